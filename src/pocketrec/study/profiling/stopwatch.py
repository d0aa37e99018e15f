"""Time as it is spent: single calls, and the steps of a run whose trainings are cut short."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pocketrec.training.run import M, Run
from pocketrec.training.steps import Abandoned, Arrays, Checkpoint

if TYPE_CHECKING:
    from pocketrec.data.dataset import Dataset
    from pocketrec.training.loop import Training

POWERCAP = Path("/sys/class/powercap")
WARM_UP = 0.1
"""Untimed calls before the timed ones, as a share of them; at least one."""
LEAST_CALLS, LONG_SECONDS = 3, 20.0
"""Once so many calls have taken so long, no more are timed."""

Timing = dict[str, Any]


def nothing() -> None:
    """What there is to wait for on a processor that has done its work when a call returns."""


def quantiles(milliseconds: Sequence[float] | NDArray[np.float64]) -> dict[str, float]:
    """Median, 10th and 90th percentile, and how many values they are of.

    Example:
        >>> quantiles([3.0, 1.0, 2.0])
        {'p50': 2.0, 'p10': 1.2, 'p90': 2.8, 'repeats': 3}
    """
    p10, p50, p90 = np.quantile(np.asarray(milliseconds, np.float64), (0.1, 0.5, 0.9)).round(6).tolist()
    return {"p50": p50, "p10": p10, "p90": p90, "repeats": len(milliseconds)}


def timed(phase: str, call: Callable[[int], object], repeats: int, settle: Callable[[], None] = nothing) -> Timing:
    """Time ``call(0), call(1), ...`` one by one after a warm-up.

    Args:
        phase: what it is called in the record.
        call: gets the number of the call.
        repeats: timed calls, at least 1; fewer where they take long.
        settle: waits until the device has nothing left to do; called around each timed call.

    Returns:
        ``phase``, ``ms``, ``extrapolated``; ``joules`` per call where the processor's energy counters can be read.
    """
    for i in range(max(1, int(WARM_UP * repeats))):
        call(i)
    milliseconds: list[float] = []
    before = _microjoules(POWERCAP)
    while len(milliseconds) < min(repeats, LEAST_CALLS) or (
        len(milliseconds) < repeats and sum(milliseconds) < 1000 * LONG_SECONDS
    ):
        settle()
        started = time.perf_counter_ns()
        call(len(milliseconds))
        settle()
        milliseconds.append((time.perf_counter_ns() - started) / 1e6)
    record = {"phase": phase, "ms": quantiles(milliseconds), "extrapolated": False}
    used = _used(before, _microjoules(POWERCAP))
    return record if used is None else {**record, "joules": used / 1e6 / len(milliseconds)}


def _microjoules(root: Path) -> dict[str, tuple[int, int]]:
    """Energy counter and its range of every processor package, as far as this process may read them."""
    found: dict[str, tuple[int, int]] = {}
    for zone in sorted(root.glob("intel-rapl:*")):
        if zone.name.count(":") == 1:
            try:
                found[zone.name] = tuple(int((zone / n).read_text()) for n in ("energy_uj", "max_energy_range_uj"))  # type: ignore[assignment]
            except (OSError, ValueError):
                return {}
    return found


def _used(before: Mapping[str, tuple[int, int]], after: Mapping[str, tuple[int, int]]) -> float | None:
    """Microjoules between two readings; a counter starts again at zero past its range."""
    if not before or before.keys() != after.keys():
        return None
    return float(sum((after[zone][0] - then) % (span + 1) for zone, (then, span) in before.items()))


class _EnoughSteps(Abandoned):
    """Enough steps of a training were timed."""


@dataclass(frozen=True)
class TimedLoop:
    """The beginning of one training.

    Attributes:
        steps: milliseconds of each timed step, drawing of its batch included; the first one warms up and is not timed.
        per_epoch: steps of a whole epoch.
        whole: whether the steps make up a whole epoch.
        epochs: that the whole training has taken, or ``None`` where the store does not know it.
    """

    steps: tuple[float, ...]
    per_epoch: int
    whole: bool
    epochs: int | None

    @property
    def epoch(self) -> float:
        """Milliseconds of the steps of an epoch; validation is not part of it."""
        return self.per_epoch * sum(self.steps) / len(self.steps)


class Stopwatch(Run):
    """A run that times what is done inside :meth:`timing`.

    There, steps are computed anew, and every training stops after some of its steps; its result is then read from the
    store, where an earlier run has left it, so that what follows meets the true one. Outside, it is a run like others.

    Args:
        seed: from which all randomness is derived.
        threads: of torch.
        device: where models are trained.
        store: of finished steps; ``None`` where there are none: a training that was cut short then leaves the model as
            it was.
        batch: rows of a training step while timing; ``None`` leaves them as they are.
        share: of an epoch's steps that are timed, in (0, 1].
        least: steps that are timed at least, if the training has so many.
        settle: waits until the device has nothing left to do.
        training: by which methods train.
    """

    def __init__(
        self,
        *,
        seed: int,
        threads: int,
        device: str = "cpu",
        store: str | Path | None = None,
        batch: int | None = None,
        share: float = 1.0,
        least: int = 20,
        settle: Callable[[], None] = nothing,
        training: Sequence[Training] = (),
    ) -> None:
        super().__init__(
            None, seed=seed, threads=threads, device=device, store=store, progress=self._tick, training=training
        )
        self.loops: list[TimedLoop] = []
        self._batch, self._share, self._least, self._settle = batch, share, least, settle
        self._on = False
        self._elapsed = 0.0
        self._ticks: list[tuple[int, float]] | None = None
        self._wanted = 0
        self._epochs: int | None = None

    @contextmanager
    def timing(self) -> Iterator[None]:
        """Time the block."""
        self._on, started = True, time.perf_counter_ns()
        try:
            yield
            self._settle()
        finally:
            self._on = False
            self._elapsed += (time.perf_counter_ns() - started) / 1e6

    def records(self, phase: str) -> list[Timing]:
        """What was timed: step and epoch of the first training, if there was one, and the whole phase.

        The whole counts every training by its epochs, without validation; it is left out where they are not known. One
        without training has no ``batch``.
        """
        found: list[Timing] = []
        if self.loops:
            first = self.loops[0]
            found.append({"phase": f"{phase} step", "ms": quantiles(first.steps), "extrapolated": False})
            found.append({"phase": f"{phase} epoch", "ms": quantiles([first.epoch]), "extrapolated": not first.whole})
        epochs = [loop.epochs for loop in self.loops]
        if None not in epochs:
            trained = sum(loop.epoch * (loop.epochs or 0) for loop in self.loops)
            whole = quantiles([self._elapsed + trained])
            entire = {} if self.loops else {"batch": None}
            found.append({"phase": phase, "ms": whole, "extrapolated": bool(self.loops), **entire})
        return found

    def once(self, name: str, key: Any, fn: Callable[[Checkpoint], Mapping[str, NDArray[Any]]]) -> Arrays:
        """See :meth:`pocketrec.training.run.Run.once`; while timing, nothing is read and nothing is kept."""
        if self._on:
            with self.working(None, name) as checkpoint:
                return dict(fn(checkpoint))
        arrays = super().once(name, key, fn)
        if "history" in arrays:
            self._epochs = len(arrays["history"])
        return arrays

    def fit(self, name: str, model: M, data: Dataset, training: Training | Sequence[Training] | None = None) -> M:
        """See :meth:`pocketrec.training.run.Run.fit`; while timing, each stage is cut short."""
        from pocketrec.training.loop import Training

        if not self._on:
            return super().fit(name, model, data, training)
        training = training or Training.default(data.schema.task)
        for stage in [training] if isinstance(training, Training) else training:
            model = self._stage(name, model, data, stage)
        return model

    def _stage(self, name: str, model: M, data: Dataset, stage: Training) -> M:
        """Time some steps, then take the result from the store; neither counts as elapsed."""
        started = time.perf_counter_ns()
        own = stage if self._batch is None else replace(stage, batch_size=self._batch)
        per_epoch = max(1, math.ceil(len(data.train) / own.batch_size))
        self._wanted = max(self._least + 1, math.ceil(self._share * per_epoch))
        self._ticks = []
        with suppress(_EnoughSteps):
            super().fit(name, model, data, own)
        ticks, self._ticks = [(started, math.nan), *self._ticks], None
        self._on, self._epochs = False, None
        if self.store is not None:
            model = super().fit(name, model, data, stage)
        self._on = True
        self.loops.append(TimedLoop(_steps(ticks), per_epoch, self._wanted >= per_epoch, self._epochs))
        self._elapsed -= (time.perf_counter_ns() - started) / 1e6
        return model

    def _tick(self, stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
        """A step of a training is done; every other step of work passes."""
        if self._ticks is None:
            return
        self._settle()
        self._ticks.append((time.perf_counter_ns(), figures["epoch"]))
        if len(self._ticks) >= self._wanted:
            raise _EnoughSteps


def _steps(ticks: Sequence[tuple[int, float]]) -> tuple[float, ...]:
    """Milliseconds between ticks of one epoch; where there are none, between the last two of any."""
    spans = [((then - now) / 1e6, epoch == other) for (now, epoch), (then, other) in pairwise(ticks)]
    return tuple(span for span, within in spans if within) or tuple(span for span, _ in spans[-1:])
