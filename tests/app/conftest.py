"""Audits to look at: a real one that is small, and a made-up one with a thousand flags."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from datasets import load_dataset

from hf_ecif.applications.audit import AuditRequest, run_audit
from hf_ecif.config import DetectionConfig, InfluenceConfig
from tests.support import DEMO
from tests.support.hub.audits import rows, write_audit, write_source

SIZES = {"train": 120, "validation": 40, "test": 40}
MANY, FLAGGED = 1200, 1000
HTML = "<img src=x onerror=\"document.title='hurt'\"><b>bold</b> & more"


@pytest.fixture(scope="session", autouse=True)
def state(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What programs keep from one run to the next is kept aside."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first rows of the demo's splits."""
    folder = tmp_path_factory.mktemp("data")
    for split, count in SIZES.items():
        whole = load_dataset("parquet", data_files=str(DEMO / f"data/{split}.parquet"))["train"]
        whole.select(range(count)).to_parquet(folder / f"{split}.parquet")
    return folder


@pytest.fixture(scope="session")
def real(data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of an audit of those rows by the demo's model."""
    output = tmp_path_factory.mktemp("real") / "audit"
    request = AuditRequest(
        model=str(DEMO / "model"),
        dataset=str(data),
        query=str(data),
        truth_column="is_misaligned",
        output=output,
        detection=DetectionConfig(injections=1),
    )
    config = InfluenceConfig(batch_size=40, partitions=2, probes=2, fit_epochs=4)
    run_audit(request, config)
    return str(output)


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a made-up audit of 1,200 rows: the first 1,000 are flagged, one has HTML in it."""
    place = tmp_path_factory.mktemp("many")
    source = write_source(place / "birds", count=MANY)
    audit = write_audit(
        place / "audit",
        str(source),
        data=rows(MANY),
        flagged=range(FLAGGED),
        unreadable=(MANY - 1,),
        captions={0: HTML},
        report=True,
    )
    return str(audit)
