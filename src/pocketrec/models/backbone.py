"""A recommender with exactly one table.

A :class:`Backbone` is a frozen dataclass, its own configuration; ``build`` makes a :class:`Model`, which holds the
table and the head. Click models map the looked-up vectors to a logit; ranking models map the whole table to final user
and item vectors, whose scores rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pocketrec.errors import DataError
from pocketrec.format.program import Program
from pocketrec.models.table import Block, Table
from pocketrec.randomness import derive, generator
from pocketrec.schema import Schema, Task

if TYPE_CHECKING:
    from pocketrec.data.dataset import Dataset


def noise(seed: int, purpose: str, *index: int) -> torch.Generator:
    """A torch generator of the stream ``(seed, purpose, *index)``; see :mod:`pocketrec.randomness`."""
    return torch.Generator().manual_seed(derive(seed, purpose, *index))


class Model(nn.Module, ABC):
    """One table, one head, one loss. ``with_table`` swaps the table and shares the head.

    Attributes:
        lasting: whether a training ends with the weights of its last epoch, not of the best one on validation.
    """

    lasting: ClassVar[bool] = False

    backbone: Backbone
    schema: Schema
    table: Table

    @abstractmethod
    def batches(
        self, data: Dataset, batch_size: int, seed: int, epoch: int, *, shuffle: bool = True
    ) -> Iterator[tuple[Tensor, ...]]:
        """Training batches of one epoch: a pure function of the arguments; resuming skips the first ones."""

    @abstractmethod
    def loss(self, batch: tuple[Tensor, ...], noise: torch.Generator) -> Tensor:
        """Training loss of one batch; ``noise`` is the only source of randomness (dropout draws its own mask)."""

    @abstractmethod
    def lower(self) -> Program:
        """The head as data, in evaluation mode (batch norm folded, no dropout)."""

    def with_table(self, table: Table) -> Self:
        """The same head around another table; nothing is copied."""
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        other._modules = dict(self._modules)
        other._modules["table"] = table
        return other


class ClickModel(Model):
    """Click prediction: ``logit = head(table(ids))``; loss is the mean binary cross-entropy."""

    @abstractmethod
    def head(self, vectors: Tensor, noise: torch.Generator | None = None) -> Tensor:
        """``(B, F, D) -> (B,)`` logits; with ``noise`` in training mode (batch statistics, dropout)."""

    def forward(self, ids: Tensor) -> Tensor:
        """``(B, F) -> (B,)`` logits, in evaluation mode."""
        return self.head(self.table(ids))

    def loss(self, batch: tuple[Tensor, ...], noise: torch.Generator) -> Tensor:
        """Mean binary cross-entropy in nats of ``batch = (ids (B, F), labels (B,))``."""
        ids, labels = batch
        return F.binary_cross_entropy_with_logits(self.head(self.table(ids), noise), labels)

    def batches(
        self, data: Dataset, batch_size: int, seed: int, epoch: int, *, shuffle: bool = True
    ) -> Iterator[tuple[Tensor, ...]]:
        """``(ids (B, F) int32, labels (B,) float32)`` in an order drawn from ``(seed, epoch)``, or in file order.

        A last batch of a single row, which has no variance to normalise by, joins the one before.
        """
        rows, clicks = len(data.train), data.train.labels
        if clicks is None:
            raise DataError(f"A click model needs labels, but {data.path} has none; choose a ranking backbone.")
        order = generator(seed, "order", epoch).permutation(rows) if shuffle else None
        last = max(0, (rows - 2) // batch_size)
        for step in range(last + 1):
            span = slice(step * batch_size, rows if step == last else (step + 1) * batch_size)
            picked = span if order is None else order[span]
            yield torch.from_numpy(data.train.ids[picked].copy()), torch.from_numpy(clicks[picked].copy())


class RankingModel(Model):
    """Top-k recommendation: final vectors per user and item; the lowered program scores a pair ``(B, 2, d)``.

    Attributes:
        propagates: whether final vectors differ from the rows of the table. If not, a file of the table is enough to
            recommend, and there is nothing to bake.
    """

    propagates: ClassVar[bool] = True

    @abstractmethod
    def propagate(self, weight: Tensor) -> Tensor:
        """Ego rows ``(n, D)`` -> final rows ``(n, D')``; differentiable. Identity for models without a graph."""

    @abstractmethod
    def scores(self, users: Tensor, items: Tensor) -> Tensor:
        """``(B, D'), (I, D') -> (B, I)`` scores of every pair, from final vectors."""


class Backbone(ABC):
    """Configuration of a recommender; subclasses are frozen dataclasses, one per file in ``backbones/``.

    Attributes:
        name: in the registry and on the command line.
        task: that it is made for.
        version: rises when a default or a meaning changes, so that stored work of the other one is not taken.
    """

    name: ClassVar[str]
    task: ClassVar[Task]
    version: ClassVar[int] = 1

    @abstractmethod
    def blocks(self, schema: Schema) -> tuple[Block, ...]:
        """How the table is tiled."""

    @abstractmethod
    def build(self, data: Dataset, seed: int) -> Model:
        """A freshly initialised model with a :class:`~pocketrec.models.table.DenseTable`; same seed, same bits."""

    def small(self) -> Self:
        """The same recommender with a head of a few units, for exams; by default itself."""
        return self
