"""`InfluenceModel`: fit the direction of a query, score rows by it.

    model = InfluenceModel.from_pretrained("openai/clip-vit-base-patch32")
    model.fit(train, query=validation)
    scored = model.score(train)

Two steps, as in scikit-learn. *Fit* brings the attributed parameters near their optimum on the
training rows and solves for the direction ``s = (H + damping)^-1 grad F`` of the query's loss
``F``. *Score* is a stateless forward-mode pass with ``s`` over any rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModel, AutoProcessor

from hf_ecif.config import InfluenceConfig
from hf_ecif.data import check_columns
from hf_ecif.encoders import DualEncoder
from hf_ecif.errors import UserError
from hf_ecif.features import Rows, read_rows
from hf_ecif.fitting import FitReport, fit_parameters
from hf_ecif.inverse import InverseCurvature
from hf_ecif.operators import Objective, random_batches
from hf_ecif.parameters import add_lora, has_adapters
from hf_ecif.planting import plant
from hf_ecif.progress import ProgressFactory, silent
from hf_ecif.queries import Query
from hf_ecif.removal import RemovalReport, remove
from hf_ecif.scoring import Batching, Directions, GroupScore, Scores, score_group, score_rows
from hf_ecif.solvers import SolveReport, random_signs

AnyQuery = Rows | Query


@dataclass(frozen=True)
class Fitted:
    """What `InfluenceModel.fit` finds.

    Attributes:
        theta: attributed parameters at which everything is linearised, ``(P,)``.
        directions: tangents of the scoring pass.
        inverse: the inverse curvature there, for further queries.
        train_count: rows fitted on, the ``N`` of every score.
        fit: how the parameters were fitted.
        solvers: reports by purpose.
        query_loss_before: loss of the query at the model's own parameters, in nats.
        query_loss: loss of the query at ``theta``.
        alignment: cosine of the query's gradient and the training gradient.
    """

    theta: Tensor
    directions: Directions
    inverse: InverseCurvature
    train_count: int
    fit: FitReport
    solvers: dict[str, SolveReport]
    query_loss_before: float
    query_loss: float
    alignment: float


class InfluenceModel:
    """A dual encoder, its processor, and once fitted, the direction that scores rows.

    Args:
        model: a Hugging Face dual encoder; it is put in evaluation mode, its weights stay as they
            are.
        processor: its processor.
        config: everything that decides a score.

    Attributes:
        fitted: result of `fit`; None before.
    """

    def __init__(self, model: Any, processor: Any, config: InfluenceConfig | None = None) -> None:
        self.config = config or InfluenceConfig()
        self.processor = processor
        if self.config.parameters == "lora" and not has_adapters(model):
            model = add_lora(model, rank=self.config.lora_rank, seed=self.config.seed)
        self.encoder = DualEncoder(model, self.config.parameters, self.config.micro_batch_size)
        self.fitted: Fitted | None = None

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, config: InfluenceConfig | None = None
    ) -> InfluenceModel:
        """Load a model and its processor from a folder or the Hub (``name@revision`` pins one).

        Raises:
            UserError: nothing there, or no contrastive dual encoder.
        """
        model, processor = load_model(str(name_or_path))
        return cls(model, processor, config)

    @property
    def theta(self) -> Tensor:
        """Attributed parameters after `fit`, ``(P,)``."""
        return self._require_fit().theta

    def read(
        self,
        dataset: Dataset,
        image_column: str = "image",
        text_column: str = "text",
        advance: Callable[[int], None] = lambda rows: None,
    ) -> Rows:
        """Read rows and run the frozen part of the model on them, once.

        What comes back serves `fit` and `score` in place of the data set.
        """
        return read_rows(
            check_columns(dataset, image_column, text_column),
            self.encoder,
            self.processor,
            image_column=image_column,
            text_column=text_column,
            max_pixels=self.config.max_pixels,
            memory_limit=self.config.memory_limit * 2**30,
            advance=advance,
        )

    def fit(
        self, train: Rows, query: AnyQuery | Sequence[AnyQuery], progress: ProgressFactory = silent
    ) -> Fitted:
        """Fit the attributed parameters on ``train`` and solve for the query's direction.

        Args:
            train: the rows to be valued, from `read`.
            query: what is asked. Rows mean their contrastive loss, better clean than many; a
                `Query` is any other function; a list is several queries, scored in one pass.
            progress: makes a progress bar of a name and a number of steps.

        Raises:
            UserError: fewer than two rows on either side.
        """
        _check_rows("data set", train)
        for one in [query] if isinstance(query, Rows | Query) else query:
            if isinstance(one, Rows):
                _check_rows("query", one)
        self.fitted = self._fit(train, query, progress)
        return self.fitted

    def score(self, rows: Rows, progress: ProgressFactory = silent) -> Scores:
        """Influence of every readable row, by the direction of the last `fit`.

        Signs: negative is harmful (removing the pair is predicted to lower the query's loss),
        positive is valuable. Units: those of the query (nats of its mean loss), per pair.
        """
        fitted = self._require_fit()
        return self._score(rows, fitted.theta, fitted.directions, fitted.train_count, progress)

    def score_for(self, rows: Rows, query: AnyQuery | Sequence[AnyQuery]) -> Scores:
        """Influence on another query than that of the last `fit`, at the same parameters.

        Sizes and self-influence do not depend on the query: they are zero here; see `score`.
        """
        fitted = self._require_fit()
        generator = torch.Generator().manual_seed(self.config.seed)
        gradient = self._target(query, generator).gradients(self.encoder, fitted.theta)
        direction = fitted.inverse.solve(gradient.reshape(-1, len(fitted.theta)))[0]
        directions = Directions.none(fitted.theta)._replace(query=direction.view(gradient.shape))
        return self._score(rows, fitted.theta, directions, fitted.train_count, silent)

    def score_group(self, rows: Rows, members: Tensor) -> GroupScore:
        """Predicted change of the query if some rows were removed together.

        Args:
            rows: the training rows, members and others.
            members: ``(n,)`` booleans.
        """
        fitted = self._require_fit()
        return score_group(
            self.encoder,
            fitted.theta,
            rows.features,
            fitted.directions.query,
            members,
            self._batching(rows),
            train_count=fitted.train_count,
        )

    def refit(self, rows: Rows, *, seed: int | None = None) -> Tensor:
        """Attributed parameters ``(P,)`` fitted to ``rows`` from the model's own, as `fit` does.

        Args:
            rows: the training rows.
            seed: of the batches; the config's if absent.
        """
        generator = torch.Generator().manual_seed(self.config.seed if seed is None else seed)
        return self._fit_parameters(rows, generator, silent)[0]

    def query_value(self, query: AnyQuery | Sequence[AnyQuery], theta: Tensor) -> Tensor:
        """The query at other attributed parameters; ``()``, or ``(Q,)`` of several queries."""
        generator = torch.Generator().manual_seed(self.config.seed)
        return self._target(query, generator).values(self.encoder, theta)

    def remove(
        self, rows: Rows, members: Tensor, *, steps: int = 1, progress: ProgressFactory = silent
    ) -> tuple[Tensor, RemovalReport]:
        """Attributed parameters as if the model had been fitted without some rows; closed form.

        Args:
            rows: the training rows of the last `fit`.
            members: ``(n,)`` booleans, true for rows that leave.
            steps: Newton steps, each with fresh curvature; see `hf_ecif.removal`.
            progress: makes a progress bar.

        Raises:
            UserError: nothing is to be removed, or nearly everything.
        """
        fitted, config = self._require_fit(), self.config
        if not 0 < members.sum() < len(rows) - 1:
            raise UserError(
                f"{int(members.sum())} of {len(rows)} rows are to be removed: choose at least one "
                "row, and leave at least two."
            )
        generator = torch.Generator().manual_seed(config.seed)
        objective = self._objective(rows, generator, config.l2, self.encoder.theta)
        return remove(
            objective,
            fitted.theta,
            members,
            fitted.inverse.spectrum,
            steps=steps,
            curvature=config.curvature,
            relative_damping=config.damping,
            tolerance=config.tolerance,
            max_iterations=config.max_iterations,
            advance=progress("Remove", steps),
        )

    def save_edited(self, theta: Tensor, folder: Path) -> None:
        """Save the model with other attributed parameters, and the processor.

        `from_pretrained` of transformers loads it. Adapters are merged into the weights. The model
        in memory is changed, too.
        """
        self.encoder.load(theta)
        model: Any = self.encoder.model
        if has_adapters(model) and hasattr(model, "merge_and_unload"):
            model = model.merge_and_unload()
        model.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    def score_as_given(self, rows: Rows) -> Scores:
        """Losses and cosines at the model's own parameters; its influence parts are zero."""
        theta = self.encoder.theta
        return self._score(rows, theta, Directions.none(theta), len(rows), silent)

    def plant(
        self, train: Rows, query: Rows, progress: ProgressFactory = silent
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Signals of runs in which some captions were exchanged on purpose.

        Returns:
            ``(R, S)`` of the rows that stayed as they are, ``(M, S)`` of those exchanged; see
            `signals`.
        """
        config = self.config
        generator = torch.Generator().manual_seed(config.seed + 2)
        images = self.encoder.embed(self.encoder.theta, train.features).image
        advance = progress("Plant wrong pairs", config.plantings)
        reference, planted = [], []
        for _ in range(config.plantings):
            planting = plant(
                train, images, share=config.planted_share, clusters=10, generator=generator
            )
            fitted = self._fit(planting.rows, query, silent)
            scores = self._score(
                planting.rows, fitted.theta, fitted.directions, fitted.train_count, silent
            )
            signals = self.signals(scores)
            reference.append(signals[~planting.planted.numpy()])
            planted.append(signals[planting.planted.numpy()])
            advance(1)
        return np.concatenate(reference), np.concatenate(planted)

    @staticmethod
    def signals(scores: Scores) -> NDArray[np.float64]:
        """``(N, 2)``, the witnesses of misalignment that `detect` weighs.

        They are the leave-one-out loss, which says whether the caption fits, and the relative
        score, which says whether the pair works against the query. Both are taken as they are, in
        nats: scaled by their own spread, runs with more wrong pairs would look like others.
        """
        loss = scores.loo_loss.double().clamp_min(0).log1p()
        return torch.stack([loss, scores.relative.double()], dim=1).numpy()

    def _fit(
        self, train: Rows, query: AnyQuery | Sequence[AnyQuery], progress: ProgressFactory
    ) -> Fitted:
        config, encoder = self.config, self.encoder
        generator = torch.Generator().manual_seed(config.seed)
        start = encoder.theta
        theta, report, objective = self._fit_parameters(train, generator, progress)
        target = self._target(query, generator)
        gradient = target.gradients(encoder, theta)
        inverse = InverseCurvature(objective, theta, config)
        probes = random_signs((config.probes, len(theta)), generator).to(theta)
        direction, task = inverse.solve(gradient.reshape(-1, len(theta)))
        solved, own = inverse.solve(probes)
        average = gradient.reshape(-1, len(theta)).mean(dim=0)
        cosine = torch.cosine_similarity(average, objective.gradient(theta), dim=0)
        return Fitted(
            theta=theta,
            directions=Directions(direction.view(gradient.shape), probes, solved),
            inverse=inverse,
            train_count=len(train),
            fit=report,
            solvers={"task score": task, "self-influence": own},
            query_loss_before=target.values(encoder, start).mean().item(),
            query_loss=target.values(encoder, theta).mean().item(),
            alignment=cosine.item(),
        )

    def _fit_parameters(
        self, rows: Rows, generator: torch.Generator, progress: ProgressFactory
    ) -> tuple[Tensor, FitReport, Objective]:
        config, start = self.config, self.encoder.theta
        objective = self._objective(rows, generator, config.l2, start)
        theta, report = fit_parameters(
            objective,
            start,
            batch_size=config.batch_size,
            epochs=config.fit_epochs,
            learning_rate=config.fit_learning_rate,
            generator=generator,
            advance=progress("Fit", config.fit_epochs),
        )
        return theta, report, objective

    def _score(
        self,
        rows: Rows,
        theta: Tensor,
        directions: Directions,
        train_count: int,
        progress: ProgressFactory,
    ) -> Scores:
        return score_rows(
            self.encoder,
            theta,
            rows.features,
            directions,
            self._batching(rows),
            train_count=train_count,
            form=self.config.role,
            tangents=self.config.tangents,
            advance=progress("Score", len(rows)),
        )

    def _batching(self, rows: Rows) -> Batching:
        config = self.config
        generator = torch.Generator().manual_seed(config.seed + 1)
        return Batching(config.batch_size, config.partitions, generator, self._same(rows))

    def _target(self, query: AnyQuery | Sequence[AnyQuery], generator: torch.Generator) -> _Target:
        if isinstance(query, Query):
            return query
        if isinstance(query, Rows):
            return _ContrastiveLoss(self._objective(query, generator))
        return _Several([self._target(one, generator) for one in query])

    def _objective(
        self,
        rows: Rows,
        generator: torch.Generator,
        l2: float = 0.0,
        center: Tensor | None = None,
    ) -> Objective:
        batches = random_batches(len(rows), self.config.batch_size, generator)
        return Objective(self.encoder, rows.features, batches, self._same(rows), l2, center)

    def _require_fit(self) -> Fitted:
        if self.fitted is None:
            raise UserError("This model is not fitted yet: call fit(train, query) first.")
        return self.fitted

    def _same(self, rows: Rows) -> Tensor | None:
        return rows.same_text if self.config.mask_repeated else None


class _Target(Protocol):
    """What the scores predict the change of: one value, or several."""

    def values(self, encoder: DualEncoder, theta: Tensor) -> Tensor: ...

    def gradients(self, encoder: DualEncoder, theta: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class _ContrastiveLoss:
    """Of any number of rows, batch by batch."""

    objective: Objective

    def values(self, encoder: DualEncoder, theta: Tensor) -> Tensor:
        return self.objective.value(theta)

    def gradients(self, encoder: DualEncoder, theta: Tensor) -> Tensor:
        return self.objective.gradient(theta)


@dataclass(frozen=True)
class _Several:
    targets: list[_Target]

    def values(self, encoder: DualEncoder, theta: Tensor) -> Tensor:
        return torch.cat([target.values(encoder, theta).reshape(-1) for target in self.targets])

    def gradients(self, encoder: DualEncoder, theta: Tensor) -> Tensor:
        gradients = [target.gradients(encoder, theta) for target in self.targets]
        return torch.cat([gradient.reshape(-1, len(theta)) for gradient in gradients])


def _check_rows(name: str, rows: Rows) -> None:
    if len(rows) < 2:
        raise UserError(
            f"The {name} has {len(rows)} readable row, and a contrastive loss needs at least two "
            "pairs. Give more rows."
        )
    if len(set(rows.texts)) < 2:
        raise UserError(
            f"All captions of the {name} are equal ({rows.texts[0][:40]!r}), so there is nothing "
            "to tell apart. Look at --text-column."
        )


def load_model(name: str) -> tuple[Any, Any]:
    """Model and processor from a folder or the Hub, with weights from safetensors only.

    Raises:
        UserError: nothing there, or not loadable.
    """
    path, _, revision = name.partition("@") if not Path(name).exists() else (name, "", "")
    options = {"revision": revision} if revision else {}
    try:
        model = AutoModel.from_pretrained(
            path, dtype=torch.float32, use_safetensors=True, **options
        )
        processor = AutoProcessor.from_pretrained(path, **options)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--model {name!r} cannot be loaded: {reason} Give a folder written by save_pretrained "
            "(model and processor) or a Hub id, such as openai/clip-vit-base-patch32."
        ) from error
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise UserError(
            f"--model {name!r} has no processor for images and texts. Save it with the processor: "
            "processor.save_pretrained(folder)."
        )
    return model, processor
