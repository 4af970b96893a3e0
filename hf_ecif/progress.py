"""Progress bars of long stages: a function of a stage's name and its number of steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Advance = Callable[[int], None]
ProgressFactory = Callable[[str, int], Advance]


def silent(name: str, steps: int) -> Advance:
    """No bar at all."""
    return lambda done: None


@contextmanager
def progress_bars(console: Console) -> Iterator[ProgressFactory]:
    """A bar per stage with the estimated time left; in a log, where bars cannot move, none."""
    with Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        disable=not console.is_terminal,
    ) as bars:

        def add(name: str, steps: int) -> Advance:
            task = bars.add_task(name, total=steps)
            return lambda done: bars.advance(task, done)

        yield add
