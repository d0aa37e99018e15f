"""The best items of each user, by inner product or by given scores, and scores of all pairs by a perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pocketrec.errors import ConfigError, DataError
from pocketrec.native import library
from pocketrec.native.library import check_array, pointer
from pocketrec.native.sparse import check_csr


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
    check_array("items", items, (len(items), users.shape[1]), np.float32)
    seen_indptr, seen_indices = _seen(seen_indptr, seen_indices, len(users), len(items))
    compiled = library.compiled()
    if compiled is None:
        return _topk_numpy(users, items, seen_indptr, seen_indices, k)
    ids, scores = np.empty((len(users), k), np.int32), np.empty((len(users), k), np.float32)
    status = compiled.pocketrec_topk(
        pointer(users), len(users), pointer(items), len(items), users.shape[1], pointer(seen_indptr),
        pointer(seen_indices), len(seen_indices), k, pointer(ids), pointer(scores), threads,
    )  # fmt: skip
    library.check_status(status, "`seen_indptr`")
    return ids, scores


def _seen(
    indptr: NDArray[np.int64] | None, indices: NDArray[np.int32] | None, users: int, items: int
) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """What each user has seen as a sparse matrix, checked; nothing where there is none."""
    if indptr is None or indices is None:
        indptr, indices = np.zeros(users + 1, np.int64), np.empty(0, np.int32)
    indptr, indices = np.ascontiguousarray(indptr, np.int64), np.ascontiguousarray(indices, np.int32)
    check_array("seen_indptr", indptr, (users + 1,), np.int64)
    check_csr(indptr, indices, items)
    _check_ascending(indptr, indices)
    return indptr, indices


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
        best(products(users[begin : begin + block], items), seen_indptr[begin : begin + block + 1], seen_indices, k)
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
    check_array("items", items, (len(items), width), np.float32)
    check_array("bias", bias, (width,), np.float32)
    widths = _widths(width, layers)
    if counts is not None:
        counts = np.ascontiguousarray(counts[0], np.float32), np.ascontiguousarray(counts[1], np.float32)
        check_array("counts[0]", counts[0], (len(users),), np.float32)
        check_array("counts[1]", counts[1], (len(items),), np.float32)
    out = np.empty((len(users), len(items)), np.float32)
    if library.available():
        _tower_compiled(users, items, bias, layers, counts, out, widths, threads)
    else:
        _tower_numpy(users, items, bias, layers, counts, out)
    return out


def _widths(width: int, layers: Sequence[tuple[NDArray[np.float32], NDArray[np.float32]]]) -> list[int]:
    """Widths from ``width`` on to one.

    Raises:
        ConfigError: The layers do not lead there.
    """
    shapes = [weight.shape for weight, _ in layers]
    widths = [width, *(outputs for outputs, _ in shapes)]
    fit = [(outputs, inputs) for inputs, outputs in pairwise(widths)] == shapes and widths[-1] == 1 and bool(layers)
    if not fit or any(b.shape != (len(w),) for w, b in layers):
        raise ConfigError(f"`layers` must lead from {width} values to one, but their weights have shapes {shapes}.")
    return widths


def _tower_compiled(
    users: NDArray[np.float32],
    items: NDArray[np.float32],
    bias: NDArray[np.float32],
    layers: Sequence[tuple[NDArray[np.float32], NDArray[np.float32]]],
    counts: tuple[NDArray[np.float32], NDArray[np.float32]] | None,
    out: NDArray[np.float32],
    widths: list[int],
    threads: int,
) -> None:
    weights = np.concatenate([np.asarray(a, np.float32).ravel() for layer in layers for a in layer])
    shape = np.array(widths, np.int64)
    status = library.needed().pocketrec_tower(
        pointer(users), pointer(items), *((None, None) if counts is None else map(pointer, counts)), pointer(bias),
        len(users), len(items), widths[0], pointer(weights), pointer(shape), len(layers), pointer(out), threads,
    )  # fmt: skip
    library.check_status(status, "`layers`")


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
