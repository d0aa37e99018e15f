"""The tables of a report, in the papers' layout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pocketrec.evaluation.statistics import Ranks, ranks, retained
from pocketrec.report import formats
from pocketrec.report.compare import Evidence
from pocketrec.report.papers import PUBLISHED, beside, data_set, is_sample, lightgcn, plain, transfer
from pocketrec.report.records import (
    DENSE,
    METRICS,
    ORIGINAL,
    JournalRecord,
    Metric,
    Pairing,
    Place,
    Study,
    Task,
    deviation,
)
from pocketrec.report.sheet import BLANK, FAILED, MISSING, Sheet, SheetColumn, SheetEntry, SheetRow, Tone

EvidenceByPair = Mapping[Pairing, Mapping[str, Evidence]]

_WORDS = {"seeds and rows": "bootstrap over seeds and test rows", "rows": "bootstrap over the test rows of one seed",
          "seeds": "paired t over seeds, since no predictions were kept"}  # fmt: skip


def sheets(study: Study, known: EvidenceByPair) -> list[Sheet]:
    """Every table that has something to say."""
    data = list(dict.fromkeys(p.data for p in study.pairs))
    made = [
        *(quality(study, known, d) for d in data),
        within(study, known),
        retain(study, known),
        transferred(study),
        ranked(study),
        comparisons(study, known),
        *(published(study, d) for d in data),
        short(study),
        facts(study),
        beyond(study),
        efficiency(study),
        settings(study),
        failures(study),
        ledger(study),
    ]
    return [sheet for sheet in made if sheet.rows]


_PLACE = (SheetColumn("data", hidden=True), SheetColumn("backbone", hidden=True), SheetColumn("method", words=True),
          SheetColumn("budget", words=True))  # fmt: skip


def _place(place: Place) -> tuple[SheetEntry, ...]:
    """Where a row belongs; pairs are blocks for people and columns for programs."""
    return (
        SheetEntry("", place.pair.data),
        SheetEntry("", place.pair.backbone),
        SheetEntry.of(place.method),
        SheetEntry(formats.budget(place.budget), place.budget),
    )


# ---- quality ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _PlaceStatus:
    """How a place stands: done, in part, failed or not run."""

    study: Study
    place: Place

    @property
    def done(self) -> int:
        return len(self.study.cells.get(self.place, {}))

    @property
    def state(self) -> SheetEntry | None:
        """What stands where no figure does."""
        if self.done:
            return None
        if self.study.failures.get(self.place):
            return SheetEntry.of(FAILED, "failed")
        return SheetEntry.of(MISSING, "missing")

    @property
    def part(self) -> str:
        """How many seeds a mean is of, where they are not all."""
        every, planned = len(self.study.seeds(self.place.pair.data)), len(self.study.planned[self.place])
        if self.done < planned:
            return f" ({self.done} of {planned} seeds)"
        return "" if planned == every else f" ({planned} of {every} seeds)"


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
    view = _PlaceStatus(study, place)
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


# ---- retention and ranks ---------------------------------------------------------------------------------------------


def retain(study: Study, known: EvidenceByPair) -> Sheet:
    """What every method keeps of the original's quality, plainly and above chance."""
    rows = []
    for pair in study.pairs:
        for place in study.places(pair):
            kept = retention(study, place)
            if kept is None or place.method == ORIGINAL:
                continue
            plainly, above = kept
            shares = SheetEntry(formats.share(plainly), plainly), SheetEntry(formats.share(above), above)
            rows.append(SheetRow((*_place(place), *shares), str(pair)))
    return Sheet(
        "retained",
        "Quality retained",
        (*_PLACE, SheetColumn("retained"), SheetColumn("above chance")),
        tuple(rows),
        ("Mean figure over the original's: AUC or NDCG@20. Above chance: (AUC − .5) / (original − .5), since an AUC "
         "cannot fall below .5; for NDCG both are the same.",),
    )  # fmt: skip


def retention(study: Study, place: Place) -> tuple[float, float] | None:
    """The share of the original's figure that a place keeps, plainly and above chance, on the seeds that both have."""
    task = study.task(place.pair)
    if task is None:
        return None
    metric = METRICS[task][0]
    ours = study.values(place, metric.name)
    dense = study.values(Place(place.pair, ORIGINAL, DENSE), metric.name)
    both = sorted(ours.keys() & dense.keys())
    if not both:
        return None
    a, b = float(np.mean([ours[s] for s in both])), float(np.mean([dense[s] for s in both]))
    return retained(a, b), retained(a, b, metric.chance)


def transferred(study: Study) -> Sheet:
    """Table 7: how well a method does wherever it is used; mean over the pairs of each task."""
    pairs = [p for p in study.pairs if study.task(p) is not None]
    tasks: list[Task] = [t for t in ("cf", "ctr") if any(study.task(p) == t for p in pairs)]
    columns = [SheetColumn("method", words=True), *(SheetColumn(str(p)) for p in pairs)]
    columns += [SheetColumn(f"overall {t}") for t in tasks] + [SheetColumn(f"published overall {t}") for t in tasks]
    rows = []
    for budget in budgets(study):
        for method in study.methods:
            kept = {p: retention(study, Place(p, method, budget)) for p in pairs}
            if not any(kept.values()):
                continue
            overall = [_overall([kept[p] for p in pairs if study.task(p) == t]) for t in tasks]
            theirs = [_published_overall(study, method, budget, t) for t in tasks]
            entries = [_ratio(k[0] if k else None) for k in (kept[p] for p in pairs)]
            rows.append(
                SheetRow(
                    (SheetEntry.of(method), *entries, *map(_ratio, overall), *map(_ratio, theirs)),
                    formats.budget(budget),
                )
            )
    shown = _without_empty(columns, rows)
    return Sheet(
        "transfer",
        "Transfer: share of the original's quality, by data set and backbone",
        shown[0],
        shown[1],
        (
            "Ratios of NDCG@20 or AUC, as in Table 7 of the benchmark; an overall figure needs every pair of its task. "
            "The published ones are of the paper's own data sets.",
        ),
        "budget",
    )


def _overall(kept: Sequence[tuple[float, float] | None]) -> float | None:
    known = [k[0] for k in kept if k is not None]
    return float(np.mean(known)) if known and len(known) == len(kept) else None


def _published_overall(study: Study, method: str, budget: str, task: Task) -> float | None:
    asked = formats.sparsity(budget)
    if asked is None:
        return None
    names = [plain(method), plain(str(study.plan["methods"].get(method, {}).get("plugin", method)))]
    found = (transfer().get((f"{100 * asked:.6g}", name)) for name in names)
    return next((row[f"overall_{task}"] for row in found if row), None)


def _ratio(value: float | None) -> SheetEntry:
    return SheetEntry(formats.quality(value), value)


def _without_empty(
    columns: Sequence[SheetColumn], rows: Sequence[SheetRow]
) -> tuple[tuple[SheetColumn, ...], tuple[SheetRow, ...]]:
    """The same without columns in which no row says anything."""
    kept = [i for i, c in enumerate(columns) if c.words or any(r.entries[i].value is not None for r in rows)]
    return tuple(columns[i] for i in kept), tuple(SheetRow(tuple(r.entries[i] for i in kept), r.block) for r in rows)


def standings(study: Study) -> dict[str, Ranks]:
    """By budget, ranks of the methods that have a figure on every pair with that budget; at least two of each."""
    found = {}
    for budget in budgets(study):
        pairs = [p for p in study.pairs if budget in study.budgets(p.data) and study.task(p) is not None]
        by_method = {m: [_first_figure(study, Place(p, m, budget)) for p in pairs] for m in study.methods}
        whole = {m: [f for f in figures if f is not None] for m, figures in by_method.items()}
        whole = {m: figures for m, figures in whole.items() if len(figures) == len(pairs)}
        if len(whole) > 1 and len(pairs) > 1:
            found[budget] = ranks(whole)
    return found


def _first_figure(study: Study, place: Place) -> float | None:
    values = study.values(place, METRICS[study.task(place.pair) or "ctr"][0].name)
    return float(np.mean(list(values.values()))) if values else None


def ranked(study: Study) -> Sheet:
    """Average ranks across data sets and backbones, with Friedman's test and Nemenyi's critical difference."""
    rows = []
    for budget, found in standings(study).items():
        block = formats.budget(budget)
        for method, rank in sorted(found.average.items(), key=lambda item: item[1]):
            rows.append(
                SheetRow((SheetEntry.of(method), SheetEntry(f"{rank:.2f}", rank), SheetEntry(f"{found.critical:.2f}", found.critical),
                     SheetEntry(f"{found.p:.3g}", found.p), SheetEntry(str(found.blocks), found.blocks)), block)
            )  # fmt: skip
    return Sheet(
        "ranks",
        "Ranks across data sets",
        (SheetColumn("method", words=True), SheetColumn("average rank"), SheetColumn("critical difference"), SheetColumn("Friedman p"),
         SheetColumn("pairs")),
        tuple(rows),
        ("1 is best. Two methods differ at 5 % where their ranks are further apart than the critical difference "
         "(Nemenyi), which few pairs of data set and backbone can hardly show.",),
        "budget",
    )  # fmt: skip


def comparisons(study: Study, known: EvidenceByPair) -> Sheet:
    """Every comparison behind the marks."""
    rows = [
        SheetRow(
            (
                *_place(c.place),
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
        (*_PLACE, *(SheetColumn(c, words=c not in numbers, hidden=c in hidden) for c in columns)),
        tuple(rows),
        ("The best and the second best of each budget against all below them, as differences in their favour; "
         "evidence is corrected by Holm within one budget and metric.",),
    )  # fmt: skip


# ---- beside the papers -----------------------------------------------------------------------------------------------


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
    columns = [*_PLACE]
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
    theirs, view = beside(study, place), _PlaceStatus(study, place)
    entries = [*_place(place)]
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
        _ratio(kept[0] if kept else None),
        _ratio(retained(theirs.figures[first], base.figures[first]) if theirs and base else None),
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
    first = {p: r for p, r in _first_records(study) if p.pair == place.pair}
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


# ---- more than accuracy ----------------------------------------------------------------------------------------------


def beyond(study: Study) -> Sheet:
    """Coverage, novelty, diversity, popularity of recommendation lists."""
    names = sorted({n for by in study.cells.values() for r in by.values() for n in (r.get("beyond") or {})})
    rows = []
    for pair in study.pairs:
        for place in study.places(pair):
            means = [study.mean(place, "beyond", name) for name in names]
            if any(m is not None for m in means):
                entries = (SheetEntry("–" if m is None else f"{m:.3f}", m) for m in means)
                rows.append(SheetRow((*_place(place), *entries), str(pair)))
    return Sheet(
        "beyond-accuracy",
        "Beyond accuracy",
        (*_PLACE, *map(SheetColumn, names)),
        tuple(rows),
        ("Coverage: share of the catalogue in some list. Novelty: mean −log₂ of the share of users who have an item. "
         "Diversity: mean 1 − cosine over the pairs of a list, items being alike where the same users have them. "
         "Popularity: mean count of a recommended item over that of a held-out one. Gini: inequality of exposure.",),
    )  # fmt: skip


def short(study: Study) -> Sheet:
    """Quality in the first ten places, and how far each method is above the best other one."""
    rows = []
    for pair in study.pairs:
        means = {p: study.mean(p, "test", "ndcg@10") for p in study.places(pair)}
        for place, mean in means.items():
            if mean is None:
                continue
            name = _plugin(study, place)
            others = [m for p, m in means.items() if m and p.budget == place.budget and _plugin(study, p) != name]
            gain = mean / max(others) - 1 if others else None
            recall = study.mean(place, "test", "recall@10")
            told = "–" if gain is None else f"{100 * gain:+.1f} %".replace("-", "−")
            rows.append(SheetRow((*_place(place), SheetEntry(formats.quality(mean), mean), _ratio(recall), SheetEntry(told, gain)),
                            str(pair)))  # fmt: skip
    return Sheet(
        "top-10",
        "Quality in the first ten places",
        (*_PLACE, SheetColumn("NDCG@10"), SheetColumn("recall@10"), SheetColumn("over the best other")),
        tuple(rows),
        ("Means over seeds of the test split. The last column is NDCG@10 over that of the best other method at the "
         "same budget, less 1; labels of one plug-in are not others to each other.",),
    )  # fmt: skip


def _plugin(study: Study, place: Place) -> str:
    """The method's plug-in; the original is its own."""
    return str(study.plan["methods"].get(place.method, {}).get("plugin", place.method))


def facts(study: Study) -> Sheet:
    """What tables tell of how they are made."""
    names = list(dict.fromkeys(n for by in study.cells.values() for r in by.values() for n in r.get("facts") or {}))
    rows = []
    for pair in study.pairs:
        for place in study.places(pair):
            means = [study.mean(place, "facts", name) for name in names]
            if any(m is not None for m in means):
                rows.append(SheetRow((*_place(place), *map(_ratio, means)), str(pair)))
    return Sheet(
        "facts",
        "What tables tell of themselves",
        (*_PLACE, *map(SheetColumn, names)),
        tuple(rows),
        ("Means over seeds. Overlap: of the coordinates that either of two added rows fills, the share that both fill, "
         "over all rows of the table; by block, and their mean weighted by rows.",),
    )  # fmt: skip


PARTS = ("packages", "vocabulary", "model", "runtime")


def efficiency(study: Study) -> Sheet:
    """Time and peak memory of every phase, as in Figures 3 and 4."""
    rows = []
    for r in study.of_kind("efficiency"):
        ms, peak = r["ms"], r.get("peak_mib") or {}
        rows.append(
            SheetRow(
                (
                    SheetEntry("", r["data"]),
                    SheetEntry("", r["backbone"]),
                    SheetEntry.of(r["method"]),
                    SheetEntry.of(r["phase"]),
                    SheetEntry.of(r["profile"]),
                    SheetEntry("all rows" if r["batch"] is None else str(r["batch"]), r["batch"]),
                    SheetEntry(str(r.get("threads", "")), r.get("threads")),
                    SheetEntry.of(formats.milliseconds(ms["p50"]) + (" *" if r.get("extrapolated") else "")),
                    SheetEntry.of(f"{formats.milliseconds(ms['p10'])} to {formats.milliseconds(ms['p90'])}"),
                    SheetEntry("", ms["p50"]),
                    SheetEntry("", ms["p10"]),
                    SheetEntry("", ms["p90"]),
                    *(_mib(peak.get(part)) for part in (*PARTS, "total")),
                    SheetEntry("", bool(r.get("extrapolated"))),
                ),
                str(Pairing(r["data"], r["backbone"])),
            )
        )
    rows.sort(key=lambda row: (row.block, *(row.entries[i].text for i in (4, 3, 2))))
    columns = ("data", "backbone", "method", "phase", "profile", "batch", "threads", "median", "p10 to p90", "p50 ms",
               "p10 ms", "p90 ms", *(f"{p} MiB" for p in PARTS), "peak MiB", "extrapolated")  # fmt: skip
    hidden = ("data", "backbone", "p50 ms", "p10 ms", "p90 ms", "extrapolated")
    words = ("method", "phase", "profile")
    return Sheet(
        "efficiency",
        "Time and memory by phase",
        tuple(SheetColumn(c, words=c in words, hidden=c in hidden) for c in columns),
        tuple(rows),
        ("Medians of repeated calls after a warm-up; * extrapolated from a part of an epoch. Peak resident memory is "
         "split into packages, vocabulary, model and what the phase itself takes.",),
    )  # fmt: skip


def _mib(value: float | None) -> SheetEntry:
    return SheetEntry("–" if value is None else f"{value:.1f}", value)


# ---- how it came to be -----------------------------------------------------------------------------------------------


def settings(study: Study) -> Sheet:
    """The hyper-parameters of every place, first seed, and which of them were searched."""
    rows = []
    for place, record in _first_records(study):
        searched = searched_names(study, place)
        for name, value in flat(record.get("params") or {}).items():
            found = (
                SheetEntry.of(name),
                SheetEntry.of(formats.plain(value)),
                SheetEntry.of("yes" if name in searched else "no"),
            )
            rows.append(SheetRow((*_place(place), *found), str(place.pair)))
    columns = SheetColumn("setting", words=True), SheetColumn("value"), SheetColumn("searched", words=True)
    return Sheet("settings", "Hyper-parameters", (*_PLACE, *columns), tuple(rows))


def _first_records(study: Study) -> Iterator[tuple[Place, JournalRecord]]:
    for pair in study.pairs:
        for place in study.places(pair):
            if by_seed := study.cells.get(place):
                yield place, by_seed[min(by_seed)]


def flat(params: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by dotted name: ``training.`` for the first stage of the training, ``training.2.`` for the second.

    Example:
        >>> flat({"method": {"name": "qr", "n": 2}, "training": [{"epochs": 3}]})
        {'method.n': 2, 'training.epochs': 3}
    """
    found = {f"{part}.{n}": v for part in ("backbone", "method") for n, v in (params.get(part) or {}).items()}
    for i, stage in enumerate(params.get("training") or []):
        found |= {f"training.{i + 1}.{n}" if i else f"training.{n}": v for n, v in stage.items()}
    return {n: v for n, v in found.items() if not n.endswith(".name")}


def searched_names(study: Study, place: Place) -> set[str]:
    """Settings that the search of a place, or of the original that it starts from, was over."""
    places = {(place.method, place.budget), (ORIGINAL, DENSE)}
    trials = [
        r
        for r in study.of_kind("trial")
        if (r["data"], r["backbone"]) == (place.pair.data, place.pair.backbone) and (r["method"], r["budget"]) in places
    ]
    return {name for r in trials for name in r.get("params", {})}


def failures(study: Study) -> Sheet:
    """Cells that ended in an error."""
    rows = [
        SheetRow((*_place(p), SheetEntry(str(seed), seed), SheetEntry.of(error)), str(pair))
        for pair in study.pairs
        for p in study.places(pair)
        for seed, error in sorted(study.failures.get(p, {}).items())
    ]
    return Sheet(
        "failures", "Cells that failed", (*_PLACE, SheetColumn("seed"), SheetColumn("error", words=True)), tuple(rows)
    )


def ledger(study: Study) -> Sheet:
    """How often test splits were read, and how many cells read one more than once."""
    reads: Counter[str] = Counter(str(e.get("backbone", "")) for e in study.ledger)
    again: Counter[str] = Counter(str(e.get("backbone", "")) for e in study.ledger if e.get("again"))
    cells = Counter(p.pair.backbone for p, by in study.cells.items() for _ in by)
    rows = [
        SheetRow(
            (
                SheetEntry.of(b),
                SheetEntry(str(reads[b]), reads[b]),
                SheetEntry(str(cells[b]), cells[b]),
                SheetEntry(str(again[b]), again[b]),
            )
        )
        for b in sorted(reads)
    ]
    return Sheet(
        "ledger",
        "Reads of test splits",
        (
            SheetColumn("backbone", words=True),
            SheetColumn("reads"),
            SheetColumn("cells done"),
            SheetColumn("reads by a cell cut short"),
        ),
        tuple(rows),
        ("Every read of a test split is noted before it happens; choices are made on validation.",),
    )


def budgets(study: Study) -> list[str]:
    """Budgets of all data sets, in the plan's order."""
    return list(dict.fromkeys(b for pair in study.pairs for b in study.budgets(pair.data)))
