"""The search for hyper-parameters of one job: Optuna's TPE, judged on validation only.

Trials are drawn in rounds of ``at_once``: a round knows the rounds before it and nothing of itself, and its sampler is
seeded by its number. A space that has no more points than there are trials is gone through whole. So the same plan
draws the same trials however many workers there are, and a search that was killed goes on as if nothing had happened.
"""

from __future__ import annotations

import sys
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.storages import RDBStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from pocketrec.errors import ConfigError, PocketRecError
from pocketrec.files import Lock
from pocketrec.randomness import derive
from pocketrec.study.cells import Choices, Record, Workspace, validation_figure
from pocketrec.study.jobs import Job
from pocketrec.study.recipe import Categorical as Listed
from pocketrec.study.recipe import Point, Space
from pocketrec.training.run import waited
from pocketrec.training.steps import Abandoned

HEARTBEAT_SECONDS = 30
"""How often a running trial shows that its process lives."""

STARTUP_TRIALS = 3
"""Finished trials before one can be hopeless."""

WARMUP_EPOCHS = 2
"""Epochs that every trial gets."""

STATES = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED, "failed": TrialState.FAIL}
"""What Optuna calls the state of a trial."""


@dataclass(frozen=True)
class Trial:
    """What one trial came to: its state, its figure on validation, and the figure after each epoch of each stage."""

    state: Literal["complete", "pruned", "failed"]
    metric: float | None
    epochs: tuple[tuple[str, int, float], ...]
    seconds: float
    error: str = ""

    def curve(self) -> list[float]:
        """Best figure so far, by epoch."""
        best: list[float] = []
        for _, _, metric in self.epochs:
            best.append(max([metric, *best[-1:]]))
        return best


Round = tuple[Sequence[tuple[str, Point]], Sequence[float]]
"""Trials that are drawn together, by the name and point of each, and the bar that each epoch has to reach."""

Evaluate = Callable[[Sequence[tuple[str, Point]], Sequence[float]], list[Trial]]
"""Does a round."""

SearchOutcome = tuple[Record, list[Record]]
"""The record of a choice, and those of its trials."""


def search(bench: Workspace, job: Job, choices: Choices, evaluate: Evaluate | None = None) -> SearchOutcome:
    """The record of the choice, and those of its trials.

    Args:
        bench: where the study works.
        job: what to search for.
        choices: of the searches that this one needs.
        evaluate: how a round is done; by default one trial after the other, in this process.

    Raises:
        ConfigError: no trial came to a figure.
    """
    evaluate = evaluate or partial(one_by_one, bench, job, choices)
    with closing(rounds(bench, job)) as steps:
        try:
            asked = next(steps)
            while True:
                asked = steps.send(evaluate(*asked))
        except StopIteration as end:
            return end.value


def rounds(bench: Workspace, job: Job) -> Generator[Round, list[Trial], SearchOutcome]:
    """The search from outside: yields each round, is sent what its trials came to, and returns what it found."""
    every = _points(bench.grid.space(job))
    trials = min(bench.plan.trials_of(bench.grid.data(job)), len(every) or sys.maxsize)
    with _study(bench.folder / "search.db", f"{job} {bench.grid.key(job)[:16]}") as study:
        space = {name: _distribution(s) for name, s in bench.grid.space(job).items()}
        while len(finished := _finished(study)) < trials:
            study.sampler = _sampler(job, len(finished), trials)
            for point in every[len(finished) :][: bench.plan.at_once] if len(every) == trials else ():
                study.enqueue_trial(point)
            with _hushed():
                asked = [study.ask(space) for _ in range(min(bench.plan.at_once, trials - len(finished)))]
            named = [(f"{bench.grid.key(job)[:16]}-{len(finished) + i}", t.params) for i, t in enumerate(asked)]
            with _beating(study, asked):
                outcomes = yield named, _bar(finished)
            for trial, outcome in zip(asked, outcomes, strict=True):
                _tell(study, trial, outcome)
        return _choice(study, trials), _records(_finished(study))


def one_by_one(
    bench: Workspace, job: Job, choices: Choices, points: Sequence[tuple[str, Point]], bar: Sequence[float]
) -> list[Trial]:
    """A round in this process."""
    return [attempt(bench, job, choices, name, point, bar) for name, point in points]


def attempt(bench: Workspace, job: Job, choices: Choices, name: str, point: Point, bar: Sequence[float]) -> Trial:
    """One trial; given up once its best figure falls behind the bar of its epoch."""
    seen: list[tuple[str, int, float]] = []

    def watch(stage: str, epoch: int, metric: float | None) -> None:
        seen.append((stage, epoch, metric if metric is not None else float("-inf")))
        at = len(seen) - 1
        if WARMUP_EPOCHS <= at < len(bar) and max(m for _, _, m in seen) < bar[at]:
            raise Abandoned

    started = time.monotonic()

    def trial(state: Literal["complete", "pruned", "failed"], metric: float | None, error: str = "") -> Trial:
        return Trial(state, metric, tuple(seen), time.monotonic() - started, error)

    with bench.run(name, job, watch) as run:
        try:
            metric = validation_figure(bench, job, point, choices, run)
        except Abandoned:
            return trial("pruned", max(m for _, _, m in seen))
        except PocketRecError as error:
            return trial("failed", None, f"{type(error).__name__}: {error}")
    return (
        trial("failed", None, "the validation split decides nothing") if metric is None else trial("complete", metric)
    )


@contextmanager
def _study(path: Path, name: str) -> Iterator[Study]:
    """The stored study; what a dead process left running is marked as failed, and its trial is drawn again."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with waited(Lock(path.with_suffix(".lock"))), _hushed():
        storage = RDBStorage(f"sqlite:///{path}", heartbeat_interval=HEARTBEAT_SECONDS)
    try:
        with _hushed():
            study = optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)
            for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING, TrialState.WAITING)):
                study.tell(trial.number, state=TrialState.FAIL)
        yield study
    finally:
        storage.remove_session()
        storage.engine.dispose()


@contextmanager
def _hushed() -> Iterator[None]:
    """Optuna's warnings on heartbeats, which we send ourselves, are not shown."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        warnings.filterwarnings("ignore", "Heartbeat of storage", UserWarning)
        yield


@contextmanager
def _beating(study: Study, trials: Sequence[optuna.Trial]) -> Iterator[None]:
    """Show in the store, now and then, that the trials are worked on."""
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(HEARTBEAT_SECONDS):
            for trial in trials:
                study._storage.record_heartbeat(trial._trial_id)  # pyright: ignore[reportAttributeAccessIssue]

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def _sampler(job: Job, number: int, trials: int) -> optuna.samplers.TPESampler:
    """The sampler of the round that begins with trial ``number``."""
    seed = derive(job.seed, f"search {job}", number) % 2**32
    return optuna.samplers.TPESampler(n_startup_trials=max(3, trials // 3), seed=seed)


def _points(space: Mapping[str, Space]) -> list[dict[str, Any]]:
    """Every point of a space of choices; none of another."""
    lists = [[(name, value) for value in s.choices] for name, s in space.items() if isinstance(s, Listed)]
    return [dict(point) for point in product(*lists)] if len(lists) == len(space) else []


def _distribution(space: Space) -> BaseDistribution:
    if isinstance(space, Listed):
        return CategoricalDistribution(space.choices)
    if space.whole:
        return IntDistribution(int(space.low), int(space.high), log=space.log, step=int(space.step or 1))
    return FloatDistribution(space.low, space.high, log=space.log, step=space.step)


def _finished(study: Study) -> list[FrozenTrial]:
    """Trials that came to an end in our sense; those that a dead process left half stored do not count."""
    return [t for t in study.get_trials(deepcopy=False) if t.state == STATES.get(t.user_attrs.get("state", ""))]


def _tell(study: Study, trial: optuna.Trial, outcome: Trial) -> None:
    """Store the end of a trial: its curve first, its state last."""
    for epoch, best in enumerate(outcome.curve()):
        trial.report(best, epoch)
    for name, value in reversed(asdict(outcome).items()):
        trial.set_user_attr(name, value)
    study.tell(trial, outcome.metric if outcome.state == "complete" else None, state=STATES[outcome.state])


def _bar(finished: Sequence[FrozenTrial]) -> list[float]:
    """By epoch: the median of the best figures so far of all complete trials, once there are enough of them."""
    curves = [list(t.intermediate_values.values()) for t in finished if t.state == TrialState.COMPLETE]
    longest = max((len(c) for c in curves), default=0)
    columns = [[c[at] for c in curves if len(c) > at] for at in range(longest)]
    return [median(column) if len(column) >= STARTUP_TRIALS else float("-inf") for column in columns]


def _choice(study: Study, trials: int) -> Record:
    """The best complete trial, the earlier one of equals."""
    complete = [t for t in _finished(study) if t.state == TrialState.COMPLETE]
    if not complete:
        errors = sorted({t.user_attrs["error"] for t in _finished(study)})
        raise ConfigError(f"None of {trials} trials came to a figure; the first one says: {errors[0]}")
    best = max(complete, key=lambda t: (t.value, -t.number))
    return {"params": dict(best.params), "metric": best.value, "trials": trials}


def _records(finished: Sequence[FrozenTrial]) -> list[Record]:
    """One record a trial."""
    return [
        {
            "trial": number,
            "params": dict(trial.params),
            "metric": trial.user_attrs["metric"],
            "state": trial.user_attrs["state"],
            "error": trial.user_attrs["error"],
            "curve": [[None, metric] for _, _, metric in trial.user_attrs["epochs"]],
            "seconds": trial.user_attrs["seconds"],
        }
        for number, trial in enumerate(finished)
    ]
