"""Optimisers: dense Adam, and lazy row Adam with closed-form catch-up. Both follow one rule.

Adam with coupled weight decay, at step ``t = 1, 2, ...`` for a scalar ``w`` with gradient ``g``::

    g' = g + lambda w;   m = b1 m + (1 - b1) g';   v = b2 v + (1 - b2) g'^2
    w  = w - lr c(t) m / (sqrt(v) + eps sqrt(1 - b2^t)),     c(t) = sqrt(1 - b2^t) / (1 - b1^t)

:class:`DenseAdam` does exactly that to every parameter in every step. :class:`LazyAdam` does it to the head, but
touches only those rows of the table that a batch reads, and makes up for the ``k`` steps that a row has missed when it
is read again. In those steps its gradient is zero, which leaves two forces, and each has a closed form:

* Momentum: ``m`` and ``v`` decay by ``b1`` and ``b2`` a step. With ``r = b1 / sqrt(b2)`` a row last updated at step
  ``s`` moves by ``-lr m / (sqrt(v) + eps') * sum_{j=1..k} r^j c(s + j)``, and the sum is ``T(s) - r^k T(s + k)`` for
  ``T(s) = sum_{j>=1} r^j c(s + j)``, a table that is made once. Exact but for the growth of ``eps' / sqrt(v)``.
* Weight decay: the gradient is ``lambda w``, so ``v`` after ``j`` steps is ``b2^j v + (1 - b2^j) (lambda w)^2``. With
  ``w`` inside ``v`` held at its start, ``eps`` moved under the root, and the bias correction taken at the end,
  ``d log w / dj = -lr c lambda / sqrt(A + B b2^j)``, ``A = (lambda w)^2 + eps'^2``, ``B = v - (lambda w)^2``, whose
  integral over ``k`` steps is ``[k + (2 / theta) log((u_k + 1) / (u_0 + 1))] / sqrt(A)`` with ``theta = -log b2`` and
  ``u_j = sqrt(1 + B b2^j / A)``. The momentum that this force needs to build up takes the share ``(1 - b1^j)`` of step
  ``j``. Approximate in the constants; exact in the limits (no decay; ``v`` large; ``v`` forgotten).

So a row that is never read again shrinks to nothing, as under dense Adam. ``synchronise`` brings all rows up to date.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from pocketrec.backbone import Model
from pocketrec.errors import ConfigError, UnsupportedOp
from pocketrec.packed import Packed, Storage
from pocketrec.table import DenseTable, Table

BETAS = (0.9, 0.999)
EPS = 1e-8


class Optimizer(ABC):
    """Minimises the loss of ``model``: compute it, call ``backward`` on it, then ``step``.

    ``model`` is the model on which the loss must be computed; it shares all weights with the one given.
    """

    model: Model

    @abstractmethod
    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Name and gradient of every tensor that the last ``backward`` reached."""

    @abstractmethod
    def step(self) -> None:
        """Update the weights from the gradients, and forget these."""

    @abstractmethod
    def synchronise(self) -> None:
        """Make the weights what they would be if every step had updated all of them."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on besides the weights; ``restore`` takes it back."""

    @abstractmethod
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what ``state`` returned."""


class DenseAdam(Optimizer):
    """Adam with coupled weight decay on all trainable parameters, in one fused pass.

    Args:
        model: the model to train.
        learning_rate: step size, above 0.
        weight_decay: ``lambda``, at least 0.

    Reference:
        Adam: A Method for Stochastic Optimization, 2015, algorithm 1.
    """

    def __init__(self, model: Model, learning_rate: float, weight_decay: float) -> None:
        self.model = model
        self._named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._adam = _fused_adam(list(self._named.values()), learning_rate, weight_decay)

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Gradients of the last ``backward``."""
        return ((name, p.grad) for name, p in self._named.items() if p.grad is not None)

    def step(self) -> None:
        """Update the weights."""
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)

    def synchronise(self) -> None:
        """Nothing is ever late."""

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts."""
        return _moments(self._adam, self._named)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what ``state`` returned."""
        _restore_moments(self._adam, self._named, state)


class LazyAdam(Optimizer):
    """Adam that touches only the rows a batch reads, with closed-form catch-up; dense on the head.

    Args:
        model: a model around a :class:`~pocketrec.table.DenseTable` that looks rows up.
        learning_rate: step size, above 0.
        weight_decay: ``lambda``, at least 0.

    Raises:
        ConfigError: the table is not dense.
        UnsupportedOp: the model asks for the whole table, as graph models do.
    """

    def __init__(self, model: Model, learning_rate: float, weight_decay: float) -> None:
        if not isinstance(model.table, DenseTable):
            raise ConfigError(
                f"`optimizer='lazy_adam'` needs a DenseTable, but the model has a {type(model.table).__name__}; "
                "use 'adam'."
            )
        self._rule = RowRule(learning_rate, weight_decay)
        self._matrix = model.table.matrix.detach()
        self._first = torch.zeros_like(self._matrix)
        self._second = torch.zeros_like(self._matrix)
        self._updated = torch.zeros(len(self._matrix), dtype=torch.int32)
        self._steps = 0
        self._reads: list[tuple[Tensor, Tensor, Tensor]] = []
        self.model = model.with_table(_Lookups(model.table, self))
        self._named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self._adam = _fused_adam(list(self._named.values()), learning_rate, weight_decay)

    def read(self, ids: Tensor) -> Tensor:
        """Vectors ``(..., D)`` of ids ``(...)``, brought up to date; a leaf whose gradient ``step`` applies."""
        rows, inverse = torch.unique(ids.long(), return_inverse=True)
        self._catch_up(rows)
        vectors = self._matrix[ids].requires_grad_()
        self._reads.append((rows, inverse, vectors))
        return vectors

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Gradients of the last ``backward``."""
        yield from ((name, p.grad) for name, p in self._named.items() if p.grad is not None)
        yield from (("table.matrix", vectors.grad) for _, _, vectors in self._reads if vectors.grad is not None)

    def step(self) -> None:
        """Update the weights."""
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        self._steps += 1
        rows, gradient = self._row_gradient()
        state = (self._matrix[rows], self._first[rows], self._second[rows])
        self._write(rows, self._rule.update(*state, gradient, self._steps))
        self._reads.clear()

    def synchronise(self) -> None:
        """Bring every row up to date, in blocks of rows."""
        for start in range(0, len(self._matrix), 1 << 16):
            self._catch_up(torch.arange(start, min(start + (1 << 16), len(self._matrix))))

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts."""
        table = {"first": self._first, "second": self._second, "updated": self._updated}
        return (
            _moments(self._adam, self._named)
            | {f"table.{name}": t for name, t in table.items()}
            | {"steps": torch.tensor(self._steps)}
        )

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what ``state`` returned."""
        _restore_moments(self._adam, self._named, state)
        self._first.copy_(state["table.first"])
        self._second.copy_(state["table.second"])
        self._updated.copy_(state["table.updated"])
        self._steps = int(state["steps"])

    def _row_gradient(self) -> tuple[Tensor, Tensor]:
        """Distinct rows ``(U,)`` that were read, and their gradient ``(U, D)``."""
        rows = torch.unique(torch.cat([rows for rows, _, _ in self._reads]))
        gradient = torch.zeros(len(rows), self._matrix.shape[1])
        for read, inverse, vectors in self._reads:
            place = inverse if len(self._reads) == 1 else torch.searchsorted(rows, read)[inverse]
            gradient.index_add_(0, place.flatten(), vectors.grad.flatten(0, -2))
        return rows, gradient

    def _catch_up(self, rows: Tensor) -> None:
        """Apply to ``rows`` the steps they have missed."""
        updated = self._updated[rows]
        if int(updated.min()) == self._steps:
            return
        state = (self._matrix[rows], self._first[rows], self._second[rows])
        self._write(rows, self._rule.catch_up(*state, updated.long(), self._steps))

    def _write(self, rows: Tensor, state: tuple[Tensor, Tensor, Tensor]) -> None:
        for target, source in zip((self._matrix, self._first, self._second), state, strict=True):
            target.index_copy_(0, rows, source)
        self._updated[rows] = self._steps


class RowRule:
    """The two closed forms on rows: weights, first and second moments, each ``(U, D)`` float32.

    Args:
        learning_rate: step size.
        weight_decay: ``lambda``, coupled.
    """

    def __init__(self, learning_rate: float, weight_decay: float) -> None:
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self._tail = torch.zeros(0)

    def update(self, weight: Tensor, first: Tensor, second: Tensor, gradient: Tensor, step: int) -> tuple[Tensor, ...]:
        """One step of Adam, number ``step``, with the batch's gradient."""
        b1, b2 = BETAS
        gradient = gradient.add(weight, alpha=self.weight_decay)
        first = first.lerp(gradient, 1 - b1)
        second = (b2 * second).addcmul_(gradient, gradient, value=1 - b2)
        unbias = math.sqrt(1 - b2**step)
        rate = self.learning_rate * unbias / (1 - b1**step)
        return weight.addcdiv(first, second.sqrt().add_(EPS * unbias), value=-rate), first, second

    def catch_up(self, weight: Tensor, first: Tensor, second: Tensor, updated: Tensor, step: int) -> tuple[Tensor, ...]:
        """State after ``step`` of rows last updated at steps ``updated (U,)`` and not read since."""
        b1, b2 = BETAS
        missed = (step - updated)[:, None].float()
        decay1, decay2 = b1**missed, b2**missed
        tail = self._momentum_tail(step)
        ratio = decay1 / decay2.sqrt()
        reach = tail[updated][:, None] - ratio * tail[step]
        unbias = math.sqrt(1 - b2**step)
        moved = weight - self.learning_rate * reach * first / (second.sqrt() + EPS * unbias)
        first, second = decay1 * first, decay2 * second
        if self.weight_decay == 0:
            return moved, first, second
        pull = self.weight_decay * weight
        ramp = 1 - b1 / (1 - b1) * (1 - decay1) / missed.clamp_min(1)
        rate = self.learning_rate * unbias / (1 - b1**step) * self.weight_decay
        span = _decay_span(pull.square(), second / decay2, decay2, missed, (EPS * unbias) ** 2)
        shrunk = moved * torch.exp(-rate * ramp * span)
        first += (1 - decay1) * pull
        second += (1 - decay2) * pull * self.weight_decay * shrunk
        return shrunk, first, second

    def _momentum_tail(self, step: int) -> Tensor:
        """``T(s) = sum_{j>=1} r^j c(s + j)`` for ``s = 0 .. step`` at least, by ``T(s) = r (c(s + 1) + T(s + 1))``."""
        if step >= len(self._tail):
            b1, b2 = BETAS
            r = b1 / math.sqrt(b2)
            length = max(4096, 2 * step)
            tail, sums = r / (1 - r), [0.0] * length
            for s in reversed(range(length)):
                tail = r * (math.sqrt(1 - b2 ** (s + 1)) / (1 - b1 ** (s + 1)) + tail)
                sums[s] = tail
            self._tail = torch.tensor(sums, dtype=torch.float32)
        return self._tail


def _decay_span(pull2: Tensor, second: Tensor, decay2: Tensor, missed: Tensor, eps2: float) -> Tensor:
    """``integral_0^k dj / sqrt(A + B b2^j)`` with ``A = pull2 + eps2`` and ``B = second - pull2``."""
    base = pull2 + eps2
    excess = (second - pull2) / base
    start, stop = (1 + excess).sqrt(), (1 + excess * decay2).sqrt()
    return (missed + 2 / -math.log(BETAS[1]) * ((stop + 1) / (start + 1)).log()) / base.sqrt()


class _Lookups(Table):
    """A dense table seen through a lazy optimiser: rows are brought up to date when they are read."""

    def __init__(self, table: DenseTable, optimizer: LazyAdam) -> None:
        super().__init__()
        self.schema = table.schema
        self.blocks = table.blocks
        self._optimizer = optimizer

    def forward(self, ids: Tensor) -> Tensor:
        return self._optimizer.read(ids)

    def weight(self) -> Tensor:
        raise UnsupportedOp(
            "`optimizer='lazy_adam'` needs a model that looks rows up, but this one reads the whole table; use 'adam'."
        )

    def values(self) -> int:
        return sum(b.values for b in self.blocks if b.counted)

    def stored(self) -> Tensor:
        return torch.ones(self.schema.rows, dtype=torch.bool)

    def pack(self, storage: Storage = "fp32", rows: object = None) -> Packed:
        raise UnsupportedOp("A table in training cannot be packed; pack the model's own table.")


def _fused_adam(parameters: list[nn.Parameter], learning_rate: float, weight_decay: float) -> torch.optim.Adam:
    """Torch's Adam in one pass over all parameters."""
    return torch.optim.Adam(parameters, lr=learning_rate, betas=BETAS, eps=EPS, weight_decay=weight_decay, fused=True)


def _moments(adam: torch.optim.Adam, named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Adam's state by parameter name; empty before the first step."""
    return {
        f"{name}.{key}": value for name, p in named.items() if p in adam.state for key, value in adam.state[p].items()
    }


def _restore_moments(adam: torch.optim.Adam, named: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]) -> None:
    """Put back what :func:`_moments` returned."""
    for name, p in named.items():
        keys = ("step", "exp_avg", "exp_avg_sq")
        if f"{name}.step" in state:
            adam.state[p] = {key: state[f"{name}.{key}"].clone() for key in keys}
