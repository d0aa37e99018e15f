"""Layout ``trellis``: items as a gain times a shared shape and a coded rest, users as sums of items and a coded rest.

The block's rows are ``users`` rows, then ``items`` rows. With ``C_a`` one of ``2^shapes`` shared vectors, and ``q``
what a trellis code says, an item of class ``c`` is ``gain (C_a + scale q)``, where the class names the code. A user is
``sum_k coefficient_k direction(i_k) + scale q``; ``direction`` is the vector of an item at length one, and ``i_k``
counts the items of class ``first`` and above, in the order of the file. All users have one code.

A trellis code of ``k`` bits, span ``V`` and memory ``L`` spends ``k`` bits on each ``V`` coordinates: the last ``L``
bits name a row of the code's table, which holds the ``V`` values. Bits before the first one are zeros. So each bit says
something of many coordinates, but a coordinate needs no other than its own ``L`` bits to be read.

Arrays:

``planes``
    A class number has one bit in each of 0 to 3 planes. Every 256 items (the last ones may be fewer) have their planes
    behind each other: uint8.
``offsets``
    Bits of the records before every 256 items: uint32.
``codes``
    Records of items, then from a new byte on records of users, least significant bit first, and four bytes of zeros:
    uint8. An item's record: 4 bits of gain, ``shapes`` bits ``a``, and where its class has a code 2 bits of scale and
    the code. A user's record: ``i_k`` in ``places`` bits each, and where users have a code 2 bits of scale and it.
``centroids``
    The shared vectors, 4 bits a value: ``(value - 7.5) step``: uint8 ``(2^shapes, ceil(width / 2))``.
``scales``
    Least and ratio of the gains, the items' scales and the users' scales; ``step``; the coefficients: float32.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketrec.errors import ArtifactError, BudgetError
from pocketrec.format.block import FileBlock
from pocketrec.format.layouts.quantised import code_bytes, pack_codes, unpack_codes
from pocketrec.format.planes import GROUP, MOST_PLANES, SPARE, Part, pack_planes, per_set, plane_bytes
from pocketrec.format.trellis_codes import CODES, SCALE_BITS, CodeView, code_part, rate_bits
from pocketrec.native.library import LONG, POINTER, pointer, structure
from pocketrec.native.lookup import Table

GAIN_BITS, CENTROID_BITS = 4, 4
MOST_SHAPES, MOST_ATOMS, MOST_PLACES = 12, 4, 24


_PAIRS = 3
"""Least and ratio of gains, items' scales and users' scales."""
_READ_ROWS = 4096

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Shape:
    """How a block is laid out: all sizes but the number of items in each class.

    Attributes:
        users: rows.
        items: rows.
        shapes: bits of the number of a shared vector.
        rates: number of the code of each class, ``2^planes`` of them, 0 for none.
        first: items of this class and above are those that users are sums of.
        places: bits of their number among these.
        atoms: how many of them a user is a sum of.
        rest: number of the users' code, 0 for none.
    """

    users: int
    items: int
    shapes: int
    rates: tuple[int, ...]
    first: int
    places: int
    atoms: int
    rest: int

    @property
    def planes(self) -> int:
        """Bits of a class number."""
        return (len(self.rates) - 1).bit_length()

    def item_bits(self, width: int) -> Ints:
        """Bits of an item's record by class, ``(2^planes,)``."""
        return np.array([GAIN_BITS + self.shapes + rate_bits(rate, width) for rate in self.rates], np.int64)

    def user_bits(self, width: int) -> int:
        """Bits of a user's record."""
        return self.atoms * self.places + rate_bits(self.rest, width)

    def size_bytes(self, width: int, counts: NDArray[np.integer]) -> int:
        """Bytes of a block, exactly.

        Args:
            width: columns.
            counts: items of each class, ``(2^planes,)``.
        """
        records = -(-int(counts @ self.item_bits(width)) // 8)
        sums = -(-self.users * self.user_bits(width) // 8)
        shared = code_bytes(width, CENTROID_BITS) << self.shapes
        numbers = 4 * (2 * _PAIRS + 1 + self.atoms)
        index = plane_bytes(self.items, self.planes) + 4 * -(-self.items // GROUP)
        return records + sums + SPARE + shared + numbers + index

    def sound(self) -> bool:
        """Whether such a block is possible at all."""
        counts = (self.users, self.items, self.shapes, self.first, self.places, self.atoms, self.rest, *self.rates)
        return (
            all(type(n) is int and 0 <= n < 1 << 40 for n in counts)
            and len(self.rates) in (1, 2, 4, 8)
            and max(*self.rates, self.rest, 0) <= len(CODES)
            and self.shapes <= MOST_SHAPES
            and self.atoms <= MOST_ATOMS
            and self.places <= MOST_PLACES
            and self.first < len(self.rates)
        )


@dataclass(frozen=True)
class Records:
    """What the codes of a block say, unpacked; rows as in the file.

    Attributes:
        classes: of items, uint8 ``(I,)``.
        gains: uint8 ``(I,)``.
        shapes: which shared vector, uint16 ``(I,)``.
        item_scales: uint8 ``(I,)``.
        item_codes: one for each step, uint8 ``(I, s)``; what a class does not code is ignored.
        atoms: int64 ``(U, atoms)``, numbers of items.
        user_scales: uint8 ``(U,)``.
        user_codes: uint8 ``(U, s')``.
        centroids: uint8 ``(2^shapes, width)``, below 16.
        scales: float32 ``(7 + atoms,)``.
    """

    classes: NDArray[np.uint8]
    gains: NDArray[np.uint8]
    shapes: NDArray[np.uint16]
    item_scales: NDArray[np.uint8]
    item_codes: NDArray[np.uint8]
    atoms: Ints
    user_scales: NDArray[np.uint8]
    user_codes: NDArray[np.uint8]
    centroids: NDArray[np.uint8]
    scales: Floats


def encode(shape: Shape, records: Records) -> dict[str, NDArray[Any]]:
    """The arrays of a block.

    Raises:
        BudgetError: The items take 512 MiB, or more.
    """
    width = records.centroids.shape[1]
    sizes = shape.item_bits(width)[records.classes]
    if (total := int(sizes.sum())) >= 1 << 32:
        raise BudgetError(f"The items must take less than 512 MiB, but take {total // 8:,} B.")
    starts = np.cumsum(sizes) - sizes
    items = np.zeros(-(-total // 8) * 8, np.uint8)
    place = _put(items, starts, records.gains, GAIN_BITS)
    place = _put(items, place, records.shapes, shape.shapes)
    for which, rate in enumerate(shape.rates):
        rows = np.flatnonzero(records.classes == which)
        _put_code(items, place[rows], rate, width, records.item_scales[rows], records.item_codes[rows])
    candidates = np.flatnonzero(records.classes >= shape.first)
    size = shape.user_bits(width)
    users = np.zeros(-(-shape.users * size // 8) * 8, np.uint8)
    place = size * np.arange(shape.users)
    for chosen in np.searchsorted(candidates, records.atoms).T:
        place = _put(users, place, chosen, shape.places)
    _put_code(users, place, shape.rest, width, records.user_scales, records.user_codes)
    packed = [np.packbits(part, bitorder="little") for part in (items, users)]
    return {
        "planes": pack_planes(records.classes, shape.planes),
        "offsets": starts[::GROUP].astype(np.uint32),
        "codes": np.concatenate([*packed, np.zeros(SPARE, np.uint8)]),
        "centroids": pack_codes(records.centroids, CENTROID_BITS),
        "scales": records.scales.astype(np.float32),
    }


def _put(stream: NDArray[np.uint8], places: Ints, numbers: NDArray[np.integer], bits: int) -> Ints:
    """Write numbers of so many bits; the places behind them."""
    for bit in range(bits):
        stream[places + bit] = (numbers >> bit) & 1
    return places + bits


def _put_code(
    stream: NDArray[np.uint8], places: Ints, rate: int, width: int, scales: NDArray[np.uint8], codes: NDArray[np.uint8]
) -> None:
    """Write scale and code of rows that have one code."""
    if not rate:
        return
    code = CODES[rate - 1]
    places = _put(stream, places, scales, SCALE_BITS)
    for step in range(code.steps(width)):
        places = _put(stream, places, codes[:, step], code.bits)


def geometric(least: float, ratio: float, bits: int) -> Floats:
    """The ``2^bits`` numbers ``least * ratio^j``.

    Example:
        >>> geometric(1.0, 2.0, 2).tolist()
        [1.0, 2.0, 4.0, 8.0]
    """
    return (np.float64(least) * np.float64(ratio) ** np.arange(1 << bits)).astype(np.float32)


def centroid_values(numbers: NDArray[np.uint8], step: float) -> Floats:
    """What the numbers of shared vectors mean."""
    return (numbers.astype(np.float32) - np.float32(7.5)) * np.float32(step)


@structure("Trellis")
class TableView(ctypes.Structure):
    """A table of layout ``trellis`` as the library sees it."""

    _fields_ = (
        *((name, LONG) for name in ("first", "users", "items", "user_start", "user_bits", "code_bytes",
                                     "candidate_count", "centroid_bytes", "shapes", "places", "atoms")),
        *((name, POINTER) for name in ("index", "codes", "stream", "centroids", "candidates", "levels", "gains",
                                        "item_scales", "user_scales", "coefficients", "fill", "absent")),
        ("field_count", LONG), ("width", LONG),
    )  # fmt: skip


@dataclass(frozen=True)
class TrellisBlock(FileBlock):
    """See the module; file row ``start + i`` is user ``i``, or item ``i - users``. Every row is stored."""

    shape: Shape

    def __post_init__(self) -> None:
        if isinstance(self.shape, dict):
            object.__setattr__(self, "shape", Shape(**{**self.shape, "rates": tuple(self.shape["rates"])}))

    def to_json(self) -> dict[str, Any]:
        """Everything but the arrays, whose names it lists."""
        return {**super().to_json(), "shape": {**asdict(self.shape), "rates": list(self.shape.rates)}}

    def check(self, fields: int) -> None:
        """Raise :class:`ArtifactError` unless every array has the type and the shape that the layout asks for."""
        shape = self.shape
        if self.rows < 0 or self.width < 1 or self.left < 0 or not shape.sound():
            raise ArtifactError(f"Block {self.name!r} has an impossible shape: {self.to_json()}.")
        if shape.users + shape.items != self.rows:
            raise ArtifactError(f"Block {self.name!r} must have {shape.users + shape.items} rows, but has {self.rows}.")
        self.check_array("planes", np.uint8, (plane_bytes(shape.items, shape.planes),))
        self.check_array("offsets", np.uint32, (-(-shape.items // GROUP),))
        self.check_array("centroids", np.uint8, (1 << shape.shapes, code_bytes(self.width, CENTROID_BITS)))
        self.check_array("scales", np.float32, (2 * _PAIRS + 1 + shape.atoms,))
        self.check_array("codes", np.uint8, (self._user_start + -(-shape.users * self._user_bits // 8) + SPARE,))
        if len(self.arrays) != 5 or not np.isfinite(self.arrays["scales"]).all():
            raise ArtifactError(f"Block {self.name!r} has other arrays than its layout, or scales that are no numbers.")

    @cached_property
    def _item_bits(self) -> Ints:
        return self.shape.item_bits(self.width)

    @cached_property
    def _user_bits(self) -> int:
        return self.shape.user_bits(self.width)

    @cached_property
    def _user_start(self) -> int:
        """First byte of the users' records."""
        if not self.shape.items:
            return 0
        last = np.array([self.shape.items - 1])
        number, place = self._places(last)
        return -(-int(place[0] + self._item_bits[number[0]]) // 8)

    @cached_property
    def candidates(self) -> Ints:
        """Items that users are sums of."""
        starts = np.arange(0, self.shape.items, GROUP)
        numbers = self._numbers(starts // GROUP).reshape(-1)[: self.shape.items]
        return np.flatnonzero(numbers >= self.shape.first)

    @cached_property
    def _gains(self) -> Floats:
        return self._geometric(0, GAIN_BITS)

    @cached_property
    def _item_scales(self) -> Floats:
        return self._geometric(1, SCALE_BITS)

    @cached_property
    def _user_scales(self) -> Floats:
        return self._geometric(2, SCALE_BITS)

    def _geometric(self, which: int, bits: int) -> Floats:
        least, ratio = self.arrays["scales"][2 * which : 2 * which + 2].tolist()
        return geometric(least, ratio, bits)

    def _numbers(self, groups: Ints) -> NDArray[np.uint8]:
        """Class numbers of the items of groups ``(m,)``, ``(m, 256)``; zeros behind the last item."""
        planes = self.shape.planes
        size = -(-np.minimum(GROUP, self.shape.items - groups * GROUP) // 8)
        column = np.arange(GROUP // 8)
        found = np.zeros((len(groups), GROUP), np.uint8)
        for plane in range(planes):
            place = (groups * planes * (GROUP // 8) + plane * size)[:, None] + column
            there = column < size[:, None]
            word = np.where(there, self.arrays["planes"][np.where(there, place, 0)], 0).astype(np.uint8)
            found |= np.unpackbits(word, axis=1, bitorder="little") << np.uint8(plane)
        return found

    def _places(self, items: Ints) -> tuple[Ints, Ints]:
        """Classes of items ``(m,)``, and the first bits of their records."""
        groups, inner = items // GROUP, items % GROUP
        numbers = self._numbers(groups)
        before = np.where(np.arange(GROUP) < inner[:, None], self._item_bits[numbers], 0).sum(axis=1)
        own = numbers[np.arange(len(items)), inner].astype(np.int64)
        return own, self.arrays["offsets"][groups] + before

    def _readable(self, items: Ints) -> tuple[Ints, Ints]:
        """Classes and first bits; far below zero, where all bits are zeros, for a record outside (a damaged file)."""
        numbers, places = self._places(items)
        inside = places + self._item_bits[numbers] <= 8 * (len(self.arrays["codes"]) - SPARE)
        return numbers, np.where(inside, places, -(1 << 40))

    def _word(self, places: Ints) -> Ints:
        """At least 25 bits from each place on; zeros where a place lies below zero."""
        codes = self.arrays["codes"]
        inside = places >= 0
        byte = np.where(inside, places >> 3, 0)
        word = np.zeros(places.shape, np.int64)
        for i in range(SPARE):
            word |= codes[byte + i].astype(np.int64) << (8 * i)
        return np.where(inside, word, 0) >> (places & 7)

    def _rest(self, rate: int, places: Ints, scales: Floats) -> Floats:
        """Scaled values of the codes whose scales stand at ``places (m,)``: ``(m, width)``."""
        code = CODES[rate - 1]
        scale = scales[self._word(places) & ((1 << SCALE_BITS) - 1)]
        first, mask, shift = code.windows(self.width)
        states = (self._word((places + SCALE_BITS)[:, None] + first) & mask) << shift
        values = code.table[states].reshape(len(places), code.steps(self.width) * code.span)
        return values[:, : self.width] * scale[:, None]

    def _shapes(self, items: Ints) -> tuple[Floats, Floats]:
        """Vectors of items ``(m,)`` without their gains, ``(m, width)``, and the gains."""
        numbers, places = self._readable(items)
        gains = self._gains[self._word(places) & ((1 << GAIN_BITS) - 1)]
        places = places + GAIN_BITS
        chosen = self._word(places) & ((1 << self.shape.shapes) - 1)
        stored = unpack_codes(self.arrays["centroids"][chosen], self.width, CENTROID_BITS)
        found = centroid_values(stored, float(self._step))
        for which, rate in enumerate(self.shape.rates):
            rows = np.flatnonzero(numbers == which)
            if rate and len(rows):
                found[rows] += self._rest(rate, places[rows] + self.shape.shapes, self._item_scales)
        return found, gains

    def _items(self, items: Ints) -> Floats:
        found, gains = self._shapes(items)
        return found * gains[:, None]

    def _users(self, users: Ints) -> Floats:
        places = 8 * self._user_start + users * self._user_bits
        bits = self.shape.places
        found = np.zeros((len(users), self.width), np.float32)
        for coefficient in self._coefficients:
            number = self._word(places) & ((1 << bits) - 1)
            places = places + bits
            if len(self.candidates):
                chosen = self.candidates[np.minimum(number, len(self.candidates) - 1)]
                found += coefficient * direction(self._shapes(chosen)[0])
        if self.shape.rest:
            found += self._rest(self.shape.rest, places, self._user_scales)
        return found

    @classmethod
    def view(cls, blocks: Sequence[TrellisBlock], fill: Floats, absent: Floats) -> Table | None:
        """One block of all columns, as the compiled kernel reads it; of its arrays, ``scales`` is unpacked."""
        if len(blocks) > 1 or blocks[0].width != fill.shape[1]:
            return None
        block = blocks[0]
        index, shape = block._index(), block.shape
        rates = [*shape.rates, *[0] * ((1 << MOST_PLANES) - len(shape.rates)), shape.rest]
        parts = [code_part(rate, block.width) for rate in rates]
        codes = (CodeView * len(parts))(*(part.view() for part in parts))
        arrays = block._unpacked() | {"fill": fill, "absent": absent}
        part = index.view()
        table = TableView(
            **block._counts(), field_count=len(fill), index=ctypes.addressof(part), codes=ctypes.addressof(codes),
            **{name: pointer(array) for name, array in arrays.items()},
        )  # fmt: skip
        return Table("pocketrec_trellis", table, len(fill), (index, part, parts, codes, arrays))

    def _index(self) -> Part:
        """Planes, offsets and sizes of the items' records."""
        shape, arrays = self.shape, self.arrays
        sizes = np.zeros(1 << MOST_PLANES, np.int64)
        sizes[: len(self._item_bits)] = self._item_bits
        small, large = np.zeros((0, 1 << MOST_PLANES), np.uint32), np.zeros((0, 1 << MOST_PLANES), np.float32)
        return Part(
            first=0, rows=shape.items, code_start=0, planes=shape.planes, classes=len(shape.rates),
            codes=arrays["codes"], class_planes=arrays["planes"], offsets=arrays["offsets"],
            weights=per_set(sizes), record=sizes.astype(np.int32), directions=0, widest=np.zeros(0, np.int32),
            bits=small, mask=small, scale=large, levels=self._gains, basis=large, last=large[:, 0].copy(),
        )  # fmt: skip

    def _counts(self) -> dict[str, int]:
        """The whole numbers of :class:`TableView`."""
        shape, arrays = self.shape, self.arrays
        return {
            "first": self.start, "users": shape.users, "items": shape.items, "user_start": 8 * self._user_start,
            "user_bits": self._user_bits, "code_bytes": len(arrays["codes"]),
            "candidate_count": len(self.candidates), "centroid_bytes": arrays["centroids"].shape[1],
            "shapes": shape.shapes, "places": shape.places, "atoms": shape.atoms,
            "width": self.width,
        }  # fmt: skip

    def _unpacked(self) -> dict[str, NDArray[Any]]:
        """The arrays of :class:`TableView`."""
        arrays = self.arrays
        return {
            "stream": arrays["codes"], "centroids": arrays["centroids"],
            "candidates": self.candidates.astype(np.uint32),
            "levels": centroid_values(np.arange(1 << CENTROID_BITS, dtype=np.uint8), float(self._step)),
            "gains": self._gains, "item_scales": self._item_scales, "user_scales": self._user_scales,
            "coefficients": self._coefficients,
        }  # fmt: skip

    @property
    def _step(self) -> np.float32:
        return self.arrays["scales"][2 * _PAIRS]

    @property
    def _coefficients(self) -> Floats:
        return np.ascontiguousarray(self.arrays["scales"][2 * _PAIRS + 1 :])

    def read(self, positions: Ints, fields: NDArray[np.int32], out: Floats) -> None:
        """Write the vectors of ``positions (m,)`` over ``out (m, width)``; each distinct one is computed once."""
        distinct, place = np.unique(positions, return_inverse=True)
        found = np.empty((len(distinct), self.width), np.float32)
        border = int(np.searchsorted(distinct, self.shape.users))
        for begin in range(0, len(distinct), _READ_ROWS):
            stop = min(begin + _READ_ROWS, len(distinct))
            middle = min(max(border, begin), stop)
            found[begin:middle] = self._users(distinct[begin:middle])
            found[middle:stop] = self._items(distinct[middle:stop] - self.shape.users)
        out[...] = found[place]


def direction(vectors: Floats) -> Floats:
    """Vectors ``(m, width)`` at length one; zeros stay zeros.

    Example:
        >>> direction(np.array([[3, 4], [0, 0]], np.float32)).round(3).tolist()
        [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    norms = np.sqrt(np.einsum("ij,ij->i", vectors, vectors))
    return vectors / np.maximum(norms, np.float32(1e-20))[:, None]
