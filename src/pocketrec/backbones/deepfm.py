"""DeepFM: a factorisation machine and a multi-layer perceptron that share one embedding table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from typing import TYPE_CHECKING, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pocketrec.backbone import Backbone, ClickModel, noise
from pocketrec.errors import ConfigError
from pocketrec.program import Op, Program
from pocketrec.schema import Schema, Task
from pocketrec.table import Block, DenseTable, Table

if TYPE_CHECKING:
    from pocketrec.dataset import Dataset


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
        return (
            Block("embedding", 0, schema.rows, 0, self.dim),
            Block("linear", 0, schema.rows, self.dim, self.dim + 1, counted=False),
        )

    def build(self, data: Dataset, seed: int) -> DeepFMModel:
        """Embeddings Xavier-uniform on the whole ``n x d`` matrix, bound ``sqrt(6 / (n + d))``; bias zero."""
        schema = data.schema
        source = noise(seed, "init")
        bound = math.sqrt(6 / (schema.rows + self.dim))
        weight = torch.empty(schema.rows, self.dim + 1)
        weight[:, : self.dim].uniform_(-bound, bound, generator=source)
        weight[:, self.dim].normal_(0, self.linear_std, generator=source)
        table = DenseTable(schema, self.blocks(schema), weight)
        return DeepFMModel(self, table, source)


class DeepFMModel(ClickModel):
    """The head of DeepFM around a table with ``d`` embedding columns and one linear column."""

    def __init__(self, backbone: DeepFM, table: Table, source: torch.Generator) -> None:
        super().__init__()
        self.backbone = backbone
        self.schema = table.schema
        self.table = table
        widths = (self.schema.width * backbone.dim, *backbone.hidden, 1)
        self.layers = nn.ModuleList(_linear(i, o, source) for i, o in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for width in backbone.hidden if backbone.batch_norm)
        self.bias = nn.Parameter(torch.zeros(()))
        self.dim = backbone.dim
        self.dropout = backbone.dropout

    def head(self, vectors: Tensor, noise: torch.Generator | None = None) -> Tensor:
        """``(B, F, d + 1) -> (B,)`` logits."""
        embedding, linear = vectors[..., : self.dim], vectors[..., self.dim]
        pairs = 0.5 * (embedding.sum(dim=1).square() - embedding.square().sum(dim=1)).sum(dim=-1)
        return linear.sum(dim=1) + self.bias + pairs + self._perceptron(embedding.flatten(1), noise).float()

    def _perceptron(self, x: Tensor, noise: torch.Generator | None) -> Tensor:
        """``(B, F * d) -> (B,)``."""
        *hidden, (last, _) = self._stack()
        for layer, norm in hidden:
            x = layer(x)
            if norm is not None:
                x = _normalise(x, norm, training=noise is not None)
            x = F.relu(x)
            if noise is not None and self.dropout > 0:
                x = x * _dropout_mask(x, self.dropout, noise)
        return last(x).squeeze(-1)

    def _stack(self) -> list[tuple[nn.Linear, nn.BatchNorm1d | None]]:
        """Each linear layer with the batch norm that follows it, if one does."""
        layers, norms = cast("list[nn.Linear]", list(self.layers)), cast("list[nn.BatchNorm1d]", list(self.norms))
        return list(zip_longest(layers, norms))

    def lower(self) -> Program:
        """Two column views, the perceptron with batch norm folded into its linear layers, and three sums."""
        ops = [
            Op("columns", ("vectors",), "embedding", {"start": 0, "stop": self.dim}),
            Op("columns", ("vectors",), "weights", {"start": self.dim, "stop": self.dim + 1}),
            Op("sum", ("weights",), "linear", {"bias": float(self.bias.detach())}),
            Op("fm", ("embedding",), "pairs"),
            Op("flatten", ("embedding",), "hidden0"),
        ]
        for i, (weight, bias) in enumerate(self._folded()):
            ops.append(Op("linear", (f"hidden{i}",), f"linear{i}", tensors={"weight": weight, "bias": bias}))
            ops.append(Op("relu", (f"linear{i}",), f"hidden{i + 1}"))
        ops[-1] = Op("sum", (ops[-2].output,), "perceptron")
        ops.append(Op("add", ("linear", "pairs", "perceptron"), "logit"))
        return Program(tuple(ops))

    def _folded(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Weight ``(o, i)`` and bias ``(o,)`` of each layer, ``s W`` and ``s (b - mean) + beta`` under batch norm."""
        folded = []
        for layer, norm in self._stack():
            weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
            if norm is not None:
                mean, variance = _statistics(norm)
                scale = norm.weight.detach() / torch.sqrt(variance.double() + norm.eps)
                weight, bias = scale[:, None] * weight, scale * (bias - mean) + norm.bias.detach()
            folded.append((weight.float().numpy(), bias.float().numpy()))
        return folded


def _linear(inputs: int, outputs: int, source: torch.Generator) -> nn.Linear:
    """A linear layer with weight and bias uniform in ``+-1 / sqrt(inputs)``, the framework's default."""
    layer = cast("nn.Linear", nn.utils.skip_init(nn.Linear, inputs, outputs))
    bound = 1 / math.sqrt(inputs)
    with torch.no_grad():
        layer.weight.uniform_(-bound, bound, generator=source)
        layer.bias.uniform_(-bound, bound, generator=source)
    return layer


def _normalise(x: Tensor, norm: nn.BatchNorm1d, *, training: bool) -> Tensor:
    """Batch norm with the batch's statistics in training (and a step of the running ones), else the running ones."""
    mean, variance = _statistics(norm)
    return F.batch_norm(x, mean, variance, norm.weight, norm.bias, training, norm.momentum or 0.0, norm.eps)


def _statistics(norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """Running mean and variance, ``(width,)`` each."""
    return cast("Tensor", norm.running_mean), cast("Tensor", norm.running_var)


def _dropout_mask(x: Tensor, rate: float, noise: torch.Generator) -> Tensor:
    """``0`` with probability ``rate`` (to 2^-16), else ``1 / (1 - rate)``; the same on every device."""
    seed = int(torch.randint(2**62, (), generator=noise))
    bits = np.random.Generator(np.random.SFC64(seed)).integers(0, 2**16, x.shape, dtype=np.uint16)
    kept = torch.from_numpy(bits >= round(rate * 2**16))
    return kept.to(x.device, x.dtype).mul_(1 / (1 - rate))
