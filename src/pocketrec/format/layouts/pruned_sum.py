"""Layout ``pruned_sum``: the vector of a slot is the sum of one row of each of two pruned codebooks.

With ``b`` rows in the first codebook and ``c = ceil(slots / b)``, slot ``i`` reads row ``i mod b`` of the first and row
``i div c`` of the second, which has ``ceil(slots / c)`` rows; with the operation ``concat`` its vector is not their sum
but both side by side, each of half the width. The codebooks lie behind each other in one block of layout ``bitmap`` in
which every row is present, so that its size depends on the number of kept entries alone.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from pocketrec.errors import ConfigError, DivergedError
from pocketrec.format.block import DTYPES, Storage
from pocketrec.format.computed import ComposedBlock, Shape, whole
from pocketrec.format.entries import PackedBlock, mask_bytes, size_for, stride_for

Operation = Literal["add", "concat"]

OPERATIONS: tuple[str, ...] = get_args(Operation)


def part_width(width: int, operation: str) -> int:
    """Columns of a codebook.

    Raises:
        ConfigError: Two halves do not make up the width.

    Example:
        >>> part_width(16, "add"), part_width(16, "concat")
        (16, 8)
    """
    if operation != "concat":
        return width
    if width % 2:
        raise ConfigError(f"`operation='concat'` needs an even width, but a block has {width} columns.")
    return width // 2


def codebook_rows(slots: int, bucket: int) -> tuple[int, int]:
    """Rows of the two codebooks, as far as a slot reads them.

    Example:
        >>> codebook_rows(10, 4)
        (4, 4)
    """
    return bucket, -(-slots // -(-slots // bucket))


def codebook_places(slots: NDArray[np.int64], count: int, bucket: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of both codebooks, the second behind the first, that slots of ``count`` read."""
    return slots % bucket, bucket + slots // -(-count // bucket)


def pruned_sum_bytes(slots: int, bucket: int, width: int, kept: int, storage: Storage) -> int:
    """Bytes of both codebooks with ``kept`` entries, ``slots`` left out."""
    rows = sum(codebook_rows(slots, bucket))
    return size_for(rows, rows, kept, width, 2, storage)


def encode_pruned(
    books: NDArray[np.float32], keep: NDArray[np.bool_], bucket: int, storage: Storage
) -> dict[str, NDArray[Any]]:
    """The arrays of two codebooks ``books (rows, d)``, the second from row ``bucket`` on, and of what is kept.

    Raises:
        DivergedError: A kept value is not finite.
        ConfigError: A kept value is too large for fp16.
    """
    row, column = np.nonzero(keep)
    values = books[row, column]
    if not np.isfinite(values).all():
        raise DivergedError("Every stored value must be finite, but the table holds NaN or infinity; train again.")
    arrays: dict[str, NDArray[Any]] = {}
    if storage == "int8":
        largest = np.zeros((2, books.shape[1]), np.float32)
        np.maximum.at(largest, ((row >= bucket).astype(np.int64), column), np.abs(values))
        scale = largest / np.float32(127)
        arrays["scale"] = scale
        values = np.rint(values / np.where(scale > 0, scale, 1)[(row >= bucket).astype(np.int64), column])
    elif storage == "fp16" and (top := float(np.abs(values).max(initial=0))) > np.finfo(np.float16).max:
        raise ConfigError(f"fp16 holds values up to 65,504, but the table has {top:g}; use fp32 or int8.")
    arrays["values"] = values.astype(DTYPES[storage])
    if len(values) < keep.size:
        counts = keep.sum(axis=1)
        before = (np.cumsum(counts) - counts).astype(np.uint32)
        arrays["masks"] = np.packbits(keep, axis=1, bitorder="little").reshape(-1)
        arrays["offsets"] = before[:: stride_for(len(keep), keep.shape[1], len(values), storage)]
    return arrays


class PrunedSumBlock(ComposedBlock):
    """See the module. Settings: ``slots``, ``bucket``, ``kept`` (the number of stored values), perhaps ``operation``.

    Arrays: those of a ``bitmap`` block of both codebooks; int8 has a scale for each codebook and column.
    """

    @property
    def slots(self) -> int:
        """Vectors that can be computed."""
        return self.settings["slots"]

    def sound(self) -> bool:
        """Whether the settings are possible at all."""
        kept = self.settings.get("kept")
        if not whole(self.settings, "slots", "bucket") or type(kept) is not int:
            return False
        if self._operation not in OPERATIONS or (self._operation == "concat" and self.width % 2):
            return False
        return self.settings["bucket"] <= self.slots and 0 <= kept <= self._rows * self._part

    def factors(self) -> dict[str, Shape]:
        """None: a pruned codebook is no matrix."""
        return {}

    def plain(self) -> dict[str, tuple[type[np.generic], tuple[int, ...]]]:
        """The arrays of the bitmap block."""
        kept = self.settings["kept"]
        arrays: dict[str, tuple[type[np.generic], tuple[int, ...]]] = {"values": (DTYPES[self.storage], (kept,))}
        if kept < self._rows * self._part:
            arrays["masks"] = (np.uint8, (self._rows * mask_bytes(self._part),))
            arrays["offsets"] = (np.uint32, (-(-self._rows // self._stride),))
        if self.storage == "int8":
            arrays["scale"] = (np.float32, (2, self._part))
        return arrays

    def vectors(self, slots: NDArray[np.int64]) -> NDArray[np.float32]:
        """Slots ``(m,)`` -> vectors ``(m, width)``."""
        out = np.zeros((2, len(slots), self._part), np.float32)
        for book, places in enumerate(codebook_places(slots, self.slots, self.settings["bucket"])):
            self._books.read(places, np.full(len(slots), book, np.int32), out[book])
        return np.concatenate(list(out), axis=1) if self._operation == "concat" else out[0] + out[1]

    @property
    def _operation(self) -> Any:
        return self.settings.get("operation", "add")

    @property
    def _part(self) -> int:
        """Columns of a codebook."""
        return part_width(self.width, self._operation)

    @property
    def _rows(self) -> int:
        return sum(codebook_rows(self.slots, self.settings["bucket"]))

    @property
    def _stride(self) -> int:
        return stride_for(self._rows, self._part, self.settings["kept"], self.storage)

    @cached_property
    def _books(self) -> PackedBlock:
        """Both codebooks as a table of their own."""
        arrays = {name: array for name, array in self.arrays.items() if name != "slots"}
        return PackedBlock(self.name, 0, self._rows, 0, self._part, "bitmap", self.storage, self._stride, arrays=arrays)
