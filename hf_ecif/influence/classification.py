"""Zero-shot classification of test images, by prompts that name the classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from hf_ecif.engine.features import Features
from hf_ecif.errors import UserError
from hf_ecif.influence.keys import firsts
from hf_ecif.influence.loaded import LoadedModel
from hf_ecif.influence.rows import BLANK, Preprocessor, Rows

TEMPLATES = ("a photo of a {}",)


@dataclass(frozen=True)
class Classes:
    """Classes of test rows, and the prompts that name them.

    Attributes:
        names: ``C`` names, sorted.
        labels: ``(n,)``, the class of each row; -1 of rows without one.
        prompts: ``C * T`` prompts at the frozen boundary, in micro-batches: those of one class, by
            all templates, follow each other.
    """

    names: list[str]
    labels: Tensor
    prompts: list[Features]

    def embed(self, model: LoadedModel, theta: Tensor) -> Tensor:
        """Normalised class embeddings ``(C, d)``: the means of those of their prompts."""
        found = torch.cat([model.encoder.embed(theta, part).text for part in self.prompts])
        return normalize(found.view(len(self.names), -1, found.shape[1]).mean(dim=1), dim=1)


def read_classes(
    model: LoadedModel,
    rows: Rows,
    named: Sequence[str | None],
    templates: Sequence[str] = TEMPLATES,
) -> Classes:
    """Classes of the readable rows of a test.

    Args:
        model: that is to classify them.
        rows: the readable rows.
        named: class of every row of the data set, None where it has none.
        templates: prompts, with ``{}`` for the name of a class.

    Raises:
        UserError: a template has no place for a name, fewer than two classes are left, or the model
            is one of embeddings, which reads no captions.
    """
    if not model.reads_captions:
        raise UserError(
            "Classes cannot be named to embeddings alone, since the model that made them is not "
            "here: leave out `class_column`."
        )
    for template in templates:
        if "{}" not in template:
            raise UserError(
                f"`class_template={template!r}` has no place for the name of a class. Write {{}} "
                "where it belongs: 'a photo of a {}'."
            )
    own = [named[row] for row in rows.positions.tolist()]
    names = sorted({name for name in own if name is not None})
    if len(names) < 2:
        raise UserError(
            f"`class_column` names {len(names)} classes of the readable test rows, and there must "
            "be two to tell apart. Name another column."
        )
    numbers = {name: number for number, name in enumerate(names)}
    labels = torch.tensor([-1 if name is None else numbers[name] for name in own])
    prompts = [template.replace("{}", name) for name in names for template in templates]
    return Classes(names, labels, list(freeze_captions(model, prompts)))


def zero_shot_accuracy(model: LoadedModel, theta: Tensor, rows: Rows, classes: Classes) -> float:
    """Share of the images whose nearest class is their own.

    An image that stands in several rows counts once, and any class of these is right.
    """
    here = (classes.labels >= 0).nonzero()[:, 0]
    image = model.encoder.embed(theta, rows.features).image[here]
    told = (image @ classes.embed(model, theta).T).argmax(dim=1).cpu()
    first, number = firsts(rows.same_image[here])
    is_right = torch.zeros(len(first), dtype=torch.bool)
    is_right[number[told[first][number] == classes.labels[here]]] = True
    return is_right.double().mean().item()


def freeze_captions(model: LoadedModel, captions: list[str]) -> Iterator[Features]:
    """Captions at the frozen boundary, in micro-batches, each with an image that says nothing."""
    encoder = model.encoder
    preprocess = Preprocessor(encoder, model.processor, lambda: iter([captions]))
    image = preprocess([BLANK]).image  # the towers want one, which does for all
    for start in range(0, len(captions), encoder.micro_batch_size):
        tokens = preprocess.tokens(captions[start : start + encoder.micro_batch_size])
        yield encoder.freeze(Features(tokens, image))
