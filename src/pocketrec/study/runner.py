"""The study at work: every job of a plan once, each a record of the journal, by as many processes as like to.

Killed at any moment and started again, only what is missing runs. A job that fails is a ``failed`` record with its
error, as is every job that needs it; the next start tries it again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pocketrec.errors import ConfigError, RunLocked
from pocketrec.files import Journal, Lock, atomic_write, canonical_json, digest, parse_json
from pocketrec.study.cells import Choices, Record, Workspace, cell, dense, profiles
from pocketrec.study.jobs import Grid, Job
from pocketrec.study.plan import Plan
from pocketrec.study.profiling.profile import machine
from pocketrec.study.recipe import Point
from pocketrec.training.run import torch_threads
from pocketrec.training.steps import Progress

POLL_SECONDS = 0.2


@dataclass
class JournalState:
    """What the journal of a study says: finished jobs by key, and failures of this and of earlier starts."""

    journal: Journal
    done: dict[str, Record]
    failed: dict[str, str]

    @classmethod
    def read(cls, folder: Path) -> JournalState:
        """The journal of a folder; earlier failures are to be tried again."""
        known = cls(Journal(folder / "journal"), {}, {})
        known.refresh()
        return known

    def refresh(self) -> None:
        """See what other processes have finished."""
        self.done = {r["key"]: r for r in self.journal.read() if r["kind"] in ("cell", "choice") or "last" in r}


def run_study(
    plan: Plan,
    folder: str | Path,
    *,
    store: str | Path | None = None,
    progress: Progress | None = None,
    workers: Workers | None = None,
) -> dict[str, int]:
    """Do what is missing of a study.

    Args:
        plan: what is studied.
        folder: of the study; another process may work in it at the same time.
        store: of trained models, shared by any number of studies; by default inside the folder.
        progress: told how many jobs are done.
        workers: who does the jobs; by default this process.

    Returns:
        How many jobs are ``done`` and ``failed``.

    Raises:
        ConfigError: the folder holds another study.
    """
    context = prepare(plan, folder, store, progress)
    known = JournalState.read(context.folder)
    (workers or in_process)(context, known, progress or _quiet)
    known.refresh()
    keys = {context.grid.key(job) for job in context.grid.jobs}
    done = len(keys & known.done.keys())
    return {"done": done, "failed": len(keys) - done}


Workers = Callable[[Workspace, JournalState, Progress], None]
"""Does every job that is missing, and journals it."""


def prepare(plan: Plan, folder: str | Path, store: str | Path | None, progress: Progress | None = None) -> Workspace:
    """The folder of a study, with its plan in it, and the jobs that the plan makes: records of others are stale."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    document = folder / "plan.json"
    grid = Grid(plan)
    jobs = [{**job.labels(), "key": grid.key(job)} for job in grid.jobs]
    if document.exists() and (old := parse_json(document.read_bytes()))["name"] != plan.name:
        raise ConfigError(f"{folder} holds the study {old['name']!r}, not {plan.name!r}; choose another folder.")
    atomic_write(document, canonical_json({**plan.to_json(), "jobs": jobs}))
    atomic_write(folder / "machine.json", canonical_json(machine(plan.device)))
    return Workspace(plan, folder, Path(store) if store else folder / "store", progress)


def in_process(context: Workspace, known: JournalState, tell: Progress) -> None:
    """Job after job in this process; what another process works on is left to it."""
    while True:
        waiting = advanced = False
        for job in context.grid.jobs:
            at = state(context, known, job)
            if at == "ready":
                with torch_threads(context.plan.threads):
                    taken = _claimed(context, known, job)
                advanced, waiting = advanced or taken, waiting or not taken
                report(context, known, tell)
            waiting = waiting or at == "waiting"
        if not (waiting or advanced):
            return
        if not advanced:
            time.sleep(POLL_SECONDS)
            known.refresh()


def state(context: Workspace, known: JournalState, job: Job) -> str:
    """Whether a job is ``over``, ``waiting`` for another, or ``ready``; what needs a failed job fails."""
    key = context.grid.key(job)
    if key in known.done or key in known.failed:
        return "over"
    for needed in context.grid.needs(job):
        other = context.grid.key(needed)
        if other in known.failed:
            fail(context, known, job, f"needs {needed}, which failed")
            return "over"
        if other not in known.done:
            return "waiting"
    return "ready"


def claim(context: Workspace, job: Job) -> Lock:
    """What a process holds while it does a job, so that no other takes one of its group."""
    locks = context.folder / "locks"
    locks.mkdir(exist_ok=True)
    return Lock(locks / digest(list(job.group))[:16])


def _claimed(context: Workspace, known: JournalState, job: Job) -> bool:
    """Do a job unless another process has it, or its group."""
    try:
        with claim(context, job):
            known.refresh()
            if context.grid.key(job) not in known.done:
                record(context, known, job, *attempt(context, job, choices_of(context, known)))
    except RunLocked:
        return False
    return True


def attempt(context: Workspace, job: Job, choices: Choices) -> tuple[list[Record], str]:
    """The records of a job, or the error that stopped it; only signals get through, and that another has it."""
    try:
        return WORK[job.kind](context, job, choices), ""
    except RunLocked:
        raise
    except Exception as error:
        return [], error_text(error)


def error_text(error: BaseException) -> str:
    """An error as a record says it."""
    return f"{type(error).__name__}: {error}"


def _cell(context: Workspace, job: Job, choices: Choices) -> list[Record]:
    return [{"kind": "cell", **cell(context, job, choices)}]


def _choice(context: Workspace, job: Job, choices: Choices) -> list[Record]:
    from pocketrec.study.search import search

    return searched(*search(context, job, choices))


def searched(choice: Record, trials: Sequence[Record]) -> list[Record]:
    """The records of a search; that of the choice finishes it."""
    return [*({"kind": "trial", **t} for t in trials), {"kind": "choice", **choice}]


def _anatomy(context: Workspace, job: Job, choices: Choices) -> list[Record]:
    from pocketrec.study.anatomy import anatomy

    table = dense(context, job, choices).table
    blocks = anatomy(table.weight().detach().numpy(), context.data(job).counts, table.blocks)
    return [{"kind": "anatomy", "blocks": blocks, "last": True}]


def _efficiency(context: Workspace, job: Job, choices: Choices) -> list[Record]:
    records = [{"kind": "efficiency", **r} for r in profiles(context, job, choices)]
    return [*records[:-1], {**records[-1], "last": True}]


WORK: Mapping[str, Callable[[Workspace, Job, Choices], list[Record]]] = {
    "cell": _cell,
    "choice": _choice,
    "anatomy": _anatomy,
    "efficiency": _efficiency,
}
"""How each kind of job is done; the last record says that it is."""


def record(context: Workspace, known: JournalState, job: Job, records: list[Record], error: str) -> None:
    """Journal what came of a job; the record that finishes it comes last."""
    if error:
        fail(context, known, job, error)
        return
    key = context.grid.key(job)
    noted = {r["trial"] for r in known.journal.read() if r["key"] == key and r["kind"] == "trial"}
    for found in records:
        if found.get("trial") not in noted:
            known.journal.append({**job.labels(), "key": key, **found})
    known.done[key] = {**job.labels(), "key": key, **records[-1]}


def fail(context: Workspace, known: JournalState, job: Job, error: str) -> None:
    """Journal a failure."""
    key = context.grid.key(job)
    known.failed[key] = error
    known.journal.append({**job.labels(), "key": key, "kind": "failed", "job": job.kind, "error": error})


def choices_of(context: Workspace, known: JournalState) -> dict[Job, Point]:
    """What finished searches have chosen."""
    keys = {context.grid.key(job): job for job in context.grid.jobs if job.kind == "choice"}
    return {job: known.done[key]["params"] for key, job in keys.items() if key in known.done}


def report(context: Workspace, known: JournalState, tell: Progress) -> None:
    """Say how far the study is."""
    tell("jobs", len(known.done), len(context.grid.jobs), {"failed": float(len(known.failed))})


def _quiet(stage: str, done: int, total: int, figures: Mapping[str, float]) -> None:
    """Progress that nobody watches."""
