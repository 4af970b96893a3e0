"""Output of a command while it runs and when it is done."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.console import Console

from hf_ecif.cli.flags import name_flags

if TYPE_CHECKING:
    from hf_ecif.reports.console import Shown
    from hf_ecif.utils.progress import ProgressFactory


class Result(NamedTuple):
    """Result of a command.

    Attributes:
        values: plain values, for ``--json``.
        lines: lines for a person.
    """

    values: dict[str, Any]
    lines: Iterable[Shown]


@dataclass(frozen=True)
class Screen:
    """Console and progress bars of a command; of several processes, only one shows anything.

    Attributes:
        console: console for a person.
        progress: makes progress bars on it.
        prints_json: whether the result is printed for programs.
    """

    console: Console
    progress: ProgressFactory
    prints_json: bool = False

    def result(self, result: Result) -> None:
        """Show a result."""
        from hf_ecif.reports.console import print_lines
        from hf_ecif.utils import distributed
        from hf_ecif.utils.files import to_json

        print_lines(self.console, result.lines, name_flags)
        if self.prints_json and distributed.is_main():
            print(to_json(result.values))


@contextmanager
def screen(quiet: bool, as_json: bool = False, *, resumes: bool = False) -> Iterator[Screen]:
    """Context with the screen of a command.

    Args:
        quiet: show no progress bars.
        as_json: print nothing but JSON.
        resumes: whether the command can be resumed.
    """
    from hf_ecif.utils import distributed
    from hf_ecif.utils.progress import progress_bars, silent

    quieten_libraries()
    console = Console(quiet=as_json or not distributed.is_main())
    try:
        with nullcontext(silent) if quiet or console.quiet else progress_bars(console) as progress:
            yield Screen(console, progress, as_json)
    except KeyboardInterrupt:
        if resumes:
            _say("Stopped. The same command with --resume continues where it was.")
        raise
    distributed.leave()


def warn(message: str) -> None:
    """Print a warning about something that a person should change."""
    if is_first():
        _say(f"Warning: {message}")


def is_first() -> bool:
    """Whether this is the process that prints, before the processes have met."""
    return os.environ.get("RANK", "0") == "0"


def _say(message: str) -> None:
    Console(stderr=True).print(message, highlight=False, markup=False, emoji=False, soft_wrap=True)


def quieten_libraries() -> None:
    """Silence the progress bars and notices of other libraries."""
    import datasets
    import transformers
    from huggingface_hub.utils.tqdm import disable_progress_bars

    datasets.disable_progress_bars()
    disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    for name in ("datasets", "huggingface_hub"):
        logging.getLogger(name).setLevel(logging.ERROR)
