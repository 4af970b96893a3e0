"""Do verdicts hold on data as they are built: several captions an image, copies, stock phrases?

    python -m tests.benchmarks.structure            # 13 kinds of data; --seeds for more than one
    python -m tests.benchmarks.structure --quick    # five of them, small, one seed

Pairs of the embedded data with their right captions are drawn, and made into data of a kind:

* *1, 3, 5 captions*: a row each; 15 % of the captions are exchanged (*by row*), or all captions of
  15 % of the images (*by image*), as when two lists are out of step. Further captions of an image
  are some of its keywords, so that many say little;
* *copies*: 15 % wrong, every row once, twice, four times; or each with a JPEG of its image;
* *stock phrase*: one sentence under 10 or 60 % of the images, 15 % of the other rows wrong;
* *placeholder*: one picture over 10 % of the captions, 15 % of the other rows wrong;
* *cut off*: half of the captions begin with more than the model reads, 15 % of all wrong.

Every audit is without a query. Ranking, flags and rate are judged on the rows without a finding;
how many rows have the right finding, and how many others have any, is told beside it. Should hold:
the ranking is level with NegCLIPLoss or better; copies change neither rate nor ranking; every row
of a stock phrase, a placeholder or an opening that hides the rest has its finding, and no other.

Choices were made on seeds 0 to 3 of other draws; here seeds are 100 and on.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from datasets import Dataset, Image, disable_progress_bars
from PIL import Image as PILImage
from rich.console import Console
from rich.progress import track
from sklearn.metrics import average_precision_score

import hf_ecif
from hf_ecif.config import InfluenceConfig
from hf_ecif.data.loading import load_rows
from hf_ecif.utils.progress import silent
from tests.benchmarks.shared import DEMO, parser, print_table, save, write_table

IMAGES, QUICK_IMAGES = 300, 200
WRONG = 0.15
SEEDS, FIRST_SEED = 1, 100
TITLE = "Verdicts on data as they are built"
NOTE = (__doc__ or "").split("\n\n", 2)[2].strip()
HEADING = (
    "data",
    "rows",
    "wrong",
    "estimated rate",
    "flagged",
    "precision",
    "recall",
    "AUPRC",
    "NegCLIPLoss",
    "findings",
    "findings elsewhere",
)
OPENINGS = ("a picture of {}", "this is {}", "{}, drawn", "here: {}")
STOCK = "click here to see more of our pictures"
LONG = (
    "All drawings of this set were made by one team for use on any screen and in any print, and "
    "whoever uses them is asked to name the team and the licence beside them; this one, which is "
    "among the first, shows the following: "
)

Row = dict[str, Any]  # image, text, whether it is wrong, and the finding it should have


@dataclass(frozen=True)
class Kind:
    """Data of a kind, made from right pairs ``(image, caption)``."""

    name: str
    make: Callable[[list[tuple[Any, str]], random.Random], list[Row]]


def main() -> None:
    options = parser(__doc__, "structure")
    options.add_argument("--seeds", type=int, default=SEEDS)
    options.add_argument("--only", nargs="+", choices=[kind.name for kind in KINDS])
    args = options.parse_args()
    disable_progress_bars()
    names = args.only or (QUICK if args.quick else [kind.name for kind in KINDS])
    images, seeds = (QUICK_IMAGES, 1) if args.quick else (IMAGES, args.seeds)
    results = []
    for kind in track([k for k in KINDS if k.name in names], "Audit", console=Console(stderr=True)):
        runs = [run(kind, images, FIRST_SEED + seed) for seed in range(seeds)]
        results.append({"data": kind.name, "runs": runs})
    settings = {"images": images, "seeds": seeds, "first seed": FIRST_SEED, "wrong": WRONG}
    save(args.output, settings | {"config": InfluenceConfig().to_dict()}, results)
    draw(results, args.output.with_suffix(".png"))
    table = (TITLE, HEADING, [*table_rows(results)])
    print_table(*table)
    write_table(args.output, *table, note=NOTE)


def run(kind: Kind, images: int, seed: int) -> dict[str, float]:
    """An audit of such data, beside the truth."""
    chance = random.Random(f"{images} {seed}")
    pairs = load_rows(str(DEMO / "data"), "train").cast_column("image", Image(decode=False))
    drawn = chance.sample(range(len(pairs)), images)
    right = [(pairs[row]["image"], pairs[row]["original_text"]) for row in drawn]
    rows = kind.make(right, chance)
    chance.shuffle(rows)
    data = Dataset.from_list(rows).cast_column("image", Image())
    result = hf_ecif.audit(
        DEMO / "model",
        data.select_columns(["image", "text"]),
        config=InfluenceConfig(seed=seed),
        suggest=False,
        progress=silent,
    )
    return figures(rows, result.dataset, result.summary.noise.rate)


def figures(rows: list[Row], scored: Dataset, rate: float) -> dict[str, float]:
    """What is said of the rows, beside what is so."""
    wrong = np.array([row["wrong"] for row in rows])
    should = np.array([row["finding"] or "" for row in rows])
    told = np.array([kind or "" for kind in scored["ecif_finding"]])
    plain = should == ""
    flag = np.array(scored["ecif_flag"], dtype=bool)
    probability = np.array(scored["ecif_noise_probability"], dtype=float)
    loss = -np.array(scored["neg_clip_loss"], dtype=float)
    hits = int((flag & wrong & plain).sum())
    return {
        "rows": len(rows),
        "wrong": float(wrong[plain].mean()),
        "rate": rate,
        "flagged": float(flag[plain].mean()),
        "precision": hits / max(int(flag[plain].sum()), 1),
        "recall": hits / int(wrong[plain].sum()),
        "AUPRC": float(average_precision_score(wrong[plain], np.nan_to_num(probability[plain]))),
        "NegCLIPLoss": float(average_precision_score(wrong[plain], loss[plain])),
        "findings": float((told == should)[~plain].mean()) if (~plain).any() else float("nan"),
        "findings elsewhere": float((told[plain] != "").mean()),
    }


# ------------------------------------------------------------------------------ kinds of data


def rows_of(pairs: list[tuple[Any, str]]) -> list[Row]:
    blank: Row = {"wrong": False, "finding": None}
    return [{"image": image, "text": text} | blank for image, text in pairs]


def exchange(rows: list[Row], chance: random.Random, share: float = WRONG) -> list[Row]:
    """The rows, with a share of their captions moved on among each other."""
    rows = [dict(row) for row in rows]
    chosen = chance.sample(rows, round(share * len(rows)))
    texts = [row["text"] for row in chosen]
    for row, text in zip(chosen, [*texts[1:], texts[0]], strict=True):
        row |= {"text": text, "wrong": True}
    return rows


def captions(text: str, count: int, chance: random.Random) -> list[str]:
    """The caption, and others of some of its keywords."""
    words, told = [word.strip() for word in text.split(",")], [text]
    while len(told) < count:
        some = ", ".join(chance.sample(words, chance.randint(1, len(words))))
        told.append(some if some not in told else chance.choice(OPENINGS).format(some))
        told = list(dict.fromkeys(told))
    return told


def several(count: int, by_image: bool) -> Callable[..., list[Row]]:
    """So many captions an image, a row each."""

    def make(pairs: list[tuple[Any, str]], chance: random.Random) -> list[Row]:
        if by_image:
            rows = exchange(rows_of(pairs), chance)
            told = [row | {"text": t} for row in rows for t in captions(row["text"], count, chance)]
            return [dict(row) for row in told]
        all_pairs = [(image, t) for image, text in pairs for t in captions(text, count, chance)]
        return exchange(rows_of(all_pairs), chance)

    return make


def copied(count: int) -> Callable[..., list[Row]]:
    """Every row so many times."""

    def make(pairs: list[tuple[Any, str]], chance: random.Random) -> list[Row]:
        return [dict(row) for row in exchange(rows_of(pairs), chance) for _ in range(count)]

    return make


def near_copies(pairs: list[tuple[Any, str]], chance: random.Random) -> list[Row]:
    """Every row, and once more with a JPEG of its image."""
    rows = exchange(rows_of(pairs), chance)
    return [*rows, *(row | {"image": as_jpeg(row["image"])} for row in rows)]


def with_stock_phrase(share: float) -> Callable[..., list[Row]]:
    """One sentence under a share of the images."""

    def make(pairs: list[tuple[Any, str]], chance: random.Random) -> list[Row]:
        rows = rows_of(pairs)
        count = round(share * len(rows))
        stock = [row | {"text": STOCK, "finding": "stock_phrase"} for row in rows[:count]]
        return [*stock, *exchange(rows[count:], chance)]

    return make


def with_placeholder(pairs: list[tuple[Any, str]], chance: random.Random) -> list[Row]:
    """One picture over a tenth of the captions."""
    rows = rows_of(pairs)
    count = len(rows) // 10
    grey = encode(PILImage.new("RGB", (64, 64), "silver"), "PNG")
    same = [row | {"image": grey, "finding": "placeholder_image"} for row in rows[:count]]
    return [*same, *exchange(rows[count:], chance)]


def cut_off(pairs: list[tuple[Any, str]], chance: random.Random) -> list[Row]:
    """Every other caption begins with more than the model reads."""
    rows = exchange(rows_of(pairs), chance)
    for row in rows[::2]:
        row |= {"text": LONG + row["text"], "finding": "truncated_equal"}
    return rows


def as_jpeg(cell: dict[str, Any]) -> dict[str, Any]:
    drawing = PILImage.open(io.BytesIO(cell["bytes"])).convert("RGBA")
    white = PILImage.new("RGBA", drawing.size, "white")
    return encode(PILImage.alpha_composite(white, drawing).convert("RGB"), "JPEG", quality=75)


def encode(picture: PILImage.Image, form: str, **options: Any) -> dict[str, Any]:
    stream = io.BytesIO()
    picture.save(stream, form, **options)
    return {"bytes": stream.getvalue(), "path": None}


KINDS = (
    Kind("1 caption", several(1, by_image=False)),
    Kind("3 captions, by row", several(3, by_image=False)),
    Kind("3 captions, by image", several(3, by_image=True)),
    Kind("5 captions, by row", several(5, by_image=False)),
    Kind("5 captions, by image", several(5, by_image=True)),
    Kind("copies x1", copied(1)),
    Kind("copies x2", copied(2)),
    Kind("copies x4", copied(4)),
    Kind("near copies", near_copies),
    Kind("stock phrase, 10%", with_stock_phrase(0.1)),
    Kind("stock phrase, 60%", with_stock_phrase(0.6)),
    Kind("placeholder, 10%", with_placeholder),
    Kind("cut off, 50%", cut_off),
)
QUICK = ["3 captions, by image", "copies x1", "copies x2", "stock phrase, 10%", "cut off, 50%"]


# -------------------------------------------------------------------------------- the report


def table_rows(results: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    for result in results:
        runs = result["runs"]
        yield (
            result["data"],
            *(shown([run[name] for run in runs], name) for name in HEADING_KEYS),
        )


HEADING_KEYS = (
    "rows",
    "wrong",
    "rate",
    "flagged",
    "precision",
    "recall",
    "AUPRC",
    "NegCLIPLoss",
    "findings",
    "findings elsewhere",
)
AS_NUMBER = {"rows": "{:.0f}", "AUPRC": "{:.3f}", "NegCLIPLoss": "{:.3f}"}


def shown(values: list[float], name: str) -> str:
    """Mean over the seeds."""
    mean = float(np.mean(values))
    return "–" if np.isnan(mean) else AS_NUMBER.get(name, "{:.1%}").format(mean)


def draw(results: list[dict[str, Any]], path: Any) -> None:
    """AUPRC of the probability on that of NegCLIPLoss; estimated on true rates."""
    canvas, (left, right) = plt.subplots(1, 2, figsize=(10, 4.5), layout="constrained")
    for number, result in enumerate(results):
        style = {"marker": "os^"[number // 10], "linestyle": "", "color": f"C{number % 10}"}
        for axis, x, y in ((left, "NegCLIPLoss", "AUPRC"), (right, "wrong", "rate")):
            points = [[run[x], run[y]] for run in result["runs"]]
            axis.plot(*np.transpose(points), label=result["data"], **style)
    for axis in (left, right):
        axis.axline((0.5, 0.5), slope=1, color="grey", linewidth=0.8)
    left.set(xlabel="AUPRC of NegCLIPLoss", ylabel="AUPRC of the probability")
    left.set(xlim=(0.4, 1), ylim=(0.4, 1))
    right.set(xlabel="wrong", ylabel="estimated", xlim=(0, 0.4), ylim=(0, 0.4))
    right.legend(fontsize=7)
    canvas.savefig(path, dpi=110)
    plt.close(canvas)


if __name__ == "__main__":
    main()
