"""The cheapest version of each benchmark runs, with assertions that only a break would fail."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest


class Case(NamedTuple):
    """A benchmark.

    Attributes:
        name: of its module.
        check: asserts something of its results.
        options: besides ``--quick``.
    """

    name: str
    check: Callable[[Any], None]
    options: tuple[str, ...] = ()


def finds_wrong_captions(results: Any) -> None:
    """20 % of 200 rows are wrong."""
    for cell in results:
        ours = cell["methods"]["ecif_noise_probability"]
        assert ours["AUROC"][0] > 0.85
        assert ours["P@20"][0] > 0.6
        for name in ("CLIPScore", "NegCLIPLoss", "LEMoN-fix", "TracIn to itself"):
            assert cell["methods"][name]["AUROC"][0] > 0.75
        interval = cell["against"]["as published"]["differences"]["AUPRC"]
        assert interval["low"] <= interval["difference"] <= interval["high"]


def ranks_pairs(results: Any) -> None:
    """Nothing is known to be wrong, and little is flagged."""
    (found,) = results.values()
    assert found["flagged"] < 0.1
    by_group = {
        group: [pair["probability"] for pair in found["pairs"] if pair["group"] == group]
        for group in ("suspicious", "control")
    }
    assert len(by_group["suspicious"]) == len(by_group["control"]) > 0
    assert min(by_group["suspicious"]) > max(by_group["control"])


def compares_settings(results: Any) -> None:
    """20 % of 200 rows are wrong."""
    by_setting = {(one["question"], one["setting"]): one["measures"] for one in results}
    default = by_setting["wrong rows of the query", "0% (default)"]
    assert default["AUPRC"]["values"][0] > 0.5
    assert default["LDS"]["values"][0] > 0.2
    noisy = by_setting["wrong rows of the query", "40%"]
    assert noisy["LDS"]["values"] != default["LDS"]["values"]
    both, positive, negative = (
        by_setting["roles in the score", name]["LDS"]["values"][0]
        for name in ("both (default)", "positive", "negative")
    )
    assert len({both, positive, negative}) == 3
    assert np.all(np.abs([both, positive, negative]) <= 1)


CASES = (
    Case("detection", finds_wrong_captions),
    Case("natural", ranks_pairs),
    Case("ablations", compares_settings),
)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_quick(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / f"{case.name}.json"
    options = ["--quick", "--output", str(output), *case.options]
    monkeypatch.setattr(sys, "argv", [case.name, *options])
    import_module(f"tests.benchmarks.{case.name}").main()
    record = json.loads(output.read_text())
    assert record["origin"]["versions"]["hf_ecif"]
    case.check(record["results"])
    assert output.with_suffix(".md").read_text().count("\n|") > 2
    assert list(tmp_path.glob("*.png")) or list(tmp_path.glob("*.jpg"))
