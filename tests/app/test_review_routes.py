"""Addresses of the review's page, over HTTP: what they answer, and whom they refuse."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

from hf_ecif.app import review_routes, review_rows
from hf_ecif.app.desk import DESKS, Place
from hf_ecif.app.review_routes import STATIC
from hf_ecif.app.selection import open_audit
from tests.app.conftest import HTML, MANY

JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = Starlette(routes=review_routes.review_routes())
    return TestClient(app, raise_server_exceptions=False)


@pytest.fixture
def desk(many: str, tmp_path: Path) -> Iterator[str]:
    token = DESKS.open(many, "", Place(shared=False, own=many, keep=tmp_path))
    yield f"/review/{token}"
    DESKS.close(token)


@pytest.fixture
def stranger(many: str, tmp_path: Path) -> Iterator[str]:
    """A desk on a shared machine, at an upload."""
    token = DESKS.open(many, "me", Place(shared=True, own="/elsewhere", keep=tmp_path))
    yield f"/review/{token}"
    DESKS.close(token)


def unpack(content: bytes) -> tuple[dict, dict[str, np.ndarray]]:
    """Header and columns, as the page's script reads them."""
    length = int.from_bytes(content[:4], "little")
    header = json.loads(content[4 : 4 + length])
    start = 4 + length
    assert start % 4 == 0
    ends = [part["start"] for part in header["layout"][1:]] + [len(content) - start]
    columns = {}
    for part, end in zip(header["layout"], ends, strict=True):
        size = np.dtype(part["kind"]).itemsize
        raw = content[start + part["start"] : start + end]
        columns[part["name"]] = np.frombuffer(raw[: len(raw) // size * size], part["kind"])
    return header, columns


def step(number: int, rows: list[int], action: str = "keep", **more) -> dict:
    return {"id": f"step-{number}", "rows": rows, "action": action} | more


class TestRows:
    def test_the_table_is_the_audits_columns(self, client, desk, many):
        header, columns = unpack(client.get(f"{desk}/table").content)
        rows = open_audit(many).rows
        assert header["rows"] == MANY
        np.testing.assert_array_equal(columns["score"], rows.score.astype("f4"))
        np.testing.assert_array_equal(columns["probability"], rows.probability.astype("f4"))
        bits = columns["bits"][:MANY]
        np.testing.assert_array_equal((bits & review_rows.BITS["flag"]) > 0, rows.flag)
        np.testing.assert_array_equal((bits & review_rows.BITS["readable"]) > 0, rows.readable)
        assert {"text", "kind", "ecif_score"} <= set(header["columns"])
        assert "image" not in header["columns"]
        assert str(Path(many)) not in json.dumps(header)

    def test_rows_in_words(self, client, desk):
        first, second = client.get(f"{desk}/rows?rows=0,5,99999").json()
        assert "".join(text for text, _ in first["caption"]) == HTML
        assert first["caption"][0][1]  # its first word is contradicted
        assert first["reasons"] == ["looks <b>wrong</b>"]
        assert (second["row"], second["suggestion"]) == (5, None)
        assert "±" in second["influence"]

    def test_one_question_is_for_so_many_rows(self, client, desk):
        numbers = ",".join(map(str, range(MANY)))
        assert len(client.get(f"{desk}/rows?rows={numbers}").json()) == review_routes.MOST_ROWS

    def test_columns_to_choose_from(self, client, desk, many):
        header, columns = unpack(client.get(f"{desk}/column/kind").content)
        assert header["names"] == ["tit", "crow"]
        assert columns["values"].tolist() == [row % 2 for row in range(MANY)]
        header, columns = unpack(client.get(f"{desk}/column/text").content)
        assert header["kind"] == "order"
        texts = pq.read_table(Path(many) / "scored")["text"].to_pylist()
        order = np.argsort(columns["values"], kind="stable")
        assert [texts[row] for row in order] == sorted(texts)
        header, _ = unpack(client.get(f"{desk}/column/ecif_score").content)
        assert header["kind"] == "numbers"
        for name in ("image", "no such", "../summary"):
            answer = client.get(f"{desk}/column/{name}")
            assert answer.status_code in (400, 404)

    def test_search_ignores_case(self, client, desk):
        _, columns = unpack(client.get(f"{desk}/search?text=NUMBER 119").content)
        assert columns["values"].tolist() == [119, *range(1190, 1200)]
        _, columns = unpack(client.get(f"{desk}/search?text=.*").content)
        assert not len(columns["values"])  # it is no pattern

    def test_similar_rows_say_why(self, client, desk):
        (section,) = client.get(f"{desk}/similar/7").json()
        assert section["how"] == "with captions of the same words"
        assert 7 not in section["rows"]

    def test_pictures(self, client, desk):
        small = client.get(f"{desk}/image/3")
        assert small.headers["content-type"] == "image/webp"
        assert small.content[:4] == b"RIFF"
        assert client.get(f"{desk}/image/3?side=640").status_code == 200
        for row in ("99999", "-1", "x", "1.5", "²"):
            assert client.get(f"{desk}/image/{row}").status_code == 404

    def test_nothing_of_an_upload_stays_in_a_browser(self, client, desk, stranger):
        for path in ("image/3", "table", "rows?rows=1", "steps"):
            assert client.get(f"{stranger}/{path}").headers["cache-control"] == "no-store"
        assert "max-age" in client.get(f"{desk}/image/3").headers["cache-control"]

    def test_pictures_that_several_rows_have(self, client, desk):
        _, columns = unpack(client.get(f"{desk}/pictures").content)
        assert columns["values"].tolist() == list(range(MANY))


class TestSteps:
    def test_decisions_are_written_and_come_back(self, client, desk, tmp_path):
        body = {"steps": [step(1, [3], "remove"), step(2, [4])], "since": 0}
        answer = client.post(f"{desk}/steps", json=body).json()
        assert (answer["steps"], answer["upto"]) == (body["steps"], 2)
        assert client.get(f"{desk}/steps?since=1").json()["steps"] == body["steps"][1:]
        (file,) = tmp_path.iterdir()
        assert len(file.read_text().splitlines()) == 3

    def test_a_file_is_imported(self, client, desk):
        text = json.dumps({"log": [{"row": 3, "action": "keep", "text": None}], "threshold": None})
        assert client.post(f"{desk}/import", json={"text": text}).json() == {"new": 1, "found": 1}
        bad = client.post(f"{desk}/import", json={"text": "nonsense"})
        assert bad.status_code == 400
        assert "no saved decisions" in bad.json()["error"]

    @pytest.mark.parametrize(
        ("body", "status", "words"),
        [
            ({"steps": [step(1, [MANY])]}, 400, "belong to another audit"),
            ({"steps": [{"no": "step"}]}, 400, "needs a name"),
            ({"steps": "no"}, 400, "as a list"),
            ([], 400, "as a list"),
            ({"steps": [step(n, [1]) for n in range(1001)]}, 413, "At most 1,000"),
        ],
    )
    def test_what_is_no_decision_is_refused(self, client, desk, body, status, words):
        answer = client.post(f"{desk}/steps", json=body)
        assert answer.status_code == status
        assert words in answer.json()["error"]
        assert client.get(f"{desk}/steps").json()["upto"] == 0

    def test_another_page_cannot_decide(self, client, desk):
        body = json.dumps({"steps": [step(1, [1])]})
        for headers, status in (
            (JSON | {"sec-fetch-site": "cross-site"}, 403),
            (JSON | {"sec-fetch-site": "same-site"}, 403),
            ({"content-type": "text/plain"}, 415),
            ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ):
            assert client.post(f"{desk}/steps", content=body, headers=headers).status_code == status
        assert client.get(f"{desk}/steps").json()["upto"] == 0

    def test_what_is_too_large_is_not_read(self, client, desk, monkeypatch):
        big = b'{"steps": [' + b" " * review_routes.MOST_BYTES + b"]}"
        assert client.post(f"{desk}/steps", content=big, headers=JSON).status_code == 413

    def test_a_full_disk_is_said(self, client, desk, monkeypatch):
        def fail(*_: object) -> None:
            raise OSError(28, "No space left on device", "/secret/place")

        monkeypatch.setattr("hf_ecif.data.review_log.os.fsync", fail)
        answer = client.post(f"{desk}/steps", json={"steps": [step(1, [1])]})
        assert answer.status_code == 507
        assert "secret" not in answer.text


class TestDesks:
    def test_a_closed_or_guessed_desk_shows_nothing(self, client, many):
        token = DESKS.open(many, "", Place(shared=True, own=many, keep=Path(many) / "x"))
        assert client.get(f"/review/{token}/table").status_code == 200
        DESKS.close(token)
        for name in (token, "guessed", many.replace("/", "%2F")):
            for path in ("table", "rows?rows=1", "image/1", "steps", "similar/1"):
                assert client.get(f"/review/{name}/{path}").status_code in (404, 410)
            assert client.post(f"/review/{name}/steps", json={"steps": []}).status_code in (
                404,
                410,
            )

    def test_static_files_are_those_of_the_page_alone(self, client):
        assert client.get("/review/static/review.js").status_code == 200
        for path in ("../review.py", "%2e%2e/review.py", "..%2freview.py"):
            assert client.get(f"/review/static/{path}").status_code == 404

    def test_texts_never_become_markup(self):
        """The script puts texts of rows into the page as text nodes alone."""
        for file in STATIC.glob("*.js"):
            code = file.read_text()
            for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
                assert word not in code, (file.name, word)
