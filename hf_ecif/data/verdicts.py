"""A person's verdicts on pairs: read from many formats, and carried into the rows of an audit.

Formats are CSV and parquet with a line for each row, JSON of such records, and what Label Studio
exports as JSON, JSON-MIN or CSV.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal, get_args

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from datasets import Dataset
from numpy.typing import NDArray
from scipy.special import expit

from hf_ecif.data.captions import plain
from hf_ecif.data.columns import set_column
from hf_ecif.errors import UserError
from hf_ecif.utils.formatting import Bools, Floats, share

Verdict = Literal["right", "wrong", "cannot tell"]

VERDICT = "ecif_verdict"
AUDIT_PROBABILITY, AUDIT_FLAG = "ecif_audit_probability", "ecif_audit_flag"
JUDGED, BY_OTHERS = "judged wrong by a person", "by the verdicts on other rows"  # in reasons
ROW_NAMES = ("row", "ecif_row")
CAPTION = "caption"
VERDICT_NAMES = ("verdict", VERDICT, "choice", "label")
RIGHT = ("right", "correct", "ok", "good", "fits", "fit", "match", "matches", "aligned", "keep")
WRONG = ("wrong", "incorrect", "bad", "misfit", "mismatch", "mismatched", "misaligned", "remove")
UNTOLD = ("cannot tell", "can't tell", "can not tell", "unclear", "unsure", "unknown", "skip", "?")
SPELLINGS: dict[Verdict, tuple[str, ...]] = {
    "right": RIGHT,
    "wrong": WRONG,
    "cannot tell": UNTOLD,
}
# Answers to another question: is it right, or is there a problem?
AMBIGUOUS = ("true", "false", "yes", "no", "1", "0")


def read_verdicts(
    path: Path, rows: int, captions: Sequence[str | None] | None = None
) -> dict[int, Verdict]:
    """Verdicts by row number; rows whose verdict is empty are left out.

    Args:
        path: CSV, parquet or JSON.
        rows: that the audit has.
        captions: ``rows`` of them; where the file has captions, too, they must be these.

    Raises:
        UserError: the file cannot be read, a row number or a verdict is none, or the verdicts are
            on other rows.
    """
    verdicts: dict[int, Verdict] = {}
    for place, cells in _records(path):
        row = _row(cells, rows, place)
        if captions is not None:
            _check_caption(cells, captions[row], place)
        verdict = _verdict(cells, place)
        if verdict is None:
            continue
        if verdicts.setdefault(row, verdict) != verdict:
            raise UserError(
                f"{place}: row {row} is {verdict!r} here and {verdicts[row]!r} before. Decide on "
                "one."
            )
    if not verdicts:
        raise UserError(
            f"{path} has no verdicts. Write 'right', 'wrong' or 'cannot tell' into the column "
            f"{VERDICT_NAMES[0]!r}."
        )
    return verdicts


def to_marks(verdicts: Mapping[int, Verdict], rows: int) -> NDArray[np.int8]:
    """Verdicts ``(rows,)`` as a detector takes them: 1 is right, -1 wrong, 0 unknown."""
    marks = np.zeros(rows, dtype=np.int8)
    for row, verdict in verdicts.items():
        marks[row] = {"right": 1, "wrong": -1, "cannot tell": 0}[verdict]
    return marks


def verdicts_of(scored: Dataset) -> dict[int, Verdict]:
    """Verdicts that the rows of an audit have already, by row number."""
    if VERDICT not in scored.column_names:
        return {}
    column = scored.with_format(None)[VERDICT][:]
    return {row: verdict for row, verdict in enumerate(column) if verdict is not None}


def before_verdicts(scored: Dataset) -> tuple[Floats, Bools]:
    """Probabilities and flags ``(N,)`` as the audit had them; nan and false of unreadable rows.

    Where the audit gave no probability, the order of the rows is known all the same: it is then the
    probability if as many were wrong as right.
    """
    names = ("ecif_noise_probability", "ecif_flag")
    if AUDIT_PROBABILITY in scored.column_names:
        names = (AUDIT_PROBABILITY, AUDIT_FLAG)
    plain = scored.with_format(None)
    # As floats, null is not-a-number.
    probability = np.array(plain[names[0]][:], dtype=float)
    flag = np.array([value is True for value in plain[names[1]][:]])
    if "ecif_suspicion" in scored.column_names:
        suspicion = np.array(plain["ecif_suspicion"][:], dtype=float)
        probability = np.where(np.isnan(probability), expit(suspicion), probability)
    return probability, flag


def apply_verdicts(
    scored: Dataset, verdicts: Mapping[int, Verdict], probability: Floats, flag: Bools
) -> Dataset:
    """The rows of an audit with new probabilities and flags, and the old ones beside.

    What a person judged is certain, whatever its probability: it is flagged if it is wrong.

    Args:
        scored: rows with influence columns.
        verdicts: by row number.
        probability: ``(N,)``, calibrated; nan of unreadable rows.
        flag: ``(N,)``, by a cut of it.
    """
    before, flag_before = before_verdicts(scored)
    readable = np.isfinite(before)
    probability, flag = probability.copy(), flag & readable
    for row, verdict in verdicts.items():
        if verdict != "cannot tell" and readable[row]:
            flag[row] = verdict == "wrong"
            probability[row] = float(flag[row])
    old = scored.with_format(None)["ecif_reason"][:]
    reasons = [
        _reason(old[row], verdicts.get(row), value) if flag[row] else None if known else old[row]
        for row, (value, known) in enumerate(zip(probability, readable, strict=True))
    ]
    columns: dict[str, tuple[str, list[Any]]] = {
        "ecif_noise_probability": ("float32", _or_null(probability, readable)),
        "ecif_flag": ("bool", _or_null(flag, readable)),
        "ecif_borderline": ("bool", [None] * len(flag)),  # of the cut before
        "ecif_reason": ("string", reasons),
        VERDICT: ("string", [verdicts.get(row) for row in range(len(flag))]),
        AUDIT_PROBABILITY: ("float32", _or_null(before, readable)),
        AUDIT_FLAG: ("bool", _or_null(flag_before, readable)),
    }
    for name, (dtype, values) in columns.items():
        scored = set_column(scored, name, values, dtype)
    return scored


def _reason(old: str | None, verdict: Verdict | None, probability: float) -> str:
    """Why a row is flagged now, before what the audit said of it."""
    new = JUDGED if verdict == "wrong" else f"{share(probability)} {BY_OTHERS}"
    first, _, rest = (old or "").partition("; ")
    of_audit = rest if first.endswith((JUDGED, BY_OTHERS)) else old
    return f"{new}; {of_audit}" if of_audit else new


def _or_null(values: Floats | Bools, known: Bools) -> list[Any]:
    pairs = zip(values.tolist(), known.tolist(), strict=True)
    return [value if here else None for value, here in pairs]


def _records(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Where each record is, in words, and its cells."""
    readers: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
        ".csv": _read_csv,
        ".parquet": lambda path: pyarrow.parquet.read_table(
            path, columns=_wanted(path)
        ).to_pylist(),
        ".json": _read_json,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(
            f"`verdicts={path}` must be a file that ends in {', '.join(readers)}: the sheet "
            "that was written, filled in, or an export of Label Studio."
        )
    try:
        records = reader(path)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"`verdicts={path}` cannot be read: {error}") from error
    for number, record in enumerate(records, 1):
        yield f"{path.name}, record {number}", record


def _read_csv(path: Path) -> list[dict[str, Any]]:
    options = pyarrow.csv.ParseOptions(newlines_in_values=True)
    return pyarrow.csv.read_csv(path, parse_options=options).to_pylist()


def _wanted(path: Path) -> list[str]:
    """Columns to read: not the images."""
    names = pyarrow.parquet.read_schema(path).names
    return [name for name in names if name in (*ROW_NAMES, *VERDICT_NAMES, CAPTION)]


def _read_json(path: Path) -> list[dict[str, Any]]:
    values = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise ValueError("it must hold a list of records")
    return [_of_label_studio(value) if "annotations" in value else value for value in values]


def _of_label_studio(task: dict[str, Any]) -> dict[str, Any]:
    """A record of a task: its data, and what all annotators agree on."""
    choices = {
        choice
        for annotation in task["annotations"]
        if not annotation.get("was_cancelled")
        for result in annotation.get("result", [])
        for choice in result.get("value", {}).get("choices", [])
    }
    agreed = choices.pop() if len(choices) == 1 else "cannot tell" if choices else None
    return dict(task.get("data", {})) | {VERDICT_NAMES[0]: agreed}


def _row(cells: Mapping[str, Any], rows: int, place: str) -> int:
    name = _named(cells, ROW_NAMES, place)
    value = cells[name]
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise UserError(f"{place}: {name} = {value!r} is no number of a row.")
    if value >= rows:
        raise UserError(
            f"{place}: there is no row {value:,} in the audit, which has {rows:,}. These verdicts "
            "belong to another one."
        )
    return value


def _check_caption(cells: Mapping[str, Any], caption: str | None, place: str) -> None:
    told = cells.get(CAPTION)
    if isinstance(told, str) and plain(told) != plain(caption or ""):
        raise UserError(
            f"{place}: the caption is {shorten(told, 60)!r}, but that of the row is "
            f"{shorten(caption or '', 60)!r}. These verdicts belong to other data."
        )


def _verdict(cells: Mapping[str, Any], place: str) -> Verdict | None:
    name = _named(cells, VERDICT_NAMES, place)
    value = cells[name]
    text = "" if value is None else " ".join(str(value).lower().replace("_", " ").split())
    if not text:
        return None
    for verdict, spellings in SPELLINGS.items():
        if text in spellings:
            return verdict
    known = ", ".join(map(repr, get_args(Verdict)))
    if text in AMBIGUOUS:
        raise UserError(
            f"{place}: {name} = {value!r} may mean that the pair is right, or that it is wrong. "
            f"Write one of {known}."
        )
    raise UserError(f"{place}: {name} = {value!r} is no verdict. Write one of {known}.")


def _named(cells: Mapping[str, Any], names: tuple[str, ...], place: str) -> str:
    for name in names:
        if name in cells:
            return name
    raise UserError(
        f"{place}: there is no column {names[0]!r}. The columns are: {', '.join(cells) or 'none'}."
    )
