"""Rebuild the embedded model, data set and audit from freely licensed emoji packages.

The demo needs a real CLIP and real image-text pairs that are small enough to ship. Emoji are
both: every concept is drawn by several vendors, and Unicode names and tags describe it in words.
A tiny ``CLIPModel`` is pretrained on three vendors (Twemoji, OpenMoji, Fluent) and the data set
is a fourth (Noto) that the model has never seen, which is how users work: a pretrained CLIP, and
new data of doubtful quality.

    python spaces_demo/build_assets.py                # all, about 40 minutes on 2 cores
    python spaces_demo/build_assets.py --only data    # the parquet files alone, a minute
    python spaces_demo/build_assets.py --only audit   # what the app shows first, a minute

Sources come from the npm registry through ``npm pack``; see NOTICE for their licences.
Needs ``npm`` and the Python package ``resvg-py`` besides hf_ecif.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import random
import re
import shutil
import subprocess
import tarfile
import tempfile
import time
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

HERE = Path(__file__).parent
PACKAGES = {
    "noto": "emoji-datasource-google@16.0.0",
    "twemoji": "emoji-datasource-twitter@16.0.0",
    "openmoji": "openmoji@17.0.0",
    "fluent": "fluentui-emoji@1.3.0",
    "names": "emojibase-data@17.0.0",
}
COMPONENT_GROUP = 2  # skin tones and hair: parts of emoji, not concepts
IMAGE_SIZE = 48
RENDER_SIZE = 64
SPLIT_ROWS = {"validation": 200, "test": 200}
NOISE_RATE = 0.2


@dataclass
class Concept:
    """One emoji: its Unicode name and tags, its category and every vendor's drawing of it."""

    hexcode: str
    name: str
    tags: list[str]
    group: str
    subgroup: str
    images: dict[str, Image.Image] = field(default_factory=dict)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=["data", "model", "audit"], help="build one of them")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "hf_ecif" / "emoji")
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument("--steps", type=int, default=1300, help="pretraining steps")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    if args.only != "audit":
        concepts = read_concepts(args.cache)
        if args.only != "model":
            build_data(concepts, args.output / "data", args.seed)
        if args.only != "data":
            build_model(concepts, args.output / "model", args.steps, args.seed)
    if args.only in (None, "audit"):
        build_audit(args.output)


# ---------------------------------------------------------------------------------- sources


def read_concepts(cache: Path) -> list[Concept]:
    """Concepts that Noto draws, with all the drawings that the other vendors have of them."""
    folders = {key: download(spec, cache) for key, spec in PACKAGES.items()}
    groups = json.loads((folders["names"] / "meta" / "groups.json").read_text())
    entries = json.loads((folders["names"] / "en" / "data.json").read_text())
    images = {
        "noto": index_by_code(folders["noto"] / "img" / "google" / "64"),
        "twemoji": index_by_code(folders["twemoji"] / "img" / "twitter" / "64"),
        "openmoji": index_by_code(folders["openmoji"] / "color" / "svg"),
        "fluent-flat": index_by_name(folders["fluent"] / "icons" / "flat"),
        "fluent-modern": index_by_name(folders["fluent"] / "icons" / "modern"),
    }
    concepts = []
    for entry in entries:
        if entry.get("group", COMPONENT_GROUP) == COMPONENT_GROUP:
            continue
        concept = Concept(
            hexcode=entry["hexcode"],
            name=entry["label"],
            tags=[tag for tag in entry.get("tags", []) if tag.lower() != entry["label"].lower()],
            group=groups["groups"][str(entry["group"])],
            subgroup=groups["subgroups"][str(entry["subgroup"])],
        )
        for vendor, files in images.items():
            key = slug(concept.name) if vendor.startswith("fluent") else code(concept.hexcode)
            if key in files:
                concept.images[vendor] = read_image(files[key])
        if "noto" in concept.images:
            concepts.append(concept)
    return concepts


def download(spec: str, cache: Path) -> Path:
    """Folder of an unpacked npm package, fetched once."""
    folder = cache / spec.replace("@", "-")
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        packed = subprocess.run(
            ["npm", "pack", "--silent", spec], cwd=cache, check=True, capture_output=True, text=True
        )
        archive = cache / packed.stdout.strip().splitlines()[-1]
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        with tarfile.open(archive) as tar:
            tar.extractall(partial, filter="data")
        partial.rename(folder)
        archive.unlink()
    return folder / "package"


def index_by_code(folder: Path) -> dict[str, Path]:
    return {code(path.stem): path for path in sorted(folder.iterdir())}


def index_by_name(folder: Path) -> dict[str, Path]:
    """Fluent names its files by the Unicode name; people carry a suffix for the skin tone."""
    return {path.stem.removesuffix("-default"): path for path in sorted(folder.iterdir())}


def code(hexcode: str) -> str:
    """Vendors disagree about the variation selector FE0F, so it is left out on both sides."""
    return hexcode.upper().replace("-FE0F", "")


def slug(name: str) -> str:
    ascii_name = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", ascii_name.replace("'", "")).strip("-")


def read_image(path: Path) -> Image.Image:
    """The drawing on white, RGB, `RENDER_SIZE` pixels wide."""
    if path.suffix == ".svg":
        import resvg_py

        data = bytes(resvg_py.svg_to_bytes(svg_string=path.read_text(), width=RENDER_SIZE))
    else:
        data = path.read_bytes()
    drawing = Image.open(io.BytesIO(data)).convert("RGBA")
    if drawing.size != (RENDER_SIZE, RENDER_SIZE):
        drawing = drawing.resize((RENDER_SIZE, RENDER_SIZE), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", drawing.size, "white")
    return Image.alpha_composite(canvas, drawing).convert("RGB")


# ------------------------------------------------------------------------------------- data


def build_data(concepts: list[Concept], output: Path, seed: int) -> None:
    """Write `train`, `validation` and `test` as parquet, with wrong captions in `train`."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    rng = random.Random(seed)
    rows = [row(concept, rng) for concept in rng.sample(concepts, len(concepts))]
    # Some territories fly the flag of their country: one drawing, which must not be in two splits.
    rows = list({item["image"]["bytes"]: item for item in rows}.values())
    held_out = sum(SPLIT_ROWS.values())
    splits = {
        "validation": rows[: SPLIT_ROWS["validation"]],
        "test": rows[SPLIT_ROWS["validation"] : held_out],
        "train": misalign(rows[held_out:], rng),
    }
    features = Features(
        {
            "image": ImageFeature(),
            "text": Value("string"),
            "category": Value("string"),
            "subcategory": Value("string"),
            "emoji": Value("string"),
            "original_text": Value("string"),
            "is_misaligned": Value("bool"),
            "noise": Value("string"),
        }
    )
    output.mkdir(parents=True, exist_ok=True)
    for split, split_rows in splits.items():
        target = output / f"{split}.parquet"
        Dataset.from_list(split_rows, features=features).to_parquet(target)
        wrong = sum(r["is_misaligned"] for r in split_rows)
        print(f"{target}: {len(split_rows)} rows, {wrong} misaligned, {target.stat().st_size:,} B")


def row(concept: Concept, rng: random.Random) -> dict:
    text = caption(concept, rng.sample(concept.tags, min(3, len(concept.tags))))
    return {
        "image": {"bytes": png(concept.images["noto"]), "path": f"{concept.hexcode}.png"},
        "text": text,
        "category": concept.group,
        "subcategory": concept.subgroup,
        "emoji": "".join(chr(int(part, 16)) for part in concept.hexcode.split("-")),
        "original_text": text,
        "is_misaligned": False,
        "noise": "none",
    }


def caption(concept: Concept, tags: list[str]) -> str:
    return ", ".join([concept.name, *tags])


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.quantize(256, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def misalign(rows: list[dict], rng: random.Random) -> list[dict]:
    """Give `NOISE_RATE` of the rows another row's caption, half of them within the category."""
    chosen = rng.sample(range(len(rows)), round(NOISE_RATE * len(rows)))
    for position, i in enumerate(chosen):
        kind = "cat" if position < len(chosen) // 2 else "random"
        donors = [
            other["original_text"]
            for other in rows
            if other["original_text"] != rows[i]["original_text"]
            and (kind == "random" or other["category"] == rows[i]["category"])
        ]
        rows[i] |= {"text": rng.choice(donors), "is_misaligned": True, "noise": kind}
    return rows


# ------------------------------------------------------------------------------------ model


def build_model(concepts: list[Concept], output: Path, steps: int, seed: int) -> None:
    """Pretrain a tiny CLIP on every vendor but Noto, report its recall on Noto, save it."""
    from transformers import CLIPProcessor

    torch.manual_seed(seed)
    rng = random.Random(seed)
    tokenizer = build_tokenizer(concepts)
    model = build_clip(tokenizer)
    seen = [c for c in concepts if set(c.images) - {"noto"}]
    train(model, tokenizer, seen, steps, rng)

    images = torch.stack([pixels(c.images["noto"]) for c in concepts])
    captions_rng = random.Random(seed)
    texts = [caption(c, captions_rng.sample(c.tags, min(3, len(c.tags)))) for c in concepts]
    for k in (1, 10):
        print(f"Noto recall@{k}: {recall(model, tokenizer, images, texts, k):.3f}")

    CLIPProcessor(image_processor=build_image_processor(), tokenizer=tokenizer).save_pretrained(
        output
    )
    model.save_pretrained(output)
    print(f"{output}: {(output / 'model.safetensors').stat().st_size:,} B")


def build_tokenizer(concepts: list[Concept]):
    """Byte-pair encoding of the names and tags, lower case, ``[BOS] ... [EOS]`` as CLIP has it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    # [EOS] must not be 2: for that one number, CLIPModel takes the text's embedding where the
    # largest number stands instead, as the first CLIP checkpoints need it.
    specials = {"bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]"}
    bpe = Tokenizer(models.BPE(unk_token=None))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=2048,
        special_tokens=[*specials.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([caption(c, c.tags) for c in concepts], trainer)
    bos, eos = bpe.token_to_id("[BOS]"), bpe.token_to_id("[EOS]")
    bpe.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", bos), ("[EOS]", eos)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, model_max_length=32, **specials)


def build_image_processor():
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def build_clip(tokenizer):
    from transformers import CLIPConfig, CLIPModel

    shared = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4}
    config = CLIPConfig(
        text_config=shared
        | {
            "num_hidden_layers": 2,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": tokenizer.model_max_length,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config=shared | {"num_hidden_layers": 5, "image_size": IMAGE_SIZE, "patch_size": 12},
        projection_dim=64,
    )
    return CLIPModel(config)


def train(model, tokenizer, concepts: list[Concept], steps: int, rng: random.Random) -> None:
    """InfoNCE between captions and two vendors' drawings of a concept, and between the drawings.

    The third pair teaches what vendors have in common, which is what an unseen vendor shares.
    """
    drawings, owner = [], []
    for i, concept in enumerate(concepts):
        for vendor, image in concept.images.items():
            if vendor != "noto":
                drawings.append(pixels(image, RENDER_SIZE))
                owner.append(i)
    stack = torch.stack(drawings)
    of_concept: list[list[int]] = [[] for _ in concepts]
    for j, i in enumerate(owner):
        of_concept[i].append(j)

    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.2}, {"params": rest, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
    )
    model.train()
    start = time.perf_counter()
    for step, batch in zip(range(steps), batches(len(concepts), 256, rng), strict=False):
        warmup = min(1.0, (step + 1) / 100)
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * warmup * 0.5 * (1 + math.cos(math.pi * step / steps))
        views = [two_views(of_concept[i], rng) for i in batch]
        first = augment(stack[[a for a, _ in views]])
        second = augment(stack[[b for _, b in views]])
        texts = [random_caption(concepts[i], rng) for i in batch]
        tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        output = model(
            pixel_values=torch.cat([first, second]),
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
        )
        view_a, view_b = output.image_embeds.chunk(2)
        scale = model.logit_scale.exp()
        loss = (
            info_nce(scale * output.text_embeds @ view_a.T)
            + info_nce(scale * output.text_embeds @ view_b.T)
            + info_nce(10.0 * view_a @ view_b.T)
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100))
        if step % 50 == 0:
            seconds = time.perf_counter() - start
            print(f"step {step}: loss {loss.item():.3f}, {seconds:.0f} s", flush=True)
    model.eval()


def batches(count: int, size: int, rng: random.Random) -> Iterator[list[int]]:
    while True:
        order = list(range(count))
        rng.shuffle(order)
        yield from (order[i : i + size] for i in range(0, count - size + 1, size))


def two_views(drawings: list[int], rng: random.Random) -> tuple[int, int]:
    first, second = rng.sample(drawings, 2) if len(drawings) > 1 else drawings * 2
    return first, second


def random_caption(concept: Concept, rng: random.Random) -> str:
    """The name with some of its tags; now and then tags alone, so that tags mean something."""
    tags = rng.sample(concept.tags, min(rng.randint(0, 4), len(concept.tags)))
    if len(tags) > 1 and rng.random() < 0.2:
        return ", ".join(tags)
    return caption(concept, tags)


def augment(images: torch.Tensor) -> torch.Tensor:
    """Random affine map, colour and contrast jitter, blur and background of a batch in [-1, 1]."""
    n = len(images)
    angle = (torch.rand(n) - 0.5) * 0.5
    zoom = 0.85 + 0.4 * torch.rand(n)
    stretch = 1 + 0.2 * (torch.rand(n) - 0.5)
    cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
    shift = (torch.rand(2, n) - 0.5) * 0.24
    affine = torch.stack(
        [
            torch.stack([cos * stretch, -sin, shift[0]], dim=1),
            torch.stack([sin, cos / stretch, shift[1]], dim=1),
        ],
        dim=1,
    )
    grid = F.affine_grid(affine, (n, 3, IMAGE_SIZE, IMAGE_SIZE), align_corners=False)
    # White is the background; sampling outside must give it, and zero padding gives zero.
    views = 1 - F.grid_sample(1 - images, grid, align_corners=False)

    contrast = 0.7 + 0.6 * torch.rand(n, 1, 1, 1)
    brightness = 0.3 * (torch.rand(n, 1, 1, 1) - 0.5)
    mix = torch.eye(3) + 0.15 * torch.randn(n, 3, 3)
    mix = mix / mix.sum(dim=2, keepdim=True)
    gray = (torch.rand(n, 1, 1) < 0.1).float()
    mix = gray * torch.full((3, 3), 1 / 3) + (1 - gray) * mix
    # The map acts on the distance from white, so that the background stays what it is.
    views = 1 - torch.einsum("ncd,ndhw->nchw", mix, (1 - views)) * contrast
    views = views + brightness * (torch.rand(n, 1, 1, 1) < 0.5).float()

    blurred = F.avg_pool2d(F.pad(views, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    views = torch.where(torch.rand(n, 1, 1, 1) < 0.3, blurred, views)
    return views.clamp(-1, 1)


def info_nce(logits: torch.Tensor) -> torch.Tensor:
    target = torch.arange(len(logits))
    return 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))


def pixels(image: Image.Image, size: int = IMAGE_SIZE) -> torch.Tensor:
    """(3, size, size) in [-1, 1], resampled as the saved image processor does."""
    resized = image.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(resized, dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)


@torch.no_grad()
def recall(model, tokenizer, images: torch.Tensor, texts: list[str], k: int) -> float:
    """Share of captions whose own image is among the k nearest of all images."""
    tokens = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
    output = model(
        pixel_values=images,
        input_ids=tokens["input_ids"],
        attention_mask=tokens["attention_mask"],
    )
    similarity = output.text_embeds @ output.image_embeds.T
    rank = (similarity > similarity.diagonal()[:, None]).sum(dim=1)
    return (rank < k).float().mean().item()


# ------------------------------------------------------------------------------------ audit


def build_audit(place: Path) -> None:
    """Audit the data as ``make run`` does, and keep the columns: the images are in the data."""
    from hf_ecif.app.embedded import save_columns
    from hf_ecif.applications.audit import AuditRequest, run_audit
    from hf_ecif.config import InfluenceConfig

    with tempfile.TemporaryDirectory() as aside:
        request = AuditRequest(
            model=str(place / "model"),
            dataset=str(place / "data"),
            query=str(place / "data"),
            truth_column="is_misaligned",
            output=Path(aside, "audit"),
        )
        run_audit(request, InfluenceConfig())
        save_columns(request.output, place)


if __name__ == "__main__":
    main()
