"""Products of unweighted sparse matrices, in float32 or bfloat16: graph propagation."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from pocketrec.native import library
from pocketrec.native.library import check_array, pointer

_CHUNK_ENTRIES = 1 << 16


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
        >>> indptr, indices = np.array([0, 2, 3]), np.array([0, 2, 1], np.int32)
        >>> spmm(indptr, indices, np.array([[1], [2], [4]], np.float32)).tolist()
        [[5.0], [2.0]]
    """
    if out is None:
        out = np.empty((len(indptr) - 1 if rows is None else len(rows), x.shape[1]), x.dtype)
    product = _Product(indptr, indices, x, left, right, rows, add, out)
    _check_spmm(product)
    if library.available():
        _spmm_compiled(product, threads)
    else:
        _spmm_numpy(product)
    return out


class _Product(NamedTuple):
    """The arguments of :func:`spmm`."""

    indptr: NDArray[np.int64]
    indices: NDArray[np.int32]
    x: NDArray[Any]
    left: NDArray[np.float32] | None
    right: NDArray[np.float32] | None
    rows: NDArray[np.int64] | None
    add: NDArray[Any] | None
    out: NDArray[Any]


def _check_spmm(product: _Product) -> None:
    """Raise :class:`ConfigError` unless types and shapes fit."""
    indptr, indices, x, left, right, rows, add, out = product
    count, width = len(indptr) - 1 if rows is None else len(rows), x.shape[1]
    check_array("indptr", indptr, (len(indptr),), np.int64)
    check_array("indices", indices, (len(indices),), np.int32)
    check_array("x", x, (len(x), width), np.float32, np.uint16)
    check_array("out", out, (count, width), np.float32, np.uint16)
    if left is not None:
        check_array("left", left, (len(indptr) - 1,), np.float32)
    if right is not None:
        check_array("right", right, (len(x),), np.float32)
    if rows is not None:
        check_array("rows", rows, (count,), np.int64)
    if add is not None:
        check_array("add", add, (count, width), out.dtype.type)


def _spmm_compiled(product: _Product, threads: int) -> None:
    indptr, indices, x, left, right, rows, add, out = product
    status = library.needed().pocketrec_spmm(
        pointer(indptr), pointer(indices), len(indptr) - 1, len(x), len(indices), pointer(x), library.NUMBERS[x.dtype],
        pointer(out), library.NUMBERS[out.dtype], pointer(left), pointer(right), pointer(rows), pointer(add), len(out),
        x.shape[1], threads,
    )  # fmt: skip
    library.check_status(status, "`indptr`, `indices` and `rows`")


def check_csr(indptr: NDArray[np.int64], indices: NDArray[np.int32], columns: int) -> None:
    """Raise :class:`DataError` unless the arrays are a sparse matrix with ``columns`` columns."""
    ordered = indptr[0] >= 0 and indptr[-1] <= len(indices) and bool((np.diff(indptr) >= 0).all())
    if not ordered or (indices.size and not 0 <= indices.min() <= indices.max() < columns):
        library.check_status(library.BAD_INDEX, "`indptr` and `indices`")


def _spmm_numpy(product: _Product) -> None:
    indptr, indices, x, left, right, rows, add, out = product
    check_csr(indptr, indices, len(x))
    rows = np.arange(len(indptr) - 1) if rows is None else rows
    if rows.size and not 0 <= rows.min() <= rows.max() < len(indptr) - 1:
        library.check_status(library.BAD_INDEX, "`rows`")
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
