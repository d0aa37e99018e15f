"""Packed table layouts: how a table lies in a file, and how one row is read without unpacking the rest.

A packed table has ``rows`` file rows and ``D`` columns, tiled by blocks (rows ``[start, stop)`` x columns
``[left, right)``). A block stores its entries in one of three layouts, or it stores what its vectors are computed from,
in one of the layouts of :mod:`pocketrec.layouts`.

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
``q * scale[f, c]``. Bits are numbered from the least significant. Torch-free.

The absent law: a file row of -1, or one that is stored in no block, reads its field's ``absent`` row; a row that is
stored in some block reads ``fill`` wherever it keeps nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from pocketrec import kernel
from pocketrec.errors import ArtifactError, ConfigError, DivergedError

Storage = Literal["fp32", "fp16", "int8"]
Layout = Literal["dense", "bitmap", "direct"]
Index = Literal["compact", "direct"]

DTYPES: Mapping[str, type[np.generic]] = {"fp32": np.float32, "fp16": np.float16, "int8": np.int8}
COMPOSED: Mapping[str, str] = {
    "hash_mlp": "HashMlpBlock",
    "product": "ProductBlock",
    "pruned_sum": "PrunedSumBlock",
    "quantised": "QuantisedBlock",
    "tensor_train": "TensorTrainBlock",
    "transform": "TransformBlock",
    "trellis": "TrellisBlock",
}
"""Layouts of computed vectors, one per module of :mod:`pocketrec.layouts`, and the class that reads them."""
RANK_ROWS = 1024
STRIDES = (64, 128, 256)
OFFSET_BYTES = 4
_CHUNK_ROWS = 1 << 16


class BlockRange(Protocol):
    """What packing reads of a block: its name, its rows and its columns."""

    @property
    def name(self) -> str:
        """Name, unique in the table."""
        ...

    @property
    def start(self) -> int:
        """First row."""
        ...

    @property
    def stop(self) -> int:
        """One past the last row."""
        ...

    @property
    def left(self) -> int:
        """First column."""
        ...

    @property
    def right(self) -> int:
        """One past the last column."""
        ...


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


def side_size_for(fields: int, width: int, absent_fields: int) -> int:
    """Bytes of what blocks share: fill rows, and absent rows of the ``absent_fields`` fields that have their own."""
    return 4 * fields * width + (4 + 4 * width) * absent_fields


class FileBlock(ABC):
    """One block of a packed table, whatever its layout: rows are file rows, columns are the table's."""

    name: str
    start: int
    stop: int
    left: int
    right: int
    arrays: Mapping[str, NDArray[Any]]

    @property
    def rows(self) -> int:
        """File rows in the block's range."""
        return self.stop - self.start

    @property
    def width(self) -> int:
        """Columns of the block."""
        return self.right - self.left

    @property
    def size_bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(a.nbytes for a in self.arrays.values())

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Everything but the arrays."""

    @abstractmethod
    def check(self, fields: int) -> None:
        """Raise :class:`ArtifactError` unless every array has the type and the shape that the layout asks for."""

    @abstractmethod
    def positions(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """File rows ``(m,)`` -> where the block stores them, or -1."""

    @abstractmethod
    def read(self, positions: NDArray[np.int64], fields: NDArray[np.int32], out: NDArray[np.float32]) -> None:
        """Write the stored entries at ``positions (m,)`` over ``out (m, width)``, which holds the fill."""

    def parts(self) -> Sequence[kernel.Part]:
        """The block for the compiled kernel, field by field, where it is of layout ``transform``."""
        return ()

    def alone(self, fill: NDArray[np.float32], absent: NDArray[np.float32]) -> kernel.TrellisView | None:
        """A whole table of this block for the compiled kernel, where it is of layout ``trellis``."""
        return None


@dataclass(frozen=True)
class PackedBlock(FileBlock):
    """One block as it lies in the file; rows are file rows, columns are the table's.

    ``arrays`` holds ``values`` and, where the layout needs them, ``presence``, ``rank``, ``masks``, ``offsets``,
    ``records``, ``scale`` (see the module's text).
    """

    name: str
    start: int
    stop: int
    left: int
    right: int
    layout: Layout
    storage: Storage
    stride: int
    arrays: Mapping[str, NDArray[Any]] = field(repr=False)

    @cached_property
    def present_rows(self) -> int:
        """Rows that have a position: those that keep an entry, or all of them where there is no ``presence``."""
        if "presence" not in self.arrays:
            return self.rows
        if "masks" in self.arrays:
            return self.arrays["masks"].size // mask_bytes(self.width)
        return self.arrays["values"].size // self.width

    def to_json(self) -> dict[str, Any]:
        """Everything but the arrays."""
        return {
            "name": self.name, "start": self.start, "stop": self.stop, "left": self.left, "right": self.right,
            "layout": self.layout, "storage": self.storage, "stride": self.stride, "arrays": sorted(self.arrays),
        }  # fmt: skip

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
            found = self.arrays.get(name)
            if found is None or found.dtype != dtype or found.shape != shape:
                got = "nothing" if found is None else f"{found.dtype} {found.shape}"
                raise ArtifactError(f"Array '{self.name}.{name}' must be {np.dtype(dtype)} {shape}, but got {got}.")

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


@dataclass(frozen=True)
class Packed:
    """A whole table as it lies in the file.

    ``lookup`` is all that scoring needs; ``arrays`` and ``meta`` go into the file and ``from_arrays`` reads them back.
    ``fill`` and ``absent`` are float32, or both float16, of shape ``(F, D)``.

    Example:
        >>> import numpy as np
        >>> weight = np.array([[1, 2], [3, 4], [5, 6]], np.float32)
        >>> keep = np.array([[1, 0], [0, 0], [1, 1]], bool)
        >>> whole = PackedRange("embedding", 0, 3, 0, 2)
        >>> zeros = np.zeros((1, 2), np.float32)
        >>> packed = Packed.encode(weight, keep, zeros, zeros + 9, (whole,), np.zeros(3, np.int32))
        >>> packed.lookup(np.array([[0], [1], [2], [-1]]), np.array([0], np.int32))[:, 0].tolist()
        [[1.0, 0.0], [9.0, 9.0], [5.0, 6.0], [9.0, 9.0]]
    """

    rows: int
    blocks: tuple[FileBlock, ...]
    fill: NDArray[np.floating] = field(repr=False)
    absent: NDArray[np.floating] = field(repr=False)

    @property
    def width(self) -> int:
        """Columns ``D``."""
        return self.fill.shape[1]

    @property
    def size_bytes(self) -> int:
        """Bytes of all arrays: what a look-up needs, and nothing else."""
        return sum(a.nbytes for a in self.arrays().values())

    @classmethod
    def encode(
        cls,
        weight: NDArray[np.float32],
        keep: NDArray[np.bool_] | None,
        fill: NDArray[np.float32],
        absent: NDArray[np.float32],
        blocks: Sequence[BlockRange],
        fields: NDArray[np.int32],
        rows: NDArray[np.int64] | None = None,
        storage: Storage = "fp32",
        present: NDArray[np.bool_] | None = None,
        index: Index = "compact",
    ) -> Packed:
        """Pack the table rows ``rows`` (default: all, in order); nothing of the table's size is copied.

        Args:
            weight: The matrix, ``(n, D)``.
            keep: Entries to store, ``(n, D)``; ``None`` stores all of them in the ``dense`` layout.
            fill: What a stored row reads where it keeps nothing, ``(F, D)``.
            absent: What a row that is stored nowhere reads, ``(F, D)``.
            blocks: How the matrix is tiled; in table rows.
            fields: Field of each table row, ``(n,)``.
            rows: Table row of each file row; the rows of one block must come together, blocks in order.
            storage: How values are stored.
            present: Table rows that may be stored at all, ``(n,)`` (default: all).
            index: How a pruned row is found: ``compact`` (layout ``bitmap``) or ``direct``.

        Raises:
            ConfigError: An unknown storage or index, rows out of order, or values too large for fp16.
            DivergedError: A stored value is not finite.
        """
        if storage not in get_args(Storage):
            raise ConfigError(f"`storage` must be one of {', '.join(get_args(Storage))}, but got {storage!r}.")
        if index not in get_args(Index):
            raise ConfigError(f"`index` must be one of {', '.join(get_args(Index))}, but got {index!r}.")
        count = len(weight) if rows is None else len(rows)
        table = _Source(weight, keep, fields, present, rows, len(fill), storage, index)
        packed = tuple(_encode_block(table, b) for b in blocks)
        return cls(count, packed, np.array(fill, np.float32), np.array(absent, np.float32))

    def lookup(
        self,
        rows: NDArray[np.integer],
        fields: NDArray[np.integer],
        *,
        out: NDArray[np.float32] | None = None,
        threads: int = 1,
    ) -> NDArray[np.float32]:
        """Read vectors, by the compiled kernel where there is one.

        Args:
            rows: File rows ``(B, C)``; -1, or anything out of range, is absent.
            fields: Field of each column, ``(C,)``, in ``[0, F)``.
            out: Where to write, float32 ``(B, C, D)``, contiguous; default a new array.
            threads: Threads for the compiled kernel.

        Returns:
            Float32 ``(B, C, D)``.

        Raises:
            ConfigError: A field out of range, or shapes that do not fit.
        """
        rows = np.ascontiguousarray(rows, dtype=np.int64)
        fields = np.ascontiguousarray(fields, dtype=np.int32)
        if rows.ndim != 2 or fields.shape != rows.shape[1:]:
            raise ConfigError(f"`rows` must be (B, C) and `fields` (C,), but got {rows.shape} and {fields.shape}.")
        shape = (*rows.shape, self.width)
        if out is None:
            out = np.empty(shape, np.float32)
        elif out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous:
            raise ConfigError(f"`out` must be contiguous float32 {shape}, but got {out.dtype} {out.shape}.")
        if kernel.available() and self._view is not None:
            kernel.lookup(self._view, rows, fields, out, threads)
        else:
            out[...] = self.lookup_numpy(rows, fields)
        return out

    @cached_property
    def _view(self) -> kernel.View | None:
        """The table as the compiled kernel sees it, or ``None`` where it has a block that the kernel cannot read."""
        fill, absent = (np.ascontiguousarray(a, np.float32) for a in (self.fill, self.absent))
        entries = [b for b in self.blocks if isinstance(b, PackedBlock)]
        if entries and len(entries) == len(self.blocks):
            views = [
                kernel.block_view(b.start, b.stop, b.left, b.width, b.present_rows, b.stride, b.arrays) for b in entries
            ]
            return kernel.PackedView((kernel.BlockView * len(views))(*views), fill, absent)
        if len(self.blocks) == 1 and self.blocks[0].width == self.width:
            alone = self.blocks[0].alone(fill, absent)
            if alone is not None:
                return alone
        coded = [b.parts() for b in self.blocks if b.width == self.width]
        if not coded or len(coded) < len(self.blocks) or not all(coded):
            return None
        return kernel.TransformView([part for parts in coded for part in parts], fill, absent)

    def lookup_numpy(self, rows: NDArray[np.integer], fields: NDArray[np.integer]) -> NDArray[np.float32]:
        """What ``lookup`` computes, in numpy alone: the reference for the compiled kernel."""
        flat = np.asarray(rows, dtype=np.int64).reshape(-1)
        field_of = np.broadcast_to(np.asarray(fields, dtype=np.int32), np.shape(rows)).reshape(-1)
        if field_of.size and not 0 <= field_of.min() <= field_of.max() < len(self.fill):
            raise ConfigError(f"`fields` must lie in [0, {len(self.fill)}), but got {np.unique(field_of).tolist()}.")
        out = self.fill[field_of].astype(np.float32, copy=False)
        stored = np.zeros(len(flat), dtype=bool)
        for block in self.blocks:
            positions = block.positions(flat)
            hit = np.flatnonzero(positions >= 0)
            part = out[hit, block.left : block.right]
            block.read(positions[hit], field_of[hit], part)
            out[hit, block.left : block.right] = part
            stored[hit] = True
        out[~stored] = self.absent[field_of[~stored]]
        return out.reshape(*np.shape(rows), self.width)

    def meta(self) -> dict[str, Any]:
        """The part that is not arrays, ready for JSON."""
        return {"rows": self.rows, "blocks": [b.to_json() for b in self.blocks]}

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All arrays by their name in the file; absent rows are written only where they differ from ``fill``."""
        own = np.flatnonzero((self.absent != self.fill).any(axis=1))
        shared: dict[str, NDArray[Any]] = {"fill": self.fill}
        if own.size:
            shared |= {"absent": self.absent[own], "absent_fields": own.astype(np.int32)}
        return shared | {f"{b.name}.{name}": a for b in self.blocks for name, a in sorted(b.arrays.items())}

    @classmethod
    def from_arrays(cls, meta: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Packed:
        """Read what ``meta`` and ``arrays`` wrote; anything that does not fit raises :class:`ArtifactError`."""
        try:
            blocks = tuple(
                _block_class(b["layout"])(
                    **{**b, "arrays": {name: arrays[f"{b['name']}.{name}"] for name in b["arrays"]}}
                )
                for b in meta["blocks"]
            )
            rows, fill = int(meta["rows"]), arrays["fill"]
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"The packed table is incomplete: {error!r} is missing or malformed.") from error
        if fill.ndim != 2 or fill.dtype not in (np.float32, np.float16):
            raise ArtifactError(f"Array 'fill' must be float32 or float16 (F, D), but got {fill.dtype} {fill.shape}.")
        for block in blocks:
            block.check(len(fill))
            if block.right > fill.shape[1] or block.start < 0 or block.stop > rows:
                raise ArtifactError(f"Block {block.name!r} lies outside the table of {rows} rows: {block.to_json()}.")
        return cls(rows, blocks, fill, _read_absent(fill, arrays))


@dataclass(frozen=True)
class PackedRange:
    """A plain :class:`BlockRange`, for tables that are not torch modules."""

    name: str
    start: int
    stop: int
    left: int
    right: int


def _read_absent(fill: NDArray[np.floating], arrays: Mapping[str, NDArray[Any]]) -> NDArray[np.floating]:
    if "absent" not in arrays:
        return fill
    rows, own = arrays["absent"], arrays.get("absent_fields", np.empty(0, np.int32))
    typed = own.dtype == np.int32 and rows.dtype == fill.dtype and rows.shape == (own.size, fill.shape[1])
    if not typed or own.size == 0 or not 0 <= own.min() <= own.max() < len(fill):
        raise ArtifactError(
            f"Arrays 'absent' and 'absent_fields' must name fields in [0, {len(fill)}) with a row each."
        )
    absent = np.array(fill)
    absent[own] = rows
    return absent


def _block_class(layout: str) -> type[Any]:
    """The class that reads a layout; those of computed vectors are loaded when a file has them."""
    if layout not in COMPOSED:
        return PackedBlock
    return getattr(import_module(f"pocketrec.layouts.{layout}"), COMPOSED[layout])


def file_range(block: BlockRange, rows: NDArray[np.int64] | None) -> tuple[int, int]:
    """The block's range of file rows, where file row ``i`` holds table row ``rows[i]`` (default: every row)."""
    if rows is None:
        return block.start, block.stop
    inside = np.flatnonzero((rows >= block.start) & (rows < block.stop))
    start, stop = (int(inside[0]), int(inside[-1]) + 1) if inside.size else (0, 0)
    if stop - start != inside.size:
        raise ConfigError(f"`rows` must hold the rows of block {block.name!r} together, but others lie between them.")
    return start, stop


@dataclass(frozen=True)
class _Source:
    """What ``Packed.encode`` was given."""

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


def _encode_block(table: _Source, block: BlockRange) -> PackedBlock:
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
    return PackedBlock(block.name, start, stop, block.left, block.right, layout, table.storage, stride, arrays)


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
