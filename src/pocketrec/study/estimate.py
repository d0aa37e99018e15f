"""What a study will take, before it is run: the grid, the time, the disk.

Trainings are estimated from what the study's journal says of the same backbone on the same data, else from a few timed
steps; every training is assumed to run all its epochs, so patience makes the study shorter, never longer.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

from pocketrec.data.dataset import Dataset
from pocketrec.models.backbone import Model, noise
from pocketrec.study.cells import Workspace
from pocketrec.study.jobs import Grid, Job
from pocketrec.study.plan import Plan
from pocketrec.study.recipe import ORIGINAL, Range, build_backbone, build_training
from pocketrec.study.runner import JournalState
from pocketrec.training.run import torch_threads

STEPS = 3
"""Timed steps of a training that the journal does not know."""

OPTIMIZER_SHARE = 1.3
"""A step with its update, over loss and gradient alone."""

COMPRESSION_EPOCHS = 1.0
"""What a method that trains nothing takes, in epochs of the backbone."""


@dataclass(frozen=True)
class EstimateLine:
    """Jobs of one data set, backbone and method: all of them, the missing ones, seconds and bytes of these."""

    data: str
    backbone: str
    method: str
    jobs: int
    missing: int
    seconds: float
    bytes: int


@dataclass(frozen=True)
class Estimate:
    """The grid, line by line."""

    name: str
    lines: tuple[EstimateLine, ...]

    @property
    def seconds(self) -> float:
        """Of all lines together."""
        return sum(line.seconds for line in self.lines)

    @property
    def bytes(self) -> int:
        """Of all lines together."""
        return sum(line.bytes for line in self.lines)

    def to_json(self) -> dict[str, Any]:
        """The document of ``pocketrec bench --dry-run --json``."""
        grid = [vars(line) for line in self.lines]
        jobs, missing = (sum(getattr(line, n) for line in self.lines) for n in ("jobs", "missing"))
        return {
            "study": self.name, "jobs": jobs, "missing": missing, "seconds": self.seconds, "bytes": self.bytes,
            "grid": grid,
        }  # fmt: skip

    def to_text(self) -> str:
        """A table for people."""
        head = ("data", "backbone", "method", "jobs", "missing", "time", "disk")
        rows = [
            (n.data, n.backbone, n.method, str(n.jobs), str(n.missing), _duration(n.seconds), _size(n.bytes))
            for n in self.lines
        ]
        jobs, missing = (sum(getattr(line, n) for line in self.lines) for n in ("jobs", "missing"))
        rows.append(("all", "", "", str(jobs), str(missing), _duration(self.seconds), _size(self.bytes)))
        widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
        ]
        return "\n".join(lines)


def estimate(plan: Plan, folder: str | Path, store: str | Path | None = None) -> Estimate:
    """What is missing of a study in ``folder``, and what it will take.

    Data sets that are not encoded yet are encoded now, for the first seed: their size decides.

    Args:
        plan: the study.
        folder: where it is to be.
        store: of trained models.
    """
    context = Workspace(plan, Path(folder), Path(store) if store else Path(folder) / "store")
    journal = context.folder / "journal"
    known = JournalState.read(context.folder) if journal.exists() else None
    groups: dict[tuple[str, str, str], list[Job]] = {}
    for job in context.grid.jobs:
        groups.setdefault((job.data, job.backbone, job.method), []).append(job)
    return Estimate(plan.name, tuple(_line(context, known, name, jobs) for name, jobs in groups.items()))


def _line(context: Workspace, known: JournalState | None, name: tuple[str, str, str], jobs: list[Job]) -> EstimateLine:
    grid = context.grid
    missing = [job for job in jobs if known is None or grid.key(job) not in known.done]
    data = context.data(jobs[0])
    training = _training_seconds(context, known, jobs[0], data)
    epoch = training / max(1, _epochs(grid, jobs[0]))
    runs = Counter(job.kind for job in missing)
    attempts = runs["choice"] * context.plan.trials_of(grid.data(jobs[0])) + runs["cell"]
    each = training if grid.trains(jobs[0]) else COMPRESSION_EPOCHS * epoch
    model = sum(p.numel() for p in _model(context, jobs[0], data).parameters()) * 4
    kept = attempts * model if grid.trains(jobs[0]) else 0
    predictions = 4 * len(data.test) * runs["cell"] if context.plan.predictions else 0
    return EstimateLine(*name, len(jobs), len(missing), attempts * each, kept + predictions)


def _training_seconds(context: Workspace, known: JournalState | None, job: Job, data: Dataset) -> float:
    """One training of the job's backbone, from the journal if it has one."""
    past = [] if known is None else known.journal.read()
    same = [r for r in past if (r["data"], r["backbone"], r["method"]) == (job.data, job.backbone, ORIGINAL)]
    timed = [r["seconds"] for r in same if r["kind"] == "trial" and r["state"] == "complete"]
    timed += [r["seconds"]["train"] for r in same if r["kind"] == "cell" and (r["seconds"]["train"] or 0) > 0]
    if timed:
        return mean(timed)
    stage = build_training(data.schema.task, context.grid.training(job).stages(_middle(context.grid, job)))[0]
    steps = math.ceil(len(data.train) / stage.batch_size)
    return _step_seconds(context, job.data, job.backbone, data, stage.batch_size) * steps * _epochs(context.grid, job)


def _epochs(grid: Grid, job: Job) -> int:
    task = "ctr" if build_backbone(grid.backbone(job), _middle(grid, job)).task == "ctr" else "cf"
    return sum(s.epochs for s in build_training(task, grid.training(job).stages(_middle(grid, job))))


@cache
def _step_seconds(context: Workspace, label: str, backbone: str, data: Dataset, batch_size: int) -> float:
    """A training step, timed after one to warm up."""
    job = Job("cell", label, backbone, ORIGINAL, "", context.plan.seeds_of(context.plan.data[label])[0])
    model = _model(context, job, data)
    spans = []
    with torch_threads(context.plan.threads):
        for step, batch in enumerate(islice(model.batches(data, batch_size, 0, 0), STEPS + 1)):
            start = time.perf_counter()
            model.loss(batch, noise(0, "estimate", step)).backward()
            spans.append(time.perf_counter() - start)
    return OPTIMIZER_SHARE * min(spans[1:] or spans)


def _model(context: Workspace, job: Job, data: Dataset) -> Model:
    point = {n.removeprefix("backbone."): v for n, v in _middle(context.grid, job).items() if n.startswith("backbone.")}
    return build_backbone(context.grid.backbone(job), point).build(data, 0)


def _middle(grid: Grid, job: Job) -> dict[str, Any]:
    """A point of the space of a job's original: low ends, first choices."""
    original = Job("choice", job.data, job.backbone, ORIGINAL, "", job.seed)
    return {n: s.low if isinstance(s, Range) else s.choices[0] for n, s in grid.space(original).items()}


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _size(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
