"""Checkpoints of open_clip against what the package itself makes of the same inputs.

The folders under `tests/support/open_clip` were written by the package; see `make.py` there.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import HfApi
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from hf_ecif.errors import UserError
from hf_ecif.influence.model import InfluenceModel
from hf_ecif.models.load import load_model
from tests.support import DEMO, ROOT
from tests.support.hub.server import HubServer

FIXTURES = ROOT / "tests/support/open_clip"
NAMES = pytest.mark.parametrize("name", ["openai", "own_text"])
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "processor_config.json")
MakeFolder = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> MakeFolder:
    """A folder of the package, with other values in its config, and the demo's tokenizer."""

    def make(name: str = "openai", *, tokenizer: bool = False, **changes: Any) -> Path:
        path = tmp_path / name
        shutil.copytree(FIXTURES / name, path)
        config = json.loads((path / "open_clip_config.json").read_text())
        for tower, values in changes.items():
            given = config["model_cfg"].get(tower)
            new = {**given, **values} if isinstance(given, dict) else values
            config["model_cfg"][tower] = new
        (path / "open_clip_config.json").write_text(json.dumps(config))
        for file in TOKENIZER if tokenizer else ():
            shutil.copy(DEMO / "model" / file, path)
        return path

    return make


@NAMES
def test_features_are_those_of_the_package(name: str, folder: MakeFolder) -> None:
    model, processor = load_model(str(folder(name, tokenizer=True)))
    expected = load_file(FIXTURES / name / "expected.safetensors")
    assert type(model) is CLIPModel
    with torch.no_grad():
        images = model.get_image_features(expected["pixels"]).pooler_output
        texts = model.get_text_features(expected["tokens"]).pooler_output
    torch.testing.assert_close(images, expected["image_features"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(texts, expected["text_features"], rtol=1e-5, atol=1e-5)
    assert model.logit_scale == expected["logit_scale"]
    assert expected["image_features"].abs().max() > 0.5  # so that the tolerance means something
    assert processor.tokenizer.model_max_length > 0


@NAMES
def test_images_are_made_as_by_the_package(name: str, folder: MakeFolder) -> None:
    _, processor = load_model(str(folder(name, tokenizer=True)))
    expected = load_file(FIXTURES / name / "expected.safetensors")
    image = Image.fromarray(expected["image"].numpy())
    made = processor.image_processor(images=[image], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(made, expected["pixels"][:1], rtol=1e-5, atol=1e-5)


def test_weights_of_a_parallel_training_in_a_pickle(folder: MakeFolder) -> None:
    """As open_clip's own training writes them."""
    path = folder(tokenizer=True)
    weights = load_file(path / "open_clip_model.safetensors")
    before, _ = load_model(str(path))
    (path / "open_clip_model.safetensors").unlink()
    state = {f"module.{name}": value for name, value in weights.items()}
    torch.save({"epoch": 3, "state_dict": state}, path / "open_clip_pytorch_model.bin")
    after, _ = load_model(str(path))
    for name, value in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], value)


def test_tokenizer_is_named_where_there_is_none(folder: MakeFolder) -> None:
    path = folder()
    with pytest.raises(UserError, match=r"open_clip without a tokenizer.*`processor`: openai/clip"):
        load_model(str(path))
    _, processor = load_model(str(path), processor=str(DEMO / "model"))
    assert processor.image_processor.crop_size["height"] == 16  # of open_clip's config
    # Its 2,048 tokens are more than these 64: another model's.
    with pytest.raises(UserError, match=r"tokenizer has 2,048 tokens, but the model embeds 64"):
        InfluenceModel.from_pretrained(path, processor=DEMO / "model")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vision_cfg": {"timm_model_name": "vit_base_patch16_siglip_224"}}, "tower of timm"),
        ({"text_cfg": {"hf_model_name": "roberta-base"}}, "text tower of Hugging Face"),
        ({"vision_cfg": {"layers": [3, 4, 6, 3]}}, "a ResNet"),
        ({"multimodal_cfg": {"layers": 12}}, "CoCa"),
        ({"text_cfg": {"no_causal_mask": True, "pool_type": "last"}}, "looks ahead, .*'last'"),
        ({"vision_cfg": {"pool_type": "avg"}}, "'avg'"),
        ({"init_logit_bias": -10}, "sigmoid loss"),
    ],
)
def test_what_clip_has_no_part_for(folder: MakeFolder, changes: Any, words: str) -> None:
    with pytest.raises(UserError, match=rf"open_clip with .*{words}.*Give a checkpoint.*siglip"):
        load_model(str(folder(tokenizer=True, **changes)))


def test_weights_of_another_model(folder: MakeFolder) -> None:
    path = folder(tokenizer=True, vision_cfg={"layers": 3})
    with pytest.raises(UserError, match=r"it lacks vision_model\.encoder\.layers\.2"):
        load_model(str(path))
    shutil.copy(DEMO / "model/model.safetensors", path / "open_clip_model.safetensors")
    with pytest.raises(UserError, match=r"which CLIPModel has not"):
        load_model(str(path))
    weights = load_file(FIXTURES / "openai/open_clip_model.safetensors")
    weights["visual.proj"] = weights["visual.proj"][:, :4].contiguous()
    save_file(weights, path / "open_clip_model.safetensors")
    (path / "open_clip_config.json").write_bytes(
        (FIXTURES / "openai/open_clip_config.json").read_bytes()
    )
    with pytest.raises(UserError, match=r"visual_projection.weight \(4, 16\) for \(8, 16\)"):
        load_model(str(path))
    (path / "open_clip_config.json").unlink()
    with pytest.raises(UserError, match=r"weights of open_clip without open_clip_config.json"):
        load_model(str(path))


def test_from_the_hub(hub: HubServer, api: HfApi, folder: MakeFolder) -> None:
    api.create_repo("ann/vit")
    api.upload_folder(folder_path=folder(tokenizer=True), repo_id="ann/vit")
    here, _ = load_model(str(FIXTURES / "openai"), processor=str(DEMO / "model"))
    for name in ("hf-hub:ann/vit", "ann/vit"):
        model, _ = load_model(name)
        for key, value in here.state_dict().items():
            assert torch.equal(model.state_dict()[key], value)
