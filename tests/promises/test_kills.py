"""SIGKILL at every write, rename and step of the commands; the same command again ends with the same bytes.

After each kill the second process also does no more steps than the last checkpoint leaves.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

TRAIN = ("train", "../clicks", "--run", "run", "--dim", "2", "--hidden", "4", "--batch-size", "64", "--epochs", "2")
COMPRESS = ("compress", "run", "--method", "shaver", "--out", "small", "--budget", "sparsity=0.5", "--batch-size", "64")
RANKING = ("--backbone", "lightgcn", "--dim", "4", "--layers", "2", "--batch-size", "128", "--epochs", "2")


@dataclass(frozen=True)
class Case:
    """A command, run in a fresh copy of the folder ``start``."""

    arguments: tuple[str, ...]
    start: str = "nothing"


CASES = {
    "encode clicks": Case(("encode", "table", "../clicks.csv", "data", "--threshold", "2")),
    "encode pairs": Case(("encode", "interactions", "../pairs.csv", "data")),
    "train": Case(TRAIN),
    "train lazily": Case((*TRAIN, "--optimizer", "lazy_adam")),
    "train to rank": Case(("train", "../pairs", "--run", "run", *RANKING)),
    "prune by magnitude": Case(
        ("compress", "run", "--out", "small", "--method", "mag_prune", "--budget", "50%", "--budget", "5kB"), "clicks"
    ),
    "prune by attribution": Case((*COMPRESS, "--budget", "50%"), "clicks"),
    "prune a ranking table": Case((*COMPRESS, "--masks", "4"), "pairs"),
    "prune baked vectors": Case((*COMPRESS, "--bake", "--samples", "150"), "pairs"),
}
LONG = {"tune": Case((*COMPRESS, "--tune", "codebook", "--samples", "128"), "clicks"), **CASES}


@dataclass
class Laboratory:
    """Raw logs, data sets and trained runs, and the process that forks a child for each command."""

    folder: Path
    server: subprocess.Popen[str]

    def run(self, case: Case, crash_at: int | None = None) -> tuple[int, Any, list[str]]:
        """Exit status, document without times, and names of the boundaries that were met."""
        count = self.folder / "count"
        count.write_text("")
        environment = {"POCKETREC_CRASH_COUNT": str(count)}
        if crash_at is not None:
            environment["POCKETREC_CRASH_AT"] = str(crash_at)
        arguments = [*case.arguments, "--threads", "1", "--json"]
        request = {"arguments": arguments, "folder": str(self.folder / "work"), "environment": environment}
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        answer = json.loads(self.server.stdout.readline())
        if answer["status"] not in (0, -signal.SIGKILL):
            raise AssertionError(answer)
        document = timeless(json.loads(answer["out"])) if answer["status"] == 0 else None
        return answer["status"], document, count.read_text().splitlines()

    def fresh(self, start: str) -> None:
        """An empty work folder, or one with a trained run."""
        shutil.rmtree(self.folder / "work", ignore_errors=True)
        shutil.copytree(self.folder / "start" / start, self.folder / "work")

    def files(self) -> dict[str, bytes]:
        """All that lies in the work folder but the log of times and locks of the dead; unfinished files too."""
        return {
            str(p.relative_to(self.folder / "work")): p.read_bytes()
            for p in (self.folder / "work").rglob("*")
            if p.is_file() and p.name != "log.journal" and not p.name.endswith("lock")
        }


def timeless(document: Any) -> Any:
    """A document without what the clock says."""
    if isinstance(document, dict):
        return {key: timeless(value) for key, value in document.items() if key != "seconds"}
    return [timeless(value) for value in document] if isinstance(document, list) else document


def write_logs(folder: Path) -> None:
    draw = np.random.default_rng(0)
    rows = [f"{draw.zipf(1.5) % 30},w{draw.integers(6)},{draw.integers(2)}\n" for _ in range(320)]
    (folder / "clicks.csv").write_text("shop,word,label\n" + "".join(rows))
    pairs = sorted({(int(u), int(i)) for u, i in zip(*draw.integers(0, 20, (2, 300)), strict=True)})
    (folder / "pairs.csv").write_text("user,item\n" + "".join(f"{u},{i}\n" for u, i in pairs))


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kills")
    write_logs(folder)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("POCKETREC")} | {"OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(
        [sys.executable, str(Path(__file__).parents[1] / "support" / "forked_command.py"), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        text=True,
    )
    with server:
        made = Laboratory(folder, server)
        (folder / "start" / "nothing").mkdir(parents=True)
        for name, source, training in (("clicks", "table", ()), ("pairs", "interactions", RANKING)):
            made.fresh("nothing")
            made.run(Case(("encode", source, f"../{name}.csv", f"../{name}")))
            made.run(Case(("train", f"../{name}", "--run", "run", *(training or TRAIN[4:]))))
            (folder / "work").rename(folder / "start" / name)
        yield made
        assert server.stdin is not None
        server.stdin.close()


def steps_left(names: list[str], crash_at: int) -> int:
    """Steps after the last file that was renamed into place before the ``crash_at``-th boundary ended the process."""
    renamed = [i for i, name in enumerate(names[:crash_at]) if name == "renamed"]
    return names.count("step") - names[: renamed[-1] + 1 if renamed else 0].count("step")


@pytest.mark.parametrize("name", CASES)
def test_a_kill_at_every_boundary_costs_no_more_than_the_last_checkpoint(laboratory, name):
    case = CASES[name]
    laboratory.fresh(case.start)
    _, expected, names = laboratory.run(case)
    files = laboratory.files()
    for crash_at in range(1, len(names) + 1):
        laboratory.fresh(case.start)
        assert laboratory.run(case, crash_at)[0] == -signal.SIGKILL
        status, document, again = laboratory.run(case)
        assert (status, document) == (0, expected), f"boundary {crash_at}: {names[crash_at - 1]}"
        assert laboratory.files() == files, f"boundary {crash_at}: {names[crash_at - 1]}"
        assert again.count("step") == steps_left(names, crash_at), f"boundary {crash_at}: {names[crash_at - 1]}"
