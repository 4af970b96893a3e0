"""Small inputs in the forms in which people keep image-text pairs, each in a folder of its own."""

from __future__ import annotations

import base64
import csv
import io
import json
import shutil
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features, Image, List, Value
from PIL import Image as PILImage

COLOURS = ("red", "green", "blue", "white", "black", "gold")
CAPTIONS = [f"a {colour} square, it is" for colour in COLOURS]


def picture(number: int, kind: str = "PNG") -> bytes:
    """An image of a few pixels, in the colour that its caption names."""
    buffer = io.BytesIO()
    colour = COLOURS[number % len(COLOURS)]
    PILImage.new("RGB", (4 + number // len(COLOURS), 4), colour).save(buffer, kind)
    return buffer.getvalue()


def cells(count: int = 6) -> list[dict[str, Any]]:
    """Image cells."""
    return [{"bytes": picture(number), "path": None} for number in range(count)]


def rows(**columns: Sequence[Any]) -> Dataset:
    """Images with their captions, or with other columns in place of these."""
    given = columns or {"text": CAPTIONS}
    count = len(next(iter(given.values())))
    return Dataset.from_dict({"image": cells(count), **given}).cast_column("image", Image())


def classes() -> Dataset:
    """Images with a class in place of a caption."""
    kinds = Features(image=Image(), label=ClassLabel(names=list(COLOURS)))
    return Dataset.from_dict({"image": cells(), "label": list(range(6))}, features=kinds)


def with_lists(lists: Sequence[Sequence[str | None] | None]) -> Dataset:
    """Images with lists of captions."""
    kinds = Features(image=Image(), captions=List(Value("string")), number=Value("int64"))
    columns = {
        "image": cells(len(lists)),
        "captions": list(lists),
        "number": list(range(len(lists))),
    }
    return Dataset.from_dict(columns, features=kinds)


def write_tar(path: Path, files: Mapping[str, bytes]) -> None:
    """A tar of these files, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


def shard(numbers: Sequence[int], suffix: str = "jpg") -> dict[str, bytes]:
    """Files of a tar as img2dataset writes it: image, caption and JSON."""
    kind = {"jpg": "JPEG"}.get(suffix, suffix.upper())
    files = {}
    for number in numbers:
        key, text = f"{number:09d}", CAPTIONS[number]
        files[f"{key}.{suffix}"] = picture(number, kind)
        files[f"{key}.txt"] = text.encode()
        files[f"{key}.json"] = json.dumps(
            {"key": key, "caption": text, "status": "success"}
        ).encode()
    return files


def img2dataset(folder: Path) -> Path:
    """Tars with the tables and statistics beside them, which hold rows of failed downloads."""
    for number in range(2):
        name = f"{number:05d}"
        write_tar(folder / f"{name}.tar", shard(range(3 * number, 3 * number + 3)))
        known = [{"key": f"{n:09d}", "caption": "lost", "url": "x"} for n in range(5)]
        pq.write_table(pa.Table.from_pylist(known), folder / f"{name}.parquet")
        (folder / f"{name}_stats.json").write_text('{"count": 5}')
    return folder


def pictures(folder: Path, names: Sequence[str] | None = None) -> list[str]:
    """Image files, and their names."""
    folder.mkdir(parents=True, exist_ok=True)
    named = list(names or (f"{number}.png" for number in range(6)))
    for number, name in enumerate(named):
        suffix = Path(name).suffix.lower()
        kind = {".jpg": "JPEG", ".jpeg": "JPEG"}.get(suffix, suffix[1:].upper())
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture(number, kind))
    return named


def table(
    folder: Path,
    name: str = "train.csv",
    *,
    separator: str = ",",
    encoding: str = "utf-8",
    columns: tuple[str, str] = ("filepath", "title"),
    captions: Sequence[str] = CAPTIONS,
) -> Path:
    """A csv beside its pictures."""
    paths = [f"images/{path}" for path in pictures(folder / "images")]
    with (folder / name).open("w", encoding=encoding, newline="") as file:
        writer = csv.writer(file, delimiter=separator, lineterminator="\n")
        writer.writerows([columns, *zip(paths, captions, strict=True)])
    return folder / name


def sidecars(folder: Path, suffix: str = ".txt") -> Path:
    """Pictures with their captions beside them."""
    for name, text in zip(pictures(folder), CAPTIONS, strict=True):
        content = json.dumps({"caption": text}) if suffix == ".json" else f"{text}\n"
        (folder / name).with_suffix(suffix).write_text(content, encoding="utf-8")
    return folder


def parquet(folder: Path, images: Sequence[Any], **columns: Sequence[Any]) -> Path:
    """A table whose schema tells nothing of images."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {} if columns else {"text": CAPTIONS}
    pq.write_table(pa.table({"image": list(images), **texts, **columns}), folder / "train.parquet")
    return folder


def in_base64(number: int) -> str:
    """An image as text."""
    return base64.b64encode(picture(number)).decode()


# Every row of the table of formats that is read from a place: how to write it, and what to ask for.
PLACES: dict[str, Callable[[Path], Path | str]] = {}


def place(write: Callable[[Path], Path | str]) -> Callable[[Path], Path | str]:
    """Register a form under the name of its function."""
    PLACES[write.__name__] = write
    return write


@place
def saved(folder: Path) -> Path:
    rows().save_to_disk(folder / "saved")
    return folder / "saved"


@place
def parquet_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows().to_parquet(folder / "train.parquet")
    return folder


@place
def parquet_file(folder: Path) -> Path:
    rows().to_parquet(folder / "pairs.parquet")
    return folder / "pairs.parquet"


@place
def arrow_file(folder: Path) -> Path:
    rows().save_to_disk(folder / "saved")
    return next((folder / "saved").glob("*.arrow"))


@place
def json_lines(folder: Path) -> Path:
    names = pictures(folder)
    lines = [{"image": n, "text": t, "tags": [t]} for n, t in zip(names, CAPTIONS, strict=True)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "train.jsonl"


@place
def json_lines_folder(folder: Path) -> Path:
    return json_lines(folder).parent


@place
def image_folder(folder: Path) -> Path:
    lines = [f'{name},"{text}"' for name, text in zip(pictures(folder), CAPTIONS, strict=True)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,text", *lines]))
    return folder


@place
def image_folder_in_latin_1_with_semicolons(folder: Path) -> Path:
    lines = [f"{name};{text} é" for name, text in zip(pictures(folder), CAPTIONS, strict=True)]
    (folder / "metadata.csv").write_text("\n".join(["file_name;text", *lines]), "latin-1")
    return folder


@place
def zipped_image_folder(folder: Path) -> Path:
    shutil.make_archive(str(folder / "zipped/data"), "zip", image_folder(folder / "pictures"))
    return folder / "zipped"


@place
def zip_file(folder: Path) -> Path:
    return zipped_image_folder(folder) / "data.zip"


@place
def shouted_suffix(folder: Path) -> Path:
    parquet_folder(folder / "pairs")
    return (folder / "pairs/train.parquet").rename(folder / "pairs/TRAIN.PARQUET").parent


@place
def coco(folder: Path) -> Path:
    names = pictures(folder / "val2017")
    known = {
        "images": [{"id": 7 * n, "file_name": name} for n, name in enumerate(names)],
        "annotations": [
            {"id": n, "image_id": 7 * n, "caption": text} for n, text in enumerate(CAPTIONS)
        ],
    }
    (folder / "annotations").mkdir()
    (folder / "annotations/captions_val2017.json").write_text(json.dumps(known))
    return folder


@place
def csv_with_pictures_in_a_folder_that_it_does_not_name(folder: Path) -> Path:
    lines = [f"{n}|{t}" for n, t in zip(pictures(folder / "Images"), CAPTIONS, strict=True)]
    (folder / "results.csv").write_text("\n".join(["image_name|comment", *lines]))
    return folder


@place
def csv_of_open_clip(folder: Path) -> Path:
    return table(folder, separator="\t")


@place
def folder_of_csv(folder: Path) -> Path:
    return table(folder, separator="\t").parent


@place
def tsv(folder: Path) -> Path:
    return table(folder, "train.tsv", separator="\t")


@place
def csv_with_commas(folder: Path) -> Path:
    return table(folder)


@place
def csv_with_semicolons(folder: Path) -> Path:
    return table(folder, separator=";")


@place
def csv_with_a_mark(folder: Path) -> Path:
    return table(folder, encoding="utf-8-sig")


@place
def csv_in_utf_16(folder: Path) -> Path:
    return table(folder, encoding="utf-16")


@place
def csv_in_latin_1(folder: Path) -> Path:
    return table(folder, encoding="latin-1", captions=[f"{text} é" for text in CAPTIONS])


@place
def folder_of_tars(folder: Path) -> Path:
    write_tar(folder / "a.tar", shard(range(4)))
    write_tar(folder / "b.tar", shard(range(4, 6)))
    return folder


@place
def folder_of_img2dataset(folder: Path) -> Path:
    return img2dataset(folder)


@place
def one_tar(folder: Path) -> Path:
    write_tar(folder / "00000.tar", shard(range(6)))
    return folder / "00000.tar"


@place
def braces(folder: Path) -> str:
    return f"{img2dataset(folder)}/{{00000..00001}}.tar"


@place
def colons(folder: Path) -> str:
    there = img2dataset(folder)
    return f"{there}/00000.tar::{there}/00001.tar"


@place
def glob(folder: Path) -> str:
    return f"{img2dataset(folder)}/*.tar"


@place
def tar_of_webp_with_captions_in_json(folder: Path) -> Path:
    files = shard(range(6), "webp")
    write_tar(folder / "x.tar", {n: c for n, c in files.items() if not n.endswith(".txt")})
    return folder


@place
def tar_of_mixed_suffixes(folder: Path) -> Path:
    files: dict[str, bytes] = {}
    for number, suffix in enumerate(("png", "jpg", "webp", "PNG", "JPEG", "jpg")):
        kind = {"jpg": "JPEG"}.get(suffix, suffix.upper())
        files[f"a dir/ä {number}.{suffix}"] = picture(number, kind)
        files[f"a dir/ä {number}.TXT"] = CAPTIONS[number].encode()
    write_tar(folder / "x.tar", files)
    return folder


@place
def sidecar_txt(folder: Path) -> Path:
    return sidecars(folder)


@place
def sidecar_json(folder: Path) -> Path:
    return sidecars(folder, ".json")


@place
def structs_with_another_key(folder: Path) -> Path:
    return parquet(folder, [cell | {"path": "x.png", "width": 4} for cell in cells()])


@place
def structs_with_a_path_of_type_null(folder: Path) -> Path:
    return parquet(folder, cells())


@place
def raw_bytes(folder: Path) -> Path:
    return parquet(folder, [picture(number) for number in range(6)])


@place
def texts_of_base64(folder: Path) -> Path:
    return parquet(folder, [in_base64(number) for number in range(6)])


@place
def data_uris(folder: Path) -> Path:
    return parquet(folder, [f"data:image/png;base64,{in_base64(number)}" for number in range(6)])


@place
def paths_beside_parquet(folder: Path) -> Path:
    return parquet(folder, pictures(folder))
