"""An index against the comparison of all with all."""

import logging
import sys

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from hf_ecif.engine import approximate, neighbours
from hf_ecif.engine.approximate import Index
from hf_ecif.engine.neighbours import average_distance, find_best, group_near

pytest.importorskip("faiss")


def embeddings(count: int, seed: int = 0, dim: int = 16) -> Tensor:
    """Unit rows in loose groups, as those of pictures are."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(40, dim, generator=generator)
    of = torch.randint(40, (count,), generator=generator)
    return normalize(centers[of] + 0.7 * torch.randn(count, dim, generator=generator), dim=1)


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours, "is_worthwhile", lambda *sides: False)


@pytest.fixture(params=[1, 2**24], ids=["row by row", "blocks"])
def by_index(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """However few rows there are; its smallest blocks show whether they are put together well."""
    monkeypatch.setattr(approximate, "MANY", 10)
    monkeypatch.setattr(neighbours, "INDEXED", 700)
    monkeypatch.setattr(neighbours, "BLOCK", request.param)


@pytest.mark.parametrize("count", [5, 16])
def test_recall_is_that_of_the_sample_and_high(count: int) -> None:
    keys, anchors = embeddings(3000), embeddings(1000, seed=1)
    index = Index.build(keys, anchors, count)
    cosines, numbers = index.nearest(anchors, count)
    torch.testing.assert_close(cosines, (anchors[:, None] * keys[numbers]).sum(dim=2))
    true = (anchors @ keys.T).topk(count, dim=1).indices
    found = (numbers[:, :, None] == true[:, None]).any(dim=1).double().mean().item()
    assert index.recall >= approximate.LEAST_RECALL
    assert found == pytest.approx(index.recall, abs=0.02)
    assert index._cells.nprobe < index._cells.nlist  # not all cells, which would be the whole


def data(count: int = 3000) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Images three times, a little different, with three captions; a fifth of these is one phrase,
    and a tenth of the rows is mute."""
    image = embeddings(count // 3)[torch.arange(count) % (count // 3)]
    image = normalize(image + 1e-2 * embeddings(count, seed=2), dim=1)
    text = normalize(image + 0.3 * embeddings(count, seed=1), dim=1)
    captions = torch.arange(count)
    captions[captions % 5 == 0] = 0
    text = text[captions]
    same = torch.stack([captions, torch.arange(count) % (count // 3)], dim=1)
    return image, text, 1 - (image * text).sum(dim=1), same, torch.arange(count) % 10 == 7


@pytest.mark.usefixtures("by_index")
@pytest.mark.parametrize("side", ["image", "text"])
def test_average_distance_moves_little(side: str, request: pytest.FixtureRequest) -> None:
    image, text, mismatch, same, mute = data()
    near, far = (image, text) if side == "image" else (text, image)
    same = same[:, 1] if side == "image" else same
    found = average_distance(near, far, mismatch, same, mute)
    request.getfixturevalue("exact")
    expected = average_distance(near, far, mismatch, same, mute)
    assert (found - expected).abs().mean() < 0.01 * expected.std()
    assert torch.corrcoef(torch.stack([found, expected]))[0, 1] > 0.999


@pytest.mark.usefixtures("by_index")
def test_siblings_and_mute_rows_are_no_neighbours() -> None:
    """The nearest rows of all are either; with their far captions they would be seen."""
    rows, copies = embeddings(1000), 8
    image = rows.repeat(copies, 1)
    text = image.clone()
    text[1000:] = -text[1000:]
    siblings = torch.arange(1000).repeat(copies)
    alone = average_distance(rows, rows, torch.zeros(1000))
    found = average_distance(image, text, torch.zeros(8000), siblings, torch.arange(8000) >= 1000)
    torch.testing.assert_close(found[:1000], alone, rtol=0.05, atol=0.02)
    assert (found[:1000] - alone).abs().mean() < 0.01 * alone.std()


@pytest.mark.usefixtures("by_index")
def test_best_key_and_runner_up(request: pytest.FixtureRequest) -> None:
    keys, anchors = embeddings(2000), embeddings(500, seed=3)
    excluded = (anchors @ keys.T).argmax(dim=1)
    excluded[::2] = -1
    found = find_best(anchors, keys, excluded)
    assert (found.key != excluded).all()
    request.getfixturevalue("exact")
    expected = find_best(anchors, keys, excluded)
    assert (found.key == expected.key).double().mean() > 0.97
    assert (found.cosine <= expected.cosine + 1e-6).all()
    assert (found.runner_up - expected.runner_up).abs().median() < 1e-6


@pytest.mark.usefixtures("by_index")
def test_near_rows_are_grouped(request: pytest.FixtureRequest) -> None:
    """Pairs, and hundred copies of a row, more than an index is asked for."""
    rows = embeddings(3000)
    rows[2000:2300] = normalize(rows[:300] + 1e-3 * embeddings(300, seed=4), dim=1)
    rows[2900:] = rows[400]
    done: list[int] = []
    found = group_near(rows, 0.999, done.append)
    assert sum(done) == 3000
    request.getfixturevalue("exact")
    expected = group_near(rows, 0.999)
    assert torch.equal(found[2900:], torch.full((100,), 400))
    assert (found == expected).double().mean() > 0.999


def test_without_faiss_all_are_compared_and_a_warning_says_how_long(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(approximate, "MANY", 10)
    monkeypatch.setitem(sys.modules, "faiss", None)
    rows = embeddings(100)
    with caplog.at_level(logging.WARNING):
        groups = group_near(rows, 0.999)
    assert groups.tolist() == list(range(100))
    assert "100 embeddings are compared with 100, which takes about 1 minutes" in caplog.text
    assert 'pip install "hf_ecif[knn]"' in caplog.text


@pytest.mark.parametrize(("anchors", "keys", "expected"), [(50, 40, False), (60, 50, True)])
def test_an_index_of_many_alone(
    monkeypatch: pytest.MonkeyPatch, *, anchors: int, keys: int, expected: bool
) -> None:
    monkeypatch.setattr(approximate, "MANY", 50)
    assert approximate.is_worthwhile(embeddings(anchors), embeddings(keys)) is expected
