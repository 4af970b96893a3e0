"""The notebooks as they are committed: executed, in order, small, and of no machine in particular.

`make test` executes them, too.
"""

import re
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode

NOTEBOOKS = sorted(Path(__file__).parents[1].glob("notebooks/*.ipynb"))
LARGEST = 300_000  # bytes
MACHINE = re.compile(r"/(home|root|work|tmp|Users)/|127\.0\.0\.1|site-packages")


def outputs_of(notebook: NotebookNode) -> list[NotebookNode]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def words_of(notebook: NotebookNode) -> str:
    """All but the pictures."""
    for output in outputs_of(notebook):
        for kind in [kind for kind in output.get("data", {}) if kind.startswith("image/")]:
            del output.data[kind]
    return nbformat.writes(notebook)


def test_there_are_six() -> None:
    assert [path.name[:2] for path in NOTEBOOKS] == ["01", "02", "03", "04", "05", "06"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_outputs(path: Path) -> None:
    notebook = nbformat.read(path, nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = outputs_of(notebook)
    assert [output for output in outputs if output.output_type == "error"] == []
    assert [output for output in outputs if output.get("name") == "stderr"] == []
    assert all("execution" not in cell.metadata for cell in notebook.cells)
    assert not MACHINE.search(words_of(notebook))
    assert path.stat().st_size < LARGEST
