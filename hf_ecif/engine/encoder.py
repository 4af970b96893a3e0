"""A Hugging Face dual encoder as a function of the attributed parameters.

`DualEncoder` embeds rows, pushes tangents of the parameters forward to the embeddings, and pulls
cotangents of the embeddings back to the parameters, always in micro-batches. What lies below the
attributed parameters is frozen: it runs once, and its activations, a `Features`, are the input of
everything else (see `hf_ecif.engine.towers`). With ``projections`` attributed, one matrix product
per tower remains.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property, partial
from hashlib import sha256
from typing import Any, Literal, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_ecif.engine.features import Features, Side
from hf_ecif.engine.forward_mode import Derivative, FrozenLinears
from hf_ecif.engine.objectives import Contrastive, Embeddings, loss_of
from hf_ecif.engine.parameters import TEMPERATURE, select_parameters
from hf_ecif.engine.towers import Inputs, Tower
from hf_ecif.errors import UserError
from hf_ecif.utils import distributed

CHUNK_BYTES = 512 * 2**20  # held at a time, of embeddings and tangents
LIGHT_ROWS = 2**14  # rows times tangents in one pass through a head: the result fits a cache

Weights = dict[str, Tensor]
TangentForm = Literal["exact", "difference"]

# Step of a finite difference, relative to |theta|: resolved in float32, and still linear.
_STEP = 3e-4


class DualEncoder:
    """Embeddings of a CLIP-like model as a function of a flat vector of attributed parameters.

    The model is put in evaluation mode with gradients off; only `load` changes its weights. If the
    model is in half precision, attributed parameters, embeddings and everything after them are in
    float32.

    Attributes:
        names: names of the attributed parameters, in the order of the flat vector.
        count: number of their scalars, ``P``.
        contrastive: the loss that the model is trained with, from `loss_of`.

    Examples:
        >>> from transformers import CLIPConfig, CLIPModel
        >>> model = CLIPModel(CLIPConfig(projection_dim=16))  # doctest: +SKIP
        >>> DualEncoder(model, "projections").names  # doctest: +SKIP
        ['visual_projection.weight', 'text_projection.weight']
    """

    def __init__(
        self, model: nn.Module, parameters: str = "projections", micro_batch_size: int = 64
    ) -> None:
        require_dual_encoder(model)
        self.model = model.eval().requires_grad_(False)
        self.micro_batch_size = micro_batch_size
        self.names = select_parameters(model, parameters)
        self.contrastive: Contrastive = loss_of(model)
        values = [model.get_parameter(name) for name in self.names]
        self.count = sum(value.numel() for value in values)
        self.dtype = torch.promote_types(values[0].dtype, torch.float32)
        self.device = values[0].device
        self._dtypes = {name: v.dtype for name, v in zip(self.names, values, strict=True)}
        chosen = {*self.names}
        self._frozen = [value for name, value in model.named_parameters() if name not in chosen]
        self._shapes = [value.shape for value in values]
        # Looking for tied parameters at every call takes longer than a short head.
        self._has_tied = len([*model.named_parameters(remove_duplicate=False)]) > len(
            [*model.named_parameters()]
        )
        self._as_given: WeakKeyDictionary[Features, Embeddings] = WeakKeyDictionary()
        in_towers = [name for name in self.names if not TEMPERATURE.search(name)]
        self._towers: dict[Side, Tower] = {
            "text": Tower(model, "text", in_towers),
            "image": Tower(model, "image", in_towers),
        }

    @property
    def theta(self) -> Tensor:
        """Values of the attributed parameters in the model, ``(P,)``."""
        values = [self.model.get_parameter(name).reshape(-1) for name in self.names]
        return torch.cat(values).to(self.dtype)

    @property
    def max_text_length(self) -> int:
        """Largest number of tokens that the text tower accepts."""
        config: Any = self.model.config
        count = int(config.text_config.max_position_embeddings)
        for name, module in self.model.named_modules():
            # RoBERTa counts positions from the one that stands for padding.
            padding: int | None = getattr(module, "padding_idx", None)
            if name.endswith("position_embeddings") and padding:
                return count - padding - 1
        return count

    @property
    def input_dtype(self) -> torch.dtype:
        """Dtype of pixels: that of the model's weights."""
        return next(value.dtype for value in self.model.parameters() if value.is_floating_point())

    @property
    def scale(self) -> float:
        """Inverse temperature of the model, ``exp(logit_scale)``."""
        return float(self._logit_scale.exp())

    def fingerprint(self) -> str:
        """Hash of the model's weights, for provenance."""
        return _hash(sorted(self.model.state_dict().items()))

    @cached_property
    def boundary(self) -> str:
        """Hash of the frozen weights and the names of the attributed ones.

        Features that one encoder has frozen serve all encoders with an equal boundary.
        """
        chosen = {*self.names}
        frozen = (item for item in self.model.named_parameters() if item[0] not in chosen)
        return _hash([*frozen, *((name, torch.zeros(0)) for name in self.names)])

    def rows_that_fit(self, features: Features, tangents: int) -> int:
        """Number of rows whose embeddings, tangents and later cotangents take `CHUNK_BYTES`."""
        return max(1, CHUNK_BYTES // self.bytes_per_row(features, tangents))

    def bytes_per_row(self, features: Features, tangents: int) -> int:
        """Bytes of a pair's embeddings and tangents, and of the cotangents that follow."""
        width = self._towers["text"].width(self._here(features.example("text")))
        return 4 * width * (1 + tangents) * self.dtype.itemsize

    def freeze(self, features: Features) -> Features:
        """Output of the part below the attributed parameters; everything else needs only this.

        Only the rows held here are run, whatever other processes do.
        """

        def run(tower: Tower, inputs: Inputs) -> Inputs:
            count = len(next(iter(inputs.values())))
            parts = [
                tower.freeze(self._here({key: value[rows] for key, value in inputs.items()}))
                for rows in self._micro_batches(count, inputs)
            ]
            return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}

        towers = self._towers
        return Features(run(towers["text"], features.text), run(towers["image"], features.image))

    def keeps_tokens(self, inputs: Inputs) -> bool:
        """Whether the attributed part reads texts token by token."""
        return not Tower.is_light(self._towers["text"].freeze(self._here(inputs)))

    def embed(self, theta: Tensor, features: Features) -> Embeddings:
        """Normalised embeddings ``(N, d)``, scale and bias, without a graph."""
        with torch.no_grad():
            return self._embed(features, theta)

    def linearise(self, theta: Tensor, features: Features) -> Derivative:
        """Derivative of `embed`, kept for many products; for few rows, all held here.

        It keeps the whole graph of the embeddings, so it is meant for inputs that `are_light`.
        """
        with _differentiable_attention():
            return Derivative(partial(self._embed, features), theta)

    def embed_and_pull(
        self, theta: Tensor, features: Features
    ) -> tuple[Embeddings, Callable[[Embeddings], Tensor]]:
        """Embeddings as `embed` returns them, and a function that pulls their cotangents back.

        Heads run once for both; whole layers run again for the pull, in micro-batches.
        """
        if features.are_light() and distributed.count() == 1:
            near = self.linearise(theta, features)
            return Embeddings(*near.value), near.pull
        return self.embed(theta, features), lambda c: self.pull(theta, c, features)

    def push(
        self, theta: Tensor, tangents: Tensor, features: Features, form: TangentForm = "exact"
    ) -> tuple[Embeddings, Embeddings]:
        """Embeddings and their tangents along each row of ``tangents`` (forward mode).

        Args:
            theta: ``(P,)``.
            tangents: ``(K, P)``.
            features: ``N`` rows.
            form: ``"exact"``, or ``"difference"``: a second pass after a small step along each
                tangent, with the model's own attention kernel. Half precision cannot resolve the
                step, so there the tangent is exact in either form.

        Returns:
            Embeddings ``(N, d)``, and tangents with a leading ``K``: ``(K, N, d)`` and ``(K,)``.
            The primal pass is shared by all ``K``.
        """
        if len(tangents) == 0:
            here = self.embed(theta, features)
            return here, Embeddings(*(part.new_zeros(0, *part.shape) for part in here))
        if form == "difference" and all(d.itemsize >= 4 for d in self._dtypes.values()):
            return self._push_by_difference(theta, tangents, features)
        weights, moving = self._unflatten(theta), self._unflatten(tangents)

        def run(side: Side) -> list[Tensor]:
            positions, parts = self._parts(side, features, weights, len(tangents))
            pushed = [_push(embed, own, moving) for _, embed, own in parts]
            return self._whole(side, features, positions, pushed, [(), (len(tangents),)])

        with torch.no_grad(), _differentiable_attention(), FrozenLinears(self._frozen):
            (text, text_moved), (image, image_moved) = run("text"), run("image")
        scale, bias = self._temperature(weights)
        scale_moved, bias_moved = self._temperature_tangent(scale, moving, tangents)
        return (
            Embeddings(text, image, scale, bias),
            Embeddings(text_moved, image_moved, scale_moved, bias_moved),
        )

    def pull(self, theta: Tensor, cotangents: Embeddings, features: Features) -> Tensor:
        """Gradient ``(K, P)`` of ``<cotangent, embeddings(theta)>`` for each of ``K`` cotangents.

        Args:
            theta: ``(P,)``.
            cotangents: ``(K, N, d)``, ``(K, N, d)``, ``(K,)`` and ``(K,)``.
            features: ``N`` rows.
        """
        weights = self._unflatten(theta)
        total = theta.new_zeros(len(cotangents.scale), len(theta))
        with _differentiable_attention():
            for side, cotangent in zip(self._towers, cotangents[:2], strict=True):
                positions, parts = self._parts(side, features, weights, len(total))
                mine = _rows(cotangent, positions)
                for rows, embed, own in parts:
                    if own:
                        self._add(total, _pull(embed, own, mine[:, rows]))
        total = distributed.add_up(total)
        # The scale belongs to the batch, not to a row: its cotangent counts once.
        self._add_temperature(total, cotangents.scale * self._temperature(weights)[0], cotangents)
        return total

    def pull_tangent(
        self,
        theta: Tensor,
        tangents: Tensor,
        cotangent: Embeddings,
        cotangent_tangents: Embeddings,
        features: Features,
    ) -> Tensor:
        """Derivative ``(K, P)`` of a pull along each tangent, forward over reverse.

        With ``cotangent`` the loss's gradient at the embeddings and ``cotangent_tangents`` its
        derivative along the pushed tangents, this is the Hessian product.

        Args:
            theta: ``(P,)``.
            tangents: ``(K, P)``.
            cotangent: ``(N, d)``, ``(N, d)``, ``()`` and ``()``.
            cotangent_tangents: these shapes with a leading ``K``.
            features: ``N`` rows.
        """
        weights, moving = self._unflatten(theta), self._unflatten(tangents)
        total = torch.zeros_like(tangents)
        with _differentiable_attention():
            sides = zip(self._towers, cotangent[:2], cotangent_tangents[:2], strict=True)
            for side, fixed, moved in sides:
                positions, parts = self._parts(side, features, weights)
                mine, mine_moved = _rows(fixed, positions), _rows(moved, positions)
                for rows, embed, own in parts:
                    if own:
                        product = _pull_tangent(embed, own, moving, mine[rows], mine_moved[:, rows])
                        self._add(total, product)
        total = distributed.add_up(total)
        scale = self._temperature(weights)[0]
        scale_moved = self._temperature_tangent(scale, moving, tangents)[0]
        of_scale = scale_moved * cotangent.scale + scale * cotangent_tangents.scale
        self._add_temperature(total, of_scale, cotangent_tangents)
        return total

    def load(self, theta: Tensor, into: nn.Module | None = None) -> None:
        """Write ``theta`` into the model's own parameters, or into those of a copy of it."""
        for name, value in self._unflatten(theta).items():
            (into or self.model).get_parameter(name).copy_(value)
        if into is None:
            self._as_given.clear()

    def embed_as_given(self, features: Features) -> Embeddings:
        """Embeddings by the model as given, computed once for as long as the rows are in use."""
        if features not in self._as_given:
            self._as_given[features] = self.embed(self.theta, features)
        return self._as_given[features]

    def _embed(self, features: Features, theta: Tensor) -> Embeddings:
        weights = self._unflatten(theta)

        def run(side: Side) -> Tensor:
            positions, parts = self._parts(side, features, weights)
            embedded = [(embed(own),) for _, embed, own in parts]
            return self._whole(side, features, positions, embedded, [()])[0]

        return Embeddings(run("text"), run("image"), *self._temperature(weights))

    def _push_by_difference(
        self, theta: Tensor, tangents: Tensor, features: Features
    ) -> tuple[Embeddings, Embeddings]:
        here = self.embed(theta, features)
        # Fresh adapters may be zero: the step is then that of parameters of a common size.
        length = _STEP * max(theta.norm().item(), 0.01 * len(theta) ** 0.5)
        moved = []
        for tangent in tangents:
            step = length / tangent.norm().clamp_min(torch.finfo(theta.dtype).tiny)
            there = self.embed(torch.addcmul(theta, tangent, step), features)
            moved.append([(b - a) / step for a, b in zip(here, there, strict=True)])
        return here, Embeddings(*(torch.stack(parts) for parts in zip(*moved, strict=True)))

    def _unflatten(self, flat: Tensor) -> Weights:
        """Views of a flat ``(P,)`` or ``(K, P)`` by parameter name, a leading ``K`` kept."""
        pieces = flat.split([shape.numel() for shape in self._shapes], dim=-1)
        return {
            name: piece.reshape((*flat.shape[:-1], *shape))
            for name, piece, shape in zip(self.names, pieces, self._shapes, strict=True)
        }

    def _add(self, total: Tensor, parts: Weights) -> None:
        """Add ``(K, *shape)`` by name to the flat ``(K, P)``."""
        views = self._unflatten(total)
        for name, value in parts.items():
            views[name] += value

    def _parts(
        self, side: Side, features: Features, weights: Weights, tangents: int = 1
    ) -> tuple[slice | Tensor, Iterator[_Function]]:
        """Positions of the rows that this process works on, and their micro-batches.

        A micro-batch is a function of the weights that act in it.
        """
        tower, example = self._towers[side], features.example(side)
        own = {name: weights[name] for name in tower.names(self._here(example))}
        positions, rows_at, count = features.mine(side)

        def function(rows: slice) -> _Function:
            part = self._here(rows_at(rows))

            def embed(weights: Weights) -> Tensor:
                replaced = {f"model.{n}": w.to(self._dtypes[n]) for n, w in weights.items()}
                output = functional_call(tower, replaced, (part,), tie_weights=self._has_tied)
                features = output.to(self.dtype)
                return features / features.norm(dim=-1, keepdim=True)

            return _Function(rows, embed, own)

        return positions, map(function, self._micro_batches(count, example, tangents))

    def _micro_batches(self, count: int, inputs: Inputs, tangents: int = 1) -> list[slice]:
        size = self.micro_batch_size
        if Tower.is_light(inputs):  # a head on pooled activations has no graph worth splitting
            size = max(size, LIGHT_ROWS // max(1, tangents))
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]

    def _whole(
        self,
        side: Side,
        features: Features,
        positions: slice | Tensor,
        parts: Sequence[Sequence[Tensor]],
        leading: Sequence[tuple[int, ...]],
    ) -> list[Tensor]:
        """Embeddings, with or without their tangents, of the rows of all processes.

        Args:
            side: which embeddings.
            features: ``N`` rows.
            positions: places of this process's rows.
            parts: tensors ``(*leading, n, d)`` of each micro-batch of this process.
            leading: leading shape of each of these tensors.

        Returns:
            ``(*leading, N, d)`` for each tensor of a micro-batch.
        """
        if len(parts) == 1:
            here = list(parts[0])
        elif parts:
            here = [torch.cat(pieces, dim=-2) for pieces in zip(*parts, strict=True)]
        else:
            width = self._towers[side].width(self._here(features.example(side)))
            shapes = [(*before, 0, width) for before in leading]
            here = [torch.zeros(s, dtype=self.dtype, device=self.device) for s in shapes]
        return distributed.spread(here, positions, features.count(side))

    def _here(self, inputs: Inputs) -> Inputs:
        return {key: value.to(self.device) for key, value in inputs.items()}

    @property
    def _logit_scale(self) -> Tensor:
        return cast(Tensor, self.model.logit_scale)

    def _temperature(self, weights: Weights) -> tuple[Tensor, Tensor]:
        """Scale and bias, ``()`` each; the bias of InfoNCE is zero."""
        scale = _by_suffix(weights, "logit_scale", self._logit_scale).exp()
        bias = _by_suffix(weights, "logit_bias", getattr(self.model, "logit_bias", scale * 0))
        return scale.reshape(()).to(self.dtype), bias.reshape(()).to(self.dtype)

    def _temperature_tangent(
        self, scale: Tensor, moving: Weights, tangents: Tensor
    ) -> tuple[Tensor, Tensor]:
        still = tangents.new_zeros(len(tangents))
        of_scale = _by_suffix(moving, "logit_scale", still).reshape(-1)
        return scale * of_scale, _by_suffix(moving, "logit_bias", still).reshape(-1)

    def _add_temperature(self, total: Tensor, of_scale: Tensor, cotangents: Embeddings) -> None:
        """Add cotangents of ``logit_scale``, which is the logarithm of the scale, and the bias."""
        for name, view in self._unflatten(total).items():
            if name.endswith("logit_scale"):
                view += of_scale.reshape(view.shape)
            elif name.endswith("logit_bias"):
                view += cotangents.bias.reshape(view.shape)


class _Function(NamedTuple):
    """Embeddings of a micro-batch as a function of the weights that act in it."""

    rows: slice
    embed: Callable[[Weights], Tensor]
    own: Weights


def require_dual_encoder(model: nn.Module) -> None:
    """Raise `UserError` unless the model embeds images and texts with a common scale."""
    lacking = [
        name
        for name in ("get_text_features", "get_image_features", "logit_scale")
        if not hasattr(model, name)
    ]
    if lacking:
        raise UserError(
            f"{type(model).__name__} is not a contrastive dual encoder: it lacks "
            f"{', '.join(lacking)}. Use a CLIP-like model, such as a saved CLIPModel."
        )


def _hash(tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = sha256()
    for name, value in tensors:
        digest.update(name.encode())
        digest.update(value.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _rows(whole: Tensor, positions: slice | Tensor) -> Tensor:
    """Rows of ``(..., N, d)`` at the positions, in half the time of indexing."""
    if isinstance(positions, slice):
        return whole[..., positions, :]
    return whole.index_select(-2, positions.to(whole.device))


def _push(embed: Callable[[Weights], Tensor], own: Weights, moving: Weights) -> Any:
    """Embeddings ``(n, d)`` and tangents ``(K, n, d)`` of a micro-batch."""
    if not own:
        primal = embed(own)
        count = len(next(iter(moving.values())))
        return primal, primal.new_zeros(()).expand(count, *primal.shape)
    tangents = {name: moving[name] for name in own}

    def push_one(tangent: Weights) -> Any:
        return jvp(embed, (own,), (tangent,))

    if len(next(iter(tangents.values()))) > 1:
        # torch's annotation forbids the None that its documentation describes.
        return vmap(push_one, out_dims=(None, 0))(tangents)  # type: ignore[arg-type]
    primal, moved = push_one({name: value[0] for name, value in tangents.items()})
    return primal, moved[None]  # batched products of one are slower than plain ones


def _pull(embed: Callable[[Weights], Tensor], own: Weights, cotangents: Tensor) -> Weights:
    """Gradients ``(K, *shape)`` of ``<cotangent, embeddings>`` by parameter name."""
    pull_one = vjp(embed, own)[1]
    if len(cotangents) > 1:
        return vmap(pull_one)(cotangents)[0]
    return {name: value[None] for name, value in pull_one(cotangents[0])[0].items()}


def _pull_tangent(
    embed: Callable[[Weights], Tensor],
    own: Weights,
    moving: Weights,
    cotangent: Tensor,
    cotangent_tangents: Tensor,
) -> Weights:
    def pull(weights: Weights, cotangent: Tensor) -> Weights:
        return vjp(embed, weights)[1](cotangent)[0]

    def along(tangent: Weights, moved: Tensor) -> Weights:
        return jvp(pull, (own, cotangent), (tangent, moved))[1]

    return vmap(along)({name: moving[name] for name in own}, cotangent_tangents)


def _differentiable_attention() -> AbstractContextManager[Any]:
    """Context with the plain attention kernel: fused ones have no forward-mode derivative."""
    return sdpa_kernel(SDPBackend.MATH)


def _by_suffix(weights: Weights, suffix: str, default: Tensor) -> Tensor:
    """The weight whose name ends so, since adapters put a prefix before names; else the default."""
    return next((value for name, value in weights.items() if name.endswith(suffix)), default)
