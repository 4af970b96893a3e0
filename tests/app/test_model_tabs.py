"""Neighbours, traces and retrainings: what the tabs say, and that it is what the model says."""

import io
from pathlib import Path

import gradio as gr
import numpy as np
import pytest
import torch
from datasets import load_dataset
from gradio.data_classes import ImageData
from PIL import Image

from hf_ecif.app import fitted_audit as engine
from hf_ecif.app import trace as tracing
from hf_ecif.app import what_if
from hf_ecif.app.fitted_audit import Prepared, prepare
from hf_ecif.app.html import render
from hf_ecif.app.selection import open_audit
from hf_ecif.applications.tracing import find_errors, trace
from hf_ecif.errors import UserError
from hf_ecif.influence.queries import retrieval_margin
from hf_ecif.utils.files import read_json, write_json
from tests.support.images import bomb


@pytest.fixture(scope="module")
def prepared(real: str) -> Prepared:
    return prepare(real)


def test_a_broken_upload_is_not_opened_where_its_error_would_tell_its_place(tmp_path: Path) -> None:
    broken = tmp_path / "picture.png"
    broken.write_bytes(b"no image at all")
    image = tracing.unread_image(render=False)
    assert image.get_block_name() == "image"
    assert image.preprocess(ImageData(path=str(broken), orig_name="picture.png")) == str(broken)
    said = render("problem", message=f"cannot identify image file '{broken}'")
    assert str(tmp_path) not in said
    assert "picture.png" in said


def pressed(row: int) -> gr.EventData:
    return gr.EventData(None, {"row": row})


@pytest.fixture
def picture(data: Path, tmp_path: Path) -> str:
    cell = load_dataset("parquet", data_files=str(data / "validation.parquet"))["train"][0]["image"]
    cell.save(tmp_path / "own.png")
    return str(tmp_path / "own.png")


class TestPrepare:
    def test_it_is_the_audit_over_again(self, prepared, real):
        audit = open_audit(real)
        scores = prepared.influence.scores()
        found = audit.rows.score[prepared.influence.rows.positions.numpy()]
        np.testing.assert_allclose(scores.task.numpy(), found, rtol=1e-3, atol=1e-7)
        assert len(prepared.test) == 40

    def test_data_that_changed_since_are_refused(self, real, tmp_path):
        audit = open_audit(real)
        (tmp_path / "scored").symlink_to(audit.folder / "scored")
        write_json(
            read_json(audit.folder / "summary.json") | {"split": "test"}, tmp_path / "summary.json"
        )
        with pytest.raises(UserError, match="40 rows now, but had 120"):
            prepare(str(tmp_path))


class TestNeighbours:
    def test_they_are_the_nearest_images_by_captions(self, prepared):
        text, image = prepared.model.embed_as_given(prepared.rows)[:2]
        near = (image @ image[5]).argsort(descending=True)[1 : engine.NEAR + 1]
        agree, contradict = engine.find_neighbours(prepared, int(prepared.rows.positions[5]))
        assert set(agree + contradict) <= set(prepared.rows.positions[near].tolist())
        assert not set(agree) & set(contradict)
        alike = {int(row): float(text[row] @ text[5]) for row in near}
        assert min(alike[row] for row in agree) >= max(alike[row] for row in contradict)


class TestTrace:
    def test_the_errors_are_those_of_the_model(self, real, prepared):
        errors = find_errors(prepared.influence, prepared.query)
        shown = tracing.list_errors(real)
        assert f"{len(errors.rows)} captions retrieve the wrong image" in shown
        assert shown.index(f'data-row="{errors.rows[0]}"') < shown.index(
            f'data-row="{errors.rows[1]}"'
        )

    def test_the_causes_are_those_of_a_trace(self, real, prepared):
        row = find_errors(prepared.influence, prepared.query).rows[:1]
        expected = trace(prepared.influence, prepared.query, row, top_k=tracing.TOP)
        causes = engine.find_causes(
            prepared, retrieval_margin(prepared.query, row.tolist()), tracing.TOP
        )
        rows = prepared.influence.rows.positions[expected.pairs[0]]
        assert [cause.row for cause in causes] == rows.tolist()
        assert [cause.score for cause in causes] == pytest.approx(expected.score[0].tolist())
        shown = tracing.trace_error(real, pressed(int(row)))
        assert all(f'data-row="{cause.row}"' in shown for cause in causes)
        assert "nats against the" in " ".join(shown.split())

    def test_a_row_that_is_no_error_is_refused(self, prepared):
        right = set(range(40)) - set(find_errors(prepared.influence, prepared.query).rows.tolist())
        with pytest.raises(UserError, match="is not mispredicted"):
            engine.describe_query(prepared, min(right))

    def test_a_pair_of_ones_own_is_told_from_the_captions_of_the_query(
        self, real, prepared, picture
    ):
        caption = prepared.query.texts[0]
        asked, _ = engine.ask(prepared, Path(picture).read_bytes(), caption, [])
        image_to_text = retrieval_margin(prepared.query, [0], "image_to_text")
        theta = prepared.influence.theta
        expected = image_to_text.values(prepared.model.encoder, theta).item()
        assert asked.margin == pytest.approx(expected, abs=1e-4)
        assert "data-row" in tracing.trace_own(real, picture, caption, "")

    def test_removing_the_causes_fixes_the_error(self, prepared, picture):
        caption = prepared.query.texts[0]
        _, query = engine.ask(prepared, Path(picture).read_bytes(), caption, ["<b>cat</b>", "dog"])
        scores = prepared.influence.scores_for(query).of_query(0).task
        worst = scores.argsort()[:12]
        gone = torch.zeros(len(scores), dtype=torch.bool).index_fill(0, worst, True)
        influence, encoder = prepared.influence, prepared.model.encoder
        after = query.values(encoder, influence.refit(gone)).item()
        assert after < query.values(encoder, influence.theta).item()

    def test_what_cannot_be_traced_is_said(self, real, picture, tmp_path):
        assert "Give an image" in tracing.trace_own(real, None, "cat", "")
        assert "Give an image" in tracing.trace_own(real, picture, " ", "")
        assert "at least one other class" in tracing.trace_own(real, picture, "cat", "cat\ncat")

    @pytest.mark.parametrize(
        ("content", "words"), [(bomb(12_000), "pixels"), (b"GIF89a<b>", "cannot be traced: ")]
    )
    def test_what_is_no_image_to_be_decoded_is_said(self, real, tmp_path, content, words):
        (tmp_path / "image.png").write_bytes(content)
        said = tracing.trace_own(real, str(tmp_path / "image.png"), "cat", "dog")
        assert 'role="alert"' in said
        assert words in said

    def test_the_bomb_is_one(self):
        image = Image.open(io.BytesIO(bomb(12_000)))
        assert image.size == (12_000, 12_000)
        assert len(bomb(12_000)) < 100_000


class TestMeasure:
    def test_nothing_removed_changes_nothing(self, prepared):
        found = engine.retrain(prepared, set())
        assert found.predicted == 0
        assert found.loss[0] == pytest.approx(found.loss[1])
        assert found.before == pytest.approx(found.after)
        assert "split test" in found.judge

    def test_the_prediction_is_that_of_the_group(self, prepared):
        gone = set(prepared.influence.rows.positions[:12].tolist())
        members = torch.arange(120) < 12
        expected = prepared.influence.score_group(members).task.item()
        assert engine.retrain(prepared, gone).predicted == pytest.approx(expected)

    def test_it_is_shown_beside_the_truth(self, real):
        shown = what_if.measure(real, 20, "most harmful first")
        assert "without 24 pairs" in " ".join(shown.split())
        assert shown.count("<tr>") == 5

    def test_too_few_rows_left_are_said(self, prepared):
        with pytest.raises(UserError, match="Fewer than two"):
            engine.retrain(prepared, set(range(119)))
