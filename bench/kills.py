"""SIGKILL at random moments of a real encode, train and compress, then the same command again: the same bytes?

Run from the repository's root: ``POCKETREC_DATA=... python bench/kills.py [--kills 20] [--jobs 1]``. MovieLens-1M, all
rows; DeepFM of width 16 with a 64x64 head, 2 epochs; Shaver to 5 %; one thread. Moments are uniform over the time of
the uninterrupted command, from a fixed seed; a process that ends before its moment is tried again with the next one.
Steps checkpoint every second instead of every minute, so that commands this short have checkpoints to be killed in.
Lost time is processor time: killed process + second process - uninterrupted one. Writes ``bench/results/kills.md`` and
``.csv``.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from configs import RESULTS, raw

COMMAND = (
    "from pocketrec.training.run import Run; Run.__init__.__kwdefaults__['checkpoint_seconds'] = 1.0; "
    "from pocketrec.cli import main; main()"
)
TIMES = ("lock", "log.journal")
"""Files that say how the work went: no part of the result."""


@dataclass(frozen=True)
class Verb:
    """One command: its arguments for a folder of results, and what has to lie there before."""

    name: str
    arguments: Callable[[Path], list[str]]
    prepare: Callable[[Path], object] = lambda folder: None


@dataclass(frozen=True)
class Kill:
    """One kill and the second process; times in seconds, ``lost`` in processor seconds."""

    verb: str
    number: int
    moment: float
    lost: float
    equal: bool


def verbs(work: Path) -> list[Verb]:
    """Encode, train and compress; each reads what the one before left in ``work``."""
    ratings = str(raw("ml-1m-ctr", "ratings.parquet"))
    columns = ["--label", "label", "--drop", "rating", "--dense", "user_id,item_id,age,occupation"]
    one = ["--threads", "1"]

    def trained(folder: Path) -> None:
        shutil.copytree(work / "train", folder / "run", ignore=shutil.ignore_patterns(*TIMES))

    return [
        Verb("encode", lambda out: ["encode", "table", ratings, str(out / "data"), *columns]),
        Verb("train", lambda out: ["train", str(work / "encode" / "data"), "--run", str(out), "--hidden", "64,64",
                                   "--epochs", "2", *one]),
        Verb("compress", lambda out: ["compress", str(out / "run"), "--out", str(out / "files"), "--budget", "5%",
                                      *one], trained),
    ]  # fmt: skip


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    """The command in a new process."""
    environment = {k: v for k, v in os.environ.items() if k != "POCKETREC_CACHE"} | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", COMMAND, *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def finish(process: subprocess.Popen[bytes], kill_after: float | None = None) -> tuple[int, float]:
    """Exit status of the process, which is killed after so many seconds, and the processor seconds that it took."""
    timer = threading.Timer(kill_after or 0.0, process.kill)
    if kill_after is not None:
        timer.start()
    _, status, used = os.wait4(process.pid, 0)
    timer.cancel()
    process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, used.ru_utime + used.ru_stime


def content(folder: Path) -> dict[str, str]:
    """SHA-256 of every file of a result; hidden and unfinished ones count too."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file() and p.name not in TIMES
    }


def uninterrupted(verb: Verb, work: Path) -> tuple[dict[str, str], float, float]:
    """Result, seconds and processor seconds of the command that nobody kills."""
    folder = work / verb.name
    verb.prepare(folder)
    begin = time.perf_counter()
    status, used = finish(start(verb.arguments(folder)))
    if status:
        raise SystemExit(f"{verb.name} exits with {status} without being killed")
    return content(folder), time.perf_counter() - begin, used


def moments(verb: Verb, number: int, seconds: float) -> Iterator[float]:
    """When to kill: first, and after each process that ended too early."""
    generator = np.random.default_rng([number, *verb.name.encode()])
    while True:
        yield float(generator.uniform(0, seconds))


def attempt(verb: Verb, work: Path, number: int, whole: tuple[dict[str, str], float, float]) -> Kill:
    """Kill the command once, run it again, compare."""
    expected, seconds, used = whole
    folder, times = work / f"{verb.name}-{number}", moments(verb, number, seconds)
    while True:
        moment = next(times)
        verb.prepare(folder)
        status, before = finish(start(verb.arguments(folder)), moment)
        if status == -signal.SIGKILL:
            break
        shutil.rmtree(folder)
    status, after = finish(start(verb.arguments(folder)))
    kill = Kill(verb.name, number, round(moment, 2), round(before + after - used, 2),
                status == 0 and content(folder) == expected)  # fmt: skip
    shutil.rmtree(folder)
    return kill


def report(kills: list[Kill], whole: dict[str, tuple[float, float]]) -> str:
    """The table."""
    lines = [
        "# Killed at random moments, run again",
        "",
        "MovieLens-1M; see the head of `bench/kills.py`. Equal: SHA-256 of every file of the result is that of the "
        "uninterrupted command, and no other file is left. A second process pays its start again; that is a part of "
        "what is lost.",
        "",
        "| command | uninterrupted, s | processor, s | kills | equal | lost, median, s | lost, most, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, (seconds, used) in whole.items():
        mine = [k for k in kills if k.verb == name]
        lost = [k.lost for k in mine]
        lines.append(
            f"| {name} | {seconds:.1f} | {used:.1f} | {len(mine)} | {sum(k.equal for k in mine)} "
            f"| {statistics.median(lost):.1f} | {max(lost):.1f} |"
        )
    machine = f"Python {platform.python_version()}, numpy {np.__version__}, {platform.machine()}, {os.cpu_count()} CPUs"
    return "\n".join([*lines, "", f"{machine}; other work ran beside it where processor time and time differ.", ""])


def main() -> None:
    """Kill, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20, help="of each command")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    options = parser.parse_args()
    kills: list[Kill] = []
    whole: dict[str, tuple[float, float]] = {}
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(options.jobs) as pool:
        work = Path(place)
        for verb in verbs(work):
            result = uninterrupted(verb, work)
            whole[verb.name] = result[1:]
            kills += pool.map(lambda n, v=verb, r=result: attempt(v, work, n, r), range(options.kills))
            print(report([k for k in kills if k.verb == verb.name], {verb.name: result[1:]}).splitlines()[-3])
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "kills.md").write_text(report(kills, whole))
    with (RESULTS / "kills.csv").open("w", newline="") as file:
        rows = csv.DictWriter(file, list(asdict(kills[0])), lineterminator="\n")
        rows.writeheader()
        rows.writerows(asdict(k) for k in kills)
    print(report(kills, whole))
    if not all(k.equal for k in kills):
        raise SystemExit("a result differs")


if __name__ == "__main__":
    main()
