"""Layout ``hash_mlp``: the vector of a slot is what a small network says of a dense hash code of the slot.

Hash ``j`` of slot ``i`` is ``h_j = ((a_j (i + 1) + b_j) mod p_j) mod buckets`` with ``0 < a_j < 10^9``,
``0 <= b_j < 10^9`` and a prime ``p_j`` in ``(16 buckets, 17 buckets)``, all drawn from the salt. A ``uniform`` code is
``2 h_j / (buckets - 1) - 1``; a ``gaussian`` one turns pairs ``(u, v) = (h + 1) / buckets`` into normal numbers
``sqrt(-2 ln u) (cos, sin)(2 pi v)``.
"""

from __future__ import annotations

import math
from functools import cache, cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketrec.format.block import Storage
from pocketrec.format.computed import ComposedBlock, Shape, factor_bytes, whole

CODES = ("uniform", "gaussian")
ENDS = ("linear", "mish", "mish_affine")
_SPAN = 10**9
_GOLDEN = 0x9E3779B97F4A7C15
_CHUNK, _HASHED_TOGETHER = 2048, 128


@cache
def constants(functions: int, buckets: int, salt: int) -> tuple[NDArray[np.int64], ...]:
    """``a``, ``b`` and ``p`` of each hash function, ``(functions,)`` each.

    Example:
        >>> [column.shape for column in constants(4, 1000, salt=1)]
        [(4,), (4,), (4,)]
    """
    words = _words(salt, 3 * functions)
    primes = _primes(buckets)
    a, b, p = words.reshape(3, functions)
    return (
        (a % np.uint64(_SPAN - 1)).astype(np.int64) + 1,
        (b % np.uint64(_SPAN)).astype(np.int64),
        primes[(p % np.uint64(len(primes))).astype(np.int64)],
    )


def hashes(slots: NDArray[np.int64], functions: int, buckets: int, salt: int) -> NDArray[np.float64]:
    """``h_j`` of slots ``(m,)``: whole numbers ``(m, functions)`` in ``[0, buckets)``.

    In float64, where all products are exact: ``p (i + 2) < 2^53`` for every slot below :func:`most_slots`.
    """
    a, b, p = constants(functions, buckets, salt)
    prime = p.astype(np.float64)
    value = np.multiply.outer(slots.astype(np.float64) + 1, (a % p).astype(np.float64))
    value += (b % p).astype(np.float64)
    value -= np.floor(value / prime) * prime
    value += np.where(value < 0, prime, 0)
    value -= np.where(value >= prime, prime, 0)
    value -= np.floor(value / buckets) * buckets
    return value


def most_slots(buckets: int) -> int:
    """The slots that can be hashed exactly.

    Example:
        >>> most_slots(1_000_000)
        529835248
    """
    return 2**53 // (17 * buckets) - 2


def codes(slots: NDArray[np.int64], functions: int, buckets: int, salt: int, kind: str) -> NDArray[np.float32]:
    """Dense codes of slots ``(m,)``, ``(m, functions)``."""
    found = np.empty((len(slots), functions), np.float32)
    for start in range(0, len(slots), _HASHED_TOGETHER):
        part = hashes(slots[start : start + _HASHED_TOGETHER], functions, buckets, salt)
        code = 2 * part / (buckets - 1) - 1 if kind == "uniform" else _normal(part, buckets)
        found[start : start + _HASHED_TOGETHER] = code
    return found


def network_bytes(widths: tuple[int, ...], end: str, storage: Storage) -> int:
    """Bytes of a network with layers ``widths[0] -> widths[1] -> ...``."""
    layers = sum(factor_bytes(shape, storage) + 4 * shape[1] for shape in pairwise(widths))
    return layers + (8 * widths[-1] if end == "mish_affine" else 0)


def mish(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """``x tanh(ln(1 + e^x))``."""
    return x * np.tanh(np.logaddexp(np.float32(0), x))


class HashMlpBlock(ComposedBlock):
    """``e_i = f(code(i))`` with linear layers and Mish between them, normalisation folded in.

    Settings: ``slots``, ``functions``, ``buckets``, ``salt``, ``code``, ``hidden`` (widths), ``end`` (what follows the
    last layer: nothing, Mish, or Mish and then ``gain`` and ``shift``), perhaps ``hot``. Factors: ``weight<l>
    (in, out)``; float32 ``bias<l> (out,)``; rising ``hot (hot,)`` (uint32), slots whose vectors are computed at the
    first look-up and stay in memory.
    """

    @property
    def slots(self) -> int:
        """Vectors that can be computed."""
        return self.settings["slots"]

    @property
    def widths(self) -> tuple[int, ...]:
        """Widths from the code to the vector."""
        return (self.settings["functions"], *self.settings["hidden"], self.width)

    def sound(self) -> bool:
        """Whether the settings are possible at all."""
        s = self.settings
        hidden = s.get("hidden")
        known = s.get("code") in CODES and s.get("end") in ENDS
        numbers = whole(s, "slots", "functions", "salt") and whole(s, "buckets") and 2 <= s["buckets"] <= 10**7
        listed = isinstance(hidden, list | tuple) and all(type(w) is int and 0 < w < 2**31 for w in hidden)
        numbers = numbers and s["slots"] <= most_slots(s["buckets"])
        numbers = numbers and type(hot := s.get("hot", 0)) is int and 0 <= hot <= s["slots"]
        return known and numbers and listed and (s["code"] == "uniform" or s["functions"] % 2 == 0)

    def factors(self) -> dict[str, Shape]:
        """Shapes of the layers."""
        return {f"weight{i}": shape for i, shape in enumerate(pairwise(self.widths))}

    def plain(self) -> dict[str, tuple[type[np.generic], tuple[int, ...]]]:
        """Biases, and what may follow the last layer."""
        plain: dict[str, Any] = {f"bias{i}": (np.float32, (w,)) for i, w in enumerate(self.widths[1:])}
        if self.settings["end"] == "mish_affine":
            plain |= {name: (np.float32, (self.width,)) for name in ("gain", "shift")}
        if hot := self.settings.get("hot", 0):
            plain["hot"] = (np.uint32, (hot,))
        return plain

    def vectors(self, slots: NDArray[np.int64]) -> NDArray[np.float32]:
        """Slots ``(m,)`` -> vectors ``(m, width)``; those of hot slots from memory."""
        if "hot" not in self.arrays:
            return self._computed(slots)
        known = self.arrays["hot"]
        place = np.minimum(np.searchsorted(known, slots), len(known) - 1)
        hit = known[place] == slots
        out = np.empty((len(slots), self.width), np.float32)
        out[hit] = self._kept[place[hit]]
        out[~hit] = self._computed(slots[~hit])
        return out

    @cached_property
    def _kept(self) -> NDArray[np.float32]:
        """Vectors of the hot slots."""
        return self._computed(self.arrays["hot"].astype(np.int64))

    def _computed(self, slots: NDArray[np.int64]) -> NDArray[np.float32]:
        """Vectors by the network."""
        s = self.settings
        layers = [(self.factor(f"weight{i}"), self.arrays[f"bias{i}"]) for i in range(len(self.widths) - 1)]
        out = np.empty((len(slots), self.width), np.float32)
        for start in range(0, len(slots), _CHUNK):
            x = codes(slots[start : start + _CHUNK], s["functions"], s["buckets"], s["salt"], s["code"])
            for i, (weight, bias) in enumerate(layers):
                x = x @ weight + bias
                if i + 1 < len(layers) or s["end"] != "linear":
                    x = mish(x)
            out[start : start + len(x)] = x
        return out * self.arrays["gain"] + self.arrays["shift"] if s["end"] == "mish_affine" else out


def _normal(h: NDArray[np.float64], buckets: int) -> NDArray[np.float64]:
    """Box and Muller's transform of neighbouring pairs."""
    u = (h + 1) / buckets
    radius, angle = np.sqrt(-2 * np.log(u[:, ::2])), 2 * np.pi * u[:, 1::2]
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=2).reshape(h.shape)


def _words(salt: int, count: int) -> NDArray[np.uint64]:
    """SplitMix64: ``count`` 64-bit words of the stream ``salt``; the same for ever, unlike numpy's generators."""
    start = _mixed(np.array([salt], np.uint64) + np.uint64(_GOLDEN))
    return _mixed(start + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN))


def _mixed(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A permutation of the 64-bit words that leaves no trace of their order."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@cache
def _primes(buckets: int) -> NDArray[np.int64]:
    """All primes in ``(16 buckets, 17 buckets)``: so large that ``mod buckets`` favours no hash by much."""
    first, stop = 16 * buckets + 1, 17 * buckets
    small, sieve = np.ones(math.isqrt(stop) + 1, dtype=bool), np.ones(stop - first, dtype=bool)
    for n in range(2, len(small)):
        if small[n]:
            small[n * n :: n] = False
            sieve[max(n * n, -(-first // n) * n) - first :: n] = False
    return np.flatnonzero(sieve) + first
