"""A table of users as sums of items, and of items as shared shapes, both with trellis codes for the rest."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pocketrec.format.block import Storage
from pocketrec.format.entries import Index
from pocketrec.format.layouts import trellis
from pocketrec.format.layouts.trellis import Records, Shape, TrellisBlock
from pocketrec.format.packed import Packed
from pocketrec.format.trellis_codes import CODES, SCALE_BITS, code_values
from pocketrec.models.table import Block, Table
from pocketrec.schema import Schema

_AT_ONCE = 4096
"""Rows that are decoded together."""


def decoded(shape: Shape, records: Records) -> NDArray[np.float32]:
    """The vectors of users and items, ``(U + I, D)``: in every bit what the block of these records reads."""
    scales, width = records.scales, records.centroids.shape[1]
    gain, gain_ratio, item, item_ratio, user, user_ratio, step = scales[:7].tolist()
    shapes = trellis.centroid_values(records.centroids, step)[records.shapes]
    grown = trellis.geometric(item, item_ratio, SCALE_BITS)[records.item_scales]
    for which, rate in enumerate(shape.rates):
        rows = np.flatnonzero(records.classes == which)
        add_codes(shapes, rows, rate, records.item_codes, grown)
    users = np.zeros((shape.users, width), np.float32)
    if (records.classes >= shape.first).any():
        units = trellis.direction(shapes)
        for coefficient, atoms in zip(scales[7:], records.atoms.T, strict=True):
            users += coefficient * units[atoms]
    grown = trellis.geometric(user, user_ratio, SCALE_BITS)[records.user_scales]
    add_codes(users, np.arange(shape.users), shape.rest, records.user_codes, grown)
    return np.concatenate([users, shapes * trellis.geometric(gain, gain_ratio, trellis.GAIN_BITS)[records.gains, None]])


def add_codes(
    vectors: NDArray[np.float32],
    rows: NDArray[np.int64],
    rate: int,
    codes: NDArray[np.uint8],
    scales: NDArray[np.float32],
) -> None:
    """Add to some ``rows`` of ``vectors (m, D)`` what their trellis codes say times their ``scales (m,)``.

    Args:
        vectors: changed in place.
        rows: which of them.
        rate: number of their code, 0 for none.
        codes: of all rows, ``(m, s)``; steps that the code does not have are ignored.
        scales: of all rows.
    """
    if not rate:
        return
    width = vectors.shape[1]
    steps = CODES[rate - 1].steps(width)
    for start in range(0, len(rows), _AT_ONCE):
        part = rows[start : start + _AT_ONCE]
        vectors[part] += code_values(rate, codes[part, :steps], width) * scales[part, None]


class TrellisTable(Table):
    """Users and items as a file of layout ``trellis`` holds them: decoded once, and kept as float32 beside the codes.

    Args:
        schema: Users and items.
        blocks: How the matrix is tiled.
        fill: What absent rows read, float16 ``(2, D)``.
        shape: How the rows are coded.
        records: Their codes.
    """

    computed: ClassVar[bool] = True

    matrix: Tensor

    def __init__(
        self, schema: Schema, blocks: tuple[Block, ...], fill: NDArray[np.float16], shape: Shape, records: Records
    ) -> None:
        super().__init__()
        self.schema, self.blocks, self.fill, self.shape = schema, blocks, fill, shape
        self.records = records
        matrix = fill.astype(np.float32)[schema.field_of_row]
        matrix[self.stored().numpy()] = decoded(shape, records)
        self.register_buffer("matrix", torch.from_numpy(matrix))

    def forward(self, ids: Tensor) -> Tensor:
        """Look up: ``(...) -> (..., D)``."""
        return self.matrix[ids]

    def weight(self) -> Tensor:
        """The whole matrix ``(n, D)``."""
        return self.matrix

    def values(self) -> int:
        """Scalars of rows with a trellis code; of other rows the numbers that they consist of."""
        rates = np.array(self.shape.rates)[self.records.classes]
        items = np.where(rates > 0, self.width, 2).sum()
        users = self.width if self.shape.rest else self.shape.atoms
        return int(items) + self.shape.users * users

    def stored(self) -> Tensor:
        """Every row but out-of-vocabulary rows."""
        stored = np.zeros(self.schema.rows, bool)
        for field, count in zip(self.schema.fields, (self.shape.users, self.shape.items), strict=True):
            stored[field.offset : field.offset + count] = True
        return torch.from_numpy(stored)

    def pack(
        self, storage: Storage = "fp32", rows: NDArray[np.int64] | None = None, index: Index = "compact"
    ) -> Packed:
        """Layout ``trellis``, whatever the storage and the index."""
        table_rows = np.flatnonzero(self.stored().numpy()) if rows is None else rows
        border, first = self.shape.users, self.schema.fields[1].offset
        users, items = table_rows[:border], table_rows[border:] - first
        place = np.empty(self.shape.items, np.int64)
        place[items] = np.arange(len(items))
        own = self.records
        ordered = replace(
            own,
            **{name: getattr(own, name)[items] for name in ("classes", "gains", "shapes", "item_scales", "item_codes")},
            **{name: getattr(own, name)[users] for name in ("user_scales", "user_codes")},
            atoms=place[own.atoms[users]],
        )
        names = "+".join(b.name for b in self.blocks)
        block = TrellisBlock(
            names, 0, len(table_rows), 0, self.width, "trellis", self.shape, arrays=trellis.encode(self.shape, ordered)
        )
        return Packed(len(table_rows), (block,), self.fill, self.fill)
