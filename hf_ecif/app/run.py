"""Fifth tab: audit another data set, watch its progress, cancel it.

An audit runs in a separate process, so that it can be stopped at once and its memory is released.
On a shared Space that process has no login, and reads nothing from the disk except the upload.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import re
import shutil
import signal
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from queue import Empty
from tempfile import gettempdir, mkdtemp
from typing import Any, NamedTuple

import gradio as gr
import pyarrow as pa
import pyarrow.parquet as pq

from hf_ecif.app.desk import state_folder
from hf_ecif.app.html import render
from hf_ecif.app.limits import Limits
from hf_ecif.app.session import Session
from hf_ecif.app.worker import audit_in_process
from hf_ecif.errors import UserError

HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[\w-][\w./-]*)?")
OWN_MODEL = "that of the audit"
MODELS = ["openai/clip-vit-base-patch32", "google/siglip-base-patch16-224"]
WAIT = 0.3  # seconds between two updates from a running audit
ENTRIES = 3  # of a zip per allowed row, for folders and other files
MOST_RUNS = 10  # results that are kept on one's own machine
ON, OFF = gr.Button(interactive=True), gr.Button(interactive=False)
WAITING = "The progress of an audit appears here. The result opens in the other tabs."
CANCELLED = "Cancelled. Nothing was kept."


@dataclass
class Run:
    """An audit under way.

    Attributes:
        process: process of the audit.
        events: queue of its events.
        folder: folder of its upload and result.
    """

    process: Any
    events: Any
    folder: Path


class View(NamedTuple):
    """Values of the tab's outputs: message, run, folder of the audit, tab, buttons."""

    said: str
    run: Run | None
    folder: Any = gr.skip()
    tabs: Any = gr.skip()
    start: Any = gr.skip()
    cancel: Any = gr.skip()


@dataclass
class Steps:
    """Stages of a run so far."""

    done: dict[str, int] = field(default_factory=dict)
    total: dict[str, int] = field(default_factory=dict)

    def note(self, name: str, total: int | None, steps: int) -> None:
        """Record the start or the progress of a stage."""
        if total is not None:
            self.total[name], self.done[name] = total, 0
        self.done[name] = self.done.get(name, 0) + steps

    def __str__(self) -> str:
        return render(
            "steps", steps=[(name, self.done[name], self.total[name]) for name in self.total]
        )


def build(session: Session, limits: Limits, model: str, dataset: str | None) -> None:
    """Lay out the tab and connect it."""
    gr.Markdown(_introduce(limits))
    with gr.Row():
        with gr.Column():
            name = gr.Textbox(
                dataset or "",
                label="Data set on the Hub" if limits.shared else "Data set: Hub id or folder",
                placeholder="owner/name",
                elem_id="run-dataset",
            )
            upload = gr.File(
                label="or a file: parquet, or a zip of images with metadata.csv",
                file_types=[".parquet", ".zip"],
                height=150,
                elem_id="run-upload",
            )
        with gr.Column():
            models = gr.Dropdown(
                [OWN_MODEL, *MODELS],
                value=OWN_MODEL,
                allow_custom_value=True,
                label="Model: choose one, or name a CLIP-like one on the Hub",
                elem_id="run-model",
            )
            with gr.Row():
                split = gr.Textbox("train", label="Split", min_width=80)
                image = gr.Textbox("image", label="Image column", min_width=80)
                text = gr.Textbox("text", label="Text column", min_width=80)
            with gr.Row():
                query = gr.Textbox(
                    label="Query: clean pairs", placeholder="owner/name, if any", min_width=120
                )
                query_split = gr.Textbox("validation", label="Split of the query", min_width=80)
    with gr.Row():
        start = gr.Button("Audit", variant="primary", elem_id="run-start")
        cancel = gr.Button("Cancel", variant="stop", interactive=False, elem_id="run-cancel")
    said = gr.HTML(render("nothing", text=WAITING), elem_id="run-said")
    running = gr.State(None, delete_callback=discard if limits.shared else end)

    # Shown at once, since others may be ahead in the queue.
    started = start.click(
        lambda: (render("steps", steps=[]), OFF, ON), None, [said, start, cancel], queue=False
    ).then(
        partial(run, limits, model),
        [running, name, upload, models, split, image, text, query, query_split],
        [said, running, session.folder, session.tabs, start, cancel],
        api_name="run",
        concurrency_id="audit",
        concurrency_limit=1,
        show_progress="hidden",
    )
    cancel.click(
        lambda run: (stop(run), ON, OFF),
        running,
        [said, start, cancel],
        cancels=[started],
        show_progress="hidden",
        queue=False,
    )


def run(
    limits: Limits,
    own_model: str,
    earlier: Run | None,
    name: str,
    upload: str | None,
    model: str,
    split: str,
    image: str,
    text: str,
    query: str,
    query_split: str,
) -> Iterator[View]:
    """Run an audit and report its progress; at the end, the app opens the result.

    Args:
        limits: what a visitor may ask for.
        own_model: the model for which `OWN_MODEL` stands.
        earlier: the last run of this session.
        name: name of a data set.
        upload: a file instead of a named data set.
        model: `OWN_MODEL`, or a name.
        split: split of the data.
        image: column of images.
        text: column of captions.
        query: data set of clean pairs; chosen from the audited data if empty.
        query_split: split of the query.
    """
    folder = new_folder(limits)
    try:
        request = {
            "model": own_model if model == OWN_MODEL else _model_name(model or "", limits),
            "dataset": _find_data(name, upload, folder, limits),
            "split": None if (upload or "").endswith(".parquet") else split.strip() or None,
            "image_column": image.strip() or None,
            "text_column": text.strip() or None,
            "query": _data_name(query.strip(), limits) if query.strip() else None,
            "query_split": (query_split.strip() or None) if query.strip() else None,
            "output": str(folder / "audit"),
        }
    except UserError as error:
        shutil.rmtree(folder, ignore_errors=True)
        yield _problem(str(error), earlier)
        return
    found = _start(request, folder, limits)
    try:
        yield from _follow(found, earlier, limits)
    finally:  # also when the page was closed
        end(found)


def _follow(found: Run, earlier: Run | None, limits: Limits) -> Iterator[View]:
    steps, begin = Steps(), time.monotonic()
    yield View(str(steps), found, start=OFF, cancel=ON)
    while True:
        event = _next_event(found)
        late = time.monotonic() - begin > limits.seconds
        if event is None and not late:
            yield View(str(steps), found, start=OFF, cancel=ON)
            continue
        kind, *facts = event or ("error", f"It took longer than {limits.seconds / 60:.0f} minutes.")
        if kind == "step":
            steps.note(*facts)
            continue
        end(found)
        if kind == "error":
            yield _problem(facts[0].replace(f"{found.folder}{os.sep}", ""), earlier)
            return
        if limits.shared:
            discard(earlier)
        place = None if limits.shared else found.folder / "audit"
        done, tabs = (
            render("done", place=place, summary=facts[0], most=MOST_RUNS),
            gr.Tabs(selected="overview"),
        )
        yield View(done, found, str(found.folder / "audit"), tabs, start=ON, cancel=OFF)
        return


def new_folder(limits: Limits) -> Path:
    """A new folder for an upload and its result.

    On one's own machine results stay, the newest of them, among what this user's programs keep.
    Those of visitors go with them, and at the latest with this process.
    """
    if limits.shared:
        return Path(mkdtemp(dir=_folder_of_visitors()))
    runs = state_folder() / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    finished = sorted(runs.iterdir(), key=lambda folder: folder.stat().st_mtime)
    for folder in finished[: max(0, len(finished) - MOST_RUNS + 1)]:
        shutil.rmtree(folder, ignore_errors=True)
    return Path(mkdtemp(prefix=time.strftime("%Y-%m-%d-"), dir=runs))


@cache
def _folder_of_visitors() -> str:
    """Folder of this process for visitors' runs; those of processes that have ended go."""
    for other in Path(gettempdir()).glob("hf-ecif-runs-*"):
        number = other.name.split("-")[3]
        if number.isdigit() and not _is_running(int(number)):
            shutil.rmtree(other, ignore_errors=True)
    folder = mkdtemp(prefix=f"hf-ecif-runs-{os.getpid()}-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _is_running(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it is somebody else's
    return True


def stop(run: Run | None) -> str:
    """Stop a run at once, if it has begun; returns a message."""
    if run is not None and run.process.is_alive():
        run.process.terminate()
    return render("problem", message=CANCELLED)


def end(run: Run | None) -> None:
    """Stop a run at once; a complete result is kept."""
    if run is None:
        return
    if run.process.is_alive():
        run.process.terminate()
    run.process.join(5)
    if not (run.folder / "audit" / "summary.json").is_file():
        shutil.rmtree(run.folder, ignore_errors=True)


def discard(run: Run | None) -> None:
    """Stop a run at once, and delete its files."""
    if run is not None:
        end(run)
        shutil.rmtree(run.folder, ignore_errors=True)


def unpack(archive: Path, folder: Path, limits: Limits) -> Path:
    """Unpack a zip of images whose content is no larger than allowed.

    Returns:
        Folder of the images, which may be the single folder inside the zip.

    Raises:
        UserError: the file is not a zip, is too large, or names paths outside the folder.
    """
    try:
        with zipfile.ZipFile(archive) as source:
            entries, root = source.infolist(), folder.resolve()
            size = sum(entry.file_size for entry in entries)
            if size > limits.upload or len(entries) > ENTRIES * limits.rows:
                raise UserError(
                    f"The zip holds {size / 2**20:,.0f} MiB in {len(entries):,} files; "
                    f"{limits.upload / 2**20:,.0f} MiB in {ENTRIES * limits.rows:,} are allowed."
                )
            for entry in entries:
                if not (root / entry.filename).resolve().is_relative_to(root):
                    raise UserError(f"The zip names a path outside its folder: {entry.filename}")
            source.extractall(folder)
    except (zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"This is no zip that can be read: {error}.") from error
    inside = [path for path in folder.iterdir() if path.name != "__MACOSX"]
    return inside[0] if len(inside) == 1 and inside[0].is_dir() else folder


def check_parquet(path: Path, limits: Limits) -> None:
    """Check that the content of a parquet file is no larger than allowed.

    Raises:
        UserError: the file is not parquet, or is too large.
    """
    try:
        facts = pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"This is no parquet file that can be read: {error}.") from error
    size = sum(facts.row_group(group).total_byte_size for group in range(facts.num_row_groups))
    if size > limits.upload:
        raise UserError(
            f"The file holds {size / 2**20:,.0f} MiB; {limits.upload / 2**20:,.0f} are allowed."
        )
    _check_count(facts.num_rows, limits)


def _find_data(name: str, upload: str | None, folder: Path, limits: Limits) -> str:
    """Path or Hub name of the data set, for the audit to read."""
    if not upload:
        if not name.strip():
            raise UserError("Name a data set on the Hub, or upload a file.")
        return _data_name(name.strip(), limits)
    path = Path(upload)
    if path.stat().st_size > limits.upload:
        raise UserError(f"The file is larger than {limits.upload / 2**20:,.0f} MiB.")
    if path.suffix == ".parquet":
        check_parquet(path, limits)
        return shutil.copy(
            upload, str(folder / "upload.parquet")
        )  # its old name might be taken for a split
    if path.suffix == ".zip":
        return str(unpack(path, folder / "data", limits))
    raise UserError(f"{path.name} is neither parquet nor a zip.")


def _check_count(count: int, limits: Limits) -> None:
    if count > limits.rows:
        raise UserError(f"The data set has {count:,} rows; {limits.rows:,} are allowed here.")


def _data_name(name: str, limits: Limits) -> str:
    return _hub_name(name, "datasets/") if limits.shared else name


def _model_name(model: str, limits: Limits) -> str:
    if not model.strip():
        raise UserError("Name a CLIP-like model on the Hub, such as openai/clip-vit-base-patch32.")
    return _hub_name(model.strip(), "") if limits.shared else model.strip()


def _hub_name(name: str, kind: str) -> str:
    """A name that can only refer to the Hub, never to a path on this disk."""
    if not HUB_NAME.fullmatch(name):
        raise UserError(f"{name!r} is not a name on the Hub: it must look like owner/name.")
    return f"hf://{kind}{name}"


def _problem(message: str, earlier: Run | None) -> View:
    return View(render("problem", message=message), earlier, start=ON, cancel=OFF)


def _start(request: dict[str, Any], folder: Path, limits: Limits) -> Run:
    context = multiprocessing.get_context("spawn")  # a fork cannot use its parent's threads
    events = context.Queue()
    arguments = (request, limits, events)
    process = context.Process(target=audit_in_process, args=arguments, daemon=True)
    process.start()
    return Run(process, events, folder)


def _next_event(run: Run) -> tuple[Any, ...] | None:
    """Next event of the run; None if there is none yet."""
    try:
        return run.events.get(timeout=WAIT)
    except Empty:
        if run.process.is_alive():
            return None
        if run.process.exitcode == -signal.SIGTERM:
            return "error", CANCELLED
        return "error", "The audit stopped unexpectedly; perhaps there was too little memory."


def _introduce(limits: Limits) -> str:
    text = "Audit your own pairs. Without a query, well-aligned pairs of the data are used."
    if limits.shared:
        text += (
            f" Here at most {limits.rows:,} rows, {limits.upload // 2**20:,} MiB and "
            f"{limits.seconds / 60:.0f} minutes; one audit at a time, the others wait. Nobody else "
            "sees your upload, and it is deleted when you leave. Without limits: "
            "`pip install hf_ecif`."
        )
    return text
