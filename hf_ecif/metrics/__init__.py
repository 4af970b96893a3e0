"""Metrics of this field as `evaluate` modules, each a folder with a card that explains it.

    recall = hf_ecif.metrics.load("retrieval_recall")
    recall.compute(text_embeddings=texts, image_embeddings=images)

Every folder works by itself: ``evaluate.load`` also takes its path, or the path of a copy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hf_ecif.errors import UserError

_FOLDER = Path(__file__).parent


def names() -> list[str]:
    """Names of all metrics.

    >>> names()
    ['linear_datamodeling_score', 'misalignment_detection', 'retrieval_recall']
    """
    return sorted(path.parent.name for path in _FOLDER.glob("*/README.md"))


def load(name: str, **options: Any) -> Any:
    """A metric, loaded without network.

    Args:
        name: one of `names`.
        options: arguments of ``evaluate.load``, such as ``keep_in_memory=True``.

    Returns:
        An ``evaluate.Metric``; its ``compute`` is explained by the card in its folder.

    Raises:
        UserError: there is no such metric.
    """
    if name not in names():
        raise UserError(f"There is no metric {name!r}. Choose one of: {', '.join(names())}.")
    import evaluate  # slow, and not needed for the names

    return evaluate.load(str(_FOLDER / name), **options)
