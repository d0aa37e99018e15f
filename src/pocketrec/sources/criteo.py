"""Criteo display advertising: label, 13 integers, 26 categories, tab separated, no header."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from pocketrec.data.columnar import is_parquet, open_table
from pocketrec.data.lines import read_delimited
from pocketrec.data.source import Batch, Column, Scan, Source, reject, require_file
from pocketrec.errors import ConfigError

INTEGERS = tuple(f"I{i}" for i in range(1, 14))
CATEGORIES = tuple(f"C{i}" for i in range(1, 27))

Buckets = Literal["log_squared", "log2"]


@dataclass(frozen=True)
class Criteo(Source):
    """Integers are bucketed as in the published code, and an empty cell is a value of its own.

    Bucket of an integer ``v``: ``floor(ln(v)^2)`` for ``v > 2``, else ``v - 2``; of an empty cell: ``NULL``.
    The file is the original text, or parquet with the columns ``label``, ``I1`` .. ``I13``, ``C1`` .. ``C26``.
    The papers use ``threshold=10`` with ``counting="published"``.

    Args:
        buckets: of integers above 2: ``log_squared`` as above, or ``log2``, ``ceil(log2(v))``, as the text of the
            benchmark says; its figures come from the former.

    Example:
        >>> [c.name for c in Criteo().columns[:2]]
        ['I1', 'I2']

    Reference:
        Criteo Labs, Display Advertising Challenge, 2014 (45,840,617 lines).
    """

    name: ClassVar[str] = "criteo"
    columns: ClassVar[tuple[Column, ...]] = tuple(Column(n) for n in (*INTEGERS, *CATEGORIES))

    buckets: Buckets = "log_squared"

    def __post_init__(self) -> None:
        if self.buckets not in FORMULAS:
            raise ConfigError(f"`buckets` must be one of {', '.join(FORMULAS)}, but got {self.buckets!r}.")

    def scan(self, path: Path, columns: tuple[Column, ...] | None = None) -> Scan:
        """See :meth:`Source.scan`."""
        names = ("label", *INTEGERS, *CATEGORIES)
        if is_parquet(require_file(path)):
            batches = open_table(path, None, names).batches()
        else:
            batches = read_delimited(path, names, "\t", header=False, quotes=False)
        return Scan(self.columns, map(partial(_bucketed, formula=self.buckets), batches), label="label")


def _bucketed(batch: Batch, formula: Buckets) -> Batch:
    frame = batch.frame.with_columns(bucket(batch.frame[n], formula).alias(n) for n in INTEGERS)
    readable = frame.select(pl.all_horizontal(pl.col(INTEGERS).is_not_null())).to_series()
    return reject(batch, frame, readable, "integer column does not hold an integer", INTEGERS)


def bucket(cells: pl.Series, formula: Buckets = "log_squared") -> pl.Series:
    """Raw integer strings -> bucket strings; null where a cell is neither empty nor an integer.

    Example:
        >>> bucket(pl.Series(["", "0", "2", "3", "100"])).to_list()
        ['NULL', '-2', '0', '1', '21']
        >>> bucket(pl.Series(["3", "4", "5", "100"]), "log2").to_list()
        ['2', '2', '3', '7']
    """
    numbers = cells.cast(pl.Int64, strict=False)
    large = pl.Series(FORMULAS[formula](np.maximum(numbers.fill_null(1).to_numpy(), 1)).astype(np.int64))
    buckets = pl.select(pl.when(numbers > 2).then(large).otherwise(numbers - 2)).to_series().cast(pl.String)
    return pl.select(pl.when(cells == "").then(pl.lit("NULL")).otherwise(buckets)).to_series()


def _log_squared(numbers: NDArray[np.int64]) -> NDArray[Any]:
    """``floor(ln(v)^2)``."""
    return np.floor(np.log(numbers) ** 2)


def _log2(numbers: NDArray[np.int64]) -> NDArray[Any]:
    """``ceil(log2(v))``: the bits of ``v - 1``."""
    return np.frexp((numbers - 1).astype(np.float64))[1]


FORMULAS: dict[Buckets, Callable[[NDArray[np.int64]], NDArray[Any]]] = {"log_squared": _log_squared, "log2": _log2}
