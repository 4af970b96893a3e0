"""`InfluenceModel`: fit the direction of a query, score rows by it.

    model = InfluenceModel.from_pretrained("openai/clip-vit-base-patch32")
    model.fit(train, query=validation)
    scored = model.score(train)

Two steps, as in scikit-learn. *Fit* brings the attributed parameters near their optimum on the
training rows and solves for the direction ``s = (H + damping)^-1 grad F`` of the query's loss
``F``, or unrolls the steps of the fit into directions for each epoch. *Score* is a stateless
forward-mode pass with them over any rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor

from hf_ecif.config import InfluenceConfig
from hf_ecif.data.schema import check_columns
from hf_ecif.engine.encoder import DualEncoder
from hf_ecif.engine.inverse import InverseCurvature
from hf_ecif.engine.low_rank import CHUNK, nystrom
from hf_ecif.engine.objective import Objective, random_batches
from hf_ecif.engine.parameters import add_lora, has_adapters
from hf_ecif.engine.solvers import Spectrum, random_signs, require_small
from hf_ecif.errors import UserError
from hf_ecif.influence.fitted import Fitted
from hf_ecif.influence.fitting import Epoch, FitReport, fit_parameters
from hf_ecif.influence.leverage import change_without, implied_penalty, leverage, sample_leverage
from hf_ecif.influence.partners import Partners, strongest_partners
from hf_ecif.influence.queries import ContrastiveLoss, Query, Several, Target
from hf_ecif.influence.removal import RemovalReport, remove
from hf_ecif.influence.response import Station, score_through, share_partitions, unroll
from hf_ecif.influence.rows import Rows, Table, read_rows, require_pairs, require_rows
from hf_ecif.influence.saving import FIT, SavedFit, load_fit, load_model, save_fit
from hf_ecif.influence.scoring import Directions, GroupScore, Pass, Scores, score_group, score_rows
from hf_ecif.utils.checkpoints import Checkpoints
from hf_ecif.utils.progress import ProgressFactory, silent

if TYPE_CHECKING:
    from hf_ecif.hub.push import PushReport

AnyQuery = Rows | Query
ROUGH = 0.1  # residual of a solve whose answer is a step to a place, not a number
LEAST_DAMPING = 1e-3  # in units of the mean eigenvalue


class InfluenceModel:
    """A dual encoder, its processor, and once fitted, the direction that scores rows.

    Args:
        model: a Hugging Face dual encoder; it is put in evaluation mode, its weights stay as they
            are.
        processor: its processor.
        config: everything that decides a score.

    Attributes:
        name: where the model came from; empty if it was given.
        fitted: result of `fit`; None before.
        inverse: the inverse curvature there, for further queries; None where the fit was loaded.
    """

    def __init__(self, model: Any, processor: Any, config: InfluenceConfig | None = None) -> None:
        self.config = config or InfluenceConfig()
        self.processor = processor
        self._adapters_are_ours = self.config.parameters == "lora" and not has_adapters(model)
        if self._adapters_are_ours:
            model = add_lora(model, rank=self.config.lora_rank, seed=self.config.seed)
        self.encoder = DualEncoder(model, self.config.parameters, self.config.micro_batch_size)
        if self.config.solver == "exact":
            require_small(self.encoder.count)
        self.name = ""
        self.fitted: Fitted | None = None
        self.inverse: InverseCurvature | None = None
        self._walked: list[Epoch] = []

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | Path, config: InfluenceConfig | None = None
    ) -> InfluenceModel:
        """Load a model and its processor from a folder or the Hub.

        They go to the device and the precision that accelerate is configured for.

        Args:
            name_or_path: of a model, or of what `save_pretrained` wrote: a folder, or a Hub id such
                as ``owner/name``, ``owner/name@revision`` or ``hf://owner/name``.
            config: how influence is computed. If absent, a saved fit is taken up with its config.

        Raises:
            UserError: nothing there, or no contrastive dual encoder.
        """
        name = str(name_or_path)
        model, processor = load_model(name)
        saved = load_fit(name) if config is None else None
        result = cls(model, processor, saved.config if saved else config)
        result.name = saved.model if saved else name
        if saved is not None:
            result.fitted = Fitted.from_state(saved.fitted, like=result.encoder.theta)
        return result

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the model as given, the processor, and the fit: all that scoring needs.

        `from_pretrained` reads it; so does transformers' own, which sees the model alone.

        Raises:
            UserError: not fitted, or the model came with adapters of its own.
        """
        model: Any = self.encoder.model
        if has_adapters(model) and not self._adapters_are_ours:
            raise UserError(
                "This model has adapters of its own, which are saved without their base. Merge "
                "them first (merge_and_unload), and attribute new ones with parameters='lora'."
            )
        if self._adapters_are_ours:  # as added they are zero, so that merging changes nothing
            model = deepcopy(model).merge_and_unload()
        fit = SavedFit(self.name, self.config, self.require_fit().to_state())
        Path(folder, FIT).unlink(missing_ok=True)
        model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
        save_fit(Path(folder), fit)  # last: where there is a fit, the rest is whole

    def push_to_hub(self, repo_id: str, **options: Any) -> PushReport:
        """Publish what `save_pretrained` saves, with a card; `push_model` has options.

        Raises:
            UserError: not fitted, not logged in, or not allowed.
        """
        from hf_ecif.hub.push import push_model  # with plots and templates, for few

        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_model(folder, repo_id, **options)

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides a score: model, config, fit."""
        digest = sha256(f"{self.encoder.fingerprint()} {self.config.fingerprint()}".encode())
        for name, value in self.require_fit().to_state().tensors.items():
            digest.update(name.encode())
            digest.update(value.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    @property
    def theta(self) -> Tensor:
        """Attributed parameters after `fit`, ``(P,)``."""
        return self.require_fit().theta

    def require_fit(self) -> Fitted:
        """The last fit.

        Raises:
            UserError: there was none.
        """
        if self.fitted is None:
            raise UserError("This model is not fitted yet: call fit(train, query) first.")
        return self.fitted

    def read(
        self,
        dataset: Dataset,
        image_column: str = "image",
        text_column: str = "text",
        advance: Callable[[int], None] = lambda rows: None,
        checkpoints: Checkpoints | None = None,
    ) -> Rows:
        """Read rows and run the frozen part of the model on them, once.

        What comes back serves `fit` and `score` in place of the data set. With several processes,
        each reads a part.
        """
        checked = check_columns(dataset, image_column, text_column)
        rows = self.read_any(checked, image_column, text_column, advance, checkpoints)
        return require_rows(rows)

    def read_any(
        self,
        cells: Dataset | Table,
        image_column: str,
        text_column: str,
        advance: Callable[[int], None] = lambda rows: None,
        checkpoints: Checkpoints | None = None,
    ) -> Rows:
        """The same for columns that are known to be there, readable rows or none."""
        return read_rows(
            cells,
            self.encoder,
            self.processor,
            image_column=image_column,
            text_column=text_column,
            max_pixels=self.config.max_pixels,
            memory_limit=self.config.memory_limit * 2**30,
            workers=self.config.workers,
            checkpoints=checkpoints,
            advance=advance,
        )

    def fit(
        self,
        train: Rows,
        query: AnyQuery | Sequence[AnyQuery],
        progress: ProgressFactory = silent,
        checkpoints: Checkpoints | None = None,
    ) -> Fitted:
        """Fit the attributed parameters on ``train`` and solve for the query's direction.

        Args:
            train: the rows to be valued, from `read`.
            query: what is asked. Rows mean their contrastive loss, better clean than many; a
                `Query` is any other function; a list is several queries, scored in one pass.
            progress: makes a progress bar of a name and a number of steps.
            checkpoints: where every epoch and the result are kept.

        Raises:
            UserError: fewer than two rows on either side.
        """
        _check_rows("data set", train)
        for one in [query] if isinstance(query, Rows | Query) else query:
            if isinstance(one, Rows):
                _check_rows("query", one)
        known = checkpoints or Checkpoints()
        self.fitted, self.inverse = self._fit(train, query, progress, known)
        self._walked = []
        return self.fitted

    def score(
        self,
        rows: Rows,
        progress: ProgressFactory = silent,
        checkpoints: Checkpoints | None = None,
    ) -> Scores:
        """Influence of every readable row, by the direction of the last `fit`.

        Signs: negative is harmful (removing the pair is predicted to lower the query's loss),
        positive is valuable. Units: those of the query (nats of its mean loss), per pair.
        """
        return self._score(rows, self.require_fit(), progress, checkpoints or Checkpoints())

    def sizes(self, rows: Rows) -> Tensor:
        """``(N,)``, by how much the removal of each row moves the parameters; `Scores.size`."""
        fitted = self.require_fit()
        directions = fitted.directions.without_query()
        return self._score_at(fitted.theta, rows, directions, fitted.train_count).size

    def score_for(self, rows: Rows, query: AnyQuery | Sequence[AnyQuery]) -> Scores:
        """Influence on another query than that of the last `fit`, at the same parameters.

        Sizes and self-influence do not depend on the query: they are zero here; see `score`.
        """
        return self.score_through(rows, self.respond(self._gradients(query)))

    def contributions(self, rows: Rows, query: AnyQuery | Sequence[AnyQuery]) -> Scores:
        """What `score_for` gives, for what the pairs have contributed; see `contribute`."""
        return self.score_through(rows, self.contribute(self._gradients(query)))

    def solve(self, gradients: Tensor) -> Tensor:
        """``(H + damping)^-1`` times gradients at the fitted parameters, ``(P,)`` or ``(Q, P)``."""
        rows = gradients.reshape(-1, len(self.theta))
        return self._require_inverse().solve(rows)[0].view(gradients.shape)

    def respond(self, gradients: Tensor) -> list[Station]:
        """Where and along which directions pairs are scored for queries, by the config's response.

        Args:
            gradients: of the queries at the fitted parameters, ``(P,)`` or ``(Q, P)``.
        """
        if self._unrolls:
            objective = self._require_inverse().objective
            return unroll(objective, self._course(), gradients, self.config.curvature)
        return [Station(self.theta, self.solve(gradients))]

    def contribute(self, gradients: Tensor) -> list[Station]:
        """The same for contributions: what pairs have moved themselves, whoever else would have.

        A model that was not fitted here has moved nowhere; pairs are scored by the inverse
        curvature then.
        """
        if not self.config.fit_epochs:
            return [Station(self.theta, self.solve(gradients))]
        return unroll(self._require_inverse().objective, self._course(), gradients)

    def score_through(self, rows: Rows, stations: Sequence[Station]) -> Scores:
        """What `score_for` gives, for what `respond` or `contribute` gave."""
        return self._score_through(rows, stations, self.require_fit().train_count)

    def find_partners(self, rows: Rows, stations: Sequence[Station], pairs: Tensor) -> Partners:
        """In whose terms some pairs act most strongly as negatives; see `strongest_partners`.

        Args:
            rows: the training rows.
            stations: of several queries.
            pairs: ``(Q, k)``, numbers of rows, for each query its own.
        """
        fitted = self.require_fit()
        return strongest_partners(
            self.encoder,
            stations,
            rows.features,
            pairs,
            self._pass(rows),
            train_count=fitted.train_count,
        )

    def score_group(self, rows: Rows, members: Tensor) -> GroupScore:
        """Predicted change of the query if some rows were removed together.

        Args:
            rows: the training rows, members and others.
            members: ``(n,)`` booleans.
        """
        fitted = self.require_fit()
        parts = [
            score_group(
                self.encoder,
                station.theta,
                rows.features,
                station.directions,
                members,
                own,
                train_count=fitted.train_count,
            )
            for station, own in share_partitions(self._pass(rows), fitted.scored_at)
        ]
        positive, negative, stderr = map(torch.stack, zip(*parts, strict=True))
        error = stderr.square().sum(dim=0).sqrt()
        return GroupScore(positive.sum(dim=0), negative.sum(dim=0), error)

    def score_without(
        self, rows: Rows, sets: Tensor, query: AnyQuery, progress: ProgressFactory = silent
    ) -> Tensor:
        """Predicted change of the query if sets of rows were removed, each on its own; ``(K,)``.

        With the curvature without the set, and the query itself at the changed parameters: where
        a fit has memorised its pairs, `score` and `score_group` are too small. A solve for each
        set; for the rows that matter.

        Args:
            rows: the training rows of the last `fit`.
            sets: ``(K, n)`` booleans, true for rows that leave; ``torch.eye(n)[chosen].bool()`` for
                single ones.
            query: what is asked.
            progress: makes a progress bar.
        """
        fitted, config = self.require_fit(), self.config
        objective = self._fitted_objective(rows)
        before = self.query_value(query, fitted.theta)
        advance, scores = progress("Score without", len(sets)), []
        for some in sets.split(CHUNK):
            changes, _ = change_without(
                objective,
                fitted.theta,
                some,
                fitted.spectrum,
                curvature=config.curvature,
                relative_damping=config.damping,
                tolerance=ROUGH,
                max_iterations=config.max_iterations,
            )
            after = [self.query_value(query, fitted.theta + change) for change in changes]
            scores += [value - before for value in after]
            advance(len(some))
        return torch.stack(scores).cpu()

    def leverage(self, rank: int = 64) -> Tensor | None:
        """Leverages ``(N,)`` of all training rows; None of a model that was not fitted here.

        How much of what holds a row's fit is the row itself, in [0, 1): a lower bound, from the
        subspace of the largest eigenvalues alone. Where there are many more rows than the rank, it
        ranks them, and is several times too low: the size is told by `sample_leverage`, which takes
        a solve for each row. The damping is the same.

        Args:
            rank: of the subspace; that many products with the curvature.
        """
        inverse, damping = self._require_inverse(), self._damping_of_fit()
        if damping is None:
            return None
        objective, directions = inverse.objective, self.require_fit().directions.query
        vectors = nystrom(partial(objective.ggn, self.theta), self.theta, rank).vectors
        # Of the scores that come along, nothing is used: the query's directions are of another
        # damping.
        found = leverage(objective, self.theta, directions, directions, damping, vectors)
        return found.leverage

    def sample_leverage(self, count: int = 16) -> Tensor | None:
        """Leverages ``(count,)`` of random training rows; None of a model that was not fitted here.

        How much of what holds a row's fit is the row itself, in [0, 1): a lower bound. The damping
        is the `implied_penalty` of the fit, not that of the scores: `memorised` of it says whether
        they are too small to predict.
        """
        inverse, damping = self._require_inverse(), self._damping_of_fit()
        if damping is None:
            return None
        generator = torch.Generator().manual_seed(self.config.seed + 4)
        rows = torch.randperm(len(inverse.objective.features), generator=generator)[:count]
        return sample_leverage(inverse.objective, self.theta, inverse.spectrum, rows, damping)

    def refit(self, rows: Rows, *, seed: int | None = None) -> Tensor:
        """Attributed parameters ``(P,)`` fitted to ``rows`` from the model's own, as `fit` does.

        Args:
            rows: the training rows.
            seed: of the batches; the config's if absent.
        """
        generator = torch.Generator().manual_seed(self.config.seed if seed is None else seed)
        return self._fit_parameters(rows, generator)[0]

    def query_value(self, query: AnyQuery | Sequence[AnyQuery], theta: Tensor) -> Tensor:
        """The query at other attributed parameters; ``()``, or ``(Q,)`` of several queries."""
        generator = torch.Generator().manual_seed(self.config.seed)
        return self._target(query, generator).values(self.encoder, theta)

    def remove(
        self, rows: Rows, members: Tensor, *, steps: int = 1, progress: ProgressFactory = silent
    ) -> tuple[Tensor, RemovalReport]:
        """Attributed parameters as if the model had been fitted without some rows; closed form.

        What holds the change back is the penalty that would have held the fit where it stopped:
        its pull is as strong as the gradient that is left there. The config's damping is that of
        the scores, and taken only of a model that was not fitted here.

        Args:
            rows: the training rows of the last `fit`.
            members: ``(n,)`` booleans, true for rows that leave.
            steps: Newton steps, each with fresh curvature; see `hf_ecif.influence.removal`.
            progress: makes a progress bar.

        Raises:
            UserError: nothing is to be removed, or nearly everything.
        """
        fitted, config = self.require_fit(), self.config
        if not 0 < members.sum() < len(rows) - 1:
            raise UserError(
                f"{int(members.sum())} of {len(rows)} rows are to be removed: choose at least one "
                "row, and leave at least two."
            )
        damping, way = config.damping, (fitted.theta - self.encoder.theta).norm().item()
        if way:
            penalty = fitted.fit.gradient_norm / way
            damping = max(penalty / fitted.spectrum.mean_eigenvalue, LEAST_DAMPING)
        return remove(
            self._fitted_objective(rows),
            fitted.theta,
            members,
            fitted.spectrum,
            steps=steps,
            rescale=True,
            curvature=config.curvature,
            relative_damping=damping,
            tolerance=ROUGH,
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
        """Losses and cosines at the model's own parameters; its influence parts are of no query."""
        theta = self.encoder.theta
        return self._score_at(theta, rows, Directions.none(theta), len(rows))

    def _fit(
        self,
        train: Rows,
        query: AnyQuery | Sequence[AnyQuery],
        progress: ProgressFactory,
        known: Checkpoints,
        spectrum: Spectrum | None = None,
    ) -> tuple[Fitted, InverseCurvature]:
        generator = torch.Generator().manual_seed(self.config.seed)
        start = self.encoder.theta
        theta, report, objective = self._fit_parameters(train, generator, progress, known)

        known_fit = known.load("direction")
        if known_fit is not None:
            fitted = Fitted.from_state(known_fit, like=theta)
            return fitted, InverseCurvature(objective, theta, self.config, fitted.spectrum)
        inverse = InverseCurvature(objective, theta, self.config, spectrum)
        target = self._target(query, generator)
        gradients = target.gradients(self.encoder, theta)
        fitted = self._solve(inverse, target, gradients, start, generator, report)
        if self._unrolls:
            course = self._walk(objective)
            advance = progress("Unroll", len(course))
            stations = unroll(objective, course, gradients, self.config.curvature, advance)
            fitted = replace(fitted, stations=stations)
        known.save("direction", fitted.to_state())
        return fitted, inverse

    def _solve(
        self,
        inverse: InverseCurvature,
        target: Target,
        gradients: Tensor,
        start: Tensor,
        generator: torch.Generator,
        report: FitReport,
    ) -> Fitted:
        encoder, theta, objective = self.encoder, inverse.theta, inverse.objective
        rows = gradients.reshape(-1, len(theta))
        probes = random_signs((self.config.probes, len(theta)), generator).to(theta)
        # Together they take fewer products than one by one.
        solved, solve = inverse.solve(torch.cat([rows, probes]))
        direction, solved = solved.split([len(rows), len(probes)])
        cosine = torch.cosine_similarity(rows.mean(dim=0), objective.gradient(theta), dim=0)
        return Fitted(
            theta=theta,
            directions=Directions(direction.view(gradients.shape), probes, solved),
            spectrum=inverse.spectrum,
            train_count=len(objective.features),
            fit=report,
            solvers={"task score and self-influence": solve},
            query_loss_before=target.values(encoder, start).mean().item(),
            query_loss=target.values(encoder, theta).mean().item(),
            alignment=cosine.item(),
        )

    def _fit_parameters(
        self,
        rows: Rows,
        generator: torch.Generator,
        progress: ProgressFactory = silent,
        known: Checkpoints | None = None,
    ) -> tuple[Tensor, FitReport, Objective]:
        objective = self._objective(rows, generator, self.config.l2, self.encoder.theta)
        advance = progress("Fit", self.config.fit_epochs)
        theta, report = self._minimise(objective, generator, checkpoints=known, advance=advance)
        return theta, report, objective

    def _minimise(
        self, objective: Objective, generator: torch.Generator, **options: Any
    ) -> tuple[Tensor, FitReport]:
        return fit_parameters(
            objective,
            self.encoder.theta,
            batch_size=self.config.batch_size,
            epochs=self.config.fit_epochs,
            learning_rate=self.config.learning_rate,
            generator=generator,
            **options,
        )

    @property
    def _unrolls(self) -> bool:
        return self.config.response == "unrolled" and self.config.fit_epochs > 0

    def _course(self) -> list[Epoch]:
        """The course of the last fit."""
        self._walked = self._walked or self._walk(self._require_inverse().objective)
        return self._walked

    def _walk(self, objective: Objective) -> list[Epoch]:
        """The course of the fit to an objective, gone through once more: it is large to be kept."""
        course: list[Epoch] = []
        generator = torch.Generator().manual_seed(self.config.seed)
        random_batches(len(objective.features), self.config.batch_size, generator)  # its own
        self._minimise(objective, generator, course=course)
        return course

    def _score(
        self,
        rows: Rows,
        fitted: Fitted,
        progress: ProgressFactory = silent,
        known: Checkpoints | None = None,
    ) -> Scores:
        directions, count = fitted.directions, fitted.train_count
        if not fitted.stations:
            return self._score_at(fitted.theta, rows, directions, count, progress, known)
        others = directions.without_query()
        scores = self._score_at(fitted.theta, rows, others, count, silent, known)
        query = self._score_through(rows, fitted.stations, count, progress, known)
        return replace(
            scores, positive=query.positive, negative=query.negative, stderr=query.stderr
        )

    def _score_through(
        self,
        rows: Rows,
        stations: Sequence[Station],
        train_count: int,
        progress: ProgressFactory = silent,
        known: Checkpoints | None = None,
    ) -> Scores:
        return score_through(
            self.encoder,
            stations,
            rows.features,
            self._pass(rows),
            train_count=train_count,
            checkpoints=(known or Checkpoints()).within("score"),
            advance=progress("Score", len(rows) * len(stations)),
        )

    def _score_at(
        self,
        theta: Tensor,
        rows: Rows,
        directions: Directions,
        train_count: int,
        progress: ProgressFactory = silent,
        known: Checkpoints | None = None,
    ) -> Scores:
        return score_rows(
            self.encoder,
            theta,
            rows.features,
            directions,
            self._pass(rows),
            train_count=train_count,
            checkpoints=(known or Checkpoints()).within("score"),
            advance=progress("Score", len(rows)),
        )

    def _pass(self, rows: Rows) -> Pass:
        config = self.config
        return Pass(
            config.batch_size,
            config.partitions,
            config.seed + 1,
            self._same(rows),
            config.role,
            config.tangents,
        )

    def _target(self, query: AnyQuery | Sequence[AnyQuery], generator: torch.Generator) -> Target:
        if isinstance(query, Query):
            return query
        if isinstance(query, Rows):
            return ContrastiveLoss(self._objective(query, generator))
        return Several([self._target(one, generator) for one in query])

    def _gradients(self, query: AnyQuery | Sequence[AnyQuery]) -> Tensor:
        """Of a query at the fitted parameters, ``(P,)`` or ``(Q, P)``."""
        generator = torch.Generator().manual_seed(self.config.seed)
        return self._target(query, generator).gradients(self.encoder, self.theta)

    def _damping_of_fit(self) -> float | None:
        """What holds the fit where it stopped; None where there was no fit."""
        inverse, start = self._require_inverse(), self.encoder.theta
        if torch.equal(self.theta, start):
            return None
        penalty = implied_penalty(inverse.objective, self.theta, start)
        return max(penalty, LEAST_DAMPING * inverse.spectrum.mean_eigenvalue)

    def _fitted_objective(self, rows: Rows) -> Objective:
        """That of `fit`, which draws its batches first."""
        generator = torch.Generator().manual_seed(self.config.seed)
        return self._objective(rows, generator, self.config.l2, self.encoder.theta)

    def _objective(
        self,
        rows: Rows,
        generator: torch.Generator,
        l2: float = 0.0,
        center: Tensor | None = None,
    ) -> Objective:
        batches = random_batches(len(rows), self.config.batch_size, generator)
        return Objective(self.encoder, rows.features, batches, self._same(rows), l2, center)

    def _require_inverse(self) -> InverseCurvature:
        if self.inverse is None:
            raise UserError(
                "This fit was loaded without its training rows, which another query needs: call "
                "fit(train, query)."
            )
        return self.inverse

    def _same(self, rows: Rows) -> Tensor | None:
        return rows.siblings if self.config.mask_repeated else None


def _check_rows(name: str, rows: Rows) -> None:
    require_pairs(f"The {name}", rows)
    if len(set(rows.texts)) < 2:
        raise UserError(
            f"All captions of the {name} are equal ({rows.texts[0][:40]!r}), so there is nothing "
            "to tell apart. Look at --text-column."
        )
