"""What the removal benchmarks make of their measurements."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks import curves, edit, fidelity


def test_differences_are_paired_over_the_seeds() -> None:
    drift = np.array([0.0, 1.0, 5.0])  # between seeds, and far larger than the effects
    losses = {
        curves.HARMFUL: np.array([drift, drift - 0.1, drift - 0.2]),
        curves.RANDOM: np.array([drift, drift, drift + np.array([0.0, 0.3, 0.0])]),
        curves.VALUABLE: np.array([drift, drift + 0.1, drift + 0.4]),
    }
    verdict = curves.judge(losses, [0.1, 0.2])
    first, second = verdict["differences"]["random - harmful"].values()
    assert first == {"mean": pytest.approx(0.1), "stderr": pytest.approx(0)}
    assert second == {"mean": pytest.approx(0.3), "stderr": pytest.approx(0.1)}
    trend = verdict["rank correlation of share and loss"]
    assert (trend[curves.HARMFUL], trend[curves.VALUABLE]) == (pytest.approx(-1), pytest.approx(1))


def test_gaps_of_seeds_cancel_and_those_of_kinds_do_not() -> None:
    def cell(kind: str, seed: int, gap: float) -> dict[str, object]:
        test = {"retrained": {"R@1": 70.0}, "remove, 1 step": {"R@1": 70.0 + gap}}
        return {"kind": kind, "share": 0.1, "seed": seed, "test": test}

    cells = [
        cell("random", 0, 1.0),
        cell("random", 1, -0.6),
        cell("most harmful", 0, -0.3),
        cell("most harmful", 1, -0.5),
    ]
    gaps = edit.size_of_gaps(cells, "remove, 1 step", "R@1")
    assert gaps == {"mean": pytest.approx(0.3), "largest": pytest.approx(0.4)}


def test_other_parts_of_a_record_stay_with_their_commit(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    assert fidelity.known_beside(path, ["lora"]) == []
    parts = [{"part": "lora"}, {"part": "last_block"}, {"part": "projections", "commit": "older"}]
    path.write_text(json.dumps({"origin": {"commit": "old"}, "results": parts}))
    assert fidelity.known_beside(path, ["lora"]) == [
        {"part": "last_block", "commit": "old"},
        {"part": "projections", "commit": "older"},
    ]
