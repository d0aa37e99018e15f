"""Scores of every pair of a user and an item by a lowered head: what full ranking needs. Torch-free.

What depends on one entity alone is computed once per entity: the weights of an inner product go into the user vectors,
and the first layer of a perceptron on ``[u, v]`` splits into ``W_u u + W_v v``. The rest of the head runs on tiles of
pairs. Validation, measurement and files all rank with this code.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pocketrec.format.program import Array, Op, Program
from pocketrec.format.program import kernel as reference
from pocketrec.native import topk

Csr: TypeAlias = tuple[NDArray[np.int64], NDArray[np.int32]]
"""``(indptr (rows + 1,), indices (nnz,))``: the columns of row ``r`` are ``indices[indptr[r]:indptr[r + 1]]``."""

USERS, ITEMS = 64, 32
"""Users and items of a tile: its layers stay in cache. Tiles are of one size, and so equal items have equal scores."""

CHEAP = ("add", "sum")
"""Ops on scores alone: where no other is left, a tile holds all items."""

INNER_PRODUCT = Program((Op("dot", ("vectors",), "score"),))


def product_weight(head: Program) -> Array | None:
    """``h (d,)`` if the head is ``sum_j h_j u_j v_j + b``, of ones or its own weights; ``None`` for other heads."""
    op = head.ops[0]
    if len(head.ops) > 1 or op.kind != "dot":
        return None
    return op.tensors.get("weight", np.ones(1, np.float32))


@dataclass(frozen=True)
class _PairVectors:
    """The two vectors of a pair: ``(U, d)`` and ``(I, d)``; ``flat`` is their concatenation, ``/ count`` a mean."""

    users: Array
    items: Array
    flat: bool = False
    counted: bool = False

    def tile(self, rows: NDArray[np.int64], columns: slice) -> NDArray[Any]:
        """``(b i, 2, d)``, or ``(b i, 2 d)`` where it is flat; float64, so that equal pairs stay equal."""
        users, items = self.users[rows].astype(np.float64), self.items[columns]
        shape = (len(users), len(items), users.shape[1])
        pair = np.stack([np.broadcast_to(users[:, None], shape), np.broadcast_to(items, shape)], axis=2)
        pair = pair.reshape(-1, *((2 * shape[2],) if self.flat else (2, shape[2])))
        if not self.counted:
            return pair
        return pair / np.maximum(np.count_nonzero(pair, axis=1), 1)[:, None]


@dataclass(frozen=True)
class _PairSum:
    """A linear layer of the concatenation: ``(users[u] + items[i]) / (counts[0][u] + counts[1][i]) + bias``."""

    users: Array
    items: Array
    bias: Array
    counts: tuple[Array, Array] | None = None

    def tile(self, rows: NDArray[np.int64], columns: slice) -> Array:
        """``(b i, o)``."""
        total = self.users[rows][:, None] + self.items[columns]
        if self.counts is not None:
            total /= np.maximum(self.counts[0][rows][:, None] + self.counts[1][columns], 1)[..., None]
        total += self.bias
        return total.reshape(-1, total.shape[-1])


@dataclass(frozen=True)
class _PairProduct:
    """An inner product ``users[u] . items[i] + bias``."""

    users: Array
    items: Array
    bias: float

    @cached_property
    def padded(self) -> Array:
        """Items and zeros behind them, up to a whole tile."""
        return np.pad(self.items, ((0, -len(self.items) % ITEMS), (0, 0)))

    def tile(self, rows: NDArray[np.int64], columns: slice) -> Array:
        """``(b i,)``."""
        count = columns.stop - columns.start
        items = self.padded[columns.start : columns.stop + -count % ITEMS]
        return (topk.products(self.users[rows], items) + np.float32(self.bias))[:, :count].reshape(-1)


@dataclass(frozen=True)
class _PairTower:
    """A perceptron above its first layer: further layers, each behind a ReLU; ``clipped`` where one comes last."""

    first: _PairSum
    layers: tuple[tuple[Array, Array], ...] = ()
    clipped: bool = True
    score: bool = False

    def tile(self, rows: NDArray[np.int64], columns: slice) -> Array:
        """``(b i,)`` scores, or ``(b i, o)`` of a layer inside."""
        if self.score:
            return self.scores(rows, columns).reshape(-1)
        x = np.maximum(self.first.tile(rows, columns), 0).astype(np.float64)
        for i, (weight, bias) in enumerate(self.layers):
            x = (np.maximum(x, 0) if i else x) @ weight.T + bias
        x = x.astype(np.float32)
        return np.maximum(x, 0) if self.clipped else x

    def scores(self, rows: NDArray[np.int64], columns: slice) -> Array:
        """``(b, i)`` scores."""
        first = self.first
        counts = None if first.counts is None else (first.counts[0][rows], first.counts[1][columns])
        return topk.tower(first.users[rows], first.items[columns], first.bias, self.layers, counts=counts)


_PairValue: TypeAlias = _PairVectors | _PairSum | _PairProduct | _PairTower


class AllPairs:
    """A head over all users and items.

    Args:
        head: scores a pair of final vectors ``(B, 2, d)``.
        users: ``(U, d)`` float32.
        items: ``(I, d)`` float32.

    Example:
        >>> pairs = AllPairs(INNER_PRODUCT, np.ones((1, 2), np.float32), np.array([[1, 2], [3, 4]], np.float32))
        >>> pairs.scores(np.array([0])).tolist()
        [[3.0, 7.0]]
    """

    def __init__(self, head: Program, users: Array, items: Array) -> None:
        self.output = head.ops[-1].output
        self.count = len(items)
        self.known: dict[str, _PairValue] = {"vectors": _PairVectors(users, items)}
        self.steps: list[Op] = []
        self.columns = self.count
        for op in head.ops:
            folded = _fold(op, self.known.get(op.inputs[0]))
            if folded is None:
                self.steps.append(op)
                self.columns = self.columns if op.kind in CHEAP else ITEMS
            else:
                self.known[op.output] = folded

    def scores(self, rows: NDArray[np.int64]) -> Array:
        """Scores of all items for the users ``rows (B,)``: ``(B, I)`` float32."""
        out = np.empty((len(rows), self.count), np.float32)
        for top in range(0, len(rows), USERS):
            part = rows[top : top + USERS]
            for left in range(0, self.count, self.columns):
                stop = min(left + self.columns, self.count)
                columns = slice(max(0, stop - self.columns), stop)
                out[top : top + USERS, columns] = self._tile(part, columns)
        return out

    def _tile(self, rows: NDArray[np.int64], columns: slice) -> Array:
        """Scores ``(b, i)`` of a tile."""
        values: dict[str, Array] = {}

        def value(name: str) -> Array:
            if name not in values:
                values[name] = self.known[name].tile(rows, columns)
            return values[name]

        for op in self.steps:
            values[op.output] = reference(op.kind)(op, *(value(name) for name in op.inputs))
        return value(self.output).reshape(len(rows), -1)

    def topk(self, rows: NDArray[np.int64], seen: Csr, k: int, *, threads: int = 1) -> tuple[NDArray[np.int32], Array]:
        """The ``k`` best items of each user in ``rows (B,)`` that are not in its row of ``seen``; best first.

        Of equal scores the smaller id comes first; NaN never ranks. See :func:`pocketrec.native.topk.topk`.
        """
        final = self.known.get(self.output)
        if isinstance(final, _PairProduct):
            ids, scores = topk.topk(final.users[rows], final.items, *seen, k, threads=threads)
            return ids, scores + np.float32(final.bias)
        indptr, indices = seen

        def best(top: int) -> tuple[NDArray[np.int32], Array]:
            return topk.best(self.scores(rows[top : top + USERS]), indptr[top : top + USERS + 1], indices, k)

        with ThreadPoolExecutor(threads) as pool:
            found = list(pool.map(best, range(0, len(rows), USERS)))
        if not found:
            return np.empty((0, k), np.int32), np.empty((0, k), np.float32)
        return np.concatenate([ids for ids, _ in found]), np.concatenate([scores for _, scores in found])


def _fold(op: Op, value: _PairValue | None) -> _PairValue | None:
    """What the op makes of a value that is known per entity, or ``None`` where only pairs have it."""
    if len(op.inputs) > 1:
        return None
    if isinstance(value, _PairSum) and op.kind == "relu":
        return _PairTower(value)
    if isinstance(value, _PairTower) and not value.score:
        return _climb(op, value)
    if not isinstance(value, _PairVectors):
        return None
    if op.kind == "columns" and not value.flat:
        columns = slice(int(op.attributes["start"]), int(op.attributes["stop"]))
        return _PairVectors(value.users[:, columns], value.items[:, columns])
    if op.kind == "flatten" and not value.flat:
        return replace(value, flat=True)
    if op.kind == "nonzero_mean" and value.flat and not value.counted:
        return replace(value, counted=True)
    if op.kind == "linear" and value.flat:
        return _first_layer(op, value)
    if op.kind == "dot" and not value.flat:
        users = value.users * op.tensors["weight"] if "weight" in op.tensors else value.users
        return _PairProduct(users, value.items, float(op.tensors.get("bias", 0.0)))
    return None


def _climb(op: Op, value: _PairTower) -> _PairTower | None:
    """A perceptron with one op more."""
    if op.kind == "relu":
        return replace(value, clipped=True)
    if op.kind == "linear" and value.clipped:
        return replace(value, layers=(*value.layers, (op.tensors["weight"], op.tensors["bias"])), clipped=False)
    if op.kind == "sum":
        shift = np.float32(op.tensors.get("bias", 0.0))
        if value.clipped:
            inputs = len(value.layers[-1][1]) if value.layers else len(value.first.bias)
            total = (np.ones((1, inputs), np.float32), np.array([shift]))
            return replace(value, layers=(*value.layers, total), clipped=False, score=True)
        *inner, (weight, bias) = value.layers
        total = (weight.sum(axis=0, keepdims=True), bias.sum(keepdims=True) + shift)
        return replace(value, layers=(*inner, total), score=True)
    return None


def _first_layer(op: Op, value: _PairVectors) -> _PairSum:
    """``W [u, v] = W_u u + W_v v``, once per entity."""
    weight, width = op.tensors["weight"], value.users.shape[1]
    parts = (value.users, value.items)
    counts = tuple(np.count_nonzero(part, axis=1).astype(np.float32) for part in parts) if value.counted else None
    users, items = map(topk.products, parts, (weight[:, :width], weight[:, width:]))
    return _PairSum(users, items, op.tensors["bias"], counts)
