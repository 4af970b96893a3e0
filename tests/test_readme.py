"""The Python examples of the README do what they say."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_python_examples_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "README.md").read_text()
    first, *others = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(ROOT)
    names: dict[str, object] = {}
    exec(first, names)
    kept, removed = map(int, re.findall(r"\d+", capsys.readouterr().out.splitlines()[-1]))
    assert kept + removed == 1492
    assert 150 < removed < 450
    for example in others:
        exec(example, names)
    assert "[2, 1492]" in capsys.readouterr().out
