"""Where the notebooks run in tests: on the local Hub, as ann, and without warnings.

Kernels inherit the environment.
"""

import os
from pathlib import Path

import nbformat
import pytest

from tests.support.hub import HOME, HUB
from tests.support.hub.server import ANN

os.environ |= {
    "HF_ENDPOINT": HUB.url,
    "HF_HOME": HOME.name,
    "HF_TOKEN": ANN,
    "ECIF_REPO": "ann/emoji-pairs-clean",
    "HF_HUB_DISABLE_XET": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "TRANSFORMERS_VERBOSITY": "error",
    "PYTHONWARNINGS": "ignore",
}


def pytest_sessionstart() -> None:
    HUB.start()


def pytest_sessionfinish(session: pytest.Session) -> None:
    HUB.stop()
    if session.config.getoption("overwrite") and not hasattr(session.config, "workerinput"):
        for path in Path(__file__).parent.glob("*.ipynb"):
            _forget_times(path)


def _forget_times(path: Path) -> None:
    """A notebook that says when its cells ran would change with every run."""
    notebook = nbformat.read(path, nbformat.NO_CONVERT)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    nbformat.write(notebook, path)
