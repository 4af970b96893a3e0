"""Findings: what there is, in groups, the largest first, and never more than a page holds."""

from datasets import Dataset, Value

from hf_ecif.data.columns import set_column
from hf_ecif.data.scored_rows import ScoredRows
from hf_ecif.reports.audit import render_report
from hf_ecif.reports.findings import EXAMPLES, GROUPS, Finding, find_examples
from tests.support.reports import make_scored, make_summary


def find(scored: Dataset, **parts: object) -> dict[str, Finding]:
    summary = make_summary(scored, **parts)
    return {one.name: one for one in find_examples(ScoredRows(scored, summary), summary)}


def rows_of(finding: Finding) -> list[list[int]]:
    return [[card.row for card in group.cards] for group in finding.groups]


def test_a_clean_set_has_none() -> None:
    assert find(make_scored(9)) == {}
    scored = make_scored(9)
    assert 'id="findings"' not in render_report(scored, make_summary(scored))


def test_stock_phrases_are_grouped_and_named() -> None:
    kinds = [*["stock_phrase"] * 10, *[None] * 30]
    texts = [*["Best price!"] * 4, *["best  price"] * 3, *["icon"] * 3, *map(str, range(30))]
    scored = set_column(make_scored(40), "ecif_finding", kinds, "string")
    scored = set_column(scored, "text", texts)
    found = find(scored, findings={"stock_phrase": 10})["stock_phrase"]
    assert found.count == 10
    assert found.note == "2 different ones"
    assert [group.label for group in found.groups] == ["“Best price!”, 7 rows", "“icon”, 3 rows"]
    assert rows_of(found) == [list(range(EXAMPLES)), [7, 8, 9]]
    assert "These rows are flagged" in found.meaning
    assert found.command == "hf-ecif clean OUT --findings stock_phrase --output CLEAN"


def test_what_was_not_flagged_is_not_said_to_be() -> None:
    kinds = [*["says_nothing"] * 20, *["unknown_script"] * 2, *[None] * 18]
    scored = set_column(make_scored(40), "ecif_finding", kinds, "string")
    found = find(scored, findings={"says_nothing": 20, "unknown_script": 2})
    assert all("are not flagged for that" in one.meaning for one in found.values())
    assert found["unknown_script"].command is None
    kinds = {"placeholder_image": 20}
    noise = {"rate": 0.5, "threshold": 1.0, "abstains": "it cannot tell."}
    scored = set_column(scored, "ecif_finding", ["placeholder_image"] * 20 + [None] * 20)
    (placeholder,) = find(scored, findings=kinds, noise=noise).values()
    assert "are not flagged for that" in placeholder.meaning


def test_duplicates_are_shown_group_by_group() -> None:
    groups = [0, 1, None, 1, 0, 5, 5, 5]
    found = find(make_scored(8, ecif_duplicate_group=groups))["duplicates"]
    assert found.count == 7
    assert found.note == "in 3 groups, the largest of 3 rows"
    assert rows_of(found) == [[5, 6, 7], [0, 4], [1, 3]]


def test_what_is_advised_for_duplicates_keeps_the_first_of_each_group() -> None:
    scored = make_scored(8, ecif_duplicate_group=[0, 1, None, 1, 0, 5, 5, 5])
    command = find(scored)["duplicates"].command
    assert command is not None
    names: dict[str, object] = {"load_dataset": lambda *_, split: scored}
    exec(command, names)
    first = names["first"]
    assert isinstance(first, Dataset)
    assert first["text"][:] == [f"caption {row}" for row in (0, 1, 2, 5)]


def test_cut_captions_are_counted_apart() -> None:
    scored = make_scored(9, ecif_duplicate_group=[0, 0, *[None] * 7])
    cut = [row % 2 == 0 for row in range(9)]
    scored = scored.add_column("caption_truncated", cut, feature=Value("bool"))
    found = find(scored)
    assert found["truncated"].count == 5
    assert rows_of(found["truncated"]) == [[0, 2, 4, 6, 8]]
    assert found["duplicates"].count == 2


def test_unreadable_rows_are_told_by_their_reason() -> None:
    scored = make_scored(60, unreadable=tuple(range(40)))
    reasons = [f"reason {row % 7}" if row < 40 else None for row in range(60)]
    scored = set_column(scored, "ecif_reason", reasons)
    counts = {f"reason {kind}": len(range(kind, 40, 7)) for kind in range(7)}
    found = find(scored, unreadable_reasons=counts)["unreadable"]
    assert found.count == 40
    assert found.note == "for 7 different reasons"
    assert len(found.groups) == GROUPS
    assert found.groups[0].label == "reason 0, 6 rows"
    assert rows_of(found)[0] == [0, 7, 14, 21, 28, 35]
