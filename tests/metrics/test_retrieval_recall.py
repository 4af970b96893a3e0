import itertools
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ecif import metrics

# Directions of exactly known cosines, few of them, so that ties and repeats are common.
DIRECTIONS = [(1, 0), (0, 1), (-1, 0), (3, 4), (4, 3)]
LENGTHS = {1: 1, 25: 5}
ROWS = st.lists(
    st.tuples(st.sampled_from(DIRECTIONS), st.sampled_from(DIRECTIONS), st.integers(0, 2)),
    min_size=1,
    max_size=5,
)


@pytest.fixture(scope="module")
def metric(tmp_path_factory):
    return metrics.load("retrieval_recall", cache_dir=str(tmp_path_factory.mktemp("cache")))


def cosine(one, other):
    (a, b), (c, d) = one, other
    return Fraction(a * c + b * d, LENGTHS[a * a + b * b] * LENGTHS[c * c + d * d])


def brute_force(queries, candidates, k):
    """Mean over all orders of the candidates, which decide ties, of plain recall."""
    hits = []
    for query, group in queries:
        for order in itertools.permutations(candidates):
            ranked = sorted(order, key=lambda candidate: -cosine(query, candidate[0]))
            hits.append(any(own == group for _, own in ranked[:k]))
    return np.mean(hits)


class TestAgainstBruteForce:
    @settings(max_examples=80, deadline=None)
    @given(ROWS, st.integers(1, 6), st.integers(1, 4))
    def test_with_groups_ties_and_repeats(self, metric, rows, k, block_size):
        texts, images, groups = map(list, zip(*rows, strict=True))
        result = metric.compute(
            text_embeddings=texts,
            image_embeddings=images,
            groups=groups,
            k=[k],
            block_size=block_size,
        )
        distinct_texts = list(dict.fromkeys(zip(texts, groups, strict=True)))
        distinct_images = list(dict.fromkeys(zip(images, groups, strict=True)))
        assert (result["texts"], result["images"]) == (len(distinct_texts), len(distinct_images))
        assert result[f"text_to_image_recall@{k}"] == pytest.approx(
            brute_force(distinct_texts, distinct_images, k)
        )
        assert result[f"image_to_text_recall@{k}"] == pytest.approx(
            brute_force(distinct_images, distinct_texts, k)
        )

    def test_without_groups_it_is_the_rank_of_the_partner(self, metric):
        texts, images = np.random.default_rng(0).normal(size=(2, 300, 4))
        images += texts
        result = metric.compute(text_embeddings=texts, image_embeddings=images, block_size=7)
        cosines = (texts / np.linalg.norm(texts, axis=1, keepdims=True)) @ (
            images / np.linalg.norm(images, axis=1, keepdims=True)
        ).T
        for name, matrix in (("text_to_image", cosines), ("image_to_text", cosines.T)):
            rank = (matrix > np.diag(matrix)[:, None]).sum(axis=1)
            for k in (1, 5, 10):
                assert result[f"{name}_recall@{k}"] == pytest.approx(np.mean(rank < k))


IDS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=6)


class TestIds:
    @settings(max_examples=60, deadline=None)
    @given(IDS, st.integers(1, 4), st.integers(1, 3))
    def test_against_brute_force(self, metric, pairs, k, block_size):
        """A text and an image are right for each other if some pair has both."""
        rng = np.random.default_rng(0)
        texts, images = rng.normal(size=(2, 4, 3))
        text_ids, image_ids = zip(*pairs, strict=True)
        result = metric.compute(
            text_embeddings=[texts[i] for i in text_ids],
            image_embeddings=[images[i] for i in image_ids],
            text_ids=text_ids,
            image_ids=image_ids,
            k=[k],
            block_size=block_size,
        )
        cosines = (texts @ images.T) / np.outer(
            np.linalg.norm(texts, axis=1), np.linalg.norm(images, axis=1)
        )

        def recall(queries, candidates, fit, right):
            hits = []
            for one in queries:
                ranked = sorted(candidates, key=lambda other, one=one: -fit(one, other))
                hits.append(any(right(one, other) for other in ranked[:k]))
            return np.mean(hits)

        known, texts_there, images_there = set(pairs), set(text_ids), set(image_ids)
        assert (result["texts"], result["images"]) == (len(texts_there), len(images_there))
        assert result[f"text_to_image_recall@{k}"] == pytest.approx(
            recall(
                texts_there,
                images_there,
                lambda t, i: cosines[t, i],
                lambda t, i: (t, i) in known,
            )
        )
        assert result[f"image_to_text_recall@{k}"] == pytest.approx(
            recall(
                images_there,
                texts_there,
                lambda i, t: cosines[t, i],
                lambda i, t: (t, i) in known,
            )
        )

    @pytest.mark.parametrize(
        ("given", "words"),
        [
            ({"text_ids": [0, 1]}, "both"),
            ({"image_ids": [0, 1]}, "both"),
            ({"text_ids": [0, 1], "image_ids": [0, 1], "groups": [0, 1]}, "in place"),
            ({"text_ids": [0], "image_ids": [0, 1]}, "1 text_ids for 2 pairs"),
        ],
    )
    def test_mistakes(self, metric, given, words):
        vectors = [[1.0, 0.0], [0.0, 1.0]]
        with pytest.raises(ValueError, match=words):
            metric.compute(text_embeddings=vectors, image_embeddings=vectors, **given)


class TestTies:
    def test_a_collapsed_model_gets_chance(self, metric):
        same = np.tile(np.random.default_rng(0).normal(size=33), (40, 1))
        result = metric.compute(text_embeddings=same, image_embeddings=3 * same)
        for k in (1, 5, 10):
            assert result[f"text_to_image_recall@{k}"] == pytest.approx(k / 40)
            assert result[f"image_to_text_recall@{k}"] == pytest.approx(k / 40)

    def test_several_captions_of_an_image(self, metric):
        """Five captions each, as in the usual benchmarks: images count once as candidates."""
        rng = np.random.default_rng(0)
        images = rng.normal(size=(20, 8))
        texts = np.repeat(images, 5, axis=0) + 0.8 * rng.normal(size=(100, 8))
        result = metric.compute(
            text_embeddings=texts,
            image_embeddings=np.repeat(images, 5, axis=0),
            groups=np.repeat(np.arange(20), 5),
            k=[1],
        )
        unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (texts, images)]
        cosines = unit[0] @ unit[1].T
        owner = np.repeat(np.arange(20), 5)
        assert (result["texts"], result["images"]) == (100, 20)
        assert result["text_to_image_recall@1"] == pytest.approx(
            np.mean(cosines.argmax(axis=1) == owner)
        )
        assert result["image_to_text_recall@1"] == pytest.approx(
            np.mean(owner[cosines.argmax(axis=0)] == np.arange(20))
        )


def test_the_whole_matrix_is_never_held(metric):
    count = 3000
    embeddings = np.random.default_rng(0).normal(size=(count, 2))
    tracemalloc.start()
    metric.compute(text_embeddings=embeddings, image_embeddings=embeddings, block_size=50)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < count * count * 8 / 4


@pytest.mark.parametrize(
    ("texts", "images", "options", "message"),
    [
        ([], [], {}, "text_embeddings are empty"),
        ([[1.0], [0.0]], [[1.0], [1.0]], {}, r"text_embeddings\[1\] is zero"),
        ([[1.0], [1.0]], [[1.0], [float("nan")]], {}, r"image_embeddings\[1\].*not finite"),
        ([[1.0], None], [[1.0], [1.0]], {}, r"text_embeddings\[1\] has 0 numbers"),
        ([[1.0], [1.0, 2.0]], [[1.0], [1.0]], {}, r"text_embeddings\[1\] has 2 numbers"),
        ([[1.0, 2.0]], [[1.0]], {}, "2 numbers each and image embeddings 1"),
        ([[1.0]], [[1.0]], {"groups": [1, 2]}, "2 groups for 1 pairs"),
        ([[1.0]], [[1.0]], {"k": [0]}, "at least 1"),
        ([[1.0]], [[1.0]], {"block_size": 0}, "at least 1"),
    ],
)
def test_bad_input_is_named(tmp_path, texts, images, options, message):
    metric = metrics.load("retrieval_recall", cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match=message):
        metric.compute(text_embeddings=texts, image_embeddings=images, **options)
