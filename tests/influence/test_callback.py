"""Influence while a real `Trainer` trains the demo's CLIP."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModel,
    AutoProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_ecif.config import InfluenceConfig
from hf_ecif.errors import UserError
from hf_ecif.influence.callback import InfluenceCallback, _same_random_numbers
from hf_ecif.influence.model import InfluenceModel
from tests.support import DEMO

QUICK = InfluenceConfig(fit_epochs=0, probes=1, partitions=2, batch_size=16, damping=1000)
ADAPTERS = replace(QUICK, parameters="lora", solver="identity")


@pytest.fixture(scope="module")
def data():
    return load_dataset(str(DEMO / "data"))


@pytest.fixture(scope="module")
def train(data):
    return data["train"].select(range(40)).select_columns(["image", "text"])


@pytest.fixture(scope="module")
def query(data):
    return data["validation"].select(range(24))


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(DEMO / "model")


def load_model():
    return AutoModel.from_pretrained(DEMO / "model")


@pytest.fixture
def make_trainer(tmp_path, train, processor):
    """Trainers of two epochs of three steps, with dropout and a shuffled order."""

    def collate(rows: list[dict]) -> dict:
        batch = processor(
            text=[row["text"] for row in rows],
            images=[row["image"] for row in rows],
            padding=True,
            return_tensors="pt",
        )
        return {**batch, "return_loss": True}

    def make(model=None, processing_class=processor, **options) -> Trainer:
        set_seed(0)
        model = model or load_model()
        for config in (model.config.text_config, model.config.vision_config):
            config.attention_dropout = 0.1  # so that random numbers matter
        for module in model.modules():
            if hasattr(module, "dropout") and isinstance(module.dropout, float):
                module.dropout = 0.1
        defaults = {
            "num_train_epochs": 2,
            "per_device_train_batch_size": 16,
            "learning_rate": 1e-4,
            "remove_unused_columns": False,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
        }
        arguments = TrainingArguments(output_dir=str(tmp_path / "run"), **(defaults | options))
        return Trainer(
            model,
            arguments,
            train_dataset=train,
            data_collator=collate,
            processing_class=processing_class,
        )

    return make


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def state_of(trainer) -> list:
    """All that training goes on from."""
    model = trainer.model
    moments = [m.clone() for s in trainer.optimizer.state.values() for m in s.values()]
    return [
        [module.training for module in model.modules()],
        [value.requires_grad for value in model.parameters()],
        [None if value.grad is None else value.grad.clone() for value in model.parameters()],
        [(value.dtype, value.device) for value in model.parameters()],
        [len(module._forward_pre_hooks) for module in model.modules()],
        ["forward" in vars(module) for module in model.modules()],
        [*weights(model).values()],
        moments,
        torch.get_rng_state(),
        random.getstate(),
        np.random.get_state()[1].copy(),
        torch.is_grad_enabled(),
    ]


def assert_same(one, other):
    assert type(one) is type(other)
    if isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert np.array_equal(one, other)


class TestTraining:
    def test_ends_with_the_same_weights(self, make_trainer, train, query):
        plain = make_trainer()
        plain.train()
        watched = make_trainer()
        watched.add_callback(InfluenceCallback(train, query, QUICK, trainer=watched, every=1))
        watched.train()
        before, after = weights(plain.model), weights(watched.model)
        assert all(torch.equal(before[name], after[name]) for name in before)
        losses = [[entry.get("loss") for entry in t.state.log_history] for t in (plain, watched)]
        assert [x for x in losses[0] if x] == [x for x in losses[1] if x]

    def test_nothing_it_goes_on_from_is_touched(self, make_trainer, train, query):
        trainer = make_trainer()
        influence = InfluenceCallback(train, query, QUICK, trainer=trainer)

        class InTheMiddle(TrainerCallback):
            """Where gradients are there, and half of the parameters are frozen."""

            seen = 0

            def on_pre_optimizer_step(self, args, state, control, **_):
                before = state_of(trainer)
                influence._score(state, control)
                assert_same(before, state_of(trainer))
                self.seen += 1

        for value in [*trainer.model.parameters()][::2]:
            value.requires_grad_(False)
        middle = InTheMiddle()
        trainer.add_callback(middle)
        trainer.args.max_steps = 2
        trainer.train()
        assert middle.seen == 2

    def test_scores_are_those_of_the_trained_model(self, make_trainer, train, query, processor):
        trainer = make_trainer()
        influence = InfluenceCallback(train, query, QUICK, trainer=trainer)
        trainer.add_callback(influence)
        trainer.train()
        model = InfluenceModel(trainer.model, processor, QUICK)
        rows = model.read(train)
        scores = model.fit(rows, model.read(query)).scores()
        given = model.score_as_given(rows)
        columns = influence.scored.with_format("numpy")
        assert np.allclose(columns["ecif_score"][:], scores.task.numpy())
        assert np.allclose(columns["ecif_loo_loss"][:], scores.loo_loss.numpy())
        assert np.allclose(columns["clip_score"][:], given.clip_score.numpy())
        assert np.ptp(columns["ecif_score"][:]) > 0

    def test_random_numbers_go_on_where_they_were(self):
        def draw() -> list[float]:
            return [random.random(), np.random.random(), torch.rand(()).item()]

        set_seed(0)
        expected = draw(), draw()
        set_seed(0)
        first = draw()
        with _same_random_numbers(torch.device("cpu")):
            draw()
        assert (first, draw()) == expected

    def test_default_config_does_not_fit_again(self, make_trainer, train, query):
        influence = InfluenceCallback(train, query, trainer=make_trainer())
        assert influence.config == InfluenceConfig(fit_epochs=0)


class TestResults:
    def test_columns_join_those_of_the_rows(self, make_trainer, train, query):
        trainer = make_trainer(num_train_epochs=1)
        old = train.add_column("ecif_flag", [True] * len(train))
        influence = InfluenceCallback(old, query, QUICK, trainer=trainer)
        assert influence.scored is None
        trainer.add_callback(influence)
        trainer.train()
        scored = influence.scored
        assert scored["text"][:] == train["text"][:]
        assert scored.features["image"] == train.features["image"]
        assert "ecif_flag" not in scored.column_names
        parts = scored.with_format("numpy")
        assert np.allclose(
            parts["ecif_positive"][:] + parts["ecif_negative"][:], parts["ecif_score"][:], atol=1e-7
        )
        assert scored["ecif_reason"][:] == [None] * len(train)

    def test_unreadable_rows_have_a_reason(self, make_trainer, train, query):
        trainer = make_trainer(num_train_epochs=1)
        broken = train.select(range(20)).map(
            lambda row, index: {"text": "" if index == 3 else row["text"]}, with_indices=True
        )
        influence = InfluenceCallback(broken, query, QUICK, trainer=trainer)
        trainer.add_callback(influence)
        trainer.train()
        scores, reasons = influence.scored["ecif_score"][:], influence.scored["ecif_reason"][:]
        assert [row for row, score in enumerate(scores) if score is None] == [3]
        assert [row for row, reason in enumerate(reasons) if reason is not None] == [3]
        assert reasons[3] == "caption empty"

    def test_every_epoch_is_written(self, make_trainer, train, query, tmp_path):
        trainer = make_trainer()
        influence = InfluenceCallback(
            train, query, QUICK, trainer=trainer, output=tmp_path / "out", every=1
        )
        trainer.add_callback(influence)
        trainer.train()
        folders = sorted((tmp_path / "out").iterdir())
        assert [folder.name for folder in folders] == ["epoch-1", "epoch-2"]
        first, last = (
            load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
            for folder in folders
        )
        assert last["ecif_score"][:] == influence.scored["ecif_score"][:]
        assert first["ecif_score"][:] != last["ecif_score"][:]
        assert first[0]["image"].size == train[0]["image"].size

    def test_every_second_epoch(self, make_trainer, train, query):
        trainer = make_trainer(num_train_epochs=3)
        trainer.add_callback(InfluenceCallback(train, query, QUICK, trainer=trainer, every=2))
        trainer.train()
        assert [entry["epoch"] for entry in logged(trainer)] == [2]

    def test_by_default_once_at_the_end(self, make_trainer, train, query, tmp_path):
        trainer = make_trainer(max_steps=4)
        influence = InfluenceCallback(train, query, QUICK, trainer=trainer, output=tmp_path / "out")
        trainer.add_callback(influence)
        trainer.train()
        assert [entry["step"] for entry in logged(trainer)] == [4]
        assert [folder.name for folder in (tmp_path / "out").iterdir()] == ["epoch-1.3333"]

    def test_an_epoch_cut_short_does_not_count(self, make_trainer, train, query):
        trainer = make_trainer(max_steps=4)
        trainer.add_callback(InfluenceCallback(train, query, QUICK, trainer=trainer, every=1))
        trainer.train()
        assert [entry["step"] for entry in logged(trainer)] == [3]

    def test_only_the_first_process_writes(self, make_trainer, train, query, tmp_path):
        trainer = make_trainer(num_train_epochs=1)
        influence = InfluenceCallback(train, query, QUICK, trainer=trainer, output=tmp_path / "out")
        trainer.state.is_world_process_zero = False
        influence.on_train_end(trainer.args, trainer.state, trainer.control)
        assert influence.scored is not None
        assert not (tmp_path / "out").exists()


def logged(trainer) -> list[dict]:
    return [entry for entry in trainer.state.log_history if "ecif/mean_score" in entry]


class TestLog:
    def test_figures_are_those_of_the_columns(self, make_trainer, train, query):
        trainer = make_trainer(logging_strategy="epoch")
        influence = InfluenceCallback(train, query, QUICK, trainer=trainer, every=1)
        trainer.add_callback(influence)
        trainer.train()
        scores = np.array(influence.scored["ecif_score"][:])
        assert [entry["step"] for entry in logged(trainer)] == [3, 6]
        last = logged(trainer)[-1]
        assert last["ecif/mean_score"] == pytest.approx(scores.mean(), rel=1e-5)
        assert last["ecif/harmful_share"] == pytest.approx((scores < 0).mean())
        assert 0 < last["ecif/query_loss"] < 5
        # The trainer's own entries are still there, and reporters hear of ours.
        assert [e["step"] for e in trainer.state.log_history if "loss" in e] == [3, 6]

    def test_reporters_hear_of_them(self, make_trainer, train, query):
        heard: list[dict] = []

        class Reporter(TrainerCallback):
            def on_log(self, args, state, control, logs=None, **_):
                heard.append(dict(logs))

        trainer = make_trainer(num_train_epochs=1)
        trainer.add_callback(Reporter())
        trainer.add_callback(InfluenceCallback(train, query, QUICK, trainer=trainer))
        trainer.train()
        assert sum("ecif/query_loss" in logs for logs in heard) == 1


class TestResuming:
    def test_a_resumed_training_writes_the_same(self, make_trainer, train, query, tmp_path):
        def run(output: Path, checkpoint: str | None = None) -> Dataset:
            trainer = make_trainer(save_strategy="epoch")
            influence = InfluenceCallback(
                train, query, QUICK, trainer=trainer, output=output, every=1
            )
            trainer.add_callback(influence)
            trainer.train(resume_from_checkpoint=checkpoint)
            return influence.scored

        whole = run(tmp_path / "out")
        again = run(tmp_path / "out", str(tmp_path / "run" / "checkpoint-3"))
        assert again["ecif_score"][:] == whole["ecif_score"][:]
        assert len([*(tmp_path / "out").iterdir()]) == 2

    def test_scores_of_another_training_are_kept(self, make_trainer, train, query, tmp_path):
        (tmp_path / "out" / "epoch-1").mkdir(parents=True)
        trainer = make_trainer()
        before = weights(trainer.model)
        influence = InfluenceCallback(train, query, QUICK, trainer=trainer, output=tmp_path / "out")
        trainer.add_callback(influence)
        with pytest.raises(UserError, match="another training"):
            trainer.train()
        assert all(torch.equal(v, before[n]) for n, v in trainer.model.state_dict().items())


class TestWrappedModels:
    def test_adapters_in_training(self, make_trainer, train):
        adapted = get_peft_model(load_model(), LoraConfig(target_modules=["q_proj", "v_proj"]))
        trainer = make_trainer(adapted, num_train_epochs=1)
        few = train.select(range(12))
        influence = InfluenceCallback(few, few, ADAPTERS, trainer=trainer)
        trainer.add_callback(influence)
        trainer.train()
        assert np.ptp(influence.scored["ecif_score"][:]) > 0
        trained = [name for name, value in adapted.named_parameters() if value.requires_grad]
        assert trained
        assert all("lora_" in name for name in trained)

    def test_fresh_adapters_stay_on_the_copy(self, make_trainer, train):
        trainer = make_trainer(num_train_epochs=1)
        names = [*trainer.model.state_dict()]
        few = train.select(range(12))
        trainer.add_callback(InfluenceCallback(few, few, ADAPTERS, trainer=trainer))
        trainer.train()
        assert [*trainer.model.state_dict()] == names

    def test_compiled_models(self, make_trainer, train, query):
        """Wrapped alone, not run: compiling takes minutes."""
        trainer = make_trainer(num_train_epochs=1)
        influence = InfluenceCallback(train, query, QUICK, trainer=trainer)
        influence.on_train_end(trainer.args, trainer.state, trainer.control)
        plain = influence.scored["ecif_score"][:]
        compiled = torch.compile(trainer.model)
        trainer.model = compiled
        influence.on_train_end(trainer.args, trainer.state, trainer.control)
        assert influence.scored["ecif_score"][:] == plain
        assert trainer.model is compiled

    def test_distributed_wrappers(self, make_trainer, train, query):
        trainer = make_trainer(num_train_epochs=1)
        influence = InfluenceCallback(train, query, QUICK, trainer=trainer)
        influence.on_train_end(trainer.args, trainer.state, trainer.control)
        plain = influence.scored["ecif_score"][:]
        trainer.model = torch.nn.DataParallel(trainer.model)
        influence.on_train_end(trainer.args, trainer.state, trainer.control)
        assert influence.scored["ecif_score"][:] == plain


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"text_column": "caption"}, "no text column 'caption'"),
            ({"image_column": "picture"}, "no image column 'picture'"),
            ({"every": 0}, "every = 0"),
            ({"config": InfluenceConfig(parameters="nothing")}, "selects none"),
        ],
    )
    def test_show_before_the_training(self, make_trainer, train, query, options, message):
        with pytest.raises(UserError, match=message):
            InfluenceCallback(train, query, trainer=make_trainer(), **options)

    @pytest.mark.parametrize("own", [None, "tokenizer"])
    def test_no_processor(self, make_trainer, train, query, processor, own):
        trainer = make_trainer(processing_class=own and processor.tokenizer)
        with pytest.raises(UserError, match="no processor for images and texts"):
            InfluenceCallback(train, query, trainer=trainer)
        assert InfluenceCallback(train, query, trainer=trainer, processor=processor)

    def test_no_dual_encoder(self, make_trainer, train, query):
        trainer = make_trainer()
        trainer.model = CLIPTextModel(CLIPTextConfig(num_hidden_layers=1, hidden_size=64))
        with pytest.raises(UserError, match="CLIPTextModel is not a contrastive dual encoder"):
            InfluenceCallback(train, query, trainer=trainer)

    @pytest.mark.parametrize("kind", ["is_fsdp_enabled", "is_deepspeed_enabled"])
    def test_sharded_parameters(self, make_trainer, train, query, kind):
        trainer = make_trainer()
        setattr(trainer, kind, True)
        with pytest.raises(UserError, match="FSDP and DeepSpeed"):
            InfluenceCallback(train, query, trainer=trainer)

    def test_nothing_would_be_scored(self, make_trainer, train, query):
        trainer = make_trainer()
        trainer.add_callback(InfluenceCallback(train, query, QUICK, trainer=trainer, every=5))
        with pytest.raises(UserError, match="every = 5, but the training has 2 epochs"):
            trainer.train()
