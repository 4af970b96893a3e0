"""Findings on data made for it, and what is said of the rows that have one."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from hf_ecif.detection.detect import RIGHT, UNKNOWN, WRONG, Detection
from hf_ecif.detection.findings import KINDS, Findings, Kind, find_findings, settle, tell
from hf_ecif.engine.features import Features
from hf_ecif.engine.objectives import Embeddings
from hf_ecif.influence.keys import Keys
from hf_ecif.influence.rows import Rows

COUNT, WIDTH = 200, 32


def rows_of(images: Tensor, texts: list[str], **marks: Tensor) -> Rows:
    none = torch.zeros(len(texts), dtype=torch.bool)
    numbers = torch.arange(len(texts))
    features = Features({"x": numbers[:, None]}, {"x": numbers[:, None]})
    keys = {"truncated": none, "unknown_script": none, "captions": Keys.of_texts(texts).captions}
    known = Keys(images=images, **(keys | marks))
    return Rows(features, numbers, texts, {}, len(texts), known_keys=known)


class World:
    """Topics: what shows the like lies near, on either side; caption and image of a row fit."""

    def __init__(self, seed: int = 0, topics: int = 40) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        self.topic = torch.arange(COUNT) % topics
        centres = normalize(draw(topics, WIDTH), dim=1)[self.topic]
        self.text, self.image = (
            normalize(centres + 0.15 * draw(COUNT, WIDTH), dim=1) for _ in range(2)
        )
        self.odd, self.other = normalize(draw(2, WIDTH), dim=1)
        self.texts = [f"thing {n}" for n in range(COUNT)]
        self.images = torch.arange(COUNT)

    def findings(self, **marks: Tensor) -> Findings:
        one = torch.ones((), dtype=torch.float64)
        given = Embeddings(self.text, self.image, one, one)
        return find_findings(rows_of(self.images, self.texts, **marks), given)

    def put_image(self, rows: Tensor, vector: Tensor) -> None:
        self.images[rows] = -1
        self.image[rows] = vector.clone()

    def put_caption(self, rows: Tensor, text: str, vector: Tensor) -> None:
        self.text[rows] = vector.clone()
        for row in rows.tolist():
            self.texts[row] = text


@pytest.mark.parametrize("seed", range(5))
def test_a_placeholder_and_a_stock_phrase(seed: int) -> None:
    world = World(seed)
    first, second = torch.arange(0, 20), torch.arange(20, 44)
    world.put_image(first, world.odd)
    world.put_caption(second, "order today", world.other)
    found = world.findings()
    assert found.are("placeholder_image").nonzero()[:, 0].tolist() == first.tolist()
    assert found.are("stock_phrase").nonzero()[:, 0].tolist() == second.tolist()
    assert found.captions[0] == 20
    assert found.images[20] == 24
    assert found.mute.sum() == 44


@pytest.mark.parametrize("share", [0.1, 0.6])
def test_a_stock_phrase_may_be_on_most_rows(share: float) -> None:
    world = World()
    rows = torch.arange(round(share * COUNT))
    world.put_caption(rows, "an icon", world.odd)
    assert world.findings().counts()["stock_phrase"] == len(rows)


@pytest.mark.parametrize("seed", range(5))
def test_the_name_of_a_class_is_no_stock_phrase(seed: int) -> None:
    """Many images under one caption, but they are alike, and like it."""
    world = World(seed, topics=8)
    for topic in range(8):
        rows = (world.topic == topic).nonzero()[:, 0]
        world.put_caption(rows, f"sort {topic}", world.text[rows[0]])
    assert not any(world.findings().kinds)


@pytest.mark.parametrize("seed", range(5))
def test_an_image_with_many_captions_of_its_own_is_no_placeholder(seed: int) -> None:
    world = World(seed, topics=8)
    for topic in range(8):
        rows = (world.topic == topic).nonzero()[:, 0]
        world.images[rows] = 1000 + topic
        world.image[rows] = world.image[rows[0]].clone()
    assert not any(world.findings().kinds)


def test_too_few_rows_tell_nothing() -> None:
    world = World()
    world.put_image(torch.arange(9), world.odd)
    assert not any(world.findings().kinds)


def test_copies_do_not_count() -> None:
    world = World()
    rows = torch.arange(30)
    world.put_image(rows, world.odd)
    world.put_caption(rows, "one thing", world.text[0])
    found = world.findings()
    assert not any(found.kinds)
    assert found.captions[0] == found.images[0] == 1


def test_captions_of_other_kinds() -> None:
    world = World()
    cut = torch.zeros(COUNT, dtype=torch.bool)
    cut[[3, 4, 5]] = True
    captions = Keys.of_texts(world.texts).captions
    captions[4] = captions[3]
    foreign = torch.zeros(COUNT, dtype=torch.bool)
    foreign[6] = True
    world.texts[7] = "IMG_2041.JPG"
    found = world.findings(truncated=cut, captions=captions, unknown_script=foreign)
    told = {row: kind for row, kind in enumerate(found.kinds) if kind}
    assert told == {
        3: "truncated_equal",
        4: "truncated_equal",
        6: "unknown_script",
        7: "says_nothing",
    }
    assert found.counts() == dict.fromkeys(KINDS, 0) | {
        "truncated_equal": 2,
        "unknown_script": 1,
        "says_nothing": 1,
        "truncated": 3,
    }


def test_where_hardly_a_row_is_left_all_are_evidence() -> None:
    world = World()
    foreign = torch.ones(COUNT, dtype=torch.bool)
    foreign[:19] = False
    assert not world.findings(unknown_script=foreign).mute.any()
    foreign[19] = False
    assert world.findings(unknown_script=foreign).mute.sum() == COUNT - 20


def detected(count: int, wrong: list[int]) -> Detection:
    return Detection(
        probability=np.full(count, 0.9),
        suspicion=np.full(count, 2.0),
        flag=np.isin(np.arange(count), wrong),
        borderline=np.ones(count, dtype=bool),
        threshold=0.4,
        noise_rate=0.1,
        rate_interval=(0.05, 0.2),
        rate_is_bound=False,
        injected_auroc=0.9,
    )


def found(kinds: list[Kind | None]) -> Findings:
    count = len(kinds)
    none = torch.zeros(count, dtype=torch.bool)
    return Findings(kinds, torch.ones(count), torch.full((count,), 20), none)


def test_what_is_said_of_rows_with_a_finding() -> None:
    findings = found([None, None, *KINDS, *[None] * 6])
    detection = detected(13, wrong=[0, 4])
    settled = settle(detection, findings)
    assert settled.probability.tolist() == [0.9, 0.9, 0.95, 0.1, 0.1, 0.5, 0.5, *[0.9] * 6]
    assert np.flatnonzero(settled.flag).tolist() == [
        0,
        2,
        5,
        6,
    ]  # the pair's fault, not the model's
    assert settled.borderline.tolist() == [True, True, *[False] * 5, *[True] * 6]
    judged = np.array([UNKNOWN, UNKNOWN, RIGHT, UNKNOWN, WRONG, RIGHT, *[UNKNOWN] * 7])
    verified = settle(detection, findings, judged)
    assert verified.probability.tolist() == [0.9, 0.9, 0.9, 0.1, 0.9, 0.9, 0.5, *[0.9] * 6]
    assert np.flatnonzero(verified.flag).tolist() == [0, 4, 6]
    silent = replace(detection, abstains="cannot tell", probability=np.full(13, np.nan))
    assert settle(silent, findings) is silent


@pytest.mark.parametrize(("empty", "flagged"), [(5, True), (6, False)])
def test_a_phrase_on_many_rows_is_how_the_data_are_captioned(empty: int, flagged: bool) -> None:
    findings = found([*["stock_phrase"] * (empty - 1), "says_nothing", *[None] * (20 - empty)])
    settled = settle(detected(20, wrong=[19]), findings)
    assert settled.flag[:empty].tolist() == [flagged] * empty
    assert settled.flag[empty:].sum() == 1
    sentences = " ".join(tell(findings.counts(), 20))
    assert ("not flagged" not in sentences) == flagged
    assert ("--findings says_nothing,stock_phrase" in sentences) != flagged


def test_what_is_told() -> None:
    counts = {"stock_phrase": 1200, "truncated": 3, "placeholder_image": 0}
    sentences = [*tell(counts, 20_000)]
    assert [s for s in sentences if "1,200" in s and "are flagged" in s] == sentences[:1]
    assert len(sentences) == 2
    assert all(one != other for one, other in pairwise(sentences))
    assert "not flagged" in next(tell(counts, 20_000, abstains=True))
