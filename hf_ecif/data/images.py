"""Images in a data set's cells: decoded, hashed, and shown small.

All data are untrusted here: nothing in them is executed, no image is decoded before its header has
been checked, and images that are passed on keep their bytes.
"""

from __future__ import annotations

import base64
import io
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, BinaryIO

import xxhash
from datasets import Dataset, Image
from PIL import Image as PILImage
from PIL import ImageOps, UnidentifiedImageError

from hf_ecif.data.embeddings import is_reference, read_vectors, tell
from hf_ecif.utils.formatting import shorten

# Formats that hold photographs and drawings. Pillow reads many more, some through other programs
# (EPS runs Ghostscript), which no data set needs to reach.
IMAGE_FORMATS = {
    "PNG": "png",
    "JPEG": "jpg",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tiff",
    "AVIF": "avif",
    "JPEG2000": "jp2",
    "PPM": "ppm",
}  # and the endings of their files
START = 4096  # bytes from which a format is told
HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
MOST_RESIZED = 2**22  # pixels on the way into the model: 50 MB as floats of three channels
Resized = Callable[[int, int], tuple[int, int]]
THUMBNAIL_SIDE = 160
PROBLEM_LENGTH = 160
MOST_ZIPPED = 2**28  # bytes of a file in an archive


@dataclass(frozen=True)
class Pair:
    """One row, decoded.

    Attributes:
        image: the image as RGB; None if the row cannot be scored.
        text: the caption; empty if there is none.
        reason: why the row cannot be scored; None if it can.
    """

    image: PILImage.Image | None
    text: str
    reason: str | None


def read_pair(
    image_cell: dict[str, Any] | PILImage.Image | None,
    text: str | None,
    max_pixels: int,
    resized: Resized | None = None,
) -> Pair:
    """Decoded image and text of a row, or the reason why there is none.

    The image is upright, on white if it was transparent, and the first frame if it was animated.
    Its size is checked in the header, before any pixel is decoded.

    Args:
        image_cell: The cell of an `Image(decode=False)` column (`bytes`, `path` or both), or an
            image that was decoded already.
        text: The caption.
        max_pixels: Images of more pixels than this are refused.
        resized: Width and height that the model's processor gives an image on the way; what has
            more than `MOST_RESIZED` pixels then is refused, too. A line of 60,000 x 1 pixels would
            take gigabytes at a height of 224.

    Returns:
        A pair that has either an image or a reason.

    Examples:
        >>> read_pair(None, "a cat", max_pixels=1_000_000).reason
        'image missing'
    """
    try:
        image = _read_image(image_cell, max_pixels, resized)
    except _RefusedError as refusal:
        return Pair(None, text or "", str(refusal))
    if text is None:
        return Pair(None, "", "caption missing")
    if not text.strip():
        return Pair(None, text, "caption empty")
    return Pair(image, text, None)


@dataclass(frozen=True)
class ImageFacts:
    """What the header of an image says.

    Attributes:
        suffix: ending of the name of such a file.
        width: in pixels, as stored; likewise ``height``.
    """

    suffix: str
    width: int
    height: int


def image_facts(content: bytes) -> ImageFacts | None:
    """What the header of an image says; None if it is none, or damaged."""
    try:
        image = _open_image(io.BytesIO(content))
    except Exception:  # damaged files make Pillow raise nearly anything
        return None
    return ImageFacts(IMAGE_FORMATS.get(image.format or "", "jpg"), *image.size)


def image_bytes(image_cell: dict[str, Any] | str | None) -> bytes | None:
    """Undecoded bytes of an image cell, read from its local file if only a path is stored.

    A table can name any file of this machine. Only files that are images are read, of formats that
    are scored or not (SVG, HEIC), so that no other file can end up in a result.

    Returns:
        The bytes, or None if there are none to be had.
    """
    if not image_cell or isinstance(image_cell, str):  # a string names an embedding
        return None
    if image_cell.get("bytes") is not None:
        return bytes(image_cell["bytes"])
    try:
        with _open_cell(image_cell) as file:
            if not _foreign_format(file):
                _open_image(file)
            file.seek(0)
            return file.read()
    except Exception:  # damaged files make Pillow raise nearly anything
        return None


def decode_base64(text: str) -> bytes | None:
    """The image that a text is the base64 form of, also as a data URI; None if it is of none."""
    _, _, body = text.rpartition(",") if text.startswith("data:") else ("", "", text)
    try:
        content = base64.b64decode("".join(body.split()), altchars=_altchars(body), validate=True)
        _open_image(io.BytesIO(content))
    except Exception:  # damaged headers make Pillow raise nearly anything
        return None
    return content


def _altchars(body: str) -> bytes | None:
    """Signs of the form that is safe in addresses, where a text has them."""
    return b"-_" if "-" in body or "_" in body else None


def image_hashes(
    dataset: Dataset, image_column: str, among: set[bytes] | None = None
) -> set[bytes]:
    """Hashes of the readable images, by which equal images of two data sets are found.

    Args:
        dataset: the rows.
        image_column: name of the column of images.
        among: the hashes to look for; all are kept if absent.
    """
    cells = dataset[image_column]
    if len(cells) and is_reference(cells[0]):
        contents = _embeddings_in(dataset, image_column)
    else:
        contents = (image_bytes(cell) for cell in cells)
    hashes = (xxhash.xxh3_128_digest(content) for content in contents if content)
    return {one for one in hashes if among is None or one in among}


def _embeddings_in(dataset: Dataset, column: str) -> Iterator[bytes | None]:
    for batch in dataset.select_columns([column]).iter(batch_size=4096):
        known = [cell for cell in batch[column] if is_reference(cell)]
        yield from (vector.tobytes() for vector in read_vectors(known)[0])


def fingerprint_rows(dataset: Dataset) -> str:
    """Hash of the content of the rows, for provenance.

    It depends on the names and contents of the columns and on the order of the rows, not on the
    file format, the process or the place on disk: images count by their bytes.

    Args:
        dataset: Rows as returned by `check_columns`.
    """
    names = sorted(dataset.column_names)
    images = {name for name in names if isinstance(dataset.features[name], Image)}
    digest = xxhash.xxh3_128(repr((dataset.num_rows, names)).encode())
    # Arrow batches, since rows in the usual format would be decoded.
    for batch in dataset.with_format("arrow").iter(batch_size=64):
        for row in _looked_up(batch.to_pylist()):
            for name in names:
                value = image_bytes(row[name]) if name in images else row[name]
                content = value if isinstance(value, bytes) else repr(value).encode()
                digest.update(len(content).to_bytes(8, "little"))
                digest.update(content)
    return digest.hexdigest()


def _looked_up(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows with the numbers of embeddings in place of references to them."""
    for name in [name for name, value in rows[0].items() if is_reference(value)]:
        known = [row for row in rows if is_reference(row[name])]
        sides = read_vectors([row[name] for row in known])
        for row, image, text in zip(known, *sides, strict=True):
            row[name] = image.tobytes() + text.tobytes()
    return rows


def thumbnail(
    cell: dict[str, Any] | str | None, side: int = THUMBNAIL_SIDE
) -> tuple[str | None, str | None]:
    """A small copy of an image as a data URI, or None and the reason why there is none."""
    content, problem = small_copy(cell, side)
    if content is None:
        return None, problem
    return "data:image/webp;base64," + base64.b64encode(content).decode("ascii"), None


def small_copy(
    cell: dict[str, Any] | str | None, side: int = THUMBNAIL_SIDE
) -> tuple[bytes | None, str | None]:
    """A small copy of an image as a WEBP file, or None and the reason why there is none."""
    if isinstance(cell, str):
        return None, f"no picture: {tell(cell)}" if is_reference(cell) else "no image in this row"
    if not cell or not (cell.get("bytes") or cell.get("path")):
        return None, "no image in this row"
    try:
        source = io.BytesIO(cell["bytes"]) if cell.get("bytes") else cell["path"]
        with PILImage.open(source) as image:
            return _encode(image, side), None
    except UnidentifiedImageError:
        return None, "not a known image format"
    except FileNotFoundError:
        return None, "file not found"
    except Exception as error:  # decoders of damaged files raise almost anything
        return None, shorten(f"{error}", PROBLEM_LENGTH) or type(error).__name__


class _RefusedError(Exception):
    """An image that will not be scored; the message is the reason."""


def _read_image(
    image_cell: dict[str, Any] | PILImage.Image | None, max_pixels: int, resized: Resized | None
) -> PILImage.Image:
    try:
        with _header_of(image_cell) as image:
            _check_size(*image.size, max_pixels, resized)
            image.load()
            return _on_white(_upright(_eight_bits(image)))
    except _RefusedError:
        raise
    except UnidentifiedImageError:
        raise _RefusedError("image unreadable: not a known image format") from None
    except Exception as error:  # damaged files make Pillow raise nearly anything
        raise _RefusedError(f"image unreadable: {str(error) or type(error).__name__}") from error


def _check_size(width: int, height: int, max_pixels: int, resized: Resized | None) -> None:
    told = f"image of {width} x {height} pixels"
    if not width * height:
        raise _RefusedError(f"{told} has no pixels")
    if width * height > max_pixels:
        raise _RefusedError(f"{told} is over the limit of {max_pixels}")
    wide, high = resized(width, height) if resized else (0, 0)
    if wide * high > MOST_RESIZED:
        raise _RefusedError(
            f"{told} is too narrow: the model's processor would make it {wide} x {high}"
        )


@contextmanager
def _header_of(image_cell: dict[str, Any] | PILImage.Image | None) -> Iterator[PILImage.Image]:
    """An image of which the header alone is read, unless it is decoded already."""
    if isinstance(image_cell, PILImage.Image):
        yield image_cell
        return
    with _open_cell(image_cell) as file:
        if foreign := _foreign_format(file):
            raise _RefusedError(f"image unreadable: {foreign}; convert it to PNG or JPEG")
        yield _open_image(file)


def _foreign_format(file: BinaryIO) -> str | None:
    """Name of an image format that is not scored, but kept as it is; None for all others."""
    start = file.read(START)
    file.seek(0)
    if start[4:8] == b"ftyp" and start[8:12] in HEIC_BRANDS and b"avif" not in start[16:64]:
        return "HEIC"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    return "SVG" if text[:1] == b"<" and b"<svg" in text else None


def _open_cell(image_cell: dict[str, Any] | None) -> BinaryIO:
    content, path = (image_cell or {}).get("bytes"), (image_cell or {}).get("path")
    if content:
        return io.BytesIO(content)
    if content is not None or not path:
        raise _RefusedError("image missing")
    if path.startswith("zip://"):
        return _open_zipped(path)
    if not os.path.isfile(path):
        raise _RefusedError(f"image unreadable: no local file {os.path.basename(path)!r}")
    return open(path, "rb")


def _open_zipped(path: str) -> BinaryIO:
    """A file in an archive of this machine, which `datasets` names ``zip://inside::archive``."""
    inside, _, archive = path.removeprefix("zip://").partition("::")
    if not os.path.isfile(archive):
        raise _RefusedError(f"image unreadable: no local file {os.path.basename(archive)!r}")
    with zipfile.ZipFile(archive) as zipped:
        if zipped.getinfo(inside).file_size > MOST_ZIPPED:
            raise _RefusedError("image unreadable: larger than a file of an image in an archive")
        return io.BytesIO(zipped.read(inside))


def _open_image(file: BinaryIO) -> PILImage.Image:
    """Read the header of an image.

    `PIL.Image.open` does the same, but raises on a large image without telling how large it is.
    """
    PILImage.init()
    start = file.read(16)
    for name in IMAGE_FORMATS:
        if name not in PILImage.OPEN:
            continue
        factory, accepts = PILImage.OPEN[name]
        accepted = accepts is not None and accepts(start)
        # A reader whose codec is not installed answers with a string that says so.
        if accepted and not isinstance(accepted, str):
            file.seek(0)
            return factory(file, "")
    raise UnidentifiedImageError


def _eight_bits(image: PILImage.Image) -> PILImage.Image:
    """Scale 16-bit greyscale, of which `convert` would clip nearly all to white."""
    if not image.mode.startswith("I"):
        return image
    grey = image.convert("I").point(lambda value: value / 257)
    grey.info.pop("transparency", None)
    return grey.convert("L")


def _upright(image: PILImage.Image) -> PILImage.Image:
    with suppress(Exception):  # damaged metadata says nothing against the pixels
        return ImageOps.exif_transpose(image)
    return image


def _on_white(image: PILImage.Image) -> PILImage.Image:
    """Convert to RGB; `convert` alone shows whatever colour lies under transparent pixels."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    drawing = image.convert("RGBA")
    return PILImage.alpha_composite(PILImage.new("RGBA", image.size, "white"), drawing).convert(
        "RGB"
    )


def _encode(image: PILImage.Image, side: int) -> bytes:
    small: PILImage.Image = image
    if "transparency" in image.info or image.mode in ("P", "PA", "LA", "RGBA"):
        small = image.convert("RGBA")
    # Before anything else touches the pixels: a JPEG is then decoded at a reduced size.
    small.thumbnail((side, side))
    small = ImageOps.exif_transpose(small)
    stream = io.BytesIO()
    small.convert("RGBA" if small.mode == "RGBA" else "RGB").save(stream, "WEBP", quality=82)
    return stream.getvalue()
