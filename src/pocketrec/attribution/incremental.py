"""A head that follows single changed coordinates: what a permutation walk needs.

Ops that read the vectors directly (first linear layer, factorisation machine, sums, inner product) are affine in each
coordinate, so their outputs are updated in place; only what lies behind them is run again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pocketrec.attribution.lowered import Dot, FirstLinear, LoweredHead, LoweredStep


@dataclass(frozen=True)
class _Change:
    """``vectors[b, field_b, column_b] += amount_b``, for each sample; ``before`` are the vectors before it."""

    before: Tensor
    row: Tensor
    player: Tensor
    field: Tensor
    column: Tensor
    amount: Tensor

    def within(self, columns: slice) -> Tensor:
        """The amounts, zero for coordinates outside the columns."""
        if columns == slice(None):
            return self.amount
        return torch.where((self.column >= columns.start) & (self.column < columns.stop), self.amount, 0.0)


class _Update:
    """The output of a step that reads ``columns`` of the vectors, kept up to date: here of a plain sum."""

    def __init__(self, step: LoweredStep, columns: slice, vectors: Tensor) -> None:
        self.step, self.columns = step, columns
        self.output = step.node.value(vectors[..., columns]).float()

    def apply(self, change: _Change) -> None:
        """``y += change``."""
        self.output += change.within(self.columns)


class _LinearUpdate(_Update):
    """``y += W[:, player] change``; the weight covers all columns."""

    def __init__(self, step: LoweredStep, columns: slice, vectors: Tensor) -> None:
        super().__init__(step, columns, vectors)
        weight = step.node.weight if isinstance(step.node, FirstLinear) else torch.empty(0, 0)
        self.weight = weight.float().T.contiguous()

    def apply(self, change: _Change) -> None:
        self.output.addcmul_(self.weight[change.player], change.amount[:, None])


class _FmUpdate(_Update):
    """``y += change * (sum_g x_gj - x_fj)``."""

    def __init__(self, step: LoweredStep, columns: slice, vectors: Tensor) -> None:
        super().__init__(step, columns, vectors)
        self.total = vectors.sum(dim=1)

    def apply(self, change: _Change) -> None:
        total = self.total[change.row, change.column]
        others = total - change.before[change.row, change.field, change.column]
        self.output.addcmul_(change.within(self.columns), others)
        self.total[change.row, change.column] = total + change.amount


class _DotUpdate(_Update):
    """``y += change * h * x_(other field)``."""

    def apply(self, change: _Change) -> None:
        other = change.before[change.row, 1 - change.field, change.column]
        weight = self.step.node.weight if isinstance(self.step.node, Dot) else None
        if weight is not None:
            first = self.columns.start or 0
            other = other * weight[(change.column - first).clamp(0, len(weight) - 1)]
        self.output.addcmul_(change.within(self.columns), other)


_UPDATES: Mapping[str, Callable[[LoweredStep, slice, Tensor], _Update]] = {
    "linear": _LinearUpdate,
    "fm": _FmUpdate,
    "sum": _Update,
    "dot": _DotUpdate,
}


class IncrementalLogits:
    """Logits of ``vectors (B, P, D)`` while one coordinate of each sample changes at a time."""

    def __init__(self, head: LoweredHead, vectors: Tensor) -> None:
        self.head = head
        self.vectors = vectors.clone()
        self.row = torch.arange(len(vectors))
        self.updates: dict[str, _Update] = {}
        for step in head.steps:
            (source, *_), kind = step.inputs, step.node.op.kind
            if isinstance(source, slice) and kind in _UPDATES:
                self.updates[step.output] = _UPDATES[kind](step, source, self.vectors)
        self.rest = self._behind()

    def _behind(self) -> tuple[LoweredStep, ...]:
        """The steps that have to run again: those on the way from the updated outputs to the logit."""
        wanted: set[str | slice] = {self.head.output}
        found: list[LoweredStep] = []
        for step in reversed(self.head.steps):
            if step.output in wanted and step.output not in self.updates:
                wanted.update(i for i in step.inputs if isinstance(i, str))
                found.append(step)
        return tuple(reversed(found))

    def set(self, player: Tensor, new: Tensor) -> Tensor:
        """Set coordinate ``player (B,)`` of the flattened vectors to ``new (B,)``; the logits ``(B,)`` after it."""
        field, column = player // self.vectors.shape[-1], player % self.vectors.shape[-1]
        amount = new - self.vectors[self.row, field, column]
        change = _Change(self.vectors, self.row, player, field, column, amount)
        for update in self.updates.values():
            update.apply(change)
        self.vectors[self.row, field, column] = new
        values = {name: update.output for name, update in self.updates.items()}
        for step in self.rest:
            values[step.output] = step.node.value(*step.read(self.vectors, values))
        return values[self.head.output]
