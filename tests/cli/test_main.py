import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from datasets import Image, Value, load_dataset, load_from_disk
from transformers import BertConfig, BertModel

import hf_ecif.applications.audit
from hf_ecif.data.parquet import write_shards
from hf_ecif.data.summary import Summary
from hf_ecif.errors import UserError
from hf_ecif.version import __version__
from tests.support.commands import MODEL, Run
from tests.support.hub.audits import fake_summary

SMALL = ["--batch-size", "32", "--partitions", "2", "--fit-epochs", "0", "--quiet"]


@pytest.fixture
def audit(run: Run, data: Path, tmp_path: Path) -> Run:
    """An audit of 30 rows, with some of its options changed."""

    def command(**options: object) -> tuple[int, str]:
        given = {"model": MODEL, "dataset": data / "30", "output": tmp_path / "out"} | options
        flags = [part for name, value in given.items() for part in option(name, value)]
        return run("audit", *SMALL, *flags)

    def option(name: str, value: object) -> list[object]:
        flag = "--" + name.replace("_", "-")
        return [flag] if value is True else [flag, value]

    return command


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--help"], ["audit", "--version", "hf-ecif COMMAND --help"]),
        (["--version"], [f"hf_ecif {__version__}"]),
        (["audit", "--help"], ["--model", "--dataset", "--damping", "--overwrite", "negative"]),
    ],
)
def test_information(run: Run, arguments: list[str], words: list[str]) -> None:
    status, output = run(*arguments)
    assert status == 0
    assert all(word in output for word in words)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dataset": "no/such/folder"}, ["no/such/folder", "no such file or folder"]),
        ({"split": "dev"}, ["no split 'dev'", "test"]),
        ({"image_column": "picture"}, ["no image column 'picture'", "emoji", "--image-column"]),
        ({"text_column": "caption"}, ["no text column 'caption'", "emoji", "--text-column"]),
        ({"text_column": "is_misaligned"}, ["must hold strings", "--text-column"]),
        ({"truth_column": "wrong"}, ["--truth-column 'wrong'", "is_misaligned"]),
        ({"group_column": "language"}, ["--group-column 'language'", "category"]),
        ({"vocabulary": "no/words"}, ["--vocabulary no/words", "one caption a line"]),
        ({"suggest_margin": -1}, ["--suggest-margin -1.0: must be at least 0"]),
        ({"query": "no/such/query"}, ["no/such/query", "no such file or folder"]),
        (
            {"model": "no/such/model"},
            ["--model 'no/such/model'", "no such folder", "save_pretrained"],
        ),
        ({"parameters": "("}, ["--parameters '('", "not a valid regular expression"]),
        ({"parameters": "^nothing$"}, ["selects none", "last_block"]),
        ({"batch_size": 1}, ["--batch-size 1: must be at least 2"]),
        ({"batch_size": "many"}, ["--batch-size", "valid integer"]),
        ({"damping": 0}, ["--damping 0.0: must be positive"]),
        (
            {"image_column": "text", "text_column": "text"},
            ["--image-column and --text-column are both 'text'"],
        ),
        ({"output": MODEL + "/config.json/x"}, ["--output", "config.json is a file"]),
        ({"solver": "exact"}, ["dense 16,384 x 16,384", "Use cg"]),
        (
            {"solver": "nonsense"},
            ["--solver nonsense: must be one of", "cg, lissa, low_rank, exact, identity"],
        ),
    ],
)
def test_mistake_is_a_message(
    audit: Run, tmp_path: Path, options: dict[str, object], words: list[str]
) -> None:
    status, output = audit(**options)
    assert status == 2
    assert [word for word in words if word not in output] == []
    assert "Traceback" not in output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("count", "words"), [(0, "no rows"), (1, "at least 20")])
def test_too_few_rows(audit: Run, data: Path, count: int, words: str) -> None:
    status, output = audit(dataset=data / str(count))
    assert (status, words in output) == (2, True)


def test_model_that_is_no_dual_encoder(audit: Run, tmp_path: Path) -> None:
    size = {"hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=8, num_hidden_layers=1, **size)).save_pretrained(tmp_path / "b")
    status, output = audit(model=tmp_path / "b")
    assert (status, "BertModel is not a contrastive dual encoder" in output) == (2, True), output
    assert "Traceback" not in output


class TestOutput:
    def test_file(self, audit: Run, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("mine")
        status, output = audit(overwrite=True)
        assert (status, "is a file" in output) == (2, True)
        assert (tmp_path / "out").read_text() == "mine"

    @pytest.mark.parametrize("overwrite", [{}, {"overwrite": True}], ids=["plain", "overwrite"])
    @pytest.mark.parametrize("name", ["notes.txt", "scored2", ".hidden"])
    def test_foreign_files_stay(
        self, audit: Run, tmp_path: Path, name: str, overwrite: dict[str, bool]
    ) -> None:
        (tmp_path / "out" / "kept").mkdir(parents=True)
        (tmp_path / "out" / name).write_text("mine")
        status, output = audit(**overwrite)
        assert (status, name in output) == (2, True)
        assert (tmp_path / "out" / name).read_text() == "mine"
        assert (tmp_path / "out" / "kept").is_dir()

    def test_other_run_stays_without_overwrite(self, audit: Run, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "summary.json").write_text("{}")
        status, output = audit()
        assert (status, "--overwrite" in output) == (2, True)
        assert (tmp_path / "out" / "summary.json").read_text() == "{}"

    def test_other_run_stays_where_the_new_one_cannot_start(
        self, audit: Run, tmp_path: Path
    ) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "summary.json").write_text("{}")
        assert audit(overwrite=True, dataset="no/such/folder")[0] == 2
        assert (tmp_path / "out" / "summary.json").read_text() == "{}"

    def test_output_in_use_as_input_stays(self, audit: Run, data: Path, tmp_path: Path) -> None:
        shutil.copytree(data / "30", tmp_path / "out" / "scored")
        assert audit(overwrite=True, dataset=tmp_path / "out" / "scored")[0] == 2
        assert (tmp_path / "out" / "scored" / "state.json").exists()


def test_real_run_and_its_replacement(audit: Run, data: Path, tmp_path: Path) -> None:
    options = ["--model", MODEL, "--dataset", data / "30", "--output", tmp_path / "out"]
    code = "from hf_ecif.cli.main import main; main()"
    first = subprocess.run(
        [sys.executable, "-c", code, "audit", *SMALL, *map(str, options)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert first.returncode == 0, first.stderr
    assert re.search(r"30 rows: \d+ flagged as misaligned", first.stdout)
    assert "Traceback" not in first.stderr
    written = (tmp_path / "out" / "summary.json").stat().st_mtime_ns
    status, output = audit(overwrite=True, truth_column="is_misaligned", seed=1)
    assert status == 0
    assert "known to be misaligned" in " ".join(output.split())
    assert (tmp_path / "out" / "summary.json").stat().st_mtime_ns > written


def test_subprocess_tells_a_mistake_without_a_trace() -> None:
    command = [sys.executable, "-c", "from hf_ecif.cli.main import main; main()", "audit"]
    options = ["--model", MODEL, "--dataset", "x", "--output", "y", "--solver", "nonsense"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Error: --solver nonsense")


@pytest.mark.parametrize("text", ["[bold]", "[/]", "[/red] x", "[link=http://x]y", "a[0]"])
def test_square_brackets_survive(run: Run, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    def fail(*_: object) -> None:
        raise UserError(f"the folder {text} is wrong")

    monkeypatch.setattr(hf_ecif.applications.audit, "run_audit", fail)
    status, output = run("audit", "--model", "m", "--dataset", "d", "--output", "o", "--quiet")
    assert (status, output) == (2, f"Error: the folder {text} is wrong\n")


def test_full_disk_is_a_message(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fill(*_: object) -> None:
        with open("/dev/full", "w") as disk:
            disk.write("a shard")

    monkeypatch.setattr(hf_ecif.applications.audit, "run_audit", fill)
    status, output = run("audit", "--model", "m", "--dataset", "d", "--output", "o", "--quiet")
    assert status == 2
    assert "No space left on device. Make room" in output
    assert "--resume" in output


def test_other_errors_of_the_system_keep_their_trace(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        hf_ecif.applications.audit, "run_audit", lambda *_: Path("no/such/file").read_text()
    )
    with pytest.raises(FileNotFoundError):
        run("audit", "--model", "m", "--dataset", "d", "--output", "o", "--quiet")


def summary(**extra: Any) -> Summary:
    """Of three rows, with a warning that looks like markup."""
    values = fake_summary("birds", count=3, flagged=1, unreadable=0)
    return Summary.from_dict(values | {"warnings": ["look at [red]x[/red] and [/]"]} | extra)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({}, ["3 rows: 1 flagged", "[red]x[/red] and [/]", "o[/]/report.html"]),
        (
            {"truth": {"column": "wrong", "misaligned": 0, "found": 0, "precision": None}},
            ["Of 0 rows known to be misaligned"],
        ),
    ],
    ids=["brackets", "nothing known to be wrong"],
)
def test_summary_is_printed(
    run: Run, monkeypatch: pytest.MonkeyPatch, extra: dict[str, Any], words: list[str]
) -> None:
    monkeypatch.setattr(hf_ecif.applications.audit, "run_audit", lambda *_: summary(**extra))
    status, output = run("audit", "--model", "m", "--dataset", "d", "--output", "o[/]", "--quiet")
    assert status == 0
    assert [word for word in words if word not in output] == []


def test_interruption(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(hf_ecif.applications.audit, "run_audit", interrupt)
    status, output = run("audit", "--model", "m", "--dataset", "d", "--output", "o", "--quiet")
    assert status == 130
    assert "--resume continues" in " ".join(output.split())
    assert "Traceback" not in output


@pytest.fixture
def audited(data: Path, tmp_path: Path) -> Path:
    """The scored rows of an audit: of 30, the first three are flagged."""
    rows = load_from_disk(data / "30").cast_column("image", Image(decode=False))
    flags = [row < 3 for row in range(30)]
    for name, values, dtype in (
        ("ecif_flag", flags, "bool"),
        ("ecif_reason", ["because" if flag else None for flag in flags], "string"),
        ("ecif_noise_probability", [1 - row / 30 for row in range(30)], "float32"),
        ("ecif_score", [0.0] * 30, "float32"),
    ):
        rows = rows.add_column(name, values, feature=Value(dtype))
    write_shards(rows, tmp_path / "audit" / "scored")
    return tmp_path / "audit"


@pytest.mark.parametrize(
    ("options", "kept", "removed"),
    [([], 27, 3), (["--strategy", "worst", "--share", "0.5"], 15, 15)],
)
def test_clean(run: Run, audited: Path, options: list[str], kept: int, removed: int) -> None:
    output = audited.parent / "new"
    status, printed = run("clean", audited, *options, "--dry-run", "--output", output)
    assert status == 0
    assert not output.exists()
    assert re.search(rf"kept\W+{kept}\W+removed\W+{removed}\W", printed)
    assert run("clean", audited, *options, "--output", output)[0] == 0
    for part, count in (("kept", kept), ("removed", removed)):
        assert len(load_dataset(str(output / part), split="train")) == count


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "Give an --output folder, or --dry-run"),
        (["--dry-run", "--strategy", "worst"], "needs one between 0 and 1"),
        (["--dry-run", "--strategy", "burn"], "drop, worst, weight, relabel"),
        (["--dry-run", "--strategy", "relabel"], "no column 'ecif_suggested_text'"),
    ],
)
def test_clean_tells_mistakes(run: Run, audited: Path, options: list[str], words: str) -> None:
    status, output = run("clean", audited, *options)
    assert (status, words in output) == (2, True), output


def test_clean_needs_an_audit(run: Run, tmp_path: Path) -> None:
    status, output = run("clean", tmp_path / "none", "--dry-run")
    assert (status, "There is no audit in" in output) == (2, True)
    assert "'hf-ecif audit'" in output
