"""MF: matrix factorisation, ranking by the inner product of a user's and an item's vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from pocketrec.evaluation.full_ranking import INNER_PRODUCT
from pocketrec.format.program import Program
from pocketrec.models.backbone import Backbone, noise
from pocketrec.models.first_values import check_least, pair_blocks, pair_table
from pocketrec.models.pair_scoring import Loss, Objective, PairModel
from pocketrec.models.table import Block, Table
from pocketrec.schema import Schema, Task

if TYPE_CHECKING:
    from pocketrec.data.dataset import Dataset


@dataclass(frozen=True)
class MF(Backbone):
    """Configuration of matrix factorisation: ``score = e_u . e_v``.

    Args:
        dim: width ``d`` of a vector, at least 1.
        loss: ``bpr`` or ``bce``.
        negatives: of each training pair, at least 1.
        regularisation: ``lambda`` on the looked-up vectors, at least 0.

    Example:
        >>> MF(dim=32).loss
        'bpr'

    Reference:
        Rendle et al., BPR: Bayesian Personalized Ranking from Implicit Feedback, 2009, section 4.3.1.
    """

    name: ClassVar[str] = "mf"
    task: ClassVar[Task] = "cf"

    dim: int = 64
    loss: Loss = "bpr"
    negatives: int = 1
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

    def build(self, data: Dataset, seed: int) -> MFModel:
        """Vectors Xavier-uniform on the whole ``n x d`` matrix, bound ``sqrt(6 / (n + d))``."""
        return MFModel(self, pair_table(data.schema, self.dim, noise(seed, "init")))


class MFModel(PairModel):
    """Inner products around a table."""

    def __init__(self, backbone: MF, table: Table) -> None:
        super().__init__()
        self.backbone = backbone
        self.objective = backbone.objective()
        self.schema = table.schema
        self.table = table

    def head(self, vectors: Tensor, noise: torch.Generator | None = None) -> Tensor:
        """``(B, 2, d) -> (B,)``."""
        return (vectors[:, 0] * vectors[:, 1]).sum(dim=-1)

    def lower(self) -> Program:
        """One inner product."""
        return INNER_PRODUCT
