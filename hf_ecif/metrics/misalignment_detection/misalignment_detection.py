"""How well a score of suspicion finds misaligned image-text pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import evaluate
import numpy as np
from datasets import Features, Value
from numpy.typing import NDArray
from sklearn.metrics import average_precision_score, roc_auc_score

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

_DESCRIPTION = """
How well a suspicion score finds misaligned image-text pairs: the areas under the ROC and the
precision-recall curve, the precision among the most suspicious pairs, the best F1 over all
thresholds, and the results at a given threshold.
"""

_INPUTS = """
Args:
    predictions: one number per pair; higher is more suspicious.
    references: whether the pair is misaligned, as booleans or as 0 and 1.
    threshold: pairs at or above it are flagged; without it, there are no results on flags.
    k: number of most suspicious pairs for precision_at_k; 20 by default.

Returns:
    auroc, auprc, precision_at_k, best_f1: in [0, 1]; higher is better.
    best_threshold: the threshold of best_f1, the highest if there are several.
    f1, precision, recall: at the given threshold, in [0, 1].
    rows, misaligned, k: numbers of pairs; k is at most the number of rows.
    undefined: for every result above that is None, the reason by its name.

Raises:
    ValueError: a prediction is missing or not finite, or a reference is neither 0 nor 1.
"""

_CITATION = """
@article{fawcett2006introduction,
  title = {An introduction to {ROC} analysis},
  author = {Fawcett, Tom},
  journal = {Pattern Recognition Letters},
  volume = {27}, number = {8}, pages = {861--874}, year = {2006}
}
"""


class MisalignmentDetection(evaluate.Metric):
    """Areas under curves, precision at the top of the ranking, and results at a threshold."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            # As an integer, a reference of 0.5 would silently become 0.
            features=Features(predictions=Value("float64"), references=Value("float64")),
        )

    def _compute(  # type: ignore[override]  # evaluate calls it with the names of the features
        self,
        predictions: Sequence[float | None],
        references: Sequence[float | None],
        threshold: float | None = None,
        k: int = 20,
    ) -> dict[str, Any]:
        suspicion, wrong = _check(predictions, references)
        if k < 1:
            raise ValueError(f"k = {k}: must be at least 1.")
        undefined: dict[str, str] = {}
        results = {
            "rows": len(wrong),
            "misaligned": int(wrong.sum()),
            **_curves(suspicion, wrong, undefined),
            **_best_f1(suspicion, wrong, undefined),
            "k": min(k, len(wrong)),
            "precision_at_k": _precision_at(min(k, len(wrong)), suspicion, wrong),
        }
        if threshold is not None:
            results |= _at_threshold(suspicion >= threshold, wrong, undefined)
        return results | {"undefined": undefined}


def _check(
    predictions: Sequence[float | None], references: Sequence[float | None]
) -> tuple[Floats, Flags]:
    suspicion = np.array(predictions, dtype=np.float64)  # None becomes nan
    truth = np.array(references, dtype=np.float64)
    if not len(suspicion):
        raise ValueError("There are no predictions: give at least one pair.")
    for row in np.flatnonzero(~np.isfinite(suspicion))[:1]:
        raise ValueError(
            f"predictions[{row}] is {predictions[row]}: every pair needs a finite number. Leave "
            "out the pairs that could not be scored, here and in the references."
        )
    for row in np.flatnonzero((truth != 0) & (truth != 1))[:1]:
        raise ValueError(
            f"references[{row}] is {references[row]}: must be true or 1 where the pair is "
            "misaligned, false or 0 where it is not."
        )
    return suspicion, truth == 1


def _curves(suspicion: Floats, wrong: Flags, undefined: dict[str, str]) -> dict[str, float | None]:
    if not wrong.any():
        undefined |= dict.fromkeys(("auroc", "auprc"), "no pair is misaligned")
        return {"auroc": None, "auprc": None}
    if wrong.all():
        undefined["auroc"] = "every pair is misaligned"
    return {
        "auroc": None if wrong.all() else float(roc_auc_score(wrong, suspicion)),
        "auprc": float(average_precision_score(wrong, suspicion)),
    }


def _best_f1(suspicion: Floats, wrong: Flags, undefined: dict[str, str]) -> dict[str, float | None]:
    if not wrong.any():
        undefined |= dict.fromkeys(("best_f1", "best_threshold"), "no pair is misaligned")
        return {"best_f1": None, "best_threshold": None}
    thresholds = np.unique(suspicion)[::-1]
    flagged = _count_from(thresholds, suspicion)
    found = _count_from(thresholds, suspicion[wrong])
    f1 = 2 * found / (wrong.sum() + flagged)
    best = int(f1.argmax())
    return {"best_f1": float(f1[best]), "best_threshold": float(thresholds[best])}


def _count_from(thresholds: Floats, values: Floats) -> NDArray[np.int64]:
    """Number of values at or above each threshold."""
    return len(values) - np.searchsorted(np.sort(values), thresholds, side="left")


def _precision_at(k: int, suspicion: Floats, wrong: Flags) -> float:
    """Precision among the top ``k``, averaged over the orders of tied pairs at its end."""
    last = np.sort(suspicion)[-k]
    above, tied = suspicion > last, suspicion == last
    return float((wrong[above].sum() + (k - above.sum()) * wrong[tied].mean()) / k)


def _at_threshold(flag: Flags, wrong: Flags, undefined: dict[str, str]) -> dict[str, float | None]:
    found, flagged, misaligned = (int(x.sum()) for x in (flag & wrong, flag, wrong))
    if not flagged:
        undefined["precision"] = "no pair is flagged"
    if not misaligned:
        undefined["recall"] = "no pair is misaligned"
    if not flagged + misaligned:
        undefined["f1"] = "no pair is misaligned, and none is flagged"
    return {
        "precision": found / flagged if flagged else None,
        "recall": found / misaligned if misaligned else None,
        "f1": 2 * found / (flagged + misaligned) if flagged + misaligned else None,
    }
