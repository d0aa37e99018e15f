"""Documents as text for people; ``--json`` shows the same figures to programs."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

PARTS = ("file", "table", "vocabulary", "head", "header")
"""Parts of a file, as documents name them."""


def pairs(document: Mapping[str, Any]) -> str:
    """One ``name  value`` line for each entry; nested documents are indented."""
    return "\n".join(_lines(document, 0))


def dataset(report: Mapping[str, Any]) -> str:
    """What ``encode`` made: its size, what was dropped, and the fields with their cardinalities."""
    rows = "  ".join(f"{name} {count:,}" for name, count in report["rows"].items())
    dropped = "  ".join(f"{reason} {count:,}" for reason, count in report["dropped"].items()) or "none"
    fields = table(("field", "cardinality"), [(f["name"], f"{f['cardinality']:,}") for f in report["fields"]])
    notes = [f"note: {note}" for note in report["notes"]]
    return "\n".join([f"{report['dataset']}: {rows}", f"dropped rows: {dropped}", fields, *notes])


def artifacts(documents: Sequence[Mapping[str, Any]]) -> str:
    """One line for each artifact that was written."""
    rows = [
        (d["path"], d["budget"], *(f"{d['bytes'][part]:,}" for part in PARTS), f"{d['values']:,}",
         f"{d['sparsity']:.2%}", f"{d['seconds']:.1f} s")
        for d in documents
    ]  # fmt: skip
    return table(("artifact", "budget", *(f"{part} B" for part in PARTS), "values", "sparsity", "took"), rows)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A plain table; the first column is flush left, the others flush right."""
    drawn = Table(box=None, pad_edge=False, header_style="bold")
    for i, name in enumerate(header):
        drawn.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        drawn.add_row(*row)
    console = Console(file=io.StringIO(), width=200)
    with console.capture() as captured:
        console.print(drawn)
    return "\n".join(line.rstrip() for line in captured.get().rstrip("\n").split("\n"))


def _lines(document: Mapping[str, Any], depth: int) -> list[str]:
    lines = []
    for name, value in document.items():
        start = "  " * depth + name
        if isinstance(value, Mapping):
            lines += [start, *_lines(value, depth + 1)]
        elif isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value):
            header = list(value[0])
            lines += [start, *table(header, [[_figure(v[h]) for h in header] for v in value]).split("\n")]
        else:
            lines.append(f"{start:<24} {_figure(value)}")
    return lines


def _figure(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "-"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.5g}" if isinstance(value, float) else str(value)
