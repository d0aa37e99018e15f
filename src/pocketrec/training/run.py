"""A run: a folder of finished steps. What is in it is never computed twice, and what was cut short goes on.

Each step is known by the digest of its name, its configuration and its inputs, so a changed input never meets a stale
result. ``Run(None)`` keeps everything in memory. Torch-free until something is trained.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeVar

from numpy.typing import NDArray

from pocketrec.errors import RunLocked
from pocketrec.files import Journal, Lock, digest, storage_errors
from pocketrec.format.arrays import open_arrays, save_arrays
from pocketrec.training.steps import Abandoned, Arrays, Checkpoint, Progress, Signals, StepPart, Watch

if TYPE_CHECKING:
    from pocketrec.data.dataset import Dataset
    from pocketrec.models.backbone import Model
    from pocketrec.models.table import Lookup
    from pocketrec.schema import Task
    from pocketrec.training.loop import Training

M = TypeVar("M", bound="Model[Lookup]")

STEPS = "log.journal"
"""In a folder of steps: what each took, beside their files, since the same step has the same bytes."""


class Helpers(Protocol):
    """Computes parts of a step side by side, each by ``Run.once`` of a run like the given one."""

    def __call__(self, run: Run, name: str, keys: Sequence[Any], part: StepPart) -> None:
        """Returns when all parts are in ``run.steps``."""


class Run:
    """A folder in which one process at a time works.

    Args:
        path: the folder, made where it is missing; ``None`` keeps results in memory.
        seed: from which all randomness of the run is derived.
        threads: threads of torch while a step runs; ``None`` leaves them as they are.
        device: where models are trained.
        progress: told how far steps are.
        store: a folder of finished steps and trained models that runs share, so that none is computed twice; by
            default the one that ``POCKETREC_CACHE`` names, else each run keeps its own.
        watch: told of every epoch's figure on validation.
        helpers: compute the parts of a :meth:`map` side by side; by default one is computed after the other, here.
        peak: tells the peak memory of the work so far in MiB, which is noted with every step; ``None`` is not known.
        training: how a model is trained where nothing else is said, several stages each from the best weights of the
            one before; ``None`` for the defaults of the data's task.
        checkpoint_seconds: least time between two checkpoints of a step.
        checkpoint_calls: also save at every so many boundaries of a step; 0 for never.

    Raises:
        RunLocked: another living process works in the folder.
        StorageError: the folder cannot be made or written.

    Example:
        >>> import numpy as np
        >>> run = Run(None)
        >>> run.once("answer", {"of": "everything"}, lambda checkpoint: {"value": np.array(42)})["value"].item()
        42
    """

    def __init__(
        self,
        path: str | Path | None,
        *,
        seed: int = 0,
        threads: int | None = None,
        device: str = "cpu",
        progress: Progress | None = None,
        store: str | Path | None = None,
        watch: Watch | None = None,
        helpers: Helpers | None = None,
        peak: Callable[[], float | None] | None = None,
        training: Training | Sequence[Training] | None = None,
        checkpoint_seconds: float = 60.0,
        checkpoint_calls: int = 0,
    ) -> None:
        self.path = None if path is None else Path(path)
        self.seed, self.threads, self.device = seed, threads, device
        self.progress: Progress = progress or _silent
        self.watch: Watch = watch or _unwatched
        named = store or os.environ.get("POCKETREC_CACHE")
        self.store = None if named is None else Path(named)
        self.helpers = helpers
        self.peak = peak or _unmeasured
        self.training = _stages(training)
        self._every = (checkpoint_seconds, checkpoint_calls)
        self._memory: dict[str, Arrays] = {}
        self._records: dict[str, list[dict[str, Any]]] = {}
        self._lock: Lock | None = None
        if self.path is not None:
            with storage_errors(self.path, "make"):
                self.path.mkdir(parents=True, exist_ok=True)
            self._lock = Lock(self.path / "lock").__enter__()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def with_training(self, training: Training | Sequence[Training]) -> Self:
        """The same run, all of it shared, in which models are trained by other settings."""
        other = copy(self)
        other.training = _stages(training)
        return other

    def close(self) -> None:
        """Let other processes into the folder."""
        if self._lock is not None:
            self._lock.__exit__(None, None, None)
            self._lock = None

    @property
    def steps(self) -> Path | None:
        """The folder of finished steps."""
        return self.store or (None if self.path is None else self.path / "steps")

    def once(self, name: str, key: Any, fn: Callable[[Checkpoint], Mapping[str, NDArray[Any]]]) -> Arrays:
        """The arrays that ``fn`` returns, computed at most once per ``(name, key, seed)`` and then read from the file.

        The log is told what computing them took, whenever and wherever that was: ``stage``, ``step``, ``seconds`` and
        ``peak_mib`` (``None`` where no one noted it), and the seconds ``spent`` here and now.

        Args:
            name: of the step; a part of its file's name.
            key: a JSON document that says all the result depends on: configuration and digests of the inputs.
            fn: gets a :class:`Checkpoint`; must be a pure function of the key and the seed.

        Returns:
            Arrays by name; memory-mapped and read-only where the run has a folder.
        """
        identity = digest({"name": name, "key": key, "seed": self.seed})
        folder, started = self.steps, time.monotonic()
        if folder is None:
            if identity not in self._memory:
                with self.working(None, identity) as checkpoint:
                    self._memory[identity] = dict(fn(checkpoint))
                spent = time.monotonic() - started
                self.log(stage=name, step=identity, seconds=spent, peak_mib=self.peak(), spent=spent)
            return self._memory[identity]
        with storage_errors(folder, "make"):
            folder.mkdir(parents=True, exist_ok=True)
        finished = folder / f"{name}-{identity[:16]}.safetensors"
        with self.claimed(finished), self.working(finished.with_suffix(".partial"), identity) as checkpoint:
            if not finished.exists():
                arrays = fn(checkpoint)
                noted = {"step": identity, "seconds": checkpoint.seconds, "peak_mib": self.peak()}
                Journal(folder / STEPS).append(noted)
                save_arrays(finished, arrays, {"name": name, "key": key, "seed": self.seed})
            checkpoint.clear()
        self.log(stage=name, **_noted(folder, identity), spent=time.monotonic() - started)
        return open_arrays(finished)[0]

    def map(self, name: str, keys: Sequence[Any], part: StepPart) -> list[Arrays]:
        """The parts of a step, each computed :meth:`once`; who computes them changes nothing.

        Args:
            name: of the step.
            keys: a JSON document for each part.
            part: gets a key and a checkpoint.

        Returns:
            The arrays of each part, in the order of the keys.
        """
        if self.helpers is not None and self.steps is not None:
            self.helpers(self, name, keys, part)
        return [self.once(name, key, partial(part, key)) for key in keys]

    @contextmanager
    def claimed(self, finished: Path) -> Iterator[None]:
        """Sole use of a place in the store: another process that computes it is waited for."""
        with nullcontext() if self.store is None else waited(Lock(finished.with_suffix(".lock"))):
            yield

    def fit(self, name: str, model: M, data: Dataset, training: Training | Sequence[Training] | None = None) -> M:
        """A trained copy of ``model``, from its present weights on; trained at most once per model, data and settings.

        Args:
            name: of the step.
            model: trained are its parameters that require a gradient; it is left as it is.
            data: the training and validation splits are read.
            training: settings, by default those of the run, else of the data's task; of several, each goes on from the
                best weights of the one before.

        Returns:
            A copy with the weights of the best epoch on validation.
        """
        from pocketrec.training.loop import fit_step

        return fit_step(self, name, model, data, training)

    def stages(self, task: Task) -> tuple[Training, ...]:
        """How a model is trained where nothing else is said, for data of a task."""
        from pocketrec.training.loop import Training

        return self.training or (Training.default(task),)

    @contextmanager
    def working(self, partial: Path | None, identity: str) -> Iterator[Checkpoint]:
        """The state in which a step computes: its checkpoint, deferred signals, the run's number of threads."""
        signals = Signals()
        checkpoint = Checkpoint(partial, identity, *self._every, signals)
        with signals.deferred(), torch_threads(self.threads):
            try:
                yield checkpoint
            except Abandoned:
                checkpoint.clear()
                raise

    def ledger(self, **record: Any) -> None:
        """Note that a test split was read: which file, which split, which figures."""
        self._append("ledger", record)

    def reads(self) -> list[dict[str, Any]]:
        """Every entry of the ledger, oldest first."""
        return self._read("ledger")

    def log(self, **record: Any) -> None:
        """Note how the work went (times); no result depends on it."""
        self._append("log", record)

    def logged(self) -> list[dict[str, Any]]:
        """Every entry of the log, oldest first."""
        return self._read("log")

    def _append(self, name: str, record: dict[str, Any]) -> None:
        if self.path is None:
            self._records.setdefault(name, []).append(record)
        else:
            Journal(self.path / f"{name}.journal", synced=name != "log").append(record)

    def _read(self, name: str) -> list[dict[str, Any]]:
        if self.path is None:
            return list(self._records.get(name, []))
        return Journal(self.path / f"{name}.journal").read()


@contextmanager
def waited(lock: Lock) -> Iterator[None]:
    """Hold a lock, waiting for the process that has it."""
    while True:
        try:
            lock.__enter__()
            break
        except RunLocked:
            time.sleep(0.1)
    try:
        yield
    finally:
        lock.__exit__(None, None, None)


def _noted(folder: Path, identity: str) -> dict[str, Any]:
    """What a folder of steps says of one of them; steps of an earlier version are not in its journal."""
    unknown = {"step": identity, "seconds": None, "peak_mib": None}
    return next((e for e in reversed(Journal(folder / STEPS).read()) if e["step"] == identity), unknown)


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """Torch's number of threads inside the block; what it was before is put back."""
    if threads is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _stages(training: Training | Sequence[Training] | None) -> tuple[Training, ...]:
    if training is None:
        return ()
    return tuple(training) if isinstance(training, Sequence) else (training,)


def _unmeasured() -> float | None:
    """Memory that nobody measures."""
    return None


def _silent(stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
    """Progress that nobody watches."""


def _unwatched(stage: str, epoch: int, metric: float | None) -> None:
    """Epochs that nobody judges."""
