"""Packed tables: how a table lies in a file, and how one row is read without unpacking the rest.

A packed table has ``rows`` file rows and ``D`` columns, tiled by blocks (rows ``[start, stop)`` x columns
``[left, right)``). A block stores its entries, in a layout of :mod:`pocketrec.format.entries`, or what its vectors are
computed from, in a layout of :mod:`pocketrec.format.layouts`. Torch-free.

The absent law: a file row of -1, or one that is stored in no block, reads its field's ``absent`` row; a row that is
stored in some block reads ``fill`` wherever it keeps nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from pocketrec.errors import ArtifactError, ConfigError
from pocketrec.format import layouts
from pocketrec.format.block import BlockRange, FileBlock, Storage
from pocketrec.format.entries import Index, PackedBlock, Source, encode_block
from pocketrec.native import library
from pocketrec.native.lookup import Table, lookup


@dataclass(frozen=True)
class Packed:
    """A whole table as it lies in the file.

    ``lookup`` is all that scoring needs; ``arrays`` and ``meta`` go into the file and ``from_arrays`` reads them back.
    ``fill`` and ``absent`` are float32, or both float16, of shape ``(F, D)``.

    Example:
        >>> import numpy as np
        >>> from pocketrec.format.block import PackedRange
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
        table = Source(weight, keep, fields, present, rows, len(fill), storage, index)
        packed = tuple(encode_block(table, b) for b in blocks)
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
        if library.available() and self._view is not None:
            lookup(self._view, rows, fields, out, threads)
        else:
            out[...] = self.lookup_numpy(rows, fields)
        return out

    @cached_property
    def _view(self) -> Table | None:
        """The table as the compiled kernel sees it, or ``None`` where it has a block that the kernel cannot read."""
        fill, absent = (np.ascontiguousarray(a, np.float32) for a in (self.fill, self.absent))
        kinds = {type(block) for block in self.blocks}
        return kinds.pop().view(self.blocks, fill, absent) if len(kinds) == 1 else None

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
    return layouts.block_class(layout) if layout in layouts.NAMES else PackedBlock
