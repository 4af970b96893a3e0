"""What reports are made of, without an audit: scored rows, summaries, comparisons."""

from __future__ import annotations

import io
from typing import Any

import datasets
import numpy as np
from PIL import Image

from hf_ecif.data.summary import ComparisonFacts, Measured, OutcomeFacts, Summary

FLOATS = (
    "ecif_score",
    "ecif_positive",
    "ecif_negative",
    "ecif_stderr",
    "ecif_self",
    "ecif_loo_loss",
    "clip_score",
    "neg_clip_loss",
    "ecif_noise_probability",
)


def picture(size: tuple[int, int] = (8, 6), mode: str = "RGB", kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size).save(stream, kind)
    return stream.getvalue()


def make_scored(
    rows: int, unreadable: tuple[int, ...] = (), flagged: float = 0.5, **columns: list[Any]
) -> datasets.Dataset:
    """A scored data set of random influence; `columns` replace the columns made here."""
    rng = np.random.default_rng(0)
    table: dict[str, list[Any]] = {
        "image": [{"bytes": picture(), "path": None} for _ in range(rows)],
        "text": [f"caption {row}" for row in range(rows)],
    }
    table |= {name: rng.normal(scale=1e-5, size=rows).tolist() for name in FLOATS}
    table["ecif_noise_probability"] = np.linspace(0.0, 1.0, rows).tolist()
    table["ecif_flag"] = [value > flagged for value in table["ecif_noise_probability"]]
    table["ecif_borderline"] = [abs(p - flagged) < 0.3 for p in table["ecif_noise_probability"]]
    table["ecif_suggested_text"] = [None] * rows
    table["ecif_suggested_margin"] = [None] * rows
    table["ecif_duplicate_group"] = [None] * rows
    table["ecif_reason"] = [None] * rows
    for row in unreadable:
        for name in (*FLOATS, "ecif_flag", "ecif_borderline"):
            table[name][row] = None
        table["ecif_reason"][row] = "caption empty"
    table |= columns
    types: dict[str, Any] = {name: datasets.Value("float64") for name in FLOATS}
    types |= {"image": datasets.Image(decode=False), "ecif_flag": datasets.Value("bool")}
    types |= {"ecif_borderline": datasets.Value("bool")}
    types |= {"ecif_suggested_margin": datasets.Value("float32")}
    later = ("ecif_suggested_probability", "ecif_suspicion")
    types |= {name: datasets.Value("float32") for name in later if name in table}
    types |= {"ecif_duplicate_group": datasets.Value("int64")}
    types |= {n: datasets.Value("string") for n in ("text", "ecif_suggested_text", "ecif_reason")}
    types |= {name: datasets.Value("bool") for name in columns if name not in types}
    return datasets.Dataset.from_dict(table, features=datasets.Features(types))


def make_summary(scored: datasets.Dataset, /, **parts: Any) -> Summary:
    unreadable = sum(score is None for score in scored["ecif_score"])
    flagged = sum(flag is True for flag in scored["ecif_flag"])
    values = {
        "rows": len(scored),
        "scored": len(scored) - unreadable,
        "unreadable": unreadable,
        "unreadable_reasons": {"caption empty": unreadable} if unreadable else {},
        "flagged": flagged,
        "kept": len(scored) - unreadable - flagged,
        "removed": unreadable + flagged,
        "noise": {"rate": 0.195, "threshold": 0.5, "borderline": 3},
        "query": {"source": "held out", "rows": 20, "chosen": True, "overlap": 0, "loss": 1.92},
        "fit": {"parameters": "projections", "count": 16384, "loss_before": 2.5, "loss_after": 1.5},
        "solvers": [
            {"purpose": "task score", "method": "cg", "iterations": 14, "converged": True},
            {"purpose": "self-influence", "method": "cg", "iterations": 99, "converged": False},
        ],
        "warnings": ["The query is small."],
        "seconds": {"load": 0.3, "fit": 9.0, "total": 9.3},
        "config": {"batch_size": 256},
        "versions": {"hf_ecif": "0.1.0"},
        "fingerprints": {"model": "abc123"},
        "seed": 0,
        "columns": {"image": "image", "text": "text"},
        "model": "some/model",
        "dataset": "some/data",
        "split": "train",
        **parts,
    }
    return Summary.from_dict(values)


def outcome(version: str, *accuracies: float, classes: bool = True) -> OutcomeFacts:
    values = [*accuracies]
    measured = Measured(mean=sum(values) / len(values), stderr=0.01, values=values)
    names = ["loss", "text_to_image_recall@1", "image_to_text_recall@1"]
    names += ["zero_shot_accuracy"] * classes
    return OutcomeFacts(version=version, rows=10, measures=dict.fromkeys(names, measured))


def compare_by(untrained: float, whole: list[float], cleaned: list[float]) -> ComparisonFacts:
    made = [outcome("not fine-tuned", untrained), outcome("all rows", *whole)]
    made.append(outcome("drop", *cleaned))
    return ComparisonFacts(test="birds", test_rows=4000, outcomes=made, warnings=[])
