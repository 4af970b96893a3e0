"""Kinds of findings: what makes it idle to ask whether a caption fits its image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from hf_ecif.errors import UserError

Kind = Literal[
    "placeholder_image", "truncated_equal", "unknown_script", "says_nothing", "stock_phrase"
]
KINDS: tuple[Kind, ...] = get_args(Kind)
MEANINGS: dict[Kind, str] = {
    "placeholder_image": "one image under many captions that have nothing in common",
    "truncated_equal": "a caption that is equal to others as far as the model reads it",
    "unknown_script": "a caption in a script that the model's tokenizer does not know",
    "says_nothing": "a caption that says nothing: a file name, an address, a number, 'image'",
    "stock_phrase": "one caption under many images that have nothing in common",
}
# Of a pair that teaches nothing, whether its caption is true or not.
EMPTY: tuple[Kind, ...] = ("says_nothing", "stock_phrase")
MOST_EMPTY = 0.25  # share of the rows, above which these are not flagged
NONE = "none"


def flagged_kinds(counts: Mapping[str, int], rows: int) -> tuple[Kind, ...]:
    """Kinds of findings whose rows are flagged, where the model can tell right from wrong.

    Args:
        counts: rows of each kind.
        rows: that can be read.

    >>> flagged_kinds({"stock_phrase": 30}, rows=300)
    ('placeholder_image', 'says_nothing', 'stock_phrase')
    >>> flagged_kinds({"stock_phrase": 180}, rows=300)
    ('placeholder_image',)
    """
    few = sum(counts.get(kind, 0) for kind in EMPTY) <= MOST_EMPTY * rows
    return ("placeholder_image", *(EMPTY if few else ()))


def read_kinds(names: Sequence[str]) -> tuple[Kind, ...]:
    """Kinds of findings by their names, which may also be separated by commas.

    Args:
        names: of kinds; ``none`` alone is no kind.

    Raises:
        UserError: a name is not that of a kind.

    >>> read_kinds(["stock_phrase,placeholder_image"])
    ('placeholder_image', 'stock_phrase')
    """
    given = [name.strip() for one in names for name in one.split(",") if name.strip()]
    wrong = [name for name in given if name not in KINDS]
    if wrong and given != [NONE]:
        raise UserError(
            f"`findings={','.join(names)}`: there is no finding {wrong[0]!r}. Name some of "
            f"{', '.join(KINDS)}, separated by commas, or {NONE}."
        )
    return tuple(kind for kind in KINDS if kind in given)
