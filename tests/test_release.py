"""What is released: the wheel, licences of the data in it, and one version everywhere."""

import re
import subprocess
import sys
from pathlib import Path
from shutil import copy2, copytree, ignore_patterns
from zipfile import ZipFile

import pytest
import yaml

from hf_ecif.version import __version__
from tests.support import ROOT

LARGEST = 15_000_000  # bytes of a wheel
DATA = {".parquet", ".safetensors", ".png", ".npz", ".npy", ".svg", ".tar"}
# Made by commands of this repository, from its own data: pictures of a page, records of benchmarks.
OWN = (
    "spaces_demo/app.png",
    "spaces_demo/report.png",
    "tests/benchmarks/results/",
    "tests/support/open_clip/",  # random weights
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, since a build leaves its folders behind."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        copy2(ROOT / name, source)
    for name in ("hf_ecif", "spaces_demo"):
        copytree(ROOT / name, source / name, ignore=ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(target), "."]
    subprocess.run(build, cwd=source, check=True)
    return next(target.glob("*.whl"))


@pytest.mark.slow
class TestWheel:
    def test_it_is_small(self, wheel: Path) -> None:
        assert wheel.stat().st_size < LARGEST

    def test_it_holds_templates_types_and_the_demo(self, wheel: Path) -> None:
        names = set(ZipFile(wheel).namelist())
        checkout = {str(path.relative_to(ROOT)) for path in (ROOT / "hf_ecif").rglob("*.*")}
        assert {name for name in checkout if "__pycache__" not in name} <= names
        assert "hf_ecif/demo/model/model.safetensors" in names
        assert not [name for name in names if name.startswith(("tests", "spaces_demo"))]

    def test_the_command_runs_outside_of_the_repository(self, wheel: Path, tmp_path: Path) -> None:
        """With the packages of this environment, and the wheel's own code and demo before all."""
        with ZipFile(wheel) as archive:
            archive.extractall(tmp_path / "site")
        code = "from hf_ecif.cli.main import main; main()"
        told = subprocess.run(
            [sys.executable, "-c", code, "audit", "--demo", "--limit", "120", "--output", "out"],
            cwd=tmp_path,
            env={"PATH": "", "PYTHONPATH": str(tmp_path / "site"), "HOME": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert told.returncode == 0, told.stderr
        assert (tmp_path / "out" / "report.html").is_file()
        summary = (tmp_path / "out" / "summary.json").read_text()
        assert str(tmp_path / "site" / "hf_ecif" / "demo") in summary


def test_licences_of_all_data_are_listed() -> None:
    """Every file of data stands in a folder whose NOTICE names what it is made of."""
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    data = [Path(name) for name in listed if Path(name).suffix in DATA]
    unnamed = [
        str(path)
        for path in data
        if not str(path).startswith(OWN)
        and not any((ROOT / parent / "NOTICE").is_file() for parent in path.parents)
    ]
    assert data
    assert unnamed == []


def test_there_is_one_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_space_pins_it() -> None:
    assert f"hf_ecif[demo]=={__version__}" in (ROOT / "spaces_demo/requirements.txt").read_text()


def test_the_workflow_runs_what_continuous_integration_does() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())
    assert {"run": ".ci/run"} in workflow["jobs"]["all"]["steps"]


def test_targets_that_workflows_and_pages_name_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    pages = [*(ROOT / ".github/workflows").glob("*.yml"), ROOT / ".ci/run"]
    pages += [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
    named = {
        target
        for page in pages
        for target in re.findall(r"(?:^\s*(?:- run: )?|`)make ([a-z-]+)", page.read_text(), re.M)
    }
    assert named
    assert named <= targets
