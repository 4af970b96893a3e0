"""Influence of training rows on a query: it scores rows, predicts removals, and is saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, Features, Value, concatenate_datasets
from numpy.typing import ArrayLike
from torch import Tensor

from hf_ecif.config import InfluenceConfig
from hf_ecif.data.columns import SCORES
from hf_ecif.data.schema import check_columns, drop_influence_columns
from hf_ecif.errors import UserError
from hf_ecif.influence.batching import query_target, scoring_pass
from hf_ecif.influence.columns import REASON, reason_column, score_columns
from hf_ecif.influence.fitted import Fitted
from hf_ecif.influence.loaded import AnyRows, Asked, LoadedModel
from hf_ecif.influence.partners import Partners, strongest_partners
from hf_ecif.influence.response import (
    Checkpoint,
    Response,
    choose_contribution,
    choose_response,
    respond,
    score_through,
    share_partitions,
)
from hf_ecif.influence.rows import Rows
from hf_ecif.influence.saving import SavedFit, load_fit, save_fit
from hf_ecif.influence.scoring import (
    Directions,
    GroupScore,
    Scores,
    join_groups,
    score_group,
    score_rows,
)
from hf_ecif.influence.training import Training, train
from hf_ecif.models.load import load_model
from hf_ecif.utils.checkpoints import Checkpoints
from hf_ecif.utils.files import FIT
from hf_ecif.utils.progress import ProgressFactory, silent

if TYPE_CHECKING:
    from hf_ecif.hub.push import PushReport


@dataclass(frozen=True, eq=False, repr=False)
class Influence:
    """Influence on a query, of the rows that the model was fitted to and of any others.

    Signs: negative is harmful (removing the pair is predicted to lower the query's loss), positive
    is valuable. Units: those of the query (nats of its mean loss), per pair.

    Attributes:
        model: the fitted model; its own parameters are unchanged.
        config: everything that determines a score.
        fitted: results of the fit: parameters, directions, spectrum and reports.

    Examples:
        >>> import hf_ecif
        >>> demo = hf_ecif.load_demo()
        >>> pairs = demo.dataset.select(range(60))
        >>> model = hf_ecif.InfluenceModel.from_pretrained(demo.model)
        >>> influence = model.fit(pairs, demo.query)
        >>> influence.score_group(pairs["is_misaligned"][:]).task.shape
        torch.Size([])
        >>> influence.score(demo.test.select(range(8)))["ecif_score"][0] != 0
        True
    """

    model: LoadedModel
    config: InfluenceConfig
    fitted: Fitted
    _training: Training | None = None

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> Influence:
        """Influence that `save_pretrained` wrote, with its config but without its training rows.

        Args:
            name_or_path: a folder or a Hub id, as for `InfluenceModel.from_pretrained`.
            revision: branch, tag or commit on the Hub.
            token: access token of the Hub; the user's login if absent.
            dtype: dtype of the weights; that of accelerate's settings if absent.
            device: device of the weights; accelerate's if absent.

        Raises:
            UserError: nothing there, or no fit.
        """
        name = str(name_or_path)
        network, processor = load_model(
            name, revision=revision, token=token, dtype=dtype, device=device
        )
        saved = load_fit(name, revision=revision, token=token)
        if saved is None:
            raise UserError(
                f"{name} holds no fit. Give what Influence.save_pretrained or hf-ecif fit wrote, "
                "or fit the model: InfluenceModel.from_pretrained(name).fit(train, query)."
            )
        model = LoadedModel(network, processor, saved.config, saved.model)
        return cls(model, model.config, Fitted.from_state(saved.fitted, like=model.encoder.theta))

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the model as given, the processor, and the fit: all that scoring needs.

        `from_pretrained` reads it; that of transformers reads the model alone.

        Raises:
            UserError: the model came with adapters of its own.
        """
        Path(folder, FIT).unlink(missing_ok=True)
        self.model.save_pretrained(folder)
        fit = SavedFit(self.model.name, self.config, self.fitted.to_state())
        save_fit(Path(folder), fit)  # written last: with a fit, everything else is complete

    def push_to_hub(self, repo_id: str, **options: Any) -> PushReport:
        """Publish the files of `save_pretrained` with a card; options are those of `push_model`.

        Raises:
            UserError: not logged in, or not allowed.
        """
        from hf_ecif.hub.push import push_model  # imports plots and templates, which few need

        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_model(folder, repo_id, **options)

    @property
    def training(self) -> Training:
        """The training rows, their batches, and the way of the fit.

        Raises:
            UserError: the fit was loaded without them.
        """
        if self._training is None:
            raise UserError(
                "This fit was loaded without its training rows, which are needed here: call "
                "fit(train, query)."
            )
        return self._training

    @property
    def theta(self) -> Tensor:
        """Fitted values of the attributed parameters, ``(P,)``."""
        return self.fitted.theta

    @property
    def rows(self) -> Rows:
        """Training rows.

        Raises:
            UserError: the fit was loaded without them.
        """
        return self.training.rows

    @property
    def fingerprint(self) -> str:
        """Hash of everything that determines a score: model, config, fit."""
        digest = sha256(f"{self.model.encoder.fingerprint()} {self.config.fingerprint()}".encode())
        for name, value in self.fitted.to_state().tensors.items():
            digest.update(name.encode())
            digest.update(value.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def __repr__(self) -> str:
        """One line of text, without the tensors."""
        return repr(self.fitted).replace("Fitted", type(self).__name__, 1)

    def score(
        self, rows: AnyRows, image_column: str = "image", text_column: str = "text"
    ) -> Dataset:
        """Data set with influence columns, null for rows that cannot be scored.

        Args:
            rows: a data set, which keeps its other columns, except influence columns of an
                earlier run; or `Rows`, for which only the influence columns are returned.
            image_column: column of images, for a data set.
            text_column: column of captions, for a data set.

        Raises:
            UserError: a column is missing.
        """
        if isinstance(rows, Rows):
            return _with_columns(None, influence_columns(self, self.model.rows(rows)))
        plain = drop_influence_columns(rows)
        checked = check_columns(plain, image_column, text_column)
        found = self.model.read_any(checked, image_column, text_column)
        return _with_columns(plain, influence_columns(self, found))

    def scores(
        self,
        rows: AnyRows | None = None,
        progress: ProgressFactory = silent,
        checkpoints: Checkpoints | None = None,
    ) -> Scores:
        """Scores of every readable row, as tensors.

        Args:
            rows: rows to score; the training rows if absent.
            progress: makes a progress bar.
            checkpoints: store of the scores of finished chunks.
        """
        found, fitted = self._rows(rows), self.fitted
        kept = (checkpoints or Checkpoints()).within("score")
        if not fitted.checkpoints:
            return _score_along(self, found, fitted.directions, progress, kept)
        scores = _score_along(self, found, fitted.directions.without_query(), silent, kept)
        query = self.scores_through(fitted.checkpoints, found, progress, kept)
        return replace(
            scores, positive=query.positive, negative=query.negative, stderr=query.stderr
        )

    def sizes(self, rows: AnyRows | None = None) -> Tensor:
        """Norm of the change of the parameters without each row, ``(n,)``; see `Scores.size`."""
        return _score_along(self, self._rows(rows), self.fitted.directions.without_query()).size

    def scores_for(self, query: Asked, rows: AnyRows | None = None) -> Scores:
        """Scores for a query other than that of the fit, at the same parameters.

        Sizes and self-influence, which do not depend on the query, are zero; see `scores`.

        Args:
            query: see `InfluenceModel.fit`.
            rows: rows to score; the training rows if absent.

        Raises:
            UserError: the fit was loaded without its training rows.
        """
        response = choose_response(self.config)
        return self.scores_through(_checkpoints(self, response, query), rows)

    def contributions(self, query: Asked, rows: AnyRows | None = None) -> Scores:
        """`scores_for` by contributions, even if other pairs would have made them instead."""
        return self.scores_through(
            _checkpoints(self, choose_contribution(self.config), query), rows
        )

    def scores_through(
        self,
        checkpoints: Sequence[Checkpoint],
        rows: AnyRows | None = None,
        progress: ProgressFactory = silent,
        kept: Checkpoints | None = None,
    ) -> Scores:
        """Scores along the directions of checkpoints from `respond` or `contribute`.

        Args:
            checkpoints: checkpoints of a response.
            rows: rows to score; the training rows if absent.
            progress: makes a progress bar.
            kept: store of the scores of finished chunks.
        """
        found = self._rows(rows)
        return score_through(
            self.model.encoder,
            checkpoints,
            found.features,
            scoring_pass(found, self.config),
            train_count=self.fitted.train_count,
            kept=kept,
            advance=progress("Score", len(found) * len(checkpoints)),
        )

    def partners(
        self, checkpoints: Sequence[Checkpoint], pairs: Tensor, rows: AnyRows | None = None
    ) -> Partners:
        """Pairs in whose terms others act most strongly as negatives; see `strongest_partners`.

        Args:
            checkpoints: checkpoints of several queries.
            pairs: ``(Q, k)``, numbers of rows for each query.
            rows: rows to which the numbers refer; the training rows if absent.
        """
        found = self._rows(rows)
        return strongest_partners(
            self.model.encoder,
            checkpoints,
            found.features,
            pairs,
            scoring_pass(found, self.config),
            train_count=self.fitted.train_count,
        )

    def score_group(self, members: Tensor | ArrayLike) -> GroupScore:
        """Predicted change of the query if some training rows were removed together.

        Args:
            members: booleans, true for rows that leave; one for each readable row, ``(n,)``, or for
                each row of the data set.
        """
        rows, fitted = self.rows, self.fitted
        chosen = rows.chosen(members)
        passes = share_partitions(scoring_pass(rows, self.config), fitted.scored_at)
        return join_groups(
            score_group(
                self.model.encoder,
                checkpoint.theta,
                rows.features,
                checkpoint.directions,
                chosen,
                own,
                train_count=fitted.train_count,
            )
            for checkpoint, own in passes
        )

    def score_without(
        self, sets: Tensor, query: Asked, progress: ProgressFactory = silent
    ) -> Tensor:
        """Predicted change of the query if sets of rows were removed, each separately; ``(K,)``.

        It uses the curvature without the set, and the query at the changed parameters: if a fit has
        memorised its pairs, `scores` and `score_group` are too small. It takes a solve for each
        set, so it is meant for a few rows.

        Args:
            sets: ``(K, n)`` booleans, true for rows that leave; ``torch.eye(n)[chosen].bool()`` for
                single ones.
            query: what is asked.
            progress: makes a progress bar.
        """
        training, advance = self.training, progress("Score without", len(sets))
        asked = self.model.asked(query)
        before = self.model.query_value(asked, self.theta)
        scores = []
        for change in training.changes_without(sets):
            scores.append(self.model.query_value(asked, self.theta + change) - before)
            advance(1)
        return torch.stack(scores).cpu()

    def leverage(self, rank: int = 64) -> Tensor | None:
        """Leverages ``(n,)`` of the training rows; None if the fit has not moved the parameters.

        A leverage is the share of a row's fit that is due to the row itself, in [0, 1). This is a
        lower bound, from the subspace of the largest eigenvalues. With many more rows than the
        rank, it ranks them but is several times too low; `sample_leverage` gives the size, with a
        solve for each row and the same damping.

        Args:
            rank: dimension of the subspace, and number of products with the curvature.
        """
        training = self.training
        if training.is_still:
            return None
        return training.leverage(self.fitted.directions.query, rank)

    def sample_leverage(self, count: int = 16) -> Tensor | None:
        """Leverages of random training rows; None if the fit has not moved the parameters.

        A leverage is the share of a row's fit that is due to the row itself, in [0, 1); this is a
        lower bound. The damping is the `implied_penalty` of the fit, not that of the scores.
        `memorised` tells from the result whether scores are too small to predict.

        Args:
            count: number of rows.
        """
        training = self.training
        return None if training.is_still else training.sample_leverage(count)

    def refit(self, members: Tensor | ArrayLike, *, seed: int | None = None) -> Tensor:
        """Attributed parameters ``(P,)`` after another fit without some training rows.

        Args:
            members: booleans, true for rows that leave, as in `score_group`.
            seed: seed of the batches; the config's if absent.
        """
        rows = self.rows
        rest = rows.select((~rows.chosen(members)).nonzero()[:, 0])
        seed = self.config.seed if seed is None else seed
        return train(self.model.encoder, rest, self.config, seed).theta

    def remove(
        self, members: Tensor | ArrayLike, *, steps: int = 1, progress: ProgressFactory = silent
    ) -> Any:
        """Copy of the fitted model without the influence of some training rows.

        Adapters are merged into its weights. `Training.remove` also returns a report.

        Args:
            members: booleans, true for rows that leave, as in `score_group`.
            steps: Newton steps, each with fresh curvature; see `hf_ecif.influence.removal`.
            progress: makes a progress bar.

        Raises:
            UserError: no row is removed, or nearly every row.
        """
        chosen, advance = self.rows.chosen(members), progress("Remove", steps)
        return self.model.edited(self.training.remove(chosen, steps, advance)[0])

    def _rows(self, rows: AnyRows | None) -> Rows:
        return self.rows if rows is None else self.model.rows(rows)


def influence_columns(influence: Influence, rows: Rows) -> dict[str, list[Any]]:
    """Influence columns of rows: scores, a value for every row, and why a row has none."""
    if len(set(rows.texts)) < 2:
        alone = "no other caption in its batch to compare it with"
        nothing: list[Any] = [None] * rows.total
        return dict.fromkeys(SCORES, nothing) | {REASON: reason_column(rows, alone)}
    scores, given = influence.scores(rows), influence.model.score_as_given(rows)
    columns = score_columns(rows, scores, given, influence.config.relative)
    return {**columns, REASON: reason_column(rows)}


def _checkpoints(influence: Influence, response: Response, query: Asked) -> list[Checkpoint]:
    """Where and along which directions a response scores a query."""
    model, theta = influence.model, influence.theta
    target = query_target(model.encoder, model.asked(query), influence.config)
    return respond(response, influence.training, target.gradients(model.encoder, theta))


def _score_along(
    influence: Influence,
    rows: Rows,
    directions: Directions,
    progress: ProgressFactory = silent,
    kept: Checkpoints | None = None,
) -> Scores:
    """Scores of rows at the fitted parameters."""
    return score_rows(
        influence.model.encoder,
        influence.theta,
        rows.features,
        directions,
        scoring_pass(rows, influence.config),
        train_count=influence.fitted.train_count,
        checkpoints=kept,
        advance=progress("Score", len(rows)),
    )


def _with_columns(dataset: Dataset | None, columns: dict[str, list[Any]]) -> Dataset:
    types = {name: Value("string" if name == REASON else "float32") for name in columns}
    scored = Dataset.from_dict(columns, features=Features(**types))
    return scored if dataset is None else concatenate_datasets([dataset, scored], axis=1)
