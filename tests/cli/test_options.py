"""Commands have the options that do something in them, and those alone."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import pytest
import typer
from datasets import load_from_disk

from hf_ecif.applications import fit, remove, requests, trace, validate, value
from hf_ecif.cli.main import app
from hf_ecif.config import DetectionConfig, InfluenceConfig
from tests.support.commands import MODEL, Run

SETTINGS = {one.name for one in fields(InfluenceConfig)}
OF_DETECTION = {one.name for one in fields(DetectionConfig)}
QUICK = InfluenceConfig(batch_size=16, probes=1, partitions=2, fit_epochs=2, max_iterations=3)
REQUESTS = {
    "audit": requests.AuditRequest,
    "calibrate": requests.CalibrateRequest,
    "clean": requests.CleanRequest,
    "fit": requests.FitRequest,
    "remove": requests.RemoveRequest,
    "score": requests.ScoreRequest,
    "trace": requests.TraceRequest,
    "validate": requests.ValidateRequest,
    "value": requests.ValueRequest,
}
RUNS: dict[str, Callable[..., Any]] = {
    "fit": fit.run_fit,
    "trace": trace.run_trace,
    "value": value.run_value,
    "remove": remove.run_remove,
    "validate": validate.run_validate,
}
OWN: dict[str, dict[str, Any]] = {
    "trace": {"rows": [0, 1]},
    "value": {"curves": True, "repeats": 1},
    "remove": {"where": "gone", "retrain": True},
    "validate": {"subsets": 4, "repeats": 1},
}
OF_A_CHOICE = {"lora_rank", "lissa_repeats", "rank"}  # read by one solver, or of one subset


def options_of(command: str) -> dict[str, Any]:
    """Those that help shows, by the names of the fields."""
    group: Any = typer.main.get_command(app)
    known = group.commands[command].params
    return {one.name: one for one in known if not one.hidden}


@pytest.mark.parametrize("command", REQUESTS)
def test_fields_are_options_with_their_defaults_and_help(command: str) -> None:
    options = options_of(command)
    for one in fields(REQUESTS[command]):
        if "help" in one.metadata and one.name != "strategy":
            option = options[one.name]
            assert option.required == (one.default is MISSING)
            assert option.required or option.default == one.default
            assert option.help


@pytest.mark.parametrize("command", REQUESTS)
def test_settings_of_detection_are_those_of_an_audit(command: str) -> None:
    expected = OF_DETECTION if command == "audit" else set()
    assert options_of(command).keys() & OF_DETECTION == expected


def test_help_is_short_and_names_what_it_leaves_out(run: Run) -> None:
    for command in REQUESTS:
        status, page = run(command, "--help")
        assert status == 0
        assert len(page.splitlines()) < 150
        head, _, names = page.partition("--help-all also explains:")
        assert len([line for line in head.splitlines() if "--" in line]) < 30, command
        assert "--damping" not in head
        assert ("--damping" in names) == ("damping" in options_of(command))


def test_the_whole_help_explains_every_option(run: Run) -> None:
    status, page = run("audit", "--help-all")
    assert status == 0
    assert "also explains" not in page
    words = page.split()
    assert {option.opts[0] for option in options_of("audit").values()} <= set(words)


@pytest.fixture(scope="module")
def rows(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 rows, of which two are to be removed."""
    folder = tmp_path_factory.mktemp("rows") / "rows"
    gone = [row in (2, 11) for row in range(30)]
    load_from_disk(data / "30").add_column("gone", gone).save_to_disk(folder)
    return folder


@pytest.fixture
def do(rows: Path, tmp_path: Path) -> Callable[..., Any]:
    """What a command finds with a config."""

    def result(command: str, config: InfluenceConfig, number: int = 0) -> Any:
        output = tmp_path / f"{command} {number}"
        own = OWN.get(command, {})
        sources = {"dataset": str(rows), "query": str(rows), "query_split": "train"}
        request = REQUESTS[command](model=MODEL, output=output, **sources, **own)
        return RUNS[command](request, config)

    return result


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of the settings that something outside of their class has read."""
    names: set[str] = set()
    plain = InfluenceConfig.__getattribute__

    def look(config: InfluenceConfig, name: str) -> Any:
        by = sys._getframe(1).f_code
        if by.co_name == "learning_rate":
            names.add("fit_learning_rate")
        if name in SETTINGS and not by.co_filename.endswith(("config.py", "dataclasses.py")):
            names.add(name)
        return plain(config, name)

    monkeypatch.setattr(InfluenceConfig, "__getattribute__", look)
    return names


@pytest.mark.parametrize("command", ["trace", "value", "remove", "validate"])
def test_settings_are_those_that_do_something(
    do: Callable[..., Any], read: set[str], command: str
) -> None:
    for number, response in enumerate(("stationary", "unrolled")):
        do(command, replace(QUICK, response=response), number)
    assert options_of(command).keys() & SETTINGS == read | OF_A_CHOICE


@pytest.mark.parametrize("command", ["audit", "fit"])
def test_all_settings_do_something_in_what_is_scored_later(command: str) -> None:
    assert options_of(command).keys() >= SETTINGS


def test_a_setting_without_effect_is_taken_with_a_warning(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As version 0.1 took it; its value is not looked at."""

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(remove, "run_remove", stop)
    given = ["--model", "m", "--dataset", "d", "--output", "o", "--where", "w", "--quiet"]
    status, output = run("remove", *given, "--plantings", 3, "--relative", "")
    assert status == 130
    assert "Warning: --plantings has no effect on remove" in output
    assert "Warning: --relative has no effect on remove" in output


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from hf_ecif.cli.main import main; sys.argv = ['hf-ecif', 'audit', '--help']\n"
        "try: main()\n"
        "except SystemExit: print({'torch', 'transformers', 'datasets', 'numpy'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"
