"""Any csv, tsv or parquet file as batches of string columns."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import polars as pl

from pocketrec.data.lines import read_delimited, read_lines, split_quoted
from pocketrec.data.source import BATCH_ROWS, Batch, require_file
from pocketrec.errors import DataError

_SEPARATORS = ",\t;|"


@dataclass(frozen=True)
class TableFile:
    """An opened table: the names of its columns, and its batches, readable as often as wanted."""

    names: tuple[str, ...]
    batches: Callable[[], Iterator[Batch]]


def open_table(path: Path, separator: str | None, needed: Sequence[str]) -> TableFile:
    """Open a csv, tsv (with a header line) or parquet file that must have the columns ``needed``.

    Raises:
        DataError: no such file, no rows, one column only, repeated or missing columns (with the nearest name).
    """
    require_file(path)
    table = _parquet(path) if is_parquet(path) else _text(path, separator)
    repeated = sorted({n for n in table.names if table.names.count(n) > 1})
    if repeated:
        raise DataError(f"{path}: expected every column name once, but {repeated[0]!r} is repeated; rename one.")
    for name in needed:
        if name not in table.names:
            near = get_close_matches(name, table.names, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            shown = ", ".join(table.names[:12]) + (", ..." if len(table.names) > 12 else "")
            raise DataError(f"{path}: expected a column {name!r}, but the columns are {shown}{hint}")
    return table


def is_parquet(path: Path) -> bool:
    """Whether a file begins as parquet does."""
    with path.open("rb") as stream:
        return stream.read(4) == b"PAR1"


def _parquet(path: Path) -> TableFile:
    try:
        frame = pl.scan_parquet(path)
        names = tuple(frame.collect_schema().names())
    except (pl.exceptions.PolarsError, OSError) as error:
        raise _damaged(path, error) from error

    def batches() -> Iterator[Batch]:
        first = 1
        try:
            for part in frame.collect_batches(chunk_size=BATCH_ROWS, maintain_order=True):
                text = part.select(pl.all().cast(pl.String).fill_null(""))
                yield Batch(text, np.arange(first, first + part.height, dtype=np.int64))
                first += part.height
        except pl.exceptions.PolarsError as error:
            raise _damaged(path, error) from error

    return TableFile(names, batches)


def _damaged(path: Path, error: Exception) -> DataError:
    reason = str(error).splitlines()[0]
    return DataError(f"{path}: expected a readable parquet file, but got: {reason}; fetch or write it again.")


def _text(path: Path, separator: str | None) -> TableFile:
    head = next(read_lines(path))
    if not head.numbers or head.numbers[0] != 1:
        reason = head.bad[0].reason if head.bad else "nothing"
        raise DataError(f"{path}:1: expected a header line, but got: {reason}.")
    header = head.texts[0]
    chosen = separator or max(_SEPARATORS, key=header.count)
    try:
        names = tuple(split_quoted(header, chosen))
    except csv.Error as error:
        raise DataError(f"{path}:1: expected a header line, but got a quote that is not closed.") from error
    if len(names) == 1:
        raise DataError(
            f"{path}:1: expected several columns, but separator {chosen!r} gives one, {names[0]!r}; "
            "set `separator` to the one that the file uses."
        )
    return TableFile(names, lambda: read_delimited(path, names, chosen, header=True, quotes=True))
