"""Rate-distortion allocation: which rows get how many bits along which directions, under an exact budget.

Each field is brought into coordinates ``u`` in which the expected loss of an error is ``sum_j w_j du_j^2`` times the
row's weight, by whitening with the metric of the gradients and then taking principal axes (a Karhunen-Loeve transform).
There, reverse water-filling tells the bits of a coordinate of variance ``v_j`` at the water level ``theta``: the next
bit is bought as long as it lowers ``w_j v_j D(b)`` by ``theta``, where ``D(b)`` is the error of the best quantiser of
``b`` bits. Each level of a grid is an *option* for the rows of a field; up to seven of them become its classes, and
each row takes the class of least ``distortion + lambda * bits``, or none. ``lambda`` follows from the budget. The
finest options code leading directions twice, in 8 bits and 8 bits of what they leave.

Reference: Cover and Thomas, "Elements of Information Theory", 2006, theorem 10.3.3 (reverse water-filling); Shoham and
Gersho, "Efficient bit allocation for an arbitrary set of quantizers", 1988 (the Lagrangian).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pocketrec.format.planes import GROUP, MOST_PLANES
from pocketrec.format.quantiser import MOST_BITS, edges, levels, nearest
from pocketrec.format.sections import MOST_DIRECTIONS, Section, coder

Rate = Literal["bits", "values"]
"""What is paid for: bits of the file, or coded scalars."""

RIDGE = 1e-2
"""Share of a metric's mean eigenvalue that every direction has at least."""

MOST_CLASSES = (1 << MOST_PLANES) - 1
"""Classes of rows in a field; a number is left for rows of which nothing is stored."""

_WATER_LEVELS = 24
_SAMPLE_ROWS = 4096
_REFITS = 4
_ATTEMPTS = 8
_OFFSET_BITS = 32 / GROUP
_LEAST, _MOST = -120.0, 60.0
_NEAR = 2.0
"""How far, as a power of two, the price by all rows may be from the price by samples before it is sought everywhere."""

Floats = NDArray[np.float32]


def distortion(bits: int) -> float:
    """Mean squared error of the best quantiser of ``bits`` bits for a standard normal variable.

    Example:
        >>> [round(distortion(b), 4) for b in range(4)]
        [1.0, 0.3634, 0.1175, 0.0345]
    """
    x = np.linspace(-9, 9, 1 << 15)
    share = np.exp(-x * x / 2)
    error = x - levels(bits)[np.searchsorted(edges(bits), x)]
    return float((share * error * error).sum() / share.sum())


_DISTORTION = np.array([distortion(b) for b in range(MOST_BITS + 1)])
_LEFT = np.float32(np.sqrt(_DISTORTION[-1]))
"""What the most bits leave of a coordinate's root mean square."""


def water_bits(energy: NDArray[np.floating], theta: float) -> NDArray[np.int64]:
    """Bits of coordinates of weighted variance ``energy (k,)``: each bit lowers the distortion by ``theta`` or more.

    Example:
        >>> water_bits(np.array([4.0, 1.0, 0.1]), 0.2)
        array([3, 2, 0])
    """
    gains = energy[:, None] * -np.diff(_DISTORTION)
    return (gains >= theta).sum(axis=1)


@dataclass(frozen=True)
class FieldCoordinates:
    """The rows of one field that may be coded, in coordinates of independent errors.

    Attributes:
        rows: their ids, ``(m,)``.
        hashed: whether a row of which nothing is stored takes no place in the file.
        weight: of each row in the loss, ``(m,)``.
        basis: directions of the coordinates, int8 ``(D, D)``, the one of most energy first.
        gain: loss of a squared error in each coordinate, ``(D,)``.
        coefficients: the rows' residuals in this basis, ``(m, D)``.
    """

    rows: NDArray[np.int64]
    hashed: bool
    weight: Floats
    basis: NDArray[np.int8]
    gain: Floats
    coefficients: Floats

    @classmethod
    def of(
        cls, rows: NDArray[np.int64], hashed: bool, residuals: Floats, weight: Floats, metric: NDArray[np.floating]
    ) -> FieldCoordinates:
        """Choose the basis for ``residuals (m, D)``, whose errors ``e`` cost ``weight * e^T metric e``."""
        axes = principal_axes(residuals, weight, metric)
        top = np.abs(axes).max(axis=0)
        basis = np.rint(axes.T / np.where(top > 0, top, 1)[:, None] * 127).astype(np.int8)
        exact = basis.astype(np.float64)
        gain = np.einsum("ki,ij,kj->k", exact, metric, exact)
        coefficients = np.asfortranarray(residuals @ np.linalg.inv(exact).astype(np.float32))
        return cls(rows, hashed, weight, basis, gain.astype(np.float32), coefficients)

    @cached_property
    def spread(self) -> Floats:
        """Root mean square of each coordinate over the weighted rows, ``(D,)``."""
        total = max(float(self.weight.sum(dtype=np.float64)), 1e-30)
        return np.sqrt((self.weight @ np.square(self.coefficients)) / np.float32(total)) + np.float32(1e-20)

    @cached_property
    def lost(self) -> Floats:
        """Loss of each row of which nothing is stored, ``(m,)``."""
        return self.weight * (np.square(self.coefficients) @ self.gain)

    def options(self, rate: Rate) -> NDArray[np.int64]:
        """Bits of the coordinates, and of what these bits leave, at each water level, ``(O, 2 D)``.

        For values, the first coordinates have 8 bits.
        """
        width = len(self.gain)
        counts = np.unique(np.rint(np.linspace(1, width, min(width, _WATER_LEVELS))).astype(int))[:, None]
        if rate == "values":
            return np.where(np.arange(2 * width) < counts, MOST_BITS, 0)
        energy = self.gain * np.square(self.spread)
        thetas = energy.max() * 2.0 ** -np.arange(1, _WATER_LEVELS)
        found = [water_bits(energy, theta) for theta in thetas if theta > 0]
        single = np.unique([b for b in found if b.any()] + [np.full(width, MOST_BITS)], axis=0)
        single = np.pad(single, ((0, 0), (0, width)))
        if 2 * width > MOST_DIRECTIONS:
            return single
        return np.concatenate([single, np.where(np.arange(2 * width) < width + counts, MOST_BITS, 0)])

    def market(self, rate: Rate, row_bits: float) -> _RowCosts:
        """What each option costs a sample of the rows; worked out once."""
        known = self._markets
        if (rate, row_bits) not in known:
            known[rate, row_bits] = _RowCosts(self, rate, row_bits)
        return known[rate, row_bits]

    @cached_property
    def _markets(self) -> dict[tuple[Rate, float], _RowCosts]:
        return {}

    def sample(self) -> FieldCoordinates:
        """Every so-many-th row."""
        step = -(-len(self.rows) // _SAMPLE_ROWS)
        if step <= 1:
            return self
        part = slice(None, None, step)
        weight, coefficients = self.weight[part], np.asfortranarray(self.coefficients[part])
        return FieldCoordinates(self.rows[part], self.hashed, weight, self.basis, self.gain, coefficients)


def principal_axes(residuals: Floats, weight: Floats, metric: NDArray[np.floating]) -> NDArray[np.float64]:
    """Directions ``A (D, D)`` in its columns, with ``A^T metric A = 1`` and uncorrelated coordinates, largest first.

    ``metric`` gets a ridge, so that directions without any gradient keep a small price.
    """
    width = len(metric)
    ridge = RIDGE * max(float(np.trace(metric)), 1e-30) / width
    values, vectors = np.linalg.eigh(np.asarray(metric, np.float64) + ridge * np.eye(width))
    root = np.sqrt(np.maximum(values, 1e-300))
    white = residuals.astype(np.float64) @ (vectors * root)
    _, turn = np.linalg.eigh((white * weight[:, None]).T @ white)
    return (vectors / root) @ turn[:, ::-1]


@dataclass(frozen=True)
class Assignment:
    """Rows of a field in their classes.

    Attributes:
        section: how the field is coded.
        classes: class number of each row, ``(m,)``; -1 where nothing is stored.
        codes: ``(m, k)``.
    """

    section: Section
    classes: NDArray[np.int8]
    codes: NDArray[np.uint8]


class _RowCosts:
    """A sample of a field's rows, and what each option costs them."""

    def __init__(self, source: FieldCoordinates, rate: Rate, row_bits: float) -> None:
        part = source.sample()
        self.source = source
        self.rate: Rate = rate
        self.share = len(source.rows) / max(len(part.rows), 1)
        self.bits = part.options(rate)
        self.spread = source.spread
        rests = [part.coefficients - _rounded(part.coefficients, self.spread, b) for b in range(MOST_BITS + 1)]
        rests.append(rests[-1] - _rounded(rests[-1], self.spread * _LEFT, MOST_BITS))
        errors = np.square(np.stack(rests)) * part.gain
        columns = np.arange(part.coefficients.shape[1])
        finest = self.bits[:, : len(columns)] + (self.bits[:, len(columns) :] > 0)
        self.loss = np.stack([part.weight * errors[b, :, columns].sum(axis=0) for b in finest])
        self.lost = part.lost
        self.price = self.bits.sum(axis=1) if rate == "bits" else np.count_nonzero(self.bits, axis=1)
        self.row_bits = row_bits if source.hashed and rate == "bits" else 0.0
        self.part = part

    def overhead(self, chosen: Sequence[int]) -> float:
        """Bits of the section's tables."""
        if not chosen or self.rate == "values":
            return 0.0
        directions = int(np.flatnonzero(self.bits[list(chosen)].any(axis=0))[-1]) + 1
        return float(directions * (16 * len(chosen) + 8 * len(self.source.gain)))

    def choose(self, price: float) -> tuple[float, int, list[int]]:
        """The bits that they take, planes and options of least ``loss + price * bits``; worked out once."""
        if price not in self._chosen:
            self._chosen[price] = self._choose(price)
        return self._chosen[price]

    @cached_property
    def _chosen(self) -> dict[float, tuple[float, int, list[int]]]:
        return {}

    def _choose(self, price: float) -> tuple[float, int, list[int]]:
        best = self._alike(price)
        chosen: list[int] = []
        costs = self.share * (self.loss + price * (self.price[:, None] + self.row_bits))
        now = self.share * self.lost
        for _ in range(MOST_CLASSES):
            totals = np.minimum(now, costs).sum(axis=1)
            totals += price * np.array([self.overhead([*chosen, o]) for o in range(len(costs))])
            totals[chosen] = np.inf
            option = int(totals.argmin())
            if totals[option] >= now.sum() + price * self.overhead(chosen):
                break
            chosen.append(option)
            now = np.minimum(now, costs[option])
            best = min(best, self._priced(chosen, price), key=lambda found: found[0])
        return best[1:]

    def _alike(self, price: float) -> tuple[float, float, int, list[int]]:
        """Nothing of any row, or the best option for all of them without planes."""
        best = (float(self.share * self.lost.sum(dtype=np.float64)), 0.0, 0, [])
        rows = len(self.source.rows)
        if self.source.hashed or not rows:
            return best
        for option, bits in enumerate(self.price):
            size = rows * float(bits) + self.overhead([option])
            total = float(self.share * self.loss[option].sum(dtype=np.float64)) + price * size
            if total < best[0]:
                best = (total, size, 0, [option])
        return best

    def _priced(self, chosen: list[int], price: float) -> tuple[float, float, int, list[int]]:
        """Total, bits, planes and options."""
        absent = 0 if self.source.hashed else 1
        planes = max(absent, (len(chosen) + absent - 1).bit_length())
        per_row = (planes + _OFFSET_BITS * (planes > 0)) * (self.rate == "bits")
        extra = per_row + self.row_bits if self.source.hashed else 0.0
        costs = np.stack([self.lost, *(self.loss[o] + price * (self.price[o] + extra) for o in chosen)])
        taken = costs.argmin(axis=0)
        spent = np.array([0.0, *(self.price[o] + extra for o in chosen)])[taken].sum() * self.share
        spent += self.overhead(chosen) + (0.0 if self.source.hashed else per_row * len(self.source.rows))
        loss = np.stack([self.lost, *(self.loss[o] for o in chosen)])[taken, np.arange(len(taken))]
        return float(loss.sum(dtype=np.float64) * self.share + price * spent), float(spent), planes, list(chosen)

    def section(self, planes: int, chosen: Sequence[int], price: float) -> Section:
        """The section of the chosen options, the scales of each class fitted to its rows."""
        if not chosen:
            return Section(0, np.zeros((0, 0), np.uint16), np.zeros((0, len(self.source.gain)), np.int8))
        bits = self.bits[sorted(chosen, key=lambda o: (self.price[o], o))]
        directions = int(np.flatnonzero(bits.any(axis=0))[-1]) + 1
        bits = bits[:, :directions]
        spread = np.concatenate([self.spread, self.spread * _LEFT])
        scales = np.broadcast_to(spread[:directions], bits.shape).astype(np.float64)
        basis = np.concatenate([self.source.basis, self.source.basis])[:directions]
        for _ in range(_REFITS):
            coding = _Coding(self.part, Section(planes, coder(bits, scales), basis))
            taken = coding.classes(price, self.rate, self.row_bits)
            scales = scales * [coding.stretch(c, taken == c) for c in range(len(scales))]
        return Section(planes, coder(bits, scales), basis)


def _rounded(values: Floats, scales: Floats, bits: int) -> Floats:
    """Values ``(m, k)`` at the levels of so many bits, with a scale for each column."""
    return levels(bits)[nearest(values / scales, bits)] * scales


class _Coding:
    """All rows of a field under one section."""

    def __init__(self, source: FieldCoordinates, section: Section) -> None:
        self.source, self.section = source, section
        inner = source.coefficients[:, : section.coders.shape[1]]
        self.codes = [section.quantise(inner, c) for c in range(len(section.coders))]
        saved = (source.weight * self._saved(c) for c in range(len(section.coders)))
        self.loss = np.stack([source.lost, *(np.maximum(source.lost - s, 0) for s in saved)])

    def _saved(self, which: int) -> Floats:
        """Loss of each row, at a weight of 1, that a class saves against nothing: ``sum_j g_j v_j (2 u_j - v_j)``."""
        section, source = self.section, self.source
        saved, codes = np.zeros(len(source.rows), np.float32), self.codes[which]
        for j, (bits, scale, rest) in enumerate(section.walk(source.coefficients, codes, which)):
            if bits:
                values = (levels(bits) * scale)[codes[:, j]]
                saved += source.gain[j % len(source.gain)] * values * (2 * rest - values)
        return saved

    def stretch(self, which: int, rows: NDArray[np.bool_]) -> NDArray[np.float64]:
        """By what the levels of a class must be multiplied for least error of its ``rows (m,)``: ``(k,)``."""
        section, codes = self.section, self.codes[which][rows]
        found = section.coefficients(codes, which)
        wanted = np.stack([rest for _, _, rest in section.walk(self.source.coefficients[rows], codes, which)], axis=1)
        weight = self.source.weight[rows, None]
        cross, square = (weight * found * wanted).sum(axis=0), (weight * found * found).sum(axis=0)
        return np.clip(np.where(square > 0, cross / np.maximum(square, 1e-30), 1.0), 0.5, 2.0)

    def costs(self, rate: Rate) -> NDArray[np.float64]:
        """What a row of each class takes, nothing first: ``(K + 1,)``."""
        bits = self.section.bits
        return np.concatenate([[0], bits.sum(axis=1) if rate == "bits" else np.count_nonzero(bits, axis=1)]).astype(
            float
        )

    def classes(self, price: float, rate: Rate, row_bits: float) -> NDArray[np.int8]:
        """Class of each row at a price, -1 for none, ``(m,)``."""
        kept = len(self.section.coders)
        if not kept:
            return np.full(len(self.source.rows), -1, np.int8)
        whole = not self.source.hashed and kept == 1 << self.section.planes
        spent = self.costs(rate)
        if self.source.hashed and rate == "bits":
            spent[1:] += row_bits + self.section.planes + _OFFSET_BITS * (self.section.planes > 0)
        total = self.loss[int(whole) :] + price * spent[int(whole) :, None]
        return (total.argmin(axis=0) - (0 if whole else 1)).astype(np.int8)

    def counts(self, classes: NDArray[np.int8]) -> NDArray[np.int64]:
        """Rows in the file by class number, ``(8,)``."""
        kept = len(self.section.coders)
        counts = np.bincount(np.where(classes < 0, kept, classes), minlength=(1 << MOST_PLANES) + 1)
        if self.source.hashed or kept == 1 << self.section.planes:
            counts[kept] = 0
        return counts[: 1 << MOST_PLANES]

    def assignment(self, classes: NDArray[np.int8]) -> Assignment:
        """The codes of all rows."""
        codes = np.zeros((len(classes), self.section.coders.shape[1]), np.uint8)
        for which, code in enumerate(self.codes):
            codes[classes == which] = code[classes == which]
        return Assignment(self.section, classes, codes)


def allocate(
    sources: Sequence[FieldCoordinates],
    limit: int,
    size: Callable[[Sequence[Section], Sequence[NDArray[np.int64]]], int],
    *,
    rate: Rate = "bits",
    row_bits: float = 0.0,
) -> list[Assignment]:
    """The assignment of least loss among those found whose ``size`` is at most ``limit``.

    Options are planned on a sample of the rows, classes then taken by all of them at the price that fills the budget.
    Nothing at all must fit.

    Args:
        sources: Fields.
        limit: What ``size`` may be at most.
        size: Of sections with so many rows of each class number, ``(8,)`` each; rises with either.
        rate: What is paid for, and what ``size`` counts: bytes, or values.
        row_bits: What a stored row of a hashed field takes beside its codes.
    """
    markets = [source.market(rate, row_bits) for source in sources]
    unit = 8 if rate == "bits" else 1
    room = limit - size(*_nothing(sources))
    target, best = float(room), None
    for _ in range(_ATTEMPTS if room > 0 else 0):
        found = _filled(markets, target * unit, limit, size, row_bits)
        if found is None:
            target *= 0.9
            continue
        if best is None or found.loss < best.loss:
            best = found
        used = found.size - (limit - room)
        if used >= 0.995 * room or target > 2 * room or not used:
            break
        target *= min(room / used, 1.5)
    if best is None:
        return [
            _Coding(s, section).assignment(np.full(len(s.rows), -1, np.int8))
            for s, section in zip(sources, _nothing(sources)[0], strict=True)
        ]
    return best.assignments


def bit_price(
    sources: Sequence[FieldCoordinates], target_bits: float, others: Callable[[float], float], *, row_bits: float = 0.0
) -> float:
    """About the least price of a bit at which the rows, and ``others`` at that price, take at most so many bits."""
    markets = [source.market("bits", row_bits) for source in sources]

    def planned(exponent: float) -> bool:
        price = 2.0**exponent
        return sum(m.choose(price)[0] for m in markets) + others(price) <= target_bits

    return 2.0 ** _bisect(planned, 0.01)


def _nothing(sources: Sequence[FieldCoordinates]) -> tuple[list[Section], list[NDArray[np.int64]]]:
    """Sections in which nothing is stored, and their rows."""
    sections = [Section(0, np.zeros((0, 0), np.uint16), np.zeros((0, len(s.gain)), np.int8)) for s in sources]
    counts = [np.zeros(1 << MOST_PLANES, np.int64) for _ in sources]
    for source, count in zip(sources, counts, strict=True):
        count[0] = 0 if source.hashed else len(source.rows)
    return sections, counts


@dataclass(frozen=True)
class _Filling:
    """What was found for one plan."""

    size: int
    loss: float
    assignments: list[Assignment]


def _filled(
    markets: Sequence[_RowCosts],
    target: float,
    limit: int,
    size: Callable[[Sequence[Section], Sequence[NDArray[np.int64]]], int],
    row_bits: float,
) -> _Filling | None:
    """The best assignment within ``limit`` by the options of least loss within about ``target`` bits, or ``None``."""

    def planned(exponent: float) -> bool:
        return sum(m.choose(2.0**exponent)[0] for m in markets) <= target

    price = 2.0 ** (around := _bisect(planned, 0.05))
    sections = [m.section(*m.choose(price)[1:], price) for m in markets]
    codings = [_Coding(m.source, section) for m, section in zip(markets, sections, strict=True)]
    rate: Rate = markets[0].rate if markets else "bits"

    def classes(exponent: float) -> list[NDArray[np.int8]]:
        return [c.classes(2.0**exponent, rate, row_bits) for c in codings]

    def sized(exponent: float) -> int:
        return size(sections, [c.counts(k) for c, k in zip(codings, classes(exponent), strict=True)])

    exponent = _bisect(lambda e: sized(e) <= limit, 1e-6, (around - _NEAR, around + _NEAR))
    if (taken := sized(exponent)) > limit:
        return None
    kinds = classes(exponent)
    loss = sum(
        float(c.loss[k + 1, np.arange(len(k))].sum(dtype=np.float64)) for c, k in zip(codings, kinds, strict=True)
    )
    return _Filling(taken, loss, [c.assignment(k) for c, k in zip(codings, kinds, strict=True)])


def _bisect(holds: Callable[[float], bool], tolerance: float, bracket: tuple[float, float] | None = None) -> float:
    """About the least exponent for which ``holds``, which it does from some exponent on; the largest if for none.

    Args:
        holds: what is asked of an exponent.
        tolerance: how close.
        bracket: where the answer may be; found out at the cost of two more questions.
    """
    low, high = bracket or (_LEAST, _MOST)
    if bracket is not None and not holds(high):
        return _bisect(holds, tolerance)
    if holds(low):
        return low if bracket is None else _bisect(holds, tolerance)
    while high - low > tolerance:
        middle = (low + high) / 2
        if holds(middle):
            high = middle
        else:
            low = middle
    return high
