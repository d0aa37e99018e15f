"""KDD Cup 2012 track 2: click count and 11 columns, tab separated, no header."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import polars as pl

from pocketrec.data.lines import read_delimited
from pocketrec.data.source import Batch, Column, Scan, Source, reject

FIELDS = (
    "impression", "display_url", "ad_id", "advertiser_id", "depth", "position",
    "query_id", "keyword_id", "title_id", "description_id", "user_id",
)  # fmt: skip


@dataclass(frozen=True)
class Kdd12(Source):
    """The label is 1 where the first column, the number of clicks, is at least 1; the impression count is a category.

    The papers use ``threshold=10`` with ``counting="published"``.

    Example:
        >>> Kdd12().columns[0].name
        'impression'

    Reference:
        Tencent SOSO, KDD Cup 2012 track 2 (149,639,105 lines).
    """

    name: ClassVar[str] = "kdd12"
    columns: ClassVar[tuple[Column, ...]] = tuple(Column(n) for n in FIELDS)

    def scan(self, path: Path, columns: tuple[Column, ...] | None = None) -> Scan:
        """See :meth:`Source.scan`."""
        batches = read_delimited(path, ("click", *FIELDS), "\t", header=False, quotes=False)
        return Scan(self.columns, map(_clicked, batches), label="click")


def _clicked(batch: Batch) -> Batch:
    clicks = batch.frame["click"].cast(pl.Int64, strict=False)
    frame = batch.frame.with_columns((clicks >= 1).cast(pl.Int8).alias("click"))
    return reject(batch, frame, (clicks >= 0).fill_null(False), "click count is not a whole number", ("click",))
