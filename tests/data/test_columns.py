"""Groups from a column; the columns themselves are tested by a whole audit."""

from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, Sequence, Value

from hf_ecif.data.columns import read_groups, set_column
from hf_ecif.errors import UserError


@pytest.mark.parametrize(
    ("values", "feature", "groups"),
    [
        (["en", None, "de"], Value("string"), ["en", None, "de"]),
        (["en", "", "de"], Value("large_string"), ["en", "", "de"]),
        ([3, None, 1], Value("int16"), ["3", None, "1"]),
        ([True, None, False], Value("bool"), ["True", None, "False"]),
        ([1, None, 0], ClassLabel(names=["cat", "dog"]), ["dog", None, "cat"]),
    ],
)
def test_groups_are_names(values: list[Any], feature: Any, groups: list[str | None]) -> None:
    rows = Dataset.from_dict({"group": values}, features=Features({"group": feature}))
    assert read_groups(rows, "group") == groups


@pytest.mark.parametrize("feature", [Value("float32"), Sequence(Value("string"))])
def test_other_types_are_no_groups(feature: Any) -> None:
    rows = Dataset.from_dict({"group": []}, features=Features({"group": feature}))
    with pytest.raises(UserError, match="`group_column='group'` must hold strings"):
        read_groups(rows, "group")


class TestSetColumn:
    def test_in_its_place_and_type(self) -> None:
        rows = Dataset.from_dict({"a": [1, 2], "b": ["x", None], "c": [0.5, 1.5]})
        changed = set_column(rows, "b", ["y", "z"], "int64")
        assert changed.column_names == ["a", "b", "c"]
        assert changed.features == rows.features
        assert changed["b"][:] == ["y", "z"]

    def test_a_new_one_comes_last(self) -> None:
        changed = set_column(Dataset.from_dict({"a": [1, 2]}), "b", [None, 0.5], "float32")
        assert changed.column_names == ["a", "b"]
        assert changed.features["b"].dtype == "float32"
        assert changed["b"][:] == [None, 0.5]
