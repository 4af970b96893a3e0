"""What `import hf_ecif` offers is there, typed, and costs nothing until it is used."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import hf_ecif

# A push needs a Hub, and the callback a training: the guides have examples, which are run, too.
WITHOUT_EXAMPLE = {"push", "InfluenceCallback"}


@pytest.mark.parametrize("name", hf_ecif.__all__)
def test_public_name(name: str) -> None:
    assert getattr(hf_ecif, name) is not None
    assert name in dir(hf_ecif)


@pytest.mark.parametrize("name", hf_ecif._MOVED)
def test_name_of_0_1(name: str) -> None:
    with pytest.warns(
        DeprecationWarning, match=f"{name} is removed in the next version: import .* from"
    ):
        assert getattr(hf_ecif, name) is not None
    assert name not in dir(hf_ecif)


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'unheard_of'"):
        hf_ecif.unheard_of  # noqa: B018


def test_type_checkers_see_the_names_that_are_imported_on_first_use() -> None:
    tree = ast.parse(Path(hf_ecif.__file__).read_text())
    imports = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert imports == {name: f"hf_ecif.{module}" for name, module in hf_ecif._PUBLIC.items()}


def test_nothing_heavy_is_imported_before_it_is_used() -> None:
    code = "import sys, hf_ecif; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"torch", "transformers", "datasets", "pydantic"}.isdisjoint(done.stdout.split())


@pytest.mark.parametrize("name", sorted(set(hf_ecif._PUBLIC) - WITHOUT_EXAMPLE))
def test_every_public_name_has_an_example_that_runs(name: str) -> None:
    """`make test` runs it, with the other examples in docstrings."""
    text = inspect.getdoc(getattr(hf_ecif, name)) or ""
    assert ">>> " in text
    assert "+SKIP" not in text
