"""Requests: inputs and outputs of each task, from which the commands are generated.

A request names sources and files; `InfluenceConfig` says how influence is computed. Nothing here
imports torch, so that ``--help`` answers at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from hf_ecif.config import (
    SUGGEST_PROBABILITY,
    DetectionConfig,
    ExportedRows,
    ExportFormat,
    Options,
    RowFormat,
    Strategy,
    option,
)
from hf_ecif.errors import UserError
from hf_ecif.utils.demo import TRUTH, demo_folder

OVERWRITE = "Replace an earlier run in OUTPUT."
LEARN_ROWS = 20_000  # an audit learns from; of more rows, a random sample of so many
RESUME = "Continue an interrupted run in OUTPUT where it was."

DATASET = (
    "Pairs: a folder or a file (parquet, csv, JSON lines, tars, pictures with their captions "
    "beside them, what save_to_disk wrote), shards/{00000..00012}.tar, or a Hub id."
)

ErrorKind = Literal["retrieval-text", "retrieval-image", "zero-shot"]


@dataclass(frozen=True, kw_only=True)
class DataOptions(Options):
    """The rows that a command works on."""

    dataset: str = option(help=DATASET)
    split: str | None = option(
        None,
        help="Split of the data, also train[:10%] or train+test. If not given, train, or the only "
        "one.",
    )
    config_name: str | None = option(
        None, flag="config", help="Configuration of the data, where there are several."
    )
    image_column: str | None = option(
        None, help="Column of the images. If not given, the one of that type."
    )
    text_column: str | None = option(
        None,
        help="Column of the captions, of lists of captions, or of classes. If not given, the one "
        "of that type.",
    )
    template: str | None = option(
        None,
        help="Sentence around each name of a class, such as 'a photo of a {}'.",
        is_advanced=True,
    )
    limit: int | None = option(None, help="Read the first rows alone, this many.", at_least=1)
    sample: int | None = option(
        None, help="Read this many rows alone, drawn at random.", at_least=1
    )
    format: RowFormat | None = option(
        None,
        help="What the files are, where that is not found by what is there: saved, parquet, arrow, "
        "csv, json, webdataset, imagefolder or sidecars.",
        is_advanced=True,
    )


@dataclass(frozen=True, kw_only=True)
class Sources(DataOptions):
    """Sources of model, data and query."""

    model: str = option("", help="Folder of a saved CLIP-like model, or a Hub id.")
    dataset: str = option("", help=DATASET)
    embeddings: str | None = option(
        None,
        help="Embeddings in place of `model` and `dataset`: an .npz file, or a folder of DataComp "
        "or clip-retrieval. A query is of that form, too.",
    )
    embeddings_key: str | None = option(
        None,
        help="Which embeddings, where there are those of several models: l14 of l14_img and "
        "l14_txt.",
        is_advanced=True,
        needs="embeddings",
    )
    logit_scale: float | None = option(
        None,
        help="Inverse temperature of the model that made the embeddings. If not given, 100, as of "
        "CLIP.",
        is_advanced=True,
        needs="embeddings",
    )
    query: str | None = option(
        None,
        help="Clean pairs like those that the model is for. Their loss is what a pair is judged "
        "by. Chosen from the data if not given.",
    )
    query_split: str | None = option(
        None,
        help="Split of the query. If not given, validation, or the only one.",
        needs="query",
    )
    query_config: str | None = option(
        None,
        help="Configuration of the query, where there are several.",
        is_advanced=True,
        needs="query",
    )
    query_image_column: str | None = option(
        None,
        help="Column of the query's images. If not given, that of the data, or the one of that "
        "type.",
        is_advanced=True,
        needs="query",
    )
    query_text_column: str | None = option(
        None,
        help="Column of the query's captions; likewise.",
        is_advanced=True,
        needs="query",
    )
    processor: str | None = option(
        None,
        help="Folder or Hub id of the processor, where none lies beside the model: that of the "
        "model it was trained from.",
        is_advanced=True,
    )

    @property
    def columns(self) -> tuple[str, str]:
        """Names of the image and the text column, once they are known."""
        assert self.image_column is not None
        assert self.text_column is not None
        return self.image_column, self.text_column


@dataclass(frozen=True, kw_only=True)
class AuditOptions(Options):
    """Options of an audit besides its sources."""

    truth_column: str | None = option(
        None,
        help="Boolean column that says which rows are known to be wrong. Read only after the "
        "detection, to say in the report how much it found.",
    )
    verified_column: str | None = option(
        None,
        help="Boolean column of verdicts: true of rows known to be right, false of wrong ones, "
        "null of all others. The detection builds on it.",
    )
    verdicts: Path | None = option(
        None,
        help="A sheet of `hf-ecif calibrate OUT --sample`, filled in: a person's verdicts on these "
        "rows. The detection builds on them, as on a `verified_column`.",
        is_advanced=True,
    )
    group_column: str | None = option(
        None,
        help="Column of names, a language for instance. Groups of 50 rows or more get a noise "
        "rate and a threshold of their own.",
    )
    trace: int = option(
        0,
        help="Retrieval errors of the query to trace, the worst first, to the pairs behind them: a "
        "section of the report, and a page of its own.",
        at_least=0,
        is_advanced=True,
    )
    learn_rows: int = option(
        LEARN_ROWS,
        help="Rows that the audit learns from, drawn at random: the model is fitted to them, and "
        "the detector calibrated on them. All others are judged one by one by what was learned, in "
        "memory that does not grow with their number.",
        at_least=20,
        is_advanced=True,
    )
    suggest: bool = option(
        True,
        help="Compare all rows with those that the audit learns from: captions that fit flagged "
        "images better, and duplicates.",
    )
    vocabulary: Path | Sequence[str] | None = None
    suggest_probability: float = option(
        SUGGEST_PROBABILITY,
        help="A caption is suggested if it is the right one with this probability, which is "
        "learned from the rows that are not flagged.",
        at_least=0,
        is_advanced=True,
    )
    suggest_margin: float = option(
        0.0,
        help="And if its logit stands this far above the next best, in nats.",
        at_least=0,
        is_advanced=True,
    )
    detection: DetectionConfig = field(default_factory=DetectionConfig)


@dataclass(frozen=True, kw_only=True)
class AuditRequest(AuditOptions, Sources):
    """Request of an audit."""

    demo: bool = option(
        False,
        help="Audit what comes with the package: a small CLIP, and 1,492 pairs of which a fifth "
        "is wrong.",
    )
    output: Path = option(Path("hf-ecif-audit"), help="Folder for the results.")
    overwrite: bool = option(False, help=OVERWRITE)
    resume: bool = option(False, help=RESUME)
    vocabulary: Path | None = option(
        None,
        help="Text file of captions to suggest, one on a line. If not given, the captions of all "
        "rows.",
        is_advanced=True,
    )

    def __post_init__(self) -> None:
        if self.demo:
            self._take_demo()
        super().__post_init__()

    def _take_demo(self) -> None:
        """Fill in the sources that the demo stands for."""
        folder = demo_folder()
        data = str(folder / "data")
        own = {"model": str(folder / "model"), "dataset": data, "query": data}
        for name, value in (own | {"truth_column": TRUTH, "embeddings": None}).items():
            if getattr(self, name) not in ("", None, value):
                raise UserError(f"`demo` brings a `{name}` of its own. Leave one of them out.")
            object.__setattr__(self, name, value)


@dataclass(frozen=True, kw_only=True)
class TraceRequest(Sources):
    """Request of a trace: which errors, among which pairs."""

    output: Path = option(help="New folder for the results.")
    errors: ErrorKind = option(
        "retrieval-text",
        help="Which errors of the query: retrieval-text (captions that retrieve the wrong "
        "image), retrieval-image (images that retrieve the wrong caption), or zero-shot (images "
        "that are given the wrong class; the captions are the classes).",
    )
    rows: list[int] | None = option(
        None, help="A row of the query to trace, right or wrong; give it again for more rows."
    )
    top_k: int = option(10, help="Training pairs for each error.", at_least=1)
    most: int = option(100, help="Errors to trace at most, the worst first.", at_least=1)
    candidates: int = option(
        0,
        help="Let an index propose this many training pairs for each error, and score these "
        "alone; for thousands of errors in large data. 0 scores all pairs.",
        at_least=0,
        is_advanced=True,
    )


@dataclass(frozen=True, kw_only=True)
class ValueRequest(Sources):
    """Request of a valuation: query, slices and candidates."""

    output: Path = option(help="New folder for the results.")
    slice_column: str | None = option(
        None,
        help="Column of the query, language or category for instance. Pairs are ranked for each "
        "of its values, too, and those that help one and hurt another are shown.",
    )
    candidates: str | None = option(
        None,
        help="Pairs that are not trained on, to be ranked by what each would bring if it were "
        "added: those to buy or to label.",
    )
    candidates_split: str | None = option(
        None,
        help="Split of the candidates. If not given, train, or the only one.",
        needs="candidates",
    )
    curves: bool = option(
        False,
        help="Check the ranking: remove 5-30 % of the pairs, the most harmful first, the most "
        "valuable first and at random, and refit.",
    )
    repeats: int = option(3, help="Refits of each point of a curve.", at_least=1, needs="curves")
    test: str | None = option(
        None,
        help="Held-out pairs that curves are judged by; the query if not given.",
        needs="curves",
    )
    test_split: str | None = option(
        None, help="Split of the held-out pairs. If not given, test, or the only one.", needs="test"
    )
    leverage: bool = option(
        False,
        help="Add ecif_leverage, how much of what holds a pair's fit is the pair itself (a lower "
        "bound, to rank by), and warn where the fit has memorised its pairs.",
        is_advanced=True,
    )


@dataclass(frozen=True, kw_only=True)
class RemoveRequest(Sources):
    """Request of a removal: which rows leave the model."""

    where: str = option(
        help="Boolean column, true where a row is to be removed: ecif_flag of an audit's scored/ "
        "folder, for instance."
    )
    output: Path = option(help="New folder for the edited model.")
    retrain: bool = option(False, help="Retrain without the rows, too, to compare.")
    test: str | None = option(
        None, help="Further pairs to measure the models on, beside the query."
    )
    test_split: str | None = option(
        None, help="Split of the test. If not given, test, or the only one.", needs="test"
    )
    steps: int = option(
        2, help="Newton steps, each with fresh curvature.", at_least=1, is_advanced=True
    )


@dataclass(frozen=True, kw_only=True)
class ValidateRequest(Sources):
    """Request of a validation: which retrainings to compare predictions with."""

    output: Path = option(help="New folder for the results.")
    subsets: int = option(64, help="Random subsets to retrain on.", at_least=4)
    removed_share: float = option(0.5, help="Share of the rows that is left out of each subset.")
    repeats: int = option(2, help="Retrainings of each subset, averaged.", at_least=1)


@dataclass(frozen=True, kw_only=True)
class FitRequest(Sources):
    """Request of a fit, by which any number of rows can be scored later."""

    output: Path = option(help="Folder for the fit.")
    overwrite: bool = option(False, help=OVERWRITE)
    resume: bool = option(False, help=RESUME)


@dataclass(frozen=True, kw_only=True)
class ScoreRequest(DataOptions):
    """Request of a scoring with a saved fit."""

    influence: str = option(
        help="Folder of `hf-ecif fit`, or a Hub id of one that was pushed.", is_argument=True
    )
    output: Path = option(help="Folder for the scored rows.")
    streaming: bool = option(False, help="Read the rows as a stream; nothing is downloaded ahead.")
    overwrite: bool = option(False, help=OVERWRITE)
    resume: bool = option(False, help=RESUME)


@dataclass(frozen=True, kw_only=True)
class CleanRequest(Options):
    """Request of a cleaning, and of a test of whether it helps.

    Attributes:
        beside: further strategies, which are counted and compared but not written.
    """

    audit: Path = option(help="Folder of an audit, or its scored/ folder.", is_argument=True)
    strategy: Strategy = option(
        "drop",
        help="drop the flagged rows; drop the worst share by probability; weight all rows "
        "(ecif_weight) and remove none; or relabel flagged rows with the suggested caption, and "
        "drop those without one.",
    )
    beside: tuple[Strategy, ...] = ()
    share: float | None = option(
        None, help="Share of the scored rows, between 0 and 1, that `strategy=worst` drops."
    )
    findings: list[str] | None = option(
        None,
        help="Kinds of findings to drop, separated by commas: rows with these are removed, flagged "
        "or not, and those with another finding stay, but for rows that a person has judged. "
        "'none' keeps them all. If not given, those are removed that are flagged.",
    )
    output: Path | None = option(None, help="New folder for kept/ and removed/.")
    test: str | None = option(
        None,
        help="Held-out rows: neither audited nor the query. The audited model is fine-tuned on the "
        "rows before and after, with as many steps for each, and tested on these.",
    )
    test_split: str | None = option(
        None, help="Split of the test. If not given, test, or the only one.", needs="test"
    )
    class_column: str | None = option(
        None,
        help="Column of the test that names the class of an image, for zero-shot accuracy. Without "
        "it, retrieval alone is tested.",
        needs="test",
    )
    class_template: list[str] | None = option(
        None,
        help="Prompt for a class, {} for its name; 'a photo of a {}' if not given. Give it again "
        "for more prompts, whose embeddings are averaged.",
        needs="class_column",
    )
    repeats: int = option(3, help="Fine-tunings of each kind, averaged.", at_least=1, needs="test")
    model: str | None = option(
        None, help="What is fine-tuned; the audited model if not given.", is_advanced=True
    )
    text_column: str | None = option(
        None,
        help="Column of the captions that are relabelled; the audited one if not given.",
        is_advanced=True,
    )


@dataclass(frozen=True, kw_only=True)
class CalibrateRequest(Options):
    """Which rows a person is to judge, or which verdicts there are and what to make of them."""

    audit: Path = option(help="Folder of an audit.", is_argument=True)
    sample: int | None = option(
        None,
        help="Draw this many rows to judge, half of them flagged, and write a sheet of them.",
    )
    verdicts: Path | None = option(
        None,
        help="The sheet, filled in with right, wrong or cannot tell: csv or parquet; or a JSON or "
        "CSV export of Label Studio.",
    )
    output: Path | None = option(None, help="New folder for the calibrated audit.")
    precision: float | None = option(
        None,
        help="Flag as many rows as possible such that this share of them is wrong. Without it, "
        "flags are those of the best F1.",
    )
    confidence: float = option(0.9, help="Confidence with which the precision is promised.")
    overwrite: bool = option(False, help="Calibrate the audit in place, or draw another sheet.")
    seed: int = option(0, help="Seed of the sample.", at_least=0, is_advanced=True)


@dataclass(frozen=True, kw_only=True)
class ExportRequest(Options):
    """Which rows of an audit leave it, and in which format."""

    audit: Path = option(help="Folder of an audit, or of what `clean` wrote.", is_argument=True)
    to: ExportFormat = option(
        help="parquet-ids, scores without images; uids, DataComp's array; keys, a list for each "
        "tar; webdataset, tars; label-studio, tasks to judge; fiftyone; lightly; or cleanlab, a "
        "table of issues."
    )
    output: Path = option(help="New folder for the files.")
    rows: ExportedRows = option(
        "usual",
        help="all, kept, removed, flagged, or the sample that `hf-ecif calibrate` drew, without "
        "verdicts. If not given, the kept ones as uids, keys and webdataset; the sample, if there "
        "is one, or the flagged ones as label-studio; and else all.",
    )
    id_column: str | None = option(
        None, help="Column of uids; if not given, uid, by itself or in the json of a tar."
    )
    repeats: int = option(
        0,
        help="Write every row as often as this times its ecif_weight, rounded; of what `clean` "
        "wrote with `strategy=weight`, as parquet-ids, uids, keys or webdataset.",
        at_least=0,
    )
