"""Inputs from Python: loaded models and data sets, or their names."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from hf_ecif.applications.requests import Sources
from hf_ecif.applications.sources import Opened
from hf_ecif.config import InfluenceConfig
from hf_ecif.data.loading import load_rows, read_stream
from hf_ecif.data.schema import check_columns, find_columns
from hf_ecif.errors import UserError
from hf_ecif.influence.model import InfluenceModel
from hf_ecif.models.processors import check_processor

Rowset: TypeAlias = Dataset | DatasetDict | IterableDataset | IterableDatasetDict | str | Path
IN_MEMORY = "a Dataset in memory"
MOST_STREAMED = 10_000  # largest number of rows of a stream


@dataclass(frozen=True)
class Given:
    """Inputs from a caller, opened.

    Attributes:
        opened: model, data and query.
        original: the data as given, in their own format.
        notes: warnings on how the data were read.
    """

    opened: Opened
    original: Dataset
    notes: tuple[str, ...]


def open_given(
    model: Any,
    dataset: Rowset,
    query: Rowset | None = None,
    *,
    split: str | None = None,
    query_split: str | None = None,
    image_column: str | None = None,
    text_column: str | None = None,
    processor: Any = None,
    config: InfluenceConfig | None = None,
    max_rows: int = MOST_STREAMED,
) -> Given:
    """Model, data and query, opened from any form in which they are given.

    Args:
        model: a name on the Hub, a folder, a loaded dual encoder, or an `InfluenceModel`.
        dataset: rows, splits of rows, a stream, a name on the Hub, or a folder.
        query: in any of these forms, too; chosen from the data if absent.
        split: split of ``dataset``, if it has several; ``train`` if absent.
        query_split: split of ``query``; ``validation`` if absent.
        image_column: column of images; found by its type if absent.
        text_column: column of captions; found by its type if absent.
        processor: processor of a loaded dual encoder; or folder or Hub id of one, where none lies
            beside the model.
        config: how influence is computed; an `InfluenceModel` has its own.
        max_rows: largest number of rows to read of a stream.

    Raises:
        UserError: an argument cannot be read, or is ambiguous.
    """
    opened_model, name = _open_model(model, processor, config)
    rows = _open_rows(dataset, "dataset", split, "train", max_rows)
    judge = (
        query if query is None else _open_rows(query, "query", query_split, "validation", max_rows)
    )
    columns = find_columns(rows.dataset, image_column, text_column)
    sources = Sources(
        model=name,
        processor=str(processor) if isinstance(processor, str | Path) else None,
        dataset=rows.name,
        split=rows.split,
        query=judge.name if judge else None,
        query_split=judge.split if judge else "validation",
        image_column=columns[0],
        text_column=columns[1],
    )
    query_set = check_columns(judge.dataset.with_format(None), *columns) if judge else None
    checked = check_columns(rows.dataset.with_format(None), *columns)
    notes = (*rows.notes(max_rows), *(judge.notes(max_rows) if judge else ()))
    return Given(Opened(sources, opened_model, checked, query_set), rows.dataset, notes)


@dataclass(frozen=True)
class _Rows:
    """Rows with their names in a summary."""

    dataset: Dataset
    name: str
    split: str
    is_cut: bool = False

    def notes(self, most: int) -> Iterator[str]:
        if self.is_cut:
            yield (
                f"The stream has more rows than the first {most:,}, which alone were read: "
                "`max_rows` says how many are."
            )


def _open_model(
    model: Any, processor: Any, config: InfluenceConfig | None
) -> tuple[InfluenceModel, str]:
    """Model, and its name in a summary."""
    if isinstance(model, InfluenceModel):
        if config is not None or processor is not None:
            raise UserError(
                "An InfluenceModel has a `config` and a `processor` already: give them to "
                "InfluenceModel.from_pretrained."
            )
        return model, model.name or _name_of(model.encoder.model)
    if isinstance(model, str | Path):
        if processor is not None and not isinstance(processor, str | Path):
            raise UserError(
                f"`processor` goes with a loaded model: of {model}, give the folder or the Hub id "
                "of its processor."
            )
        opened = InfluenceModel.from_pretrained(model, config, processor=processor)
        return opened, str(model)
    if processor is None:
        raise UserError(
            f"A loaded {type(model).__name__} needs its `processor`, what "
            "AutoProcessor.from_pretrained loads for it."
        )
    check_processor(processor, "`processor`")
    return InfluenceModel(model, processor, config), _name_of(model)


def _name_of(model: Any) -> str:
    return getattr(model, "name_or_path", "") or f"a {type(model).__name__} in memory"


def _open_rows(given: Rowset, argument: str, split: str | None, usual: str, most: int) -> _Rows:
    if isinstance(given, str | Path):
        chosen = split or usual
        return _Rows(load_rows(str(given), chosen), str(given), chosen)
    if isinstance(given, DatasetDict | IterableDatasetDict):
        split = _choose_split([*map(str, given)], argument, split, usual)
        given = given[split]
    elif split is not None:
        raise UserError(
            f"`{argument}` is one split already, so there is no {split!r} to choose of it."
        )
    if isinstance(given, IterableDataset):
        rows, is_cut = read_stream(given, most)
        return _Rows(rows, "a stream", split or usual, is_cut)
    if not isinstance(given, Dataset):
        raise UserError(
            f"`{argument}` must be a Dataset, a DatasetDict, a stream, a folder or a Hub id, but "
            f"it is a {type(given).__name__}."
        )
    if not len(given):
        raise UserError(f"`{argument}` has no rows.")
    return _Rows(given, IN_MEMORY, split or str(given.split or usual))


def _choose_split(names: list[str], argument: str, split: str | None, usual: str) -> str:
    option = "split" if argument == "dataset" else f"{argument}_split"
    chosen = split or (usual if usual in names else names[0] if len(names) == 1 else None)
    if chosen not in names:
        told = f"no split {split!r}" if split else "several splits"
        raise UserError(f"`{argument}` has {told}. Give `{option}`, one of: {', '.join(names)}.")
    return str(chosen)
