"""Second tab: keep, remove or recaption pair after pair; undo; export."""

from __future__ import annotations

import os
import shutil
from functools import partial
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, NamedTuple

import gradio as gr
from gradio.utils import get_upload_folder

from hf_ecif.app.html import PICK, render
from hf_ecif.app.overview import WORDS
from hf_ecif.app.selection import Audit, Span, Which, open_audit
from hf_ecif.app.session import REDRAW, Session, keep_review, pressed_row, read_review, reviewed
from hf_ecif.applications.review import apply_review
from hf_ecif.data.images import thumbnail
from hf_ecif.data.review import Action, Decision, Review
from hf_ecif.errors import UserError

PAGE = 24
LARGE_SIDE = 512
WHICH: list[Which] = ["flagged", "borderline", "not flagged", "decided", "all"]
Reviews = dict[str, str]


class Page(NamedTuple):
    """Values of the list's components."""

    cards: str
    number: gr.Slider
    progress: str


class Pair(NamedTuple):
    """Values of the components that show one pair."""

    detail: str
    caption: str


class Step(NamedTuple):
    """Result of a decision: all decisions, and the next pair."""

    reviews: Reviews
    row: int | None


def build(session: Session) -> None:
    """Lay out the tab and connect it."""
    with gr.Row(elem_classes="beside"):
        with gr.Column(scale=5, min_width=320):
            which = gr.Radio(WHICH, value="flagged", label="Pairs", elem_id="review-which")
            progress = gr.HTML(elem_id="review-progress")
            page = gr.Slider(1, 2, 1, step=1, label="Page", buttons=[], elem_id="review-page")
            cards = gr.HTML(js_on_load=PICK, elem_id="review-cards")
        with gr.Column(scale=6, min_width=320, elem_classes="looked-at"):
            detail = gr.HTML(elem_id="review-detail")
            with gr.Row(elem_classes="actions"):
                keep = gr.Button("Keep", size="sm", elem_id="review-keep", min_width=80)
                remove = gr.Button("Remove", size="sm", elem_id="review-remove", min_width=80)
                undo = gr.Button("Undo", size="sm", elem_id="review-undo", min_width=80)
                previous = gr.Button(
                    "◂ Previous", size="sm", elem_id="review-previous", min_width=80
                )
                following = gr.Button("Next ▸", size="sm", elem_id="review-next", min_width=80)
            gr.HTML(render("keys"), elem_id="review-keys")
            with gr.Row(elem_classes="bar"):
                caption = gr.Textbox(label="Caption", lines=2, elem_id="review-caption")
                recaption = gr.Button(
                    "Keep with this caption",
                    size="sm",
                    scale=0,
                    min_width=190,
                    elem_id="review-recaption",
                )
            with gr.Accordion("The nearest pairs", open=False, elem_id="review-nearest") as near:
                neighbours = gr.HTML(js_on_load=PICK, elem_id="review-near")
            export = gr.Button("Export data and decisions", size="sm", elem_id="review-export")
            exported = gr.File(label="Export", visible=False, elem_id="review-exported")

    place = [session.folder, session.reviews, session.threshold, session.span, which]
    quiet: dict[str, Any] = {"show_progress": "hidden"}
    paged = [*place, page, session.row]
    list_outputs = [cards, page, progress]
    changes = [*session.changed, session.threshold.change, session.span.change, which.change]
    gr.on(changes, show_first_page, place, list_outputs, **REDRAW)
    turn = partial(show_page, follow=False)
    page.input(turn, paged, list_outputs, api_name="turn_to", **REDRAW)
    gr.on([session.row.change, session.reviews.change], show_page, paged, list_outputs, **REDRAW)
    pair_inputs = [session.folder, session.reviews, session.threshold, session.row]
    seen = [session.row.change, *session.changed]
    gr.on(seen, show_pair, pair_inputs, [detail, caption], **REDRAW)
    # A decision updates the texts about a pair, but not a caption that is being edited.
    session.reviews.change(
        lambda *values: show_pair(*values).detail,
        pair_inputs,
        detail,
        api_visibility="private",
        **REDRAW,
    )
    for pressed in (cards, neighbours):
        pressed.select(pressed_row, None, session.row)

    def decide_by(action: Action, event: Any, *more: Any) -> None:
        inputs = [*place, session.row, *more]
        outputs = [session.reviews, session.row]
        event(partial(decide, action), inputs, outputs, api_name=action, **quiet)

    decide_by("keep", keep.click)
    decide_by("remove", remove.click)
    decide_by("recaption", recaption.click, caption)
    undo.click(take_back, place[:2], [session.reviews, session.row], **quiet)
    for button, by, name in ((previous, -1, "previous"), (following, 1, "next")):
        move = partial(step, by=by)
        button.click(move, [*place, session.row], session.row, api_name=name, **quiet)
    near.expand(show_neighbours, [session.folder, session.row], neighbours)
    session.row.change(lambda: "", None, neighbours, **REDRAW)
    exports = [session.folder, session.reviews, session.threshold]
    export.click(write_export, exports, exported)


def show_first_page(
    folder: str, reviews: Reviews, threshold: float, span: Span | None, which: Which
) -> Page:
    """First page of the list."""
    return show_page(folder, reviews, threshold, span, which, 1, None)


def show_page(
    folder: str,
    reviews: Reviews,
    threshold: float,
    span: Span | None,
    which: Which,
    page: int,
    row: int | None,
    follow: bool = True,
) -> Page:
    """A page of the list; with ``follow``, the page of the row if the list has it."""
    audit = open_audit(folder)
    review = read_review(reviews, audit)
    rows = audit.pick(which, threshold, review, span)
    pages = max(1, -(-len(rows) // PAGE))
    number = min(int(page or 1), pages)
    if follow and row in rows:
        number = rows.index(row) // PAGE + 1
    shown = rows[(number - 1) * PAGE : number * PAGE]
    cards = render(
        "cards",
        cards=[audit.rows.card(one) for one in shown],
        chosen=row,
        decisions=review.current,
        words=WORDS,
        shows="review-detail",
        nothing=_nothing(which),
    )
    slider = gr.Slider(minimum=1, maximum=max(pages, 2), value=number, visible=pages > 1)
    return Page(cards, slider, _say_progress(audit, review, rows))


def show_pair(folder: str, reviews: Reviews, threshold: float, row: int | None) -> Pair:
    """One pair in full, and its caption for editing."""
    audit = open_audit(folder)
    if row is None or row >= len(audit.rows.readable):
        return Pair(render("pair", card=None), "")
    decision = read_review(reviews, audit).current.get(row)
    card = audit.rows.card(row)
    detail = render(
        "pair",
        card=card,
        marked=audit.rows.marked(row),
        picture=thumbnail(audit.rows.cell(row), LARGE_SIDE)[0],
        flagged=bool(audit.flags(threshold)[row]),
        decision=decision,
        words=WORDS,
        exponent=audit.rows.exponent,
        reach=max(abs(card.positive), abs(card.negative)) or 1.0,
    )
    new = decision.text if decision else None
    return Pair(detail, new or card.suggestion or audit.rows.text(row))


def decide(
    action: Action,
    folder: str,
    reviews: Reviews,
    threshold: float,
    span: Span | None,
    which: Which,
    row: int | None,
    caption: str | None = None,
) -> Step:
    """Record a decision and move to the next pair of the list."""
    audit = open_audit(folder)
    if row is None:
        gr.Info("Choose a pair first.")
        return Step(reviews, None)
    review = read_review(reviews, audit)
    try:
        review = review.decide(Decision(row, action, caption))
    except UserError as error:
        gr.Warning(str(error))
        return Step(reviews, row)
    after = step(folder, reviews, threshold, span, which, row, 1)
    return Step(keep_review(reviews, audit, review), after)


def take_back(folder: str, reviews: Reviews) -> Step:
    """Undo the last decision and show its pair again."""
    audit = open_audit(folder)
    review = read_review(reviews, audit)
    if not review.log:
        gr.Info("There is nothing to undo.")
        return Step(reviews, None)
    return Step(keep_review(reviews, audit, review.undo()), review.log[-1].row)


def step(
    folder: str,
    reviews: Reviews,
    threshold: float,
    span: Span | None,
    which: Which,
    row: int | None,
    by: int,
) -> int | None:
    """Row that is ``by`` places further in the list."""
    audit = open_audit(folder)
    rows = audit.pick(which, threshold, read_review(reviews, audit), span)
    if not rows:
        return row
    here = rows.index(row) if row in rows else -by
    return rows[max(0, min(here + by, len(rows) - 1))]


def show_neighbours(folder: str, row: int | None) -> str:
    """HTML of the pairs with the nearest images: agreeing and contradicting captions."""
    from hf_ecif.app.fitted_audit import find_neighbours, prepare  # with torch, which few need

    if row is None:
        return "<p>Choose a pair first.</p>"
    audit = open_audit(folder)
    agreeing, contradicting = find_neighbours(prepare(folder), row)
    groups = [
        ("Similar images, similar captions", [audit.rows.card(one) for one in agreeing]),
        ("Similar images, other captions", [audit.rows.card(one) for one in contradicting]),
    ]
    return render("neighbours", groups=groups)


def write_export(folder: str, reviews: Reviews, threshold: float) -> gr.File:
    """Zip of the audit after the decisions: kept, removed and scored rows, report, decisions."""
    audit = open_audit(folder)
    review = reviewed(audit, reviews, threshold)
    os.makedirs(get_upload_folder(), exist_ok=True)  # which Gradio cleans up
    place = Path(mkdtemp(dir=get_upload_folder()))
    apply_review(audit.folder, review, place / "cleaned")
    (place / "cleaned" / "decisions.json").write_text(review.to_json())
    archive = shutil.make_archive(str(place / "cleaned"), "zip", place / "cleaned")
    shutil.rmtree(place / "cleaned")
    return gr.File(archive, visible=True)


def _say_progress(audit: Audit, review: Review, rows: list[int]) -> str:
    done = sum(row in review.current for row in rows)
    made = {WORDS[action]: count for action, count in review.counts().items() if count}
    words = ", ".join(f"{count:,} {word}" for word, count in made.items())
    total = f" Your decisions: {words}." if words else ""
    return f"<p>{len(rows):,} pairs, {done:,} decided.{total}</p>"


def _nothing(which: Which) -> str:
    return {
        "flagged": "No pair is flagged. Lower the threshold on the overview to flag more.",
        "borderline": "No pair is close to the threshold.",
        "not flagged": "Every pair is flagged.",
        "decided": "You have not decided on any pair yet.",
        "all": "No pair could be read.",
    }[which]
