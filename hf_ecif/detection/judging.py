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

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from hf_ecif.detection.annotate import column_values
from hf_ecif.detection.detect import UNKNOWN, Detection, Detector, Verdicts
from hf_ecif.detection.explain import Ranks
from hf_ecif.detection.findings import Findings, settle
from hf_ecif.detection.known_findings import KnownFindings
from hf_ecif.detection.signals import Known, Signals, compare_with, signal_errors
from hf_ecif.detection.suggestions import Suggester
from hf_ecif.engine.neighbours import find_best
from hf_ecif.influence.contexts import Contexts, Newcomers
from hf_ecif.influence.influence import Influence
from hf_ecif.influence.pairs import Pairs, distinct_pairs
from hf_ecif.influence.rows import Rows
from hf_ecif.influence.scoring import Scores

Record = TypeVar("Record", bound=Any)


@dataclass(frozen=True, eq=False)
class Sample:
    """The distinct pairs that were learned from, ``(m,)`` each, as others are compared with them.

    Attributes:
        known: what neighbours are found by.
        scores: at the fitted parameters.
        as_given: at the model's own.
        signals: of the pairs.
        detection: of the pairs, before findings were settled.
        verdicts: what a person said of them.
    """

    known: Known
    scores: Scores
    as_given: Scores
    signals: Signals
    detection: Detection
    verdicts: Verdicts

    @cached_property
    def log_ratio(self) -> np.ndarray:
        """Log density ratios by themselves, without what other captions of the image say."""
        return self.detector.mixture.log_ratio(self.signals.stack())

    @property
    def detector(self) -> Detector:
        """What was learned."""
        assert self.detection.detector is not None
        return self.detection.detector

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
        is_new = copy < 0
        new = distinct_pairs(rows.select(is_new.nonzero()[:, 0]))
        first = is_new.nonzero()[:, 0][new.first]
        scores = self._newcomers.scores(new.rows)
        as_given = self._newcomers.score_as_given(new.rows)
        there = first.to(given.text.device)
        own = given._replace(text=given.text[there], image=given.image[there])
        signals = compare_with(self.sample.known, scores, own, new.rows.siblings)
        found = self._detect(
            new.rows, scores, signals, [groups[row] for row in first.tolist()] if groups else []
        )

        def whole(known: Record, fresh: Record) -> Record:
            return _merged(known, fresh, new, copy)

        known = np.where(is_new.numpy(), UNKNOWN, self.sample.verdicts[copy.numpy()])
        detection = settle(whole(self.sample.detection, found), findings, known)
        return Judged(
            rows,
            whole(self.sample.scores, scores),
            whole(self.sample.as_given, as_given),
            whole(self.sample.signals, signals),
            detection,
            findings,
        )

    def columns(self, judged: Judged) -> dict[str, list[Any]]:
        """`COLUMNS` of judged rows, those that name other rows null."""
        model = self.influence.model
        evidence = None
        if self.suggester is not None:
            given = model.embed_as_given(judged.rows)
            evidence = self.suggester.evidence(model, judged.rows, given, judged.detection)
        return column_values(
            judged.rows,
            judged.scores,
            judged.as_given,
            judged.signals,
            judged.detection,
            self.influence.config.relative,
            evidence,
            judged.findings,
            self.ranks,
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

    def _detect(
        self, rows: Rows, scores: Scores, signals: Signals, groups: Sequence[str | None]
    ) -> Detection:
        detector, values = self.sample.detector, signals.stack()
        log_ratio, images = detector.mixture.log_ratio(values), rows.keys.images.numpy()
        there = self.sample.known.siblings[:, 1].numpy()
        shared = np.isin(there, images)
        pooled = detector.suspicion(
            np.concatenate([log_ratio, self.sample.log_ratio[shared]]),
            np.concatenate([images, there[shared]]),
        )
        error = detector.error(values, signal_errors(scores))
        verdicts = np.full(len(rows), UNKNOWN)
        return detector.judge(pooled[: len(rows)], error, verdicts, groups)


@dataclass(frozen=True)
class Judged:
    """Verdicts on ``n`` rows.

    Attributes:
        rows: the rows; an image that is nearly one of the sample has its key.
        scores: at the fitted parameters.
        as_given: at the model's own.
        signals: what told wrong from right.
        detection: probabilities and flags.
        findings: rows of which it makes little sense to ask.
    """

    rows: Rows
    scores: Scores
    as_given: Scores
    signals: Signals
    detection: Detection
    findings: Findings


def _hash(siblings: Tensor) -> Tensor:
    """A number for both keys of every pair, ``(n,)``; the factor is odd, so that none is lost."""
    return siblings[:, 0] * 0x9E3779B97F4A7C1 + siblings[:, 1]


def _merged(known: Record, fresh: Record, new: Pairs, copy: Tensor) -> Record:
    """What is known of copies, and what was found of new pairs, row by row.

    Args:
        known: of the pairs of the sample, a dataclass.
        fresh: of the new pairs, likewise.
        new: the rows that are no copies, as distinct pairs.
        copy: ``(n,)``, the pair of the sample that each row is a copy of, or -1.
    """
    spread, is_new = new.spread(fresh), copy < 0

    def both(name: str) -> Any:
        old, now = getattr(known, name), getattr(spread, name)
        if not isinstance(now, Tensor | np.ndarray) or now.ndim == 0:
            return now
        is_tensor = isinstance(now, Tensor)
        chosen, here = (part if is_tensor else part.numpy() for part in (copy, is_new))
        values = old[..., chosen]
        values[..., here] = now
        return values

    return replace(fresh, **{field.name: both(field.name) for field in fields(fresh)})
