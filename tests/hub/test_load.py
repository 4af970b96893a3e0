"""Rows and their errors from everywhere on the Hub, with the unmodified clients."""

import logging
from pathlib import Path

import pytest
from datasets import Image, load_dataset
from huggingface_hub import HfApi

from hf_ecif import InfluenceModel
from hf_ecif.data.images import image_bytes
from hf_ecif.data.loading import Source, find_rows, load_rows, load_splits, stream_rows
from hf_ecif.errors import UserError
from hf_ecif.models.load import load_model
from hf_ecif.utils.hub_errors import explain_hub_error, is_transient
from hf_ecif.utils.hub_paths import HubPath, parse_hub_path, parse_model_path, public_name
from tests.support.formats import CAPTIONS, img2dataset
from tests.support.hub.audits import picture, rows, write_source
from tests.support.hub.server import ANN_READ_ONLY, BOB, HubServer

REPO = "ann/birds"


@pytest.fixture
def birds(hub: HubServer, api: HfApi, tmp_path: Path) -> HubServer:
    """A repository with splits, a folder inside, and a tag before its last commit."""
    source = write_source(tmp_path / "birds")
    (source / "more").mkdir()
    rows(2, 300).to_parquet(source / "more" / "train.parquet")
    api.create_repo(REPO, repo_type="dataset")
    api.upload_folder(folder_path=source, repo_id=REPO, repo_type="dataset")
    api.create_tag(REPO, tag="v1", repo_type="dataset")
    rows(5, 500).to_parquet(source / "train.parquet")
    (source / "README.md").write_text("No metadata.\n")
    api.upload_folder(folder_path=source, repo_id=REPO, repo_type="dataset")
    return hub


class TestPlaces:
    @pytest.mark.parametrize(
        ("source", "first", "count"),
        [
            (f"{REPO}@v1", 0, 12),
            (f"hf://datasets/{REPO}@v1", 0, 12),
            (f"hf://datasets/{REPO}@v1/train.parquet", 0, 12),
            (f"hf://datasets/{REPO}/train.parquet", 500, 5),
            (f"hf://datasets/{REPO}/more", 300, 2),
            (f"hf://datasets/{REPO}@main/more/train.parquet", 300, 2),
        ],
    )
    def test_rows(self, birds, source, first, count):
        loaded = load_rows(source, "train").cast_column("image", Image(decode=False))
        assert loaded["text"][:] == [f"bird number {first + row}" for row in range(count)]
        assert image_bytes(loaded[1]["image"]) == picture(first + 1)

    def test_stream(self, birds):
        stream = stream_rows(Source(f"{REPO}@v1", "train")).cast_column(
            "image", Image(decode=False)
        )
        rows = list(stream)
        assert [row["text"] for row in rows] == [f"bird number {row}" for row in range(12)]
        assert image_bytes(rows[1]["image"]) == picture(1)

    def test_stream_of_a_missing_split(self, birds):
        with pytest.raises(UserError, match="dev"):
            stream_rows(Source(REPO, "dev"))

    def test_all_splits(self, birds):
        splits = load_splits(f"{REPO}@v1")
        assert {name: len(data) for name, data in splits.items()} == {
            "train": 12,
            "validation": 4,
            "test": 3,
        }

    def test_pull_request(self, birds, api, tmp_path):
        rows(1, 700).to_parquet(tmp_path / "train.parquet")
        api.upload_file(
            path_or_fileobj=tmp_path / "train.parquet",
            path_in_repo="more/train.parquet",
            repo_id=REPO,
            repo_type="dataset",
            create_pr=True,
        )
        source = f"hf://datasets/{REPO}@refs/pr/1/more"
        assert load_rows(source, "train")["text"][:] == ["bird number 700"]

    @pytest.mark.parametrize(
        ("source", "place"),
        [
            ("a/b", HubPath("a/b", None, "")),
            ("a/b@refs/pr/3", HubPath("a/b", "refs/pr/3", "")),
            ("hf://datasets/a/b", HubPath("a/b", None, "")),
            ("hf://datasets/a/b/", HubPath("a/b", None, "")),
            (
                "hf://datasets/a/b@refs%2Fpr%2F3/x/y.parquet",
                HubPath("a/b", "refs/pr/3", "x/y.parquet"),
            ),
            (
                "hf://datasets/a/b@refs/convert/parquet/x",
                HubPath("a/b", "refs/convert/parquet", "x"),
            ),
            ("hf://a/b", None),
            ("hf://buckets/a/b", None),
            ("hf://datasets/a", None),
            ("one", None),
            ("a/b/c", None),
            ("/a/b", None),
        ],
    )
    def test_names(self, source, place):
        assert parse_hub_path(source) == place

    def test_what_lies_on_disk_goes_first(self, tmp_path, monkeypatch):
        (tmp_path / "a" / "b").mkdir(parents=True)
        monkeypatch.chdir(tmp_path)
        assert parse_hub_path("a/b") is None
        assert public_name("a/b") == "b"

    @pytest.mark.parametrize("name", ["./a", "../a/b", "/no/a", "~/no", "a/b/c", "here/b"])
    def test_what_can_only_be_a_path_is_not_looked_for(self, hub, tmp_path, monkeypatch, name):
        (tmp_path / "here").mkdir()
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError, match="no such file or folder"):
            load_rows(name, "train")
        with pytest.raises(UserError, match="no such folder"):
            load_model(name)
        assert hub.requests == []

    def test_a_scheme_names_the_hub_beside_a_folder_of_that_name(self, tmp_path, monkeypatch):
        (tmp_path / "ann").mkdir()
        monkeypatch.chdir(tmp_path)
        assert parse_hub_path("hf://datasets/ann/birds").repo_id == "ann/birds"
        assert parse_model_path("hf://ann/clip").repo_id == "ann/clip"


class TestErrors:
    def test_missing_repository(self, hub):
        with pytest.raises(UserError, match=r"ann/nothing: .*no such repository.*hf auth login"):
            load_rows("ann/nothing", "train")

    def test_missing_revision(self, birds):
        with pytest.raises(UserError, match=r"has no such revision"):
            load_rows(f"{REPO}@v9", "train")

    def test_missing_path(self, birds):
        with pytest.raises(UserError, match=r"hf://datasets/ann/birds/no\.parquet: .*no\.parquet"):
            load_rows(f"hf://datasets/{REPO}/no.parquet", "train")

    def test_missing_split(self, birds):
        with pytest.raises(UserError, match="no split 'dev'"):
            load_rows(f"{REPO}@v1", "dev")

    def test_private(self, hub, api, tmp_path, monkeypatch):
        rows(2).to_parquet(tmp_path / "train.parquet")
        api.create_repo(REPO, repo_type="dataset", private=True)
        api.upload_folder(folder_path=tmp_path, repo_id=REPO, repo_type="dataset")
        monkeypatch.setenv("HF_TOKEN", ANN_READ_ONLY)
        assert len(load_rows(REPO, "train")) == 2
        assert len(load_rows(f"hf://datasets/{REPO}/train.parquet", "train")) == 2
        monkeypatch.delenv("HF_TOKEN")
        login = tmp_path / "token"  # as `hf auth login` keeps it
        monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(login))
        login.write_text(ANN_READ_ONLY)
        assert len(load_rows(REPO, "train")) == 2
        login.unlink()
        for token in (BOB, None):
            if token is None:
                monkeypatch.delenv("HF_TOKEN", raising=False)
            else:
                monkeypatch.setenv("HF_TOKEN", token)
            with pytest.raises(UserError, match="private and not yours to see") as error:
                load_rows(REPO, "train")
            assert "hf_" not in str(error.value).replace("hf_ecif", "")

    def test_model(self, hub):
        with pytest.raises(UserError, match="ann/nothing"):
            InfluenceModel.from_pretrained("ann/nothing")


class TestNoNetwork:
    def test_the_copy_of_an_earlier_run_does_and_this_is_said(self, birds, caplog, monkeypatch):
        before = load_rows(f"{REPO}@v1", "train")["text"][:]
        _disconnect(monkeypatch)
        with caplog.at_level(logging.WARNING):
            assert load_rows(f"{REPO}@v1", "train")["text"][:] == before
        said = [
            record.message for record in caplog.records if record.name == "hf_ecif.data.readers.hub"
        ]
        assert len(said) == 1
        assert "Looking for a copy from an earlier run" in said[0]
        assert "'v1'" in said[0]

    def test_of_several_copies_the_default_one_is_taken(self, birds, monkeypatch):
        for config in ("default", "extra"):  # both of one commit
            load_dataset(REPO, config, revision="v1")
        _disconnect(monkeypatch)
        assert len(load_rows(f"{REPO}@v1", "train")) == 12

    def test_without_a_copy(self, birds, monkeypatch):
        _disconnect(monkeypatch)
        with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set|cannot be reached"):
            load_rows(f"{REPO}@v1", "train")

    def test_cut_connection(self, birds):
        birds.fail("info", kind="cut", times=1000)
        birds.fail("resolve", kind="cut", times=1000)
        try:
            with pytest.raises(UserError, match="cannot be reached"):
                load_rows(f"{REPO}@v1", "train")
        finally:
            birds._failures.clear()


class TestExplain:
    def test_errors_of_others_are_not_explained(self):
        assert explain_hub_error(KeyError("x")) is None

    @pytest.mark.parametrize(
        ("kind", "words"), [("500", "problem of its own"), ("429", "number of requests")]
    )
    def test_status(self, hub, api, kind, words):
        hub.fail("info", kind=kind)
        with pytest.raises(Exception) as error:  # noqa: PT011  # of the client's own kind
            api.dataset_info(REPO)
        assert words in (explain_hub_error(error.value) or "")
        assert is_transient(error.value)

    def test_refusal(self, hub, api):
        with pytest.raises(Exception) as error:  # noqa: PT011  # of the client's own kind
            api.create_repo("bob/x", repo_type="dataset")
        explained = explain_hub_error(error.value) or ""
        assert "the repository is not yours" in explained
        assert hub.url not in explained
        assert not is_transient(error.value)


def _disconnect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


class TestTars:
    """A repository as img2dataset leaves a folder: tars with their tables beside them."""

    @pytest.fixture
    def tars(self, hub: HubServer, api: HfApi, tmp_path: Path) -> str:
        img2dataset(tmp_path / "tars")
        api.create_repo("ann/tars", repo_type="dataset")
        api.upload_folder(folder_path=tmp_path / "tars", repo_id="ann/tars", repo_type="dataset")
        return "ann/tars"

    @pytest.mark.parametrize(
        "place",
        ["{}", "hf://datasets/{}/00001.tar", "hf://datasets/{}/{{00000..00001}}.tar"],
    )
    def test_the_tars_are_the_data(self, tars: str, place: str) -> None:
        found = find_rows(Source(place.format(tars)))
        assert found.format == "webdataset"
        assert len(found.rows) == (3 if "00001.tar" in place and "{{" not in place else 6)
        assert found.rows.column_names[:3] == ["jpg", "txt", "json"]

    def test_as_a_stream(self, tars: str) -> None:
        rows = list(stream_rows(Source(tars)))
        assert [row["txt"] for row in rows] == CAPTIONS

    def test_the_first_rows_are_read_without_the_rest(self, tars: str, hub: HubServer) -> None:
        found = find_rows(Source(tars, limit=2))
        assert found.rows["txt"][:] == CAPTIONS[:2]
