import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from hf_ecif.detection import injection
from hf_ecif.detection.injection import Injection, cluster, inject
from hf_ecif.engine.features import Features
from hf_ecif.engine.objectives import Embeddings
from hf_ecif.influence.rows import Rows


def build_rows(texts: list[str]) -> Rows:
    """The text feature of a row is its own number, so that whose caption it is can be told."""
    number = torch.arange(len(texts))[:, None].float()
    return Rows(
        features=Features({"features": number}, {"features": number}),
        positions=torch.arange(len(texts)) * 2,
        texts=texts,
        reasons={1: "caption empty"},
        total=2 * len(texts),
    )


def build_groups(count: int, groups: int = 4) -> Tensor:
    """Embeddings in well-separated groups; row ``i`` is in group ``i % groups``."""
    generator = torch.Generator().manual_seed(0)
    noise = 0.01 * torch.randn(count, groups, generator=generator)
    return normalize(torch.eye(groups)[torch.arange(count) % groups] + noise, dim=1)


def planting_of(
    rows: Rows, share: float = 0.25, seed: int = 0, among: Tensor | None = None
) -> Injection:
    generator = torch.Generator().manual_seed(seed)
    groups = build_groups(len(rows))
    return inject(rows, groups, share=share, clusters=4, generator=generator, among=among)


DISTINCT = build_rows([f"caption {i}" for i in range(80)])
REPEATED = build_rows([f"caption {i % 3}" for i in range(80)])


@pytest.mark.parametrize(
    ("count", "share", "expected"), [(80, 0.25, 20), (80, 0.0, 2), (10, 0.15, 2), (80, 1.0, 80)]
)
def test_share(count: int, share: float, expected: int) -> None:
    rows = build_rows([str(i) for i in range(count)])
    assert planting_of(rows, share).injected.sum() == expected


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rows", [DISTINCT, REPEATED], ids=["distinct", "repeated"])
def test_exactly_the_planted_rows_get_another_caption(rows: Rows, seed: int) -> None:
    injection = planting_of(rows, seed=seed)
    changed = [old != new for old, new in zip(rows.texts, injection.rows.texts, strict=True)]
    assert changed == injection.injected.tolist()


@pytest.mark.parametrize("rows", [DISTINCT, REPEATED], ids=["distinct", "repeated"])
def test_caption_and_its_features_move_together_and_the_image_stays(rows: Rows) -> None:
    injection = planting_of(rows)
    donors = injection.rows.features.text["features"][:, 0].long()
    assert injection.rows.texts == [rows.texts[i] for i in donors.tolist()]
    assert torch.equal(donors != torch.arange(len(rows)), injection.injected)
    assert torch.equal(injection.rows.features.image["features"], rows.features.image["features"])


def test_the_rest_of_the_rows_is_the_same_and_the_input_untouched() -> None:
    texts = list(DISTINCT.texts)
    injected = planting_of(DISTINCT).rows
    assert texts == DISTINCT.texts
    assert torch.equal(injected.positions, DISTINCT.positions)
    assert (injected.reasons, injected.total) == (DISTINCT.reasons, DISTINCT.total)


def test_half_of_the_captions_come_from_like_images() -> None:
    injection = planting_of(DISTINCT, share=1.0)
    donors = injection.rows.features.text["features"][:, 0].long()
    alike = (donors % 4 == torch.arange(80) % 4).double().mean()
    assert 0.5 <= alike < 0.75  # a half, and a quarter of the other half by chance
    assert injection.alike.double().mean() == alike


def test_rows_that_stay_are_of_no_kind() -> None:
    injection = planting_of(DISTINCT)
    assert 0 < injection.alike.sum() < injection.injected.sum()
    assert not injection.alike[~injection.injected].any()


def test_row_whose_like_images_share_its_caption_takes_another() -> None:
    rows = build_rows([f"group {i % 4}" for i in range(80)])
    assert planting_of(rows, share=1.0).injected.all()


def test_equal_captions_cannot_be_exchanged() -> None:
    injection = planting_of(build_rows(["same"] * 20))
    assert not injection.injected.any()
    assert injection.rows.texts == ["same"] * 20


@pytest.mark.parametrize(("seed", "equal"), [(0, True), (1, False)])
def test_seed_decides(seed: int, equal: bool) -> None:
    first, second = planting_of(DISTINCT, seed=0), planting_of(DISTINCT, seed=seed)
    assert (first.rows.texts == second.rows.texts) is equal


def test_clusters_are_the_groups() -> None:
    labels = cluster(build_groups(40), 4, seed=0)
    assert labels.dtype == torch.long
    assert len({tuple(labels[i::4].unique().tolist()) for i in range(4)}) == 4
    assert all(len(labels[i::4].unique()) == 1 for i in range(4))


def test_no_more_clusters_than_rows() -> None:
    assert len(cluster(build_groups(3), 10, seed=0)) == 3


# ------------------------------------------------------------------------- several captions


def with_several(images: int = 40, each: int = 3) -> Rows:
    """Rows of images with several captions; those of an image are of one group."""
    rows = build_rows([f"caption {i}" for i in range(images * each)])
    return rows.with_images(torch.arange(images * each) % images)


@pytest.mark.parametrize("seed", range(5))
def test_images_swap_all_of_their_captions(seed: int) -> None:
    rows = with_several()
    images = rows.keys.images
    injection = planting_of(rows, share=0.4, seed=seed)
    assert injection.whole.any()
    assert (injection.injected & ~injection.whole).any()
    for image in images[injection.whole].unique().tolist():
        members = images == image
        assert injection.whole[members].all()
        givers = images[injection.donors[members]].unique()
        assert len(givers) == 1  # all from one image,
        assert givers.item() != image
        back = images[injection.donors[images == givers.item()]].unique()
        assert back.tolist() == [image]  # which has got all of this one's
    moved = injection.donors[injection.whole]
    assert len(moved.unique()) == len(moved)


@pytest.mark.parametrize("seed", range(5))
def test_no_caption_comes_from_a_sibling(seed: int) -> None:
    rows = with_several()
    injection = planting_of(rows, share=0.4, seed=seed)
    images, donors = rows.keys.images, injection.donors
    assert (images[donors] != images)[injection.injected].all()
    single = injection.injected & ~injection.whole
    assert single.sum() >= 5


def test_kinds_part_the_exchanged_rows() -> None:
    injection = planting_of(with_several(), share=0.4)
    together = torch.stack(injection.kinds).sum(dim=0)
    assert torch.equal(together, injection.injected.long())
    assert all(kind.any() for kind in injection.kinds)
    assert not any(kind.any() for kind in planting_of(DISTINCT).kinds[2:])


@pytest.mark.parametrize("rows", [DISTINCT, with_several()], ids=["one caption", "several"])
def test_rows_that_are_no_evidence_neither_get_nor_give(rows: Rows) -> None:
    among = torch.arange(len(rows)) % 3 > 0
    injection = planting_of(rows, share=0.5, among=among)
    assert not injection.injected[~among].any()
    assert among[injection.donors[injection.injected]].all()
    assert injection.injected.sum() >= 0.4 * among.sum()


# ------------------------------------------------------------------------------ many rows


@pytest.mark.parametrize("several", [False, True], ids=["one caption", "several"])
def test_donors_looked_at_do_not_grow_with_the_rows(
    monkeypatch: pytest.MonkeyPatch, *, several: bool
) -> None:
    plain, looked = injection._Exchange._fit, [0]

    def fit(self: injection._Exchange, rows: np.ndarray, *rest: object) -> np.ndarray:
        looked[0] += len(rows)
        return plain(self, rows, *rest)

    monkeypatch.setattr(injection._Exchange, "_fit", fit)
    each = []
    for count in (2000, 8000):
        rows = build_rows([f"caption {i}" for i in range(count)])
        rows = rows.with_images(torch.arange(count) % (count // 4)) if several else rows
        looked[0] = 0
        assert planting_of(rows).injected.sum() >= 0.25 * count
        each.append(looked[0] / count)
    assert each[1] < 1.2 * each[0] < 1.2 * injection.TRIES


def test_donors_are_found_where_nearly_all_captions_are_one() -> None:
    texts = [f"caption {max(0, i - 296)}" for i in range(300)]
    found = planting_of(build_rows(texts), share=0.5)
    assert found.injected.sum() == 150
    assert all(texts[row] != texts[found.donors[row]] for row in found.injected.nonzero()[:, 0])


def test_an_exchange_that_makes_no_pair_worse_does_not_count() -> None:
    """Within a group, captions are true of all images; between groups, of none."""
    some = planting_of(DISTINCT)
    groups = build_groups(len(DISTINCT)).double()
    one = torch.ones((), dtype=torch.float64)
    given = Embeddings(groups.round(), groups.round(), one, one)  # equal within a group
    exchanged = given._replace(text=given.text[some.donors])
    worse = injection._fits_worse(some, given, exchanged)
    number = torch.arange(len(DISTINCT)) % 4
    assert worse[some.injected].tolist() == (number[some.donors] != number)[some.injected].tolist()
    assert some.alike.any()
    assert not (worse & some.alike).any()


def test_if_no_exchange_made_a_pair_worse_all_count() -> None:
    some = planting_of(DISTINCT)
    one = torch.ones((), dtype=torch.float64)
    equal = Embeddings(*torch.ones(2, len(DISTINCT), 1, dtype=torch.float64), one, one)
    assert injection._fits_worse(some, equal, equal).all()
