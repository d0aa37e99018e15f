"""Regions of a table that share one composition, and the order of their slots."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pocketrec.data.dataset import Dataset
from pocketrec.families.sharing import BlockSharing
from pocketrec.models.table import Block

SlotOrder = Literal["file", "id"]

Slots = NDArray[np.int64]

NOTHING: Slots = np.empty(0, np.int64)


@dataclass(frozen=True)
class Region:
    """Rows ``[start, stop)`` x columns ``[left, right)`` that share one composition."""

    name: str
    start: int
    stop: int
    left: int
    right: int

    @property
    def rows(self) -> int:
        """Rows, which is slots."""
        return self.stop - self.start

    @property
    def width(self) -> int:
        """Columns."""
        return self.right - self.left

    @property
    def values(self) -> int:
        """Scalars of the dense region."""
        return self.rows * self.width


def regions(blocks: Sequence[Block], scope: BlockSharing) -> tuple[Region, ...]:
    """The counted blocks as regions; in scope ``joint`` neighbours with the same columns are one.

    Example:
        >>> user, item = Block("user", 0, 30, 0, 8), Block("item", 30, 70, 0, 8)
        >>> regions((user, item), "joint")
        (Region(name='user+item', start=0, stop=70, left=0, right=8),)
    """
    counted = sorted((b for b in blocks if b.counted), key=lambda b: (b.left, b.start))
    found: list[Region] = []
    for b in counted:
        last = found[-1] if found else None
        if scope == "joint" and last and (last.left, last.right, last.stop) == (b.left, b.right, b.start):
            found[-1] = replace(last, name=f"{last.name}+{b.name}", stop=b.stop)
        else:
            found.append(Region(b.name, b.start, b.stop, b.left, b.right))
    return tuple(found)


def slots_of(region: Region, data: Dataset, order: SlotOrder) -> Slots:
    """Slot of each row of a region, a permutation ``(rows,)``: its place in the file, or its id.

    Rows that no file stores, the out-of-vocabulary rows, come last in the order of the file.
    """
    if order == "id":
        return np.arange(region.rows)
    rows = data.file_order
    rows = rows[(rows >= region.start) & (rows < region.stop)] - region.start
    slots = np.empty(region.rows, np.int64)
    slots[rows] = np.arange(region.rows)
    return slots


class FrequencyOrder:
    """Slots of regions, the most frequent in training first; each is sorted once.

    Args:
        data: It has counted its rows.
        order: What a slot is, see :func:`slots_of`.
    """

    def __init__(self, data: Dataset, order: SlotOrder) -> None:
        self._data = data
        self._order: SlotOrder = order
        self._known: dict[Region, Slots] = {}

    def of(self, region: Region) -> Slots:
        """All slots of a region, ``(rows,)``; those of equal frequency in the order of their rows."""
        if region not in self._known:
            order = np.argsort(-self._data.counts[region.start : region.stop], kind="stable")
            self._known[region] = slots_of(region, self._data, self._order)[order]
        return self._known[region]
