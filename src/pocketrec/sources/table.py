"""Any csv, tsv or parquet file with a label column."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import polars as pl

from pocketrec.data.columnar import TableFile, open_table
from pocketrec.data.source import Batch, Column, ColumnKind, Scan, Source, reject
from pocketrec.errors import ConfigError


@dataclass(frozen=True)
class Table(Source):
    """Every column but the label is one categorical feature; kinds are guessed from the first rows unless given.

    A column whose cells are all whole numbers is ``integer``; one whose cells are all numbers, some of them with a
    fraction, is ``number``: its values are rounded to ``digits`` significant digits, which gives at most
    ``9 * 10^(digits - 1)`` values per decade and sign whatever the unit, and the rounded text is what a model file
    knows. Every other column is ``category``. An empty cell is a value.

    Args:
        label: name of the label column (0/1, 0.0/1.0, false/true).
        drop: columns that are not features.
        split_column: column that says ``train``, ``valid`` or ``test`` for each row.
        separator: column separator of a text file; read from the header where ``None``.
        category: columns whose every distinct string is a value.
        integer: columns of whole numbers, stored without a vocabulary where at least half of their range occurs.
        dense: columns of whole numbers that are stored without a vocabulary in any case.
        number: columns of measured numbers, rounded.
        digits: significant digits of ``number`` columns, at least 1.

    Example:
        >>> Table(label="label", drop=("rating",), category=("zip",)).digits
        2
    """

    name: ClassVar[str] = "table"

    label: str = "label"
    drop: tuple[str, ...] = ()
    split_column: str | None = None
    separator: str | None = None
    category: tuple[str, ...] = ()
    integer: tuple[str, ...] = ()
    dense: tuple[str, ...] = ()
    number: tuple[str, ...] = ()
    digits: int = 2

    def __post_init__(self) -> None:
        if self.digits < 1:
            raise ConfigError(f"`digits` must be at least 1, but got {self.digits}.")
        said = [*self.category, *self.integer, *self.dense, *self.number]
        for column in said:
            if said.count(column) > 1:
                raise ConfigError(f"A column has one kind, but {column!r} is named {said.count(column)} times.")

    def scan(self, path: Path, columns: tuple[Column, ...] | None = None) -> Scan:
        """See :meth:`Source.scan`."""
        special = [self.label, *([self.split_column] if self.split_column else [])]
        given = [*self.category, *self.integer, *self.dense, *self.number]
        needed = [*special, *self.drop, *given] if columns is None else [*special, *(c.name for c in columns)]
        table = open_table(path, self.separator, needed)
        if columns is None:
            columns = self._columns(table, [n for n in table.names if n not in special and n not in self.drop])
        if not columns:
            raise ConfigError(f"{path}: expected at least one feature column beside {special}; drop fewer columns.")
        return Scan(columns, self._batches(table, columns, special), label=self.label, split=self.split_column)

    def _columns(self, table: TableFile, names: list[str]) -> tuple[Column, ...]:
        given: dict[str, ColumnKind] = {
            **dict.fromkeys(self.category, "category"),
            **dict.fromkeys(self.integer, "integer"),
            **dict.fromkeys(self.dense, "dense"),
            **dict.fromkeys(self.number, "number"),
        }
        first = next(table.batches(), None)
        return tuple(Column(n, given.get(n) or (guess(first.frame[n]) if first else "category")) for n in names)

    def _batches(self, table: TableFile, columns: tuple[Column, ...], special: list[str]) -> Iterator[Batch]:
        names = {kind: [c.name for c in columns if c.kind == kind] for kind in ("number", "dense")}
        for batch in table.batches():
            batch = Batch(batch.frame.select(*(c.name for c in columns), *special), batch.lines, batch.bad)
            if names["dense"]:
                valid = _all(batch.frame, [_is_whole(n) for n in names["dense"]])
                batch = reject(batch, batch.frame, valid, "not a whole number", names["dense"])
            if names["number"]:
                valid = _all(batch.frame, [_is_number_or_empty(n) for n in names["number"]])
                rounded = batch.frame.with_columns(_rounded(n, self.digits) for n in names["number"])
                batch = reject(batch, rounded, valid, "not a number", names["number"])
            yield batch


def guess(cells: pl.Series) -> ColumnKind:
    """``integer``, ``number`` or ``category``, from a sample of the raw strings of one column (empty cells apart)."""
    cells = cells.filter(cells != "")
    if not len(cells):
        return "category"
    if (cells.cast(pl.Int64, strict=False).cast(pl.String) == cells).fill_null(False).all():
        return "integer"
    numbers = cells.cast(pl.Float64, strict=False)
    measured = numbers.is_finite().fill_null(False).all() and (numbers != numbers.floor()).any()
    return "number" if measured else "category"


def _all(frame: pl.DataFrame, conditions: list[pl.Expr]) -> pl.Series:
    return frame.select(pl.all_horizontal(conditions)).to_series()


def _is_whole(name: str) -> pl.Expr:
    return pl.col(name).cast(pl.Int64, strict=False).cast(pl.String).eq_missing(pl.col(name))


def _is_number_or_empty(name: str) -> pl.Expr:
    return pl.col(name).cast(pl.Float64, strict=False).is_finite().fill_null(pl.col(name) == "")


def _rounded(name: str, digits: int) -> pl.Expr:
    number = pl.col(name).cast(pl.Float64, strict=False).round_sig_figs(digits)
    unsigned_zero = pl.when(number == 0).then(0.0).otherwise(number)
    return unsigned_zero.cast(pl.String).fill_null("").alias(name)
