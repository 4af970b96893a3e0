"""Verdicts from files as people and tools write them."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hf_ecif.data.verdicts import read_verdicts
from hf_ecif.errors import UserError

EXPECTED = {3: "right", 7: "wrong", 8: "cannot tell"}


def annotated(row: int, *choices: str, cancelled: bool = False) -> dict:
    """A task as Label Studio exports it; an annotation for each choice."""
    return {
        "id": row + 100,
        "data": {"row": row, "image": "data:image/png;base64,AAAA"},
        "annotations": [
            {
                "was_cancelled": cancelled,
                "result": [
                    {"type": "choices", "from_name": "verdict", "value": {"choices": [choice]}}
                ],
            }
            for choice in choices
        ],
    }


def write(path: Path, content: object) -> Path:
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "text",
    [
        "row,verdict,caption\n3,right,a\n7,wrong,b\n8,cannot tell,c\n9,,d\n",
        'row,verdict,caption\n3,Correct,"a, \nb"\n7,MISFIT,b\n8,?,c\n',
        "caption,ecif_verdict,ecif_row\na,OK,3\nb, remove ,7\nc,cannot_tell,8\n",
        "row,choice,id,annotator\n3.0,fits,1,4\n7,mismatch,2,4\n8,unclear,3,4\n",
    ],
)
def test_csv(tmp_path, text):
    assert read_verdicts(write(tmp_path / "sheet.csv", text), rows=20) == EXPECTED


def test_parquet_without_reading_the_images(tmp_path):
    table = pa.table(
        {
            "row": pa.array([3, 7, 8, 9], pa.int64()),
            "verdict": ["right", "wrong", "unsure", None],
            "image": [{"bytes": b"no image", "path": None}] * 4,
        }
    )
    pq.write_table(table, tmp_path / "sheet.parquet")
    assert read_verdicts(tmp_path / "sheet.parquet", rows=20) == EXPECTED


@pytest.mark.parametrize(
    "records",
    [
        [{"row": 3, "verdict": "right"}, {"row": 7, "choice": "Wrong"}, {"row": 8, "label": "?"}],
        [
            annotated(3, "Right"),
            annotated(7, "Wrong", "wrong"[0].upper() + "rong"),
            annotated(8, "Right", "Wrong"),  # they disagree
            annotated(9, "Right", cancelled=True),
            annotated(10),
        ],
    ],
)
def test_json(tmp_path, records):
    assert read_verdicts(write(tmp_path / "export.json", records), rows=20) == EXPECTED


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("row,verdict\n20,right\n", "record 1: there is no row 20 in the audit, which has 20"),
        ("row,verdict\n1,right\n-1,right\n", "record 2: row = -1 is no number"),
        ("row,verdict\nsix,right\n", "record 1: row = 'six' is no number"),
        ("row,verdict\n1.5,right\n", "record 1: row = 1.5 is no number"),
        ("row,verdict\n,right\n", "record 1: row = None is no number"),
        ("row,verdict\n2,perhaps\n", "record 1: verdict = 'perhaps' is no verdict. Write one of"),
        ("row,verdict\n2,true\n", "may mean that the pair is right, or that it is wrong"),
        ("row,verdict\n2,1\n", "may mean that the pair is right, or that it is wrong"),
        ("row,verdict\n2,right\n2,wrong\n", "record 2: row 2 is 'wrong' here and 'right' before"),
        ("row,caption\n2,a\n", "no column 'verdict'. The columns are: row, caption"),
        ("verdict\nright\n", "no column 'row'"),
        ("row,verdict\n2,\n", "has no verdicts. Write 'right'"),
        ("row,verdict\n2,right,wrong\n", "cannot be read"),
        ("", "cannot be read"),
    ],
)
def test_what_is_no_verdict_is_named(tmp_path, text, words):
    with pytest.raises(UserError) as told:
        read_verdicts(write(tmp_path / "sheet.csv", text), rows=20)
    assert words in str(told.value)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("sheet.xlsx", "", "must be a file that ends in .csv, .parquet, .json"),
        ("sheet.json", {"row": 1}, "it must hold a list of records"),
        ("sheet.json", "[", "cannot be read"),
        ("sheet.parquet", "no parquet", "cannot be read"),
    ],
)
def test_what_is_no_table_is_named(tmp_path, name, content, words):
    with pytest.raises(UserError, match="`verdicts=") as told:
        read_verdicts(write(tmp_path / name, content), rows=20)
    assert words in str(told.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"cannot be read"):
        read_verdicts(tmp_path / "none.csv", rows=20)
