"""DCNv2: cross layers of full rank, under or beside a perceptron."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, cast

import numpy as np
from numpy.typing import NDArray
from torch import Generator, Tensor, nn

from pocketrec.format.program import Op, Program
from pocketrec.models.backbone import ClickBackbone, HeadedModel
from pocketrec.models.perceptron import CrossModel, Deep, array, linear


class DCNv2Model(CrossModel, HeadedModel):
    """The head of DCNv2 around a table."""

    def draw(self, source: Generator) -> None:
        """Cross layers, the output of parallel ones, and the perceptron."""
        width, parallel = self.inputs, self.config.structure == "parallel"
        self.crosses = nn.ModuleList(linear(width, width, source) for _ in range(self.config.layers))
        self.side = linear(width, 1, source) if parallel else None
        self.draw_perceptron(width, source)

    def head(self, vectors: Tensor, noise: Generator | None = None) -> Tensor:
        """``(B, F, d) -> (B,)`` logits; ``(B, F, d + 1)`` with linear weights."""
        x0 = vectors[..., : self.config.dim].flatten(1)
        x = self.crossed(x0)
        if self.side is None:
            logit = self.perceptron(x, noise)
        else:
            logit = self.side(x).squeeze(-1).float() + self.perceptron(x0, noise)
        return logit + vectors[..., self.config.dim].sum(dim=1) if self.config.linear else logit

    def cross(self, layer: nn.Linear, x0: Tensor, x: Tensor) -> Tensor:
        """``x_0 * (W x + b) + x``."""
        return x0 * layer(x) + x

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


@dataclass(frozen=True)
class DCNv2(Deep, ClickBackbone):
    """Configuration of DCNv2.

    With ``x_0 (f,)`` the concatenated embeddings, ``f = F d``, and linear weights ``w_f`` if there are any::

        x_{l+1} = x_0 * (W_l x_l + b_l) + x_l
        logit   = MLP(x_L) [+ sum_f w_f]                  # stacked
        logit   = Linear(x_L) + MLP(x_0) [+ sum_f w_f]    # parallel: one output layer on both, written as a sum

    Args:
        layers: cross layers ``L``, at least 0.
        structure: ``stacked`` or ``parallel``.
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
    model = DCNv2Model

    dim: int = 16
    layers: int = 3
    structure: Literal["stacked", "parallel"] = "stacked"
    hidden: tuple[int, ...] = (512, 512)
    dropout: float = 0.2
    batch_norm: bool = True
    linear: bool = False
    linear_std: float = 0.01
    bounds: ClassVar = {"layers": 0, "linear_std": 0}

    @property
    def linear_start(self) -> float | None:
        """Linear weights only where they are asked for."""
        return self.linear_std if self.linear else None
