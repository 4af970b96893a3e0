"""The guides do what they say, and the site builds without a warning."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import hf_ecif
from tests.support import ROOT

GUIDES = sorted((ROOT / "notebooks").rglob("*.md"))
EXAMPLE = re.compile(r"```python\n(.*?)```", re.DOTALL)
WITH_EXAMPLES = [page for page in GUIDES if EXAMPLE.search(page.read_text())]


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda page: page.stem)
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for example in EXAMPLE.findall(page.read_text()):
        exec(compile(example, page.name, "exec"), names)


def test_every_public_name_is_in_the_reference() -> None:
    page = (ROOT / "notebooks/reference/python.md").read_text()
    listed = re.findall(r"^::: hf_ecif\.(\w+)$", page, re.MULTILINE)
    assert sorted(listed) == sorted(hf_ecif._PUBLIC)


def test_every_page_is_in_the_navigation() -> None:
    named = set(re.findall(r"[\w/]+\.(?:md|ipynb)", (ROOT / "mkdocs.yml").read_text()))
    pages = [*GUIDES, *(ROOT / "notebooks").glob("*.ipynb")]
    found = {str(page.relative_to(ROOT / "notebooks")) for page in pages}
    assert named - {"reference/commands.md"} == found


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    commands = (tmp_path / "reference" / "commands.html").read_text()
    assert "--plantings" in commands
    assert "<math" in (tmp_path / "guides" / "formulas.html").read_text()
