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
from typing import Any, get_args

import numpy as np
from datasets import Dataset, Value

from hf_ecif.data.cleaning import CleanResult, clean
from hf_ecif.data.loading import load_rows
from hf_ecif.data.parquet import write_rows, write_shards
from hf_ecif.data.schema import check_columns
from hf_ecif.data.verdicts import VERDICT, Verdict, read_verdicts
from hf_ecif.detection.calibration import (
    LEVEL,
    Curve,
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
from hf_ecif.utils.files import PARTIAL, aside, read_json, require_new, write_json
from hf_ecif.utils.formatting import Bools, Floats

FOLDER = "calibration"  # in that of the audit
SHEET, DESIGN = "sheet", "sample.json"
AUDIT_PROBABILITY, AUDIT_FLAG = "ecif_audit_probability", "ecif_audit_flag"
FEWEST = 10  # verdicts to calibrate by
SAYING = ("right", "wrong")  # verdicts that say something
JUDGED, BY_OTHERS = "judged wrong by a person", "by the verdicts on other rows"  # in reasons
PARTS = ("scored", "kept", "removed")
MANY_UNTOLD = 0.2  # share of verdicts "cannot tell" from which on the reader is warned


@dataclass(frozen=True, kw_only=True)
class CalibrateRequest:
    """Which verdicts, and what to make of them; the fields are the options of ``hf-ecif
    calibrate``.

    Attributes:
        audit: Folder of an audit.
        verdicts: The sheet, filled in, or an export of Label Studio.
        output: New folder for the calibrated audit; None calibrates in place.
        overwrite: Whether the audit itself may be replaced.
        precision: Share of the flagged rows that must be wrong; None flags for the best F1.
        confidence: With which this is promised.
    """

    audit: Path
    verdicts: Path
    output: Path | None = None
    overwrite: bool = False
    precision: float | None = None
    confidence: float = 0.9


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


@dataclass(frozen=True)
class Calibration:
    """What verdicts say of an audit.

    Attributes:
        before: how good the flags of the audit are.
        after: how good the new flags are, those of the judged rows not yet corrected.
        curve: from the probabilities of the audit to better ones.
        promise: the cut with a guarantee, where one was asked for.
        counts: verdicts by what they say; ``unasked`` are on rows that were not drawn.
        summary: of the new audit, as in ``summary.json``.
    """

    before: Quality
    after: Quality
    curve: Curve
    promise: Promise | None
    counts: dict[str, int]
    summary: dict[str, Any]


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
    opened = _open(audit)
    if size < FEWEST:
        raise UserError(f"--sample {size}: it takes at least {FEWEST} verdicts.")
    folder = audit / FOLDER
    if folder.exists() and not overwrite:
        raise UserError(
            f"{folder} holds a sheet already, perhaps filled in. Read it with --verdicts, or give "
            "--overwrite to draw another."
        )
    strata = opened.draw(size, seed)
    order = np.random.default_rng(seed).permutation(np.concatenate([s.drawn for s in strata]))
    sheet = opened.sheet(order.tolist())
    write_rows(sheet, folder / f"{SHEET}.parquet")
    csv = folder / f"{SHEET}.csv"
    with aside(csv) as partial:
        sheet.remove_columns(opened.image).to_csv(partial)
    write_json(
        {
            "seed": seed,
            "size": size,
            "strata": [
                {
                    "flagged": stratum.flagged,
                    "rows": len(stratum.rows),
                    "inclusion_probability": stratum.inclusion,
                    "drawn": stratum.drawn.tolist(),
                }
                for stratum in strata
            ],
        },
        folder / DESIGN,
    )
    return Sheet(order.tolist(), csv, folder / f"{SHEET}.parquet")


def run_calibration(request: CalibrateRequest) -> Calibration:
    """Read verdicts, and write the audit anew by them: kept and removed are all rows again.

    Raises:
        UserError: there is no audit or no sample, a verdict is none, or the output holds
            something.
    """
    _check(request)
    opened = _open(request.audit)
    strata = opened.drawn_before()
    verdicts = opened.verdicts() | read_verdicts(request.verdicts, len(opened.scored))
    told = {row: verdict == "wrong" for row, verdict in verdicts.items() if verdict in SAYING}
    judged = [row for stratum in strata for row in stratum.drawn.tolist() if row in told]
    if len(judged) < FEWEST:
        raise UserError(
            f"Of the rows that were drawn, {len(judged)} have a verdict of right or wrong, and it "
            f"takes {FEWEST}. Fill in more of {request.audit / FOLDER / SHEET}.csv."
        )
    curve = recalibrate(opened.probability[judged], np.array([told[row] for row in judged]))
    flag, made = _choose(opened, strata, told, curve, request)
    before = estimate(strata, told, opened.flag)
    after = estimate(strata, told, flag)
    counts = _count(verdicts, strata)
    calibrated = _Calibrated(opened, verdicts, curve(opened.probability), flag)
    scored = calibrated.dataset()
    result = clean(scored)
    warnings = [*_warnings(counts, made, judged)]
    summary = opened.summary | {
        "flagged": int(calibrated.corrected.sum()),
        "kept": len(result.kept),
        "removed": len(result.removed),
        "noise": opened.summary["noise"]
        | {
            "rate": after.noise_rate.value,
            "threshold": calibrated.threshold,
            "borderline": 0,
        },
        "groups": None,
        "truth": _judge(opened, calibrated.corrected),
        "calibration": _describe(before, after, curve, made, counts) | {"warnings": warnings},
        "warnings": [*opened.warnings, *warnings],
    }
    _write(scored, result, summary, request)
    return Calibration(before, after, curve, made, counts, summary)


# ----------------------------------------------------------------------------- the audit, as it was


@dataclass(frozen=True)
class _Opened:
    """An audit whose flags are to be judged.

    Attributes:
        folder: where it is.
        scored: all rows, images not decoded.
        summary: of it.
        probability: ``(N,)``, as the audit had it before any verdicts; nan of unreadable rows.
        flag: ``(N,)``, likewise; false of unreadable rows.
    """

    folder: Path
    scored: Dataset
    summary: dict[str, Any]
    probability: Floats
    flag: Bools

    @property
    def image(self) -> str:
        return str(self.summary["columns"]["image"])

    @property
    def warnings(self) -> list[str]:
        """Those of the audit, without those of an earlier calibration."""
        earlier = (self.summary.get("calibration") or {}).get("warnings", [])
        return [warning for warning in self.summary["warnings"] if warning not in earlier]

    @property
    def readable(self) -> Bools:
        return np.isfinite(self.probability)

    def draw(self, size: int, seed: int) -> list[Stratum]:
        flagged, others = (np.flatnonzero(part & self.readable) for part in (self.flag, ~self.flag))
        return draw_sample(flagged, others, size, seed)

    def drawn_before(self) -> list[Stratum]:
        """The strata that the sheet was drawn by."""
        path = self.folder / FOLDER / DESIGN
        if not path.is_file():
            raise UserError(
                f"No rows of {self.folder} were drawn to be judged, and verdicts on others say "
                "nothing of the whole. Draw some first: hf-ecif calibrate --sample 30."
            )
        design = read_json(path)
        strata = self.draw(design["size"], design["seed"])
        if [stratum.drawn.tolist() for stratum in strata] != [s["drawn"] for s in design["strata"]]:
            raise UserError(
                f"{path} was drawn from another audit than the one in {self.folder}. Draw a new "
                "sample: --sample 30 --overwrite."
            )
        return strata

    def verdicts(self) -> dict[int, Verdict]:
        """Those of earlier calibrations."""
        if VERDICT not in self.scored.column_names:
            return {}
        column = self.scored.with_format(None)[VERDICT][:]
        return {row: verdict for row, verdict in enumerate(column) if verdict is not None}

    def sheet(self, rows: list[int]) -> Dataset:
        """Image and caption of some rows, with a column for verdicts."""
        text = self.summary["columns"]["text"]
        known = self.verdicts()
        chosen = self.scored.select(rows).select_columns([self.image, text])
        if text != "caption":
            chosen = chosen.rename_column(text, "caption")
        chosen = chosen.add_column("row", rows, feature=Value("int64"))
        verdicts = [known.get(row, "") for row in rows]
        chosen = chosen.add_column("verdict", verdicts, feature=Value("string"))
        return chosen.select_columns(["row", "verdict", "caption", self.image])


def _open(folder: Path) -> _Opened:
    if not (folder / "scored").is_dir() or not (folder / "summary.json").is_file():
        raise UserError(
            f"There is no finished audit in {folder}. Name the --output of 'hf-ecif audit'."
        )
    summary = read_json(folder / "summary.json")
    columns = summary["columns"]
    scored = check_columns(load_rows(str(folder / "scored"), "train"), *columns.values())
    plain = scored.with_format(None)
    was_calibrated = AUDIT_PROBABILITY in scored.column_names
    probability, flag = (
        plain[before if was_calibrated else now][:]
        for before, now in (
            (AUDIT_PROBABILITY, "ecif_noise_probability"),
            (AUDIT_FLAG, "ecif_flag"),
        )
    )
    return _Opened(
        folder,
        scored,
        summary,
        np.array(probability, dtype=float),  # null becomes not-a-number
        np.array([value is True for value in flag]),
    )


# -------------------------------------------------------------------------------- the audit, anew


@dataclass(frozen=True)
class _Calibrated:
    """The rows of an audit by what verdicts say.

    Attributes:
        opened: the audit.
        verdicts: on single rows.
        probability: ``(N,)``, calibrated.
        flag: ``(N,)``, by the new cut.
    """

    opened: _Opened
    verdicts: Mapping[int, Verdict]
    probability: Floats
    flag: Bools

    @property
    def corrected(self) -> Bools:
        """Flags, with those of the judged rows as the verdicts have them."""
        flag = self.flag.copy()
        for row, verdict in self.verdicts.items():
            if verdict in SAYING:
                flag[row] = verdict == "wrong"
        return flag & self.opened.readable

    @property
    def threshold(self) -> float:
        """Between the probabilities of the rows that are flagged and of those that are not."""
        flagged = self.probability[self.flag].min(initial=1.0)
        return float(flagged + self.probability[~self.flag].max(where=self.below, initial=0.0)) / 2

    @property
    def below(self) -> Bools:
        return self.opened.readable[~self.flag]

    def dataset(self) -> Dataset:
        """The scored rows with new probabilities, flags and reasons, and the old ones beside."""
        opened, corrected = self.opened, self.corrected
        probability = self.probability.copy()
        for row, verdict in self.verdicts.items():
            if verdict in SAYING and opened.readable[row]:
                probability[row] = float(verdict == "wrong")
        columns: dict[str, tuple[str, list[Any]]] = {
            "ecif_noise_probability": ("float32", self._nullable(probability.tolist())),
            "ecif_flag": ("bool", self._nullable(corrected.tolist())),
            "ecif_borderline": ("bool", [None] * len(corrected)),
            "ecif_reason": ("string", self._reasons(corrected)),
            VERDICT: ("string", [self.verdicts.get(row) for row in range(len(corrected))]),
            AUDIT_PROBABILITY: ("float32", self._nullable(opened.probability.tolist())),
            AUDIT_FLAG: ("bool", self._nullable(opened.flag.tolist())),
        }
        scored = opened.scored
        order = list(dict.fromkeys([*scored.column_names, *columns]))
        for name, (dtype, values) in columns.items():
            if name in scored.column_names:
                scored = scored.remove_columns(name)
            scored = scored.add_column(name, values, feature=Value(dtype))
        return scored.select_columns(order)

    def _nullable(self, values: list[Any]) -> list[Any]:
        pairs = zip(values, self.opened.readable.tolist(), strict=True)
        return [value if readable else None for value, readable in pairs]

    def _reasons(self, flag: Bools) -> list[str | None]:
        reasons = self.opened.scored.with_format(None)["ecif_reason"][:]
        return [self._reason(row, reasons[row], bool(flag[row])) for row in range(len(flag))]

    def _reason(self, row: int, reason: str | None, flagged: bool) -> str | None:
        if not self.opened.readable[row]:
            return reason
        if not flagged:
            return None
        new = (
            JUDGED
            if self.verdicts.get(row) == "wrong"
            else f"{self.probability[row]:.0%} {BY_OTHERS}"
        )
        old = _reason_of_audit(reason)
        return f"{new}; {old}" if old else new


def _reason_of_audit(reason: str | None) -> str | None:
    """A reason without what an earlier calibration put before it."""
    first, _, rest = (reason or "").partition("; ")
    return (rest if first.endswith((JUDGED, BY_OTHERS)) else reason) or None


def _choose(
    opened: _Opened,
    strata: list[Stratum],
    wrong: Mapping[int, bool],
    curve: Curve,
    request: CalibrateRequest,
) -> tuple[Bools, Promise | None]:
    """New flags, and the promise that they keep."""
    readable = opened.readable
    if request.precision is None:
        calibrated = np.where(readable, curve(opened.probability), 0.0)
        return calibrated > best_threshold(calibrated[readable], LEAST_THRESHOLD), None
    known = np.where(readable, opened.probability, -1.0)
    made = promise(strata, wrong, known, precision=request.precision, confidence=request.confidence)
    return known >= made.least, made


def _check(request: CalibrateRequest) -> None:
    for name in ("precision", "confidence"):
        value = getattr(request, name)
        if value is not None and not 0 < value < 1:
            raise UserError(f"--{name} {value}: must be between 0 and 1.")
    if request.output is None and not request.overwrite:
        raise UserError(
            "Give an --output folder for the calibrated audit, or --overwrite to calibrate it in "
            "place; the probabilities and flags of before stay in columns of their own."
        )
    if request.output is not None:
        require_new(request.output)


def _count(verdicts: Mapping[int, Verdict], strata: list[Stratum]) -> dict[str, int]:
    drawn = {row for stratum in strata for row in stratum.drawn.tolist()}
    found = Counter(verdict for row, verdict in verdicts.items() if row in drawn)
    return {
        "drawn": len(drawn),
        **{verdict.replace(" ", "_"): found[verdict] for verdict in get_args(Verdict)},
        "unasked": len(verdicts.keys() - drawn),
    }


def _describe(
    before: Quality, after: Quality, curve: Curve, made: Promise | None, counts: dict[str, int]
) -> dict[str, Any]:
    return {
        "level": LEVEL,
        "verdicts": counts,
        "noise_rate": asdict(after.noise_rate),
        "before": {name: asdict(getattr(before, name)) for name in ("precision", "recall")},
        "after": {name: asdict(getattr(after, name)) for name in ("precision", "recall")},
        "curve": asdict(curve),
        "promise": made and asdict(made) | {"holds": made.holds},
    }


def _judge(opened: _Opened, flag: Bools) -> dict[str, Any] | None:
    """What is known to be wrong, against the new flags; the ranking is that of the audit."""
    truth = opened.summary.get("truth")
    if not truth or truth["column"] not in opened.scored.column_names:
        return None
    wrong = np.array(opened.scored.with_format(None)[truth["column"]][:]) == True  # noqa: E712
    wrong &= opened.readable
    found = int((wrong & flag).sum())
    return truth | {
        "found": found,
        "precision": found / int(flag.sum()) if flag.any() else None,
        "recall": found / int(wrong.sum()) if wrong.any() else None,
    }


def _warnings(counts: dict[str, int], made: Promise | None, judged: list[int]) -> Iterator[str]:
    untold = counts["cannot_tell"]
    if untold > MANY_UNTOLD * (untold + len(judged)):
        yield (
            f"{untold} of {untold + len(judged)} pairs could not be told right or wrong. The "
            "figures hold for pairs that can."
        )
    if made is not None and not made.holds:
        needed = verdicts_needed(made.precision, made.confidence)
        yield (
            f"That {made.precision:.0%} of the flagged rows are wrong cannot be promised with "
            f"{made.confidence:.0%} confidence, so only rows that were judged wrong are flagged. "
            f"It takes at least {needed} verdicts on flagged rows, all of them wrong. Judge more "
            f"(--sample {2 * (needed + 4)}), or promise less: of the rows that the audit flags, "
            f"{made.supported:.0%} are wrong with this confidence."
        )


def _write(
    scored: Dataset, result: CleanResult, summary: dict[str, Any], request: CalibrateRequest
) -> None:
    """Write the folder anew; in place, each part is replaced once all are whole."""
    audit = request.audit.resolve()
    output = request.output or audit.with_name(f".{audit.name}{PARTIAL}")
    if request.output is None:
        shutil.rmtree(output, ignore_errors=True)
    for name, part in zip(PARTS, (scored, result.kept, result.removed), strict=True):
        write_shards(part, output / name)
    write_report(scored, summary, output / "report.html")
    if request.output is not None:
        shutil.copytree(audit / FOLDER, output / FOLDER)
    else:
        for name in PARTS:
            shutil.rmtree(audit / name)
            (output / name).replace(audit / name)
        (output / "report.html").replace(audit / "report.html")
        shutil.rmtree(output)
    write_json(summary, (request.output or audit) / "summary.json")
