"""PTQ: the trained table in fewer bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pocketrec.compression.budget import values_below
from pocketrec.compression.ladder import Ladder, Method, Model, Room, Run
from pocketrec.data.dataset import Dataset
from pocketrec.errors import ConfigError
from pocketrec.families.sharing import ScaleSharing
from pocketrec.format.block import Storage, file_range, side_size_for
from pocketrec.format.entries import Index
from pocketrec.format.layouts.quantised import BITS, QuantisedBlock, code_bytes, pack_codes
from pocketrec.format.packed import Packed
from pocketrec.models.table import Block, Table, oov_rows
from pocketrec.schema import Schema

ZeroCode = Literal["exact", "rounded"]


@dataclass(frozen=True)
class PTQ(Method):
    """Round every entry of the trained table to a code of a few bits; no value is removed, nothing is trained.

    A baseline for budgets in bytes: the number of values stays, so every sparsity above zero is refused. Codes lie
    evenly between the least and the largest value; linear weights have 8 bits. ``storage`` has no say.

    Args:
        bits: 2 to 8 of each code, or 0 for as many as the budget allows; 8 and 4 are the usual ones.
        scale: values that share their least and largest: each ``column`` of each field, or the whole ``block``, as
            published runs do.
        zero: ``exact`` starts the grid at the least value; ``rounded`` moves it, by at most half a step, so that zero
            lies on it, as published code does: the ends of the range may then be cut off.

    Example:
        >>> PTQ(bits=4).scale
        'column'

    Reference:
        Uniform affine quantisation after training, as in Jacob et al., "Quantization and training of neural networks
        for efficient integer-arithmetic-only inference", 2018, equation 1.
    """

    name: ClassVar[str] = "ptq"

    bits: int = 0
    scale: ScaleSharing = "column"
    zero: ZeroCode = "exact"

    def check(self) -> None:
        """Bits are few."""
        if self.bits not in (0, *BITS):
            raise ConfigError(f"`bits` must be 0 or lie in [{BITS[0]}, {BITS[-1]}], but got bits={self.bits}.")

    def prepare(self, model: Model, data: Dataset, run: Run) -> PTQLadder:
        """Nothing is computed before the budget is known."""
        return PTQLadder(model.table, (self.bits,) if self.bits else tuple(BITS), self.scale, self.zero)


@dataclass(frozen=True)
class PTQLadder(Ladder):
    """One table for each number of bits.

    Args:
        dense: The dense table.
        bits: Numbers of bits to choose from, rising.
        scale: See :class:`PTQ`.
        zero: See there.
    """

    dense: Table
    bits: tuple[int, ...]
    scale: ScaleSharing
    zero: ZeroCode = "exact"

    def table(self, room: Room) -> QuantisedTable:
        """The table with the most bits that fits; it keeps all values.

        Raises:
            BudgetError: Values would have to go, or not even the one with the fewest bits fits.
        """
        bits = self._bits_within(room) if room.values is None else self._all_values(room.values)
        return QuantisedTable(self.dense.schema, self.dense.blocks, self._weight, bits, self.scale, self.zero)

    def _all_values(self, values: int) -> int:
        """The most bits, if no value has to go."""
        if values < (least := self.dense.values()):
            raise values_below(values, least, "that quantisation always keeps", "give a budget in bytes.")
        return self.bits[-1]

    def _bits_within(self, room: Room) -> int:
        """The most bits whose table fits into a room of bytes."""
        fitting = [bits for bits in self.bits if self._size(bits, room) <= room.most]
        if not fitting:
            least = self._size(self.bits[0], room)
            advice = "raise the budget" + ("." if self.bits[0] == BITS[0] else ", or allow fewer bits.")
            raise room.below(least, f"of the table in {self.bits[0]} bits", advice)
        return fitting[-1]

    def _size(self, bits: int, room: Room) -> int:
        """Bytes of the packed table, and of its keys where they share the room."""
        schema = self.dense.schema
        named = ~oov_rows(schema).numpy()
        size = side_size_for(schema.width, self.dense.width, sum(f.oov_row is not None for f in schema.fields))
        for block in self.dense.blocks:
            rows = int(np.count_nonzero(named[block.start : block.stop]))
            size += rows * code_bytes(block.width, _block_bits(block, bits)) + 8 * schema.width * block.width
        return size + room.key_bytes(schema, [f.size - f.oov for f in schema.fields])

    @cached_property
    def _weight(self) -> NDArray[np.float32]:
        """The dense matrix, known to be finite."""
        return self.dense.finite()


def _block_bits(block: Block, bits: int) -> int:
    """Bits of a block's codes: a byte is the least for one column anyway."""
    return bits if block.counted else BITS[-1]


class QuantisedTable(Table):
    """``e_ic = low[f, c] + code_ic * step[f, c]``; out-of-vocabulary rows are the absent rows of their fields.

    Args:
        schema: Fields and their rows.
        blocks: How the matrix is tiled.
        weight: The matrix to round, ``(n, D)``.
        bits: Of each code of a counted block.
        scale: Whose least and largest value set the grid: a ``column`` of a field, or the whole ``block``.
        zero: Whether the grid starts at the least value (``exact``) or is moved so that zero lies on it (``rounded``).
    """

    codes: Tensor
    low: Tensor
    step: Tensor
    fields: Tensor

    def __init__(
        self,
        schema: Schema,
        blocks: tuple[Block, ...],
        weight: NDArray[np.float32],
        bits: int,
        scale: ScaleSharing,
        zero: ZeroCode = "exact",
    ) -> None:
        super().__init__()
        self.schema, self.blocks, self.bits = schema, blocks, bits
        codes = np.zeros(weight.shape, np.uint8)
        low, step = (np.zeros((schema.width, weight.shape[1]), np.float32) for _ in range(2))
        for block in blocks:
            columns = slice(block.left, block.right)
            top = 2 ** _block_bits(block, bits) - 1
            for fields, rows in _groups(schema, block, scale):
                part = weight[rows, columns]
                axis = 0 if scale == "column" else None
                least, largest = part.min(axis=axis), part.max(axis=axis)
                width = ((largest - least) / np.float32(top)).astype(np.float32)
                unit = np.where(width > 0, width, np.float32(1))
                if zero == "rounded":
                    least = np.where(width > 0, np.rint(least / unit) * unit, least)
                low[fields, columns], step[fields, columns] = least, width
                codes[rows, columns] = np.clip(np.rint((part - least) / unit), 0, top)
        for name, array in (("codes", codes), ("low", low), ("step", step)):
            self.register_buffer(name, torch.from_numpy(array))
        self.register_buffer("fields", torch.from_numpy(schema.field_of_row.astype(np.int64)), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Look up: ``(...) -> (..., D)``."""
        fields = self.fields[ids]
        return self.codes[ids].float() * self.step[fields] + self.low[fields]

    def weight(self) -> Tensor:
        """The whole matrix ``(n, D)``."""
        return self(torch.arange(self.schema.rows, device=self.codes.device))

    def pack(
        self, storage: Storage = "fp32", rows: NDArray[np.int64] | None = None, index: Index = "compact"
    ) -> Packed:
        """Layout ``quantised``, whatever the storage and the index."""
        fill = np.zeros((self.schema.width, self.width), np.float32)
        absent = fill.copy()
        for i, field in enumerate(self.schema.fields):
            if field.oov_row is not None:
                absent[i] = self(torch.tensor([field.oov_row]))[0].numpy()
        table_rows = np.arange(self.schema.rows) if rows is None else rows
        blocks = tuple(self._pack_block(block, rows, table_rows) for block in self.blocks)
        return Packed(len(table_rows), blocks, fill, absent)

    def _pack_block(
        self, block: Block, rows: NDArray[np.int64] | None, table_rows: NDArray[np.int64]
    ) -> QuantisedBlock:
        start, stop = file_range(block, rows)
        columns, bits = slice(block.left, block.right), _block_bits(block, self.bits)
        codes = self.codes.numpy()[table_rows[start:stop], columns]
        arrays = {
            "codes": pack_codes(codes, bits),
            "low": np.ascontiguousarray(self.low.numpy()[:, columns]),
            "step": np.ascontiguousarray(self.step.numpy()[:, columns]),
        }
        return QuantisedBlock(block.name, start, stop, block.left, block.right, "quantised", bits, arrays=arrays)


def _groups(schema: Schema, block: Block, scale: ScaleSharing) -> Sequence[tuple[slice, slice]]:
    """The fields and the rows that share their least and largest value, in a column or altogether."""
    if scale == "block":
        return [(slice(0, schema.width), slice(block.start, block.stop))]
    ranges = [(i, max(f.offset, block.start), min(f.stop, block.stop)) for i, f in enumerate(schema.fields)]
    return [(slice(i, i + 1), slice(start, stop)) for i, start, stop in ranges if start < stop]
