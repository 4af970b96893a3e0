"""When is the caption that fits an image best the right one?

For most flagged rows it is not: where wrong captions are copies of others, the right ones are gone,
and whatever fits best is some other row's caption. What tells is learnt from rows that are not
flagged, whose right captions are known. Some of these captions change places, so that the right one
is still there, on another row; some are replaced by copies, so that it is gone; some rows stay as
they are, for flags that are false alarms. A logistic regression learns from how clearly a candidate
wins, and from whether it fits its own row, when the winner is right. How often the right caption
is there at all is another matter in the data than in what was made of them: its share is estimated
from the flagged rows by expectation maximisation (Saerens et al., 2002), drawn to that of the
exchanges by a prior.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import expit, logit
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from hf_ecif.engine.neighbours import count_better, find_best
from hf_ecif.utils.formatting import Bools, Floats

Numbers = NDArray[np.int64]

DRAWS = 3  # exchanges to learn from
FEWEST, ENOUGH = 20, 100  # captions that change in each of them
# The estimated share of right winners is drawn to that of the exchanges as if by so many rows. With
# 20, where all right captions are gone, as many are suggested, and the Brier score of the
# probabilities is 0.034 in place of 0.029; where they have changed places, it is 0.096 for both.
PRIOR_ROWS = 50
FALSE_ALARMS = (0.02, 0.9)  # least and largest share of the flags that are taken to be wrong


@dataclass(frozen=True)
class Pairs:
    """Images and captions as embeddings.

    Attributes:
        image: ``(n, d)``, normalised.
        text: ``(n, d)``, normalised.
        key: ``(n,)``, equal for captions that say the same.
        scale: of the model's logits.
    """

    image: Tensor
    text: Tensor
    key: Tensor
    scale: float

    def with_captions_of(self, donors: Tensor) -> Pairs:
        """These images with captions of other rows."""
        return replace(self, text=self.text[donors.to(self.text.device)], key=self.key[donors])

    def select(self, rows: Tensor) -> Pairs:
        """The given rows."""
        here = rows.to(self.image.device)
        return Pairs(self.image[here], self.text[here], self.key[rows], self.scale)

    @property
    def fit(self) -> Tensor:
        """``(n,)``, cosine of the two sides of each row."""
        return (self.image * self.text).sum(dim=1)


@dataclass(frozen=True)
class Candidates:
    """Captions, all different.

    Attributes:
        key: ``(K,)``, ascending; as that of `Pairs`.
        vectors: ``(K, d)``, their normalised embeddings.
        held: ``(K,)``, cosine of each caption with the image of its own row, the best of several;
            None where they are of a vocabulary.
    """

    key: Tensor
    vectors: Tensor
    held: Tensor | None = None

    @classmethod
    def of(cls, pairs: Pairs) -> Candidates:
        """The captions of all rows."""
        key, which = torch.unique(pairs.key, return_inverse=True)
        first = torch.full_like(key, len(pairs.key))
        first.scatter_reduce_(0, which, torch.arange(len(which)), "amin")
        fit = pairs.fit
        held = fit.new_full((len(key),), -1.0)
        held.scatter_reduce_(0, which.to(fit.device), fit, "amax")
        return cls(key, pairs.text[first.to(fit.device)], held)

    def place(self, key: Tensor) -> Tensor:
        """Where captions are, ``(m,)``; -1 where they are not."""
        found = torch.searchsorted(self.key, key).clamp(max=len(self.key) - 1)
        return torch.where(self.key[found] == key, found, -1)


@dataclass(frozen=True)
class Winners:
    """The candidates that fit some images best, ``(m,)`` each.

    Attributes:
        number: of the candidate.
        key: of its caption.
        margin: by how much its logit is above those of the row's own caption and of the next best
            candidate, in nats; below zero where the own caption fits better.
        features: ``(m, F)``, what tells whether it is right.
    """

    number: Tensor
    key: Tensor
    margin: Floats
    features: Floats


@dataclass(frozen=True)
class Rightness:
    """What tells whether a winner is right: a logistic regression, and how often they are.

    Attributes:
        mean: ``(F,)``, of the features it was learned from.
        spread: ``(F,)``, their standard deviation.
        weights: ``(F,)``, of the features in these units.
        bias: log-odds where they are at their mean.
        prior: share of right winners among those it was learned from.
        share: that among the winners of flagged rows.
    """

    mean: Floats
    spread: Floats
    weights: Floats
    bias: float
    prior: float
    share: float

    def __call__(self, features: Floats) -> Floats:
        """Probability ``(m,)`` that a winner is its row's right caption."""
        return np.asarray(expit(self.log_ratio(features) + logit(self.share)))

    def log_ratio(self, features: Floats) -> Floats:
        """Log density ratio ``(m,)`` of right and other winners."""
        odds = (features - self.mean) / self.spread @ self.weights + self.bias
        return np.asarray(odds - logit(self.prior))


def find_winners(
    pairs: Pairs,
    rows: Tensor,
    candidates: Candidates,
    barred: Tensor | None = None,
    images: Tensor | None = None,
) -> Winners:
    """The candidate that fits best, for each of some rows.

    Args:
        pairs: the data.
        rows: ``(m,)``, their numbers.
        candidates: at least one.
        barred: ``(m,)``, the caption that does not count; the row's own one if absent.
        images: ``(n, d)``, of which it is counted how many a winner fits better; those of the data
            if absent.
    """
    device = pairs.image.device
    image = pairs.image[rows.to(device)]
    place = candidates.place(pairs.key[rows] if barred is None else barred)
    best = find_best(image, candidates.vectors, place.to(device))
    own = pairs.fit[rows.to(device)]
    others = pairs.image if images is None else images
    better = count_better(candidates.vectors[best.key], others, best.cosine)
    lead, gain = best.cosine - best.runner_up, best.cosine - own
    told = [pairs.scale * lead, best.cosine, pairs.scale * gain, better.double().log1p()]
    if candidates.held is not None:
        told.append(pairs.scale * (candidates.held[best.key] - best.cosine))
    number = best.key.cpu()
    return Winners(
        number,
        candidates.key[number],
        (pairs.scale * torch.minimum(lead, gain)).double().cpu().numpy(),
        torch.stack([part.double() for part in told], dim=1).cpu().numpy(),
    )


def learn_rightness(
    pairs: Pairs,
    winners: Winners,
    flag: Bools,
    probability: Floats,
    *,
    vocabulary: Candidates | None = None,
    seed: int = 0,
) -> Rightness | None:
    """What tells whether the winner of a flagged row is its right caption.

    None where there are too few rows to learn from.

    Args:
        pairs: the data.
        winners: of the flagged rows, at least one.
        flag: ``(n,)``, which rows are flagged.
        probability: ``(n,)``, of being misaligned; nan where it is not known.
        vocabulary: the candidates; the captions of all rows if absent.
        seed: of the exchanges.
    """
    known = probability[flag & np.isfinite(probability)]
    alarms = float(np.clip(1 - known.mean(), *FALSE_ALARMS)) if len(known) else FALSE_ALARMS[0]
    made = [
        _exchange(pairs, flag, alarms, vocabulary, np.random.default_rng((seed, draw)))
        for draw in range(DRAWS)
    ]
    features, right, weight = (np.concatenate(parts) for parts in zip(*made, strict=True))
    if right.sum() < FEWEST:
        return None
    scale, classifier = StandardScaler(), LogisticRegression()
    classifier.fit(scale.fit_transform(features), right, sample_weight=weight)
    prior = float(np.average(right, weights=weight))
    found = Rightness(
        mean=scale.mean_,
        spread=scale.scale_,
        weights=classifier.coef_[0],
        bias=float(classifier.intercept_[0]),
        prior=prior,
        share=prior,
    )
    return replace(found, share=_likeliest_share(found.log_ratio(winners.features), prior))


def _exchange(
    pairs: Pairs,
    flag: Bools,
    alarms: float,
    vocabulary: Candidates | None,
    random: np.random.Generator,
) -> tuple[Floats, Bools, Floats]:
    """Features of winners where the right caption is known, whether they are right, and weights."""
    trusted = random.permutation(np.flatnonzero(~flag))
    count = min(max(int(flag.sum()), ENOUGH), len(trusted) // 3)
    moved, copied, same, others = np.split(trusted, [count // 2, count, 2 * count])
    donors = np.arange(len(flag))
    donors[moved] = np.roll(moved, 1)
    source = others if len(others) else same
    donors[copied] = random.choice(source, len(copied)) if len(source) else copied
    changed = pairs.with_captions_of(torch.from_numpy(donors))
    rows = torch.from_numpy(np.concatenate([moved, copied, same]))
    barred = changed.key[rows].clone()
    if vocabulary is not None:  # the right caption is gone from the rows, but not from there
        gone = slice(len(moved), count)
        barred[gone] = pairs.key[rows[gone]]
    candidates = Candidates.of(changed) if vocabulary is None else vocabulary
    winners = find_winners(changed, rows, candidates, barred)
    right = (winners.key == pairs.key[rows]).numpy()
    weight = np.repeat([1.0, alarms / (1 - alarms)], [count, len(same)])
    return winners.features, right, weight


def _likeliest_share(log_ratio: Floats, prior: float) -> float:
    """The share of right winners that suits the rows best."""
    share = prior
    for _ in range(500):
        expected = expit(log_ratio + logit(share))
        updated = (expected.sum() + PRIOR_ROWS * prior) / (len(expected) + PRIOR_ROWS)
        if abs(updated - share) < 1e-7:
            break
        share = float(updated)
    return share
