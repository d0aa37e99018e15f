"""Shapley values of table entries: what each stored scalar is worth to the loss.

One game per training sample: the players are the scalars of its looked-up vectors ``e (F, D)``; a coalition keeps its
players at their trained value and the others at a placeholder ``c (F, D)``; its value is minus the loss of the head.
The score of a table entry is the mean, over *all* samples, of its players' Shapley values, so frequency is part of it
and the scores add up: ``sum_i phi_i = mean[loss(empty) - loss(full)]``.

Two estimators: :class:`Owen`, a few gradients of the multilinear extension per sample, exact in expectation where the
head is multilinear in the coordinates (linear weights, factorisation machine, inner product) and an approximation
elsewhere; :class:`Permutation`, unbiased, much dearer.

Reference: Castro et al., "Polynomial calculation of the Shapley value based on sampling", 2009; Okhrati and Lipani,
"A multilinear sampling algorithm to estimate Shapley values", 2020; Covert et al., "Understanding global feature
contributions with additive importance measures" (SAGE), 2020.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from pocketrec.attribution.incremental import IncrementalLogits
from pocketrec.attribution.lowered import LoweredHead


class Game(ABC):
    """A batch of games: ``value = -loss`` of ``vectors (B, P, D)``, and its gradient."""

    @abstractmethod
    def value(self, vectors: Tensor, labels: Tensor) -> Tensor:
        """``(B, P, D), (B,) -> (B,)``."""

    @abstractmethod
    def gradient(self, vectors: Tensor, labels: Tensor) -> Tensor:
        """Gradient of each sample's value: ``(B, P, D)``, a new tensor."""

    def pair(self, centre: Tensor, offset: Tensor, labels: Tensor) -> Tensor:
        """``gradient(centre + offset) + gradient(centre - offset)``: ``(B, P, D)``, a new tensor."""
        return self.gradient(centre + offset, labels).add_(self.gradient(centre - offset, labels))

    def walk(self, vectors: Tensor, labels: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """A function that sets player ``(B,)`` to ``(B,)`` in its own copy of ``vectors`` and returns the values."""
        current = vectors.clone()
        flat, row = current.view(len(current), -1), torch.arange(len(current))

        def step(player: Tensor, new: Tensor) -> Tensor:
            flat[row, player] = new
            return self.value(current, labels)

        return step


@dataclass(frozen=True)
class ClickGame(Game):
    """Minus the binary cross-entropy of the head's logit; one player row per field."""

    head: LoweredHead

    def value(self, vectors: Tensor, labels: Tensor) -> Tensor:
        """Log-likelihood of the labels, ``(B,)``."""
        return _log_likelihood(self.head.logits(vectors), labels)

    def gradient(self, vectors: Tensor, labels: Tensor) -> Tensor:
        """``(y - sigmoid(logit))`` pulled back through the head."""
        return self.head.pull(labels - self.head.logits(vectors).sigmoid())

    def spread(self, vectors: Tensor) -> Tensor:
        """``sqrt(p (1 - p))`` pulled back: the deviation of the gradient if the label is drawn from the model."""
        return self.head.pull(_deviation(self.head.logits(vectors)))

    def pair(self, centre: Tensor, offset: Tensor, labels: Tensor) -> Tensor:
        """Both points as one batch; their gradients share the first layer's product."""
        points = torch.empty(2, *centre.shape)
        torch.add(centre, offset, out=points[0])
        torch.sub(centre, offset, out=points[1])
        return self.head.pull(labels.repeat(2) - self.head.logits(points.flatten(0, 1)).sigmoid(), parts=2)

    def walk(self, vectors: Tensor, labels: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """As the plain walk, but only what a change reaches is computed again."""
        walk = IncrementalLogits(self.head, vectors)
        return lambda player, new: _log_likelihood(walk.set(player, new), labels)


@dataclass(frozen=True)
class RankingGame(Game):
    """Minus the BPR loss ``softplus(s_uq - s_up)``; player rows are user, positive, negative (``labels`` are ones)."""

    head: LoweredHead

    def _margin(self, vectors: Tensor) -> Tensor:
        positive, negative = self.head.logits(_pairs(vectors)).view(2, -1)
        return positive - negative

    def value(self, vectors: Tensor, labels: Tensor) -> Tensor:
        """Log-likelihood of the labels, ``(B,)``."""
        return _log_likelihood(self._margin(vectors), labels)

    def gradient(self, vectors: Tensor, labels: Tensor) -> Tensor:
        """The two pairs share the user: its gradients add up."""
        return self._pull(labels - self._margin(vectors).sigmoid())

    def spread(self, vectors: Tensor) -> Tensor:
        """``sqrt(p (1 - p))`` of the margin pulled back through both scores."""
        return self._pull(_deviation(self._margin(vectors)))

    def _pull(self, slope: Tensor) -> Tensor:
        """The slope of the margin ``(B,)`` at the last pairs."""
        positive, negative = self.head.pull(torch.cat((slope, -slope))).view(2, len(slope), 2, -1)
        return torch.stack((positive[:, 0] + negative[:, 0], positive[:, 1], negative[:, 1]), dim=1)


def _pairs(vectors: Tensor) -> Tensor:
    """User, positive, negative ``(B, 3, d)`` -> the pairs (user, positive), then (user, negative): ``(2 B, 2, d)``."""
    return torch.cat((vectors[:, :2], vectors[:, ::2]))


def _deviation(logits: Tensor) -> Tensor:
    """Standard deviation of a label that is one with probability ``sigmoid(logit)``."""
    p = logits.sigmoid()
    return (p * (1 - p)).sqrt_()


def _log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """``-BCE`` per sample, from logits."""
    return -functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
