"""Criteo display advertising: label, 13 integers, 26 categories, tab separated, no header."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import polars as pl

from pocketrec.encoding.columnar import is_parquet, open_table
from pocketrec.encoding.lines import read_delimited
from pocketrec.source import Batch, Column, Scan, Source, reject, require_file

INTEGERS = tuple(f"I{i}" for i in range(1, 14))
CATEGORIES = tuple(f"C{i}" for i in range(1, 27))


@dataclass(frozen=True)
class Criteo(Source):
    """Integers are bucketed as in the published code, and an empty cell is a value of its own.

    Bucket of an integer ``v``: ``floor(ln(v)^2)`` for ``v > 2``, else ``v - 2``; of an empty cell: ``NULL``.
    The file is the original text, or parquet with the columns ``label``, ``I1`` .. ``I13``, ``C1`` .. ``C26``.
    The papers use ``threshold=10`` with ``counting="published"``.

    Example:
        >>> [c.name for c in Criteo().columns[:2]]
        ['I1', 'I2']

    Reference:
        Criteo Labs, Display Advertising Challenge, 2014 (45,840,617 lines).
    """

    name: ClassVar[str] = "criteo"
    columns: ClassVar[tuple[Column, ...]] = tuple(Column(n) for n in (*INTEGERS, *CATEGORIES))

    def scan(self, path: Path, columns: tuple[Column, ...] | None = None) -> Scan:
        """See :meth:`Source.scan`."""
        names = ("label", *INTEGERS, *CATEGORIES)
        if is_parquet(require_file(path)):
            batches = open_table(path, None, names).batches()
        else:
            batches = read_delimited(path, names, "\t", header=False, quotes=False)
        return Scan(self.columns, map(_bucketed, batches), label="label")


def _bucketed(batch: Batch) -> Batch:
    frame = batch.frame.with_columns(bucket(batch.frame[n]).alias(n) for n in INTEGERS)
    readable = frame.select(pl.all_horizontal(pl.col(INTEGERS).is_not_null())).to_series()
    return reject(batch, frame, readable, "integer column does not hold an integer", INTEGERS)


def bucket(cells: pl.Series) -> pl.Series:
    """Raw integer strings -> bucket strings; null where a cell is neither empty nor an integer.

    Example:
        >>> bucket(pl.Series(["", "0", "2", "3", "100"])).to_list()
        ['NULL', '-2', '0', '1', '21']
    """
    numbers = cells.cast(pl.Int64, strict=False)
    logarithm = np.log(np.maximum(numbers.fill_null(1).to_numpy(), 1))
    large = pl.Series(np.floor(logarithm**2).astype(np.int64))
    buckets = pl.select(pl.when(numbers > 2).then(large).otherwise(numbers - 2)).to_series().cast(pl.String)
    return pl.select(pl.when(cells == "").then(pl.lit("NULL")).otherwise(buckets)).to_series()
