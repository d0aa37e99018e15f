"""What the harness costs: the same training bare, and as a cell with its lock, store, journal and ledger.

    python bench/harness_overhead.py

One thread, both in one process, in turns, fresh folders. Measuring, which a cell also does, is taken off its time.
Since the same training takes more or less time from one minute to the next, the cell's own account is there, too: what
of its time is neither its training loop nor measuring, and what of the loop goes into logs and checkpoints.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import torch

from pocketrec.data.dataset import Dataset
from pocketrec.study import cells
from pocketrec.study.plan import Plan, parse
from pocketrec.study.recipe import ORIGINAL, build_backbone, build_training
from pocketrec.study.runner import JournalState, in_process, prepare, run_study
from pocketrec.training.run import Run
from pocketrec.training.steps import Checkpoint

RESULTS = Path(__file__).parent / "results"
SMALL = {"training": {"epochs": 1}}
Cost = tuple[float, float]
"""Elapsed and processor seconds."""


def plan(epochs: int, backbone: dict[str, Any] | None = None) -> Plan:
    """One training."""
    training = {"epochs": epochs, "patience": epochs, "batch_size": 512}
    return parse(
        {
            "budgets": ["sparsity=0.8"],
            "trials": 0,
            "data": {"clicks": {"source": "synthetic", "rows": 60_000}},
            "backbone": backbone or {"deepfm": {"dim": 16, "hidden": [64, 64], "training": training}},
            "method": {"random": {}},
        },
        "overhead",
    )


def timed(work: Callable[[], Any]) -> Cost:
    """What ``work`` takes."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall, time.process_time() - cpu


def bare(study: Plan, data: Dataset) -> Cost:
    """The training alone; nothing is kept."""
    recipe = study.backbones["deepfm"]
    training = build_training("ctr", recipe.stages({}))

    def work() -> None:
        with Run(None, seed=0, threads=1) as run:
            run.fit("original", build_backbone(recipe, {}).build(data, 0), data, training)

    return timed(work)


@contextmanager
def noted(owner: Any, name: str, costs: list[Cost]) -> Iterator[None]:
    """Inside the block, every call of ``owner.name`` adds what it took to ``costs``."""
    plain = getattr(owner, name)

    def call(*args: Any, **settings: Any) -> Any:
        found: list[Any] = []
        costs.append(timed(lambda: found.append(plain(*args, **settings))))
        return found[0]

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, plain)


def total(costs: list[Cost]) -> Cost:
    """Their sum."""
    return sum(w for w, _ in costs), sum(c for _, c in costs)


def as_cell(study: Plan, folder: Path) -> tuple[Cost, Cost]:
    """The training as a cell, without its measuring; and what of this the harness takes, by the cell's own account."""
    context = prepare(study, folder, None)
    known = JournalState.read(folder)
    known.failed.update({context.grid.key(j): "left out" for j in context.grid.jobs if j.method != ORIGINAL})
    measuring: list[Cost] = []
    loops: list[Cost] = []
    kept: list[Cost] = []
    with (
        noted(cells, "measure", measuring),
        noted(import_module("pocketrec.training.loop"), "fit", loops),
        noted(Checkpoint, "save", kept),
        noted(Run, "log", kept),
    ):
        whole = timed(lambda: in_process(context, known, lambda stage, done, total, figures: None))
    if len(known.done) != 1 or len(measuring) != 2 or len(loops) != 1:
        raise SystemExit(f"expected one cell, trained once and measured twice, but got {len(known.done)}")
    measured, loop, beside = total(measuring), total(loops), total(kept)
    wall, cpu = (w - m for w, m in zip(whole, measured, strict=True))
    own = wall - loop[0] + beside[0], cpu - loop[1] + beside[1]
    return (wall, cpu), own


def main() -> None:
    """Measure and write bench/results/harness_overhead.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    study = plan(arguments.epochs)
    pairs: list[tuple[Cost, tuple[Cost, Cost]]] = []
    with tempfile.TemporaryDirectory() as name:
        run_study(plan(1, {"deepfm": SMALL}), Path(name) / "warm")
        encoded = Path(name) / "warm" / "data"
        data = study.data["clicks"].open(encoded, 0)
        for number in range(arguments.rounds):
            folder = Path(name) / str(number)
            folder.mkdir()
            (folder / "data").symlink_to(encoded)
            arms = [lambda: bare(study, data), lambda f=folder: as_cell(study, f)]
            if number % 2:
                second, first = arms[1](), arms[0]()
            else:
                first, second = arms[0](), arms[1]()
            pairs.append((first, second))
            print(
                f"bare {first[0]:.3f} s ({first[1]:.3f} CPU)  cell {second[0][0]:.3f} s ({second[0][1]:.3f} CPU), "
                f"of which the harness {second[1][0]:.3f} s ({second[1][1]:.3f} CPU)",
                flush=True,
            )
    write(pairs, arguments)


def write(pairs: list[tuple[Cost, tuple[Cost, Cost]]], arguments: argparse.Namespace) -> None:
    """Medians, and the median of the paired differences."""
    lines = [
        "# What the harness costs",
        "",
        f"`python bench/harness_overhead.py --rounds {arguments.rounds} --epochs {arguments.epochs}`: DeepFM of width",
        f"16 on 60,000 synthetic clicks, {arguments.epochs} epochs, one thread; the training bare, and as a cell of a",
        "study with lock, store, journal, ledger and predictions, without its measuring; in turns in one process.",
        "",
        "| | bare, s | cell, s | difference, s | of the training |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    account: list[str] = []
    for at, label in enumerate(("elapsed", "processor")):
        one, two = [bare[at] for bare, _ in pairs], [whole[at] for _, (whole, _) in pairs]
        extra = statistics.median(b - a for a, b in zip(one, two, strict=True))
        base = statistics.median(one)
        lines.append(
            f"| {label}, median | {base:.2f} | {statistics.median(two):.2f} | {extra:+.3f} | {extra / base:+.2%} |"
        )
        base = min(one)
        extra = min(two) - base
        lines.append(f"| {label}, least | {base:.2f} | {min(two):.2f} | {extra:+.3f} | {extra / base:+.2%} |")
    for at, label in enumerate(("elapsed", "processor")):
        own, whole = [o[at] for _, (_, o) in pairs], [w[at] for _, (w, _) in pairs]
        median, share = statistics.median(own), statistics.median(o / (w - o) for o, w in zip(own, whole, strict=True))
        worst = max(o / (w - o) for o, w in zip(own, whole, strict=True))
        account.append(f"| {label} | {median:.3f} | {share:.2%} | {worst:.2%} |")
    lines += [
        "",
        "By the cell's own account: its time outside the training loop and measuring, and in the loop's logs and",
        "checkpoints.",
        "",
        "| | harness, s, median | of the training, median | most |",
        "| --- | ---: | ---: | ---: |",
        *account,
        "",
        "The median difference is that of pairs. The cost is per cell: a longer training pays the same.",
        "",
        f"Load average at the end: {psutil.getloadavg()[0]:.1f} on {psutil.cpu_count()} processors.",
        "",
    ]
    (RESULTS / "harness_overhead.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
