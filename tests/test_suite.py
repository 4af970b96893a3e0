"""Rules of the tests themselves."""

import ast
from collections.abc import Iterator

import pytest

from tests.support import ROOT

FILES = sorted((ROOT / "tests").rglob("*.py"))


def modules_of(source: str) -> Iterator[str]:
    """Full names of what a source imports; of ``from a import b``, ``a.b``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module or ''}.{alias.name}" for alias in node.names)


def imported_tests(source: str) -> list[str]:
    """Imports of a module of tests, which would make one file's tests depend on another's."""
    return [name for name in modules_of(source) if any(map(is_test, name.split(".")))]


def is_test(part: str) -> bool:
    return part.startswith("test_")


def test_no_test_imports_another() -> None:
    """What two of them need belongs in `tests/support` or a `conftest.py`."""
    found = {str(path.relative_to(ROOT)): imported_tests(path.read_text()) for path in FILES}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import tests.test_a as a", ["tests.test_a"]),
        ("from tests.test_a import b", ["tests.test_a.b"]),
        ("def f():\n    from tests import test_a", ["tests.test_a"]),
        ("from . import test_a", [".test_a"]),
        ("from tests.support import DEMO", []),
    ],
)
def test_an_import_of_a_test_is_seen(source: str, found: list[str]) -> None:
    assert imported_tests(source) == found
