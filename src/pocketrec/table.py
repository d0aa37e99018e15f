"""The thing that is compressed: ids -> vectors, as an ordered set of blocks.

A table is a logical matrix of ``n`` rows and ``D`` columns, tiled by blocks (a range of rows x a range of columns).
Click models: block ``embedding`` (all rows, ``d`` columns) and block ``linear`` (all rows, one column: the per-feature
weight; counted in bytes, never in ``values``). Ranking models: one block of rows for users, one for items.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pocketrec.errors import UnsupportedOp
from pocketrec.packed import Packed, Storage
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


class Table(nn.Module, ABC):
    """Ids ``(...)`` of any integer type -> vectors ``(..., D)``, float32.

    Law: ``forward(ids) == weight()[ids]``. Compressed tables also obey the *absent law*: every row that is stored
    nowhere, and the out-of-vocabulary row, reads its field's ``absent`` row, exactly as the file does.
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

    @abstractmethod
    def values(self) -> int:
        """Learned scalars that survive, over counted blocks (what papers call #Para)."""

    @abstractmethod
    def stored(self) -> Tensor:
        """Rows of which at least one scalar is stored: bool ``(n,)``."""

    @abstractmethod
    def pack(self, storage: Storage = "fp32", rows: NDArray[np.int64] | None = None) -> Packed:
        """The stored form, file row ``i`` holding table row ``rows[i]`` (default: every row, in order)."""


class DenseTable(Table):
    """The uncompressed table: one trainable float32 matrix ``(n, D)``; the out-of-vocabulary row is its absent row."""

    def __init__(self, schema: Schema, blocks: tuple[Block, ...], weight: Tensor) -> None:
        super().__init__()
        self.schema = schema
        self.blocks = blocks
        self.matrix = nn.Parameter(weight)

    def forward(self, ids: Tensor) -> Tensor:
        return self.matrix[ids]

    def weight(self) -> Tensor:
        return self.matrix

    def values(self) -> int:
        return sum(b.values for b in self.blocks if b.counted)

    def stored(self) -> Tensor:
        return torch.ones(len(self.matrix), dtype=torch.bool)

    def pack(self, storage: Storage = "fp32", rows: NDArray[np.int64] | None = None) -> Packed:
        raise UnsupportedOp("TODO")  # the files helper writes this


class PrunedTable(Table):
    """A table of which only the entries in ``keep`` survive.

    ``forward(i) = absent[f(i)]`` if row ``i`` is the out-of-vocabulary row or keeps nothing in any block, else
    ``where(keep[i], base[i], fill[f(i)])``. ``base (n, D)`` is shared with the dense table, never copied.
    """

    def __init__(self, schema: Schema, blocks: tuple[Block, ...], base: Tensor, keep: Tensor, fill: Tensor, absent: Tensor) -> None:
        ...
