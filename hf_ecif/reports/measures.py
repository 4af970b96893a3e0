"""What models are measured by, in words, and what a comparison of them says."""

from __future__ import annotations

from collections.abc import Iterator
from math import nan

from hf_ecif.data.cleaning import BEFORE, UNTRAINED
from hf_ecif.data.summary import ComparisonFacts, Measured
from hf_ecif.utils.formatting import estimate, nats, share

LOSS = "loss"
NAMES = {
    LOSS: "Loss, nats",
    "text_to_image_recall@1": "Text-to-image R@1",
    "image_to_text_recall@1": "Image-to-text R@1",
    "zero_shot_accuracy": "Zero-shot accuracy",
}


def tell_value(measure: str, value: float) -> str:
    """A loss in nats, or a share."""
    return nats(value) if measure == LOSS else share(value)


def tell_mean(measure: str, measured: Measured) -> str:
    """A mean with its error over the repeats: a loss in nats, or a share in percent."""
    error = nan if measured.stderr is None else measured.stderr
    return estimate(measured.mean, error, exponent=0 if measure == LOSS else -2)


def judge_cleaning(compared: ComparisonFacts, strategy: str) -> str:
    """A headline: what the model gains by a cleaning, and whether it should be trained at all."""
    gain, error = compared.gain(strategy, BEFORE)
    side = f"{tell_points(gain, error)} of {named(compared)} {'above' if gain > 0 else 'below'}"
    if compared.best == UNTRAINED:
        best = next(one for one in compared.outcomes if one.version == UNTRAINED)
        value = share(best.measures[compared.measure].mean)
        return (
            f"No fine-tuning at all is best, at {value} of {named(compared)}. Fine-tuned on the "
            f"cleaned rows, the model is {side} one fine-tuned on all rows."
        )
    # The error of a single fine-tuning is unknown, so no verdict is clear.
    if error is None or abs(gain) <= 2 * error:
        return (
            f"No clear difference: a model fine-tuned on the cleaned rows is {side} one "
            "fine-tuned on all rows."
        )
    return f"Fine-tuned on the cleaned rows, the model is {side} one fine-tuned on all rows."


def tell_gains(compared: ComparisonFacts) -> Iterator[str]:
    """A line for the gain of every version over all rows."""
    versions = [outcome.version for outcome in compared.outcomes]
    for version in versions[versions.index(BEFORE) + 1 :]:
        gain, error = compared.gain(version, BEFORE)
        points = tell_points(gain, error, signed=True)
        yield f"{NAMES[compared.measure]}, {version} over {BEFORE}: {points}."


def named(compared: ComparisonFacts) -> str:
    """The deciding measure within a sentence."""
    name = NAMES[compared.measure]
    return name[0].lower() + name[1:]


def tell_points(gain: float, error: float | None, signed: bool = False) -> str:
    """A difference of shares in percentage points, with its error if that is known."""
    value = gain if signed else abs(gain)
    return f"{estimate(value, nan if error is None else error, exponent=-2)} points"
