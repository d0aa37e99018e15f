"""The table beside the papers: their figures, ours, and what ours took."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from pocketrec.evaluation.statistics import retained
from pocketrec.report import formats
from pocketrec.report.papers import PUBLISHED, beside, data_set, is_sample, lightgcn
from pocketrec.report.records import DENSE, METRICS, ORIGINAL, JournalRecord, Metric, Place, Study
from pocketrec.report.sheet import BLANK, Sheet, SheetColumn, SheetEntry, SheetRow
from pocketrec.report.tables.place import PLACE, PlaceStatus, place_entries, ratio
from pocketrec.report.tables.provenance import first_records
from pocketrec.report.tables.transfer import retention


def published(study: Study, data: str) -> Sheet:
    """Every place of a data set: the benchmark's figures of Tables 5 and 6, ours, and what ours took."""
    pairs = [p for p in study.pairs if p.data == data]
    task = study.task(pairs[0]) or "ctr"
    metrics = [m for m in METRICS[task] if m.name in PUBLISHED]
    places = [place for pair in pairs for place in study.places(pair)]
    notes = [
        "Difference: ours − published, and its share of the published figure. A dash: not published, or not noted. "
        "Time is that of all training and compression of a model, median over seeds; the training of the original that "
        "a method shrinks is the original's. Memory is the most that its process held, all that it loaded included. "
        "Settings are those that the plan names or searches; below the original only what differs from it.",
    ]  # fmt: skip
    notes += ["Recall is the capped one, as in the papers: hits over min(relevant, 20)."] if task == "cf" else []
    if is_sample(data):
        notes.append(f"{data} is a sample of {data_set(data)}: absolute figures are not comparable.")
    notes += [note for pair in pairs if (note := lightgcn(study, pair)) is not None]
    columns = [*PLACE]
    for i, m in enumerate(metrics):
        columns += [
            SheetColumn("published", m.title),
            SheetColumn("ours", m.title),
            SheetColumn("difference", m.title, hidden=i > 0),
        ]
        columns.append(SheetColumn("difference %", m.title, hidden=True))
    columns += [
        SheetColumn("retained", hidden=True),
        SheetColumn("published retained", hidden=True),
        SheetColumn("values"),
    ]
    columns += [
        SheetColumn("published values", hidden=True),
        SheetColumn("seeds"),
        SheetColumn("time"),
        SheetColumn("memory"),
    ]
    columns += [SheetColumn("settings", words=True), SheetColumn("source", words=True, hidden=True)]
    rows = (SheetRow(_beside(study, place, metrics), str(place.pair)) for place in places)
    return Sheet(
        f"published-{data}", f"Beside the published figures on {data}", tuple(columns), tuple(rows), tuple(notes)
    )


def _beside(study: Study, place: Place, metrics: Sequence[Metric]) -> tuple[SheetEntry, ...]:
    """One row beside the published one, as far as each of both is there."""
    theirs, view = beside(study, place), PlaceStatus(study, place)
    entries = [*place_entries(place)]
    for metric in metrics:
        values = list(study.values(place, metric.name).values())
        mean, figure = (float(np.mean(values)) if values else None), theirs.figures[metric.name] if theirs else None
        entries += [SheetEntry(formats.quality(figure), figure), view.state or SheetEntry(formats.quality(mean), mean)]
        entries += _difference(mean, figure)
    kept, base = retention(study, place), beside(study, Place(place.pair, ORIGINAL, DENSE))
    first = metrics[0].name
    values, planned = study.mean(place, "values"), len(study.planned[place])
    seconds, peak = _median(study, place, wall), _median(study, place, lambda r: r.get("peak_mib"))
    return (
        *entries,
        ratio(kept[0] if kept else None),
        ratio(retained(theirs.figures[first], base.figures[first]) if theirs and base else None),
        SheetEntry("–" if values is None else formats.amount(values), values),
        SheetEntry("", theirs.values if theirs else None),
        SheetEntry(str(planned) if view.done == planned else f"{view.done} of {planned}", view.done),
        SheetEntry("–" if seconds is None else formats.milliseconds(1000 * seconds), seconds),
        SheetEntry("–" if peak is None else formats.size(peak * 2**20), peak),
        SheetEntry.of(searched_settings(study, place)),
        SheetEntry.of(theirs.table if theirs else ""),
    )


def _difference(mean: float | None, figure: float | None) -> list[SheetEntry]:
    if mean is None or figure is None:
        return [SheetEntry("–"), BLANK]
    by, share = mean - figure, mean / figure - 1
    return [
        SheetEntry(f"{formats.signed(by)} ({100 * share:+.1f} %)".replace("-", "−"), by),
        SheetEntry("", 100 * share),
    ]


def wall(record: JournalRecord) -> float | None:
    """Seconds of all training and compression; ``None`` where not every step told its own."""
    seconds = record.get("seconds") or {}
    parts = [seconds.get("train"), seconds.get("compress")]
    known = [p for p in parts if p is not None and "peak_mib" in record]
    return sum(known) if len(known) == len(parts) else None


def _median(study: Study, place: Place, number: Callable[[JournalRecord], float | None]) -> float | None:
    known = [n for r in study.cells.get(place, {}).values() if (n := number(r)) is not None]
    return float(np.median(known)) if known else None


def searched_settings(study: Study, place: Place) -> str:
    """The settings of a place that the plan names, first seed; of a method only what differs from the original's."""
    first = {p: r for p, r in first_records(study) if p.pair == place.pair}
    if place not in first:
        return ""
    original = first.get(Place(place.pair, ORIGINAL, DENSE), {}) if place.method != ORIGINAL else {}
    base = _joined(original.get("params") or {})
    named = _named(study, "backbones", place.pair.backbone, place.pair.data)
    named |= _named(study, "methods", place.method, place.pair.data)
    found = _joined(first[place].get("params") or {})
    return ", ".join(f"{n.partition('.')[2]} {v}" for n, v in found.items() if n in named and base.get(n) != v)


def _named(study: Study, axis: str, label: str, data: str) -> set[str]:
    """Settings that a plan gives, by dotted name."""
    entry = study.plan.get(axis, {}).get(label, {})
    parts = [entry, (entry.get("on") or {}).get(data, {})]
    own = {f"{axis[:-1]}.{n}" for part in parts for n in part.get("settings") or {}}
    return own | {f"training.{n}" for part in parts for stage in part.get("training") or () for n in stage}


def _joined(params: Mapping[str, Any]) -> dict[str, str]:
    """Settings by dotted name; where the stages of a training differ, with an arrow from each to the next."""
    found = {f"{p}.{n}": formats.plain(v) for p in ("backbone", "method") for n, v in (params.get(p) or {}).items()}
    stages = params.get("training") or []
    for name in dict.fromkeys(n for stage in stages for n in stage):
        values = [formats.plain(stage[name]) for stage in stages if name in stage]
        found[f"training.{name}"] = " → ".join(values if len(set(values)) > 1 else values[:1])
    return found
