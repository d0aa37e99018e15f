"""The compiled inner loops, and what they compute in numpy where there is no compiler.

Every function has one meaning and two implementations: ``_kernel.cpp``, called through ctypes, and numpy. The numpy
one is used where the library was not built, where it was built from other sources (which warns once), or where the
environment says ``POCKETREC_KERNEL=0``. Arrays are passed by pointer; an index out of range raises :class:`DataError`
and reads nothing. Torch-free.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from pocketrec.errors import ConfigError, DataError, StorageError

Level = Literal["portable", "avx2", "avx512", "vnni"]

LEVELS: tuple[Level, ...] = ("portable", "avx2", "avx512", "vnni")
_NUMBERS = {np.dtype(np.float32): 0, np.dtype(np.float16): 1, np.dtype(np.int8): 2, np.dtype(np.uint16): 3}
_BAD_INDEX, _NO_MEMORY = 1, 2
_CHUNK_ENTRIES = 1 << 16
_POINTER, _INT, _LONG = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
_address: Callable[[Any], int] = ctypes.addressof
_first_byte: Callable[[Any], ctypes.c_char] = ctypes.c_char.from_buffer
_SIGNATURES: dict[str, list[Any]] = {
    "pocketrec_lookup": [_POINTER, _POINTER, _POINTER, _LONG, _LONG, _POINTER, _INT],
    "pocketrec_transform": [_POINTER, _POINTER, _POINTER, _LONG, _LONG, _POINTER, _INT],
    "pocketrec_trellis": [_POINTER, _POINTER, _POINTER, _LONG, _LONG, _POINTER, _INT],
    "pocketrec_spmm": [_POINTER, _POINTER, _LONG, _LONG, _LONG, _POINTER, _INT, _POINTER, _INT, _POINTER, _POINTER,
                       _POINTER, _POINTER, _LONG, _LONG, _INT],
    "pocketrec_topk": [_POINTER, _LONG, _POINTER, _LONG, _LONG, _POINTER, _POINTER, _LONG, _LONG, _POINTER, _POINTER,
                       _INT],
    "pocketrec_tower": [_POINTER, _POINTER, _POINTER, _POINTER, _POINTER, _LONG, _LONG, _LONG, _POINTER, _POINTER,
                        _LONG, _POINTER, _INT],
    "pocketrec_beam": [_POINTER, _LONG, _LONG, _LONG, _POINTER, _POINTER, _POINTER, _POINTER, _LONG, _LONG, _LONG,
                       _POINTER],
    "pocketrec_adam_distinct": [_POINTER, _LONG, _POINTER, _LONG, _POINTER, _POINTER],
    "pocketrec_adam_catch_up": [_POINTER, _POINTER, _POINTER, _POINTER, _LONG, _LONG],
    "pocketrec_adam_update": [_POINTER, _POINTER, _POINTER, _LONG, _POINTER, _LONG, _POINTER, _POINTER, _LONG],
    "pocketrec_level": [],
    "pocketrec_limit": [_INT],
}  # fmt: skip


class BlockView(ctypes.Structure):
    """One block of a packed table as the library sees it; null where the layout leaves an array out."""

    _fields_ = (
        ("start", _LONG), ("stop", _LONG), ("present", _LONG), ("values_count", _LONG),
        ("left", ctypes.c_int32), ("width", ctypes.c_int32), ("number", ctypes.c_int32), ("shift", ctypes.c_int32),
        ("presence", _POINTER), ("rank", _POINTER), ("masks", _POINTER), ("offsets", _POINTER),
        ("values", _POINTER), ("scale", _POINTER),
    )  # fmt: skip


class PartView(ctypes.Structure):
    """The rows of one field in a table of layout ``transform`` as the library sees them."""

    _fields_ = (
        ("first", _LONG), ("rows", _LONG), ("code_start", _LONG), ("code_bytes", _LONG), ("stride", _LONG),
        ("directions", _LONG), ("planes", ctypes.c_int32), ("classes", ctypes.c_int32), ("class_planes", _POINTER),
        ("offsets", _POINTER), ("codes", _POINTER), ("weights", _POINTER), ("record", _POINTER), ("widest", _POINTER),
        ("bits", _POINTER), ("mask", _POINTER), ("scale", _POINTER), ("basis", _POINTER), ("last", _POINTER),
    )  # fmt: skip


@cache
def _library() -> ctypes.CDLL | None:
    """The compiled library, or ``None``."""
    spec = find_spec("pocketrec._kernel")
    if os.environ.get("POCKETREC_KERNEL") == "0" or spec is None or spec.origin is None:
        return None
    try:
        library = ctypes.CDLL(str(Path(spec.origin)))
    except OSError:
        return None
    missing = [name for name in _SIGNATURES if not hasattr(library, name)]
    if missing:
        warnings.warn(
            f"{spec.origin} was compiled from other sources than these (it has no {missing[0]}), so numpy does "
            "its work, more slowly; build it again: `pip install .`, or `python setup.py build_ext --inplace` in a "
            "checkout.",
            RuntimeWarning,
            stacklevel=3,
        )
        return None
    for name, arguments in _SIGNATURES.items():
        getattr(library, name).argtypes = arguments
    library.pocketrec_adam_distinct.restype = _LONG
    return library


def compiled() -> ctypes.CDLL | None:
    """The compiled library for modules that bring their own inner loops, or ``None``."""
    return _library()


def available() -> bool:
    """Whether the compiled library is in use."""
    return _library() is not None


def level() -> Level | None:
    """The instruction set in use, or ``None`` for numpy."""
    library = _library()
    return None if library is None else LEVELS[library.pocketrec_level()]


def limit(most: Level) -> None:
    """Use no instruction set above ``most``; ``vnni`` lifts every limit."""
    library = _library()
    if library is not None:
        library.pocketrec_limit(LEVELS.index(most))


def _pointer(array: NDArray[Any] | None) -> int | None:
    """Address of a contiguous array's data; the buffer is the fastest way, but to none that is empty or read-only."""
    if array is None:
        return None
    try:
        return _address(_first_byte(array))
    except (TypeError, ValueError):
        return array.ctypes.data


def _check_status(status: int, what: str) -> None:
    if status == _BAD_INDEX:
        raise DataError(f"{what} must lie inside the arrays that they point into, but at least one does not.")
    if status == _NO_MEMORY:
        raise StorageError("The kernel could not allocate its buffers; free memory or use fewer items.")


def _check_array(name: str, array: NDArray[Any], shape: tuple[int, ...], *dtypes: type[np.generic]) -> None:
    """Raise :class:`ConfigError` unless ``array`` is C-contiguous, of ``shape`` and of one of ``dtypes``."""
    if array.shape != shape or array.dtype not in dtypes or not array.flags.c_contiguous:
        expected = " or ".join(np.dtype(d).name for d in dtypes)
        layout = "contiguous" if array.flags.c_contiguous else "strided"
        raise ConfigError(
            f"`{name}` must be contiguous {expected} {shape}, but got {layout} {array.dtype} {array.shape}."
        )


def block_view(
    start: int, stop: int, left: int, width: int, present: int, stride: int, arrays: Mapping[str, NDArray[Any]]
) -> BlockView:
    """Describe one packed block to the library; the caller keeps ``arrays`` alive and has checked their shapes."""
    values = arrays["values"]
    masks = "records" if "records" in arrays else "masks"
    names = ("presence", "rank", masks, "offsets", "values", "scale")
    pointers = [_pointer(arrays.get(name)) for name in names]
    return BlockView(
        start, stop, present, values.size, left, width, _NUMBERS[values.dtype], stride.bit_length() - 1, *pointers
    )


@dataclass(frozen=True)
class Part:
    """The rows of one field in a table of layout ``transform``, unpacked for the library but for rows and codes.

    Attributes:
        first: its first file row.
        rows: how many there are.
        code_start: first bit of its codes.
        planes: bits of a class number.
        classes: how many there are.
        codes: of the whole block, uint8.
        class_planes: its planes, uint8, perhaps none.
        offsets: its offsets, uint32, perhaps none.
        weights: bits of the rows in all planes of a set, less those of its subsets, int32 ``(8,)``.
        record: bits of a row by class, int32 ``(8,)``.
        directions: one past the last direction with a code.
        widest: bits of the longest code by direction, int32 ``(p,)`` with ``p`` even.
        bits: of a code by direction and class, uint32 ``(p, 8)``.
        mask: uint32 ``(p, 8)``.
        scale: float32 ``(p, 8)``.
        levels: zero, then the positive levels of 1 bit, of 2 bits, and so on; the same for all parts, float32.
        basis: float32 ``(p, s)`` with ``s`` a multiple of 16.
        last: its last column, float32 ``(p,)``.
    """

    first: int
    rows: int
    code_start: int
    planes: int
    classes: int
    codes: NDArray[np.uint8]
    class_planes: NDArray[np.uint8]
    offsets: NDArray[np.uint32]
    weights: NDArray[np.int32]
    record: NDArray[np.int32]
    directions: int
    widest: NDArray[np.int32]
    bits: NDArray[np.uint32]
    mask: NDArray[np.uint32]
    scale: NDArray[np.float32]
    levels: NDArray[np.float32]
    basis: NDArray[np.float32]
    last: NDArray[np.float32]

    def view(self) -> PartView:
        """The part for the library; the caller keeps it alive."""
        names = ("class_planes", "offsets", "codes", "weights", "record", "widest", "bits", "mask", "scale", "basis",
                 "last")  # fmt: skip
        return PartView(
            self.first, self.rows, self.code_start, self.codes.size, self.basis.shape[1], self.directions, self.planes,
            self.classes, *(_pointer(getattr(self, name)) for name in names),
        )  # fmt: skip


def _bound(function: str, table: ctypes.Structure) -> Callable[..., int]:
    """A look-up of the library, bound to a table, which lives as long."""
    return partial(getattr(_library(), function), ctypes.byref(table))


_ASKED = (("rows", _POINTER), ("fields", _POINTER), ("count", _LONG), ("columns", _LONG), ("out", _POINTER))
"""What the library itself fills in."""


class TransformTable(ctypes.Structure):
    """A table of layout ``transform``."""

    _fields_ = (
        ("parts", _POINTER), ("part_count", _LONG), ("levels", _POINTER), ("fill", _POINTER), ("absent", _POINTER),
        ("field_count", _LONG), ("width", _LONG), *_ASKED,
    )  # fmt: skip


@dataclass(frozen=True)
class TransformView:
    """A table of layout ``transform`` as the library sees it."""

    parts: Sequence[Part]
    fill: NDArray[np.float32]
    absent: NDArray[np.float32]

    @cached_property
    def call(self) -> Callable[..., int]:
        """The look-up in this table."""
        pointers = (_pointer(a) for a in (self.parts[0].levels, self.fill, self.absent))
        table = TransformTable(ctypes.addressof(self._views), len(self.parts), *pointers, *self.fill.shape)
        return _bound("pocketrec_transform", table)

    @cached_property
    def _views(self) -> ctypes.Array[PartView]:
        parts = sorted(self.parts, key=lambda p: p.first)
        return (PartView * len(parts))(*(part.view() for part in parts))


class CodeView(ctypes.Structure):
    """One trellis code as the library sees it."""

    _fields_ = (
        ("table", _POINTER), ("first", _POINTER), ("mask", _POINTER), ("shift", _POINTER), ("steps", _LONG),
        ("span", _LONG),
    )  # fmt: skip


class TableView(ctypes.Structure):
    """A table of layout ``trellis`` as the library sees it."""

    _fields_ = (
        *((name, _LONG) for name in ("first", "users", "items", "user_start", "user_bits", "code_bytes",
                                     "candidate_count", "centroid_bytes", "shapes", "places", "atoms")),
        *((name, _POINTER) for name in ("index", "codes", "stream", "centroids", "candidates", "levels", "gains",
                                        "item_scales", "user_scales", "coefficients", "fill", "absent")),
        ("field_count", _LONG), ("width", _LONG),
    )  # fmt: skip


@dataclass(frozen=True)
class CodePart:
    """One trellis code, step by step; arrays are padded to a multiple of 16 entries.

    Attributes:
        table: float32 ``(2^memory, w)`` with ``w`` the power of two from ``span`` on.
        span: coordinates of a step, 1 to 4.
        first: first bit of each step's window, int32.
        mask: of the window, int32.
        shift: by which the window becomes a row of the table, int32.
        steps: how many there are; 0 where nothing is coded.
    """

    table: NDArray[np.float32]
    span: int
    first: NDArray[np.int32]
    mask: NDArray[np.int32]
    shift: NDArray[np.int32]
    steps: int

    def view(self) -> CodeView:
        """The code for the library; the caller keeps it alive."""
        pointers = (_pointer(a) for a in (self.table, self.first, self.mask, self.shift))
        return CodeView(*pointers, self.steps, self.span)


@dataclass(frozen=True)
class TrellisView:
    """A table of layout ``trellis`` as the library sees it.

    Attributes:
        numbers: the whole numbers of :class:`TableView`, by name.
        index: planes, offsets and sizes of the items' records.
        codes: of each class, eight of them, and of users.
        arrays: the arrays of :class:`TableView` but these, by name.
    """

    numbers: Mapping[str, int]
    index: Part
    codes: Sequence[CodePart]
    arrays: Mapping[str, NDArray[Any]]

    @property
    def fill(self) -> NDArray[np.float32]:
        """A row for each field."""
        return self.arrays["fill"]

    @cached_property
    def call(self) -> Callable[..., int]:
        """The look-up in this table."""
        return _bound("pocketrec_trellis", self._views[0])

    @cached_property
    def _views(self) -> tuple[TableView, PartView, ctypes.Array[CodeView]]:
        index, codes = self.index.view(), (CodeView * len(self.codes))(*(c.view() for c in self.codes))
        pointers = {name: _pointer(a) for name, a in self.arrays.items()}
        parts = {"index": ctypes.addressof(index), "codes": ctypes.addressof(codes)}
        return TableView(**self.numbers, **pointers, **parts), index, codes


class PackedTable(ctypes.Structure):
    """A table of blocks."""

    _fields_ = (
        ("blocks", _POINTER), ("block_count", _LONG), ("fill", _POINTER), ("absent", _POINTER), ("field_count", _LONG),
        ("width", _LONG), *_ASKED,
    )  # fmt: skip


@dataclass(frozen=True)
class PackedView:
    """A table of blocks as the library sees it."""

    blocks: ctypes.Array[BlockView]
    fill: NDArray[np.float32]
    absent: NDArray[np.float32]

    @cached_property
    def call(self) -> Callable[..., int]:
        """The look-up in this table."""
        pointers = _pointer(self.fill), _pointer(self.absent)
        table = PackedTable(ctypes.addressof(self.blocks), len(self.blocks), *pointers, *self.fill.shape)
        return _bound("pocketrec_lookup", table)


View = PackedView | TransformView | TrellisView


def lookup(
    table: View,
    rows: NDArray[np.int64],
    fields: NDArray[np.int32],
    out: NDArray[np.float32],
    threads: int = 1,
) -> None:
    """Packed look-up ``rows (B, C) -> out (B, C, D)`` by the compiled library, which must be available.

    :meth:`pocketrec.packed.Packed.lookup` is the public form, and its ``lookup_numpy`` the reference.
    """
    if not available():
        raise ConfigError("The compiled kernel is not available; use `Packed.lookup`, which falls back to numpy.")
    status = table.call(_pointer(rows), _pointer(fields), rows.size, len(fields), _pointer(out), threads)
    if status == _BAD_INDEX:
        raise ConfigError(f"`fields` must lie in [0, {len(table.fill)}), but got {np.unique(fields).tolist()}.")
    _check_status(status, "`rows`")


def beam(
    table: NDArray[np.float32],
    bits: int,
    memory: int,
    rows: NDArray[np.float32],
    scales: NDArray[np.float32],
    upper: NDArray[np.float32],
    weights: NDArray[np.float32],
    beams: int,
    codes: NDArray[np.uint8],
) -> None:
    """Beam search by the compiled library, which must be available; the public form is :mod:`pocketrec.families.coding.lists.beam`."""
    library = _library()
    if library is None:
        raise ConfigError(
            "The compiled kernel is not available; use `pocketrec.families.coding.lists.beam`, which falls back to numpy."
        )
    count, width = rows.shape
    status = library.pocketrec_beam(
        _pointer(table), bits, table.shape[1], memory, _pointer(rows), _pointer(scales), _pointer(upper),
        _pointer(weights), count, width, beams, _pointer(codes),
    )  # fmt: skip
    _check_status(status, "`rows`")


def bf16_to_fp32(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Bfloat16 bit patterns -> float32, exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def fp32_to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Float32 -> bit patterns of the nearest bfloat16, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 0x40, rounded).astype(np.uint16)


def spmm(
    indptr: NDArray[np.int64],
    indices: NDArray[np.int32],
    x: NDArray[Any],
    *,
    left: NDArray[np.float32] | None = None,
    right: NDArray[np.float32] | None = None,
    rows: NDArray[np.int64] | None = None,
    add: NDArray[Any] | None = None,
    out: NDArray[Any] | None = None,
    threads: int = 1,
) -> NDArray[Any]:
    """Multiply an unweighted sparse matrix and add: ``out[i] = left[r] * sum_j right[j] * x[j] + add[i]``.

    ``r = rows[i]`` (or ``i``), ``j`` runs over the neighbours of ``r``. With ``left = right = degree ** -0.5`` this is
    LightGCN's propagation. Sums are float32; the result does not depend on ``threads`` or ``rows``.

    Args:
        indptr: ``(n + 1,)``.
        indices: ``(entries,)``, in ``[0, m)``.
        x: ``(m, d)``, float32, or uint16 holding bfloat16 bits.
        left: ``(n,)``; default ones.
        right: ``(m,)``; default ones.
        rows: Rows to compute, ``(c,)``; default all.
        add: ``(c, d)``, of ``out``'s type; default zeros.
        out: Where to write, ``(c, d)``, float32 or uint16 (bfloat16 bits); default a new array of ``x``'s type.
        threads: Threads, at least 1.

    Returns:
        ``out``.

    Raises:
        DataError: An index is out of range.

    Example:
        >>> import numpy as np
        >>> x = np.array([[1.0], [2.0], [4.0]], np.float32)
        >>> spmm(np.array([0, 2, 3]), np.array([0, 2, 1], np.int32), x).tolist()
        [[5.0], [2.0]]
    """
    count = len(indptr) - 1 if rows is None else len(rows)
    width = x.shape[1]
    out = np.empty((count, width), x.dtype) if out is None else out
    _check_array("indptr", indptr, (len(indptr),), np.int64)
    _check_array("indices", indices, (len(indices),), np.int32)
    _check_array("x", x, (len(x), width), np.float32, np.uint16)
    _check_array("out", out, (count, width), np.float32, np.uint16)
    if left is not None:
        _check_array("left", left, (len(indptr) - 1,), np.float32)
    if right is not None:
        _check_array("right", right, (len(x),), np.float32)
    if rows is not None:
        _check_array("rows", rows, (count,), np.int64)
    if add is not None:
        _check_array("add", add, (count, width), out.dtype.type)
    library = _library()
    if library is None:
        _spmm_numpy(indptr, indices, x, left, right, rows, add, out)
        return out
    status = library.pocketrec_spmm(
        _pointer(indptr), _pointer(indices), len(indptr) - 1, len(x), len(indices), _pointer(x), _NUMBERS[x.dtype],
        _pointer(out), _NUMBERS[out.dtype], _pointer(left), _pointer(right), _pointer(rows), _pointer(add), count,
        width, threads,
    )  # fmt: skip
    _check_status(status, "`indptr`, `indices` and `rows`")
    return out


def _check_csr(indptr: NDArray[np.int64], indices: NDArray[np.int32], columns: int) -> None:
    """Raise :class:`DataError` unless the arrays are a sparse matrix with ``columns`` columns."""
    ordered = indptr[0] >= 0 and indptr[-1] <= len(indices) and bool((np.diff(indptr) >= 0).all())
    if not ordered or (indices.size and not 0 <= indices.min() <= indices.max() < columns):
        _check_status(_BAD_INDEX, "`indptr` and `indices`")


def _spmm_numpy(
    indptr: NDArray[np.int64],
    indices: NDArray[np.int32],
    x: NDArray[Any],
    left: NDArray[np.float32] | None,
    right: NDArray[np.float32] | None,
    rows: NDArray[np.int64] | None,
    add: NDArray[Any] | None,
    out: NDArray[Any],
) -> None:
    _check_csr(indptr, indices, len(x))
    rows = np.arange(len(indptr) - 1) if rows is None else rows
    if rows.size and not 0 <= rows.min() <= rows.max() < len(indptr) - 1:
        _check_status(_BAD_INDEX, "`rows`")
    lengths = indptr[rows + 1] - indptr[rows]
    chunks = np.searchsorted(np.cumsum(lengths), np.arange(_CHUNK_ENTRIES, lengths.sum(), _CHUNK_ENTRIES))
    for part in np.split(np.arange(len(rows)), np.unique(chunks)):
        length = lengths[part]
        ends = np.cumsum(length)
        edges = np.repeat(indptr[rows[part]] - (ends - length), length) + np.arange(length.sum())
        neighbours = indices[edges]
        values = bf16_to_fp32(x[neighbours]) if x.dtype == np.uint16 else x[neighbours]
        if right is not None:
            values = values * right[neighbours, None]
        sums = np.zeros((len(part), x.shape[1]), np.float32)
        filled = np.flatnonzero(length)
        if filled.size:
            sums[filled] = np.add.reduceat(values, (ends - length)[filled], axis=0)
        if left is not None:
            sums *= left[rows[part], None]
        if add is not None:
            sums += bf16_to_fp32(add[part]) if add.dtype == np.uint16 else add[part]
        out[part] = fp32_to_bf16(sums) if out.dtype == np.uint16 else sums


def topk(
    users: NDArray[np.float32],
    items: NDArray[np.float32],
    seen_indptr: NDArray[np.int64] | None,
    seen_indices: NDArray[np.int32] | None,
    k: int,
    *,
    threads: int = 1,
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Find the ``k`` items of largest inner product for each user, without those the user has seen.

    Best first; of equal scores the smaller id comes first. NaN scores never rank. Memory is ``O((U + I) d + U k)``; no
    score matrix is made. The result does not depend on ``threads``. With VNNI, pairs are screened by eight-bit codes
    and a rigorous bound first; the lists stay those of fp32.

    Args:
        users: ``(U, d)``.
        items: ``(I, d)``.
        seen_indptr: ``(U + 1,)``, or ``None``.
        seen_indices: Items, ascending within each user, or ``None``.
        k: At least 1.
        threads: Threads, at least 1.

    Returns:
        Ids ``(U, k)``, -1 where fewer than ``k`` items are left, and scores ``(U, k)``, ``-inf`` there.

    Raises:
        DataError: A seen index is out of range, or not in order.

    Example:
        >>> import numpy as np
        >>> items = np.array([[1.0], [3.0], [2.0]], np.float32)
        >>> topk(np.ones((1, 1), np.float32), items, np.array([0, 1]), np.array([1], np.int32), 2)[0].tolist()
        [[2, 0]]
    """
    if k < 1:
        raise ConfigError(f"`k` must be at least 1, but got {k}.")
    users, items = np.ascontiguousarray(users, np.float32), np.ascontiguousarray(items, np.float32)
    _check_array("items", items, (len(items), users.shape[1]), np.float32)
    if seen_indptr is None or seen_indices is None:
        seen_indptr, seen_indices = np.zeros(len(users) + 1, np.int64), np.empty(0, np.int32)
    seen_indptr, seen_indices = (
        np.ascontiguousarray(seen_indptr, np.int64),
        np.ascontiguousarray(seen_indices, np.int32),
    )
    _check_array("seen_indptr", seen_indptr, (len(users) + 1,), np.int64)
    _check_csr(seen_indptr, seen_indices, len(items))
    _check_ascending(seen_indptr, seen_indices)
    library = _library()
    if library is None:
        return _topk_numpy(users, items, seen_indptr, seen_indices, k)
    ids, scores = np.empty((len(users), k), np.int32), np.empty((len(users), k), np.float32)
    status = library.pocketrec_topk(
        _pointer(users), len(users), _pointer(items), len(items), users.shape[1], _pointer(seen_indptr),
        _pointer(seen_indices), len(seen_indices), k, _pointer(ids), _pointer(scores), threads,
    )  # fmt: skip
    _check_status(status, "`seen_indptr`")
    return ids, scores


def _check_ascending(indptr: NDArray[np.int64], indices: NDArray[np.int32]) -> None:
    held = indices[indptr[0] : indptr[-1]]
    drops = np.flatnonzero(held[1:] < held[:-1]) + 1 + indptr[0]
    if not np.isin(drops, indptr).all():
        raise DataError("`seen_indices` must ascend within each user, but at least one user's do not; sort them.")


def _topk_numpy(
    users: NDArray[np.float32],
    items: NDArray[np.float32],
    seen_indptr: NDArray[np.int64],
    seen_indices: NDArray[np.int32],
    k: int,
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    block = 64
    found = [
        best(
            products(users[begin : begin + block], items),
            seen_indptr[begin : begin + block + 1],
            seen_indices,
            k,
        )
        for begin in range(0, len(users), block)
    ]
    if not found:
        return np.empty((0, k), np.int32), np.empty((0, k), np.float32)
    return np.concatenate([ids for ids, _ in found]), np.concatenate([scores for _, scores in found])


def products(users: NDArray[np.float32], items: NDArray[np.float32]) -> NDArray[np.float32]:
    """Inner products of all pairs, by numpy.

    In float64, then rounded: in float32 a library of linear algebra rounds a row by where it stands, and equal items
    would have unequal scores.

    Args:
        users: ``(U, d)``.
        items: ``(I, d)``; a part at a time is held in float64.

    Returns:
        ``(U, I)``.

    Example:
        >>> import numpy as np
        >>> products(np.array([[1, 2]], np.float32), np.array([[3, 4], [5, 6]], np.float32)).tolist()
        [[11.0, 17.0]]
    """
    scores, exact, wide = np.empty((len(users), len(items)), np.float32), users.astype(np.float64), 4096
    for left in range(0, len(items), wide):
        scores[:, left : left + wide] = exact @ items[left : left + wide].T.astype(np.float64)
    return scores


def best(
    scores: NDArray[np.float32], seen_indptr: NDArray[np.int64], seen_indices: NDArray[np.int32], k: int
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Find the ``k`` largest of each user's scores, without the items it has seen; see :func:`topk`.

    Args:
        scores: ``(U, I)``; it is overwritten.
        seen_indptr: ``(U + 1,)``, into ``seen_indices``.
        seen_indices: items.
        k: At least 1.
    """
    users, take = len(scores), min(k, scores.shape[1])
    ids, kept = np.full((users, k), -1, np.int32), np.full((users, k), -np.inf, np.float32)
    if not take:
        return ids, kept
    scores[np.repeat(np.arange(users), np.diff(seen_indptr)), seen_indices[seen_indptr[0] : seen_indptr[-1]]] = -np.inf
    scores[np.isnan(scores)] = -np.inf
    for user, (row, bound) in enumerate(zip(scores, _bounds(scores, take), strict=True)):
        chosen = np.flatnonzero(row >= bound)
        values = row[chosen]
        last = np.partition(values, len(values) - take)[-take]
        above, equal = np.flatnonzero(values > last), np.flatnonzero(values == last)
        places = np.sort(np.concatenate([above, equal[: take - len(above)]]))
        places = places[np.argsort(-values[places], kind="stable")]
        ids[user, :take], kept[user, :take] = chosen[places], values[places]
    ids[kept == -np.inf] = -1
    return ids, kept


def _bounds(scores: NDArray[np.float32], take: int) -> NDArray[np.float32]:
    """A number per row that at least ``take`` of its entries reach: the ``take``-th largest of the maxima of groups."""
    groups = max(take, scores.shape[1] // 64)
    starts = np.arange(groups) * scores.shape[1] // groups
    return np.partition(np.maximum.reduceat(scores, starts, axis=1), groups - take, axis=1)[:, groups - take]


def tower(
    users: NDArray[np.float32],
    items: NDArray[np.float32],
    bias: NDArray[np.float32],
    layers: Sequence[tuple[NDArray[np.float32], NDArray[np.float32]]],
    *,
    counts: tuple[NDArray[np.float32], NDArray[np.float32]] | None = None,
    threads: int = 1,
) -> NDArray[np.float32]:
    """Scores of all pairs by a perceptron, from the parts that users and items have in its first layer.

    ``h = max(0, (users[u] + items[i]) / max(1, counts[0][u] + counts[1][i]) + bias)``, then ``layers`` with a ReLU
    after each but the last. A pair's score does not depend on where user and item stand.

    Args:
        users: ``(U, o)``.
        items: ``(I, o)``.
        bias: of the first layer, ``(o,)``.
        layers: weight ``(outputs, inputs)`` and bias ``(outputs,)`` each, at least one; the last has one output.
        counts: ``(U,)`` and ``(I,)``; by default nothing is divided.
        threads: Threads, at least 1.

    Returns:
        ``(U, I)``.

    Example:
        >>> import numpy as np
        >>> ones = np.ones((1, 2), np.float32)
        >>> tower(ones, -3 * ones, 4 * ones[0], [(ones, ones[0, :1])]).tolist()
        [[5.0]]
    """
    users, items, bias = (np.ascontiguousarray(a, np.float32) for a in (users, items, bias))
    width = users.shape[1]
    _check_array("items", items, (len(items), width), np.float32)
    _check_array("bias", bias, (width,), np.float32)
    shapes = [weight.shape for weight, _ in layers]
    widths = [width, *(outputs for outputs, _ in shapes)]
    fit = [(outputs, inputs) for inputs, outputs in pairwise(widths)] == shapes and widths[-1] == 1 and bool(layers)
    if not fit or any(b.shape != (len(w),) for w, b in layers):
        raise ConfigError(f"`layers` must lead from {width} values to one, but their weights have shapes {shapes}.")
    if counts is not None:
        counts = np.ascontiguousarray(counts[0], np.float32), np.ascontiguousarray(counts[1], np.float32)
        _check_array("counts[0]", counts[0], (len(users),), np.float32)
        _check_array("counts[1]", counts[1], (len(items),), np.float32)
    out = np.empty((len(users), len(items)), np.float32)
    library = _library()
    if library is None:
        _tower_numpy(users, items, bias, layers, counts, out)
        return out
    weights = np.concatenate([np.asarray(a, np.float32).ravel() for layer in layers for a in layer])
    shape = np.array(widths, np.int64)
    status = library.pocketrec_tower(
        _pointer(users), _pointer(items), *((None, None) if counts is None else map(_pointer, counts)), _pointer(bias),
        len(users), len(items), width, _pointer(weights), _pointer(shape), len(layers), _pointer(out), threads,
    )  # fmt: skip
    _check_status(status, "`layers`")
    return out


def _tower_numpy(
    users: NDArray[np.float32],
    items: NDArray[np.float32],
    bias: NDArray[np.float32],
    layers: Sequence[tuple[NDArray[np.float32], NDArray[np.float32]]],
    counts: tuple[NDArray[np.float32], NDArray[np.float32]] | None,
    out: NDArray[np.float32],
) -> None:
    # In float64, as `products` does.
    tall, wide = 16, 128
    *hidden, (last, last_bias) = [(weight.astype(np.float64), shift.astype(np.float64)) for weight, shift in layers]
    for top in range(0, len(users), tall):
        for right in range(wide, len(items) + wide, wide):
            stop = min(right, len(items))
            tile = np.s_[top : top + tall, max(0, stop - wide) : stop]
            x = users[tile[0], None] + items[tile[1]]
            if counts is not None:
                x /= np.maximum(counts[0][tile[0], None] + counts[1][tile[1]], 1)[..., None]
            x = np.maximum(x + bias, 0).reshape(-1, len(bias)).astype(np.float64)
            for weight, shift in hidden:
                x = np.maximum(x @ weight.T + shift, 0)
            out[tile] = (x @ last.T + last_bias).reshape(out[tile].shape)
