"""What all blocks of a packed table have in common: their range of rows and columns, and how they are read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pocketrec.errors import ArtifactError, ConfigError
from pocketrec.native.lookup import Table

Storage = Literal["fp32", "fp16", "int8"]

DTYPES: Mapping[str, type[np.generic]] = {"fp32": np.float32, "fp16": np.float16, "int8": np.int8}


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


class PackedRange(NamedTuple):
    """A plain :class:`BlockRange`, for tables that are not torch modules."""

    name: str
    start: int
    stop: int
    left: int
    right: int


def side_size_for(fields: int, width: int, absent_fields: int) -> int:
    """Bytes of what blocks share: fill rows, and absent rows of the ``absent_fields`` fields that have their own."""
    return 4 * fields * width + (4 + 4 * width) * absent_fields


@dataclass(frozen=True)
class FileBlock(ABC):
    """One block of a packed table, whatever its layout: rows are file rows, columns are the table's."""

    name: str
    start: int
    stop: int
    left: int
    right: int
    layout: str
    arrays: Mapping[str, NDArray[Any]] = field(repr=False, kw_only=True)

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

    def to_json(self) -> dict[str, Any]:
        """Everything but the arrays, whose names it lists."""
        return {**{f.name: getattr(self, f.name) for f in fields(self)}, "arrays": sorted(self.arrays)}

    def check_array(self, name: str, dtype: type[np.generic], shape: tuple[int, ...]) -> None:
        """Raise :class:`ArtifactError` unless there is an array of this type and shape."""
        found = self.arrays.get(name)
        if found is None or found.dtype != dtype or found.shape != shape:
            got = "nothing" if found is None else f"{found.dtype} {found.shape}"
            raise ArtifactError(f"Array '{self.name}.{name}' must be {np.dtype(dtype)} {shape}, but got {got}.")

    @abstractmethod
    def check(self, fields: int) -> None:
        """Raise :class:`ArtifactError` unless every array has the type and the shape that the layout asks for."""

    def positions(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """File rows ``(m,)`` -> where the block stores them, or -1; by default their places in its range."""
        local = rows - self.start
        return np.where((local >= 0) & (local < self.rows), local, -1)

    @abstractmethod
    def read(self, positions: NDArray[np.int64], fields: NDArray[np.int32], out: NDArray[np.float32]) -> None:
        """Write the stored entries at ``positions (m,)`` over ``out (m, width)``, which holds the fill."""

    @classmethod
    def view(cls, blocks: Sequence[Any], fill: NDArray[np.float32], absent: NDArray[np.float32]) -> Table | None:
        """A table of blocks of this layout as the compiled kernel reads it, or ``None`` where it cannot.

        Args:
            blocks: all blocks of the table, at least one, each of this class.
            fill: ``(F, D)``.
            absent: ``(F, D)``.
        """
        return None


def file_range(block: BlockRange, rows: NDArray[np.int64] | None) -> tuple[int, int]:
    """The block's range of file rows, where file row ``i`` holds table row ``rows[i]`` (default: every row)."""
    if rows is None:
        return block.start, block.stop
    inside = np.flatnonzero((rows >= block.start) & (rows < block.stop))
    start, stop = (int(inside[0]), int(inside[-1]) + 1) if inside.size else (0, 0)
    if stop - start != inside.size:
        raise ConfigError(f"`rows` must hold the rows of block {block.name!r} together, but others lie between them.")
    return start, stop
