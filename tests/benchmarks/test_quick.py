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


def scores_beside_the_tools(results: Any) -> None:
    """20 % of 200 rows are wrong; EK-FAC and TRAK are there if they are installed."""
    (cell,) = results
    for name, found in cell["methods"].items():
        if name.endswith("to the query"):
            assert 0.5 < found["AUROC"][0] < 0.8, name  # harm to a query tells some of it
    assert cell["methods"]["ecif_score"]["AUROC"][0] > 0.55
    against = cell["score against"]
    assert against["baseline"].endswith("to the query")
    assert against["differences"]["AUPRC"]["low"] <= against["differences"]["AUPRC"]["high"]


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


def keeps_what_it_should(results: Any) -> None:
    """400 rows, of which none, 20 or 40 % are wrong."""
    by_noise = {cell["noise"]: cell["runs"][0] for cell in results}
    assert by_noise.pop("0%")["flagged"] < 5
    assert len(by_noise) == 4
    for name, run in by_noise.items():
        assert run["F1"] > 0.65, name
        assert run["F1 below the best"] < 12, name
        assert run["noise rate off by"] < 20, name


def holds_on_structure(results: Any) -> None:
    """200 images: captions exchanged by image, copies, a stock phrase, captions cut off."""
    by_kind = {cell["data"]: cell["runs"][0] for cell in results}
    siblings = by_kind["3 captions, by image"]
    assert siblings["AUPRC"] > siblings["NegCLIPLoss"] + 0.05
    once, twice = by_kind["copies x1"], by_kind["copies x2"]
    assert abs(once["rate"] - twice["rate"]) < 0.02
    assert abs(once["AUPRC"] - twice["AUPRC"]) < 0.02
    for name in ("stock phrase, 10%", "cut off, 50%"):
        assert by_kind[name]["findings"] == 1, name
        assert by_kind[name]["recall"] > 0.7, name
    for name, found in by_kind.items():
        assert found["findings elsewhere"] < 0.05, name
        assert found["flagged"] < 0.35, name


def holds_on_the_ladder(results: Any) -> None:
    """240 rows of a rung, none or 20 % wrong; captions in an unknown alphabet tell nothing."""
    for cell in results:
        for run in cell["runs"]:
            name = f"{cell['rung']}, {cell['rate']:.0%}, verified: {run['verified']}"
            blind = cell["rung"] in ("unknown alphabet", "untrained")
            assert run["abstains"] == blind, name
            assert run["right pairs flagged"] < 0.1, name
            if blind:
                assert run["Brier"] is None, name
            else:
                assert run["Brier"] <= run["constant"] + 0.01, name
                assert abs(run["rate"] - run["true rate"]) < 0.12, name


def wins_back(results: Any) -> None:
    """40 % of 400 rows are wrong; two seeds of either kind."""
    (found,) = results
    loss = {
        name: np.mean([cell["values"][name]["loss"] for cell in found["cells"]])
        for name in ("noisy", "cleaned", "oracle", "random")
    }
    assert loss["oracle"] < loss["noisy"]
    recovered = {
        name: (loss["noisy"] - loss[name]) / (loss["noisy"] - loss["oracle"])
        for name in ("cleaned", "random")
    }
    assert recovered["cleaned"] > 0.5
    assert recovered["random"] < 0.3


def foretells_retraining(results: Any) -> None:
    """Of eight single pairs, and of a dozen sets of 400 rows."""
    by_truth = {one["truth"]: one["methods"] for one in results}
    alone = by_truth["single pairs, l2 0.3"]
    assert alone["next to no damping"]["spearman"] > 0.5
    assert alone["curvature without the pair"]["spearman"] > 0.7
    assert 0.6 < alone["curvature without the pair"]["slope"] < 1.6
    assert by_truth["halves"]["damping 30"]["spearman"] > 0.3
    assert by_truth["a tenth"]["damping 30"]["spearman"] > 0.3


def foretells_single_removals(results: Any) -> None:
    """Eight pairs of a fit that plain scores no longer suit; Newton steps for four."""
    (fit,) = results
    methods = {one["method"]: one for one in fit["results"]}
    assert methods["exact"]["spearman"] > max(0.6, methods["plain"]["spearman"])
    assert 0.6 < methods["exact"]["slope"] < 1.6
    assert methods["plain"]["slope"] > 1.5  # too small, as foretold
    assert 0.6 < methods["remove, 2 Newton steps"]["slope"] < 1.6
    assert fit["warning"]


def edits_like_retraining(results: Any) -> None:
    """A tenth and three tenths of 400 rows."""
    gaps = {name: one["loss"]["mean"] for name, one in results["summary"]["gaps"].items()}
    edits = [name for name in gaps if name.startswith("remove")]
    assert max(gaps[name] for name in edits) < gaps["left as it was"] / 2
    assert gaps["retrained again"] < gaps["left as it was"] / 2
    seconds = results["summary"]["seconds"]
    assert seconds["retrained through the whole model"] > 5 * max(seconds[name] for name in edits)


def parts_harmful_from_valuable(results: Any) -> None:
    """Three tenths of 400 rows removed, two seeds."""
    last = {curve["name"]: np.mean(curve["losses"][-1]) for curve in results["curves"]}
    assert last["most harmful"] < last["random"] < last["most valuable"]
    assert last["most harmful, no curvature"] < last["random"]


def names_the_planted_pairs(results: Any) -> None:
    """Two concepts that failed."""
    assert len(results["cases"]) == 2

    def mean(key: str, name: str) -> float:
        return float(np.mean([case[key][name] for case in results["cases"]]))

    assert mean("recall", "hf_ecif") > max(0.4, mean("recall", "random") + 0.2)
    assert mean("mended", "the planted pairs") == 1
    assert mean("mended", "hf_ecif") >= 0.5
    shares = [recall["200"] for recall in results["index"]["recall"].values()]
    assert shares == sorted(shares)  # a higher rank proposes better
    assert shares[-1] > 0.6


def names_the_exchanged_word(results: Any) -> None:
    """27 captions, each with one exchanged word, in either order of their tags."""
    for one in results:
        pooled = {
            method: np.mean([hit for hits in one["hits"].values() for hit in hits[method]])
            for method in ("hf_ecif", "chance")
        }
        assert 0.2 < pooled["chance"] < 0.4
        assert pooled["hf_ecif"] > pooled["chance"] + 0.15


def suggests_what_is_right(results: Any) -> None:
    """80 of 400 rows are wrong; their captions are gone, or have changed places."""
    (copied,), (moved,) = (one["runs"] for one in results)
    assert copied["suggested"] < 0.3 * copied["flagged"]
    assert moved["suggested"] > 0.2 * moved["flagged"]
    for run in (copied, moved):
        assert run["right"] >= 0.7 * run["suggested"]


def costs_a_few_embeddings(results: Any) -> None:
    """Of 300 rows, where three injections and the suggestions take most."""
    (found,) = results.values()
    assert 1 < found["ratio"] < 20
    assert sum(found["stages"].values()) > found["stages"]["embed"] > 0
    assert len(found["longest"]) == 10
    plain = sum(found["embedding"]) / 2
    assert plain <= found["others"]["CLIPScore"] < 1.1 * plain
    assert all(spent > plain for spent in found["others"].values())


CASES = (
    Case("detection", finds_wrong_captions),
    Case("detection_peers", scores_beside_the_tools),
    Case("natural", ranks_pairs),
    Case("ablations", compares_settings),
    Case("threshold", keeps_what_it_should),
    Case("ladder", holds_on_the_ladder),
    Case("structure", holds_on_structure),
    Case("cleaning", wins_back),
    Case("fidelity", foretells_retraining),
    Case("leverage", foretells_single_removals),
    Case("edit", edits_like_retraining),
    Case("curves", parts_harmful_from_valuable),
    Case("trace", names_the_planted_pairs),
    Case("words", names_the_exchanged_word),
    Case("suggestions", suggests_what_is_right),
    Case("audit_cost", costs_a_few_embeddings),
)


@pytest.mark.slow
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
