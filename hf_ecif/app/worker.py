"""The process of an audit, which imports little before its access is restricted."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_ecif.app.limits import Limits


def audit_in_process(request: dict[str, Any], limits: Limits, events: Any) -> None:
    """Run an audit and report its progress.

    Args:
        request: fields of an `AuditRequest`.
        limits: bounds of rows and memory; on a shared machine its login is out of reach.
        events: queue that receives ``("step", name, total or None, steps)``, and at the end
            ``("done", Summary)`` or ``("error", message)``.
    """
    if limits.shared:
        forget_login()
    if limits.memory is not None:
        resource.setrlimit(resource.RLIMIT_AS, (limits.memory, limits.memory))
    from hf_ecif.applications.audit import run_audit
    from hf_ecif.applications.requests import AuditRequest
    from hf_ecif.config import InfluenceConfig
    from hf_ecif.data.loading import load_rows
    from hf_ecif.errors import UserError

    def progress(name: str, total: int) -> Callable[[int], None]:
        events.put(("step", name, total, 0))
        return lambda steps: events.put(("step", name, None, steps))

    try:
        count = len(load_rows(request["dataset"], request["split"]))
        if count > limits.rows:
            raise UserError(f"The data set has {count:,} rows; {limits.rows:,} are allowed here.")
        output = Path(request.pop("output"))
        summary = run_audit(AuditRequest(**request, output=output), InfluenceConfig(), progress)
        events.put(("done", summary))
    except UserError as error:
        events.put(("error", str(error)))
    except MemoryError:
        events.put(("error", "There is too little memory here for this audit."))
    except Exception as error:  # whatever it is, the page must say that the audit ended
        events.put(("error", f"Unexpected error: {type(error).__name__}."))
        raise


def forget_login() -> None:
    """Make this machine's login unreachable for this process."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"):
        os.environ.pop(name, None)
    os.environ["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "1"
    os.environ["HF_TOKEN_PATH"] = os.devnull
