"""What a report draws: frontiers, training curves, searches, time and memory, frequency against magnitude."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pocketrec.report import formats
from pocketrec.report.chart import AxisScale, Bar, Figure, Format, Line, Marker, bars, svg
from pocketrec.report.records import DENSE, METRICS, ORIGINAL, JournalRecord, Metric, Pairing, Place, Study, deviation
from pocketrec.report.tables.cost import PARTS

FRONTIERS: tuple[tuple[str, tuple[str, ...], Format, AxisScale], ...] = (
    ("learned values", ("values",), formats.amount, "log"),
    ("bytes of the table", ("bytes", "table"), formats.size, "binary"),
    ("bytes of the file", ("bytes", "file"), formats.size, "binary"),
)
"""What quality is drawn against: name, where it stands in a record, how it is written, its axis."""

BATCHES = ("batch_64", "batch_1")
LISTS = ("scoring", "ranking", "recommending")


@dataclass(frozen=True)
class TitledFigure:
    """A figure and what stands above it."""

    title: str
    svg: str


def style(study: Study, method: str) -> int:
    """The look of a method, the same in all figures."""
    return study.methods.index(method) if method in study.methods else 0


def frontiers(study: Study, pair: Pairing) -> list[TitledFigure]:
    """Quality against values, table bytes, file bytes and latency, one line for each method."""
    task = study.task(pair)
    if task is None:
        return []
    drawn = [_frontier(study, pair, METRICS[task][0], *axis) for axis in FRONTIERS]
    for batch in BATCHES:
        axis = (f"median latency, {batch.replace('_', ' of ')}", ("latency_us", batch, "p50"), formats.microseconds)
        found = _frontier(study, pair, METRICS[task][0], *axis, "log")
        if found.svg:
            drawn.append(found)
            break
    return [d for d in drawn if d.svg]


def _frontier(
    study: Study, pair: Pairing, metric: Metric, name: str, path: tuple[str, ...], write: Format, scale: AxisScale
) -> TitledFigure:
    lines = []
    for method in study.methods:
        dots = [_dot(study, Place(pair, method, b), metric, path, write) for b in study.budgets(pair.data)]
        found = tuple(sorted((d for d in dots if d is not None), key=lambda d: d.x))
        if found:
            lines.append(Line(style(study, method), found))
    star = _dot(study, Place(pair, ORIGINAL, DENSE), metric, path, write)
    if not lines:
        return TitledFigure("", "")
    title = f"{metric.title} against {name}"
    figure = Figure(title, f"{name}, log scale", metric.title, tuple(lines), write, None, scale, star)
    return TitledFigure(f"By {name}", svg(figure))


def _dot(study: Study, place: Place, metric: Metric, path: tuple[str, ...], write: Format) -> Marker | None:
    values = list(study.values(place, metric.name).values())
    x = study.mean(place, *path)
    if not values or x is None or x <= 0:
        return None
    y = float(np.mean(values))
    hint = f"{place.method}, {formats.budget(place.budget)}: {metric.title} {y:.4f} at {write(x)}"
    return Marker(x, y, deviation(values) or 0.0, hint)


def curves(study: Study, pair: Pairing) -> list[TitledFigure]:
    """The figure on validation after each epoch, seed by seed: the original's, then each budget's trainings."""
    task = study.task(pair)
    if task is None:
        return []
    metric, drawn = METRICS[task][0], []
    places = [[Place(pair, ORIGINAL, DENSE)]]
    places += [[Place(pair, m, b) for m in study.methods] for b in study.budgets(pair.data)]
    for group in places:
        lines = [line for place in group for line in _curves(study, place)]
        title = formats.budget(group[0].budget)
        if lines:
            named = f"{metric.title} on validation"
            figure = Figure(f"{named}, {title}", "epoch", named, tuple(lines), whole=True)
            drawn.append(TitledFigure(title, svg(figure)))
    return drawn


def _curves(study: Study, place: Place) -> list[Line]:
    lines = []
    for seed, record in sorted(study.cells.get(place, {}).items()):
        points = [(e, p[1]) for e, p in enumerate(record.get("curve") or [], start=1) if p[1] is not None]
        if points:
            dots = tuple(Marker(e, y, 0.0, f"{place.method}, seed {seed}, epoch {e}: {y:.4f}") for e, y in points)
            look = None if place.method == ORIGINAL else style(study, place.method)
            lines.append(Line(look, dots, marks=len(dots) == 1))
    return lines


def search(study: Study, method: str) -> list[TitledFigure]:
    """What each trial of a method's searches came to on validation, and the best so far."""
    by_search: dict[tuple[Pairing, str], list[JournalRecord]] = {}
    for r in study.of_kind("trial"):
        if r["method"] == method and r.get("metric") is not None:
            by_search.setdefault((Pairing(r["data"], r["backbone"]), r["budget"]), []).append(r)
    drawn = []
    order = [(pair, budget) for pair in study.pairs for budget in (DENSE, *study.budgets(pair.data))]
    for (pair, budget), trials in sorted(by_search.items(), key=lambda item: order.index(item[0])):
        task = study.task(pair)
        if task is None or len(trials) < 2:
            continue
        metric = METRICS[task][0].title
        ordered = sorted(trials, key=lambda r: r["trial"])
        best = np.maximum.accumulate([r["metric"] for r in ordered]).tolist()
        look = None if method == ORIGINAL else style(study, method)
        dots = tuple(Marker(r["trial"] + 1, r["metric"], 0.0, _hint(r)) for r in ordered)
        steps = tuple(Marker(d.x, b) for d, b in zip(dots, best, strict=True))
        lines = (Line(look, steps, marks=False, faint=True), *(Line(look, (d,)) for d in dots))
        named = f"{metric} on validation"
        figure = Figure(f"search of {method} on {pair}", "trial", named, lines, whole=True)
        drawn.append(TitledFigure(f"{pair}, {formats.budget(budget)}", svg(figure)))
    return drawn


def _hint(trial: JournalRecord) -> str:
    points = ", ".join(f"{n} {formats.plain(v)}" for n, v in trial.get("params", {}).items())
    return f"trial {trial['trial'] + 1}, {trial['state']}: {trial['metric']:.4f} with {points}"


def magnitudes(study: Study) -> list[TitledFigure]:
    """Figure 2: mean magnitude of the original's rows by how often they occur, one line for each block of the table."""
    drawn = []
    seen: set[Pairing] = set()
    for r in study.of_kind("anatomy"):
        pair = Pairing(r["data"], r["backbone"])
        if pair in seen:
            continue
        seen.add(pair)
        lines, notes = [], []
        for i, block in enumerate(r["blocks"]):
            dots = tuple(
                Marker(math.sqrt(max(b["low"], 0.5) * max(b["high"], 0.5)), b["mean"], 0.0,
                    f"{block['block']}: {b['rows']:,} rows of {b['low']} to {b['high']} times, mean {b['mean']:.3g}")
                for b in block["bins"]
            )  # fmt: skip
            if dots:
                lines.append(Line(i, dots))
            notes.append(f"{block['block']} ρ = {block['spearman']:.2f}" if block["spearman"] is not None else "")
        figure = Figure(f"magnitude against frequency on {pair}", "times in training, log scale", "mean magnitude",
                        tuple(lines), formats.amount, None, "log")  # fmt: skip
        drawn.append(TitledFigure(f"{pair}, seed {r['seed']}: {', '.join(filter(None, notes))}", svg(figure)))
    return [d for d in drawn if d.svg]


@dataclass(frozen=True)
class Cost:
    """Time and memory of the phases of one pair on one profile."""

    title: str
    figures: tuple[TitledFigure, ...]


def costs(study: Study) -> list[Cost]:
    """Bars as in Figures 3 and 4, one group for each profile and pair; phases that compare share a figure."""
    groups: dict[tuple[str, str], list[JournalRecord]] = {}
    for r in study.of_kind("efficiency"):
        groups.setdefault((r["profile"], str(Pairing(r["data"], r["backbone"]))), []).append(r)
    kinds = (("Time", _time), ("Memory", _memory))
    return [
        Cost(
            f"{profile}, {pair}",
            tuple(_bars(study, f"{name}: {t}", some, bar) for name, bar in kinds for t, some in _alike(records)),
        )
        for (profile, pair), records in sorted(groups.items())
    ]


def _alike(records: Sequence[JournalRecord]) -> list[tuple[str, list[JournalRecord]]]:
    """Records by what may be compared: whole phases of learning, their epochs and steps, and serving by batch."""
    found: dict[str, list[JournalRecord]] = {}
    for r in records:
        found.setdefault(_kind(r), []).append(r)
    return sorted(found.items(), key=lambda item: (item[0].startswith(("inference", "lists")), item[0]))


def _kind(r: JournalRecord) -> str:
    phase = r["phase"]
    batch = "all rows" if r["batch"] is None else f"batch {r['batch']}"
    if phase.startswith("inference"):
        return f"inference, {batch}"
    if phase in LISTS:
        return f"lists, {batch}"
    part = phase.rpartition(" ")[2]
    return f"one {part} of training" if part in ("step", "epoch") else "training and search"


def _bars(study: Study, title: str, records: Sequence[JournalRecord], bar: Any) -> TitledFigure:
    made = [b for r in records if (b := bar(study, r)) is not None]
    return TitledFigure(title, bars(title, made))


def _time(study: Study, r: JournalRecord) -> Bar | None:
    p50 = (r.get("ms") or {}).get("p50")
    if p50 is None:
        return None
    text = formats.milliseconds(p50) + (" *" if r.get("extrapolated") else "")
    return Bar(_name(r), (p50,), text, None if r["method"] == ORIGINAL else style(study, r["method"]))


def _memory(_study: Study, r: JournalRecord) -> Bar | None:
    peak: Mapping[str, float | None] = r.get("peak_mib") or {}
    parts = tuple(float(peak.get(part) or 0.0) for part in PARTS)
    return Bar(_name(r), parts, f"{peak.get('total') or sum(parts):.0f} MiB") if sum(parts) else None


def _name(r: JournalRecord) -> str:
    return f"{r['method']} · {r['phase'].removeprefix('inference ')}"
