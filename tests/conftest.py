"""Tiny models and batches, in float64 and with fixed seeds."""

import os

from tests.support.hub import HOME, HUB

# The clients read these when they are imported. Only `tests/hub` leaves the offline mode.
os.environ["HF_ENDPOINT"] = HUB.url
os.environ["HF_HOME"] = HOME.name
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

from collections.abc import Callable

import pytest
import torch
from torch.nn.functional import normalize
from transformers import CLIPConfig, CLIPModel

from hf_ecif.engine.features import Features
from hf_ecif.engine.objectives import Embeddings
from tests.support.commands import data, run  # noqa: F401  # fixtures, for all folders of tests
from tests.support.hub.fixtures import api, hub, running_hub  # noqa: F401

# A script that is run by hand, with open_clip in an environment of its own.
collect_ignore = ["support/open_clip/make.py"]
VOCABULARY, TOKENS, PIXELS = 50, 12, 16


def build_clip(attention: str = "sdpa", seed: int = 0) -> CLIPModel:
    """Two layers of width 16 and an 8-dimensional projection per tower, all weights random."""
    tower = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    tokens = {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": TOKENS,
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": VOCABULARY - 1,
    }
    config = CLIPConfig(
        text_config={**tower, **tokens},
        vision_config={**tower, "image_size": PIXELS, "patch_size": 8},
        projection_dim=8,
        logit_scale_init_value=1.5,
        attn_implementation=attention,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = CLIPModel(config).double().eval()
    with torch.no_grad():  # a fresh model embeds all rows nearly alike
        for name, value in model.named_parameters():
            if name != "logit_scale":
                value += 0.25 * torch.randn(value.shape, generator=generator, dtype=value.dtype)
    return model


def build_features(count: int, seed: int = 0) -> Features:
    """Captions of random length, closed by the end token and padded, and images of noise."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, VOCABULARY - 1, (count, TOKENS), generator=generator)
    last = torch.randint(3, TOKENS, (count, 1), generator=generator)
    position = torch.arange(TOKENS)
    tokens = tokens.masked_fill(position > last, 1).masked_fill(position == last, VOCABULARY - 1)
    tokens[:, 0] = 0
    pixels = torch.randn(count, 3, PIXELS, PIXELS, generator=generator, dtype=torch.float64)
    return Features(
        {"input_ids": tokens, "attention_mask": (position <= last).long()},
        {"pixel_values": pixels},
    )


def build_batch(count: int = 8, dim: int = 5, scale: float = 6.0, seed: int = 0) -> Embeddings:
    """Random unit embeddings in which a pair's two sides are somewhat alike."""
    generator = torch.Generator().manual_seed(seed)
    text, noise = torch.randn(2, count, dim, generator=generator, dtype=torch.float64)
    return Embeddings(
        normalize(text, dim=1),
        normalize(text + noise, dim=1),
        torch.tensor(scale, dtype=torch.float64),
    )


@pytest.fixture
def tiny_clip() -> CLIPModel:
    """A random float64 `CLIPModel` with the default attention."""
    return build_clip()


@pytest.fixture
def tiny_features() -> Features:
    """Inputs of `tiny_clip` for 10 pairs."""
    return build_features(10)


@pytest.fixture
def tiny_batch() -> Embeddings:
    """Embeddings of 8 pairs, and a scale."""
    return build_batch()


@pytest.fixture(scope="session")
def make_clip() -> Callable[..., CLIPModel]:
    return build_clip


@pytest.fixture(scope="session")
def make_features() -> Callable[..., Features]:
    return build_features


@pytest.fixture(scope="session")
def make_batch() -> Callable[..., Embeddings]:
    return build_batch
