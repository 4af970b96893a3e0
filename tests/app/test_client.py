"""The app through its own client: real sessions over a real socket."""

from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from gradio_client import Client

from hf_ecif.app.app import launch, make_app
from hf_ecif.app.limits import HOME
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


def test_every_step_of_the_app_has_a_name(client: Client):
    names = client.view_api(return_format="dict")["named_endpoints"]
    assert {"/show", "/draw", "/say", "/write_export"} <= set(names)


def test_the_audit_is_no_input_of_a_visitor(client: Client):
    """It is a state of the session: nobody names a folder of the machine from outside."""
    endpoints = client.view_api(return_format="dict")["named_endpoints"]
    assert str(DEMO) not in str(endpoints)
    for endpoint in endpoints.values():
        names = {parameter["parameter_name"] for parameter in endpoint["parameters"]}
        assert not names & {"folder", "token"}


def test_captions_are_text(client: Client):
    client.predict("", api_name="/begin")
    shown = client.predict(0.4, api_name="/show")
    assert "&lt;b&gt;bold" in str(shown)
    assert HTML not in str(shown)


def test_an_export_comes_as_a_file(client: Client, tmp_path: Path):
    file = client.predict(0.4, api_name="/write_export")
    path = file["value"] if isinstance(file, dict) else file
    assert Path(path).read_bytes()[:2] == b"PK"


@pytest.mark.parametrize("path", ["monitoring", "monitoring/summary", "gradio_api/runs"])
def test_nobody_is_told_of_others(url: str, path: str):
    with pytest.raises(HTTPError) as refused:
        urlopen(f"{url}{path}", timeout=60)
    assert refused.value.code in (403, 404)
