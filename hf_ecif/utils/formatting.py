"""Numbers and texts as people read them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def number(value: Any, digits: int = 3) -> str:
    """Significant digits, thousands separated, tiny and huge values as powers of ten."""
    if value is None:
        return "–"
    if isinstance(value, (bool, str)):
        return str(value)
    if isinstance(value, (int, np.integer)):
        return f"{value:,}".replace("-", "−")
    if not math.isfinite(value):
        return "–" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    size = abs(value)
    if size and not 1e-3 <= size < 1e6:
        mantissa, power = f"{value:.{digits - 1}e}".split("e")
        text = f"{mantissa} × 10{superscript(int(power))}"
    else:
        text = f"{value:,.0f}" if size >= 10**digits - 0.5 else f"{value:.{digits}g}"
    return text.replace("-", "−")


def nats(value: float | None, signed: bool = False) -> str:
    """A loss, a margin, or a change of one with its sign: four digits, without the unit."""
    plus = "+" if signed and value is not None and value > 0 else ""
    return plus + number(value, digits=4)


def models_of_removal(config: Mapping[str, Any]) -> dict[str, str]:
    """What a page calls the models of a removal, by their names in its summary."""
    return {
        "before": "fitted on all rows" if config["fit_epochs"] else "as given",
        "after": "edited: without them",
        "retrained": "retrained without them",
    }


def reach(ceiling: float | None) -> str:
    """Text that follows an interval: what a perfect prediction would reach, if known."""
    return "" if ceiling is None else f"; a perfect prediction would reach {ceiling:.2f}"


def share(value: float | None) -> str:
    """A share as a percentage of one decimal, which a whole percentage goes without.

    What is not nothing or all is not told as such, however near it is.

    >>> [share(value) for value in (0.9514, 0.9, 0.0002, 0.9999)]
    ['95.1 %', '90 %', '<0.1 %', '>99.9 %']
    """
    if value is None or math.isnan(value):
        return "–"
    percent = 100.0 * value
    if 0 < percent < 0.1:
        return "<0.1 %"
    if 99.9 < percent < 100:
        return ">99.9 %"
    if math.isclose(percent, round(percent), abs_tol=1e-5):  # shares are of single precision
        return f"{percent:.0f} %".replace("-", "−")
    return f"{percent:.1f} %".replace("-", "−")


def estimate(value: float, stderr: float, exponent: int = 0) -> str:
    """A value and its standard error to the same decimal place, in units of a power of ten.

    An error that is unknown, or zero up to rounding, is left out.

    >>> estimate(0.00123, 0.0004, exponent=-3)
    '1.23 ± 0.40'
    """
    scaled = value / 10.0**exponent
    decimals = 2 - math.floor(math.log10(abs(scaled))) if scaled else 0
    decimals = min(max(decimals, 0), 4)
    text = f"{scaled:,.{decimals}f}"
    if math.isfinite(stderr) and stderr > 1e-5 * abs(value):
        text += f" ± {stderr / 10.0**exponent:,.{decimals}f}"
    return text.replace("-", "−")


def readable_exponent(values: Floats) -> int:
    """Exponent of ten, a multiple of three, of the unit in which typical values read well.

    >>> readable_exponent(np.array([2e-5, -7e-5]))
    -6
    """
    sizes = np.abs(values[np.isfinite(values)])
    sizes = sizes[sizes > 0.0]
    if not sizes.size:
        return 0
    power = math.floor(math.log10(float(np.quantile(sizes, 0.9))))
    return 0 if -2 < power < 3 else 3 * math.floor(power / 3)


def superscript(power: int) -> str:
    return str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def mark(text: str, spans: Iterable[tuple[int, int]], length: int) -> list[tuple[str, bool]]:
    """A text in parts, each with whether it lies in a span; shortened as `shorten` does.

    >>> mark("a red  ball", [(2, 5)], 20)
    [('a ', False), ('red', True), (' ball', False)]
    >>> mark("a red ball", [(2, 5)], 8)
    [('a ', False), ('red', True), (' b…', False)]
    """
    bounds, place = [], 0
    for start, end in sorted(spans):
        bounds += [(place, start, False), (start, end, True)]
        place = end
    parts: list[tuple[str, bool]] = []
    room = length
    for start, end, inside in [*bounds, (place, len(text), False)]:
        part = re.sub(r"\s+", " ", text[start:end])
        if len(part) > room:
            return [*parts, (part[: max(room - 1, 0)] + "…", inside)]
        if part:
            parts.append((part, inside))
        room -= len(part)
    return parts


def shorten(text: str, length: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"
