"""A fitted influence goes to the Hub and comes back, and scores the same rows the same."""

import pytest
import torch
from datasets import Dataset
from huggingface_hub import HfApi, ModelCard

from hf_ecif import Influence, InfluenceConfig, InfluenceModel, Scorer, UserError
from tests.support import DEMO
from tests.support.hub.server import ANN, ANN_READ_ONLY, BOB, HubServer

REPO = "ann/influence"
CONFIG = InfluenceConfig(batch_size=16, fit_epochs=1, probes=2, partitions=2)


@pytest.fixture(scope="module")
def data() -> Dataset:
    return Dataset.from_parquet(str(DEMO / "data" / "test.parquet")).select(range(30))


@pytest.fixture(scope="module")
def fitted(data: Dataset) -> Influence:
    model = InfluenceModel.from_pretrained(DEMO / "model", CONFIG)
    rows = model.read(data)
    return model.fit(rows, rows.select(torch.arange(8)))


def test_round_trip(hub: HubServer, api: HfApi, fitted: Influence, data: Dataset) -> None:
    report = fitted.push_to_hub(REPO)
    assert report.url.startswith(hub.url)
    api.create_tag(REPO, tag="v1")
    expected = fitted.scores().task
    for name in (REPO, f"{REPO}@v1", f"hf://{REPO}", f"hf://models/{REPO}@v1"):
        loaded = Influence.from_pretrained(name)
        assert loaded.config.to_dict() == CONFIG.to_dict()
        assert loaded.fingerprint == fitted.fingerprint
        assert torch.equal(loaded.scores(data).task, expected)
    by_revision = Influence.from_pretrained(REPO, revision="v1")
    assert by_revision.fingerprint == fitted.fingerprint
    with pytest.raises(UserError, match="names the revision 'v1'"):
        Influence.from_pretrained(f"{REPO}@v1", revision="main")
    card = ModelCard.load(REPO)
    assert card.data.library_name == "hf_ecif"
    assert str(DEMO) not in str(card)
    assert "| rows fitted on | 30 |" in str(card)
    residual = fitted.fitted.solvers["task score"].relative_residual
    assert f"relative residual {residual:.1e}" in str(card)


def test_scorer_of_a_repository(hub: HubServer, fitted: Influence, data: Dataset) -> None:
    fitted.push_to_hub(REPO)
    columns = Scorer(REPO, fitted.fingerprint, rows=64)(data[:])
    assert columns["ecif_score"] == fitted.scores().task.tolist()
    with pytest.raises(UserError, match="another fit"):
        Scorer(REPO, "other", rows=64)(data[:])


def test_pushing_again_changes_nothing(hub: HubServer, fitted: Influence) -> None:
    fitted.push_to_hub(REPO)
    before = len(hub.commits(REPO, "model"))
    fitted.push_to_hub(REPO)
    assert len(hub.commits(REPO, "model")) == before


def test_private_is_for_its_owner(
    hub: HubServer, fitted: Influence, monkeypatch: pytest.MonkeyPatch
) -> None:
    fitted.push_to_hub(REPO, private=True)
    assert Influence.from_pretrained(REPO).fingerprint == fitted.fingerprint
    for load in (Influence.from_pretrained, InfluenceModel.from_pretrained):
        with pytest.raises(UserError, match="no such repository"):
            load("ann/influence@main", token=BOB)
    monkeypatch.setenv("HF_TOKEN", BOB)
    with pytest.raises(UserError, match="no such repository"):
        Influence.from_pretrained("ann/influence@main")
    assert Influence.from_pretrained(REPO, token=ANN).fingerprint == fitted.fingerprint


def test_without_network_the_copy_of_an_earlier_run_does(
    hub: HubServer, fitted: Influence, caplog: pytest.LogCaptureFixture
) -> None:
    fitted.push_to_hub(REPO)
    before = Influence.from_pretrained(REPO)
    for route in ("info", "resolve", "tree"):
        hub.fail(route, kind="cut", times=1000)
    after = Influence.from_pretrained(REPO)
    assert after.fingerprint == before.fingerprint
    assert "Taking the copy from an earlier run" in caplog.text
    with pytest.raises(UserError, match=r"ann/other.*cannot be reached"):
        InfluenceModel.from_pretrained("ann/other")


def test_read_only_token_is_refused(hub: HubServer, fitted: Influence) -> None:
    with pytest.raises(UserError) as raised:
        fitted.push_to_hub(REPO, token=ANN_READ_ONLY)
    assert ANN_READ_ONLY not in str(raised.value)
