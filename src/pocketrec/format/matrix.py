"""Matrices of a head in a few bits: each row has a scale and as many bits an entry as it is worth.

Entry ``(o, i)`` is ``scale_o * level[b_o][code_oi]``, with levels as in :mod:`pocketrec.format.quantiser`; a row
of 0 bits is zero. Arrays in a file:

``bits``
    Of each row, uint8 ``(o,)``, 0 to 8.
``scale``
    Of each row that has bits, float16.
``codes``
    Row after row, least significant bit first, each row from a new byte on: uint8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketrec.errors import ArtifactError
from pocketrec.format.layouts.quantised import code_bytes, pack_codes, unpack_codes
from pocketrec.format.quantiser import MOST_BITS, levels

ROW_BYTES = 1
"""Bytes of a row without bits."""
SCALE_BYTES = 2


def row_bytes(width: int, bits: int) -> int:
    """Bytes of a row of ``width`` entries.

    Example:
        >>> [row_bytes(100, bits) for bits in (0, 1, 8)]
        [1, 16, 103]
    """
    return ROW_BYTES + (SCALE_BYTES + code_bytes(width, bits) if bits else 0)


@dataclass(frozen=True)
class CodedMatrix:
    """A matrix as its rows are coded.

    Attributes:
        width: entries of a row.
        bits: uint8 ``(o,)``.
        scale: float16, one for each row with bits.
        codes: uint8.
    """

    width: int
    bits: NDArray[np.uint8]
    scale: NDArray[np.float16]
    codes: NDArray[np.uint8]

    @classmethod
    def encode(cls, codes: NDArray[np.uint8], bits: NDArray[np.uint8], scale: NDArray[np.float16]) -> CodedMatrix:
        """From codes ``(o, i)`` below ``2^bits`` of their row, and bits and scale of all rows ``(o,)``."""
        parts = [
            pack_codes(row[None], int(b))[0] if b else np.empty(0, np.uint8) for row, b in zip(codes, bits, strict=True)
        ]
        return cls(codes.shape[1], bits, scale[bits > 0], np.concatenate([np.empty(0, np.uint8), *parts]))

    @classmethod
    def from_arrays(cls, width: int, arrays: Mapping[str, NDArray[Any]]) -> CodedMatrix:
        """Read what ``arrays`` wrote; anything that does not fit raises :class:`ArtifactError`."""
        bits, scale, codes = (arrays[name] for name in ("bits", "scale", "codes"))
        typed = (bits.dtype, scale.dtype, codes.dtype) == (np.uint8, np.float16, np.uint8)
        flat = all(a.ndim == 1 for a in (bits, scale, codes))
        if not typed or not flat or type(width) is not int or width < 1 or (bits > MOST_BITS).any():
            raise ArtifactError("A coded matrix must have bits of 0 to 8 (uint8), float16 scales and uint8 codes.")
        sizes = _sizes(width)[bits]
        if scale.size != np.count_nonzero(bits) or codes.size != sizes.sum():
            raise ArtifactError(
                f"A coded matrix of {len(bits)} rows needs {np.count_nonzero(bits)} scales and {sizes.sum()} bytes of "
                f"codes, but has {scale.size} and {codes.size}."
            )
        return cls(width, bits, scale, codes)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What a file holds."""
        return {"bits": self.bits, "codes": self.codes, "scale": self.scale}

    def decoded(self) -> NDArray[np.float32]:
        """The matrix ``(o, i)``."""
        out = np.zeros((len(self.bits), self.width), np.float32)
        starts = np.concatenate([[0], np.cumsum(_sizes(self.width)[self.bits])])
        scales = np.zeros(len(self.bits), np.float32)
        scales[self.bits > 0] = self.scale
        for bits in range(1, MOST_BITS + 1):
            rows = np.flatnonzero(self.bits == bits)
            size = code_bytes(self.width, bits)
            packed = self.codes[starts[rows, None] + np.arange(size)]
            out[rows] = levels(bits)[unpack_codes(packed, self.width, bits)] * scales[rows, None]
        return out


def _sizes(width: int) -> NDArray[np.int64]:
    """Bytes of a row's codes by its bits."""
    return np.array([code_bytes(width, bits) if bits else 0 for bits in range(MOST_BITS + 1)])
