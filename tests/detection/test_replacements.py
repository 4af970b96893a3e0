"""When the best caption is the right one, on made-up embeddings whose right captions are known."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from hf_ecif.detection.replacements import Candidates, Pairs, find_winners, learn_rightness

COUNT, DIM, WRONG = 900, 16, 200


def make_pairs(seed: int = 0, noise: float = 0.8) -> Pairs:
    """Captions near their images, all different."""
    generator = torch.Generator().manual_seed(seed)
    image, other = torch.randn(2, COUNT, DIM, generator=generator, dtype=torch.float64)
    text = normalize(image + noise * other, dim=1)
    return Pairs(normalize(image, dim=1), text, torch.arange(COUNT), 20.0)


def spoil(pairs: Pairs, how: str) -> Pairs:
    """The first rows with the caption of the next of them, or with copies of later ones."""
    donors = torch.arange(COUNT)
    wrong = torch.arange(WRONG)
    donors[:WRONG] = wrong.roll(1) if how == "moved" else wrong + WRONG
    return pairs.with_captions_of(donors)


def flags(precision: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Flags on the wrong rows, and on some right ones; probabilities that know of these."""
    alarms = round(WRONG * (1 / precision - 1))
    flag = np.arange(COUNT) < WRONG
    flag[COUNT - alarms :] = True
    return flag, np.where(flag, precision, 0.02)


def suggest(how: str, seed: int = 0, vocabulary: bool = False, precision: float = 1.0):
    """Whether each winner is right, and its probability of that."""
    pairs = make_pairs(seed)
    given, (flag, probability) = spoil(pairs, how), flags(precision)
    listed = replace(Candidates.of(pairs), held=None) if vocabulary else None
    rows = torch.from_numpy(np.flatnonzero(flag))
    winners = find_winners(given, rows, listed or Candidates.of(given))
    right = (winners.key == pairs.key[rows]).numpy()
    learned = learn_rightness(given, winners, flag, probability, vocabulary=listed)
    assert learned is not None
    return right, learned(winners.features)


def test_winners_by_brute_force():
    pairs = spoil(make_pairs(), "copied")
    rows = torch.tensor([3, 199, 200, 700])
    found = find_winners(pairs, rows, Candidates.of(pairs))
    cosines = pairs.image[rows] @ pairs.text.T
    for number, row in enumerate(rows.tolist()):
        own = cosines[number, row]
        others = cosines[number].masked_fill(pairs.key == pairs.key[row], -1)
        by_key = {int(pairs.key[n]): float(value) for n, value in enumerate(others) if value > -1}
        first, second = sorted(by_key, key=lambda key: -by_key[key])[:2]
        assert found.key[number] == first
        margin = 20 * (by_key[first] - max(by_key[second], own))
        assert found.margin[number] == pytest.approx(float(margin))
        lead, best, gain, better, taken = found.features[number]
        column = pairs.image @ pairs.text[pairs.key == first][0]
        holders = pairs.fit[pairs.key == first].max()
        assert lead == pytest.approx(20 * (by_key[first] - by_key[second]))
        assert best == pytest.approx(by_key[first])
        assert gain == pytest.approx(float(20 * (by_key[first] - own)))
        assert better == pytest.approx(np.log1p(int((column > by_key[first] + 1e-5).sum())))
        assert taken == pytest.approx(float(20 * (holders - by_key[first])))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_captions_that_changed_places_are_found_again(seed):
    right, chance = suggest("moved", seed)
    sure = chance >= 0.7
    assert sure.sum() > 0.5 * right.sum() > 20
    assert right[sure].mean() > 0.8
    assert chance.sum() == pytest.approx(right.sum(), rel=0.25)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_of_copies_hardly_any_is_suggested(seed):
    """The right captions are gone; the caption that fits best is right for some other row."""
    right, chance = suggest("copied", seed)
    assert not right.any()
    assert (chance >= 0.7).sum() <= 0.02 * WRONG
    assert chance.mean() < 0.1


def test_a_vocabulary_with_all_right_captions():
    right, chance = suggest("copied", vocabulary=True)
    assert right.mean() > 0.3
    sure = chance >= 0.7
    assert sure.sum() > 0.3 * right.sum()
    assert right[sure].mean() > 0.7
    assert chance.mean() == pytest.approx(right.mean(), abs=0.12)


def test_false_alarms_have_no_better_caption():
    right, chance = suggest("moved", precision=0.6)
    sure = chance >= 0.7
    assert right[sure].mean() > 0.8
    assert chance[WRONG:].mean() < 0.1


def test_equal_captions_are_one_candidate_held_by_the_row_that_they_fit_best():
    pairs = spoil(make_pairs(), "copied")
    candidates = Candidates.of(pairs)
    assert len(candidates.key) == COUNT - WRONG
    place = int(candidates.place(torch.tensor([250]))[0])
    assert candidates.held is not None
    assert candidates.held[place] == max(pairs.fit[250], pairs.fit[50])
    assert candidates.place(torch.tensor([5]))[0] == -1


@pytest.mark.parametrize("flagged", [COUNT, COUNT - 20])
def test_too_few_to_learn_from(flagged):
    pairs = make_pairs()
    flag = np.arange(COUNT) < flagged
    winners = find_winners(pairs, torch.arange(flagged), Candidates.of(pairs))
    assert learn_rightness(pairs, winners, flag, np.full(COUNT, np.nan)) is None
