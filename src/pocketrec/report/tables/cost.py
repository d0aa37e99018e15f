"""The table of time and memory by phase."""

from __future__ import annotations

from pocketrec.report import formats
from pocketrec.report.records import Pairing, Study
from pocketrec.report.sheet import Sheet, SheetColumn, SheetEntry, SheetRow

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
