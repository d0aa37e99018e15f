"""Tables of how a study came to be: settings, failures, and reads of test splits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from pocketrec.report import formats
from pocketrec.report.records import DENSE, ORIGINAL, JournalRecord, Place, Study
from pocketrec.report.sheet import Sheet, SheetColumn, SheetEntry, SheetRow
from pocketrec.report.tables.place import PLACE, place_entries


def settings(study: Study) -> Sheet:
    """The hyper-parameters of every place, first seed, and which of them were searched."""
    rows = []
    for place, record in first_records(study):
        searched = searched_names(study, place)
        for name, value in flat(record.get("params") or {}).items():
            found = (
                SheetEntry.of(name),
                SheetEntry.of(formats.plain(value)),
                SheetEntry.of("yes" if name in searched else "no"),
            )
            rows.append(SheetRow((*place_entries(place), *found), str(place.pair)))
    columns = SheetColumn("setting", words=True), SheetColumn("value"), SheetColumn("searched", words=True)
    return Sheet("settings", "Hyper-parameters", (*PLACE, *columns), tuple(rows))


def first_records(study: Study) -> Iterator[tuple[Place, JournalRecord]]:
    """Every place with a result, and the record of its first seed."""
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
        SheetRow((*place_entries(p), SheetEntry(str(seed), seed), SheetEntry.of(error)), str(pair))
        for pair in study.pairs
        for p in study.places(pair)
        for seed, error in sorted(study.failures.get(p, {}).items())
    ]
    return Sheet(
        "failures", "Cells that failed", (*PLACE, SheetColumn("seed"), SheetColumn("error", words=True)), tuple(rows)
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
