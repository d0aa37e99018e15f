"""NeuMF: generalised matrix factorisation and a perceptron, each on tables of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from pocketrec.format.program import Op, Program
from pocketrec.models.first_values import xavier
from pocketrec.models.pair_scoring import Loss, PairBackbone, PairModel, opposed
from pocketrec.models.perceptron import Deep, DeepModel, array, linear
from pocketrec.models.table import Block, DenseTable
from pocketrec.schema import Schema

if TYPE_CHECKING:
    from pocketrec.data.dataset import Dataset, Split

PERCEPTRON, PRODUCT, BOTH = range(3)
"""Which branches an epoch trains."""


class NeuMFModel(DeepModel, PairModel):
    """Both branches around a table of width ``2d``."""

    def draw(self, source: torch.Generator) -> None:
        """The output of the product, and the perceptron."""
        self.output = linear(self.config.dim, 1, source)
        self.draw_perceptron(self.inputs, source, "xavier", norm=False)
        self.share = 0.5 if self.config.pretraining else 1.0

    def head(self, vectors: Tensor, noise: torch.Generator | None = None) -> Tensor:
        """``(B, 2, 2d) -> (B,)``."""
        return self.share * (self._product(vectors) + self._deep(vectors, noise))

    def _product(self, vectors: Tensor) -> Tensor:
        product = vectors[:, 0, : self.config.dim] * vectors[:, 1, : self.config.dim]
        return self.output(product).squeeze(-1).float()

    def _deep(self, vectors: Tensor, noise: torch.Generator | None) -> Tensor:
        return self.perceptron(vectors[..., self.config.dim :].flatten(1), noise)

    def batches(
        self, data: Dataset, batch_size: int, seed: int, epoch: int, *, shuffle: bool = True, split: Split | None = None
    ) -> Iterator[tuple[Tensor, ...]]:
        """``(ids (B, 2 + K) int64, branch ())``: every pair of the split once, and which branches it trains."""
        start = self.config.pretraining
        branch = torch.tensor(BOTH if epoch >= 2 * start else PRODUCT if epoch >= start else PERCEPTRON)
        drawn = super().batches(data, batch_size, seed, epoch, shuffle=shuffle, split=split)
        return ((*batch, branch) for batch in drawn)

    def loss(self, batch: tuple[Tensor, ...], noise: torch.Generator) -> Tensor:
        """The objective of both branches, or of the one in training."""
        ids, branch = batch[0], int(batch[1])
        vectors, dim = self.table(ids), self.config.dim
        pairs = opposed(vectors)
        if branch == BOTH:
            scores, trained = self.head(pairs, noise), vectors
        elif branch == PRODUCT:
            scores, trained = self._product(pairs), vectors[..., :dim]
        else:
            scores, trained = self._deep(pairs, noise), vectors[..., dim:]
        return self.objective(scores.view(len(ids), -1)) + self.penalty(trained)

    def lower(self) -> Program:
        """A weighted inner product and the perceptron, on a column view each; ``share`` is folded into both outputs."""
        dim, *deep, last, total = self.config.dim, *self.perceptron.lower("hidden0")
        bias = array(self.share * self.output.bias.detach().double()).reshape(())
        weight = self.share * array(self.output.weight)[0]
        halved = {name: self.share * tensor for name, tensor in last.tensors.items()}
        return Program(
            (
                Op("columns", ("vectors",), "factors", {"start": 0, "stop": dim}),
                Op("dot", ("factors",), "product", tensors={"weight": weight, "bias": bias}),
                Op("columns", ("vectors",), "inputs", {"start": dim, "stop": 2 * dim}),
                Op("flatten", ("inputs",), "hidden0"),
                *deep,
                Op(last.kind, last.inputs, last.output, tensors=halved),
                total,
                Op("add", ("product", "perceptron"), "score"),
            )
        )


@dataclass(frozen=True)
class NeuMF(Deep, PairBackbone):
    """Configuration of NeuMF.

    Users and items have two vectors each, ``g`` and ``m``: four tables, as two column ranges of one table::

        score = h . (g_u * g_v) + b + MLP([m_u, m_v])
        MLP   = [Linear -> ReLU -> Dropout] x hidden -> Linear(., 1)

    Positives and negatives go through one forward pass.

    Args:
        dim: width ``d`` of each vector, at least 1.
        pretraining: epochs that train the perceptron alone, then as many for the product alone, before both; if there
            are any, each branch counts one half in their sum.

    Example:
        >>> NeuMF(hidden=(64, 32, 16)).dim
        32

    Reference:
        He et al., Neural Collaborative Filtering, 2017, equations 7 and 12 and section 3.4.1. The loss averages each
        side, as the code of the benchmark of lightweight embeddings (2024) does.
    """

    name: ClassVar[str] = "neumf"
    model = NeuMFModel

    dim: int = 32
    hidden: tuple[int, ...] = (64, 32, 16)
    dropout: float = 0.0
    loss: Loss = "bce"
    negatives: int = 4
    regularisation: float = 1e-4
    pretraining: int = 0
    bounds: ClassVar = {"pretraining": 0}

    def blocks(self, schema: Schema) -> tuple[Block, ...]:
        """Four tables: users and items, times columns ``[0, d)`` of the product and ``[d, 2d)`` of the perceptron."""
        return tuple(
            Block(f"{kind} {branch}", field.offset, field.stop, left, left + self.dim)
            for left, branch in ((0, "product"), (self.dim, "perceptron"))
            for kind, field in zip(("user", "item"), schema.fields, strict=True)
        )

    def table(self, schema: Schema, source: torch.Generator) -> DenseTable:
        """Each table and each hidden layer Xavier-uniform; the two output layers as the framework draws them."""
        weight, blocks = torch.empty(schema.rows, 2 * self.dim), self.blocks(schema)
        for block in blocks:
            xavier(weight[block.start : block.stop, block.left : block.right], source)
        return DenseTable(schema, blocks, weight)
