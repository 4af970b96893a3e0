"""Faster forward mode for two cases in which torch does needless work.

- A linear layer whose weight is not attributed has the tangent ``W x'``. Torch treats the missing
  tangent of ``W`` as zeros and multiplies them by ``x``: three matrix products instead of two.
- Torch repeats the primal pass in every push, though many pushes at one point need it only once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class FrozenLinears(TorchFunctionMode):
    """Context in which a tangent passes a linear layer with frozen weights in one product.

    Args:
        frozen: parameters without a tangent.
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
            missing = [None] * (3 - len(args))
            return _FrozenLinear.apply(*args, *missing)  # type: ignore[no-untyped-call]  # torch's
        return function(*args, **(kwargs or {}))

    def _are_frozen(self, weight: Tensor, bias: Tensor | None = None) -> bool:
        return id(weight) in self._frozen and (bias is None or id(bias) in self._frozen)


class _FrozenLinear(torch.autograd.Function):
    """``x W^T + b`` with constant ``W`` and ``b``."""

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


class Derivative:
    """Derivative of a function at a point, for many pushes and pulls without another pass.

    A pull is linear in the cotangent, so the pull of a pull is the push: one graph serves both and
    is kept in memory.

    Args:
        function: maps a vector ``(P,)`` to tensors ``(...)``, some of which may not depend on it.
        point: ``(P,)``.

    Attributes:
        value: tensors that the function returns at the point.
    """

    def __init__(self, function: Callable[[Tensor], Sequence[Tensor]], point: Tensor) -> None:
        with torch.enable_grad():
            self._point = point.detach().requires_grad_()
            outputs = function(self._point)
            self._moving = [number for number, out in enumerate(outputs) if out.requires_grad]
            self._outputs = [outputs[number] for number in self._moving]
        self.value = tuple(out.detach() for out in outputs)

    def push(self, tangents: Tensor) -> list[Tensor]:
        """Tangents ``(K, ...)`` of the value along each row of ``(K, P)``."""
        pulled, cotangents = self._linear_pull
        pushed = _backward([pulled], cotangents, [tangents])
        moved = dict(zip(self._moving, pushed, strict=True))
        return [
            moved[number] if number in moved else value.new_zeros(len(tangents), *value.shape)
            for number, value in enumerate(self.value)
        ]

    def pull(self, cotangents: Sequence[Tensor]) -> Tensor:
        """Gradients ``(K, P)`` of ``<cotangent, function>`` for cotangents ``(K, ...)``."""
        own = [cotangents[number] for number in self._moving]
        return _backward(self._outputs, [self._point], own)[0]

    def bend(self, cotangent: Sequence[Tensor], tangents: Tensor) -> Tensor:
        """Derivative ``(K, P)`` of the pull of one cotangent along each row of ``(K, P)``.

        Since second derivatives are symmetric, this is another pull.
        """
        with torch.enable_grad():
            pulled = self._pull([cotangent[number] for number in self._moving])
        if not pulled.requires_grad:  # a linear function
            return torch.zeros_like(tangents)
        return _backward([pulled], [self._point], [tangents])[0]

    @cached_property
    def _linear_pull(self) -> tuple[Tensor, list[Tensor]]:
        """A pull, and the cotangents on which it depends."""
        with torch.enable_grad():
            cotangents = [torch.zeros_like(output).requires_grad_() for output in self._outputs]
            return self._pull(cotangents), cotangents

    def _pull(self, cotangents: list[Tensor]) -> Tensor:
        """Gradient ``(P,)`` of ``<cotangents, outputs>``, itself differentiable."""
        return torch.autograd.grad(self._outputs, self._point, cotangents, create_graph=True)[0]


def _backward(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
) -> Sequence[Tensor]:
    """Gradients with a leading ``K`` for cotangents with a leading ``K``; the graph is kept."""
    if len(cotangents[0]) > 1:
        return torch.autograd.grad(
            outputs, inputs, cotangents, retain_graph=True, is_grads_batched=True
        )
    single = [cotangent[0] for cotangent in cotangents]  # batched products of one are slower
    found = torch.autograd.grad(outputs, inputs, single, retain_graph=True)
    return [gradient[None] for gradient in found]
