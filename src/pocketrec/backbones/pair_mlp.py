"""PairMLP: ranking by a perceptron on a user's and an item's vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from pocketrec.format.program import Op, Program
from pocketrec.models.backbone import Backbone, noise
from pocketrec.models.first_values import check_least, pair_blocks, pair_table
from pocketrec.models.pair_scoring import Loss, Objective, PairModel
from pocketrec.models.perceptron import Perceptron, batch_norms, check_perceptron, linear_layers
from pocketrec.models.table import Block, Table
from pocketrec.schema import Schema, Task

if TYPE_CHECKING:
    from pocketrec.data.dataset import Dataset


@dataclass(frozen=True)
class PairMLP(Backbone):
    """Configuration of the perceptron for ranking; ``MLP`` is the one for clicks.

    With ``x = [e_u, e_v]`` and ``n`` the number of its non-zero entries::

        score = MLP(x / n)
        MLP   = [Linear -> BatchNorm -> ReLU -> Dropout] x hidden -> Linear(., 1)

    Args:
        dim: width ``d`` of a vector, at least 1.
        hidden: widths of the hidden layers; published are ``2d * 2^l`` for layers ``l = 1, 2, 3``.
        dropout: share of hidden units dropped in training, in [0, 1).
        batch_norm: batch normalisation in the hidden layers.
        nonzero_mean: divide the input by its number of non-zero entries, so that pruned vectors weigh the same.
        loss: ``bpr`` or ``bce``.
        negatives: of each training pair, at least 1; under ``bpr`` their losses are summed.
        regularisation: ``lambda`` on the looked-up vectors, at least 0.

    Example:
        >>> PairMLP(dim=16, hidden=(64, 128, 256)).negatives
        5

    Reference:
        Liang et al., Learning Compact Compositional Embeddings via Regularized Pruning for Recommendation (CERP), 2023:
        its MLP recommender, as the released code has it.
    """

    name: ClassVar[str] = "pair_mlp"
    task: ClassVar[Task] = "cf"

    dim: int = 64
    hidden: tuple[int, ...] = (256, 512, 1024)
    dropout: float = 0.0
    batch_norm: bool = True
    nonzero_mean: bool = True
    loss: Loss = "bpr"
    negatives: int = 5
    regularisation: float = 1e-4

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        check_least(self, dim=1, negatives=1, regularisation=0)
        check_perceptron(self.hidden, self.dropout)
        self.objective()

    def objective(self) -> Objective:
        """What is minimised."""
        return Objective(self.loss, self.negatives, self.regularisation)

    def blocks(self, schema: Schema) -> tuple[Block, ...]:
        """One block of rows for users, one for items."""
        return pair_blocks(schema, self.dim)

    def build(self, data: Dataset, seed: int) -> PairMLPModel:
        """Vectors Xavier-uniform on the whole ``n x d`` matrix, bound ``sqrt(6 / (n + d))``."""
        source = noise(seed, "init")
        return PairMLPModel(self, pair_table(data.schema, self.dim, source), source)


class PairMLPModel(PairModel):
    """The perceptron around a table."""

    def __init__(self, backbone: PairMLP, table: Table, source: torch.Generator) -> None:
        super().__init__()
        self.backbone = self.config = backbone
        self.objective = backbone.objective()
        self.schema = table.schema
        self.table = table
        self.layers = linear_layers((2 * backbone.dim, *backbone.hidden, 1), source)
        self.norms = batch_norms(backbone.hidden if backbone.batch_norm else ())

    @property
    def perceptron(self) -> Perceptron:
        """The head."""
        return Perceptron(self.layers, self.norms, self.config.dropout)

    def head(self, vectors: Tensor, noise: torch.Generator | None = None) -> Tensor:
        """``(B, 2, d) -> (B,)``."""
        x = vectors.flatten(1)
        if self.config.nonzero_mean:
            x = x / x.count_nonzero(dim=1).clamp_min(1)[:, None]
        return self.perceptron(x, noise)

    def lower(self) -> Program:
        """The perceptron on the two vectors, or on their mean over non-zeros."""
        ops, source = [Op("flatten", ("vectors",), "pair")], "pair"
        if self.config.nonzero_mean:
            ops.append(Op("nonzero_mean", ("pair",), "mean"))
            source = "mean"
        return Program((*ops, *self.perceptron.lower(source, "score")))
