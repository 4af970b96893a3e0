"""What may become of a folder that a run is to write into: one policy for all."""

from pathlib import Path

import pytest

from hf_ecif.applications.outputs import require_free
from hf_ecif.errors import UserError
from hf_ecif.utils.checkpoints import MANIFEST
from hf_ecif.utils.files import CHECKPOINTS

RUN = {"finished": "done.json", "others": ("done.json", "rows")}


@pytest.mark.parametrize("names", [[], [".rows.7.partial"]])
def test_new_or_empty(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).touch()
    require_free(tmp_path)
    require_free(tmp_path, **RUN)
    require_free(tmp_path / "a" / "b")


@pytest.mark.parametrize(
    ("names", "options", "words"),
    [
        (["mine.txt"], {}, "other files"),
        (["mine.txt"], RUN | {"overwrite": True}, "other files"),
        (["mine.txt", "done.json"], RUN | {"overwrite": True}, r"other files \(mine.txt\)"),
        (["mine.txt"], {"finished": "done.json", "overwrite": True}, "other files"),
        (["done.json", "rows"], RUN, "is finished"),
        (["done.json"], RUN | {"resume": True}, "is finished"),
        ([CHECKPOINTS], RUN, "interrupted"),
        ([MANIFEST, "rows"], RUN, "interrupted"),
        (["rows"], RUN, "interrupted"),
    ],
)
def test_what_must_not_be_lost(tmp_path: Path, names: list[str], options: dict, words: str) -> None:
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=words):
        require_free(tmp_path, **options)


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (["done.json", "rows"], RUN | {"overwrite": True}),
        (["done.json", "rows", CHECKPOINTS], RUN | {"resume": True}),
        ([CHECKPOINTS], RUN | {"resume": True}),
        ([CHECKPOINTS], RUN | {"overwrite": True}),
        # Of a model's folder, not all names are known.
        (["model.safetensors", "done.json"], {"finished": "done.json", "overwrite": True}),
    ],
)
def test_what_a_run_goes_on_with_or_replaces(
    tmp_path: Path, names: list[str], options: dict
) -> None:
    for name in names:
        (tmp_path / name).touch()
    require_free(tmp_path, **options)


def test_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        require_free(tmp_path / "file" / "below")
