"""Why a row was flagged, in words."""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import shorten

import numpy as np
from torch import Tensor

from hf_ecif.data.findings import EMPTY, MEANINGS
from hf_ecif.detection.detect import Detection
from hf_ecif.detection.findings import Findings
from hf_ecif.detection.mixture import Floats
from hf_ecif.detection.signals import Signals
from hf_ecif.detection.suggestions import Evidence, Numbers
from hf_ecif.influence.rows import Rows
from hf_ecif.influence.scoring import Scores

CAPTION_LENGTH = 80  # of a caption that is quoted
ROWS_NAMED = 3
TELLING = 0.9  # share of the pairs that neighbours speak less against


def explain_flags(
    rows: Rows,
    scores: Scores,
    signals: Signals,
    detection: Detection,
    evidence: Evidence | None = None,
    findings: Findings | None = None,
) -> list[str | None]:
    """A sentence for every flagged row of the readable ones, None for the others.

    Args:
        rows: the readable rows.
        scores: of these rows.
        signals: of these rows.
        detection: of these rows.
        evidence: of these rows; without it, no other row is named.
        findings: of these rows; without them, there are none.
    """
    rank = _share_below(scores.loo_loss)
    apart = [
        ("caption", "similar images", _share_below(signals.image_neighbours)),
        ("image", "similar captions", _share_below(signals.text_neighbours)),
    ]
    duplicates = [] if evidence is None else _duplicates(evidence, rows)

    def empty(row: int) -> str | None:
        """Why a row is flagged that is as likely right as wrong, but says nothing."""
        kind = None if findings is None else findings.kinds[row]
        if findings is None or kind not in EMPTY or detection.probability[row] == 1:
            return None
        what = MEANINGS[kind]
        if kind == "stock_phrase":
            count = int(findings.images[row])
            what = f"its caption stands under {count} images that have nothing in common"
        return f"no use to learn from ({kind}), whether it is true or not: {what}"

    def clauses(row: int) -> Iterator[str]:
        if findings is not None and findings.kinds[row] == "placeholder_image":
            count = int(findings.captions[row])
            yield f"its image stands over {count} captions that have nothing in common"
        if evidence is not None:
            yield from _misfit(row, evidence)
        yield f"held out, its loss is in the top {100 - int(100 * rank[row])}%"
        for own, like, share in apart:
            if share[row] >= TELLING:
                yield (
                    f"its {own} is farther from the {own}s of {like} than that of "
                    f"{int(100 * share[row])}% of the pairs"
                )
        role = scores.positive[row].item()
        effect = "raises" if role < 0 else "lowers"
        yield f"as a positive it {effect} the query's loss by {abs(role):.1e}"
        for kind in duplicates:
            yield from kind.of(row)

    return [
        empty(row)
        or f"{'probably' if probability > 0.5 else 'possibly'} misaligned "
        f"({probability:.0%}{', borderline' if near else ''}): {'; '.join(clauses(row))}"
        if flag
        else None
        for row, (flag, near, probability) in enumerate(
            zip(detection.flag, detection.borderline, detection.probability, strict=True)
        )
    ]


def _share_below(values: Tensor) -> Floats:
    """Share of the rows with a smaller value, ``(n,)``."""
    found = values.double().cpu().numpy()
    return np.searchsorted(np.sort(found), found, side="left") / len(found)


def _misfit(row: int, evidence: Evidence) -> Iterator[str]:
    count, text = evidence.better_images[row], evidence.better_text[row]
    if count > 0:
        yield f"its caption fits {count} other image{'s' if count > 1 else ''} better"
    if text is not None:
        source = evidence.better_row[row]
        whose = f"the caption of row {source}" if source >= 0 else "the caption"
        yield f"{whose} ('{shorten(text, CAPTION_LENGTH, placeholder='…')}') fits its image better"


def _duplicates(evidence: Evidence, rows: Rows) -> list[_Duplicates]:
    return [
        _Duplicates("image is nearly", evidence.same_image, rows),
        _Duplicates("caption is also", evidence.same_caption, rows),
    ]


class _Duplicates:
    """Which other rows have the image, or the caption, of a row."""

    def __init__(self, words: str, firsts: Numbers, rows: Rows) -> None:
        self._words = words
        self._firsts = firsts.tolist()
        self._positions = rows.positions.tolist()
        self._members: dict[int, list[int]] = {}
        for position, first in zip(self._positions, self._firsts, strict=True):
            self._members.setdefault(first, []).append(position)

    def of(self, row: int) -> Iterator[str]:
        members = self._members[self._firsts[row]]
        others = len(members) - 1
        if others:
            named = [m for m in members[: ROWS_NAMED + 1] if m != self._positions[row]][:ROWS_NAMED]
            more = f" and {others - len(named)} more" if others > len(named) else ""
            plural = "rows" if others > 1 else "row"
            yield f"its {self._words} that of {plural} {', '.join(map(str, named))}{more}"
