"""Every clause of a reason, from evidence made by hand."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from hf_ecif.detection.detect import Detection
from hf_ecif.detection.explain import explain_flags
from hf_ecif.detection.findings import Findings, Kind
from hf_ecif.detection.suggestions import Evidence
from hf_ecif.detection.words import Word

ROWS: Any = SimpleNamespace(positions=torch.tensor([0, 2, 3, 7, 8]))  # of the data set
SCORES: Any = SimpleNamespace(
    loo_loss=torch.tensor([1.0, 9.0, 2.0, 3.0, 4.0]),
    positive=torch.tensor([1.0, -3.2e-4, 2.5e-4, 1.0, 1.0]),
)
WITNESSES: Any = SimpleNamespace(
    image_neighbours=torch.tensor([0.1, 0.9, 0.2, 0.3, 0.4]),
    text_neighbours=torch.tensor([0.1, 0.2, 0.3, 0.9, 0.4]),
)
DETECTION = Detection(
    probability=np.array([0.1, 0.87, 0.45, 0.2, 0.1]),
    suspicion=np.array([-2.0, 2.0, 0.0, -1.0, -2.0]),
    flag=np.array([False, True, True, False, False]),
    borderline=np.array([False, False, True, True, False]),
    threshold=0.4,
    noise_rate=0.3,
    rate_interval=(0.2, 0.4),
    rate_is_bound=False,
    injected_auroc=0.9,
)
ALONE = np.array([0, 2, 3, 7, 8])
EVIDENCE = Evidence(
    wrong_words=[None] * 5,
    better_images=np.array([-1, 14, 1, -1, -1]),
    better_text=[None, "a red ball", "x" * 200, None, None],
    better_row=np.array([-1, 8, -1, -1, -1]),
    margin=np.array([np.nan, 3.0, 0.1, np.nan, np.nan]),
    probability=np.full(5, np.nan),
    least_margin=1.0,
    least_probability=0.7,
    same_image=ALONE,
    same_caption=ALONE,
    duplicate=ALONE,
)


def explain(**changes: Any) -> list[str | None]:
    return explain_flags(ROWS, SCORES, WITNESSES, DETECTION, replace(EVIDENCE, **changes))


def test_only_flagged_rows_have_a_reason() -> None:
    assert [bool(reason) for reason in explain()] == DETECTION.flag.tolist()


def test_whole_reason() -> None:
    assert explain()[1] == (
        "probably misaligned (87 %): its caption fits 14 other images better; the model prefers "
        "the caption of row 8 for its image ('a red ball'); held out, its loss is in the top 20 %; "
        "as a positive it raises the query's loss by 3.200 × 10⁻⁴ nats"
    )


@pytest.mark.parametrize(
    ("side", "words"),
    [
        ("image", "its caption is farther from the captions of similar images"),
        ("text", "its image is farther from the images of similar captions"),
    ],
)
def test_neighbours_are_heard_where_they_are_telling(side: str, words: str) -> None:
    values = torch.arange(20.0)
    rows = SimpleNamespace(positions=torch.arange(20))
    scores = SimpleNamespace(loo_loss=torch.zeros(20), positive=torch.ones(20))
    apart = {f"{one}_neighbours": values * (one == side) for one in ("image", "text")}
    detection = replace(
        DETECTION,
        probability=np.ones(20),
        flag=np.ones(20, dtype=bool),
        borderline=np.zeros(20, dtype=bool),
    )
    reasons = explain_flags(rows, scores, SimpleNamespace(**apart), detection)
    assert [words in str(reason) for reason in reasons] == [False] * 18 + [True] * 2
    assert f"{words} than that of 90 % of the pairs;" in str(reasons[18])


def test_reason_without_other_rows() -> None:
    assert explain_flags(ROWS, SCORES, WITNESSES, DETECTION)[2] == (
        "possibly misaligned (45 %, borderline): held out, its loss is in the top 80 %; "
        "as a positive it lowers the query's loss by 2.500 × 10⁻⁴ nats"
    )


def test_caption_of_a_vocabulary_is_quoted_in_brief() -> None:
    reason = explain()[2]
    assert reason is not None
    assert "fits 1 other image better" in reason
    assert "; the model prefers another caption for its image ('…')" in reason


def test_caption_that_fits_its_image_best_is_no_evidence() -> None:
    reason = explain(better_images=np.zeros(5, dtype=int), better_text=[None] * 5)[1]
    assert reason is not None
    assert "fits" not in reason
    assert "prefers" not in reason


def test_contradicted_words_come_first_and_no_quote_parts_the_facts() -> None:
    words = [Word(2, 5, "red", 1.0, 0.5), Word(6, 16, "two; three", 0.5, 0.2)]
    reason = explain(wrong_words=[None, words, None, None, None])[1]
    assert reason is not None
    first, second, *_ = reason.partition(": ")[2].split("; ")
    assert first == "its image contradicts 'red', 'two, three'"
    assert second == "its caption fits 14 other images better"


@pytest.mark.parametrize(
    ("kind", "firsts", "words"),
    [
        ("same_image", [0, 2, 3, 7, 2], "its image is nearly that of row 8"),
        ("same_caption", [0, 0, 0, 7, 8], "its caption is also that of rows 0, 3"),
        ("same_caption", [0] * 5, "its caption is also that of rows 0, 3, 7 and 1 more"),
    ],
)
def test_duplicates_are_named(kind: str, firsts: list[int], words: str) -> None:
    reason = explain(**{kind: np.array(firsts)})[1]
    assert reason is not None
    assert f"; {words}; " in reason


def test_a_caption_that_says_nothing_is_flagged_for_that_alone() -> None:
    kinds: list[Kind | None] = [None, "stock_phrase", "says_nothing", None, None]
    some = torch.tensor([1, 30, 1, 1, 1])
    findings = Findings(kinds, some, some, torch.zeros(5, dtype=torch.bool))
    _, stock, empty, *_ = explain_flags(ROWS, SCORES, WITNESSES, DETECTION, EVIDENCE, findings)
    assert stock is not None
    assert "stock_phrase" in stock
    assert "30 images that have nothing in common" in stock
    assert empty is not None
    assert "a file name" in empty
    assert "misaligned" not in stock + empty
    judged = replace(DETECTION, probability=np.array([0, 1, 1, 0, 0.0]))
    _, stock, *_ = explain_flags(ROWS, SCORES, WITNESSES, judged, EVIDENCE, findings)
    assert stock is not None
    assert "misaligned" in stock
