"""The table of which only some entries survive."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pocketrec.format.block import Storage
from pocketrec.format.entries import Index
from pocketrec.format.packed import Packed
from pocketrec.models.table import Block, Table, check_matrix, oov_rows
from pocketrec.schema import Schema


def own_absent(schema: Schema, keep: Tensor, counts: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Fields whose absent row is their out-of-vocabulary row, not the fill row: ``(F,)``.

    Such a row keeps something, and its training count exceeds that of the field's other removed rows together.
    """
    removed = np.where(keep.any(dim=1).numpy(), 0, counts)
    own = np.zeros(schema.width, dtype=bool)
    for i, field in enumerate(schema.fields):
        row = field.oov_row
        own[i] = row is not None and bool(keep[row].any()) and counts[row] > removed[field.offset : row].sum()
    return own


class PrunedTable(Table):
    """A table of which only the entries in ``keep`` survive.

    ``forward(i) = absent[f(i)]`` if row ``i`` is the out-of-vocabulary row or keeps nothing in any block, else
    ``where(keep[i], base[i], fill[f(i)])``. ``base (n, D)`` is shared with the dense table, never copied; a
    ``Parameter`` stays one, so gradients reach ``base`` and ``fill``.

    Args:
        schema: Fields and their rows.
        blocks: How the matrix is tiled.
        base: Float32 ``(n, D)``.
        keep: Bool ``(n, D)``.
        fill: Float32 ``(F, D)``: zeros, or the codebook.
        absent: Float32 ``(F, D)``; see ``from_counts``.
    """

    forms: tuple[str, ...] = ("masked",)

    base: Tensor
    keep: Tensor
    fill: Tensor
    absent: Tensor
    present: Tensor
    stops: Tensor

    def __init__(
        self, schema: Schema, blocks: tuple[Block, ...], base: Tensor, keep: Tensor, fill: Tensor, absent: Tensor
    ) -> None:
        super().__init__()
        self.schema, self.blocks = schema, blocks
        check_matrix("base", base, (schema.rows, self.width), torch.float32)
        check_matrix("keep", keep, (schema.rows, self.width), torch.bool)
        check_matrix("fill", fill, (schema.width, self.width), torch.float32)
        check_matrix("absent", absent, (schema.width, self.width), torch.float32)
        for name, tensor in (("base", base), ("fill", fill), ("absent", absent)):
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)
        self.register_buffer("keep", keep)
        self.register_buffer("present", keep.any(dim=1) & ~oov_rows(schema))
        self.register_buffer("stops", torch.from_numpy(schema.offsets[1:].copy()))

    @classmethod
    def from_counts(
        cls,
        schema: Schema,
        blocks: tuple[Block, ...],
        base: Tensor,
        keep: Tensor,
        fill: Tensor,
        counts: NDArray[np.int64],
    ) -> PrunedTable:
        """Choose each field's absent row by how often it will be read.

        It is the out-of-vocabulary row's kept vector where :func:`own_absent` says so, else the fill row.

        Args:
            schema: Fields and their rows.
            blocks: How the matrix is tiled.
            base: Float32 ``(n, D)``.
            keep: Bool ``(n, D)``.
            fill: Float32 ``(F, D)``.
            counts: Training occurrences of each row, ``(n,)``.
        """
        absent = fill.detach().clone()
        for i in np.flatnonzero(own_absent(schema, keep, counts)):
            row = schema.fields[i].stop - 1
            absent[i] = torch.where(keep[row], base.detach()[row], absent[i])
        return cls(schema, blocks, base, keep, fill, absent)

    def forward(self, ids: Tensor) -> Tensor:
        """Look up: ``(...) -> (..., D)``."""
        fields = torch.bucketize(ids, self.stops, right=True)
        vectors = torch.where(self.keep[ids], self.base[ids], self.fill[fields])
        return torch.where(self.present[ids].unsqueeze(-1), vectors, self.absent[fields])

    def weight(self) -> Tensor:
        """The whole matrix ``(n, D)`` as ``forward`` reads it."""
        fields = torch.from_numpy(self.schema.field_of_row)
        vectors = torch.where(self.keep, self.base, self.fill[fields])
        return torch.where(self.present.unsqueeze(-1), vectors, self.absent[fields])

    def values(self) -> int:
        """Kept scalars of the counted blocks."""
        counted = [b for b in self.blocks if b.counted]
        keep = self.keep.cpu().numpy()
        return sum(int(np.count_nonzero(keep[b.start : b.stop, b.left : b.right])) for b in counted)

    def stored(self) -> Tensor:
        """Rows that keep something, but the out-of-vocabulary rows."""
        return self.present

    def pack(
        self, storage: Storage = "fp32", rows: NDArray[np.int64] | None = None, index: Index = "compact"
    ) -> Packed:
        """Layout ``bitmap`` or ``direct``; the out-of-vocabulary row is not stored, it reads ``absent``."""
        return Packed.encode(
            self.base.detach().numpy(),
            self.keep.numpy(),
            self.fill.detach().numpy(),
            self.absent.detach().numpy(),
            self.blocks,
            self.schema.field_of_row,
            rows,
            storage,
            present=self.present.numpy(),
            index=index,
        )
