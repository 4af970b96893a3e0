"""A forward-mode rule that torch has, but slower than need be.

A linear layer whose weight is not attributed has the tangent ``W x'``. Torch takes the missing
tangent of ``W`` for zeros and multiplies them with ``x``, too: three matrix products for two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class FrozenLinears(TorchFunctionMode):
    """While it is on, tangents pass linear layers with frozen weights at the cost of one product.

    Args:
        frozen: the parameters that have no tangent.
    """

    def __init__(self, frozen: Iterable[Tensor]) -> None:
        super().__init__()
        self._frozen = {id(parameter) for parameter in frozen}

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if function is F.linear and not kwargs and self._are_frozen(*args[1:]):
            return _FrozenLinear.apply(*args, *[None] * (3 - len(args)))
        return function(*args, **(kwargs or {}))

    def _are_frozen(self, weight: Tensor, bias: Tensor | None = None) -> bool:
        return id(weight) in self._frozen and (bias is None or id(bias) in self._frozen)


class _FrozenLinear(torch.autograd.Function):
    """``x W^T + b`` of constants ``W`` and ``b``."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Any) -> None:
        ctx.save_for_forward(inputs[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def jvp(ctx: Any, moved: Tensor | None, *constant: None) -> Tensor | None:
        (weight,) = ctx.saved_tensors
        return None if moved is None else F.linear(moved, weight)
