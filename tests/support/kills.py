"""Jobs in processes of their own, to be killed. All imports are done once, in their common parent.

That parent has never computed anything, so it has no threads that its children would miss.
"""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits

_CONTEXT = get_context("forkserver")
LATE = ["transformers.models.clip.modeling_clip", "torch._decomp.decompositions_for_jvp"]
_CONTEXT.set_forkserver_preload(
    ["pytest", "hf_ecif.applications.audit", "hf_ecif.applications.score", *LATE, __name__]
)
SECONDS = 300


def start(job: Callable[..., Any], *arguments: Any, log: Path) -> BaseProcess:
    """Run ``job`` in a process; what it raises is written to ``log``."""
    process = _CONTEXT.Process(target=_run, args=(job, arguments, log), daemon=True)
    process.start()
    return process


def kill(process: BaseProcess, after: float) -> bool:
    """Kill a process after some seconds; False if it was done before, and well."""
    process.join(after)
    if process.is_alive():
        process.kill()
    return was_killed(process)


def was_killed(process: BaseProcess) -> bool:
    """Wait until a process ends: killed, or done well."""
    process.join(SECONDS)
    assert process.exitcode in (0, -signal.SIGKILL), f"exit status {process.exitcode}"
    return process.exitcode != 0


def kill_me() -> None:
    """What a job calls to be killed where it stands."""
    os.kill(os.getpid(), signal.SIGKILL)


def _run(job: Callable[..., Any], arguments: tuple[Any, ...], log: Path) -> None:
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            job(*arguments)
    except BaseException:
        log.write_text(traceback.format_exc())
        raise
