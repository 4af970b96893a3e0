"""The Python example of the README does what it says."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_python_example_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(ROOT)
    exec(example, {})
    kept, removed = map(int, re.findall(r"\d+", capsys.readouterr().out.splitlines()[-1]))
    assert kept + removed == 1492
    assert 150 < removed < 450
