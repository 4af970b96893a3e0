"""The commands ``validate`` and ``remove``, as a user types them."""

import json
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image
from transformers import CLIPModel

from hf_ecif.applications.remove import _against_the_scores
from hf_ecif.cli.flags import name_flags
from hf_ecif.influence.model import InfluenceModel
from hf_ecif.utils.formatting import nats, number, share
from tests.support import DEMO
from tests.support.commands import MODEL, Run

QUICK = ["--batch-size", 16, "--probes", 1, "--partitions", 2, "--fit-epochs", 2, "--quiet"]


@pytest.fixture
def marked(data: Path, tmp_path: Path) -> Path:
    """30 rows, of which three are to be removed; one row says neither yes nor no."""
    rows = Dataset.load_from_disk(str(data / "30"))
    wanted = [i in (2, 3, 11) for i in range(30)]
    marked = rows.add_column("gone", [None if i == 5 else want for i, want in enumerate(wanted)])
    marked.add_column("number", list(range(30))).save_to_disk(tmp_path / "marked")
    return tmp_path / "marked"


def test_validate(run: Run, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    status, output = run(
        "validate", "--model", MODEL, "--dataset", data / "30", "--output", out,
        "--subsets", 5, "--repeats", 1, *QUICK,
    )  # fmt: skip
    assert status == 0, output
    assert "Rank correlation" in output
    result = json.loads((out / "validation.json").read_text())
    assert len(result["predicted"]) == len(result["actual"]) == 5
    assert name_flags(result["verdict"]) in " ".join(output.split())
    page = (out / "validation.html").read_text()
    assert result["verdict"].split(":")[0].rstrip(".") in page
    assert number(result["spearman"]) in page
    with Image.open(out / "validation.png") as picture:
        assert np.ptp(np.asarray(picture.convert("L"))) > 100


def test_an_audit_named_as_the_data_is_its_scored_rows(
    run: Run,
    marked: Path,
    tmp_path: Path,
) -> None:
    """Its folder holds every row twice more, and columns that a second run replaces."""
    first, second = tmp_path / "first", tmp_path / "second"
    given = ["audit", "--model", MODEL, *QUICK, "--plantings", 1, "--dataset"]
    assert run(*given, marked, "--output", first)[0] == 0
    status, output = run(*given, first, "--group-column", "category", "--output", second)
    assert (status, "30 rows: " in output) == (0, True)
    assert "No group of 'category' has 50 rows" in output
    assert "columns of these names are ours" not in output
    cleaned = tmp_path / "cleaned"
    assert run("clean", first, "--output", cleaned)[0] == 0
    status, output = run(*given, cleaned, "--output", tmp_path / "third")
    assert (status, "Name its folder kept, or removed" in output) == (2, True)
    (first / "scored").rename(first / ".checkpoints")
    status, output = run("clean", first, "--dry-run")
    assert (status, "was interrupted" in output) == (2, True)


def test_a_column_of_a_name_of_ours_is_told_of(run: Run, data: Path, tmp_path: Path) -> None:
    rows = Dataset.load_from_disk(str(data / "30")).add_column("clip_score", ["good"] * 30)
    rows.save_to_disk(tmp_path / "rows")
    given = ["--model", MODEL, *QUICK, "--plantings", 1, "--dataset", tmp_path / "rows"]
    status, output = run("audit", *given, "--output", tmp_path / "out")
    assert (status, "clip_score: columns of these names are ours" in output) == (0, True)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["remove", "--where", "gone", "--fit-epochs", 0, "--retrain"], "there is no --retrain"),
        (["trace", "--top-k", 5, "--candidates", 3], "fewer than the --top-k 5"),
        (["validate", "--removed-share", 0.97, "--subsets", 4], "fewer than two are left"),
    ],
)
def test_what_cannot_be_is_refused(
    run: Run,
    marked: Path,
    tmp_path: Path,
    command: list[object],
    words: str,
) -> None:
    name, *options = command
    given = ["--model", MODEL, "--dataset", marked, "--output", tmp_path / "out", *QUICK]
    status, output = run(name, *given, *options)
    assert (status, words in " ".join(output.split())) == (2, True), output
    assert not (tmp_path / "out").exists()


def test_every_command_tells_that_the_query_is_in_the_data(
    run: Run,
    marked: Path,
    tmp_path: Path,
) -> None:
    given = ["--model", MODEL, "--dataset", marked, "--query", marked, "--query-split", "train"]
    own = {"trace": [], "value": [], "remove": ["--where", "gone"], "validate": ["--subsets", 4]}
    for name, options in own.items():
        out = tmp_path / name
        status, output = run(name, *given, *QUICK, *options, "--batch-size", 30, "--output", out)
        assert status == 0, output
        words = " ".join(output.split())
        assert "30 images of the query are in the data, too" in words
        assert "All 30 rows fit into one batch of 30" in words


def test_remove(run: Run, marked: Path, tmp_path: Path) -> None:
    out = tmp_path / "edited"
    status, output = run(
        "remove", "--model", MODEL, "--dataset", marked, "--where", "gone", "--output", out,
        "--retrain", "--test", DEMO / "data", *QUICK,
    )  # fmt: skip
    assert status == 0, output
    assert "3 of 30 readable rows removed" in output
    assert "│ retrained" in output
    summary = json.loads((out / "removal.json").read_text())
    assert summary["removal"]["removed"] == 3
    assert [*summary["measures"]] == ["query", "test"]
    for states in summary["measures"].values():
        assert [*states] == ["before", "after", "retrained"]
        assert states["before"] != states["after"]
        assert share(states["after"]["text_to_image_recall@1"]) in output
    page = (out / "removal.html").read_text()
    for states in summary["measures"].values():
        for state in states.values():
            assert nats(state["loss"]) in page
    assert (summary["query"]["chosen"], summary["test"]) == (True, f"{DEMO / 'data'}, split test")
    assert summary["test"] in page
    edited, given = CLIPModel.from_pretrained(out), CLIPModel.from_pretrained(MODEL)
    weights = edited.state_dict()
    for name, value in given.state_dict().items():
        assert (weights[name] != value).any() == ("projection" in name), name
    InfluenceModel.from_pretrained(out)  # the processor came along


@pytest.mark.parametrize(
    ("after", "predicted", "warned"),
    [
        (1.1, -0.2, True),
        (0.9, -0.2, False),
        (1.01, -0.2, True),
        (0.8, 0.1, True),
        (1.001, -0.002, False),
    ],
)
def test_a_change_against_the_scores_is_told(after: float, predicted: float, warned: bool) -> None:
    told = _against_the_scores({"before": {"loss": 1.0}, "after": {"loss": after}}, predicted)
    assert (told is not None) == warned
    assert told is None or f"predicted {nats(predicted, signed=True)}." in told


def test_remove_prints_json_alone(run: Run, marked: Path, tmp_path: Path) -> None:
    out = tmp_path / "edited"
    status, output = run(
        "remove", "--model", MODEL, "--dataset", marked, "--where", "gone", "--output", out,
        "--json", *QUICK,
    )  # fmt: skip
    assert status == 0, output
    printed = json.loads(output)
    assert printed == json.loads((out / "removal.json").read_text())
    assert [*printed["measures"]["query"]] == ["before", "after"]
    assert "retrain" not in printed["seconds"]


def test_adapters_are_merged_into_the_edited_model(run: Run, marked: Path, tmp_path: Path) -> None:
    out = tmp_path / "edited"
    status, output = run(
        "remove", "--model", MODEL, "--dataset", marked, "--where", "gone", "--output", out,
        "--parameters", "lora", "--lora-rank", 2, "--steps", 1, *QUICK,
    )  # fmt: skip
    assert status == 0, output
    weights = CLIPModel.from_pretrained(out).state_dict()
    for name, value in CLIPModel.from_pretrained(MODEL).state_dict().items():
        adapted = name.endswith(("q_proj.weight", "v_proj.weight"))
        assert (weights[name] != value).any() == adapted, name


@pytest.mark.parametrize(
    ("command", "options", "words"),
    [
        ("remove", ["--where", "nowhere"], "--where 'nowhere' is not in the data set. It has: "),
        ("remove", ["--where", "number"], "must be boolean"),
        ("remove", ["--where", "gone", "--test", "nowhere"], "nowhere"),
        ("validate", ["--subsets", 3], "at least 4"),
        ("validate", ["--removed-share", 1.5], "between 0 and 1"),
        ("validate", ["--fit-epochs", 0], "retrains nothing"),
    ],
)
def test_mistakes(
    run: Run,
    marked: Path,
    tmp_path: Path,
    command: str,
    options: list[object],
    words: str,
) -> None:
    status, output = run(
        command, "--model", MODEL, "--dataset", marked, "--output", tmp_path / "o", *QUICK, *options
    )
    assert status == 2
    assert words in output
    assert not (tmp_path / "o").exists()


def test_nothing_is_overwritten(run: Run, marked: Path, tmp_path: Path) -> None:
    status, output = run(
        "remove", "--model", MODEL, "--dataset", marked, "--where", "gone", "--output", marked
    )
    assert status == 2
    assert "is not empty" in output


def test_removing_all_is_refused(run: Run, data: Path, tmp_path: Path) -> None:
    rows = Dataset.load_from_disk(str(data / "30")).add_column("gone", [True] * 30)
    rows.save_to_disk(tmp_path / "all")
    status, output = run(
        "remove", "--model", MODEL, "--dataset", tmp_path / "all", "--where", "gone",
        "--output", tmp_path / "o", *QUICK,
    )  # fmt: skip
    assert status == 2
    assert "30 of 30 rows are to be removed" in output
