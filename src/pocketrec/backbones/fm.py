"""FM: the second-order factorisation machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor

from pocketrec.format.program import Op, Program
from pocketrec.models.backbone import FactorisationBackbone, FactorisationModel


class FMModel(FactorisationModel):
    """The head of FM: nothing but its terms."""

    def head(self, vectors: Tensor, noise: Generator | None = None) -> Tensor:
        """``(B, F, d + 1) -> (B,)`` logits."""
        return self.parts(vectors)[1]

    def lower(self) -> Program:
        """Two column views and two sums."""
        return Program((*self.terms(), Op("add", ("linear", "pairs"), "logit")))


@dataclass(frozen=True)
class FM(FactorisationBackbone):
    """Configuration of a factorisation machine.

    With ``e_f (d,)`` the embedding and ``w_f`` the linear weight of field ``f``'s value, and a scalar bias ``b``::

        logit = sum_f w_f + b + sum_{f<g} e_f . e_g
              = sum_f w_f + b + 0.5 sum_j [(sum_f e_fj)^2 - sum_f e_fj^2]

    Example:
        >>> FM(dim=8).dim
        8

    Reference:
        Rendle, Factorization Machines, 2010, equations 1 and 3.
    """

    name: ClassVar[str] = "fm"
    model = FMModel

    dim: int = 16
    linear_std: float = 0.01
