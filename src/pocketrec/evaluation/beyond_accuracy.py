"""What recommendation lists are like beyond accuracy: coverage, novelty, diversity, popularity. Torch-free.

Everything here is a function of the lists and of the *training interactions*, never of the vectors of the model that
made the lists: a compressed table is judged by the same yardstick as the dense one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketrec.errors import DataError
from pocketrec.evaluation.metrics import Csr, take_rows, to_csr

CELLS = 1 << 22
"""Cells of the largest intermediate array of :func:`diversity`."""

Lists = NDArray[np.integer[Any]]
"""Item ids ``(U, k)``, best first; -1 where a list is shorter."""


def beyond(lists: Lists, seen: Csr, truth: Csr, items: int) -> dict[str, float | None]:
    """The five figures of this module by name, ``coverage@k`` and so on; ``None`` where one is undefined.

    Args:
        lists: ``(U, k)`` recommended items, -1 for none.
        seen: training items per user, of all users.
        truth: held-out items per user, of all users.
        items: size of the catalogue.

    Raises:
        DataError: the lists are not ``(U, k)``, or hold items outside of the catalogue.

    Example:
        >>> seen = to_csr(np.array([0, 0, 1]), np.array([0, 1, 0]), 2)
        >>> truth = to_csr(np.array([0, 1]), np.array([2, 1]), 2)
        >>> beyond(np.array([[2], [1]]), seen, truth, items=4)["coverage@1"]
        0.5
    """
    if lists.ndim != 2 or (lists.size and not (lists.min() >= -1 and lists.max() < items)):
        raise DataError(f"Lists must be (U, k) with items below {items} or -1, but got {lists.shape} or other items.")
    counts = np.bincount(seen[1], minlength=items)
    figures = {
        "coverage": coverage(lists, items),
        "novelty": novelty(lists, counts, len(seen[0]) - 1),
        "diversity": diversity(lists, seen, items),
        "popularity": popularity_bias(lists, counts, truth[1]),
        "gini": gini(np.bincount(lists[lists >= 0], minlength=items)),
    }
    return {f"{name}@{lists.shape[1]}": value for name, value in figures.items()}


def coverage(lists: Lists, items: int) -> float:
    """Share of the catalogue that is in at least one list: ``|union of the lists| / I``, in [0, 1]."""
    return float(len(np.unique(lists[lists >= 0])) / items)


def novelty(lists: Lists, counts: NDArray[np.integer[Any]], users: int) -> float | None:
    """Mean self-information of a recommended item, in bits: ``mean -log2 p_i`` with ``p_i = max(c_i, 1) / U``.

    ``c_i`` of the ``U`` users have item ``i`` in training; an item that nobody has counts as one that one user has.

    Reference:
        Zhou et al., Solving the apparent diversity-accuracy dilemma of recommender systems, PNAS 2010.
    """
    listed = lists[lists >= 0]
    return float(-np.log2(np.maximum(counts[listed], 1) / users).mean()) if len(listed) else None


def popularity_bias(lists: Lists, counts: NDArray[np.integer[Any]], chosen: NDArray[np.integer[Any]]) -> float | None:
    """Mean training count of a recommended item over that of a held-out one: 1 is as popular as what users choose."""
    listed = lists[lists >= 0]
    reference = float(counts[chosen].mean()) if len(chosen) else 0.0
    return float(counts[listed].mean()) / reference if len(listed) and reference else None


def gini(exposure: NDArray[np.integer[Any]]) -> float | None:
    """Gini coefficient of exposure ``(I,)``: 0 where all items are shown alike, ``1 - 1/I`` where one has it all.

    ``G = sum_r (2 r - I - 1) x_(r) / (I sum x)`` over the exposures in ascending order.
    """
    total, size = int(exposure.sum()), len(exposure)
    if total == 0:
        return None
    ranks = 2 * np.arange(1, size + 1) - size - 1
    return int(ranks @ np.sort(exposure)) / (size * total)


def diversity(lists: Lists, seen: Csr, items: int) -> float | None:
    """Mean intra-list diversity: ``mean_u mean_{i<j in L_u} 1 - cos(i, j)``, over lists of two items or more.

    Items are compared by who has them in training: ``cos(i, j) = |U_i & U_j| / sqrt(|U_i| |U_j|)``; an item that nobody
    has is unlike all others. With unit vectors ``x_i`` over users, the sum over the pairs of a list is
    ``(||sum_i x_i||^2 - sum_i ||x_i||^2) / 2``: each list costs the interactions of its items, not its pairs.

    Reference:
        Ziegler et al., Improving recommendation lists through topic diversification, WWW 2005 (intra-list similarity).
    """
    users = len(seen[0]) - 1
    owners = to_csr(seen[1], np.repeat(np.arange(users), np.diff(seen[0])), items)
    audience = np.diff(owners[0])
    scale = 1 / np.sqrt(np.maximum(audience, 1))
    sizes = (lists >= 0).sum(axis=1)
    rows = np.flatnonzero(sizes > 1)
    step = max(1, CELLS // max(1, users))
    total = 0.0
    for start in range(0, len(rows), step):
        block = rows[start : start + step]
        position, place = np.nonzero(lists[block] >= 0)
        listed = lists[block][position, place].astype(np.int64)
        _, who = take_rows(owners, listed)
        cells = np.repeat(position * users, audience[listed]) + who
        sums = np.bincount(cells, np.repeat(scale[listed], audience[listed]), minlength=len(block) * users)
        squares = (sums.reshape(len(block), users) ** 2).sum(axis=1)
        alone = np.bincount(position, audience[listed] > 0, minlength=len(block))
        n = sizes[block]
        total += float((1 - (squares - alone) / (n * (n - 1))).sum())
    return total / len(rows) if len(rows) else None
