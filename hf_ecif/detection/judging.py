"""What an audit has learned from some rows, and its verdicts on any others.

An audit learns from a sample: it fits the model, injects mismatches and calibrates a detector.
`Learned` is what that leaves. `Learned.judge` is a function of a few rows at a time, in memory that
does not grow with their number, and gives them all that the rows of the sample have:

- A row that was not fitted to joins batches of the sample, see `hf_ecif.influence.contexts`; its
  loss is one without it, as the leave-one-out loss of a row of the sample is.
- Neighbours, suggested captions and what is nearly the same image come from the sample, for its own
  rows as for others; siblings are left out of the neighbours likewise.
- A copy of a pair of the sample is that pair, and has its scores and its verdict.
- Captions of one image are judged together with those of the sample and of the rows beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from hf_ecif.data.findings import KINDS
from hf_ecif.detection.annotate import column_values
from hf_ecif.detection.detect import UNKNOWN, Detection, Detector, Verdicts
from hf_ecif.detection.explain import Ranks
from hf_ecif.detection.findings import Findings, settle
from hf_ecif.detection.known_findings import KnownFindings
from hf_ecif.detection.mixture import Floats
from hf_ecif.detection.signals import Known, Signals, compare_with, signal_errors
from hf_ecif.detection.suggestions import Suggester
from hf_ecif.engine.neighbours import find_best
from hf_ecif.engine.objectives import Embeddings
from hf_ecif.influence.contexts import Contexts, Newcomers
from hf_ecif.influence.influence import Influence
from hf_ecif.influence.pairs import distinct_pairs
from hf_ecif.influence.rows import Rows
from hf_ecif.influence.scoring import Scores
from hf_ecif.utils.formatting import Bools

Record = TypeVar("Record", bound=Any)
ODD = 0x9E3779B97F4A7C1  # a factor that loses no bit of a number of 64 bits


class Assessed(NamedTuple):
    """What was found of ``n`` pairs.

    Attributes:
        scores: at the fitted parameters.
        as_given: at the model's own.
        signals: what tells wrong from right.
        detection: probabilities and flags.
    """

    scores: Scores
    as_given: Scores
    signals: Signals
    detection: Detection

    def mapped(self, change: Callable[..., Any], *others: Assessed) -> Assessed:
        """What a function makes of every part, and of those of others."""
        parts: list[Any] = [change(*ones) for ones in zip(self, *others, strict=True)]
        return Assessed(*parts)


@dataclass(frozen=True, eq=False)
class Sample:
    """The ``m`` distinct pairs that were learned from, as others are compared with them.

    Attributes:
        known: what neighbours are found by.
        assessed: what was found of them, before findings were settled.
        verdicts: ``(m,)``, what a person said of them.
    """

    known: Known
    assessed: Assessed
    verdicts: Verdicts

    @cached_property
    def log_ratio(self) -> Floats:
        """Log density ratios by themselves, without what other captions of the image say."""
        return self.detector.mixture.log_ratio(self.assessed.signals.stack())

    @property
    def detector(self) -> Detector:
        """What was learned."""
        detector = self.assessed.detection.detector
        assert detector is not None
        return detector

    @property
    def heard(self) -> Bools:
        """``(m,)``, which of them are evidence for others."""
        mute = self.known.mute
        return np.ones(len(self.verdicts), dtype=bool) if mute is None else ~mute.cpu().numpy()

    @cached_property
    def _index(self) -> tuple[Tensor, Tensor]:
        """Hashes of the pairs, ascending, and the pair of each."""
        order = _hash(self.known.siblings).argsort()
        return _hash(self.known.siblings)[order], order

    def find(self, siblings: Tensor) -> Tensor:
        """``(n,)``, the pair that each row is a copy of; -1 where there is none."""
        known, order = self._index
        own = _hash(siblings)
        place = torch.searchsorted(known, own).clamp(max=len(known) - 1)
        return torch.where(known[place] == own, order[place], -1)


@dataclass(frozen=True, eq=False)
class Learned:
    """What an audit has learned: all that it takes to judge rows.

    Attributes:
        influence: the fit.
        contexts: batches that rows join.
        sample: the pairs that were learned from.
        findings: what makes a row a finding.
        suggester: finds better captions; None where none were asked for.
        ranks: what rows are ranked among, in their reasons.
        least_cosine: from which on an image is one of the sample.
    """

    influence: Influence
    contexts: Contexts
    sample: Sample
    findings: KnownFindings
    suggester: Suggester | None
    ranks: Ranks
    least_cosine: float

    def judge(self, rows: Rows, groups: Sequence[str | None] = ()) -> Judged:
        """Verdicts on rows beyond the sample.

        Args:
            rows: read by the model; all of them are held here.
            groups: the group of every row, where the detector has rates by group.
        """
        given = self.influence.model.embed_as_given(rows)
        findings = self.findings.find(rows)
        rows = self._join_near_images(rows, given.image)
        copy = self.sample.find(rows.siblings)
        found = _taken(self.sample.assessed, copy)
        new = (copy < 0).nonzero()[:, 0]
        if len(new):
            pairs = distinct_pairs(rows.select(new))
            first = new[pairs.first]
            names = [groups[row] for row in first.tolist()] if groups else []
            silent = findings.are(*KINDS)[first].numpy()
            fresh = self._assess(pairs.rows, _rows_of(given, first), names, silent)
            found = _joined(found, new, fresh.mapped(pairs.spread))
        verdicts = np.where(copy.numpy() < 0, UNKNOWN, self.sample.verdicts[copy.numpy()])
        settled = settle(found.detection, findings, verdicts)
        return Judged(rows, found._replace(detection=settled), findings)

    def columns(self, judged: Judged) -> dict[str, list[Any]]:
        """`COLUMNS` of judged rows, those that name other rows null."""
        model = self.influence.model
        evidence = None
        if self.suggester is not None:
            given = model.embed_as_given(judged.rows)
            evidence = self.suggester.evidence(model, judged.rows, given, judged.assessed.detection)
        return column_values(
            judged.rows,
            *judged.assessed,
            self.influence.config.relative,
            evidence,
            judged.findings,
            self.ranks,
        )

    def without_numbers(self) -> Learned:
        """The same for rows of other data, whose reasons name no row of these."""
        if self.suggester is None:
            return self
        return replace(
            self, suggester=replace(self.suggester, rows=-np.ones_like(self.suggester.rows))
        )

    @cached_property
    def _newcomers(self) -> Newcomers:
        return Newcomers(self.influence, self.contexts)

    def _join_near_images(self, rows: Rows, images: Tensor) -> Rows:
        """Rows in which an image that is nearly one of the sample counts as that one."""
        known = self.sample.known
        nothing = torch.full((len(images),), -1, device=images.device)
        best = find_best(images, known.given.image, nothing)
        there = known.siblings[best.key.cpu(), 1]
        near = (best.cosine >= self.least_cosine).cpu()
        return rows.with_images(torch.where(near, there, rows.keys.images))

    def _assess(
        self, rows: Rows, given: Embeddings, groups: Sequence[str | None], silent: Bools
    ) -> Assessed:
        """What is found of distinct pairs that are not in the sample.

        Args:
            rows: the pairs.
            given: their embeddings by the model as given.
            groups: their groups, where there are groups.
            silent: ``(n,)``, which are findings, and no evidence for others.
        """
        scores = self._newcomers.scores(rows)
        as_given = self._newcomers.score_as_given(rows)
        signals = compare_with(self.sample.known, scores, as_given, given, rows.siblings)
        detection = self._detect(rows, scores, signals, groups, silent)
        return Assessed(scores, as_given, signals, detection)

    def _detect(
        self,
        rows: Rows,
        scores: Scores,
        signals: Signals,
        groups: Sequence[str | None],
        silent: Bools,
    ) -> Detection:
        detector, values = self.sample.detector, signals.stack()
        suspicion, images = detector.mixture.log_ratio(values), rows.keys.images.numpy()
        there = self.sample.known.siblings[:, 1].numpy()
        shared = np.isin(there, images) & self.sample.heard
        pooled = detector.suspicion(
            np.concatenate([suspicion[~silent], self.sample.log_ratio[shared]]),
            np.concatenate([images[~silent], there[shared]]),
        )
        suspicion[~silent] = pooled[: int((~silent).sum())]
        error = detector.error(values, signal_errors(scores))
        return detector.judge(suspicion, error, np.full(len(rows), UNKNOWN), groups)


@dataclass(frozen=True)
class Judged:
    """Verdicts on ``n`` rows.

    Attributes:
        rows: the rows; an image that is nearly one of the sample has its key.
        assessed: what was found of them.
        findings: rows of which it makes little sense to ask.
    """

    rows: Rows
    assessed: Assessed
    findings: Findings


def _hash(siblings: Tensor) -> Tensor:
    """A number for both keys of every pair, ``(n,)``."""
    return siblings[:, 0] * ODD + siblings[:, 1]


def _rows_of(embeddings: Embeddings, rows: Tensor) -> Embeddings:
    here = rows.to(embeddings.text.device)
    return embeddings._replace(text=embeddings.text[here], image=embeddings.image[here])


def _taken(known: Assessed, pairs: Tensor) -> Assessed:
    """What is known of some pairs, ``(n,)``, in tensors of their own."""

    def taken(record: Record) -> Record:
        return _mapped(record, lambda _, value: value[..., _index(value, pairs)])

    return known.mapped(taken)


def _joined(assessed: Assessed, rows: Tensor, fresh: Assessed) -> Assessed:
    """The same with what was found of some rows, ``(k,)``, in the place of what was there."""

    def joined(record: Record, others: Record) -> Record:
        def changed(name: str, value: Any) -> Any:
            value[..., _index(value, rows)] = getattr(others, name)
            return value

        return _mapped(record, changed)

    return assessed.mapped(joined, fresh)


def _index(value: Any, rows: Tensor) -> Any:
    """Numbers of rows, as tensors and as arrays take them."""
    return rows if isinstance(value, Tensor) else rows.numpy()


def _mapped(record: Record, change: Callable[[str, Any], Any]) -> Record:
    """A dataclass in which everything that has a value for every row is changed."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    return replace(
        record,
        **{
            name: change(name, value)
            for name, value in values.items()
            if isinstance(value, Tensor | np.ndarray)
        },
    )
