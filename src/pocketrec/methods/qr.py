"""QR: the quotient-remainder trick."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pocketrec.errors import ConfigError
from pocketrec.families.compositional.ladder import CompositionalMethod, Start
from pocketrec.families.compositional.region import NOTHING, Region, SlotOrder, Slots
from pocketrec.families.compositional.table import Composition
from pocketrec.families.sharing import BlockSharing
from pocketrec.format.block import PackedRange, Storage
from pocketrec.format.computed import encode_factor, factor_bytes
from pocketrec.format.layouts.product import ProductBlock

Operation = Literal["mult", "add", "concat"]
LargerFactor = Literal["remainder", "quotient"]
FactorInit = Literal["normal", "uniform"]

STD = {"mult": math.sqrt(0.1), "add": 0.05, "concat": 0.1}


@dataclass(frozen=True)
class QR(CompositionalMethod):
    """Two small tables in place of a large one: ``e_i = R[i mod p] * Q[i div p]``, a pair of rows for each id.

    Both tables together have ``p + ceil(n / p)`` rows. With a large remainder table every budget is met to within one
    row; with a large quotient table the sizes near the dense one are far apart (half, a third, a quarter ...).

    Args:
        operation: how two rows become a vector: ``mult``, ``add``, or ``concat`` (two halves side by side).
        init: ``normal`` (standard deviation sqrt(0.1) for ``mult``, 0.05 for ``add``, 0.1 for ``concat``) or
            ``uniform`` in [1/sqrt(n), 1), as published runs do.
        large: which table is the large one; ``quotient`` with ``order="id"`` is the published behaviour.
        divisor: ``p`` of every region, at least 1, as published runs fix it; by default from the budget.
        scope: ``block`` has a pair of tables for each counted block, ``joint`` one for all rows.
        order: which ids are neighbours: ``file`` (by fingerprint of the value; free in a file) or ``id`` (in the order
            of first appearance; 4 bytes a row in a file with hashed fields).

    Example:
        >>> QR().divisor_of(rows=1_086_810, most=543_405), QR(large="quotient").divisor_of(rows=1_086_810, most=543_407)
        (543402, 2)

    Reference:
        Shi et al., "Compositional embeddings using complementary partitions for memory-efficient recommendation
        systems", 2020.
    """

    name: ClassVar[str] = "qr"
    bounds: ClassVar = {"divisor": 1}

    operation: Operation = "mult"
    init: FactorInit = "normal"
    large: LargerFactor = "remainder"
    divisor: int | None = None
    scope: BlockSharing = "block"
    order: SlotOrder = "file"
    start: Start = field(default=Start())

    def plan(self, region: Region, values: int, frequent: Slots = NOTHING) -> QRPlan | None:
        """The tables of a region that hold at most ``values`` scalars."""
        divisor = self.divisor_of(region.rows, values // self._row(region))
        return None if divisor is None else QRPlan(region.rows, region.width, divisor, self.operation, self.init)

    def least(self, region: Region) -> int:
        """Scalars of the smallest tables of a region."""
        fixed = self._fixed(region.rows)
        return (least_rows(region.rows) if fixed is None else table_rows(region.rows, fixed)) * self._row(region)

    def divisor_of(self, rows: int, most: int) -> int | None:
        """``p`` with ``p + ceil(rows / p) <= most``: the largest, or for a large quotient table the smallest."""
        fixed = self._fixed(rows)
        if most < (least_rows(rows) if fixed is None else table_rows(rows, fixed)):
            return None
        if fixed is not None:
            return fixed
        if self.large == "remainder":
            return next(p for p in range(min(most - 1, rows), 0, -1) if table_rows(rows, p) <= most)
        return next(p for p in range(-(-rows // most), rows + 1) if table_rows(rows, p) <= most)

    def _fixed(self, rows: int) -> int | None:
        """The given divisor, as far as there are rows."""
        return None if self.divisor is None else min(self.divisor, rows)

    def _row(self, region: Region) -> int:
        """Scalars of a row of either table."""
        if self.operation != "concat":
            return region.width
        if region.width % 2:
            raise ConfigError(
                f"`operation='concat'` needs an even width, but block {region.name!r} has {region.width} columns."
            )
        return region.width // 2


def table_rows(rows: int, divisor: int) -> int:
    """Rows of both tables, ``p + ceil(n / p)``.

    Example:
        >>> table_rows(100, 7)
        22
    """
    return divisor + -(-rows // divisor)


def least_rows(rows: int) -> int:
    """``min_p p + ceil(rows / p)``, reached next to the square root.

    Example:
        >>> least_rows(100), least_rows(7)
        (20, 6)
    """
    root = math.isqrt(rows)
    return min(table_rows(rows, p) for p in (root, root + 1) if p >= 1)


@dataclass(frozen=True)
class QRPlan:
    """Two tables for ``rows`` slots of ``width`` columns."""

    rows: int
    width: int
    divisor: int
    operation: Operation = "mult"
    init: FactorInit = "normal"

    @property
    def shapes(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of the remainder table and of the quotient table."""
        width = self.width // 2 if self.operation == "concat" else self.width
        return (self.divisor, width), (-(-self.rows // self.divisor), width)

    @property
    def values(self) -> int:
        """Scalars of both tables."""
        return sum(rows * width for rows, width in self.shapes)

    def size_bytes(self, storage: Storage) -> int:
        """Bytes of both tables in a file."""
        return sum(factor_bytes(shape, storage) for shape in self.shapes)

    def build(self, source: torch.Generator) -> QRComposition:
        """Both tables, freshly drawn."""
        tables = [torch.empty(shape) for shape in self.shapes]
        for table in tables:
            if self.init == "uniform":
                table.uniform_(math.sqrt(1 / self.rows), 1, generator=source)
            else:
                table.normal_(0, STD[self.operation], generator=source)
        return QRComposition(self, *tables)


class QRComposition(Composition):
    """``R[i mod p]`` and ``Q[i div p]``, multiplied, added or side by side."""

    def __init__(self, plan: QRPlan, remainder: Tensor, quotient: Tensor) -> None:
        super().__init__()
        self.rows, self.width, self.divisor = plan.rows, plan.width, plan.divisor
        self.operation = plan.operation
        self.remainder = nn.Parameter(remainder)
        self.quotient = nn.Parameter(quotient)

    def extra_repr(self) -> str:
        """What the shapes of the tables do not say."""
        return f"rows={self.rows}, {self.operation}"

    def forward(self, slots: Tensor) -> Tensor:
        """Slots ``(m,)`` -> ``(m, width)``."""
        return self._combine(self.remainder[slots % self.divisor], self.quotient[slots // self.divisor])

    def weight(self) -> Tensor:
        """Every vector, ``(rows, width)``: an outer product of the two tables, without a look-up."""
        shape = (len(self.quotient), self.divisor, self.remainder.shape[1])
        remainder, quotient = self.remainder.expand(shape), self.quotient[:, None].expand(shape)
        return self._combine(remainder, quotient).flatten(0, 1)[: self.rows]

    def _combine(self, remainder: Tensor, quotient: Tensor) -> Tensor:
        if self.operation == "concat":
            return torch.cat([remainder, quotient], dim=-1)
        return remainder * quotient if self.operation == "mult" else remainder + quotient

    def values(self) -> int:
        """Scalars of both tables."""
        return self.remainder.numel() + self.quotient.numel()

    def pack(self, place: PackedRange, storage: Storage, slots: NDArray[np.uint32] | None) -> ProductBlock:
        """Layout ``product``."""
        arrays = {} if slots is None else {"slots": slots}
        for name in ("remainder", "quotient"):
            arrays |= encode_factor(name, getattr(self, name).detach().cpu().numpy(), storage)
        settings = {"slots": self.rows, "divisor": self.divisor, "operation": self.operation}
        return ProductBlock(*place, "product", storage, settings, arrays=arrays)
