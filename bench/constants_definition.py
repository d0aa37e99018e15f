"""Where the numbers of ``constants.bin`` come from. ``python bench/constants_definition.py FILE`` writes it.

Nothing reads this module but the test that compares: processors may differ in the last digit of what is computed here,
and the bytes of ``constants.bin`` are what files mean.
"""

from __future__ import annotations

import math
import sys
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pocketrec.files import atomic_write
from pocketrec.format.arrays import buffer, header

MOST_BITS = 8
"""Bits of the finest quantiser."""
TRELLISES = (
    (1, 4, 10, 7),
    (1, 2, 10, 5),
    (2, 3, 10, 19),
    (1, 1, 10, 19),
    (3, 2, 10, 21),
    (2, 1, 10, 10),
    (3, 1, 10, 20),
    (4, 1, 12, 28),
    (6, 1, 6, 0),
    (8, 1, 8, 0),
)
"""Bits, span, memory and seed of each code; the seed is one of the best of some dozens for a normal variable."""

_REFINEMENTS = 200
_STEPS = 2**14
"""All numbers are multiples of ``1 / _STEPS``."""


def tables() -> dict[str, NDArray[np.float32]]:
    """All arrays of the file by name."""
    found = {"levels": np.concatenate([levels(bits) for bits in range(MOST_BITS + 1)])}
    return found | {f"trellis.{n}": trellis(*code) for n, code in enumerate(TRELLISES, start=1)}


def write(path: Path) -> None:
    """Write the file; the same numbers are the same bytes."""
    arrays = tables()
    prefix, order = header(arrays, {"constants": 1})
    atomic_write(path, b"".join([prefix, *(buffer(arrays[name]) for name in order)]))


@cache
def levels(bits: int) -> NDArray[np.float32]:
    """The ``2^bits`` levels of least mean squared error for a standard normal variable, rising: a Lloyd-Max quantiser.

    Example:
        >>> levels(1).tolist()
        [-0.79791259765625, 0.79791259765625]

    Reference: Max, "Quantizing for minimum distortion", 1960; Lloyd, "Least squares quantization in PCM", 1982.
    """
    count = 1 << bits
    found = quantiles(count) * math.sqrt(3)
    for _ in range(_REFINEMENTS if bits else 0):
        edges = [-math.inf, *((found[1:] + found[:-1]) / 2).tolist(), math.inf]
        density = np.array([math.exp(-e * e / 2) / math.sqrt(2 * math.pi) for e in edges])
        below = np.array([(1 + math.erf(e / math.sqrt(2))) / 2 for e in edges])
        found = -np.diff(density) / np.diff(below)
        found = (found - found[::-1]) / 2
    return _rounded(found)


def trellis(bits: int, span: int, memory: int, seed: int) -> NDArray[np.float32]:
    """The table of a trellis code, ``(2^memory, span)``: normal quantiles, each column in a scrambled order.

    They are shrunk to the variance that a code of the rate reproduces at best. The first step, before which there are
    only zeros, chooses between the levels of a Lloyd-Max quantiser.
    """
    if memory == bits:
        return levels(bits)[:, None]
    count = 1 << memory
    ranks = quantiles(count) * (1 - 4.0 ** (-bits / span)) ** 0.5
    found = np.empty((count, span))
    for column in range(span):
        order = np.argsort(_scramble(np.arange(count), seed * span + column), kind="stable")
        found[order, column] = ranks
    if span == 1:
        found[:: count >> bits, 0] = levels(bits)
    return _rounded(found)


@cache
def quantiles(count: int) -> NDArray[np.float64]:
    """Standard normal quantiles of ``(i + 1/2) / count``, by bisection.

    Example:
        >>> quantiles(2).round(6).tolist()
        [-0.67449, 0.67449]
    """
    return np.array([_quantile((i + 0.5) / count) for i in range(count)])


def _quantile(share: float) -> float:
    low, high = -9.0, 9.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if (1 + math.erf(middle / math.sqrt(2))) / 2 < share else (low, middle)
    return (low + high) / 2


def _scramble(numbers: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """Words that look random: multiplications and shifts modulo 2^32."""
    word = (numbers + (seed << 16)).astype(np.uint64)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        word = ((word ^ (word >> np.uint64(shift))) * np.uint64(factor)) & np.uint64(0xFFFFFFFF)
    return word ^ (word >> np.uint64(16))


def _rounded(numbers: NDArray[np.float64]) -> NDArray[np.float32]:
    return (np.rint(numbers * _STEPS) / _STEPS).astype(np.float32)


if __name__ == "__main__":
    write(Path(sys.argv[1]))
