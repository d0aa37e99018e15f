"""Ranking models without a graph: a pair's score is a function of the two looked-up vectors."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from pocketrec import settings
from pocketrec.data.dataset import Dataset, Split
from pocketrec.data.sampling import triples
from pocketrec.models.backbone import Backbone, RankingModel, noise, source_of
from pocketrec.models.first_values import pair_blocks, pair_table
from pocketrec.models.table import Block, Table
from pocketrec.schema import Schema, Task

Loss = Literal["bpr", "bce"]


@dataclass(frozen=True)
class Objective:
    """What a pair model is trained for.

    With scores ``s_p`` of a pair and ``s_k`` of its negatives, means over the batch of ``B`` pairs::

        bpr = mean sum_k softplus(s_k - s_p)
        bce = mean softplus(-s_p) + mean_{pairs, k} softplus(s_k)      # both sides weigh the same whatever K is
        loss = bpr or bce, + lambda sum (|e_u|^2 + |e_p|^2 + sum_k |e_k|^2) / (2 B)

    Args:
        loss: ``bpr`` or ``bce``.
        negatives: ``K``, of each training pair, at least 1.
        regularisation: ``lambda``, at least 0, on the looked-up vectors alone.

    Reference:
        Rendle et al., BPR: Bayesian Personalized Ranking from Implicit Feedback, 2009; He et al., Neural Collaborative
        Filtering, 2017, equation 7. Several negatives under BPR are summed, as in CERP (2023).
    """

    loss: Loss
    negatives: int
    regularisation: float

    def __post_init__(self) -> None:
        settings.check(self, negatives=1, regularisation=0)

    def __call__(self, scores: Tensor) -> Tensor:
        """``(B, 1 + K)`` scores, the positive first -> the loss without its penalty."""
        positive, negative = scores[:, :1], scores[:, 1:]
        if self.loss == "bpr":
            return F.softplus(negative - positive).sum(dim=1).mean()
        return F.softplus(-positive).mean() + F.softplus(negative).mean()


class PairBackbone(Backbone):
    """A backbone for ranking whose ``model`` scores two vectors: a block of rows for users, one for items.

    Args:
        dim: width ``d`` of a vector, at least 1.
        loss: ``bce`` or ``bpr``.
        negatives: of each training pair, at least 1.
        regularisation: ``lambda`` on the looked-up vectors, at least 0.
    """

    task: ClassVar[Task] = "cf"
    model: ClassVar[type[PairModel]]
    bounds: ClassVar[Mapping[str, float]] = {}
    """Least values of further settings."""

    dim: int
    loss: Loss
    negatives: int
    regularisation: float

    def __post_init__(self) -> None:
        settings.check(self, dim=1, negatives=1, regularisation=0, **self.bounds)

    def objective(self) -> Objective:
        """What is minimised."""
        return Objective(self.loss, self.negatives, self.regularisation)

    def blocks(self, schema: Schema) -> tuple[Block, ...]:
        """One block of rows for users, one for items."""
        return pair_blocks(schema, self.dim)

    def build(self, data: Dataset, seed: int) -> PairModel:
        """Vectors Xavier-uniform on the whole ``n x d`` matrix, bound ``sqrt(6 / (n + d))``."""
        source = noise(seed, "init")
        return self.model(self, self.table(data.schema, source), source)

    def table(self, schema: Schema, source: torch.Generator) -> Table:
        """The first vectors."""
        return pair_table(schema, self.dim, source)


class PairedModel(RankingModel):
    """A model that is trained on pairs, each with ``negatives`` of its configuration."""

    config: Any

    def batches(
        self, data: Dataset, batch_size: int, seed: int, epoch: int, *, shuffle: bool = True, split: Split | None = None
    ) -> Iterator[tuple[Tensor, ...]]:
        """``(ids (B, 2 + K) int64,)``: every pair of the split once per epoch, with its negatives."""
        negatives = self.config.negatives
        return ranking_batches(data, batch_size, seed, epoch, shuffle=shuffle, negatives=negatives, split=split)


class PairModel(PairedModel):
    """Scores the vectors that a table holds; subclasses say how.

    Args:
        backbone: its configuration.
        table: whose vectors it reads.
        source: of its first weights.
    """

    propagates: ClassVar[bool] = False

    objective: Objective

    def __init__(self, backbone: PairBackbone, table: Table, source: torch.Generator) -> None:
        super().__init__()
        self.backbone = self.config = backbone
        self.objective = backbone.objective()
        self.schema, self.table = table.schema, table
        self.draw(source)

    @property
    def inputs(self) -> int:
        """Entries of both vectors of a pair."""
        return 2 * self.config.dim

    def draw(self, source: torch.Generator) -> None:
        """Give the head its first weights; by default it has none."""

    @abstractmethod
    def head(self, vectors: Tensor, noise: torch.Generator | None = None) -> Tensor:
        """Pairs ``(B, 2, D) -> (B,)`` scores; with ``noise`` in training mode."""

    def loss(self, batch: tuple[Tensor, ...], noise: torch.Generator) -> Tensor:
        """The objective of ``batch = (ids (B, 2 + K),)``; positives and negatives go through one forward pass."""
        vectors = self.table(batch[0])
        scores = self.head(opposed(vectors), noise).view(len(vectors), -1)
        return self.objective(scores) + self.penalty(vectors)

    def penalty(self, vectors: Tensor) -> Tensor:
        """``lambda sum |e|^2 / (2 B)`` of looked-up vectors ``(B, 2 + K, d)``."""
        return self.objective.regularisation / (2 * len(vectors)) * vectors.square().sum()

    def propagate(self, weight: Tensor) -> Tensor:
        """The identity."""
        return weight

    def scores(self, users: Tensor, items: Tensor) -> Tensor:
        """``(B, D), (I, D) -> (B, I)`` scores of every pair."""
        shape = (len(users), len(items), users.shape[1])
        pairs = torch.stack((users[:, None].expand(shape), items.expand(shape)), dim=2)
        return self.head(pairs.flatten(0, 1)).view(shape[:2])


def opposed(vectors: Tensor) -> Tensor:
    """User, positive and negatives ``(B, 2 + K, d)`` -> the pairs of each user with its items ``(B (1 + K), 2, d)``."""
    items = vectors[:, 1:]
    return torch.stack((vectors[:, :1].expand_as(items), items), dim=2).flatten(0, 1)


def ranking_batches(
    data: Dataset, batch_size: int, seed: int, epoch: int, *, shuffle: bool, negatives: int, split: Split | None = None
) -> Iterator[tuple[Tensor, ...]]:
    """``(ids (B, 2 + K) int64,)``: user, positive and negatives of every pair of a split, once per epoch.

    Args:
        data: The data set; no pair of its training split is a negative, whatever the split.
        batch_size: Pairs of a batch.
        seed: Of the training.
        epoch: Counted from 0.
        shuffle: ``False`` keeps the order of the pairs.
        negatives: ``K``, of each pair.
        split: Where the pairs are from, training by default.
    """
    users, rows = data.schema.fields[0].size, data.schema.rows
    read, seed = source_of(data, seed, split)
    seen = None if split is None else data.train.ids
    drawn = triples(read.ids, users, rows, seed, epoch, shuffle=shuffle, negatives=negatives, seen=seen)
    return ((batch,) for batch in torch.from_numpy(drawn).split(batch_size))
