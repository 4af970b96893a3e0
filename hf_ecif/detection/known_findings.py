"""Findings in rows beyond those that were learned from: what was found there, found again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_ecif.data.captions import says_nothing
from hf_ecif.data.findings import KINDS, Kind
from hf_ecif.detection.findings import Findings, first_kind
from hf_ecif.influence.keys import Keys, firsts
from hf_ecif.influence.rows import Rows

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class KnownFindings:
    """What makes a row a finding, as far as other rows tell it.

    Attributes:
        phrases: keys of the captions that are stock phrases, ascending.
        images: how many different images each of them stood under.
        placeholders: keys of the images that are placeholders, ascending.
        captions: how many different captions stood under each.
        cut: ``(k, 2)``, keys of captions that are cut off, as the model reads them, and in full.
        flagged: kinds whose rows are flagged.
    """

    phrases: Tensor
    images: Tensor
    placeholders: Tensor
    captions: Tensor
    cut: Tensor
    flagged: tuple[Kind, ...]

    @classmethod
    def learn(cls, findings: Findings, rows: Rows) -> KnownFindings:
        """What was found in these rows."""
        stock, placeholder = (findings.are(kind) for kind in ("stock_phrase", "placeholder_image"))
        keys, full = rows.keys, Keys.of_texts(rows.texts).captions
        both = torch.stack([keys.captions, full], dim=1)[keys.truncated]
        return cls(
            *_counted(keys.captions[stock], findings.images[stock]),
            *_counted(keys.images[placeholder], findings.captions[placeholder]),
            both[firsts(both)[0]],
            findings.flagged,
        )

    def find(self, rows: Rows) -> Findings:
        """The findings in other rows, of the same kinds in the same order."""
        keys = rows.keys
        phrase, images = _look_up(keys.captions, self.phrases, self.images)
        placeholder, captions = _look_up(keys.images, self.placeholders, self.captions)
        marks: dict[Kind, Tensor] = {
            "placeholder_image": placeholder,
            "truncated_equal": keys.truncated & self._hides_others(rows),
            "unknown_script": keys.unknown_script,
            "says_nothing": torch.tensor([says_nothing(text) for text in rows.texts]),
            "stock_phrase": phrase,
        }
        kinds = first_kind([marks[kind] for kind in KINDS])
        return Findings(kinds, images, captions, keys.truncated, self.flagged)

    def _hides_others(self, rows: Rows) -> Tensor:
        """``(n,)`` booleans, whether another caption is equal as far as the model reads."""
        if not len(self.cut) or not rows.keys.truncated.any():
            return torch.zeros(len(rows), dtype=torch.bool)
        full = Keys.of_texts(rows.texts).captions
        hidden = torch.zeros(len(rows), dtype=torch.bool)
        for row in rows.keys.truncated.nonzero()[:, 0].tolist():
            alike = self.cut[self.cut[:, 0] == rows.keys.captions[row], 1]
            hidden[row] = bool((alike != full[row]).any())
        return hidden


def _counted(keys: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Every key once, ascending, with its count."""
    first, _ = firsts(keys)
    order = keys[first].argsort()
    return keys[first][order], counts[first][order]


def _look_up(keys: Tensor, known: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Whether each key is known, and its count; 1 where it is not."""
    if not len(known):
        return torch.zeros(len(keys), dtype=torch.bool), torch.ones(len(keys), dtype=torch.long)
    place = torch.searchsorted(known, keys).clamp(max=len(known) - 1)
    found = known[place] == keys
    return found, torch.where(found, counts[place], 1)
