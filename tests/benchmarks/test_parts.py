"""Pieces of the benchmarks against plain formulas."""

import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_auc_score
from torch.nn.functional import normalize

from hf_ecif.engine.encoder import DualEncoder
from hf_ecif.engine.objective import random_batches
from hf_ecif.influence.rows import Rows
from tests.benchmarks.bootstrap import areas, paired_difference, verdict
from tests.benchmarks.signals import Lemon, gradients, lemon


def test_areas_of_weighted_rows_are_those_of_repeated_rows():
    rng = np.random.default_rng(0)
    wrong = rng.random(30) < 0.4
    suspicion = rng.integers(0, 8, 30) / 8  # with ties
    drawn = rng.multinomial(30, np.full(30, 1 / 30), size=5)
    found = areas(wrong, suspicion, drawn.astype(float))
    for weights, auprc, auroc in zip(drawn, *found, strict=True):
        rows = np.repeat(np.arange(30), weights)
        assert np.isclose(auprc, average_precision_score(wrong[rows], suspicion[rows]))
        assert np.isclose(auroc, roc_auc_score(wrong[rows], suspicion[rows]))


def test_a_better_ranking_is_above_a_worse_one_and_level_with_itself():
    rng = np.random.default_rng(1)  # not that of the resamples
    wrong = [rng.random(300) < 0.3 for _ in range(2)]
    good = [w + rng.normal(size=300) / 2 for w in wrong]
    poor = [w + 3 * rng.normal(size=300) for w in wrong]
    assert verdict(paired_difference(wrong, good, poor)["AUPRC"]) == "above"
    assert verdict(paired_difference(wrong, poor, good)["AUROC"]) == "below"
    assert verdict(paired_difference(wrong, good, good)["AUPRC"]) == "level"


def test_lemon_is_its_formula():
    torch.manual_seed(0)
    text, image = normalize(torch.randn(2, 9, 4, dtype=torch.float64), dim=2)
    setting = Lemon(neighbours=3, beta=2.0, gamma=0.5, tau1=0.3, tau2=1.5)
    (found,) = lemon(text, image, [setting])
    mismatch = [1 - float(text[i] @ image[i]) for i in range(9)]

    def average(i, anchors, others):
        distance = {j: 1 - float(anchors[i] @ anchors[j]) for j in range(9) if j != i}
        near = sorted(distance, key=distance.get)[:3]
        terms = [
            (1 - float(others[i] @ others[j]))
            * np.exp(-0.3 * distance[j])
            * np.exp(-1.5 * mismatch[j])
            for j in near
        ]
        return sum(terms) / 3

    for i in range(9):
        expected = mismatch[i] + 2 * average(i, image, text) + 0.5 * average(i, text, image)
        assert np.isclose(float(found[i]), expected)


def test_gradients_of_single_pairs_against_autograd(make_clip, make_features):
    encoder = DualEncoder(make_clip(), "projections")
    features = make_features(10)
    encoder.freeze(features)
    rows = Rows(features, torch.arange(10), [str(i) for i in range(10)], {}, 10)
    theta, along = encoder.theta, torch.randn_like(encoder.theta)
    product, norm = gradients(encoder, theta, rows, along, torch.Generator().manual_seed(0))
    (batch,) = random_batches(10, 256, torch.Generator().manual_seed(0))
    step = 1e-6

    def losses(point):
        embeddings = encoder.embed(point, features)
        return encoder.contrastive.roles(embeddings, form="exact", same=None).positive

    assert sorted(batch.tolist()) == list(range(10))
    difference = (losses(theta + step * along) - losses(theta - step * along)) / (2 * step)
    torch.testing.assert_close(product, difference, rtol=1e-6, atol=1e-8)
    columns = torch.eye(len(theta), dtype=theta.dtype)
    jacobian = [(losses(theta + step * c) - losses(theta - step * c)) / (2 * step) for c in columns]
    torch.testing.assert_close(norm, torch.stack(jacobian).norm(dim=0), rtol=1e-6, atol=1e-8)
