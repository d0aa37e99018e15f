"""Sections of layout ``transform``: how the rows of one field are coded along a few directions of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketrec.errors import BudgetError
from pocketrec.format.planes import GROUP, MOST_PLANES, SPARE, pack_planes
from pocketrec.format.quantiser import level_table, levels, nearest

MOST_DIRECTIONS = 255

_SCALE_ZERO, _SCALE_STEPS, _SCALE_TOP = 3072, 128, 4095


def coder(bits: NDArray[np.integer], scales: NDArray[np.floating]) -> NDArray[np.uint16]:
    """Bits, 0 to 8, and positive scales as coders; a scale is rounded to 0.3 %.

    Example:
        >>> coder(np.array([3]), np.array([0.25])).tolist()
        [45059]
    """
    steps = np.rint(np.log2(np.maximum(scales, 1e-30)) * _SCALE_STEPS) + _SCALE_ZERO
    return (np.clip(steps, 0, _SCALE_TOP).astype(np.int64) * 16 + bits).astype(np.uint16)


def coder_bits(coders: NDArray[np.uint16]) -> NDArray[np.int64]:
    """Bits of each code."""
    return (coders & 15).astype(np.int64)


def coder_scales(coders: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Scale of each code's levels."""
    return np.exp2(((coders >> 4).astype(np.float64) - _SCALE_ZERO) / _SCALE_STEPS).astype(np.float32)


@dataclass(frozen=True)
class Section:
    """How the rows of one field are coded.

    A basis of more than ``width`` directions has the first ones twice: what is coded along the second one is what the
    first one's code leaves.

    Attributes:
        planes: bits of a row's class number, 0 to 3.
        coders: one for each class and direction, uint16 ``(K, k)``; ``K`` at most ``2^planes``.
        basis: directions, int8 ``(k, width)``.
    """

    planes: int
    coders: NDArray[np.uint16]
    basis: NDArray[np.int8]

    @cached_property
    def bits(self) -> NDArray[np.int64]:
        """``(K, k)``."""
        return coder_bits(self.coders)

    @cached_property
    def scales(self) -> NDArray[np.float32]:
        """``(K, k)``."""
        return coder_scales(self.coders)

    @cached_property
    def record_bits(self) -> NDArray[np.int64]:
        """Bits of a row by its class number, ``(8,)``; none where a number is no class."""
        found = np.zeros(1 << MOST_PLANES, np.int64)
        found[: len(self.coders)] = self.bits.sum(axis=1)
        return found

    def quantise(self, coefficients: NDArray[np.float32], which: int) -> NDArray[np.uint8]:
        """Codes of rows of one class, the nearest for each coefficient: ``(m, min(k, width)) -> (m, k)``."""
        codes = np.zeros((len(coefficients), len(self.basis)), np.uint8, order="F")
        for j, (bits, scale, rest) in enumerate(self.walk(coefficients, codes, which)):
            codes[:, j] = nearest(rest / scale, bits) if bits else 0
        return codes

    def walk(
        self, coefficients: NDArray[np.float32], codes: NDArray[np.uint8], which: int
    ) -> Iterator[tuple[int, np.float32, NDArray[np.float32]]]:
        """Bits and scale of each direction in a class, and what is left to code along it, by the codes before it.

        Args:
            coefficients: ``(m, min(k, width))``.
            codes: ``(m, k)``; only those of directions that are done are read.
            which: the class.
        """
        width = self.basis.shape[1]
        for j, (bits, scale) in enumerate(zip(self.bits[which].tolist(), self.scales[which], strict=True)):
            rest = coefficients[:, j % width]
            if j >= width and (first := int(self.bits[which][j - width])):
                rest = rest - levels(first)[codes[:, j - width]] * self.scales[which][j - width]
            yield bits, scale, rest

    def coefficients(self, codes: NDArray[np.uint8], which: int) -> NDArray[np.float32]:
        """What codes of rows of one class mean: ``(m, k) -> (m, k)``."""
        return level_table()[(1 << self.bits[which]) - 1 + codes] * self.scales[which]

    def size_bits(self, counts: NDArray[np.integer]) -> int:
        """Bits of everything but the fixed part of a section, see :func:`fixed_bytes`.

        Args:
            counts: rows of each class number, ``(8,)``.
        """
        codes = int(counts @ self.record_bits)
        rows = int(counts.sum())
        groups = -(-rows // GROUP)
        tail = -(-(rows - GROUP * max(groups - 1, 0)) // 8)
        planes = 8 * self.planes * (GROUP // 8 * max(groups - 1, 0) + tail)
        return (
            -(-codes // 8) * 8 + planes + 32 * groups * (self.planes > 0) + 16 * self.coders.size + 8 * self.basis.size
        )


def fixed_bytes(sections: int) -> int:
    """Bytes of a block in whose sections nothing is stored."""
    return 4 * (sections + 1) + 3 * sections + SPARE


def accumulate(
    out: NDArray[np.float32], coefficients: NDArray[np.float32], basis: NDArray[np.floating | np.int8]
) -> None:
    """Add ``sum_j coefficients[:, j] * basis[..., j, :]`` to ``out (m, width)``, always in the same order of sums.

    Args:
        out: ``(m, width)``.
        coefficients: ``(m, k)``.
        basis: ``(k, width)``, or one for each row, ``(m, k, width)``.
    """
    for j in range(coefficients.shape[1]):
        out += coefficients[:, j, None] * basis[..., j, :].astype(np.float32, copy=False)


def encode(
    sections: Sequence[Section], classes: Sequence[NDArray[np.integer]], codes: Sequence[NDArray[np.uint8]]
) -> dict[str, NDArray[Any]]:
    """The arrays of a block.

    Args:
        sections: in the order of the file.
        classes: of each section, the class numbers of its rows, ``(rows,)``.
        codes: of each section, ``(rows, k)``; what a class does not code is ignored.

    Raises:
        BudgetError: A section takes 512 MiB of codes, or more.
    """
    rows = [len(c) for c in classes]
    planes, offsets, streams = [], [], []
    for section, kind, code in zip(sections, classes, codes, strict=True):
        sizes = section.record_bits[kind]
        if (total := int(sizes.sum())) >= 1 << 32:
            raise BudgetError(f"The codes of a field must take less than 512 MiB, but take {total // 8:,} B.")
        if section.planes:
            offsets.append(np.concatenate([[0], np.cumsum(sizes)])[:-1:GROUP])
            planes.append(pack_planes(kind, section.planes))
        streams.append(_pack_codes(section, kind, code))
    shapes = [(s.planes, *s.coders.shape) for s in sections]
    return {
        "starts": np.concatenate([[0], np.cumsum(rows)]).astype(np.uint32),
        "shapes": np.array(shapes, np.uint8).reshape(-1, 3),
        "coders": np.concatenate([s.coders.reshape(-1) for s in sections]),
        "basis": np.concatenate([s.basis.reshape(-1) for s in sections]),
        "planes": np.concatenate([np.empty(0, np.uint8), *planes]),
        "offsets": np.concatenate([np.empty(0, np.uint32), *offsets]).astype(np.uint32),
        "codes": np.concatenate([*streams, np.zeros(SPARE, np.uint8)]),
    }


def _pack_codes(section: Section, classes: NDArray[np.integer], codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The codes of all rows, bit behind bit."""
    sizes = section.record_bits[classes]
    ends = np.cumsum(sizes)
    stream = np.zeros(int(ends[-1]) if len(ends) else 0, np.uint8)
    for which, widths in enumerate(section.bits):
        rows = np.flatnonzero(classes == which)
        first = (ends - sizes)[rows]
        for j, bits in enumerate(widths.tolist()):
            for bit in range(bits):
                stream[first + bit] = (codes[rows, j] >> bit) & 1
            first = first + bits
    return np.packbits(stream, bitorder="little")
