"""Two workers with one thread each against one: the same study, on a local cluster and by processes on one folder.

    python bench/two_workers.py

Independent trainings and their measuring, one thread each; fresh folders and stores; the arms take turns. On the
cluster the workers have started; a second arm is plain processes that share the study's folder, from their start. A
third arm is what the machine allows: processes that share nothing, with half of the trainings each.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from pocketrec.study.plan import Plan, parse
from pocketrec.study.runner import run_study

RESULTS = Path(__file__).parent / "results"
ARMS = ("cluster", "processes", "apart")
PLAN = {
    "budgets": ["sparsity=0.8"],
    "seeds": [0],
    "trials": 0,
    "data": {"clicks": {"source": "synthetic", "rows": 60_000}},
    "method": {"mag_prune": {}},
}


WARM = parse({**PLAN, "seeds": [0, 1], "backbone": {"fm": {"training": {"epochs": 1}}}}, "warm")
"""A small study, by which workers have started and imported what they need."""


def plan(cells: int, epochs: int) -> Plan:
    """As many independent trainings as ``cells``."""
    training = {"epochs": epochs, "patience": epochs, "batch_size": 512}
    backbones = {
        f"deepfm-{i}": {"is": "deepfm", "dim": 8 + i, "hidden": [64, 64], "training": training} for i in range(cells)
    }
    return parse({**PLAN, "backbone": backbones}, "two workers")


def on_nodes(workers: int, study: Plan, folder: Path) -> float:
    """Seconds of the study on a local cluster of so many nodes."""
    from pocketrec.distributed.cluster import helpers
    from pocketrec.study.driver import on_cluster

    with helpers(f"local:{workers}"):
        run_study(WARM, folder.with_name("warm"), workers=on_cluster("auto"))
        started = time.perf_counter()
        run_study(study, folder, workers=on_cluster("auto"))
        return time.perf_counter() - started


def by_processes(workers: int, arguments: argparse.Namespace, folder: Path) -> float:
    """Seconds of the study by so many processes that share its folder."""
    return started([command(arguments, arguments.cells, folder)] * workers)


def apart(workers: int, arguments: argparse.Namespace, folder: Path) -> float:
    """Seconds of the study's trainings by so many processes, each with its part of them in a folder of its own."""
    folders = [folder.with_name(f"apart-{i}") for i in range(workers)]
    for own in folders:
        shutil.copytree(folder, own)
    return started([command(arguments, arguments.cells // workers, own) for own in folders])


def command(arguments: argparse.Namespace, cells: int, folder: Path) -> list[str]:
    """A process that works on a folder."""
    sizes = ["--cells", str(cells), "--epochs", str(arguments.epochs)]
    return [sys.executable, __file__, *sizes, "--process", str(folder)]


def started(commands: list[list[str]]) -> float:
    """Seconds from the start of all processes to the end of the last."""
    start = time.perf_counter()
    running = [subprocess.Popen(c, start_new_session=True) for c in commands]
    if any([process.wait() for process in running]):
        raise SystemExit("a process failed")
    return time.perf_counter() - start


def trial(arm: str, workers: int, arguments: argparse.Namespace) -> float:
    """One measurement, checked: every cell is there once."""
    study = plan(arguments.cells, arguments.epochs)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_study(WARM, folder / "encoded")
        (folder / "study").mkdir()
        (folder / "encoded" / "data").rename(folder / "study" / "data")
        if arm == "apart":
            return apart(workers, arguments, folder / "study")
        run = (
            on_nodes(workers, study, folder / "study")
            if arm == "cluster"
            else by_processes(workers, arguments, folder / "study")
        )
        counts = run_study(study, folder / "study")
        if counts != {"done": 2 * arguments.cells, "failed": 0}:
            raise SystemExit(f"expected every cell once, but got {counts}")
        return run


def main() -> None:
    """Measure and write bench/results/two_workers.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cells", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--trial", nargs=2, metavar=("ARM", "WORKERS"), help=argparse.SUPPRESS)
    parser.add_argument("--process", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.process:
        run_study(plan(arguments.cells, arguments.epochs), arguments.process)
        return
    if arguments.trial:
        print(json.dumps(trial(arguments.trial[0], int(arguments.trial[1]), arguments)))
        return
    seconds: dict[tuple[str, int], list[float]] = {(arm, workers): [] for arm in ARMS for workers in (1, 2)}
    for _ in range(arguments.rounds):
        for arm, workers in seconds:
            sizes = ["--cells", str(arguments.cells), "--epochs", str(arguments.epochs)]
            again = [sys.executable, __file__, *sizes, "--trial", arm, str(workers)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(again, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            seconds[arm, workers].append(json.loads(done.stdout))
            print(arm, workers, seconds[arm, workers][-1], flush=True)
    write(seconds, arguments)


def write(seconds: dict[tuple[str, int], list[float]], arguments: argparse.Namespace) -> None:
    """Medians and ratios."""
    lines = [
        "# Two workers against one",
        "",
        f"`python bench/two_workers.py --rounds {arguments.rounds} --cells {arguments.cells} "
        f"--epochs {arguments.epochs}`:",
        f"{arguments.cells} independent trainings of {arguments.epochs} epochs on 60,000 synthetic clicks, each then",
        "pruned and measured, one thread a worker, fresh folders and stores, the arms in turns. Seconds of each round:",
        "",
        "| arm | one worker | two workers | median | ratio of medians |",
        "| --- | --- | --- | ---: | ---: |",
    ]
    for arm in ARMS:
        one, two = seconds[arm, 1], seconds[arm, 2]
        medians = statistics.median(one), statistics.median(two)
        shown = (", ".join(f"{s:.1f}" for s in arm_seconds) for arm_seconds in (one, two))
        lines.append(
            f"| {arm} | {' | '.join(shown)} | {medians[0]:.1f} / {medians[1]:.1f} | {medians[0] / medians[1]:.2f} |"
        )
    lines += [
        "",
        "`cluster`: `local:1` and `local:2`, whose workers have started and imported torch before, by a small study.",
        "`processes`: one and two `pocketrec bench` on one folder, from their start to their end.",
        "`apart`: one and two of them on own folders, with half of the trainings each: what the machine allows.",
        "",
        f"Load average at the end: {psutil.getloadavg()[0]:.1f} on {psutil.cpu_count()} processors.",
        "",
    ]
    (RESULTS / "two_workers.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
