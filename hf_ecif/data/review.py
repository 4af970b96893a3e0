"""A person's decisions on an audit: pairs to keep, to remove, to recaption and to leave open.

A `Review` holds the decisions and a threshold; `hf_ecif.data.review_log` keeps them on disk as they
are made. `part_by_review` parts an audit's rows anew by them.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import Literal, get_args

import numpy as np
from datasets import Dataset

from hf_ecif.data.cleaning import ORIGINAL_TEXT, CleanResult
from hf_ecif.data.columns import set_column
from hf_ecif.errors import UserError
from hf_ecif.utils.formatting import Bools, share

Action = Literal["keep", "remove", "recaption", "unsure"]
ACTIONS: tuple[Action, ...] = get_args(Action)
DECISION = "ecif_decision"
MAX_CAPTION = 10_000
MAX_NOTE = 2_000


@dataclass(frozen=True)
class Decision:
    """Decision on a row.

    Attributes:
        row: number of the row.
        action: keep it, remove it, keep it with another caption, or leave it to the audit.
        text: the new caption; None for the other actions.
    """

    row: int
    action: Action
    text: str | None = None

    def __post_init__(self) -> None:
        if self.action not in ACTIONS:
            raise UserError(f"{self.action!r}: must be one of {', '.join(ACTIONS)}.")
        check_row(self.row)
        if (self.action == "recaption") != bool(self.text and self.text.strip()):
            raise UserError("A new caption needs words, and only a new caption takes them.")
        if self.text and len(self.text) > MAX_CAPTION:
            raise UserError(f"A caption may have {MAX_CAPTION:,} characters at most.")


def check_row(row: object) -> None:
    """Raises `UserError` for what is no number of a row."""
    if not isinstance(row, int) or isinstance(row, bool) or row < 0:
        raise UserError(f"{row!r} is no number of a row.")


@dataclass(frozen=True)
class Review:
    """Decisions in the order in which they were made; the last one on a row counts.

    >>> review = Review().decide(Decision(3, "remove")).decide(Decision(3, "keep"))
    >>> review.current[3].action
    'keep'

    Attributes:
        log: all decisions.
        threshold: probability from which a row is flagged; the audit's if None.
        notes: what was noted about rows, by their numbers; it stays with the decisions, and is
            written into no data.
    """

    log: tuple[Decision, ...] = ()
    threshold: float | None = None
    notes: dict[int, str] = field(default_factory=dict)

    @property
    def current(self) -> dict[int, Decision]:
        """Valid decision on every row that has one."""
        return {decision.row: decision for decision in self.log}

    def decide(self, decision: Decision) -> Review:
        """Review with one more decision."""
        return replace(self, log=(*self.log, decision))

    def counts(self) -> dict[str, int]:
        """Number of rows by decision."""
        found = Counter(decision.action for decision in self.current.values())
        return {action: found[action] for action in ACTIONS}

    def to_json(self) -> str:
        """JSON text, which `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Review:
        """Review from JSON text, as `to_json` gave it here or in version 0.1.

        Raises:
            UserError: the text is not a review.
        """
        try:
            values = json.loads(text)
            log = tuple(Decision(**decision) for decision in values["log"])
            threshold = values["threshold"]
            notes = {int(row): str(note) for row, note in values.get("notes", {}).items()}
            return cls(log, None if threshold is None else float(threshold), notes)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f"These are no saved decisions: {error}.") from error


def part_by_review(
    scored: Dataset, review: Review, *, threshold: float, text_column: str = "text"
) -> tuple[Dataset, CleanResult]:
    """All rows of an audit with the decisions on them, and the kept and removed rows.

    A row without a decision, or left open, is removed if it is flagged or was not scored.

    Args:
        scored: rows with influence columns.
        review: the decisions; its threshold sets the flags.
        threshold: threshold of the audit, used if the review has none.
        text_column: column of captions.

    Raises:
        UserError: a decision is on a row that does not exist.
    """
    decisions = review.current
    beyond = [row for row in (*decisions, *review.notes) if row >= len(scored)]
    if beyond:
        raise UserError(
            f"There is a decision on row {beyond[0]:,}, but the audit has {len(scored):,} rows: "
            "these decisions belong to another audit."
        )
    flags, reasons = _flags(scored, review.threshold, threshold)
    remove = np.array([flag is None or flag for flag in flags], dtype=bool)
    for row, decision in decisions.items():
        if decision.action == "unsure":
            continue
        if decision.action == "remove" and not remove[row]:
            reasons[row] = "removed in review"
        remove[row] = decision.action == "remove"
    scored = set_column(scored, "ecif_flag", flags)
    scored = set_column(scored, "ecif_reason", reasons)
    scored = _recaption(scored, decisions, text_column)
    actions = [decisions[row].action if row in decisions else None for row in range(len(scored))]
    scored = set_column(scored, DECISION, actions, "string")
    kept, removed = (scored.select(np.flatnonzero(part)) for part in (~remove, remove))
    return scored, CleanResult(kept=kept, removed=removed)


def is_kept(scored: Dataset) -> Bools:
    """Whether each row of an audit is kept: by a person's decision, or else by its flag."""
    plain = scored.with_format(None)
    kept = np.array([flag is False for flag in plain["ecif_flag"][:]], dtype=bool)
    if DECISION in scored.column_names:
        for row, action in enumerate(plain[DECISION][:]):
            kept[row] = kept[row] if action is None else action != "remove"
    return kept


def _flags(
    scored: Dataset, chosen: float | None, threshold: float
) -> tuple[list[bool | None], list[str | None]]:
    """Flags at a threshold, null for rows without score, and the reason of each set flag."""
    plain = scored.with_format(None)
    flags, reasons = list(plain["ecif_flag"][:]), list(plain["ecif_reason"][:])
    if chosen is None or chosen == threshold:
        return flags, reasons
    for row, probability in enumerate(plain["ecif_noise_probability"][:]):
        if probability is None:
            continue
        flags[row] = probability > chosen
        if flags[row] and not reasons[row]:
            at, cut = share(probability), share(chosen)
            reasons[row] = f"at {at}, above the threshold of the review, {cut}"
        elif not flags[row]:
            reasons[row] = None
    return flags, reasons


def _recaption(scored: Dataset, decisions: dict[int, Decision], text_column: str) -> Dataset:
    """Rows with the new captions, and the old ones in a column of their own."""
    new = {row: d.text for row, d in decisions.items() if d.action == "recaption"}
    if not new:
        return scored
    old = scored.with_format(None)[text_column][:]
    originals = [text if row in new else None for row, text in enumerate(old)]
    texts = [new.get(row, text) for row, text in enumerate(old)]
    return set_column(set_column(scored, text_column, texts), ORIGINAL_TEXT, originals, "string")
