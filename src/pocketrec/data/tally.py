"""Raw files on their way in: every row is kept or counted by the reason why it is not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pocketrec.data.source import BadRow, Batch, Scan
from pocketrec.errors import DataError

RowProgress = Callable[[str, int], None]
"""Told what is being done and how many rows are done."""


@dataclass(frozen=True)
class RawFile:
    """A raw file and the split that its rows belong to (``None``: decided by seed or by a column)."""

    path: Path
    split: str | None


class Tally:
    """Rows read and dropped, so that no row disappears silently."""

    def __init__(self, most_bad: float) -> None:
        self.rows_in = 0
        self.dropped: Counter[str] = Counter()
        self._most_bad = most_bad

    def batches(self, path: Path, scan: Scan) -> Iterator[Batch]:
        """The batches of one file, counted; too many bad rows raise :class:`DataError` with the first of them."""
        rows = bad = blank = 0
        first: BadRow | None = None
        for batch in scan.batches:
            rows += batch.frame.height + len(batch.bad)
            self.dropped.update(b.reason for b in batch.bad)
            faults = [b for b in batch.bad if b.reason != "blank line"]
            bad += len(faults)
            blank += len(batch.bad) - len(faults)
            first = first or min(faults, key=lambda b: b.line, default=None)
            if first and bad == rows:
                self._refuse(path, bad, rows, first)
            if batch.frame.height:
                yield batch
        if first and bad > self._most_bad * rows:
            self._refuse(path, bad, rows, first)
        if rows == blank:
            raise DataError(f"{path}: expected rows, but there are none.")
        self.rows_in += rows

    def _refuse(self, path: Path, bad: int, rows: int, first: BadRow) -> None:
        detail = f" ({first.detail})" if first.detail else ""
        raise DataError(
            f"{path}:{first.line}: {first.reason}{detail}; {bad:,} of the first {rows:,} rows are bad, "
            f"at most {self._most_bad:.1%} may be; repair the file or raise `max_bad`."
        )
