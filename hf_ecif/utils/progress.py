"""Progress bars of long stages: a function of a stage's name and its number of steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

Advance = Callable[[int], None]
ProgressFactory = Callable[[str, int], Advance]


def silent(name: str, steps: int) -> Advance:
    """No bar at all."""
    return lambda done: None


@contextmanager
def progress_bars(console: Console) -> Iterator[ProgressFactory]:
    """A bar per stage with rate and time left; in a log, where bars cannot move, none."""
    with Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
        disable=not console.is_terminal,
    ) as bars:

        def add(name: str, steps: int) -> Advance:
            task = bars.add_task(name, total=steps or None)  # 0: nobody knows how many
            return lambda done: bars.advance(task, done)

        yield add


class _RateColumn(ProgressColumn):
    """Steps per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f}/s" if speed else "", style="progress.data.speed")
