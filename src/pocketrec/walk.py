"""A head that follows single changed coordinates: what a permutation walk needs.

Ops that read the vectors directly (first linear layer, factorisation machine, sums, inner product) are affine in each
coordinate, so their outputs are updated in place; only what lies behind them is run again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from pocketrec.gradient import Head, Node


class _Update:
    """The output of one op on columns ``[start, stop)`` of the vectors, kept up to date."""

    def __init__(self, node: Node, columns: range, vectors: Tensor) -> None:
        self.node = node
        self.columns = columns
        self.row = torch.arange(len(vectors))
        self.output = node.value(*node.inputs).clone()

    def apply(self, vectors: Tensor, field: Tensor, column: Tensor, change: Tensor) -> None:
        """Follow ``vectors[b, field_b, column_b] += change_b``; ``vectors`` are still the old ones."""
        inside = (column >= self.columns.start) & (column < self.columns.stop)
        column = column.clamp(self.columns.start, self.columns.stop - 1)
        self.add(vectors, field, column, torch.where(inside, change, 0.0))

    def add(self, vectors: Tensor, field: Tensor, column: Tensor, change: Tensor) -> None:
        """``change`` is zero wherever the coordinate is not the op's; here for a plain sum."""
        self.output.add_(change)


class _LinearUpdate(_Update):
    """``y += W[:, player] change``."""

    def __init__(self, node: Node, columns: range, vectors: Tensor) -> None:
        super().__init__(node, columns, vectors)
        self.weight = torch.tensor(node.op.tensors["weight"]).T.contiguous()
        self.output = self.output.float()

    def add(self, vectors: Tensor, field: Tensor, column: Tensor, change: Tensor) -> None:
        player = field * len(self.columns) + column - self.columns.start
        self.output.addcmul_(self.weight[player], change[:, None])


class _FmUpdate(_Update):
    """``y += change * (sum_g x_gj - x_fj)``."""

    def __init__(self, node: Node, columns: range, vectors: Tensor) -> None:
        super().__init__(node, columns, vectors)
        self.total = vectors.sum(dim=1)

    def add(self, vectors: Tensor, field: Tensor, column: Tensor, change: Tensor) -> None:
        others = self.total[self.row, column] - vectors[self.row, field, column]
        self.output.addcmul_(change, others)
        self.total[self.row, column] += change


class _DotUpdate(_Update):
    """``y += change * x_(other field)``."""

    def add(self, vectors: Tensor, field: Tensor, column: Tensor, change: Tensor) -> None:
        self.output.addcmul_(change, vectors[self.row, 1 - field, column])


_UPDATES: Mapping[str, Callable[[Node, range, Tensor], _Update]] = {
    "linear": _LinearUpdate,
    "fm": _FmUpdate,
    "sum": _Update,
    "dot": _DotUpdate,
}


class Walk:
    """Logits of ``vectors (B, P, D)`` while one coordinate of each sample changes at a time."""

    def __init__(self, head: Head, vectors: Tensor) -> None:
        self.head = head
        self.vectors = vectors.clone()
        head.logits(self.vectors)
        views = {"vectors": range(vectors.shape[-1])}
        self.updates: dict[str, _Update] = {}
        for node in head.nodes:
            view = views.get(node.op.inputs[0])
            if view is None:
                continue
            if node.op.kind == "columns":
                views[node.op.output] = view[int(node.op.attributes["start"]) : int(node.op.attributes["stop"])]
            elif node.op.kind == "flatten":
                views[node.op.output] = view
            elif node.op.kind in _UPDATES:
                self.updates[node.op.output] = _UPDATES[node.op.kind](node, view, self.vectors)
        self.rest = self._behind()

    def _behind(self) -> tuple[Node, ...]:
        """The nodes that have to run again: those on the way from the updated outputs to the logit."""
        wanted = {self.head.nodes[-1].op.output}
        found: list[Node] = []
        for node in reversed(self.head.nodes):
            if node.op.output in wanted and node.op.output not in self.updates:
                wanted.update(node.op.inputs)
                found.append(node)
        return tuple(reversed(found))

    def set(self, player: Tensor, new: Tensor) -> Tensor:
        """Set coordinate ``player (B,)`` of the flattened vectors to ``new (B,)``; the logits ``(B,)`` after it."""
        field, column = player // self.vectors.shape[-1], player % self.vectors.shape[-1]
        row = torch.arange(len(player))
        change = new - self.vectors[row, field, column]
        for update in self.updates.values():
            update.apply(self.vectors, field, column, change)
        self.vectors[row, field, column] = new
        values = {"vectors": self.vectors, **{name: update.output for name, update in self.updates.items()}}
        for node in self.rest:
            values[node.op.output] = node.value(*(values[name] for name in node.op.inputs))
        return values[self.head.nodes[-1].op.output]
