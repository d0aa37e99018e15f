"""Look-up, scoring, budget and epoch of this checkout against another one, in turns.

Each figure is measured by a fresh process for either checkout, in turns (A B, B A, ...), with one thread, by the public
interface alone, on the same data set and the same files (those that the other checkout wrote). A figure is the median
over rounds of the ratio within a round; the spread is that of the ratios.

    git worktree add /tmp/before COMMIT && (cd /tmp/before && python setup.py build_ext --inplace)
    python bench/against.py --before /tmp/before --rounds 7
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "bench" / "results" / "against.md"

SHARED = """
import json, sys, time
from pathlib import Path
import numpy as np, torch
import pocketrec as pr

torch.set_num_threads(1)
folder = Path(sys.argv[1])


def least(work, times):
    work()
    taken = []
    for _ in range(times):
        started = time.process_time()
        work()
        taken.append(time.process_time() - started)
    return min(taken)
"""

PREPARE = """
source = pr.sources.Synthetic(rows=120_000, cardinalities=(20_000, 10_000, 3_000, 1_000, 200, 50))
data = pr.encode(source, None, folder / "data")
model = pr.train(pr.backbones.DeepFM(dim=16, hidden=(64, 64)), data, folder / "base", pr.Training(epochs=1))
for name, method, budget, index in (
    ("compact", pr.methods.MagPrune(), "20%", "compact"),
    ("direct", pr.methods.MagPrune(), "20%", "direct"),
    ("transform", pr.methods.RateDistortion(), "5%", "compact"),
):
    pr.compress(model, data, method, budget, index=index).save(folder / name)
"""

MEASURE = """
data = pr.Dataset.open(folder / "data")
model = pr.load(folder / "base", data)
rows = np.random.default_rng(0).integers(0, data.schema.rows, (4096, data.schema.width))
ids = np.ascontiguousarray(data.test.ids[:4096]) if hasattr(data.test, "ids") else rows
found = {}
for name in ("compact", "direct", "transform"):
    reader = pr.open(folder / name)
    for batch in (1, 64, 2048):
        part = ids[:batch]
        repeats = 2000 // batch + 20
        found[f"look-up and score, {name}, batch {batch}"] = least(
            lambda: [reader.logits(part) for _ in range(repeats)], 7
        )
    found[f"open and first score, {name}"] = least(lambda: pr.open(folder / name).logits(ids[:1]), 5)
found["scoring run of Shaver"] = least(lambda: pr.compress(model, data, pr.methods.Shaver(), "5%"), 2)
found["scoring run of RateDistortion"] = least(lambda: pr.compress(model, data, pr.methods.RateDistortion(), "5%"), 2)
import tempfile
with tempfile.TemporaryDirectory() as kept:
    for method in (pr.methods.Shaver(), pr.methods.RateDistortion()):
        pr.compress(model, data, method, "10%", run=kept)
        name = type(method).__name__
        found[f"another budget, {name}"] = least(lambda: pr.compress(model, data, method, "5%", run=kept), 3)
        found[f"a budget for the file, {name}"] = least(lambda: pr.compress(model, data, method, "400kB", run=kept), 3)
for optimizer in ("adam", "lazy_adam"):
    training = pr.Training(epochs=1, optimizer=optimizer)
    backbone = pr.backbones.DeepFM(dim=16, hidden=(64, 64))
    found[f"epoch, {optimizer}"] = least(lambda: pr.train(backbone, data, None, training), 2)
print(json.dumps(found))
"""


def run(root: Path, code: str, folder: Path) -> str:
    """What a process of a checkout prints."""
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SHARED + code, str(folder)]
    return subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout


def main() -> None:
    """Measure, print and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="the other checkout, its library built")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    roots = {"before": given.before.resolve(), "now": ROOT}
    ratios: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        run(roots["before"], PREPARE, Path(folder))
        for turn in range(given.rounds):
            order = ["before", "now"] if turn % 2 else ["now", "before"]
            found = {which: json.loads(run(roots[which], MEASURE, Path(folder))) for which in order}
            for name, value in found["now"].items():
                ratios.setdefault(name, []).append(value / found["before"][name])
                seconds.setdefault(name, []).append(value)
            print(f"round {turn + 1} of {given.rounds}", file=sys.stderr)
    rows = [
        f"| {name} | {1e3 * statistics.median(seconds[name]):.2f} | {statistics.median(r):.3f} | "
        f"{min(r):.3f} - {max(r):.3f} |"
        for name, r in ratios.items()
    ]
    head = [
        "# This checkout against an earlier one",
        "",
        f"`python bench/against.py --rounds {given.rounds}`: {__doc__}",
    ]
    table = ["| work | CPU ms now | ratio to before, median | spread |", "| --- | ---: | ---: | ---: |", *rows, ""]
    RESULT.write_text("\n".join([*head, "", *table]), encoding="utf-8")
    print(RESULT.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
