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
backbone = pr.backbones.DeepFM(dim=16, hidden=(64, 64))
model = pr.train(backbone, data, folder / sys.argv[2], pr.Training(epochs=1))
for name, method, budget, index in (
    ("compact", pr.methods.MagPrune(), "20%", "compact"),
    ("direct", pr.methods.MagPrune(), "20%", "direct"),
    ("transform", pr.methods.RateDistortion(), "5%", "compact"),
):
    pr.compress(model, data, method, budget, index=index).save(folder / name)
"""

MEASURE = """
import tempfile
data = pr.Dataset.open(folder / "data")
backbone = pr.backbones.DeepFM(dim=16, hidden=(64, 64))
model = pr.train(backbone, data, folder / sys.argv[2], pr.Training(epochs=1))
ids = np.ascontiguousarray(data.test.ids[:4096])
kept = tempfile.TemporaryDirectory()
work = {}
for name in ("compact", "direct", "transform"):
    reader = pr.open(folder / name)
    for batch in (1, 64, 2048):
        part, repeats = ids[:batch], 2000 // batch + 20
        score = lambda reader=reader, part=part, repeats=repeats: [reader.logits(part) for _ in range(repeats)]
        work[f"look-up and score, {name}, batch {batch}"] = score, 9
    work[f"open and first score, {name}"] = lambda name=name: pr.open(folder / name).logits(ids[:1]), 15
for method in (pr.methods.Shaver(), pr.methods.RateDistortion()):
    name = type(method).__name__
    work[f"scoring run of {name}"] = lambda method=method: pr.compress(model, data, method, "5%"), 5
    for budget, words in (("5%", "another budget"), ("400kB", "a budget for the file")):
        again = lambda method=method, budget=budget: pr.compress(model, data, method, budget, run=kept.name)
        work[f"{words}, {name}"] = again, 5
for optimizer in ("adam", "lazy_adam"):
    training = pr.Training(epochs=1, optimizer=optimizer)
    work[f"epoch, {optimizer}"] = lambda training=training: pr.train(backbone, data, None, training), 5
print(json.dumps({name: least(*given) for name, given in work.items() if sys.argv[3] in name}))
"""


def run(which: str, root: Path, code: str, folder: Path, only: str) -> str:
    """What a process of a checkout prints."""
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SHARED + code, str(folder), which, only]
    return subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> None:
    """Measure, print and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="the other checkout, its library built")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", default="", help="work whose name holds this; nothing is written then")
    given = parser.parse_args()
    roots = {"before": given.before.resolve(), "now": ROOT}
    ratios: dict[str, list[float]] = {}
    seconds: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        run("prepare", roots["before"], PREPARE, Path(folder), "")
        for turn in range(given.rounds):
            order = ["before", "now"] if turn % 2 else ["now", "before"]
            found = {which: json.loads(run(which, roots[which], MEASURE, Path(folder), given.only)) for which in order}
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
    page = "\n".join([*head, "", *table])
    print(page)
    if not given.only:
        RESULT.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
