"""Runs that are killed, again and again, end with the bits of a run that was left alone."""

import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset

from hf_ecif.applications import judged, result
from hf_ecif.applications.audit import CHECKPOINTS, AuditRequest, run_audit
from hf_ecif.applications.fit import FitRequest, run_fit
from hf_ecif.applications.score import ScoreRequest, run_score
from hf_ecif.config import DetectionConfig, InfluenceConfig
from hf_ecif.errors import UserError
from hf_ecif.influence import rows as features
from hf_ecif.influence.model import InfluenceModel
from hf_ecif.influence.saving import save_model
from hf_ecif.utils.checkpoints import MANIFEST, Checkpoints
from tests.support import DEMO, kills

ROWS, PART = 60, 16
UNREADABLE = 5
CONFIG = InfluenceConfig(
    batch_size=32,
    micro_batch_size=32,
    fit_epochs=3,
    partitions=2,
    probes=1,
    max_iterations=2,
)
SCORING = replace(CONFIG, batch_size=2, fit_epochs=0, solver="identity")  # blocks of 8 rows
LEARNED, JUDGED = 40, 8  # rows that an audit learns from, and rows of a part of the others
KILLS = {"audit": 24, "score": 13, "stream": 13, "judged": 20}
SEED = 0


@dataclass(frozen=True)
class Job:
    """A run that can be started again.

    Attributes:
        run: does it.
        request: with an output.
        config: of the run; None where the fit has it.
    """

    run: Callable[..., Any]
    request: AuditRequest | FitRequest | ScoreRequest
    config: InfluenceConfig | None = None

    def __call__(self) -> Any:
        """Do it, with many small parts."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(features, "PART", PART)
            patch.setattr(judged, "PART_ROWS", JUDGED)
            patch.setattr("hf_ecif.engine.encoder.CHUNK_BYTES", 1)  # chunks of four batches
            patch.setattr(result, "render_report", render_little)
            return self.run(self.request, *([self.config] if self.config else []))

    @property
    def output(self) -> Path:
        return self.request.output

    def into(self, output: Path, **options: Any) -> "Job":
        """The same with another output and other options of the request."""
        return replace(self, request=replace(self.request, output=output, **options))

    def again(self, **options: Any) -> "Job":
        """The same with other options of the request."""
        return self.into(self.output, **options)


def render_little(scored: Dataset, summary: Any) -> str:
    """In place of the report, whose figures take longer than all the rest."""
    return f"{len(scored)} rows"


def results(folder: Path) -> dict[str, Any]:
    """The bytes of all files, and the values of JSON without what a clock says."""
    found: dict[str, Any] = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.suffix == ".json":
            found[name] = json.loads(path.read_text())
            found[name].pop("seconds", None)
        elif path.is_file():
            found[name] = path.read_bytes()
    return found


def assert_same(job: Job, undisturbed: Job) -> None:
    """Same files, same bytes, and nothing beside them."""
    found, expected = results(job.output), results(undisturbed.output)
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``rows`` with an unreadable one, ``other`` rows, and a ``query``."""
    root = tmp_path_factory.mktemp("resume")
    train = Dataset.from_parquet(str(DEMO / "data" / "train.parquet"))
    query = Dataset.from_parquet(str(DEMO / "data" / "validation.parquet"))
    rows = train.select(range(ROWS))
    texts = ["" if row == UNREADABLE else text for row, text in enumerate(rows["text"])]
    rows = rows.remove_columns("text").add_column("text", texts)
    rows.save_to_disk(root / "rows")
    train.select(range(1, ROWS + 1)).save_to_disk(root / "other")
    query.select(range(16)).save_to_disk(root / "query")
    return root


@pytest.fixture(scope="module")
def finish(folder: Path) -> Callable[[Job], Job]:
    """Run a job in a process of its own, to its end."""

    def finish(job: Job) -> Job:
        log = folder / "log"
        assert not kills.was_killed(kills.start(job, log=log)), "killed by someone else"
        return job

    return finish


@pytest.fixture(scope="module")
def jobs(folder: Path, finish: Callable[[Job], Job]) -> dict[str, Job]:
    """By name, each done once, undisturbed."""
    sources: dict[str, Any] = {
        "model": str(DEMO / "model"),
        "dataset": str(folder / "rows"),
        "query": str(folder / "query"),
        "query_split": "train",
    }
    audit = AuditRequest(
        **sources,
        output=folder / "audit",
        truth_column="is_misaligned",
        suggest=False,
        detection=DetectionConfig(injections=1),
    )
    fit = FitRequest(**sources, output=folder / "fit")
    scoring = replace(fit, output=folder / "scoring fit")
    finish(Job(run_fit, scoring, SCORING))
    score = ScoreRequest(
        influence=str(scoring.output), dataset=sources["dataset"], output=folder / "score"
    )
    stream = replace(score, output=folder / "stream", streaming=True)
    larger = replace(audit, output=folder / "judged", suggest=True, learn_rows=LEARNED)
    return {
        "audit": finish(Job(run_audit, audit, CONFIG)),
        "judged": finish(Job(run_audit, larger, CONFIG)),
        "fit": finish(Job(run_fit, fit, CONFIG)),
        "score": finish(Job(run_score, score)),
        "stream": finish(Job(run_score, stream)),
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", KILLS)
def test_killed_at_random(
    jobs: dict[str, Job], folder: Path, finish: Callable[[Job], Job], name: str
) -> None:
    done, rng = jobs[name], random.Random(f"{SEED} {name}")
    start = time.perf_counter()
    finish(done.into(folder / f"timed {name}"))
    seconds = time.perf_counter() - start
    delays: list[float] = []
    killed = runs = 0
    while killed < KILLS[name]:
        job = done.into(folder / f"killed {name} {runs}")
        while True:
            delays.append(rng.uniform(0, seconds))
            process = kills.start(job, log=folder / "log")
            if not kills.kill(process, after=delays[-1]):
                break
            killed += 1
            if results(job.output).keys() == results(done.output).keys():
                break  # it had nothing left to do but to end
            if killed == KILLS[name]:
                finish(job.again(resume=True))
                break
            job = job.again(resume=True)
        print(f"run {runs}: {killed} kills, delays {[round(delay, 3) for delay in delays]}")
        assert_same(job, done)
        runs += 1


def dying(job: Job, event: int) -> None:
    """Do a job; be killed just before the change of its output with that number."""
    left = event

    def watched(change: Callable[..., Any]) -> Callable[..., Any]:
        def die_or_change(path: Any, *arguments: Any, **options: Any) -> Any:
            nonlocal left
            if Path(path).is_relative_to(job.output) and CHECKPOINTS not in Path(path).parts[:-1]:
                left -= 1
                if left < 0:
                    kills.kill_me()
            return change(path, *arguments, **options)

        return die_or_change

    with pytest.MonkeyPatch.context() as patch:
        for name in ("replace", "unlink", "mkdir"):
            patch.setattr(Path, name, watched(getattr(Path, name)))
        patch.setattr(shutil, "rmtree", watched(shutil.rmtree))
        job()


def dying_at_a_part(job: Job) -> None:
    """Do a job; be killed when the second part that it judged is about to be there."""
    written, replace_file = 0, Path.replace

    def die_or_replace(path: Path, target: Any) -> Any:
        nonlocal written
        written += Path(target).parent.name.startswith("judged-")
        if written == 2:
            kills.kill_me()
        return replace_file(path, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "replace", die_or_replace)
        job()


@pytest.mark.slow
def test_killed_at_every_part_of_the_judging(jobs: dict[str, Job], folder: Path) -> None:
    job, deaths = jobs["judged"].into(folder / "parts", resume=True), 0
    while kills.was_killed(kills.start(dying_at_a_part, job, log=folder / "log")):
        deaths += 1
        found = list(job.output.glob(f"{CHECKPOINTS}/judged-*/rows-*.parquet"))
        assert len(found) == deaths, "a part was lost, or judged again"
    assert deaths == -(-ROWS // JUDGED)  # the last of them where the parts are put together
    assert_same(job, jobs["judged"])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["audit", "fit", "score", "stream"])
def test_killed_before_every_change_of_the_output(
    jobs: dict[str, Job], folder: Path, name: str
) -> None:
    job = jobs[name].into(folder / f"dying {name}", resume=True)
    event = 0
    while kills.was_killed(kills.start(dying, job, event, log=folder / "log")):
        event += 1 if event < 4 else 2
    assert event >= 5
    assert_same(job, jobs[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["audit", "fit", "score"])
def test_overwriting_run_that_was_killed_goes_on(
    jobs: dict[str, Job], folder: Path, name: str
) -> None:
    """Before every change, too: what is found of the earlier run is never taken for the new one."""
    output = folder / f"overwritten {name}"
    shutil.copytree(jobs[name].output, output)
    for path in output.rglob("*.parquet"):
        path.write_bytes(b"of another run")
    job = jobs[name].into(output, overwrite=True)
    assert kills.was_killed(kills.start(dying, job, 3, log=folder / "log"))
    event = 4
    job = job.again(overwrite=False, resume=True)
    while kills.was_killed(kills.start(dying, job, event, log=folder / "log")):
        event += 2
    assert_same(job, jobs[name])


@pytest.fixture(scope="module")
def halves(jobs: dict[str, Job], folder: Path) -> dict[str, Job]:
    """Jobs that were killed after some steps."""
    found = {}
    for name, events in {"audit": 19, "fit": 10, "score": 15, "stream": 15}.items():
        job = jobs[name].into(folder / f"half {name}")
        assert kills.was_killed(kills.start(dying, job, events, log=folder / "log"))
        found[name] = job
    return found


@pytest.fixture
def half(halves: dict[str, Job], tmp_path: Path, request: pytest.FixtureRequest) -> Job:
    """A copy of one of them."""
    job = halves[request.param]
    shutil.copytree(job.output, tmp_path / "run")
    return job.into(tmp_path / "run")


ALL = pytest.mark.parametrize("half", ["audit", "fit", "score", "stream"], indirect=True)
TWO_STEPS = pytest.mark.parametrize("half", ["audit", "fit"], indirect=True)
SCORES = pytest.mark.parametrize("half", ["score", "stream"], indirect=True)


@ALL
def test_interrupted_run_is_not_replaced_by_mistake(half: Job) -> None:
    before = results(half.output)
    with pytest.raises(UserError, match="interrupted run: `resume` continues it, `overwrite`"):
        half()
    assert results(half.output) == before


@ALL
def test_overwrite_starts_anew(half: Job, jobs: dict[str, Job], request: Any) -> None:
    name = request.node.callspec.params["half"]
    for path in half.output.rglob("*"):
        if path.suffix in (".safetensors", ".parquet"):
            path.write_bytes(b"damaged")
    job = half.again(overwrite=True)
    assert not kills.was_killed(kills.start(job, log=half.output.parent / "log"))
    assert_same(job, jobs[name])


@ALL
def test_what_a_crash_has_cut_short_is_done_again(
    half: Job, jobs: dict[str, Job], request: Any, finish: Callable[[Job], Job]
) -> None:
    parts = [p for p in sorted(half.output.rglob("[!.]*")) if p.suffix != ".json" and p.is_file()]
    assert len(parts) > 1
    for path in parts[::2]:
        path.write_bytes(path.read_bytes()[:-9])
    assert_same(finish(half.again(resume=True)), jobs[request.node.callspec.params["half"]])


@TWO_STEPS
def test_other_config_is_refused(half: Job) -> None:
    before = results(half.output)
    assert half.config is not None
    other = replace(half.again(resume=True), config=replace(half.config, seed=1, fit_epochs=4))
    with pytest.raises(UserError) as caught:
        other()
    assert "seed was 0 and is 1" in str(caught.value)
    assert "fit_epochs was 3 and is 4" in str(caught.value)
    assert "batch_size" not in str(caught.value)
    assert results(half.output) == before


@TWO_STEPS
@pytest.mark.parametrize(
    ("difference", "options"),
    [
        ("data was", {"dataset": "other"}),
        ("query was", {"query": "rows"}),
        ("query was", {"query": None, "query_split": None}),
        ("columns was", {"text_column": "original_text"}),
    ],
)
def test_other_data_are_refused(
    half: Job, folder: Path, difference: str, options: dict[str, Any]
) -> None:
    places = {
        name: str(folder / value) if value and name in ("dataset", "query") else value
        for name, value in options.items()
    }
    with pytest.raises(UserError) as caught:
        half.again(resume=True, **places)()
    assert difference in str(caught.value)
    assert str(caught.value).count(" was ") == 2  # one difference, and "the run was another one"


@SCORES
def test_other_rows_or_columns_are_refused(half: Job, folder: Path) -> None:
    other = {"dataset": str(folder / "other"), "text_column": "original_text"}
    with pytest.raises(UserError) as caught:
        half.again(resume=True, **other)()
    message = str(caught.value)
    assert f"dataset was {str(folder / 'rows')!r} and is {other['dataset']!r}" in message
    assert "columns was" in message


@SCORES
def test_other_rows_of_the_same_name_are_refused(half: Job, folder: Path, tmp_path: Path) -> None:
    rows = folder / "rows"
    rows.rename(tmp_path / "rows")
    try:
        shutil.copytree(folder / "other", rows)
        with pytest.raises(UserError, match=r"data was '[0-9a-f]{32}' and is '[0-9a-f]{32}'"):
            half.again(resume=True)()
    finally:
        shutil.rmtree(rows)
        (tmp_path / "rows").rename(rows)


@SCORES
def test_other_fit_is_refused(half: Job, folder: Path, finish: Callable[[Job], Job]) -> None:
    assert isinstance(half.request, ScoreRequest)
    fit = FitRequest(
        model=str(DEMO / "model"), dataset=str(folder / "other"), output=half.output.parent / "fit"
    )
    finish(Job(run_fit, fit, SCORING))
    with pytest.raises(UserError, match=r"fit was '[0-9a-f]{16}' and is '[0-9a-f]{16}'"):
        half.again(resume=True, influence=str(fit.output))()


@TWO_STEPS
def test_other_model_is_refused(half: Job, tmp_path: Path) -> None:
    model = InfluenceModel.from_pretrained(DEMO / "model")
    edited = model.edited(model.encoder.theta * 1.01)
    save_model(edited, model.processor, tmp_path / "model")
    with pytest.raises(UserError, match=r"model was '[0-9a-f]{16}' and is '[0-9a-f]{16}'"):
        half.again(resume=True, model=str(tmp_path / "model"))()


@pytest.mark.parametrize("parameters", ["projections", "last_block", "all"])
def test_rows_that_were_read_serve_a_model_that_has_seen_none(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parameters: str
) -> None:
    monkeypatch.setattr(features, "PART", 6)
    dataset = Dataset.load_from_disk(folder / "query")
    known = Checkpoints.open(tmp_path / "known", {}, resume=False)
    losses = []
    for _ in range(2):
        model = InfluenceModel.from_pretrained(
            DEMO / "model", replace(CONFIG, parameters=parameters)
        )
        losses.append(model.score_as_given(model.read(dataset, checkpoints=known)).loss)
    assert len(list((tmp_path / "known").glob("*.safetensors"))) == 3
    assert torch.equal(*losses)


@pytest.mark.parametrize("name", ["audit", "fit", "score"])
def test_finished_run_says_so(jobs: dict[str, Job], name: str) -> None:
    before = results(jobs[name].output)
    with pytest.raises(UserError, match=r"is finished.*`overwrite`"):
        jobs[name].again(resume=True)()
    assert results(jobs[name].output) == before


def test_counts_reconcile(jobs: dict[str, Job]) -> None:
    summary = json.loads((jobs["audit"].output / "summary.json").read_text())
    rows = {
        name: sum(pq.read_metadata(f).num_rows for f in (jobs["audit"].output / name).iterdir())
        for name in ("scored", "kept", "removed")
    }
    assert rows["scored"] == rows["kept"] + rows["removed"] == ROWS
    assert (summary["rows"], summary["unreadable"]) == (ROWS, 1)
    for name in ("score", "stream"):
        scoring = json.loads((jobs[name].output / "scoring.json").read_text())
        shards = list((jobs[name].output / "scored").iterdir())
        assert sum(pq.read_metadata(shard).num_rows for shard in shards) == ROWS
        assert (scoring["rows"], scoring["unscored"]) == (ROWS, 1)
        assert scoring["shards"] == len(shards) == 7


def test_jobs_have_several_steps(halves: dict[str, Job]) -> None:
    """Else the kills would show little."""
    states = {path.name for path in (halves["audit"].output / CHECKPOINTS).iterdir()}
    assert sum(name.startswith("rows-") for name in states) == ROWS // PART + 1
    assert {"direction.safetensors", "fit.safetensors"} <= states
    assert any(name.startswith("score-") for name in states)
    assert any(name.startswith("injection-00-score-") for name in states)
    for name in ("score", "stream"):
        assert (halves[name].output / MANIFEST).exists()
        assert 0 < len(list((halves[name].output / "scored").glob("[!.]*"))) < 7
    assert asdict(CONFIG)["fit_epochs"] > 1
