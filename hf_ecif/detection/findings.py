"""Rows of which it makes little sense to ask whether the caption fits the image.

A sentence that stands under many different images, one picture under many different captions, a
caption that the model cannot read, or one that says nothing: each is told of as a finding of its
own. Such rows are no evidence for others. They get and give no captions when mismatches are
injected, are nobody's neighbours, and neither the noise rate nor what is right is learned from
them.

What becomes of such a row depends on whether the pair is at fault, or the model. A pair is good
training data if its caption tells its image from others. Under a *placeholder* no caption does:
of ``m`` captions that have nothing in common one can be right at most, so the pair is wrong with a
probability of at least ``1 - 1/m``, and flagged. A *stock phrase*, and a caption that says nothing,
may be true of all of their images ("an icon") or of none ("order today"), and look the same to the
model: of six phrases of either sort, on a tenth of 300 rows of the demo, the detector gave "an
icon", "symbol" and "great quality, best price" the same median probability of 0.3 on one seed, and
of 0.0 on another. So their probability of being misaligned is even. But true or not, they teach a
contrastive model nothing, or worse, make negatives of images that they are true of, too: they are
flagged, and the reason is that they say nothing, not that they are misaligned. Where more than a
quarter of the rows are so, it is how these data are captioned; to flag them would discard the data
set for what may be true, and they are told of alone. A caption that the *model* cannot read, or
cannot tell from others, is no fault of the pair: it is as likely wrong as any, its probability is
the noise rate, and it is not flagged. `hf-ecif clean --findings` overrules all this, kind by kind.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from hf_ecif.data.captions import plain, says_nothing
from hf_ecif.data.findings import EMPTY, KINDS, MEANINGS, Kind, flagged_kinds
from hf_ecif.detection.detect import UNKNOWN, Detection, Verdicts
from hf_ecif.engine.objectives import Embeddings
from hf_ecif.influence.keys import firsts
from hf_ecif.influence.rows import Rows

# So many different captions make an image a placeholder, so many images a caption a stock phrase.
# With fewer, it cannot be told whether they have something in common: of five captions of an image
# of the demo, one in twenty sets has no more than 2.5 standard errors allow to chance.
FEWEST_IN_COMMON = 10
CHANCE = 2.5  # standard errors
EVEN = 0.5  # probability of what is neither right nor wrong
FEWEST_LEFT = 20  # rows without a finding; with fewer, there is no evidence but theirs


@dataclass(frozen=True)
class Findings:
    """What was found in ``n`` rows.

    Attributes:
        kinds: one for every row, None where there is nothing to tell.
        images: ``(n,)``, different images that the row's caption stands under.
        captions: ``(n,)``, different captions that stand under the row's image.
        truncated: ``(n,)`` booleans, whether the caption is longer than the model reads.
        known_flagged: `flagged`, where that is known from other rows; these tell it if absent.
    """

    kinds: list[Kind | None]
    images: Tensor
    captions: Tensor
    truncated: Tensor
    known_flagged: tuple[Kind, ...] | None = None

    def are(self, *kinds: Kind) -> Tensor:
        """``(n,)`` booleans, true for rows of some kinds."""
        return torch.tensor([kind in kinds for kind in self.kinds], dtype=torch.bool)

    @property
    def mute(self) -> Tensor:
        """``(n,)`` booleans, true for rows that are no evidence; none where few others are left."""
        found = self.are(*KINDS)
        return found & (len(found) - found.sum() >= FEWEST_LEFT)

    @property
    def flagged(self) -> tuple[Kind, ...]:
        """Kinds whose rows are flagged; see the module's docstring."""
        if self.known_flagged is not None:
            return self.known_flagged
        return flagged_kinds(self.counts(), len(self.kinds))

    def counts(self) -> dict[str, int]:
        """Rows of every kind, and those with a caption that is cut off."""
        counts = Counter(kind for kind in self.kinds if kind is not None)
        return {kind: counts[kind] for kind in KINDS} | {"truncated": int(self.truncated.sum())}


def find_findings(rows: Rows, given: Embeddings) -> Findings:
    """Look for all kinds; a row of several is of the first in the order of `KINDS`.

    Args:
        rows: the data. Copies count once; images count as equal if all of their pixels are.
        given: their embeddings by the model as given, ``(n, d)``.
    """
    keys = rows.keys
    images, is_stock = _stand_under(keys.captions, keys.images, given.text, given.image)
    captions, is_placeholder = _stand_under(keys.images, keys.captions, given.image, given.text)
    marks: dict[Kind, Tensor] = {
        "placeholder_image": is_placeholder,
        "truncated_equal": keys.truncated & _hides_others(rows),
        "unknown_script": keys.unknown_script,
        "says_nothing": torch.tensor([says_nothing(text) for text in rows.texts]),
        "stock_phrase": is_stock,
    }
    kinds = first_kind([marks[kind] for kind in KINDS])
    return Findings(kinds, images, captions, keys.truncated)


def first_kind(marks: Sequence[Tensor]) -> list[Kind | None]:
    """The first kind that each row is of.

    Args:
        marks: ``(n,)`` booleans for each of `KINDS`.
    """
    table = torch.stack(list(marks), dim=1).tolist()
    return [next(compress(KINDS, row), None) for row in table]


def settle(detection: Detection, findings: Findings, verdicts: Verdicts | None = None) -> Detection:
    """The detection with what is said of rows that have a finding; see the module's docstring.

    Nothing changes where the detection abstains.

    Args:
        detection: of the rows.
        findings: of these rows.
        verdicts: ``(n,)``, of a person, which count more; none if absent.
    """
    if detection.abstains:
        return detection
    judged = np.ones(len(detection.flag), dtype=bool) if verdicts is None else verdicts == UNKNOWN
    placeholder = findings.are("placeholder_image").numpy() & judged
    empty = findings.are(*EMPTY).numpy() & judged
    unread = findings.are("truncated_equal", "unknown_script").numpy() & judged
    faulty = placeholder | (empty & findings.are(*findings.flagged).numpy())
    at_least = np.where(placeholder, 1 - 1 / findings.captions.numpy(), 0)
    probability = np.maximum(detection.probability, at_least)
    probability[empty] = EVEN
    probability[unread] = detection.noise_rate
    found = placeholder | empty | unread
    return replace(
        detection,
        probability=probability,
        flag=np.where(found, faulty, detection.flag),
        borderline=detection.borderline & ~found,
    )


def tell(counts: Mapping[str, int], rows: int, *, abstains: bool = False) -> Iterator[str]:
    """A sentence for every kind that was found.

    Args:
        counts: of `Findings.counts`.
        rows: that can be read.
        abstains: whether the model cannot tell right from wrong, so that nothing is flagged.
    """
    flagged = () if abstains else flagged_kinds(counts, rows)
    for kind, meaning in MEANINGS.items():
        if counts.get(kind):
            verdict = "flagged" if kind in flagged else "not flagged for that"
            yield (
                f"Rows with {meaning}: {counts[kind]:,}. They are {verdict}, and no evidence for "
                f"other rows; their ecif_finding is {kind}."
            )
    if not abstains and any(counts.get(kind) for kind in set(EMPTY).difference(flagged)):
        yield (
            "So many captions say nothing of their images that it seems to be how these data are "
            f"captioned: they are kept. `hf-ecif clean --findings {','.join(EMPTY)}` removes them."
        )
    if counts.get("truncated"):
        yield (
            f"Captions longer than the model reads: {counts['truncated']:,}. What is beyond its "
            "limit of tokens is not judged; see caption_truncated."
        )


def _stand_under(
    own: Tensor, other: Tensor, one_side: Tensor, other_side: Tensor
) -> tuple[Tensor, Tensor]:
    """Whether what is paired with the same has nothing in common; said for captions.

    A caption is a stock phrase if its images are no more alike than any images are, and no more
    like it than other images are, as far as chance goes.

    Args:
        own: ``(n,)``, equal for equal captions.
        other: ``(n,)``, equal for equal images.
        one_side: ``(n, d)``, embeddings of the captions.
        other_side: ``(n, d)``, embeddings of the images.

    Returns:
        ``(n,)`` different images of the pair's caption, and booleans ``(n,)``.
    """
    edges, _ = firsts(torch.stack([own, other], dim=1))
    _, number = firsts(own)
    counts = torch.bincount(number[edges])[number]
    marked = torch.zeros(len(own), dtype=torch.bool)
    distinct, _ = firsts(other)
    for group in number[counts >= FEWEST_IN_COMMON].unique().tolist():
        members = edges[number[edges] == group]
        rest = distinct[~torch.isin(other[distinct], other[members])]
        alike = _alike(other_side[members], other_side[distinct])
        fit = _fit(one_side[members[0]], other_side[members], other_side[rest])
        marked |= (number == group) & (max(alike, fit) < CHANCE)
    return counts, marked


def _alike(some: Tensor, every: Tensor) -> float:
    """By how many standard errors some vectors are more alike than any of all are.

    The mean cosine of pairs among ``m`` vectors, from the centre of all: of random ones it is about
    zero, with a variance of ``2 / (m (m - 1))`` times that of a single pair.
    """
    centre = every.double().mean(dim=0)
    some, every = (normalize(x.double() - centre, dim=1) for x in (some, every))
    count = len(some)
    mean = (some.sum(dim=0).square().sum() - count) / (count * (count - 1))
    spread = (every.T @ every).norm() / len(every)
    return float(mean / spread * (count * (count - 1) / 2) ** 0.5)


def _fit(anchor: Tensor, some: Tensor, others: Tensor) -> float:
    """By how many standard errors some vectors are nearer to an anchor than others are."""
    if len(others) < 2:
        return 0.0
    near, far = some.double() @ anchor.double(), others.double() @ anchor.double()
    error = (near.var() / len(near) + far.var() / len(far)).sqrt()
    return float((near.mean() - far.mean()) / error)


def _hides_others(rows: Rows) -> Tensor:
    """``(n,)`` booleans, whether other captions are equal as far as the model reads."""
    _, number = firsts(rows.keys.captions)
    distinct = {*zip(number.tolist(), map(plain, rows.texts), strict=True)}
    texts = Counter(key for key, _ in distinct)
    return torch.tensor([texts[key] > 1 for key in number.tolist()])
