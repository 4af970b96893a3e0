"""The embedded demo: a small CLIP, and pairs that it has never seen, a fifth of them wrong.

Sources and licences of the pictures and words stand in its ``NOTICE``.
"""

from __future__ import annotations

from typing import NamedTuple

from datasets import Dataset

from hf_ecif.data.loading import load_rows
from hf_ecif.utils.demo import demo_folder


class Demo(NamedTuple):
    """A model and data to try things on, without a download.

    Attributes:
        model: folder of a CLIP of 1.7 M parameters, pretrained on three vendors' emoji.
        dataset: 1,492 pairs of a fourth vendor; ``is_misaligned`` says which fifth is wrong.
        query: 200 clean pairs.
        test: 200 more.

    Examples:
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

    Examples:
        >>> import hf_ecif
        >>> hf_ecif.load_demo().dataset["text"][0]
        'woman elf, magic, magical, enchantment'
    """
    folder = demo_folder()
    splits = (load_rows(str(folder / "data"), name) for name in ("train", "validation", "test"))
    return Demo(str(folder / "model"), *splits)
