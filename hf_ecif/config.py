"""Everything that decides a score, in one validated, serialisable place."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field, fields
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from hf_ecif.errors import UserError

# The more weights move, the sooner they memorise. Chosen by the loss of the demo's validation split
# after ten epochs, in nats; train as shipped, seed 0.
#                                          before    1e-3    3e-4    1e-4    3e-5
#   400 rows, batches of 64   layer_norm   0.874    0.821   0.852       -       -
#                             lora         0.874    0.822   0.845   0.866   0.872
#                             last_block   0.874    0.995   0.849   0.783   0.829
#                             all          0.874    1.364   0.937   0.950   0.795
#   400 rows, batches of 256  last_block   1.355    1.506   1.217   1.259   1.319
#                             all          1.355    1.943   1.514   1.290   1.237
#   all rows, batches of 256  last_block   1.355    1.268   1.124   1.143   1.258
LEARNING_RATES = {
    **dict.fromkeys(("projections", "logit_scale", "layer_norm", "lora"), 1e-3),
    "all": 3e-5,
}
RATE_OF_LAYERS = 1e-4  # of last_block and its like, and of what a regular expression selects


def _option(
    default: Any, help: str, *, at_least: float | None = None, is_resource: bool = False
) -> Any:
    metadata = {"help": help, "at_least": at_least, "is_resource": is_resource}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class InfluenceConfig:
    """How influence is computed. Two runs with equal configs, models and data give equal scores.

    Three fields decide what is asked: `parameters`, what may change when a pair goes; `fit_epochs`,
    0 for the model as it is; and `damping`, how far a training gets along directions of small
    curvature. `batch_size` and `role` belong to the objective. `probes`, `partitions` and
    `plantings` buy precision with time, the rest is numerics.

    Every field carries its own help; ``InfluenceConfig.help("damping")`` prints it.

    Raises:
        UserError: a value is out of its range.
    """

    parameters: str = _option(
        "projections",
        "attributed parameters: projections, last_block, last_2 (or more), lora, layer_norm, "
        "logit_scale, all, or a regex",
    )
    lora_rank: int = _option(
        8, "of the adapters that lora adds to a model that has none", at_least=1
    )
    batch_size: int = _option(256, "pairs of a contrastive batch", at_least=2)
    micro_batch_size: int = _option(
        64, "rows encoded at a time; memory only", at_least=1, is_resource=True
    )
    partitions: int = _option(6, "random partitions that scores are averaged over", at_least=2)
    role: Literal["exact", "first_order"] = _option(
        "exact", "the negative role: exact for a deletion, or the paper's first-order form"
    )
    mask_repeated: bool = _option(
        True,
        "pairs of one caption or of one image are not taken as negatives of each other",
    )
    fit_epochs: int = _option(10, "epochs of fitting the attributed parameters first", at_least=0)
    fit_learning_rate: float | None = _option(
        None,
        "of that fit, by Adam; if not given, what suits the parameters: 0.001, of whole layers "
        "1e-4, of all 3e-5",
        at_least=0,
    )
    l2: float = _option(
        0.0,
        "weight of |theta - theta_0|^2 / 2 in the training objective, theta_0 the model as given",
        at_least=0,
    )
    curvature: Literal["ggn", "hessian"] = _option(
        "ggn", "generalised Gauss-Newton matrix, or the full Hessian, which may be indefinite"
    )
    # Rank correlation of predicted and true retrainings of the demo without a tenth of the rows:
    # 0.86 for the one, 0.91 for the other; slope of true on predicted changes, 2.8 and 1.3.
    response: Literal["stationary", "unrolled"] = _option(
        "stationary",
        "how the model answers to a removal: stationary, as a minimum does (inverse curvature, "
        "with its damping), or unrolled through the steps of its own fit, if there are any, which "
        "foretells short fits better and costs a few more passes",
    )
    solver: Literal["cg", "lissa", "low_rank", "exact", "identity"] = _option(
        "cg",
        "of the inverse curvature: cg, lissa, low_rank (many queries), exact (few parameters) or "
        "identity",
    )
    rank: int = _option(
        0,
        "of low_rank, and of a preconditioner of cg: 0 means 64 for low_rank, no preconditioner "
        "for cg",
        at_least=0,
    )
    lissa_repeats: int = _option(1, "independent runs of lissa that are averaged", at_least=1)
    # Over halves of the demo's data, the rank correlation of predicted and true retrainings is 0.83
    # at 30 and above, 0.70 at 1, 0.44 at 0.01: a fit of a few epochs does not follow the directions
    # of small curvature to their end. Finding wrong pairs and causes of errors likes it large, too.
    damping: float = _option(
        30.0,
        "of the inverse curvature, in units of its mean eigenvalue: large for short fits and for "
        "finding wrong pairs, small for fits to convergence",
    )
    relative: Literal["deletion", "span"] = _option(
        "deletion",
        "the relative score: over the size of the whole change, or the norm within the span of "
        "both roles",
    )
    tangents: Literal["exact", "difference"] = _option(
        "exact",
        "of the scoring pass: exact, or by finite differences, which keep the fused attention "
        "kernel",
    )
    probes: int = _option(16, "random probes of norms and of the self-influence", at_least=1)
    plantings: int = _option(
        3,
        "runs in which captions are exchanged on purpose, to learn what wrong looks like",
        at_least=1,
    )
    planted_share: float = _option(0.15, "share of the rows exchanged in such a run")
    tolerance: float = _option(1e-3, "relative residual at which a solve stops", at_least=0)
    max_iterations: int = _option(200, "products with the curvature per solve", at_least=1)
    max_pixels: int = _option(
        64_000_000, "larger images are refused, unread, as a row with a reason", at_least=1
    )
    memory_limit: float = _option(
        4.0,
        "GiB of activations at the frozen boundary; more go to a temporary file",
        at_least=0,
        is_resource=True,
    )
    workers: int = _option(
        0,
        "processes that decode and tokenise ahead of the model; 0: it does it itself",
        at_least=0,
        is_resource=True,
    )
    seed: int = _option(0, "of everything random", at_least=0)

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for option in fields(self):
            value = getattr(self, option.name)
            least = option.metadata["at_least"]
            if least is not None and value is not option.default and not value >= least:
                raise UserError(f"{option.name} = {value!r}: must be at least {least:g}.")
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{option.name} = {value!r}: must be finite.")
            if get_origin(hints[option.name]) is Literal:
                choices = get_args(hints[option.name])
                if value not in choices:
                    raise UserError(
                        f"{option.name} = {value!r}: must be one of {', '.join(choices)}."
                    )
        if not 0 < self.planted_share <= 0.5:
            raise UserError(f"planted_share = {self.planted_share!r}: must be between 0 and 0.5.")
        if self.seed >= 2**62:
            raise UserError(f"seed = {self.seed!r}: must be below 2^62.")
        if not self.damping > 0:
            raise UserError(f"damping = {self.damping!r}: must be positive.")

    @classmethod
    def help(cls, name: str) -> str:
        """What the field means.

        >>> InfluenceConfig.help("seed")
        'of everything random'
        """
        return str({option.name: option for option in fields(cls)}[name].metadata["help"])

    @property
    def learning_rate(self) -> float:
        """`fit_learning_rate`, or what suits the attributed parameters."""
        if self.fit_learning_rate is not None:
            return self.fit_learning_rate
        return LEARNING_RATES.get(self.parameters, RATE_OF_LAYERS)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON, with the learning rate in force: a record outlives defaults."""
        return asdict(self) | {"fit_learning_rate": self.learning_rate}

    def deciding(self) -> dict[str, Any]:
        """The values that decide a score; those of memory and workers move it by rounding alone."""
        resources = {o.name for o in fields(self) if o.metadata["is_resource"]}
        return {name: value for name, value in self.to_dict().items() if name not in resources}

    def fingerprint(self) -> str:
        """A short hash of the values that decide a score."""
        values = json.dumps(self.deciding(), sort_keys=True)
        return sha256(values.encode()).hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> InfluenceConfig:
        """Read what `save` wrote.

        Raises:
            UserError: the file has a field that this version does not know.
        """
        return cls.from_dict(json.loads(path.read_text()), str(path))

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "config") -> InfluenceConfig:
        """Read what `to_dict` gave.

        Raises:
            UserError: there is a field that this version does not know.
        """
        unknown = set(values) - {option.name for option in fields(cls)}
        if unknown:
            raise UserError(f"{source}: unknown fields {', '.join(sorted(unknown))}.")
        return cls(**values)
