"""What may become of a folder that a run is to write into."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from hf_ecif.errors import UserError
from hf_ecif.utils.checkpoints import MANIFEST
from hf_ecif.utils.files import CHECKPOINTS, PARTIAL, require_writable

INTERRUPTED = {
    MANIFEST,
    CHECKPOINTS,
}  # one of them lies in the folder of a run until it is finished


def require_free(
    output: Path,
    *,
    finished: str = "",
    others: Collection[str] = (),
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Refuse a folder that holds what must not be lost.

    A run may go into a folder that is new or empty, go on with an interrupted one of its own kind,
    or replace one; nothing else is ever touched.

    Args:
        output: where the run is to write.
        finished: name of the file that it writes last; none of a run that replaces nothing.
        others: names of all that it writes, where they are known.
        resume: whether it goes on with an interrupted run.
        overwrite: whether it replaces an earlier one.

    Raises:
        UserError: it may not, or cannot.
    """
    require_writable(output)
    names = sorted(path.name for path in output.iterdir()) if output.exists() else []
    present = [name for name in names if not name.endswith(PARTIAL)]
    ours = {finished, *others, *INTERRUPTED} if finished else set()
    foreign = [name for name in present if name not in ours]
    if foreign and (others or not ours.intersection(present)):
        raise UserError(
            f"--output {output} is not empty: it holds other files ({', '.join(foreign[:3])}). "
            "Give a new folder."
        )
    is_interrupted = not INTERRUPTED.isdisjoint(present)
    if finished in present and not is_interrupted and not overwrite:
        raise UserError(f"The run in --output {output} is finished. --overwrite replaces it.")
    if present and not (resume or overwrite):
        raise UserError(
            f"--output {output} holds an interrupted run: --resume goes on with it, --overwrite "
            "starts anew."
        )
