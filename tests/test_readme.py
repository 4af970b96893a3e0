"""The Python of the README does what it says, and its links lead somewhere."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


@pytest.mark.slow
def test_its_python_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    monkeypatch.chdir(ROOT)
    exec(example, {})
    kept, removed = map(int, re.findall(r"\d+", capsys.readouterr().out.splitlines()[-1]))
    assert kept + removed == 1492
    assert 150 < removed < 450


def test_it_is_read_in_minutes() -> None:
    assert len(README.read_text().splitlines()) <= 150


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "tests/benchmarks/README.md"]
)
def test_links_lead_somewhere(name: str) -> None:
    page = ROOT / name
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text())
    assert links or name == "CHANGELOG.md"
    assert [link for link in links if not (page.parent / link).exists()] == []
