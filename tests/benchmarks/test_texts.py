"""What the texts quote of the records is what the records hold."""

import re
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
DATA = {"training pictures": "emoji", "held out, 200 rows": "emoji, test", "digits": "digits"}


def tables(path: Path) -> Iterator[dict[str, str]]:
    """Every row of every table of a Markdown file, by the names of its columns."""
    for table in re.findall(r"(?:^\|.*\n)+", path.read_text(), re.MULTILINE):
        heading, _, *rows = [re.split(r" ?\| ?", line)[1:-1] for line in table.splitlines()]
        yield from (dict(zip(heading, row, strict=True)) for row in rows)


def test_table_of_detection() -> None:
    record = {
        row["cell"]: row
        for row in tables(HERE / "results" / "detection.md")
        if row.get("measure") == "AUPRC"
    }
    quoted = [row for row in tables(HERE / "README.md") if row.get("data") in DATA]
    assert len(quoted) == 16
    for row in quoted:
        measured = record[f"{DATA[row.pop('data')]}, {row.pop('wrong')}, after"]
        assert row.pop("verdict") == measured["verdict"].split()[0]
        for method, value in row.items():
            assert value == measured[method.strip("`")].split()[0], (measured["cell"], method)
