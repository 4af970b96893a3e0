"""Data from which no detector can learn are refused in one sentence."""

import numpy as np
import pytest
import torch

from hf_ecif.applications.analysis import _require_injected, _require_saying
from hf_ecif.detection.injection import Injected
from hf_ecif.errors import UserError


def test_captions_that_all_say_nothing() -> None:
    with pytest.raises(UserError, match=r"^No caption says anything of its image.*`text_column`"):
        _require_saying(torch.tensor([True] * 30 + [False]))
    _require_saying(torch.tensor([True] * 30 + [False] * 2))


def test_captions_that_cannot_be_exchanged() -> None:
    def injected(*rows: int) -> Injected:
        kinds = [np.zeros((count, 4)) for count in rows]
        return Injected(np.zeros((9, 4)), kinds, np.arange(9), np.concatenate(kinds))

    with pytest.raises(UserError, match=r"^Hardly any caption can be exchanged.*`image_column`"):
        _require_injected(injected(1, 0))
    _require_injected(injected(1, 1))
