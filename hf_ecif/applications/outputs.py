"""What may become of a folder that a run is to write into."""

from __future__ import annotations

from pathlib import Path

from hf_ecif.errors import UserError
from hf_ecif.influence.saving import FIT
from hf_ecif.utils.checkpoints import MANIFEST
from hf_ecif.utils.files import CHECKPOINTS, PARTIAL, require_writable

SCORING = "scoring.json"  # of a finished run of ``score``
FINISHED, INTERRUPTED = {SCORING, FIT}, {MANIFEST, CHECKPOINTS}


def require_free(output: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that holds what must not be lost."""
    require_writable(output)
    names = {path.name for path in output.iterdir()} if output.exists() else set()
    present = {name for name in names if not name.endswith(PARTIAL)}
    interrupted = present & INTERRUPTED
    if present & FINISHED and not interrupted and not overwrite:
        raise UserError(f"The run in --output {output} is finished. --overwrite replaces it.")
    if interrupted and not (resume or overwrite):
        raise UserError(
            f"--output {output} holds an interrupted run: --resume goes on with it, --overwrite "
            "starts anew."
        )
    if present and not present & (FINISHED | INTERRUPTED):
        raise UserError(f"--output {output} holds other files. Give a new folder.")
