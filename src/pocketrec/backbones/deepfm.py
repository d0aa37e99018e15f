"""DeepFM: a factorisation machine and a multi-layer perceptron that share one embedding table."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor

from pocketrec.format.program import Op, Program
from pocketrec.models.backbone import FactorisationBackbone, FactorisationModel
from pocketrec.models.perceptron import Deep, DeepModel


class DeepFMModel(DeepModel, FactorisationModel):
    """The head of DeepFM: a factorisation machine's terms beside a perceptron."""

    def draw(self, source: Generator) -> None:
        """Perceptron and bias."""
        super().draw(source)
        FactorisationModel.draw(self, source)

    def head(self, vectors: Tensor, noise: Generator | None = None) -> Tensor:
        """``(B, F, d + 1) -> (B,)`` logits."""
        embedding, terms = self.parts(vectors)
        return terms + self.perceptron(embedding.flatten(1), noise)

    def lower(self) -> Program:
        """The terms, the perceptron with batch norm folded into its linear layers, and their sum."""
        deep = (Op("flatten", ("embedding",), "hidden0"), *self.perceptron.lower("hidden0"))
        return Program((*self.terms(), *deep, Op("add", ("linear", "pairs", "perceptron"), "logit")))


@dataclass(frozen=True)
class DeepFM(Deep, FactorisationBackbone):
    """Configuration of DeepFM.

    With ``e_f (d,)`` the embedding and ``w_f`` the linear weight of field ``f``'s value, and a scalar bias ``b``::

        logit = sum_f w_f + b + 0.5 sum_j [(sum_f e_fj)^2 - sum_f e_fj^2] + MLP(concat_f e_f)
        MLP   = [Linear -> BatchNorm -> ReLU -> Dropout] x hidden -> Linear(., 1)

    Args:
        linear_std: standard deviation of the linear weights at the start. The default starts them near zero; 1.0 is
            the published initialisation (the default of a framework's embedding layer).

    Example:
        >>> DeepFM(dim=8, hidden=(64, 64)).hidden
        (64, 64)

    Reference:
        DeepFM: A Factorization-Machine based Neural Network for CTR Prediction, 2017, equations 1-4.
    """

    name: ClassVar[str] = "deepfm"
    model = DeepFMModel

    dim: int = 16
    hidden: tuple[int, ...] = (400, 400, 400)
    dropout: float = 0.2
    batch_norm: bool = True
    linear_std: float = 0.01
