"""The embedded demo."""

from pathlib import Path

import pytest

import hf_ecif
from hf_ecif.errors import UserError
from hf_ecif.utils import demo
from tests.support import DEMO


def test_in_a_checkout_it_is_that_of_the_repository() -> None:
    assert demo.demo_folder() == DEMO


def test_it_has_a_model_and_three_splits() -> None:
    model, dataset, query, test = hf_ecif.load_demo()
    assert (Path(model) / "config.json").is_file()
    assert [len(dataset), len(query), len(test)] == [1492, 200, 200]
    assert sum(dataset[demo.TRUTH]) == 298
    assert not any(query[demo.TRUTH])


def test_without_it_the_remedy_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "hf_ecif" / "utils" / "demo.py"))
    with pytest.raises(UserError, match="Install hf_ecif again"):
        demo.demo_folder()
