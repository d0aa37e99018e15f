"""Evidence in a file: what stored predictions came to, so that a report can be made again where they are not kept.

Predictions take megabytes for each cell, and what a report tells of them a few numbers. A report leaves these in
``evidence.json``; beside a plan and a journal without predictions the next report takes them from there, as long as
they are of the same records, the same number of draws and the same seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pocketrec.errors import ArtifactError
from pocketrec.evaluation.statistics import Interval
from pocketrec.files import canonical_json, digest, parse_json
from pocketrec.report.compare import LEVEL, REPLICATES, Comparison, Evidence, evidence
from pocketrec.report.records import METRICS, Metric, Pairing, Place, Study

NAME = "evidence.json"


def known_evidence(study: Study, *, replicates: int = REPLICATES, seed: int = 0) -> dict[Pairing, dict[str, Evidence]]:
    """Everything that can be said, by pair and metric: computed, or from the file of a pair that lacks predictions.

    Raises:
        ArtifactError: the file is damaged.
    """
    file = _entries(study.folder)
    known = {}
    for pair in study.pairs:
        entry = file.get((pair.data, pair.backbone)) if _lacks_predictions(study, pair) else None
        if entry is not None and entry.get("of") == _of(study, pair, replicates, seed):
            known[pair] = _read(study, pair, entry)
        else:
            known[pair] = evidence(study, pair, replicates=replicates, seed=seed)
    return known


def content(
    study: Study, known: Mapping[Pairing, Mapping[str, Evidence]], *, replicates: int = REPLICATES, seed: int = 0
) -> bytes | None:
    """The file of the pairs whose rows were resampled; ``None`` if there are none."""
    pairs = [
        {
            "data": pair.data,
            "backbone": pair.backbone,
            "of": _of(study, pair, replicates, seed),
            "metrics": {name: _written(e) for name, e in by_metric.items()},
        }
        for pair, by_metric in known.items()
        if any(e.intervals for e in by_metric.values())
    ]
    return canonical_json({"pairs": pairs}) + b"\n" if pairs else None


def _lacks_predictions(study: Study, pair: Pairing) -> bool:
    """Whether a record names predictions that are not in the folder."""
    records = [r for place in study.places(pair) for r in study.cells.get(place, {}).values()]
    return any(r.get("predictions") is not None and study.predictions(r) is None for r in records)


def _of(study: Study, pair: Pairing, replicates: int, seed: int) -> str:
    """The digest of all that the evidence of a pair depends on, predictions by the figures that they came to."""
    cells = [
        (place.method, place.budget, study.planned[place], number, record["test"])
        for place in study.places(pair)
        for number, record in sorted(study.cells.get(place, {}).items())
    ]
    return digest([cells, replicates, seed])


def _entries(folder: Path) -> dict[tuple[str, str], Mapping[str, Any]]:
    """What the file says, by pair; it lies beside the plan, or where the last report left it."""
    for path in (folder / NAME, folder / "report" / NAME):
        if path.is_file():
            try:
                return {(e["data"], e["backbone"]): e for e in parse_json(path.read_bytes())["pairs"]}
            except (ValueError, TypeError, KeyError) as error:
                raise ArtifactError(
                    f"{path} is damaged ({error!r}); restore it, or delete it and report again."
                ) from error
    return {}


def _written(found: Evidence) -> dict[str, Any]:
    """All of it that a report shows."""
    return {
        "intervals": _rows(found.intervals),
        "against": _rows(found.against),
        "marks": [(p.method, p.budget, mark) for p, mark in found.marks.items()],
        "comparisons": [
            (c.place.method, c.other.method, c.place.budget, *_numbers(c.interval), c.corrected, c.how)
            for c in found.comparisons
        ],
    }


def _rows(intervals: Mapping[Place, Interval]) -> list[tuple[Any, ...]]:
    return [(p.method, p.budget, *_numbers(i)) for p, i in intervals.items()]


def _numbers(interval: Interval) -> tuple[float, float, float]:
    return interval.estimate, interval.low, interval.high


def _read(study: Study, pair: Pairing, entry: Mapping[str, Any]) -> dict[str, Evidence]:
    """The evidence of a pair as it was written."""
    task = study.task(pair)
    metrics = {m.name: m for m in METRICS[task]} if task is not None else {}
    try:
        return {name: _evidence(metrics[name], pair, found) for name, found in entry["metrics"].items()}
    except (ValueError, TypeError, KeyError) as error:
        raise ArtifactError(
            f"The {NAME} of {study.folder} is damaged at {pair} ({error!r}); restore it, or delete it and report again."
        ) from error


def _evidence(metric: Metric, pair: Pairing, found: Mapping[str, Any]) -> Evidence:
    return Evidence(
        metric,
        _intervals(pair, found["intervals"]),
        _intervals(pair, found["against"]),
        {Place(pair, method, budget): mark for method, budget, mark in found["marks"]},
        tuple(
            Comparison(Place(pair, a, budget), Place(pair, b, budget), metric.name, _interval(*numbers), corrected, how)
            for a, b, budget, *numbers, corrected, how in found["comparisons"]
        ),
        from_file=True,
    )


def _intervals(pair: Pairing, rows: Iterable[Sequence[Any]]) -> dict[Place, Interval]:
    return {Place(pair, method, budget): _interval(*numbers) for method, budget, *numbers in rows}


def _interval(estimate: float, low: float, high: float) -> Interval:
    """An interval as shown; evidence against zero is kept only where it is corrected."""
    return Interval(estimate, low, high, math.nan, LEVEL)
