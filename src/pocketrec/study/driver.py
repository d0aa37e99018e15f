"""A study on a Ray cluster: every job, every trial of a search and every shard of a scoring run is a task of its own.

The driver does what :func:`pocketrec.study.runner.in_process` does, but has the work done: it alone writes the journal
and the searches' store, and it holds the lock of each job's group. All work in one folder, on a file system that they
share. A task whose node dies is run again on another, and goes on from the checkpoint that it left in the store; so the
records are those of one process.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from pocketrec.distributed.cluster import Share, compute_parts, connection
from pocketrec.errors import ConfigError, RunLocked, StorageError
from pocketrec.files import Lock, atomic_write, digest, remove
from pocketrec.study import runner
from pocketrec.study.cells import Choices, Record, Workspace
from pocketrec.study.jobs import Job
from pocketrec.study.plan import Plan
from pocketrec.study.recipe import Point
from pocketrec.study.runner import JournalState, Workers
from pocketrec.study.search import Trial, rounds
from pocketrec.study.search import attempt as attempt_trial
from pocketrec.training.steps import Progress

REFRESH_SECONDS = 2.0
"""How often the driver looks for what other processes have finished while it waits for its tasks."""

GRACE_SECONDS = 20.0
"""How long interrupted tasks may take to reach a checkpoint."""

SIGHT_SECONDS = 3.0
"""How long a shared file system may take to show a new file."""

ENVIRONMENT = ("POCKETREC_DATA", "POCKETREC_CACHE")
"""Variables that workers take over from the driver."""

JobOutcome = tuple[list[Record], str]
"""The records of a job, or the error that stopped it."""

T = TypeVar("T")

Steps = Generator[list[Any], list[Any], JobOutcome]
"""A job under way: yields tasks, is sent what they came to, returns its outcome."""


def on_cluster(address: str) -> Workers:
    """Who does the jobs of a study: the workers of a Ray cluster.

    Args:
        address: ``local:N`` starts ``N`` nodes on this machine, each for one job at a time; ``ray://HOST:PORT``,
            ``HOST:PORT`` and ``auto`` are clusters that run. A job takes the plan's threads, and a GPU where the
            plan's device is one.

    Raises:
        ConfigError: the address is none; once at work, no cluster answers, or no node has what a job takes.
        StorageError: once at work, a worker does not see the folder of the study, or no node could be started.

    Example:
        >>> workers = on_cluster("local:2")
    """
    connect = connection(address)

    def work(context: Workspace, known: JournalState, tell: Progress) -> None:
        share = share_of(context.plan)
        with connect(share), _place(context, share) as place:
            _Driver(context, known, tell, place).work()

    return work


# ---- workers ---------------------------------------------------------------------------------------------------------


def share_of(plan: Plan) -> Share:
    """What each job of a plan takes of a node."""
    return Share(plan.threads, int(plan.device.startswith("cuda")))


@dataclass(frozen=True)
class WorkerContext:
    """What a worker has to know of a study; a process opens it once.

    Attributes:
        plan: what is studied.
        identity: digest of the plan.
        folder: of the study.
        store: of trained models.
        mark: a file in the folder by which a worker knows that it is the driver's.
        environment: variables that it takes over.
        share: what a task takes.
    """

    plan: Plan = field(compare=False)
    identity: str
    folder: Path
    store: Path
    mark: str
    environment: tuple[tuple[str, str], ...]
    share: Share

    def open(self) -> Workspace:
        """The study as it is seen from here.

        Raises:
            StorageError: the folder is not the driver's.
        """
        os.environ.update(self.environment)
        torch.set_num_threads(self.share.threads)
        until = time.monotonic() + SIGHT_SECONDS
        while not (self.folder / self.mark).exists():
            if time.monotonic() > until:
                raise StorageError(
                    f"The worker on {socket.gethostname()} does not see {self.folder}; choose a folder on a file "
                    "system that all nodes share, mounted at the same place."
                )
            time.sleep(runner.POLL_SECONDS)
        return _opened(self)


@lru_cache(maxsize=1)
def _opened(place: WorkerContext) -> Workspace:
    return Workspace(place.plan, place.folder, place.store, helpers=partial(compute_parts, place.share.threads))


@contextmanager
def _place(context: Workspace, share: Share) -> Iterator[WorkerContext]:
    """The study as its workers need it, with a mark in its folder."""
    folder, store = context.folder.resolve(), context.store.resolve()
    known = tuple((name, os.environ[name]) for name in ENVIRONMENT if name in os.environ)
    mark = f".driver-{secrets.token_hex(8)}"
    atomic_write(folder / mark, b"")
    try:
        yield WorkerContext(context.plan, digest(context.plan.to_json()), folder, store, mark, known, share)
    finally:
        remove(folder / mark)


def _do(place: WorkerContext, job: Job, choices: Choices) -> JobOutcome:
    """Task: a job."""
    context = place.open()
    return _once_free(partial(runner.attempt, context, job, choices))


def _try(
    place: WorkerContext, job: Job, choices: Choices, name: str, point: Point, bar: Sequence[float]
) -> Trial | str:
    """Task: a trial, or the error that stopped it."""
    context = place.open()
    try:
        return _once_free(partial(attempt_trial, context, job, choices, name, point, bar))
    except Exception as error:
        return runner.error_text(error)


def _once_free(work: Callable[[], T]) -> T:
    """What a lost node still holds is waited for."""
    while True:
        try:
            return work()
        except RunLocked:
            time.sleep(runner.POLL_SECONDS)


# ---- the driver ------------------------------------------------------------------------------------------------------


@dataclass
class _RunningJob:
    """A job under way: its group's lock, its steps, and the tasks that it waits for."""

    lock: Lock
    steps: Steps
    tasks: list[Any]


class _Driver:
    """Hands out jobs and journals what comes back."""

    def __init__(self, context: Workspace, known: JournalState, tell: Progress, place: WorkerContext) -> None:
        self.context, self.known, self.tell = context, known, tell
        self.share = place.share
        self.sent = ray.put(place)
        self.job, self.trial = self.share.task(_do), self.share.task(_try)
        self.doing: dict[Job, _RunningJob] = {}
        self.refreshed = time.monotonic()

    def work(self) -> None:
        """Until nothing is left to do, here or by another process."""
        try:
            while self._hand_out() or self.doing:
                self._collect()
        finally:
            self._stop()

    def _hand_out(self) -> bool:
        """Start as many jobs as fit; whether one waits for another process."""
        free = self._fitting() - sum(len(doing.tasks) for doing in self.doing.values())
        busy = {job.group for job in self.doing}
        waiting = False
        for job in self.context.grid.jobs:
            at = "doing" if job in self.doing else runner.state(self.context, self.known, job)
            waiting = waiting or at in ("ready", "waiting")
            if at == "ready" and free > 0 and job.group not in busy and self._start(job):
                free -= 1
                busy.add(job.group)
        return waiting

    def _fitting(self) -> int:
        if not (fitting := self.share.fitting()):
            gpu = " and a GPU" if self.share.gpus else ""
            raise ConfigError(
                f"A job takes {self.share.threads} CPUs{gpu}, but no node of the cluster has that; add one, or lower "
                "the plan's `threads`."
            )
        return fitting

    def _start(self, job: Job) -> bool:
        """Hand a job out unless another process has it, or its group."""
        lock = runner.claim(self.context, job)
        try:
            lock.__enter__()
        except RunLocked:
            return False
        self.known.refresh()
        if self.context.grid.key(job) in self.known.done:
            lock.__exit__(None, None, None)
            return False
        self.doing[job] = _RunningJob(lock, self._search(job) if job.kind == "choice" else self._once(job), [])
        self._advance(job, None)
        return True

    def _once(self, job: Job) -> Steps:
        """A job that is one task."""
        return (yield [self.job.remote(self.sent, job, runner.choices_of(self.context, self.known))])[0]

    def _search(self, job: Job) -> Steps:
        """A search: rounds of trials side by side, between which its sampler, here, learns from them."""
        choices = runner.choices_of(self.context, self.known)
        steps = rounds(self.context, job)
        try:
            named, bar = next(steps)
            while True:
                outcomes = yield [self.trial.remote(self.sent, job, choices, name, point, bar) for name, point in named]
                if errors := [outcome for outcome in outcomes if isinstance(outcome, str)]:
                    return [], errors[0]
                named, bar = steps.send(outcomes)
        except StopIteration as end:
            return runner.searched(*end.value), ""
        finally:
            steps.close()

    def _advance(self, job: Job, results: list[Any] | None) -> None:
        """Give a job what its tasks came to, and take its next ones; or end it."""
        doing = self.doing[job]
        try:
            doing.tasks = next(doing.steps) if results is None else doing.steps.send(results)
        except StopIteration as end:
            self._end(job, *end.value)
        except Exception as error:
            self._end(job, [], runner.error_text(error))

    def _end(self, job: Job, records: list[Record], error: str) -> None:
        """Journal the outcome of a job."""
        runner.record(self.context, self.known, job, records, error)
        doing = self.doing.pop(job)
        doing.steps.close()
        doing.lock.__exit__(None, None, None)
        runner.report(self.context, self.known, self.tell)

    def _collect(self) -> None:
        """Wait for a task, a little, and go on with every job whose tasks are done."""
        tasks = [task for doing in self.doing.values() for task in doing.tasks]
        if tasks:
            ray.wait(tasks, timeout=runner.POLL_SECONDS)
        else:
            time.sleep(runner.POLL_SECONDS)
        over = set(ray.wait(tasks, num_returns=len(tasks), timeout=0)[0] if tasks else ())
        if not over and time.monotonic() - self.refreshed > REFRESH_SECONDS:
            self.known.refresh()
            self.refreshed = time.monotonic()
        for job, doing in list(self.doing.items()):
            if over.issuperset(doing.tasks):
                self._finish(job, doing.tasks)

    def _finish(self, job: Job, tasks: list[Any]) -> None:
        """Go on with a job whose tasks are done."""
        try:
            results = ray.get(tasks)
        except RayTaskError as error:
            raise error.cause from error
        except RayError as error:
            self._end(job, [], runner.error_text(error))
        else:
            self._advance(job, results)

    def _stop(self) -> None:
        """Interrupt what still runs, and let it reach a checkpoint."""
        tasks = [task for doing in self.doing.values() for task in doing.tasks]
        for task in tasks:
            ray.cancel(task)
        if tasks:
            with suppress(RayError):
                ray.wait(tasks, num_returns=len(tasks), timeout=GRACE_SECONDS)
        for doing in self.doing.values():
            doing.steps.close()
            doing.lock.__exit__(None, None, None)
