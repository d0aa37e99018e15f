"""Layout ``transform``: each row as a few short codes along the directions that matter in its field.

The rows of a block fall into *sections*, one for each field, in the order of the file. A section has a basis of ``k``
directions ``B (k, width)`` and up to eight classes of rows. A row of class ``c`` spends ``b_cj`` bits, 0 to 8, on
direction ``j``, and reads::

    fill + sum_j scale_cj * level[b_cj][code_j] * B_j

``level[b]`` are the best ``2^b`` levels for a normal variable. All rows of a class take the same number of bits, so
that the place of a row follows from the classes of the rows before it. Arrays, sections behind each other:

``starts``
    First row of each section, and the number of rows: uint32 ``(S + 1,)``.
``shapes``
    Planes, classes and directions of each section: uint8 ``(S, 3)``.
``coders``
    Of each class and direction, ``16 h + b``: ``b`` bits, and the scale ``2^((h - 3072) / 128)``: uint16.
``basis``
    int8.
``planes``
    A class number has one bit in each of 0 to 3 planes. Every 256 rows (the last ones of a section may be fewer) have
    their planes behind each other. A number that is no class means that nothing is stored of the row; without planes
    all rows are of class 0, if there is one: uint8.
``offsets``
    Bits of codes in the section before every 256 rows, where it has planes: uint32.
``codes``
    The codes, least significant bit first, each section from a new byte on, and four bytes of zeros: uint8.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketrec import kernel
from pocketrec.errors import ArtifactError, BudgetError
from pocketrec.packed import FileBlock

MOST_BITS = 8
MOST_DIRECTIONS = 255
MOST_PLANES = 3
GROUP = 256
"""Rows between two offsets."""
SPARE = 4
"""Bytes behind the codes, so that words can be read anywhere."""

_LANES = 16

_SCALE_ZERO, _SCALE_STEPS, _SCALE_TOP = 3072, 128, 4095
_REFINEMENTS = 200
_COMPARED_BITS = 3
"""Up to so many bits, comparing with every edge is the fastest."""
_CELLS, _REACH = 4096, 6.0


@cache
def levels(bits: int) -> NDArray[np.float32]:
    """The ``2^bits`` levels of least mean squared error for a standard normal variable, rising: a Lloyd-Max quantiser.

    They are rounded to multiples of 2^-14, so that every machine has the same.

    Example:
        >>> levels(1).tolist()
        [-0.79791259765625, 0.79791259765625]

    Reference: Max, "Quantizing for minimum distortion", 1960; Lloyd, "Least squares quantization in PCM", 1982.
    """
    count = 1 << bits
    found = np.array([quantile((i + 0.5) / count) * math.sqrt(3) for i in range(count)])
    for _ in range(_REFINEMENTS if bits else 0):
        edges = [-math.inf, *((found[1:] + found[:-1]) / 2).tolist(), math.inf]
        density = np.array([math.exp(-e * e / 2) / math.sqrt(2 * math.pi) for e in edges])
        below = np.array([(1 + math.erf(e / math.sqrt(2))) / 2 for e in edges])
        found = -np.diff(density) / np.diff(below)
        found = (found - found[::-1]) / 2
    return (np.rint(found * 2**14) / 2**14).astype(np.float32)


def quantile(share: float) -> float:
    """The standard normal quantile, by bisection.

    Example:
        >>> round(quantile(0.975), 6)
        1.959964
    """
    low, high = -9.0, 9.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 + math.erf(middle / math.sqrt(2))) / 2 < share else (low, middle)
    return (low + high) / 2


@cache
def edges(bits: int) -> NDArray[np.float32]:
    """Halfway between each two :func:`levels`: the bounds of their cells, ``(2^bits - 1,)``."""
    found = levels(bits)
    return (found[1:] + found[:-1]) / np.float32(2)


def nearest(values: NDArray[np.float32], bits: int) -> NDArray[np.uint8]:
    """Codes of the levels that values are nearest to; of two, the lower one.

    Example:
        >>> nearest(np.array([-9.0, 0.1, 1.2], np.float32), 2).tolist()
        [0, 2, 3]
    """
    if bits > _COMPARED_BITS:
        low, above = _cells(bits)
        cell = np.clip(values * np.float32(_CELLS / (2 * _REACH)) + np.float32(_CELLS / 2), 0, _CELLS - 1)
        codes = low[cell.astype(np.intp)]
        return codes + (values > above[codes])
    codes = np.zeros(values.shape, np.uint8)
    for edge in edges(bits):
        codes += values > edge
    return codes


@cache
def _cells(bits: int) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Least code in each of many even cells, each of which holds one edge at most; and the edge above each code."""
    lower = (np.arange(_CELLS) / _CELLS * 2 - 1) * _REACH - 1e-4
    above = np.append(edges(bits), np.float32(np.inf))
    low = np.where(np.arange(_CELLS) > 0, np.searchsorted(edges(bits), lower), 0)
    return low.astype(np.uint8), above


@cache
def _positive_levels() -> NDArray[np.float32]:
    """Zero, and the positive levels of ``b`` bits from ``2^(b - 1)`` on, so that a code is the place of its level."""
    return np.concatenate([levels(bits)[len(levels(bits)) // 2 :] for bits in range(MOST_BITS + 1)])


@cache
def _level_table() -> NDArray[np.float32]:
    """All levels: those of ``b`` bits from ``2^b - 1`` on."""
    return np.concatenate([levels(bits) for bits in range(MOST_BITS + 1)])


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
        return _level_table()[(1 << self.bits[which]) - 1 + codes] * self.scales[which]

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
            planes.append(_pack_planes(kind, section.planes))
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


def _pack_planes(classes: NDArray[np.integer], planes: int) -> NDArray[np.uint8]:
    """The planes of each group of rows behind each other."""
    bits = (classes[:, None] >> np.arange(planes) & 1).astype(np.uint8)
    groups = [bits[i : i + GROUP] for i in range(0, len(bits), GROUP)]
    return np.concatenate([np.packbits(g.T, axis=1, bitorder="little").reshape(-1) for g in groups] or [bits[:0, 0]])


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


@dataclass(frozen=True)
class TransformBlock(FileBlock):
    """See the module; file row ``start + i`` is row ``i``, and ``read`` adds to the fill that it finds."""

    name: str
    start: int
    stop: int
    left: int
    right: int
    layout: str
    arrays: Mapping[str, NDArray[Any]] = field(repr=False)

    def to_json(self) -> dict[str, Any]:
        """Everything but the arrays."""
        return {
            "name": self.name, "start": self.start, "stop": self.stop, "left": self.left, "right": self.right,
            "layout": self.layout, "arrays": sorted(self.arrays),
        }  # fmt: skip

    def check(self, fields: int) -> None:
        """Raise :class:`ArtifactError` unless every array has the type and the shape that the sections ask for."""
        if self.rows < 0 or self.width < 1 or self.left < 0:
            raise ArtifactError(f"Block {self.name!r} has an impossible shape: {self.to_json()}.")
        self._check("starts", np.uint32, None)
        starts = self.arrays["starts"].astype(np.int64)
        if len(starts) < 1 or starts[0] != 0 or starts[-1] != self.rows or (np.diff(starts) < 0).any():
            raise ArtifactError(f"Array '{self.name}.starts' must rise from 0 to {self.rows}, the number of rows.")
        self._check("shapes", np.uint8, (len(starts) - 1, 3))
        planes, classes, directions = self.arrays["shapes"].astype(np.int64).T
        if (planes > MOST_PLANES).any() or (classes > 1 << planes).any():
            raise ArtifactError(f"Array '{self.name}.shapes' must have at most {MOST_PLANES} planes, and classes fit.")
        self._check("coders", np.uint16, (int((classes * directions).sum()),))
        self._check("basis", np.int8, (int(directions.sum()) * self.width,))
        self._check("planes", np.uint8, (int(self._plane_starts[-1]),))
        self._check("offsets", np.uint32, (int(self._offset_starts[-1]),))
        self._check("codes", np.uint8, None)
        if len(self.arrays) != 7 or (coder_bits(self.arrays["coders"]) > MOST_BITS).any():
            raise ArtifactError(f"Block {self.name!r} has other arrays than its layout, or codes of too many bits.")
        if len(self.arrays["codes"]) != (least := int(self._code_starts[-1]) // 8 + SPARE):
            raise ArtifactError(f"Array '{self.name}.codes' must have {least} bytes.")

    def _check(self, name: str, dtype: type[np.generic], shape: tuple[int, ...] | None) -> None:
        found = self.arrays.get(name)
        if (
            found is None
            or found.dtype != dtype
            or found.ndim != len(shape or (0,))
            or found.shape != (shape or found.shape)
        ):
            got = "nothing" if found is None else f"{found.dtype} {found.shape}"
            raise ArtifactError(f"Array '{self.name}.{name}' must be {np.dtype(dtype)} {shape or ''}, but got {got}.")

    @cached_property
    def sections(self) -> tuple[Section, ...]:
        """How each section is coded."""
        found, coders, basis = [], self.arrays["coders"], self.arrays["basis"]
        for planes, classes, directions in self.arrays["shapes"].tolist():
            own, coders = coders[: classes * directions], coders[classes * directions :]
            part, basis = basis[: directions * self.width], basis[directions * self.width :]
            found.append(Section(planes, own.reshape(classes, directions), part.reshape(directions, self.width)))
        return tuple(found)

    @cached_property
    def _rows_of(self) -> NDArray[np.int64]:
        """Rows of each section."""
        return np.diff(self.arrays["starts"].astype(np.int64))

    @cached_property
    def _plane_starts(self) -> NDArray[np.int64]:
        """First byte of each section's planes, and the end."""
        rows, full = self._rows_of, np.maximum(-(-self._rows_of // GROUP) - 1, 0)
        size = self.arrays["shapes"][:, 0] * (full * (GROUP // 8) + -(-(rows - GROUP * full) // 8))
        return np.concatenate([[0], np.cumsum(size)])

    @cached_property
    def _offset_starts(self) -> NDArray[np.int64]:
        """First offset of each section, and the end."""
        return np.concatenate([[0], np.cumsum(-(-self._rows_of // GROUP) * (self.arrays["shapes"][:, 0] > 0))])

    @cached_property
    def _code_starts(self) -> NDArray[np.int64]:
        """First bit of each section's codes, and the end."""
        sizes = np.zeros(len(self.sections), np.int64)
        for s, (section, rows) in enumerate(zip(self.sections, self._rows_of.tolist(), strict=True)):
            if rows and not section.planes:
                sizes[s] = rows * section.record_bits[0]
            elif rows:
                last = np.array([self.arrays["starts"][s + 1] - 1], np.int64)
                number, first = self._places(last, np.array([s]))
                sizes[s] = first[0] + section.record_bits[number[0]]
        return np.concatenate([[0], np.cumsum(-(-sizes // 8) * 8)])

    @cached_property
    def _records(self) -> NDArray[np.int64]:
        """Bits of a row by section and class number, ``(S, 8)``."""
        return np.stack([s.record_bits for s in self.sections]) if self.sections else np.zeros((0, 8), np.int64)

    @cached_property
    def _weights(self) -> NDArray[np.int64]:
        """See :func:`per_set`, ``(S, 8)``."""
        found = [per_set(s.record_bits) for s in self.sections]
        return np.array(found, np.int64).reshape(-1, 1 << MOST_PLANES)

    @cached_property
    def _tables(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
        """Bits, bits before and scale, ``(S, 8, k)``, and basis ``(S, k, width)``, by the widest section's ``k``."""
        most = max((len(s.basis) for s in self.sections), default=0)
        bits = np.zeros((len(self.sections), 1 << MOST_PLANES, most), np.int64)
        scales = np.zeros(bits.shape, np.float32)
        basis = np.zeros((len(self.sections), most, self.width), np.float32)
        for s, section in enumerate(self.sections):
            classes, directions = section.coders.shape
            bits[s, :classes, :directions] = section.bits
            scales[s, :classes, :directions] = section.scales
            basis[s, :directions] = section.basis
        return bits, np.cumsum(bits, axis=2) - bits, scales, basis

    def _sections_of(self, local: NDArray[np.int64]) -> NDArray[np.int64]:
        """Section of each row ``(m,)``."""
        return np.searchsorted(self.arrays["starts"], local, side="right") - 1

    def _places(
        self, local: NDArray[np.int64], sections: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Class numbers of rows ``(m,)``, and the first bit of their codes in their section."""
        planes = self.arrays["shapes"][sections, 0].astype(np.int64)
        row = local - self.arrays["starts"][sections].astype(np.int64)
        group, inner = row // GROUP, row % GROUP
        size = -(-np.minimum(GROUP, self._rows_of[sections] - group * GROUP) // 8)
        first = self._plane_starts[sections] + group * planes * (GROUP // 8)
        column = np.arange(GROUP // 8)
        before = ((1 << np.clip(inner[:, None] - 8 * column, 0, 8)) - 1).astype(np.uint8).view(np.uint64)
        number = np.zeros(len(local), np.int64)
        masks = []
        for plane in range(MOST_PLANES):
            there = (plane < planes)[:, None] & (column < size[:, None])
            place = np.where(there, (first + plane * size)[:, None] + column, 0)
            word = np.where(there, self.arrays["planes"][place] if self.arrays["planes"].size else 0, 0).astype(
                np.uint8
            )
            masks.append(word.view(np.uint64))
            number |= ((word[np.arange(len(local)), inner // 8] >> (inner % 8)) & 1).astype(np.int64) << plane
        offsets = self.arrays["offsets"]
        known = np.where(planes > 0, self._offset_starts[sections] + group, 0)
        bits = np.where(
            planes > 0, offsets[known].astype(np.int64) if offsets.size else 0, row * self._records[sections, 0]
        )
        sets = [before]
        for word in masks:
            sets += [rows & word for rows in sets]
        weights = np.where(planes[:, None] > 0, self._weights[sections], 0)
        for rows, weight in zip(sets, weights.T, strict=True):
            bits = bits + weight * np.bitwise_count(rows).sum(axis=1, dtype=np.int64)
        return number, bits

    def parts(self) -> Sequence[kernel.Part]:
        """The sections as the compiled kernel reads them: small tables are unpacked, planes and codes are not."""
        starts = self.arrays["starts"].astype(np.int64) + self.start
        found = []
        for s, (section, rows) in enumerate(zip(self.sections, self._rows_of.tolist(), strict=True)):
            if not rows:
                continue
            classes, directions = section.coders.shape
            even = -(-directions // 2) * 2
            bits, scale = np.zeros((even, 1 << MOST_PLANES), np.uint32), np.zeros((even, 1 << MOST_PLANES), np.float32)
            bits[:directions, :classes], scale[:directions, :classes] = section.bits.T, section.scales.T
            basis = np.zeros((even, -(-self.width // _LANES) * _LANES), np.float32)
            basis[:directions, : self.width] = section.basis
            part = kernel.Part(
                first=int(starts[s]),
                rows=rows,
                code_start=int(self._code_starts[s]),
                planes=section.planes,
                classes=classes,
                codes=self.arrays["codes"],
                class_planes=self.arrays["planes"][self._plane_starts[s] : self._plane_starts[s + 1]],
                offsets=self.arrays["offsets"][self._offset_starts[s] : self._offset_starts[s + 1]],
                weights=per_set(section.record_bits),
                record=section.record_bits.astype(np.int32),
                directions=int(np.flatnonzero(bits.any(axis=1)).max(initial=-1)) + 1,
                widest=bits.max(axis=1).astype(np.int32),
                bits=bits,
                mask=(np.uint32(1) << bits) - np.uint32(1),
                scale=scale,
                levels=_positive_levels(),
                basis=basis,
                last=np.ascontiguousarray(basis[:, self.width - 1]),
            )
            found.append(part)
        return found

    def positions(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """File rows ``(m,)`` -> rows of the block, or -1 where nothing is stored."""
        local = rows - self.start
        inside = np.flatnonzero((local >= 0) & (local < self.rows))
        found = np.full(len(rows), -1, np.int64)
        sections = self._sections_of(local[inside])
        number, _ = self._places(local[inside], sections)
        stored = number < self.arrays["shapes"][sections, 1]
        found[inside[stored]] = local[inside[stored]]
        return found

    def read(self, positions: NDArray[np.int64], fields: NDArray[np.int32], out: NDArray[np.float32]) -> None:
        """Add what the codes of ``positions (m,)`` mean to ``out (m, width)``.

        A row whose codes would lie outside the array (a damaged file) keeps nothing, as in the compiled kernel.
        """
        sections = self._sections_of(positions)
        number, first = self._places(positions, sections)
        bits, before, scales, basis = self._tables
        codes = self.arrays["codes"]
        place = self._code_starts[sections] + first
        readable = (place >= 0) & (place + self._records[sections, number] <= 8 * (len(codes) - SPARE))
        place = np.where(readable, place, 0)[:, None] + np.where(readable[:, None], before[sections, number], 0)
        word = codes[place >> 3].astype(np.int64) | codes[(place >> 3) + 1].astype(np.int64) << 8
        width = bits[sections, number]
        code = (word >> (place & 7)) & ((1 << width) - 1)
        coefficients = _level_table()[(1 << width) - 1 + code] * scales[sections, number] * readable[:, None]
        accumulate(out, coefficients, basis[sections])
