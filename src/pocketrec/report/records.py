"""The records of a study's folder, read and sorted; a cell that was tried again counts as it ended last."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketrec.errors import ArtifactError, DataError
from pocketrec.files import Journal, parse_json
from pocketrec.format.arrays import open_arrays
from pocketrec.schema import Task

ORIGINAL = "original"
DENSE = "dense"

JournalRecord = Mapping[str, Any]
StoredArrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Metric:
    """A figure of quality.

    Attributes:
        name: as records have it.
        title: as people read it.
        rising: whether more is better.
        chance: what no model at all reaches.
        margin: a difference that does not matter: absolute, or a share of the original where ``relative``.
    """

    name: str
    title: str
    rising: bool = True
    chance: float = 0.0
    margin: float = 0.0
    relative: bool = False


METRICS: Mapping[Task, tuple[Metric, ...]] = {
    "ctr": (Metric("auc", "AUC", chance=0.5, margin=0.001), Metric("logloss", "log-loss", rising=False)),
    "cf": (
        Metric("ndcg@20", "NDCG@20", margin=0.01, relative=True),
        Metric("recall@20", "recall@20"),
        Metric("recall_capped@20", "recall@20 capped"),
    ),
}
"""The first one of a task is the one that decides."""


@dataclass(frozen=True)
class Pairing:
    """A data set and a backbone."""

    data: str
    backbone: str

    def __str__(self) -> str:
        """For people."""
        return f"{self.data} · {self.backbone}"


@dataclass(frozen=True)
class Place:
    """Where a cell stands in the study, but for its seed."""

    pair: Pairing
    method: str
    budget: str


@dataclass(frozen=True)
class Study:
    """Everything that a folder records of the jobs of its plan.

    Attributes:
        folder: where it lies.
        plan: the resolved plan.
        machine: what it ran on, if that was written.
        planned: seeds of every place, in the plan's order.
        cells: final records by place and seed.
        failures: errors of cells that did not end well.
        others: records of other kinds, in order.
        ledger: reads of test splits.
    """

    folder: Path
    plan: JournalRecord
    machine: JournalRecord
    planned: Mapping[Place, tuple[int, ...]]
    cells: Mapping[Place, Mapping[int, JournalRecord]]
    failures: Mapping[Place, Mapping[int, str]]
    others: tuple[JournalRecord, ...]
    ledger: tuple[JournalRecord, ...]

    @classmethod
    def read(cls, folder: str | Path) -> Study:
        """Read a folder that ``pocketrec bench`` has made; nothing in it is changed.

        Records of jobs that an earlier plan had and this one has not are left out.

        Raises:
            DataError: there is no study.
            ArtifactError: a record or the plan is damaged.
        """
        folder = Path(folder)
        if not (folder / "plan.json").is_file():
            raise DataError(
                f"Expected the folder of a study, but {folder} has no plan.json; make one: "
                "pocketrec bench PLAN.toml --out DIR."
            )
        plan = _document(folder / "plan.json")
        missing = [key for key in ("name", "data", "methods", "jobs") if key not in plan]
        if missing:
            raise ArtifactError(f"{folder / 'plan.json'} must have {', '.join(missing)}, but has not; run bench again.")
        keys = {job["key"] for job in plan["jobs"]}
        records = [r for r in _journal(folder, "journal") if r.get("key") in keys]
        cells, failures = _final(records, folder)
        machine = _document(folder / "machine.json") if (folder / "machine.json").is_file() else {}
        others = tuple(r for r in records if r["kind"] not in ("cell", "failed"))
        ledger = tuple(r for r in _journal(folder, "ledger") if r.get("key") in keys)
        return cls(folder, plan, machine, _planned(plan), cells, failures, others, ledger)

    def of_kind(self, kind: str) -> list[JournalRecord]:
        """Records of another kind than cells."""
        return [r for r in self.others if r["kind"] == kind]

    @cached_property
    def tasks(self) -> Mapping[str, Task]:
        """The task of every data set that has a cell."""
        return {p.pair.data: task_of(r) for p, by_seed in self.cells.items() for r in by_seed.values()}

    def task(self, pair: Pairing) -> Task | None:
        """The task of a pair, as far as any record tells."""
        return self.tasks.get(pair.data)

    @cached_property
    def pairs(self) -> tuple[Pairing, ...]:
        """Data sets with the backbones that fit them, in the plan's order."""
        return tuple(dict.fromkeys(place.pair for place in self.planned))

    @cached_property
    def methods(self) -> tuple[str, ...]:
        """Labels of methods in the plan's order, without the original."""
        return tuple(dict.fromkeys(place.method for place in self.planned if place.method != ORIGINAL))

    def budgets(self, data: str) -> tuple[str, ...]:
        """Budgets of a data set, as planned."""
        found = (p.budget for p in self.planned if p.pair.data == data and p.method != ORIGINAL)
        return tuple(dict.fromkeys(found))

    def seeds(self, data: str) -> tuple[int, ...]:
        """Seeds of a data set, as planned."""
        return next(seeds for place, seeds in self.planned.items() if place.pair.data == data)

    def places(self, pair: Pairing) -> list[Place]:
        """Every place of a pair: the original, then budget by budget all its methods."""
        order = (DENSE, *self.budgets(pair.data))
        return sorted((p for p in self.planned if p.pair == pair), key=lambda p: order.index(p.budget))

    def count(self) -> dict[str, int]:
        """Planned cells that are ``done``, ``failed`` and ``missing``."""
        planned = [(place, seed) for place, seeds in self.planned.items() for seed in seeds]
        done = sum(s in self.cells.get(p, {}) for p, s in planned)
        failed = sum(s in self.failures.get(p, {}) for p, s in planned)
        return {"done": done, "failed": failed, "missing": len(planned) - done - failed}

    def values(self, place: Place, metric: str) -> dict[int, float]:
        """A test figure by seed; a figure that is not defined is left out."""
        found = {seed: record["test"].get(metric) for seed, record in self.cells.get(place, {}).items()}
        return {seed: float(value) for seed, value in sorted(found.items()) if value is not None}

    def mean(self, place: Place, *path: str) -> float | None:
        """Mean over seeds of a number inside the records of a place."""
        numbers = [n for r in self.cells.get(place, {}).values() if (n := _inside(r, path)) is not None]
        return float(np.mean(numbers)) if numbers else None

    def predictions(self, record: JournalRecord) -> StoredArrays | None:
        """What the test split came to, per row or per user; with ``labels`` for click data; ``None`` if not kept."""
        path = record.get("predictions")
        if path is None or not (self.folder / path).is_file():
            return None
        arrays = dict(open_arrays(self.folder / path)[0])
        if "logits" in arrays:
            labels = self.folder / "labels" / f"{record['data']}-{record['seed']}.safetensors"
            if not labels.is_file():
                return None
            arrays["labels"] = open_arrays(labels)[0]["labels"]
        return arrays


def task_of(record: JournalRecord) -> Task:
    """Click data have an AUC."""
    return "ctr" if "auc" in record["test"] else "cf"


def deviation(values: Iterable[float]) -> float | None:
    """Standard deviation over seeds; ``None`` for a single one."""
    figures = list(values)
    return float(np.std(figures, ddof=1)) if len(figures) > 1 else None


def _planned(plan: JournalRecord) -> dict[Place, tuple[int, ...]]:
    """Seeds of the cells that a plan asks for."""
    found: dict[Place, tuple[int, ...]] = {}
    for job in plan["jobs"]:
        if job["kind"] == "cell":
            place = Place(Pairing(job["data"], job["backbone"]), job["method"], job["budget"])
            found[place] = (*found.get(place, ()), job["seed"])
    return found


def _final(
    records: Iterable[JournalRecord], folder: Path
) -> tuple[dict[Place, dict[int, JournalRecord]], dict[Place, dict[int, str]]]:
    """Cells and failures; the last record of a place and seed counts."""
    cells: dict[Place, dict[int, JournalRecord]] = {}
    failures: dict[Place, dict[int, str]] = {}
    for record in records:
        if record["kind"] == "cell" or (record["kind"] == "failed" and record.get("job", "cell") == "cell"):
            try:
                place = Place(Pairing(record["data"], record["backbone"]), record["method"], record["budget"])
                seed, good = record["seed"], record["kind"] == "cell"
                if good and not {"test", "bytes", "values"} <= record.keys():
                    raise KeyError("test, bytes or values")
            except KeyError as error:
                raise ArtifactError(f"{folder / 'journal'}: a record lacks {error}; restore the file.") from error
            for other in (cells, failures):
                other.get(place, {}).pop(seed, None)
            if good:
                cells.setdefault(place, {})[seed] = record
            else:
                failures.setdefault(place, {})[seed] = str(record.get("error", "no error was recorded"))
    return {p: c for p, c in cells.items() if c}, {p: f for p, f in failures.items() if f}


def _document(path: Path) -> JournalRecord:
    try:
        document = parse_json(path.read_bytes())
    except ValueError as error:
        raise ArtifactError(f"{path} is not JSON ({error}); restore the file, or run bench again.") from error
    if not isinstance(document, dict):
        raise ArtifactError(f"{path} must hold an object, but holds another document; run bench again.")
    return document


def _journal(folder: Path, name: str) -> list[JournalRecord]:
    """Records of a journal, if it exists; reading must not make one."""
    for path in (folder / name, folder / f"{name}.journal"):
        if path.is_file():
            return list(Journal(path).read())
    return []


def _inside(record: JournalRecord, path: tuple[str, ...]) -> float | None:
    """A finite number at a path of keys, or ``None``."""
    found: Any = record
    for key in path:
        found = found.get(key) if isinstance(found, Mapping) else None
    return float(found) if isinstance(found, int | float) and math.isfinite(found) else None
