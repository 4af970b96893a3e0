"""What the review's page is told of rows: all of them as columns, a few of them in words.

The columns go to the browser once, as numbers in the order of the rows, so that sorting, filtering
and finding the next row need no server.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from datasets import ClassLabel, Features

from hf_ecif.app.selection import Audit, open_audit
from hf_ecif.data.columns import COLUMNS
from hf_ecif.data.scored_rows import split_reason
from hf_ecif.errors import UserError
from hf_ecif.utils.formatting import estimate, number, superscript

MOST_NAMES = 500  # of the values of a column that can be chosen from a list
MOST_SIMILAR = 60
MOST_WORDS = 16  # of a caption, that others are compared by
BITS = {"readable": 1, "flag": 2, "borderline": 4, "suggestion": 8, "wrong": 16}
# Columns that the page has in another form, or that are of no use in a list.
HIDDEN = {"ecif_flag", "ecif_borderline", "ecif_wrong_words", "ecif_reason", "ecif_suggested_text"}


def table(audit: Audit, facts: dict[str, Any]) -> bytes:
    """All rows as columns: a header in JSON, after its length in four bytes, then the columns.

    Args:
        audit: an audit.
        facts: more fields of the header.
    """
    rows = audit.rows
    columns = {
        "probability": rows.probability.astype("<f4"),
        "suspicion": rows.suspicion.astype("<f4"),
        "score": rows.score.astype("<f4"),
        "positive": rows.positive.astype("<f4"),
        "duplicate": np.nan_to_num(rows.duplicate, nan=-1).astype("<i4"),
        "bits": _bits(audit),
        "findingCode": _findings(audit)[0],
    }
    header = {
        "rows": len(rows),
        "exponent": rows.exponent,
        "own": audit.threshold,
        "reach": audit.reach,
        "findings": _findings(audit)[1],
        "columns": _choices(audit),
        "groups": audit.summary.groups and audit.summary.groups.column,
        "abstains": audit.summary.noise.abstains,
    }
    return packed(header | facts, columns)


def packed(header: dict[str, Any], columns: dict[str, np.ndarray]) -> bytes:
    """A header and columns, each beginning at a multiple of four bytes."""
    assert sys.byteorder == "little"
    layout, start = [], 0
    for name, values in columns.items():
        layout.append({"name": name, "kind": values.dtype.str[1:], "start": start})
        start += -(-values.nbytes // 4) * 4
    text = json.dumps(header | {"layout": layout}).encode()
    text += b" " * (-len(text) % 4)
    parts = [len(text).to_bytes(4, "little"), text]
    for values in columns.values():
        content = values.tobytes()
        parts.append(content + b"\0" * (-len(content) % 4))
    return b"".join(parts)


def details(audit: Audit, numbers: Iterable[int]) -> list[dict[str, Any]]:
    """Rows in words: caption in parts, reason, suggestion."""
    return [_detail(audit, row) for row in numbers if 0 <= row < len(audit.rows)]


def search(audit: Audit, text: str) -> np.ndarray:
    """Rows whose captions hold a text, whatever its case."""
    captions = audit.rows.column(audit.summary.columns.text)
    found = pc.match_substring(captions, text, ignore_case=True)
    return np.flatnonzero(found.fill_null(False).to_numpy()).astype("<u4")


def column(audit: Audit, name: str) -> tuple[dict[str, Any], np.ndarray]:
    """A column to sort and to filter by.

    Args:
        audit: an audit.
        name: name of one of the columns that `table` lists.

    Returns:
        What its values are, and the values: numbers; or codes of names, -1 for none; or, of more
        names than can be listed, their places in alphabetical order.

    Raises:
        UserError: there is no such column to choose.
    """
    if name not in _choices(audit):
        raise UserError(f"There is no column {name!r} to sort by.")
    values = audit.rows.column(name)
    kind = _features(audit).get(name)
    if isinstance(kind, ClassLabel):
        codes = values.fill_null(-1).to_numpy().astype("<i4")
        return {"kind": "names", "names": kind.names}, codes
    if pa.types.is_floating(values.type) or pa.types.is_integer(values.type):
        distinct = pc.count_distinct(values).as_py()
        if pa.types.is_floating(values.type) or distinct > MOST_NAMES:
            return {"kind": "numbers"}, values.cast("double").to_numpy().astype("<f4")
    texts = values.cast("string").combine_chunks().dictionary_encode()
    texts = texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts
    names = texts.dictionary.to_pylist()
    order = np.argsort(np.array(names, dtype=object), kind="stable") if names else np.array([], int)
    places = np.empty(len(names) + 1, dtype="<i4")
    places[order], places[-1] = np.arange(len(names)), -1
    codes = places[texts.indices.fill_null(len(names)).to_numpy()]
    if len(names) > MOST_NAMES:
        return {"kind": "order"}, codes
    return {"kind": "names", "names": [names[place] for place in order]}, codes


def similar(audit: Audit, row: int) -> list[dict[str, Any]]:
    """Rows that are like one, by what makes them so: the nearest reason first."""
    rows = audit.rows
    group = rows.duplicate[row]
    sections = []
    if np.isfinite(group):
        sections.append(
            ("in the same group of duplicates", np.flatnonzero(rows.duplicate == group))
        )
    captions = rows.column(audit.summary.columns.text)
    same = pc.equal(captions, captions[row]).fill_null(False).to_numpy()
    sections.append(("with the same caption", np.flatnonzero(same)))
    sections.append(("with captions of the same words", _alike(captions, row)))
    seen, told = {row}, []
    for how, numbers in sections:
        new = [int(other) for other in numbers if int(other) not in seen][:MOST_SIMILAR]
        seen |= set(new)
        if new:
            told.append({"how": how, "rows": new})
    return told


@lru_cache(maxsize=4)
def pictures(folder: str) -> np.ndarray:
    """For every row the first one with the same picture, byte by byte, ``(N,)``.

    Only rows in groups of duplicates are compared, if the audit has looked for these.
    """
    audit = open_audit(folder)
    rows = audit.rows
    grouped = np.isfinite(rows.duplicate)
    among = np.flatnonzero(grouped) if grouped.any() else np.arange(len(rows))
    first: dict[bytes, int] = {}
    found = np.arange(len(rows), dtype="<i4")
    for row in among.tolist():
        cell = rows.cell(row)
        if isinstance(cell, dict) and (content := cell.get("bytes")):
            found[row] = first.setdefault(xxhash.xxh3_128_digest(content), row)
    return found


def _detail(audit: Audit, row: int) -> dict[str, Any]:
    rows = audit.rows
    suggestion, exponent = rows.suggestion(row), rows.exponent
    unit = f" × 10{superscript(exponent)}" if exponent else ""
    return {
        "row": row,
        "caption": rows.marked(row),
        "reasons": split_reason(rows.reason(row) or ""),
        "suggestion": suggestion,
        "chance": _number(rows.chance[row]) if suggestion else None,
        "margin": _number(rows.margin[row]) if suggestion else None,
        "score": _number(rows.score[row]),
        "influence": estimate(rows.score[row], rows.stderr[row], exponent) + unit,
        "positive": number(rows.positive[row]),
        "negative": number(rows.negative[row]),
    }


def _bits(audit: Audit) -> np.ndarray:
    rows = audit.rows
    marks = {
        "readable": rows.readable,
        "flag": rows.flag,
        "borderline": rows.borderline,
        "suggestion": rows.suggested,
        "wrong": rows.known_wrong,
    }
    return sum(
        (marks[name].astype(np.uint8) * np.uint8(bit) for name, bit in BITS.items()),
        start=np.zeros(len(rows), dtype=np.uint8),
    )


def _findings(audit: Audit) -> tuple[np.ndarray, list[str]]:
    """Number of every row's finding, 0 for none, and their names from 1 on."""
    nothing = np.zeros(len(audit.rows), dtype=np.uint8)
    if "ecif_finding" not in audit.rows.column_names:
        return nothing, []
    values = audit.rows.column("ecif_finding")
    if not pa.types.is_string(values.type):
        return nothing, []
    names = sorted(pc.unique(values.drop_null()).to_pylist())
    codes = pc.index_in(values, pa.array(names, pa.string())).fill_null(-1).to_numpy()
    return (codes + 1).astype(np.uint8), names


@lru_cache(maxsize=16)
def _choices_of(folder: str) -> tuple[str, ...]:
    audit = open_audit(folder)
    image = audit.summary.columns.image
    schema = audit.rows.schema

    def is_plain(kind: pa.DataType) -> bool:
        tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_boolean)
        return any(test(kind) for test in (*tests, pa.types.is_integer, pa.types.is_floating))

    names = [
        field.name
        for field in schema
        if is_plain(field.type) and field.name not in HIDDEN and field.name != image
    ]
    # The data's own columns before those of the audit.
    return tuple(sorted(names, key=lambda name: name in COLUMNS))


def _choices(audit: Audit) -> tuple[str, ...]:
    return _choices_of(str(audit.folder))


def _features(audit: Audit) -> Features:
    return Features.from_arrow_schema(audit.rows.schema)


def _alike(captions: pa.ChunkedArray, row: int) -> np.ndarray:
    """Rows whose captions share words with a row's, the nearest first.

    A word counts by how rare it is, and a caption by its length: that of term frequency and inverse
    document frequency, but for the words of one caption alone, so that no index is kept.
    """
    found = re.findall(r"\w{2,}", (captions[row].as_py() or "").lower())
    nearness = np.zeros(len(captions))
    for word in list(dict.fromkeys(found))[:MOST_WORDS]:
        pattern = rf"\b{re.escape(word)}\b"
        has = pc.match_substring_regex(captions, pattern, ignore_case=True)
        has = has.fill_null(False).to_numpy()
        nearness += has * np.log(len(captions) / max(has.sum(), 1))
    lengths = pc.utf8_length(captions).fill_null(1).to_numpy()
    nearness /= np.sqrt(np.maximum(lengths, 1))
    order = np.argsort(-nearness, kind="stable")[: MOST_SIMILAR + 1]
    return order[nearness[order] > 0]


def _number(value: float) -> float | None:
    """A number for JSON, which has none for what is not finite."""
    return float(value) if np.isfinite(value) else None
