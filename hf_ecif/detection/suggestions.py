"""What the other rows say of a flagged one: better captions, better images, and duplicates.

Everything is judged by the embeddings of the model as given. A caption is suggested only where it
stands out: it must fit the image better than the row's own caption, and better than any other
candidate, by a margin in nats of the model's own logits. By a margin of 1.5, the model would prefer
it 4.5 to 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_ecif.config import SUGGEST_MARGIN
from hf_ecif.data.captions import plain
from hf_ecif.detection.detect import Detection
from hf_ecif.detection.mixture import Floats
from hf_ecif.engine.features import Features
from hf_ecif.engine.neighbours import count_better, find_best, link
from hf_ecif.engine.objectives import Embeddings
from hf_ecif.errors import UserError
from hf_ecif.influence.keys import firsts
from hf_ecif.influence.rows import BLANK, Preprocessor, Rows

if TYPE_CHECKING:
    from hf_ecif.influence.loaded import LoadedModel

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Evidence:
    """Of the readable rows, ``(n,)`` each. Row numbers are those of the data set.

    Attributes:
        better_images: how many other images the caption fits better than its own; -1 where the row
            is not flagged.
        better_text: the candidate caption that fits the image best, where it is better than the
            row's own; None elsewhere, and where the row is not flagged.
        better_row: a row with that caption; -1 where it is of a vocabulary or there is none.
        margin: by how much its logit is above those of the row's own caption and of the next best
            one, in nats; NaN where there is none.
        least_margin: from which on it is suggested.
        same_image: first row with nearly the same image; the row itself where it is alone.
        same_caption: first row with the same caption but for case, spacing and punctuation.
        duplicate: first row that is linked to this one by equal images or captions.
    """

    better_images: Numbers
    better_text: list[str | None]
    better_row: Numbers
    margin: Floats
    least_margin: float
    same_image: Numbers
    same_caption: Numbers
    duplicate: Numbers

    @property
    def suggested(self) -> NDArray[np.bool_]:
        """Where the better caption stands out enough to be suggested."""
        return self.margin >= self.least_margin

    @property
    def suggested_text(self) -> list[str | None]:
        """The suggested captions, None elsewhere."""
        pairs = zip(self.better_text, self.suggested.tolist(), strict=True)
        return [text if good else None for text, good in pairs]

    @property
    def suggested_margin(self) -> list[float | None]:
        """Their margins, in nats."""
        pairs = zip(self.margin.tolist(), self.suggested.tolist(), strict=True)
        return [margin if good else None for margin, good in pairs]

    @property
    def duplicate_group(self) -> list[int | None]:
        """`duplicate` of the rows that have others like them, None for the rest."""
        first, inverse, sizes = np.unique(self.duplicate, return_inverse=True, return_counts=True)
        shared = (sizes > 1)[inverse].tolist()
        pairs = zip(first[inverse].tolist(), shared, strict=True)
        return [group if many else None for group, many in pairs]

    def describe_duplicates(self) -> dict[str, dict[str, int]]:
        """Groups of more than one row, and rows in them, by what is alike."""
        kinds = {"image": self.same_image, "caption": self.same_caption, "either": self.duplicate}
        return {kind: _describe_groups(first) for kind, first in kinds.items()}


def find_evidence(
    model: LoadedModel,
    rows: Rows,
    detection: Detection,
    *,
    vocabulary: list[str] | None = None,
    margin: float = SUGGEST_MARGIN,
    mute: Tensor | None = None,
) -> Evidence:
    """Compare the flagged rows with all others, and look for duplicates.

    Args:
        model: its own parameters count, not the fitted ones.
        rows: the readable rows; which have nearly the same image, `join_near_images` finds.
        detection: of these rows.
        vocabulary: captions to suggest; those of the rows that are not flagged, if absent.
        margin: from which on a caption is suggested, in nats.
        mute: ``(n,)`` booleans, true for rows whose captions are not suggested.
    """
    embeddings = model.embed_as_given(rows)
    flagged = torch.from_numpy(np.flatnonzero(detection.flag))
    good = ~detection.flag if mute is None else ~detection.flag & ~mute.numpy()
    candidates = (
        _captions_of_rows(rows, embeddings.text, good)
        if vocabulary is None
        else _captions_of_vocabulary(model, vocabulary)
    )
    better = _find_better(rows, embeddings, flagged, candidates)
    positions = rows.positions.cpu()
    same_image, same_caption = map(_first_like, (rows.keys.images, rows.keys.captions))
    own = torch.arange(len(rows))
    duplicate = link(len(rows), iter([(own, same_image), (own, same_caption)]))
    return Evidence(
        *better,
        least_margin=margin,
        same_image=positions[same_image].numpy(),
        same_caption=positions[same_caption].numpy(),
        duplicate=positions[duplicate].numpy(),
    )


def read_vocabulary(path: Path) -> list[str]:
    """Captions of a text file, one a line.

    Raises:
        UserError: the file cannot be read, or has no captions.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"`vocabulary={path}` cannot be read as UTF-8 text: {error}. Give a text file with one "
            "caption a line."
        ) from error
    captions = [line.strip() for line in lines if line.strip()]
    if not captions:
        raise UserError(f"`vocabulary={path}` has no captions. Write one on every line.")
    return captions


@dataclass(frozen=True)
class _Candidates:
    """Captions, all different; ``rows`` are -1 where they are of a vocabulary."""

    texts: list[str]
    vectors: Tensor
    rows: Tensor


def _captions_of_rows(rows: Rows, vectors: Tensor, good: NDArray[np.bool_]) -> _Candidates:
    firsts = {plain(text): row for row, text in reversed([*enumerate(rows.texts)]) if good[row]}
    chosen = torch.tensor(sorted(firsts.values()), dtype=torch.long)
    return _Candidates(
        [rows.texts[row] for row in chosen.tolist()],
        vectors[chosen.to(vectors.device)],
        rows.positions.cpu()[chosen],
    )


def _captions_of_vocabulary(model: LoadedModel, vocabulary: list[str]) -> _Candidates:
    texts = list({plain(text): text for text in reversed(vocabulary)}.values())[::-1]
    return _Candidates(texts, _embed_captions(model, texts), torch.full((len(texts),), -1))


def _embed_captions(model: LoadedModel, captions: list[str]) -> Tensor:
    """Normalised text embeddings ``(V, d)`` of the model as given."""
    encoder = model.encoder
    preprocess = Preprocessor(encoder, model.processor, lambda: iter([captions]))
    # The towers want an image; one does for all.
    image = preprocess([BLANK]).image
    parts = []
    for start in range(0, len(captions), encoder.micro_batch_size):
        tokens = preprocess.tokens(captions[start : start + encoder.micro_batch_size])
        features = encoder.freeze(Features(tokens, image))
        parts.append(encoder.embed(encoder.theta, features).text)
    return torch.cat(parts)


def _find_better(
    rows: Rows, embeddings: Embeddings, flagged: Tensor, candidates: _Candidates
) -> tuple[Numbers, list[str | None], Numbers, Floats]:
    """`Evidence.better_images`, `better_text`, `better_row` and `margin`."""
    count = len(rows)
    better_images, better_row = np.full(count, -1), np.full(count, -1)
    better_text: list[str | None] = [None] * count
    margin = np.full(count, np.nan)
    image, text = (side[flagged.to(side.device)] for side in (embeddings.image, embeddings.text))
    own = (image * text).sum(dim=1)
    better_images[flagged] = count_better(text, embeddings.image, own).cpu()
    if candidates.texts:
        numbers = {plain(caption): number for number, caption in enumerate(candidates.texts)}
        known = [numbers.get(plain(rows.texts[row]), -1) for row in flagged.tolist()]
        best = find_best(image, candidates.vectors, torch.tensor(known).long().to(image.device))
        gap = embeddings.scale * (best.cosine - torch.maximum(best.runner_up, own))
        fits = (best.cosine > own).tolist()
        for number, row in enumerate(flagged.tolist()):
            if fits[number]:
                key = int(best.key[number])
                better_text[row], better_row[row] = candidates.texts[key], candidates.rows[key]
                margin[row] = gap[number]
    return better_images, better_text, better_row, margin


def _first_like(keys: Tensor) -> Tensor:
    """``(n,)``, the first row with the key of each."""
    first, number = firsts(keys)
    return first[number]


def _describe_groups(first: Numbers) -> dict[str, int]:
    sizes = np.unique(first, return_counts=True)[1]
    shared = sizes[sizes > 1]
    return {"groups": len(shared), "rows": int(shared.sum()), "largest": int(sizes.max())}
