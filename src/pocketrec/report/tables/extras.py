"""Tables of more than accuracy: recommendation lists, the first ten places, and what tables tell of themselves."""

from __future__ import annotations

from pocketrec.report.records import Place, Study
from pocketrec.report.sheet import Sheet, SheetColumn, SheetEntry, SheetRow
from pocketrec.report.tables.place import PLACE, place_entries, ratio


def beyond_accuracy(study: Study) -> Sheet:
    """Coverage, novelty, diversity, popularity of recommendation lists."""
    names = sorted({n for by in study.cells.values() for r in by.values() for n in (r.get("beyond") or {})})
    rows = []
    for pair in study.pairs:
        for place in study.places(pair):
            means = [study.mean(place, "beyond", name) for name in names]
            if any(m is not None for m in means):
                entries = (SheetEntry("–" if m is None else f"{m:.3f}", m) for m in means)
                rows.append(SheetRow((*place_entries(place), *entries), str(pair)))
    return Sheet(
        "beyond-accuracy",
        "Beyond accuracy",
        (*PLACE, *map(SheetColumn, names)),
        tuple(rows),
        ("Coverage: share of the catalogue in some list. Novelty: mean −log₂ of the share of users who have an item. "
         "Diversity: mean 1 − cosine over the pairs of a list, items being alike where the same users have them. "
         "Popularity: mean count of a recommended item over that of a held-out one. Gini: inequality of exposure.",),
    )  # fmt: skip


def first_ten(study: Study) -> Sheet:
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
            entries = (*place_entries(place), ratio(mean), ratio(recall), SheetEntry(told, gain))
            rows.append(SheetRow(entries, str(pair)))
    return Sheet(
        "top-10",
        "Quality in the first ten places",
        (*PLACE, SheetColumn("NDCG@10"), SheetColumn("recall@10"), SheetColumn("over the best other")),
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
                rows.append(SheetRow((*place_entries(place), *map(ratio, means)), str(pair)))
    return Sheet(
        "facts",
        "What tables tell of themselves",
        (*PLACE, *map(SheetColumn, names)),
        tuple(rows),
        ("Means over seeds. Overlap: of the coordinates that either of two added rows fills, the share that both fill, "
         "over all rows of the table; by block, and their mean weighted by rows.",),
    )  # fmt: skip
