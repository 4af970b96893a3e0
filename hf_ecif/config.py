"""Options: what may be chosen, what it means and which values are sound, each in one place.

`InfluenceConfig` and `DetectionConfig` hold what decides a score and a verdict. What a command
works on stands in `hf_ecif.applications.requests`, by the same means.
"""

from __future__ import annotations

import json
import math
from dataclasses import MISSING, asdict, dataclass, field, fields
from hashlib import sha256
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Self, Union, get_args, get_origin, get_type_hints

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


Strategy = Literal["drop", "worst", "weight", "relabel"]  # of a cleaning
RowFormat = Literal[  # of rows on disk
    "saved", "parquet", "arrow", "csv", "json", "webdataset", "imagefolder", "sidecars"
]
ExportFormat = Literal[
    "parquet-ids",
    "uids",
    "keys",
    "webdataset",
    "label-studio",
    "fiftyone",
    "lightly",
    "cleanlab",
]
ExportedRows = Literal["usual", "all", "kept", "removed", "flagged", "sample"]
SUGGEST_PROBABILITY = 0.7  # of being right, from which on a caption is suggested

# Injected captions from which a detector learns no less than from more, and most runs for fewer.
ENOUGH_INJECTED, MOST_INJECTIONS = 400, 3

# Fields that version 0.1 wrote by another name.
RENAMED = {"plantings": "injections", "planted_share": "injected_share"}


def option(
    default: Any = MISSING,
    *,
    help: str,
    at_least: float | None = None,
    needs: str | None = None,
    is_advanced: bool = False,
    is_resource: bool = False,
    is_argument: bool = False,
    flag: str | None = None,
) -> Any:
    """A field of a dataclass, for the library and the command line alike.

    Args:
        default: its value if none is given; required without one.
        help: what it means, in whole sentences.
        at_least: the smallest sound value.
        needs: another field, without which this one means nothing and must keep its default.
        is_advanced: whether few will need it: help lists it apart.
        is_resource: whether it costs time or memory, and decides nothing.
        is_argument: whether the command takes it by its place, not by a flag.
        flag: of the command, where it is not the name of the field.
    """
    metadata = {
        "help": help,
        "at_least": at_least,
        "needs": needs,
        "is_advanced": is_advanced,
        "is_resource": is_resource,
        "is_argument": is_argument,
        "flag": flag,
    }
    return field(default=default, metadata=metadata)


def choices_of(hint: Any) -> tuple[Any, ...]:
    """Values among which a field chooses, besides None; none of a field of another type.

    >>> choices_of(Literal["a", "b"] | None), choices_of(int)
    (('a', 'b'), ())
    """
    if get_origin(hint) is Literal:
        return get_args(hint)
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else ()
    return next((get_args(one) for one in parts if get_origin(one) is Literal), ())


@dataclass(frozen=True)
class Options:
    """Fields made by `option`, checked when they are set.

    Raises:
        UserError: a value is out of its range, not finite, none of its choices, or means nothing
            without another one.
    """

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for one in fields(self):
            value, least = getattr(self, one.name), one.metadata.get("at_least")
            named, needs = f"`{one.name}={value}`", one.metadata.get("needs")
            if needs and value != one.default and not getattr(self, needs):
                raise UserError(f"{named} means nothing without `{needs}`. Give both, or neither.")
            if least is not None and value is not one.default and not value >= least:
                raise UserError(f"{named}: must be at least {least:g}.")
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{named}: must be finite.")
            choices = choices_of(hints[one.name])
            if choices and value is not one.default and value not in choices:
                raise UserError(f"{named}: must be one of {', '.join(choices)}.")

    @classmethod
    def help(cls, name: str) -> str:
        """What a field means.

        >>> InfluenceConfig.help("seed")
        'Seed of everything random.'
        """
        return str({one.name: one for one in fields(cls)}[name].metadata["help"])


@dataclass(frozen=True)
class Config(Options):
    """Options that are kept beside what they decided."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def deciding(self) -> dict[str, Any]:
        """The values that decide a result; resources move it by rounding alone."""
        resources = {one.name for one in fields(self) if one.metadata["is_resource"]}
        return {name: value for name, value in self.to_dict().items() if name not in resources}

    def fingerprint(self) -> str:
        """A short hash of the values that decide a result."""
        values = json.dumps(self.deciding(), sort_keys=True)
        return sha256(values.encode()).hexdigest()[:16]

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote.

        Raises:
            UserError: the file has a field that this version does not know.
        """
        return cls.from_dict(json.loads(path.read_text()), str(path))

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str = "config") -> Self:
        """Read what `to_dict` gave, or the record of a run, which has all configs in one.

        Raises:
            UserError: there is a field that no config of this version knows.
        """
        values = {RENAMED.get(name, name): value for name, value in values.items()}
        known = {one.name for kind in (InfluenceConfig, DetectionConfig) for one in fields(kind)}
        unknown = set(values) - known
        if unknown:
            raise UserError(f"{source}: unknown fields {', '.join(sorted(unknown))}.")
        own = {one.name for one in fields(cls)}
        return cls(**{name: value for name, value in values.items() if name in own})


@dataclass(frozen=True)
class InfluenceConfig(Config):
    """How influence is computed. Two runs with equal configs, models and data give equal scores.

    Three fields decide what is asked: `parameters`, what may change when a pair goes; `fit_epochs`,
    0 for the model as it is; and `damping`, how far a training gets along directions of small
    curvature. `batch_size` and `role` belong to the objective. `probes` and `partitions` buy
    precision with time, the rest is numerics.

    Every field carries its own help; ``InfluenceConfig.help("damping")`` prints it.

    Raises:
        UserError: a value is out of its range.

    Examples:
        >>> from hf_ecif import InfluenceConfig
        >>> InfluenceConfig(parameters="last_block", probes=4).learning_rate
        0.0001
    """

    parameters: str = option(
        "projections",
        help="Parameters that may change when a pair is removed: projections, last_block, last_2 "
        "(or more), lora, layer_norm, logit_scale, all, or a regular expression.",
    )
    batch_size: int = option(256, help="Pairs in a contrastive batch.", at_least=2)
    fit_epochs: int = option(
        10,
        help="Epochs in which these parameters are fitted to the data first; 0 takes the model as "
        "it is.",
        at_least=0,
    )
    fit_learning_rate: float | None = option(
        None,
        help="Learning rate of that fit, by Adam. If not given, what suits the parameters: 1e-3, "
        "of whole layers 1e-4, of all 3e-5.",
        at_least=0,
        is_advanced=True,
    )
    lora_rank: int = option(
        8,
        help="Rank of the adapters that `parameters=lora` adds to a model that has none.",
        at_least=1,
        is_advanced=True,
    )
    l2: float = option(
        0.0,
        help="Weight of |theta - theta_0|^2 / 2 in the training objective; theta_0 is the model as "
        "given.",
        at_least=0,
        is_advanced=True,
    )
    role: Literal["exact", "first_order"] = option(
        "exact",
        help="Role of a pair as a negative: exact, as its deletion changes it, or first_order, the "
        "form of the paper.",
        is_advanced=True,
    )
    mask_repeated: bool = option(
        True,
        help="Do not take pairs of one caption, or of one image, for negatives of each other.",
        is_advanced=True,
    )
    # Rank correlation of predicted and true retrainings of the demo without a tenth of the rows:
    # 0.86 for the one, 0.91 for the other; slope of true on predicted changes, 2.8 and 1.3.
    response: Literal["stationary", "unrolled"] = option(
        "stationary",
        help="How the model answers a removal: stationary, as at a minimum (inverse curvature with "
        "its damping); or unrolled, through the steps of its own fit, which predicts short fits "
        "better and costs a few more passes.",
        is_advanced=True,
    )
    # Over halves of the demo's data, the rank correlation of predicted and true retrainings is 0.83
    # at 30 and above, 0.70 at 1, 0.44 at 0.01: a fit of a few epochs does not follow the directions
    # of small curvature to their end. Finding wrong pairs and causes of errors likes it large, too.
    damping: float = option(
        30.0,
        help="Damping of the inverse curvature, in units of its mean eigenvalue: large for short "
        "fits and for finding wrong pairs, small for fits to convergence.",
        is_advanced=True,
    )
    curvature: Literal["ggn", "hessian"] = option(
        "ggn",
        help="Curvature: ggn, the generalised Gauss-Newton matrix, or hessian, which may be "
        "indefinite.",
        is_advanced=True,
    )
    solver: Literal["cg", "lissa", "low_rank", "exact", "identity"] = option(
        "cg",
        help="Solver for the inverse curvature: cg, lissa, low_rank (for many queries), exact (for "
        "few parameters) or identity.",
        is_advanced=True,
    )
    rank: int = option(
        0,
        help="Rank of the low_rank solver (0: 64), or of a preconditioner of cg (0: none).",
        at_least=0,
        is_advanced=True,
    )
    lissa_repeats: int = option(
        1, help="Independent runs of lissa that are averaged.", at_least=1, is_advanced=True
    )
    tolerance: float = option(
        1e-3, help="Relative residual at which a solve stops.", at_least=0, is_advanced=True
    )
    max_iterations: int = option(
        200, help="Products with the curvature per solve, at most.", at_least=1, is_advanced=True
    )
    partitions: int = option(
        6,
        help="Random divisions of the rows into batches that scores are averaged over.",
        at_least=2,
        is_advanced=True,
    )
    # On 1,492 rows of the demo with noise of its own (4 seeds, two kinds), an audit with 4, 8 or 16
    # finds it alike: AUPRC within 0.0003, F1 within 0.004, the rate within 0.2 points.
    probes: int = option(
        8,
        help="Random probes by which norms and self-influence are estimated.",
        at_least=1,
        is_advanced=True,
    )
    relative: Literal["deletion", "span"] = option(
        "deletion",
        help="What the relative score is divided by: the size of the whole change (deletion), or "
        "the norm within the span of both roles (span).",
        is_advanced=True,
    )
    tangents: Literal["exact", "difference"] = option(
        "exact",
        help="Derivatives of the scoring pass: exact, or by finite differences, which keep the "
        "fused attention kernel.",
        is_advanced=True,
    )
    max_pixels: int = option(
        64_000_000,
        help="Larger images are not read; their row gets a reason.",
        at_least=1,
        is_advanced=True,
    )
    micro_batch_size: int = option(
        64,
        help="Rows encoded at a time; decides memory alone.",
        at_least=1,
        is_advanced=True,
        is_resource=True,
    )
    memory_limit: float = option(
        4.0,
        help="GiB of activations held in memory; more go to a temporary file.",
        at_least=0,
        is_advanced=True,
        is_resource=True,
    )
    workers: int = option(
        0,
        help="Processes that decode and tokenise ahead of the model; 0: it does so itself.",
        at_least=0,
        is_advanced=True,
        is_resource=True,
    )
    seed: int = option(0, help="Seed of everything random.", at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.seed >= 2**62:
            raise UserError(f"`seed={self.seed}`: must be below 2^62.")
        if not self.damping > 0:
            raise UserError(f"`damping={self.damping}`: must be positive.")

    @property
    def learning_rate(self) -> float:
        """`fit_learning_rate`, or what suits the attributed parameters."""
        if self.fit_learning_rate is not None:
            return self.fit_learning_rate
        return LEARNING_RATES.get(self.parameters, RATE_OF_LAYERS)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON, with the learning rate in force: a record outlives defaults."""
        return super().to_dict() | {"fit_learning_rate": self.learning_rate}


@dataclass(frozen=True)
class DetectionConfig(Config):
    """How an audit learns what a wrong pair looks like: from mismatches that it injects itself.

    Raises:
        UserError: a value is out of its range.

    Examples:
        >>> from hf_ecif import DetectionConfig
        >>> DetectionConfig(injected_share=0.2).injected_share
        0.2
    """

    # On 1,492 rows of the demo with noise of its own (4 seeds, two kinds), one run of 224 injected
    # captions finds a rate 2.5 points off that of three runs where captions are exchanged at
    # random, and an F1 lower by 0.013; with two runs, neither differs by its error.
    injections: int = option(
        0,
        help="Runs in which captions are exchanged on purpose, to learn what wrong looks like; 0: "
        "as many as exchange 400 captions together, but three at most.",
        at_least=0,
        is_advanced=True,
        flag="plantings",
    )
    injected_share: float = option(
        0.15,
        help="Share of the rows whose captions are exchanged in such a run.",
        is_advanced=True,
        flag="planted-share",
    )

    def runs(self, rows: int) -> int:
        """`injections`, or how many it takes with so many rows."""
        needed = math.ceil(ENOUGH_INJECTED / max(1, self.injected_share * rows))
        return self.injections or min(needed, MOST_INJECTIONS)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.injected_share <= 0.5:
            raise UserError(f"`injected_share={self.injected_share}`: must be between 0 and 0.5.")
