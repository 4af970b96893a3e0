"""What a push leaves on the Hub, seen with the clients that everybody uses."""

import json
import logging
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from datasets import (
    DatasetDict,
    Image,
    Value,
    concatenate_datasets,
    get_dataset_config_names,
    load_dataset,
)
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import httpx
from transformers import CLIPModel

from hf_ecif import InfluenceConfig, push
from hf_ecif.applications.audit import AuditRequest, run_audit
from hf_ecif.applications.clean import CleanRequest, run_clean
from hf_ecif.applications.remove import RemoveRequest, run_remove
from hf_ecif.applications.review import apply_review
from hf_ecif.cli.main import main
from hf_ecif.config import DetectionConfig
from hf_ecif.data.review import Decision, Review
from hf_ecif.errors import UserError
from hf_ecif.hub.commits import Target, publish, retried
from hf_ecif.hub.dataset_repo import CardMaker, DatasetRepo
from hf_ecif.hub.markdown import read_card
from hf_ecif.hub.push import push_model
from tests.support import DEMO
from tests.support.hub.audits import picture, rows, write_audit, write_source
from tests.support.hub.server import ANN, ANN_READ_ONLY, BOB, HubServer

REPO = "ann/birds-clean"
TEXT = (".json", ".html")


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_source(tmp_path_factory.mktemp("source") / "birds")


@pytest.fixture(scope="session")
def audit(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    return write_audit(tmp_path_factory.mktemp("audit"), str(source), report=True)


@pytest.fixture(scope="session")
def other_audit(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    """Of the same source, with nothing to remove and so with fewer files."""
    folder = tmp_path_factory.mktemp("other-audit")
    return write_audit(folder, str(source), flagged=(), unreadable=())


@pytest.fixture(scope="session")
def suggested(tmp_path_factory: pytest.TempPathFactory, source: Path) -> Path:
    """An audit with another caption for one of the flagged rows."""
    folder = tmp_path_factory.mktemp("suggested")
    return write_audit(folder, str(source), suggestions={1: "a crow"}, report=True)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Nobody waits; what would have been waited, in seconds."""
    seconds: list[float] = []
    monkeypatch.setattr(time, "sleep", seconds.append)
    return seconds


def load(config: str = "default", split: str = "train", repo: str = REPO, **options):
    data = load_dataset(repo, config, split=split, **options)
    return data.cast_column("image", Image(decode=False))


def cells(data) -> list[tuple[bytes, str]]:
    return [(row["image"]["bytes"], row["text"]) for row in data]


def everything() -> list[tuple[bytes, str]]:
    return [(picture(row), f"bird number {row}") for row in range(12)]


class TestAudit:
    def test_kept_and_removed_are_the_input(self, hub, audit):
        push(audit, REPO)
        kept, removed = load(), load("removed")
        assert len(kept) == 9
        assert [row["text"] for row in removed] == [f"bird number {n}" for n in (1, 5, 7)]
        assert sorted(cells(kept) + cells(removed)) == sorted(everything())

    def test_removed_rows_tell_why(self, hub, whole):
        publish_to_hub(whole)
        removed = load("removed")
        assert removed["ecif_reason"][:] == ["looks <b>wrong</b>"] * 2 + ["image unreadable"]
        assert removed["ecif_noise_probability"][:] == pytest.approx([0.9, 0.9, None])

    def test_the_card_says_how_to_put_them_together_again(self, hub, whole):
        publish_to_hub(whole)
        text = hub.files(REPO)["README.md"].decode()
        names: dict = {}
        for block in text.split("```python\n")[1:]:
            exec(block.split("```")[0], names)
        assert len(names["kept"]) == 9
        assert len(names["everything"]) == 12

    def test_other_splits_come_along(self, hub, whole):
        publish_to_hub(whole)
        for split, seed, count in (("validation", 100, 4), ("test", 200, 3)):
            data = load(split=split)
            expected = rows(count, seed).cast_column("image", Image(decode=False))
            assert cells(data) == cells(expected)
            assert data["kind"][:] == expected["kind"][:]
            assert data["ecif_score"][:] == [None] * count

    def test_streams(self, hub, whole):
        publish_to_hub(whole)
        assert len(list(load_dataset(REPO, split="train", streaming=True))) == 9
        assert len(list(load_dataset(REPO, "removed", split="train", streaming=True))) == 3

    def test_evidence_comes_along_without_the_folders_of_this_machine(self, hub, audit, source):
        push(audit, REPO)
        files = hub.files(REPO)
        summary = json.loads(files["hf_ecif/summary.json"])
        assert summary["dataset"] == "birds"
        assert summary["query"]["source"] == "birds, split validation"
        assert summary["kept"] + summary["removed"] == summary["rows"] == 12
        assert files["hf_ecif/histogram.png"].startswith(b"\x89PNG")
        assert b"bird number" in files["hf_ecif/report.html"]
        for path, content in files.items():
            assert str(source.parent).encode() not in content, path

    def test_without_removed_rows(self, hub, audit):
        push(audit, REPO, removed=False)
        assert get_dataset_config_names(REPO) == ["default"]
        files = hub.files(REPO)
        assert not any(path.startswith("removed/") for path in files)
        assert "hf_ecif/report.html" not in files  # it shows them
        assert "were not published" in files["README.md"].decode()
        assert "report.html" not in files["README.md"].decode()

    def test_nothing_removed(self, hub, other_audit):
        push(other_audit, REPO)
        assert get_dataset_config_names(REPO) == ["default"]
        assert len(load()) == 12
        assert "no configuration `removed`" in hub.files(REPO)["README.md"].decode()

    def test_many_shards(self, hub, tmp_path):
        data = concatenate_datasets([rows(60, 0), rows(60, 60)])
        folder = write_audit(tmp_path, "gone", data=data)
        kept = folder / "kept"
        shard = next(kept.iterdir())
        load_dataset("parquet", data_files=str(shard), split="train").select(range(50)).to_parquet(
            kept / "data-00000-of-00002.parquet"
        )
        load_dataset("parquet", data_files=str(shard), split="train").select(
            range(50, 117)
        ).to_parquet(kept / "data-00001-of-00002.parquet")
        shard.unlink()
        push(folder, REPO, other_splits=False)
        assert len(load()) == 117

    def test_source_on_the_hub(self, hub, api, tmp_path, source):
        api.create_repo("bob/birds", repo_type="dataset", token=BOB)
        api.upload_folder(folder_path=source, repo_id="bob/birds", repo_type="dataset", token=BOB)
        push(write_audit(tmp_path, "bob/birds"), REPO)
        assert len(load(split="validation")) == 4
        metadata, text = read_card(hub.files(REPO)["README.md"].decode())
        assert metadata["source_datasets"] == ["bob/birds"]
        assert metadata["license"] == "cc-by-4.0"
        assert "Taken by **Kari**." in text


class TestDecisions:
    """What `clean` or a person made of an audit is pushed like the audit."""

    @pytest.mark.parametrize(
        ("strategy", "share", "kept", "says"),
        [
            ("drop", None, 9, "were removed from"),
            ("worst", 0.1, 10, "The 10 % of the pairs that look most misaligned"),
            ("weight", None, 12, "None was removed from"),
            ("relabel", None, 10, "got a caption that fits better"),
        ],
    )
    def test_cleaning(self, hub, suggested, tmp_path, strategy, share, kept, says):
        request = CleanRequest(
            audit=suggested, output=tmp_path / "new", strategy=strategy, share=share
        )
        run_clean(request)
        report = push(tmp_path / "new", REPO)
        assert report.rows["default/train"] == len(load()) == kept
        assert report.rows.get("removed/train", 0) == 12 - kept
        assert len(load(split="test")) == 3
        card = hub.files(REPO)["README.md"].decode()
        assert says in " ".join(card.split())
        assert f"| kept | {kept} |" in card
        assert f"| removed | {12 - kept} |" in card
        summary = json.loads(hub.files(REPO)["hf_ecif/summary.json"])
        assert summary["kept"] + summary["removed"] == summary["rows"]
        assert summary["cleaning"]["strategy"] == strategy
        assert str(suggested).encode() not in hub.files(REPO)["hf_ecif/summary.json"]

    def test_relabelled_rows_keep_their_old_caption(self, hub, suggested, tmp_path):
        run_clean(CleanRequest(audit=suggested, output=tmp_path / "new", strategy="relabel"))
        push(tmp_path / "new", REPO)
        row = load()[1]
        assert (row["text"], row["ecif_original_text"]) == ("a crow", "bird number 1")
        assert load(split="test")["ecif_original_text"][:] == [None] * 3
        card = hub.files(REPO)["README.md"].decode()
        assert "| `ecif_original_text` |" in card
        assert "| … with another caption | 1 |" in card

    def test_review(self, hub, audit, tmp_path):
        review = Review()
        for decision in (
            Decision(0, "remove"),
            Decision(1, "keep"),
            Decision(2, "recaption", "a tit"),
        ):
            review = review.decide(decision)
        apply_review(audit, review, tmp_path / "new")
        push(tmp_path / "new", REPO)
        kept, removed = load(), load("removed")
        assert [row["text"] for row in removed] == [f"bird number {n}" for n in (0, 5, 7)]
        assert kept[1]["text"] == "a tit"
        assert kept[0]["ecif_decision"] == "keep"
        assert len(load(split="validation")) == 4
        card = hub.files(REPO)["README.md"].decode()
        assert "reviewed 3 of them and decided to keep 1, to remove 1 and" in " ".join(card.split())
        for line in ("removed | 3", "… flagged as probably misaligned | 1", "… not flagged | 1"):
            assert f"| {line} |" in card

    def test_cleaning_of_bare_rows_tells_nothing(self, hub, audit, tmp_path):
        shutil.copytree(audit / "scored", tmp_path / "bare" / "scored")
        run_clean(CleanRequest(audit=tmp_path / "bare", output=tmp_path / "new"))
        with pytest.raises(UserError, match="Clean the folder of the audit"):
            push(tmp_path / "new", REPO)


class TestTarget:
    def test_private(self, hub, api, audit):
        push(audit, REPO, private=True)
        assert api.dataset_info(REPO).private
        assert len(load()) == 9
        with pytest.raises(Exception, match=r"doesn't exist|not found|401|404"):
            HfApi(token=BOB).dataset_info(REPO)

    def test_private_refuses_a_public_repository(self, hub, api, audit):
        api.create_repo(REPO, repo_type="dataset")
        with pytest.raises(UserError, match="is public"):
            push(audit, REPO, private=True)
        assert list(hub.files(REPO)) == [".gitattributes"]

    def test_branch(self, hub, audit):
        report = push(audit, REPO, revision="cleaner", other_splits=False)
        assert report.url.endswith(f"{REPO}/tree/cleaner")
        assert list(hub.files(REPO)) == [".gitattributes"]
        assert len(load(revision="cleaner")) == 9

    def test_pull_request(self, hub, api, audit, other_audit):
        push(other_audit, REPO)
        report = push(audit, REPO, create_pr=True)
        assert report.url == f"{hub.url}/datasets/{REPO}/discussions/1"
        assert len(load()) == 12
        assert len(load(revision="refs/pr/1")) == 9
        api.merge_pull_request(REPO, 1, repo_type="dataset")
        assert sorted(cells(load()) + cells(load("removed"))) == sorted(everything())

    def test_pull_request_to_others(self, hub, contents, earlier):
        publish_to_hub(earlier)
        files = hub.files(REPO)
        api, target = HfApi(token=BOB), Target(REPO, "dataset", create_pr=True)
        done = publish(api, target, *contents, message="Clean")
        assert done.pull_request == f"{hub.url}/datasets/{REPO}/discussions/1"
        assert hub.files(REPO) == files
        assert published(hub, "refs/pr/1") == expected(contents)

    def test_pull_request_twice_is_one(self, hub, contents, earlier):
        publish_to_hub(earlier)
        first, second = (publish_to_hub(contents, create_pr=True) for _ in range(2))
        assert second.pull_request == first.pull_request
        assert not second.added
        assert len(hub.commits(REPO, revision="refs/pr/1")) == len(hub.commits(REPO)) + 1

    def test_pull_request_needs_a_repository(self, hub, audit):
        with pytest.raises(UserError, match="takes no pull request"):
            push(audit, REPO, create_pr=True)
        with pytest.raises(KeyError):
            hub.commits(REPO)

    def test_dry_run_changes_nothing(self, hub, audit):
        report = push(audit, REPO, dry_run=True)
        assert "data/train/data-00000-of-00001.parquet" in report.publication.added
        assert report.rows["default/train"] == 9
        assert "nothing was" in str(report)
        assert not [seen for seen in hub.requests if seen.method != "GET"]

    def test_dry_run_of_an_update(self, hub, audit, other_audit):
        push(audit, REPO)
        before = hub.files(REPO)
        report = push(other_audit, REPO, dry_run=True)
        assert "removed/train/data-00000-of-00001.parquet" in report.publication.deleted
        assert hub.files(REPO) == before


class TestAgain:
    def test_the_same_makes_no_commit(self, hub, audit):
        first = push(audit, REPO)
        count, asked = len(hub.commits(REPO)), len(hub.requests)
        second = push(audit, REPO)
        assert len(hub.commits(REPO)) == count
        assert second.publication.commit == first.publication.commit
        assert "Nothing has changed" in str(second)
        assert not [seen for seen in hub.requests[asked:] if seen.method in ("PUT", "POST")]

    def test_another_audit_replaces_it(self, hub, contents, earlier):
        publish_to_hub(contents)
        first = hub.files(REPO)
        done = publish_to_hub(earlier)
        assert "removed/train/data-00000-of-00001.parquet" in done.deleted
        assert published(hub) == expected(earlier)
        assert hub.files(REPO)["README.md"].count(b"hf-ecif:begin") == 1
        assert len(load()) == 12
        publish_to_hub(contents)
        assert hub.files(REPO) == first

    def test_what_others_put_there_stays(self, hub, api, contents, earlier):
        publish_to_hub(contents)
        readme = hub.files(REPO)["README.md"] + b"\nWritten later, by hand.\n"
        for path, content in (
            ("notes/todo.md", b"mine"),
            ("extra/data.parquet", b"mine"),
            ("README.md", readme),
        ):
            api.upload_file(
                path_or_fileobj=content, path_in_repo=path, repo_id=REPO, repo_type="dataset"
            )
        publish_to_hub(earlier)
        files = hub.files(REPO)
        assert files["notes/todo.md"] == files["extra/data.parquet"] == b"mine"
        assert b"Written later, by hand." in files["README.md"]

    def test_foreign_rows_are_not_mixed_in(self, hub, api, contents):
        api.create_repo(REPO, repo_type="dataset")
        api.upload_file(
            path_or_fileobj=b"PAR1",
            path_in_repo="data/train/more.parquet",
            repo_id=REPO,
            repo_type="dataset",
        )
        with pytest.raises(UserError, match=r"data/train/more\.parquet"):
            publish_to_hub(contents)

    def test_damaged_manifest(self, hub, api, contents):
        publish_to_hub(contents)
        api.upload_file(
            path_or_fileobj=b"[]",
            path_in_repo="hf_ecif/manifest.json",
            repo_id=REPO,
            repo_type="dataset",
        )
        with pytest.raises(UserError, match=r"manifest\.json in ann/birds-clean is damaged"):
            publish_to_hub(contents)


STEPS = ["info", "create", "tree", "preupload", "lfs_batch", "lfs_put", "commit"]


@pytest.fixture(scope="session")
def contents(audit: Path) -> Iterator[tuple[dict, CardMaker]]:
    """The files of a push and what makes its card."""
    folder = DatasetRepo(audit)
    with folder.publish_as(REPO, removed=True, other_splits=False) as contents:
        yield contents


@pytest.fixture(scope="session")
def whole(audit: Path) -> Iterator[tuple[dict, CardMaker]]:
    """The same with the other splits."""
    folder = DatasetRepo(audit)
    with folder.publish_as(REPO, removed=True, other_splits=True) as contents:
        yield contents


@pytest.fixture(scope="session")
def earlier(other_audit: Path) -> Iterator[tuple[dict, CardMaker]]:
    folder = DatasetRepo(other_audit)
    with folder.publish_as(REPO, removed=True, other_splits=False) as contents:
        yield contents


def publish_to_hub(contents, **options):
    return publish(HfApi(), Target(REPO, "dataset", **options), *contents, message="Clean")


def expected(contents) -> dict[str, bytes]:
    files, _ = contents
    return {
        path: content if isinstance(content, bytes) else content.read_bytes()
        for path, content in files.items()
    }


def published(hub: HubServer, revision: str = "main") -> dict[str, bytes]:
    """What is there, without what names the files or is the Hub's own."""
    files = hub.files(REPO, revision=revision)
    return {
        path: content
        for path, content in files.items()
        if path not in (".gitattributes", "README.md", "hf_ecif/manifest.json")
    }


class TestFailures:
    """Each request of a push fails in each way."""

    @pytest.mark.parametrize("route", STEPS)
    @pytest.mark.parametrize("kind", ["500", "429", "cut"])
    def test_a_passing_failure_is_survived(self, hub, waits, contents, route, kind):
        hub.fail(route, kind=kind, times=2)
        publish_to_hub(contents)
        assert len(hub.commits(REPO)) == 2
        assert published(hub) == expected(contents)

    @pytest.mark.parametrize("route", STEPS)
    @pytest.mark.parametrize("kind", ["503", "cut"])
    def test_a_lasting_failure_leaves_no_trace_and_a_second_run_completes(
        self, hub, waits, contents, route, kind
    ):
        hub.fail(route, kind=kind, times=1000)
        with pytest.raises(UserError, match=r"ann/birds-clean was not changed.*Run the same"):
            publish_to_hub(contents)
        assert len([seen for seen in hub.requests if seen.route == route]) < 300
        try:
            assert list(hub.files(REPO)) == [".gitattributes"]
        except KeyError:
            assert route in ("info", "create")
        recover(hub)
        publish_to_hub(contents)
        assert published(hub) == expected(contents)

    @pytest.mark.parametrize("route", ["info", "tree", "resolve", "lfs_put", "commit"])
    def test_a_failing_update_leaves_the_earlier_push(self, hub, waits, contents, earlier, route):
        publish_to_hub(earlier)
        before = hub.files(REPO)
        hub.fail(route, kind="503", times=1000)
        with pytest.raises(UserError, match=r"ann/birds-clean was not changed"):
            publish_to_hub(contents)
        assert hub.files(REPO) == before
        recover(hub)
        publish_to_hub(contents)
        assert published(hub) == expected(contents)

    @pytest.mark.parametrize("route", ["resolve", "discussions", "branch"])
    @pytest.mark.parametrize("kind", ["500", "429", "cut"])
    def test_a_passing_failure_of_an_update_is_survived(
        self, hub, waits, contents, earlier, route, kind
    ):
        publish_to_hub(earlier)
        options = {"revision": "cleaner"} if route == "branch" else {"create_pr": True}
        hub.fail(route, kind=kind, times=2)
        publish_to_hub(contents, **options)
        assert not [failure for failure in hub._failures if failure.times]
        assert published(hub, options.get("revision", "refs/pr/1")) == expected(contents)

    @pytest.mark.parametrize("kind", ["500", "429", "cut"])
    def test_a_passing_failure_of_the_source_is_survived(
        self, hub, api, waits, tmp_path, source, kind
    ):
        """Where its card is read."""
        api.create_repo("ann/birds", repo_type="dataset")
        api.upload_folder(folder_path=source, repo_id="ann/birds", repo_type="dataset")
        folder = write_audit(tmp_path, "ann/birds")
        hub.fail("resolve", kind=kind, times=2)
        push(folder, REPO, other_splits=False)
        assert not hub._failures[0].times
        assert b"Taken by **Kari**" in hub.files(REPO)["README.md"]

    @pytest.mark.parametrize("kind", ["500", "429", "cut"])
    def test_login(self, hub, waits, audit, kind):
        hub.fail("whoami", kind=kind, times=2)
        assert push(audit, REPO, dry_run=True).rows["default/train"] == 9

    def test_what_is_uploaded_is_not_uploaded_again(self, hub, waits, contents):
        hub.fail("commit", kind="503", times=1000)
        with pytest.raises(UserError):
            publish_to_hub(contents)
        recover(hub)
        large = {c for path, c in expected(contents).items() if not path.endswith(TEXT)}
        sent = [seen.body for seen in hub.requests if seen.route == "lfs_put"]
        assert sorted(sent) == sorted(large)
        publish_to_hub(contents)
        assert len([seen for seen in hub.requests if seen.route == "lfs_put"]) == len(large)

    def test_an_upload_goes_on_where_it_broke_off(self, hub, waits, contents):
        hub.fail("lfs_put", kind="cut", times=1000, after=1)
        with pytest.raises(UserError):
            publish_to_hub(contents)
        recover(hub)
        stored = {s.body for s in hub.requests if s.route == "lfs_put" and s.status == 200}
        assert len(stored) == 1
        asked = len(hub.requests)
        publish_to_hub(contents)
        assert not stored & {s.body for s in hub.requests[asked:] if s.route == "lfs_put"}

    def test_a_commit_whose_answer_is_lost_is_not_made_twice(self, hub, waits, contents):
        hub.fail("commit", kind="cut_after")
        report = publish_to_hub(contents)
        assert [commit.title for commit in hub.commits(REPO)] == ["Clean", "initial commit"]
        assert report.commit == hub.commits(REPO)[0].id

    def test_a_pull_request_whose_answer_is_lost_is_not_made_twice(
        self, hub, api, waits, contents, earlier
    ):
        publish_to_hub(earlier)
        hub.fail("commit", kind="cut_after")
        report = publish_to_hub(contents, create_pr=True)
        opened = list(api.get_repo_discussions(REPO, repo_type="dataset"))
        assert [discussion.url for discussion in opened] == [report.pull_request]

    @pytest.mark.parametrize("route", ["create", "branch"])
    def test_what_is_made_without_an_answer_is_found(self, hub, waits, contents, route):
        hub.fail(route, kind="cut_after")
        publish_to_hub(contents, revision="cleaner")
        assert len(hub.commits(REPO, revision="cleaner")) == 2

    def test_a_moved_parent_is_looked_at_again(self, hub, waits, contents):
        hub.fail("commit", kind="stale", times=2)
        publish_to_hub(contents)
        assert len(hub.commits(REPO)) == 2

    def test_a_real_race_keeps_both(self, hub, api, contents, monkeypatch):
        """Somebody commits between the look and the commit."""
        api.create_repo(REPO, repo_type="dataset")
        files, make_card = contents
        raced: list[str | None] = []

        def card(before: str | None) -> str:
            if not raced:
                note = b"# Mine\n"
                api.upload_file(
                    path_or_fileobj=note,
                    path_in_repo="README.md",
                    repo_id=REPO,
                    repo_type="dataset",
                )
            raced.append(before)
            return make_card(before)

        publish_to_hub((files, card))
        assert len(raced) == 2
        readme = hub.files(REPO)["README.md"].decode()
        assert "# Mine" in readme
        assert "hf-ecif:begin" in readme

    def test_waits_grow_and_end(self, hub, waits, contents):
        hub.fail("commit", kind="503", times=1000)
        with pytest.raises(UserError, match="after 6 tries"):
            publish_to_hub(contents)
        assert len(waits) == 5
        assert all(2**n * 0.5 <= wait <= 2**n for n, wait in enumerate(waits))

    def test_the_hub_says_how_long_to_wait(self, hub, waits, contents):
        answers = iter(["7", "Wed, 21 Oct 2015 07:28:00 GMT", "nonsense"])

        def attempt() -> str:
            header = next(answers, None)
            if header is None:
                return "done"
            request = httpx.Request("POST", hub.url)
            answer = httpx.Response(429, headers={"Retry-After": header}, request=request)
            raise HfHubHTTPError("busy", response=answer)

        assert retried(attempt, "nothing changed") == "done"
        assert waits[0] == 7
        assert 1 <= waits[1] <= 2  # a date that is past
        assert 2 <= waits[2] <= 4

    def test_a_wait_of_hours_is_not_waited_for(self, hub, waits):
        def attempt() -> None:
            request = httpx.Request("POST", hub.url)
            answer = httpx.Response(429, headers={"Retry-After": "7200"}, request=request)
            raise HfHubHTTPError("busy", response=answer)

        with pytest.raises(UserError, match="limits the number of requests"):
            retried(attempt, "nothing changed")
        assert waits == []

    def test_other_errors_are_not_hidden(self):
        with pytest.raises(ZeroDivisionError):
            retried(lambda: 1 // 0, "nothing changed")

    def test_network_gone(self, hub, waits, contents):
        with pytest.raises(UserError, match=r"cannot be reached\. Check the network"):
            publish(
                HfApi(endpoint="http://127.0.0.1:9"),
                Target(REPO, "dataset"),
                *contents,
                message="Clean",
            )


def recover(hub: HubServer) -> None:
    hub._failures.clear()


@pytest.fixture(scope="session")
def edited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder as `hf-ecif remove` leaves it, with a file that is nobody's business."""
    folder = tmp_path_factory.mktemp("edited")
    data = load_dataset("parquet", data_files=f"{DEMO}/data/test.parquet", split="train")
    data = data.select(range(30)).add_column("gone", [row < 2 for row in range(30)])
    data.to_parquet(folder / "secret.parquet")
    request = RemoveRequest(
        model=f"{DEMO}/model",
        dataset=str(folder / "secret.parquet"),
        where="gone",
        output=folder / "model",
        steps=1,
    )
    run_remove(request, InfluenceConfig(fit_epochs=1, probes=1, partitions=2))
    (folder / "model" / ".env").write_text("SECRET=1")
    return folder / "model"


class TestModel:
    def test_loads_again(self, hub, edited):
        report = push(edited, "ann/edited")
        assert report.url == f"{hub.url}/ann/edited"
        loaded, saved = (CLIPModel.from_pretrained(name) for name in ("ann/edited", edited))
        for name, value in saved.state_dict().items():
            assert (loaded.state_dict()[name] == value).all(), name

    def test_holds_the_folder_and_a_card(self, hub, edited):
        assert str(edited.parent) in (edited / "removal.json").read_text()  # so it stays behind
        push_model(edited, "ann/edited")
        files = hub.files("ann/edited", "model")
        assert files.keys() == {
            ".gitattributes",
            "README.md",
            "config.json",
            "hf_ecif/manifest.json",
            "model.safetensors",
            "processor_config.json",
            "removal.json",
            "tokenizer.json",
            "tokenizer_config.json",
        }
        assert str(edited.parent).encode() not in files["removal.json"] + files["README.md"]
        assert b"without 2 of 30 image" in files["README.md"]
        ModelCard(files["README.md"].decode()).data.to_dict()

    def test_again_and_changed(self, hub, edited, tmp_path):
        push(edited, "ann/edited")
        push(edited, "ann/edited")
        assert len(hub.commits("ann/edited", "model")) == 2
        shutil.copytree(edited, tmp_path, dirs_exist_ok=True)
        (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
        push(tmp_path, "ann/edited")
        files = hub.files("ann/edited", "model")
        assert "other.safetensors" in files
        assert "model.safetensors" not in files

    def test_base_on_the_hub_gives_its_licence(self, hub, api, edited, tmp_path):
        shutil.copytree(edited, tmp_path, dirs_exist_ok=True)
        removal = json.loads((tmp_path / "removal.json").read_text())
        (tmp_path / "removal.json").write_text(json.dumps(removal | {"model": "ann/clip@main"}))
        with pytest.raises(UserError, match=r"README\.md of ann/clip, for its licence: .*no such"):
            push(tmp_path, "ann/edited")
        api.create_repo("ann/clip")
        push(tmp_path, "ann/bare")  # the base has no card
        readme = b"---\nlicense: mit\n---\n# CLIP\n"
        api.upload_file(path_or_fileobj=readme, path_in_repo="README.md", repo_id="ann/clip")
        push(tmp_path, "ann/edited")
        data, text = read_card(hub.files("ann/edited", "model")["README.md"].decode())
        assert (data["license"], data["base_model"]) == ("mit", ["ann/clip"])
        assert "# CLIP" not in text

    def test_of_another_version(self, hub, edited, tmp_path):
        shutil.copytree(edited, tmp_path, dirs_exist_ok=True)
        (tmp_path / "removal.json").write_text('{"model": "a/b", "rows": 3}')
        with pytest.raises(UserError, match=r"removal\.json lacks 'dataset'"):
            push(tmp_path, "ann/edited")

    def test_damaged_fit(self, hub, edited, tmp_path):
        shutil.copytree(edited, tmp_path, dirs_exist_ok=True)
        (tmp_path / "influence.safetensors").write_bytes(b"weights")
        (tmp_path / "influence_config.json").write_text('{"model": "a/b", "curvature": "ggn"}')
        with pytest.raises(UserError, match=r"influence\.safetensors cannot be read.*Fit again"):
            push(tmp_path, "ann/influence")

    def test_pickles_are_refused(self, hub, edited, tmp_path):
        shutil.copytree(edited, tmp_path, dirs_exist_ok=True)
        (tmp_path / "pytorch_model.bin").write_bytes(b"x")
        with pytest.raises(UserError, match=r"pytorch_model\.bin can run code"):
            push(tmp_path, "ann/edited")

    def test_has_no_rows_to_leave_out(self, hub, edited):
        with pytest.raises(UserError, match="is no audit"):
            push(edited, "ann/edited", removed=False)


class TestCommand:
    def test_pushes(self, hub, audit, capsys, monkeypatch):
        assert run(monkeypatch, audit, REPO, "--no-other-splits", "--private") == 0
        out = capsys.readouterr().out
        assert f"Pushed: {hub.url}/datasets/{REPO}" in out
        assert "default/train: 9 rows" in out
        assert "removed/train: 3 rows" in out

    def test_dry_run(self, hub, audit, capsys, monkeypatch):
        assert run(monkeypatch, audit, REPO, "--dry-run", "--no-removed", "--revision", "x") == 0
        assert "nothing was changed" in capsys.readouterr().out
        with pytest.raises(KeyError):
            hub.commits(REPO)

    def test_mistake(self, hub, tmp_path, capsys, monkeypatch):
        assert run(monkeypatch, tmp_path, REPO) == 2
        assert "holds nothing to push" in capsys.readouterr().err


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["hf-ecif", "push", *map(str, arguments)])
    try:
        main()
    except SystemExit as exit:
        return int(exit.code or 0)
    return 0


def test_a_real_audit(hub, api, tmp_path):
    """What `run_audit` writes is what a push reads."""
    data = load_dataset("parquet", data_files=f"{DEMO}/data/test.parquet", split="train")
    data.select(range(40)).to_parquet(tmp_path / "train.parquet")
    api.create_repo("ann/clip")
    api.upload_folder(folder_path=DEMO / "model", repo_id="ann/clip")
    request = AuditRequest(
        model="ann/clip",
        dataset=str(tmp_path / "train.parquet"),
        output=tmp_path / "out",
        suggest=False,
        detection=DetectionConfig(injections=1),
    )
    config = InfluenceConfig(fit_epochs=1, probes=1, damping=30.0)
    summary = run_audit(request, config)
    report = push(tmp_path / "out", REPO)
    assert report.rows["default/train"] == summary.kept
    assert len(load()) == summary.kept
    commit = api.model_info("ann/clip").sha
    assert summary.loaded.revision == commit
    assert f"ann/clip (revision {commit}, dtype float32" in hub.files(REPO)["README.md"].decode()
    for path, content in hub.files(REPO).items():
        assert str(tmp_path).encode() not in content, path


class TestMistakes:
    def test_no_folder(self, hub, tmp_path):
        with pytest.raises(UserError, match="There is no folder"):
            push(tmp_path / "nothing", REPO)

    def test_unfinished_audit(self, hub, tmp_path):
        (tmp_path / "kept").mkdir()
        with pytest.raises(UserError, match=r"neither a finished audit \(summary\.json\)"):
            push(tmp_path, REPO)

    def test_damaged_summary(self, hub, tmp_path):
        (tmp_path / "summary.json").write_text('{"rows": 3')
        with pytest.raises(UserError, match=r"summary\.json cannot be read"):
            push(tmp_path, REPO)
        (tmp_path / "summary.json").write_text('{"rows": 3}')
        with pytest.raises(UserError, match="'model' is missing"):
            push(tmp_path, REPO)

    def test_rows_that_do_not_add_up(self, hub, tmp_path, source):
        folder = write_audit(tmp_path, str(source))
        next((folder / "removed").iterdir()).unlink()
        with pytest.raises(UserError, match="removed has 0 rows, but the audit wrote 3"):
            push(folder, REPO)

    @pytest.mark.parametrize("name", ["birds", "ann/bi rds", "ann/birds/clean", "", "ann/--"])
    def test_bad_name(self, hub, audit, name):
        with pytest.raises(UserError, match="is not the name of a repository"):
            push(audit, name)

    def test_not_logged_in(self, hub, audit, monkeypatch):
        monkeypatch.delenv("HF_TOKEN")
        with pytest.raises(UserError, match=r"You are not logged in.*hf auth login"):
            push(audit, REPO)

    def test_unknown_token(self, hub, audit):
        with pytest.raises(UserError, match="does not accept the token"):
            push(audit, REPO, token="hf_nobody")

    def test_token_that_only_reads(self, hub, audit):
        with pytest.raises(UserError, match="can only read"):
            push(audit, REPO, token=ANN_READ_ONLY)
        assert {seen.route for seen in hub.requests} == {"whoami"}

    def test_repository_of_somebody_else(self, hub, contents, earlier):
        bob = HfApi(token=BOB)
        with pytest.raises(UserError, match="the repository is not yours"):
            publish(bob, Target(REPO, "dataset"), *contents, message="Clean")
        publish_to_hub(earlier)
        before = hub.commits(REPO)
        with pytest.raises(UserError, match="the repository is not yours") as error:
            publish(bob, Target(REPO, "dataset"), *contents, message="Clean")
        assert "Run the same again" not in str(error.value)
        assert hub.commits(REPO) == before

    def test_other_split_with_other_columns(self, hub, tmp_path):
        odd = rows(3, 100).rename_column("kind", "sort")
        source = tmp_path / "saved"
        DatasetDict({"train": rows(12), "test": odd}).save_to_disk(source)
        folder = write_audit(tmp_path / "audit", str(source))
        with pytest.raises(
            UserError, match=r"'test' has other columns than 'train' \(kind, sort\)"
        ):
            push(folder, REPO)

    def test_other_split_with_another_type_is_cast(self, hub, tmp_path):
        odd = rows(3, 100).cast_column("kind", Value("int32"))
        source = tmp_path / "saved"
        DatasetDict({"train": rows(12), "test": odd}).save_to_disk(source)
        push(write_audit(tmp_path / "audit", str(source)), REPO)
        assert load(split="test")["kind"][:] == [0, 1, 0]

    def test_source_on_the_hub_without_a_card(self, hub, api, tmp_path):
        rows(12).to_parquet(tmp_path / "train.parquet")
        api.create_repo("ann/bare", repo_type="dataset")
        api.upload_folder(folder_path=tmp_path, repo_id="ann/bare", repo_type="dataset")
        push(write_audit(tmp_path / "audit", "ann/bare"), REPO)
        assert "# birds&#45;clean" not in hub.files(REPO)["README.md"].decode()
        assert "\n# birds-clean\n" in hub.files(REPO)["README.md"].decode()

    def test_source_card_that_cannot_be_read(self, hub, tmp_path):
        folder = write_audit(tmp_path / "audit", "bob/secret")
        with pytest.raises(UserError, match=r"README\.md of bob/secret: .*no such repository"):
            push(folder, REPO, other_splits=False)

    def test_source_is_gone(self, hub, tmp_path):
        folder = write_audit(tmp_path / "audit", str(tmp_path / "gone"))
        with pytest.raises(UserError, match=r"other splits.*no such file.*`other_splits=False`"):
            push(folder, REPO)
        push(folder, REPO, other_splits=False)
        assert len(load()) == 9

    def test_source_has_changed(self, hub, tmp_path):
        source = write_source(tmp_path / "birds", None, count=5)
        folder = write_audit(tmp_path / "audit", str(source))
        with pytest.raises(UserError, match="has changed since the audit"):
            push(folder, REPO)

    def test_pull_request_to_a_branch(self, hub, audit):
        with pytest.raises(UserError, match="either `create_pr` or `revision`"):
            push(audit, REPO, create_pr=True, revision="x")

    def test_card_with_broken_metadata(self, hub, tmp_path):
        source = write_source(tmp_path / "birds", readme="---\na: [1\n---\nHi\n")
        folder = write_audit(tmp_path / "audit", str(source))
        with pytest.raises(UserError, match=r"README\.md of .*not valid YAML.*Correct it"):
            push(folder, REPO, other_splits=False)


class TestToken:
    def test_is_shown_and_stored_nowhere(self, hub, audit, tmp_path, capfd, caplog, monkeypatch):
        caplog.set_level(logging.DEBUG)
        before = {path: path.read_bytes() for path in audit.rglob("*") if path.is_file()}
        report = push(audit, REPO, token=ANN)
        hub.fail("commit", kind="500", times=1000)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        with pytest.raises(UserError) as error:
            push(audit, "ann/other", token=ANN, other_splits=False)
        out, err = capfd.readouterr()
        secret = ANN.removeprefix("hf_")
        for text in (out, err, caplog.text, str(report), repr(report), str(error.value)):
            assert secret not in text
        for content in hub.files(REPO).values():
            assert secret.encode() not in content
        for seen in hub.requests:
            assert secret not in seen.url
            assert secret.encode() not in seen.body
        after = {path: path.read_bytes() for path in audit.rglob("*") if path.is_file()}
        assert after == before
