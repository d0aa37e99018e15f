"""DeepFM: a factorisation machine and a multi-layer perceptron that share one embedding table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from pocketrec.errors import ConfigError
from pocketrec.format.program import Op, Program
from pocketrec.models.backbone import Backbone, ClickModel, noise
from pocketrec.models.first_values import click_blocks, click_table
from pocketrec.models.perceptron import Perceptron, array, batch_norms, linear_layers
from pocketrec.models.table import Block, Table
from pocketrec.schema import Schema, Task

if TYPE_CHECKING:
    from pocketrec.data.dataset import Dataset


@dataclass(frozen=True)
class DeepFM(Backbone):
    """Configuration of DeepFM.

    With ``e_f (d,)`` the embedding and ``w_f`` the linear weight of field ``f``'s value, and a scalar bias ``b``::

        logit = sum_f w_f + b + 0.5 sum_j [(sum_f e_fj)^2 - sum_f e_fj^2] + MLP(concat_f e_f)
        MLP   = [Linear -> BatchNorm -> ReLU -> Dropout] x hidden -> Linear(., 1)

    Args:
        dim: width ``d`` of an embedding, at least 1.
        hidden: widths of the hidden layers.
        dropout: share of hidden units dropped in training, in [0, 1).
        batch_norm: batch normalisation in the hidden layers.
        linear_std: standard deviation of the linear weights at the start. The default starts them near zero; 1.0 is
            the published initialisation (the default of a framework's embedding layer).

    Example:
        >>> DeepFM(dim=8, hidden=(64, 64)).hidden
        (64, 64)

    Reference:
        DeepFM: A Factorization-Machine based Neural Network for CTR Prediction, 2017, equations 1-4.
    """

    name: ClassVar[str] = "deepfm"
    task: ClassVar[Task] = "ctr"

    dim: int = 16
    hidden: tuple[int, ...] = (400, 400, 400)
    dropout: float = 0.2
    batch_norm: bool = True
    linear_std: float = 0.01

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        if self.dim < 1 or any(width < 1 for width in self.hidden):
            raise ConfigError(f"`dim` and `hidden` must be at least 1, but got {self.dim} and {self.hidden}.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"`dropout` must be in [0, 1), but got {self.dropout}.")
        if not self.linear_std >= 0:
            raise ConfigError(f"`linear_std` must be at least 0, but got {self.linear_std}.")

    def blocks(self, schema: Schema) -> tuple[Block, ...]:
        """``embedding``: columns ``[0, d)``; ``linear``: column ``d``, which no published count includes."""
        return click_blocks(schema, self.dim, linear=True)

    def build(self, data: Dataset, seed: int) -> DeepFMModel:
        """Embeddings Xavier-uniform on the whole ``n x d`` matrix, bound ``sqrt(6 / (n + d))``; bias zero."""
        source = noise(seed, "init")
        return DeepFMModel(self, click_table(data.schema, self.dim, source, self.linear_std), source)


class DeepFMModel(ClickModel):
    """The head of DeepFM around a table with ``d`` embedding columns and one linear column."""

    def __init__(self, backbone: DeepFM, table: Table, source: torch.Generator) -> None:
        super().__init__()
        self.backbone = backbone
        self.schema = table.schema
        self.table = table
        self.layers = linear_layers((self.schema.width * backbone.dim, *backbone.hidden, 1), source)
        self.norms = batch_norms(backbone.hidden if backbone.batch_norm else ())
        self.bias = nn.Parameter(torch.zeros(()))
        self.dim = backbone.dim
        self.dropout = backbone.dropout

    @property
    def perceptron(self) -> Perceptron:
        """The deep part."""
        return Perceptron(self.layers, self.norms, self.dropout)

    def head(self, vectors: Tensor, noise: torch.Generator | None = None) -> Tensor:
        """``(B, F, d + 1) -> (B,)`` logits."""
        embedding, linear = vectors[..., : self.dim], vectors[..., self.dim]
        pairs = 0.5 * (embedding.sum(dim=1).square() - embedding.square().sum(dim=1)).sum(dim=-1)
        return linear.sum(dim=1) + self.bias + pairs + self.perceptron(embedding.flatten(1), noise)

    def lower(self) -> Program:
        """Two column views, the perceptron with batch norm folded into its linear layers, and three sums."""
        ops = [
            Op("columns", ("vectors",), "embedding", {"start": 0, "stop": self.dim}),
            Op("columns", ("vectors",), "weights", {"start": self.dim, "stop": self.dim + 1}),
            Op("sum", ("weights",), "linear", tensors={"bias": array(self.bias)}),
            Op("fm", ("embedding",), "pairs"),
            Op("flatten", ("embedding",), "hidden0"),
            *self.perceptron.lower("hidden0"),
            Op("add", ("linear", "pairs", "perceptron"), "logit"),
        ]
        return Program(tuple(ops))
