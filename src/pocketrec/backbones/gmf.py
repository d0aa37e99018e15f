"""GMF: generalised matrix factorisation, an inner product with a learned weight per dimension."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from pocketrec.format.program import Op, Program
from pocketrec.models.backbone import Backbone, noise
from pocketrec.models.first_values import check_least, pair_blocks, pair_table
from pocketrec.models.pair_scoring import Loss, Objective, PairModel
from pocketrec.models.perceptron import array, linear
from pocketrec.models.table import Block, Table
from pocketrec.schema import Schema, Task

if TYPE_CHECKING:
    from pocketrec.data.dataset import Dataset


@dataclass(frozen=True)
class GMF(Backbone):
    """Configuration of generalised matrix factorisation: ``score = h . (e_u * e_v) + b``.

    Args:
        dim: width ``d`` of a vector, at least 1.
        loss: ``bce`` or ``bpr``.
        negatives: of each training pair, at least 1.
        regularisation: ``lambda`` on the looked-up vectors, at least 0.

    Example:
        >>> GMF(negatives=4).loss
        'bce'

    Reference:
        He et al., Neural Collaborative Filtering, 2017, equation 9.
    """

    name: ClassVar[str] = "gmf"
    task: ClassVar[Task] = "cf"

    dim: int = 64
    loss: Loss = "bce"
    negatives: int = 4
    regularisation: float = 1e-4

    def __post_init__(self) -> None:
        check_least(self, dim=1, negatives=1, regularisation=0)
        self.objective()

    def objective(self) -> Objective:
        """What is minimised."""
        return Objective(self.loss, self.negatives, self.regularisation)

    def blocks(self, schema: Schema) -> tuple[Block, ...]:
        """One block of rows for users, one for items."""
        return pair_blocks(schema, self.dim)

    def build(self, data: Dataset, seed: int) -> GMFModel:
        """Vectors Xavier-uniform on the whole ``n x d`` matrix; weights and bias as the framework draws them."""
        source = noise(seed, "init")
        return GMFModel(self, pair_table(data.schema, self.dim, source), source)


class GMFModel(PairModel):
    """Weighted inner products around a table."""

    def __init__(self, backbone: GMF, table: Table, source: torch.Generator) -> None:
        super().__init__()
        self.backbone = backbone
        self.objective = backbone.objective()
        self.schema = table.schema
        self.table = table
        self.output = linear(backbone.dim, 1, source)

    def head(self, vectors: Tensor, noise: torch.Generator | None = None) -> Tensor:
        """``(B, 2, d) -> (B,)``."""
        return self.output(vectors[:, 0] * vectors[:, 1]).squeeze(-1).float()

    def lower(self) -> Program:
        """One weighted inner product."""
        tensors = {"weight": array(self.output.weight)[0], "bias": array(self.output.bias).reshape(())}
        return Program((Op("dot", ("vectors",), "score", tensors=tensors),))
