"""A table that can be written as csv, as markdown and as html from the same entries."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

Tone = Literal["", "best", "second", "failed", "missing", "faint"]
Scalar = str | int | float | bool | None

FAILED = "failed"
MISSING = "not run"


@dataclass(frozen=True)
class SheetEntry:
    """One field: what people read, what programs read, and how it is shown."""

    text: str
    value: Scalar = None
    tone: Tone = ""

    @classmethod
    def of(cls, text: str, tone: Tone = "") -> SheetEntry:
        """A field that is its own value."""
        return cls(text, text, tone)


BLANK = SheetEntry("", None)


@dataclass(frozen=True)
class SheetColumn:
    """A column: its title, the group it stands in, whether it is text, and whether only csv has it."""

    title: str
    group: str = ""
    words: bool = False
    hidden: bool = False

    @property
    def full(self) -> str:
        """Title with the group, where there is no place for two lines."""
        return f"{self.group} {self.title}".strip()


@dataclass(frozen=True)
class SheetRow:
    """Entries below each other's columns; rows of one ``block`` stand together under its name."""

    entries: tuple[SheetEntry, ...]
    block: str = ""


@dataclass(frozen=True)
class Sheet:
    """A table.

    Attributes:
        slug: name of its files.
        title: above it.
        columns: in order; the first ones name the row.
        rows: in order.
        notes: below it.
        block: what the blocks of rows are, where csv has no other column for it.
    """

    slug: str
    title: str
    columns: tuple[SheetColumn, ...]
    rows: tuple[SheetRow, ...]
    notes: tuple[str, ...] = field(default=())
    block: str = ""

    def csv(self) -> str:
        """All columns, plain values."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow([*([self.block] if self.block else []), *(c.full for c in self.columns)])
        for row in self.rows:
            values = ["" if e.value is None else e.value for e in row.entries]
            writer.writerow([*([row.block] if self.block else []), *values])
        return out.getvalue()

    def markdown(self) -> str:
        """The columns that people read; best is bold, second underlined."""
        shown = self.shown
        blocks = any(row.block for row in self.rows)
        titles = [*([""] if blocks else []), *(c.full for c in shown)]
        rules = [*(["---"] if blocks else []), *("---" if c.words else "---:" for c in shown)]
        lines = [f"## {self.title}", "", _line(titles), _line(rules)]
        last = ""
        for row in self.rows:
            head = [row.block if row.block != last else ""] if blocks else []
            lines.append(_line([*head, *(_marked(e) for e in self.visible(row))]))
            last = row.block
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes), ""])

    @property
    def shown(self) -> tuple[SheetColumn, ...]:
        """Columns that people read."""
        return tuple(c for c in self.columns if not c.hidden)

    def visible(self, row: SheetRow) -> list[SheetEntry]:
        """Entries that people read."""
        return [e for c, e in zip(self.columns, row.entries, strict=True) if not c.hidden]

    def groups(self) -> list[tuple[str, int]]:
        """Groups of the columns that people read, with how many columns each spans."""
        found: list[tuple[str, int]] = []
        for column in self.shown:
            if found and found[-1][0] == column.group:
                found[-1] = (column.group, found[-1][1] + 1)
            else:
                found.append((column.group, 1))
        return found

    def blocks(self) -> Iterator[tuple[str, Sequence[SheetRow]]]:
        """Rows by block, in order."""
        start = 0
        for i in range(1, len(self.rows) + 1):
            if i == len(self.rows) or self.rows[i].block != self.rows[start].block:
                yield self.rows[start].block, self.rows[start:i]
                start = i


def _line(fields: Sequence[str]) -> str:
    return "| " + " | ".join(f.replace("|", "\\|") for f in fields) + " |"


def _marked(entry: SheetEntry) -> str:
    if entry.tone == "best":
        return f"**{entry.text}**"
    if entry.tone == "second":
        return f"<u>{entry.text}</u>"
    return entry.text
