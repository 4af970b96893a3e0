"""One process or several, on one node or two: the same numbers. The processes are real ones."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
# Its name for several processes, on CPUs, too, where the plain command needs MPI.
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
SECONDS = 600
TOLERANCE = {"float64": 1e-10, "float32": 1e-5}
# Standard errors are roots of differences of nearly equal numbers, and derivatives of Adam's first
# steps such differences: their size does not depend on that of the gradient.
LOOSE = (
    *("stderr", "self_stderr", "size_stderr", "planted", "reference", "difference"),
    "unrolled",
)


def environment() -> dict[str, str]:
    return os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }


def start(launcher: list[str], *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*launcher, *arguments],
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == 0, output[-4000:]
    return output


def program(launcher: list[str], output: Path, *dtypes: str) -> subprocess.Popen[str]:
    return start(launcher, "-m", "tests.utils.distributed.program", str(output), *dtypes)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Results of one process."""
    path = tmp_path_factory.mktemp("single") / "results.safetensors"
    finish(program([sys.executable], path, *TOLERANCE))
    return load_file(path)


def compare(several: Path, one: dict[str, Tensor], *dtypes: str) -> None:
    found = load_file(several)
    assert found.keys() == {name for name in one if name.startswith(dtypes)}
    for name, value in found.items():
        expected, tolerance = one[name], TOLERANCE[name.split("/")[0]]
        loose = 100 if name.endswith(LOOSE) else 1
        scale = expected.abs().max().item()
        torch.testing.assert_close(
            value,
            expected,
            rtol=loose * tolerance,
            atol=loose * tolerance * scale,
            equal_nan=True,
            msg=lambda text, name=name: f"{name}: {text}",
        )


def torchrun(count: int) -> list[str]:
    return [*TORCHRUN, f"--nproc_per_node={count}", *rendezvous()]


def accelerate(count: int) -> list[str]:
    plain = ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no"]
    return [*ACCELERATE, f"--num_processes={count}", f"--main_process_port={free_port()}", *plain]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "count", "dtypes"),
    [(accelerate, 2, ["float64", "float32"]), (torchrun, 3, ["float64"])],
)
def test_processes_agree_with_one(
    single: dict[str, Tensor],
    tmp_path: Path,
    launcher: Callable[[int], list[str]],
    count: int,
    dtypes: list[str],
) -> None:
    output = tmp_path / "results.safetensors"
    finish(program(launcher(count), output, *dtypes))
    compare(output, single, *dtypes)


@pytest.mark.slow
def test_two_nodes_agree_with_one(single: dict[str, Tensor], tmp_path: Path) -> None:
    output = tmp_path / "results.safetensors"
    nodes = [*TORCHRUN, "--nnodes=2", "--nproc_per_node=1", *rendezvous()]
    agents = [program([*nodes, f"--node_rank={n}"], output, "float64") for n in range(2)]
    for agent in agents:
        finish(agent)
    compare(output, single, "float64")


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ("everywhere", "Error: the file is missing: bring it here."),
        ("elsewhere", "Error: the file is missing: bring it here."),
        ("unexpectedly", "KeyError: 'the file'"),
        ("--nowhere", "No such option: --nowhere"),
    ],
)
def test_error_is_told_once_and_ends_all(where: str, words: str) -> None:
    process = start(torchrun(2), "-m", "tests.utils.distributed.failing", where)
    output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode != 0
    assert output.count(words) == 1, output
    assert "MainProcessError" not in output
    assert "gloo" not in output


def test_help_is_printed_once() -> None:
    output = finish(start(torchrun(2), "-m", "tests.utils.distributed.failing", "--help"))
    assert output.count("Usage:") == 1, output


def rendezvous() -> list[str]:
    return ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--rdzv_id=test"]
