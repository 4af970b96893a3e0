"""`hf_ecif.audit` as in a notebook: whatever is given, to flags, files and the Hub."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset, DatasetDict, Image, IterableDataset, Value, load_dataset
from PIL import Image as PILImage
from transformers import AutoProcessor, CLIPModel

import hf_ecif
from hf_ecif import Audit, DetectionConfig, InfluenceConfig, InfluenceModel, UserError
from hf_ecif.applications.given import IN_MEMORY
from hf_ecif.data.columns import COLUMNS
from hf_ecif.utils.files import to_json
from hf_ecif.utils.progress import silent
from tests.support import DEMO

MODEL = str(DEMO / "model")
CONFIG = InfluenceConfig(batch_size=16, partitions=2, probes=1, fit_epochs=1)
ONCE = DetectionConfig(injections=1)
ROWS, QUERY = 64, 20


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="module")
def pairs(cache: None) -> DatasetDict:
    """Some rows of the demo, as `load_dataset` gives them, with columns of no concern."""
    data = load_dataset(str(DEMO / "data"))
    return DatasetDict(
        train=data["train"].select(range(ROWS)).select_columns(["image", "text", "is_misaligned"]),
        validation=data["validation"].select(range(QUERY)).select_columns(["image", "text"]),
    )


@pytest.fixture(scope="module")
def audit(pairs: DatasetDict) -> Audit:
    """Of rows in memory, with a truth and traced errors."""
    return hf_ecif.audit(
        MODEL,
        pairs["train"],
        query=pairs["validation"],
        config=CONFIG,
        detection=ONCE,
        truth_column="is_misaligned",
        trace=2,
        progress=silent,
    )


@pytest.fixture
def quick(pairs: DatasetDict) -> Callable[..., Audit]:
    """The same, as fast as can be, of other things given."""

    def run(model: Any = MODEL, dataset: Any = None, query: Any = None, **options: Any) -> Audit:
        return hf_ecif.audit(
            model,
            pairs["train"] if dataset is None else dataset,
            pairs["validation"] if query is None else query,
            **{"config": CONFIG, "detection": ONCE, "suggest": False, "progress": silent} | options,
        )

    return run


def scores(audit: Audit) -> list[float | None]:
    return audit.dataset["ecif_score"][:]


class TestResult:
    def test_rows_are_the_callers_with_our_columns(self, audit: Audit, pairs: DatasetDict) -> None:
        given = pairs["train"]
        own, ours = audit.dataset.column_names[:3], audit.dataset.column_names[3:]
        assert own == given.column_names
        assert sorted(ours) == sorted(COLUMNS)
        same = audit.dataset.select_columns(given.column_names)
        assert same.features == given.features
        raw, before = (d.cast_column("image", Image(decode=False)) for d in (same, given))
        assert raw[:] == before[:]
        assert isinstance(audit.dataset[0]["image"], PILImage.Image)

    def test_summary_is_of_these_rows(self, audit: Audit) -> None:
        found, flags = audit.summary, audit.dataset["ecif_flag"][:]
        assert (found.rows, found.scored, found.dataset) == (ROWS, ROWS, IN_MEMORY)
        assert (found.model, found.split, found.query.rows) == (MODEL, "train", QUERY)
        assert found.flagged == sum(flags)
        assert found.truth is not None
        assert found.kept + found.removed == ROWS
        assert found.seconds["total"] > 0

    def test_words(self, audit: Audit) -> None:
        head, *notes = repr(audit).splitlines()
        assert head.startswith(
            f"Audit({ROWS} rows, {audit.summary.flagged} flagged, estimated noise "
        )
        assert [note.strip() for note in notes] == audit.summary.warnings
        shown = audit._repr_html_()
        assert "<table>" in shown
        assert audit.summary.noise.told in shown

    def test_report(self, audit: Audit, tmp_path: Path) -> None:
        report = audit.report()
        shown = report._repr_html_()
        assert shown.startswith("<iframe srcdoc=")
        assert "<html" not in shown  # but for what is escaped in the frame
        report.save(tmp_path / "new" / "report.html")
        assert (tmp_path / "new" / "report.html").read_text() == report.html
        assert "How the pairs are spread" in report.html

    def test_cleaning(self, audit: Audit) -> None:
        cleaned = audit.clean()
        assert len(cleaned.kept) == audit.summary.kept
        assert len(cleaned.kept) + len(cleaned.removed) == ROWS
        assert all(cleaned.removed["ecif_reason"])
        assert cleaned.kept.features == audit.dataset.features
        assert repr(cleaned).startswith(f"Cleaned(drop: kept {len(cleaned.kept)}, removed ")
        worst = audit.clean("worst", share=0.25)
        assert len(worst.removed) == ROWS // 4
        assert "worst 25 %" in repr(worst)
        with pytest.raises(UserError, match="needs one between 0 and 1"):
            audit.clean("worst")


class TestFolder:
    def test_it_comes_back(self, audit: Audit, tmp_path: Path) -> None:
        audit.save(tmp_path / "out")
        assert {path.name for path in (tmp_path / "out").iterdir()} == {
            *("scored", "kept", "removed", "summary.json", "report.html"),
            *("trace.parquet", "trace.html"),
        }
        again = hf_ecif.load_audit(tmp_path / "out")
        assert to_json(again.summary.to_dict()) == to_json(audit.summary.to_dict())
        assert again.dataset.features == audit.dataset.features
        assert scores(again) == scores(audit)
        again.save(tmp_path / "copy")
        for name in ("trace.parquet", "trace.html", "summary.json"):
            copy = (tmp_path / "copy" / name).read_bytes()
            assert copy == (tmp_path / "out" / name).read_bytes()

    def test_it_is_replaced_if_asked_for_alone(self, audit: Audit, tmp_path: Path) -> None:
        audit.save(tmp_path / "out")
        with pytest.raises(UserError, match="is finished"):
            audit.save(tmp_path / "out")
        audit.save(tmp_path / "out", overwrite=True)
        (tmp_path / "out" / "mine.txt").touch()
        with pytest.raises(UserError, match=r"other files \(mine.txt\)"):
            audit.save(tmp_path / "out", overwrite=True)

    def test_a_cleaning_is_saved_with_its_evidence(self, audit: Audit, tmp_path: Path) -> None:
        cleaned = audit.clean("worst", share=0.25)
        cleaned.save(tmp_path / "out")
        kept = load_dataset(str(tmp_path / "out" / "kept"), split="train")
        assert len(kept) == len(cleaned.kept) == ROWS * 3 // 4
        with pytest.raises(UserError, match="that of a cleaning"):
            hf_ecif.load_audit(tmp_path / "out")

    def test_output_is_written_and_checked_first(
        self, quick: Callable[..., Audit], tmp_path: Path
    ) -> None:
        (tmp_path / "mine.txt").touch()
        with pytest.raises(UserError, match="other files"):
            quick(model="no/model", output=tmp_path)
        found = quick(output=tmp_path / "new")
        assert hf_ecif.load_audit(tmp_path / "new").summary.flagged == found.summary.flagged

    def test_what_is_read_is_never_replaced(
        self, audit: Audit, quick: Callable[..., Audit], tmp_path: Path
    ) -> None:
        audit.dataset.save_to_disk(tmp_path / "out" / "scored")
        with pytest.raises(UserError, match="holds the input"):
            quick(dataset=tmp_path / "out" / "scored", output=tmp_path / "out", overwrite=True)
        rows = Dataset.load_from_disk(str(tmp_path / "out" / "scored"))
        with pytest.raises(UserError, match="holds the input"):
            Audit(rows, audit.summary).save(tmp_path / "out", overwrite=True)
        assert len(Dataset.load_from_disk(str(tmp_path / "out" / "scored"))) == ROWS

    def test_there_is_none(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="holds no finished audit"):
            hf_ecif.load_audit(tmp_path)


class TestGiven:
    """Forms of one thing give the same scores."""

    @pytest.fixture(scope="class")
    def expected(self, pairs: DatasetDict) -> list[float | None]:
        found = hf_ecif.audit(
            MODEL, pairs["train"], pairs["validation"], config=CONFIG, progress=silent
        )
        return scores(found)

    def test_loaded_model(self, quick: Callable[..., Audit], expected: list[float | None]) -> None:
        clip, processor = CLIPModel.from_pretrained(MODEL), AutoProcessor.from_pretrained(MODEL)
        found = quick(clip, processor=processor)
        assert scores(found) == pytest.approx(expected)
        assert found.summary.model == MODEL

    def test_model_of_no_name(self, quick: Callable[..., Audit]) -> None:
        clip, processor = CLIPModel.from_pretrained(MODEL), AutoProcessor.from_pretrained(MODEL)
        own = CLIPModel(clip.config)
        own.load_state_dict(clip.state_dict())
        own.name_or_path = ""
        found = quick(own, processor=processor)
        assert found.summary.model == "a CLIPModel in memory"
        assert found.summary.loaded.revision is None

    def test_influence_model(
        self, quick: Callable[..., Audit], expected: list[float | None]
    ) -> None:
        model = InfluenceModel.from_pretrained(MODEL, CONFIG)
        assert scores(quick(model, config=None)) == pytest.approx(expected)
        with pytest.raises(UserError, match="has a `config`"):
            quick(model)

    def test_splits(
        self, quick: Callable[..., Audit], pairs: DatasetDict, expected: list[float | None]
    ) -> None:
        assert scores(quick(dataset=pairs, query=pairs)) == pytest.approx(expected)
        found = quick(dataset=pairs, split="train", query=pairs, query_split="validation")
        assert (found.summary.split, found.summary.query.split) == ("train", "validation")
        with pytest.raises(UserError, match=r"no split 'test'. Give `split`, one of: train, val"):
            quick(dataset=pairs, split="test")
        odd = DatasetDict(a=pairs["train"], b=pairs["train"])
        with pytest.raises(UserError, match=r"several splits. Give `query_split`, one of: a, b"):
            quick(query=odd)
        with pytest.raises(UserError, match="one split already"):
            quick(split="train")

    @pytest.mark.parametrize("knows_its_features", [True, False])
    def test_stream(
        self,
        quick: Callable[..., Audit],
        pairs: DatasetDict,
        expected: list[float | None],
        knows_its_features: bool,
    ) -> None:
        rows = pairs["train"]
        stream = (
            rows.to_iterable_dataset()
            if knows_its_features
            else IterableDataset.from_generator(lambda: iter(rows.to_iterable_dataset()))
        )
        found = quick(dataset=stream)
        assert scores(found) == pytest.approx(expected)
        assert found.dataset.features["image"] == Image()
        assert not any("stream" in warning for warning in found.summary.warnings)

    def test_stream_that_goes_on(self, quick: Callable[..., Audit], pairs: DatasetDict) -> None:
        found = quick(dataset=pairs["train"].to_iterable_dataset(), max_rows=30)
        assert len(found.dataset) == 30
        assert found.dataset["text"][:] == pairs["train"]["text"][:30]
        assert any("more rows than the first 30" in note for note in found.summary.warnings)

    def test_folders(
        self,
        quick: Callable[..., Audit],
        pairs: DatasetDict,
        expected: list[float | None],
        tmp_path: Path,
    ) -> None:
        pairs.save_to_disk(tmp_path / "pairs")
        found = quick(dataset=tmp_path / "pairs", query=str(tmp_path / "pairs"))
        assert scores(found) == pytest.approx(expected)
        assert found.summary.dataset == str(tmp_path / "pairs")

    def test_other_names_and_a_format_of_the_callers(
        self, quick: Callable[..., Audit], pairs: DatasetDict, expected: list[float | None]
    ) -> None:
        names = {"image": "photo", "text": "alt"}
        given = DatasetDict({name: rows.rename_columns(names) for name, rows in pairs.items()})
        found = quick(dataset=given["train"].with_format("numpy"), query=given)
        assert found.summary.columns.to_dict() == names
        assert scores(Audit(found.dataset.with_format(None), found.summary)) == pytest.approx(
            expected
        )

    def test_paths_of_images(
        self,
        quick: Callable[..., Audit],
        pairs: DatasetDict,
        expected: list[float | None],
        tmp_path: Path,
    ) -> None:
        paths = [str(tmp_path / f"{row}.png") for row in range(ROWS)]
        for path, image in zip(paths, pairs["train"]["image"], strict=True):
            image.save(path)
        given = pairs["train"].remove_columns("image").add_column("image", paths)
        found = quick(dataset=given)
        assert scores(found) == pytest.approx(expected)
        assert found.dataset.features["image"] == Value("string")
        found.save(tmp_path / "out")
        saved = load_dataset(str(tmp_path / "out" / "scored"), split="train")
        assert saved.features["image"] == Image()

    def test_captions_to_suggest(self, quick: Callable[..., Audit]) -> None:
        words = ["a red apple", "a dog"]
        found = quick(suggest=True, suggest_probability=0.0, vocabulary=words)
        suggested = {text for text in found.dataset["ecif_suggested_text"] if text}
        assert suggested <= set(words)
        assert found.summary.suggestions is not None
        assert found.summary.suggestions.vocabulary == "2 captions given"


class TestMistakes:
    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"text": ["text", "alt"]}, "several columns that could hold the texts: text2, alt"),
            ({"text": []}, "no columns that could hold the texts. The columns are: image"),
            ({"image": ["photo", "scan"]}, "several .* the images: photo, scan. Give `image_col"),
        ],
    )
    def test_columns_that_cannot_be_told(
        self,
        quick: Callable[..., Audit],
        pairs: DatasetDict,
        change: dict[str, list[str]],
        words: str,
    ) -> None:
        rows = pairs["train"].select_columns(["image", "text"])
        rows = rows.cast_column("image", Image(decode=False))
        for name, others in change.items():
            values, feature = rows[name][:], rows.features[name]
            rows = rows.remove_columns(name)
            for other in others:
                rows = rows.add_column(other.replace("text", "text2"), values, feature=feature)
        with pytest.raises(UserError, match=words):
            quick(dataset=rows)

    def test_a_loaded_model_needs_its_processor(self, quick: Callable[..., Audit]) -> None:
        clip = CLIPModel.from_pretrained(MODEL)
        with pytest.raises(UserError, match="A loaded CLIPModel needs its `processor`"):
            quick(clip)
        with pytest.raises(UserError, match="`processor` is no processor for images and texts"):
            quick(clip, processor=object())
        with pytest.raises(UserError, match="`processor` goes with a loaded model"):
            quick(processor=AutoProcessor.from_pretrained(MODEL))

    @pytest.mark.parametrize(
        ("dataset", "words"),
        [
            ([1, 2], "`dataset` must be a Dataset.* but it is a list"),
            (Dataset.from_dict({"image": [], "text": []}), "`dataset` has no rows"),
            (
                IterableDataset.from_generator(lambda: iter([])),
                "The stream has no rows",
            ),
        ],
    )
    def test_no_rows(self, quick: Callable[..., Audit], dataset: Any, words: str) -> None:
        with pytest.raises(UserError, match=words):
            quick(dataset=dataset)

    def test_errors_are_not_traced_in_a_query_of_the_data(self, pairs: DatasetDict) -> None:
        with pytest.raises(UserError, match=r"trace.* looks for errors in the query"):
            hf_ecif.audit(MODEL, pairs["train"], trace=3, config=CONFIG, progress=silent)


def test_bars_are_those_of_datasets(
    quick: Callable[..., Audit], capsys: pytest.CaptureFixture[str]
) -> None:
    from hf_ecif.utils.progress import tqdm_bars

    was_enabled = datasets.is_progress_bar_enabled()
    datasets.enable_progress_bars()
    try:
        tqdm_bars("Read rows", 3)(3)
        assert "Read rows: 100%" in capsys.readouterr().err
        datasets.disable_progress_bars()
        tqdm_bars("Read rows", 3)(3)
        assert capsys.readouterr().err == ""
    finally:
        if was_enabled:
            datasets.enable_progress_bars()


class TestOtherTasks:
    """`trace`, `value` and `validate` take data sets, too."""

    @pytest.fixture(scope="class")
    def influence(self, pairs: DatasetDict) -> hf_ecif.Influence:
        model = InfluenceModel.from_pretrained(MODEL, CONFIG)
        return model.fit(pairs["train"], pairs["validation"])

    def test_trace(self, influence: hf_ecif.Influence, pairs: DatasetDict) -> None:
        query = pairs["validation"].rename_column("text", "caption")
        found = hf_ecif.trace(influence, query, rows=[3, 5], top_k=4, progress=silent)
        assert len(found) == 2 * 4
        assert {*found["error_row"]} == {3, 5}
        for row in found:
            assert row["error_text"] == query[row["error_row"]]["caption"]
            assert row["cause_text"] == pairs["train"][row["cause_row"]]["text"]
            assert row["score"] == pytest.approx(row["positive"] + row["negative"], abs=1e-6)
        errors = hf_ecif.trace(influence, query, top_k=1, progress=silent)
        wrong = hf_ecif.find_errors(influence, influence.model.rows(query))
        assert errors["error_row"][:] == wrong.rows.tolist()
        with pytest.raises(UserError, match=r"nonsense.*must be one of retrieval-text"):
            hf_ecif.trace(influence, query, errors="nonsense")

    def test_value(self, influence: hf_ecif.Influence, pairs: DatasetDict) -> None:
        slices = ["a", "b"] * (QUERY // 2)
        query = pairs["validation"].add_column("kind", slices)
        given = pairs["train"]
        found = hf_ecif.value(
            MODEL, given, query, slice_column="kind", config=CONFIG, progress=silent
        )
        assert found.select_columns(given.column_names).features == given.features
        assert {"ecif_score", "ecif_score:a", "ecif_stderr:b"} <= {*found.column_names}
        # Three solves at once stop elsewhere within the tolerance than one does.
        expected = influence.scores().task.tolist()
        assert found["ecif_score"][:] == pytest.approx(expected, rel=2e-2, abs=1e-4)
        with pytest.raises(UserError, match="nowhere"):
            hf_ecif.value(MODEL, given, query, slice_column="nowhere", progress=silent)

    def test_validate(self, influence: hf_ecif.Influence, pairs: DatasetDict) -> None:
        options = {"subsets": 4, "repeats": 1}
        found = hf_ecif.validate(influence, pairs["validation"], **options)
        rows = influence.model.rows(pairs["validation"])
        assert found.predicted == hf_ecif.validate(influence, rows, **options).predicted
