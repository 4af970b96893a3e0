"""Progress bars of long stages, made from a stage's name and its number of steps."""

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
    """A progress bar that shows nothing."""
    return lambda done: None


def tqdm_bars(name: str, steps: int) -> Advance:
    """Progress bar of `datasets`, in a notebook or a terminal; none if these bars are disabled."""
    from datasets.utils import tqdm  # for the commands' help, which shows no bar

    bar = tqdm(desc=name, total=steps or None)

    def advance(done: int) -> None:
        bar.update(done)
        if bar.total is not None and bar.n >= bar.total:
            bar.close()

    return advance


@contextmanager
def progress_bars(console: Console) -> Iterator[ProgressFactory]:
    """Bars with rate and time left, one a stage; none in a log, where bars cannot move."""
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
            task = bars.add_task(name, total=steps or None)  # 0: the number is unknown
            return lambda done: bars.advance(task, done)

        yield add


class _RateColumn(ProgressColumn):
    """Column that shows steps per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f}/s" if speed else "", style="progress.data.speed")
