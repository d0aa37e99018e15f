"""The size of a block of layout ``trellis``, and what each code of an item costs and saves."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pocketrec.format.layouts.trellis import Records, Shape
from pocketrec.format.trellis_codes import rate_bits

DISTORTION = np.array([1.0, 0.783, 0.594, 0.475, 0.33, 0.174, 0.098, 0.0287, 0.0084, 6.4e-4, 4.1e-5])
"""Share of a normal variable's energy that is left by each code, none first, as measured with ``BEAMS`` beams."""

PLACE_BITS = 13
"""About the binary logarithm of the number of items that users are sums of."""

Floats = NDArray[np.float32]

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class TrellisPlan:
    """All that the size of a block depends on.

    Attributes:
        shape: of the block.
        classes: of the items, uint8 ``(I,)``.
    """

    shape: Shape
    classes: NDArray[np.uint8]

    @property
    def counts(self) -> Ints:
        """Items of each class."""
        return np.bincount(self.classes, minlength=len(self.shape.rates))

    def size_bytes(self, width: int) -> int:
        """Bytes of the block."""
        return self.shape.size_bytes(width, self.counts)

    def blank(self, width: int) -> Records:
        """Records of the right size that say nothing."""
        users, items, steps = self.shape.users, self.shape.items, width
        byte = np.uint8
        candidates = np.flatnonzero(self.classes >= self.shape.first)
        return Records(
            classes=self.classes,
            gains=np.zeros(items, byte),
            shapes=np.zeros(items, np.uint16),
            item_scales=np.zeros(items, byte),
            item_codes=np.zeros((items, steps), byte),
            atoms=np.full((users, self.shape.atoms), candidates[0] if len(candidates) else 0),
            user_scales=np.zeros(users, byte),
            user_codes=np.zeros((users, steps), byte),
            centroids=np.zeros((1 << self.shape.shapes, width), byte),
            scales=np.zeros(7 + self.shape.atoms, np.float32),
        )


class ItemCosts:
    """Items, and what each code costs them.

    Args:
        weights: loss of each item without a code, ``(I,)``.
        blur: of each item, as :meth:`GainShape._blur` says, ``(I,)``.
        width: columns.
    """

    def __init__(self, weights: NDArray[np.float64], blur: NDArray[np.float64], width: int) -> None:
        self.weights = weights
        self.bits = np.array([rate_bits(rate, width) for rate in range(len(DISTORTION))], np.int64)
        top = max(float(weights.max(initial=0)), 1e-30)
        points = []
        for price in top * 2.0 ** -np.arange(0, 40):
            taken = self._take(price, np.arange(len(self.bits)))
            loss = float((weights * DISTORTION[taken]).sum())
            points.append((int(self.bits[taken].sum()), loss, float(blur @ DISTORTION[taken])))
        self.points = np.array(points, np.float64)

    def _take(self, price: float, rates: Ints) -> Ints:
        """The rate of least loss and price for each item, among ``rates``."""
        costs = self.weights[:, None] * DISTORTION[rates] + price * self.bits[rates]
        return rates[costs.argmin(axis=1)]

    def expected(self, room: float) -> tuple[float, float]:
        """Loss of the items in about so many bits, and what is left of the rest of those that users are sums of."""
        bits, loss, blur = self.points.T
        return float(np.interp(room, bits, loss)), float(np.interp(room, bits, blur))

    def spend(self, room: int, most: int) -> tuple[tuple[int, ...], NDArray[np.uint8], float]:
        """Rates of at most so many classes, classes of items within ``room`` bits, and their loss."""
        rates = np.arange(len(self.bits))
        if most == 1:
            rates = rates[self.bits * len(self.weights) <= room][-1:]
        while len(rates) > most:
            price = self._price(room, rates)
            costs = self.weights[:, None] * DISTORTION[rates] + price * self.bits[rates]
            without = [np.delete(costs, i, axis=1).min(axis=1).sum() for i in range(1, len(rates))]
            rates = np.delete(rates, 1 + int(np.argmin(without)))
        taken = self._fill(room, rates, self._price(room, rates))
        classes = np.searchsorted(rates, taken).astype(np.uint8)
        return tuple(rates.tolist()), classes, float((self.weights * DISTORTION[taken]).sum())

    def _price(self, room: int, rates: Ints) -> float:
        """The least price at which ``room`` is enough."""
        low, high = -60.0, 2.0
        top = max(float(self.weights.max(initial=0)), 1e-30)
        if self.bits[self._take(top * 2.0**low, rates)].sum() <= room:
            return top * 2.0**low
        while high - low > 1e-7:
            middle = (low + high) / 2
            if self.bits[self._take(top * 2.0**middle, rates)].sum() <= room:
                high = middle
            else:
                low = middle
        return top * 2.0**high

    def _fill(self, room: int, rates: Ints, price: float) -> Ints:
        """Rates at the price, and better ones for what room is left, item after item by what they gain."""
        taken = self._take(price, rates)
        room -= int(self.bits[taken].sum())
        place = np.searchsorted(rates, taken)
        better = rates[np.minimum(place + 1, len(rates) - 1)]
        extra = self.bits[better] - self.bits[taken]
        gain = self.weights * (DISTORTION[taken] - DISTORTION[better]) / np.maximum(extra, 1)
        step = int(np.diff(self.bits[rates]).min(initial=1 << 30))
        for item in np.argsort(-gain, kind="stable").tolist():
            if room < step:
                break
            if 0 < extra[item] <= room:
                room -= int(extra[item])
                taken[item] = better[item]
        return taken


def number_bits(count: int) -> int:
    """Bits of a number below ``count``."""
    return max(count - 1, 0).bit_length()


def atom_threshold(counts: Ints, places: int | None) -> tuple[int, int]:
    """The first class whose items users are sums of, and the bits of their numbers, more than ``places`` if need be.

    They are about ``2^PLACE_BITS``, or at most ``2^places``.
    """
    above = np.cumsum(counts[::-1])[::-1]
    if places is None:
        first = int(np.abs(np.log2(np.maximum(above, 0.5)) - PLACE_BITS).argmin())
        return first, number_bits(int(above[first]))
    fitting = np.flatnonzero((above <= 1 << places) & (above > 0))
    first = int(fitting[0]) if len(fitting) else int(np.flatnonzero(above)[-1])
    return first, max(places, number_bits(int(above[first])))
