"""Influence during training: a callback of `transformers.Trainer`.

    def collate(rows):
        texts, images = [row["text"] for row in rows], [row["image"] for row in rows]
        batch = processor(text=texts, images=images, padding=True, return_tensors="pt")
        return {**batch, "return_loss": True}

    args = TrainingArguments("runs/clip", remove_unused_columns=False)
    trainer = Trainer(model, args, train_dataset=train, data_collator=collate)
    influence = InfluenceCallback(train, validation, trainer=trainer, processor=processor, every=1)
    trainer.add_callback(influence)
    trainer.train()  # logs ecif/mean_score, ecif/harmful_share and ecif/query_loss
    influence.scored.sort("ecif_score")[:5]["text"]  # the most harmful captions

The model in training is copied and the copy is scored with, so training goes on as it would have
without: same weights, gradients, modes and random numbers. The copy takes the memory of the weights
once more, where training itself takes about four times that.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import extract_model_from_parallel
from datasets import Dataset, Value
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_ecif.config import InfluenceConfig
from hf_ecif.data.parquet import write_shards
from hf_ecif.data.schema import check_columns, drop_influence_columns
from hf_ecif.engine.encoder import require_dual_encoder
from hf_ecif.engine.parameters import has_adapters, select_parameters
from hf_ecif.errors import UserError
from hf_ecif.influence.columns import REASON, reason_column, score_columns
from hf_ecif.influence.model import InfluenceModel
from hf_ecif.influence.rows import Rows
from hf_ecif.influence.scoring import RelativeForm, Scores
from hf_ecif.models.processors import check_processor


class InfluenceCallback(TrainerCallback):
    """Scores the training rows by their influence on a query, with the model as it is by then.

    It logs ``ecif/mean_score`` (nats), ``ecif/harmful_share`` (of the rows with a negative score)
    and ``ecif/query_loss`` (nats) through the trainer. All processes of a run compute; the first
    one writes.

    Args:
        train: the rows that the model is trained on, images and texts as they are; the trainer's
            own data set may be tokenised.
        query: rows whose contrastive loss is asked about, better clean than many.
        config: everything that decides a score. By default that of `InfluenceConfig`, but with
            ``fit_epochs=0``: the trainer has fitted the model to these rows already, and a further
            fit would answer for another model.
        trainer: whose model is scored with, and whose log is written to.
        output: folder for the scored rows, as parquet in ``epoch-1``, ``epoch-2`` and so on;
            without it, they are only kept in `scored`.
        every: score after every so many epochs; without it, once at the end of training, when the
            trainer has loaded its best model if it was told to.
        processor: for images and texts; the trainer's ``processing_class`` if absent.
        image_column: name, of both data sets.
        text_column: name, of both data sets.

    Attributes:
        scored: ``train`` with its influence columns, those of the last time; None before. Earlier
            influence columns are replaced, and rows that cannot be read have a reason.

    Raises:
        UserError: a column or the processor is missing, or the model is sharded or no dual encoder.
    """

    def __init__(
        self,
        train: Dataset,
        query: Dataset,
        config: InfluenceConfig | None = None,
        *,
        trainer: Any,
        output: str | Path | None = None,
        every: int | None = None,
        processor: Any = None,
        image_column: str = "image",
        text_column: str = "text",
    ) -> None:
        if every is not None and every < 1:
            raise UserError(f"every = {every}: must be at least 1 epoch, or None for the end.")
        self.columns = (image_column, text_column)
        for dataset in (train, query):
            check_columns(dataset, *self.columns)
        self.train, self.query = drop_influence_columns(train), query
        self.config = config or InfluenceConfig(fit_epochs=0)
        self.trainer = trainer
        self.processor = processor or trainer.processing_class
        self.output = None if output is None else Path(output)
        self.every = every
        self.scored: Dataset | None = None
        check_processor(
            self.processor, "What InfluenceCallback(processor=...) or the Trainer was given"
        )
        _check_model(trainer, self.config.parameters)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Refuse what would fail or lose something only after hours."""
        if self.every is not None and self.every > state.num_train_epochs:
            raise UserError(
                f"every = {self.every}, but the training has {state.num_train_epochs} epochs, so "
                "nothing would be scored. Choose fewer, or None for the end of training."
            )
        resumed = state.global_step > 0
        if self.output is not None and not resumed and any(self.output.glob("epoch-*")):
            raise UserError(
                f"output {self.output} holds the scores of another training. Give a new folder."
            )

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Score after the chosen epochs, if they were not cut short."""
        done = round(state.epoch)
        is_whole = abs(state.epoch - done) < 1e-6
        if self.every is not None and is_whole and done % self.every == 0:
            self._score(state, control)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Score once, by default."""
        if self.every is None:
            self._score(state, control)

    def _score(self, state: TrainerState, control: TrainerControl) -> None:
        source = _unwrap(self.trainer.model)
        with _same_random_numbers(next(source.parameters()).device):
            model = InfluenceModel(deepcopy(source), self.processor, self.config)
            rows = model.read(self.train, *self.columns)
            influence = model.fit(rows, model.read(self.query, *self.columns))
            scores, given = influence.scores(rows), model.score_as_given(rows)
        self.scored = _add_scores(self.train, rows, scores, given, self.config.relative)
        if self.output is not None and state.is_world_process_zero:
            _write(self.scored, self.output / f"epoch-{round(state.epoch, 4):g}")
        # A log of ours must not stand in for one of the trainer that is due.
        is_due = control.should_log
        self.trainer.log(
            {
                "ecif/mean_score": scores.task.mean().item(),
                "ecif/harmful_share": (scores.task < 0).double().mean().item(),
                "ecif/query_loss": influence.fitted.query_loss,
            }
        )
        control.should_log = is_due


def _check_model(trainer: Any, parameters: str) -> None:
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise UserError(
            "FSDP and DeepSpeed spread the parameters over processes, and influence needs them "
            "whole. Train without InfluenceCallback, and score the saved model with "
            "InfluenceModel.from_pretrained."
        )
    model = _unwrap(trainer.model)
    require_dual_encoder(model)
    if parameters != "lora" or has_adapters(model):
        select_parameters(model, parameters)


def _unwrap(model: Any) -> Any:
    """The model itself, without DistributedDataParallel or torch.compile around it."""
    return extract_model_from_parallel(model, keep_torch_compile=False)


@contextmanager
def _same_random_numbers(device: torch.device) -> Iterator[None]:
    """Random numbers drawn inside do not change those drawn after."""
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


def _add_scores(
    dataset: Dataset, rows: Rows, scores: Scores, given: Scores, relative: RelativeForm
) -> Dataset:
    """The influence columns that need no detection; null where a row could not be read."""
    for name, values in score_columns(rows, scores, given, relative).items():
        dataset = dataset.add_column(name, values, feature=Value("float32"))
    return dataset.add_column(REASON, reason_column(rows), feature=Value("string"))


def _write(scored: Dataset, folder: Path) -> None:
    if folder.exists():  # a training that was resumed from an earlier epoch comes by again
        shutil.rmtree(folder)
    write_shards(scored, folder)
