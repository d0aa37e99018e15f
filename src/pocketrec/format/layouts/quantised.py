"""Layout ``quantised``: every entry as a code of a few bits between the least and the largest value around it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pocketrec.errors import ArtifactError
from pocketrec.format.block import FileBlock

BITS = range(2, 9)


def code_bytes(width: int, bits: int) -> int:
    """Bytes of one row of codes."""
    return -(-width * bits // 8)


def pack_codes(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Codes ``(m, width)`` below ``2^bits`` -> bytes ``(m, ceil(width * bits / 8))``, least significant bit first."""
    unpacked = np.unpackbits(codes[..., None], axis=2, count=bits, bitorder="little")
    return np.packbits(unpacked.reshape(len(codes), codes.shape[1] * bits), axis=1, bitorder="little")


def unpack_codes(packed: NDArray[np.uint8], width: int, bits: int) -> NDArray[np.uint8]:
    """What :func:`pack_codes` packed, ``(m, width)``."""
    unpacked = np.unpackbits(packed, axis=1, count=width * bits, bitorder="little").reshape(len(packed), width, bits)
    return np.packbits(unpacked, axis=2, bitorder="little")[..., 0]


@dataclass(frozen=True)
class QuantisedBlock(FileBlock):
    """Entry ``(i, c)`` of field ``f`` is ``low[f, c] + code * step[f, c]``; every row of the block's range is stored.

    Arrays: ``codes (rows, ceil(width * bits / 8))`` uint8, ``low`` and ``step (F, width)`` float32.
    """

    bits: int

    def check(self, fields: int) -> None:
        """Raise :class:`ArtifactError` unless every array has the type and the shape that the layout asks for."""
        if type(self.bits) is not int or self.bits not in BITS or self.rows < 0 or self.width < 1 or self.left < 0:
            raise ArtifactError(f"Block {self.name!r} has an impossible shape: {self.to_json()}.")
        table = (np.float32, (fields, self.width))
        expected = {
            "codes": (np.uint8, (self.rows, code_bytes(self.width, self.bits))), "low": table, "step": table,
        }  # fmt: skip
        for name, (dtype, shape) in expected.items():
            self.check_array(name, dtype, shape)

    def read(self, positions: NDArray[np.int64], fields: NDArray[np.int32], out: NDArray[np.float32]) -> None:
        """Write the entries of ``positions (m,)`` over ``out (m, width)``."""
        codes = unpack_codes(self.arrays["codes"][positions], self.width, self.bits)
        out[...] = codes.astype(np.float32) * self.arrays["step"][fields] + self.arrays["low"][fields]
