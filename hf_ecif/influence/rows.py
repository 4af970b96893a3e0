"""Rows of a data set to `Features`: read, preprocess, run the frozen part once.

Several processes read a part each. Within a process, workers can decode and tokenise the next
micro-batches while the model runs on this one.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import ArrayLike
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from hf_ecif.data.images import Pair, read_pair
from hf_ecif.engine.encoder import DualEncoder
from hf_ecif.engine.features import Features, Side
from hf_ecif.engine.towers import Inputs
from hf_ecif.errors import UserError
from hf_ecif.influence.embedded import EmbeddedPreprocessor
from hf_ecif.influence.keys import Keys, caption_key, content_key, firsts, image_key
from hf_ecif.models.embeddings import EmbeddingProcessor
from hf_ecif.utils import distributed
from hf_ecif.utils.checkpoints import Checkpoints, State

PART = 1024  # rows that are checkpointed together
PIXELS_HELD = 2**24  # of decoded images at a time
SIDES: tuple[Side, Side] = ("text", "image")
BLANK = Pair(Image.new("RGB", (8, 8)), "a", None)


@dataclass(frozen=True, eq=False)
class Rows:
    """The readable rows of a data set, at the frozen boundary.

    Attributes:
        features: features of the ``n`` readable rows.
        positions: ``(n,)``, their row numbers in the data set.
        texts: captions of the rows.
        reasons: why a row could not be read, by row number.
        total: rows of the data set, readable or not.
        boundary: fingerprint of what the features went through, `DualEncoder.boundary`; empty where
            nobody knows.
        known_keys: which rows have equal images or captions; see `keys`.
    """

    features: Features
    positions: Tensor
    texts: list[str]
    reasons: dict[int, str]
    total: int
    boundary: str = ""
    known_keys: Keys | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, chosen: Tensor) -> Rows:
        """The readable rows with these numbers, as rows of their own."""
        return Rows(
            features=self.features[chosen],
            positions=self.positions[chosen],
            texts=[self.texts[i] for i in chosen.tolist()],
            reasons={},
            total=len(chosen),
            boundary=self.boundary,
            known_keys=self.keys[chosen],
        )

    def first(self, total: int) -> Rows:
        """The readable ones of the first ``total`` rows of the data set, as if it ended there."""
        here = self.select((self.positions < total).nonzero()[:, 0])
        reasons = {row: reason for row, reason in self.reasons.items() if row < total}
        return replace(here, reasons=reasons, total=total)

    def numbered(self, numbers: Tensor, total: int) -> Rows:
        """These rows as some of a larger data set.

        Args:
            numbers: ``(self.total,)``, their row numbers there.
            total: rows of that data set.
        """
        reasons = {int(numbers[row]): reason for row, reason in self.reasons.items()}
        return replace(self, positions=numbers[self.positions], reasons=reasons, total=total)

    def with_texts_of(self, donors: Tensor) -> Rows:
        """These images, each with the caption of another row."""
        return replace(
            self,
            features=self.features.with_texts_of(donors),
            texts=[self.texts[i] for i in donors.tolist()],
            known_keys=self.keys.with_captions_of(donors),
        )

    def chosen(self, flags: Tensor | ArrayLike) -> Tensor:
        """Flags of the readable rows, ``(n,)`` booleans.

        Args:
            flags: booleans, one for each readable row, or for each row of the data set.

        Raises:
            UserError: there are more or fewer.
        """
        given = torch.as_tensor(np.asarray(flags), dtype=torch.bool)
        if given.shape == (len(self),):
            return given
        if given.shape != (self.total,):
            raise UserError(
                f"There are flags of shape {tuple(given.shape)} for {self.total} rows, of which "
                f"{len(self)} can be read. Give a boolean for every row."
            )
        return given[self.positions]

    def spread(self, values: list[Any]) -> list[Any]:
        """Values of the readable rows in a list of all ``total`` rows, None for the others."""
        spread: list[Any] = [None] * self.total
        for position, value in zip(self.positions.tolist(), values, strict=True):
            spread[position] = value
        return spread

    def with_images(self, keys: Tensor) -> Rows:
        """These rows with keys ``(n,)`` of their images, equal for rows with one image."""
        return replace(self, known_keys=replace(self.keys, images=keys))

    @cached_property
    def keys(self) -> Keys:
        """What the rows are known by; where nothing else is known, their captions alone."""
        return self.known_keys or Keys.of_texts(self.texts)

    @property
    def siblings(self) -> Tensor:
        """``(n, 2)``; rows that agree in a column have one caption or one image."""
        return self.keys.siblings

    def are_pairs(self, images: Tensor, captions: Tensor) -> Tensor:
        """Whether the image of one row and the caption of another are a pair of these data.

        Args:
            images: row numbers, of any shape.
            captions: row numbers, of a shape that broadcasts with it.

        Returns:
            Booleans, of the common shape.
        """
        image, text = self.same_image, self.same_text
        known = image * len(self) + text
        return torch.isin(image[images] * len(self) + text[captions], known)

    @property
    def same_text(self) -> Tensor:
        """``(n,)``, numbers from 0 on, equal for equal captions: the class of each row."""
        return firsts(self.keys.captions)[1]

    @property
    def same_image(self) -> Tensor:
        """``(n,)``, numbers from 0 on, equal for equal images."""
        return firsts(self.keys.images)[1]


@dataclass(frozen=True)
class Table:
    """Columns in memory, where a data set would be too much."""

    columns: dict[str, list[Any]]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, rows: slice) -> dict[str, list[Any]]:
        return {name: values[rows] for name, values in self.columns.items()}

    def select_columns(self, names: list[str]) -> Table:
        """Some of the columns."""
        return Table({name: self.columns[name] for name in names})


@dataclass(frozen=True)
class Chain:
    """Two data sets, the rows of one after those of the other; their types may differ."""

    first: Dataset
    second: Dataset

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    def __getitem__(self, rows: slice) -> dict[str, list[Any]]:
        start, stop, _ = rows.indices(len(self))
        border = len(self.first)
        here = self.first[min(start, border) : min(stop, border)]
        there = self.second[max(start - border, 0) : max(stop - border, 0)]
        return {name: [*here[name], *there[name]] for name in self.first.column_names}

    def select_columns(self, names: list[str]) -> Chain:
        """Some of the columns."""
        return Chain(self.first.select_columns(names), self.second.select_columns(names))


def read_rows(
    dataset: Dataset | Table | Chain,
    encoder: DualEncoder,
    processor: Any,
    *,
    image_column: str,
    text_column: str,
    max_pixels: int,
    memory_limit: float = math.inf,
    workers: int = 0,
    checkpoints: Checkpoints | None = None,
    advance: Callable[[int], None] = lambda rows: None,
) -> Rows:
    """Read and embed up to the frozen boundary, in micro-batches.

    Args:
        dataset: with an image column. If it is not decoded, images are judged before they are.
        encoder: encoder whose frozen part is run.
        processor: the model's processor.
        image_column: name.
        text_column: name.
        max_pixels: larger images are refused before they are decoded.
        memory_limit: bytes; larger activations are kept in a temporary file, mapped into memory.
        workers: processes that decode and tokenise ahead; 0 does it in between.
        checkpoints: store of what was read.
        advance: called with the number of rows done, for a progress bar.
    """
    known = checkpoints or Checkpoints()
    cells = dataset.select_columns([image_column, text_column])
    mine = distributed.share(len(cells))
    texts = partial(_chunks, cells, mine, text_column)
    preprocess = choose_preprocessor(encoder, processor, texts)
    parts = {_name(part): part for part in _split(mine, PART)}
    done = {name for name in parts if known.has(name, own=True)}
    missing = [
        rows
        for name, part in parts.items()
        if name not in done
        for rows in _split(part, encoder.micro_batch_size)
    ]
    read = _MicroBatches(cells, (image_column, text_column), missing, preprocess, max_pixels)
    ahead = _load_ahead(read, workers)
    store = _Store(len(mine), memory_limit)
    if done:
        # The towers find their frozen part by raw inputs, and there may be none to come.
        encoder.freeze(preprocess.blank())
    for name, part in parts.items():
        if name in done:
            advance(len(part))

        def compute(part: range = part) -> State:
            return _freeze(encoder, len(_split(part, encoder.micro_batch_size)), ahead, advance)

        store.append(known.remember(name, compute, own=True))
    if not store.rows:
        # Without a row to show it, this process would not know the shapes.
        store.allocate(encoder.freeze(preprocess.blank()))
    return _gather(store, len(cells), encoder.boundary)


def choose_preprocessor(
    encoder: DualEncoder, processor: Any, all_texts: Callable[[], Iterator[list[Any]]]
) -> Preprocessor | EmbeddedPreprocessor:
    """What makes inputs of pairs, or takes them as they are where they are embeddings.

    Args:
        encoder: whose inputs are made.
        processor: the model's processor.
        all_texts: as for `Preprocessor`.
    """
    if isinstance(processor, EmbeddingProcessor):
        return EmbeddedPreprocessor(processor.width, encoder.input_dtype)
    return Preprocessor(encoder, processor, all_texts)


def require_rows(rows: Rows) -> Rows:
    """Rows, unless none of them can be read.

    Raises:
        UserError: that is so.
    """
    if not len(rows):
        example = f" The first row: {rows.reasons[0]}." if rows.reasons else ""
        raise UserError(
            f"None of the {rows.total} rows can be read.{example} Look at `image_column` and "
            "`text_column`, or give other rows."
        )
    return rows


def require_pairs(name: str, rows: Rows) -> Rows:
    """Rows, unless there is one alone, of which there is no contrastive loss.

    Args:
        name: name of the rows, for the error.
        rows: one at least, as from `require_rows`.

    Raises:
        UserError: there is one alone.
    """
    if len(rows) < 2:
        raise UserError(
            f"{name} has {len(rows)} readable row, and a contrastive loss needs at least two "
            "pairs. Give more rows."
        )
    return rows


def require_distinct(name: str, rows: Rows) -> None:
    """Refuse rows without anything to tell apart.

    Args:
        name: name of the rows, for the error.
        rows: one at least.

    Raises:
        UserError: there is one row alone, or one caption, or one image.
    """
    require_pairs(f"The {name}", rows)
    keys, start = rows.keys, rows.texts[0][:40]
    if len(keys.captions.unique()) < 2:
        equal, remedy = "equal", "Look at `text_column`."
        if keys.truncated.all():
            equal = "equal within the number of tokens that the model reads"
            remedy = "Take off what they begin with, or use a model that reads longer ones."
        raise UserError(
            f"All captions of the {name} are {equal} ({start!r}), so there is nothing to tell "
            f"apart. {remedy}"
        )
    if len(keys.images.unique()) < 2:
        raise UserError(
            f"All images of the {name} are the same, so there is nothing to tell apart. Look at "
            "`image_column`."
        )


def require_same_encoder(rows: Rows, encoder: DualEncoder) -> None:
    """Refuse rows that went through another model than they are to be used with.

    Raises:
        UserError: they did.
    """
    if rows.boundary and rows.boundary != encoder.boundary:
        raise UserError(
            "These rows were read by another model, or for other attributed parameters: their "
            "features mean nothing here. Read the data set again with this model (model.read)."
        )


class Preprocessor:
    """Pairs to inputs of the two towers.

    Args:
        encoder: whose inputs are made.
        processor: the model's processor.
        all_texts: iterates over batches of all captions. Where tokens are kept, every row must have
            as many, so the longest is looked for first. Each process looks at a part of them.
    """

    def __init__(
        self, encoder: DualEncoder, processor: Any, all_texts: Callable[[], Iterator[list[Any]]]
    ) -> None:
        self.image_processor = processor.image_processor
        self.tokenizer = processor.tokenizer
        self.max_length = min(self.tokenizer.model_max_length, encoder.max_text_length)
        self.dtype = encoder.input_dtype
        self.length: int | None = None
        if encoder.contrastive.FULL_LENGTH:
            self.length = self.max_length
        elif encoder.keeps_tokens(self.tokens(["a"])):
            longest = max((self._longest(texts) for texts in all_texts()), default=0)
            self.length = max(distributed.collect(longest))

    def __call__(self, pairs: list[Pair]) -> Features:
        return Features(
            text=self.tokens([pair.text for pair in pairs]),
            image=self.pixels([pair.image for pair in pairs if pair.image]),
        )

    def blank(self) -> Features:
        """Inputs of one row, which show their shapes."""
        return self([BLANK])

    def pixels(self, images: list[Image.Image]) -> Inputs:
        """Inputs of the image tower."""
        inputs = self.image_processor(images=images, return_tensors="pt")
        return {
            key: value.to(self.dtype) if value.is_floating_point() else value
            for key, value in inputs.items()
        }

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of an image after its processor's resizing, before it is cropped."""
        size = getattr(self.image_processor, "size", None) or {}
        shortest, longest = size.get("shortest_edge"), size.get("longest_edge")
        if not (getattr(self.image_processor, "do_resize", False) and shortest):
            return 0, 0  # to a fixed size, or to a fixed number of patches
        scale = shortest / min(width, height)
        if longest:
            scale = min(scale, longest / max(width, height))
        return round(scale * width), round(scale * height)

    def tokens(self, texts: list[str]) -> Inputs:
        """Inputs of the text tower."""
        tokens = self.tokenizer(
            texts,
            padding="longest" if self.length is None else "max_length",
            max_length=self.length or self.max_length,
            truncation=True,
            return_tensors="pt",
        )
        return {key: tokens[key] for key in self.tokenizer.model_input_names if key in tokens}

    def keys(self, images: list[int], texts: list[str]) -> Keys:
        """What pairs are known by, by the keys of their images and as this tokenizer reads their
        captions."""
        read = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        truncated = [len(ids) + self._specials > self.max_length for ids in read]
        return Keys(
            images=torch.tensor(images),
            captions=torch.tensor(
                [
                    self._key_of_tokens(text) if cut else caption_key(text)
                    for text, cut in zip(texts, truncated, strict=True)
                ]
            ),
            truncated=torch.tensor(truncated),
            unknown_script=torch.tensor(
                [
                    is_unknown_script(text, ids, self.tokenizer.unk_token_id)
                    for text, ids in zip(texts, read, strict=True)
                ]
            ),
        )

    @cached_property
    def _specials(self) -> int:
        """Tokens that are added to every caption."""
        with_them, without = (
            self.tokenizer("a", add_special_tokens=some)["input_ids"] for some in (True, False)
        )
        return len(with_them) - len(without)

    def _key_of_tokens(self, text: str) -> int:
        tokens = self.tokenizer(text, max_length=self.max_length, truncation=True)
        return content_key(repr(tokens["input_ids"]).encode())

    def _longest(self, texts: list[Any]) -> int:
        readable = [text for text in texts if isinstance(text, str)] or [""]
        tokens = self.tokenizer(readable, max_length=self.max_length, truncation=True)
        return max(len(ids) for ids in tokens["input_ids"])


def is_unknown_script(text: str, ids: Sequence[int], unknown: int | None) -> bool:
    """Whether a tokenizer has no pieces for a caption's script.

    Half of the tokens are unknown, or there is at least one for every character of a text that is
    not in Latin letters. Scripts that are known take a third to four fifths of that.

    Args:
        text: the caption.
        ids: its tokens, without special ones.
        unknown: the token of what is unknown, if there is one.
    """
    letters = [character for character in text if character.isalpha()]
    foreign = sum(not character.isascii() for character in letters)
    if not letters:
        return False
    if unknown is not None and 2 * ids.count(unknown) >= max(1, len(ids)):
        return True
    return 2 * foreign > len(letters) and len(ids) >= len("".join(text.split()))


@dataclass(frozen=True)
class _Read:
    """A micro-batch, read.

    Attributes:
        features: inputs of the readable rows; None if there is none.
        keys: keys of these rows; None likewise.
        positions: row numbers in the data set.
        texts: captions of the rows.
        reasons: why the others cannot be read, by row number.
        count: rows in all.
    """

    features: Features | None
    keys: Keys | None
    positions: list[int]
    texts: list[str]
    reasons: dict[int, str]
    count: int


@dataclass(frozen=True)
class _MicroBatches:
    """Micro-batches by their number, for the workers."""

    cells: Dataset | Table | Chain
    columns: tuple[str, str]
    rows: list[range]
    preprocess: Preprocessor | EmbeddedPreprocessor
    max_pixels: int

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> _Read:
        rows = self.rows[number]
        cells = self.cells[rows.start : rows.stop]
        if isinstance(self.preprocess, EmbeddedPreprocessor):
            return _look_up(self.preprocess, rows, *(cells[column] for column in self.columns))
        positions, texts, reasons = [], [], {}
        images = _Images(self.preprocess)
        both = (cells[column] for column in self.columns)
        for row, image, text in zip(rows, *both, strict=True):
            pair = read_pair(image, text, self.max_pixels, self.preprocess.resized)
            if pair.image is None:
                reasons[row] = str(pair.reason)
                continue
            positions.append(row)
            texts.append(pair.text)
            images.add(pair.image)
        return _Read(
            features=Features(self.preprocess.tokens(texts), images.inputs()) if texts else None,
            keys=self.preprocess.keys(images.keys, texts) if texts else None,
            positions=positions,
            texts=texts,
            reasons=reasons,
            count=len(rows),
        )


def _look_up(
    preprocess: EmbeddedPreprocessor, rows: range, cells: list[Any], texts: list[Any]
) -> _Read:
    features, keys, places, reasons = preprocess.read(cells, texts)
    return _Read(
        features=features,
        keys=keys,
        positions=[rows[place] for place in places],
        texts=[texts[place] for place in places],
        reasons={rows[place]: reason for place, reason in reasons.items()},
        count=len(rows),
    )


class _Images:
    """Images on their way into the model, few of them decoded at a time.

    Attributes:
        keys: keys of the images so far.
    """

    def __init__(self, preprocess: Preprocessor) -> None:
        self._preprocess = preprocess
        self._decoded: list[Image.Image] = []
        self._parts: list[Inputs] = []
        self.keys: list[int] = []

    def add(self, image: Image.Image) -> None:
        self.keys.append(image_key(image))
        self._decoded.append(image)
        if sum(one.width * one.height for one in self._decoded) > PIXELS_HELD:
            self._process()

    def inputs(self) -> Inputs:
        """Inputs of the image tower, of one image at least."""
        self._process()
        return {key: torch.cat([part[key] for part in self._parts]) for key in self._parts[0]}

    def _process(self) -> None:
        if self._decoded:
            self._parts.append(self._preprocess.pixels(self._decoded))
            self._decoded = []


def _load_ahead(micro_batches: _MicroBatches, workers: int) -> Iterator[_Read]:
    return iter(
        DataLoader(cast(Any, micro_batches), batch_size=None, num_workers=workers, collate_fn=_keep)
    )


def _keep(read: Any) -> Any:
    return read


def _freeze(
    encoder: DualEncoder, count: int, ahead: Iterator[_Read], advance: Callable[[int], None]
) -> State:
    """Run the frozen part on the next ``count`` micro-batches."""
    frozen: list[Features] = []
    found = []
    for _ in range(count):
        read = next(ahead)
        if read.features is not None:
            frozen.append(encoder.freeze(read.features))
        found.append(read)
        advance(read.count)
    tensors = {"positions": torch.tensor([row for read in found for row in read.positions])}
    for side in SIDES:
        inputs = [getattr(features, side) for features in frozen]
        for key in inputs[0] if inputs else ():
            tensors[f"{side}.{key}"] = torch.cat([part[key].cpu() for part in inputs])
    keys = Keys.join([read.keys for read in found if read.keys is not None])
    tensors |= {f"keys.{name}": values for name, values in vars(keys).items()}
    return State(
        tensors,
        {
            "texts": [text for read in found for text in read.texts],
            "reasons": [item for read in found for item in read.reasons.items()],
        },
    )


class _Store:
    """Rows that a process has read, filled in part by part, in memory or in a mapped file.

    Attributes:
        rows: readable ones so far.
        positions: row numbers in the data set.
        texts: captions of the rows.
        keys: keys of the rows, part by part.
        reasons: why others cannot be read, by row number.
    """

    def __init__(self, rows: int, memory_limit: float) -> None:
        self._most = rows
        self._limit = memory_limit
        self._kept: dict[Side, Inputs] = {}
        self.rows = 0
        self.positions: list[int] = []
        self.texts: list[str] = []
        self.keys: list[Keys] = []
        self.reasons: dict[int, str] = {}

    def append(self, part: State) -> None:
        """Add what `_freeze` read."""
        self.texts += part.values["texts"]
        self.keys.append(Keys(**_with_prefix(part.tensors, "keys.")))
        self.reasons |= {int(row): reason for row, reason in part.values["reasons"]}
        self.positions += part.tensors["positions"].tolist()
        if len(self.positions) == self.rows:
            return
        sides = [_with_prefix(part.tensors, f"{side}.") for side in SIDES]
        if not self._kept:
            self.allocate(Features(sides[0], sides[1]))
        rows = slice(self.rows, len(self.positions))
        for side, inputs in zip(SIDES, sides, strict=True):
            for key, value in inputs.items():
                self._kept[side][key][rows] = value
        self.rows = rows.stop

    def allocate(self, like: Features) -> None:
        """Make room for all rows."""
        size = like.bytes_per_row() * self._most
        empty = _map_empty if size > self._limit else torch.empty
        for side in SIDES:
            self._kept[side] = {
                key: empty((self._most, *value.shape[1:]), dtype=value.dtype)
                for key, value in getattr(like, side).items()
            }

    def side(self, side: Side) -> Inputs:
        """Inputs of one tower."""
        return {key: value[: self.rows] for key, value in self._kept[side].items()}


def _gather(store: _Store, total: int, boundary: str) -> Rows:
    """Rows of all processes; each keeps the features that it has."""
    found = distributed.collect((store.positions, store.texts, store.keys, store.reasons))
    positions, texts, keys, reasons = zip(*found, strict=True)
    rows = [position for part in positions for position in part]
    why = {row: reason for part in reasons for row, reason in part.items()}
    first = sum(map(len, positions[: distributed.rank()]))
    held = range(first, first + store.rows) if distributed.count() > 1 else None
    features = Features(store.side("text"), store.side("image"), held, len(rows))
    known = Keys.join([key for part in keys for key in part])
    captions = [text for part in texts for text in part]
    return Rows(features, torch.tensor(rows), captions, why, total, boundary, known)


def _with_prefix(tensors: Inputs, prefix: str) -> Inputs:
    return {key.removeprefix(prefix): v for key, v in tensors.items() if key.startswith(prefix)}


def _split(rows: range, size: int) -> list[range]:
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _name(part: range) -> str:
    return f"{part.start:09d}-{part.stop:09d}"


def _map_empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor in a temporary file that is gone as soon as the tensor is."""
    with tempfile.NamedTemporaryFile(prefix="hf_ecif_", delete=False) as file:
        path = Path(file.name)
    try:
        flat = torch.from_file(str(path), shared=True, size=math.prod(shape), dtype=dtype)
    finally:
        path.unlink()  # the mapping holds the file until the tensor is freed
    return flat.view(shape)


def _chunks(cells: Dataset | Table | Chain, rows: range, column: str) -> Iterator[list[Any]]:
    texts = cells.select_columns([column])
    return (texts[part.start : part.stop][column] for part in _split(rows, 1000))
