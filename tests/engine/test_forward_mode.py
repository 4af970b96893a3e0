"""The kept derivative of a function against forward and reverse mode of torch."""

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.func import hessian, jacrev

from hf_ecif.engine.forward_mode import Derivative
from tests.support.families import gaussian

close = partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)
POINT, MATRIX, FIXED = gaussian(6, seed=1), gaussian(5, 6, seed=2), gaussian(2, seed=3)


def bent(point: Tensor) -> list[Tensor]:
    """A vector, something that stays, and a number."""
    direction = MATRIX @ point
    return [direction / direction.norm(), FIXED, point[0].exp()]


def straight(point: Tensor) -> list[Tensor]:
    return [MATRIX @ point, FIXED]


@pytest.mark.parametrize("function", [bent, straight])
@pytest.mark.parametrize("count", [1, 3])
def test_pushes_and_pulls(function, count: int) -> None:
    derivative = Derivative(function, POINT)
    close(list(derivative.value), function(POINT))
    jacobians = jacrev(function)(POINT)
    tangents = gaussian(count, 6, seed=4)
    cotangents = [gaussian(count, *x.shape, seed=5) for x in function(POINT)]
    for _ in range(2):  # the first leaves all that the second needs
        pushed = derivative.push(tangents)
        close(pushed, [(tangents @ j.T if j.ndim > 1 else tangents @ j) for j in jacobians])
        pulled = sum(
            c.reshape(count, -1) @ j.reshape(-1, 6)
            for c, j in zip(cotangents, jacobians, strict=True)
        )
        close(derivative.pull(cotangents), pulled)


@pytest.mark.parametrize("function", [bent, straight])
@pytest.mark.parametrize("count", [1, 3])
def test_bend_is_the_second_derivative(function, count: int) -> None:
    cotangent = [gaussian(1, *x.shape, seed=6)[0] for x in function(POINT)]

    def along(point: Tensor) -> Tensor:
        return sum((c * x).sum() for c, x in zip(cotangent, function(point), strict=True))

    tangents = gaussian(count, 6, seed=4)
    close(Derivative(function, POINT).bend(cotangent, tangents), tangents @ hessian(along)(POINT))


def test_the_point_is_left_alone() -> None:
    point = POINT.clone()
    derivative = Derivative(bent, point)
    point.zero_()
    assert not any(value.requires_grad for value in derivative.value)
    assert not point.requires_grad
    with torch.no_grad():
        pushed = derivative.push(torch.ones(1, 6, dtype=torch.float64))
    assert not any(moved.requires_grad for moved in pushed)
