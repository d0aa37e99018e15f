"""Adjacency lists of the LightGCN release: ``user item item ...``, one user a line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import polars as pl

from pocketrec.data.lines import Lines, read_lines
from pocketrec.data.source import BadRow, Batch, Column, Scan, Source
from pocketrec.schema import Task


@dataclass(frozen=True)
class Adjacency(Source):
    """Non-negative whole numbers separated by blanks; a row is one (user, item) pair, a line without items has none.

    A line with anything else in it is one bad row.

    Example:
        >>> Adjacency().task
        'cf'

    Reference:
        He et al., LightGCN, SIGIR 2020 (train.txt, test.txt).
    """

    name: ClassVar[str] = "adjacency"
    task: ClassVar[Task] = "cf"

    def scan(self, path: Path, columns: tuple[Column, ...] | None = None) -> Scan:
        """See :meth:`Source.scan`."""
        return Scan((Column("user", "dense"), Column("item", "dense")), map(_pairs, read_lines(path)))


def _pairs(lines: Lines) -> Batch:
    tokens = (
        pl.Series(lines.texts, dtype=pl.String).str.strip_chars(" \t").str.replace_all("[ \t]+", " ").str.split(" ")
    )
    numbers = tokens.cast(pl.List(pl.Int64), strict=False)
    good = numbers.list.eval((pl.element() >= 0).fill_null(False)).list.all()
    where = np.array(lines.numbers, np.int64)
    refused = zip(where[~good.to_numpy()], pl.Series(lines.texts, dtype=pl.String).filter(~good), strict=True)
    bad = [BadRow(int(n), "not a list of whole numbers", f"got {text[:40]!r}") for n, text in refused]
    kept = pl.DataFrame({"user": numbers.list.first(), "item": numbers.list.slice(1), "line": where}).filter(good)
    pairs = kept.filter(pl.col("item").list.len() > 0).explode("item")
    return Batch(pairs.select("user", "item"), pairs["line"].to_numpy(), lines.bad + bad)
