"""What layouts of computed vectors share: matrices of factors in fp32, fp16 or int8, and how a row finds its vector.

A block computes the vector of a *slot*, a number in ``[0, slots)``. File row ``start + i`` has slot ``i``, or
``slots[i]`` where the array ``slots`` is stored. Every row of the block's range is stored, so none is absent.

An int8 code ``q`` of a matrix means ``q * scale``, with a scale for each column of a matrix that is not wider than
high, else for each row: the fewer of the two.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from pocketrec.errors import ArtifactError, ConfigError, DivergedError
from pocketrec.format import layouts
from pocketrec.format.block import DTYPES, FileBlock, Storage

Shape = tuple[int, int]


def factor_bytes(shape: Shape, storage: Storage) -> int:
    """Bytes of a matrix and its scales.

    Example:
        >>> factor_bytes((100, 16), "int8")
        1664
    """
    scales = min(shape) if storage == "int8" else 0
    return shape[0] * shape[1] * np.dtype(DTYPES[storage]).itemsize + 4 * scales


def encode_factor(name: str, values: NDArray[np.float32], storage: Storage) -> dict[str, NDArray[Any]]:
    """The arrays of a matrix: its codes by its name, and its scales where the storage has them.

    Raises:
        DivergedError: A value is not finite.
        ConfigError: A value is too large for fp16.
    """
    if not np.isfinite(values).all():
        raise DivergedError("Every stored value must be finite, but the table holds NaN or infinity; train again.")
    if storage == "fp32":
        return {name: np.ascontiguousarray(values, np.float32)}
    largest = np.abs(values).max(axis=_scale_axis(_shape(values)), keepdims=True, initial=0)
    if storage == "fp16":
        if largest.max(initial=0) > np.finfo(np.float16).max:
            raise ConfigError(f"fp16 holds values up to 65,504, but the table has {largest.max():g}; use fp32 or int8.")
        return {name: values.astype(np.float16)}
    scale = (largest / np.float32(127)).astype(np.float32)
    codes = np.rint(values / np.where(scale > 0, scale, np.float32(1))).astype(np.int8)
    return {name: codes, f"{name}_scale": scale.reshape(-1)}


def _shape(values: NDArray[Any]) -> Shape:
    rows, columns = values.shape
    return rows, columns


def _scale_axis(shape: Shape) -> int:
    """The axis along which all codes share a scale."""
    return 0 if shape[1] <= shape[0] else 1


@dataclass(frozen=True)
class ComposedBlock(FileBlock):
    """One block of computed vectors.

    Attributes:
        settings: Whole numbers and words that, with the width, fix the shape of every array.
        arrays: Factors, and ``slots`` (uint32) unless file rows are in the order of their slots.
    """

    storage: Storage
    settings: Mapping[str, Any]

    @property
    @abstractmethod
    def slots(self) -> int:
        """Vectors that can be computed."""

    @abstractmethod
    def sound(self) -> bool:
        """Whether the settings are possible at all."""

    @abstractmethod
    def factors(self) -> dict[str, Shape]:
        """Shape of each matrix that is stored as ``storage`` says."""

    def plain(self) -> dict[str, tuple[type[np.generic], tuple[int, ...]]]:
        """Type and shape of every other array."""
        return {}

    @abstractmethod
    def vectors(self, slots: NDArray[np.int64]) -> NDArray[np.float32]:
        """Slots ``(m,)`` -> vectors ``(m, width)``."""

    def check(self, fields: int) -> None:
        """Raise :class:`ArtifactError` unless every array has the type and the shape that the settings ask for."""
        if self.layout not in layouts.NAMES or self.storage not in get_args(Storage):
            raise ArtifactError(
                f"Block {self.name!r} must have a layout of {layouts.NAMES} and a storage of {get_args(Storage)}, "
                f"but has {self.layout!r} and {self.storage!r}; update PocketRec."
            )
        if self.rows < 0 or self.width < 1 or self.left < 0 or not self.sound():
            raise ArtifactError(f"Block {self.name!r} has an impossible shape: {self.to_json()}.")
        expected = self._expected()
        for name, (dtype, shape) in expected.items():
            self.check_array(name, dtype, shape)
        if set(self.arrays) != set(expected) or ("slots" not in self.arrays and self.rows > self.slots):
            raise ArtifactError(f"Block {self.name!r} has other arrays or rows than its layout: {self.to_json()}.")

    def positions(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """File rows ``(m,)`` -> slots, or -1 outside the block."""
        local = rows - self.start
        inside = (local >= 0) & (local < self.rows)
        if "slots" in self.arrays and self.rows:
            local = self.arrays["slots"][np.where(inside, local, 0)].astype(np.int64)
        return np.where(inside, local, -1)

    def read(self, positions: NDArray[np.int64], fields: NDArray[np.int32], out: NDArray[np.float32]) -> None:
        """Write the vectors of slots ``positions (m,)`` over ``out (m, width)``; each distinct one is computed once."""
        distinct, place = np.unique(positions, return_inverse=True)
        out[...] = self.vectors(distinct)[place]

    def _expected(self) -> dict[str, tuple[type[np.generic], tuple[int, ...]]]:
        expected: dict[str, tuple[type[np.generic], tuple[int, ...]]] = dict(self.plain())
        for name, shape in self.factors().items():
            expected[name] = (DTYPES[self.storage], shape)
            if self.storage == "int8":
                expected[f"{name}_scale"] = (np.float32, (min(shape),))
        if "slots" in self.arrays:
            expected["slots"] = (np.uint32, (self.rows,))
        return expected

    def factor(self, name: str, rows: NDArray[np.int64] | slice = slice(None)) -> NDArray[np.float32]:
        """Rows of a matrix as float32."""
        stored = self.arrays[name]
        values = stored[rows].astype(np.float32)
        if self.storage == "int8":
            scale = self.arrays[f"{name}_scale"]
            values *= scale if _scale_axis(_shape(stored)) == 0 else scale[rows, None]
        return values


def whole(settings: Mapping[str, Any], *names: str) -> bool:
    """Whether these settings are there, and are integers of at least 1 that no file exceeds."""
    return all(type(settings.get(name)) is int and 1 <= settings[name] < 2**40 for name in names)
