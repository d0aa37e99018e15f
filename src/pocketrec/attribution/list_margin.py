"""What errors in final vectors cost a ranking: squared changes of scores at the margin of the list.

Whether an item enters a user's list of ``k`` is decided among the items whose scores are close to the ``k``-th. Each
user spreads a weight of one over its best items, ``w_ui`` in proportion to ``exp(min((s_ui - s_k) / gap_u, 0))`` with
``gap_u = s_k - s_5k``. An error ``D`` in the vector of item ``i`` costs ``D^T H_i D`` with ``H_i = sum_u w_ui u u^T``,
one in that of user ``u`` costs it with ``H_u = sum_i w_ui v_i v_i^T``. To each a share of the mean over all rows is
added: what the lists of today do not read, others may. No label is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pocketrec.attribution.fisher import Sensitivity
from pocketrec.attribution.samples import training_rows
from pocketrec.data.dataset import Dataset
from pocketrec.evaluation.full_ranking import product_weight
from pocketrec.evaluation.metrics import to_csr
from pocketrec.models.backbone import Model, RankingModel
from pocketrec.native import topk
from pocketrec.schema import Field

LIST = 20
"""Items of a list."""
DEPTH = 10
"""Lists' lengths down to which items have a weight."""
EDGE = 5
"""Where the scores are read that the gap reaches down to, in lists' lengths."""

LEAST_GAP = 0.05
"""Share of the mean gap that each gap has at least."""

ITEM_SHARE, USER_SHARE = 1.0, 0.3
"""How much of the mean over all rows is added to the metric of an item and of a user; chosen on validation."""

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]


def ranks_by_products(model: Model) -> bool:
    """Whether scores are inner products, perhaps weighted ones, of the rows of the model's table."""
    return isinstance(model, RankingModel) and not model.propagates and product_weight(model.lower()) is not None


@dataclass(frozen=True)
class ListMargin:
    """The items at the margin of each user's list, and how users and items enter the scores.

    Attributes:
        items: best first, int32 ``(U, K)``; -1 where fewer are left.
        weights: they sum to one for each user, float32 ``(U, K)``; 0 where no item is.
        users: gradients of scores by item vectors, ``(U, d)``, of mean length one.
        vectors: gradients of scores by user vectors, ``(I, d)``.
        length: what ``users`` have been divided by.
    """

    items: NDArray[np.int32]
    weights: Floats
    users: Floats
    vectors: Floats
    length: float

    @cached_property
    def _by_item(self) -> tuple[Ints, Ints, Floats]:
        """For each item its span, users and weights."""
        flat = self.items.reshape(-1).astype(np.int64)
        order = np.argsort(flat, kind="stable")
        order = order[np.searchsorted(flat[order], 0) :]
        spans = np.concatenate([[0], np.cumsum(np.bincount(flat[order], minlength=len(self.vectors)))])
        return spans, order // self.items.shape[1], self.weights.reshape(-1)[order]

    @cached_property
    def item_traces(self) -> Floats:
        """Trace of each item's own part of the metric, ``(I,)``."""
        spans, users, weights = self._by_item
        lengths = np.square(self.users).sum(axis=1)[users] * weights
        sums = np.concatenate([[0], np.cumsum(lengths, dtype=np.float64)])
        found = np.diff(sums[spans])
        return (found + 1e-6 * max(float(found.mean()), 1e-30)).astype(np.float32)

    @cached_property
    def user_traces(self) -> Floats:
        """Trace of each user's own part of the metric, ``(U,)``."""
        lengths = np.square(self.vectors).sum(axis=1)
        return (self.weights * lengths[self.items]).sum(axis=1)

    def item_metrics(self, items: Ints) -> Floats:
        """``H_i`` of ``items (m,)``: ``(m, d, d)``."""
        spans, users, weights = self._by_item
        mean = _mean_square(self.users)
        found = np.empty((len(items), *mean.shape), np.float32)
        for place, item in enumerate(items.tolist()):
            own = slice(spans[item], spans[item + 1])
            read = self.users[users[own]]
            found[place] = (read * weights[own, None]).T @ read
        return found + (ITEM_SHARE * self.item_traces[items] / np.trace(mean))[:, None, None] * mean

    def user_metrics(self, users: Ints) -> Floats:
        """``H_u`` of ``users (m,)``: ``(m, d, d)``."""
        mean = _mean_square(self.vectors)
        read = self.vectors[self.items[users]]
        own = np.matmul((read * self.weights[users][..., None]).transpose(0, 2, 1), read)
        traces = np.maximum(self.user_traces[users], 1e-30)
        return own + (USER_SHARE * traces / np.trace(mean))[:, None, None] * mean

    def sensitivity(self, fields: tuple[Field, ...]) -> Sensitivity:
        """The same in one metric for all users and one for all items."""
        shape = (fields[-1].stop, self.vectors.shape[1])
        metric, trace = np.zeros((2, shape[1], shape[1]), np.float32), np.zeros(shape[0], np.float32)
        own = self.user_traces / self.length**2, self.item_traces
        for i, (field, part, read) in enumerate(zip(fields, own, (self.vectors, self.users), strict=True)):
            metric[i] = _mean_square(read)
            metric[i] *= part.sum() / max(float(np.trace(metric[i])), 1e-30)
            trace[field.offset : field.offset + len(part)] = part
        return Sensitivity(metric, trace)


def _mean_square(vectors: Floats) -> Floats:
    return (vectors.T @ vectors / np.float32(max(len(vectors), 1))).astype(np.float32)


def lists(model: Model, data: Dataset) -> dict[str, NDArray[Any]]:
    """The best items of each user without those of its training rows, and their weights; see :class:`ListMargin`.

    Raises:
        DivergedError: A vector is not finite.
    """
    users, items, _ = _vectors(model)
    first, second = data.schema.fields
    ids = training_rows(data.train).ids
    seen = to_csr(ids[:, 0], ids[:, 1] - second.offset, first.size)
    seen = seen[0][: len(users) + 1], seen[1]
    found, scores = topk.topk(users, items, *seen, min(DEPTH * LIST, len(items)), threads=torch.get_num_threads())
    there = found >= 0
    last = np.maximum(there.sum(axis=1) - 1, 0)
    row = np.arange(len(found))
    bar = scores[row, np.minimum(LIST - 1, last)]
    gap = bar - scores[row, np.minimum(EDGE * LIST - 1, last)]
    gap = np.where(np.isfinite(gap), gap, 0)
    gap = np.maximum(gap, max(LEAST_GAP * float(gap.mean()), 1e-30))
    with np.errstate(invalid="ignore"):
        weights = np.where(there, np.exp(np.minimum((scores - bar[:, None]) / gap[:, None], 0)), 0)
    weights = weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-30)
    return {"items": found, "weights": weights.astype(np.float32)}


def margin(model: Model, arrays: Mapping[str, NDArray[Any]]) -> ListMargin:
    """What :func:`lists` found, with the vectors of the model."""
    users, items, weight = _vectors(model)
    length = max(float(np.sqrt(np.square(users).sum(axis=1)).mean()), 1e-30)
    return ListMargin(arrays["items"], arrays["weights"], users / np.float32(length), items * weight, length)


def _vectors(model: Model) -> tuple[Floats, Floats, Floats]:
    """Gradients of scores by the vectors of items and users, and the weights of the products ``(d,)``."""
    matrix = model.table.finite()
    weight = product_weight(model.lower())
    weight = np.ones(matrix.shape[1], np.float32) if weight is None else weight
    first, second = model.schema.fields
    users, items = (matrix[f.offset : f.stop - f.oov] for f in (first, second))
    return (users * weight).astype(np.float32), np.ascontiguousarray(items, np.float32), weight.astype(np.float32)
