"""AUC, log-loss, NDCG and recall: pure functions on numpy arrays. Torch-free.

They are exact where the definition is exact (AUC counts pairs in integers) and stable where it is not (log-loss comes
from logits). Ranking is full ranking over all items, in blocks of users: memory is bounded by the block, and no figure
depends on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pocketrec.errors import DataError, DivergedError
from pocketrec.evaluation.full_ranking import INNER_PRODUCT, AllPairs, Csr
from pocketrec.format.program import Program

TILE = 64
"""Users that share a tile of scores: blocks are whole tiles, so each user's scores are the same in all of them."""

POPULAR, MARGIN = 2048, 1e-3
"""Items that :func:`mean_ndcg` tries first, and how near scores may be, against the user's largest, to be left open."""


def auc(labels: ArrayLike, scores: ArrayLike) -> float | None:
    """Area under the ROC curve: the share of (positive, negative) pairs in the right order, ties counting one half.

    ``AUC = sum_g p_g (2 N_<g + n_g) / (2 P N)`` over groups ``g`` of equal score, with ``p_g``/``n_g`` positives and
    negatives in the group and ``N_<g`` negatives below it: counted in integers, so the rank statistic is exact.

    Args:
        labels: ``(n,)``, 0 or 1.
        scores: ``(n,)``, any increasing function of the click probability; infinite values are allowed.

    Returns:
        A number in [0, 1], or ``None`` where only one class is present.

    Raises:
        DataError: shapes differ, or a label is neither 0 nor 1.
        DivergedError: a score is not a number.

    Example:
        >>> auc([0, 1, 1, 0], [0.1, 0.9, 0.4, 0.4])
        0.875
    """
    truth, values = _pair(labels, scores)
    order = np.argsort(values, kind="stable")
    ranked = values[order]
    starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]]) if len(ranked) else np.zeros(0, np.int64)
    sizes = np.diff(np.r_[starts, len(ranked)])
    positives = np.add.reduceat(truth[order].astype(np.int64), starts) if len(starts) else np.zeros(0, np.int64)
    negatives = sizes - positives
    pairs = int(positives.sum()) * int(negatives.sum())
    if pairs == 0:
        return None
    below = np.cumsum(negatives) - negatives
    return int((positives * (2 * below + negatives)).sum()) / (2 * pairs)


def logloss(labels: ArrayLike, logits: ArrayLike) -> float:
    """Mean binary cross-entropy in nats, from logits: ``mean log(1 + exp(-(2y - 1) z))``.

    Nothing is clipped: an infinite logit on the right side costs 0, on the wrong side infinity.

    Args:
        labels: ``(n,)``, 0 or 1.
        logits: ``(n,)``, log-odds of a click.

    Raises:
        DataError: shapes differ, nothing is there, or a label is neither 0 nor 1.
        DivergedError: a logit is not a number.

    Example:
        >>> round(logloss([1, 0], [0.0, 0.0]), 6)
        0.693147
    """
    truth, values = _pair(labels, logits)
    if not len(truth):
        raise DataError("Log-loss needs at least one row, but got none; measure a split that has rows.")
    return float(np.logaddexp(0.0, np.where(truth, -values, values)).mean())


def _pair(labels: ArrayLike, scores: ArrayLike) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Checked labels as booleans and scores as float64, both ``(n,)``."""
    truth = np.asarray(labels)
    values = np.asarray(scores, dtype=np.float64)
    if truth.shape != values.shape or truth.ndim != 1:
        raise DataError(f"Labels and scores must both be (n,), but got {truth.shape} and {values.shape}.")
    if not np.isin(truth, (0, 1)).all():
        raise DataError("Labels must be 0 or 1, but other values came; encode the label column first.")
    if np.isnan(values).any():
        row = int(np.flatnonzero(np.isnan(values))[0])
        raise DivergedError(f"Scores must be numbers, but row {row} is NaN; the model or its table diverged.")
    return truth == 1, values


@dataclass(frozen=True)
class Ranking:
    """Per-user figures of a full ranking, over the users with a non-empty truth set.

    ``hits_r`` is 1 where the item at rank ``r`` is in the user's truth set ``T``:
    ``ndcg = sum_{r<=k} hits_r / log2(r + 1)  /  sum_{r<=min(|T|,k)} 1 / log2(r + 1)``;
    ``recall = |hits| / |T|``; ``recall_capped = |hits| / min(|T|, k)``. ``lists`` ``(U', k)`` holds the items at the
    ranks, -1 where fewer are left to rank; ``hits`` ``(U', k)`` are the ``hits_r``, ``sizes`` ``(U',)`` the ``|T|``.
    """

    k: int
    users: NDArray[np.int64]
    ndcg: NDArray[np.float64]
    recall: NDArray[np.float64]
    recall_capped: NDArray[np.float64]
    lists: NDArray[np.int32]
    hits: NDArray[np.bool_]
    sizes: NDArray[np.int64]

    def at(self, k: int) -> Ranking:
        """The same ranking, scored by its first ``k`` places.

        Raises:
            DataError: ``k`` is below 1, or beyond the lists.
        """
        if not 1 <= k <= self.k:
            raise DataError(f"`k` must lie in [1, {self.k}], the length of the lists, but got k={k}.")
        return _score_lists(self.users, self.lists[:, :k], self.hits[:, :k], self.sizes)

    def quality(self) -> dict[str, float | None]:
        """Means over users: ``ndcg@k``, ``recall@k``, ``recall_capped@k``; ``None`` where no user has a truth set."""
        return {
            f"{name}@{self.k}": float(values.mean()) if len(values) else None
            for name, values in (("ndcg", self.ndcg), ("recall", self.recall), ("recall_capped", self.recall_capped))
        }


def ranking(
    user_vectors: NDArray[np.float32],
    item_vectors: NDArray[np.float32],
    seen: Csr,
    truth: Csr,
    k: int = 20,
    *,
    head: Program = INNER_PRODUCT,
    block: int = 4096,
    threads: int = 1,
) -> Ranking:
    """Rank all items for every user with a truth set and score the first ``k``.

    Items in ``seen`` are left out; equal scores rank by item id. Memory is ``O(U k)`` on top of that of
    :class:`~pocketrec.evaluation.full_ranking.AllPairs`, and the result does not depend on ``block``.

    Args:
        user_vectors: ``(U, d)`` float32.
        item_vectors: ``(I, d)`` float32.
        seen: training items per user, sorted, never ranked.
        truth: the items to find per user.
        k: length of the list, at least 1.
        head: scores a pair of vectors; by default their inner product.
        block: users per block, rounded up to whole tiles.
        threads: threads of the scoring kernel.

    Raises:
        DataError: the shapes do not belong together, or ``k`` is below 1.
        DivergedError: a vector is not finite.
    """
    _check_ranking(user_vectors, item_vectors, seen, truth, k)
    pairs = AllPairs(head, user_vectors, item_vectors)
    sizes = np.diff(truth[0])
    users = np.flatnonzero(sizes)
    step = -(-block // TILE) * TILE
    lists = np.empty((len(users), k), dtype=np.int32)
    relevance = np.empty((len(users), k), dtype=np.bool_)
    for start in range(0, len(users), step):
        part = slice(start, start + step)
        some = users[part]
        lists[part], _ = pairs.topk(some, take_rows(seen, some), k, threads=threads)
        relevance[part] = _relevance(lists[part], take_rows(truth, some), len(item_vectors))
    return _score_lists(users, lists, relevance, sizes[users])


@dataclass(frozen=True)
class RankingTargets:
    """What full rankings of a split are judged by.

    Attributes:
        seen: training items per user, never ranked.
        truth: the items to find per user.
        popular: the items seen most often, rising, ``(m,)``.
        seen_popular: of these the seen ones per user, by their places among them.
    """

    seen: Csr
    truth: Csr
    popular: NDArray[np.int64]
    seen_popular: Csr

    @classmethod
    def of(cls, seen: Csr, truth: Csr, items: int) -> RankingTargets:
        """Popular are the ``POPULAR`` items most frequent in ``seen``, or none where these are half of all."""
        indptr, indices = seen
        counts = np.bincount(indices, minlength=items)
        popular = np.sort(np.argsort(-counts, kind="stable")[: POPULAR if items > 2 * POPULAR else 0])
        place = np.full(items, -1, np.int32)
        place[popular] = np.arange(len(popular))
        places = place[indices]
        before = np.concatenate([[0], np.cumsum(places >= 0)])
        return cls(seen, truth, popular, (before[indptr], places[places >= 0]))


def mean_ndcg(
    user_vectors: NDArray[np.float32],
    item_vectors: NDArray[np.float32],
    wanted: RankingTargets,
    k: int = 20,
    *,
    head: Program = INNER_PRODUCT,
    threads: int = 1,
) -> float | None:
    """Mean NDCG@k over the users with a truth set, as :func:`ranking` has it, in a part of the time.

    Where ``k`` popular items that the user has not seen outscore the best item of its truth set, no item of that is in
    the list, and the figure is 0: only the other users' lists are looked for. ``None`` where no user has a truth set.

    Args:
        user_vectors: ``(U, d)`` float32.
        item_vectors: ``(I, d)`` float32.
        wanted: what to find, and what not to rank.
        k: length of the list, at least 1.
        head: scores a pair of vectors; by default their inner product.
        threads: threads of the scoring kernel.

    Raises:
        DataError: the shapes do not belong together, or ``k`` is below 1.
        DivergedError: a vector is not finite.
    """
    _check_ranking(user_vectors, item_vectors, wanted.seen, wanted.truth, k)
    sizes = np.diff(wanted.truth[0])
    users = np.flatnonzero(sizes)
    if not len(users):
        return None
    still = users[_contenders(user_vectors, item_vectors, wanted, users, k, head, threads)]
    left = np.zeros_like(sizes)
    left[still] = sizes[still]
    _, indices = take_rows(wanted.truth, still)
    truth = np.concatenate([[0], np.cumsum(left)]), indices
    found = ranking(user_vectors, item_vectors, wanted.seen, truth, k, head=head, threads=threads)
    figures = np.zeros(len(sizes))
    figures[found.users] = found.ndcg
    return float(figures[users].mean())


def _contenders(
    user_vectors: NDArray[np.float32],
    item_vectors: NDArray[np.float32],
    wanted: RankingTargets,
    users: NDArray[np.int64],
    k: int,
    head: Program,
    threads: int,
) -> NDArray[np.bool_]:
    """Which ``users (U',)`` may have an item of their truth sets among their first ``k``."""
    if len(wanted.popular) <= k:
        return np.ones(len(users), dtype=np.bool_)
    pairs = AllPairs(head, user_vectors, item_vectors[wanted.popular])
    _, best = pairs.topk(users, take_rows(wanted.seen_popular, users), k, threads=threads)
    indptr, indices = take_rows(wanted.truth, users)
    owner = np.repeat(users, np.diff(indptr))
    scores = head(np.stack([user_vectors[owner], item_vectors[indices]], axis=1))
    own = np.maximum.reduceat(scores, indptr[:-1])
    return own + MARGIN * np.maximum(np.abs(best[:, 0]), np.abs(own)) >= best[:, -1]


def _score_lists(
    users: NDArray[np.int64], lists: NDArray[np.int32], relevance: NDArray[np.bool_], sizes: NDArray[np.int64]
) -> Ranking:
    """The three figures from relevance flags ``(U', k)`` and truth-set sizes ``(U',)``."""
    k = lists.shape[1]
    discount = 1.0 / np.log2(np.arange(2, k + 2))
    gains = np.cumsum(relevance * discount, axis=1)[:, -1]
    ideal = np.cumsum(discount)[np.minimum(sizes, k) - 1]
    hits = relevance.sum(axis=1)
    return Ranking(k, users, gains / ideal, hits / sizes, hits / np.minimum(sizes, k), lists, relevance, sizes)


def _relevance(lists: NDArray[np.int32], truth: Csr, width: int) -> NDArray[np.bool_]:
    """Whether the item at each rank is in the truth set of its user: ``(U', k)``."""
    indptr, indices = truth
    owner = np.repeat(np.arange(len(lists)), np.diff(indptr))
    wanted = np.sort(owner * width + indices)
    keys = np.arange(len(lists))[:, None] * width + lists.astype(np.int64)
    position = np.minimum(np.searchsorted(wanted, keys), len(wanted) - 1)
    return (wanted[position] == keys) & (lists >= 0)


def take_rows(matrix: Csr, rows: NDArray[np.int64]) -> Csr:
    """The listed rows of a CSR pattern, in the listed order."""
    indptr, indices = matrix
    sizes = indptr[rows + 1] - indptr[rows]
    taken = np.zeros(len(rows) + 1, dtype=np.int64)
    np.cumsum(sizes, out=taken[1:])
    source = np.arange(taken[-1]) + np.repeat(indptr[rows] - taken[:-1], sizes)
    return taken, indices[source]


def to_csr(rows: NDArray[np.integer[Any]], columns: NDArray[np.integer[Any]], height: int) -> Csr:
    """Pairs -> CSR pattern of ``height`` rows, columns sorted and unique within a row."""
    order = np.lexsort((columns, rows))
    r, c = rows[order], columns[order]
    fresh = np.ones(len(r), dtype=np.bool_)
    fresh[1:] = (r[1:] != r[:-1]) | (c[1:] != c[:-1])
    indptr = np.zeros(height + 1, dtype=np.int64)
    np.cumsum(np.bincount(r[fresh], minlength=height), out=indptr[1:])
    return indptr, c[fresh].astype(np.int32)


def _check_ranking(
    user_vectors: NDArray[np.float32], item_vectors: NDArray[np.float32], seen: Csr, truth: Csr, k: int
) -> None:
    if k < 1:
        raise DataError(f"`k` must be at least 1, but got k={k}.")
    if user_vectors.ndim != 2 or item_vectors.ndim != 2 or user_vectors.shape[1] != item_vectors.shape[1]:
        raise DataError(
            f"Vectors must be (U, d) and (I, d) with one d, but got {user_vectors.shape} and {item_vectors.shape}."
        )
    for name, (indptr, indices) in (("seen", seen), ("truth", truth)):
        if len(indptr) != len(user_vectors) + 1:
            raise DataError(f"`{name}` must have {len(user_vectors)} rows, one per user, but has {len(indptr) - 1}.")
        if len(indices) and not (indices.min() >= 0 and indices.max() < len(item_vectors)):
            raise DataError(f"`{name}` must hold item ids in [0, {len(item_vectors)}), but others came.")
    for name, vectors in (("user", user_vectors), ("item", item_vectors)):
        if not np.isfinite(vectors).all():
            raise DivergedError(f"The {name} vectors must be finite, but some are not; the model diverged.")
