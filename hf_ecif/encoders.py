"""A Hugging Face dual encoder as a function of the attributed parameters.

`DualEncoder` embeds rows, pushes tangents of the parameters forward to the embeddings, and pulls
cotangents of the embeddings back to the parameters, always in micro-batches. What lies below the
attributed parameters is frozen: it runs once, and its activations, a `Features`, are the input of
everything else (see `hf_ecif.towers`). With ``projections`` attributed, that leaves one matrix
product per tower.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from hashlib import sha256
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_ecif.errors import UserError
from hf_ecif.forward_mode import FrozenLinears
from hf_ecif.objectives import Contrastive, Embeddings, infonce, sigmoid
from hf_ecif.parameters import TEMPERATURE, select_parameters
from hf_ecif.towers import Inputs, Tower

CHUNK_BYTES = 512 * 2**20  # of embeddings and tangents that are held at a time

Weights = dict[str, Tensor]
Side = Literal["text", "image"]
TangentForm = Literal["exact", "difference"]

# Of a finite difference, relative to |theta|: large enough for float32, small enough to be linear.
_STEP = 3e-4


class Features:
    """Inputs of the attributed part, a row each in every tensor.

    Texts and images are pairs, row by row, except where a query pairs all with all (class prompts
    and images): then their numbers may differ. Choosing rows copies nothing; a micro-batch is
    copied when it is encoded.

    Args:
        text: inputs of the text tower, or activations at its boundary.
        image: the same of the image tower.
    """

    def __init__(self, text: Inputs, image: Inputs) -> None:
        self._sides: dict[Side, _Chosen] = {"text": _Chosen(text), "image": _Chosen(image)}

    @property
    def text(self) -> Inputs:
        """Inputs of the text tower."""
        return self.part("text", slice(None))

    @property
    def image(self) -> Inputs:
        """Inputs of the image tower."""
        return self.part("image", slice(None))

    def __len__(self) -> int:
        return self.count("text")

    def __getitem__(self, rows: Tensor | slice) -> Features:
        return self._with({side: chosen.choose(rows) for side, chosen in self._sides.items()})

    def with_texts_of(self, rows: Tensor) -> Features:
        """The same images, each with the text of another row."""
        return self._with(self._sides | {"text": self._sides["text"].choose(rows)})

    def paired_with(self, other: Features) -> Features:
        """The texts of these rows, and the images of others."""
        return self._with(self._sides | {"image": other._sides["image"]})

    def count(self, side: Side) -> int:
        """Number of texts, or of images."""
        inputs, rows = self._sides[side]
        return len(next(iter(inputs.values()))) if rows is None else len(rows)

    def part(self, side: Side, rows: slice) -> Inputs:
        """Some rows of a side, as tensors."""
        return self._sides[side].part(rows)

    def bytes_per_row(self) -> int:
        """Of all inputs together."""
        values = [v for chosen in self._sides.values() for v in chosen.inputs.values()]
        return sum(value[:1].numel() * value.element_size() for value in values)

    @staticmethod
    def _with(sides: dict[Side, _Chosen]) -> Features:
        features = Features({}, {})
        features._sides = sides
        return features


class _Chosen(NamedTuple):
    """Rows of tensors; all of them where ``rows`` is None."""

    inputs: Inputs
    rows: Tensor | None = None

    def choose(self, rows: Tensor | slice) -> _Chosen:
        if self.rows is not None:
            return _Chosen(self.inputs, self.rows[rows])
        if isinstance(rows, slice):
            return _Chosen({key: value[rows] for key, value in self.inputs.items()})
        return _Chosen(self.inputs, rows)

    def part(self, rows: slice) -> Inputs:
        chosen = rows if self.rows is None else self.rows[rows]
        return {key: value[chosen] for key, value in self.inputs.items()}


class DualEncoder:
    """Embeddings of a CLIP-like model as a function of a flat vector of attributed parameters.

    The model is put in evaluation mode with gradients off; its own weights are never changed, but
    by `load`. Attributed parameters, embeddings and everything after them are in float32 where the
    model is in half precision.

    Attributes:
        names: names of the attributed parameters, in the order of the flat vector.
        count: their number of scalars, ``P``.
        contrastive: the loss that the model is trained with: sigmoid where it has a logit bias,
            else InfoNCE.

    Example:
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
        self.contrastive: Contrastive = sigmoid if hasattr(model, "logit_bias") else infonce
        values = [model.get_parameter(name) for name in self.names]
        self.count = sum(value.numel() for value in values)
        self.dtype = torch.promote_types(values[0].dtype, torch.float32)
        self.device = values[0].device
        self._dtypes = {name: v.dtype for name, v in zip(self.names, values, strict=True)}
        chosen = {*self.names}
        self._frozen = [value for name, value in model.named_parameters() if name not in chosen]
        self._shapes = [value.shape for value in values]
        in_towers = [name for name in self.names if not TEMPERATURE.search(name)]
        self._towers: dict[Side, Tower] = {
            "text": Tower(model, "text", in_towers),
            "image": Tower(model, "image", in_towers),
        }

    @property
    def theta(self) -> Tensor:
        """The model's own values of the attributed parameters, ``(P,)``."""
        values = [self.model.get_parameter(name).reshape(-1) for name in self.names]
        return torch.cat(values).to(self.dtype)

    @property
    def max_text_length(self) -> int:
        """Tokens that the text tower takes."""
        count = int(self.model.config.text_config.max_position_embeddings)
        for name, module in self.model.named_modules():
            # RoBERTa counts positions from the one that stands for padding.
            if name.endswith("position_embeddings") and getattr(module, "padding_idx", None):
                return count - module.padding_idx - 1
        return count

    @property
    def input_dtype(self) -> torch.dtype:
        """Of pixels: that of the model's weights."""
        return next(value.dtype for value in self.model.parameters() if value.is_floating_point())

    @property
    def scale(self) -> float:
        """Inverse temperature of the model as given."""
        return float(self.model.logit_scale.exp())

    def fingerprint(self) -> str:
        """A hash of the model's weights, for provenance."""
        digest = sha256()
        for name, value in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(value.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:16]

    def rows_that_fit(self, features: Features, tangents: int) -> int:
        """Rows whose embeddings and tangents, with the cotangents to come, take `CHUNK_BYTES`."""
        width = self._towers["text"].width(self._here(features.part("text", slice(0, 2))))
        return max(1, CHUNK_BYTES // (4 * width * (1 + tangents) * self.dtype.itemsize))

    def freeze(self, features: Features) -> Features:
        """Run what lies below the attributed parameters, once; the rest needs only its output."""
        frozen = []
        for side, tower in self._towers.items():
            parts = [tower.freeze(part) for _, part in self._micro_batches(side, features)]
            frozen.append({key: torch.cat([part[key] for part in parts]) for key in parts[0]})
        return Features(*frozen)

    def keeps_tokens(self, inputs: Inputs) -> bool:
        """Whether texts are needed beyond the frozen part, token by token."""
        return not Tower.is_light(self._towers["text"].freeze(self._here(inputs)))

    def embed(self, theta: Tensor, features: Features) -> Embeddings:
        """Normalised embeddings ``(N, d)``, scale and bias, without a graph."""
        weights = self._unflatten(theta)
        with torch.no_grad():
            text, image = (
                torch.cat([embed(own) for _, embed, own in self._parts(side, features, weights)])
                for side in self._towers
            )
        return Embeddings(text, image, *self._temperature(weights))

    def push(
        self, theta: Tensor, tangents: Tensor, features: Features, form: TangentForm = "exact"
    ) -> tuple[Embeddings, Embeddings]:
        """Embeddings, and their tangents along each row of ``tangents`` (forward mode).

        Args:
            theta: ``(P,)``.
            tangents: ``(K, P)``.
            features: ``N`` rows.
            form: ``"exact"``, or ``"difference"``: a second pass a small step along each tangent,
                with the model's own attention kernel. Half precision cannot resolve the step, so
                there it is exact all the same.

        Returns:
            Embeddings ``(N, d)``, and tangents with a leading ``K``: ``(K, N, d)`` and ``(K,)``.
            The primal pass is shared by all ``K``.
        """
        if form == "difference" and all(d.itemsize >= 4 for d in self._dtypes.values()):
            return self._push_by_difference(theta, tangents, features)
        weights, moving = self._unflatten(theta), self._unflatten(tangents)
        pushed = []
        with torch.no_grad(), _differentiable_attention(), FrozenLinears(self._frozen):
            for side in self._towers:
                parts = self._parts(side, features, weights)
                pushed.append([_push(embed, own, moving) for _, embed, own in parts])
        (text, text_moved), (image, image_moved) = (
            (torch.cat(primal), torch.cat(moved, dim=1))
            for primal, moved in (zip(*side, strict=True) for side in pushed)
        )
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
                for rows, embed, own in self._parts(side, features, weights):
                    if own:
                        self._add(total, _pull(embed, own, cotangent[:, rows]))
        # The scale belongs to the batch, not to a row: its cotangent is spent once.
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
            cotangent_tangents: the same with a leading ``K``.
            features: ``N`` rows.
        """
        weights, moving = self._unflatten(theta), self._unflatten(tangents)
        total = torch.zeros_like(tangents)
        with _differentiable_attention():
            sides = zip(self._towers, cotangent[:2], cotangent_tangents[:2], strict=True)
            for side, fixed, moved in sides:
                for rows, embed, own in self._parts(side, features, weights):
                    if own:
                        product = _pull_tangent(embed, own, moving, fixed[rows], moved[:, rows])
                        self._add(total, product)
        scale = self._temperature(weights)[0]
        scale_moved = self._temperature_tangent(scale, moving, tangents)[0]
        of_scale = scale_moved * cotangent.scale + scale * cotangent_tangents.scale
        self._add_temperature(total, of_scale, cotangent_tangents)
        return total

    def load(self, theta: Tensor) -> None:
        """Write ``theta`` into the model's own parameters."""
        for name, value in self._unflatten(theta).items():
            self.model.get_parameter(name).copy_(value)

    def _push_by_difference(
        self, theta: Tensor, tangents: Tensor, features: Features
    ) -> tuple[Embeddings, Embeddings]:
        here = self.embed(theta, features)
        # Fresh adapters may be zero: then parameters of common size set the measure.
        length = _STEP * max(theta.norm().item(), 0.01 * len(theta) ** 0.5)
        moved = []
        for tangent in tangents:
            step = length / tangent.norm().clamp_min(torch.finfo(theta.dtype).tiny)
            there = self.embed(theta + step * tangent, features)
            moved.append([(b - a) / step for a, b in zip(here, there, strict=True)])
        return here, Embeddings(*(torch.stack(parts) for parts in zip(*moved, strict=True)))

    def _unflatten(self, flat: Tensor) -> Weights:
        """Views of ``(P,)``, or of ``(K, P)`` with the leading ``K``, by name."""
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
        self, side: Side, features: Features, weights: Weights
    ) -> Iterator[tuple[slice, Callable[[Weights], Tensor], Weights]]:
        """Micro-batches of a side, each a function of those weights that act in it."""
        tower = self._towers[side]
        for rows, part in self._micro_batches(side, features):
            own = {name: weights[name] for name in tower.names(part)}

            def embed(weights: Weights, part: Inputs = part) -> Tensor:
                replaced = {f"model.{n}": w.to(self._dtypes[n]) for n, w in weights.items()}
                features = functional_call(tower, replaced, (part,)).to(self.dtype)
                return features / features.norm(dim=-1, keepdim=True)

            yield rows, embed, own

    def _micro_batches(self, side: Side, features: Features) -> Iterator[tuple[slice, Inputs]]:
        # A head on pooled activations has no graph worth splitting: one product does for all rows.
        count = features.count(side)
        light = Tower.is_light(features.part(side, slice(0, 1)))
        size = count if light else self.micro_batch_size
        for start in range(0, count, max(size, 1)):
            rows = slice(start, min(start + size, count))
            yield rows, self._here(features.part(side, rows))

    def _here(self, inputs: Inputs) -> Inputs:
        return {key: value.to(self.device) for key, value in inputs.items()}

    def _temperature(self, weights: Weights) -> tuple[Tensor, Tensor]:
        """Scale and bias, ``()`` each; the bias of InfoNCE is zero."""
        scale = _by_suffix(weights, "logit_scale", self.model.logit_scale).exp()
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
        return vmap(push_one, out_dims=(None, 0))(tangents)
    primal, moved = push_one({name: value[0] for name, value in tangents.items()})
    return primal, moved[None]  # batched products of one are slower than plain ones


def _pull(embed: Callable[[Weights], Tensor], own: Weights, cotangents: Tensor) -> Weights:
    """Gradients ``(K, *shape)`` by name."""
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
    """Fused attention has no forward-mode derivative; the plain kernel has, and is restored."""
    return sdpa_kernel(SDPBackend.MATH)


def _by_suffix(weights: Weights, suffix: str, default: Tensor) -> Tensor:
    """Adapters put a prefix before the names of a model's own parameters."""
    return next((value for name, value in weights.items() if name.endswith(suffix)), default)
