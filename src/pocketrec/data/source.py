"""What a raw log format is: the abstract :class:`Source`, the batches it yields, and what all sources share.

A source reads a file once, in order and in bounded memory. It yields every row as strings (or as integers where the
range is known) and sets unreadable rows aside by line and reason; it never drops a row silently.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pocketrec.errors import DataError
from pocketrec.schema import Task

ColumnKind = Literal["category", "integer", "dense", "number"]

BATCH_ROWS = 1 << 16


@dataclass(frozen=True)
class Column:
    """One feature column and how its values become ids.

    ``category``: every distinct string is a value. ``integer``: the same, but kept without a vocabulary when the range
    of the training values is at least half occupied. ``dense``: integers, always without a vocabulary. ``number``: the
    source has already reduced the values to few strings (see the source). ``size``: the values are known to be the
    integers ``0 .. size - 1``.
    """

    name: str
    kind: ColumnKind = "category"
    size: int | None = None


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be read: its line (1-based; for parquet its row), why, and what exactly came."""

    line: int
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Batch:
    """Consecutive rows of a raw file.

    ``frame`` holds the feature columns (strings without nulls; integers where ``Column.size`` is given) and the
    label, split and teacher columns that the :class:`Scan` names; ``lines`` ``(n,)`` int64 are their 1-based lines.
    """

    frame: pl.DataFrame
    lines: NDArray[np.int64]
    bad: list[BadRow] = field(default_factory=list)


@dataclass(frozen=True)
class Scan:
    """An opened raw file: what its columns are, and its batches, which can be read once."""

    columns: tuple[Column, ...]
    batches: Iterator[Batch]
    label: str | None = None
    split: str | None = None
    teacher: str | None = None


class Source(ABC):
    """A raw log format; subclasses are frozen dataclasses, one per file in ``sources/``."""

    name: ClassVar[str]
    task: ClassVar[Task] = "ctr"
    generates: ClassVar[bool] = False
    """Whether the rows are made rather than read, so that there is no raw file."""

    @abstractmethod
    def scan(self, path: Path, columns: tuple[Column, ...] | None = None) -> Scan:
        """Open ``path`` lazily; ``columns`` are those of the training file when ``path`` is another part of it.

        Raises:
            DataError: the file is missing, empty, a folder, or does not have the promised columns.
        """


def require_file(path: Path) -> Path:
    """``path`` itself, or a :class:`DataError` that says why it cannot be read as a file."""
    if path.is_dir():
        raise DataError(f"{path}: expected a file, but got a folder; name the file inside it.")
    if not path.exists():
        raise DataError(f"{path}: expected a file, but there is none; check the path.")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: expected rows, but the file is empty (0 bytes).")
    return path


def whole_numbers(batch: Batch, names: Sequence[str]) -> Batch:
    """The columns ``names`` as int64; rows in which one of them is not a whole number of at least 0 are bad."""
    frame = batch.frame.select(pl.col(n).cast(pl.Int64, strict=False).alias(n) for n in names)
    valid = frame.select(pl.all_horizontal(pl.all() >= 0).fill_null(False)).to_series()
    return reject(batch, frame, valid, "not a whole number of at least 0", names)


def reject(batch: Batch, frame: pl.DataFrame, valid: pl.Series, reason: str, names: Sequence[str]) -> Batch:
    """``batch`` with the columns of ``frame``, its rows where ``valid`` is false set aside with their raw ``names``."""
    if valid.all():
        return Batch(frame, batch.lines, batch.bad)
    refused = batch.frame.filter(~valid).select(names).rows()
    mask = valid.to_numpy()
    bad = [BadRow(int(n), reason, f"got {raw!r}") for n, raw in zip(batch.lines[~mask], refused, strict=True)]
    return Batch(frame.filter(valid), batch.lines[mask], batch.bad + bad)
