"""The clients that people use, unmodified, against the Hub of the tests."""

import io
import json
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Image, Value, load_dataset
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    constants,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_session, httpx
from PIL import Image as PILImage
from transformers import CLIPModel

from tests.support.hub import HUB
from tests.support.hub.server import ANN, ANN_READ_ONLY, BOB, HubServer

DATA = "ann/data"
HELLO = b"hello\n"
HELLO_OID = "ce013625030ba8dba906f756967f9e9ca394464a"  # git hash-object
LARGE = bytes(range(256)) * 20


@pytest.fixture
def data(api: HfApi) -> str:
    """A dataset repository with a small file, and a large one in a folder."""
    api.create_repo(DATA, repo_type="dataset")
    add(api, {"hello.txt": HELLO, "shards/0.parquet": LARGE})
    return DATA


def add(api: HfApi, files: dict[str, bytes], repo_type: str = "dataset", **options):
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    options = {"commit_message": "add", **options}
    return api.create_commit(DATA, operations, repo_type=repo_type, **options)


def asked(hub: HubServer, route: str) -> list[str]:
    """The methods of all requests to a route."""
    return [seen.method for seen in hub.requests if seen.route == route]


def stored(hub: HubServer, **options) -> dict[str, bytes]:
    """The files, without the one that each repository starts with."""
    files = hub.files(DATA, **options)
    assert b"*.parquet filter=lfs" in files.pop(".gitattributes")
    return files


class TestReach:
    def test_other_tests_are_offline(self):
        assert constants.ENDPOINT == datasets.config.HF_ENDPOINT == HUB.url
        with pytest.raises(OfflineModeIsEnabled):
            HfApi().whoami(token=ANN)

    def test_no_other_host(self, hub):
        with pytest.raises(httpx.ConnectError):
            get_session().get("https://huggingface.co/api/whoami-v2")

    def test_other_process(self, hub):
        code = "from huggingface_hub import HfApi; print(HfApi().whoami()['name'])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (done.stdout, done.returncode) == ("ann\n", 0)
        assert [(seen.route, seen.user, seen.status) for seen in hub.requests] == [
            ("whoami", "ann", 200)
        ]

    def test_each_test_starts_empty(self, hub, data):
        hub.fail("info", kind="500")
        hub.reset()
        with pytest.raises(KeyError):
            hub.files(DATA)
        assert not HfApi().repo_exists(DATA, repo_type="dataset")


class TestRepositories:
    @pytest.mark.parametrize("repo_type", ["model", "dataset", "space"])
    def test_life(self, hub, api, repo_type):
        sdk = {"space_sdk": "gradio"} if repo_type == "space" else {}
        url = api.create_repo(DATA, repo_type=repo_type, private=True, **sdk)
        assert (url.repo_id, url.repo_type) == (DATA, repo_type)
        made = add(api, {"hello.txt": HELLO, "weights.safetensors": LARGE}, repo_type)
        assert stored(hub, repo_type=repo_type) == {
            "hello.txt": HELLO,
            "weights.safetensors": LARGE,
        }
        assert made.repo_url.repo_id == DATA
        info = api.repo_info(DATA, repo_type=repo_type, files_metadata=True)
        assert (info.sha, info.private, info.author) == (made.oid, True, "ann")
        assert [(f.rfilename, f.size, bool(f.lfs)) for f in info.siblings[1:]] == [
            ("hello.txt", 6, False),
            ("weights.safetensors", len(LARGE), True),
        ]
        path = hf_hub_download(DATA, "weights.safetensors", repo_type=repo_type)
        assert Path(path).read_bytes() == LARGE
        api.delete_repo(DATA, repo_type=repo_type)
        assert not api.repo_exists(DATA, repo_type=repo_type)

    def test_create_twice(self, api, data):
        assert api.create_repo(data, repo_type="dataset", exist_ok=True).repo_id == data
        with pytest.raises(HfHubHTTPError, match="409"):
            api.create_repo(data, repo_type="dataset")

    def test_name_without_user_is_missing(self, api):
        assert not api.repo_exists("squad", repo_type="dataset")
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download("squad", "README.md", repo_type="dataset")


class TestCommits:
    def test_history(self, hub, api, data):
        parent = api.repo_info(data, repo_type="dataset").sha
        operations = [
            CommitOperationDelete("shards/"),
            CommitOperationDelete("hello.txt"),
            CommitOperationAdd("new.txt", b"new"),
        ]
        made = api.create_commit(
            data,
            operations,
            commit_message="Title",
            commit_description="Why",
            repo_type="dataset",
            parent_commit=parent,
        )
        assert stored(hub) == {"new.txt": b"new"}
        assert stored(hub, revision=parent) == {"hello.txt": HELLO, "shards/0.parquet": LARGE}
        newest = api.list_repo_commits(data, repo_type="dataset")
        assert [commit.title for commit in newest] == ["Title", "add", "initial commit"]
        assert (newest[0].commit_id, newest[0].message, newest[0].authors) == (
            made.oid,
            "Why",
            ["ann"],
        )
        assert [commit.id for commit in hub.commits(data)] == [one.commit_id for one in newest]

    def test_stale_parent(self, hub, api, data):
        parent = api.repo_info(data, repo_type="dataset").sha
        add(api, {"first.txt": b"1"}, parent_commit=parent)
        with pytest.raises(HfHubHTTPError, match="412"):
            add(api, {"second.txt": b"2"}, parent_commit=parent)
        assert "second.txt" not in stored(hub)

    def test_same_content_is_sent_and_committed_once(self, hub, api, data):
        before = hub.commits(data)
        add(api, {"hello.txt": HELLO, "shards/0.parquet": LARGE})
        add(api, {"copy.parquet": LARGE})
        assert len(hub.commits(data)) == len(before) + 1
        assert len(asked(hub, "lfs_put")) == 1

    def test_deleting_what_is_not_there(self, hub, api, data):
        with pytest.raises(EntryNotFoundError):
            api.delete_file("none.txt", data, repo_type="dataset")
        assert len(hub.commits(data)) == 2

    def test_large_file_must_be_what_was_announced(self, hub, api, data):
        body = {"objects": [{"oid": "0" * 64, "size": 3}], "operation": "upload"}
        url = f"{hub.url}/datasets/{data}.git/info/lfs/objects/batch"
        token = {"authorization": f"Bearer {ANN}"}
        answer = get_session().post(url, json=body, headers=token).json()
        upload = answer["objects"][0]["actions"]["upload"]["href"]
        assert get_session().put(upload, content=b"abc").status_code == 400

    def test_large_file_must_have_come(self, hub, data):
        large = {"path": "1.parquet", "algo": "sha256", "oid": "0" * 64, "size": 3}
        lines = [
            {"key": "header", "value": {"summary": "x", "description": ""}},
            {"key": "lfsFile", "value": large},
        ]
        body = "".join(json.dumps(line) + "\n" for line in lines)
        url = f"{hub.url}/api/datasets/{data}/commit/main"
        token = {"authorization": f"Bearer {ANN}"}
        answer = get_session().post(url, content=body, headers=token)
        assert answer.status_code == 400
        assert "does not exist" in answer.json()["error"]
        assert "1.parquet" not in stored(hub)

    def test_bad_card(self, api, data):
        with pytest.raises(ValueError, match="Invalid metadata"):
            add(api, {"README.md": b"---\nlicense: [\n---\n"})

    def test_upload_folder(self, hub, api, data, tmp_path):
        (tmp_path / "deep" / "er").mkdir(parents=True)
        (tmp_path / "deep" / "er" / "image.png").write_bytes(LARGE)
        (tmp_path / "empty.txt").touch()
        options = {"folder_path": tmp_path, "repo_type": "dataset"}
        api.upload_folder(repo_id=data, delete_patterns="*.parquet", **options)
        assert stored(hub) == {
            "hello.txt": HELLO,
            "deep/er/image.png": LARGE,
            "empty.txt": b"",
        }
        checked = api.verify_repo_checksums(data, repo_type="dataset", local_dir=tmp_path)
        assert not checked.mismatches
        assert checked.checked_count == 2


class TestRevisions:
    def test_branches_and_tags(self, hub, api, data):
        api.create_branch(data, branch="feature/x", repo_type="dataset")
        add(api, {"hello.txt": b"changed"}, revision="feature/x")
        api.create_tag(data, tag="v1", revision="feature/x", repo_type="dataset")
        api.delete_branch(data, branch="feature/x", repo_type="dataset")
        refs = api.list_repo_refs(data, repo_type="dataset")
        assert [ref.name for ref in refs.branches] == ["main"]
        assert [(ref.name, ref.ref) for ref in refs.tags] == [("v1", "refs/tags/v1")]
        path = hf_hub_download(data, "hello.txt", repo_type="dataset", revision="v1")
        assert Path(path).read_bytes() == stored(hub, revision="v1")["hello.txt"] == b"changed"
        assert stored(hub)["hello.txt"] == HELLO
        with pytest.raises(BadRequestError, match="not a branch"):
            add(api, {"hello.txt": b"again"}, revision="v1")
        with pytest.raises(HfHubHTTPError, match="409"):
            api.create_branch(data, branch="main", repo_type="dataset")

    def test_pull_request(self, hub, api, data):
        made = add(api, {"hello.txt": b"better"}, create_pr=True, commit_message="Better")
        assert (made.pr_num, made.pr_revision) == (1, "refs/pr/1")
        assert stored(hub)["hello.txt"] == HELLO
        add(api, {"more.txt": b"more"}, revision="refs/pr/1")
        add(api, {"other.txt": b"other"})
        fs = HfFileSystem()
        assert fs.cat_file(f"datasets/{data}@refs/pr/1/hello.txt") == b"better"
        path = snapshot_download(data, repo_type="dataset", revision="refs/pr/1")
        assert (Path(path) / "more.txt").read_bytes() == b"more"
        api.merge_pull_request(data, 1, repo_type="dataset")
        assert {"hello.txt": b"better", "more.txt": b"more", "other.txt": b"other"}.items() <= (
            stored(hub).items()
        )
        details = api.get_discussion_details(data, 1, repo_type="dataset")
        assert (details.status, details.title) == ("merged", "Better")
        assert details.merge_commit_oid == hub.commits(data)[0].id
        assert [event.type for event in details.events] == [
            *("comment", "commit", "commit", "status-change"),
        ]

    def test_conflict(self, api, data):
        add(api, {"hello.txt": b"theirs"}, create_pr=True)
        add(api, {"hello.txt": b"ours"})
        details = api.get_discussion_details(data, 1, repo_type="dataset")
        assert details.conflicting_files == ["hello.txt"]
        with pytest.raises(HfHubHTTPError, match="409"):
            api.merge_pull_request(data, 1, repo_type="dataset")

    def test_discussions(self, api, data):
        api.create_discussion(data, "A question", repo_type="dataset", description="Why?")
        pull = api.create_pull_request(data, "A change", repo_type="dataset")
        assert (pull.num, pull.status, pull.git_reference) == (2, "draft", "refs/pr/2")
        api.comment_discussion(data, 1, "Because.", repo_type="dataset")
        api.change_discussion_status(data, 1, "closed", repo_type="dataset")
        comments = api.get_discussion_details(data, 1, repo_type="dataset").events[:2]
        assert [event.content for event in comments] == ["Why?", "Because."]
        everything = list(api.get_repo_discussions(data, repo_type="dataset"))
        assert [(one.num, one.status) for one in everything] == [(2, "draft"), (1, "closed")]
        pulls = {"discussion_type": "pull_request", "discussion_status": "open"}
        (only,) = api.get_repo_discussions(data, repo_type="dataset", **pulls)
        assert (only.num, only.is_pull_request) == (2, True)


class TestReading:
    def test_odd_names(self, hub, api, data):
        name = "a b/ü#%25?&+.txt"
        add(api, {name: b"odd"})
        path = hf_hub_download(data, name, repo_type="dataset")
        assert Path(path).read_bytes() == stored(hub)[name] == b"odd"
        assert HfFileSystem().ls(f"datasets/{data}/a b", detail=False) == [
            f"datasets/{data}/{name}"
        ]
        (info,) = api.get_paths_info(data, [name, "none"], repo_type="dataset")
        assert info.path == name

    def test_listing(self, api, data):
        entries = api.list_repo_tree(data, repo_type="dataset", recursive=True, expand=True)
        rows = {entry.path: entry for entry in entries}
        assert list(rows) == [".gitattributes", "hello.txt", "shards", "shards/0.parquet"]
        assert rows["hello.txt"].blob_id == HELLO_OID
        assert rows["shards/0.parquet"].lfs.size == len(LARGE)
        assert rows["shards"].last_commit.title == rows["hello.txt"].last_commit.title == "add"
        assert rows[".gitattributes"].last_commit.title == "initial commit"

    def test_cache(self, hub, data):
        first = hf_hub_download(data, "hello.txt", repo_type="dataset")
        hub.requests.clear()
        assert hf_hub_download(data, "hello.txt", repo_type="dataset") == first
        assert [seen.method for seen in hub.requests] == ["HEAD"]
        sha = hub.commits(data)[0].id
        assert hf_hub_download(data, "hello.txt", repo_type="dataset", revision=sha) == first
        assert len(hub.requests) == 1

    def test_missing(self, api, data):
        with pytest.raises(EntryNotFoundError):
            hf_hub_download(data, "none.txt", repo_type="dataset")
        with pytest.raises(RevisionNotFoundError):
            hf_hub_download(data, "hello.txt", repo_type="dataset", revision="none")
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download("ann/none", "hello.txt", repo_type="dataset")

    def test_file_system(self, hub, data):
        fs = HfFileSystem()
        assert fs.ls(f"datasets/{data}/shards", detail=False) == [
            f"datasets/{data}/shards/0.parquet"
        ]
        with fs.open(f"datasets/{data}/shards/0.parquet", block_size=64) as file:
            file.seek(1000)
            assert file.read(50) == LARGE[1000:1050]
        ranged = [seen.status for seen in hub.requests if seen.route == "resolve"]
        assert ranged
        assert set(ranged) == {206}
        with fs.open(f"datasets/{data}/written.txt", "wb") as file:
            file.write(b"through the file system")
        assert stored(hub)["written.txt"] == b"through the file system"


class TestDatasets:
    def test_two_configs_with_images(self, hub):
        red, noise = png(np.full((4, 4, 3), [255, 0, 0])), png(np.arange(48).reshape(4, 4, 3))
        features = Features({"image": Image(), "text": Value("string")})
        for config, captions in {"default": ["a", "b"], "removed": ["c", "d"]}.items():
            cells = [{"bytes": red, "path": None}, {"bytes": noise, "path": None}]
            rows = Dataset.from_dict({"image": cells, "text": captions}, features=features)
            rows.push_to_hub(DATA, config_name=config)
        for config, captions in {"default": ["a", "b"], "removed": ["c", "d"]}.items():
            for streaming in (False, True):
                loaded = load_dataset(DATA, config, split="train", streaming=streaming)
                assert loaded.features == features
                read = list(loaded.cast_column("image", Image(decode=False)))
                assert [row["text"] for row in read] == captions
                assert [row["image"]["bytes"] for row in read] == [red, noise]
        assert not [s for s in hub.requests if ANN in s.url or ANN.encode() in s.body]

    def test_pull_request(self, hub, data):
        Dataset.from_dict({"a": [1, 2]}).push_to_hub("ann/numbers")
        Dataset.from_dict({"a": [3]}).push_to_hub("ann/numbers", create_pr=True)
        assert load_dataset("ann/numbers", split="train")["a"][:] == [1, 2]
        changed = load_dataset("ann/numbers", split="train", revision="refs/pr/1")
        assert changed["a"][:] == [3]

    def test_private(self, hub):
        Dataset.from_dict({"a": [1]}).push_to_hub("ann/secret", private=True)
        with pytest.raises(datasets.exceptions.DatasetNotFoundError):
            load_dataset("ann/secret", split="train", token=BOB)
        assert load_dataset("ann/secret", split="train")["a"][:] == [1]


def test_model(hub, tiny_clip, tmp_path):
    tiny_clip.push_to_hub("ann/clip")
    assert {"config.json", "model.safetensors"} <= hub.files("ann/clip", "model").keys()
    loaded = CLIPModel.from_pretrained("ann/clip", dtype=torch.float64)
    assert {name: value.tolist() for name, value in loaded.state_dict().items()} == {
        name: value.tolist() for name, value in tiny_clip.state_dict().items()
    }


class TestAccess:
    def test_private(self, api):
        api.create_repo(DATA, repo_type="dataset", private=True)
        add(api, {"hello.txt": HELLO})
        assert api.auth_check(DATA, repo_type="dataset", token=ANN_READ_ONLY) is None
        for token, status in ((BOB, 404), (False, 401)):
            with pytest.raises(RepositoryNotFoundError) as error:
                api.repo_info(DATA, repo_type="dataset", token=token)
            assert error.value.response.status_code == status
            with pytest.raises(RepositoryNotFoundError):
                hf_hub_download(DATA, "hello.txt", repo_type="dataset", token=token)

    @pytest.mark.parametrize(("token", "status"), [(ANN_READ_ONLY, 403), (BOB, 403), (False, 401)])
    def test_writing(self, hub, data, token, status):
        refused = HfApi(token=token)
        with pytest.raises(HfHubHTTPError) as error:
            add(refused, {"hello.txt": b"changed"})
        assert error.value.response.status_code == status
        with pytest.raises(HfHubHTTPError):
            refused.create_repo("ann/other", repo_type="dataset")
        assert stored(hub)["hello.txt"] == HELLO

    def test_others_open_pull_requests(self, hub, data):
        made = add(HfApi(token=BOB), {"1.parquet": LARGE[::-1]}, create_pr=True)
        add(HfApi(token=BOB), {"more.txt": b"more"}, revision=made.pr_revision)
        assert hub.commits(data, revision="refs/pr/1")[0].author == "bob"
        assert "1.parquet" not in stored(hub)

    def test_wrong_token(self, api):
        with pytest.raises(HfHubHTTPError, match="Invalid user token"):
            api.whoami(token="hf_unknown")


class TestFailures:
    @pytest.mark.parametrize("kind", ["500", "503", "429"])
    def test_status(self, hub, api, data, kind):
        hub.fail("info", kind=kind)
        with pytest.raises(HfHubHTTPError) as error:
            api.repo_info(data, repo_type="dataset")
        assert str(error.value.response.status_code) == kind
        assert api.repo_info(data, repo_type="dataset").id == data

    def test_cut(self, hub, api, data):
        hub.fail("commit", kind="cut")
        with pytest.raises(httpx.TransportError):
            add(api, {"new.txt": b"new"})
        assert "new.txt" not in stored(hub)

    def test_cut_after(self, hub, api, data):
        hub.fail("commit", kind="cut_after")
        with pytest.raises(httpx.TransportError):
            add(api, {"new.txt": b"new"})
        assert stored(hub)["new.txt"] == b"new"

    def test_stale(self, hub, api, data):
        hub.fail("commit", kind="stale")
        with pytest.raises(HfHubHTTPError, match="412"):
            add(api, {"new.txt": b"new"})

    def test_client_repeats_an_upload(self, hub, api, data):
        hub.fail("lfs_put", kind="cut")
        hub.requests.clear()
        add(api, {"1.parquet": LARGE[::-1]})
        uploads = [seen.status for seen in hub.requests if seen.route == "lfs_put"]
        assert uploads == [0, 200]
        assert stored(hub)["1.parquet"] == LARGE[::-1]

    def test_after_and_times(self, hub, api, data):
        hub.fail("info", kind="500", after=1, times=2)
        hub.fail("info", kind="503")
        hub.requests.clear()
        for _ in range(5):
            try:
                api.repo_info(data, repo_type="dataset")
            except HfHubHTTPError:
                continue
        assert [seen.status for seen in hub.requests] == [200, 500, 500, 503, 200]

    @pytest.mark.parametrize(("route", "kind"), [("none", "500"), ("info", "stale"), ("info", "x")])
    def test_unknown(self, hub, route, kind):
        with pytest.raises(ValueError, match="route"):
            hub.fail(route, kind=kind)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PILImage.fromarray(pixels.astype("uint8")).save(buffer, "png")
    return buffer.getvalue()
