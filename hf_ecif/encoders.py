"""A Hugging Face dual encoder as a function of the attributed parameters.

`DualEncoder` embeds rows, pushes tangents of the parameters forward to the embeddings, and pulls
cotangents of the embeddings back to the parameters, always in micro-batches. What lies below the
attributed parameters is *frozen*: it runs once, and its activations, a `Features`, are the input of
everything else. With ``projections`` attributed, that leaves one matrix product per tower.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from hf_ecif.errors import UserError
from hf_ecif.objectives import Embeddings

PROJECTIONS = {"text": "text_projection", "image": "visual_projection"}
TEMPERATURE = ("logit_scale", "logit_bias")


@dataclass(frozen=True)
class Features:
    """Inputs of the attributed part for ``N`` pairs, a row each in every tensor.

    Attributes:
        text: keyword arguments of the text tower, or its pooled output under ``"pooled"``.
        image: the same of the image tower.
    """

    text: dict[str, Tensor]
    image: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.text.values())))

    def __getitem__(self, rows: Tensor | slice) -> Features:
        return Features(
            {key: value[rows] for key, value in self.text.items()},
            {key: value[rows] for key, value in self.image.items()},
        )

    def to(self, device: torch.device) -> Features:
        return Features(
            {key: value.to(device) for key, value in self.text.items()},
            {key: value.to(device) for key, value in self.image.items()},
        )

    def with_texts_of(self, rows: Tensor) -> Features:
        """The same images, each with the text of another row."""
        return Features({key: value[rows] for key, value in self.text.items()}, self.image)

    @staticmethod
    def cat(parts: Sequence[Features]) -> Features:
        return Features(
            {key: torch.cat([p.text[key] for p in parts]) for key in parts[0].text},
            {key: torch.cat([p.image[key] for p in parts]) for key in parts[0].image},
        )


class DualEncoder:
    """Embeddings of a CLIP-like model as a function of a flat vector of attributed parameters.

    The model is put in evaluation mode with gradients off; its own weights are never changed.

    Attributes:
        names: names of the attributed parameters, in the order of the flat vector.
        count: their number of scalars, ``P``.
        frozen: whether everything below the projections is frozen, so that features are pooled
            activations.

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
        self._sizes = [model.get_parameter(name).numel() for name in self.names]
        self.count = sum(self._sizes)
        heads = tuple(f"{name}." for name in PROJECTIONS.values())
        self.frozen = all(name.startswith((*heads, *TEMPERATURE)) for name in self.names)
        self._towers = _Towers(model)

    @property
    def theta(self) -> Tensor:
        """The model's own values of the attributed parameters, ``(P,)``."""
        return torch.cat([self.model.get_parameter(name).reshape(-1) for name in self.names])

    @property
    def max_text_length(self) -> int:
        """Tokens that the text tower takes."""
        text = getattr(self.model.config, "text_config", self.model.config)
        return int(text.max_position_embeddings)

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

    def freeze(self, features: Features) -> Features:
        """Run what lies below the attributed parameters, once; the rest needs only its output."""
        if not self.frozen:
            return features
        parts = []
        with torch.no_grad():
            for part in self._micro_batches(features):
                pooled = self._towers.pooled(part.text, part.image)
                parts.append(Features({"pooled": pooled[0]}, {"pooled": pooled[1]}))
        return Features.cat(parts)

    def embed(self, theta: Tensor, features: Features) -> Embeddings:
        """Normalised embeddings ``(N, d)`` and the scale, without a graph."""
        with torch.no_grad():
            return _cat([self._forward(theta, part) for part in self._micro_batches(features)])

    def push(
        self, theta: Tensor, tangents: Tensor, features: Features
    ) -> tuple[Embeddings, Embeddings]:
        """Embeddings, and their tangents along each row of ``tangents`` (forward mode).

        Args:
            theta: ``(P,)``.
            tangents: ``(K, P)``.
            features: ``N`` rows.

        Returns:
            Embeddings ``(N, d)``, and tangents with a leading ``K``: ``(K, N, d)`` and ``(K,)``.
            The primal pass is shared by all ``K``.
        """
        primal, moved = [], []
        with torch.no_grad(), self._differentiable_attention():
            for part in self._micro_batches(features):

                def push_one(tangent: Tensor, part: Features = part) -> Any:
                    return jvp(lambda t: self._forward(t, part), (theta,), (tangent,))

                embeddings, tangent = vmap(push_one, out_dims=(None, 0))(tangents)
                primal.append(embeddings)
                moved.append(tangent)
        return _cat(primal), _cat(moved, rows=1)

    def pull(self, theta: Tensor, cotangents: Embeddings, features: Features) -> Tensor:
        """Gradient ``(K, P)`` of ``<cotangent, embeddings(theta)>`` for each of ``K`` cotangents.

        Args:
            theta: ``(P,)``.
            cotangents: ``(K, N, d)``, ``(K, N, d)`` and ``(K,)``.
            features: ``N`` rows.
        """
        total = torch.zeros(len(cotangents.scale), len(theta), dtype=theta.dtype).to(theta.device)
        with self._differentiable_attention():
            for rows, part in zip(
                self._slices(features), self._micro_batches(features), strict=True
            ):
                # The scale belongs to the batch, not to a row: its cotangent is spent once.
                spent = cotangents.scale * (rows.start == 0)
                cotangent = Embeddings(cotangents.text[:, rows], cotangents.image[:, rows], spent)
                pull_one = vjp(lambda t, part=part: self._forward(t, part), theta)[1]
                total += vmap(pull_one)(cotangent)[0]
        return total

    def load(self, theta: Tensor) -> None:
        """Write ``theta`` into the model's own parameters."""
        for name, value in self._unflatten(theta).items():
            self.model.get_parameter(name).copy_(value)

    def _forward(self, theta: Tensor, features: Features) -> Embeddings:
        weights = {f"model.{name}": value for name, value in self._unflatten(theta).items()}
        return functional_call(self._towers, weights, (features.text, features.image))

    def _unflatten(self, theta: Tensor) -> dict[str, Tensor]:
        return {
            name: piece.view(self.model.get_parameter(name).shape)
            for name, piece in zip(self.names, theta.split(self._sizes), strict=True)
        }

    def _slices(self, features: Features) -> Iterator[slice]:
        # Pooled activations have no graph worth splitting: one product does for all rows.
        size = len(features) if "pooled" in features.text else self.micro_batch_size
        return (slice(i, min(i + size, len(features))) for i in range(0, len(features), size))

    def _micro_batches(self, features: Features) -> Iterator[Features]:
        device = next(self.model.parameters()).device
        return (features[rows].to(device) for rows in self._slices(features))

    def _differentiable_attention(self) -> AbstractContextManager[Any]:
        """Fused attention has no forward-mode derivative; the plain kernel has, and is restored."""
        return nullcontext() if self.frozen else sdpa_kernel(SDPBackend.MATH)


def select_parameters(model: nn.Module, parameters: str) -> list[str]:
    """Names of the parameters that ``parameters`` selects.

    Args:
        model: a dual encoder.
        parameters: ``projections`` (the two projection heads), ``last_block`` (the last transformer
            layer of each tower, and the projections), ``all`` (everything but the temperature), or
            a regular expression searched for in the parameter names.

    Raises:
        UserError: the expression is invalid or selects nothing.
    """
    names = [name for name, value in model.named_parameters() if value.is_floating_point()]
    chosen = [name for name in names if _selector(parameters, names)(name)]
    if not chosen:
        raise UserError(
            f"--parameters {parameters!r} selects none of the model's {len(names)} parameters. "
            f"Use projections, last_block, all, or a regular expression that matches names such as "
            f"{', '.join(names[-3:])}."
        )
    return chosen


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
    if hasattr(model, "logit_bias"):
        raise UserError(
            f"{type(model).__name__} is trained with the sigmoid loss, which is not supported yet. "
            "Use a model trained with InfoNCE, such as a CLIPModel."
        )


def _selector(parameters: str, names: list[str]) -> Callable[[str], object]:
    if parameters == "all":
        return lambda name: not name.startswith(TEMPERATURE)
    heads = "|".join(PROJECTIONS.values())
    if parameters == "projections":
        return re.compile(rf"^({heads})\.").search
    if parameters == "last_block":
        last = _last_layers(names)
        return lambda name: name.startswith(last) or re.match(rf"({heads})\.", name)
    try:
        return re.compile(parameters).search
    except re.error as error:
        raise UserError(
            f"--parameters {parameters!r} is not a valid regular expression: {error}."
        ) from error


def _last_layers(names: Iterable[str]) -> tuple[str, ...]:
    """Prefix of the highest-numbered layer of every stack of layers, ``...layers.11.``."""
    last: dict[str, int] = {}
    for name in names:
        if found := re.match(r"(.*\blayers?\.)(\d+)\.", name):
            last[found[1]] = max(last.get(found[1], 0), int(found[2]))
    return tuple(f"{stack}{number}." for stack, number in last.items())


class _Towers(nn.Module):
    """Both towers behind one `forward`, as `functional_call` wants it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, text: dict[str, Tensor], image: dict[str, Tensor]) -> Embeddings:
        if "pooled" in text:
            text_features = self.model.text_projection(text["pooled"])
            image_features = self.model.visual_projection(image["pooled"])
        else:
            text_features = self.model.get_text_features(**text).pooler_output
            image_features = self.model.get_image_features(**image).pooler_output
        return Embeddings(
            text_features / text_features.norm(dim=-1, keepdim=True),
            image_features / image_features.norm(dim=-1, keepdim=True),
            self.model.logit_scale.exp(),
        )

    def pooled(self, text: dict[str, Tensor], image: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Inputs of the two projections."""
        caught: dict[str, Tensor] = {}
        hooks = [
            getattr(self.model, name).register_forward_pre_hook(
                lambda _, args, side=side: caught.update({side: args[0]})
            )
            for side, name in PROJECTIONS.items()
        ]
        try:
            self.forward(text, image)
        finally:
            for hook in hooks:
                hook.remove()
        return caught["text"], caught["image"]


def _cat(parts: Sequence[Embeddings], rows: int = 0) -> Embeddings:
    return Embeddings(
        torch.cat([part.text for part in parts], dim=rows),
        torch.cat([part.image for part in parts], dim=rows),
        parts[0].scale,
    )
