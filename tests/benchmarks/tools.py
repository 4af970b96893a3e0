"""EK-FAC by kronfluence and TRAK by traker, on fitted projections and cached activations.

    pip install --no-deps kronfluence traker && pip install einops einconv opt-einsum tqdm

Both are optional: they are imported when they are asked for, and `is_installed` tells beforehand.
They say of every training row by how much the query's loss would change without it, in all
settings of their damping (EK-FAC) or ridge and dimension (TRAK).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from hf_ecif.influence.rows import Rows
from tests.benchmarks.heads import Heads, average_visits, logits_of, pair_losses, partitions
from tests.benchmarks.lds import CONFIG, Problem

OWN_DAMPING = "0.1, by layer"  # the library's: a tenth of a layer's mean eigenvalue
DAMPINGS = (0.01, 1.0, 10.0, 30.0, 100.0, 1000.0)  # of EK-FAC, in units of its mean eigenvalue
RIDGES = (0.1, 1.0, 10.0, 100.0, 1e3, 1e4)  # of TRAK, in units of the mean diagonal of its matrix
TRAK_DIMENSIONS = (512, 2048)

Variants = Iterator[tuple[str, Tensor]]
"""Names and scores: the predicted change of the query without a row."""


def is_installed(module: str) -> bool:
    return find_spec(module) is not None


# ------------------------------------------------------------------------------ EK-FAC, kronfluence


def ek_fac(problem: Problem, folder: Path) -> Kronfluence:
    """On the projections and the cached activations; the library writes into the folder."""
    train, query = problem.train, problem.query
    data = [
        Batched(rows.features.text, rows.features.image, rows.same_text, torch.cat(batches))
        for rows, batches in (
            (train, problem.batches),
            (query, problem.query_batches),
            (train, partitions(problem, CONFIG.partitions)),
        )
    ]
    names = ["visual_projection", "text_projection"]
    return Kronfluence(problem, Heads(problem), names, data, folder)


def ek_fac_scores(tool: Kronfluence) -> Variants:
    """By the tool's own damping, then by others."""
    tool.fit()
    yield OWN_DAMPING, tool.score(None)
    yield "1e-8, absolute", tool.score(1e-8)
    mean = tool.mean_eigenvalue()
    for relative in DAMPINGS:
        yield f"{relative:g}", tool.score(relative * mean)
        yield f"{relative:g}, 6 partitions", tool.score(relative * mean, more=True)


def ek_fac_self_scores(tool: Kronfluence) -> Variants:
    """What a row holds up of its own loss, by the same dampings; `tool` has been fitted."""
    yield OWN_DAMPING, tool.score_self(None)
    for relative in DAMPINGS:
        yield f"{relative:g}", tool.score_self(relative * tool.mean_eigenvalue())


class Batched(Dataset):
    """Rows in the order of contrastive batches, so that a loader without shuffling makes these."""

    def __init__(
        self, text: dict[str, Tensor], image: dict[str, Tensor], same: Tensor, order: Tensor
    ) -> None:
        self.text, self.image, self.same, self.order = text, image, same, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> dict[str, Any]:
        row = self.order[position]
        return {
            "text": {key: value[row] for key, value in self.text.items()},
            "image": {key: value[row] for key, value in self.image.items()},
            "same": self.same[row],
        }


class Kronfluence:
    """The library, with the batch's loss for its per-sample loss.

    It differentiates the sum of the batch's pair losses by what each row's projections put out.
    So a row's gradient holds its own terms and its share, through its embeddings, in those of all
    others; it is not that of the row's terms, nor of the row's removal.
    """

    def __init__(
        self,
        problem: Problem,
        model: nn.Module,
        names: list[str],
        data: list[Batched],
        folder: Path,
    ) -> None:
        from kronfluence.analyzer import Analyzer, prepare_model

        scale = float(problem.model.logit_scale.exp())
        task = kronfluence_task(names, scale, len(problem.query_batches))
        self.problem, self.data = problem, data
        self.analyzer = Analyzer(
            "peers",
            prepare_model(model, task),
            task,
            cpu=True,
            disable_tqdm=True,
            output_dir=str(folder),
        )
        self.scored = 0

    def fit(self) -> None:
        """Covariances, their eigenvectors, and the eigenvalues."""
        self.analyzer.fit_all_factors("factors", self.data[0], CONFIG.batch_size)

    def mean_eigenvalue(self) -> float:
        """Over both layers."""
        factors = self.analyzer.load_lambda_matrices("factors")
        counts = factors["num_lambda_processed"]
        sums = [matrix.sum() / counts[name] for name, matrix in factors["lambda_matrix"].items()]
        return float(sum(sums) / len(self.problem.theta))

    def score(self, damping: float | None, *, more: bool = False) -> Tensor:
        """Predicted change of the query without each row."""
        from kronfluence.arguments import ScoreArguments

        self.scored += 1
        batches = partitions(self.problem, CONFIG.partitions if more else 1)
        self.analyzer.compute_pairwise_scores(
            f"scores{self.scored}",
            "factors",
            self.data[1],
            self.data[2 if more else 0],
            per_device_query_batch_size=len(self.problem.query_batches[0]),
            per_device_train_batch_size=CONFIG.batch_size,
            score_args=ScoreArguments(damping_factor=damping, aggregate_query_gradients=True),
        )
        # Up-weighting a row lowers the loss by the score over N, so its removal raises it by that.
        values = self.analyzer.load_pairwise_scores(f"scores{self.scored}")["all_modules"][0]
        count = len(self.problem.train)
        return average_visits(batches, values, count) / count

    def score_self(self, damping: float | None) -> Tensor:
        """``g' (H + damping)^-1 g`` of each row's gradient ``g``; higher where more suspicious."""
        from kronfluence.arguments import ScoreArguments

        self.scored += 1
        self.analyzer.compute_self_scores(
            f"self{self.scored}",
            "factors",
            self.data[0],
            per_device_train_batch_size=CONFIG.batch_size,
            score_args=ScoreArguments(damping_factor=damping),
        )
        values = self.analyzer.load_self_scores(f"self{self.scored}")["all_modules"]
        return average_visits(self.problem.batches, values, len(self.problem.train))


def kronfluence_task(names: list[str], scale: float, query_batches: int) -> Any:
    """CLIP's loss in the terms of the library; the true Fisher draws the partner of every row."""
    from kronfluence.task import Task

    class Contrastive(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            logits = logits_of(*model(batch["text"], batch["image"]), scale, batch["same"])
            if not sample:
                return pair_losses(logits).sum()
            with torch.no_grad():
                drawn = tuple(s.softmax(dim=1).multinomial(1)[:, 0] for s in (logits, logits.T))
            return pair_losses(logits, drawn).sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            logits = logits_of(*model(batch["text"], batch["image"]), scale, batch["same"])
            return pair_losses(logits).mean() / query_batches

        def get_influence_tracked_modules(self) -> list[str]:
            return names

    return Contrastive()


# ------------------------------------------------------------------------------- TRAK, traker


class Clip(nn.Module):
    """The heads as open_clip has them, which the library's CLIP output asks for.

    Args:
        share: the power of the inverse temperature that is multiplied into each embedding. The
            library's output function knows no temperature; a half each puts it there.
    """

    def __init__(self, problem: Problem, share: float) -> None:
        super().__init__()
        self.heads = Heads(problem)
        scale = problem.model.logit_scale.exp().item()
        self.factor, self.temperature = scale**share, scale ** (1 - 2 * share)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, float]:
        """Embeddings of images and texts, and what still multiplies their products."""
        texts, images = self.heads({"hidden": text}, {"hidden": image})
        return self.factor * images, self.factor * texts, self.temperature


def trak(problem: Problem, folder: Path) -> Callable[[], Variants]:
    """One checkpoint, the fitted one, and the library's output function for CLIP."""
    from trak import TRAKer

    def scores(number: int, ridge: float, dimension: int, share: float) -> tuple[Tensor, float]:
        tool = trak_task()
        model = Clip(problem, share).requires_grad_(True)
        traker = TRAKer(
            model,
            tool,
            len(problem.train),
            save_dir=str(folder / str(number)),
            device="cpu",
            proj_dim=dimension,
            use_half_precision=False,
            lambda_reg=ridge,
            logging_level=40,
        )
        return trak_scores(traker, model, tool, problem)

    def run() -> Variants:
        number = 0
        for share, temperature in ((0.0, "as shipped"), (0.5, "with temperature")):
            number += 1
            plain, diagonal = scores(number, 0.0, TRAK_DIMENSIONS[0], share)
            yield f"{temperature}, {TRAK_DIMENSIONS[0]}, ridge 0", plain
            for dimension, ridge in product(TRAK_DIMENSIONS, RIDGES):
                number += 1
                name = f"{temperature}, {dimension}, ridge {ridge:g}"
                yield name, scores(number, ridge * diagonal, dimension, share)[0]

    return run


def trak_task() -> Any:
    from trak.modelout_functions import CLIPModelOutput

    class Output(CLIPModelOutput):
        def get_out_to_loss_grad(self, *args: Any) -> Tensor:
            return super().get_out_to_loss_grad(*args)[:, None]  # a column, as the store has it

    return Output(simulated_batch_size=CONFIG.batch_size)


def trak_scores(traker: Any, model: nn.Module, task: Any, problem: Problem) -> tuple[Tensor, float]:
    """Predicted change of the query, and the mean diagonal of the library's matrix."""
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with redirect_stderr(open(os.devnull, "w")), redirect_stdout(open(os.devnull, "w")):
        contrast_with(task, model, problem.train)
        traker.load_checkpoint(state, model_id=0)
        for rows in torch.arange(len(problem.train)).split(CONFIG.batch_size):
            traker.featurize(inputs_of(problem.train, rows), inds=rows.numpy())
        diagonal = float(np.square(traker.saver.current_store["grads"]).sum(axis=0).mean())
        traker.finalize_features()
        contrast_with(task, model, problem.query)
        traker.start_scoring_checkpoint("query", state, 0, num_targets=len(problem.query))
        for rows in torch.arange(len(problem.query)).split(CONFIG.batch_size):
            traker.score(inputs_of(problem.query, rows), inds=rows.numpy())
        scores = torch.tensor(np.array(traker.finalize_scores("query")))
    # A row's score is what it adds to the output of a query pair; the loss falls with the output
    # by one less the pair's probability.
    weights = query_weights(task, model, problem)
    return scores @ weights, diagonal


def contrast_with(task: Any, model: nn.Module, rows: Rows) -> None:
    """What `get_embeddings` of the library does, which insists on CUDA."""
    kind = type(task).__mro__[1]
    with torch.no_grad():
        image, text, _ = model(rows.features.image["hidden"], rows.features.text["hidden"])
    kind.image_embeddings, kind.text_embeddings = image, text
    kind.num_computed_embeddings = len(rows)
    kind.sim_batch_size = min(CONFIG.batch_size, len(rows))


def inputs_of(rows: Rows, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Images, then texts."""
    return rows.features.image["hidden"][chosen], rows.features.text["hidden"][chosen]


def query_weights(task: Any, model: nn.Module, problem: Problem) -> Tensor:
    """By how much the mean loss falls with the output of each query pair."""
    parts = [
        task.get_out_to_loss_grad(model, dict(model.named_parameters()), {}, inputs)[:, 0]
        for inputs in (inputs_of(problem.query, batch) for batch in problem.query_batches)
    ]
    return average_visits(problem.query_batches, torch.cat(parts), len(problem.query)) / len(
        problem.query
    )
