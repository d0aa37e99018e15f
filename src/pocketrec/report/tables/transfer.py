"""Tables of what is kept of the original: retention, transfer across data sets, and ranks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pocketrec.evaluation.statistics import Ranks, ranks, retained
from pocketrec.report import formats
from pocketrec.report.papers import folded_name, transfer
from pocketrec.report.records import DENSE, METRICS, ORIGINAL, Place, Study
from pocketrec.report.sheet import Sheet, SheetColumn, SheetEntry, SheetRow
from pocketrec.report.tables.place import PLACE, EvidenceByPair, budgets, place_entries, ratio
from pocketrec.schema import Task


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
            rows.append(SheetRow((*place_entries(place), *shares), str(pair)))
    return Sheet(
        "retained",
        "Quality retained",
        (*PLACE, SheetColumn("retained"), SheetColumn("above chance")),
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
            entries = [ratio(k[0] if k else None) for k in (kept[p] for p in pairs)]
            rows.append(
                SheetRow(
                    (SheetEntry.of(method), *entries, *map(ratio, overall), *map(ratio, theirs)), formats.budget(budget)
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
    names = [folded_name(method), folded_name(str(study.plan["methods"].get(method, {}).get("plugin", method)))]
    found = (transfer().get((f"{100 * asked:.6g}", name)) for name in names)
    return next((row[f"overall_{task}"] for row in found if row), None)


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
                SheetRow((SheetEntry.of(method), SheetEntry(f"{rank:.2f}", rank),
                          SheetEntry(f"{found.critical:.2f}", found.critical), SheetEntry(f"{found.p:.3g}", found.p),
                          SheetEntry(str(found.blocks), found.blocks)), block)
            )  # fmt: skip
    return Sheet(
        "ranks",
        "Ranks across data sets",
        (SheetColumn("method", words=True), SheetColumn("average rank"), SheetColumn("critical difference"),
         SheetColumn("Friedman p"), SheetColumn("pairs")),
        tuple(rows),
        ("1 is best. Two methods differ at 5 % where their ranks are further apart than the critical difference "
         "(Nemenyi), which few pairs of data set and backbone can hardly show.",),
        "budget",
    )  # fmt: skip
