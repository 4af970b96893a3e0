"""Audits of a visitor's own data: the process, its limits, and what an upload may not do."""

import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import load_dataset

from hf_ecif.app import run as running
from hf_ecif.app.limits import HOME, NEIGHBOURS, SPACE, find_limits
from hf_ecif.app.run import OWN_MODEL, Run, View, check_parquet, discard, run, stop, unpack
from hf_ecif.app.selection import is_audit, open_audit
from hf_ecif.app.worker import audit_in_process, forget_login
from hf_ecif.errors import UserError
from tests.app.conftest import DEMO
from tests.support.hub.audits import picture
from tests.support.hub.server import ANN

MODEL = str(DEMO / "model")
SMALL = replace(SPACE, rows=100, upload=2**20, seconds=300.0)


def start(limits=SMALL, name="", upload=None, model=OWN_MODEL, **changes) -> Iterator[View]:
    values = {"split": "train", "image": "image", "text": "text", "query": "", "query_split": ""}
    return run(limits, MODEL, None, name, upload, model, *(values | changes).values())


def only(views: Iterator[View]) -> str:
    """What is said where nothing was started."""
    (view,) = views
    assert view.run is None
    return view.said


@pytest.fixture
def parquet(data: Path, tmp_path: Path) -> str:
    rows = load_dataset("parquet", data_files=str(data / "test.parquet"), split="train")
    rows.to_parquet(tmp_path / "mine.parquet")
    return str(tmp_path / "mine.parquet")


def zipped(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


class TestLimits:
    def test_a_space_has_them_and_a_home_has_not(self, monkeypatch):
        assert find_limits() == HOME
        monkeypatch.setenv("SPACE_ID", "me/space")
        assert find_limits() == SPACE
        shared = [(limits.shared, limits.login) for limits in (HOME, SPACE, NEIGHBOURS)]
        assert shared == [(False, False), (True, True), (True, False)]

    @pytest.mark.parametrize("name", ["/etc", "../data", "owner/name/../..", "hf://x/y", "name"])
    def test_a_shared_space_reads_nothing_but_the_hub(self, name):
        assert "is not a name on the Hub" in only(start(name=name))
        assert "is not a name on the Hub" in only(start(name="me/data", model=name))
        assert "is not a name on the Hub" in only(start(name="me/data", query=name))

    def test_nothing_named_is_said(self):
        assert "Name a data set" in only(start(name=" "))
        assert "Name a CLIP-like model" in only(start(name="me/data", model=" "))


class TestUploads:
    def test_a_wrong_type(self, tmp_path):
        (tmp_path / "data.pickle").write_bytes(b"x")
        assert "neither parquet nor a zip" in only(start(upload=str(tmp_path / "data.pickle")))

    @pytest.mark.parametrize("name", ["data.parquet", "data.zip"])
    def test_what_its_name_does_not_keep(self, tmp_path, name):
        (tmp_path / name).write_bytes(b"<b>no</b>" * 100)
        said = only(start(upload=str(tmp_path / name)))
        assert "This is no" in said
        assert "<b>no" not in said

    def test_an_enormous_file(self, tmp_path):
        with open(tmp_path / "data.zip", "wb") as file:
            file.truncate(SMALL.upload + 1)
        assert "larger than 1 MiB" in only(start(upload=str(tmp_path / "data.zip")))

    def test_a_zip_that_swells(self, tmp_path):
        bomb = zipped(tmp_path / "bomb.zip", {"zeros": bytes(2**21)})
        assert bomb.stat().st_size < 10_000
        with pytest.raises(UserError, match="holds 2 MiB"):
            unpack(bomb, tmp_path / "out", SMALL)
        assert not (tmp_path / "out").exists()

    def test_a_zip_of_more_files_than_rows(self, tmp_path):
        many = zipped(tmp_path / "many.zip", {str(n): b"" for n in range(301)})
        with pytest.raises(UserError, match="301 files"):
            unpack(many, tmp_path / "out", SMALL)

    @pytest.mark.parametrize("name", ["../out.png", "/out.png", "a/../../out.png"])
    def test_a_zip_that_leads_elsewhere(self, tmp_path, name):
        with pytest.raises(UserError, match="outside its folder"):
            unpack(zipped(tmp_path / "x.zip", {name: b"x"}), tmp_path / "out", SMALL)

    def test_the_folder_of_a_zip_is_stepped_into(self, tmp_path):
        files = {"mine/metadata.csv": b"file_name,text\n", "__MACOSX/mine": b"x"}
        found = unpack(zipped(tmp_path / "x.zip", files), tmp_path / "out", SMALL)
        assert found == tmp_path / "out" / "mine"

    def test_a_parquet_that_swells(self, tmp_path):
        table = pa.table({"text": pa.array([b"\0" * 2**21])})
        pq.write_table(table, tmp_path / "x.parquet", compression="zstd", use_dictionary=False)
        assert (tmp_path / "x.parquet").stat().st_size < 10_000
        with pytest.raises(UserError, match="holds 2 MiB"):
            check_parquet(tmp_path / "x.parquet", SMALL)

    def test_a_parquet_of_too_many_rows(self, tmp_path):
        pq.write_table(pa.table({"text": ["a"] * 101}), tmp_path / "x.parquet")
        assert "101 rows; 100 are allowed" in only(start(upload=str(tmp_path / "x.parquet")))


class TestRun:
    def test_it_says_how_far_it_is_and_opens_the_result(self, parquet):
        views = list(start(upload=parquet))
        said = [view.said for view in views]
        assert any("<progress" in text and "Fit" in text for text in said)
        assert "40 pairs" in said[-1]
        assert is_audit(views[-1].folder)
        assert len(open_audit(views[-1].folder).rows.score) == 40
        assert views[-1].tabs.selected == "overview"
        discard(views[-1].run)
        assert not Path(views[-1].folder).exists()

    def test_a_column_that_is_missing_is_said(self, parquet):
        last = list(start(upload=parquet, text="captions"))[-1]
        assert "captions" in last.said
        assert 'role="alert"' in last.said
        assert last.run is None

    def test_no_folder_of_this_machine_is_told(self, tmp_path):
        files = {"metadata.csv": b"file_name,text\na.png,bird\n", "a.png": picture(0)}
        upload = zipped(tmp_path / "mine.zip", files)
        last = list(start(upload=str(upload), split="other"))[-1]
        assert "there is no split &#39;other&#39;" in last.said
        assert "hf-ecif-run" not in last.said

    def test_cancelled_it_ends_at_once_and_leaves_nothing(self, parquet):
        views = start(upload=parquet)
        found = next(views).run
        assert found.process.is_alive()
        assert "Cancelled" in stop(found)
        begin = time.monotonic()
        assert "Cancelled" in list(views)[-1].said
        assert time.monotonic() - begin < 10
        assert not found.folder.exists()
        assert "Cancelled" in stop(None)  # it waits in the queue

    def test_nobody_listening_it_ends(self, parquet):
        views = start(upload=parquet)
        found = next(views).run
        views.close()
        assert not found.process.is_alive()
        assert not found.folder.exists()

    def test_too_long_it_ends(self, parquet):
        *_, last = start(replace(SMALL, seconds=0.0), upload=parquet)
        assert "took longer than 0 minutes" in last.said

    def test_broken_off_it_is_said(self, parquet):
        views = start(upload=parquet)
        next(views).run.process.kill()
        assert "The audit stopped unexpectedly" in list(views)[-1].said

    def test_another_result_replaces_the_earlier_one_where_space_is_shared(self, tmp_path):
        class Ended:
            exitcode = 0

            def is_alive(self) -> bool:
                return False

            def join(self, seconds: float) -> None:
                pass

        events = Queue(
            [("done", SimpleNamespace(rows=1, flagged=0, noise=SimpleNamespace(told="0.0 %")))]
        )
        for shared in (True, False):
            folders = [tmp_path / f"{shared}-{n}" for n in (0, 1)]
            for folder in folders:
                (folder / "audit").mkdir(parents=True)
                (folder / "audit" / "summary.json").touch()
            earlier, found = (Run(Ended(), events, folder) for folder in folders)
            events.put(
                ("done", SimpleNamespace(rows=1, flagged=0, noise=SimpleNamespace(told="0.0 %")))
            )
            limits = replace(SMALL, shared=shared)
            *_, last = running._follow(found, earlier, limits)
            assert folders[0].exists() != shared
            assert ("hf-ecif demo" in last.said) != shared


class Queue:
    """A queue without processes."""

    def __init__(self, items: list[Any]) -> None:
        self.items = items

    def put(self, item: Any) -> None:
        self.items.append(item)

    def get(self, timeout: float) -> Any:
        return self.items.pop(0)


class TestFolders:
    def test_at_home_the_newest_results_are_kept(self, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
        folders = []
        for number in range(running.MOST_RUNS + 3):
            folders.append(running.new_folder(HOME))
            os.utime(folders[-1], (number, number))
        assert [folder.exists() for folder in folders] == [False] * 3 + [True] * running.MOST_RUNS
        assert folders[-1].is_relative_to(tmp_path)

    def test_a_visitors_goes_with_the_process(self, tmp_path):
        code = (
            "from hf_ecif.app.limits import SPACE\n"
            "from hf_ecif.app.run import new_folder\n"
            "import os, sys\n"
            "print(new_folder(SPACE), flush=True)\n"
            "if len(sys.argv) > 1: os._exit(1)"
        )
        environment = os.environ | {"TMPDIR": str(tmp_path)}

        def run_process(*more: str) -> Path:
            command = [sys.executable, "-c", code, *more]
            told = subprocess.run(command, env=environment, capture_output=True, text=True)
            return Path(told.stdout.strip())

        killed = run_process("killed")
        assert killed.is_relative_to(tmp_path)
        assert killed.exists()
        ended = run_process()
        assert not ended.exists()
        assert not killed.exists()  # the next process clears up
        assert not list(tmp_path.glob("hf-ecif-runs-*"))


class TestWorker:
    def request(self, parquet: str, tmp_path: Path, **changes: Any) -> dict[str, Any]:
        return {
            "model": MODEL,
            "dataset": parquet,
            "split": "train",
            "output": str(tmp_path / "audit"),
        } | changes

    def test_rows_are_counted_before_anything_is_done(self, parquet, tmp_path):
        events = Queue([])
        limits = replace(HOME, rows=10)
        audit_in_process(self.request(parquet, tmp_path), limits, events)
        assert events.items == [("error", "The data set has 40 rows; 10 are allowed here.")]

    def test_too_little_memory_is_said(self, parquet, tmp_path, monkeypatch):
        def starve(*_: Any) -> None:
            raise MemoryError

        monkeypatch.setattr("hf_ecif.applications.audit.run_audit", starve)
        events = Queue([])
        audit_in_process(self.request(parquet, tmp_path), HOME, events)
        assert events.items == [("error", "There is too little memory here for this audit.")]

    def test_the_unexpected_is_said_without_its_details(self, parquet, tmp_path, monkeypatch):
        def fail(*_: Any) -> None:
            raise RuntimeError(ANN)

        monkeypatch.setattr("hf_ecif.applications.audit.run_audit", fail)
        events = Queue([])
        with pytest.raises(RuntimeError):
            audit_in_process(self.request(parquet, tmp_path), HOME, events)
        assert events.items == [("error", "Unexpected error: RuntimeError.")]

    def test_a_shared_one_has_no_login(self, monkeypatch):
        for name in ("HF_TOKEN", "HF_TOKEN_PATH", "HF_HUB_DISABLE_IMPLICIT_TOKEN"):
            monkeypatch.setenv(name, ANN)
        forget_login()
        assert ANN not in os.environ.values()
