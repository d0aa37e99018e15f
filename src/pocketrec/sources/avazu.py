"""Avazu click-through rate prediction: csv with a header; 22 fields."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pocketrec.data.columnar import open_table
from pocketrec.data.source import Column, Scan, Source

FIELDS = (
    "hour", "C1", "banner_pos", "site_id", "site_domain", "site_category", "app_id", "app_domain", "app_category",
    "device_id", "device_ip", "device_model", "device_type", "device_conn_type",
    "C14", "C15", "C16", "C17", "C18", "C19", "C20", "C21",
)  # fmt: skip


@dataclass(frozen=True)
class Avazu(Source):
    """``click`` is the label, ``id`` is dropped, ``hour`` stays the raw YYMMDDHH string, one category.

    The papers use ``threshold=2`` with ``counting="published"``.

    Example:
        >>> len(Avazu().columns)
        22

    Reference:
        Avazu, Click-Through Rate Prediction, Kaggle 2014 (40,428,967 rows).
    """

    name: ClassVar[str] = "avazu"
    columns: ClassVar[tuple[Column, ...]] = tuple(Column(n) for n in FIELDS)

    def scan(self, path: Path, columns: tuple[Column, ...] | None = None) -> Scan:
        """See :meth:`Source.scan`."""
        return Scan(self.columns, open_table(path, ",", ("click", *FIELDS)).batches(), label="click")
