"""User-item pairs in csv, tsv or parquet."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from pocketrec.data.columnar import open_table
from pocketrec.data.source import Batch, Column, Scan, Source, whole_numbers
from pocketrec.schema import Task


@dataclass(frozen=True)
class Interactions(Source):
    """One row = one observed (user, item) pair of non-negative whole numbers; other columns are ignored.

    Args:
        user: name of the user column.
        item: name of the item column.
        separator: column separator of a text file; read from the header where ``None``.

    Example:
        >>> Interactions(user="user_id", item="item_id")
        Interactions(user='user_id', item='item_id', separator=None)
    """

    name: ClassVar[str] = "interactions"
    task: ClassVar[Task] = "cf"

    user: str = "user"
    item: str = "item"
    separator: str | None = None

    def scan(self, path: Path, columns: tuple[Column, ...] | None = None) -> Scan:
        """See :meth:`Source.scan`."""
        table = open_table(path, self.separator, (self.user, self.item))

        def batches() -> Iterator[Batch]:
            for batch in table.batches():
                yield whole_numbers(batch, (self.user, self.item))

        return Scan((Column("user", "dense"), Column("item", "dense")), batches())
