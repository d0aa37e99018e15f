"""What the tables of a report share: the place of a row, how it stands, and budgets in order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pocketrec.report import formats
from pocketrec.report.compare import Evidence
from pocketrec.report.records import Pairing, Place, Study
from pocketrec.report.sheet import FAILED, MISSING, SheetColumn, SheetEntry

EvidenceByPair = Mapping[Pairing, Mapping[str, Evidence]]

PLACE = (SheetColumn("data", hidden=True), SheetColumn("backbone", hidden=True), SheetColumn("method", words=True),
          SheetColumn("budget", words=True))  # fmt: skip


def place_entries(place: Place) -> tuple[SheetEntry, ...]:
    """Where a row belongs; pairs are blocks for people and columns for programs."""
    return (
        SheetEntry("", place.pair.data),
        SheetEntry("", place.pair.backbone),
        SheetEntry.of(place.method),
        SheetEntry(formats.budget(place.budget), place.budget),
    )


@dataclass(frozen=True)
class PlaceStatus:
    """How a place stands: done, in part, failed or not run."""

    study: Study
    place: Place

    @property
    def done(self) -> int:
        """Seeds that have a result."""
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


def ratio(value: float | None) -> SheetEntry:
    """A figure, or a share of one, to four digits."""
    return SheetEntry(formats.quality(value), value)


def budgets(study: Study) -> list[str]:
    """Budgets of all data sets, in the plan's order."""
    return list(dict.fromkeys(b for pair in study.pairs for b in study.budgets(pair.data)))
