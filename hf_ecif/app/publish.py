"""Last tab: publish kept and removed pairs on the Hub, with a card, after a dry run.

On a Space, only the token of the logged-in visitor is used; on one's own machine, the login of that
machine.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr

from hf_ecif.app.html import render
from hf_ecif.app.limits import Limits
from hf_ecif.app.selection import open_audit
from hf_ecif.app.session import Session, reviewed
from hf_ecif.applications.review import apply_review
from hf_ecif.errors import UserError


def build(session: Session, limits: Limits) -> None:
    """Lay out the tab and connect it."""
    gr.Markdown(
        "The kept pairs become the data set, the removed ones its configuration `removed`, each "
        "with its reason. Your decisions and your threshold are applied. Dry run first; it changes "
        "nothing."
    )
    if limits.login:
        gr.LoginButton(elem_id="publish-login")
    with gr.Row():
        repo = gr.Textbox(label="Repository", placeholder="owner/name", elem_id="publish-repo")
        with gr.Column():
            private = gr.Checkbox(True, label="Private")
            removed = gr.Checkbox(True, label="Publish the removed pairs, too")
            others = gr.Checkbox(False, label="Publish the other splits of the source, too")
    with gr.Row():
        trial = gr.Button("Dry run", elem_id="publish-try")
        go = gr.Button("Publish", variant="primary", interactive=False, elem_id="publish-go")
    said = gr.HTML(elem_id="publish-said")

    inputs = [session.folder, session.reviews, session.threshold, repo, private, removed, others]
    attempt, finish = (_as_visitor if limits.shared else _at_home)()
    trial.click(attempt, inputs, [said, go], concurrency_id="push")
    go.click(finish, inputs, [said, go], concurrency_id="push")
    gr.on([repo.change, *session.changed], lambda: gr.Button(interactive=False), None, go)


def publish(
    folder: str,
    reviews: str | None,
    threshold: float,
    repo: str,
    private: bool,
    removed: bool,
    others: bool,
    *,
    token: str | None,
    dry_run: bool,
) -> tuple[str, gr.Button]:
    """Push an audit with its decisions; returns a report, and whether publishing may follow."""
    from hf_ecif.hub.push import push  # imports torch, which few visitors need

    audit = open_audit(folder)
    try:
        with TemporaryDirectory(prefix="hf-ecif-push-") as aside:
            cleaned = Path(aside, "audit")
            apply_review(audit.folder, reviewed(audit, reviews, threshold), cleaned)
            report = push(
                cleaned,
                repo.strip(),
                private=private,
                removed=removed,
                other_splits=others,
                token=token,
                dry_run=dry_run,
            )
    except UserError as error:
        return render("problem", message=str(error)), gr.Button(interactive=False)
    lines, link = str(report).splitlines(), None if dry_run else report.url
    return render("pushed", lines=lines, url=link), gr.Button(interactive=dry_run)


def _at_home() -> tuple[Any, Any]:
    """Handlers that use this machine's login."""

    def attempt(*values: Any) -> tuple[str, gr.Button]:
        return publish(*values, token=None, dry_run=True)

    def finish(*values: Any) -> tuple[str, gr.Button]:
        return publish(*values, token=None, dry_run=False)

    return attempt, finish


def _as_visitor() -> tuple[Any, Any]:
    """Handlers that use only the visitor's token."""

    def as_visitor(token: gr.OAuthToken | None, values: tuple[Any, ...], dry_run: bool) -> Any:
        if token is None:  # without it, `push` would use the login of the Space
            message = "Log in with Hugging Face first."
            return render("problem", message=message), gr.Button(interactive=False)
        return publish(*values, token=token.token, dry_run=dry_run)

    def attempt(
        folder: str,
        reviews: str | None,
        threshold: float,
        repo: str,
        private: bool,
        removed: bool,
        others: bool,
        token: gr.OAuthToken | None,
    ) -> Any:
        values = (folder, reviews, threshold, repo, private, removed, others)
        return as_visitor(token, values, True)

    def finish(
        folder: str,
        reviews: str | None,
        threshold: float,
        repo: str,
        private: bool,
        removed: bool,
        others: bool,
        token: gr.OAuthToken | None,
    ) -> Any:
        values = (folder, reviews, threshold, repo, private, removed, others)
        return as_visitor(token, values, False)

    return attempt, finish
