"""One tower of a dual encoder, cut where the attributed parameters begin.

Everything before the first attributed module is *frozen*: its output never changes, so it runs once
and its output is kept. A tower finds this *boundary* itself. It watches one forward pass and finds
the earliest attributed unit (a transformer layer, an embedding, a head). Later passes skip the
units before it and start from the kept activation. The first pass also checks that this yields the
features of the whole tower; if it does not (because a connection skips the boundary, for example),
nothing is frozen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

Inputs = dict[str, Tensor]
FEATURES, HIDDEN, PIXELS = "features", "hidden", "pixel_values"


class Tower(nn.Module):
    """Features of one modality as a function of the attributed parameters.

    Its parameters are those of the model, so ``torch.func.functional_call`` replaces them.

    Args:
        model: a dual encoder with ``get_text_features`` and ``get_image_features``.
        side: ``"text"`` or ``"image"``.
        attributed: names of the attributed parameters of both towers.
    """

    def __init__(self, model: nn.Module, side: str, attributed: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self._embed = getattr(model, f"get_{side}_features")
        self._attributed = attributed
        self._found: _Found | None = None
        self._boundaries: dict[torch.Size, Boundary] = {}

    def forward(self, inputs: Inputs) -> Tensor:
        """Features ``(B, d)``, not normalised, from raw inputs or from the output of `freeze`."""
        if FEATURES in inputs:
            return inputs[FEATURES]
        if HIDDEN in inputs:
            return self._resume(self._boundary_of(inputs[HIDDEN]), inputs)
        return self._whole(inputs)

    def freeze(self, inputs: Inputs) -> Inputs:
        """Output of the frozen part, which replaces ``inputs`` from then on."""
        boundary = self._find(inputs).boundary
        if boundary is None or not _is_raw(inputs):
            return inputs
        with torch.no_grad():
            frozen = self._cut(boundary, inputs)
            if boundary.has_shapes and frozen[HIDDEN].shape[1:] not in self._boundaries:
                again = self._look(_first_rows(inputs))  # perhaps of longer texts than before
                if again.boundary is None:
                    raise ValueError(f"Inputs of other shapes cannot be cut at {boundary.unit}.")
        return frozen

    def names(self, inputs: Inputs) -> list[str]:
        """Names of the attributed parameters that act in this tower."""
        return self._find(inputs).names

    def width(self, inputs: Inputs) -> int:
        """Size ``d`` of the features."""
        return self._find(inputs).width

    @staticmethod
    def is_light(inputs: Inputs) -> bool:
        """Whether no more than a head on pooled activations remains of the tower."""
        return inputs.keys() <= {FEATURES, HIDDEN} and all(v.ndim == 2 for v in inputs.values())

    def _find(self, inputs: Inputs) -> _Found:
        """Boundary and names, found in a pass of the first inputs."""
        if self._found is None:
            if not _is_raw(inputs):
                raise ValueError("The first inputs of a tower must be raw, not frozen ones.")
            with torch.no_grad():
                self._found = self._look(_first_rows(inputs))
        return self._found

    def _look(self, inputs: Inputs) -> _Found:
        calls, features = _watch(self.model, lambda: self._whole(inputs))
        owners = {name: _owner(name, calls) for name in self._attributed}
        names = [name for name, owner in owners.items() if owner is not None]
        found = _Found(names, features.shape[1], None)
        holders = {owner for owner in owners.values() if owner is not None}
        boundary = _find_boundary(self.model, holders, calls, features, inputs)
        if boundary is None:
            return found
        frozen = self._cut(boundary, inputs)
        if not torch.allclose(self._resume(boundary, frozen), features):
            return found
        if HIDDEN in frozen:
            self._boundaries[frozen[HIDDEN].shape[1:]] = boundary
        return replace(found, boundary=boundary)

    def _boundary_of(self, hidden: Tensor) -> Boundary:
        assert self._found is not None
        assert self._found.boundary is not None
        return self._boundaries.get(hidden.shape[1:], self._found.boundary)

    def _whole(self, inputs: Inputs) -> Tensor:
        output = self._embed(**inputs)
        return output if isinstance(output, Tensor) else output.pooler_output

    def _cut(self, boundary: Boundary, inputs: Inputs) -> Inputs:
        """Activation at the boundary, from raw inputs."""
        if boundary.unit is None:
            return {FEATURES: self._whole(inputs)}
        hidden = self._input_of(boundary.unit, inputs)
        if boundary.is_last:
            return {HIDDEN: hidden}
        # Token ids and masks are small, and later layers use them; pixels are no longer needed.
        return {key: value for key, value in inputs.items() if key != PIXELS} | {HIDDEN: hidden}

    def _input_of(self, unit: str, inputs: Inputs) -> Tensor:
        caught: list[Tensor] = []

        def catch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught.append(_tensors(args, kwargs)[0])
            raise _Reached

        hook = self.model.get_submodule(unit).register_forward_pre_hook(catch, with_kwargs=True)
        try:
            self._whole(inputs)
        except _Reached:
            return caught[0]
        finally:
            hook.remove()
        raise AssertionError(f"{unit} was not called.")

    def _resume(self, boundary: Boundary, inputs: Inputs) -> Tensor:
        """Features, from the activation at the boundary."""
        if boundary.unit is None:
            return inputs[FEATURES]
        if boundary.is_last:
            return self.model.get_submodule(boundary.unit)(inputs[HIDDEN])
        hidden = inputs[HIDDEN]
        rest = {key: value for key, value in inputs.items() if key != HIDDEN}
        if boundary.pixels is not None:
            rest[PIXELS] = boundary.pixels.blank(hidden)
        with self._jump(boundary, hidden):
            return self._whole(rest)

    @contextmanager
    def _jump(self, boundary: Boundary, hidden: Tensor) -> Iterator[None]:
        """Context in which modules before the boundary are skipped; its unit takes ``hidden``."""
        assert boundary.unit is not None

        def put(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return _with_first_tensor(args, kwargs, hidden)

        unit = self.model.get_submodule(boundary.unit)
        hook = unit.register_forward_pre_hook(put, with_kwargs=True)
        skipped = [self.model.get_submodule(name) for name in boundary.skipped]
        # Other libraries set a forward of their own on the instance: keep it.
        own = [module.__dict__.get("forward") for module in skipped]
        for module, output in zip(skipped, boundary.skipped.values(), strict=True):
            module.forward = _returning(output, hidden)
        try:
            yield
        finally:
            hook.remove()
            for module, forward in zip(skipped, own, strict=True):
                del module.forward
                if forward is not None:
                    module.forward = forward


@dataclass(frozen=True)
class Boundary:
    """Where the attributed part of a tower begins.

    Attributes:
        unit: name of the first attributed module; None if the whole tower is frozen.
        is_last: whether the unit's output is the tower's, so that nothing else has to run.
        skipped: modules that finish before the unit begins, with the shapes they return.
        pixels: shape of the pixels, if the tower takes them.
    """

    unit: str | None
    is_last: bool = False
    skipped: dict[str, Any] = field(default_factory=dict)
    pixels: _Blank | None = None

    @property
    def has_shapes(self) -> bool:
        """Whether it depends on the shapes of the inputs; a cut just before the end does not."""
        return self.unit is not None and not self.is_last


@dataclass(frozen=True)
class _Found:
    names: list[str]
    width: int
    boundary: Boundary | None  # None: the attributed part begins at the inputs


class _Reached(Exception):  # noqa: N818
    """Raised at the boundary, where a forward pass can stop."""


@dataclass(frozen=True)
class _Blank:
    """Shape and dtype of a tensor with a row per pair, for a place where values do not matter."""

    shape: torch.Size
    dtype: torch.dtype

    @classmethod
    def of(cls, value: Any, rows: int) -> Any:
        """Blank of a tensor with a row per pair; other values, such as rotations, unchanged."""
        if isinstance(value, Tensor) and value.shape[:1] == (rows,):
            return cls(value.shape[1:], value.dtype)
        return value

    def blank(self, like: Tensor) -> Tensor:
        """Tensor of NaN with as many rows as ``like``, which takes no memory.

        NaN makes any use of its values visible.
        """
        value = torch.nan if self.dtype.is_floating_point else 0
        single = torch.full((), value, dtype=self.dtype, device=like.device)
        return single.expand(len(like), *self.shape)


@dataclass
class _Call:
    """Call of a module in a forward pass."""

    entered: int
    takes: list[Tensor]
    returns: Any = None
    left: int = -1


def _watch(model: nn.Module, run: Callable[[], Tensor]) -> tuple[dict[str, _Call], Tensor]:
    """First call of every module by name, and the result of the pass."""
    calls: dict[str, _Call] = {}
    clock = count()
    hooks = []
    for name, module in model.named_modules():

        def enter(_: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            if name not in calls:
                calls[name] = _Call(next(clock), _tensors(args, kwargs))

        def leave(_: nn.Module, args: Any, output: Any, name: str = name) -> None:
            if calls[name].left < 0:
                calls[name].left, calls[name].returns = next(clock), output

        hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        hooks.append(module.register_forward_hook(leave))
    try:
        return calls, run()
    finally:
        for hook in hooks:
            hook.remove()


def _owner(name: str, calls: dict[str, _Call]) -> str | None:
    """Innermost called module that holds a parameter; None for one of the other tower."""
    owner = name.rpartition(".")[0]
    if owner not in calls and any(call.startswith(f"{owner}.".lstrip(".")) for call in calls):
        return owner  # such as the model itself, whose own parameters may be used anywhere
    while owner and owner not in calls:
        owner = owner.rpartition(".")[0]
    return owner or None


def _find_boundary(
    model: nn.Module,
    owners: set[str],
    calls: dict[str, _Call],
    features: Tensor,
    inputs: Inputs,
) -> Boundary | None:
    """Boundary before the earliest unit with attributed parameters; None if it takes the inputs."""
    if not owners:
        return Boundary(None)
    units = {_unit(model, owner, calls) for owner in owners}
    if None in units:
        return None
    unit = min((name for name in units if name), key=lambda name: calls[name].entered)
    first, rows = calls[unit], len(features)
    done = {name: call for name, call in calls.items() if 0 <= call.left < first.entered}
    if not done or not first.takes or not _is_activation(first.takes[0], rows):
        return None
    return Boundary(
        unit,
        is_last=first.returns is features and len(first.takes) == 1,
        skipped={
            name: tree_map(partial(_Blank.of, rows=rows), call.returns)
            for name, call in done.items()
            if name.rpartition(".")[0] not in done
        },
        pixels=_Blank.of(inputs[PIXELS], rows) if PIXELS in inputs else None,
    )


def _unit(model: nn.Module, owner: str, calls: dict[str, _Call]) -> str | None:
    """Layer of a stack that contains the owner, or else the outermost module beside the stacks."""
    stacks = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
    }
    layers = {name for name in calls if name.rpartition(".")[0] in stacks}
    parts = owner.split(".")
    for depth in range(1, len(parts) + 1):
        outer = ".".join(parts[:depth])
        holds_stack = any(layer.startswith(f"{outer}.") for layer in layers)
        if outer in calls and (outer in layers or not holds_stack):
            return outer
    return None


def _returning(output: Any, hidden: Tensor) -> Callable[..., Any]:
    """Forward function that returns blanks of the shapes seen before."""
    blank = tree_map(lambda part: part.blank(hidden) if isinstance(part, _Blank) else part, output)
    return lambda *args, **kwargs: blank


def _first_rows(inputs: Inputs) -> Inputs:
    return {key: value[:2] for key, value in inputs.items()}


def _is_raw(inputs: Inputs) -> bool:
    return inputs.keys().isdisjoint({FEATURES, HIDDEN})


def _tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """Tensors among the arguments of a call."""
    return [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]


def _is_activation(value: Tensor, rows: int) -> bool:
    return value.is_floating_point() and value.shape[:1] == (rows,)


def _with_first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any], value: Tensor) -> Any:
    """Arguments of a call, with ``value`` in place of the first of `_tensors`."""
    first = _tensors(args, kwargs)[0]
    return (
        tuple(value if arg is first else arg for arg in args),
        {key: value if arg is first else arg for key, arg in kwargs.items()},
    )
