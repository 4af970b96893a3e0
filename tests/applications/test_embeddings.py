"""Audits by embeddings alone: every task works, and as given they say what their model says."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, concatenate_datasets, load_dataset
from huggingface_hub import HfApi, hf_hub_download

import hf_ecif
from hf_ecif.applications.requests import AuditRequest
from hf_ecif.applications.result import Audit
from hf_ecif.config import DetectionConfig, InfluenceConfig
from hf_ecif.errors import UserError
from hf_ecif.influence.model import InfluenceModel
from tests.support import DEMO
from tests.support.commands import Run
from tests.support.embeddings import vectors, write_datacomp
from tests.support.hub.server import HubServer

CONFIG = InfluenceConfig(fit_epochs=1, probes=2, partitions=2, batch_size=32)
QUICK = DetectionConfig(injections=1)
ROWS = 60
OPTIONS = [
    "--fit-epochs",
    "1",
    "--probes",
    "2",
    "--partitions",
    "2",
    "--batch-size",
    "32",
    "--quiet",
]


@pytest.fixture(scope="module")
def model() -> InfluenceModel:
    return InfluenceModel.from_pretrained(DEMO / "model", CONFIG)


@pytest.fixture(scope="module")
def pairs() -> Dataset:
    return load_dataset("parquet", data_files=str(DEMO / "data/test.parquet"), split="train")


@pytest.fixture(scope="module")
def folder(model: InfluenceModel, pairs: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's embeddings as DataComp keeps them, in two shards, and others as a query."""
    root = tmp_path_factory.mktemp("embedded")
    for name, rows in (("train", range(ROWS)), ("query", range(ROWS, 2 * ROWS))):
        write(model, pairs.select(rows), root / name)
    return root


def write(model: InfluenceModel, pairs: Dataset, folder: Path) -> None:
    """Shards of embeddings, with all columns but the picture beside them."""
    embeddings = model.embed_as_given(model.read(pairs))
    table = pairs.remove_columns("image").with_format("arrow")[:]
    folder.mkdir()
    half = len(pairs) // 2
    for number, rows in enumerate((slice(0, half), slice(half, None))):
        image, text = embeddings.image[rows].numpy(), embeddings.text[rows].numpy()
        np.savez(folder / f"{number}.npz", l14_img=image, l14_txt=text)
        part = table.slice(rows.start, len(image)).replace_schema_metadata(None)
        pq.write_table(part, folder / f"{number}.parquet")


@pytest.fixture(scope="module")
def audited(model: InfluenceModel, folder: Path) -> Audit:
    return hf_ecif.audit(
        embeddings=folder / "train",
        query=folder / "query",
        logit_scale=model.encoder.scale,
        config=CONFIG,
        detection=QUICK,
    )


class TestAudit:
    def test_as_given_it_says_what_the_model_says(
        self, model: InfluenceModel, pairs: Dataset, audited: Audit
    ) -> None:
        image, text, *_ = model.embed_as_given(model.read(pairs.select(range(ROWS))))
        expected = (image * text).sum(dim=1)
        np.testing.assert_allclose(audited.dataset["clip_score"][:], expected, rtol=1e-5, atol=1e-6)

    def test_rows_keep_their_columns(self, pairs: Dataset, audited: Audit) -> None:
        assert audited.dataset["text"][:] == pairs["text"][:ROWS]
        assert audited.dataset["emoji"][:] == pairs["emoji"][:ROWS]
        assert audited.summary.rows == audited.summary.scored == ROWS
        assert audited.summary.reading.format == "embeddings"
        assert audited.summary.columns.image == "embedding"

    def test_report_shows_captions_and_rows_in_place_of_pictures(
        self, pairs: Dataset, audited: Audit
    ) -> None:
        page = audited.report().html
        assert "no picture: row" in page
        assert "of 0.npz" in page
        assert "file not found" not in page

    def test_saved_without_the_folders_of_this_machine(
        self, audited: Audit, tmp_path: Path
    ) -> None:
        audited.save(tmp_path / "out")
        parts = [
            load_dataset(str(tmp_path / "out" / part), split="train")
            for part in ("kept", "removed")
            if any((tmp_path / "out" / part).glob("*.parquet"))
        ]
        kept = concatenate_datasets([part for part in parts if len(part)])
        assert sorted(kept["text"]) == sorted(audited.dataset["text"])
        assert {cell.partition("#")[0] for cell in kept["embedding"]} == {"0.npz", "1.npz"}
        loaded = hf_ecif.load_audit(tmp_path / "out")
        assert loaded.summary.flagged == audited.summary.flagged
        assert "no picture: row" in loaded.report().html

    def test_rows_that_hold_nothing_have_a_reason(self, tmp_path: Path) -> None:
        images, texts = vectors(40, 8)
        images[3], texts[5, 2], images[7, 0] = 0, np.nan, np.inf
        audit = hf_ecif.audit(
            embeddings=write_datacomp(tmp_path / "e", [(images, texts)]),
            config=CONFIG,
            detection=QUICK,
        )
        reasons = audit.dataset["ecif_reason"][:]
        assert reasons[3] == "embedding of the image is zero"
        assert reasons[5] == "embedding of the text holds NaN or infinite values"
        assert reasons[7] == "embedding of the image holds NaN or infinite values"
        assert audit.summary.unreadable == 3
        assert audit.summary.scored == 37

    def test_arguments_that_contradict_each_other(self, folder: Path, pairs: Dataset) -> None:
        train = folder / "train"
        for wrong, words in (
            ({"model": DEMO / "model"}, "take the place of `model` and `dataset`"),
            ({"dataset": pairs}, "take the place of `model` and `dataset`"),
            ({"query": pairs}, "`query` names a file or a folder of embeddings, too"),
            ({"logit_scale": -1.0}, "must be positive"),
            ({"embeddings_key": "b32"}, r"no embeddings 'b32'.*one of: l14"),
            ({"vocabulary": ["a cat"]}, "cannot be compared with embeddings alone"),
        ):
            with pytest.raises(UserError, match=words):
                hf_ecif.audit(embeddings=train, config=CONFIG, detection=QUICK, **wrong)
        with pytest.raises(UserError, match=r"`logit_scale=1.0` means nothing without"):
            AuditRequest(model="a", dataset="b", logit_scale=1.0, output=Path("c"))
        with pytest.raises(UserError, match=r"`model` and `dataset` are missing"):
            hf_ecif.audit()


class TestOtherTasks:
    @pytest.mark.slow
    def test_clean_with_a_test(
        self, run: Run, audited: Audit, folder: Path, tmp_path: Path
    ) -> None:
        """The projections are fine-tuned on the embeddings of the rows before and after."""
        audited.save(tmp_path / "out")
        status, output = run(
            *("clean", tmp_path / "out", "--output", tmp_path / "clean", "--repeats", 1, "--quiet"),
            *("--strategy", "weight", "--test", folder / "query"),
        )
        assert (status, "Traceback" in output) == (0, False), output
        assert "R@1" in output or "text" in output
        kept = load_dataset(str(tmp_path / "clean/kept"), split="train")
        assert len(kept) == ROWS
        assert "/" not in kept[0]["embedding"].partition("#")[0]

    def test_published_without_pictures_and_folders(
        self, hub: HubServer, audited: Audit, folder: Path
    ) -> None:
        audited.push_to_hub("ann/embedded", private=True)
        rows = load_dataset("ann/embedded", split="train")
        assert set(rows["text"]) <= set(audited.dataset["text"])
        assert rows[0]["embedding"].startswith("0.npz#l14_img/")
        files = {file.rfilename for file in HfApi().dataset_info("ann/embedded").siblings}
        for name in sorted(files):
            content = Path(hf_hub_download("ann/embedded", name, repo_type="dataset")).read_bytes()
            assert str(folder).encode() not in content

    def test_fit_and_score_other_rows(
        self, run: Run, folder: Path, tmp_path: Path, audited: Audit
    ) -> None:
        fit = tmp_path / "fit"
        status, output = run("fit", "--embeddings", folder / "train", "--output", fit, *OPTIONS)
        assert status == 0, output
        status, output = run(
            *("score", fit, "--dataset", folder / "query", "--output", tmp_path / "s", "--quiet")
        )
        assert status == 0, output
        scored = load_dataset(str(tmp_path / "s/scored"), split="train")
        assert len(scored) == ROWS
        assert all(np.isfinite(scored["ecif_score"][:]))

    @pytest.mark.parametrize(
        "command",
        [
            ("value", "--slice-column", "category"),
            ("trace", "--most", 3),
        ],
    )
    def test_value_and_trace(
        self, run: Run, folder: Path, tmp_path: Path, command: tuple[object, ...]
    ) -> None:
        given = ("--embeddings", folder / "train", "--query", folder / "query")
        status, output = run(*command, *given, "--output", tmp_path / "out", *OPTIONS)
        assert status == 0, output
        (page,) = (tmp_path / "out").glob("*.html")
        assert "no picture: row" in page.read_text()


@pytest.mark.slow
def test_demo_by_its_embeddings_is_ranked_alike(
    model: InfluenceModel, pairs: Dataset, audited: Audit, quick: Callable[..., Audit]
) -> None:
    """Two projections of 64 x 64 after the embeddings, in place of two of 128 x 64 before them."""
    by_pictures = quick(pairs.select(range(ROWS)), pairs.select(range(ROWS, 2 * ROWS)))
    left = np.array(by_pictures.dataset["ecif_score"][:])
    right = np.array(audited.dataset["ecif_score"][:])
    assert np.corrcoef(left.argsort().argsort(), right.argsort().argsort())[0, 1] > 0.6


@pytest.fixture
def quick(model: InfluenceModel) -> Callable[..., Audit]:
    return lambda rows, query: hf_ecif.audit(model, rows, query, detection=QUICK)
