"""Rungs of `tests.benchmarks.ladder`: right pairs, ever farther from what the model knows.

Emoji and icons of other vendors come as npm packages, which are fetched when they are first needed:
`emojione` and `emojione-monotone` are CC BY 4.0, Material Design Icons Apache-2.0.
"""

from __future__ import annotations

import io
import json
import random
import re
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from transformers import AutoConfig, AutoModel, set_seed

from hf_ecif.config import InfluenceConfig
from hf_ecif.data.loading import load_rows
from hf_ecif.influence.model import InfluenceModel
from hf_ecif.influence.rows import Rows
from tests.benchmarks.detection_cells import digits
from tests.benchmarks.shared import DEMO

FEATURES = Features({"image": ImageFeature(), "text": Value("string"), "category": Value("string")})
SPLITS = ("train", "validation", "test")
MOST_PAIRS = 1500  # of a rung
PIXELS = 96
# As a translation would look to the model: letters that it has never read.
ALPHABET = str.maketrans("abcdefghijklmnopqrstuvwxyz", "αβγδεζηθικλμνξοπρστυφχψωжш")


class Pair(NamedTuple):
    image: Image.Image
    text: str
    category: str


@dataclass(frozen=True)
class Rung:
    """Right pairs, read.

    Attributes:
        model: not fitted.
        rows: the pairs, in random order.
    """

    model: InfluenceModel
    rows: Rows


@cache
def read_rung(name: str, assets: Path) -> Rung:
    """A rung by its name.

    Args:
        name: one of `RUNGS`.
        assets: folder of the fetched packages.
    """
    pairs = list(RUNGS[name](assets))
    random.Random(0).shuffle(pairs)
    columns = dict(zip(FEATURES, zip(*pairs[:MOST_PAIRS], strict=True), strict=True))
    model = untrained() if name == "untrained" else InfluenceModel.from_pretrained(DEMO / "model")
    return Rung(model, model.read(Dataset.from_dict(columns, features=FEATURES)))


def untrained() -> InfluenceModel:
    """The demo's model with random weights."""
    set_seed(0)
    given = InfluenceModel.from_pretrained(DEMO / "model")
    model = AutoModel.from_config(AutoConfig.from_pretrained(DEMO / "model")).eval()
    return InfluenceModel(model, given.processor, InfluenceConfig())


def of_home(assets: Path) -> Iterator[Pair]:
    """Drawings in the style of the demo, with their own captions."""
    for split in SPLITS:
        for row in load_rows(str(DEMO / "data"), split):
            yield Pair(row["image"].convert("RGB"), row["original_text"], row["category"])


def of_alphabet(assets: Path) -> Iterator[Pair]:
    for pair in of_home(assets):
        yield pair._replace(text=pair.text.lower().translate(ALPHABET))


def of_digits(assets: Path) -> Iterator[Pair]:
    for split in digits().values():
        for row in split:
            yield Pair(row["image"], row["text"], row["text"])


def of_emoji(package: str) -> Callable[[Path], Iterator[Pair]]:
    """Another vendor's drawings of the same concepts, with the same captions."""

    def pairs(assets: Path) -> Iterator[Pair]:
        known = {slug(pair.text.split(", ")[0]): pair for pair in of_home(assets)}
        for name, image in icons(package, assets, lambda name: name in known):
            yield known[name]._replace(image=image)

    return pairs


def of_icons(assets: Path) -> Iterator[Pair]:
    """Interface icons, captioned by their names; variants of another icon are left out."""
    variant = re.compile(r"outline|-off$|variant|-\d")
    names = [name for name in read_package("mdi", assets)["icons"] if not variant.search(name)]
    chosen = set(random.Random(0).sample(names, MOST_PAIRS))
    for name, image in icons("mdi", assets, chosen.__contains__):
        yield Pair(image, name.replace("-", " "), name.split("-")[0])


RUNGS: dict[str, Callable[[Path], Iterator[Pair]]] = {
    "home": of_home,
    "another vendor": of_emoji("emojione"),
    "monochrome": of_emoji("emojione-monotone"),
    "icons": of_icons,
    "digits": of_digits,
    "unknown alphabet": of_alphabet,
    "untrained": of_home,
}
AT_HAND = ("home", "digits", "unknown alphabet", "untrained")  # without any package


def icons(
    package: str, assets: Path, wanted: Callable[[str], bool]
) -> Iterator[tuple[str, Image.Image]]:
    """Names and drawings of an icon set, black on white where they have no colours."""
    import resvg_py  # for this benchmark alone

    content = read_package(package, assets)
    for name, icon in content["icons"].items():
        if not wanted(name):
            continue
        width, height = (icon.get(side, content.get(side, 16)) for side in ("width", "height"))
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{PIXELS}" height="{PIXELS}" '
            f'viewBox="{icon.get("left", 0)} {icon.get("top", 0)} {width} {height}" color="black">'
            f"{icon['body']}</svg>"
        )
        drawing = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg))))
        white = Image.new("RGBA", drawing.size, "white")
        yield name, Image.alpha_composite(white, drawing.convert("RGBA")).convert("RGB")


@cache
def read_package(name: str, assets: Path) -> dict[str, Any]:
    """An icon set, fetched once."""
    file = assets / f"{name}.json"
    if not file.exists():
        assets.mkdir(parents=True, exist_ok=True)
        pack = ["npm", "pack", "--silent", f"@iconify-json/{name}"]
        packed = subprocess.run(pack, cwd=assets, check=True, capture_output=True, text=True)
        archive = assets / packed.stdout.strip().splitlines()[-1]
        with tarfile.open(archive) as tar:
            member = tar.extractfile("package/icons.json")
            assert member is not None
            file.write_bytes(member.read())
        archive.unlink()
    return dict(json.loads(file.read_text()))


def slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("’", "").replace("'", "")).strip("-")
