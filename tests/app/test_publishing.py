"""From the app to the Hub: first on trial, and with nobody's token but the visitor's."""

import inspect
from pathlib import Path
from typing import Any

import gradio as gr
import pytest
from datasets import load_dataset

from hf_ecif.app import publish as publishing
from hf_ecif.app.desk import DESKS, Place
from tests.support.hub.audits import write_audit, write_source
from tests.support.hub.server import ANN, BOB, HubServer

REPO = "bob/birds-clean"


@pytest.fixture(scope="module")
def audit(tmp_path_factory: pytest.TempPathFactory) -> str:
    """12 rows: 1 and 5 are flagged, 7 cannot be read."""
    place = tmp_path_factory.mktemp("publish")
    source = write_source(place / "birds")
    return str(write_audit(place / "audit", str(source), report=True))


def decided(folder: str) -> str:
    """Desk at which row 1 is kept and row 2 removed."""
    token = DESKS.open(folder, "", Place(shared=False, own=folder))
    steps = [("step-of-1", 1, "keep"), ("step-of-2", 2, "remove")]
    DESKS.get(token).log.append(
        [{"id": name, "rows": [row], "action": action} for name, row, action in steps]
    )
    return token


def press(
    kind: Any, folder: str, token: gr.OAuthToken | None = None, *, trial: bool, repo: str = REPO
) -> tuple[str, gr.Button]:
    handlers = kind()
    tokens = () if kind is publishing._at_home else (token,)
    handler = handlers[0 if trial else 1]
    return handler(folder, decided(folder), 0.4, repo, False, True, False, *tokens)


def token_of(name: str) -> gr.OAuthToken:
    return gr.OAuthToken(name, "write-repos", 2**40)


def users(hub: HubServer) -> set[str | None]:
    """Who asked; a large file goes to an address that needs no token."""
    return {seen.user for seen in hub.requests if seen.route != "lfs_put"}


class TestVisitor:
    def test_a_trial_changes_nothing_and_lets_publish(self, hub: HubServer, audit: str):
        said, button = press(publishing._as_visitor, audit, token_of(BOB), trial=True)
        assert "would be pushed" in said
        assert button.interactive
        with pytest.raises(KeyError):
            hub.commits(REPO)

    def test_decisions_are_what_is_published(self, hub: HubServer, audit: str):
        said, button = press(publishing._as_visitor, audit, token_of(BOB), trial=False)
        assert f'href="{hub.url}/datasets/{REPO}"' in said
        assert not button.interactive
        kept = load_dataset(REPO, split="train", token=BOB)
        removed = load_dataset(REPO, "removed", split="train", token=BOB)
        assert len(kept) == 9
        assert removed["text"][:] == ["bird number 2", "bird number 5", "bird number 7"]
        assert "bird number 1" in kept["text"][:]

    def test_only_the_visitors_token_is_used(self, hub: HubServer, audit: str):
        press(publishing._as_visitor, audit, token_of(BOB), trial=True)
        press(publishing._as_visitor, audit, token_of(BOB), trial=False)
        assert users(hub) == {"bob"}

    @pytest.mark.parametrize("trial", [True, False])
    def test_without_a_login_nothing_is_asked_of_the_hub(
        self, hub: HubServer, audit: str, trial: bool
    ):
        said, button = press(publishing._as_visitor, audit, None, trial=trial)
        assert "Log in with Hugging Face first" in said
        assert not button.interactive
        assert not hub.requests

    def test_the_token_comes_from_the_login_alone(self):
        """A parameter of this type is filled in by Gradio, and is no input of the page."""
        for handler in publishing._as_visitor():
            (hint,) = [
                parameter.annotation
                for parameter in inspect.signature(handler, eval_str=True).parameters.values()
                if parameter.name == "token"
            ]
            assert hint == gr.OAuthToken | None

    def test_a_token_is_in_no_message(self, hub: HubServer, audit: str):
        said, _ = press(publishing._as_visitor, audit, token_of("hf_unknown"), trial=False)
        assert 'role="alert"' in said
        assert "hf_unknown" not in said


class TestHome:
    def test_the_login_of_the_machine_is_used(self, hub: HubServer, audit: str):
        press(publishing._at_home, audit, trial=False, repo="ann/birds-clean")
        assert users(hub) == {"ann"}
        assert ANN not in str(hub.files("ann/birds-clean"))

    @pytest.mark.parametrize("repo", ["", "<b>x</b>", "a/b/c"])
    def test_a_wrong_name_is_said(self, hub: HubServer, audit: str, repo: str):
        said, button = press(publishing._at_home, audit, trial=True, repo=repo)
        assert 'role="alert"' in said
        assert "<b>" not in said
        assert not button.interactive

    def test_nothing_is_left_aside(self, hub: HubServer, audit: str, tmp_path: Path, monkeypatch):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        press(publishing._at_home, audit, trial=True, repo="ann/birds-clean")
        assert not list(tmp_path.glob("hf-ecif-push-*"))
