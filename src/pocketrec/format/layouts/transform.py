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

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pocketrec.errors import ArtifactError
from pocketrec.format.block import FileBlock
from pocketrec.format.planes import GROUP, MOST_PLANES, SPARE, Part, PartView, per_set
from pocketrec.format.quantiser import MOST_BITS, level_table, positive_levels
from pocketrec.format.sections import Section, accumulate, coder_bits
from pocketrec.native.library import LONG, POINTER, pointer, structure
from pocketrec.native.lookup import ASKED, Table

_LANES = 16


@structure("Transform")
class TransformTable(ctypes.Structure):
    """A table of layout ``transform``."""

    _fields_ = (
        ("parts", POINTER), ("part_count", LONG), ("levels", POINTER), ("fill", POINTER), ("absent", POINTER),
        ("field_count", LONG), ("width", LONG), *ASKED,
    )  # fmt: skip


@dataclass(frozen=True)
class TransformBlock(FileBlock):
    """See the module; file row ``start + i`` is row ``i``, and ``read`` adds to the fill that it finds."""

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

    @classmethod
    def view(
        cls, blocks: Sequence[TransformBlock], fill: NDArray[np.float32], absent: NDArray[np.float32]
    ) -> Table | None:
        """The sections of all blocks, as the compiled kernel reads them, where each block has all columns."""
        if any(block.width != fill.shape[1] or not block.rows for block in blocks):
            return None
        parts = sorted((part for block in blocks for part in block._parts()), key=lambda part: part.first)
        views = (PartView * len(parts))(*(part.view() for part in parts))
        pointers = (pointer(array) for array in (parts[0].levels, fill, absent))
        table = TransformTable(ctypes.addressof(views), len(parts), *pointers, *fill.shape)
        return Table("pocketrec_transform", table, len(fill), (parts, views, fill, absent))

    def _parts(self) -> Sequence[Part]:
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
            part = Part(
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
                levels=positive_levels(),
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
        coefficients = level_table()[(1 << width) - 1 + code] * scales[sections, number] * readable[:, None]
        accumulate(out, coefficients, basis[sections])
