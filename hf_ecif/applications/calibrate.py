"""A few verdicts of a person on an audit: a sheet to fill in, and the audit anew by what it says.

`write_sheet` draws the rows to judge; `run_calibration` reads the verdicts and writes the audit
again, with better probabilities and with flags whose quality is known.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_args

import numpy as np
from datasets import Dataset

from hf_ecif.applications.outputs import require_free
from hf_ecif.applications.requests import CalibrateRequest
from hf_ecif.data.audit_folder import AuditFolder
from hf_ecif.data.cleaning import clean
from hf_ecif.data.columns import set_column
from hf_ecif.data.loading import load_scored
from hf_ecif.data.parquet import write_rows
from hf_ecif.data.summary import (
    CalibrationFacts,
    CurveOfProbability,
    PromiseFacts,
    QualityFacts,
    ShareFacts,
    Summary,
    Truth,
    VerdictCounts,
    Verified,
)
from hf_ecif.data.verdicts import (
    Verdict,
    apply_verdicts,
    before_verdicts,
    read_verdicts,
    verdicts_of,
)
from hf_ecif.detection.calibration import (
    LEVEL,
    Curve,
    Estimate,
    Promise,
    Quality,
    Stratum,
    best_threshold,
    draw_sample,
    estimate,
    promise,
    recalibrate,
    verdicts_needed,
)
from hf_ecif.detection.detect import LEAST_THRESHOLD
from hf_ecif.errors import UserError
from hf_ecif.reports.audit import write_report
from hf_ecif.utils.files import PARTIAL, aside, read_json, write_json
from hf_ecif.utils.formatting import Bools, Floats, share

SHEET, DESIGN = "sheet", "sample.json"  # in the audit's folder `calibration`
FEWEST = 10  # verdicts to calibrate by
MANY_UNTOLD = 0.2  # share of verdicts "cannot tell" from which on the reader is warned


@dataclass(frozen=True)
class Sheet:
    """Rows to judge.

    Attributes:
        rows: their numbers, in the order of the sheet.
        csv: the file to fill in.
        parquet: the same with the images.
    """

    rows: list[int]
    csv: Path
    parquet: Path


def write_sheet(audit: Path, size: int, *, seed: int = 0, overwrite: bool = False) -> Sheet:
    """Draw rows of an audit for a person to judge, and write them in random order.

    The sheet shows image and caption and nothing else: what the audit thinks of a pair would
    colour the verdict. A larger sample of the same seed holds the smaller one, with the verdicts
    that the audit knows already.

    Args:
        audit: folder of an audit.
        size: rows to draw.
        seed: of the choice.
        overwrite: whether an earlier sheet may be replaced.

    Raises:
        UserError: there is no audit or too few rows, or there is a sheet that may be filled in.
    """
    sample = draw_rows(audit, size, seed)
    folder = sample.audit.folder.calibration
    if folder.exists() and not overwrite:
        raise UserError(
            f"{folder} holds a sheet already, perhaps filled in. Read it with `verdicts`, or give "
            "`overwrite` to draw another."
        )
    return sample.write(folder, verdicts_of(sample.audit.scored))


def draw_rows(audit: Path, size: int, seed: int = 0) -> Sample:
    """Rows of an audit for a person to judge, with nothing written.

    Args:
        audit: folder of an audit.
        size: rows to draw.
        seed: of the choice.

    Raises:
        UserError: there is no audit, or these are too few rows.
    """
    if size < FEWEST:
        raise UserError(f"`sample={size}`: it takes at least {FEWEST} verdicts.")
    opened = _open(audit)
    return Sample(opened, opened.draw(size, seed), size, seed)


def sampled_rows(folder: AuditFolder) -> list[int] | None:
    """Numbers of the rows of an audit's sheet, in its order; None where none were drawn."""
    path = folder.calibration / DESIGN
    if not path.is_file():
        return None
    design = read_json(path)
    return _order([stratum["drawn"] for stratum in design["strata"]], design["seed"])


def _order(drawn: list[list[int]], seed: int) -> list[int]:
    """Random order, which tells nothing of flags."""
    rows: list[int] = np.random.default_rng(seed).permutation(np.concatenate(drawn)).tolist()
    return rows


def run_calibration(request: CalibrateRequest) -> Summary:
    """Read verdicts, and write the audit anew by them: kept and removed are all rows again.

    Returns:
        The summary of the new audit; its ``calibration`` has the figures.

    Raises:
        UserError: there is no audit or no sample, a verdict is none, or the output holds
            something.
    """
    _check(request)
    if request.verdicts is None:
        raise UserError("Give `verdicts` to calibrate by, or `sample` to draw rows to judge.")
    opened = _open(request.audit)
    sample = opened.drawn_before()
    known = verdicts_of(opened.scored) | read_verdicts(request.verdicts, len(opened.scored))
    judged = sample.judge(known, request.precision, request.confidence)
    summary = write_calibrated(sample, judged, request.output)
    if request.output is not None:
        calibration = AuditFolder(request.output).calibration
        shutil.copytree(opened.folder.calibration, calibration, dirs_exist_ok=True)
    return summary


SAYING = ("right", "wrong")  # verdicts that say something


@dataclass(frozen=True)
class Judged:
    """What verdicts on a sample say of an audit.

    Attributes:
        verdicts: by row number.
        facts: rate, and quality of the flags of before and of those from now on.
        probability: ``(N,)``, calibrated; nan of unreadable rows.
        flag: ``(N,)``, from now on, without the verdicts themselves.
    """

    verdicts: Mapping[int, Verdict]
    facts: CalibrationFacts
    probability: Floats
    flag: Bools

    @property
    def count(self) -> int:
        """Rows drawn that a person could tell right or wrong."""
        return self.facts.verdicts.right + self.facts.verdicts.wrong


@dataclass(frozen=True)
class Sample:
    """Rows of an audit that were drawn for a person to judge.

    Attributes:
        audit: as it was.
        strata: that the rows were drawn by.
        size: how many were asked for.
        seed: of the choice.
    """

    audit: Opened
    strata: list[Stratum]
    size: int
    seed: int

    @property
    def rows(self) -> list[int]:
        """Row numbers in random order."""
        return _order([stratum.drawn.tolist() for stratum in self.strata], self.seed)

    def judge(
        self,
        verdicts: Mapping[int, Verdict],
        precision: float | None = None,
        confidence: float = LEVEL,
    ) -> Judged:
        """What verdicts say; with few of them, in wide intervals.

        Args:
            verdicts: by row number; those on rows that were not drawn correct these alone.
            precision: share of the flagged rows that is to be wrong; without it, flags are those
                of the best F1.
            confidence: with which that is promised.
        """
        wrong = {row: verdict == "wrong" for row, verdict in verdicts.items() if verdict in SAYING}
        judged = [row for stratum in self.strata for row in stratum.drawn.tolist() if row in wrong]
        known = self.audit.probability
        curve = recalibrate(known[judged], np.array([wrong[row] for row in judged], dtype=bool))
        flag, made = self._choose(wrong, curve, precision, confidence)
        facts = _describe(
            _count(verdicts, self.strata),
            estimate(self.strata, wrong, self.audit.flag),
            estimate(self.strata, wrong, flag),
            curve,
            made,
        )
        return Judged(verdicts, facts, curve(known), flag)

    def _choose(
        self,
        wrong: Mapping[int, bool],
        curve: Curve,
        precision: float | None,
        confidence: float,
    ) -> tuple[Bools, Promise | None]:
        """New flags, and the promise that they keep."""
        known, readable = self.audit.probability, self.audit.readable
        if precision is None:
            calibrated = curve(known)
            cut = best_threshold(calibrated[readable], LEAST_THRESHOLD)
            return calibrated > cut, None  # not-a-number is no larger
        known = np.where(readable, known, -1.0)
        made = promise(self.strata, wrong, known, precision=precision, confidence=confidence)
        return known >= made.least, made

    def write(self, folder: Path, verdicts: Mapping[int, Verdict]) -> Sheet:
        """Write the sheet, with the verdicts that are known, and how its rows were drawn."""
        sheet = Sheet(self.rows, folder / f"{SHEET}.csv", folder / f"{SHEET}.parquet")
        content = self.audit.sheet(sheet.rows, verdicts)
        write_rows(content, sheet.parquet)
        with aside(sheet.csv) as partial:
            content.remove_columns(self.audit.summary.columns.image).to_csv(partial)
        strata = list(map(_describe_stratum, self.strata))
        write_json({"seed": self.seed, "size": self.size, "strata": strata}, folder / DESIGN)
        return sheet


def _check(request: CalibrateRequest) -> None:
    for name in ("precision", "confidence"):
        value = getattr(request, name)
        if value is not None and not 0 < value < 1:
            raise UserError(f"`{name}={value}`: must be between 0 and 1.")
    if request.output is not None:
        require_free(request.output)
    elif not request.overwrite:
        raise UserError(
            "Give an `output` folder for the calibrated audit, or `overwrite` to calibrate it in "
            "place; the probabilities and flags of before stay in columns of their own."
        )


# ----------------------------------------------------------------------------- the audit, as it was


@dataclass(frozen=True)
class Opened:
    """An audit whose flags are to be judged.

    Attributes:
        folder: where it is.
        summary: of it.
        scored: all rows, images not decoded.
        probability: ``(N,)``, as the audit had it before any verdicts; nan of unreadable rows.
        flag: ``(N,)``, likewise; false of unreadable rows.
    """

    folder: AuditFolder
    summary: Summary
    scored: Dataset
    probability: Floats
    flag: Bools

    @property
    def readable(self) -> Bools:
        return np.isfinite(self.probability)

    def draw(self, size: int, seed: int) -> list[Stratum]:
        flagged, others = (np.flatnonzero(part & self.readable) for part in (self.flag, ~self.flag))
        return draw_sample(flagged, others, size, seed)

    def drawn_before(self) -> Sample:
        """The rows of the sheet that was written before."""
        path = self.folder.calibration / DESIGN
        if not path.is_file():
            raise UserError(
                f"No rows of {self.folder.path} were drawn to be judged, and verdicts on others "
                "say nothing of the whole. Draw some first (`sample=30`)."
            )
        design = read_json(path)
        strata = self.draw(design["size"], design["seed"])
        if list(map(_describe_stratum, strata)) != design["strata"]:
            raise UserError(
                f"{path} was drawn from another audit than the one in {self.folder.path}. Draw a "
                "new sample (`sample=30`, `overwrite=True`)."
            )
        return Sample(self, strata, design["size"], design["seed"])

    def sheet(self, rows: list[int], known: Mapping[int, Verdict]) -> Dataset:
        """Image and caption of some rows, with a column for verdicts."""
        columns = self.summary.columns
        chosen = self.scored.select(rows).select_columns([columns.image, columns.text])
        if columns.text != "caption":
            chosen = chosen.rename_column(columns.text, "caption")
        chosen = set_column(chosen, "row", rows, "int64")
        chosen = set_column(chosen, "verdict", [known.get(row, "") for row in rows], "string")
        return chosen.select_columns(["row", "verdict", "caption", columns.image])


def _open(path: Path) -> Opened:
    folder = AuditFolder(path)
    summary = folder.read_summary()
    scored = load_scored(folder, summary.columns)
    return Opened(folder, summary, scored, *before_verdicts(scored))


def _describe_stratum(stratum: Stratum) -> dict[str, object]:
    return {
        "flagged": stratum.flagged,
        "rows": len(stratum.rows),
        "inclusion_probability": stratum.inclusion,
        "drawn": stratum.drawn.tolist(),
    }


# -------------------------------------------------------------------------------- the audit, anew


def _threshold(probability: Floats, flag: Bools) -> float:
    """A cut between the rows that are flagged and those that are not."""
    lowest = probability[flag].min(initial=1.0)
    highest = np.nanmax(probability[~flag], initial=0.0)
    return float(lowest + highest) / 2


def _count(verdicts: Mapping[int, Verdict], strata: list[Stratum]) -> VerdictCounts:
    drawn = {row for stratum in strata for row in stratum.drawn.tolist()}
    found = Counter(verdict for row, verdict in verdicts.items() if row in drawn)
    by_verdict = {name.replace(" ", "_"): found[name] for name in get_args(Verdict)}
    return VerdictCounts(drawn=len(drawn), unasked=len(verdicts.keys() - drawn), **by_verdict)


def _describe(
    counts: VerdictCounts, before: Quality, after: Quality, curve: Curve, made: Promise | None
) -> CalibrationFacts:
    def facts(one: Estimate) -> ShareFacts:
        return ShareFacts(**asdict(one))

    def quality(one: Quality) -> QualityFacts:
        return QualityFacts(precision=facts(one.precision), recall=facts(one.recall))

    asked = None
    if made is not None:
        asked = PromiseFacts(
            precision=made.precision,
            confidence=made.confidence,
            holds=made.holds,
            supported=made.supported,
        )
    return CalibrationFacts(
        level=LEVEL,
        verdicts=counts,
        noise_rate=facts(after.noise_rate),
        before=quality(before),
        after=quality(after),
        curve=CurveOfProbability(**asdict(curve)),
        promise=asked,
        warnings=[*_warnings(counts, asked)],
    )


def _warnings(counts: VerdictCounts, asked: PromiseFacts | None) -> Iterator[str]:
    judged = counts.right + counts.wrong + counts.cannot_tell
    if counts.cannot_tell > MANY_UNTOLD * judged:
        yield (
            f"{counts.cannot_tell} of {judged} pairs could not be told right or wrong. The figures "
            "hold for pairs that can."
        )
    if asked is not None and not asked.holds:
        needed = verdicts_needed(asked.precision, asked.confidence)
        yield (
            f"That {share(asked.precision)} of the flagged rows are wrong cannot be promised with "
            f"{share(asked.confidence)} confidence, so only rows that were judged wrong are "
            f"flagged. It takes at least {needed} verdicts on flagged rows, all of them wrong. "
            f"Judge more (`sample={2 * (needed + 4)}`), or promise less: of the rows that the "
            f"audit flags, {share(asked.supported)} are wrong with this confidence."
        )


def write_calibrated(sample: Sample, judged: Judged, output: Path | None) -> Summary:
    """Write an audit anew by verdicts: kept and removed are all rows again.

    Args:
        sample: the rows that were drawn.
        judged: from `Sample.judge`.
        output: new folder; in place if absent, where rows are replaced once all are whole.

    Raises:
        UserError: too few rows have a verdict.
    """
    opened, facts = sample.audit, judged.facts
    if judged.count < FEWEST:
        raise UserError(
            f"Of the rows that were drawn, {judged.count} have a verdict of right or wrong, and it "
            f"takes {FEWEST}. Judge more of them."
        )
    scored = apply_verdicts(opened.scored, judged.verdicts, judged.probability, judged.flag)
    threshold = _threshold(judged.probability, judged.flag)
    result = clean(scored)
    flag = np.array([value is True for value in scored.with_format(None)["ecif_flag"][:]])
    before = opened.summary
    earlier = before.calibration.warnings if before.calibration else []
    verified = Verified(right=facts.verdicts.right, wrong=facts.verdicts.wrong)
    summary = before.replace(
        flagged=int(flag.sum()),
        kept=len(result.kept),
        removed=len(result.removed),
        noise=before.noise.replace(
            rate=facts.noise_rate.value,
            threshold=threshold,
            borderline=0,
            interval=(facts.noise_rate.low, facts.noise_rate.high),
            rate_is_bound=False,
            abstains=None,
            verified=verified,
        ),
        groups=None,
        truth=before.truth and _judge(before.truth, scored, flag),
        calibration=facts,
        warnings=[*(w for w in before.warnings if w not in earlier), *facts.warnings],
    )
    home = opened.folder
    new = AuditFolder(output or home.path.resolve().parent / f".{home.path.name}{PARTIAL}")
    if output is None:
        shutil.rmtree(new.path, ignore_errors=True)
    new.write_rows(result, scored)
    write_report(scored, summary, new.report)
    if output is None:
        home.replace_rows(new)
        home.finish(summary)
    else:
        new.finish(summary)
    return summary


def _judge(truth: Truth, scored: Dataset, flag: Bools) -> Truth | None:
    """What is known to be wrong, against the new flags; the ranking is that of the audit."""
    if truth.column not in scored.column_names:
        return None
    plain = scored.with_format(None)
    known = zip(plain[truth.column][:], plain["ecif_flag"][:], strict=True)
    wrong = np.array([bad is True and readable is not None for bad, readable in known])
    found = int((wrong & flag).sum())
    return truth.replace(
        found=found,
        precision=found / int(flag.sum()) if flag.any() else None,
        recall=found / int(wrong.sum()) if wrong.any() else None,
    )
