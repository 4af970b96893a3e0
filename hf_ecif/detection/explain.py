"""Why a row was flagged, in words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
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
from hf_ecif.utils.formatting import nats, share

CAPTION_LENGTH = 80  # of a caption that is quoted
ROWS_NAMED = 3
TELLING = 0.9  # share of the pairs that neighbours speak less against


@dataclass(frozen=True)
class Ranks:
    """Signals of the rows that others are ranked among, ``(N,)`` each, ascending.

    Attributes:
        loo_loss: losses without the row itself, in nats.
        image_neighbours: as in `Signals`; likewise ``text_neighbours``.
    """

    loo_loss: Floats
    image_neighbours: Floats
    text_neighbours: Floats

    @classmethod
    def of(cls, scores: Scores, signals: Signals) -> Ranks:
        """The ranks of rows among themselves."""
        values = (scores.loo_loss, signals.image_neighbours, signals.text_neighbours)
        return cls(*(np.sort(_numbers(value)) for value in values))


def explain_flags(
    rows: Rows,
    scores: Scores,
    signals: Signals,
    detection: Detection,
    evidence: Evidence | None = None,
    findings: Findings | None = None,
    ranks: Ranks | None = None,
) -> list[str | None]:
    """A verdict and facts for every flagged row of the readable ones, None for the others.

    Facts are parted by semicolons, and the most telling ones come first.

    Args:
        rows: the readable rows.
        scores: of these rows.
        signals: of these rows.
        detection: of these rows.
        evidence: of these rows; without it, no other row is named.
        findings: of these rows; without them, there are none.
        ranks: of the rows that these are ranked among; themselves if absent.
    """
    among = ranks or Ranks.of(scores, signals)
    rank = _share_below(scores.loo_loss, among.loo_loss)
    captions = _share_below(signals.image_neighbours, among.image_neighbours)
    images = _share_below(signals.text_neighbours, among.text_neighbours)
    apart = [("caption", "similar images", captions), ("image", "similar captions", images)]
    duplicates: Iterable[SharedRows] = ()
    if evidence is not None:
        own = rows.positions.numpy()
        duplicates = SharedRows.of_both(evidence.same_image, evidence.same_caption, own)

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
        yield f"held out, its loss is in the top {100 - int(100 * rank[row])} %"
        for own, like, below in apart:
            if below[row] >= TELLING:
                yield (
                    f"its {own} is farther from the {own}s of {like} than that of "
                    f"{int(100 * below[row])} % of the pairs"
                )
        for kind in duplicates:
            yield from kind.of(row)
        role = scores.positive[row].item()
        effect = "raises" if role < 0 else "lowers"
        yield f"as a positive it {effect} the query's loss by {nats(abs(role))} nats"

    return [
        empty(row)
        or f"{'probably' if probability > 0.5 else 'possibly'} misaligned "
        f"({share(probability)}{', borderline' if near else ''}): {'; '.join(clauses(row))}"
        if flag
        else None
        for row, (flag, near, probability) in enumerate(
            zip(detection.flag, detection.borderline, detection.probability, strict=True)
        )
    ]


def _share_below(values: Tensor, among: Floats) -> Floats:
    """Share of the ascending ones that are smaller, ``(n,)``."""
    return np.searchsorted(among, _numbers(values), side="left") / len(among)


def _numbers(values: Tensor) -> Floats:
    return np.asarray(values.double().cpu().numpy())


def _misfit(row: int, evidence: Evidence) -> Iterator[str]:
    words, text = evidence.wrong_words[row], evidence.better_text[row]
    if words:
        yield f"its image contradicts {', '.join(_quote(word.text) for word in words)}"
    count = evidence.better_images[row]
    if count > 0:
        yield f"its caption fits {count} other image{'s' if count > 1 else ''} better"
    if text is not None:
        source = evidence.better_row[row]
        whose = f"the caption of row {source}" if source >= 0 else "another caption"
        yield f"the model prefers {whose} for its image ({_quote(text)})"


def _quote(text: str) -> str:
    """A caption in quotes, without the sign that parts the facts."""
    return f"'{shorten(text, CAPTION_LENGTH, placeholder='…').replace(';', ',')}'"


class SharedRows:
    """Which other rows have the image, or the caption, of a row.

    Args:
        words: how that is said.
        firsts: ``(n,)``, number of the first row that has it, for every readable row.
        positions: ``(n,)``, numbers of the readable rows, ascending.
    """

    def __init__(self, words: str, firsts: Numbers, positions: Numbers) -> None:
        self._words, self._firsts, self._positions = words, firsts, positions
        self._order = np.argsort(firsts, kind="stable")
        self._sorted = firsts[self._order]

    @classmethod
    def of_both(
        cls, same_image: Numbers, same_caption: Numbers, positions: Numbers
    ) -> tuple[SharedRows, SharedRows]:
        """By image and by caption."""
        return (
            cls("image is nearly", same_image, positions),
            cls("caption is also", same_caption, positions),
        )

    def of(self, row: int) -> Iterator[str]:
        """The clause of a readable row, if others share with it."""
        start, stop = (
            int(np.searchsorted(self._sorted, self._firsts[row], side=side))
            for side in ("left", "right")
        )
        others = stop - start - 1
        if others:
            members = self._positions[self._order[start:stop][: ROWS_NAMED + 1]].tolist()
            named = [member for member in members if member != self._positions[row]][:ROWS_NAMED]
            more = f" and {others - len(named)} more" if others > len(named) else ""
            plural = "rows" if others > 1 else "row"
            yield f"its {self._words} that of {plural} {', '.join(map(str, named))}{more}"
