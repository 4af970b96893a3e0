"""What the benchmarks share: the embedded data, exchanged captions, the detector, and records.

A record is a JSON file: where its figures come from (commit, versions, machine, settings), and the
figures. Beside it lie a table of them in Markdown, and where that helps a figure.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from hf_ecif import metrics
from hf_ecif.config import DetectionConfig, InfluenceConfig
from hf_ecif.data.loading import load_rows
from hf_ecif.data.schema import check_columns
from hf_ecif.detection.detect import Detection, detect
from hf_ecif.detection.injection import inject_mismatches
from hf_ecif.detection.signals import TRUST, signals_of_rows
from hf_ecif.influence.model import InfluenceModel
from hf_ecif.influence.rows import Rows
from hf_ecif.influence.scoring import Scores
from tests.support import DEMO

RESULTS = Path(__file__).parent / "results"
QUICK_ROWS = 400  # of a `--quick` run
PACKAGES = ("hf_ecif", "torch", "transformers", "datasets", "numpy", "scipy", "scikit-learn")


@dataclass(frozen=True)
class Embedded:
    """The embedded model and data.

    Attributes:
        model: not fitted.
        train: the rows as shipped, a fifth of them with a wrong caption (``is_misaligned``; what it
            was: ``original_text``; its ``category`` and ``subcategory``).
        query: the validation split, read.
        test: the test split, read; nothing in the method sees it.
    """

    model: InfluenceModel
    train: Dataset
    query: Rows
    test: Rows


def embedded(config: InfluenceConfig | None = None, *, quick: bool = False) -> Embedded:
    """Load them; of the training rows only some at random if it has to be quick."""
    disable_progress_bars()
    model = InfluenceModel.from_pretrained(DEMO / "model", config or InfluenceConfig())
    splits = {name: load_rows(str(DEMO / "data"), name) for name in ("train", "validation", "test")}
    train = check_columns(splits["train"], "image", "text")
    if quick:
        train = train.shuffle(seed=0).select(range(QUICK_ROWS))
    return Embedded(model, train, model.read(splits["validation"]), model.read(splits["test"]))


@dataclass(frozen=True)
class Exchanged:
    """Rows some of which have the caption of another row.

    Attributes:
        rows: with the captions as they are then.
        donors: ``(N,)``, the row that each caption was taken from; its own where it stayed.
    """

    rows: Rows
    donors: NDArray[np.int64]

    @property
    def wrong(self) -> NDArray[np.bool_]:
        """``(N,)``, which rows are misaligned."""
        return self.donors != np.arange(len(self.donors))

    @property
    def index(self) -> str:
        """The noise for a record, ``row:donor`` of each wrong row."""
        rows = np.flatnonzero(self.wrong).tolist()
        return " ".join(f"{row}:{self.donors[row]}" for row in rows)


def exchange(rows: Rows, categories: list[str], rate: float, kind: str, seed: int) -> Exchanged:
    """Give a share of the rows the caption of another row, for ``cat`` one of the same category."""
    rng = random.Random(f"{rate} {kind} {seed}")
    donors = list(range(len(rows)))
    for i in rng.sample(donors, round(rate * len(rows))):
        donors[i] = rng.choice(
            [
                j
                for j, text in enumerate(rows.texts)
                if text != rows.texts[i] and (kind == "random" or categories[j] == categories[i])
            ]
        )
    return Exchanged(rows.with_texts_of(torch.tensor(donors)), np.array(donors))


def find_wrong(
    model: InfluenceModel, rows: Rows, query: Rows, detection: DetectionConfig | None = None
) -> tuple[Scores, Detection]:
    """What an audit makes of the rows; the model is fitted to them."""
    influence = model.fit(rows, query)
    scores = influence.scores()
    injected = inject_mismatches(model, influence, query, detection=detection)
    signals = signals_of_rows(model, rows, scores).stack()
    return scores, detect(
        signals, injected.reference, injected.kinds, trust=TRUST, exchanged=injected.exchanged
    )


def judge(wrong: NDArray[np.bool_], suspicion: NDArray[np.floating]) -> dict[str, Any]:
    """How well a signal ranks the wrong rows, by our metric."""
    return metrics.load("misalignment_detection").compute(predictions=suspicion, references=wrong)


def parser(doc: str | None, name: str) -> argparse.ArgumentParser:
    """Options of every benchmark: ``--quick``, and where the record goes.

    Args:
        doc: of the benchmark's module.
        name: of its record.
    """
    result = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--quick", action="store_true", help="minutes, with larger errors")
    result.add_argument("--output", type=Path, default=RESULTS / f"{name}.json")
    return result


def save(path: Path, settings: Mapping[str, Any], results: Any) -> None:
    """Write a record.

    Args:
        path: of the JSON file.
        settings: all that decides the figures: seeds, numbers, indices.
        results: the figures.
    """
    record = {"origin": origin(), "settings": settings, "results": results}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def print_table(title: str, heading: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print what `write_table` writes."""
    table = Table(*heading, title=title)
    for row in rows:
        table.add_row(*map(str, row))
    Console(width=120).print(table)


def write_table(
    path: Path, title: str, heading: Sequence[str], rows: Iterable[Sequence[Any]], note: str = ""
) -> None:
    """Write a record's figures as a page with one table; see `write_page`.

    Args:
        path: of the record.
        title: of the page.
        heading: names of the columns.
        rows: their cells, as they are to be read.
        note: how to read them, Markdown.
    """
    write_page(path, title, [note, as_markdown(heading, rows)])


def write_page(path: Path, title: str, parts: Iterable[str]) -> None:
    """Write a record's figures as Markdown, for people.

    A figure of the same name, drawn before, is shown below them, and then where they come from.

    Args:
        path: of the record, which is there; the page lies beside it, ending in ``.md``.
        title: of the page.
        parts: paragraphs and tables, Markdown; empty ones are left out.
    """
    page = [f"# {title}", *filter(None, parts)]
    figure = path.with_suffix(".png")
    if figure.exists():
        page.append(f"![{title}]({figure.name})")
    source = json.loads(path.read_text())["origin"]
    machine = source["machine"]
    page.append(
        f"Commit {source['commit']}, torch {source['versions']['torch']}, {machine['threads']} "
        f"thread(s) of {machine['cores']} cores; settings and single values are in "
        f"[{path.name}]({path.name})."
    )
    path.with_suffix(".md").write_text("\n\n".join(page) + "\n")


def as_markdown(heading: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; bars within its cells are escaped."""

    def line(cells: Iterable[Any]) -> str:
        return f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in cells)} |"

    return "\n".join([line(heading), line("-" * len(heading)), *map(line, rows)])


def origin() -> dict[str, Any]:
    """Where figures come from."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, cwd=DEMO, check=False)
    return {
        "commit": commit.stdout.strip() or None,
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        "machine": {
            "system": platform.system(),
            "architecture": platform.machine(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
        },
    }
