"""The processes of a run, as ``torchrun`` or ``accelerate launch`` started them.

Every process runs the same program with the same parameters and the same random numbers; only the
rows are divided among them. So they exchange two kinds of things only: tensors, and small Python
objects. A single process exchanges nothing.

``accelerate launch`` starts several processes on CPUs with ``--multi_gpu``, or through MPI.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState, is_initialized
from accelerate.utils import (
    broadcast_object_list,
    gather_object,
    parse_choice_from_env,
    parse_flag_from_env,
    reduce,
)
from torch import Tensor
from torch.distributed import TCPStore, broadcast

from hf_ecif.errors import UserError

PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The end of a process is noticed at once. A process that is merely slow, or that writes a large
# result while the others wait, has not failed.
PATIENCE = timedelta(days=1)
T = TypeVar("T")

_alone = ContextVar("alone", default=False)


class MainProcessError(RuntimeError):
    """The main process failed; it reports why itself."""


@contextmanager
def alone() -> Iterator[None]:
    """Context in which this process works alone, whatever the others do."""
    token = _alone.set(True)
    try:
        yield
    finally:
        _alone.reset(token)


def rank() -> int:
    """Number of this process, from 0."""
    return 0 if _alone.get() else _state().process_index


def count() -> int:
    """Number of processes."""
    return 1 if _alone.get() else _state().num_processes


def is_main() -> bool:
    """Whether this is the process that writes files and talks to the user."""
    return rank() == 0


def leave() -> None:
    """Leave the process group, at the end of a run."""
    if count() > 1:
        _state().wait_for_everyone()
        _state().destroy_process_group()


def device() -> torch.device:
    """Device on which this process computes."""
    return _state().device


def dtype() -> torch.dtype:
    """Type of a model's weights, from accelerate's setting for mixed precision.

    Raises:
        UserError: a precision that the engine does not know.
    """
    if is_initialized():
        name = AcceleratorState().mixed_precision
    else:
        name = parse_choice_from_env("ACCELERATE_MIXED_PRECISION", "no")
    if name not in PRECISIONS:
        raise UserError(
            f"accelerate is configured for mixed precision {name!r}: use no, bf16 or fp16."
        )
    return PRECISIONS[name]


def add_up(part: Tensor) -> Tensor:
    """Sum of ``part`` over all processes, the same in each."""
    return part if count() == 1 else reduce(part.to(device()), "sum").to(part.device)


def spread(parts: Sequence[Tensor], positions: slice | Tensor, total: int) -> list[Tensor]:
    """Whole tensors, assembled from the rows that each process holds.

    Args:
        parts: ``(..., n, d)``, the ``n`` rows of this process; the same ``d`` in all of them.
        positions: places of these rows in the whole; each place belongs to one process.
        total: number of rows of the whole, ``N``.

    Returns:
        ``(..., N, d)`` of each.
    """
    if count() == 1:
        return list(parts)
    own, width = parts[0].shape[-2:]
    order, sizes = _order(positions, own, total, parts[0].device)
    # Layer by layer, in one buffer: touching fresh memory takes longer than sending its content.
    received = parts[0].new_empty(total, width)
    mine = received.split(sizes)[rank()]
    wholes = []
    for part in parts:
        wholes.append(part.new_empty(*part.shape[:-2], total, width))
        layers = wholes[-1].view(-1, total, width)
        for here, whole in zip(part.reshape(len(layers), own, width), layers, strict=True):
            mine.copy_(here)
            fill_in(received, sizes)
            torch.index_select(received, 0, order, out=whole)
    return wholes


def fill_in(whole: Tensor, sizes: Sequence[int]) -> None:
    """Complete a tensor in place, when every process has filled its own rows.

    Every part is broadcast to its place. A gather takes several times as long on CPUs, since the
    backend copies parts in and out and needs parts of equal size.

    Args:
        whole: ``(..., N, d)``, contiguous.
        sizes: number of rows of each process; their rows follow one another.
    """
    if count() == 1:
        return
    here = device()
    for layer in whole.view(-1, *whole.shape[-2:]):
        for source, part in enumerate(layer.split(sizes)):
            if len(part):
                sent = part.to(here)
                broadcast(sent, source)
                part.copy_(sent)


def share(total: int, process: int | None = None) -> range:
    """Consecutive items of ``total`` that a process works on; shares differ by at most one.

    Args:
        total: number of items.
        process: number of the process; this one if absent.
    """
    number = rank() if process is None else process
    return range(number * total // count(), (number + 1) * total // count())


def collect(thing: T) -> list[T]:
    """Every process's ``thing``, in the order of the processes."""
    return [thing] if count() == 1 else gather_object([thing])


def decide(choose: Callable[[], T]) -> T:
    """The value that ``choose`` returns in the main process, sent to all; others do not call it.

    An error of the main process is raised in every process. Since not every error can be pickled,
    the others raise a `UserError` with the same message, or a `MainProcessError` for other types.
    """
    if count() == 1:
        return choose()
    outcome: list[Any] = [None, None]
    own: Exception | None = None
    if is_main():
        try:
            outcome[0] = choose()
        except Exception as error:
            own = error
            kind = UserError if isinstance(error, UserError) else MainProcessError
            outcome[1] = kind(f"{error}")
    result, failure = broadcast_object_list(outcome)
    if failure is not None:
        raise own or failure
    return result


def is_first(name: str) -> bool:
    """Whether this is the first process to ask for ``name``, whatever state the others are in.

    Only the launcher's store is needed, so it works before the process group exists and after a
    process has died. Without a store, the main process counts as the first.
    """
    address, port = (os.environ.get(f"MASTER_{part}", "") for part in ("ADDR", "PORT"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store = TCPStore(address, int(port), is_master=False, timeout=timedelta(seconds=10))
        return store.add(f"hf_ecif, first {name}, attempt {attempt}", 1) == 1
    except (ValueError, RuntimeError):
        return os.environ.get("RANK", "0") == "0"


def _order(
    positions: slice | Tensor, own: int, total: int, device: torch.device
) -> tuple[Tensor, list[int]]:
    """Places of all rows when processes follow one another, ``(total,)``; rows of each process."""
    codes = torch.zeros(total, dtype=torch.long, device=device)
    codes[positions] = rank() * total + torch.arange(own, device=device)
    codes = add_up(codes)
    owners, numbers = codes // total, codes % total
    sizes = owners.bincount(minlength=count())
    return (sizes.cumsum(0) - sizes)[owners] + numbers, sizes.tolist()


def _state() -> Any:  # its attributes have no types
    """State of accelerate, which, unlike its `Accelerator`, must be told to stay on the CPU."""
    no_accelerator = (
        parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    )
    return PartialState(cpu=no_accelerator, timeout=PATIENCE)
