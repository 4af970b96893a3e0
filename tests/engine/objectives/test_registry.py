"""A loss of one's own: registered in one place, fitted and scored like the others.

The toy loss is a squared error on every cell of the logits: ``J = (1/B) sum_ij (S_ij - y_ij)^2``
with targets ``y`` of `GOAL` on the diagonal and zero elsewhere. Every cell is a term, as in the
sigmoid loss, so a pair's roles are the cells that go with it.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev
from transformers import CLIPModel

from hf_ecif.config import InfluenceConfig
from hf_ecif.engine.encoder import DualEncoder
from hf_ecif.engine.features import Features
from hf_ecif.engine.objectives import (
    Contrastive,
    Embeddings,
    LinearisedLoss,
    RoleForm,
    Roles,
    contrastive,
    infonce,
    linearised,
    loss_of,
    register,
    similarity,
)
from hf_ecif.engine.objectives.linearised import Derivatives
from hf_ecif.engine.objectives.similarity import Direction
from hf_ecif.influence.model import InfluenceModel
from hf_ecif.influence.rows import Rows
from tests.conftest import build_clip, build_features

GOAL, ROWS = 3.0, 9


class ToyClip(CLIPModel):
    """A CLIP that was trained with the toy loss."""


class Squares:
    """The functions that a fit and its scores take."""

    TERMS = 1
    FULL_LENGTH = False

    def loss(
        self, embeddings: Embeddings, same: Tensor | None = None, rows: range | None = None
    ) -> Tensor:
        counted = slice(None) if rows is None else slice(rows.start, rows.stop)
        return self._cells(embeddings)[counted].sum() / len(embeddings.text)

    def pair_losses(
        self, embeddings: Embeddings, same: Tensor | None = None, rows: range | None = None
    ) -> Tensor:
        return self._cells(embeddings).diagonal()

    def linearise(
        self, embeddings: Embeddings, same: Tensor | None = None, rows: range | None = None
    ) -> LinearisedLoss:
        return linearised.linearise(embeddings, self._only_way, self._derivatives, rows)

    def roles(self, embeddings: Embeddings) -> Tensor:
        """``(B, 2)``."""
        cells = self._cells(embeddings)
        own = cells.diagonal()
        return torch.stack([own, cells.sum(dim=0) + cells.sum(dim=1) - 2 * own], dim=1)

    def role_tangents(
        self,
        embeddings: Embeddings,
        tangents: Embeddings,
        *,
        form: RoleForm = "exact",
        same: Tensor | None = None,
    ) -> Roles:
        rows = slice(0, len(embeddings.text))
        direction, moved = similarity.one_way(embeddings), similarity.one_way(tangents)
        slopes = 2 * (similarity.logits(direction, rows) - self._goal(rows, rows.stop))
        cells = slopes * similarity.logits_tangent(direction, moved, rows)
        own = cells.diagonal(dim1=-2, dim2=-1)
        return Roles(own, cells.sum(dim=-1) + cells.sum(dim=-2) - 2 * own)

    def _cells(self, embeddings: Embeddings) -> Tensor:
        rows = slice(0, len(embeddings.text))
        logits = similarity.logits(similarity.one_way(embeddings), rows)
        return (logits - self._goal(rows, rows.stop)).square()

    def _derivatives(self, direction: Direction, rows: slice) -> Derivatives:
        count = len(direction.keys)
        errors = similarity.logits(direction, rows) - self._goal(rows, count)
        return Derivatives(lambda: 2 * errors / count, lambda moved: 2 * moved / count)

    @staticmethod
    def _goal(rows: slice, count: int) -> Tensor:
        return GOAL * torch.eye(count, dtype=torch.float64)[rows]

    @staticmethod
    def _only_way(embeddings: Embeddings) -> Sequence[Direction]:
        return [similarity.one_way(embeddings)]


@pytest.fixture
def squares() -> Iterator[Squares]:
    before = [*contrastive._REGISTERED]
    loss = Squares()
    register(loss, lambda model: isinstance(model, ToyClip))  # type: ignore[arg-type]
    yield loss
    contrastive._REGISTERED[:] = before


def build_toy() -> ToyClip:
    plain = build_clip(attention="eager")
    toy = ToyClip(plain.config).double().eval()
    toy.load_state_dict(plain.state_dict())
    return toy


def test_a_loss_is_taken_for_the_models_that_it_suits(squares: Squares) -> None:
    assert loss_of(build_toy()) is squares
    assert loss_of(build_clip()) is infonce
    assert DualEncoder(build_toy()).contrastive is squares


def test_without_it_the_model_has_the_loss_of_its_kind() -> None:
    assert loss_of(build_toy()) is infonce


def test_fit_and_scores_are_those_of_the_loss(squares: Squares) -> None:
    """Against autograd: the fit ends at a lower loss, scores are ``s . grad(Pos + Neg) / N``."""
    config = InfluenceConfig(
        batch_size=ROWS,
        fit_epochs=3,
        solver="exact",
        damping=1.0,
        tolerance=1e-9,
        probes=1,
        partitions=2,
        parameters="text_projection",
    )
    model = InfluenceModel(build_toy(), None, config)
    train, query = (named_rows(model.encoder, seed) for seed in (0, 5))
    influence = model.fit(train, query)
    assert influence.fitted.fit.loss_after < influence.fitted.fit.loss_before

    def embed(theta: Tensor, rows: Rows) -> Embeddings:
        return model.encoder._embed(rows.features, theta)

    def objective(theta: Tensor, rows: Rows) -> Tensor:
        return squares.loss(embed(theta, rows))

    def logits(embeddings: Embeddings) -> Tensor:
        return similarity.logits(similarity.one_way(embeddings), slice(0, ROWS))

    theta = influence.theta
    with torch.enable_grad():
        slope = grad(partial(objective, rows=query))(theta)
        cells = jacrev(lambda at: logits(embed(at, train)))(theta).flatten(0, 1)
        roles = jacrev(lambda at: squares.roles(embed(at, train)))(theta)
    damping = influence.fitted.solvers["task score"].damping
    curvature = 2 / ROWS * cells.T @ cells  # Gauss-Newton: the loss is a square in the logits
    direction = torch.linalg.solve(curvature + damping * torch.eye(len(theta)), slope)
    scores = influence.scores()
    expected = roles @ direction / ROWS
    torch.testing.assert_close(scores.positive, expected[:, 0])
    torch.testing.assert_close(scores.negative, expected[:, 1])
    torch.testing.assert_close(scores.loss, squares.roles(embed(theta, train))[:, 0])
    assert scores.terms == 1


def named_rows(encoder: DualEncoder, seed: int) -> Rows:
    features: Features = encoder.freeze(build_features(ROWS, seed))
    return Rows(features, torch.arange(ROWS), [f"row {i}" for i in range(ROWS)], {}, ROWS)


def test_the_modules_have_all_that_is_asked_of_a_loss() -> None:
    wanted = {name for name in vars(Contrastive) if not name.startswith("_")}
    wanted |= {*Contrastive.__annotations__}
    for loss in (infonce, contrastive.sigmoid):
        assert wanted <= {*vars(loss)}
