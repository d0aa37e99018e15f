"""Studies small enough to run whole in a test, and what their records come to without the clock."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from pocketrec.files import Journal
from pocketrec.study.plan import Plan, parse

CLICKS: dict[str, Any] = {
    "budgets": ["sparsity=0.5", "50%"],
    "seeds": [0, 1],
    "trials": 3,
    "data": {"clicks": {"source": "synthetic", "rows": 1500, "cardinalities": [60, 20, 5]}},
    "backbone": {
        "deepfm": {
            "dim": 4,
            "hidden": [8],
            "dropout": {"low": 0.0, "high": 0.5},
            "training": {"epochs": 2, "batch_size": 256, "learning_rate": {"low": 1e-3, "high": 1e-1, "log": True}},
        }
    },
    "method": {"random": {}, "mag_prune": {"n_min": {"choices": [0, 1]}}},
}

CLOCK = ("seconds", "latency_us", "peak_mib", "curve")
"""What a resumed or distributed study may say differently: times, memory, the curve of a trial not repeated."""


def plan(changes: dict[str, Any] | None = None, **more: Any) -> Plan:
    """The small plan with some of its tables or keys replaced; dots go deeper."""
    document = copy.deepcopy(CLICKS)
    for path, value in {**(changes or {}), **more}.items():
        *tables, key = path.split(".")
        place = document
        for table in tables:
            place = place.setdefault(table, {})
        place[key] = value
    return parse(document, "small")


def pairs_file(folder: Path) -> Path:
    """Adjacency lists of 30 users with 8 of 25 items each."""
    path = folder / "pairs.txt"
    lists = [[(3 * user + step * (1 + user % 4)) % 25 for step in range(8)] for user in range(30)]
    path.write_text("".join(" ".join(map(str, [u, *sorted(set(items))])) + "\n" for u, items in enumerate(lists)))
    return path


def records(folder: Path, clock: tuple[str, ...] = CLOCK) -> list[dict[str, Any]]:
    """Everything in the journal, in the order of its keys, without the clock."""
    found = [{k: v for k, v in r.items() if k not in clock} for r in Journal(folder / "journal").read()]
    return sorted(found, key=lambda r: (r["key"], r["kind"], r.get("trial", -1)))
