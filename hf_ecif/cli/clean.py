"""``hf-ecif clean``: rows of an audit."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from hf_ecif.applications.requests import CleanRequest
from hf_ecif.cli.options import CLEANING, command
from hf_ecif.cli.screen import Result
from hf_ecif.errors import UserError
from hf_ecif.utils.progress import ProgressFactory

Strategies = Annotated[
    list[str],
    typer.Option(
        metavar="<choice>",
        help=f"{CleanRequest.help('strategy')} Given more than once, all are counted and compared, "
        "and the first is written.",
    ),
]


@command(CleanRequest, panel=CLEANING)
def clean(
    request: CleanRequest,
    progress: ProgressFactory,
    *,
    strategy: Strategies = ["drop"],  # noqa: B006  # typer shows it as the default
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the table and write nothing.")
    ] = False,
) -> Result:
    """Part an audit's rows into those to keep and those to remove, without a new audit.

    OUTPUT gets `kept/` and `removed/`, which together are all rows, and `cleaning.json`; `hf-ecif
    push` publishes it like an audit. With `--test`, a table and a page, `cleaning.html`, say
    whether it helps.
    """
    if request.output is None and not dry_run:
        raise UserError("Give an `output` folder, or `dry_run`.")
    from hf_ecif.applications.clean import run_clean
    from hf_ecif.reports.console import cleaning_lines

    first, *others = strategy
    request = replace(
        request,
        strategy=first,  # type: ignore[arg-type]  # checked there
        beside=tuple(others),  # type: ignore[arg-type]
        output=None if dry_run else request.output,
    )
    cleaning = run_clean(request, progress)
    comparison = cleaning.comparison.describe() if cleaning.comparison else None
    known = (result.expected_right for result in cleaning.results.values())
    expected_right = next((expected for expected in known if expected is not None), None)
    counts = {str(name): result.counts() for name, result in cleaning.results.items()}
    findings = cleaning.result.removed_findings()
    facts = {"counts": counts, "findings": findings}
    return Result(
        facts | {"comparison": comparison.to_dict() if comparison else None},
        cleaning_lines(request.audit, counts, comparison, request.output, expected_right, findings),
    )
