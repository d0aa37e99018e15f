"""DCNv2: cross layers of full rank, under or beside a perceptron."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pocketrec.errors import ConfigError
from pocketrec.format.program import Op, Program
from pocketrec.models.backbone import Backbone, ClickModel, noise
from pocketrec.models.first_values import check_least, click_blocks, click_table
from pocketrec.models.perceptron import Perceptron, array, batch_norms, check_perceptron, linear, linear_layers
from pocketrec.models.table import Block, Table
from pocketrec.schema import Schema, Task

if TYPE_CHECKING:
    from pocketrec.data.dataset import Dataset


@dataclass(frozen=True)
class DCNv2(Backbone):
    """Configuration of DCNv2.

    With ``x_0 (f,)`` the concatenated embeddings, ``f = F d``, and linear weights ``w_f`` if there are any::

        x_{l+1} = x_0 * (W_l x_l + b_l) + x_l
        logit   = MLP(x_L) [+ sum_f w_f]                  # stacked
        logit   = Linear(x_L) + MLP(x_0) [+ sum_f w_f]    # parallel: one output layer on both, written as a sum

    Args:
        dim: width ``d`` of an embedding, at least 1.
        layers: cross layers ``L``, at least 0.
        structure: ``stacked`` or ``parallel``.
        hidden: widths of the perceptron's hidden layers.
        dropout: share of hidden units dropped in training, in [0, 1).
        batch_norm: batch normalisation in the hidden layers.
        linear: add a linear weight per feature, as one of the two published codes does.
        linear_std: standard deviation of these at the start.

    Example:
        >>> DCNv2(structure="parallel").layers
        3

    Reference:
        Wang et al., DCN V2: Improved Deep & Cross Network and Practical Lessons for Web-scale Learning to Rank Systems,
        2021, equation 1 and figure 1.
    """

    name: ClassVar[str] = "dcnv2"
    task: ClassVar[Task] = "ctr"

    dim: int = 16
    layers: int = 3
    structure: Literal["stacked", "parallel"] = "stacked"
    hidden: tuple[int, ...] = (512, 512)
    dropout: float = 0.2
    batch_norm: bool = True
    linear: bool = False
    linear_std: float = 0.01

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        check_least(self, dim=1, layers=0, linear_std=0)
        check_perceptron(self.hidden, self.dropout)
        if self.structure not in ("stacked", "parallel"):
            raise ConfigError(f"`structure` must be 'stacked' or 'parallel', but got {self.structure!r}.")

    def blocks(self, schema: Schema) -> tuple[Block, ...]:
        """``embedding``: columns ``[0, d)``; with ``linear``, column ``d``, which no published count includes."""
        return click_blocks(schema, self.dim, linear=self.linear)

    def build(self, data: Dataset, seed: int) -> DCNv2Model:
        """Embeddings Xavier-uniform on the whole ``n x d`` matrix, bound ``sqrt(6 / (n + d))``."""
        source = noise(seed, "init")
        std = self.linear_std if self.linear else None
        return DCNv2Model(self, click_table(data.schema, self.dim, source, std), source)


class DCNv2Model(ClickModel):
    """The head of DCNv2 around a table."""

    def __init__(self, backbone: DCNv2, table: Table, source: torch.Generator) -> None:
        super().__init__()
        self.backbone = self.config = backbone
        self.schema = table.schema
        self.table = table
        width = self.schema.width * backbone.dim
        self.crosses = nn.ModuleList(linear(width, width, source) for _ in range(backbone.layers))
        self.side = linear(width, 1, source) if backbone.structure == "parallel" else None
        self.layers = linear_layers((width, *backbone.hidden, 1), source)
        self.norms = batch_norms(backbone.hidden if backbone.batch_norm else ())

    @property
    def perceptron(self) -> Perceptron:
        """The deep part."""
        return Perceptron(self.layers, self.norms, self.config.dropout)

    def head(self, vectors: Tensor, noise: torch.Generator | None = None) -> Tensor:
        """``(B, F, d) -> (B,)`` logits; ``(B, F, d + 1)`` with linear weights."""
        x0 = vectors[..., : self.config.dim].flatten(1)
        x = self.crossed(x0)
        if self.side is None:
            logit = self.perceptron(x, noise)
        else:
            logit = self.side(x).squeeze(-1).float() + self.perceptron(x0, noise)
        return logit + vectors[..., self.config.dim].sum(dim=1) if self.config.linear else logit

    def crossed(self, x0: Tensor) -> Tensor:
        """``x_0 -> x_L``, ``(B, f)`` both."""
        x = x0
        for layer in self.crosses:
            x = x0 * layer(x) + x
        return x

    def lower(self) -> Program:
        """One ``cross`` per layer, the perceptron behind or beside them, and a sum where there are several parts."""
        dim, parts = self.config.dim, ["perceptron"]
        ops = [Op("columns", ("vectors",), "embedding", {"start": 0, "stop": dim}), Op("flatten", ("embedding",), "x0")]
        x = "x0"
        for i, layer in enumerate(cast("list[nn.Linear]", list(self.crosses))):
            ops.append(Op("cross", ("x0", x), f"x{i + 1}", tensors=_tensors(layer)))
            x = f"x{i + 1}"
        if self.side is not None:
            ops += [Op("linear", (x,), "side", tensors=_tensors(self.side)), Op("sum", ("side",), "crossed")]
            parts.append("crossed")
        ops += self.perceptron.lower("x0" if self.side is not None else x)
        if self.config.linear:
            ops.append(Op("columns", ("vectors",), "weights", {"start": dim, "stop": dim + 1}))
            ops.append(Op("sum", ("weights",), "linear"))
            parts.append("linear")
        return Program((*ops, Op("add", tuple(parts), "logit")))


def _tensors(layer: nn.Linear) -> dict[str, NDArray[np.float32]]:
    """Weight and bias."""
    return {name: array(p) for name, p in layer.named_parameters()}
