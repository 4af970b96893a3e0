"""The keys of rows, a text file for each tar that they are from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hf_ecif.data.columns import KEY
from hf_ecif.data.exports.rows import Exported, ExportRows
from hf_ecif.data.exports.shards import Shard, shards_of
from hf_ecif.errors import UserError
from hf_ecif.utils.files import write_text


def write_keys(rows: ExportRows, folder: Path, advance: Callable[[int], None]) -> Exported:
    """`00000.txt` with the keys of `00000.tar`, a line each, in the order of the tar.

    Raises:
        UserError: the rows are from no tars.
    """
    if KEY not in rows.names:
        raise UserError(
            f"These rows have no {KEY!r}: they were not read from tars. Export parquet-ids, or "
            "uids."
        )
    keys = rows.column(KEY)
    shards = shards_of(rows)
    for shard in shards:
        path = folder / _name(shard)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text("".join(f"{keys[row]}\n" for row in shard.rows), path)
        advance(len(shard.rows))
    return Exported(len(rows), [_name(shard) for shard in shards], "a key a line")


def _name(shard: Shard) -> str:
    return f"{shard.name}.txt"
