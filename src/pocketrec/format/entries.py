"""Blocks of entries: each row stores its own values, in one of three layouts.

``dense``
    Every row of the block is stored: ``values (rows, width)``.
``bitmap``
    Only kept entries are stored. ``presence`` has one bit per row, ``rank`` the number of present rows before every
    1,024th row; both are left out where every row is present. Each present row has a column mask of
    ``ceil(width / 8)`` bytes in ``masks``, left out where every present row is whole. ``offsets`` is the number of
    values before every ``stride``-th present row, and ``values`` holds the kept entries, row by row.
``direct``
    The same values behind a faster index. ``records`` has ``4 + ceil(width / 8)`` bytes for every row: the number of
    values before it as uint32, then its column mask, empty where the row is not present; left out where every row is
    whole.

Values are stored as ``fp32``, ``fp16`` or ``int8``; an int8 code ``q`` of field ``f`` and column ``c`` means
``q * scale[f, c]``. Bits are numbered from the least significant.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from pocketrec.errors import ArtifactError, ConfigError, DivergedError
from pocketrec.format.block import DTYPES, BlockRange, FileBlock, Storage, file_range
from pocketrec.native.library import LONG, NUMBERS, POINTER, pointer, structure
from pocketrec.native.lookup import ASKED, Table

Layout = Literal["dense", "bitmap", "direct"]
Index = Literal["compact", "direct"]

RANK_ROWS = 1024
STRIDES = (64, 128, 256)
OFFSET_BYTES = 4
_CHUNK_ROWS = 1 << 16


def mask_bytes(width: int) -> int:
    """Bytes of one row's column mask."""
    return -(-width // 8)


def stride_for(present: int, width: int, kept: int, storage: Storage) -> int:
    """Present rows between two offsets: the least stride whose offsets take at most 1/256 of masks and values."""
    payload = present * mask_bytes(width) + kept * np.dtype(DTYPES[storage]).itemsize
    for stride in STRIDES:
        if 4 * -(-present // stride) * 256 <= payload:
            return stride
    return STRIDES[-1]


def size_for(
    rows: int, present: int, kept: int, width: int, fields: int, storage: Storage, index: Index = "compact"
) -> int:
    """Bytes of a pruned block, exactly, from its counts alone.

    Args:
        rows: File rows in the block's range.
        present: Rows that keep at least one entry of the block.
        kept: Entries kept.
        width: Columns of the block.
        fields: Fields of the table (int8 has a scale per field and column).
        storage: How values are stored.
        index: ``compact`` for the layout ``bitmap``, or ``direct``.

    Example:
        >>> size_for(rows=4096, present=1000, kept=3000, width=16, fields=2, storage="fp16")
        8544
    """
    size = kept * np.dtype(DTYPES[storage]).itemsize
    if storage == "int8":
        size += 4 * fields * width
    if index == "direct":
        return size + (rows * (OFFSET_BYTES + mask_bytes(width)) if kept < rows * width else 0)
    if present < rows:
        size += -(-rows // 8) + 4 * -(-rows // RANK_ROWS)
    if kept < present * width:
        size += present * mask_bytes(width) + 4 * -(-present // stride_for(present, width, kept, storage))
    return size


@structure("Block")
class BlockView(ctypes.Structure):
    """One block as the library sees it; null where the layout leaves an array out."""

    _fields_ = (
        ("start", LONG), ("stop", LONG), ("present", LONG), ("values_count", LONG),
        ("left", ctypes.c_int32), ("width", ctypes.c_int32), ("number", ctypes.c_int32), ("shift", ctypes.c_int32),
        ("presence", POINTER), ("rank", POINTER), ("masks", POINTER), ("offsets", POINTER),
        ("values", POINTER), ("scale", POINTER),
    )  # fmt: skip


@structure("Lookup")
class PackedTable(ctypes.Structure):
    """A table of blocks."""

    _fields_ = (
        ("blocks", POINTER), ("block_count", LONG), ("fill", POINTER), ("absent", POINTER), ("field_count", LONG),
        ("width", LONG), *ASKED,
    )  # fmt: skip


@dataclass(frozen=True)
class PackedBlock(FileBlock):
    """One block as it lies in the file; rows are file rows, columns are the table's.

    ``arrays`` holds ``values`` and, where the layout needs them, ``presence``, ``rank``, ``masks``, ``offsets``,
    ``records``, ``scale`` (see the module's text).
    """

    layout: Layout
    storage: Storage
    stride: int

    @cached_property
    def present_rows(self) -> int:
        """Rows that have a position: those that keep an entry, or all of them where there is no ``presence``."""
        if "presence" not in self.arrays:
            return self.rows
        if "masks" in self.arrays:
            return self.arrays["masks"].size // mask_bytes(self.width)
        return self.arrays["values"].size // self.width

    def check(self, fields: int) -> None:
        """Raise :class:`ArtifactError` unless every array has the type and the shape that the layout asks for."""
        if self.layout not in get_args(Layout) or self.storage not in get_args(Storage):
            raise ArtifactError(
                f"Block {self.name!r} must have a layout of {get_args(Layout)} and a storage of {get_args(Storage)}, "
                f"but has {self.layout!r} and {self.storage!r}; update PocketRec."
            )
        if self.rows < 0 or self.width < 1 or self.left < 0 or self.stride not in STRIDES:
            raise ArtifactError(f"Block {self.name!r} has an impossible shape: {self.to_json()}.")
        for name, (dtype, shape) in self._expected(fields).items():
            self.check_array(name, dtype, shape)

    def _expected(self, fields: int) -> dict[str, tuple[type[np.generic], tuple[int, ...]]]:
        count = self.arrays["values"].size if "values" in self.arrays else 0
        expected: dict[str, tuple[type[np.generic], tuple[int, ...]]] = {}
        if self.layout == "dense":
            expected["values"] = (DTYPES[self.storage], (self.rows * self.width,))
        elif self.layout == "direct":
            expected["values"] = (DTYPES[self.storage], (count,))
            if "records" in self.arrays or count != self.rows * self.width:
                expected["records"] = (np.uint8, (self.rows * (OFFSET_BYTES + mask_bytes(self.width)),))
        else:
            whole = "masks" not in self.arrays
            values = self.present_rows * self.width if whole else count
            expected["values"] = (DTYPES[self.storage], (values,))
            if "presence" in self.arrays:
                expected["presence"] = (np.uint8, (-(-self.rows // 8),))
                expected["rank"] = (np.uint32, (-(-self.rows // RANK_ROWS),))
            if not whole:
                expected["masks"] = (np.uint8, (self.present_rows * mask_bytes(self.width),))
                expected["offsets"] = (np.uint32, (-(-self.present_rows // self.stride),))
        if self.storage == "int8":
            expected["scale"] = (np.float32, (fields, self.width))
        return expected

    @cached_property
    def _byte_ranks(self) -> NDArray[np.int64]:
        """Present rows before each byte of ``presence``."""
        counts = np.bitwise_count(self.arrays["presence"]).astype(np.int64)
        return np.concatenate([[0], np.cumsum(counts)])

    @cached_property
    def _row_offsets(self) -> NDArray[np.int64]:
        """Values before each present row, and all values at the end."""
        counts = np.bitwise_count(self.arrays["masks"]).reshape(-1, mask_bytes(self.width)).sum(axis=1, dtype=np.int64)
        return np.concatenate([[0], np.cumsum(counts)])

    def _records(self, positions: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        """Values before each of ``positions (m,)``, and their masks ``(m, ceil(width / 8))``."""
        records = self.arrays["records"].reshape(-1, OFFSET_BYTES + mask_bytes(self.width))[positions]
        first = np.ascontiguousarray(records[:, :OFFSET_BYTES]).view("<u4")[:, 0]
        return first.astype(np.int64), records[:, OFFSET_BYTES:]

    def positions(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """File rows ``(m,)`` -> index among the block's present rows, or -1."""
        local = rows - self.start
        inside = (local >= 0) & (local < self.rows)
        if "records" in self.arrays:
            inside[inside] = self._records(local[inside])[1].any(axis=1)
        if "presence" not in self.arrays:
            return np.where(inside, local, -1)
        local = np.where(inside, local, 0)
        byte, bit = local >> 3, (local & 7).astype(np.uint8)
        word = self.arrays["presence"][byte] if self.rows else np.zeros_like(bit)
        below = np.bitwise_count(word & ((np.uint8(1) << bit) - np.uint8(1)))
        present = inside & ((word >> bit) & 1).astype(bool)
        return np.where(present, self._byte_ranks[byte] + below, -1)

    def read(self, positions: NDArray[np.int64], fields: NDArray[np.int32], out: NDArray[np.float32]) -> None:
        """Write the kept entries of present rows ``positions (m,)`` over ``out (m, width)``.

        A row whose record points outside the values (a damaged file) keeps nothing, as in the compiled kernel.
        """
        if "records" in self.arrays:
            first, masks = self._records(positions)
        elif "masks" in self.arrays:
            first = self._row_offsets[positions]
            masks = self.arrays["masks"].reshape(-1, mask_bytes(self.width))[positions]
        else:
            first = positions * self.width
            masks = np.full((len(positions), mask_bytes(self.width)), 255, np.uint8)
        kept = np.unpackbits(masks, axis=1, count=self.width, bitorder="little").astype(bool)
        kept &= (first + kept.sum(axis=1) <= self.arrays["values"].size)[:, None]
        row, column = np.nonzero(kept)
        index = first[row] + (np.cumsum(kept, axis=1)[row, column] - 1)
        values = self.arrays["values"][index].astype(np.float32)
        if self.storage == "int8":
            values *= self.arrays["scale"][fields[row], column]
        out[row, column] = values

    @classmethod
    def view(
        cls, blocks: Sequence[PackedBlock], fill: NDArray[np.float32], absent: NDArray[np.float32]
    ) -> Table | None:
        """The blocks side by side or one above the other, as the compiled kernel reads them."""
        views = (BlockView * len(blocks))(*(_block_view(block) for block in blocks))
        table = PackedTable(ctypes.addressof(views), len(blocks), pointer(fill), pointer(absent), *fill.shape)
        return Table("pocketrec_lookup", table, len(fill), (blocks, views, fill, absent))


def _block_view(block: PackedBlock) -> BlockView:
    """One block for the library; its arrays must live as long, and have been checked."""
    arrays = block.arrays
    values = arrays["values"]
    masks = "records" if "records" in arrays else "masks"
    names = ("presence", "rank", masks, "offsets", "values", "scale")
    return BlockView(
        block.start, block.stop, block.present_rows, values.size, block.left, block.width, NUMBERS[values.dtype],
        block.stride.bit_length() - 1, *(pointer(arrays.get(name)) for name in names),
    )  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A table to be packed: what :meth:`pocketrec.format.packed.Packed.encode` was given."""

    weight: NDArray[np.float32]
    keep: NDArray[np.bool_] | None
    fields: NDArray[np.int32]
    present: NDArray[np.bool_] | None
    rows: NDArray[np.int64] | None
    field_count: int
    storage: Storage
    index: Index

    def kept(self, chunk: slice | NDArray[np.int64], columns: slice) -> NDArray[np.bool_]:
        """Entries to store among ``chunk`` of table rows and ``columns``."""
        if self.keep is None:
            return np.ones(self.weight[chunk, columns].shape, dtype=bool)
        kept = self.keep[chunk, columns]
        return kept if self.present is None else kept & self.present[chunk, None]


@dataclass
class _Kept:
    """The kept entries of a block, gathered chunk by chunk; ``cells`` are ``field * width + column``."""

    present: list[NDArray[np.bool_]] = field(default_factory=list)
    masks: list[NDArray[np.uint8]] = field(default_factory=list)
    values: list[NDArray[np.float32]] = field(default_factory=list)
    cells: list[NDArray[np.int32]] = field(default_factory=list)


def encode_block(table: Source, block: BlockRange) -> PackedBlock:
    """Pack one block of a table; nothing of the table's size is copied."""
    start, stop = file_range(block, table.rows)
    width = block.right - block.left
    columns = slice(block.left, block.right)
    found = _Kept()
    for begin in range(start, stop, _CHUNK_ROWS):
        end = min(begin + _CHUNK_ROWS, stop)
        chunk = slice(begin, end) if table.rows is None else table.rows[begin:end]
        kept = table.kept(chunk, columns)
        masks = np.packbits(kept, axis=1, bitorder="little")
        present = np.asarray(masks.any(axis=1) if masks.shape[1] > 1 else masks[:, 0] > 0)
        stored = np.flatnonzero(present)
        row, column = np.nonzero(kept[stored])
        row = stored[row]
        found.present.append(present)
        found.masks.append(masks[present])
        found.values.append(table.weight[chunk, columns][row, column])
        found.cells.append(table.fields[chunk][row] * np.int32(width) + column.astype(np.int32))
    values, arrays = _encode_values(found, table.field_count, width, table.storage)
    arrays["values"] = values
    stride = STRIDES[0]
    layout: Layout = "dense"
    if table.keep is not None and table.index == "direct":
        layout = "direct"
        _encode_records(found, arrays, stop - start, width)
    elif table.keep is not None:
        layout = "bitmap"
        stride = _encode_index(found, arrays, stop - start, width, table.storage)
    return PackedBlock(block.name, start, stop, block.left, block.right, layout, table.storage, stride, arrays=arrays)


def _encode_values(
    found: _Kept, fields: int, width: int, storage: Storage
) -> tuple[NDArray[Any], dict[str, NDArray[Any]]]:
    """Stored values, and the scales where the storage has them."""
    values = np.concatenate([*found.values, np.empty(0, np.float32)])
    if not np.isfinite(values).all():
        raise DivergedError("Every stored value must be finite, but the table holds NaN or infinity; train again.")
    if storage == "fp32":
        return values, {}
    largest = np.zeros(fields * width, np.float32)
    cells = np.concatenate([*found.cells, np.empty(0, np.int32)])
    np.maximum.at(largest, cells, np.abs(values))
    if storage == "fp16":
        if values.size and largest.max() > np.finfo(np.float16).max:
            raise ConfigError(f"fp16 holds values up to 65,504, but the table has {largest.max():g}; use fp32 or int8.")
        return values.astype(np.float16), {}
    scale = largest / np.float32(127)
    codes = np.rint(values / np.where(scale > 0, scale, np.float32(1))[cells]).astype(np.int8)
    return codes, {"scale": scale.reshape(fields, width)}


def _encode_index(found: _Kept, arrays: dict[str, NDArray[Any]], rows: int, width: int, storage: Storage) -> int:
    """Add presence, rank, masks and offsets to ``arrays`` as far as they are needed; the stride of the offsets."""
    present = np.concatenate([*found.present, np.empty(0, bool)])
    masks = np.concatenate([*found.masks, np.empty((0, mask_bytes(width)), np.uint8)])
    kept, count = arrays["values"].size, len(masks)
    if count < rows:
        arrays["presence"] = np.packbits(present, bitorder="little")
        arrays["rank"] = _directory(present, RANK_ROWS)
    stride = stride_for(count, width, kept, storage)
    if kept < count * width:
        arrays["masks"] = masks.reshape(-1)
        arrays["offsets"] = _directory(np.bitwise_count(masks).sum(axis=1), stride)
    return stride


def _encode_records(found: _Kept, arrays: dict[str, NDArray[Any]], rows: int, width: int) -> None:
    """Add ``records`` to ``arrays`` unless every row is whole."""
    if arrays["values"].size == rows * width:
        return
    present = np.concatenate([*found.present, np.empty(0, bool)])
    records = np.zeros((rows, OFFSET_BYTES + mask_bytes(width)), np.uint8)
    records[present, OFFSET_BYTES:] = np.concatenate([*found.masks, np.empty((0, mask_bytes(width)), np.uint8)])
    counts = np.bitwise_count(records[:, OFFSET_BYTES:]).sum(axis=1)
    records[:, :OFFSET_BYTES] = _directory(counts, 1).astype("<u4").view(np.uint8).reshape(rows, OFFSET_BYTES)
    arrays["records"] = records.reshape(-1)


def _directory(counts: NDArray[Any], stride: int) -> NDArray[np.uint32]:
    """Sum of ``counts`` before every ``stride``-th element."""
    sums = np.add.reduceat(counts, np.arange(0, len(counts), stride), dtype=np.int64) if len(counts) else counts
    return (np.cumsum(sums) - sums).astype(np.uint32)
