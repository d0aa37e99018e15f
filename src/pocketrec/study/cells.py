"""One job, done: a model trained or compressed, and measured. No function here knows a method or backbone by name."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from pocketrec import settings
from pocketrec.compression.compress import compress
from pocketrec.compression.measure import Measurement, measure
from pocketrec.compression.small import Small
from pocketrec.data.dataset import Dataset
from pocketrec.files import Journal
from pocketrec.format.arrays import save_arrays
from pocketrec.models.backbone import Model
from pocketrec.models.baked import BakedModel
from pocketrec.study.jobs import Grid, Job
from pocketrec.study.plan import Plan
from pocketrec.study.profiling.memory import Peak
from pocketrec.study.recipe import DENSE, ORIGINAL, STAGE, Point, build_backbone, build_method, build_training
from pocketrec.training.evaluate import validate
from pocketrec.training.run import Helpers, Run
from pocketrec.training.steps import Progress, Watch

SHORT = 10
"""Length of the shorter recommendation lists that are judged, too."""

Record = dict[str, Any]
Choices = Mapping[Job, Point]
"""The values that each finished search has chosen."""


@dataclass(frozen=True, eq=False)
class Workspace:
    """Where a study works: its plan, its folder, and the store of trained models.

    Attributes:
        plan: what is studied.
        folder: of journal, ledger, predictions and encoded data.
        store: of trained models and other finished steps; may be shared by many studies.
        progress: told how far long steps are.
        helpers: compute parts of a step side by side.
    """

    plan: Plan
    folder: Path
    store: Path
    progress: Progress | None = None
    helpers: Helpers | None = None

    @property
    def grid(self) -> Grid:
        """All jobs."""
        return _grid(self.plan)

    def data(self, job: Job) -> Dataset:
        """The encoded data set of a job."""
        return _opened(self, job.data, job.seed)

    def run(self, name: str, job: Job, watch: Watch | None = None) -> Run:
        """A run that logs into the study's folder and keeps its steps in the store."""
        return Run(
            self.folder / "runs" / name,
            seed=job.seed,
            threads=self.plan.threads,
            device=self.plan.device,
            store=self.store,
            watch=watch,
            progress=self.progress,
            helpers=self.helpers,
            peak=Peak(),
        )


def original(bench: Workspace, job: Job, point: Point, run: Run) -> Model:
    """The uncompressed model at a point of its space; trained at most once."""
    grid, data = bench.grid, bench.data(job)
    recipe = grid.backbone(job)
    model = build_backbone(recipe, _part(point, "backbone.")).build(data, job.seed).to(run.device)
    return run.fit("original", model, data, build_training(data.schema.task, recipe.stages(_stage(point))))


def compressed(bench: Workspace, job: Job, point: Point, choices: Choices, run: Run) -> Small:
    """The model of a method at a point of its space."""
    grid, data, recipe = bench.grid, bench.data(job), bench.grid.method(job)
    if recipe is None:
        raise TypeError(f"Expected a method, but {job} is the original.")
    backbone = build_backbone(grid.backbone(job), _part(point, "backbone."))
    stages = build_training(data.schema.task, grid.training(job).stages(_stage(point)))
    method = build_method(recipe, _part(point, "method."))
    if not method.trains:
        return compress(dense(bench, job, choices), data, method, job.budget, run=run, bake=grid.data(job).bake)
    model = backbone.build(data, job.seed)
    if method.starts_from == "trained":
        model.load_state_dict(dense(bench, job, choices).state_dict())
    return compress(model, data, method, job.budget, run=run, training=stages)


def validation_figure(bench: Workspace, job: Job, point: Point, choices: Choices, run: Run) -> float | None:
    """The figure on validation by which a search chooses: AUC, or NDCG@20."""
    if job.method == ORIGINAL:
        return validate(original(bench, job, point, run), bench.data(job).valid)
    return validate(compressed(bench, job, point, choices, run).model, bench.data(job).valid)


def cell(bench: Workspace, job: Job, choices: Choices) -> Record:
    """The record of a final cell; the one place where a test split is read."""
    key = bench.grid.key(job)
    point = point_of(bench, job, choices)
    data = bench.data(job)
    started = time.monotonic()
    with bench.run(key[:16], job) as run, TemporaryDirectory(dir=bench.folder) as folder:
        earlier = len(run.logged())
        if job.method == ORIGINAL:
            model: Model = original(bench, job, point, run)
            target: Model | Path = BakedModel.of(model) if bench.grid.data(job).bake else model
            made = {"values": model.table.values(), "sparsity": 0.0}
        else:
            small = compressed(bench, job, point, choices, run)
            model, target = small.model, Path(folder) / "small.safetensors"
            small.save(target)
            made = {"values": small.values, "sparsity": small.sparsity}
        ready = time.monotonic()
        threads = bench.plan.threads
        valid = measure(model, data.valid, latency=False, threads=threads).quality
        test = measure(target, data.test, threads=threads, predictions=True, ledger=_ledger(bench, job, key))
        logged, peak = run.logged(), run.peak()
    return {
        "params": params(bench, job, point),
        "valid": dict(valid),
        "test": {**test.quality, **(test.ranking.at(SHORT).quality() if test.ranking is not None else {})},
        "beyond": dict(test.beyond),
        "bytes": dict(test.bytes),
        "latency_us": {batch: dict(figures) for batch, figures in test.latency_us.items()},
        "digest": test.digest,
        **made,
        **({"facts": facts} if (facts := dict(model.table.facts())) else {}),
        **cost(logged[earlier:], ready - started, time.monotonic() - ready, peak),
        "curve": curve(logged),
        "predictions": _keep(bench, job, key, data, test) if bench.plan.predictions else None,
    }


def point_of(bench: Workspace, job: Job, choices: Choices) -> Point:
    """The searched values of a cell; where a method searches nothing of backbone and training, the original's."""
    seed = bench.plan.seeds_of(bench.grid.data(job))[0]
    found = choices.get(Job("choice", job.data, job.backbone, job.method, job.budget, seed), {})
    if job.method == ORIGINAL or bench.grid.trains(job):
        return found
    return {**_original_point(bench, job, choices), **found}


def params(bench: Workspace, job: Job, point: Point) -> dict[str, Any]:
    """All settings of a cell, as they came to be."""
    grid, task = bench.grid, bench.data(job).schema.task
    method = grid.method(job)
    backbone = build_backbone(grid.backbone(job), _part(point, "backbone."))
    stages = build_training(task, grid.training(job).stages(_stage(point)))
    built = None if method is None else build_method(method, _part(point, "method."))
    return {
        "backbone": {"name": backbone.name, **settings.flat(backbone)},
        "method": {} if built is None else {"name": built.name, **settings.flat(built)},
        "training": [settings.flat(stage) for stage in stages],
    }


def profiles(bench: Workspace, job: Job, choices: Choices) -> Iterator[Record]:
    """Time and memory of every phase of a method at the budget of the job, by each profile of the plan."""
    from pocketrec.study.profiling.profile import profile

    grid, point = bench.grid, point_of(bench, job, choices)
    recipe, task = grid.method(job), bench.data(job).schema.task
    stages = build_training(task, grid.training(job).stages(_stage(point)))
    method = None if recipe is None else build_method(recipe, _part(point, "method."))
    backbone = build_backbone(grid.backbone(job), _part(point, "backbone."))
    for name in bench.plan.efficiency:
        yield from profile(
            backbone,
            method,
            bench.data(job),
            budget=bench.plan.efficiency_budget,
            training=stages,
            seed=job.seed,
            profile=name,
            threads=bench.plan.threads,
            device=bench.plan.device,
            store=bench.store,
        )


def cost(logged: list[Record], elapsed: float, measured: float, peak: float | None) -> Record:
    """What the model of a cell took to make: ``seconds`` and ``peak_mib``; ``None`` where a step of it noted nothing.

    A step that was found in the store counts as it was computed: with its own time, added up over its starts, and its
    own peak. ``train`` is all trainings of the model, ``compress`` all else that led to its file; the training of the
    original that a method shrinks is the original's.

    Args:
        logged: what the run has noted since this start.
        elapsed: seconds of this start until the file was there.
        measured: seconds of measuring.
        peak: MiB of this start, all that the process held included.
    """
    steps = {e["step"]: e for e in logged if "step" in e}.values()
    trained = {e["stage"] for e in logged if "curve" in e}
    train = _sum([e["seconds"] for e in steps if e["stage"] in trained])
    others = _sum([e["seconds"] for e in steps if e["stage"] not in trained])
    rest = elapsed - sum(e["spent"] for e in logged if "step" in e)
    peaks = [peak, *(e["peak_mib"] for e in steps)]
    return {
        "seconds": {"train": train, "compress": None if others is None else others + rest, "measure": measured},
        "peak_mib": None if None in peaks else max(p for p in peaks if p is not None),
    }


def _sum(seconds: list[float | None]) -> float | None:
    known = [s for s in seconds if s is not None]
    return sum(known) if len(known) == len(seconds) else None


def curve(logged: list[Record]) -> list[list[float | None]]:
    """Loss and validation figure of every epoch of the last training."""
    curves = [e["curve"] for e in logged if "curve" in e]
    return curves[-1] if curves else []


def dense(bench: Workspace, job: Job, choices: Choices) -> Model:
    """The trained original that a job builds on, from the store."""
    return _trained(
        bench, job.data, job.backbone, job.seed, tuple(sorted(_original_point(bench, job, choices).items()))
    )


def _original_point(bench: Workspace, job: Job, choices: Choices) -> Point:
    seed = bench.plan.seeds_of(bench.grid.data(job))[0]
    return choices.get(Job("choice", job.data, job.backbone, ORIGINAL, DENSE, seed), {})


@lru_cache(maxsize=2)
def _trained(bench: Workspace, data: str, backbone: str, seed: int, point: tuple[tuple[str, Any], ...]) -> Model:
    job = Job("cell", data, backbone, ORIGINAL, DENSE, seed)
    with Run(None, seed=seed, threads=bench.plan.threads, device=bench.plan.device, store=bench.store) as run:
        return original(bench, job, dict(point), run)


@lru_cache(maxsize=4)
def _opened(bench: Workspace, label: str, seed: int) -> Dataset:
    return bench.plan.data[label].open(bench.folder / "data", seed)


@lru_cache(maxsize=4)
def _grid(plan: Plan) -> Grid:
    return Grid(plan)


def _ledger(bench: Workspace, job: Job, key: str) -> Any:
    """Notes a read of test rows with its cell; a cell that was cut short reads again, and the ledger says so."""
    journal = Journal(bench.folder / "ledger.journal")
    again = any(entry["key"] == key for entry in journal.read())

    def note(**record: Any) -> None:
        journal.append({**record, "data_digest": record["data"], **job.labels(), "key": key, "again": again})

    return note


def _keep(bench: Workspace, job: Job, key: str, data: Dataset, test: Measurement) -> str:
    """Write what the test split came to, per row or user; the path inside the folder."""
    path = Path("predictions") / f"{key[:16]}.safetensors"
    (bench.folder / "predictions").mkdir(exist_ok=True)
    (bench.folder / "labels").mkdir(exist_ok=True)
    if test.ranking is not None:
        figures = test.ranking
        save_arrays(
            bench.folder / path,
            {"ndcg": figures.ndcg, "recall": figures.recall, "recall_capped": figures.recall_capped},
        )
    else:
        save_arrays(bench.folder / path, {"logits": np.asarray(test.logits)})
        labels = bench.folder / "labels" / f"{job.data}-{job.seed}.safetensors"
        if not labels.exists():
            save_arrays(labels, {"labels": np.asarray(data.test.labels)})
    return str(path)


def _part(point: Point, prefix: str) -> dict[str, Any]:
    return {n.removeprefix(prefix): v for n, v in point.items() if n.startswith(prefix)}


def _stage(point: Point) -> dict[str, Any]:
    return {n: v for n, v in point.items() if n.startswith(STAGE)}
