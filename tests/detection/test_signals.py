"""What tells misaligned rows, against sums over single rows, and that it does tell them."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor
from torch.nn.functional import normalize

from hf_ecif.detection.detect import auroc
from hf_ecif.detection.signals import find_signals, signal_errors
from hf_ecif.engine.objectives import Embeddings
from hf_ecif.influence.scoring import Scores

TOPICS, EACH, WIDTH = 10, 6, 16


def scores(**changes: Any) -> Scores:
    values: dict[str, Any] = {
        "stderr": torch.tensor([1e-4, 2e-4]),
        "size": torch.tensor([0.1, 0.2]),
        "size_stderr": torch.tensor([0.01, 0.001]),
        "task": torch.tensor([3e-3, -1e-3]),
        "loo_loss": torch.tensor([2.0, 0.5]),
        "self_stderr": torch.tensor([0.05, 0.01]),
    }
    values |= changes
    values["relative"] = values["task"] / values["size"]
    values["loss"] = values["loo_loss"] / 2
    return SimpleNamespace(**values)  # type: ignore[return-value]


def like_rows(seed: int = 0) -> Embeddings:
    """Topics of rows that look alike and say the like."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    topics = draw(TOPICS, WIDTH).repeat_interleave(EACH, dim=0)
    text, image = (normalize(topics + 0.5 * draw(*topics.shape), dim=1) for _ in range(2))
    one = torch.ones((), dtype=torch.float64)
    return Embeddings(text, image, one, one)


def keys(captions: Tensor, images: Tensor | None = None) -> Tensor:
    """By which rows are siblings; all images are different if not given."""
    images = torch.arange(len(captions)) if images is None else images
    return torch.stack([captions, images], dim=1)


def signals_of_rows(given: Embeddings, siblings: Tensor | None = None, **options: Any) -> Any:
    count = len(given.text)
    some = scores(loo_loss=torch.ones(count), task=torch.ones(count), size=torch.ones(count))
    if siblings is None:
        siblings = keys(torch.arange(count))
    return find_signals(some, some, given, siblings, **options)


def test_neighbours_tell_an_exchanged_caption() -> None:
    given = like_rows()
    wrong = torch.arange(0, len(given.text), EACH)  # one of every topic
    donors = torch.arange(len(given.text))
    donors[wrong] = wrong.roll(1) + 1
    found = signals_of_rows(given._replace(text=given.text[donors]))
    is_wrong = donors != torch.arange(len(donors))
    for side in (found.image_neighbours, found.text_neighbours):
        assert auroc(side[is_wrong].numpy(), side[~is_wrong].numpy()) > 0.95


def test_a_copy_of_the_caption_does_not_give_a_row_away() -> None:
    """Where the caption's owner is left out, it makes no difference whether it is there."""
    given = like_rows()
    donors = torch.arange(len(given.text))
    donors[0] = EACH
    text = given.text[donors]
    with_owner = signals_of_rows(given._replace(text=text), keys(donors))
    others = torch.arange(len(donors)) != EACH
    without = signals_of_rows(
        given._replace(text=text[others], image=given.image[others]), keys(donors[others])
    )
    torch.testing.assert_close(with_owner.text_neighbours[0], without.text_neighbours[0])


@pytest.mark.parametrize("side", ["image_neighbours", "text_neighbours"])
@pytest.mark.parametrize("left_out", ["sibling by image", "mute"])
def test_what_is_no_evidence_makes_no_difference(side: str, left_out: str) -> None:
    """Row 1, of the topic of row 0, is as good as absent."""
    given = like_rows()
    count = len(given.text)
    others = torch.arange(count) != 1
    if left_out == "mute":
        found = signals_of_rows(given, mute=~others)
    else:
        images = torch.arange(count)
        images[1] = 0
        found = signals_of_rows(given, keys(torch.arange(count), images))
    absent = signals_of_rows(given._replace(text=given.text[others], image=given.image[others]))
    torch.testing.assert_close(getattr(found, side)[0], getattr(absent, side)[0])
    assert not torch.isclose(getattr(signals_of_rows(given), side)[0], getattr(absent, side)[0])


def test_stack_is_in_the_order_of_the_errors() -> None:
    given = like_rows()
    few = given._replace(text=given.text[:2], image=given.image[:2])
    found = find_signals(scores(), scores(), few, keys(torch.arange(2)))
    np.testing.assert_allclose(found.stack()[:, 0], np.log1p([2.0, 0.5]))
    np.testing.assert_allclose(found.stack()[:, 1], np.log1p([1.0, 0.25]))
    np.testing.assert_allclose(found.stack()[:, 2], [-0.03, 0.005])
    errors = signal_errors(scores())
    assert found.stack().shape == errors.shape == (2, 5)
    assert (errors > 0).tolist() == [[True, False, True, False, False]] * 2


class TestErrors:
    def test_spread_of_what_is_drawn(self) -> None:
        """Signals of scores drawn from their errors spread as is foretold."""
        given = like_rows()
        few = given._replace(text=given.text[:2], image=given.image[:2])
        fixed = scores()
        draws = torch.from_numpy(norm.rvs(size=(3, 5_000, 2), random_state=0)).float()
        moved = (fixed.stderr, fixed.size_stderr, fixed.self_stderr)
        found = [
            find_signals(
                scores(
                    task=fixed.task + moved[0] * task,
                    size=fixed.size + moved[1] * size,
                    loo_loss=fixed.loo_loss + moved[2] * loss,
                ),
                fixed,
                few,
                keys(torch.arange(2)),
            ).stack()
            for task, size, loss in zip(*draws, strict=True)
        ]
        np.testing.assert_allclose(
            np.std(found, axis=0), signal_errors(fixed), rtol=0.05, atol=1e-12
        )

    def test_of_a_single_probe_nothing_is_known(self) -> None:
        errors = signal_errors(scores(self_stderr=torch.full((2,), torch.inf)))
        assert np.isinf(errors[:, 0]).all()
