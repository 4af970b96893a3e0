"""Data sets of any schema: each is read with nothing lost, or refused in words that help.

Rows go the way of an audit but for its mathematics: found, made into pairs, judged (here by their
number), parted, written, and read again. A few go the whole way.
"""

import csv
import io
import json
import math
import re
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import date, datetime
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, LargeList, List, Value
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage

import hf_ecif
from hf_ecif import DetectionConfig, InfluenceConfig, InfluenceModel, UserError
from hf_ecif.applications.given import open_given
from hf_ecif.data.audit_folder import AuditFolder
from hf_ecif.data.cleaning import clean
from hf_ecif.data.columns import set_column
from hf_ecif.data.images import read_pair
from hf_ecif.data.schema import check_columns, is_influence_column
from hf_ecif.utils.progress import silent
from tests.support import DEMO

NUMBER = "number"  # a column by which rows are told apart, whatever becomes of their order
REMEDY = re.compile(r"\b(give|name|choose|rename|write|look|set|take|install|download)\b", re.I)
SETTINGS = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "phases": [Phase.generate],  # what fails is small, and making it smaller takes minutes
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}


# --------------------------------------------------------------------------------- what is drawn


@dataclass(frozen=True)
class Rows:
    """Rows as a person has them.

    Attributes:
        image: name of the column of images; likewise ``text``.
        images: contents of image files; None where there is none.
        captions: strings, lists of strings, or numbers of classes; None where there is none.
        kind: of the captions.
        others: further columns, by name: their types and values.
        are_named: whether the columns are told, or are to be found.
    """

    image: str
    text: str
    images: list[bytes | None]
    captions: list[Any]
    kind: Any
    others: dict[str, tuple[Any, list[Any]]]
    are_named: bool

    def __len__(self) -> int:
        return len(self.images)

    def columns(self) -> dict[str, tuple[Any, list[Any]]]:
        """All but the images, with the number of each row."""
        numbers = {NUMBER: (Value("int64"), list(range(len(self))))}
        return numbers | {self.text: (self.kind, self.captions)} | self.others

    def dataset(self) -> Dataset:
        """The rows in memory."""
        columns = self.columns()
        cells = [content and {"bytes": content, "path": None} for content in self.images]
        kinds = Features(**{self.image: Image()}, **{n: kind for n, (kind, _) in columns.items()})
        values = {name: values for name, (_, values) in columns.items()}
        return Dataset.from_dict({self.image: cells} | values, features=kinds)


@cache
def picture(kind: str, seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    stream = io.BytesIO()
    PILImage.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


PICTURES = [picture(kind, seed) for kind in ("PNG", "JPEG", "GIF", "WEBP") for seed in range(3)]
CONTENTS = st.sampled_from([*PICTURES * 3, b"no image", b"<svg/>", PICTURES[0][:50], None])
TEXTS = st.sampled_from(
    ["a cat", "two dogs, \"in\" a park", "", None, " \t", "ünï 貓", "a line\nand another", "x;y\tz",
     "'", "long " * 100, "NaN", "007", "{}", "<b>", "\\n"]
)  # fmt: skip
SCALARS: list[tuple[Any, st.SearchStrategy[Any]]] = [
    (Value("int64"), st.integers(-(2**62), 2**62)),
    (Value("int8"), st.integers(-128, 127)),
    (Value("float64"), st.floats()),
    (Value("bool"), st.booleans()),
    (Value("string"), st.text("ab,;\"'\n\t é貓", max_size=6)),
]
OTHERS = [
    *SCALARS,
    (Value("float32"), st.floats(width=32)),
    (Value("uint16"), st.integers(0, 2**16 - 1)),
    (Value("large_string"), st.text(max_size=5)),
    (Value("binary"), st.binary(max_size=5)),
    (Value("null"), st.none()),
    (Value("date32"), st.dates(date(1900, 1, 1), date(2100, 1, 1))),
    (Value("timestamp[us]"), st.datetimes(datetime(1900, 1, 1), datetime(2100, 1, 1))),
    (Value("decimal128(9, 2)"), st.integers(-(10**6), 10**6).map(lambda n: Decimal(n).scaleb(-2))),
    (ClassLabel(names=["a", "b", "c"]), st.integers(0, 2)),
    (List(Value("int64")), st.lists(st.integers(-9, 9), max_size=3)),
    (List(List(Value("string"))), st.lists(st.lists(st.text(max_size=2), max_size=2), max_size=2)),
    (LargeList(Value("float64")), st.lists(st.floats(allow_nan=False), max_size=2)),
    (List(Value("float32"), length=2), st.lists(st.floats(width=32), min_size=2, max_size=2)),
    ({"a": Value("int64"), "b": {"c": Value("string")}},
     st.fixed_dictionaries({"a": st.none() | st.integers(0, 9),
                            "b": st.fixed_dictionaries({"c": st.text(max_size=2)})})),
    (List({"x": Value("bool"), "y": Value("string")}),
     st.lists(st.fixed_dictionaries({"x": st.booleans(), "y": st.text(max_size=2)}), max_size=2)),
]  # fmt: skip
IN_TABLES = (Value("int64"), Value("bool"), Value("string"))  # types that a csv gives back
NAMES = st.sampled_from(
    ["width", "a b", "naïve", "a.b", "url", "label", "Text", "row", "x" * 60, "ecif_score", "path",
     "clip_score", "ecif_weight", "é.ü", "{}", "id", "original text", "split", "bytes", "caption 2"]
)  # fmt: skip
PAIRS = st.sampled_from(
    [("image", "text"), ("jpg", "caption"), ("img", "title"), ("a picture", "é")]
)


@st.composite
def rows(
    draw: st.DrawFn, kinds: list[Any] = OTHERS, is_plain: bool = False, least: int = 1
) -> Rows:
    """Rows; plain ones have strings for captions, and a picture in every row."""
    image, text = draw(PAIRS)
    count = draw(st.integers(least, least + 6))

    def column(values: st.SearchStrategy[Any], nulls: bool = True) -> list[Any]:
        cell = st.none() | values if nulls else values
        return draw(st.lists(cell, min_size=count, max_size=count))

    images = column(st.sampled_from(PICTURES) if is_plain else CONTENTS, nulls=False)
    form = "text" if is_plain else draw(st.sampled_from(["text"] * 4 + ["list", "class"]))
    kind, captions = {
        "text": (Value("string"), TEXTS),
        "list": (List(Value("string")), st.lists(TEXTS, max_size=3)),
        "class": (ClassLabel(names=["a cat", "two dogs"]), st.integers(0, 1)),
    }[form]
    others = {}
    for name in draw(st.lists(NAMES, max_size=4, unique=True)):
        other, values = draw(st.sampled_from(kinds))
        others[name] = (other, column(values))
    return Rows(image, text, images, column(captions), kind, others, draw(st.booleans()))


def told_apart(rows: Rows) -> Rows:
    """Rows that an audit can learn from: no two have one picture, and most have a caption."""
    captions = [
        text if number % 5 == 0 else f"{(text or '').strip()} thing {number}"
        for number, text in enumerate(rows.captions)
    ]
    return replace(rows, images=[picture("PNG", n) for n in range(len(rows))], captions=captions)


# ------------------------------------------------------------------------------- where rows lie

Written = tuple[Any, Rows]  # what is given to an audit, and the rows that are to come back


def in_memory(rows: Rows, folder: Path) -> Written:
    return rows.dataset(), rows


def in_splits(rows: Rows, folder: Path) -> Written:
    return DatasetDict(train=rows.dataset()), rows


def as_stream(rows: Rows, folder: Path) -> Written:
    return rows.dataset().to_iterable_dataset(), rows


def saved(rows: Rows, folder: Path) -> Written:
    rows.dataset().save_to_disk(folder / "saved")
    return folder / "saved", rows


def parquet_file(rows: Rows, folder: Path) -> Written:
    rows.dataset().to_parquet(folder / "train.parquet")
    return folder / "train.parquet", rows


def parquet_folder(rows: Rows, folder: Path) -> Written:
    whole, half = rows.dataset(), len(rows) // 2
    for name, part in (("a", range(half)), ("b", range(half, len(rows)))):
        whole.select(part).to_parquet(folder / f"{name}.parquet")
    return folder, rows


def bare_parquet(rows: Rows, folder: Path) -> Written:
    """Bytes in place of images, and nothing that tells of features but the types of Arrow."""
    table = rows.dataset().with_format("arrow")[:]
    place = table.column_names.index(rows.image)
    cells = pa.array(rows.images, pa.binary())
    table = table.set_column(place, rows.image, cells).replace_schema_metadata(None)
    pq.write_table(table, folder / "train.parquet")
    return folder, rows


def _files(rows: Rows, folder: Path) -> tuple[list[str], Rows]:
    """Pictures as files, their names, and the rows without what has no picture."""
    named = [f"{number}.png" for number in range(len(rows))]
    images = [PICTURES[0] if content is None else content for content in rows.images]
    for name, content in zip(named, images, strict=True):
        (folder / name).write_bytes(content)
    return named, replace(rows, images=images)


def _records(rows: Rows, **first: list[Any]) -> list[dict[str, Any]]:
    columns = first | {name: values for name, (_, values) in rows.columns().items()}
    return [dict(zip(columns, cells, strict=True)) for cells in zip(*columns.values(), strict=True)]


def csv_file(rows: Rows, folder: Path) -> Written:
    named, rows = _files(rows, folder)
    _write_csv(folder / "train.csv", _records(rows, **{rows.image: named}))
    return folder / "train.csv", rows


def image_folder(rows: Rows, folder: Path) -> Written:
    named, rows = _files(rows, folder)
    _write_csv(folder / "metadata.csv", _records(rows, file_name=named))
    return folder, replace(rows, image="image")


def lines(rows: Rows, folder: Path) -> Written:
    named, rows = _files(rows, folder)
    _write_lines(folder / "metadata.jsonl", _records(rows, file_name=named))
    return folder, replace(rows, image="image")


def json_file(rows: Rows, folder: Path) -> Written:
    named, rows = _files(rows, folder)
    _write_lines(folder / "train.jsonl", _records(rows, **{rows.image: named}))
    return folder / "train.jsonl", rows


def tar(rows: Rows, folder: Path) -> Written:
    """A row's files side by side; whatever is no picture and no caption is in the JSON."""
    images = [PICTURES[0] if content is None else content for content in rows.images]
    with tarfile.open(folder / "0.tar", "w") as file:
        for number, record in enumerate(_records(rows)):
            caption = record.pop(rows.text) or ""
            content = json.dumps(record, default=str).encode()
            members = {"png": images[number], "txt": caption.encode(), "json": content}
            for field, value in members.items():
                member = tarfile.TarInfo(f"{number:04d}.{field}")
                member.size = len(value)
                file.addfile(member, io.BytesIO(value))
    captions = [caption or "" for caption in rows.captions]
    return folder / "0.tar", replace(
        rows, images=images, image="png", text="txt", captions=captions
    )


def _write_csv(path: Path, records: list[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        sheet = csv.DictWriter(file, records[0])
        sheet.writeheader()
        sheet.writerows(records)


def _write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")


EXACT = (in_memory, in_splits, as_stream, saved, parquet_file, parquet_folder, bare_parquet)
AS_TEXT = (csv_file, image_folder, lines, json_file, tar)


# ----------------------------------------------------------------------------- what is to be true


@pytest.fixture(scope="module", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@cache
def model() -> InfluenceModel:
    config = InfluenceConfig(fit_epochs=1, partitions=2, probes=1, batch_size=8)
    return InfluenceModel.from_pretrained(str(DEMO / "model"), config)


def read_part_write_read(source: Any, rows: Rows, folder: Path) -> None:
    """All that an audit does but the scores.

    Raises:
        UserError: the rows are refused.
    """
    named = {"image_column": rows.image, "text_column": rows.text} if rows.are_named else {}
    opened = open_given(model(), source, split=None, **named).opened
    columns = opened.sources.columns
    scored = check_columns(opened.plain.with_format(None), *columns)
    reasons: list[str | None] = []
    for number, cells in enumerate(scored.select_columns(list(columns))):
        reason = read_pair(cells[columns[0]], cells[columns[1]], 10**6).reason
        reasons.append(reason or ("odd" if number % 2 else None))
    flags = [None if reason not in (None, "odd") else reason == "odd" for reason in reasons]
    for name, kind, values in (("flag", "bool", flags), ("reason", "string", reasons)):
        scored = set_column(scored, f"ecif_{name}", values, kind)
    result = clean(scored)
    audit = AuditFolder(folder)
    audit.write_rows(result, scored)
    assert len(result.kept) + len(result.removed) == len(scored)


def audit_and_save(source: Any, rows: Rows, folder: Path) -> None:
    """The same with the scores.

    Raises:
        UserError: the rows are refused.
    """
    named = {"image_column": rows.image, "text_column": rows.text} if rows.are_named else {}
    audit = hf_ecif.audit(
        model(), source, detection=DetectionConfig(injections=1), progress=silent, **named
    )
    audit.save(folder)


def nothing_is_lost(rows: Rows, folder: Path, is_exact: bool) -> None:
    """Kept and removed rows are those that were given, byte for byte; likewise the scored ones."""
    for parts in (("scored",), ("kept", "removed")):
        files = [file for part in parts for file in sorted((folder / part).glob("*.parquet"))]
        found = by_number(map(pq.read_table, files))
        assert found.keys() == set(range(len(rows)))
        for number, cells in found.items():
            check_row(rows, number, cells, is_exact)


def by_number(tables: Iterable[Any]) -> dict[int, list[dict[str, Any]]]:
    """Rows by their number: several where each has some of the captions."""
    found: dict[int, list[dict[str, Any]]] = {}
    for table in tables:
        for row in table.to_pylist():
            about = json.loads(row["json"]) if NUMBER not in row else row
            found.setdefault(int(about[NUMBER]), []).append(row | about)
    return found


def check_row(rows: Rows, number: int, found: list[dict[str, Any]], is_exact: bool) -> None:
    kind = rows.kind
    for row in found:
        content = row[rows.image] and row[rows.image]["bytes"]
        assert content == rows.images[number]
        for name, (_, values) in rows.others.items():
            if not is_influence_column(name):
                same(row.get(name), values[number], is_exact, name)
    if isinstance(kind, List):
        captions = [text for row in found for text in row[rows.text] or []]
        expected = rows.captions[number]
        assert sorted(map(str, captions)) == sorted(map(str, expected or []))
        assert (expected is None) == all(row[rows.text] is None for row in found)
        return
    assert len(found) == 1
    same(found[0][rows.text], rows.captions[number], is_exact, rows.text)


def same(found: Any, expected: Any, is_exact: bool, name: str) -> None:
    """Equal; what is kept as text may come back as another type that says the same."""
    if is_exact:
        assert _plain(found) == _plain(expected), name
        return
    # A csv has no other way to say that a value is missing.
    if expected in (None, "", "NaN") or (isinstance(expected, float) and math.isnan(expected)):
        assert found in (None, "", expected) or found != found, name
        return
    assert str(found) == str(expected) or float(found) == float(expected), name


def _plain(value: Any) -> str:
    """Text that tells values apart, but not lists from tuples, nor not-a-number from itself."""
    if isinstance(value, dict):
        return repr({name: _plain(one) for name, one in sorted(value.items())})
    if isinstance(value, list | tuple):
        return repr([_plain(one) for one in value])
    if isinstance(value, date):  # a datetime is one, too
        return value.isoformat()
    return repr(float(value)) if isinstance(value, float) else repr(value)


def helps(error: UserError, rows: Rows, source: Any) -> None:
    """The message names the thing, in a sentence, and another says what to do."""
    message = str(error)
    things = ["`", *(repr(name) for name in (rows.image, rows.text)), str(source), "rows"]
    assert any(thing in message for thing in things), message
    assert REMEDY.search(message), message
    assert message.endswith("."), message
    assert len(message) < 1500, message


def try_rows(
    write: Callable[[Rows, Path], Written],
    rows: Rows,
    is_exact: bool,
    run: Callable[[Any, Rows, Path], None] = read_part_write_read,
) -> None:
    folder = Path(tempfile.mkdtemp())
    try:
        (folder / "in").mkdir()
        source, expected = write(rows, folder / "in")
        try:
            run(source, expected, folder / "out")
        except UserError as error:
            helps(error, expected, source)
        else:
            nothing_is_lost(expected, folder / "out", is_exact)
    finally:
        shutil.rmtree(folder)


@pytest.mark.slow
@settings(max_examples=300, **SETTINGS)
@given(drawn=rows(), write=st.sampled_from(EXACT))
def test_rows_with_their_types(drawn: Rows, write: Any) -> None:
    try_rows(write, drawn, is_exact=True)


@pytest.mark.slow
@settings(max_examples=200, **SETTINGS)
@given(drawn=rows(SCALARS, is_plain=True), write=st.sampled_from(AS_TEXT))
def test_rows_as_text(drawn: Rows, write: Any) -> None:
    try_rows(write, drawn, is_exact=False)


@pytest.mark.slow
@settings(max_examples=8, **SETTINGS)
@given(drawn=rows(is_plain=True, least=40).map(told_apart), write=st.sampled_from(EXACT))
def test_whole_audits(drawn: Rows, write: Any) -> None:
    try_rows(write, drawn, is_exact=True, run=audit_and_save)
