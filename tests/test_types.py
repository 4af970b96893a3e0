"""What mypy, as this project sets it, finds in code that uses the libraries it stands on."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
USES = """
from datasets import Dataset
from torch import Tensor, nn

from hf_ecif.data.schema import check_columns
from hf_ecif.engine.encoder import DualEncoder

def use(tensor: Tensor, rows: Dataset, model: nn.Module) -> None:
"""
RIGHT = [
    "mean: Tensor = tensor.mean(dim=0)",
    "names: list[str] = check_columns(rows, 'image', 'text').column_names",
    "theta: Tensor = DualEncoder(model).theta",
]
WRONG = {
    "tensor.no_such_method()": "attr-defined",
    "number: int = tensor": "assignment",
    "tensor.mean(dimension=0)": "call-overload",
    "rows.no_such_method()": "attr-defined",
    "types: int = rows.features": "assignment",
    "model.logit_scale.exp()": "operator",
    "check_columns(tensor, 'image', 'text')": "type-var",
    "DualEncoder(rows)": "arg-type",
}


def _findings(folder: Path, lines: list[str]) -> list[tuple[str, str]]:
    """Lines of a function that mypy refuses, each with the code of the error."""
    source = (USES + "".join(f"    {line}\n" for line in lines)).splitlines()
    file = folder / "uses.py"
    file.write_text("\n".join(source) + "\n")
    command = [sys.executable, "-m", "mypy", "--no-error-summary", "--config-file"]
    ran = subprocess.run(
        [*command, str(ROOT / "pyproject.toml"), str(file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert not ran.stderr
    errors = re.findall(r"uses\.py:(\d+): error: .*\[([a-z-]+)\]$", ran.stdout, re.MULTILINE)
    assert bool(errors) == bool(ran.returncode), ran.stdout
    return [(source[int(line) - 1].strip(), code) for line, code in errors]


def test_right_use_passes(tmp_path: Path) -> None:
    assert _findings(tmp_path, RIGHT) == []


def test_every_wrong_use_is_refused(tmp_path: Path) -> None:
    assert dict(_findings(tmp_path, [*WRONG])) == WRONG
