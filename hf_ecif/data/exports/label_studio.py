"""Rows as tasks of Label Studio, to be judged there and read back with the verdicts.

Tasks have their images as data URIs, which import anywhere without a storage to be set up; the
images are shrunk to what a person needs to judge them. label-studio-sdk 2.1 accepts the labelling
interface and finds tasks and predictions valid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

from hf_ecif.data.exports.rows import ROW, Exported, ExportRows
from hf_ecif.data.images import thumbnail
from hf_ecif.errors import UserError
from hf_ecif.utils.files import to_json, write_text
from hf_ecif.version import __version__

CONFIG = "config.xml"
SIDE = 640  # pixels of the longer side of an image
FILE_BYTES = 40 * 2**20  # a server takes files of some hundred MiB; more tasks go to another one
INTERFACE = """<View>
  <Image name="image" value="$image" zoom="true"/>
  <Text name="caption" value="$caption"/>
  <Choices name="verdict" toName="image" choice="single" required="true" showInline="true">
    <Choice value="right" hotkey="1"/>
    <Choice value="wrong" hotkey="2"/>
    <Choice value="cannot tell" hotkey="3"/>
  </Choices>
</View>
"""


def write_tasks(rows: ExportRows, folder: Path, advance: Callable[[int], None]) -> Exported:
    """`config.xml`, the labelling interface, and tasks with the audit's verdict as a prediction.

    Rows that were drawn for a person to judge come without one, which would colour the judgement.

    Raises:
        UserError: the rows have lost the numbers by which verdicts are read back.
    """
    if not rows.are_numbered:
        raise UserError(
            "Verdicts are read back by the rows of an audit, and this is the folder of a cleaning. "
            "Give that of the audit."
        )
    write_text(INTERFACE, folder / CONFIG)
    files = []
    for number, text in zip(count(1), _files(_tasks(rows, advance)), strict=False):
        files.append(f"tasks-{number:03d}.json")
        write_text(text, folder / files[-1])
    opens = f"a project with {CONFIG} as its labelling interface, and these files imported"
    return Exported(len(rows), [CONFIG, *files], opens)


def _tasks(rows: ExportRows, advance: Callable[[int], None]) -> Iterator[dict[str, Any]]:
    for number, cells in rows.records():
        uri, problem = thumbnail(cells[rows.columns.image], SIDE)
        text = str(cells[rows.columns.text] or "")
        task: dict[str, Any] = {"data": {ROW: number, "image": uri or "", "caption": text}}
        if problem:
            task["data"]["problem"] = problem
        if not rows.is_sample:
            task["data"] |= _told(cells)
            task["predictions"] = [*_predictions(cells)]
        yield task
        advance(1)


def _told(cells: dict[str, Any]) -> dict[str, Any]:
    names = ("ecif_noise_probability", "ecif_reason", "ecif_suggested_text")
    return {name: cells[name] for name in names if cells.get(name) is not None}


def _predictions(cells: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What the audit thinks, and how sure it is; nothing where it cannot tell."""
    probability, flag = cells.get("ecif_noise_probability"), cells.get("ecif_flag")
    if probability is None or flag is None:
        return
    choice = {
        "from_name": "verdict",
        "to_name": "image",
        "type": "choices",
        "value": {"choices": ["wrong" if flag else "right"]},
    }
    score = probability if flag else 1 - probability
    yield {"model_version": f"hf_ecif {__version__}", "score": score, "result": [choice]}


def _files(tasks: Iterator[dict[str, Any]]) -> Iterator[str]:
    """JSON lists of tasks, none of them much larger than `FILE_BYTES`."""
    texts: list[str] = []
    size = 0
    for task in tasks:
        texts.append(to_json(task))
        size += len(texts[-1])
        if size >= FILE_BYTES:
            yield _list(texts)
            texts, size = [], 0
    if texts:
        yield _list(texts)


def _list(texts: list[str]) -> str:
    return "[\n" + ",\n".join(texts) + "\n]\n"
