"""A model with its processor and config, from a folder or the Hub."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Self, TypeAlias

import torch
from datasets import Dataset
from torch import Tensor

from hf_ecif.config import InfluenceConfig
from hf_ecif.data.schema import check_columns, find_columns
from hf_ecif.engine.encoder import DualEncoder
from hf_ecif.engine.inverse import require_solvable
from hf_ecif.engine.objectives import Embeddings
from hf_ecif.engine.parameters import add_lora, has_adapters
from hf_ecif.errors import UserError
from hf_ecif.influence.batching import AnyQuery, query_target, scoring_pass
from hf_ecif.influence.queries import Query
from hf_ecif.influence.rows import (
    Chain,
    Rows,
    Table,
    choose_preprocessor,
    read_rows,
    require_rows,
    require_same_encoder,
)
from hf_ecif.influence.saving import save_model
from hf_ecif.influence.scoring import Scores, score_embedded
from hf_ecif.models.checks import require_finite, require_fit, with_padding
from hf_ecif.models.embeddings import EmbeddingProcessor
from hf_ecif.models.families import adapt
from hf_ecif.models.load import load_model
from hf_ecif.utils.checkpoints import Checkpoints
from hf_ecif.utils.seeds import derive

AnyRows: TypeAlias = Rows | Dataset
# A query: rows, for their contrastive loss, or another function; a list takes one pass.
Asked: TypeAlias = AnyRows | Query | Sequence[AnyRows | Query]


class LoadedModel:
    """A dual encoder with its processor and config, which reads rows, embeds and is saved.

    Args:
        model: a Hugging Face dual encoder; it is put in evaluation mode, and into the form of
            `hf_ecif.models.families`. Its weights stay as they are.
        processor: its processor.
        config: everything that determines a score.
        name: name of the folder or repository of the model; empty if it was given loaded.
    """

    def __init__(
        self, model: Any, processor: Any, config: InfluenceConfig | None = None, name: str = ""
    ) -> None:
        self.config = config or InfluenceConfig()
        model = adapt(model)
        require_finite(model)
        self.processor = processor
        if processor is not None and not isinstance(processor, EmbeddingProcessor):
            self.processor = with_padding(processor, model)
            require_fit(model, self.processor)
        self.name = name
        self._adapters_are_ours = self.config.parameters == "lora" and not has_adapters(model)
        if self._adapters_are_ours:
            seed = derive(self.config.seed, "adapters")
            model = add_lora(model, rank=self.config.lora_rank, seed=seed)
        self.encoder = DualEncoder(model, self.config.parameters, self.config.micro_batch_size)
        require_solvable(self.config, self.encoder.count)

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        config: InfluenceConfig | None = None,
        *,
        processor: str | Path | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
    ) -> Self:
        """Load a model and its processor from a folder or the Hub.

        Args:
            name_or_path: a folder, or a Hub id such as ``owner/name``, ``owner/name@revision`` or
                ``hf://owner/name``.
            config: how influence is computed; that of `InfluenceConfig` if absent.
            processor: folder or Hub id of the processor, where none lies beside the model.
            revision: branch, tag or commit on the Hub.
            token: access token of the Hub; the user's login if absent.
            dtype: dtype of the weights, as ``"float32"``; that of accelerate's settings if absent.
            device: device of the weights, as ``"cuda:0"``; accelerate's if absent.

        Raises:
            UserError: the model or its processor is missing, broken, or not of a contrastive dual
                encoder.
        """
        name, own = str(name_or_path), None if processor is None else str(processor)
        model, made = load_model(
            name, processor=own, revision=revision, token=token, dtype=dtype, device=device
        )
        return cls(model, made, config, name)

    @property
    def reads_captions(self) -> bool:
        """Whether new captions can be embedded, as a model of embeddings cannot."""
        return not isinstance(self.processor, EmbeddingProcessor)

    def save_pretrained(self, folder: str | Path) -> None:
        """Save the model as given, and the processor; transformers' own `from_pretrained` reads it.

        Raises:
            UserError: the model came with adapters of its own.
        """
        model: Any = self.encoder.model
        if has_adapters(model) and not self._adapters_are_ours:
            raise UserError(
                "This model has adapters of its own, which are saved without their base. Merge "
                "them first (merge_and_unload), and attribute new ones with parameters='lora'."
            )
        if self._adapters_are_ours:  # new adapters are zero, so merging changes nothing
            model = deepcopy(model).merge_and_unload()
        save_model(model, self.processor, folder)

    def read(
        self,
        dataset: Dataset,
        image_column: str = "image",
        text_column: str = "text",
        advance: Callable[[int], None] = lambda rows: None,
        checkpoints: Checkpoints | None = None,
    ) -> Rows:
        """Rows of a data set, with the frozen part of the model run on them.

        They can replace the data set in every method that takes one. With several processes, each
        reads a part.

        Raises:
            UserError: a column is missing, or no row can be read.
        """
        checked = check_columns(dataset, image_column, text_column)
        rows = self.read_any(checked, image_column, text_column, advance, checkpoints)
        return require_rows(rows)

    def read_any(
        self,
        cells: Dataset | Table | Chain,
        image_column: str,
        text_column: str,
        advance: Callable[[int], None] = lambda rows: None,
        checkpoints: Checkpoints | None = None,
    ) -> Rows:
        """Rows of columns that exist; perhaps none is readable."""
        return read_rows(
            cells,
            self.encoder,
            self.processor,
            image_column=image_column,
            text_column=text_column,
            max_pixels=self.config.max_pixels,
            memory_limit=self.config.memory_limit * 2**30,
            workers=self.config.workers,
            checkpoints=checkpoints,
            advance=advance,
        )

    def warm_up(self) -> None:
        """Let the towers find their frozen part, which frozen inputs alone do not show them."""
        preprocess = choose_preprocessor(self.encoder, self.processor, lambda: iter([]))
        self.encoder.freeze(preprocess.blank())

    def rows(self, rows: AnyRows) -> Rows:
        """Rows unchanged, or those of a data set, whose columns are found by their types.

        Raises:
            UserError: the rows were encoded by another model or cannot be read, or several columns
                fit: give `read` their names.
        """
        if isinstance(rows, Dataset):
            return self.read(rows, *find_columns(rows))
        require_same_encoder(rows, self.encoder)
        return rows

    def query_value(self, query: Asked, theta: Tensor) -> Tensor:
        """Value of the query at attributed parameters; ``()``, or ``(Q,)`` for several queries."""
        target = query_target(self.encoder, self.asked(query), self.config)
        return target.values(self.encoder, theta)

    def score_as_given(self, rows: AnyRows, embeddings: Embeddings | None = None) -> Scores:
        """Losses and cosines by the model as given; influence parts are of no query.

        Args:
            rows: the rows.
            embeddings: of the rows by the model as given, where they are known.
        """
        found = self.rows(rows)
        embeddings = embeddings or self.encoder.embed_as_given(found.features)
        how = scoring_pass(found, self.config)
        return score_embedded(self.encoder, found.features, embeddings, how)

    def embed_as_given(self, rows: AnyRows) -> Embeddings:
        """Normalised embeddings ``(n, d)`` of rows by the model as given, computed once."""
        return self.encoder.embed_as_given(self.rows(rows).features)

    def edited(self, theta: Tensor) -> Any:
        """Copy of the model with other attributed parameters; adapters are merged into it."""
        model: Any = deepcopy(self.encoder.model)
        self.encoder.load(theta, into=model)
        if has_adapters(model) and hasattr(model, "merge_and_unload"):
            return model.merge_and_unload()
        return model

    def asked(self, query: Asked) -> AnyQuery | Sequence[AnyQuery]:
        """Query whose data sets have been read."""
        if isinstance(query, Query):
            return query
        if isinstance(query, Rows | Dataset):
            return self.rows(query)
        return [one if isinstance(one, Query) else self.rows(one) for one in query]
