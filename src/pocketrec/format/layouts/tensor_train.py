"""Layout ``tensor_train``: the vector of a slot is a product of one slice of each of a few cores.

With ``n = prod n_k`` at least the number of slots and ``d = prod d_k`` columns, slot ``i`` has digits
``i_k = (i div prod_{l>k} n_l) mod n_k``, and its vector is ``G_1[i_1] G_2[i_2] ... G_T[i_T]``, read as an array of
``d_1 x ... x d_T``; slice ``G_k[i_k]`` has the shape ``(r_{k-1}, d_k, r_k)``, ``r_0 = r_T = 1``.
"""

from __future__ import annotations

import math
from functools import cache, cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pocketrec.format.block import Storage
from pocketrec.format.computed import ComposedBlock, Shape, factor_bytes, whole

HALF_BYTES = 64 << 20
"""The product of the first half of the cores is kept in memory up to this size."""

_CHUNK, _SMALL_CHUNK = 4096, 128


def core_shapes(rows: tuple[int, ...], widths: tuple[int, ...], ranks: tuple[int, ...]) -> list[Shape]:
    """Shape ``(n_k, r_{k-1} d_k r_k)`` of each core.

    Example:
        >>> core_shapes((3, 4), (2, 2), (5,))
        [(3, 10), (4, 10)]
    """
    every = (1, *ranks, 1)
    return [(n, left * d * right) for n, d, (left, right) in zip(rows, widths, pairwise(every), strict=True)]


def train_bytes(shapes: list[Shape], cached: int, width: int, storage: Storage) -> int:
    """Bytes of cores, cached rows and the slots of these."""
    cache_bytes = factor_bytes((cached, width), storage) + 4 * cached if cached else 0
    return sum(factor_bytes(shape, storage) for shape in shapes) + cache_bytes


def row_factors(rows: int, count: int) -> tuple[int, ...]:
    """``count`` numbers with a product of at least ``rows``, as equal as can be.

    Of all factorisations of ``rows`` rounded up to a multiple of 1, 10, 100 ..., the one whose shares have the largest
    entropy; in rising order, but for four (first, third, second, fourth).

    Example:
        >>> row_factors(1_086_810, 3), row_factors(29_858, 3), row_factors(31_668, 3)
        ((125, 125, 128), (25, 30, 40), (28, 29, 39))
    """
    powers = [10**j for j in range(len(str(rows)))]
    rounded = sorted({-(-rows // power) * power for power in powers})
    return _ordered(max((_even_factors(n, count) for n in rounded), key=_entropy))


def width_factors(width: int, count: int) -> tuple[int, ...]:
    """``count`` numbers with the product ``width``, as equal as can be, in the order of :func:`row_factors`.

    Example:
        >>> width_factors(16, 3), width_factors(64, 3), width_factors(64, 4)
        ((2, 2, 4), (4, 4, 4), (2, 4, 2, 4))
    """
    return _ordered(_even_factors(width, count))


def _ordered(factors: tuple[int, ...]) -> tuple[int, ...]:
    if len(factors) != 4:
        return factors
    first, second, third, fourth = factors
    return first, third, second, fourth


def _entropy(factors: tuple[int, ...]) -> float:
    """Of the factors' shares of their sum; rounded, so that equal ones are equal."""
    total = sum(factors)
    return round(-sum(f / total * math.log(f / total) for f in factors), 12)


@cache
def _even_factors(number: int, count: int) -> tuple[int, ...]:
    """The factorisation of the largest entropy, rising."""
    if count == 1:
        return (number,)
    divisors = [k for k in range(1, math.isqrt(number) + 1) if number % k == 0]
    first = [k for k in divisors if k**count <= number]
    return max((tuple(sorted((k, *_even_factors(number // k, count - 1)))) for k in first), key=_entropy)


class TensorTrainBlock(ComposedBlock):
    """Cores, and rows that are stored as they are: the cache.

    Settings: ``slots``, ``rows`` (``n_k``), ``widths`` (``d_k``), ``ranks`` (``r_1 .. r_{T-1}``), ``cached``. Factors:
    ``core<k>``, and ``cache (cached, width)`` with rising ``cached_slots`` (uint32).
    """

    @property
    def slots(self) -> int:
        """Vectors that can be computed."""
        return self.settings["slots"]

    def sound(self) -> bool:
        """Whether the settings are possible at all."""
        s = self.settings
        names = ("rows", "widths", "ranks")
        listed = all(
            isinstance(s.get(n), list | tuple) and all(type(v) is int and 0 < v < 2**31 for v in s[n]) for n in names
        )
        if not (listed and whole(s, "slots") and type(s.get("cached")) is int and 0 <= s["cached"] <= s["slots"]):
            return False
        rows, widths, ranks = (s[n] for n in names)
        even = 2 <= len(rows) == len(widths) == len(ranks) + 1
        return even and math.prod(rows) >= s["slots"] and math.prod(widths) == self.width

    def factors(self) -> dict[str, Shape]:
        """Shapes of the cores and of the cache."""
        s = self.settings
        shapes = core_shapes(tuple(s["rows"]), tuple(s["widths"]), tuple(s["ranks"]))
        cores = {f"core{k}": shape for k, shape in enumerate(shapes)}
        return cores | ({"cache": (s["cached"], self.width)} if s["cached"] else {})

    def plain(self) -> dict[str, tuple[type[np.generic], tuple[int, ...]]]:
        """Slots of the cached rows."""
        cached = self.settings["cached"]
        return {"cached_slots": (np.uint32, (cached,))} if cached else {}

    def vectors(self, slots: NDArray[np.int64]) -> NDArray[np.float32]:
        """Slots ``(m,)`` -> vectors ``(m, width)``."""
        if not self.settings["cached"]:
            return self._computed(slots)
        known = self.arrays["cached_slots"]
        place = np.minimum(np.searchsorted(known, slots), len(known) - 1)
        hit = known[place] == slots
        out = np.empty((len(slots), self.width), np.float32)
        out[hit] = self.factor("cache", place[hit])
        out[~hit] = self._computed(slots[~hit])
        return out

    def _computed(self, slots: NDArray[np.int64]) -> NDArray[np.float32]:
        """Vectors from the cores, in blocks of slots."""
        out = np.empty((len(slots), self.width), np.float32)
        chunk = _SMALL_CHUNK if self._left is None else _CHUNK
        for start in range(0, len(slots), chunk):
            part = slots[start : start + chunk]
            left, right = np.divmod(part, self._right_rows)
            product = self._left_of(left) @ self._right[right]
            out[start : start + len(part)] = product.reshape(len(part), self.width)
        return out

    @cached_property
    def _split(self) -> int:
        """Cores in the first half."""
        return -(-len(self.settings["rows"]) // 2)

    @cached_property
    def _right_rows(self) -> int:
        return math.prod(self.settings["rows"][self._split :])

    def _left_of(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Products of the first half of the cores, ``(m, d', r)``: from the table of all, or each one anew."""
        if self._left is not None:
            return self._left[rows]
        distinct, place = np.unique(rows, return_inverse=True)
        return self._half(range(self._split), distinct)[place]

    @cached_property
    def _left(self) -> NDArray[np.float32] | None:
        """All products of the first half of the cores, ``(n', d', r)``, if they are few enough."""
        s, split = self.settings, self._split
        count = math.prod(s["rows"][:split])
        if 4 * count * math.prod(s["widths"][:split]) * s["ranks"][split - 1] > HALF_BYTES:
            return None
        return self._half(range(split), np.arange(count))

    @cached_property
    def _right(self) -> NDArray[np.float32]:
        """All products of the second half of the cores, ``(n'', r, d'')``."""
        s, split = self.settings, self._split
        whole_half = self._half(range(split, len(s["rows"])), np.arange(self._right_rows))
        return whole_half.reshape(self._right_rows, s["ranks"][split - 1], -1)

    def _half(self, cores: range, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Products of some neighbouring cores at these mixed-radix numbers, ``(m, r_left * d, r_right)``."""
        ranks = (1, *self.settings["ranks"], 1)
        first, *others = cores
        digit, *digits = np.unravel_index(rows, [self.settings["rows"][k] for k in cores])
        result = self.factor(f"core{first}", digit).reshape(len(rows), -1, ranks[first + 1])
        for k, digit in zip(others, digits, strict=True):
            result = result @ self.factor(f"core{k}", digit).reshape(len(rows), ranks[k], -1)
            result = result.reshape(len(rows), -1, ranks[k + 1])
        return result
