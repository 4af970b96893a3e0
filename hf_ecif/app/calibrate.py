"""Tab of a few verdicts: one pair at a time, blind, and then how good the flags are.

The page holds all pairs of the sample, so that a verdict shows the next one at once, and sends all
verdicts of a person with each of them: none can be lost or land on another pair. They are kept in
the visitor's browser under the key of the audit, for two persons, who judge the same sample.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, get_args

import gradio as gr
import numpy as np
from gradio.utils import get_upload_folder
from sklearn.metrics import cohen_kappa_score

from hf_ecif.app.html import render
from hf_ecif.app.limits import Limits
from hf_ecif.app.selection import Audit, open_audit
from hf_ecif.app.session import REDRAW, Session
from hf_ecif.data.images import thumbnail
from hf_ecif.data.summary import CurveOfProbability
from hf_ecif.data.verdicts import Verdict, read_verdicts
from hf_ecif.errors import UserError
from hf_ecif.reports.figures import reliability_figure
from hf_ecif.reports.html import inline_svg
from hf_ecif.utils.hub_paths import hide_paths

SIZES = [30, 60, 100]
PEOPLE = ["you", "a second person"]
SIDE = 384  # pixels of a picture
STORAGE_KEY = "hf_ecif_verdicts"
MOST_AUDITS = 20  # whose verdicts a browser keeps
COMMON = 5  # verdicts of both, from which on their agreement is told

# Verdicts as the browser holds them: by key of the audit, by person, by row number as text.
Stored = dict[str, dict[str, dict[str, Verdict]]]

# The pairs are list items, of which one is shown. A verdict moves on; keys press the buttons.
JUDGE = """
const list = () => [...element.querySelectorAll('.judge > li')];
const open_one = items => items.find(item => !item.dataset.verdict);
function show(item) {
  const items = list();
  if (!items.length) return;
  items.forEach(other => { other.hidden = other !== item; });
  const place = element.querySelector('.judge-place');
  const done = items.filter(one => one.dataset.verdict).length;
  place.textContent = item
    ? `Pair ${items.indexOf(item) + 1} of ${items.length}, ${done} judged`
    : `All ${items.length} pairs are judged.`;
  element.querySelector('.judge-done').hidden = Boolean(item);
  element.querySelector('.judge-bar').value = done;
  items.forEach(one => one.querySelectorAll('[data-choice]').forEach(button =>
    button.setAttribute('aria-pressed', button.dataset.choice === one.dataset.verdict)));
}
function step(by) {
  const items = list(), here = items.findIndex(item => !item.hidden);
  const place = here < 0 ? items.length - 1 : Math.min(Math.max(here + by, 0), items.length - 1);
  show(items[place]);
}
function choose(item, choice) {
  item.dataset.verdict = choice;
  const items = list(), after = items.slice(items.indexOf(item) + 1);
  show(open_one(after) || open_one(items));
  const judged = items.filter(one => one.dataset.verdict);
  const verdicts = Object.fromEntries(judged.map(one => [one.dataset.row, one.dataset.verdict]));
  const judge = element.querySelector('.judge');
  trigger('select', {audit: judge.dataset.audit, person: judge.dataset.person, verdicts});
}
element.addEventListener('click', event => {
  const button = event.target.closest('button');
  if (!button) return;
  if (button.dataset.choice) choose(button.closest('li'), button.dataset.choice);
  if (button.dataset.step) step(Number(button.dataset.step));
});
document.addEventListener('keydown', event => {
  const writing = event.target.closest('input:not([type=radio]), textarea, select');
  if (!element.offsetParent || writing || event.ctrlKey || event.metaKey || event.altKey) return;
  const choice = {1: 'right', 2: 'wrong', 3: 'cannot tell'}[event.key];
  const item = list().find(one => !one.hidden);
  if (choice && item) { event.preventDefault(); choose(item, choice); }
  if (event.key === 'Backspace') { event.preventDefault(); step(-1); }
});
function begin() {
  const items = list();  // as they come, all of them are hidden
  const fresh = items.every(item => item.hidden) && element.querySelector('.judge-done')?.hidden;
  if (items.length && fresh) show(open_one(items));
}
new MutationObserver(begin).observe(element, {childList: true, subtree: true, attributes: true});
begin();
"""


def build(session: Session, limits: Limits, tab: gr.Tab) -> None:
    """Lay out the tab and connect it; it draws a sample when it is first looked at."""
    kept = gr.BrowserState({}, storage_key=STORAGE_KEY, secret="hf_ecif")
    gr.Markdown(
        "How many flags are right? Judge a few pairs, drawn at random and shown without what the "
        "audit thinks of them: does the caption fit the image? Thirty take a few minutes."
    )
    with gr.Row(elem_classes="bar"):
        size = gr.Radio(SIZES, value=SIZES[0], label="Pairs to judge", elem_id="judge-size")
        person = gr.Radio(PEOPLE, value=PEOPLE[0], label="Who judges", elem_id="judge-person")
    with gr.Row(elem_classes="beside"):
        with gr.Column(scale=5, min_width=300):
            pairs = gr.HTML(js_on_load=JUDGE, elem_id="judge-pairs")
            with gr.Accordion("Verdicts as a file", open=False):
                save = gr.DownloadButton("Save my verdicts", size="sm", elem_id="judge-save")
                given = gr.File(
                    label="Read verdicts: csv, parquet or json",
                    file_types=[".csv", ".parquet", ".json"],
                    elem_id="judge-file",
                    height=110,
                )
        with gr.Column(scale=6, min_width=320):
            said = gr.HTML(elem_id="judge-said")
            with gr.Row(elem_classes="bar"):
                promised = gr.Checkbox(False, label="Promise a precision", elem_id="judge-promise")
                precision = gr.Slider(
                    0.5,
                    0.99,
                    0.9,
                    step=0.01,
                    label="At least this share of the flagged pairs is misaligned",
                    buttons=[],
                    visible=False,
                    elem_id="judge-precision",
                )
            output = gr.Textbox(
                label="Folder for the calibrated audit",
                visible=not limits.shared,
                elem_id="judge-output",
            )
            apply = gr.Button("Apply", variant="primary", elem_id="judge-apply")
            applied = gr.HTML(elem_id="judge-applied")

    chosen = [session.folder, size, person]
    begun = [tab.select, size.change, person.change]
    gr.on(begun, show_pairs, [*chosen, kept], pairs, **REDRAW)
    gr.on(session.changed, propose_folder, session.folder, output, **REDRAW)
    asked = [session.folder, size, kept, promised, precision]
    # All verdicts come with each one, so that the last word is right, and none may be left out.
    pairs.select(take_verdicts, kept, kept, show_progress="hidden", trigger_mode="multiple")
    moved = [*begun, kept.change, promised.change, precision.change]
    gr.on(moved, tell, asked, said, **REDRAW)
    promised.change(lambda on: gr.Slider(visible=on), promised, precision, show_progress="hidden")
    save.click(save_sheet, [*chosen, kept], save)
    given.upload(read_sheet, [session.folder, person, given, kept], [kept, applied]).then(
        show_pairs, [*chosen, kept], pairs
    )
    home = gr.State(not limits.shared)
    done = apply.click(apply_verdicts, [*asked, home, output], [session.folder, applied])
    done.then(show_pairs, [*chosen, kept], pairs).then(tell, asked, said)


def show_pairs(folder: str, size: int, person: str, kept: Stored | None) -> str:
    """HTML of all pairs of the sample, with the verdicts of a person."""
    audit = open_audit(folder)
    try:
        rows = _sample(folder, size).rows
    except UserError as error:
        return render("problem", message=str(error))
    verdicts = _verdicts(kept, audit, person)
    pairs = []
    for row in rows:
        picture, problem = thumbnail(audit.rows.cell(row), SIDE)
        pairs.append((row, picture, problem, audit.rows.text(row), verdicts.get(str(row), "")))
    return render("judge", pairs=pairs, audit=audit.key, person=person, choices=get_args(Verdict))


def take_verdicts(kept: Stored | None, event: gr.EventData) -> Stored:
    """All verdicts that the browser keeps, with those that were sent."""
    sent = event._data
    return _keep(kept, sent["audit"], sent["person"], dict(sent["verdicts"]))


def tell(folder: str, size: int, kept: Stored | None, promised: bool, precision: float) -> str:
    """HTML of what the verdicts say so far."""
    audit = open_audit(folder)
    both = [_verdicts(kept, audit, person) for person in PEOPLE]
    try:
        sample = _sample(folder, size)
    except UserError:  # told of beside the pairs
        return ""
    judged = sample.judge(_agreed(*both), precision if promised else None)
    picture = None
    known = [row for row in sample.rows if judged.verdicts.get(row) in ("right", "wrong")]
    if known:
        wrong = np.array([judged.verdicts[row] == "wrong" for row in known])
        believed, curve = sample.audit.probability[known], _curve(judged.facts.curve)
        picture = inline_svg(reliability_figure(believed, wrong, curve), "reliability")
    flagged = int(judged.flag.sum())
    return render(
        "verdicts",
        facts=judged.facts,
        count=judged.count,
        of=len(sample.rows),
        flagged=flagged,
        flagged_before=int(sample.audit.flag.sum()),
        agreement=compare_people(*both),
        reliability=picture,
    )


def compare_people(
    first: Mapping[str, Verdict], second: Mapping[str, Verdict]
) -> tuple[int, float, float] | None:
    """Pairs that both have judged, the share that they agree on, and Cohen's kappa.

    None of too few pairs; kappa is not-a-number where both gave one and the same verdict to all.
    """
    common = sorted(first.keys() & second.keys())
    if len(common) < COMMON:
        return None
    one, two = ([verdicts[row] for row in common] for verdicts in (first, second))
    alike = float(np.mean([a == b for a, b in zip(one, two, strict=True)]))
    has_several = len({*one, *two}) > 1
    return len(common), alike, float(cohen_kappa_score(one, two)) if has_several else np.nan


def save_sheet(folder: str, size: int, person: str, kept: Stored | None) -> str:
    """Path of a file of the sample with a person's verdicts, as ``hf-ecif calibrate`` reads it."""
    verdicts = _verdicts(kept, open_audit(folder), person)
    known = {int(row): verdict for row, verdict in verdicts.items()}
    return str(_sample(folder, size).write(_new_folder(), known).csv)


def read_sheet(
    folder: str, person: str, path: str | None, kept: Stored | None
) -> tuple[Stored, str]:
    """Verdicts with those of a file, as a person's; and what went wrong."""
    audit = open_audit(folder)
    if path is None:
        return kept or {}, ""
    try:
        found = read_verdicts(Path(path), len(audit.rows.readable))
    except UserError as error:
        return kept or {}, render("problem", message=hide_paths(str(error)))
    verdicts = _verdicts(kept, audit, person) | {str(row): one for row, one in found.items()}
    return _keep(kept, audit.key, person, verdicts), ""


def propose_folder(folder: str) -> str:
    """Where the calibrated audit may go: beside the audit."""
    path = Path(folder).expanduser()
    return str(path.with_name(f"{path.name}-calibrated"))


def apply_verdicts(
    folder: str,
    size: int,
    kept: Stored | None,
    promised: bool,
    precision: float,
    is_home: bool,
    output: str,
) -> tuple[str, str]:
    """Folder of the calibrated audit, which is opened, and HTML of what was done."""
    from hf_ecif.applications.calibrate import write_calibrated
    from hf_ecif.applications.outputs import require_free
    from hf_ecif.data.audit_folder import AuditFolder

    audit = open_audit(folder)
    both = [_verdicts(kept, audit, person) for person in PEOPLE]
    place = Path(output).expanduser() if is_home else _new_folder() / "audit"
    try:
        require_free(place)
        sample = _sample(folder, size)
        verdicts = _agreed(*both)
        judged = sample.judge(verdicts, precision if promised else None)
        summary = write_calibrated(sample, judged, place)
        sample.write(AuditFolder(place).calibration, verdicts)
    except UserError as error:
        message = str(error) if is_home else hide_paths(str(error))
        return folder, render("problem", message=message)
    return str(place), render("calibrated", summary=summary, place=place if is_home else None)


def _new_folder() -> Path:
    """A folder for files of a visitor, which Gradio cleans up."""
    os.makedirs(get_upload_folder(), exist_ok=True)
    return Path(mkdtemp(dir=get_upload_folder()))


@lru_cache(maxsize=16)
def _sample(folder: str, size: int) -> Any:
    from hf_ecif.applications.calibrate import draw_rows

    return draw_rows(Path(folder).expanduser(), size)


def _curve(curve: CurveOfProbability) -> Any:
    from hf_ecif.detection.calibration import Curve

    return Curve(**curve.to_dict())


def _verdicts(kept: Stored | None, audit: Audit, person: str) -> dict[str, Verdict]:
    """Verdicts of a person on an audit; what is none is left out, as a browser may say anything."""
    try:
        told = dict((kept or {})[audit.key][person])
    except (KeyError, TypeError, ValueError):
        return {}
    count = len(audit.rows.readable)
    return {
        row: verdict
        for row, verdict in told.items()
        if row.isdecimal() and int(row) < count and verdict in get_args(Verdict)
    }


def _keep(kept: Stored | None, audit: str, person: str, verdicts: dict[str, Verdict]) -> Stored:
    """All that is kept, with a person's verdicts on an audit, the newest audit last."""
    others = {key: value for key, value in (kept or {}).items() if key != audit}
    newest = dict(list(others.items())[-(MOST_AUDITS - 1) :])
    own = (kept or {}).get(audit)
    return newest | {audit: (own if isinstance(own, dict) else {}) | {person: verdicts}}


def _agreed(first: Mapping[str, Verdict], second: Mapping[str, Verdict]) -> dict[int, Verdict]:
    """Verdicts that count: where two persons disagree, it cannot be told."""
    agreed: dict[int, Verdict] = {}
    for row in first.keys() | second.keys():
        told = {verdicts[row] for verdicts in (first, second) if row in verdicts}
        agreed[int(row)] = told.pop() if len(told) == 1 else "cannot tell"
    return agreed
