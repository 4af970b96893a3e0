"""What a run tells of itself: one typed, versioned record for each kind of run, kept as JSON.

`Summary` is that of an audit. Records are frozen, refuse fields that they do not know, and come
back from JSON as they went: ``Summary.load(path)`` reads what ``summary.save(path)`` wrote, and
what version 0.1 did. A number that JSON cannot hold is null there, and not-a-number here.
"""

from __future__ import annotations

import warnings
from math import nan
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from hf_ecif.errors import UserError
from hf_ecif.utils.files import read_json, to_json, write_json
from hf_ecif.utils.formatting import share

FORMAT = 2  # version 0.1 wrote none; counted up whenever a field changes its name or its meaning

Real = Annotated[float, BeforeValidator(lambda value: nan if value is None else value)]


class Record(BaseModel):
    """Named values; those of a nested record are attributes, too."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    def __getitem__(self, name: str) -> Any:
        """The value of a field, as of the dictionaries of version 0.1."""
        if name not in type(self).model_fields:
            raise KeyError(name)
        warnings.warn(
            f"summary[{name!r}] is removed in the next version: use summary.{name}",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(self, name)

    def replace(self, **changes: Any) -> Self:
        """Copy with other values in some fields."""
        return type(self)(**dict(self) | changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return self.model_dump()


AnyRecord = TypeVar("AnyRecord", bound=Record)


# ----------------------------------------------------------------------------- parts of summaries


class Columns(Record):
    """Names of the two columns of a pair."""

    image: str
    text: str

    @property
    def names(self) -> tuple[str, str]:
        """Both, the image first."""
        return self.image, self.text


class Reading(Record):
    """How pairs were made of what was read.

    Attributes:
        format: what the files were read as; None of a data set in memory.
        config: which configuration of several.
        limit: how many of the first rows were read; None of all.
        sample: how many rows were drawn at random; None of all.
        template: sentence around the name of a class.
        text: column that captions were made of, where they are not in it as they are.
    """

    format: str | None = None
    config: str | None = None
    limit: int | None = None
    sample: int | None = None
    template: str | None = None
    text: str | None = None


class QueryFacts(Record):
    """What stood for the purpose of the model.

    Attributes:
        source: in words.
        dataset: where its rows are from; None where they were chosen from the data.
        split: of ``dataset``.
        rows: how many could be read.
        chosen: whether they were chosen from the data.
        overlap: images that are in the data, too.
        loss_before_fit: its loss under the model as given, in nats.
        loss: the same after the fit.
        alignment: cosine of its gradient and that of the training rows.
        slice_column: by which it was cut into slices, for a valuation.
        unnamed: its rows in no slice.
        columns: of its pairs, where they have other names than those of the data.
        config: which configuration of several.
    """

    source: str
    rows: int
    chosen: bool
    dataset: str | None = None
    split: str | None = None
    overlap: int = 0
    loss_before_fit: Real = nan
    loss: Real = nan
    alignment: Real = nan
    slice_column: str | None = None
    unnamed: int = 0
    columns: Columns | None = None
    config: str | None = None


class Solve(Record):
    """A linear system that was solved; the fields are those of `SolveReport`.

    Attributes:
        purpose: what for.
        relative_damping: in units of the mean eigenvalue.
    """

    purpose: str
    method: str
    iterations: int = 0
    relative_residual: Real = nan
    tolerance: Real = nan
    converged: bool = True
    damping: Real = nan
    relative_damping: Real = nan
    mean_eigenvalue: Real = nan
    largest_eigenvalue: float | None = None
    advice: str = ""

    @property
    def warning(self) -> str | None:
        """What the reader of the figures must know of it; None of one that converged."""
        if self.converged:
            return None
        advice = f": {self.advice}" if self.advice else ""
        return (
            f"The solve for the {self.purpose} reached a relative residual of "
            f"{self.relative_residual:.1e}, not {self.tolerance:.0e}{advice}."
        )


class FitFacts(Record):
    """How the attributed parameters were fitted; losses in nats, of the training rows.

    Attributes:
        epochs: passes over the data.
        gradient_norm: of the objective, after the fit.
        parameters: which were attributed.
        count: how many those are.
    """

    loss_before: Real
    loss_after: Real
    count: int
    epochs: int = 0
    gradient_norm: Real = nan
    parameters: str = ""


class Loaded(Record):
    """How the model was read, which scores depend on: its commit on the Hub, dtype, processor."""

    revision: str | None = None
    dtype: str | None = None
    image_processor: str | None = None


class Provenance(Record):
    """Where the figures of a run come from: what every summary has.

    Attributes:
        reading: how pairs were made of the data.
        processor: where the model's processor is from, if it does not lie beside the model.
        rows: of the data.
        scored: those that could be read.
        unreadable: those that could not.
        config: every setting in force, by its name.
        versions: of the packages that figures depend on.
        warnings: what a reader of the figures must know.
    """

    format_version: int = FORMAT
    model: str
    processor: str | None = None
    dataset: str
    split: str
    columns: Columns
    reading: Reading = Reading()
    rows: int
    scored: int
    unreadable: int
    query: QueryFacts
    config: dict[str, Any]
    versions: dict[str, str] = {}
    seed: int = 0
    warnings: list[str] = []

    def save(self, path: Path) -> None:
        """Write as JSON, in one step."""
        write_json(self.to_dict(), path)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote, or what version 0.1 did.

        Raises:
            UserError: the file cannot be read, is of a newer version, or is something else.
        """
        return cls.from_dict(read_json(path), str(path))

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "summary") -> Self:
        """Read what `to_dict` gave.

        Args:
            values: plain ones.
            source: where they are from, for the error.

        Raises:
            UserError: they are of a newer version, or of something else.
        """
        written = values.get("format_version", 1)
        if written > FORMAT:
            raise UserError(
                f"{source} was written by a newer version of hf_ecif (format {written}; this one "
                f"reads up to {FORMAT}). Update hf_ecif."
            )
        if written < FORMAT:
            values = cls._upgrade(values) | {"format_version": FORMAT}
        return _validated(cls, values, source)

    @classmethod
    def _upgrade(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Values of version 0.1 in today's format."""
        return values


def _validated(kind: type[AnyRecord], values: dict[str, Any], source: str) -> AnyRecord:
    try:
        return kind.model_validate_json(to_json(values))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        problem = "is missing" if first["type"] == "missing" else first["msg"].lower()
        raise UserError(
            f"{source} cannot be used: {place!r} {problem}. It is of another version, or of "
            "something else. Make it again."
        ) from error


# --------------------------------------------------------------------------------------- an audit


class Verified(Record):
    """Rows that a person has judged, by the verdict."""

    right: int
    wrong: int


class Noise(Record):
    """How many pairs are wrong, and from where they are flagged.

    Attributes:
        rate: estimated share of the readable rows.
        threshold: of the probability, above which a row is flagged.
        borderline: rows whose error reaches across it.
        interval: of the rate, at 95 % confidence, or at that of the calibration where there is
            one; None where it is not known.
        rate_is_bound: whether no row is known to be right, so that only the upper end of the
            interval is to be relied on.
        abstains: why nothing is flagged, where the model cannot tell right from wrong.
        verified: rows with a person's verdict that the rate was estimated with.
        injected_auroc: how well mismatches made on purpose are told from the rest, by probability.
        injected_score_auroc: the same by the score alone; below 0.5, it is inverted.
    """

    rate: Real
    threshold: Real
    borderline: int = 0
    interval: tuple[float, float] | None = None
    rate_is_bound: bool = False
    abstains: str | None = None
    verified: Verified | None = None
    injected_auroc: Real = nan
    injected_score_auroc: Real = nan

    @property
    def told(self) -> str:
        """The rate with its interval, where that is known, in words."""
        if self.abstains:
            return "unknown"
        return f"{share(self.rate)} ({self.interval_told})" if self.interval else share(self.rate)

    @property
    def interval_told(self) -> str:
        """The interval in words, its upper end alone for a bound; empty where it is not known."""
        if self.interval is None:
            return ""
        low, high = map(share, self.interval)
        return f"at most {high}" if self.rate_is_bound else f"{low} to {high}"


class GroupFacts(Record):
    """A group of rows with a noise rate and a threshold of its own."""

    group: str
    rows: int
    noise_rate: Real
    threshold: Real
    flagged: int
    borderline: int


class Groups(Record):
    """Noise by group.

    Attributes:
        column: that names the groups.
        smallest: rows that a group needs for a rate of its own.
        other_rows: judged by the rate of all rows.
        table: the groups that have one.
    """

    column: str
    smallest: int
    other_rows: int
    table: list[GroupFacts]


class Suggestions(Record):
    """Captions that fit better.

    Attributes:
        count: rows with one.
        expected_right: how many of these are the right caption, by their probabilities.
        least_probability: of being right, from which on a caption is suggested.
        least_margin: by which its logit stands above the next best, in nats.
        vocabulary: the file that they are from; None where they are captions of the data.
    """

    count: int
    expected_right: Real = nan
    least_probability: Real = 0.0
    least_margin: Real
    vocabulary: str | None = None


class DuplicateCounts(Record):
    """Groups of more than one row, the rows in them, and the rows of the largest."""

    groups: int
    rows: int
    largest: int


class Duplicates(Record):
    """Pairs with nearly the same image, the same caption, or either."""

    image: DuplicateCounts
    caption: DuplicateCounts
    either: DuplicateCounts


class Truth(Record):
    """How much of what is known to be wrong was found; the audit never sees this.

    Attributes:
        column: that tells.
        misaligned: rows known to be wrong.
        found: those that are flagged.
        precision: share of the flags that are right; None without flags.
        recall: share of the wrong rows that are flagged; None without any.
        precision_at_20: of the twenty rows of the highest probability.
    """

    column: str
    misaligned: int
    found: int
    precision: float | None = None
    recall: float | None = None
    auroc: float | None = None
    average_precision: float | None = None
    precision_at_20: float | None = None


class CleaningFacts(Record):
    """What a cleaning made of the rows of an audit.

    Attributes:
        audit: its folder.
        counts: rows by what became of them, as `CleanResult.counts` has them.
        findings: removed rows by their finding.
        expected_right: how many of the captions that were replaced are right now, by their
            probabilities; None where that is not known.
        comparison: of models fine-tuned on the rows before and after.
    """

    audit: str
    strategy: str
    share: float | None = None
    counts: dict[str, int]
    findings: dict[str, int] = {}
    expected_right: float | None = None
    comparison: ComparisonFacts | None = None


def _upgrade_cleaning(cleaning: dict[str, Any]) -> dict[str, Any]:
    """Version 0.1 had the measures of an outcome beside its name."""
    compared = cleaning.get("comparison")
    if compared:
        outcomes = [
            {name: one.pop(name) for name in ("version", "rows")} | {"measures": one}
            for one in map(dict, compared["outcomes"])
        ]
        compared = compared | {"outcomes": outcomes}
    return cleaning | {"comparison": compared}


class ShareFacts(Record):
    """A share of rows with its interval; null where nothing is there to have one."""

    value: Real
    low: Real
    high: Real


class QualityFacts(Record):
    """How good flags are: share of them that is wrong, and of the wrong rows that has one."""

    precision: ShareFacts
    recall: ShareFacts


class CurveOfProbability(Record):
    """From an audit's probability to a calibrated one: ``shift + stretch * log-odds``."""

    shift: Real
    stretch: Real


class PromiseFacts(Record):
    """A precision that was asked for.

    Attributes:
        precision: share of the flagged rows that is to be wrong.
        confidence: with which.
        holds: whether the verdicts support it.
        supported: the share that they support for the flags of the audit.
    """

    precision: Real
    confidence: Real
    holds: bool
    supported: Real


class VerdictCounts(Record):
    """Rows that a person judged.

    Attributes:
        drawn: at random, to be judged.
        right: of these; likewise ``wrong`` and ``cannot_tell``.
        unasked: rows with a verdict that were not drawn.
    """

    drawn: int
    right: int
    wrong: int
    cannot_tell: int
    unasked: int


class CalibrationFacts(Record):
    """What verdicts on a random sample say of an audit.

    Attributes:
        level: probability with which the intervals hold.
        before: quality of the flags of the audit.
        after: quality of the new flags, those of the judged rows not yet corrected.
        promise: None where no precision was asked for.
        warnings: what a reader of the figures must know.
    """

    level: Real
    verdicts: VerdictCounts
    noise_rate: ShareFacts
    before: QualityFacts
    after: QualityFacts
    curve: CurveOfProbability
    promise: PromiseFacts | None = None
    warnings: list[str] = []


class ReviewFacts(Record):
    """Rows that a person decided on, by the decision; those left open are ``unsure``."""

    decided: int
    keep: int
    remove: int
    recaption: int
    unsure: int = 0


class Summary(Provenance):
    """What an audit found.

    Attributes:
        flagged: rows that look misaligned.
        kept: rows to go on with.
        removed: the others; both together are all rows.
        learned_from: rows that the audit learned from, where it judged others by them; None where
            it learned from all.
        findings: rows by the kind of what is the matter with them.
        unreadable_reasons: rows that could not be read, by the reason.
        groups: noise by group, where that was asked for.
        suggestions: None where captions were not compared; likewise ``duplicates``.
        truth: None where nothing is known to be wrong.
        trace: errors of the query and what is behind them, where that was asked for.
        cleaning: where these rows were parted by `clean`; ``review``, where by a person.
        calibration: where verdicts on a sample moved probabilities and flags.
        fingerprints: hashes of the model, the data, the query and the config.
        seconds: by stage.
        about: a sentence on what was audited.

    Examples:
        >>> import hf_ecif
        >>> demo = hf_ecif.load_demo()
        >>> pairs = demo.dataset.select(range(60))
        >>> quick = hf_ecif.InfluenceConfig(fit_epochs=1, probes=2, partitions=2)
        >>> audit = hf_ecif.audit(demo.model, pairs, demo.query, config=quick)
        >>> audit.summary.rows == audit.summary.kept + audit.summary.removed
        True
    """

    flagged: int
    kept: int
    removed: int
    noise: Noise
    fit: FitFacts
    learned_from: int | None = None
    findings: dict[str, int] = {}
    unreadable_reasons: dict[str, int] = {}
    groups: Groups | None = None
    suggestions: Suggestions | None = None
    duplicates: Duplicates | None = None
    solvers: list[Solve] = []
    loaded: Loaded = Loaded()
    truth: Truth | None = None
    trace: TraceFindings | None = None
    cleaning: CleaningFacts | None = None
    review: ReviewFacts | None = None
    calibration: CalibrationFacts | None = None
    fingerprints: dict[str, str] = {}
    seconds: dict[str, Real] = {}
    about: str | None = None

    @classmethod
    def _upgrade(cls, values: dict[str, Any]) -> dict[str, Any]:
        noise, trace = dict(values.get("noise", {})), values.get("trace")
        for name in ("auroc", "score_auroc"):
            if f"planted_{name}" in noise:
                noise[f"injected_{name}"] = noise.pop(f"planted_{name}")
        if trace:
            trace = trace | {"worst": [_upgrade_error(error) for error in trace["worst"]]}
        cleaning = values.get("cleaning") and _upgrade_cleaning(values["cleaning"])
        return values | {"noise": noise, "trace": trace, "cleaning": cleaning}


# ------------------------------------------------------------------------- a trace, and its errors


class Cause(Record):
    """A training pair behind an error; the values are those of `Traces`."""

    rank: int
    cause_row: int
    cause_text: str
    role: Literal["positive", "negative"]
    score: Real
    stderr: Real
    relative: Real
    positive: Real
    negative: Real
    partner_row: int | None
    partner_text: str | None
    partner_part: Real


class TracedError(Record):
    """A row that is mispredicted, what was predicted instead, and the pairs behind it.

    Attributes:
        error_row: its number in the query.
        predicted_row: number of the row that was predicted.
        margin: log-odds against the right answer, in nats.
        causes: the most responsible first.
    """

    error_row: int
    error_text: str
    predicted_row: int
    predicted_text: str
    margin: Real
    causes: list[Cause]


class ErrorCounts(Record):
    """Errors of a query.

    Attributes:
        kind: such as ``retrieval-text``.
        wrong: captions or images that are mispredicted; None where rows were chosen, right or
            wrong.
        traced: those that were traced.
        of: different captions, or images, of the query.
    """

    kind: str
    wrong: int | None
    traced: int
    of: int

    @property
    def asked(self) -> str:
        """What the query is asked with, in words."""
        return "captions" if self.kind == "retrieval-text" else "images"


class Often(Record):
    """A training pair that is behind several errors."""

    row: int
    text: str
    errors: int


class TraceFacts(Record):
    """What was traced.

    Attributes:
        errors: how many there are.
        top_k: pairs that each was traced to.
        as_negatives: share of these that act as negatives; None where there is no error.
        often: the pairs behind several errors.
    """

    errors: ErrorCounts
    top_k: int
    as_negatives: float | None
    often: list[Often]


class TraceFindings(TraceFacts):
    """Traced errors in the summary of an audit, with the worst of them."""

    worst: list[TracedError]


class TraceSummary(TraceFacts, Provenance):
    """What ``hf-ecif trace`` found.

    Attributes:
        candidates: pairs that were scored for each error; None where all were.
    """

    candidates: int | None = None
    solvers: list[Solve] = []
    seconds: Real = nan


def _upgrade_error(error: dict[str, Any]) -> dict[str, Any]:
    """Version 0.1 told of an error again with each of its causes."""
    causes = [
        {name: value for name, value in cause.items() if name in Cause.model_fields}
        for cause in error["causes"]
    ]
    return error | {"causes": causes}


# ------------------------------------------------------------------------------------ a valuation


class Entry(Record):
    """A pair in a ranking: its score in nats, the two parts of it, and its standard error."""

    row: int
    score: Real
    positive: Real
    negative: Real
    stderr: Real


class Rankings(Record):
    """The pairs with the lowest and with the highest values."""

    lowest: list[Entry]
    highest: list[Entry]


class SliceFacts(Record):
    """A slice of the query; the fields are those of `Slice`."""

    name: str
    rows: int
    loss_before: Real
    loss: Real
    harmful_share: Real
    agreement: Real
    rankings: Rankings


class Side(Entry):
    """What a pair does to one slice."""

    slice: str


class ConflictFacts(Record):
    """A pair that helps one slice and hurts another, clearly."""

    row: int
    strength: Real
    helps: Side
    hurts: Side


class CurveFacts(Record):
    """Losses and recalls of refits without growing shares of the rows, a list for each share."""

    name: str
    shares: list[Real]
    losses: list[list[Real]]
    recalls: list[list[Real]]


class Curves(Record):
    """Removal curves.

    Attributes:
        judge: the rows that they are measured on.
        held_out: whether those are others than the query.
        repeats: refits for each point.
        verdict: whether the ranking holds, in words.
    """

    judge: str
    held_out: bool
    repeats: int
    curves: list[CurveFacts]
    verdict: str


class Candidates(Record):
    """What new pairs would bring.

    Attributes:
        valued: those that could be read.
        worth_having: whose value is below zero by two standard errors or more.
        slices: rankings for each slice of the query.
    """

    source: str
    rows: int
    valued: int
    unreadable: int
    worth_having: int
    rankings: Rankings
    slices: dict[str, Rankings]


class LeverageFacts(Record):
    """Leverages of all rows, and of a sample that shows whether the fit has memorised them."""

    median: Real
    sample_median: Real
    warning: str | None


class ValueSummary(Provenance):
    """What ``hf-ecif value`` found.

    Attributes:
        harmful: rows with a negative score; ``clearly_harmful``, by two standard errors.
        slices: the whole query first.
        skipped: slices without a ranking, with the reason.
    """

    unreadable_reasons: dict[str, int]
    harmful: int
    clearly_harmful: int
    slices: list[SliceFacts]
    skipped: dict[str, str]
    conflicts: list[ConflictFacts]
    curves: Curves | None
    candidates: Candidates | None
    leverage: LeverageFacts | None
    solvers: list[Solve]
    seconds: Real = nan


# ------------------------------------------------------- a removal, a validation, a comparison


class RemovalFacts(Record):
    """How rows were removed from a model; the fields are those of `RemovalReport`."""

    removed: int
    change: Real
    residuals: list[Real]
    solvers: list[Solve]
    trials: int


class RemovalSummary(Provenance):
    """What ``hf-ecif remove`` did, as in ``removal.json``.

    Attributes:
        where: column of the rows that were removed.
        test: the rows that it is judged by beside the query, in words.
        predicted_change: of the query's loss by the scores alone, in nats.
        measures: figures by what they are measured on (``query``, ``test``), then by the model
            (``before``, ``after``, ``retrained``), then by the measure.
        seconds: by stage.
    """

    where: str
    test: str | None
    predicted_change: Real
    measures: dict[str, dict[str, dict[str, Real]]]
    removal: RemovalFacts
    seconds: dict[str, Real] = {}

    @classmethod
    def _upgrade(cls, values: dict[str, Any]) -> dict[str, Any]:
        removal = dict(values.get("removal", {}))
        removal["solvers"] = [
            {"purpose": f"step {step}"} | solve
            for step, solve in enumerate(removal.get("solvers", []), 1)
        ]
        return values | {"removal": removal}


class ValidationSummary(Provenance):
    """Predicted and true changes, as in ``validation.json``; the fields are those of `Validation`.

    Attributes:
        repeats: retrainings on each subset.
        verdict: what the correlation means, in words.
        seconds: of one retraining.
    """

    removed_share: Real
    repeats: int
    predicted: list[Real]
    actual: list[Real]
    spearman: Real
    low: Real
    high: Real
    ceiling: float | None
    slope: Real
    sign_agreement: Real
    signs_right: float | None = None
    verdict: str
    seconds: Real


class Measured(Record):
    """A measure over repeated trainings; the error is None of a single one."""

    mean: Real
    stderr: float | None
    values: list[Real]

    def gain(self, other: Measured) -> tuple[float, float | None]:
        """By how much it is above another, repeat by repeat: mean and standard error."""
        gains = [ours - theirs for ours, theirs in zip(self.values, other.values, strict=True)]
        error = stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else None
        return fmean(gains), error


class OutcomeFacts(Record):
    """What training on one version of the rows led to; see `Outcome`."""

    version: str
    rows: Real
    measures: dict[str, Measured]


class ComparisonFacts(Record):
    """Models fine-tuned on the rows before and after a cleaning; see `Comparison`."""

    test: str
    test_rows: int
    outcomes: list[OutcomeFacts]
    warnings: list[str]

    @property
    def measure(self) -> str:
        """What versions are judged by: zero-shot accuracy if the test has classes, else R@1."""
        accuracy = "zero_shot_accuracy"
        return accuracy if accuracy in self.outcomes[0].measures else "text_to_image_recall@1"

    @property
    def best(self) -> str:
        """Version of the highest `measure`."""
        return max(self.outcomes, key=lambda one: one.measures[self.measure].mean).version

    def gain(self, version: str, over: str) -> tuple[float, float | None]:
        """By how much a version's `measure` is above another's, and its standard error.

        The error is that over the repeats together with that of the choice of test rows: for a
        gain ``g``, at least a share ``g`` of the test rows changed from wrong to right, so the
        latter alone has a variance of at least ``g (1 - g) / n``. That of a single repeat is not
        known.
        """
        measures = {one.version: one.measures[self.measure] for one in self.outcomes}
        gain, error = measures[version].gain(measures[over])
        if error is None:
            return gain, None
        sampling = abs(gain) * (1 - abs(gain)) / self.test_rows
        return gain, (error**2 + sampling) ** 0.5
