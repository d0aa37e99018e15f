"""GMF: generalised matrix factorisation, an inner product with a learned weight per dimension."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor

from pocketrec.format.program import Op, Program
from pocketrec.models.pair_scoring import Loss, PairBackbone, PairModel
from pocketrec.models.perceptron import array, linear


class GMFModel(PairModel):
    """Weighted inner products around a table."""

    def draw(self, source: Generator) -> None:
        """Weights and bias as the framework draws them."""
        self.output = linear(self.config.dim, 1, source)

    def head(self, vectors: Tensor, noise: Generator | None = None) -> Tensor:
        """``(B, 2, d) -> (B,)``."""
        return self.output(vectors[:, 0] * vectors[:, 1]).squeeze(-1).float()

    def lower(self) -> Program:
        """One weighted inner product."""
        tensors = {"weight": array(self.output.weight)[0], "bias": array(self.output.bias).reshape(())}
        return Program((Op("dot", ("vectors",), "score", tensors=tensors),))


@dataclass(frozen=True)
class GMF(PairBackbone):
    """Configuration of generalised matrix factorisation: ``score = h . (e_u * e_v) + b``.

    Example:
        >>> GMF(negatives=4).loss
        'bce'

    Reference:
        He et al., Neural Collaborative Filtering, 2017, equation 9.
    """

    name: ClassVar[str] = "gmf"
    model = GMFModel

    dim: int = 64
    loss: Loss = "bce"
    negatives: int = 4
    regularisation: float = 1e-4
