"""FM: the second-order factorisation machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from pocketrec.format.program import Op, Program
from pocketrec.models.backbone import Backbone, ClickModel, noise
from pocketrec.models.first_values import check_least, click_blocks, click_table
from pocketrec.models.perceptron import array
from pocketrec.models.table import Block, Table
from pocketrec.schema import Schema, Task

if TYPE_CHECKING:
    from pocketrec.data.dataset import Dataset


@dataclass(frozen=True)
class FM(Backbone):
    """Configuration of a factorisation machine.

    With ``e_f (d,)`` the embedding and ``w_f`` the linear weight of field ``f``'s value, and a scalar bias ``b``::

        logit = sum_f w_f + b + sum_{f<g} e_f . e_g
              = sum_f w_f + b + 0.5 sum_j [(sum_f e_fj)^2 - sum_f e_fj^2]

    Args:
        dim: width ``d`` of an embedding, at least 1.
        linear_std: standard deviation of the linear weights at the start.

    Example:
        >>> FM(dim=8).dim
        8

    Reference:
        Rendle, Factorization Machines, 2010, equations 1 and 3.
    """

    name: ClassVar[str] = "fm"
    task: ClassVar[Task] = "ctr"

    dim: int = 16
    linear_std: float = 0.01

    def __post_init__(self) -> None:
        check_least(self, dim=1, linear_std=0)

    def blocks(self, schema: Schema) -> tuple[Block, ...]:
        """``embedding``: columns ``[0, d)``; ``linear``: column ``d``, which no published count includes."""
        return click_blocks(schema, self.dim, linear=True)

    def build(self, data: Dataset, seed: int) -> FMModel:
        """Embeddings Xavier-uniform on the whole ``n x d`` matrix, bound ``sqrt(6 / (n + d))``; bias zero."""
        return FMModel(self, click_table(data.schema, self.dim, noise(seed, "init"), self.linear_std))


class FMModel(ClickModel):
    """The head of FM around a table with ``d`` embedding columns and one linear column."""

    def __init__(self, backbone: FM, table: Table) -> None:
        super().__init__()
        self.backbone = backbone
        self.schema = table.schema
        self.table = table
        self.bias = nn.Parameter(torch.zeros(()))
        self.dim = backbone.dim

    def head(self, vectors: Tensor, noise: torch.Generator | None = None) -> Tensor:
        """``(B, F, d + 1) -> (B,)`` logits."""
        embedding, linear = vectors[..., : self.dim], vectors[..., self.dim]
        pairs = 0.5 * (embedding.sum(dim=1).square() - embedding.square().sum(dim=1)).sum(dim=-1)
        return linear.sum(dim=1) + self.bias + pairs

    def lower(self) -> Program:
        """Two column views and two sums."""
        return Program(
            (
                Op("columns", ("vectors",), "embedding", {"start": 0, "stop": self.dim}),
                Op("columns", ("vectors",), "weights", {"start": self.dim, "stop": self.dim + 1}),
                Op("sum", ("weights",), "linear", tensors={"bias": array(self.bias)}),
                Op("fm", ("embedding",), "pairs"),
                Op("add", ("linear", "pairs"), "logit"),
            )
        )
