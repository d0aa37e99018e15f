"""Tables of quality and size: methods beside each other, what is no worse, and the comparisons behind the marks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from pocketrec.report import formats
from pocketrec.report.compare import Evidence
from pocketrec.report.records import DENSE, METRICS, ORIGINAL, Metric, Pairing, Place, Study, deviation
from pocketrec.report.sheet import BLANK, Sheet, SheetColumn, SheetEntry, SheetRow, Tone
from pocketrec.report.tables.place import PLACE, EvidenceByPair, PlaceStatus, place_entries

_WORDS = {"seeds and rows": "bootstrap over seeds and test rows", "rows": "bootstrap over the test rows of one seed",
          "seeds": "paired t over seeds, since no predictions were kept"}  # fmt: skip


def quality(study: Study, known: EvidenceByPair, data: str) -> Sheet:
    """Methods x budgets of one data set, backbones side by side: quality, what is kept of it, and both accountings."""
    pairs = [p for p in study.pairs if p.data == data]
    columns = [SheetColumn("method", words=True)]
    for pair in pairs:
        columns += _quality_columns(pair, METRICS[study.task(pair) or "ctr"])
    rows = []
    for place in study.places(pairs[0]):
        entries = [SheetEntry.of(place.method)]
        for pair in pairs:
            here = Place(pair, place.method, place.budget)
            entries += _quality_entries(study, here, known.get(pair, {}), METRICS[study.task(pair) or "ctr"])
        rows.append(SheetRow(tuple(entries), formats.budget(place.budget)))
    how = sorted({_WORDS[h] for p in pairs for e in known.get(p, {}).values() for h in e.how})
    notes = [
        "Mean ± standard deviation over seeds of the test split. Bold is best and underlined second best at a budget, "
        "only where better than every one below it at 5 % after Holm's correction"
        + (f" ({'; '.join(how)})." if how else "; nothing could be tested."),
        "Only methods with all their seeds are compared, each with those of the same seeds. “vs original” is the "
        "paired difference with its 95 % interval. Table and file are bytes that lie on the disk.",
    ]
    title = f"Quality and size on {data}"
    return Sheet(f"quality-{data}", title, tuple(columns), tuple(rows), tuple(notes), "budget")


def _quality_columns(pair: Pairing, metrics: Sequence[Metric]) -> list[SheetColumn]:
    group = pair.backbone
    columns = []
    for m in metrics:
        columns.append(SheetColumn(m.title, group))
        columns += [SheetColumn(f"{m.title} {x}", group, hidden=True) for x in ("sd", "low", "high", "mark")]
    return [
        *columns,
        SheetColumn(f"{metrics[0].title} vs original", group),
        SheetColumn("vs original low", group, hidden=True),
        SheetColumn("vs original high", group, hidden=True),
        SheetColumn("values", group),
        SheetColumn("sparsity", group),
        SheetColumn("table", group),
        SheetColumn("file", group),
        SheetColumn("seeds", group, hidden=True),
    ]


def _quality_entries(
    study: Study, place: Place, known: Mapping[str, Evidence], metrics: Sequence[Metric]
) -> list[SheetEntry]:
    view = PlaceStatus(study, place)
    if (state := view.state) is not None:
        return [state, *[BLANK] * (5 * len(metrics) + 7)]
    entries = []
    for i, metric in enumerate(metrics):
        entries += _figure(study, place, known.get(metric.name, Evidence(metric)), view.part if i == 0 else "")
    first = known.get(metrics[0].name, Evidence(metrics[0]))
    if place in first.against:
        d = first.against[place]
        span = f"{formats.signed(d.estimate)} [{formats.signed(d.low)}, {formats.signed(d.high)}]"
        entries += [SheetEntry(span, d.estimate), SheetEntry("", d.low), SheetEntry("", d.high)]
    else:
        entries += [SheetEntry("" if place.method == ORIGINAL else "–"), BLANK, BLANK]
    values, sparsity = study.mean(place, "values"), study.mean(place, "sparsity")
    table, file = study.mean(place, "bytes", "table"), study.mean(place, "bytes", "file")
    return [
        *entries,
        SheetEntry(formats.amount(values or 0), values),
        SheetEntry(formats.share(sparsity), sparsity),
        SheetEntry(formats.size(table or 0), table),
        SheetEntry(formats.size(file or 0), file),
        SheetEntry("", view.done),
    ]


def _figure(study: Study, place: Place, known: Evidence, part: str) -> list[SheetEntry]:
    """A figure with its spread; hidden behind it the interval of its mean and its mark."""
    values = list(study.values(place, known.metric.name).values())
    mean, sd = (float(np.mean(values)) if values else None), deviation(values)
    mark: Tone = known.marks.get(place, "")
    span = known.intervals.get(place)
    text = " ".join(t for t in (formats.quality(mean), formats.spread(sd)) if t) + part
    return [
        SheetEntry(text, mean, mark),
        SheetEntry("", sd),
        SheetEntry("", span.low if span else None),
        SheetEntry("", span.high if span else None),
        SheetEntry("", mark),
    ]


def within(study: Study, known: EvidenceByPair) -> Sheet:
    """Per pair and method, the smallest table that is shown to be no worse than the original beyond the margin."""
    pairs = [p for p in study.pairs if study.task(p) is not None]
    rows = [SheetRow((SheetEntry.of(m), *(_smallest(study, known, pair, m) for pair in pairs))) for m in study.methods]
    return Sheet(
        "within-margin",
        "Smallest table shown to be as good as the original",
        (SheetColumn("method", words=True), *(SheetColumn(str(p)) for p in pairs)),
        tuple(rows) if any(e.against for by_metric in known.values() for e in by_metric.values()) else (),
        ("No worse than the original by more than .001 AUC, or 1 % of its NDCG@20: the 95 % interval of the paired "
         "difference lies above that. A dash: no budget of the study could be shown to be.",),
    )  # fmt: skip


def _smallest(study: Study, known: EvidenceByPair, pair: Pairing, method: str) -> SheetEntry:
    metric = METRICS[study.task(pair) or "ctr"][0].name
    dense = study.values(Place(pair, ORIGINAL, DENSE), metric)
    found = known.get(pair, {}).get(metric)
    if found is None or not dense:
        return SheetEntry("–")
    original = float(np.mean(list(dense.values())))
    good = [
        (study.mean(place, "bytes", "table") or 0.0, place.budget)
        for place in found.against
        if place.method == method and found.no_worse(place, original)
    ]
    if not good:
        return SheetEntry("–")
    table, budget = min(good)
    return SheetEntry(f"{formats.size(table)} ({formats.budget(budget)})", table)


def comparisons(study: Study, known: EvidenceByPair) -> Sheet:
    """Every comparison behind the marks."""
    rows = [
        SheetRow(
            (
                *place_entries(c.place),
                SheetEntry.of(c.other.method),
                SheetEntry.of(c.metric),
                SheetEntry(formats.signed(c.interval.estimate), c.interval.estimate),
                SheetEntry(f"[{formats.signed(c.interval.low)}, {formats.signed(c.interval.high)}]"),
                SheetEntry("", c.interval.low),
                SheetEntry("", c.interval.high),
                SheetEntry(f"{c.corrected:.3g}", c.corrected),
                SheetEntry.of("yes" if c.better else "no"),
                SheetEntry.of(c.how),
            ),
            str(pair),
        )
        for pair, by_metric in known.items()
        for found in by_metric.values()
        for c in found.comparisons
    ]
    columns = ("over", "metric", "by", "95 % interval", "low", "high", "p (Holm)", "significant", "resampled")
    numbers, hidden = ("by", "low", "high", "p (Holm)"), ("low", "high")
    return Sheet(
        "comparisons",
        "Comparisons behind the marks",
        (*PLACE, *(SheetColumn(c, words=c not in numbers, hidden=c in hidden) for c in columns)),
        tuple(rows),
        ("The best and the second best of each budget against all below them, as differences in their favour; "
         "evidence is corrected by Holm within one budget and metric.",),
    )  # fmt: skip
