"""Groups that are flagged more often than the other rows, beyond chance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from scipy.stats import fisher_exact

LEVEL = 0.01  # chance of naming any group where all are flagged alike


class Counts(Protocol):
    """Rows of a group, and how many of them are flagged."""

    @property
    def rows(self) -> int: ...

    @property
    def flagged(self) -> int: ...


def often_flagged(groups: Sequence[Counts], rows: int, flagged: int) -> list[int]:
    """Numbers of the groups whose share of flagged rows is above that of all others together.

    By Fisher's exact test of each, one-sided, at `LEVEL` over the number of groups (Bonferroni).

    Args:
        groups: the groups.
        rows: of all data, in a group or not.
        flagged: how many of them are flagged.
    """
    return [
        number
        for number, group in enumerate(groups)
        if _chance(group, rows - group.rows, flagged - group.flagged) < LEVEL / len(groups)
    ]


def _chance(group: Counts, other_rows: int, other_flagged: int) -> float:
    """Chance of as many flagged rows or more in the group, if it were like the others."""
    if not other_rows:
        return 1.0
    table = [
        [group.flagged, group.rows - group.flagged],
        [other_flagged, other_rows - other_flagged],
    ]
    return float(fisher_exact(table, alternative="greater").pvalue)
