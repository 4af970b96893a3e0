"""Small models of open_clip and what the package itself makes of a few inputs.

`python tests/support/open_clip/make.py` writes the folders beside this file anew. It needs
open_clip_torch 3.3.0, which is no dependency of hf_ecif, and so an environment of its own:
`python -m venv elsewhere; elsewhere/bin/pip install open_clip_torch==3.3.0 torch torchvision`.

Each folder is one that open_clip writes (config and weights), and beside it `expected.safetensors`:
an image of bytes and the pixels that the package's transform makes of it, tokens, and the features
of both.
"""

import json
from pathlib import Path
from typing import Any

import torch
from open_clip import CLIP, CustomTextCLIP
from open_clip.transform import image_transform
from PIL import Image
from safetensors.torch import save_file

HERE = Path(__file__).parent
WORDS, CONTEXT = 64, 12
VISION = {"layers": 2, "width": 16, "head_width": 8, "patch_size": 8, "image_size": 16}
TEXT = {"context_length": CONTEXT, "vocab_size": WORDS, "width": 16, "heads": 2, "layers": 2}
MODELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # As OpenAI's: quick_gelu, images resized by their shorter edge and cropped.
    "openai": ({"embed_dim": 8, "quick_gelu": True, "vision_cfg": VISION, "text_cfg": TEXT}, {}),
    # As LAION's largest and newer ones: gelu, scales of layers, a text tower of its own.
    "own_text": (
        {
            "embed_dim": 8,
            "custom_text": True,
            "vision_cfg": {**VISION, "mlp_ratio": 3.0, "ls_init_value": 0.5},
            "text_cfg": {**TEXT, "pool_type": "eos", "eos_id": 5, "norm_kwargs": {"eps": 1e-3}},
        },
        {
            "mean": [0.5, 0.4, 0.3],
            "std": [0.2, 0.3, 0.4],
            "resize_mode": "squash",
            "interpolation": "bilinear",
        },
    ),
}


def main() -> None:
    for name, (config, preprocess) in MODELS.items():
        torch.manual_seed(0)
        folder = HERE / name
        folder.mkdir(exist_ok=True)
        model = build(config)
        written = {"model_cfg": config, "preprocess_cfg": preprocess}
        (folder / "open_clip_config.json").write_text(json.dumps(written, indent=2) + "\n")
        save_file(model.state_dict(), folder / "open_clip_model.safetensors")
        save_file(expect(model, config, preprocess), folder / "expected.safetensors")


def build(config: dict[str, Any]) -> torch.nn.Module:
    """A random model, its scales of layers random, too."""
    options = {key: value for key, value in config.items() if key != "custom_text"}
    made = (CustomTextCLIP if config.get("custom_text") else CLIP)(**options).eval()
    with torch.no_grad():
        for value in made.parameters():
            value += 0.1 * torch.randn_like(value)
    return made


def expect(
    model: Any, config: dict[str, Any], preprocess: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Inputs, and what the package makes of them."""
    last = config["text_cfg"].get("eos_id", WORDS - 1)
    tokens = torch.zeros(4, CONTEXT, dtype=torch.long)  # padded as open_clip does
    for row, length in enumerate((2, 5, 8, CONTEXT)):
        tokens[row, :length] = torch.randint(6, WORDS - 2, (length,))
        tokens[row, 0], tokens[row, length - 1] = WORDS - 2, last
    image = torch.randint(0, 256, (21, 34, 3), dtype=torch.uint8)
    transform = image_transform(16, is_train=False, **preprocess)
    pixels = torch.stack([transform(Image.fromarray(image.numpy())), *torch.randn(3, 3, 16, 16)])
    with torch.no_grad():
        return {
            "image": image,
            "pixels": pixels,
            "tokens": tokens,
            "image_features": model.encode_image(pixels),
            "text_features": model.encode_text(tokens),
            "logit_scale": model.logit_scale.detach().clone(),
        }


if __name__ == "__main__":
    main()
