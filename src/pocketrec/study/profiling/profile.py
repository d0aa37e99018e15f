"""Time and memory of every phase of a model's life, each in a fresh process (:mod:`pocketrec.study.profiling.phase`).

Phases of the uncompressed model: ``train``, one ``train step``, one ``train epoch``. Of a method: ``find mask``
(preparing it and sizing its table), ``retrain`` where it trains afterwards, both with ``step`` and ``epoch`` where
they run the training loop, and ``build`` of every other form of its table. Of both: ``inference`` by torch in every
form of the table, and ``inference packed`` from the written file, by the compiled kernel and by numpy. For ranking
models, inference is computing all user and item vectors, propagation included (batch ``None``). From these, ``scoring``
is all items for a batch of users, ``ranking`` the best 20 of such scores, ``recommending`` both in one pass.

The profile ``server`` times batches of 2,048 and 64. ``edge`` is one thread, batches of 64, inference by the runtime
without torch from a file as a device has it (final vectors of ranking models; none where a method has trained them
through a graph), and part of an epoch of training, extrapolated.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch

from pocketrec import runtime, settings
from pocketrec.compression.budget import Budget
from pocketrec.compression.compress import sized
from pocketrec.compression.ladder import Ladder, Method
from pocketrec.compression.small import Small
from pocketrec.errors import ConfigError, PocketRecError, UnsupportedOp
from pocketrec.format.arrays import save_arrays
from pocketrec.models.baked import BakedModel
from pocketrec.native import library
from pocketrec.study.profiling.memory import STATUS
from pocketrec.study.profiling.phase import Workload, prepared
from pocketrec.study.profiling.stopwatch import Timing
from pocketrec.training.run import Run

if TYPE_CHECKING:
    from pocketrec.data.dataset import Dataset
    from pocketrec.models.backbone import Backbone, Model
    from pocketrec.training.loop import Training

Profile = Literal["server", "edge"]

BATCHES: Mapping[Profile, tuple[int, ...]] = {"server": (2048, 64), "edge": (64,)}
"""Rows of a call; the first is that of a training step."""

EDGE_SHARE = {"ctr": 0.05, "cf": 0.2}
"""Part of an epoch that is timed on the edge, by task."""

PACKAGES = ("pocketrec", "numpy", "safetensors", "torch", "polars")
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def profile(
    backbone: Backbone,
    method: Method | None,
    data: Dataset,
    *,
    budget: str | Budget = "sparsity=0.8",
    training: Training | Sequence[Training] | None = None,
    seed: int = 0,
    profile: Profile = "server",
    threads: int = 1,
    repeats: int = 20,
    store: str | Path | None = None,
    device: str = "cpu",
    share: float | None = None,
) -> list[Timing]:
    """Time and peak memory of every phase of the uncompressed model, or of a method.

    Models come from the store, or are trained and compressed first. Each phase then runs in its own process, one after
    the other; nothing else should run meanwhile.

    Args:
        backbone: configuration of the recommender.
        method: how its table is made smaller; ``None`` for the uncompressed model.
        data: the data set; its test split is not read.
        budget: of the method.
        training: stages of the uncompressed model; ``None`` leaves it at its initial weights: times hardly depend on
            them, and how long a whole training takes is then not told. Methods that train do so by these stages, too.
        seed: of model and method.
        profile: ``server`` or ``edge``.
        threads: at least 1; the edge has one.
        repeats: timed calls of a phase, and steps of a training at least; at least 1.
        store: of trained models and finished steps; ``None`` keeps nothing.
        device: where torch works; on a GPU the phases of the runtime, which has none, are left out.
        share: of an epoch's steps that are timed, in (0, 1]; by default all on the server, on the edge 5 % of click
            and 20 % of ranking data.

    Returns:
        Records of kind ``efficiency`` without labels: ``phase``, ``profile``, ``batch`` (``None`` where the phase takes
        all rows as it likes), ``threads``, ``ms`` (``p50``, ``p10``, ``p90``, ``repeats``), ``peak_mib`` (see
        :mod:`pocketrec.study.profiling.phase`), ``extrapolated``, ``device``; ``joules`` per call where energy counters
        can be read, ``device_peak_mib`` on a GPU.

    Raises:
        ConfigError: an argument is out of range, or there is no GPU.
        UnsupportedOp: the system has no ``/proc``, from which memory is read.

    Example:
        >>> records = profile(DeepFM(), MagPrune(), data, store="store")  # doctest: +SKIP
        >>> [r["phase"] for r in records if r["batch"] == 64]  # doctest: +SKIP
        ['inference masked', 'inference packed', 'inference packed numpy']

    Reference:
        Tran et al., "A thorough performance benchmarking on lightweight embedding-based recommender systems", 2024,
        Figures 3 and 4.
    """
    share = share or (EDGE_SHARE[backbone.task] if profile == "edge" else 1.0)
    _check(profile, threads, repeats, share, device)
    with TemporaryDirectory() as folder:
        task = Workload(
            kind="",
            phase="",
            data=str(data.path.resolve()),
            backbone={"name": backbone.name, "config": settings.to_json(backbone)},
            training=[settings.to_json(stage) for stage in _stages(training)],
            method=None if method is None else method.config(),
            budget=str(budget) if isinstance(budget, str) else _text(budget),
            seed=seed,
            threads=1 if profile == "edge" else threads,
            repeats=repeats,
            store=str(Path(store or folder).resolve()),
            device=device,
            share=share,
        )
        bench = _Specimens(
            Path(folder), profile, data, backbone, method, Budget.parse(budget), tuple(_stages(training))
        )
        return [record for job in bench.tasks(task) for record in _records(job, profile)]


def machine(device: str = "cpu") -> dict[str, Any]:
    """What the figures were taken on: processor, cores, memory, system, versions, instruction set; the GPU if one is.

    Example:
        >>> sorted(machine())
        ['cores', 'cpu', 'device', 'kernel', 'memory_gib', 'system', 'threads', 'usable_cores', 'versions']
    """
    named = device
    if device.startswith("cuda"):
        named = torch.cuda.get_device_name(device)
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": {name: os.environ.get(name) for name in THREADS},
        "memory_gib": _memory_gib(),
        "system": platform.platform(),
        "kernel": library.level() or "numpy",
        "device": named,
        "versions": {"python": platform.python_version(), **{n: v for n in PACKAGES if (v := _version(n))}},
    }


@dataclass(frozen=True)
class _Whole(Method):
    """The uncompressed table as a method, so that it can be written like others."""

    name: ClassVar[str] = "original"

    def prepare(self, model: Model, data: Dataset, run: Run) -> Ladder:
        raise UnsupportedOp("The uncompressed table has no smaller ones; give `profile` a method.")


@dataclass(frozen=True, eq=False)
class _Specimens:
    """Models and files of one profile, made as they are needed."""

    folder: Path
    profile: Profile
    data: Dataset
    backbone: Backbone
    method: Method | None
    budget: Budget
    training: tuple[Training, ...]

    def tasks(self, task: Workload) -> Iterator[Workload]:
        """Every phase in turn; what it needs is in store before."""
        small, ladder = self._small(task)
        yield from self._training_tasks(task, ladder)
        if self.profile == "server":
            yield from self._torch_tasks(task, small)
        if task.device == "cpu":
            yield from self._file_tasks(task, small)

    def _training_tasks(self, task: Workload, ladder: Ladder | None) -> Iterator[Workload]:
        batch = BATCHES[self.profile][0]
        if ladder is None:
            yield replace(task, kind="train", phase="train", batch=batch)
            return
        yield replace(task, kind="search", phase="find mask", batch=batch)
        if type(ladder).finish is not Ladder.finish:
            yield replace(task, kind="finish", phase="retrain", batch=batch)

    def _torch_tasks(self, task: Workload, small: Small) -> Iterator[Workload]:
        forms = small.table.forms
        for form in forms[1:]:
            yield replace(task, kind="build", phase=f"build {form}", form=form, repeats=min(3, task.repeats))
        for form in forms:
            for batch in self._batches():
                yield replace(task, kind="infer", phase=f"inference {form}", form=form, batch=batch)

    def _file_tasks(self, task: Workload, small: Small) -> Iterator[Workload]:
        ego = small.contents.kind == "ego"
        if self.profile == "server" or not ego:
            yield from self._packed_tasks(task, small, "propagate" if ego else "serve")
        elif self.method is None or not self.method.trains:
            yield from self._packed_tasks(task, self._small(task, bake=True)[0], "serve")
        if self.backbone.task == "cf" and self.method is None:
            file = self._save(self._small(task, bake=True)[0])
            rows = self._rows(file, None, task.repeats)
            for batch in BATCHES[self.profile]:
                served = replace(task, batch=batch, file=str(file), rows=str(rows))
                yield replace(served, kind="serve scores", phase="scoring and ranking")
                yield replace(served, kind="serve lists", phase="recommending")

    def _packed_tasks(self, task: Workload, small: Small, kind: str) -> Iterator[Workload]:
        file = self._save(small)
        for batch in self._batches():
            rows = self._rows(file, batch, task.repeats)
            packed = replace(task, kind=kind, phase="inference packed", batch=batch, file=str(file), rows=str(rows))
            yield packed
            if self.profile == "server" and library.available():
                yield replace(packed, phase="inference packed numpy")

    def _save(self, small: Small) -> Path:
        """The written file."""
        file = self.folder / f"{small.contents.kind}.safetensors"
        small.save(file)
        return file

    def _batches(self) -> tuple[int | None, ...]:
        """Of inference: click models score rows, ranking models compute all vectors at once."""
        return BATCHES[self.profile] if self.backbone.task == "ctr" else (None,)

    def _small(self, task: Workload, *, bake: bool = False) -> tuple[Small, Ladder | None]:
        """The model around its final table, and the ladder of the method."""
        with Run(
            None, seed=task.seed, threads=task.threads, store=task.store, device=task.device, training=self.training
        ) as run:
            model: Model = self.backbone.build(self.data, task.seed).to(run.device)
            if self.training and not (self.method and self.method.trains):
                model = run.fit("original", model, self.data, self.training)
            model = BakedModel.of(model) if bake else model
            if self.method is None:
                return Small(model, self.data, _Whole(), Budget("share", 1.0), "fp32"), None
            ladder = self.method.prepare(model, self.data, run)
            small, room = sized(ladder, Small(model, self.data, self.method, self.budget, self.budget.storage))
            return replace(small, model=ladder.finish(small.model, room)), ladder

    def _rows(self, file: Path, batch: int | None, repeats: int) -> Path:
        """File rows to look up: of prepared batches, or of all rows of each field."""
        rows = runtime.open(file).artifact.vocabulary.file_rows(self.data.hashes, self.data.schema)
        fields = self.data.schema.fields
        arrays = (
            {f"field{i}": rows[f.offset : f.stop] for i, f in enumerate(fields)}
            if batch is None
            else {"batches": rows[prepared(self.data, batch, repeats)]}
        )
        path = self.folder / f"rows-{batch}.safetensors"
        save_arrays(path, arrays)
        return path


def _records(task: Workload, profile: Profile) -> Iterator[Timing]:
    """Run one task in its own process."""
    found = _run(task)
    memory = {part: round(mib, 2) for part, mib in found["peak_mib"].items()}
    device = {"device_peak_mib": found["device_peak_mib"]} if "device_peak_mib" in found else {}
    common = {"profile": profile, "threads": task.threads, "peak_mib": memory, "device": task.device, **device}
    for timing in found["phases"]:
        yield {"batch": task.batch, **common, **timing}


def _run(task: Workload) -> Timing:
    """What the process of a task has found.

    Raises:
        PocketRecError: the process failed; the message is its own.
    """
    with TemporaryDirectory() as folder:
        path = Path(folder) / "task.json"
        path.write_text(json.dumps(asdict(task)), encoding="utf-8")
        command = [sys.executable, "-m", "pocketrec.study.profiling.phase", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, env=_environment(task), check=False)  # noqa: S603
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise PocketRecError(f"Phase {task.phase!r} failed: {lines[-1].removeprefix('error: ')}")
    return json.loads(done.stdout)


def _environment(task: Workload) -> dict[str, str]:
    """The environment of a task's process: its threads, no shared cache but the task's, numpy alone where asked for."""
    kept = {n: v for n, v in os.environ.items() if n != "POCKETREC_CACHE"}
    plain = {"POCKETREC_KERNEL": "off"} if task.phase.endswith(" numpy") else {}
    return {**kept, **{name: str(task.threads) for name in THREADS}, **plain}


def _check(profile: str, threads: int, repeats: int, share: float, device: str) -> None:
    if profile not in get_args(Profile):
        raise ConfigError(f"`profile` must be one of {', '.join(get_args(Profile))}, but got {profile!r}.")
    if threads < 1 or repeats < 1 or not 0 < share <= 1:
        raise ConfigError(
            f"`threads` and `repeats` must be at least 1 and `share` in (0, 1], but got {threads}, {repeats}, {share}."
        )
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"`device` must be one that torch finds, but it finds no GPU for {device!r}; choose 'cpu'.")
    if not STATUS.exists():
        raise UnsupportedOp(f"Memory is read from {STATUS}, which this system lacks; take profiles on Linux.")


def _stages(training: Training | Sequence[Training] | None) -> Sequence[Training]:
    if training is None:
        return ()
    return list(training) if isinstance(training, Sequence) else [training]


def _text(budget: Budget) -> str:
    """A budget as :meth:`Budget.parse` reads it."""
    forms = {"sparsity": f"sparsity={budget.amount!r}", "share": f"{100 * budget.amount!r}%"}
    return forms.get(budget.kind, f"{budget.amount!r}B")


def _cpu() -> str:
    """The processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    """Memory of the machine."""
    info = Path("/proc/meminfo")
    return round(int(info.read_text().split("MemTotal:")[1].split()[0]) / 2**20, 1) if info.exists() else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
