"""What an audit has learned as a function of a batch of rows, for any engine that maps batches.

    auditor = audit.auditor
    kinds = auditor.features(other)
    judged = other.map(auditor, batched=True, batch_size=auditor.rows, features=kinds)
    ray.data.from_huggingface(other).map_batches(auditor, batch_size=auditor.rows)
    auditor.save_pretrained("auditor")         # Auditor.from_pretrained("auditor") reads it

It gives rows the columns of an audit, in memory that does not grow with their number. What is said
of a row does not depend on the rows beside it, with one exception: several captions of one image
are judged together as far as they are in one batch, or in the sample that was learned from. Columns
that name other rows are null, since these may be rows of another data set. Give ``map`` images that
are not decoded (``cast_column("image", Image(decode=False))``), since it encodes anew what it has
decoded.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset, Features, IterableDataset
from huggingface_hub.constants import HF_HOME
from torch import Tensor

from hf_ecif.data.columns import COLUMNS
from hf_ecif.detection.annotate import FEATURES, TYPES, spread_columns
from hf_ecif.detection.judging import Judged, Learned
from hf_ecif.engine.features import Features as Inputs
from hf_ecif.errors import UserError
from hf_ecif.influence.influence import Influence
from hf_ecif.influence.rows import Rows, Table
from hf_ecif.influence.saving import find_file
from hf_ecif.influence.scorer import as_cell
from hf_ecif.utils import distributed
from hf_ecif.utils.checkpoints import State, read_state, write_state
from hf_ecif.utils.records import Codec, pack, unpack

if TYPE_CHECKING:
    from hf_ecif.hub.push import PushReport

AUDITOR = "auditor.safetensors"  # beside the files of a fit
ROWS = 1024  # of a batch
_PROCESS = os.getpid()


@dataclass(frozen=True, eq=False, repr=False)
class Auditor:
    """Columns of an audit for a batch of rows; see `hf_ecif.data.columns.COLUMNS`.

    It is pickled by its name: what it holds is then put into the cache of Hugging Face, once, or
    stays where it was loaded from, and is loaded where it is used.

    Attributes:
        learned: what the audit has learned.
        image_column: name of the images' column; its cells may be undecoded, or images.
        text_column: name of the captions' column.
        group_column: name of the groups' column; None where the audit had none.
        source: folder or Hub id that it was loaded from; empty if it was not.

    Examples:
        >>> import hf_ecif
        >>> demo = hf_ecif.load_demo()
        >>> quick = hf_ecif.InfluenceConfig(fit_epochs=1, probes=2, partitions=2)
        >>> pairs = demo.dataset.select(range(60))
        >>> auditor = hf_ecif.audit(demo.model, pairs, demo.query, config=quick).auditor
        >>> judged = auditor(demo.dataset[60:64])
        >>> [value is None for value in judged["ecif_noise_probability"]]
        [False, False, False, False]
    """

    learned: Learned
    image_column: str = "image"
    text_column: str = "text"
    group_column: str | None = None
    source: str = ""

    @property
    def rows(self) -> int:
        """Rows of a batch that are well used."""
        return ROWS

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that decides a verdict."""
        state = _state(self)
        digest = sha256(self.learned.influence.fingerprint.encode())
        digest.update(repr(sorted(state.values.items())).encode())
        for name, value in sorted(state.tensors.items()):
            digest.update(name.encode())
            digest.update(value.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """New columns of a batch, a value per row; null for a row that cannot be read.

        Returns:
            The new columns alone. A batch of NumPy arrays, as Ray Data gives, comes back whole,
            since there the result takes its place.

        Raises:
            UserError: a column is missing.
        """
        columns = self._columns(batch)
        if not isinstance(batch[self.text_column], np.ndarray):
            return columns
        return {**batch, **{name: _as_array(name, values) for name, values in columns.items()}}

    def features(self, dataset: Dataset | IterableDataset) -> Features:
        """Types of all columns once ``dataset`` is judged, for the ``features`` of ``map``."""
        known: dict[str, Any] = dataset.features or {}
        return Features(**{**known, **FEATURES})

    def judge(self, rows: Rows, groups: Sequence[str | None] = ()) -> Judged:
        """Verdicts on rows that the model has read, which need not be of the audited data.

        Args:
            rows: the rows.
            groups: the group of every row, where the audit had groups.
        """
        with distributed.alone():
            return self.learned.judge(rows, groups)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> Auditor:
        """Auditor that `save_pretrained` wrote; arguments are those of `Influence.from_pretrained`.

        Raises:
            UserError: nothing there, or no auditor.
        """
        influence = Influence.from_pretrained(
            name_or_path, revision=revision, token=token, dtype=dtype, device=device
        )
        path = find_file(str(name_or_path), AUDITOR, revision=revision, token=token)
        if path is None:
            raise UserError(
                f"{name_or_path} holds a fit, but no auditor. Give what Auditor.save_pretrained "
                "wrote."
            )
        auditor = _restored(influence, read_state(path))
        return replace(auditor, source=str(name_or_path) if revision is None else "")

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the model as given, the processor, the fit, and what was learned with it.

        `from_pretrained` reads it; that of `Influence` and of transformers read their parts alone.

        Raises:
            UserError: the model came with adapters of its own.
        """
        path = Path(folder, AUDITOR)
        path.unlink(missing_ok=True)
        self.learned.influence.save_pretrained(folder)
        write_state(_state(self), path)

    def push_to_hub(self, repo_id: str, **options: Any) -> PushReport:
        """Publish the files of `save_pretrained` with a card; options are those of `push_model`.

        Raises:
            UserError: not logged in, or not allowed.
        """
        from hf_ecif.hub.push import push_model  # imports plots and templates, which few need

        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return push_model(folder, repo_id, **options)

    def __repr__(self) -> str:
        detector = self.learned.sample.detector
        told = "it cannot tell" if detector.abstains else f"flags from {detector.threshold:.2f}"
        return f"Auditor(learned from {len(self.learned.sample.verdicts):,} distinct pairs, {told})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _load, (
            self.source or self._cached(),
            self.fingerprint,
            self.image_column,
            self.text_column,
            self.group_column,
        )

    def _cached(self) -> str:
        """A folder in the cache that holds it, and is named by its fingerprint."""
        folder = Path(HF_HOME, "hf_ecif", f"auditor-{self.fingerprint}").absolute()
        if not folder.exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=folder.parent) as aside:
                self.save_pretrained(Path(aside, "auditor"))
                with suppress(OSError):  # another process was faster
                    Path(aside, "auditor").rename(folder)
        return str(folder)

    def _columns(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, list[Any]]:
        for name in (self.image_column, self.text_column, *filter(None, [self.group_column])):
            if name not in batch:
                raise UserError(
                    f"The batch has no column {name!r}, but {', '.join(batch)}. Name the columns "
                    "of these rows: dataclasses.replace(auditor, image_column=..., "
                    "text_column=..., group_column=...)."
                )
        images = [as_cell(value) for value in batch[self.image_column]]
        texts = [None if text is None else str(text) for text in batch[self.text_column]]
        table = Table({self.image_column: images, self.text_column: texts})
        with distributed.alone():
            model = self.learned.influence.model
            rows = model.read_any(table, self.image_column, self.text_column)
            return _columns_of(self.learned, rows, self._groups(batch, rows))

    def _groups(self, batch: Mapping[str, Sequence[Any]], rows: Rows) -> list[str | None]:
        """The group of every readable row; none where the audit had none."""
        if self.group_column is None:
            return []
        names = batch[self.group_column]
        return [None if names[row] is None else str(names[row]) for row in rows.positions.tolist()]


def _columns_of(learned: Learned, rows: Rows, groups: Sequence[str | None]) -> dict[str, list[Any]]:
    """`COLUMNS` of all ``rows.total`` rows, readable or not."""
    if not len(rows):
        return spread_columns(rows, {name: [] for name in COLUMNS})
    return spread_columns(rows, learned.columns(learned.judge(rows, groups)))


def _as_array(name: str, values: list[Any]) -> np.ndarray:
    """A column as NumPy has it; cells that are lists stay cells."""
    if TYPES[name] == "float32":
        return np.array(values, dtype=np.float32)
    return np.fromiter(values, dtype=object, count=len(values))


@lru_cache(maxsize=2)
def _load(
    source: str, fingerprint: str, image_column: str, text_column: str, group_column: str | None
) -> Auditor:
    if os.getpid() != _PROCESS:  # a fork cannot use the threads of its parent
        torch.set_num_threads(1)
    auditor = Auditor.from_pretrained(source)
    if auditor.fingerprint != fingerprint:
        raise UserError(f"{source} holds another auditor by now: load it again.")
    names = (image_column, text_column, group_column)
    return Auditor(auditor.learned, *names, source=source)


# ------------------------------------------------------------------------------ as a state


@dataclass(frozen=True)
class _Parts:
    """What is saved beside the fit: the fields of `Learned` and `Auditor`."""

    learned: Learned
    image_column: str
    text_column: str
    group_column: str | None


def _state(auditor: Auditor) -> State:
    names = (auditor.image_column, auditor.text_column, auditor.group_column)
    return pack(_Parts(auditor.learned, *names), _codecs(auditor.learned.influence))


def _restored(influence: Influence, state: State) -> Auditor:
    parts = unpack(_Parts, state, _codecs(influence))
    # The towers find their frozen part by raw inputs, and those of the batches are frozen.
    influence.model.warm_up()
    learned = _on_device(parts.learned, influence.theta.device)
    return Auditor(learned, parts.image_column, parts.text_column, parts.group_column)


def _on_device(learned: Learned, device: torch.device) -> Learned:
    """The embeddings that rows are compared with, where the model is."""

    def moved(record: Any, *names: str) -> Any:
        values = {name: getattr(record, name) for name in names}
        there = {name: value.to(device) for name, value in values.items() if value is not None}
        return replace(record, **there)

    known, suggester = learned.sample.known, learned.suggester
    given = known.given._replace(
        text=known.given.text.to(device), image=known.given.image.to(device)
    )
    if suggester is not None:
        candidates = moved(suggester.candidates, "vectors", "held")
        suggester = replace(moved(suggester, "images"), candidates=candidates)
    sample = replace(learned.sample, known=known._replace(given=given))
    return replace(learned, sample=sample, suggester=suggester)


def _codecs(influence: Influence) -> dict[type, Codec]:
    """The fit is saved by itself; inputs of the towers are by their names."""
    return {
        Influence: Codec(lambda value: {}, lambda parts: influence),
        Inputs: Codec(_parts_of_inputs, _inputs),
    }


def _parts_of_inputs(inputs: Inputs) -> dict[str, Any]:
    sides = {"text": inputs.text, "image": inputs.image}
    return {f"{side}.{key}": value for side, held in sides.items() for key, value in held.items()}


def _inputs(parts: dict[str, Any]) -> Inputs:
    def side(name: str) -> dict[str, Tensor]:
        prefix = f"{name}."
        return {k.removeprefix(prefix): v for k, v in parts.items() if k.startswith(prefix)}

    return Inputs(side("text"), side("image"))
