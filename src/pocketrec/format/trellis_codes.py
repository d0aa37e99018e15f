"""Trellis codes: each bit says something of many coordinates, but a coordinate is read from a few bits alone.

A trellis code of ``k`` bits, span ``V`` and memory ``L`` spends ``k`` bits on each ``V`` coordinates: the last ``L``
bits name a row of the code's table, which holds the ``V`` values. Bits before the first one are zeros.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from numpy.typing import NDArray

from pocketrec.format import constants
from pocketrec.native.library import LONG, POINTER, pointer, structure

SCALE_BITS = 2
"""Bits of the scale of a coded rest."""

_LANES = 16
_PAIRED_MEMORY = 13
"""Bits that name a row of the largest table of pairs of steps, 64 KiB."""

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Code:
    """A trellis code.

    Attributes:
        bits: of a step, ``k``.
        span: coordinates of a step, ``V``.
        memory: bits that name a row of the table, ``L``.
    """

    bits: int
    span: int
    memory: int

    def steps(self, width: int) -> int:
        """Steps of a row."""
        return -(-width // self.span)

    def size(self, width: int) -> int:
        """Bits of a row."""
        return self.bits * self.steps(width)

    def windows(self, width: int) -> tuple[Ints, Ints, Ints]:
        """First bit and mask of each step's bits, and by which they are shifted to name a row of the table."""
        ends = self.bits * np.arange(1, self.steps(width) + 1)
        known = np.minimum(ends, self.memory)
        return ends - known, (1 << known) - 1, self.memory - known

    @cached_property
    def table(self) -> Floats:
        """The values, ``(2^L, V)``: normal quantiles in a scrambled order, from ``constants.bin``.

        They are shrunk to the variance that a code of the rate reproduces at best. The first step, before which there
        are only zeros, chooses between the levels of a Lloyd-Max quantiser.
        """
        return constants.trellis(CODES.index(self) + 1)


CODES = (
    Code(1, 4, 10),
    Code(1, 2, 10),
    Code(2, 3, 10),
    Code(1, 1, 10),
    Code(3, 2, 10),
    Code(2, 1, 10),
    Code(3, 1, 10),
    Code(4, 1, 12),
    Code(6, 1, 6),
    Code(8, 1, 8),
)
"""All codes; class and file name code ``n`` by ``n + 1``, and no code by 0."""


def rate_bits(rate: int, width: int) -> int:
    """Bits of a coded rest by the number of its code, its scale included; 0 is no code.

    Example:
        >>> rate_bits(0, 64), rate_bits(4, 64)
        (0, 66)
    """
    return CODES[rate - 1].size(width) + SCALE_BITS if rate else 0


def code_values(rate: int, codes: NDArray[np.integer], width: int) -> Floats:
    """What codes ``(m, steps)`` mean, ``(m, width)``."""
    code = CODES[rate - 1]
    states = np.zeros(codes.shape, np.int64)
    state = np.zeros(len(codes), np.int64)
    for step in range(codes.shape[1]):
        state = (state >> code.bits) | (codes[:, step].astype(np.int64) << (code.memory - code.bits))
        states[:, step] = state
    return code.table[states].reshape(len(codes), codes.shape[1] * code.span)[:, :width]


@structure("TrellisCode")
class CodeView(ctypes.Structure):
    """One trellis code as the library sees it."""

    _fields_ = (
        ("table", POINTER), ("first", POINTER), ("mask", POINTER), ("shift", POINTER), ("steps", LONG),
        ("span", LONG),
    )  # fmt: skip


@dataclass(frozen=True)
class CodePart:
    """One trellis code, step by step; arrays are padded to a multiple of 16 entries.

    Attributes:
        table: float32 ``(2^memory, w)`` with ``w`` the power of two from ``span`` on.
        span: coordinates of a step, 1 to 4.
        first: first bit of each step's window, int32.
        mask: of the window, int32.
        shift: by which the window becomes a row of the table, int32.
        steps: how many there are; 0 where nothing is coded.
    """

    table: NDArray[np.float32]
    span: int
    first: NDArray[np.int32]
    mask: NDArray[np.int32]
    shift: NDArray[np.int32]
    steps: int

    def view(self) -> CodeView:
        """The code for the library; the caller keeps it alive."""
        pointers = (pointer(a) for a in (self.table, self.first, self.mask, self.shift))
        return CodeView(*pointers, self.steps, self.span)


@cache
def code_part(rate: int, width: int) -> CodePart:
    """A code for the compiled kernel, by its number; where the table stays small, it reads two steps at a time."""
    if not rate:
        nothing = np.zeros(_LANES, np.int32)
        return CodePart(np.zeros((1, 1), np.float32), 1, nothing, nothing, nothing, 0)
    code = CODES[rate - 1]
    table = code.table
    if code.span == 1 and code.memory + code.bits <= _PAIRED_MEMORY:
        windows = np.arange(1 << (code.memory + code.bits))
        table = np.hstack([table[windows & ((1 << code.memory) - 1)], table[windows >> code.bits]])
        code = Code(2 * code.bits, 2, code.memory + code.bits)
    steps = code.steps(width)
    first, mask, shift = (np.pad(a, (0, -steps % _LANES), "edge").astype(np.int32) for a in code.windows(width))
    table = np.pad(table, ((0, 0), (0, (1 << (code.span - 1).bit_length()) - code.span)))
    return CodePart(np.ascontiguousarray(table), code.span, first, mask, shift, steps)
