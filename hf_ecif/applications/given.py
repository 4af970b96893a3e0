"""Inputs from Python: loaded models and data sets, or their names."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from hf_ecif.applications.requests import Sources
from hf_ecif.applications.sources import (
    A_STREAM,
    IN_MEMORY,
    Named,
    Opened,
    open_named,
    open_sources,
    read_named,
)
from hf_ecif.config import InfluenceConfig
from hf_ecif.data.loading import read_stream
from hf_ecif.data.readers.splits import cut
from hf_ecif.errors import UserError
from hf_ecif.influence.model import InfluenceModel
from hf_ecif.models.processors import check_processor

Rowset: TypeAlias = Dataset | DatasetDict | IterableDataset | IterableDatasetDict | str | Path
MOST_STREAMED = 10_000  # largest number of rows of a stream


@dataclass(frozen=True)
class Given:
    """Inputs from a caller, opened.

    Attributes:
        opened: model, data and query.
        notes: warnings on how the data were read.
    """

    opened: Opened
    notes: tuple[str, ...]


def open_given(
    model: Any,
    dataset: Rowset | None,
    query: Rowset | None = None,
    *,
    processor: Any = None,
    config: InfluenceConfig | None = None,
    max_rows: int = MOST_STREAMED,
    **options: Any,
) -> Given:
    """Model, data and query, opened from any form in which they are given.

    Args:
        model: a name on the Hub, a folder, a loaded dual encoder, or an `InfluenceModel`.
        dataset: rows, splits of rows, a stream, a name on the Hub, or a folder or a file.
        query: in any of these forms, too; chosen from the data if absent.
        processor: processor of a loaded dual encoder; or folder or Hub id of one, where none lies
            beside the model.
        config: how influence is computed; an `InfluenceModel` has its own.
        max_rows: largest number of rows to read of a stream.
        options: of `Sources`: ``split``, ``query_split``, ``image_column`` and so on.

    Raises:
        UserError: an argument cannot be read, or is ambiguous.
    """
    if options.get("embeddings") is not None:
        return _open_embeddings(model, dataset, query, config, options)
    if model is None or dataset is None:
        raise UserError("`model` and `dataset` are missing. Give both, or `embeddings`.")
    _check_model(model, processor, config)
    asked = Sources(
        model=_model_name(model),
        processor=str(processor) if isinstance(processor, str | Path) else None,
        dataset=_row_name(dataset),
        query=None if query is None else _row_name(query),
        **options,
    )
    most = max_rows if asked.limit is None else min(max_rows, asked.limit)
    data, notes = _open_rows(dataset, "dataset", asked, most)
    judge, more = (None, ()) if query is None else _open_rows(query, "query", asked, max_rows)
    sources = replace(asked, dataset=data.name, query=judge.name if judge else None)
    seed = (
        model.config.seed
        if isinstance(model, InfluenceModel)
        else (config or InfluenceConfig()).seed
    )
    opened = open_named(data, judge, sources, lambda: _open_model(model, processor, config), seed)
    if asked.limit is not None and asked.limit <= max_rows:
        notes = ()  # that there are more is no news
    return Given(opened, (*notes, *more))


def _open_embeddings(
    model: Any,
    dataset: Rowset | None,
    query: Rowset | None,
    config: InfluenceConfig | None,
    options: dict[str, Any],
) -> Given:
    """Embeddings in place of model and data; the query is of that form, too."""
    if model is not None or dataset is not None:
        raise UserError(
            "`embeddings` take the place of `model` and `dataset`. Leave out the one or the other."
        )
    if query is not None and not isinstance(query, str | Path):
        raise UserError("With `embeddings`, `query` names a file or a folder of embeddings, too.")
    given = options | {"embeddings": str(options["embeddings"])}
    sources = Sources(query=None if query is None else str(query), **given)
    return Given(open_sources(sources, config or InfluenceConfig()), ())


def _check_model(model: Any, processor: Any, config: InfluenceConfig | None) -> None:
    """Refuse a processor or a config where there is one already, and a lack of one."""
    if isinstance(model, InfluenceModel):
        if config is not None or processor is not None:
            raise UserError(
                "An InfluenceModel has a `config` and a `processor` already: give them to "
                "InfluenceModel.from_pretrained."
            )
    elif isinstance(model, str | Path):
        if processor is not None and not isinstance(processor, str | Path):
            raise UserError(
                f"`processor` goes with a loaded model: of {model}, give the folder or the Hub id "
                "of its processor."
            )
    elif processor is None:
        raise UserError(
            f"A loaded {type(model).__name__} needs its `processor`, what "
            "AutoProcessor.from_pretrained loads for it."
        )
    else:
        check_processor(processor, "`processor`")


def _open_model(model: Any, processor: Any, config: InfluenceConfig | None) -> InfluenceModel:
    if isinstance(model, InfluenceModel):
        return model
    if isinstance(model, str | Path):
        return InfluenceModel.from_pretrained(model, config, processor=processor)
    return InfluenceModel(model, processor, config)


def _model_name(model: Any) -> str:
    """Name in a summary."""
    if isinstance(model, str | Path):
        return str(model)
    if isinstance(model, InfluenceModel):
        if model.name:
            return model.name
        model = model.encoder.model
    return getattr(model, "name_or_path", "") or f"a {type(model).__name__} in memory"


def _open_rows(
    given: Rowset, role: str, asked: Sources, most: int
) -> tuple[Named, tuple[str, ...]]:
    """Rows, and warnings on how they were read."""
    is_query = role == "query"
    split, usual = (asked.query_split, "validation") if is_query else (asked.split, "train")
    if isinstance(given, str | Path):
        named = read_named(
            role,
            str(given),
            split,
            usual=usual,
            config=asked.query_config if is_query else asked.config_name,
            format=None if is_query else asked.format,
            image_column=asked.query_image_column if is_query else asked.image_column,
            limit=None if is_query else asked.limit,
        )
        return named, ()
    named, is_cut = _open_in_memory(given, role, split, usual, most)
    note = (
        f"The stream has more rows than the first {most:,}, which alone were read: `max_rows` says "
        "how many are."
    )
    return named, (note,) if is_cut else ()


def _open_in_memory(
    given: Any, role: str, split: str | None, usual: str, most: int
) -> tuple[Named, bool]:
    """Rows, and whether a stream of them has more."""
    if isinstance(given, DatasetDict | IterableDatasetDict):
        given, split = _choose(given, role, split, usual)
    elif split is not None:
        raise UserError(f"`{role}` is one split already, so there is no {split!r} to choose of it.")
    if isinstance(given, IterableDataset):
        rows, is_cut = read_stream(given, most)
        return Named(role, A_STREAM, rows, split or usual), is_cut
    if not isinstance(given, Dataset):
        raise UserError(
            f"`{role}` must be a Dataset, a DatasetDict, a stream, a folder, a file or a Hub id, "
            f"but it is a {type(given).__name__}."
        )
    if not len(given):
        raise UserError(f"`{role}` has no rows.")
    return Named(role, IN_MEMORY, given, split or str(given.split or usual)), False


def _choose(given: Any, role: str, split: str | None, usual: str) -> tuple[Any, str]:
    """A split of several, or a part of the rows in them."""
    names = [*map(str, given)]
    option = "split" if role == "dataset" else f"{role}_split"
    chosen = split or (usual if usual in names else names[0] if len(names) == 1 else None)
    if chosen in names:
        return given[chosen], str(chosen)
    if chosen is not None and isinstance(given, DatasetDict) and set(chosen) & {*"[+"}:
        try:
            return cut(chosen, {str(name): rows for name, rows in given.items()}), chosen
        except UserError as error:
            raise UserError(f"`{option}={chosen}`: {error}") from None
    told = f"no split {split!r}" if split else "several splits"
    raise UserError(f"`{role}` has {told}. Give `{option}`, one of: {', '.join(names)}.")


def _row_name(given: Any) -> str:
    return str(given) if isinstance(given, str | Path) else IN_MEMORY
