"""Rows in classes: how the place of a record of so many bits by class is found without an index of rows.

A class number has one bit in each of up to three planes. Every 256 rows (the last ones may be fewer) have their planes
behind each other, and an offset says how many bits there are before them. The bits before a row in its group follow
from population counts of the planes.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pocketrec.native.library import LONG, POINTER, pointer, structure

MOST_PLANES = 3
GROUP = 256
"""Rows between two offsets."""
SPARE = 4
"""Bytes behind the codes, so that words can be read anywhere."""


def plane_bytes(rows: int, planes: int) -> int:
    """Bytes of the planes of so many rows."""
    full, tail = divmod(rows, GROUP)
    return planes * (full * GROUP // 8 + -(-tail // 8))


def pack_planes(classes: NDArray[np.integer], planes: int) -> NDArray[np.uint8]:
    """The planes of each group of rows behind each other."""
    bits = (classes[:, None] >> np.arange(planes) & 1).astype(np.uint8)
    groups = [bits[i : i + GROUP] for i in range(0, len(bits), GROUP)]
    return np.concatenate([np.packbits(g.T, axis=1, bitorder="little").reshape(-1) for g in groups] or [bits[:0, 0]])


def per_set(bits: NDArray[np.int64]) -> NDArray[np.int32]:
    """Of each set of planes, the bits of a class that has them all, less those of all smaller sets: ``(8,)``.

    So the bits of rows are the sum over sets of these times the rows that have all planes of the set.

    Example:
        >>> per_set(np.array([0, 3, 5, 9, 0, 0, 0, 0])).tolist()[:4]
        [0, 3, 5, 1]
    """
    found = bits.reshape((2,) * MOST_PLANES).copy()
    for axis in range(MOST_PLANES):
        upper: list[int | slice] = [slice(None)] * MOST_PLANES
        lower = upper.copy()
        upper[axis], lower[axis] = 1, 0
        found[tuple(upper)] -= found[tuple(lower)]
    return found.reshape(-1).astype(np.int32)


@structure("Part")
class PartView(ctypes.Structure):
    """The rows of one field in a table of layout ``transform`` as the library sees them."""

    _fields_ = (
        ("first", LONG), ("rows", LONG), ("code_start", LONG), ("code_bytes", LONG), ("stride", LONG),
        ("directions", LONG), ("planes", ctypes.c_int32), ("classes", ctypes.c_int32), ("class_planes", POINTER),
        ("offsets", POINTER), ("codes", POINTER), ("weights", POINTER), ("record", POINTER), ("widest", POINTER),
        ("bits", POINTER), ("mask", POINTER), ("scale", POINTER), ("basis", POINTER), ("last", POINTER),
    )  # fmt: skip


@dataclass(frozen=True)
class Part:
    """The rows of one field, unpacked for the library but for rows and codes.

    Attributes:
        first: its first file row.
        rows: how many there are.
        code_start: first bit of its codes.
        planes: bits of a class number.
        classes: how many there are.
        codes: of the whole block, uint8.
        class_planes: its planes, uint8, perhaps none.
        offsets: its offsets, uint32, perhaps none.
        weights: bits of the rows in all planes of a set, less those of its subsets, int32 ``(8,)``.
        record: bits of a row by class, int32 ``(8,)``.
        directions: one past the last direction with a code.
        widest: bits of the longest code by direction, int32 ``(p,)`` with ``p`` even.
        bits: of a code by direction and class, uint32 ``(p, 8)``.
        mask: uint32 ``(p, 8)``.
        scale: float32 ``(p, 8)``.
        levels: zero, then the positive levels of 1 bit, of 2 bits, and so on; the same for all parts, float32.
        basis: float32 ``(p, s)`` with ``s`` a multiple of 16.
        last: its last column, float32 ``(p,)``.
    """

    first: int
    rows: int
    code_start: int
    planes: int
    classes: int
    codes: NDArray[np.uint8]
    class_planes: NDArray[np.uint8]
    offsets: NDArray[np.uint32]
    weights: NDArray[np.int32]
    record: NDArray[np.int32]
    directions: int
    widest: NDArray[np.int32]
    bits: NDArray[np.uint32]
    mask: NDArray[np.uint32]
    scale: NDArray[np.float32]
    levels: NDArray[np.float32]
    basis: NDArray[np.float32]
    last: NDArray[np.float32]

    def view(self) -> PartView:
        """The part for the library; the caller keeps it alive."""
        names = ("class_planes", "offsets", "codes", "weights", "record", "widest", "bits", "mask", "scale", "basis",
                 "last")  # fmt: skip
        return PartView(
            self.first, self.rows, self.code_start, self.codes.size, self.basis.shape[1], self.directions, self.planes,
            self.classes, *(pointer(getattr(self, name)) for name in names),
        )  # fmt: skip
