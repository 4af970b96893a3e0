"""States in a folder: what is found there is whole, and belongs to this run."""

import json
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor

from hf_ecif.errors import UserError
from hf_ecif.utils import checkpoints as module
from hf_ecif.utils.checkpoints import MANIFEST, Checkpoints, State, require_same
from tests.support import kills

RUN: dict[str, Any] = {"seed": 0, "parameters": "projections", "damping": 30.0}
TENSORS = {
    "float32": torch.tensor([[0.1, torch.inf], [-0.0, 1e-45]]),
    "float64": torch.tensor([1 / 3, torch.nan], dtype=torch.float64),
    "bfloat16": torch.tensor([1 / 3], dtype=torch.bfloat16),
    "bytes": torch.Generator().manual_seed(7).get_state(),
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 4),
    "transposed": torch.arange(6).view(2, 3).T,
}
VALUES = {"epochs": 3, "loss": 0.1 + 0.2, "texts": ["naïve", "", '"quoted"'], "none": None}


def bits(value: Tensor) -> tuple[Any, ...]:
    return value.dtype, value.shape, value.contiguous().reshape(-1).view(torch.uint8).tolist()


def number(value: float) -> State:
    return State({"value": torch.tensor(value)})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / ".checkpoints"


@pytest.fixture
def known(folder: Path) -> Checkpoints:
    return Checkpoints.open(folder, RUN, resume=False)


class TestState:
    def test_comes_back_bit_by_bit(self, known: Checkpoints) -> None:
        known.save("step", State(TENSORS, VALUES))
        state = known.load("step")
        assert state is not None
        assert state.values == VALUES
        assert {k: bits(v) for k, v in state.tensors.items()} == {
            k: bits(v) for k, v in TENSORS.items()
        }

    def test_without_tensors(self, known: Checkpoints) -> None:
        known.save("step", State({}, {"rows": 0}))
        assert known.load("step") == State({}, {"rows": 0})

    def test_replaces_an_earlier_one(self, known: Checkpoints) -> None:
        for value in (1.0, 2.0):
            known.save("step", number(value))
        assert known.load("step") == number(2.0)

    def test_unknown_one_is_none(self, known: Checkpoints) -> None:
        assert not known.has("step")
        assert known.load("step") is None


class TestRemember:
    def test_computes_once(self, known: Checkpoints, folder: Path) -> None:
        first = known.remember("step", lambda: number(1.0))
        again = Checkpoints.open(folder, RUN, resume=True)
        second = again.remember("step", lambda: pytest.fail("it was known"))
        assert first == second == number(1.0)

    def test_an_error_keeps_nothing(self, known: Checkpoints) -> None:
        with pytest.raises(ZeroDivisionError):
            known.remember("step", lambda: number(1 / 0))
        assert not known.has("step")

    @pytest.mark.parametrize("size", [0, 7, 100, -1])
    @pytest.mark.parametrize("own", [False, True])
    def test_a_damaged_state_is_computed_again(
        self, known: Checkpoints, folder: Path, size: int, own: bool
    ) -> None:
        """As a crash of the machine may leave it; a killed process cannot."""
        known.save("step", State({"value": torch.zeros(50)}), own=own)
        path = folder / "step.safetensors"
        path.write_bytes(path.read_bytes()[:size])
        assert not known.has("step", own=own)
        assert known.remember("step", lambda: number(1.0), own=own) == number(1.0)
        assert known.load("step", own=own) == number(1.0)

    def test_full_disk_is_an_error_and_leaves_nothing(
        self, known: Checkpoints, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def write_half(tensors: Any, path: Path, metadata: Any) -> None:
            path.write_bytes(b"half")
            raise SafetensorError("I/O error: No space left on device (os error 28)")

        known.save("step", number(1.0))
        monkeypatch.setattr(module, "save_file", write_half)
        with pytest.raises(OSError, match=r"No space left on device: '.*step\.safetensors'"):
            known.save("step", number(2.0))
        assert known.load("step") == number(1.0)
        assert {path.name for path in folder.iterdir()} == {MANIFEST, "step.safetensors"}

    def test_without_a_folder_computes_every_time(self) -> None:
        nowhere, values = Checkpoints(), iter([1.0, 2.0])
        states = [nowhere.remember("step", lambda: number(next(values))) for _ in range(2)]
        assert states == [number(1.0), number(2.0)]
        assert not nowhere.has("step")
        nowhere.clear()


class TestNames:
    def test_parts_of_a_run_have_their_own(self, known: Checkpoints) -> None:
        for value, part in enumerate([known, known.within("a"), known.within("a").within("b")]):
            part.save("step", number(value))
        assert known.load("step") == number(0)
        assert known.within("a").load("step") == number(1)
        assert known.within("a").within("b").load("step") == number(2)
        assert not known.within("b").has("step")


class TestProcesses:
    """The second of two processes, which must not touch what the main one writes."""

    @pytest.fixture(autouse=True)
    def _second(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module.distributed, "is_main", lambda: False)
        monkeypatch.setattr(module.distributed, "decide", lambda choose: choose())

    def test_common_states_are_written_by_the_main_one(self, folder: Path) -> None:
        known = Checkpoints(folder)
        known.save("step", number(1.0))
        assert not known.has("step")

    def test_own_states_are_written_by_each(self, folder: Path) -> None:
        known = Checkpoints(folder)
        known.remember("own", lambda: number(1.0), own=True)
        assert known.has("own", own=True)
        known.clear()
        assert known.load("own", own=True) == number(1.0)


class TestOpen:
    def test_goes_on_with_the_same_run(self, known: Checkpoints, folder: Path) -> None:
        known.save("step", number(1.0))
        assert Checkpoints.open(folder, RUN, resume=True).has("step")

    def test_tuples_are_the_lists_they_become(self, tmp_path: Path) -> None:
        for resume in (False, True):
            Checkpoints.open(tmp_path, {"columns": ("image", "text")}, resume=resume)

    def test_anew_clears(self, known: Checkpoints, folder: Path) -> None:
        known.save("step", number(1.0))
        assert not Checkpoints.open(folder, RUN, resume=False).has("step")
        assert [path.name for path in folder.iterdir()] == [MANIFEST]

    def test_states_without_a_manifest_belong_to_nothing(
        self, known: Checkpoints, folder: Path
    ) -> None:
        known.save("step", number(1.0))
        (folder / MANIFEST).unlink()
        assert not Checkpoints.open(folder, RUN, resume=True).has("step")

    def test_nothing_there_simply_starts(self, folder: Path) -> None:
        assert not Checkpoints.open(folder, RUN, resume=True).has("step")
        assert json.loads((folder / MANIFEST).read_text()) == RUN

    def test_of_another_run_is_refused_with_every_difference(
        self, known: Checkpoints, folder: Path
    ) -> None:
        known.save("step", number(1.0))
        other = {"seed": 1, "damping": 30.0, "new": "x", "parameters": "all"}
        with pytest.raises(UserError) as caught:
            Checkpoints.open(folder, other, resume=True)
        message = str(caught.value)
        assert str(folder.parent) in message
        assert "seed was 0 and is 1" in message
        assert "parameters was 'projections' and is 'all'" in message
        assert "new was None and is 'x'" in message
        assert "damping" not in message
        assert "`overwrite`" in message
        assert Checkpoints.open(folder, RUN, resume=True).has("step"), "it was lost"

    def test_a_damaged_manifest_is_refused(self, known: Checkpoints, folder: Path) -> None:
        (folder / MANIFEST).write_text('{"seed": ')
        with pytest.raises(UserError, match=r"not known what .*: .*manifest\.json.*`overwrite`"):
            Checkpoints.open(folder, RUN, resume=True)

    def test_clear_leaves_nothing(self, known: Checkpoints, folder: Path) -> None:
        known.save("step", number(1.0))
        known.clear()
        assert not folder.exists()
        known.clear()


def test_equal_manifests_pass() -> None:
    require_same(RUN, dict(reversed(RUN.items())), Path())


def write_forever(folder: Path) -> None:
    """Write one state over and over, all of its values alike."""
    known, value = Checkpoints(folder), 0
    while True:
        value += 1
        known.save("step", State({"value": torch.full((300_000,), value)}, {"value": value}))


@pytest.mark.slow
def test_what_a_killed_run_leaves_is_whole(
    known: Checkpoints, folder: Path, tmp_path: Path
) -> None:
    found = []
    for _ in range(10):
        writer = kills.start(write_forever, folder, log=tmp_path / "log")
        while not known.has("step"):
            assert writer.is_alive(), (tmp_path / "log").read_text()
            time.sleep(0.001)
        assert kills.kill(writer, after=random.uniform(0.01, 0.05))
        state = known.load("step")
        assert state is not None
        assert (state.tensors["value"] == state.values["value"]).all()
        found.append(state.values["value"])
        (folder / "step.safetensors").unlink()
    assert {path.name for path in folder.glob("[!.]*")} == {MANIFEST}
    assert max(found) > 1, "no state was ever replaced"
