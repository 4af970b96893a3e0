"""Rules for the folder of a run's output."""

from __future__ import annotations

from collections.abc import Collection, Iterable
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
    """Refuse an output folder with content that must not be lost.

    A run may write into a new or empty folder, resume an interrupted run of its own kind, or
    replace an earlier one; nothing else is ever touched.

    Args:
        output: folder of the run.
        finished: name of the file that it writes last; empty for a run that replaces nothing.
        others: names of all that it writes, if they are known.
        resume: whether it resumes an interrupted run.
        overwrite: whether it replaces an earlier run.

    Raises:
        UserError: the folder has other content, or is not writable.
    """
    require_writable(output)
    names = sorted(path.name for path in output.iterdir()) if output.exists() else []
    present = [name for name in names if not name.endswith(PARTIAL)]
    ours = {finished, *others, *INTERRUPTED} if finished else set()
    foreign = [name for name in present if name not in ours]
    if foreign and (others or not ours.intersection(present)):
        raise UserError(
            f"`output={output}` is not empty: it holds other files ({', '.join(foreign[:3])}). "
            "Give a new folder."
        )
    is_interrupted = not INTERRUPTED.isdisjoint(present)
    if finished in present and not is_interrupted and not overwrite:
        raise UserError(f"The run in `output={output}` is finished. `overwrite` replaces it.")
    if present and not (resume or overwrite):
        raise UserError(
            f"`output={output}` holds an interrupted run: `resume` continues it, `overwrite` "
            "starts anew."
        )


def require_outside(output: Path, sources: Iterable[str | Path]) -> None:
    """Refuse a folder that holds what is read, which the results would replace.

    Args:
        output: where the run is to write.
        sources: files and folders; names on the Hub are nowhere.

    Raises:
        UserError: one of them is the folder, or lies in it.
    """
    place = output.resolve()
    for source in sources:
        path = Path(source).expanduser().resolve()
        if place in (path, *path.parents):
            raise UserError(
                f"`output={output}` holds the input {source}, which the results would replace. "
                "Give another folder."
            )
