"""Checkpoints as people bring them: each is loaded, or one sentence says what would work."""

import json
import logging
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, BertConfig, BertModel, CLIPModel, CLIPTextModel

from hf_ecif.engine.parameters import has_adapters
from hf_ecif.errors import UserError
from hf_ecif.influence.model import InfluenceModel
from hf_ecif.models.load import load_model
from tests.support import DEMO
from tests.support.families import build
from tests.support.hub.server import HubServer

MODEL = DEMO / "model"
PROCESSOR = ("processor_config.json", "tokenizer.json", "tokenizer_config.json")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Copy of the demo's model."""
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return load_file(MODEL / "model.safetensors")


def without(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).unlink()
    return folder


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def is_the_demo(loaded: tuple[Any, Any], weights: dict[str, torch.Tensor]) -> bool:
    found = loaded[0].state_dict()
    return all(torch.equal(found[name], value) for name, value in weights.items())


class TestLoaded:
    def test_pickle_of_weights_alone(self, model: Path, weights: dict[str, torch.Tensor]) -> None:
        torch.save(weights, without(model, "model.safetensors") / "pytorch_model.bin")
        assert is_the_demo(load_model(str(model)), weights)

    def test_shards(self, tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
        CLIPModel.from_pretrained(MODEL).save_pretrained(tmp_path, max_shard_size="2MB")
        assert len([*tmp_path.glob("*.safetensors")]) > 1
        loaded = load_model(str(tmp_path), processor=str(MODEL))
        assert is_the_demo(loaded, weights)

    @pytest.mark.parametrize("kind", ["models.CLIPModel", "sentence_transformer.modules.CLIPModel"])
    def test_sentence_transformers(
        self, tmp_path: Path, weights: dict[str, torch.Tensor], kind: str
    ) -> None:
        shutil.copytree(MODEL, tmp_path / "0_CLIPModel")
        module = {"idx": 0, "path": "0_CLIPModel", "type": f"sentence_transformers.{kind}"}
        (tmp_path / "modules.json").write_text(json.dumps([module]))
        assert is_the_demo(load_model(str(tmp_path)), weights)

    def test_sentence_transformers_in_one_folder(
        self, model: Path, weights: dict[str, torch.Tensor]
    ) -> None:
        module = {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"}
        (model / "modules.json").write_text(json.dumps([module]))
        assert is_the_demo(load_model(str(model)), weights)

    def test_checkpoint_of_a_training(
        self,
        tmp_path: Path,
        weights: dict[str, torch.Tensor],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        folder = Path(shutil.copytree(MODEL, tmp_path / "run/checkpoint-20"))
        (without(folder, *PROCESSOR) / "trainer_state.json").write_text("{}")
        with pytest.raises(UserError, match=r"no processor for images and texts beside it\. Name"):
            load_model(str(folder))
        assert is_the_demo(load_model(str(folder), processor=str(MODEL)), weights)
        AutoProcessor.from_pretrained(MODEL).save_pretrained(tmp_path / "run")
        with caplog.at_level(logging.WARNING):
            assert is_the_demo(load_model(str(folder)), weights)
        assert "taking that of the folder above it" in caplog.text
        with pytest.raises(UserError, match=r"holds the checkpoints.*Give one.*checkpoint-20\."):
            load_model(str(tmp_path / "run"))

    def test_processor_in_two_halves(self, model: Path, weights: dict[str, torch.Tensor]) -> None:
        """As version 4 of transformers and most trainings save it."""
        halves = AutoProcessor.from_pretrained(MODEL)
        without(model, *PROCESSOR)
        halves.image_processor.save_pretrained(model)
        halves.tokenizer.save_pretrained(model)
        _, processor = load_model(str(model))
        assert processor.tokenizer.pad_token == halves.tokenizer.pad_token
        assert processor.image_processor.crop_size == halves.image_processor.crop_size

    @pytest.mark.parametrize(
        ("lost", "half"),
        [("tokenizer.json", "ImageProcessor"), ("processor_config.json", "Token")],
    )
    def test_half_a_processor(self, model: Path, lost: str, half: str) -> None:
        """A tokenizer without its file would be made with no words, and nobody would be told."""
        with pytest.raises(UserError, match=rf"no processor .* beside it, only \w*{half}"):
            load_model(str(without(model, lost)))

    def test_adapters_with_the_processor_of_their_base(self, tmp_path: Path) -> None:
        torch.manual_seed(0)
        base = CLIPModel.from_pretrained(MODEL)
        config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        adapted = get_peft_model(base, config)
        adapted.save_pretrained(tmp_path)
        loaded, processor = load_model(str(tmp_path))
        assert has_adapters(loaded)
        tokens = processor.tokenizer(["a cat"], return_tensors="pt")
        with torch.no_grad():
            expected = adapted.get_text_features(**tokens).pooler_output
            actual = loaded.eval().get_text_features(**tokens).pooler_output
            plain = CLIPModel.from_pretrained(MODEL).get_text_features(**tokens).pooler_output
        torch.testing.assert_close(actual, expected)
        assert not torch.allclose(actual, plain, atol=1e-2)
        edit(tmp_path / "adapter_config.json", base_model_name_or_path="/no/such/model")
        with pytest.raises(UserError, match=r"adapters of /no/such/model\..*no such folder"):
            load_model(str(tmp_path))
        edit(tmp_path / "adapter_config.json", base_model_name_or_path=None)
        with pytest.raises(UserError, match=r"names no base model"):
            load_model(str(tmp_path))
        edit(tmp_path / "adapter_config.json", base_model_name_or_path=str(tmp_path))
        with pytest.raises(UserError, match=r"in a circle"):
            load_model(str(tmp_path))

    def test_tokenizer_without_padding(self, model: Path) -> None:
        """Padded by another token, it reads captions of all lengths as before."""
        rows = {"image": [{"bytes": None, "path": str(_picture(model))}] * 3}
        texts = ["a cat", "a very long caption of a cat on a mat", "cat"]
        given = InfluenceModel.from_pretrained(MODEL)
        edit(model / "tokenizer_config.json", pad_token=None)
        assert AutoProcessor.from_pretrained(model).tokenizer.pad_token is None
        found = InfluenceModel.from_pretrained(model)
        assert found.processor.tokenizer.pad_token is not None
        from hf_ecif.influence.rows import Table

        table = Table(rows | {"text": texts})
        both = (one.embed_as_given(one.read_any(table, "image", "text")) for one in (given, found))
        expected, actual = both
        torch.testing.assert_close(actual.text, expected.text)


class TestRefused:
    @pytest.mark.parametrize(
        ("files", "words"),
        [
            ({}, "no model's folder: it holds nothing"),
            ({"notes.txt": ""}, r"no model's folder: it holds notes\.txt"),
            ({"model_index.json": "{}", "unet/config.json": "{}"}, "pipeline of diffusers"),
            ({"model.safetensors": ""}, "weights, but no config.json"),
            ({"global_step5/a": ""}, "parts of a distributed training. Join them"),
            ({"tf_model.h5": ""}, "for TensorFlow"),
            ({"config.json": '{"model_type": "clip"}'}, "no weights"),
            ({"config.json": '{"model_type": "clip"}', "tf_model.h5": ""}, "for TensorFlow"),
            ({"config.json": "{}"}, "no model_type"),
            ({"config.json": '{"model_type": "mine"}'}, "model_type 'mine', which transformers"),
            ({"config.json": "{"}, "cannot be read"),
            ({"modules.json": '[{"type": "a.Transformer"}, {"type": "b.Pooling"}]'}, "without a C"),
            ({"modules.json": "["}, "modules.json cannot be read"),
        ],
    )
    def test_folders_of_something_else(
        self, tmp_path: Path, files: dict[str, str], words: str
    ) -> None:
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=words) as error:
            load_model(str(tmp_path))
        assert "\n" not in str(error.value)

    def test_a_single_file(self, tmp_path: Path) -> None:
        (tmp_path / "epoch_3.pt").touch()
        with pytest.raises(UserError, match=r"one file of weights.*open_clip"):
            load_model(str(tmp_path / "epoch_3.pt"))
        with pytest.raises(UserError, match=r"it is a file\."):
            load_model(str(MODEL / "model.safetensors"))

    def test_half_of_a_model(self, tmp_path: Path) -> None:
        CLIPTextModel.from_pretrained(MODEL).save_pretrained(tmp_path)
        with pytest.raises(UserError, match=r"CLIPTextModel is not a contrastive dual encoder"):
            load_model(str(tmp_path))

    def test_a_text_model(self, tmp_path: Path) -> None:
        size = {"hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8}
        BertModel(BertConfig(vocab_size=8, num_hidden_layers=1, **size)).save_pretrained(tmp_path)
        with pytest.raises(UserError, match=r"BertModel is not a contrastive dual encoder"):
            load_model(str(tmp_path))

    def test_missing_weights_are_not_made_up(
        self, model: Path, weights: dict[str, torch.Tensor]
    ) -> None:
        some = {name: value for name, value in weights.items() if "visual_proj" not in name}
        save_file(some, model / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=r"1 layers are missing \(visual_projection\.weight\)"):
            load_model(str(model))

    def test_pointer_of_git_lfs(self, model: Path) -> None:
        (model / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
        with pytest.raises(UserError, match=r"pointer of Git LFS.*git lfs pull"):
            load_model(str(model))

    def test_damaged_weights(self, model: Path) -> None:
        content = (model / "model.safetensors").read_bytes()
        (model / "model.safetensors").write_bytes(content[: len(content) // 2])
        with pytest.raises(UserError, match=r"cannot be loaded"):
            load_model(str(model))

    def test_code_in_a_pickle_is_not_run(self, model: Path, tmp_path: Path) -> None:
        class Evil:
            def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
                return os.mkdir, (str(tmp_path / "run by the pickle"),)

        path = without(model, "model.safetensors") / "pytorch_model.bin"
        torch.save({"text_projection.weight": Evil()}, path)
        with pytest.raises(UserError, match=r"holds more than weights, and is not opened"):
            load_model(str(model))
        path.write_bytes(pickle.dumps(Evil()))  # not in a zip, as old versions of torch saved it
        with pytest.raises(UserError, match=r"cannot be loaded"):
            load_model(str(model))
        assert not (tmp_path / "run by the pickle").exists()

    def test_code_beside_a_model_is_not_run(
        self, model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Nor is the user asked whether it may."""
        monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
        edit(
            model / "config.json",
            model_type="own_clip",
            auto_map={"AutoConfig": "mine.Config", "AutoModel": "mine.Model"},
        )
        (model / "mine.py").write_text(f"open({str(model / 'ran')!r}, 'w')\n")
        with pytest.raises(UserError, match=r"code of its own.*is not run here"):
            load_model(str(model))
        assert not (model / "ran").exists()

    @pytest.mark.parametrize("value", ["nan", "inf"])
    def test_weights_that_are_no_numbers(
        self, model: Path, weights: dict[str, torch.Tensor], value: str
    ) -> None:
        name = "vision_model.encoder.layers.1.mlp.fc1.bias"
        broken = weights[name].clone()
        broken[3] = float(value)
        save_file(weights | {name: broken}, model / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(UserError, match=rf"weights {name} hold NaN or infinite"):
            InfluenceModel.from_pretrained(model)

    def test_processor_of_another_size(self, model: Path) -> None:
        settings = json.loads((model / "processor_config.json").read_text())
        settings["image_processor"]["crop_size"] = {"height": 224, "width": 224}
        (model / "processor_config.json").write_text(json.dumps(settings))
        with pytest.raises(UserError, match=r"images of 224 x 224 pixels, but the model takes 48"):
            InfluenceModel.from_pretrained(model)

    def test_processor_of_a_model_in_memory(self) -> None:
        processor = AutoProcessor.from_pretrained(MODEL)
        with pytest.raises(UserError, match=r"tokenizer has 2,048 tokens, but the model embeds 50"):
            InfluenceModel(build("clip").float(), processor)

    def test_tokenizer_without_the_token_that_the_model_reads_at(self, model: Path) -> None:
        """All captions would be one and the same to it."""
        config = json.loads((model / "config.json").read_text())
        config["text_config"]["eos_token_id"] = 2047
        (model / "config.json").write_text(json.dumps(config))
        with pytest.raises(UserError, match=r"reads a caption at its end token, number 2,047"):
            InfluenceModel.from_pretrained(model)

    @pytest.mark.parametrize("name", ["/no/such", "ann", "./no"])
    def test_named_processor_that_is_not_there(self, name: str, hub: HubServer) -> None:
        with pytest.raises(
            UserError, match=rf"`processor='{name}'` cannot be loaded: no such folder"
        ):
            load_model(str(MODEL), processor=name)
        assert hub.requests == []


class TestHub:
    def test_sentence_transformers(
        self, hub: HubServer, api: HfApi, tmp_path: Path, weights: dict[str, torch.Tensor]
    ) -> None:
        shutil.copytree(MODEL, tmp_path / "0_CLIPModel")
        module = {"path": "0_CLIPModel", "type": "sentence_transformers.models.CLIPModel"}
        (tmp_path / "modules.json").write_text(json.dumps([module]))
        api.create_repo("ann/st")
        api.upload_folder(folder_path=tmp_path, repo_id="ann/st")
        assert is_the_demo(load_model("ann/st"), weights)

    def test_pickle_and_another_processor(
        self, hub: HubServer, api: HfApi, model: Path, weights: dict[str, torch.Tensor]
    ) -> None:
        api.create_repo("ann/processor")
        api.upload_folder(folder_path=model, repo_id="ann/processor", ignore_patterns="*.saf*")
        torch.save(weights, without(model, "model.safetensors", *PROCESSOR) / "pytorch_model.bin")
        api.create_repo("ann/bin")
        api.upload_folder(folder_path=model, repo_id="ann/bin")
        with pytest.raises(UserError, match=r"ann/bin.*no processor.*Name one with `processor`"):
            load_model("ann/bin")
        assert is_the_demo(load_model("ann/bin", processor="ann/processor"), weights)
        with pytest.raises(UserError, match=r"ann/nothing.*no such repository"):
            load_model("ann/bin", processor="ann/nothing")


def _picture(folder: Path) -> Path:
    from PIL import Image

    Image.new("RGB", (60, 60), "red").save(folder / "red.png")
    return folder / "red.png"
