from dataclasses import MISSING, fields, replace
from pathlib import Path
from typing import Any

import pytest

from hf_ecif.applications.requests import CleanRequest, RemoveRequest, Sources, ValueRequest
from hf_ecif.config import DetectionConfig, InfluenceConfig
from hf_ecif.errors import UserError

LEAST = {
    option.name: option.metadata["at_least"]
    for option in fields(InfluenceConfig)
    if option.metadata["at_least"] is not None
}


@pytest.mark.parametrize(("name", "least"), LEAST.items())
def test_smallest_value_is_accepted(name: str, least: float) -> None:
    assert getattr(InfluenceConfig(**{name: least}), name) == least


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, least - 1) for name, least in LEAST.items()),
        ("l2", float("nan")),
        ("damping", 0.0),
        ("damping", -1.0),
        ("damping", float("nan")),
        ("damping", float("inf")),
        ("fit_learning_rate", float("inf")),
        ("seed", 2**70),
        ("role", "second_order"),
        ("solver", "nonsense"),
    ],
)
def test_value_out_of_range_is_named(name: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"^`{name}={value}`: must be "):
        InfluenceConfig(**{name: value})


def test_wrong_choice_lists_the_right_ones() -> None:
    with pytest.raises(UserError, match="cg, lissa, low_rank, exact, identity"):
        InfluenceConfig(solver="nonsense")  # type: ignore[arg-type]


@pytest.mark.parametrize("option", fields(InfluenceConfig), ids=lambda option: option.name)
def test_every_field_has_help(option: Any) -> None:
    assert InfluenceConfig.help(option.name)


@pytest.mark.parametrize(
    "config",
    [
        InfluenceConfig(),
        InfluenceConfig(parameters=r"\.bias$", damping=0.1, solver="exact", mask_repeated=False),
    ],
)
def test_json_round_trip(tmp_path: Path, config: InfluenceConfig) -> None:
    config.save(tmp_path / "config.json")
    assert InfluenceConfig.load(tmp_path / "config.json").to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"seed": 1, "sed": 2, "dumping": 3}', "config.json: unknown fields dumping, sed"),
        ('{"batch_size": 1}', "`batch_size=1`: must be at least 2"),
    ],
)
def test_wrong_file(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        InfluenceConfig.load(path)


def test_file_with_some_fields_leaves_the_others_at_their_defaults(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"seed": 3}')
    assert InfluenceConfig.load(path) == InfluenceConfig(seed=3)


@pytest.mark.parametrize("value", [0, 0.6, -0.1])
def test_a_share_of_injections_out_of_range(value: float) -> None:
    with pytest.raises(UserError, match=rf"^`injected_share={value}`: must be between"):
        DetectionConfig(injected_share=value)


@pytest.mark.parametrize(
    ("rows", "runs"), [(2, 3), (800, 3), (1000, 3), (1400, 2), (2600, 2), (2700, 1), (10**6, 1)]
)
def test_few_rows_take_more_injections(rows: int, runs: int) -> None:
    assert DetectionConfig().runs(rows) == runs
    assert DetectionConfig(injections=5).runs(rows) == 5


def test_configs_of_version_0_1_hold_both() -> None:
    """A file of 0.1, and the record of a run, have the fields of both configs in one."""
    values = {"seed": 3, "plantings": 5, "planted_share": 0.2}
    assert InfluenceConfig.from_dict(values) == InfluenceConfig(seed=3)
    assert DetectionConfig.from_dict(values) == DetectionConfig(5, 0.2)
    both = InfluenceConfig(seed=3).to_dict() | DetectionConfig(5, 0.2).to_dict()
    assert DetectionConfig.from_dict(both) == DetectionConfig(5, 0.2)


def test_memory_and_workers_decide_nothing() -> None:
    frugal = InfluenceConfig(micro_batch_size=1, memory_limit=0.5, workers=2)
    assert frugal.deciding() == InfluenceConfig().deciding()
    assert frugal.fingerprint() == InfluenceConfig().fingerprint()
    assert InfluenceConfig(damping=1.0).fingerprint() != InfluenceConfig().fingerprint()


@pytest.mark.parametrize("given", [None, 0.0, 0.02])
@pytest.mark.parametrize(
    ("parameters", "default"),
    [("projections", 1e-3), ("lora", 1e-3), ("last_2", 1e-4), ("mlp", 1e-4), ("all", 3e-5)],
)
def test_learning_rate_suits_the_parameters_or_is_given(
    parameters: str, default: float, given: float | None
) -> None:
    config = InfluenceConfig(parameters=parameters, fit_learning_rate=given)
    assert config.learning_rate == (default if given is None else given)
    assert config.to_dict()["fit_learning_rate"] == config.learning_rate
    named = replace(config, fit_learning_rate=config.learning_rate)
    assert named.fingerprint() == config.fingerprint()
    assert InfluenceConfig.from_dict(config.to_dict()) == named


@pytest.mark.parametrize(
    ("request_of", "given", "needs"),
    [
        (CleanRequest, {"test_split": "dev"}, "test"),
        (CleanRequest, {"repeats": 5}, "test"),
        (ValueRequest, {"candidates_split": "dev"}, "candidates"),
        (ValueRequest, {"test": "some/pairs"}, "curves"),
        (RemoveRequest, {"test_split": "dev"}, "test"),
    ],
)
def test_an_option_that_means_nothing_by_itself(
    request_of: Any, given: dict[str, Any], needs: str
) -> None:
    required: dict[str, Any] = {
        one.name: Path("x")
        for one in fields(request_of)
        if one.default is MISSING and one.default_factory is MISSING
    }
    if issubclass(request_of, Sources):
        required |= {"model": "some/model", "dataset": "some/pairs"}
    ((name, value),) = given.items()
    with pytest.raises(UserError, match=rf"^`{name}={value}` means nothing without `{needs}`"):
        request_of(**required, **given)
    request_of(**required)
    request_of(**required, **given, **{needs: True if needs == "curves" else "some/pairs"})
