"""A small model that can be refitted to convergence: the oracle of predictions.

Its objective and its losses are written out here, apart from the library.
"""

from contextlib import AbstractContextManager, ExitStack

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian
from transformers import CLIPConfig, CLIPModel

from hf_ecif.engine.encoder import DualEncoder
from hf_ecif.engine.features import Features
from hf_ecif.engine.objective import Objective
from hf_ecif.engine.objectives import RoleForm
from hf_ecif.engine.solvers import ConjugateGradients, solve
from hf_ecif.engine.system import System, estimate_spectrum
from hf_ecif.influence import scoring
from hf_ecif.influence.scoring import Directions, Pass, Scores, score_rows

PAIRS, BATCH, WIDTH, DIM, WRONG = 32, 8, 12, 8, 5
BATCHES = list(torch.arange(PAIRS).split(BATCH))
L2 = 1.0
RAW = Features(
    {"input_ids": torch.tensor([[0, 9]])}, {"pixel_values": torch.zeros(1, 3, 8, 8).double()}
)
EVERY = -1  # no pair is gone


def linear_clip() -> CLIPModel:
    """Only its two projections count here: the rows are pooled activations already."""
    tower = {
        "hidden_size": WIDTH,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    config = CLIPConfig(
        text_config={
            **tower,
            "vocab_size": 10,
            "max_position_embeddings": 4,
            "bos_token_id": 0,
            "pad_token_id": 1,
            "eos_token_id": 9,
        },
        vision_config={**tower, "image_size": 8, "patch_size": 8},
        projection_dim=DIM,
        logit_scale_init_value=1.6,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return CLIPModel(config).double()


def gaussian(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def views() -> Tensor:
    """Of a hidden point, as a text and as an image."""
    return gaussian(7, 2, DIM, WIDTH)


def pretrained() -> Tensor:
    """Projections that undo the views, but for some error."""
    undo = torch.linalg.pinv(views()).flip(0).transpose(1, 2)  # images first, as in the model
    return (undo + 0.1 * gaussian(8, 2, DIM, WIDTH)).flatten()


def clustered_pairs(count: int, seed: int) -> Features:
    """Text and image are noisy linear views of one hidden point near one of six centres."""
    hidden = gaussian(9, 6, DIM)[torch.arange(count) % 6] + 0.5 * gaussian(seed, count, DIM)
    text, image = hidden @ views() + 0.3 * gaussian(seed + 100, 2, count, WIDTH)
    return Features({"hidden": text}, {"hidden": image})


def batch_terms(theta: Tensor, features: Features, rows: Tensor) -> Tensor:
    """``sum_n [-log p_nn - log q_nn]`` of the rows, written out."""
    image_weight, text_weight = theta.view(2, DIM, WIDTH)
    text = features.text["hidden"][rows] @ text_weight.T
    image = features.image["hidden"][rows] @ image_weight.T
    text, image = (x / x.norm(dim=1, keepdim=True) for x in (text, image))
    logits = torch.tensor(1.6, dtype=torch.float64).exp() * text @ image.T
    return -(logits.log_softmax(1).diagonal() + logits.log_softmax(0).diagonal()).sum()


def training_loss(theta: Tensor, start: Tensor, features: Features, gone: int) -> Tensor:
    """``J`` without a pair; the mean keeps its denominator.

    The norm of a projection does not change a cosine, so ``|theta|^2`` alone would have no
    minimum: it would only shrink the weights. Here it is the distance from the start that is
    penalised, which has the same curvature.
    """
    terms = [batch_terms(theta, features, rows[rows != gone]) for rows in BATCHES]
    return sum(terms) / (2 * PAIRS) + L2 / 2 * (theta - start).square().sum()


def minimise(start: Tensor, origin: Tensor, features: Features, gone: int) -> Tensor:
    """To convergence, in float64: L-BFGS into the basin, Newton steps to its bottom."""
    theta = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [theta], max_iter=300, tolerance_grad=1e-4, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = training_loss(theta, origin, features, gone)
        value.backward()
        return value

    def of_theta(theta: Tensor) -> Tensor:
        return training_loss(theta, origin, features, gone)

    optimizer.step(closure)
    bottom = theta.detach()
    for _ in range(6):
        slope = grad(of_theta)(bottom)
        if slope.norm() < 1e-9:
            return bottom
        bottom = bottom - torch.linalg.solve(hessian(of_theta)(bottom), slope)
    raise AssertionError("the oracle found no minimum")


class Study:
    """A fit of clustered pairs, one of them with a wrong caption, and the scores of all pairs."""

    def __init__(self) -> None:
        self.encoder = DualEncoder(linear_clip(), "projections")
        self.encoder.freeze(RAW)  # the activations that follow stand for what this makes
        self.features = clustered_pairs(PAIRS, seed=1)
        other = clustered_pairs(PAIRS, seed=3)  # of its own, and of the next cluster
        self.features.text["hidden"][WRONG] = other.text["hidden"][WRONG + 1]
        self.query = clustered_pairs(12, seed=2)
        self.origin = pretrained()
        self.theta = minimise(self.origin, self.origin, self.features, EVERY)
        self.scores = {form: self._score(form) for form in ("exact", "first_order")}

    def query_loss(self, theta: Tensor) -> Tensor:
        return batch_terms(theta, self.query, torch.arange(12)) / 24

    def _score(self, form: RoleForm) -> Scores:
        held_out = Objective(self.encoder, self.query, [torch.arange(12)])
        training = Objective(self.encoder, self.features, BATCHES, l2=L2)

        def product(vectors: Tensor) -> Tensor:
            return training.ggn(self.theta, vectors)

        system = System(product, estimate_spectrum(product, self.theta), relative_damping=1e-6)
        solver = ConjugateGradients(tolerance=1e-8)
        solved, report = solve(system, held_out.gradient(self.theta)[None], solver)
        assert report.converged
        with in_batches_of_training():
            return score_rows(
                self.encoder,
                self.theta,
                self.features,
                Directions.none(self.theta)._replace(query=solved[0]),
                Pass(BATCH, 1, 0, form=form),
                train_count=PAIRS,
            )

    def true_change(self, pair: int) -> float:
        """``F(theta without the pair) - F(theta)`` by a refit."""
        refitted = minimise(self.theta, self.origin, self.features, pair)
        return float(self.query_loss(refitted) - self.query_loss(self.theta))


def in_batches_of_training() -> AbstractContextManager[None]:
    """The retraining below keeps its batches, so the scores are of these."""
    patch = pytest.MonkeyPatch()
    patch.setattr(scoring, "row_chunks", lambda *_: [torch.arange(PAIRS)])
    patch.setattr(scoring, "random_batches", lambda *_: BATCHES)
    stack = ExitStack()
    stack.callback(patch.undo)
    return stack


def spearman(left: Tensor, right: Tensor) -> float:
    ranks = torch.stack([left, right]).argsort(dim=1).argsort(dim=1).double()
    return float(torch.corrcoef(ranks)[0, 1])
