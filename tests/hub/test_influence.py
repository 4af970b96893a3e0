"""A fitted influence goes to the Hub and comes back, and scores the same rows the same."""

import pytest
import torch
from datasets import Dataset
from huggingface_hub import HfApi, ModelCard

from hf_ecif import InfluenceConfig, InfluenceModel, Scorer, UserError
from hf_ecif.influence.rows import Rows
from tests.support import DEMO
from tests.support.hub.server import ANN_READ_ONLY, BOB, HubServer

REPO = "ann/influence"
CONFIG = InfluenceConfig(batch_size=16, fit_epochs=1, probes=2, partitions=2)


@pytest.fixture(scope="module")
def data() -> Dataset:
    return Dataset.from_parquet(str(DEMO / "data" / "test.parquet")).select(range(30))


@pytest.fixture(scope="module")
def fitted(data: Dataset) -> tuple[InfluenceModel, Rows]:
    model = InfluenceModel.from_pretrained(DEMO / "model", CONFIG)
    rows = model.read(data)
    model.fit(rows, rows.select(torch.arange(8)))
    return model, rows


def test_round_trip(
    hub: HubServer, api: HfApi, fitted: tuple[InfluenceModel, Rows], data: Dataset
) -> None:
    model, rows = fitted
    report = model.push_to_hub(REPO)
    assert report.url.startswith(hub.url)
    api.create_tag(REPO, tag="v1")
    expected = model.score(rows).task
    for name in (REPO, f"{REPO}@v1", f"hf://{REPO}", f"hf://models/{REPO}@v1"):
        loaded = InfluenceModel.from_pretrained(name)
        assert loaded.config.to_dict() == CONFIG.to_dict()
        assert loaded.fingerprint == model.fingerprint
        assert torch.equal(loaded.score(loaded.read(data)).task, expected)
    card = ModelCard.load(REPO)
    assert card.data.library_name == "hf_ecif"
    assert str(DEMO) not in str(card)
    assert "| rows fitted on | 30 |" in str(card)
    residual = model.fitted.solvers["task score and self-influence"].relative_residual
    assert f"relative residual {residual:.1e}" in str(card)


def test_scorer_of_a_repository(
    hub: HubServer, fitted: tuple[InfluenceModel, Rows], data: Dataset
) -> None:
    model, rows = fitted
    model.push_to_hub(REPO)
    columns = Scorer(REPO, model.fingerprint, rows=64)(data[:])
    assert columns["ecif_score"] == model.score(rows).task.tolist()
    with pytest.raises(UserError, match="another fit"):
        Scorer(REPO, "other", rows=64)(data[:])


def test_pushing_again_changes_nothing(hub: HubServer, fitted: tuple[InfluenceModel, Rows]) -> None:
    model, _ = fitted
    model.push_to_hub(REPO)
    before = len(hub.commits(REPO, "model"))
    model.push_to_hub(REPO)
    assert len(hub.commits(REPO, "model")) == before


def test_private_is_for_its_owner(
    hub: HubServer, fitted: tuple[InfluenceModel, Rows], monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted[0].push_to_hub(REPO, private=True)
    assert InfluenceModel.from_pretrained(REPO).fitted is not None
    monkeypatch.setenv("HF_TOKEN", BOB)
    with pytest.raises(UserError, match="no such repository"):
        InfluenceModel.from_pretrained("ann/influence@main")


def test_without_network_the_copy_of_an_earlier_run_does(
    hub: HubServer, fitted: tuple[InfluenceModel, Rows], caplog: pytest.LogCaptureFixture
) -> None:
    fitted[0].push_to_hub(REPO)
    before = InfluenceModel.from_pretrained(REPO)
    for route in ("info", "resolve", "tree"):
        hub.fail(route, kind="cut", times=1000)
    after = InfluenceModel.from_pretrained(REPO)
    assert after.fingerprint == before.fingerprint
    assert "Taking the copy from an earlier run" in caplog.text
    with pytest.raises(UserError, match=r"ann/other.*cannot be reached"):
        InfluenceModel.from_pretrained("ann/other")


def test_read_only_token_is_refused(hub: HubServer, fitted: tuple[InfluenceModel, Rows]) -> None:
    with pytest.raises(UserError) as raised:
        fitted[0].push_to_hub(REPO, token=ANN_READ_ONLY)
    assert ANN_READ_ONLY not in str(raised.value)


def test_what_is_not_fitted_is_not_pushed(hub: HubServer) -> None:
    with pytest.raises(UserError, match="not fitted"):
        InfluenceModel.from_pretrained(DEMO / "model", CONFIG).push_to_hub(REPO)
    assert not hub.requests or all(seen.method == "GET" for seen in hub.requests)
