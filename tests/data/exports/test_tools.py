"""What annotators and viewers get, by the rules of their formats.

label-studio-sdk 2.1.2, fiftyone 1.22.1 and lightly-studio 1.2.0 read these files; they are too
large to be installed for a test.
"""

import base64
import io
import json
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hf_ecif.data.exports import label_studio
from hf_ecif.data.exports.rows import ExportRows
from hf_ecif.data.exports.targets import write_export
from hf_ecif.data.summary import Columns
from hf_ecif.data.verdicts import read_verdicts
from hf_ecif.errors import UserError
from tests.support.exports import COUNT, FLAGGED, UNREADABLE, picture, table

READABLE = [row for row in range(COUNT) if row != UNREADABLE]


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


class TestLabelStudio:
    @pytest.fixture
    def tasks(self, tmp_path: Path) -> list[dict[str, Any]]:
        write_export(table(), "label-studio", tmp_path / "out")
        return read(tmp_path / "out/tasks-001.json")

    def test_tasks_have_what_the_interface_shows(self, tmp_path: Path, tasks: list[dict]) -> None:
        interface = ET.parse(tmp_path / "out/config.xml").getroot()
        shown = {tag.get("name"): tag.get("value") for tag in interface if tag.get("value")}
        assert shown == {"image": "$image", "caption": "$caption"}
        assert all({"image", "caption", "row"} <= task["data"].keys() for task in tasks)
        head, _, content = tasks[0]["data"]["image"].partition(",")
        assert head == "data:image/webp;base64"
        with Image.open(io.BytesIO(base64.b64decode(content))) as image:
            assert image.size == (7, 9)
        assert tasks[UNREADABLE]["data"]["problem"] == "not a known image format"

    def test_predictions_are_choices_of_the_interface(self, tmp_path: Path, tasks: list) -> None:
        interface = ET.parse(tmp_path / "out/config.xml").getroot()
        (control,) = interface.findall("Choices")
        choices = {choice.get("value") for choice in control}
        for row, task in enumerate(tasks):
            if row == UNREADABLE:
                assert task["predictions"] == []
                continue
            (prediction,) = task["predictions"]
            (result,) = prediction["result"]
            assert result["type"] == "choices"
            assert (result["from_name"], result["to_name"]) == (control.get("name"), "image")
            assert result["to_name"] == control.get("toName")
            (choice,) = result["value"]["choices"]
            assert choice in choices
            assert choice == ("wrong" if row in FLAGGED else "right")
            assert prediction["score"] == pytest.approx(0.9 if row in FLAGGED else 0.8)

    @pytest.mark.parametrize("is_short", [False, True])
    def test_verdicts_come_back(self, tmp_path: Path, tasks: list[dict], is_short: bool) -> None:
        """As Label Studio exports them, JSON and JSON-MIN."""
        answers = {0: "right", 1: "wrong", 4: "cannot tell"}
        choose = [{"type": "choices", "from_name": "verdict", "value": {"choices": ["?"]}}]
        exported = []
        for row, answer in answers.items():
            if is_short:
                exported.append(tasks[row]["data"] | {"id": row + 7, "verdict": answer})
                continue
            result = [choose[0] | {"value": {"choices": [answer]}}]
            annotation = {"was_cancelled": False, "result": result}
            exported.append(tasks[row] | {"id": row + 7, "annotations": [annotation]})
        (tmp_path / "back.json").write_text(json.dumps(exported))
        assert read_verdicts(tmp_path / "back.json", COUNT) == answers

    def test_a_sample_is_judged_without_our_verdicts(self, tmp_path: Path) -> None:
        rows = replace(table(), is_sample=True).select(np.array([4, 0]))
        write_export(rows, "label-studio", tmp_path / "out")
        tasks = read(tmp_path / "out/tasks-001.json")
        assert [task["data"]["row"] for task in tasks] == [4, 0]
        assert [task.keys() for task in tasks] == [{"data"}] * 2
        assert [task["data"].keys() for task in tasks] == [{"row", "image", "caption"}] * 2

    def test_large_files_are_parted(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(label_studio, "FILE_BYTES", 1500)
        done = write_export(table(), "label-studio", tmp_path / "out")
        files = [read(tmp_path / "out" / name) for name in done.files[1:]]
        assert len(files) > 1
        assert [task["data"]["row"] for tasks in files for task in tasks] == list(range(COUNT))

    def test_of_a_cleaning(self, tmp_path: Path) -> None:
        rows = replace(table(), are_numbered=False)
        with pytest.raises(UserError, match=r"by the rows of an audit.*Give that of the audit"):
            write_export(rows, "label-studio", tmp_path / "out")


class TestFiftyOne:
    @pytest.fixture
    def samples(self, tmp_path: Path) -> list[dict[str, Any]]:
        done = write_export(own_names(table()), "fiftyone", tmp_path / "out")
        assert done.notes == ["1 rows have no image that can be read, and are left out."]
        return read(tmp_path / "out/samples.json")["samples"]

    def test_images_byte_for_byte(self, tmp_path: Path, samples: list[dict]) -> None:
        assert [sample["row"] for sample in samples] == READABLE
        for sample in samples:
            content = (tmp_path / "out" / sample["filepath"]).read_bytes()
            assert content == picture(sample["row"])

    def test_fields(self, samples: list[dict]) -> None:
        by_row = {sample["row"]: sample for sample in samples}
        assert by_row[0]["text"] == "caption 0"
        assert by_row[0]["own_tags"] == 0
        assert by_row[0]["a_b"] == "x"
        assert by_row[0]["tags"] == ["kept"]
        assert by_row[1]["tags"] == ["removed", "flagged"]
        assert by_row[1]["verdict"] == {
            "_cls": "Classification",
            "label": "wrong",
            "confidence": pytest.approx(0.9),
        }
        assert "about" not in by_row[0]


def own_names(rows: ExportRows) -> ExportRows:
    """Rows with columns whose names FiftyOne has for something else."""
    dataset = rows.dataset.add_column("tags", list(range(COUNT)))
    return replace(rows, dataset=dataset.add_column("_a.b", ["x"] * COUNT))


def test_lightly(tmp_path: Path) -> None:
    """Captions in COCO's format, a file for every tag."""
    done = write_export(table(), "lightly", tmp_path / "out")
    assert done.files[:2] == ["captions-flagged.json", "captions-kept.json"]
    found = {}
    for name in done.files[:2]:
        coco = read(tmp_path / "out" / name)
        files = {image["id"]: image for image in coco["images"]}
        assert all(type(image["id"]) is int for image in coco["images"])
        assert {(image["width"], image["height"]) for image in coco["images"]} == {(7, 9)}
        for note in coco["annotations"]:
            found[files[note["image_id"]]["file_name"]] = note["caption"]
    assert found == {f"{row:09d}.png": f"caption {row}" for row in READABLE}
    scores = read(tmp_path / "out/scores.json")
    assert scores.keys() == found.keys()
    assert scores["000000001.png"]["ecif_noise_probability"] == pytest.approx(0.9)
    compile((tmp_path / "out/open.py").read_text(), "open.py", "exec")


@pytest.mark.parametrize("to", ["webdataset", "label-studio", "fiftyone", "lightly"])
def test_embeddings_have_no_pictures_to_show(tmp_path: Path, to: str) -> None:
    rows = table()
    references = [f"shards/0.npz#l14_img/{row}" for row in range(COUNT)]
    dataset = rows.dataset.remove_columns("image").add_column("embedding", references)
    rows = replace(rows, dataset=dataset, columns=Columns(image="embedding", text="text"))
    with pytest.raises(UserError, match=rf"without pictures, which {to} shows. Give parquet-ids"):
        write_export(rows, to, tmp_path / "out")
    write_export(rows, "cleanlab", tmp_path / "out")
    assert write_export(rows, "uids", tmp_path / "uids").rows == COUNT
