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

from pocketrec.program import Program
from pocketrec.schema import Schema, Task
from pocketrec.table import Block, Table

if TYPE_CHECKING:
    from pocketrec.dataset import Dataset


class Model(nn.Module, ABC):
    """One table, one head, one loss. ``with_table`` swaps the table and shares the head."""

    backbone: Backbone
    schema: Schema
    table: Table

    @abstractmethod
    def batches(self, data: Dataset, batch_size: int, seed: int, epoch: int) -> Iterator[tuple[Tensor, ...]]:
        """Training batches of one epoch: a pure function of ``(data, batch_size, seed, epoch)``; may be skipped into."""

    @abstractmethod
    def rows(self, batch: tuple[Tensor, ...]) -> Tensor | None:
        """Table rows that the loss of this batch reads (for sparse optimisers), or ``None`` for all of them."""

    @abstractmethod
    def loss(self, batch: tuple[Tensor, ...], noise: torch.Generator) -> Tensor:
        """Training loss of one batch; ``noise`` is the only source of randomness (dropout draws its own mask)."""

    @abstractmethod
    def lower(self) -> Program:
        """The head as data, in evaluation mode (batch norm folded, no dropout)."""

    def with_table(self, table: Table) -> Self:
        """The same head around another table; nothing is copied."""
        other = object.__new__(type(self))
        other.__dict__ = dict(self.__dict__)
        other._modules = dict(self._modules)
        other._modules["table"] = table
        return other


class ClickModel(Model):
    """Click prediction: ``logit = head(table(ids))``; loss is the mean binary cross-entropy."""

    @abstractmethod
    def head(self, vectors: Tensor, noise: torch.Generator | None = None) -> Tensor:
        """``(B, F, D) -> (B,)`` logits."""

    def forward(self, ids: Tensor) -> Tensor:
        """``(B, F) -> (B,)`` logits."""
        return self.head(self.table(ids))


class RankingModel(Model):
    """Top-k recommendation: final vectors per user and item; the lowered program scores a pair ``(B, 2, d)``."""

    @abstractmethod
    def propagate(self, weight: Tensor) -> Tensor:
        """Ego rows ``(n, D)`` -> final rows ``(n, D')``; differentiable. Identity for models without a graph."""

    @abstractmethod
    def scores(self, users: Tensor, items: Tensor) -> Tensor:
        """``(B, D'), (I, D') -> (B, I)`` scores of every pair, from final vectors."""


class Backbone(ABC):
    """Configuration of a recommender; subclasses are frozen dataclasses, one per file in ``backbones/``."""

    name: ClassVar[str]
    task: ClassVar[Task]

    @abstractmethod
    def blocks(self, schema: Schema) -> tuple[Block, ...]:
        """How the table is tiled."""

    @abstractmethod
    def build(self, data: Dataset, seed: int) -> Model:
        """A freshly initialised model with a :class:`~pocketrec.table.DenseTable`; same seed, same bits."""
