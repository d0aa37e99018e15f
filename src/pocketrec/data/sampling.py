"""Triples for ranking: every pair once per epoch, with uniform negatives each."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketrec.errors import DataError
from pocketrec.randomness import generator


def triples(
    pairs: NDArray[np.integer[Any]],
    users: int,
    rows: int,
    seed: int,
    epoch: int,
    *,
    shuffle: bool = True,
    negatives: int = 1,
    seen: NDArray[np.integer[Any]] | None = None,
) -> NDArray[np.int64]:
    """One epoch of ``(user, positive, negative, ...)``, a pure function of its arguments.

    Each pair comes once, in an order drawn from ``(seed, epoch)``; its negatives are uniform and independent over the
    items that are not among the user's pairs. They are drawn for all pairs at once, and those that hit a pair again.

    Args:
        pairs: pairs of global ids (user, item), ``(N, 2)``.
        users: number of users; items are ``[users, rows)``.
        rows: rows of the table.
        seed: of the training.
        epoch: counted from 0.
        shuffle: ``False`` keeps the order of the pairs.
        negatives: ``K``, of each pair, at least 1.
        seen: further pairs ``(M, 2)`` that are no negatives: those of training, where ``pairs`` are not.

    Returns:
        Global ids, ``(N, 2 + K)``.

    Raises:
        DataError: a user has every item, so that there is no negative.

    Example:
        >>> triples(np.array([[0, 2], [1, 3]]), users=2, rows=4, seed=0, epoch=0, shuffle=False).tolist()
        [[0, 2, 3], [1, 3, 2]]
    """
    positive = np.asarray(pairs, dtype=np.int64)
    others = np.empty((0, 2), np.int64) if seen is None else np.asarray(seen, dtype=np.int64)
    known = np.unique(np.concatenate([part[:, 0] * rows + part[:, 1] for part in (positive, others)]))
    full = np.flatnonzero(np.bincount(known // rows, minlength=1) >= rows - users)
    if len(full):
        raise DataError(f"Every user must lack at least one item, but user {full[0]} has all {rows - users}; drop it.")
    order = generator(seed, "order", epoch).permutation(len(positive)) if shuffle else np.arange(len(positive))
    drawn = np.repeat(positive[order, 0] * rows, negatives)
    items = _negatives(drawn, known, users, rows, generator(seed, "negatives", epoch))
    return np.concatenate([positive[order], items.reshape(-1, negatives)], axis=1)


def _negatives(
    bases: NDArray[np.int64], known: NDArray[np.int64], users: int, rows: int, random: np.random.Generator
) -> NDArray[np.int64]:
    """One item per ``base = user * rows`` such that ``base + item`` is not in the sorted ``known``."""
    items = random.integers(users, rows, len(bases))
    wrong = np.arange(len(bases))
    while len(wrong):
        keys = bases[wrong] + items[wrong]
        place = np.minimum(np.searchsorted(known, keys), len(known) - 1)
        wrong = wrong[known[place] == keys]
        items[wrong] = random.integers(users, rows, len(wrong))
    return items
