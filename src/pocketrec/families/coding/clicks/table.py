"""A table whose rows are codes of different lengths, and how it is packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pocketrec.families.coding.clicks.allocation import Assignment, FieldCoordinates
from pocketrec.format.block import PackedRange, Storage, file_range
from pocketrec.format.entries import Index
from pocketrec.format.layouts.transform import TransformBlock
from pocketrec.format.packed import Packed
from pocketrec.format.sections import Section, accumulate, encode
from pocketrec.models.table import Block, Table
from pocketrec.schema import Schema


class CodedTable(Table):
    """Rows as coded in a file of layout ``transform``: decoded once, and kept as float32 beside their codes.

    Args:
        schema: Fields and their rows.
        blocks: How the matrix is tiled; blocks of the same rows are coded together.
        centre: What codes are added to, and what absent rows read, float16 ``(F, D)``.
        sections: How each field is coded.
        classes: Class number of each row, int8 ``(n,)``; -1 where nothing is stored.
        codes: Uint8 ``(n, k)``, with ``k`` the most directions of a section.
    """

    computed: ClassVar[bool] = True

    matrix: Tensor
    classes: Tensor
    codes: Tensor

    def __init__(
        self,
        schema: Schema,
        blocks: tuple[Block, ...],
        centre: NDArray[np.float16],
        sections: Sequence[Section],
        classes: NDArray[np.int8],
        codes: NDArray[np.uint8],
    ) -> None:
        super().__init__()
        self.schema, self.blocks, self.centre = schema, blocks, centre
        self.sections = tuple(sections)
        matrix = centre.astype(np.float32)[schema.field_of_row]
        for field, section in zip(schema.fields, self.sections, strict=True):
            own = slice(field.offset, field.stop)
            for which in range(len(section.coders)):
                rows = field.offset + np.flatnonzero(classes[own] == which)
                vectors = matrix[rows]
                coefficients = section.coefficients(codes[rows, : len(section.basis)], which)
                accumulate(vectors, coefficients, section.basis)
                matrix[rows] = vectors
        for name, array in (("matrix", matrix), ("classes", classes), ("codes", codes)):
            self.register_buffer(name, torch.from_numpy(array))

    @classmethod
    def of(
        cls,
        schema: Schema,
        blocks: tuple[Block, ...],
        centre: NDArray[np.float16],
        sources: Sequence[FieldCoordinates],
        assignments: Sequence[Assignment],
    ) -> CodedTable:
        """The table in which each field's rows are coded as assigned; rows of no source are stored nowhere."""
        sections = [a.section for a in assignments]
        classes = np.full(schema.rows, -1, np.int8)
        codes = np.zeros((schema.rows, max(len(s.basis) for s in sections)), np.uint8)
        for source, assignment in zip(sources, assignments, strict=True):
            classes[source.rows] = assignment.classes
            codes[source.rows, : len(assignment.section.basis)] = assignment.codes
        return cls(schema, blocks, centre, sections, classes, codes)

    def forward(self, ids: Tensor) -> Tensor:
        """Look up: ``(...) -> (..., D)``."""
        return self.matrix[ids]

    def weight(self) -> Tensor:
        """The whole matrix ``(n, D)``."""
        return self.matrix

    def values(self) -> int:
        """Coded scalars: directions with at least a bit, over all rows; tables that rows share are not counted."""
        kinds = self.classes.numpy()
        total = 0
        for field, section in zip(self.schema.fields, self.sections, strict=True):
            coded = np.count_nonzero(section.bits[:, : self.width], axis=1)
            own = kinds[field.offset : field.stop]
            total += int(coded[own[own >= 0]].sum())
        return total

    def stored(self) -> Tensor:
        """Rows of some class."""
        return self.classes >= 0

    def pack(
        self, storage: Storage = "fp32", rows: NDArray[np.int64] | None = None, index: Index = "compact"
    ) -> Packed:
        """Layout ``transform``, whatever the storage and the index."""
        table_rows = np.arange(self.schema.rows) if rows is None else rows
        blocks = tuple(self._pack(span, rows, table_rows) for span in spans(self.blocks))
        return Packed(len(table_rows), blocks, self.centre, self.centre)

    def _pack(self, span: PackedRange, rows: NDArray[np.int64] | None, table_rows: NDArray[np.int64]) -> TransformBlock:
        start, stop = file_range(span, rows)
        held = table_rows[start:stop]
        kinds, codes = self.classes.numpy()[held], self.codes.numpy()[held]
        fields = self.schema.field_of_row[held]
        inside = [i for i, f in enumerate(self.schema.fields) if span.start <= f.offset < span.stop]
        own = [np.flatnonzero(fields == i) for i in inside]
        sections = [_with_room(self.sections[i], kinds[r]) for i, r in zip(inside, own, strict=True)]
        numbers = [np.where(kinds[r] < 0, len(s.coders), kinds[r]) for s, r in zip(sections, own, strict=True)]
        kept = [codes[r, : len(s.basis)] for s, r in zip(sections, own, strict=True)]
        arrays = encode(sections, numbers, kept)
        return TransformBlock(span.name, start, stop, span.left, span.right, "transform", arrays=arrays)


def _with_room(section: Section, kinds: NDArray[np.int8]) -> Section:
    """The section with a class number to spare, where a row has no class."""
    crowded = bool((kinds < 0).any()) and len(section.coders) == 1 << section.planes
    return replace(section, planes=section.planes + 1) if crowded else section


def spans(blocks: Sequence[Block]) -> tuple[PackedRange, ...]:
    """Blocks of the same rows as one.

    Example:
        >>> spans((Block("embedding", 0, 9, 0, 4), Block("linear", 0, 9, 4, 5)))
        (PackedRange(name='embedding+linear', start=0, stop=9, left=0, right=5),)
    """
    ranges = sorted({(b.start, b.stop) for b in blocks})
    found = []
    for start, stop in ranges:
        own = sorted((b for b in blocks if (b.start, b.stop) == (start, stop)), key=lambda b: b.left)
        found.append(PackedRange("+".join(b.name for b in own), start, stop, own[0].left, own[-1].right))
    return tuple(found)
