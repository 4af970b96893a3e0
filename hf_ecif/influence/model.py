"""Fit on rows for a query, and score rows by what was found.

    model = InfluenceModel.from_pretrained("openai/clip-vit-base-patch32")
    influence = model.fit(train, query=validation)
    scored = influence.score(train)

Two steps, as in scikit-learn. *Fit* brings the attributed parameters near their optimum on the
training rows and solves for the direction ``s = (H + damping)^-1 grad F`` of the query's loss
``F``, or unrolls the steps of the fit into directions for each epoch. *Score* is a stateless
forward-mode pass with them over any rows.

The model remembers nothing of a fit: all that a fit found, and the rows and batches that it was
made with, belong to the `Influence` that it returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from hf_ecif.engine.low_rank import random_signs
from hf_ecif.engine.system import Spectrum
from hf_ecif.influence.batching import AnyQuery, query_target
from hf_ecif.influence.fitted import Fitted
from hf_ecif.influence.influence import Influence
from hf_ecif.influence.loaded import AnyRows, Asked, LoadedModel
from hf_ecif.influence.queries import Query
from hf_ecif.influence.response import choose_response
from hf_ecif.influence.rows import Rows, require_distinct
from hf_ecif.influence.training import Training, train
from hf_ecif.utils.checkpoints import Checkpoints
from hf_ecif.utils.progress import ProgressFactory, silent
from hf_ecif.utils.seeds import stream


class InfluenceModel(LoadedModel):
    """A dual encoder with its processor, ready to be fitted.

    It has the arguments and the abilities of `LoadedModel`.

    Examples:
        >>> import hf_ecif
        >>> demo = hf_ecif.load_demo()
        >>> pairs = demo.dataset.select(range(60))
        >>> model = hf_ecif.InfluenceModel.from_pretrained(demo.model)
        >>> influence = model.fit(pairs, demo.query)
        >>> influence.scores().task.shape
        torch.Size([60])
    """

    def fit(
        self,
        train: AnyRows,
        query: Asked,
        progress: ProgressFactory = silent,
        checkpoints: Checkpoints | None = None,
        spectrum: Spectrum | None = None,
    ) -> Influence:
        """The influence of training rows on a query, once the model is fitted to them.

        Args:
            train: the rows to be valued.
            query: what is asked. Rows mean their contrastive loss, better clean than many; a
                `Query` is any other function; a list is several queries, scored in one pass.
            progress: makes a progress bar of a name and a number of steps.
            checkpoints: store of the last epoch and the result.
            spectrum: spectrum of the curvature, where that of similar rows is known: both are then
                damped alike.

        Raises:
            UserError: fewer than two rows or distinct captions on either side.
        """
        known = checkpoints or Checkpoints()
        rows, asked = self.rows(train), self.asked(query)
        require_distinct("data set", rows)
        for one in [asked] if isinstance(asked, Rows | Query) else asked:
            if isinstance(one, Rows):
                require_distinct("query", one)
        training = self._train(rows, self.config.seed, progress, known, spectrum)
        state = known.load("direction")
        if state is not None:
            fitted = Fitted.from_state(state, like=training.theta)
            return Influence(
                self, self.config, fitted, replace(training, known_spectrum=fitted.spectrum)
            )
        fitted = _answer(self, training, asked, progress)
        known.save("direction", fitted.to_state())
        return Influence(self, self.config, fitted, training)

    def refit(self, rows: AnyRows, *, seed: int | None = None) -> Tensor:
        """Attributed parameters ``(P,)`` fitted to rows from the model's own, as `fit` does.

        Args:
            rows: the training rows.
            seed: seed of the batches; the config's if absent.
        """
        return self._train(self.rows(rows), self.config.seed if seed is None else seed).theta

    def _train(
        self,
        rows: Rows,
        seed: int,
        progress: ProgressFactory = silent,
        checkpoints: Checkpoints | None = None,
        spectrum: Spectrum | None = None,
    ) -> Training:
        return train(
            self.encoder,
            rows,
            self.config,
            seed,
            record=choose_response(self.config).needs_trajectory,
            spectrum=spectrum,
            checkpoints=checkpoints,
            advance=progress("Fit", self.config.fit_epochs),
        )


def _answer(
    model: InfluenceModel,
    training: Training,
    query: AnyQuery | Sequence[AnyQuery],
    progress: ProgressFactory,
) -> Fitted:
    """Result of the fit: the answer of the config's response to a query."""
    config, encoder, theta = model.config, model.encoder, training.theta
    target = query_target(encoder, query, config)
    gradients = target.gradients(encoder, theta)
    signs = random_signs((config.probes, len(theta)), stream(config.seed, "probes"))
    probes = signs.to(theta)
    answer = choose_response(config).answer(training, gradients, probes, progress)
    mean = gradients.reshape(-1, len(theta)).mean(dim=0)
    slope = training.objective.gradient(theta)
    return Fitted(
        theta=theta,
        directions=answer.directions,
        spectrum=training.spectrum,
        train_count=len(training.rows),
        fit=training.report,
        solvers=answer.solvers,
        query_loss_before=target.values(encoder, training.start).mean().item(),
        query_loss=target.values(encoder, theta).mean().item(),
        alignment=torch.cosine_similarity(mean, slope, dim=0).item(),
        checkpoints=answer.checkpoints,
    )
