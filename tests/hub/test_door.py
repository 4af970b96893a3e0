"""From rows in memory to flags to the Hub, without a file of the caller's."""

import runpy
from pathlib import Path

import pytest
from datasets import Image, load_dataset
from huggingface_hub import HfApi

import hf_ecif
from hf_ecif.data.columns import set_column
from hf_ecif.utils.progress import silent
from tests.support import DEMO, ROOT
from tests.support.hub.server import HubServer

ROWS = 80
REPO = "ann/pairs-clean"
CONFIG = hf_ecif.InfluenceConfig(batch_size=40, partitions=2, probes=2, fit_epochs=4)
ONCE = hf_ecif.DetectionConfig(injections=1)


@pytest.fixture
def audit(hub: HubServer, tmp_path: Path) -> hf_ecif.Audit:
    """Of rows in memory, two of which cannot be read, so that some are removed for sure."""
    data = load_dataset("parquet", data_files=f"{DEMO}/data/train.parquet", split="train")
    data = data.select(range(ROWS))
    data = set_column(data, "text", ["", "", *data["text"][2:]])
    return hf_ecif.audit(
        str(DEMO / "model"),
        data,
        config=CONFIG,
        detection=ONCE,
        suggest=False,
        progress=silent,
    )


def test_one_line_to_the_hub(audit: hf_ecif.Audit, api: HfApi, hub: HubServer) -> None:
    assert 2 <= audit.summary.removed < ROWS
    pushed = audit.push_to_hub(REPO, private=True, progress=silent)
    assert pushed.rows == {
        "default/train": audit.summary.kept,
        "removed/train": audit.summary.removed,
    }
    assert api.dataset_info(REPO).private
    kept = load_dataset(REPO, split="train")
    removed = load_dataset(REPO, "removed", split="train")
    assert kept.features == audit.dataset.features
    assert len(kept) + len(removed) == ROWS
    assert all(removed["ecif_reason"])
    card = hub.files(REPO)["README.md"].decode()
    assert "the split `train` of a Dataset in memory" in card
    for path, content in hub.files(REPO).items():
        assert str(DEMO).encode() not in content, path


def test_a_cleaning_to_the_hub(audit: hf_ecif.Audit, hub: HubServer) -> None:
    cleaned = audit.clean("worst", share=0.5)
    cleaned.push_to_hub(REPO, removed=False, progress=silent)
    kept = load_dataset(REPO, split="train").cast_column("image", Image(decode=False))
    expected = cleaned.kept.cast_column("image", Image(decode=False))
    assert kept["text"][:] == expected["text"][:]
    assert [cell["bytes"] for cell in kept["image"]] == [c["bytes"] for c in expected["image"]]
    assert not [path for path in hub.files(REPO) if path.startswith("removed/")]
    assert "The 50 % of the pairs" in hub.files(REPO)["README.md"].decode()


def test_a_name_on_the_hub(audit: hf_ecif.Audit, hub: HubServer) -> None:
    audit.push_to_hub(REPO, progress=silent)
    again = hf_ecif.audit(
        str(DEMO / "model"),
        REPO,
        config=CONFIG,
        detection=ONCE,
        suggest=False,
        progress=silent,
    )
    assert again.summary.rows == audit.summary.kept
    assert again.summary.dataset == REPO


@pytest.mark.slow
def test_the_script_of_a_job(
    api: HfApi, hub: HubServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a data set of the Hub to a private one, by what ``uv run`` would run."""
    data = load_dataset("parquet", data_files=f"{DEMO}/data/train.parquet", split="train")
    data.select(range(ROWS)).push_to_hub("ann/pairs")
    given = ["audit.py", "ann/pairs", REPO, "--model", str(DEMO / "model")]
    monkeypatch.setattr("sys.argv", given)
    runpy.run_path(str(ROOT / "notebooks/jobs/audit.py"), run_name="__main__")
    assert "Pushed: " in capsys.readouterr().out
    assert api.dataset_info(REPO).private
    assert len(load_dataset(REPO, split="train")) <= ROWS
