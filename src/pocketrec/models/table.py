"""The thing that is compressed: ids -> vectors, as an ordered set of blocks.

A table is a logical matrix of ``n`` rows and ``D`` columns, tiled by blocks (a range of rows x a range of columns).
Click models: block ``embedding`` (all rows, ``d`` columns) and block ``linear`` (all rows, one column: the per-feature
weight; counted in bytes, never in ``values``). Ranking models: one block of rows for users, one for items.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pocketrec.errors import ConfigError, DivergedError
from pocketrec.format.block import Storage
from pocketrec.format.entries import Index
from pocketrec.format.packed import Packed
from pocketrec.schema import Schema


@dataclass(frozen=True)
class Block:
    """Rows ``[start, stop)`` x columns ``[left, right)``; ``counted`` blocks make up ``values``."""

    name: str
    start: int
    stop: int
    left: int
    right: int
    counted: bool = True

    @property
    def width(self) -> int:
        """Columns of the block."""
        return self.right - self.left

    @property
    def values(self) -> int:
        """Scalars in the block."""
        return (self.stop - self.start) * self.width


class Lookup(nn.Module, ABC):
    """Ids ``(...)`` of any integer type -> vectors ``(..., D)``, float32: all that a model in training asks of a table.

    Law: ``forward(ids) == weight()[ids]``.

    Attributes:
        schema: fields and their rows.
        blocks: how the matrix is tiled.
    """

    schema: Schema
    blocks: tuple[Block, ...]

    @property
    def width(self) -> int:
        """Columns ``D`` of all blocks together."""
        return max(b.right for b in self.blocks)

    @abstractmethod
    def forward(self, ids: Tensor) -> Tensor:
        """Look up: ``(...) -> (..., D)``."""

    @abstractmethod
    def weight(self) -> Tensor:
        """The whole matrix ``(n, D)``."""


class Table(Lookup, ABC):
    """A look-up that has a form in a file, and a size.

    Compressed tables obey the *absent law* beside that of :class:`Lookup`: every row that is stored nowhere, and the
    out-of-vocabulary row, reads its field's ``absent`` row, exactly as the file does.

    Attributes:
        forms: Ways to hold the table for inference, by the names that efficiency is reported under. The first is the
            table as it is; the others are made by ``form``.
        computed: Whether vectors are computed when they are read, so that two ways to read them differ by rounding.
    """

    forms: tuple[str, ...] = ("table",)
    computed: ClassVar[bool] = False

    def form(self, name: str) -> Table:
        """The same vectors held in another of the ``forms``, at another cost in time and memory."""
        if name != self.forms[0]:
            raise ConfigError(f"`name` must be {self.forms[0]!r}, the only form of this table, but got {name!r}.")
        return self

    def values(self) -> int:
        """Learned scalars that survive, over counted blocks (what papers call #Para); by default all."""
        return sum(b.values for b in self.blocks if b.counted)

    def finite(self) -> NDArray[np.float32]:
        """The whole matrix ``(n, D)``, known to be finite."""
        weight = self.weight().detach().numpy()
        if not np.isfinite(weight).all():
            raise DivergedError("Every value must be finite, but the table holds NaN or infinity; train again.")
        return weight

    def facts(self) -> Mapping[str, float]:
        """Figures of its own that say how it is made, by name; a study records them. None by default."""
        return {}

    def stored(self) -> Tensor:
        """Rows that a file must be able to find: bool ``(n,)``, never the out-of-vocabulary row; by default all."""
        return ~oov_rows(self.schema)

    @abstractmethod
    def pack(
        self, storage: Storage = "fp32", rows: NDArray[np.int64] | None = None, index: Index = "compact"
    ) -> Packed:
        """The stored form, file row ``i`` holding table row ``rows[i]`` (default: every row, in order).

        ``index`` says how a pruned row is found: ``compact`` takes the fewest bytes, ``direct`` the least time.
        """


def oov_rows(schema: Schema) -> Tensor:
    """Rows that stand for values without an id of their own: bool ``(n,)``."""
    rows = torch.zeros(schema.rows, dtype=torch.bool)
    rows[[f.oov_row for f in schema.fields if f.oov_row is not None]] = True
    return rows


def counted_cells(schema: Schema, blocks: Sequence[Block]) -> Tensor:
    """Columns that are counted, per field: bool ``(F, D)``; a block spans whole fields."""
    cells = torch.zeros(schema.width, max(b.right for b in blocks), dtype=torch.bool)
    for i, field in enumerate(schema.fields):
        for block in blocks:
            if block.start <= field.offset < block.stop:
                cells[i, block.left : block.right] = block.counted
    return cells


def check_matrix(name: str, matrix: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Raise :class:`ConfigError` where a matrix has another shape or type."""
    if matrix.shape != shape or matrix.dtype != dtype:
        raise ConfigError(f"`{name}` must be {dtype} {shape}, but got {matrix.dtype} {tuple(matrix.shape)}.")


class DenseTable(Table):
    """The uncompressed table: one trainable float32 matrix ``(n, D)``; the out-of-vocabulary row is its absent row."""

    forms: tuple[str, ...] = ("dense",)

    def __init__(self, schema: Schema, blocks: tuple[Block, ...], weight: Tensor) -> None:
        super().__init__()
        self.schema, self.blocks = schema, blocks
        check_matrix("weight", weight, (schema.rows, self.width), torch.float32)
        self.matrix = nn.Parameter(weight)

    def forward(self, ids: Tensor) -> Tensor:
        """Look up: ``(...) -> (..., D)``."""
        return self.matrix[ids]

    def weight(self) -> Tensor:
        """The whole matrix ``(n, D)``."""
        return self.matrix

    def pack(
        self, storage: Storage = "fp32", rows: NDArray[np.int64] | None = None, index: Index = "compact"
    ) -> Packed:
        """Layout ``dense``; a field without an out-of-vocabulary row has zeros for absent ids."""
        weight = self.matrix.detach().numpy()
        fill = np.zeros((self.schema.width, self.width), np.float32)
        absent = fill.copy()
        for i, field in enumerate(self.schema.fields):
            if field.oov_row is not None:
                absent[i] = weight[field.oov_row]
        return Packed.encode(weight, None, fill, absent, self.blocks, self.schema.field_of_row, rows, storage)
