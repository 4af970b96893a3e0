"""How long does a person take to judge five hundred rows in the browser, and is any verdict lost?

    python -m tests.benchmarks.review                       # of 10,000 rows, then of 100,000
    python -m tests.benchmarks.review --quick               # 20 of 1,492 rows
    python -m tests.benchmarks.review --checkout OTHER --judged 20   # another version beside it

A script with Chromium looks at a pair for a while once its picture and its caption are on the
screen, and presses a key; the pair that comes next is waited for. *Wait* is the time from the key
until another pair is there with its picture, by the page's own clock; *a row* is that and the time
of looking. Then the same without looking, faster than any person. At the end, what the server has
written is compared with what was on the screen at each key, where the version keeps it in a file.

The audit is the embedded one, its rows repeated under numbered captions. The server is `hf-ecif
demo` in a process of its own; its memory is what it takes from the machine after the run.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.request import urlopen

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from playwright.sync_api import Page, sync_playwright
from rich.progress import track

from hf_ecif.app.embedded import open_embedded
from hf_ecif.utils.files import read_json, write_json
from tests.app.visitor import CHROMIUM, FLAGS
from tests.benchmarks.shared import parser, print_table, save, write_table

LOOKING = 0.8  # seconds
# Rows of the audit, how many are judged, and seconds of looking at each.
RUNS = ((10_000, 500, LOOKING), (10_000, 500, 0.0), (100_000, 200, 0.0))
QUICK = ((1_492, 20, LOOKING),)
HERE = Path(__file__).parents[2]
HEADING = (
    *("version", "rows", "judged", "looking, s", "wait, ms: median", "95 %", "longest", "a row, s"),
    *("lost or elsewhere", "charts and cards, s", "server, MB"),
)
# The number of the row that is on the screen with its picture, or null.
SEEN = """() => {
  const detail = document.querySelector('#review-detail'), image = detail?.querySelector('img');
  const row = /row\\s([\\d,]+)/.exec(detail?.innerText ?? '');
  return row && image?.complete && image.naturalWidth ? row[1] : null;
}"""
# Notes how long after each key another row is there.
WATCH = f"""() => {{
  const seen = {SEEN};
  window.waits = [];
  document.addEventListener('keydown', () => {{
    const start = performance.now(), before = seen();
    const look = () => {{
      const now = seen();
      if (now !== null && now !== before) window.waits.push(performance.now() - start);
      else requestAnimationFrame(look);
    }};
    requestAnimationFrame(look);
  }}, true);
}}"""


def main() -> None:
    options = parser(__doc__, "review")
    options.add_argument("--checkout", type=Path, help="another version, measured beside this one")
    options.add_argument("--judged", type=int, default=20, help="rows that are judged in that one")
    chosen = options.parse_args()
    runs = QUICK if chosen.quick else RUNS
    results = [_run("this one", HERE, *run) for run in runs]
    if chosen.checkout:
        size, _, looking = runs[0]
        results.append(_run("the one before", chosen.checkout, size, chosen.judged, looking))
    save(chosen.output, {"runs": runs, "judged before": chosen.judged}, results)
    rows = [_row(result) for result in results]
    title = "Five hundred rows judged in the browser"
    print_table(title, HEADING, rows)
    write_table(chosen.output, title, HEADING, rows, (__doc__ or "").split("\n\n", 2)[2].strip())


def _run(version: str, checkout: Path, size: int, judged: int, looking: float) -> dict[str, Any]:
    with TemporaryDirectory(prefix="hf-ecif-review-") as place:
        audit = write_audit(Path(place) / "audit", size, checkout)
        facts = {"version": version, "rows": size, "judged": judged, "looking": looking}
        return facts | measure(audit, checkout, judged, looking)


def write_audit(folder: Path, count: int, checkout: Path) -> Path:
    """The embedded audit with its rows repeated, each under a caption of its own.

    Its summary is the one that the checkout has, which that version can read.
    """
    with TemporaryDirectory(prefix="hf-ecif-embedded-") as embedded:
        open_embedded(Path(embedded))
        table = pq.read_table(Path(embedded) / "scored")
    (folder / "scored").mkdir(parents=True)
    place = table.schema.get_field_index("text")
    texts = table["text"].to_pylist()
    with pq.ParquetWriter(folder / "scored" / "data.parquet", table.schema) as writer:
        for start in range(0, count, 50):
            rows = np.arange(start, min(start + 50, count))
            part = table.take(pa.array(rows % len(table)))
            new = pa.array([f"{texts[row % len(texts)]}, {row}" for row in rows])
            writer.write_table(part.set_column(place, table.schema.field("text"), new))
    flagged = sum(pq.read_table(folder / "scored", columns=["ecif_flag"])["ecif_flag"].to_pylist())
    facts = read_json(checkout / "spaces_demo" / "audit" / "summary.json")
    facts |= {"rows": count, "scored": count, "flagged": flagged, "kept": count - flagged}
    write_json(facts | {"removed": flagged}, folder / "summary.json")
    return folder


def measure(audit: Path, checkout: Path, judged: int, looking: float) -> dict[str, Any]:
    """Judge rows of an audit in the browser; returns what it took."""
    with serve(audit, checkout) as (url, process), sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": 1300, "height": 900})
        page.set_default_timeout(120_000)
        begin = time.perf_counter()
        page.goto(url)
        page.wait_for_selector("#overview-cards img, #overview-cards .pair")
        page.wait_for_selector("#overview-scatter canvas, #overview-scatter svg")
        opened = time.perf_counter() - begin
        page.get_by_role("tab", name="Review", exact=True).click()
        page.wait_for_function(SEEN)
        page.evaluate(WATCH)
        begin = time.perf_counter()
        seen = [_judge(page, number, looking) for number in track(range(judged), "judging")]
        seconds = time.perf_counter() - begin
        page.wait_for_timeout(3000)
        waits = np.array(page.evaluate("window.waits"))
        memory = _memory(process.pid)
        browser.close()
    return {
        "wait": {
            "median": float(np.median(waits)),
            "95 %": float(np.quantile(waits, 0.95)),
            "longest": float(waits.max()),
        },
        "seconds a row": seconds / judged,
        "lost or elsewhere": _differences(audit / "review.jsonl", seen),
        "seconds until charts and cards": opened,
        "server, MB": memory,
    }


@contextmanager
def serve(audit: Path, checkout: Path) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """`hf-ecif demo` of a checkout, and its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "from hf_ecif.cli.main import main; main()"
    options = ["demo", str(audit), "--no-browser", "--port", str(port)]
    command = [sys.executable, "-c", code, *options]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    process = subprocess.Popen(command, env=environment, cwd=checkout, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_for(url)
        yield url, process
    finally:
        process.terminate()
        process.wait(60)


def _judge(page: Page, number: int, looking: float) -> tuple[int, str]:
    """Look at the pair on the screen, press a key, wait for another one."""
    row = page.evaluate(SEEN)
    if looking:
        page.wait_for_timeout(1000 * looking)
    action, key = ("keep", "k") if number % 3 else ("remove", "r")
    page.keyboard.press(key)
    page.wait_for_function("count => window.waits.length > count", arg=number)
    return int(row.replace(",", "")), action


def _differences(log: Path, seen: list[tuple[int, str]]) -> int | None:
    """Decisions that are missing, or are not on what was on the screen; None without a file."""
    if not log.exists():
        return None
    steps = [json.loads(line) for line in log.read_text().splitlines()[1:]]
    found = [(step["rows"][0], step["action"]) for step in steps]
    return sum(one != other for one, other in zip(seen, found, strict=False)) + abs(
        len(seen) - len(found)
    )


def _wait_for(url: str) -> None:
    for _ in range(600):
        try:
            urlopen(url, timeout=30).close()
            return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError("the server did not start")


def _memory(process: int) -> float:
    """Megabytes that a process has in memory, without what it maps from files."""
    told = Path(f"/proc/{process}/status").read_text().splitlines()
    anonymous = next(line for line in told if line.startswith("RssAnon"))
    return int(anonymous.split()[1]) / 1000


def _row(result: dict[str, Any]) -> list[str]:
    wait = [f"{result['wait'][name]:.0f}" for name in ("median", "95 %", "longest")]
    lost = result["lost or elsewhere"]
    return [
        result["version"],
        f"{result['rows']:,}",
        str(result["judged"]),
        f"{result['looking']:.1f}",
        *wait,
        f"{result['seconds a row']:.2f}",
        "not kept" if lost is None else str(lost),
        f"{result['seconds until charts and cards']:.1f}",
        f"{result['server, MB']:.0f}",
    ]


if __name__ == "__main__":
    if shutil.which("chromium") is None:
        sys.exit("This needs chromium: make chromium.")
    main()
