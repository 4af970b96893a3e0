"""What is the matter with rows beside being misaligned: each finding with examples and a remedy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hf_ecif.data.captions import plain
from hf_ecif.data.findings import Kind, flagged_kinds
from hf_ecif.data.scored_rows import Card, ScoredRows
from hf_ecif.data.summary import Summary
from hf_ecif.utils.formatting import number, shorten

Numbers = NDArray[np.int64]
GROUPS, EXAMPLES = 4, 6  # shown of a finding, and of one of its groups
LABEL_LENGTH = 60
KEEP_FIRST = """\
scored = load_dataset("OUT/scored", split="train")
first = scored.filter(lambda group, row: group in (None, row),
                      input_columns="ecif_duplicate_group", with_indices=True)"""


@dataclass(frozen=True)
class Examples:
    """Rows that belong together; the label is empty where there is nothing to say of them."""

    label: str
    cards: list[Card]


@dataclass(frozen=True)
class Finding:
    """One kind of finding.

    Attributes:
        name: of the kind, as an anchor.
        title: in words.
        count: rows with it.
        note: further counts; empty where there are none.
        meaning: what it is, and what the audit made of it.
        advice: what to do about it.
        command: for that; None where there is none.
        groups: examples.
    """

    name: str
    title: str
    count: int
    note: str
    meaning: str
    advice: str
    command: str | None
    groups: list[Examples]


_WORDS: dict[Kind, tuple[str, str, str]] = {  # title, meaning, advice
    "stock_phrase": (
        "Stock phrases",
        "One caption stands under many images that have nothing in common: true of all of them or "
        "of none, it teaches little.",
        "Leave these rows out, or write captions that tell their images apart.",
    ),
    "placeholder_image": (
        "Placeholder images",
        "One image stands under many captions that have nothing in common: most often a picture "
        "that says 'not available', or a logo. At most one of its captions can be right.",
        "Leave these rows out.",
    ),
    "says_nothing": (
        "Captions that say nothing",
        "A file name, an address, a number, or a word such as 'image'.",
        "Leave these rows out, or caption them anew.",
    ),
    "unknown_script": (
        "A script that the model cannot read",
        "The tokenizer breaks these captions into unknown pieces, so the model does not know what "
        "they say. The audit cannot judge them.",
        "Audit these rows with a model that reads their script.",
    ),
    "truncated_equal": (
        "Captions that are equal as far as the model reads",
        "They differ only beyond the model's limit of tokens, so to the model they are one.",
        "Put first what tells them apart, or use a model that reads longer captions.",
    ),
}


def find_examples(rows: ScoredRows, summary: Summary) -> list[Finding]:
    """All kinds that were found, with examples; none of an audit that found nothing."""
    kinds = rows.strings("ecif_finding")
    flagged = () if summary.noise.abstains else flagged_kinds(summary.findings, summary.scored)
    found = [
        _of_kind(kind, np.flatnonzero(kinds == kind), rows, kind in flagged) for kind in _WORDS
    ]
    found += [_of_truncated(rows), _of_duplicates(rows), _of_unreadable(rows, summary)]
    return [finding for finding in found if finding.count]


def _of_kind(kind: Kind, here: Numbers, rows: ScoredRows, is_flagged: bool) -> Finding:
    """A finding of the audit, its examples by what they have in common."""
    title, meaning, advice = _WORDS[kind]
    common: list[object] = [None] * len(here)
    if kind in ("stock_phrase", "truncated_equal"):
        common = [plain(text) for text in rows.captions(here)]
    elif kind == "placeholder_image":
        common = rows.duplicate[here].tolist()
    many = len(set(common))
    note = f"{number(many)} different ones" if 1 < many < len(here) else ""
    verdict = "are flagged" if is_flagged else "are not flagged for that"
    return Finding(
        name=kind,
        title=title,
        count=len(here),
        note=note,
        meaning=f"{meaning} These rows {verdict}, and are no evidence for others.",
        advice=advice,
        command=f"hf-ecif clean OUT --findings {kind} --output CLEAN"
        if kind != "unknown_script"
        else None,
        groups=_groups(here, common, rows, quoted=kind == "stock_phrase"),
    )


def _of_truncated(rows: ScoredRows) -> Finding:
    here = np.flatnonzero(rows.is_true("caption_truncated"))
    return Finding(
        name="truncated",
        title="Captions that are cut off",
        count=len(here),
        note="",
        meaning="They are longer than the model reads. What is beyond its limit is not judged.",
        advice="Nothing, if what matters comes first; else a model that reads longer captions.",
        command=None,
        groups=_groups(here, [None] * len(here), rows),
    )


def _of_duplicates(rows: ScoredRows) -> Finding:
    here = np.flatnonzero(np.isfinite(rows.duplicate))
    groups = rows.duplicate[here]
    sizes = np.unique(groups, return_counts=True)[1]
    largest = f", the largest of {number(int(sizes.max()))} rows" if len(sizes) else ""
    return Finding(
        name="duplicates",
        title="Duplicates",
        count=len(here),
        note=f"in {number(len(sizes))} {'group' if len(sizes) == 1 else 'groups'}{largest}",
        meaning="Rows with nearly the same image or the same caption. Rows of a group are no "
        "negatives of each other, and no evidence for each other.",
        advice="Nothing for the audit. To keep the first row of each group alone, in Python:",
        command=KEEP_FIRST if len(here) else None,
        groups=_groups(here, groups.tolist(), rows),
    )


def _of_unreadable(rows: ScoredRows, summary: Summary) -> Finding:
    here = np.array(rows.unreadable_rows, dtype=np.int64)
    reasons = [str(reason) for reason in rows.strings("ecif_reason")[here]]
    many = len(summary.unreadable_reasons)
    return Finding(
        name="unreadable",
        title="Rows that cannot be read",
        count=len(here),
        note=f"for {number(many)} different reasons" if many > 1 else "",
        meaning="They have no score, and are removed by every cleaning.",
        advice="Mend them in the source, or leave them out.",
        command="hf-ecif clean OUT --output CLEAN",
        groups=_groups(here, reasons, rows, labelled=True),
    )


def _groups(
    here: Numbers,
    common: Sequence[object],
    rows: ScoredRows,
    quoted: bool = False,
    labelled: bool = False,
) -> list[Examples]:
    """Examples of the largest groups of rows that have something in common.

    Args:
        here: row numbers.
        common: what each of these rows has in common with others.
        rows: all rows.
        quoted: whether a group is named by the caption of its first row.
        labelled: whether it is named by what is common.
    """
    found = []
    for value, count in Counter(common).most_common(GROUPS):
        members = [row for row, one in zip(here.tolist(), common, strict=True) if one == value]
        cards = [rows.card(row) for row in members[:EXAMPLES]]
        told = f"\u201c{cards[0].caption}\u201d" if quoted else str(value) if labelled else ""
        label = f"{shorten(told, LABEL_LENGTH)}, {number(count)} rows" if told else ""
        if value is not None and not told:
            label = f"{number(count)} rows"
        found.append(Examples(label, cards))
    return found
