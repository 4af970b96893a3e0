"""The demo's own audit, the command, and the files of the Space."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import pytest
import yaml
from datasets import load_dataset

from hf_ecif.app import app
from hf_ecif.app.embedded import open_embedded, save_columns
from hf_ecif.app.selection import open_audit
from hf_ecif.cli import demo as command
from hf_ecif.data.loading import load_rows
from hf_ecif.errors import UserError
from tests.app.conftest import DEMO


class TestEmbedded:
    def test_it_is_an_audit_of_the_data_beside_it(self, tmp_path):
        summary = open_embedded(tmp_path)
        audit = open_audit(str(tmp_path))
        assert len(audit.rows.score) == summary.rows == 1492
        assert int(audit.rows.flag.sum()) == summary.flagged
        scored = load_rows(str(tmp_path / "scored"), "train")
        data = load_dataset("parquet", data_files=str(DEMO / "data/train.parquet"))["train"]
        assert scored["text"][:] == data["text"][:]
        wrong = np.array(data["is_misaligned"][:])
        assert (wrong & audit.rows.flag).sum() == summary.truth.found

    def test_it_names_no_folder_of_the_machine_that_made_it(self):
        text = (DEMO / "audit" / "summary.json").read_text()
        assert not re.search(r'"/|"[A-Z]:\\', text)

    def test_it_is_small(self):
        sizes = [path.stat().st_size for path in (DEMO / "audit").iterdir()]
        assert sum(sizes) < 200_000

    def test_columns_that_are_kept_come_back(self, real, data, tmp_path):
        for name in ("data", "model"):
            (tmp_path / name).symlink_to(data if name == "data" else DEMO / "model")
        save_columns(Path(real), tmp_path)
        open_embedded(tmp_path / "opened", tmp_path)
        before, after = open_audit(real), open_audit(str(tmp_path / "opened"))
        np.testing.assert_array_equal(before.rows.score, after.rows.score)
        assert before.key == after.key
        assert repr(before.rows.card(3)) == repr(after.rows.card(3))

    def test_other_data_are_refused(self, data, tmp_path):
        (tmp_path / "audit").symlink_to(DEMO / "audit")
        (tmp_path / "data").symlink_to(data)
        with pytest.raises(UserError, match="is no audit of"):
            open_embedded(tmp_path / "opened", tmp_path)

    def test_a_folder_without_an_audit_is_refused(self, tmp_path):
        with pytest.raises(UserError, match="hf-ecif demo OUT"):
            open_embedded(tmp_path / "opened", tmp_path)


class TestCommand:
    @pytest.fixture
    def shown(self, monkeypatch) -> dict:
        """What would be served."""
        seen: dict = {}

        class App:
            local_url = "http://127.0.0.1:1"

            def block_thread(self) -> None:
                seen["blocked"] = True

        def make_app(folder, limits, **options):
            seen.update(options, limits=limits, rows=len(open_audit(folder).rows.score))
            return App()

        monkeypatch.setattr(app, "make_app", make_app)
        monkeypatch.setattr(app, "launch", lambda built, limits, **options: seen.update(options))
        return seen

    def test_without_a_name_it_is_the_demo(self, shown):
        command.demo(None, model=None, host="127.0.0.1", port=0, browser=False)
        assert (shown["rows"], shown["dataset"], shown["limits"].shared) == (1492, None, False)
        assert shown["blocked"]

    def test_an_audit_is_opened(self, shown, real):
        command.demo(real, model=None, host="localhost", port=0, browser=False)
        assert (shown["rows"], shown["dataset"]) == (120, None)

    @pytest.mark.parametrize("name", ["me/pairs@v1", "hf://datasets/me/pairs/folder"])
    def test_other_data_are_to_be_audited(self, shown, name):
        command.demo(name, model="me/clip", host="127.0.0.1", port=0, browser=False)
        assert (shown["rows"], shown["dataset"], shown["model"]) == (1492, name, "me/clip")

    def test_beyond_this_machine_there_are_limits_and_no_login(self, shown):
        command.demo(None, model=None, host="0.0.0.0", port=0, browser=False)
        assert shown["limits"].shared
        assert not shown["limits"].login

    def test_a_folder_that_is_not_there(self, shown):
        with pytest.raises(UserError, match="no folder"):
            command.demo("./nothing", model=None, host="127.0.0.1", port=0, browser=False)

    def test_without_gradio_it_says_what_to_install(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "gradio", None)
        with pytest.raises(UserError, match="pip install"):
            command.demo(None, model=None, host="127.0.0.1", port=0, browser=False)


class TestSpace:
    def test_the_header_is_that_of_a_gradio_space(self):
        header = yaml.safe_load((DEMO / "README.md").read_text().split("---")[1])
        pinned = dict(
            line.split("==") for line in Path("constraints.txt").read_text().split() if "==" in line
        )
        assert header["sdk"] == "gradio"
        assert header["sdk_version"] == pinned["gradio"]
        assert (DEMO / header["app_file"]).is_file()
        assert header["hf_oauth"]
        assert {"write-repos", "manage-repos"} <= set(header["hf_oauth_scopes"])
        assert len(header["short_description"]) <= 60

    def test_it_starts_and_needs_no_network(self, tmp_path):
        """As a Space does it, by running the file; with a name server that knows nobody."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        code = (
            "import runpy, socket\n"
            "look_up = socket.getaddrinfo\n"
            "def only_here(host, *a, **k):\n"
            "    assert host in ('127.0.0.1', 'localhost', '0.0.0.0', None), host\n"
            "    return look_up(host, *a, **k)\n"
            "socket.getaddrinfo = only_here\n"
            f"runpy.run_path({str(DEMO / 'app.py')!r}, run_name='__main__')\n"
        )
        environment = os.environ | {
            "GRADIO_SERVER_PORT": str(port),
            "HF_HUB_OFFLINE": "0",
            "HOME": str(tmp_path),
            "TMPDIR": str(tmp_path),
        }
        process = subprocess.Popen(
            [sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True
        )
        try:
            page = wait_for(f"http://127.0.0.1:{port}", process)
        finally:
            process.terminate()
            _, errors = process.communicate(timeout=60)
        assert app.TITLE in page
        assert "Traceback" not in errors


def wait_for(url: str, process: subprocess.Popen, seconds: float = 240) -> str:
    end = time.monotonic() + seconds
    while time.monotonic() < end and process.poll() is None:
        try:
            with urlopen(url, timeout=30) as answer:
                return answer.read().decode()
        except OSError:
            time.sleep(0.2)
    raise AssertionError("it did not start")
