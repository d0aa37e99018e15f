"""MLP: a multi-layer perceptron on the embeddings of a click's fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from pocketrec.format.program import Op, Program
from pocketrec.models.backbone import Backbone, ClickModel, noise
from pocketrec.models.first_values import check_least, click_blocks, click_table
from pocketrec.models.perceptron import Perceptron, batch_norms, check_perceptron, linear_layers
from pocketrec.models.table import Block, Table
from pocketrec.schema import Schema, Task

if TYPE_CHECKING:
    from pocketrec.data.dataset import Dataset


@dataclass(frozen=True)
class MLP(Backbone):
    """Configuration of the perceptron for clicks; ``PairMLP`` is the one for ranking.

    With ``e_f (d,)`` the embedding of field ``f``'s value::

        logit = MLP(concat_f e_f)
        MLP   = [Linear -> BatchNorm -> ReLU -> Dropout] x hidden -> Linear(., 1)

    Args:
        dim: width ``d`` of an embedding, at least 1.
        hidden: widths of the hidden layers.
        dropout: share of hidden units dropped in training, in [0, 1).
        batch_norm: batch normalisation in the hidden layers.

    Example:
        >>> MLP(hidden=(64, 32)).hidden
        (64, 32)

    Reference:
        The deep part of DeepFM: A Factorization-Machine based Neural Network for CTR Prediction, 2017, equations 3-4.
    """

    name: ClassVar[str] = "mlp"
    task: ClassVar[Task] = "ctr"

    dim: int = 16
    hidden: tuple[int, ...] = (400, 400, 400)
    dropout: float = 0.2
    batch_norm: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        check_least(self, dim=1)
        check_perceptron(self.hidden, self.dropout)

    def blocks(self, schema: Schema) -> tuple[Block, ...]:
        """One block, ``embedding``."""
        return click_blocks(schema, self.dim, linear=False)

    def build(self, data: Dataset, seed: int) -> MLPModel:
        """Embeddings Xavier-uniform on the whole ``n x d`` matrix, bound ``sqrt(6 / (n + d))``."""
        source = noise(seed, "init")
        return MLPModel(self, click_table(data.schema, self.dim, source), source)


class MLPModel(ClickModel):
    """The perceptron around a table."""

    def __init__(self, backbone: MLP, table: Table, source: torch.Generator) -> None:
        super().__init__()
        self.backbone = backbone
        self.schema = table.schema
        self.table = table
        self.layers = linear_layers((self.schema.width * backbone.dim, *backbone.hidden, 1), source)
        self.norms = batch_norms(backbone.hidden if backbone.batch_norm else ())
        self.dropout = backbone.dropout

    @property
    def perceptron(self) -> Perceptron:
        """The head."""
        return Perceptron(self.layers, self.norms, self.dropout)

    def head(self, vectors: Tensor, noise: torch.Generator | None = None) -> Tensor:
        """``(B, F, d) -> (B,)`` logits."""
        return self.perceptron(vectors.flatten(1), noise)

    def lower(self) -> Program:
        """The perceptron on the flattened vectors."""
        return Program((Op("flatten", ("vectors",), "hidden0"), *self.perceptron.lower("hidden0", "logit")))
