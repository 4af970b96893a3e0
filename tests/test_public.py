"""What `hf_ecif` offers by name."""

import pytest

import hf_ecif


@pytest.mark.parametrize("name", hf_ecif.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(hf_ecif, name) is not None


def test_other_names_are_not() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hf_ecif.nothing
