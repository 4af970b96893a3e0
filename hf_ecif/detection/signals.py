"""What tells a misaligned pair from a good one: five numbers a row, each from another side.

* the *leave-one-out loss*: does the caption fit?
* the *loss as given*: did it before the fit?
* the *relative score*: does the pair work against the query?
* the captions of the *most similar images*: do they say the same?
* the images of the *most similar captions*: do they show the same?

The leave-one-out loss and the score are taken at the fitted parameters. A fit learns the domain of
the data, but also from wrong pairs, and from few rows little; the others are of the model as given,
which they have not worn down. All are taken as they are: scaled by their own
spread, runs with more wrong pairs would look like others.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from hf_ecif.detection.mixture import Floats
from hf_ecif.engine.neighbours import Neighbourhood, distance_from
from hf_ecif.engine.objectives import Embeddings
from hf_ecif.influence.loaded import LoadedModel
from hf_ecif.influence.rows import Rows
from hf_ecif.influence.scoring import Scores

# How much `detect` relies on each before it has seen anything. Without the loss as given, the AUPRC
# of 120 to 300 rows of the demo is lower by 0.01; where the model hardly knows the domain, the fit
# tells more, and with full trust in it the AUPRC of one-coloured drawings is lower by 0.02.
TRUST = (1.0, 0.5, 1.0, 1.0, 1.0)


@dataclass(frozen=True)
class Signals:
    """Signals of every row, ``(N,)`` each; higher for misaligned pairs, lower for good ones.

    `relative` alone has the opposite sign, that of a score, until it is stacked.

    Attributes:
        loss: ``log(1 + loo_loss)``, nats within.
        given_loss: ``log(1 + loss)`` by the model as given, likewise.
        relative: the predicted change of the query over the size of the parameters' change.
        image_neighbours: cosine distance of the caption from those of the most similar images.
        text_neighbours: cosine distance of the image from those of the most similar captions.
    """

    loss: Tensor
    given_loss: Tensor
    relative: Tensor
    image_neighbours: Tensor
    text_neighbours: Tensor

    def stack(self) -> Floats:
        """``(N, 5)``, what `detect` weighs: all of them higher for misaligned pairs."""
        parts = astuple(replace(self, relative=-self.relative))
        return torch.stack([part.double().cpu() for part in parts], dim=1).numpy()


# Places of the signals in what `Signals.stack` gives.
PLACE = {one.name: place for place, one in enumerate(fields(Signals))}


class Known(NamedTuple):
    """Rows that others are compared with.

    Attributes:
        given: embeddings of the rows by the model as given, ``(N, d)``.
        siblings: ``(N, 2)``, equal numbers for equal captions, and for equal images.
        mute: ``(N,)`` booleans, true for rows that are no evidence for others; none if absent.
    """

    given: Embeddings
    siblings: Tensor
    mute: Tensor | None = None

    def around_images(self) -> Neighbourhood:
        """Where the most similar images are looked for."""
        return self._around(self.given.image, self.given.text, self.siblings[:, 1:])

    def around_texts(self) -> Neighbourhood:
        """Where the most similar captions are looked for."""
        return self._around(self.given.text, self.given.image, self.siblings)

    def _around(self, anchors: Tensor, others: Tensor, same: Tensor) -> Neighbourhood:
        mismatch = 1 - (self.given.text * self.given.image).sum(dim=1)
        return Neighbourhood(anchors, others, mismatch, same, self.mute)


def find_signals(
    scores: Scores,
    as_given: Scores,
    given: Embeddings,
    siblings: Tensor,
    mute: Tensor | None = None,
) -> Signals:
    """`compare_with` of rows among themselves; a row is not its own neighbour.

    Args:
        scores: of the rows, at the fitted parameters.
        as_given: of the rows, by the model as given.
        given: as in `Known`, as all others.
        siblings: likewise.
        mute: likewise.
    """
    return compare_with(Known(given, siblings, mute), scores, as_given, given, siblings)


def compare_with(
    known: Known, scores: Scores, as_given: Scores, given: Embeddings, siblings: Tensor
) -> Signals:
    """Ask all five.

    A neighbour counts the more, the more similar it is and the better its own caption fits its
    image, as in LEMoN (Zhang et al., 2025). Rows with the very image of a pair are no neighbours:
    its own captions vouch for each other, right or wrong. Rows with the very caption are left out
    of the neighbours by caption: where wrong captions are copies of right ones, as in most
    benchmarks, a copy would give them away by how the noise was made.

    Args:
        known: the rows that can be neighbours.
        scores: of the rows that are asked about, at the fitted parameters.
        as_given: of these, by the model as given.
        given: their embeddings by the model as given.
        siblings: what they are known by, as in `Known`.
    """
    text, image = given.text, given.image
    return Signals(
        loss=scores.loo_loss.double().clamp_min(0).log1p(),
        given_loss=as_given.loss.double().clamp_min(0).log1p(),
        relative=scores.relative,
        image_neighbours=distance_from(known.around_images(), image, text, siblings[:, 1:]),
        text_neighbours=distance_from(known.around_texts(), text, image, siblings),
    )


def signals_of_rows(
    model: LoadedModel, rows: Rows, scores: Scores, mute: Tensor | None = None
) -> Signals:
    """What tells misaligned rows from good ones; `detect` weighs it.

    Args:
        model: that was fitted; its own parameters count.
        rows: those that were scored.
        scores: of `Influence.scores`, for a single query.
        mute: as in `find_signals`.
    """
    given = model.embed_as_given(rows)
    return find_signals(scores, model.score_as_given(rows), given, rows.siblings, mute)


def signal_errors(scores: Scores) -> Floats:
    """Standard errors of what `find_signals` finds, ``(N, 5)``, to first order.

    Those of the self-influence over its probes, of the score over partitions and of its size over
    the probes; infinite where there was but one of them. What is of the model as given has none.
    """
    loss = scores.self_stderr.double() / (1 + scores.loo_loss.double().clamp_min(0))
    size, task = scores.size.double(), scores.task.double()
    relative = torch.hypot(scores.stderr / size, task * scores.size_stderr / size.square())
    exact = torch.zeros_like(loss)
    return torch.stack([loss, exact, relative, exact, exact], dim=1).numpy()
