"""The libFM (libSVM) text format: ``label feature:1 feature:1 ...``, one feature per field."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import ClassVar, Literal

import polars as pl

from pocketrec.data.lines import Lines, delimit, read_lines
from pocketrec.data.source import Batch, Column, Scan, Source, reject
from pocketrec.errors import ConfigError, DataError


@dataclass(frozen=True)
class Libfm(Source):
    """The ``p``-th feature of every line is the value of field ``p``; every line has as many as the first.

    Features are whole numbers; a weight, if there is one, must be 1.

    Args:
        negative: how the file writes the label of a row that was not clicked; ``-1`` is libSVM's way.

    Example:
        >>> Libfm(negative="-1")
        Libfm(negative='-1')

    Reference:
        Rendle, Factorization Machines with libFM, ACM TIST 2012.
    """

    name: ClassVar[str] = "libfm"

    negative: Literal["0", "-1"] = "0"

    def __post_init__(self) -> None:
        if self.negative not in ("0", "-1"):
            raise ConfigError(f"`negative` must be '0' or '-1', but got {self.negative!r}.")

    def scan(self, path: Path, columns: tuple[Column, ...] | None = None) -> Scan:
        """See :meth:`Source.scan`."""
        blocks = map(_single_spaced, read_lines(path))
        first = next(blocks)
        if columns is None:
            width = first.texts[0].count(" ") if first.texts else 0
            if not width:
                raise DataError(f"{path}:1: expected 'label feature:1 feature:1 ...', but got {first.texts[:1]}.")
            columns = tuple(Column(f"f{p}", "integer") for p in range(width))
        return Scan(columns, self._batches(chain([first], blocks), [c.name for c in columns]), label="label")

    def _batches(self, blocks: Iterator[Lines], names: list[str]) -> Iterator[Batch]:
        for lines in blocks:
            batch = delimit(lines, ("label", *names), " ")
            features = [pl.col(n).str.extract(r"^(\d+)(?::1(?:\.0*)?)?$") for n in names]
            label = pl.col("label").replace({self.negative: "0", "+1": "1"} if self.negative == "-1" else {})
            frame = batch.frame.with_columns(label, *features)
            valid = frame.select(pl.all_horizontal(pl.col(names).is_not_null())).to_series()
            yield reject(batch, frame, valid, "feature is not a whole number with weight 1", names)


def _single_spaced(lines: Lines) -> Lines:
    return replace(lines, texts=[" ".join(text.split()) for text in lines.texts])
