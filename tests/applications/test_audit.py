"""A whole audit of 150 rows of the demo, some of them damaged on purpose."""

import csv
import io
import struct
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets.config
import numpy as np
import pytest
from datasets import Dataset, Image, Value, load_dataset
from PIL import Image as PILImage
from sklearn.metrics import roc_auc_score

from hf_ecif.applications.audit import AuditRequest, run_audit
from hf_ecif.applications.audit_summary import _warn_of_groups
from hf_ecif.config import DetectionConfig, InfluenceConfig
from hf_ecif.data.columns import COLUMNS, WRONG_WORDS
from hf_ecif.data.summary import Summary
from hf_ecif.errors import UserError
from tests.support import DEMO
from tests.support.rows import read

ROWS = 150
ONCE = DetectionConfig(injections=3)
CONFIG = InfluenceConfig(partitions=2, probes=4, fit_epochs=2, batch_size=64)
# Columns that are no float32, and those of them that a readable row may lack.
TYPES = {
    "ecif_flag": "bool",
    "ecif_borderline": "bool",
    "ecif_finding": "string",
    "caption_truncated": "bool",
    "ecif_suggested_text": "string",
    "ecif_duplicate_group": "int64",
    "ecif_reason": "string",
}
FLAGGED_ALONE = ("ecif_suggested_margin", "ecif_suggested_probability", "ecif_wrong_words")
NUMBERS = [name for name in COLUMNS if name not in (*TYPES, *FLAGGED_ALONE)]


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


# A few bytes whose header promises 1.6 billion pixels.
BOMB = (
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0))
    + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
)
# Row, column, what is put there, and words of the reason.
DAMAGE: list[tuple[int, str, Any, str]] = [
    (3, "image", {"bytes": b"no image", "path": None}, "unreadable"),
    (10, "image", {"bytes": BOMB, "path": None}, "40000 x 40000"),
    (17, "image", None, "image missing"),
    (24, "text", "", "caption empty"),
    (31, "text", None, "caption missing"),
    (38, "text", "  ", "caption empty"),
]
DAMAGED = [row for row, *_ in DAMAGE]
REPEATED = slice(50, 54)


def write(columns: dict[str, list[Any]], like: Dataset, path: Path) -> None:
    Dataset.from_dict(columns, features=like.features).cast_column("image", Image()).to_parquet(
        path
    )


def content(rows: Dataset, names: list[str]) -> Counter[str]:
    """The rows, in no order, each as often as it is there."""
    columns = [rows[name][:] for name in names]
    return Counter(repr(row) for row in zip(*columns, strict=True))


@pytest.fixture(scope="module")
def module_patch() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, module_patch: pytest.MonkeyPatch) -> Path:
    """``data`` with damaged rows and repeated ones, a clean query, and nothing else yet."""
    root = tmp_path_factory.mktemp("audit")
    module_patch.setattr(datasets.config, "HF_DATASETS_CACHE", root / "cache")
    (root / "data").mkdir()
    train, query = (read(DEMO / "data" / f"{split}.parquet") for split in ("train", "validation"))
    columns = train.select([*range(ROWS - 2), 60, 60])[:]
    for row, column, value, _ in DAMAGE:
        columns[column][row] = value
    columns["text"][REPEATED] = ["the same caption"] * 4
    write(columns, train, root / "data" / "train.parquet")
    write(query[:60], query, root / "data" / "validation.parquet")
    return root


@pytest.fixture(scope="module")
def request_(folder: Path) -> AuditRequest:
    data = str(folder / "data")
    return AuditRequest(
        model=str(DEMO / "model"),
        dataset=data,
        query=data,
        output=folder / "out",
        truth_column="is_misaligned",
        group_column="noise",
        suggest_probability=0.0,
        detection=ONCE,
    )


@pytest.fixture(scope="module")
def summary(request_: AuditRequest) -> Summary:
    return run_audit(request_, CONFIG)


@pytest.fixture(scope="module")
def before(folder: Path) -> Dataset:
    return read(folder / "data" / "train.parquet")


@pytest.fixture(scope="module")
def parts(summary: Summary, request_: AuditRequest) -> dict[str, Dataset]:
    return {name: read(request_.output / name) for name in ("scored", "kept", "removed")}


@pytest.fixture(scope="module")
def scored(parts: dict[str, Dataset]) -> Dataset:
    return parts["scored"]


@pytest.mark.parametrize("part", ["scored", "kept", "removed"])
def test_folders_open_with_load_dataset(
    summary: Summary, request_: AuditRequest, part: str
) -> None:
    rows = load_dataset(str(request_.output / part), split="train")
    assert rows.num_rows == getattr(summary, "rows" if part == "scored" else part) > 0
    assert rows.features["image"] == Image()


@pytest.mark.parametrize("names", [["emoji"], ["emoji", "text", "image"], [*COLUMNS]])
def test_kept_and_removed_are_the_scored_rows(parts: dict[str, Dataset], names: list[str]) -> None:
    halves = content(parts["kept"], names) + content(parts["removed"], names)
    assert halves == content(parts["scored"], names)
    assert halves.total() == ROWS


def test_input_columns_are_untouched(before: Dataset, scored: Dataset) -> None:
    assert scored.column_names == [*before.column_names, *COLUMNS]
    for name in before.column_names:
        assert scored.features[name] == before.features[name]
        if name != "image":
            assert scored[name][:] == before[name][:]


def test_image_bytes_are_untouched(before: Dataset, scored: Dataset) -> None:
    old, new = ([cell and cell["bytes"] for cell in rows["image"]] for rows in (before, scored))
    assert old == new
    PILImage.open(io.BytesIO(new[0])).verify()


@pytest.mark.parametrize("name", COLUMNS)
def test_column_types(scored: Dataset, name: str) -> None:
    expected = WRONG_WORDS if name == "ecif_wrong_words" else Value(TYPES.get(name, "float32"))
    assert scored.features[name] == expected


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_finite_where_a_row_is_readable(scored: Dataset, name: str) -> None:
    values = scored[name][:]
    assert [row for row, value in enumerate(values) if value is None] == DAMAGED
    assert np.isfinite([value for value in values if value is not None]).all()


def test_both_roles_add_up_to_the_score(scored: Dataset) -> None:
    score, positive, negative = (
        np.array(scored[f"ecif_{name}"][:], dtype=float)
        for name in ("score", "positive", "negative")
    )
    np.testing.assert_allclose(positive + negative, score, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(("row", "column", "value", "reason"), DAMAGE)
def test_damaged_row_has_a_reason_and_no_scores(
    scored: Dataset, row: int, column: str, value: Any, reason: str
) -> None:
    damaged = scored[row]
    assert reason in damaged["ecif_reason"]
    assert {damaged[name] for name in COLUMNS if name != "ecif_reason"} == {None}


def test_reasons_are_with_the_removed_rows(parts: dict[str, Dataset]) -> None:
    assert all(parts["removed"]["ecif_reason"])
    assert not any(parts["kept"]["ecif_reason"])
    assert set(parts["kept"]["ecif_flag"]) == {False}
    assert set(parts["removed"]["ecif_flag"]) == {True, None}


def test_summary_counts_what_is_in_the_files(
    summary: Summary, parts: dict[str, Dataset], scored: Dataset
) -> None:
    flags = np.array([bool(flag) for flag in scored["ecif_flag"]])
    wrong = np.array(scored["is_misaligned"][:])
    wrong[DAMAGED] = False  # they are not judged
    assert summary.rows == ROWS
    assert summary.unreadable == len(DAMAGE) == sum(summary.unreadable_reasons.values())
    assert summary.unreadable_reasons == Counter(scored[r]["ecif_reason"] for r in DAMAGED)
    assert summary.scored == ROWS - len(DAMAGE)
    assert summary.flagged == flags.sum()
    assert summary.kept == parts["kept"].num_rows == ROWS - len(DAMAGE) - flags.sum()
    assert summary.removed == parts["removed"].num_rows == ROWS - summary.kept
    assert summary.truth.misaligned == wrong.sum()
    assert summary.truth.found == (wrong & flags).sum()
    assert summary.truth.precision == pytest.approx((wrong & flags).sum() / flags.sum())
    assert summary.truth.recall == pytest.approx((wrong & flags).sum() / wrong.sum())
    assert summary.noise.borderline == sum(flag is True for flag in scored["ecif_borderline"])
    suggested = [text is not None for text in scored["ecif_suggested_text"]]
    assert summary.suggestions.count == sum(suggested) > 0
    shared = Counter(group for group in scored["ecif_duplicate_group"] if group is not None)
    assert summary.duplicates.either.to_dict() == {
        "groups": len(shared),
        "rows": shared.total(),
        "largest": max(shared.values()),
    }
    assert summary.query.rows == 60
    assert summary.noise.verified.to_dict() == {"right": 30, "wrong": 0}  # half of the query
    assert not summary.noise.rate_is_bound
    assert summary.config == CONFIG.to_dict() | ONCE.to_dict()


def test_injected_mismatches_look_harmful_where_wrong_rows_do(
    summary: Summary, scored: Dataset
) -> None:
    known = [row for row in scored if row["ecif_relative"] is not None]
    wrong = [row["is_misaligned"] for row in known]
    of_wrong = roc_auc_score(wrong, [-row["ecif_relative"] for row in known])
    assert of_wrong > 0.5
    assert summary.noise.injected_score_auroc > 0.5


def test_a_group_that_is_flagged_beyond_chance_is_named(summary: Summary) -> None:
    group = summary.groups.table[0]
    often = group.replace(group="latin", rows=100, flagged=60)
    rest = group.replace(group="greek", rows=1000, flagged=50)
    groups = summary.groups.replace(table=[often, rest])
    told = [*_warn_of_groups(summary.replace(groups=groups, scored=1100, flagged=110))]
    assert [("latin (60 of 100)" in text, "greek" in text) for text in told] == [(True, False)]
    alike = summary.groups.replace(table=[often.replace(flagged=6), rest])
    assert not [*_warn_of_groups(summary.replace(groups=alike, scored=1100, flagged=56))]


def test_groups_in_the_summary_are_those_of_the_files(summary: Summary, scored: Dataset) -> None:
    (group,) = summary.groups.table  # the wrong rows are fewer than a group needs
    rows = scored.filter(lambda row: row["noise"] == "none" and row["ecif_flag"] is not None)
    assert (group.group, group.rows) == ("none", len(rows))
    assert group.rows + summary.groups.other_rows == summary.scored
    assert group.flagged == sum(rows["ecif_flag"])
    assert group.noise_rate < summary.noise.rate
    probability = np.array(rows["ecif_noise_probability"])
    flagged = np.array(rows["ecif_flag"])
    assert probability[~flagged].max() <= group.threshold + 1e-6
    assert probability[flagged].min() >= group.threshold - 1e-6


def test_suggestions_are_captions_of_other_rows(scored: Dataset) -> None:
    rows = scored.remove_columns("image").to_list()
    texts = {row["text"] for row in rows}
    for row in rows:
        assert (row["ecif_suggested_text"] is None) == (row["ecif_suggested_margin"] is None)
        if row["ecif_suggested_text"] is not None:
            assert row["ecif_flag"]
            assert row["ecif_suggested_text"] in texts - {row["text"]}
            assert row["ecif_suggested_margin"] >= 0
            assert row["ecif_suggested_text"][:30] in row["ecif_reason"]


def test_wrong_words_are_where_they_say(scored: Dataset) -> None:
    rows = scored.remove_columns("image").to_list()
    for row in rows:
        words = row["ecif_wrong_words"]
        assert (words is None) == (row["ecif_flag"] is not True)
        for word in words or []:
            assert row["text"][word["start"] : word["end"]] == word["word"]
    assert any(row["ecif_wrong_words"] for row in rows)


def test_repeated_rows_are_one_group(scored: Dataset) -> None:
    groups = scored["ecif_duplicate_group"][:]
    assert groups[REPEATED] == [REPEATED.start] * 4
    assert groups[60] == groups[ROWS - 1] == groups[ROWS - 2] == 60


def test_summary_file_is_the_summary(summary: Summary, request_: AuditRequest) -> None:
    assert Summary.load(request_.output / "summary.json") == summary


def test_nothing_else_is_written(summary: Summary, request_: AuditRequest) -> None:
    names = {path.name for path in request_.output.iterdir()}
    assert names == {"scored", "kept", "removed", "summary.json", "report.html"}
    assert "<html" in (request_.output / "report.html").read_text()[:500].lower()


def test_missing_cells_are_no_overlap(summary: Summary) -> None:
    assert summary.query.overlap == 0
    assert not any("query" in warning for warning in summary.warnings)


def test_own_output_is_scored_anew_and_truth_changes_no_score(
    scored: Dataset, request_: AuditRequest, folder: Path
) -> None:
    columns = scored[:]
    for name in ("is_misaligned", "original_text"):
        columns[name] = columns[name][::-1]
    columns["ecif_score"] = [7.0] * ROWS
    (folder / "scored").mkdir()
    write(columns, scored, folder / "scored" / "train.parquet")
    again = replace(request_, dataset=str(folder / "scored"), output=folder / "again")
    run_audit(again, CONFIG)
    rows = read(again.output / "scored")
    assert rows.column_names == scored.column_names
    for name in COLUMNS:
        assert rows[name][:] == scored[name][:], name


@pytest.fixture(scope="module")
def small(folder: Path, before: Dataset) -> Callable[..., Summary]:
    """Audit the rows 60 to 85, with columns exchanged."""

    def audit(
        name: str,
        query_rows: slice | None = None,
        options: dict[str, Any] | None = None,
        **columns: list[Any],
    ) -> dict[str, Any]:
        root = folder / name
        root.mkdir()
        write({**before[60:85], **columns}, before, root / "train.parquet")
        if query_rows:
            write(before[query_rows], before, root / "validation.parquet")
        query = str(root) if query_rows else None
        request = AuditRequest(
            model=str(DEMO / "model"),
            dataset=str(root),
            output=root / "out",
            query=query,
            detection=ONCE,
            **(options or {}),
        )
        return run_audit(request, replace(CONFIG, fit_epochs=1, batch_size=32))

    return audit


def test_a_column_of_verdicts_is_built_on(small: Callable[..., Summary], folder: Path) -> None:
    verdicts = [True] * 6 + [False] * 2 + [None] * 17
    summary = small(
        "verdicts", options={"verified_column": "is_misaligned"}, is_misaligned=verdicts
    )
    assert summary.noise.verified.to_dict() == {"right": 6, "wrong": 2}
    assert not summary.noise.rate_is_bound or summary.noise.abstains
    scored = read(folder / "verdicts" / "out" / "scored")
    assert scored["ecif_noise_probability"][:8] == [0.0] * 6 + [1.0] * 2
    assert scored["ecif_flag"][:8] == [False] * 6 + [True] * 2


def test_a_sheet_of_verdicts_is_built_on(
    small: Callable[..., Summary], folder: Path, before: Dataset, tmp_path: Path
) -> None:
    captions = before["text"][60:85]
    verdicts = ["wrong", "right", "", "cannot tell", "right"]

    def sheet(name: str, *captions: str) -> Path:
        lines = zip(range(5), verdicts, captions, strict=True)
        path = tmp_path / name
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([["row", "verdict", "caption"], *lines])
        return path

    summary = small("sheet", options={"verdicts": sheet("own.csv", *captions[:5])})
    assert summary.noise.verified.to_dict() == {"right": 2, "wrong": 1}
    scored = read(folder / "sheet" / "out" / "scored")
    assert [scored["ecif_noise_probability"][row] for row in (0, 1, 4)] == [1.0, 0.0, 0.0]
    assert scored["ecif_flag"][:2] == [True, False]
    with pytest.raises(UserError, match=r"record 1: .* belong to other data"):
        small("other", options={"verdicts": sheet("other.csv", "no", *captions[1:5])})


def test_verdicts_for_all_rows_leave_none_to_judge(small: Callable[..., Summary]) -> None:
    with pytest.raises(UserError, match="none is left to judge"):
        small("all", options={"verified_column": "is_misaligned"}, is_misaligned=[True] * 25)


def test_query_is_chosen_with_a_warning_and_no_row_is_known_to_be_wrong(
    small: Callable[..., Summary],
) -> None:
    summary = small("chosen", options={"truth_column": "is_misaligned"}, is_misaligned=[False] * 25)
    assert summary.query.chosen
    assert summary.query.rows >= 2
    assert any("No query was given" in warning for warning in summary.warnings)
    truth = summary.truth
    assert (truth.misaligned, truth.found, truth.recall) == (0, 0, None)
    assert truth.auroc is None


def test_overlap_counts_images_and_no_missing_ones_with_a_warning(
    small: Callable[..., Summary], before: Dataset
) -> None:
    images = [*before[60:84]["image"], None]
    summary = small("overlap", query_rows=slice(17, 64), image=images)
    assert before[17]["image"] is None  # missing on both sides
    assert summary.query.overlap == 4
    assert any(w.startswith("4 images of the query are in") for w in summary.warnings)


def test_equal_captions_leave_nothing_to_learn_from(small: Callable[..., Summary]) -> None:
    with pytest.raises(UserError, match="caption"):
        small("equal", text=["the same"] * 25)


def test_no_row_is_readable(small: Callable[..., Summary]) -> None:
    with pytest.raises(UserError, match=r"None of the 25 rows can be read.*image missing"):
        small("unreadable", image=[None] * 25)


def test_truth_must_be_boolean(small: Callable[..., Summary]) -> None:
    with pytest.raises(UserError, match="noise"):
        small("kinds", options={"truth_column": "noise"})


def test_without_comparison_there_are_no_suggestions(
    small: Callable[..., Summary], folder: Path
) -> None:
    summary = small("alone", options={"suggest": False})
    assert (summary.suggestions, summary.duplicates) == (None, None)
    rows = read(folder / "alone" / "out" / "scored")
    for name in COLUMNS:
        if not name.startswith(("ecif_suggested", "ecif_duplicate", "ecif_wrong_words")):
            continue
        assert set(rows[name]) == {None}


def test_suggestions_of_a_vocabulary(small: Callable[..., Summary], folder: Path) -> None:
    words = folder / "words.txt"
    words.write_text("a red heart\na dog\na flag\n")
    options = {"vocabulary": words, "suggest_probability": 0.0}
    summary = small("words", query_rows=slice(85, 130), options=options)
    suggested = read(folder / "words" / "out" / "scored")["ecif_suggested_text"][:]
    assert summary.suggestions.vocabulary == str(words)
    assert set(suggested) - {None} <= {"a red heart", "a dog", "a flag"}
    assert summary.suggestions.count == sum(text is not None for text in suggested)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"group_column": "language"}, "group_column='language'` is not in the data set"),
        ({"group_column": "image"}, "must hold strings, integers or booleans"),
        ({"vocabulary": Path("no/such/file")}, "vocabulary=no/such/file` cannot be read"),
    ],
)
def test_mistakes_in_what_is_compared(
    small: Callable[..., Summary], options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        small(f"mistake {words[-9:]}".replace("/", ""), options=options)


class TestDemo:
    def test_it_names_its_own_sources(self) -> None:
        request = AuditRequest(demo=True)
        assert (request.model, request.dataset) == (str(DEMO / "model"), str(DEMO / "data"))
        assert (request.query, request.truth_column) == (str(DEMO / "data"), "is_misaligned")

    def test_others_are_refused(self) -> None:
        with pytest.raises(UserError, match="`demo` brings a `model` of its own"):
            AuditRequest(demo=True, model="me/clip")
