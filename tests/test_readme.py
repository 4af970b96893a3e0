"""The Python examples of the README do what they say, and its links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
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


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "tests/benchmarks/README.md"]
)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert links or name == "CHANGELOG.md"
    assert [link for link in links if not (page.parent / link).exists()] == []
