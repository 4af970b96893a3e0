"""Rows that are verified: known to be right or wrong, from a query, a column or a review.

In the runs with injected mismatches, half of a clean query is fitted and scored beside the data, so
that it tells what right rows look like there; the other half is their query. It tells that only if
its images and captions are like those of the data, each side by itself: which caption belongs to
which image does not matter for that, so wrong pairs among the data do no harm.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from torch import Tensor

from hf_ecif.engine.objectives import Embeddings
from hf_ecif.influence.keys import firsts
from hf_ecif.influence.rows import Rows
from hf_ecif.utils.seeds import stream

# Of a query that is halved; fewer pairs all stay the query.
FEWEST_HALVED = 40
# AUROC by which verified rows are told from the data, from which on they are of another kind, if
# it is also more than chance by so many standard errors.
MOST_UNLIKE, UNLIKE_ERRORS = 0.75, 3.0
FOLDS = 5
MOST_COMPARED = 10_000  # rows of the data, evenly spread over them
SHIFTS = 8  # rows by which captions may be out of step with their images
LEAST_GAIN = 0.05  # in cosine, of another pairing


@dataclass(frozen=True)
class Likeness:
    """How well verified rows are told from the data; 0.5 is not at all, 1 entirely.

    Attributes:
        image: AUROC by the embeddings of the images, cross-validated.
        text: likewise, of the captions.
        error: standard error of either, where there is no difference.
    """

    image: float
    text: float
    error: float

    @property
    def is_alike(self) -> bool:
        """Whether the verified rows can stand for the right rows of the data."""
        most = max(self.image, self.text)
        return most < MOST_UNLIKE or most < 0.5 + UNLIKE_ERRORS * self.error


def halve_query(query: Rows, seed: int) -> tuple[Rows, Rows]:
    """Verified rows and the query that is left, a random half of the images each.

    Args:
        query: clean pairs.
        seed: of the run.
    """
    order = torch.randperm(len(query), generator=stream(seed, "verified"))
    images, image = firsts(query.keys.images[order])
    is_verified = image < (len(images) + 1) // 2
    verified, left = order[is_verified], order[~is_verified]
    return query.select(verified.sort().values), query.select(left.sort().values)


def compare(verified: Embeddings, data: Embeddings) -> Likeness:
    """A two-sample test by a linear classifier, for images and for captions.

    Args:
        verified: embeddings of the verified rows by the model as given.
        data: those of the data.
    """
    step = -(-len(data.image) // MOST_COMPARED)
    data = data._replace(image=data.image[::step], text=data.text[::step])
    few, many = len(verified.image), len(data.image)
    # Of the Mann-Whitney statistic without a difference.
    error = ((few + many + 1) / (12 * few * many)) ** 0.5
    image, text = (
        _told_apart(getattr(verified, side), getattr(data, side)) for side in ("image", "text")
    )
    return Likeness(image, text, error)


def find_shift(given: Embeddings) -> int:
    """By how many rows captions are out of step with their images; 0 where no other pairing is
    better.

    At a shift of ``k``, the caption of row ``n + k`` belongs to the image of row ``n``.

    Args:
        given: embeddings of the rows by the model as given, in the order of the data.
    """
    most = min(SHIFTS, len(given.text) - 1)
    shifts = [0, *(sign * shift for shift in range(1, most + 1) for sign in (1, -1))]
    aligned = [
        (given.image * given.text.roll(-shift, dims=0)).sum(dim=1).mean().item() for shift in shifts
    ]
    best = int(np.argmax(aligned))
    return shifts[best] if aligned[best] > aligned[0] + LEAST_GAIN else 0


def _told_apart(verified: Tensor, data: Tensor) -> float:
    values = torch.cat([verified, data]).double().cpu().numpy()
    labels = np.repeat([1, 0], [len(verified), len(data)])
    return _cross_validated(values, labels)


def _cross_validated(values: NDArray[np.float64], labels: NDArray[np.int64]) -> float:
    classifier = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")
    folds = StratifiedKFold(FOLDS, shuffle=True, random_state=0)
    odds = cross_val_predict(classifier, values, labels, cv=folds, method="decision_function")
    return float(roc_auc_score(labels, odds))
