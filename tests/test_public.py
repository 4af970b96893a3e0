"""What `import hf_ecif` offers is there."""

import pytest

import hf_ecif


@pytest.mark.parametrize("name", hf_ecif.__all__)
def test_public_name(name: str) -> None:
    assert getattr(hf_ecif, name) is not None


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'unheard_of'"):
        hf_ecif.unheard_of  # noqa: B018
