"""Coding the final vectors of a ranking model: which rows get how many bits, and with which codes.

Items ``v`` are coded as ``gain (C_a + scale q)``: a shared vector near the direction of ``v``, and what is left by a
trellis code. Each item takes the code of least ``loss + lambda * bits``, where the loss of an error is that of
:mod:`pocketrec.attribution.list_margin` and a code of ``R`` bits a coordinate leaves a share ``D(R)`` of the energy.
Users come from the items that they like, so decoded items are their codebook: a user is a sum of a few, found by beam
search, plus a trellis code, the same for all. Lists do not depend on the length of a user's vector, so none is stored.

Reference:
    Gain-shape coding: Gersho and Gray, "Vector quantization and signal compression", 1992, section 12.10. Sums of
    codewords by beam search: Babenko and Lempitsky, "Additive quantization for extreme vector compression", 2014.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from pocketrec.attribution.list_margin import ListMargin
from pocketrec.families.coding.lists import plan as plans
from pocketrec.families.coding.lists.beam import beam_search, factors
from pocketrec.families.coding.lists.plan import Floats, Ints, ItemCosts, TrellisPlan
from pocketrec.format.layouts import trellis
from pocketrec.format.layouts.quantised import code_bytes
from pocketrec.format.layouts.trellis import Records, Shape
from pocketrec.format.planes import MOST_PLANES
from pocketrec.format.trellis_codes import CODES, SCALE_BITS, code_values
from pocketrec.randomness import generator

BEAMS = 24

MOST_SHAPE_BITS = 10

SHAPE_SHARE = 0.25
"""Share of the budget that shared vectors, and which of them items take, may cost."""

ITEM_WEIGHT = 3.0
"""How much more the expected loss of items counts than that of users: an item's error moves it in all lists at once;
chosen on validation."""

MOST_ATOMS = 3

_ATTEMPTS = 4

_MEANS_ROUNDS = 6

_MEANS_ROWS = 15_000

_CLIP = 0.9

_ATOM_BEAMS, _ATOM_CANDIDATES = 4, 24

_FIRST_GUESS = (0.65, 0.37, 0.27, 0.22)

_SAMPLE_USERS, _SAMPLE_CODED = 1500, 256

_ROWS_AT_ONCE = 1024

_METRICS_AT_ONCE = 512

_TINY = 1e-12


@dataclass(frozen=True)
class _GeometricGrid:
    """Numbers in geometric progression."""

    least: float
    ratio: float
    bits: int

    @classmethod
    def between(cls, low: float, high: float, bits: int) -> _GeometricGrid:
        """From ``low`` to ``high``, as float32 keeps it."""
        low, high = max(low, _TINY), max(high, low, _TINY)
        return cls(float(np.float32(low)), float(np.float32((high / low) ** (1 / ((1 << bits) - 1)))), bits)

    @classmethod
    def over(cls, numbers: Floats, bits: int) -> _GeometricGrid:
        """Over nearly all of some numbers."""
        low, high = np.quantile(numbers, (0.01, 0.99))
        return cls.between(float(low), float(high), bits)

    @property
    def values(self) -> Floats:
        """All of them."""
        return trellis.geometric(self.least, self.ratio, self.bits)

    def nearest(self, numbers: Floats) -> NDArray[np.uint8]:
        """Which of them is nearest to each number."""
        return np.abs(self.values - numbers[:, None]).argmin(axis=1).astype(np.uint8)

    def nearest_ratio(self, numbers: Floats) -> NDArray[np.uint8]:
        """Which of them is nearest to each number by ratio."""
        logs = np.log(np.maximum(self.values, _TINY))
        return np.abs(logs - np.log(np.maximum(numbers, _TINY))[:, None]).argmin(axis=1).astype(np.uint8)


@dataclass(frozen=True)
class _SharedVectors:
    """Shared vectors, and what they leave of the items.

    Attributes:
        numbers: uint8 ``(K, d)``.
        step: between two values.
        chosen: of each item, ``(I,)``.
        rest: of each item at about length one, ``(I, d)``.
    """

    numbers: NDArray[np.uint8]
    step: float
    chosen: Ints
    rest: Floats

    @property
    def vectors(self) -> Floats:
        """``(K, d)``."""
        return trellis.centroid_values(self.numbers, self.step)

    @cached_property
    def energy(self) -> Floats:
        """Of the rest, ``(I,)``."""
        return np.square(self.rest).sum(axis=1)


class GainShape:
    """Codes the vectors of users and items for any budget.

    Args:
        users: ``(U, d)``.
        items: ``(I, d)``.
        margin: what errors cost.
        seed: of the sample that shared vectors are learned on.
    """

    def __init__(self, users: Floats, items: Floats, margin: ListMargin, seed: int) -> None:
        self.items, self.margin, self.seed = items, margin, seed
        self.width = items.shape[1]
        self.directions = trellis.direction(users)
        self.lengths = np.sqrt(np.square(users).sum(axis=1))
        self.length = float(self.lengths.mean())
        norms = np.sqrt(np.square(items).sum(axis=1))
        low, high = np.quantile(norms, (0.002, 0.998))
        self.gains = _GeometricGrid.between(0.6 * float(low), float(high), trellis.GAIN_BITS)
        self.units = self.gains.values[self.gains.nearest(norms)]
        self._shared: dict[int, _SharedVectors] = {}

    # ---- planning ----------------------------------------------------------------------------------------------------

    def least(self) -> TrellisPlan:
        """The smallest block there is."""
        classes = np.zeros(len(self.items), np.uint8)
        return TrellisPlan(Shape(len(self.directions), len(self.items), 0, (0,), 0, 0, 0, 0), classes)

    def plan(self, size_bytes: int) -> TrellisPlan:
        """The block of least expected loss among those of at most ``size_bytes``, of which :meth:`least` is one."""
        shapes = self._shape_bits(size_bytes)
        market = ItemCosts(self._weights(shapes), self._blur(shapes), self.width)
        best, places = self.least(), None
        for _ in range(_ATTEMPTS):
            shape = self._users(
                market, shapes, places or min(plans.PLACE_BITS, plans.number_bits(len(self.items))), size_bytes
            )
            if shape is None:
                break
            found = self._classes(market, shape, size_bytes, free=places is None)
            if best.size_bytes(self.width) < found.size_bytes(self.width) <= size_bytes:
                best = found
            if found.shape.places == places:
                break
            places = found.shape.places
        return best

    def _shape_bits(self, size_bytes: int) -> int:
        """The most shared vectors that are worth their bytes."""
        one, rows = code_bytes(self.width, trellis.CENTROID_BITS), len(self.items) + len(self.directions)
        bits = np.arange(MOST_SHAPE_BITS + 1)
        costs = (one << bits) + len(self.items) * bits / 8
        return int(bits[(costs <= SHAPE_SHARE * size_bytes) & (8 << bits <= rows)].max(initial=0))

    def _weights(self, shapes: int) -> NDArray[np.float64]:
        """Loss of each item without a code."""
        energy = self._shared_vectors(shapes).energy
        return self.margin.item_traces / self.width * np.square(self.units) * energy.astype(np.float64)

    def _blur(self, shapes: int) -> NDArray[np.float64]:
        """Of items that users may be sums of, what a code does not keep of their directions; zero for others."""
        heavy = np.argsort(-self.margin.item_traces, kind="stable")[: 1 << plans.PLACE_BITS]
        found = np.zeros(len(self.items))
        found[heavy] = self._shared_vectors(shapes).energy[heavy] / max(len(heavy), 1)
        return found

    def _users(self, market: ItemCosts, shapes: int, places: int, size_bytes: int) -> Shape | None:
        """How many atoms and which code users get for least loss of both sides; ``None`` where nothing fits."""
        count, best, found = len(self.directions), np.inf, None
        for atoms, (squares, losses) in enumerate(self._users_lose):
            for rest, lost in enumerate(losses.tolist()):
                shape = Shape(count, len(self.items), shapes, (0,), 0, places, atoms, rest)
                room = 8 * (size_bytes - shape.size_bytes(self.width, np.array([len(self.items)])))
                if room < 0:
                    continue
                loss, blur = market.expected(room)
                total = ITEM_WEIGHT * loss + lost * (1 + squares * blur)
                if total < best:
                    best, found = total, shape
        return found

    def _classes(self, market: ItemCosts, base: Shape, size_bytes: int, *, free: bool) -> TrellisPlan:
        """Classes of items for least loss in what users leave, whose ``places`` are as they are unless ``free``."""
        best: tuple[float, TrellisPlan] | None = None
        for planes in range(MOST_PLANES + 1):
            shape = replace(base, rates=(0,) * (1 << planes))
            counts = np.zeros(1 << planes, np.int64)
            counts[0] = len(self.items)
            room = 8 * (size_bytes - shape.size_bytes(self.width, counts))
            if room < 0:
                continue
            rates, classes, loss = market.spend(room, 1 << planes)
            if best is None or loss < best[0]:
                counts = np.bincount(classes, minlength=len(rates))
                first, places = plans.atom_threshold(counts, None if free else base.places)
                best = loss, TrellisPlan(replace(shape, rates=rates, first=first, places=places), classes)
        return TrellisPlan(base, np.zeros(len(self.items), np.uint8)) if best is None else best[1]

    @cached_property
    def _users_lose(self) -> list[tuple[float, NDArray[np.float64]]]:
        """For each number of exact atoms, what blurred ones add to the loss, and the loss of users with each code.

        Errors in the atoms add the sum of their squared coefficients, as a share of the energy that they leave.
        """
        rng = generator(self.seed, "users to plan with")
        total = len(self.directions)
        rows = np.sort(rng.choice(total, min(total, _SAMPLE_USERS), replace=False))
        users, weights = self.directions[rows], np.square(self.lengths[rows] / self.margin.length)
        heavy = np.argsort(-self.margin.item_traces, kind="stable")[: 1 << plans.PLACE_BITS]
        atoms = trellis.direction(self.items[heavy])
        tried = slice(None, _SAMPLE_CODED)
        upper, own = factors(self.margin.user_metrics(rows[tried]))
        found = []
        for count in range(MOST_ATOMS + 1):
            chosen, coefficients = sparse_sums(users, atoms, count)
            rest = users - np.einsum("k,mkd->md", coefficients, atoms[chosen])
            energy = float(np.square(rest).sum(axis=1).mean())
            losses = np.array([weights[tried] @ lost for lost in _losses(rest[tried], upper, own)])
            blurred = float(np.square(coefficients).sum()) / max(energy, _TINY)
            found.append((blurred, losses * (total / max(len(upper), 1))))
        return found

    # ---- coding ------------------------------------------------------------------------------------------------------

    def encode(self, plan: TrellisPlan) -> Records:
        """The codes of all rows."""
        shape, shared = plan.shape, self._shared_vectors(plan.shape.shapes)
        spread = np.sqrt(shared.energy / self.width)
        scales = _GeometricGrid.over(spread, SCALE_BITS)
        chosen_scales = scales.nearest_ratio(spread)
        steps = max((CODES[r - 1].steps(self.width) for r in shape.rates if r), default=0)
        codes = np.zeros((len(self.items), steps), np.uint8)
        decoded = shared.vectors[shared.chosen]
        for rows, rate in self._batches(plan):
            upper, weights = factors(self.margin.item_metrics(rows))
            own = scales.values[chosen_scales[rows]]
            found = beam_search(CODES[rate - 1], shared.rest[rows], own, upper, weights, BEAMS)
            codes[rows, : found.shape[1]] = found
            decoded[rows] += code_values(rate, found, self.width) * own[:, None]
        best = (self.items * decoded).sum(axis=1) / np.maximum(np.square(decoded).sum(axis=1), _TINY)
        atoms, coefficients, user_scales, user_codes, grid = self._encode_users(plan, decoded)
        numbers = [self.gains.least, self.gains.ratio, scales.least, scales.ratio, self.length * grid.least, grid.ratio]
        return Records(
            classes=plan.classes,
            gains=self.gains.nearest(best),
            shapes=shared.chosen.astype(np.uint16),
            item_scales=chosen_scales,
            item_codes=codes,
            atoms=atoms,
            user_scales=user_scales,
            user_codes=user_codes,
            centroids=shared.numbers,
            scales=np.array([*numbers, shared.step, *(self.length * coefficients).tolist()], np.float32),
        )

    def _batches(self, plan: TrellisPlan) -> Iterator[tuple[Ints, int]]:
        """Items with one code at a time, not too many at once."""
        for which, rate in enumerate(plan.shape.rates):
            rows = np.flatnonzero(plan.classes == which) if rate else np.empty(0, np.int64)
            for begin in range(0, len(rows), _METRICS_AT_ONCE):
                yield rows[begin : begin + _METRICS_AT_ONCE], rate

    def _encode_users(
        self, plan: TrellisPlan, decoded: Floats
    ) -> tuple[Ints, Floats, NDArray[np.uint8], NDArray[np.uint8], _GeometricGrid]:
        """Atoms, their coefficients, scales, codes and the grid of scales."""
        shape = plan.shape
        candidates = np.flatnonzero(plan.classes >= shape.first)
        atoms = trellis.direction(decoded[candidates])
        chosen, coefficients = sparse_sums(self.directions, atoms, shape.atoms)
        rest = self.directions - np.einsum("k,mkd->md", coefficients, atoms[chosen])
        spread = np.sqrt(np.square(rest).sum(axis=1) / self.width)
        grid = _GeometricGrid.over(spread, SCALE_BITS)
        scales = grid.nearest_ratio(spread)
        codes = np.zeros((len(rest), 0), np.uint8)
        if shape.rest:
            codes = np.zeros((len(rest), CODES[shape.rest - 1].steps(self.width)), np.uint8)
            for begin in range(0, len(rest), _METRICS_AT_ONCE):
                rows = np.arange(begin, min(begin + _METRICS_AT_ONCE, len(rest)))
                upper, weights = factors(self.margin.user_metrics(rows))
                own = grid.values[scales[rows]]
                codes[rows] = beam_search(CODES[shape.rest - 1], rest[rows], own, upper, weights, BEAMS)
        return candidates[chosen], coefficients, scales, codes, grid

    def _shared_vectors(self, bits: int) -> _SharedVectors:
        if bits not in self._shared:
            self._shared[bits] = self._learn(1 << bits)
        return self._shared[bits]

    def _learn(self, count: int) -> _SharedVectors:
        """Shared vectors by k-means on a sample of users and items, all at length one."""
        rng = generator(self.seed, "shared vectors", count)
        sample = np.concatenate(
            [
                part[np.sort(rng.choice(len(part), min(len(part), _MEANS_ROWS), replace=False))]
                for part in (self.directions, trellis.direction(self.items))
            ]
        )
        means: Floats = sample[np.sort(rng.choice(len(sample), count, replace=False))].copy()
        for _ in range(_MEANS_ROUNDS):
            near = _nearest(sample, means)
            sums_, held = np.zeros(means.shape), np.bincount(near, minlength=count)
            np.add.at(sums_, near, sample)
            means[held > 0] = (sums_ / np.maximum(held, 1)[:, None])[held > 0]
        top = (1 << trellis.CENTROID_BITS) - 1
        step = float(np.float32(max(_CLIP * float(np.abs(means).max()), _TINY) * 2 / top))
        numbers = np.clip(np.rint(means / step + top / 2), 0, top).astype(np.uint8)
        wanted = self.items / self.units[:, None]
        vectors = trellis.centroid_values(numbers, step)
        chosen = _nearest(wanted, vectors)
        return _SharedVectors(numbers, step, chosen, wanted - vectors[chosen])


def sparse_sums(targets: Floats, atoms: Floats, count: int) -> tuple[Ints, Floats]:
    """Targets as ``sum_k c_k atoms[i_k]``, the same ``c`` for all: ``i (m, count)`` and ``c (count,)``.

    The coefficients are fitted once to what a search with guessed ones finds in every sixth target.
    """
    if not count or not len(atoms):
        return np.zeros((len(targets), 0), np.int64), np.zeros(0, np.float32)
    sample = targets[::6]
    chosen = _pursue(sample, atoms, np.array(_FIRST_GUESS[:count], np.float32))
    picked = atoms[chosen]
    gram = np.einsum("mad,mbd->ab", picked, picked).astype(np.float64)
    fitted = np.linalg.solve(gram + 1e-6 * np.trace(gram) * np.eye(count), np.einsum("mad,md->a", picked, sample))
    return _pursue(targets, atoms, fitted.astype(np.float32)), fitted.astype(np.float32)


def _pursue(targets: Floats, atoms: Floats, coefficients: Floats) -> Ints:
    """Beam search for the atoms of each target, the ones of largest coefficient first."""
    columns = torch.from_numpy(atoms.T.copy())
    found = np.empty((len(targets), len(coefficients)), np.int64)
    wide = min(_ATOM_CANDIDATES, len(atoms))
    for begin in range(0, len(targets), _ROWS_AT_ONCE):
        part = targets[begin : begin + _ROWS_AT_ONCE]
        rests, picked = part[:, None], np.zeros((len(part), 1, 0), np.int64)
        row = np.arange(len(part))[:, None]
        for k, coefficient in enumerate(coefficients.tolist()):
            beams = rests.shape[1]
            flat = torch.from_numpy(np.ascontiguousarray(rests.reshape(-1, rests.shape[2])))
            close = (flat @ columns * (1 if coefficient >= 0 else -1)).topk(wide, dim=1).indices.numpy()
            left = rests[:, :, None] - coefficient * atoms[close].reshape(len(part), beams, wide, -1)
            left = left.reshape(len(part), beams * wide, -1)
            keep = 1 if k == len(coefficients) - 1 else min(_ATOM_BEAMS, beams * wide)
            best = np.argsort(np.square(left).sum(axis=2), axis=1, kind="stable")[:, :keep]
            rests = left[row, best]
            new = close.reshape(len(part), -1)[row, best]
            picked = np.concatenate([picked[row, best // wide], new[..., None]], axis=2)
        found[begin : begin + len(part)] = picked[:, 0]
    return found


def _losses(rows: Floats, upper: Floats, weights: Floats) -> list[Floats]:
    """What each code, none first, costs each row under the metric of these factors: a list of ``(m,)``."""
    scales = np.sqrt(np.square(rows).sum(axis=1) / rows.shape[1])
    found = []
    for rate in range(len(CODES) + 1):
        errors = rows
        if rate:
            codes = beam_search(CODES[rate - 1], rows, scales, upper, weights, BEAMS)
            errors = rows - code_values(rate, codes, rows.shape[1]) * scales[:, None]
        felt = np.einsum("md,mdc->mc", errors, upper)
        found.append((np.square(felt) * weights).sum(axis=1))
    return found


def _nearest(rows: Floats, means: Floats) -> Ints:
    """The nearest mean of each row."""
    half = np.square(means).sum(axis=1) / 2
    parts = [(rows[i : i + 4096] @ means.T - half).argmax(axis=1) for i in range(0, len(rows), 4096)]
    return np.concatenate([*parts, np.empty(0, np.int64)])
