"""MLP: a multi-layer perceptron on the embeddings of a click's fields."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor

from pocketrec.format.program import Op, Program
from pocketrec.models.backbone import ClickBackbone, HeadedModel
from pocketrec.models.perceptron import Deep, DeepModel


class MLPModel(DeepModel, HeadedModel):
    """The perceptron around a table."""

    def head(self, vectors: Tensor, noise: Generator | None = None) -> Tensor:
        """``(B, F, d) -> (B,)`` logits."""
        return self.perceptron(vectors.flatten(1), noise)

    def lower(self) -> Program:
        """The perceptron on the flattened vectors."""
        return Program((Op("flatten", ("vectors",), "hidden0"), *self.perceptron.lower("hidden0", "logit")))


@dataclass(frozen=True)
class MLP(Deep, ClickBackbone):
    """Configuration of the perceptron for clicks; ``PairMLP`` is the one for ranking.

    With ``e_f (d,)`` the embedding of field ``f``'s value::

        logit = MLP(concat_f e_f)
        MLP   = [Linear -> BatchNorm -> ReLU -> Dropout] x hidden -> Linear(., 1)

    Example:
        >>> MLP(hidden=(64, 32)).hidden
        (64, 32)

    Reference:
        The deep part of DeepFM: A Factorization-Machine based Neural Network for CTR Prediction, 2017, equations 3-4.
    """

    name: ClassVar[str] = "mlp"
    model = MLPModel

    dim: int = 16
    hidden: tuple[int, ...] = (400, 400, 400)
    dropout: float = 0.2
    batch_norm: bool = True
