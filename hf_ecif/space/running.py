"""The fifth tab: audit a data set of one's own, see how far it is, cancel it.

An audit runs in a process of its own, so that it can be stopped at once and takes its memory with
it. On a shared Space that process has no login and reads nothing from the disk but the upload.
"""

from __future__ import annotations

import multiprocessing
import re
import shutil
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty
from tempfile import mkdtemp
from typing import Any

import gradio as gr

from hf_ecif.errors import UserError
from hf_ecif.space.html import render
from hf_ecif.space.limits import Limits
from hf_ecif.space.session import Session
from hf_ecif.space.worker import audit_in_process

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
WAIT = 0.3  # seconds between two looks at a running audit


@dataclass
class Run:
    """An audit under way.

    Attributes:
        process: that does it.
        events: what it says of itself.
        folder: of its upload and its result.
    """

    process: Any
    events: Any
    folder: Path


@dataclass
class Steps:
    """The stages of a run, as far as they are known."""

    done: dict[str, int] = field(default_factory=dict)
    total: dict[str, int] = field(default_factory=dict)

    def note(self, name: str, total: int | None, steps: int) -> None:
        """A stage has begun, or has come further."""
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
                elem_id="run-upload",
            )
        with gr.Column():
            models = gr.Textbox(model, label="Model", elem_id="run-model")
            with gr.Row():
                split = gr.Textbox("train", label="Split", min_width=80)
                image = gr.Textbox("image", label="Image column", min_width=80)
                text = gr.Textbox("text", label="Text column", min_width=80)
    with gr.Row():
        start = gr.Button("Audit", variant="primary", elem_id="run-start")
        cancel = gr.Button("Cancel", elem_id="run-cancel")
    said = gr.HTML(elem_id="run-said")
    running = gr.State(None, delete_callback=end)

    def launch(*values: Any) -> Iterator[tuple[Any, ...]]:
        yield from run(limits, *values)

    start.click(
        launch,
        [name, upload, models, split, image, text],
        [said, running, session.folder, session.tabs],
        concurrency_id="audit",
        concurrency_limit=1,
        show_progress="hidden",
    )
    cancel.click(stop, running, said, show_progress="hidden", queue=False)


def run(
    limits: Limits, name: str, upload: str | None, model: str, split: str, image: str, text: str
) -> Iterator[tuple[Any, ...]]:
    """Audit, saying all the while how far it is; in the end the result is looked at.

    Yields:
        What is said, the run, the folder of the audit to look at, the tab to go to.
    """
    folder = Path(mkdtemp(prefix="hf-ecif-run-"))
    try:
        request = {
            "model": _model_name(model, limits),
            "dataset": _find_data(name, upload, folder, limits),
            "split": split,
            "image_column": image,
            "text_column": text,
            "output": str(folder / "audit"),
        }
    except UserError as error:
        shutil.rmtree(folder, ignore_errors=True)
        yield render("problem", message=str(error)), None, gr.skip(), gr.skip()
        return
    found = _start(request, folder, limits)
    steps, begin = Steps(), time.monotonic()
    yield str(steps), found, gr.skip(), gr.skip()
    while True:
        event = _next_event(found)
        late = time.monotonic() - begin > limits.seconds
        if event is None and not late:
            yield str(steps), found, gr.skip(), gr.skip()
            continue
        kind, *facts = event or ("error", f"It took longer than {limits.seconds / 60:.0f} minutes.")
        if kind == "step":
            steps.note(*facts)
            continue
        end(found)
        if kind == "done":
            yield render("done", **facts[0]), None, request["output"], gr.Tabs(selected="overview")
        else:
            yield render("problem", message=facts[0]), None, gr.skip(), gr.skip()
        return


def stop(run: Run | None) -> str:
    """End a run at once, and say so."""
    if run is None:
        return render("problem", message="Nothing is running.")
    end(run)
    return render("problem", message="Cancelled. Nothing was kept.")


def end(run: Run | None) -> None:
    """End a run at once; a result that is whole stays."""
    if run is None:
        return
    if run.process.is_alive():
        run.process.terminate()
    run.process.join(5)
    if not (run.folder / "audit" / "summary.json").is_file():
        shutil.rmtree(run.folder, ignore_errors=True)


def unpack(archive: Path, folder: Path, most: int) -> Path:
    """Unpack a zip of images, if what is in it is no larger than allowed.

    Raises:
        UserError: it is no zip, is too large, or has names that lead elsewhere.
    """
    try:
        with zipfile.ZipFile(archive) as source:
            if sum(entry.file_size for entry in source.infolist()) > most:
                raise UserError(f"The zip holds more than {most / 2**20:,.0f} MiB.")
            root = folder.resolve()
            for entry in source.infolist():
                if not (root / entry.filename).resolve().is_relative_to(root):
                    raise UserError(f"The zip holds a name that leads elsewhere: {entry.filename}")
            source.extractall(folder)
    except (zipfile.BadZipFile, OSError, RuntimeError) as error:
        raise UserError(f"This is no zip that can be read: {error}.") from error
    return folder


def _find_data(name: str, upload: str | None, folder: Path, limits: Limits) -> str:
    """The data set that is meant, in a way that the audit can read."""
    if upload:
        path = Path(upload)
        if path.stat().st_size > limits.upload:
            raise UserError(f"The file is larger than {limits.upload / 2**20:,.0f} MiB.")
        if path.suffix == ".parquet":
            return str(path)
        if path.suffix == ".zip":
            return str(unpack(path, folder / "data", limits.upload))
        raise UserError(f"{path.name} is neither parquet nor a zip.")
    if not name.strip():
        raise UserError("Name a data set on the Hub, or upload a file.")
    return _hub_name(name.strip(), "datasets/") if limits.shared else name.strip()


def _model_name(model: str, limits: Limits) -> str:
    if not model.strip():
        raise UserError("Name a CLIP-like model on the Hub, openai/clip-vit-base-patch32 for one.")
    return _hub_name(model.strip(), "") if limits.shared else model.strip()


def _hub_name(name: str, kind: str) -> str:
    """A name that can only mean the Hub, whatever lies on this disk."""
    if not HUB_NAME.fullmatch(name):
        raise UserError(f"{name!r} is no name on the Hub: it must look like owner/name.")
    return f"hf://{kind}{name}"


def _start(request: dict[str, Any], folder: Path, limits: Limits) -> Run:
    context = multiprocessing.get_context("spawn")  # a fork cannot use the threads of its parent
    events = context.Queue()
    arguments = (request, limits.shared, limits.rows, events)
    process = context.Process(target=audit_in_process, args=arguments, daemon=True)
    process.start()
    return Run(process, events, folder)


def _next_event(run: Run) -> tuple[Any, ...] | None:
    """What the run says next; None if it says nothing for now."""
    try:
        return run.events.get(timeout=WAIT)
    except Empty:
        if run.process.is_alive():
            return None
        return "error", "The audit was stopped."


def _introduce(limits: Limits) -> str:
    text = "Audit your own pairs. Without a query, well-aligned pairs are chosen from the data."
    if limits.shared:
        text += (
            f" Here at most {limits.rows:,} rows, {limits.upload // 2**20:,} MiB and "
            f"{limits.seconds / 60:.0f} minutes; one audit at a time, the others wait. Nobody else "
            "sees your upload, and it goes when you leave. `pip install hf_ecif` has no limits."
        )
    return text
