"""Adam on single rows of a table: a step on the rows of a batch, and the steps that a row has missed in closed form.

Adam with coupled weight decay, at step ``t = 1, 2, ...`` for a scalar ``w`` with gradient ``g``::

    g' = g + lambda w;   m = b1 m + (1 - b1) g';   v = b2 v + (1 - b2) g'^2
    w  = w - lr c(t) m / (sqrt(v) + eps_t),   c(t) = sqrt(1 - b2^t) / (1 - b1^t),   eps_t = eps sqrt(1 - b2^t)

A row that no batch reads for ``k`` steps has ``g = 0`` in them, which leaves two forces, each with a closed form:

* Momentum. ``m`` and ``v`` decay by ``b1`` and ``b2`` a step; with ``r = b1 / sqrt(b2)``, a row last updated at step
  ``s`` moves by ``-lr m / (sqrt(v) + eps_t) sum_{j=1..k} r^j c(s + j)``, and the sum is ``T(s) - r^k T(s + k)`` for
  ``T(s) = sum_{j>=1} r^j c(s + j)``, a curve that is made once. Exact but for the growth of ``eps_t / sqrt(v)``.
* Weight decay. The gradient is ``lambda w``, so with ``w`` inside ``v`` held at its start ``w_s``, the unbiased second
  moment after ``j`` steps is ``P + (v / (1 - q) - P) z_j`` with ``P = (lambda w_s)^2``, ``q = b2^s`` and
  ``z_j = (1 - q) b2^j / (1 - q b2^j)``. With ``eps`` moved under the root and ``z`` replaced by the exponential through
  its ends, ``d log w / dj = -lr lambda / sqrt(A + B z_j)`` with ``A = P + eps^2`` and ``B = v / (1 - q) - P``, and the
  integral over ``k`` steps is ``k [1 + (2 / -log z_k) log((u_k + 1) / (u_0 + 1))] / sqrt(A)`` for
  ``u_j = sqrt((A + B z_j) / A)``. The momentum that this force builds up is ``(1 - b1^j) / (1 - b1^(s + j))`` of the
  whole at step ``j``; its mean over the gap is a factor. An approximation between exact limits (``lambda = 0``; ``v``
  large; ``v`` forgotten), within a few per cent of the way that step-by-step Adam goes.

So a row that is never read again shrinks to nothing, as it does under dense Adam.
"""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pocketrec.errors import DataError
from pocketrec.native import library
from pocketrec.native.library import structure

BETAS = (0.9, 0.999)
EPS = 1e-8
TINY = 1e-30


@dataclass(frozen=True)
class RowState:
    """A table in training: weights and moments ``(n, D)`` float32, and the last step of each row ``(n,)`` int32."""

    weight: Tensor
    first: Tensor
    second: Tensor
    updated: Tensor

    @classmethod
    def start(cls, weight: Tensor) -> RowState:
        """The state before the first step, around (not a copy of) the weights."""
        updated = torch.zeros(len(weight), dtype=torch.int32, device=weight.device)
        return cls(weight, torch.zeros_like(weight), torch.zeros_like(weight), updated)


class RowAdam:
    """Lazy Adam on the rows of a table, in place; by the compiled library where it is there, else by torch.

    Args:
        table: what is trained.
        learning_rate: step size.
        weight_decay: ``lambda``, coupled.
    """

    def __init__(self, table: RowState, learning_rate: float, weight_decay: float) -> None:
        self.table, self.learning_rate, self.weight_decay = table, learning_rate, weight_decay
        self._curves = Curves.upto(4096)
        self._library = library.compiled() if table.weight.device.type == "cpu" else None
        self._mark = torch.full_like(table.updated, -1)

    def distinct(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Distinct rows ``(U,)`` among ids ``(...)``, and the place in them of each id ``(...)``.

        Raises:
            DataError: an id is outside the table.
        """
        if self._library is None:
            return torch.unique(ids.long(), return_inverse=True)
        ids = ids.long().contiguous()
        rows, place = torch.empty(ids.numel(), dtype=torch.int64), torch.empty(ids.shape, dtype=torch.int32)
        found = self._library.pocketrec_adam_distinct(
            ids.data_ptr(), ids.numel(), self._mark.data_ptr(), len(self._mark), rows.data_ptr(), place.data_ptr()
        )
        if found < 0:
            raise DataError(f"Ids must lie in [0, {len(self._mark)}), but some do not; encode the data again.")
        return rows[:found], place

    def catch_up(self, rows: Tensor, step: int) -> None:
        """Bring distinct ``rows (U,)`` to the end of ``step``, as if no batch had read them since their last one."""
        if step == 0:
            return
        if step >= len(self._curves.tail):
            self._curves = Curves.upto(2 * step)
        if self._library is not None:
            curves = _CurvesView(*(t.data_ptr() for t in self._curves.tensors()))
            self._library.pocketrec_adam_catch_up(
                self._view(), self._rule(step), ctypes.byref(curves), rows.data_ptr(), len(rows), step
            )
        elif len(late := rows[self.table.updated[rows] < step]):
            self._write(late, self._caught_up(late, step), step)

    def update(self, rows: Tensor, place: Tensor, gradients: Tensor, step: int) -> None:
        """Take ``step`` on ``rows (U,)``, up to date with the step before, from gradients ``(..., D)`` at ``place``."""
        if self._library is not None:
            sums = torch.empty(len(rows), gradients.shape[-1])
            self._library.pocketrec_adam_update(
                self._view(), self._rule(step), rows.data_ptr(), len(rows), place.data_ptr(), place.numel(),
                gradients.contiguous().data_ptr(), sums.data_ptr(), step,
            )  # fmt: skip
        else:
            flat = gradients.reshape(-1, gradients.shape[-1])
            sums = flat.new_zeros(len(rows), flat.shape[1]).index_add_(0, place.flatten(), flat)
            self._write(rows, self._updated(rows, sums, step), step)

    def _updated(self, rows: Tensor, gradient: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """State of ``rows`` after one step of Adam with gradient ``(U, D)``."""
        b1, b2 = BETAS
        weight, first, second = self._gather(rows)
        gradient = gradient.add(weight, alpha=self.weight_decay)
        first = first.lerp(gradient, 1 - b1)
        second = (b2 * second).addcmul_(gradient, gradient, value=1 - b2)
        rate = self.learning_rate * _rate(step)
        return weight.addcdiv(first, second.sqrt().add_(EPS * _unbias(step)), value=-rate), first, second

    def _caught_up(self, rows: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """State of ``rows`` after the steps they have missed."""
        weight, first, second = self._gather(rows)
        updated = self.table.updated[rows].long()
        curves, missed = self._curves, step - updated
        by_gap = (curves.decay1, curves.decay2, curves.ratio, curves.ramp)
        decay1, decay2, ratio, ramp = (curve[missed][:, None] for curve in by_gap)
        reach = curves.tail[updated][:, None] - ratio * curves.tail[step]
        moved = weight - self.learning_rate * reach * first / (second.sqrt() + EPS * _unbias(step))
        if self.weight_decay == 0:
            return moved, decay1 * first, decay2 * second
        bias1, bias2 = (curve[updated][:, None] for curve in (curves.decay1, curves.decay2))
        pull = self.weight_decay * weight
        base = pull.square() + EPS**2
        excess = (second / (1 - bias2).clamp_min(TINY) - pull.square()) / base
        fade = decay2 * (1 - bias2) / (1 - bias2 * decay2)
        start, stop = (1 + excess).clamp_min(0).sqrt(), (1 + excess * fade).clamp_min(0).sqrt()
        share = 1 + 2 / -fade.clamp_min(TINY).log() * ((stop + 1) / (start + 1)).log()
        pace = self.learning_rate * self.weight_decay * missed[:, None] * ramp / (1 - bias1 * (1 - ramp))
        end = moved * torch.exp((-pace * share / base.sqrt()).clamp_max(0))
        end_pull = self.weight_decay * end
        return end, decay1 * first + (1 - decay1) * end_pull, decay2 * second + (1 - decay2) * pull * end_pull

    def _gather(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.table.weight[rows], self.table.first[rows], self.table.second[rows]

    def _write(self, rows: Tensor, state: tuple[Tensor, Tensor, Tensor], step: int) -> None:
        for target, source in zip((self.table.weight, self.table.first, self.table.second), state, strict=True):
            target.index_copy_(0, rows, source)
        self.table.updated[rows] = step

    def _view(self) -> object:
        table = self.table
        pointers = (t.data_ptr() for t in (table.weight, table.first, table.second, table.updated))
        return ctypes.byref(_RowStateView(*pointers, table.weight.shape[1]))

    def _rule(self, step: int) -> object:
        return ctypes.byref(_RuleView(self.learning_rate, self.weight_decay, EPS, *BETAS, _rate(step), _unbias(step)))


@dataclass(frozen=True)
class Curves:
    """What catch-up needs, float32: ``tail`` is ``T(s)`` by step; the others go by a number ``k`` of steps.

    ``decay1 = b1^k``, ``decay2 = b2^k``, ``ratio = r^k``, ``ramp`` the mean of ``1 - b1^j`` over ``j = 1..k``.
    """

    tail: Tensor
    decay1: Tensor
    decay2: Tensor
    ratio: Tensor
    ramp: Tensor

    @classmethod
    def upto(cls, length: int) -> Curves:
        """Curves for steps ``0 .. length - 1``; ``T(s) = r (c(s + 1) + T(s + 1))`` from far beyond the end."""
        b1, b2 = BETAS
        r = b1 / math.sqrt(b2)
        tail, sums = _rate(length) * r / (1 - r), np.empty(length)
        for s in reversed(range(length)):
            tail = r * (_rate(s + 1) + tail)
            sums[s] = tail
        k = np.arange(length)
        ramp = 1 - b1 / (1 - b1) * (1 - b1**k) / np.maximum(k, 1)
        curves = (sums, b1**k, b2**k, r**k, ramp)
        return cls(*(torch.from_numpy(curve.astype(np.float32)) for curve in curves))

    def tensors(self) -> tuple[Tensor, ...]:
        """All curves, in order."""
        return (self.tail, self.decay1, self.decay2, self.ratio, self.ramp)


def _unbias(step: int) -> float:
    """``sqrt(1 - b2^t)``."""
    return math.sqrt(1 - BETAS[1] ** step)


def _rate(step: int) -> float:
    """``c(t) = sqrt(1 - b2^t) / (1 - b1^t)``."""
    return _unbias(step) / (1 - BETAS[0] ** step)


@structure("Rows")
class _RowStateView(ctypes.Structure):
    _fields_ = (
        ("weight", ctypes.c_void_p), ("first", ctypes.c_void_p), ("second", ctypes.c_void_p),
        ("updated", ctypes.c_void_p), ("width", ctypes.c_int64),
    )  # fmt: skip


@structure("Rule")
class _RuleView(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_float) for name in ("learning_rate", "weight_decay", "eps", "beta1", "beta2", "rate", "unbias")
    )


@structure("Curves")
class _CurvesView(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("tail", "decay1", "decay2", "ratio", "ramp"))
