"""What a detection keeps, relabels and removes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from hf_ecif.config import Strategy
from hf_ecif.data.columns import set_column
from hf_ecif.data.findings import KINDS, MEANINGS, Kind
from hf_ecif.data.schema import require_text
from hf_ecif.errors import UserError
from hf_ecif.utils import formatting

Bools = NDArray[np.bool_]


WEIGHT = "ecif_weight"


ORIGINAL_TEXT = "ecif_original_text"
SUGGESTED_PROBABILITY = "ecif_suggested_probability"
UNTRAINED, BEFORE = "not fine-tuned", "all rows"  # versions that every cleaning is compared with


NEEDED = {
    "worst": ("ecif_noise_probability", "ecif_score"),
    "weight": ("ecif_noise_probability",),
    "relabel": ("ecif_suggested_text", SUGGESTED_PROBABILITY),
}


@dataclass(frozen=True)
class CleanResult:
    """A data set in two parts, which together are all of its rows.

    Attributes:
        kept: Rows to go on with.
        removed: The others, each with its `ecif_reason`.
    """

    kept: Dataset
    removed: Dataset

    @property
    def expected_right(self) -> float | None:
        """How many of the new captions are right, by their probabilities; None where unknown."""
        rows = self.kept
        if not {ORIGINAL_TEXT, SUGGESTED_PROBABILITY} <= set(rows.column_names):
            return None
        plain = rows.with_format(None)
        pairs = zip(plain[ORIGINAL_TEXT][:], plain[SUGGESTED_PROBABILITY][:], strict=True)
        chances = [chance for original, chance in pairs if original is not None]
        return None if None in chances else float(sum(chances))

    def counts(self) -> dict[str, int]:
        """Rows by what became of them; those kept include those relabelled."""
        flags = self.removed.with_format(None)["ecif_flag"][:]
        counts = {"kept": len(self.kept)}
        if ORIGINAL_TEXT in self.kept.column_names:
            originals = self.kept.with_format(None)[ORIGINAL_TEXT][:]
            counts["relabelled"] = sum(text is not None for text in originals)
        return counts | {
            "removed": len(flags),
            "removed_flagged": sum(flag is True for flag in flags),
            "removed_not_flagged": sum(flag is False for flag in flags),
            "removed_unreadable": sum(flag is None for flag in flags),
        }

    def removed_findings(self) -> dict[str, int]:
        """Removed rows by their finding; those without one are not counted."""
        if "ecif_finding" not in self.removed.column_names:
            return {}
        found = Counter(self.removed.with_format(None)["ecif_finding"][:])
        return {kind: found[kind] for kind in KINDS if found[kind]}


def clean(
    scored: Dataset,
    strategy: Strategy = "drop",
    *,
    share: float | None = None,
    findings: Collection[Kind] | None = None,
    text_column: str = "text",
    name_column: str | None = None,
) -> CleanResult:
    """Part a scored data set into the rows to keep and the rows to remove.

    ``drop`` removes the flagged rows, ``worst`` the ``share`` of the scored rows with the highest
    `ecif_noise_probability`, of equal ones those with the lowest `ecif_score`. ``relabel`` gives
    flagged rows their `ecif_suggested_text`, keeps the old caption as `ecif_original_text`, and
    removes those without a suggestion. All three remove what could not be scored. ``weight``
    removes nothing: `ecif_weight` is 1 - `ecif_noise_probability`, 0 of what could not be scored,
    and 1 where the model cannot tell.

    Args:
        scored: Rows with the influence columns; null in `ecif_flag` where a row could not be
            scored, null in `ecif_reason` where it is not flagged.
        strategy: What becomes of suspicious rows.
        share: In (0, 1), for ``worst`` alone.
        findings: Rows with an `ecif_finding` of these kinds are removed, too, and those of other
            kinds are not, whatever their flag, but for rows that a person has judged. If absent,
            findings count as their flags say.
        text_column: Of the captions, for ``relabel`` alone.
        name_column: What captions were made of, classes for instance. It is relabelled, too, and a
            row whose suggestion is no caption of it is removed.

    Raises:
        UserError: If a column is missing, the data have been cleaned already, the share is none,
            or a row would be removed without a reason.

    Examples:
        >>> import hf_ecif
        >>> demo = hf_ecif.load_demo()
        >>> pairs = demo.dataset.select(range(60))
        >>> quick = hf_ecif.InfluenceConfig(fit_epochs=1, probes=2, partitions=2)
        >>> audit = hf_ecif.audit(demo.model, pairs, demo.query, config=quick)
        >>> parts = hf_ecif.clean(audit.dataset, "weight")
        >>> len(parts.kept), "ecif_weight" in parts.kept.column_names
        (60, True)
    """
    _check(scored, strategy, share, text_column, findings)
    decided, remove_found = _by_findings(scored, findings)
    cleaned, remove = _by_strategy(scored, strategy, share, text_column, name_column, ~decided)
    return _part(_name_findings(cleaned, remove_found), np.where(decided, remove_found, remove))


def _by_strategy(
    scored: Dataset,
    strategy: Strategy,
    share: float | None,
    text_column: str,
    name_column: str | None,
    among: Bools,
) -> tuple[Dataset, Bools]:
    """The rows as the strategy leaves them, and which of those that it decides on go."""
    if strategy == "worst" and share is not None:
        return _mark_worst(scored, share, among)
    if strategy == "weight":
        return _add_weight(scored), np.zeros(len(scored), dtype=bool)
    flags = _column(scored, "ecif_flag")
    suspicious = np.array([flag is None or flag for flag in flags], dtype=bool)
    if strategy == "relabel":
        # A caption of which it is not known how likely it is right, is no suggestion.
        both = zip(
            _column(scored, "ecif_suggested_text"),
            _column(scored, SUGGESTED_PROBABILITY),
            strict=True,
        )
        has_other = np.array([None not in pair for pair in both], dtype=bool)
        relabelled = np.array([flag is True for flag in flags], dtype=bool) & has_other & among
        if name_column in scored.column_names and name_column != text_column:
            scored, relabelled = _rename(scored, relabelled, text_column, name_column)
        return _relabel(scored, relabelled, text_column), suspicious & ~relabelled
    return scored, suspicious


def _by_findings(scored: Dataset, findings: Collection[Kind] | None) -> tuple[Bools, Bools]:
    """Rows that their finding decides on, ``(N,)`` booleans, and those of them that go.

    It does not where a person has judged the pair, which is then certain, or where it could not be
    read.
    """
    nothing = np.zeros(len(scored), dtype=bool)
    if findings is None:
        return nothing, nothing
    kinds, flags, chances = (
        _column(scored, name) for name in ("ecif_finding", "ecif_flag", "ecif_noise_probability")
    )
    decided = np.array(
        [
            kind is not None and flag is not None and chance not in (0.0, 1.0)
            for kind, flag, chance in zip(kinds, flags, chances, strict=True)
        ],
        dtype=bool,
    )
    return decided, decided & np.array([kind in findings for kind in kinds], dtype=bool)


def _name_findings(scored: Dataset, removed: Bools) -> Dataset:
    """The rows, with a reason for each that goes for its finding and has none."""
    if not removed.any():
        return scored
    kinds, reasons = _column(scored, "ecif_finding"), _column(scored, "ecif_reason")
    for row in np.flatnonzero(removed).tolist():
        reasons[row] = reasons[row] or f"{MEANINGS[kinds[row]]} ({kinds[row]}); not flagged"
    return set_column(scored, "ecif_reason", reasons)


def _check(
    scored: Dataset,
    strategy: str,
    share: float | None,
    text_column: str,
    findings: Collection[Kind] | None,
) -> None:
    if strategy not in get_args(Strategy):
        raise UserError(f"`strategy={strategy}`: must be one of {', '.join(get_args(Strategy))}.")
    of_findings = () if findings is None else ("ecif_finding", "ecif_noise_probability")
    for column in ("ecif_flag", "ecif_reason", *NEEDED.get(strategy, ()), *of_findings):
        if column not in scored.column_names:
            raise UserError(
                f"There is no column {column!r}. Run 'hf-ecif audit' first, and clean its output."
            )
    if strategy == "relabel" and text_column not in scored.column_names:
        raise UserError(
            f"There is no text column {text_column!r} to relabel. The columns are: "
            f"{', '.join(scored.column_names)}. Name the right one with `text_column`."
        )
    if strategy == "relabel":
        require_text(scored.features, text_column)
    cleaned = {ORIGINAL_TEXT, WEIGHT} & set(scored.column_names)
    if cleaned:
        raise UserError(
            f"These rows have been cleaned before: they have {', '.join(sorted(cleaned))}. Clean "
            "the rows of the audit, its folder 'scored'."
        )
    if strategy == "worst" and (share is None or not 0 < share < 1):
        raise UserError(f"share = {share}: the strategy worst needs one between 0 and 1.")
    if strategy != "worst" and share is not None:
        raise UserError(f"share = {share}: only the strategy worst takes one.")


def _part(scored: Dataset, remove: Bools) -> CleanResult:
    reasons = _column(scored, "ecif_reason")
    unexplained = [row for row in np.flatnonzero(remove).tolist() if not reasons[row]]
    if unexplained:
        raise UserError(
            f"{len(unexplained)} rows would be removed without an 'ecif_reason', the first of them "
            f"row {unexplained[0]}. Run detect again, and clean what it returns."
        )
    kept, removed = (scored.select(np.flatnonzero(part)) for part in (~remove, remove))
    assert len(kept) + len(removed) == len(scored)
    return CleanResult(kept=kept, removed=removed)


def _mark_worst(scored: Dataset, share: float, among: Bools) -> tuple[Dataset, Bools]:
    """The rows with a reason for each that goes, and which go."""
    probability, score = (
        np.array(_column(scored, name), dtype=float)  # null becomes not-a-number
        for name in ("ecif_noise_probability", "ecif_score")
    )
    remove = np.array([flag is None for flag in _column(scored, "ecif_flag")], dtype=bool)
    if np.isnan(probability[~remove]).any():
        raise UserError(
            "The model cannot tell right from wrong pairs here, so the audit gives no "
            "probabilities, and there are no worst rows to remove. Its report says what to do."
        )
    order = np.lexsort((score, -probability))  # not-a-number comes last
    worst = order[among[order]][: round(share * int((among & ~remove).sum()))]
    remove[worst] = True
    reasons = _column(scored, "ecif_reason")
    for row in worst.tolist():
        reasons[row] = reasons[row] or (
            f"among the worst {formatting.share(share)} of the rows, at "
            f"{formatting.share(probability[row])}; not flagged"
        )
    return set_column(scored, "ecif_reason", reasons), remove


def _add_weight(scored: Dataset) -> Dataset:
    """Rows that the audit has no probability of, though it could read them, keep their weight."""
    cells = zip(
        _column(scored, "ecif_flag"), _column(scored, "ecif_noise_probability"), strict=True
    )
    weights = [0.0 if flag is None else 1.0 - (value or 0.0) for flag, value in cells]
    return set_column(scored, WEIGHT, weights, "float32")


def _relabel(scored: Dataset, relabelled: Bools, text_column: str) -> Dataset:
    old, new = _column(scored, text_column), _column(scored, "ecif_suggested_text")
    texts = [after if r else before for before, after, r in zip(old, new, relabelled, strict=True)]
    originals = [text if r else None for text, r in zip(old, relabelled, strict=True)]
    scored = set_column(scored, text_column, texts)
    return set_column(scored, ORIGINAL_TEXT, originals, "string")


def _rename(
    scored: Dataset, relabelled: Bools, text_column: str, name_column: str
) -> tuple[Dataset, Bools]:
    """Rows with the names that suggested captions were made of, and which rows get one."""
    names, new = _column(scored, name_column), _column(scored, "ecif_suggested_text")
    name_of = dict(zip(_column(scored, text_column), names, strict=True))
    relabelled = relabelled & np.array([text in name_of for text in new], dtype=bool)
    chosen = [
        name_of[text] if r else name for name, text, r in zip(names, new, relabelled, strict=True)
    ]
    return set_column(scored, name_column, chosen), relabelled


def _column(dataset: Dataset, name: str) -> list[Any]:
    return list(dataset.with_format(None)[name][:])
