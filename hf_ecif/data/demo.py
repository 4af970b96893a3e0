"""The embedded demo: a small CLIP, and pairs that it has never seen, a fifth of them wrong.

A checkout has it as ``spaces_demo``, a wheel as ``hf_ecif/demo``. Sources and licences of the
pictures and words stand in its ``NOTICE``.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from datasets import Dataset

from hf_ecif.data.loading import load_rows
from hf_ecif.errors import UserError

TRUTH = "is_misaligned"  # column that says which captions were exchanged


class Demo(NamedTuple):
    """A model and data to try things on, without a download.

    Attributes:
        model: folder of a CLIP of 1.7 M parameters, pretrained on three vendors' emoji.
        dataset: 1,492 pairs of a fourth vendor; ``is_misaligned`` says which fifth is wrong.
        query: 200 clean pairs.
        test: 200 more.

    Example:
        >>> import hf_ecif
        >>> model, dataset, query, test = hf_ecif.load_demo()
        >>> len(dataset), len(query), len(test)
        (1492, 200, 200)
    """

    model: str
    dataset: Dataset
    query: Dataset
    test: Dataset


def load_demo() -> Demo:
    """A model, pairs of which a fifth is wrong, and clean pairs as query and test.

    Raises:
        UserError: the demo has been removed from the installation.

    Example:
        >>> import hf_ecif
        >>> hf_ecif.load_demo().dataset["text"][0]
        'woman elf, magic, magical, enchantment'
    """
    folder = demo_folder()
    splits = (load_rows(str(folder / "data"), name) for name in ("train", "validation", "test"))
    return Demo(str(folder / "model"), *splits)


def demo_folder() -> Path:
    """Folder with the demo's ``model``, ``data`` and ``audit``.

    Raises:
        UserError: it has been removed from the installation.
    """
    packed, checkout = Path(__file__).parents[1] / "demo", Path(__file__).parents[2] / "spaces_demo"
    for folder in (packed, checkout):
        if (folder / "model").is_dir():
            return folder
    raise UserError(f"The demo is not in {packed}. Install hf_ecif again.")
