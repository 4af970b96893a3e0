"""A person's decisions on an audit: pairs to keep, to remove and to recaption.

A `Review` is a log of decisions and a threshold, both to be undone and saved. `apply_review` parts
an audit's rows anew by it, into a folder that is an audit again: it can be opened, reported on and
pushed like the one it came from.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Literal, get_args

import numpy as np
from datasets import Dataset

from hf_ecif.data.cleaning import ORIGINAL_TEXT, CleanResult
from hf_ecif.data.columns import set_column
from hf_ecif.errors import UserError
from hf_ecif.utils.formatting import Bools, share

Action = Literal["keep", "remove", "recaption"]


DECISION = "ecif_decision"


MAX_CAPTION = 10_000


@dataclass(frozen=True)
class Decision:
    """Decision on a row.

    Attributes:
        row: number of the row.
        action: keep it, remove it, or keep it with another caption.
        text: the new caption; None for the other actions.
    """

    row: int
    action: Action
    text: str | None = None

    def __post_init__(self) -> None:
        if self.action not in get_args(Action):
            raise UserError(f"{self.action!r}: must be one of {', '.join(get_args(Action))}.")
        if not isinstance(self.row, int) or self.row < 0:
            raise UserError(f"{self.row!r} is no number of a row.")
        if (self.action == "recaption") != bool(self.text and self.text.strip()):
            raise UserError("A new caption needs words, and only a new caption takes them.")
        if self.text and len(self.text) > MAX_CAPTION:
            raise UserError(f"A caption may have {MAX_CAPTION:,} characters at most.")


@dataclass(frozen=True)
class Review:
    """Decisions in the order in which they were made; the last one on a row counts.

    >>> review = Review().decide(Decision(3, "remove")).decide(Decision(3, "keep"))
    >>> review.current[3].action, review.undo().current[3].action
    ('keep', 'remove')

    Attributes:
        log: all decisions.
        threshold: probability from which a row is flagged; the audit's if None.
    """

    log: tuple[Decision, ...] = ()
    threshold: float | None = None

    @property
    def current(self) -> dict[int, Decision]:
        """Valid decision on every row that has one."""
        return {decision.row: decision for decision in self.log}

    def decide(self, decision: Decision) -> Review:
        """Review with one more decision."""
        return replace(self, log=(*self.log, decision))

    def undo(self) -> Review:
        """Review without the last decision."""
        return replace(self, log=self.log[:-1])

    def counts(self) -> dict[str, int]:
        """Number of rows by decision."""
        found = Counter(decision.action for decision in self.current.values())
        return {action: found[action] for action in get_args(Action)}

    def to_json(self) -> str:
        """JSON text, which `from_json` reads."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Review:
        """Review from JSON text, which may have come through a browser.

        Raises:
            UserError: the text is not a review.
        """
        try:
            values = json.loads(text)
            log = tuple(Decision(**decision) for decision in values["log"])
            threshold = values["threshold"]
            return cls(log, None if threshold is None else float(threshold))
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"These are no saved decisions: {error}.") from error


def part_by_review(
    scored: Dataset, review: Review, *, threshold: float, text_column: str = "text"
) -> tuple[Dataset, CleanResult]:
    """All rows of an audit with the decisions on them, and the kept and removed rows.

    A row without a decision is removed if it is flagged or was not scored.

    Args:
        scored: rows with influence columns.
        review: the decisions; its threshold sets the flags.
        threshold: threshold of the audit, used if the review has none.
        text_column: column of captions.

    Raises:
        UserError: a decision is on a row that does not exist.
    """
    decisions = review.current
    beyond = [row for row in decisions if row >= len(scored)]
    if beyond:
        raise UserError(
            f"There is a decision on row {beyond[0]:,}, but the audit has {len(scored):,} rows: "
            "these decisions belong to another audit."
        )
    flags, reasons = _flags(scored, review.threshold, threshold)
    remove = np.array([flag is None or flag for flag in flags], dtype=bool)
    for row, decision in decisions.items():
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
