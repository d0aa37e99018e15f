"""A recommender with exactly one table.

A :class:`Backbone` is a frozen dataclass, its own configuration; ``build`` makes a :class:`Model`, which holds the
table and the head. Click models map the looked-up vectors to a logit; ranking models map the whole table to final user
and item vectors, whose scores rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import TypeVar

from pocketrec import settings
from pocketrec.errors import DataError
from pocketrec.format.program import Op, Program
from pocketrec.models.first_values import click_blocks, click_table
from pocketrec.models.table import Block, Lookup, Table
from pocketrec.randomness import derive, generator
from pocketrec.schema import Schema, Task

if TYPE_CHECKING:
    from pocketrec.data.dataset import Dataset, Split

L = TypeVar("L", bound=Lookup)
T_co = TypeVar("T_co", bound=Lookup, default=Table, covariant=True)
"""What a model looks its vectors up in: while it is trained any look-up will do, else it is a :class:`Table`."""


def noise(seed: int, purpose: str, *index: int) -> torch.Generator:
    """A torch generator of the stream ``(seed, purpose, *index)``; see :mod:`pocketrec.randomness`."""
    return torch.Generator().manual_seed(derive(seed, purpose, *index))


def source_of(data: Dataset, seed: int, split: Split | None) -> tuple[Split, int]:
    """The rows that batches are made of, training by default, and the seed of their order, one for each kind of split.

    Raises:
        DataError: the split is of another data set.
    """
    if split is None:
        return data.train, seed
    if split.dataset.digest != data.digest:
        raise DataError(f"Batches of {data.path} need a split of it, but got one of {split.dataset.path}.")
    return split, seed if split.name == "train" else derive(seed, split.name)


class Model(nn.Module, ABC, Generic[T_co]):
    """One table, one head, one loss. ``with_table`` swaps the table and shares the head.

    ``Model`` is a model around a :class:`~pocketrec.models.table.Table`, which has a form in a file; ``Model[Lookup]``
    one around anything that looks vectors up, which is enough to train and to judge it.

    Attributes:
        lasting: whether a training ends with the weights of its last epoch, not of the best one on validation.
    """

    lasting: bool = False

    backbone: Backbone
    schema: Schema
    table: T_co

    @abstractmethod
    def batches(
        self, data: Dataset, batch_size: int, seed: int, epoch: int, *, shuffle: bool = True, split: Split | None = None
    ) -> Iterator[tuple[Tensor, ...]]:
        """Batches of one epoch: a pure function of the arguments; resuming skips the first ones.

        Args:
            data: The data set.
            batch_size: Rows of a batch; the last one may differ.
            seed: Of the training.
            epoch: Counted from 0.
            shuffle: ``False`` keeps the order of the rows.
            split: Where the rows are from: training by default, or any split of ``data`` or half of one.
        """

    @abstractmethod
    def loss(self, batch: tuple[Tensor, ...], noise: torch.Generator) -> Tensor:
        """Training loss of one batch; ``noise`` is the only source of randomness (dropout draws its own mask)."""

    @abstractmethod
    def lower(self) -> Program:
        """The head as data, in evaluation mode (batch norm folded, no dropout)."""

    def with_table(self, table: L) -> Model[L]:
        """The same head around another table; nothing is copied."""
        return _around(self, table)


def _around(model: Model[Lookup], table: Lookup) -> Any:
    """A model of the same class, in which only the table is another."""
    other = object.__new__(type(model))
    vars(other).update(vars(model))
    other._modules = {**model._modules, "table": table}
    return other


class ClickModel(Model[T_co]):
    """Click prediction: ``logit = head(table(ids))``; loss is the mean binary cross-entropy."""

    def with_table(self, table: L) -> ClickModel[L]:
        """The same head around another table; nothing is copied."""
        return _around(self, table)

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
        self, data: Dataset, batch_size: int, seed: int, epoch: int, *, shuffle: bool = True, split: Split | None = None
    ) -> Iterator[tuple[Tensor, ...]]:
        """``(ids (B, F) int32, labels (B,) float32)`` in an order drawn from ``(seed, epoch)``, or in file order.

        A last batch of a single row, which has no variance to normalise by, joins the one before.
        """
        read, seed = source_of(data, seed, split)
        rows, clicks = len(read), read.labels
        if clicks is None:
            raise DataError(f"A click model needs labels, but {data.path} has none; choose a ranking backbone.")
        order = generator(seed, "order", epoch).permutation(rows) if shuffle else None
        last = max(0, (rows - 2) // batch_size) if rows else -1
        for step in range(last + 1):
            span = slice(step * batch_size, rows if step == last else (step + 1) * batch_size)
            picked = span if order is None else order[span]
            yield torch.from_numpy(read.ids[picked].copy()), torch.from_numpy(clicks[picked].copy())


class RankingModel(Model[T_co]):
    """Top-k recommendation: final vectors per user and item; the lowered program scores a pair ``(B, 2, d)``.

    Attributes:
        propagates: whether final vectors differ from the rows of the table. If not, a file of the table is enough to
            recommend, and there is nothing to bake.
    """

    propagates: ClassVar[bool] = True

    def with_table(self, table: L) -> RankingModel[L]:
        """The same head around another table; nothing is copied."""
        return _around(self, table)

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


class ClickBackbone(Backbone):
    """A backbone for clicks: embeddings, with or without a linear weight, under the head of a ``model``.

    Args:
        dim: width ``d`` of an embedding, at least 1.
        linear_std: standard deviation of the linear weights at the start.
    """

    task: ClassVar[Task] = "ctr"
    model: ClassVar[type[HeadedModel]]
    bounds: ClassVar[Mapping[str, float]] = {}
    """Least values of further settings."""

    dim: int

    def __post_init__(self) -> None:
        settings.check(self, dim=1, **self.bounds)

    @property
    def linear_start(self) -> float | None:
        """Standard deviation of the linear weights at the start; ``None`` has none."""
        return None

    def blocks(self, schema: Schema) -> tuple[Block, ...]:
        """``embedding``: columns ``[0, d)``; ``linear``, if there is one: column ``d``, which no count includes."""
        return click_blocks(schema, self.dim, linear=self.linear_start is not None)

    def build(self, data: Dataset, seed: int) -> HeadedModel:
        """Embeddings Xavier-uniform on the whole ``n x d`` matrix, bound ``sqrt(6 / (n + d))``."""
        source = noise(seed, "init")
        return self.model(self, click_table(data.schema, self.dim, source, self.linear_start), source)


class HeadedModel(ClickModel):
    """A head around a table, drawn by a subclass.

    Args:
        backbone: its configuration.
        table: whose vectors it reads.
        source: of its first weights.
    """

    config: Any

    def __init__(self, backbone: Backbone, table: Table, source: torch.Generator) -> None:
        super().__init__()
        self.backbone = self.config = backbone
        self.schema, self.table = table.schema, table
        self.draw(source)

    @property
    def inputs(self) -> int:
        """Entries of all embeddings of a row."""
        return self.schema.width * self.config.dim

    @abstractmethod
    def draw(self, source: torch.Generator) -> None:
        """Give the head its first weights."""


class FactorisationBackbone(ClickBackbone):
    """A backbone with a linear weight beside each embedding."""

    bounds: ClassVar[Mapping[str, float]] = {"linear_std": 0}

    linear_std: float

    @property
    def linear_start(self) -> float | None:
        """The linear weights of the first-order term."""
        return self.linear_std


class FactorisationModel(HeadedModel):
    """The first- and second-order terms of a factorisation machine, on ``d`` embedding columns and a linear one."""

    def draw(self, source: torch.Generator) -> None:
        """A bias of zero."""
        self.bias = nn.Parameter(torch.zeros(()))

    def parts(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, F, d + 1)`` -> embeddings ``(B, F, d)``, and the sum of the terms ``(B,)``."""
        embedding, linear = vectors[..., : self.config.dim], vectors[..., self.config.dim]
        pairs = 0.5 * (embedding.sum(dim=1).square() - embedding.square().sum(dim=1)).sum(dim=-1)
        return embedding, linear.sum(dim=1) + self.bias + pairs

    def terms(self) -> tuple[Op, ...]:
        """Two column views, and the sums ``linear`` and ``pairs``."""
        dim = self.config.dim
        return (
            Op("columns", ("vectors",), "embedding", {"start": 0, "stop": dim}),
            Op("columns", ("vectors",), "weights", {"start": dim, "stop": dim + 1}),
            Op("sum", ("weights",), "linear", tensors={"bias": self.bias.detach().float().numpy().copy()}),
            Op("fm", ("embedding",), "pairs"),
        )
