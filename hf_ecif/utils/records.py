"""Nested records of tensors and plain values as one `State`, and back, by their fields' types.

A record is a dataclass or a named tuple. A field may hold a tensor, an array, another record,
anything that JSON can hold, or None in place of any of them. For all other types there is a
`Codec`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor

from hf_ecif.utils.checkpoints import State

T = TypeVar("T")


@dataclass(frozen=True)
class Codec:
    """How to keep what is no record.

    Attributes:
        parts: tensors, arrays and plain values by name.
        build: makes it of these.
    """

    parts: Callable[[Any], dict[str, Any]]
    build: Callable[[dict[str, Any]], Any]


Codecs = Mapping[type, Codec]


def pack(record: Any, codecs: Codecs | None = None) -> State:
    """A record as a state.

    Args:
        record: a dataclass or a named tuple.
        codecs: of what is neither a record nor a value, by its type.
    """
    state = State({}, {})
    for name, value in _leaves(record, "", codecs or {}):
        if isinstance(value, Tensor):
            state.tensors[name] = value.contiguous()
        elif isinstance(value, np.ndarray):
            state.tensors[name] = torch.from_numpy(np.ascontiguousarray(value))
        else:
            state.values[name] = value
    return state


def unpack(kind: type[T], state: State, codecs: Codecs | None = None) -> T:
    """What `pack` took.

    Args:
        kind: type of the record.
        state: of `pack`.
        codecs: as for `pack`.
    """
    return _build(kind, "", state, codecs or {})


def _leaves(value: Any, name: str, codecs: Codecs) -> Iterator[tuple[str, Any]]:
    if type(value) in codecs:
        for part, leaf in codecs[type(value)].parts(value).items():
            yield f"{name}.{part}", leaf
    elif names := _names(type(value)):
        for field in names:
            inner = getattr(value, field)
            yield from _leaves(inner, f"{name}.{field}" if name else field, codecs)
    else:
        yield name, value


def _build(hint: Any, name: str, state: State, codecs: Codecs) -> Any:
    if state.values.get(name, ...) is None:
        return None
    kind = _not_none(hint)
    if kind in codecs:
        prefix = f"{name}."
        held: dict[str, Any] = {**state.tensors, **state.values}
        found = {k.removeprefix(prefix): v for k, v in held.items() if k.startswith(prefix)}
        return codecs[kind].build(found)
    if names := _names(kind):
        hints = get_type_hints(kind)
        parts = {
            field: _build(hints[field], f"{name}.{field}" if name else field, state, codecs)
            for field in names
        }
        return kind(**parts)
    if kind is Tensor:
        return state.tensors[name]
    if name in state.tensors:
        return state.tensors[name].numpy()
    value = state.values[name]
    return tuple(value) if get_origin(kind) is tuple else value


def _names(kind: Any) -> tuple[str, ...]:
    """Fields of a record; none of anything else."""
    if is_dataclass(kind):
        return tuple(field.name for field in fields(kind))
    return tuple(getattr(kind, "_fields", ()))


def _not_none(hint: Any) -> Any:
    """The type that a hint allows beside None."""
    if get_origin(hint) in (Union, UnionType):
        return next(one for one in get_args(hint) if one is not type(None))
    return hint
