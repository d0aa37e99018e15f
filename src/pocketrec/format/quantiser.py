"""The best quantiser of a normal variable: its levels, and which of them is nearest."""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from pocketrec.format import constants

MOST_BITS = 8

_COMPARED_BITS = 3
"""Up to so many bits, comparing with every edge is the fastest."""
_CELLS, _REACH = 4096, 6.0


@cache
def levels(bits: int) -> NDArray[np.float32]:
    """The ``2^bits`` levels of least mean squared error for a standard normal variable, rising: a Lloyd-Max quantiser.

    They are multiples of 2^-14, and are read from ``constants.bin``, so that every machine has the same.

    Example:
        >>> levels(1).tolist()
        [-0.79791259765625, 0.79791259765625]

    Reference: Max, "Quantizing for minimum distortion", 1960; Lloyd, "Least squares quantization in PCM", 1982.
    """
    return constants.levels(bits)


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
def positive_levels() -> NDArray[np.float32]:
    """Zero, and the positive levels of ``b`` bits from ``2^(b - 1)`` on, so that a code is the place of its level."""
    return np.concatenate([levels(bits)[len(levels(bits)) // 2 :] for bits in range(MOST_BITS + 1)])


@cache
def level_table() -> NDArray[np.float32]:
    """All levels: those of ``b`` bits from ``2^b - 1`` on."""
    return np.concatenate([levels(bits) for bits in range(MOST_BITS + 1)])
