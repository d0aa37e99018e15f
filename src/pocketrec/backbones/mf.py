"""MF: matrix factorisation, ranking by the inner product of a user's and an item's vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor

from pocketrec.evaluation.full_ranking import INNER_PRODUCT
from pocketrec.format.program import Program
from pocketrec.models.pair_scoring import Loss, PairBackbone, PairModel


class MFModel(PairModel):
    """Inner products around a table."""

    def head(self, vectors: Tensor, noise: Generator | None = None) -> Tensor:
        """``(B, 2, d) -> (B,)``."""
        return (vectors[:, 0] * vectors[:, 1]).sum(dim=-1)

    def lower(self) -> Program:
        """One inner product."""
        return INNER_PRODUCT


@dataclass(frozen=True)
class MF(PairBackbone):
    """Configuration of matrix factorisation: ``score = e_u . e_v``.

    Example:
        >>> MF(dim=32).loss
        'bpr'

    Reference:
        Rendle et al., BPR: Bayesian Personalized Ranking from Implicit Feedback, 2009, section 4.3.1.
    """

    name: ClassVar[str] = "mf"
    model = MFModel

    dim: int = 64
    loss: Loss = "bpr"
    negatives: int = 1
    regularisation: float = 1e-4
