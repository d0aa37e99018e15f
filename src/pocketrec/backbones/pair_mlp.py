"""PairMLP: ranking by a perceptron on a user's and an item's vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Generator, Tensor

from pocketrec.format.program import Op, Program
from pocketrec.models.pair_scoring import Loss, PairBackbone, PairModel
from pocketrec.models.perceptron import Deep, DeepModel


class PairMLPModel(DeepModel, PairModel):
    """The perceptron around a table."""

    def head(self, vectors: Tensor, noise: Generator | None = None) -> Tensor:
        """``(B, 2, d) -> (B,)``."""
        x = vectors.flatten(1)
        if self.config.nonzero_mean:
            x = x / x.count_nonzero(dim=1).clamp_min(1)[:, None]
        return self.perceptron(x, noise)

    def lower(self) -> Program:
        """The perceptron on the two vectors, or on their mean over non-zeros."""
        ops, source = [Op("flatten", ("vectors",), "pair")], "pair"
        if self.config.nonzero_mean:
            ops.append(Op("nonzero_mean", ("pair",), "mean"))
            source = "mean"
        return Program((*ops, *self.perceptron.lower(source, "score")))


@dataclass(frozen=True)
class PairMLP(Deep, PairBackbone):
    """Configuration of the perceptron for ranking; ``MLP`` is the one for clicks.

    With ``x = [e_u, e_v]`` and ``n`` the number of its non-zero entries::

        score = MLP(x / n)
        MLP   = [Linear -> BatchNorm -> ReLU -> Dropout] x hidden -> Linear(., 1)

    Args:
        hidden: widths of the hidden layers; published are ``2d * 2^l`` for layers ``l = 1, 2, 3``.
        nonzero_mean: divide the input by its number of non-zero entries, so that pruned vectors weigh the same.
        negatives: of each training pair, at least 1; under ``bpr`` their losses are summed.

    Example:
        >>> PairMLP(dim=16, hidden=(64, 128, 256)).negatives
        5

    Reference:
        Liang et al., Learning Compact Compositional Embeddings via Regularized Pruning for Recommendation (CERP), 2023:
        its MLP recommender, as the released code has it.
    """

    name: ClassVar[str] = "pair_mlp"
    model = PairMLPModel

    dim: int = 64
    hidden: tuple[int, ...] = (256, 512, 1024)
    dropout: float = 0.0
    batch_norm: bool = True
    nonzero_mean: bool = True
    loss: Loss = "bpr"
    negatives: int = 5
    regularisation: float = 1e-4
