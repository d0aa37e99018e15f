"""DCN-Mix: cross layers of low rank, each a gated mixture of experts, under a perceptron."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pocketrec.format.program import Op, Program
from pocketrec.models.backbone import ClickBackbone, HeadedModel
from pocketrec.models.perceptron import CrossModel, Deep, array


class CrossMixture(nn.Module):
    """One cross layer: the experts' matrices side by side, so that three products run all of them.

    Attributes:
        down: ``V_k^T`` of all experts, ``(K r, f)``.
        core: ``C_k``, ``(K, r, r)``.
        up: ``U_k`` of all experts, ``(f, K r)``.
        bias: ``b``, ``(f,)``.
    """

    def __init__(self, backbone: DCNMix, width: int, source: torch.Generator) -> None:
        super().__init__()
        experts, rank = backbone.experts, backbone.rank
        published = backbone.init == "published"
        stds = (width * rank, rank * rank, width * rank) if published else (width, rank, rank)
        shapes = ((experts * rank, width), (experts, rank, rank), (width, experts * rank))
        self.down, self.core, self.up = (
            nn.Parameter(torch.empty(shape).normal_(0, math.sqrt(2 / fan), generator=source))
            for shape, fan in zip(shapes, stds, strict=True)
        )
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x0: Tensor, x: Tensor, gate: Tensor) -> Tensor:
        """``(B, f), (B, f), (K, f) -> (B, f)``."""
        experts, rank, _ = self.core.shape
        inner = torch.tanh(F.linear(x, self.down)).view(-1, experts, rank).transpose(0, 1)
        outer = torch.tanh(torch.bmm(inner, self.core.transpose(1, 2))).transpose(0, 1)
        gates = F.linear(x, gate)
        update = F.linear((outer * gates[..., None]).flatten(1), self.up)
        return x + x0 * torch.addcmul(update, gates.sum(dim=1, keepdim=True), self.bias)


class DCNMixModel(CrossModel, HeadedModel):
    """The head of DCN-Mix around a table."""

    def draw(self, source: torch.Generator) -> None:
        """Cross layers, gates, and the perceptron that lies on the last of them."""
        config, width = self.config, self.inputs
        self.crosses = nn.ModuleList(CrossMixture(config, width, source) for _ in range(config.layers))
        gate = torch.empty(config.experts, width).normal_(0, math.sqrt(2 / width), generator=source)
        self.gate = nn.Parameter(gate)
        self.draw_perceptron(width, source)

    def head(self, vectors: Tensor, noise: torch.Generator | None = None) -> Tensor:
        """``(B, F, d) -> (B,)`` logits."""
        return self.perceptron(self.crossed(vectors.flatten(1)), noise)

    def cross(self, layer: CrossMixture, x0: Tensor, x: Tensor) -> Tensor:
        """The mixture of a layer under the gates of all."""
        return layer(x0, x, self.gate)

    def lower(self) -> Program:
        """One ``mixture`` per cross layer, then the perceptron."""
        gate = array(self.gate)
        ops, x = [Op("flatten", ("vectors",), "x0")], "x0"
        for i, cross in enumerate(cast("list[CrossMixture]", list(self.crosses))):
            tensors = {name: array(p) for name, p in cross.named_parameters()}
            ops.append(Op("mixture", ("x0", x), f"x{i + 1}", tensors={**tensors, "gate": gate}))
            x = f"x{i + 1}"
        return Program((*ops, *self.perceptron.lower(x, "logit")))


@dataclass(frozen=True)
class DCNMix(Deep, ClickBackbone):
    """Configuration of DCN-Mix.

    With ``x_0 (f,)`` the concatenated embeddings, ``f = F d``, and gates ``w_k`` shared by all layers::

        P_k(x)  = x_0 * (U_k tanh(C_k tanh(V_k^T x)) + b)
        x_{l+1} = x_l + sum_k (w_k . x_l) P_k(x_l)
        logit   = MLP(x_L)

    All experts of a layer are computed together: ``sum_k g_k U_k c_k`` is one product of the gated codes of all experts
    with ``[U_1 ... U_K]``.

    Args:
        layers: cross layers ``L``, at least 0.
        experts: experts ``K`` of a layer, at least 1.
        rank: inner width ``r`` of an expert, at least 1.
        init: how the cross layers start. ``published`` draws He-normal with the fan of the released code, which takes
            it over all experts at once: standard deviation ``sqrt(2 / (f r))`` for ``U`` and ``V``, ``sqrt(2 / r^2)``
            for ``C``, so that layers start near the identity. ``he`` takes each matrix by itself: ``sqrt(2 / f)`` for
            ``V``, ``sqrt(2 / r)`` for ``C`` and ``U``. Gates have ``sqrt(2 / f)`` in both.

    Example:
        >>> DCNMix(layers=2, experts=4, rank=32).rank
        32

    Reference:
        Wang et al., DCN V2: Improved Deep & Cross Network and Practical Lessons for Web-scale Learning to Rank Systems,
        2021, equations 3-6.
    """

    name: ClassVar[str] = "dcn_mix"
    model = DCNMixModel

    dim: int = 16
    layers: int = 3
    experts: int = 4
    rank: int = 64
    hidden: tuple[int, ...] = (512, 512)
    dropout: float = 0.2
    batch_norm: bool = True
    init: Literal["published", "he"] = "published"
    bounds: ClassVar = {"layers": 0, "experts": 1, "rank": 1}

    def small(self) -> DCNMix:
        """Narrow experts, too."""
        return replace(super().small(), rank=4)
