"""The command line as a user types it, and a few rows of the demo to give to it."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import load_dataset

from hf_ecif.cli.main import main
from tests.support import DEMO

MODEL = str(DEMO / "model")
Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved rows by number: ``0``, ``1`` and ``30``."""
    root = tmp_path_factory.mktemp("data")
    rows = load_dataset("parquet", data_files=str(DEMO / "data/test.parquet"), split="train")
    for count in (0, 1, 30):
        rows.select(range(count)).save_to_disk(root / str(count))
    return root


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Status and messages of the command, by its entry point."""

    def command(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["hf-ecif", *map(str, arguments)])
        monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 200)  # wherever the tests run
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setenv("LINES", "50")  # a dumb terminal takes the width with the height alone
        try:
            main()
            status = 0
        except SystemExit as end:
            status = int(end.code or 0)
        out, err = capsys.readouterr()
        return status, out + err

    return command
