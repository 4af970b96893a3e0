"""The app through its own client: real sessions over a real socket."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from gradio_client import Client

from hf_ecif.app.app import launch, make_app
from hf_ecif.app.limits import HOME
from hf_ecif.app.selection import open_audit
from tests.app.conftest import DEMO, HTML


@pytest.fixture(scope="module")
def url(many: str) -> Iterator[str]:
    app = make_app(many, HOME)
    launch(app, HOME, prevent_thread_lock=True, quiet=True, server_name="127.0.0.1")
    yield app.local_url
    app.close()


@pytest.fixture
def client(url: str) -> Client:
    return Client(url, verbose=False)


def show(client: Client, which: str = "flagged", page: int = 1) -> str:
    reviews, threshold = {}, 0.4
    return client.predict(reviews, threshold, which, api_name="/show_first_page")[0]


def test_every_step_of_the_app_has_a_name(client: Client):
    names = client.view_api(return_format="dict")["named_endpoints"]
    assert {"/show", "/show_first_page", "/show_pair", "/draw", "/say", "/write_export"} <= set(
        names
    )


def test_the_audit_is_no_input_of_a_visitor(client: Client):
    """It is a state of the session: nobody names a folder of the machine from outside."""
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    assert str(DEMO) not in str(endpoints)
    for endpoint in endpoints.values():
        names = {parameter["parameter_name"] for parameter in endpoint["parameters"]}
        assert not names & {"folder", "token"}


def test_the_list_comes_in_pages(client: Client):
    assert show(client).count("data-row=") == 24
    assert "&lt;b&gt;bold" in show(client)
    assert HTML not in show(client)


def test_an_export_comes_as_a_file(client: Client, tmp_path: Path):
    file = client.predict({}, 0.4, api_name="/write_export")
    path = file["value"] if isinstance(file, dict) else file
    assert Path(path).read_bytes()[:2] == b"PK"


class TestTwoSessions:
    def test_decisions_do_not_mix(self, url: str, many: str):
        """Each decides on the pair it looks at, and gets its own decisions back."""
        one, other = (Client(url, verbose=False) for _ in range(2))
        for client in (one, other):
            client.predict({}, api_name="/begin")
        key = open_audit(many).key
        mine = decide(one, {}, "keep")
        theirs = decide(other, {}, "remove")
        assert '"action": "keep"' in mine[key]
        assert '"action": "remove"' in theirs[key]
        assert mine[key].count("action") == theirs[key].count("action") == 1

    def test_where_one_is_does_not_move_the_other(self, url: str):
        one, other = (Client(url, verbose=False) for _ in range(2))
        for client in (one, other):
            client.predict({}, api_name="/begin")
        reviews = {}
        for _ in range(3):
            reviews = decide(one, reviews, "keep")
        assert "row 3<" in one.predict(reviews, 0.4, api_name="/show_pair")[0]
        assert "row 0<" in other.predict({}, 0.4, api_name="/show_pair")[0]


def decide(client: Client, reviews: dict, action: str):
    return client.predict(reviews, 0.4, "flagged", api_name=f"/{action}")
