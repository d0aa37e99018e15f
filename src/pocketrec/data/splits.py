"""Which rows train, validate and test: pure functions of the rows' positions and a seed."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from pocketrec.errors import ConfigError
from pocketrec.randomness import generator

NAMES = ("train", "valid", "test")

_ROUNDS = 6
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


def parse_ratio(text: str) -> tuple[int, int, int]:
    """Read ``"8:1:1"`` as the weights of train, valid and test."""
    parts = text.split(":")
    if len(parts) != len(NAMES) or not all(p.strip().isdigit() for p in parts) or int(parts[0]) < 1:
        raise ConfigError(f"`split` must be three whole numbers like '8:1:1', the first above 0, but got {text!r}.")
    train, valid, test = (int(p) for p in parts)
    return train, valid, test


def parse_fraction(name: str, value: float) -> Fraction:
    """The exact decimal ``value`` as written, which must lie in [0, 1)."""
    if not 0 <= value < 1:
        raise ConfigError(f"`{name}` must be at least 0 and below 1, but got {value}.")
    return Fraction(str(value))


def by_ratio(rows: int, ratio: tuple[int, int, int], seed: int) -> Callable[[NDArray[np.int64]], NDArray[np.uint8]]:
    """The split of each row position in ``[0, rows)``: 0 train, 1 valid, 2 test.

    A permutation ``p`` of the positions, made from the seed alone, sends position ``i`` to train if
    ``p(i) < floor(rows w0 / w)``, to valid if it is among the next ``floor(rows w1 / w)``, else to test
    (``w = w0 + w1 + w2``). Nothing of the size of ``rows`` is held in memory.
    """
    total = sum(ratio)
    bounds = np.cumsum([rows * ratio[0] // total, rows * ratio[1] // total])
    permute = permutation(rows, seed)
    return lambda positions: np.searchsorted(bounds, permute(positions), side="right").astype(np.uint8)


def permutation(rows: int, seed: int) -> Callable[[NDArray[np.int64]], NDArray[np.int64]]:
    """A seeded permutation of ``[0, rows)`` that is computed point by point.

    A balanced Feistel network over the smallest even number of bits that holds ``rows``; a value outside the range is
    sent through it again until it falls inside (cycle walking).
    """
    half = np.uint64((max(rows - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << int(half)) - 1)
    keys = generator(seed, "split").integers(2**64 - 1, size=_ROUNDS, dtype=np.uint64, endpoint=True)

    def network(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = x >> half, x & mask
        for key in keys:
            left, right = right, left ^ (scramble(right ^ key) & mask)
        return (left << half) | right

    def permute(positions: NDArray[np.int64]) -> NDArray[np.int64]:
        x = network(positions.astype(np.uint64))
        while (outside := np.flatnonzero(x >= np.uint64(rows))).size:
            x[outside] = network(x[outside])
        return x.astype(np.int64)

    return permute


def scramble(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The 64-bit finaliser of splitmix64."""
    x = (x ^ (x >> np.uint64(30))) * _MIX[0]
    x = (x ^ (x >> np.uint64(27))) * _MIX[1]
    return x ^ (x >> np.uint64(31))


def per_user(users: NDArray[np.int64], fraction: Fraction, seed: int, purpose: str) -> NDArray[np.bool_]:
    """Which interactions are held out: ``max(1, floor(n_u * fraction))`` random ones of each user, but never all.

    Args:
        users: ``(N,)`` user of each interaction.
        fraction: share to hold out, in [0, 1); 0 holds out nothing.
        seed: seed of the draw.
        purpose: keeps draws for different purposes apart.
    """
    if not fraction:
        return np.zeros(len(users), bool)
    noise = generator(seed, f"hold out {purpose}").random(len(users))
    order = np.lexsort((noise, users))
    counts = np.bincount(users)
    quota = np.maximum(1, counts * fraction.numerator // fraction.denominator)
    quota = np.minimum(quota, np.maximum(counts - 1, 0))
    rank = np.arange(len(users)) - (np.cumsum(counts) - counts)[users[order]]
    held = np.empty(len(users), bool)
    held[order] = rank < quota[users[order]]
    return held
