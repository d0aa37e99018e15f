"""DCN-Mix: cross layers of low rank, each a gated mixture of experts, under a perceptron."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pocketrec.errors import ConfigError
from pocketrec.format.program import Op, Program
from pocketrec.models.backbone import Backbone, ClickModel, noise
from pocketrec.models.first_values import check_least, click_blocks, click_table
from pocketrec.models.perceptron import Perceptron, array, batch_norms, check_perceptron, linear_layers
from pocketrec.models.table import Block, Table
from pocketrec.schema import Schema, Task

if TYPE_CHECKING:
    from pocketrec.data.dataset import Dataset


@dataclass(frozen=True)
class DCNMix(Backbone):
    """Configuration of DCN-Mix.

    With ``x_0 (f,)`` the concatenated embeddings, ``f = F d``, and gates ``w_k`` shared by all layers::

        P_k(x)  = x_0 * (U_k tanh(C_k tanh(V_k^T x)) + b)
        x_{l+1} = x_l + sum_k (w_k . x_l) P_k(x_l)
        logit   = MLP(x_L)

    All experts of a layer are computed together: ``sum_k g_k U_k c_k`` is one product of the gated codes of all experts
    with ``[U_1 ... U_K]``.

    Args:
        dim: width ``d`` of an embedding, at least 1.
        layers: cross layers ``L``, at least 0.
        experts: experts ``K`` of a layer, at least 1.
        rank: inner width ``r`` of an expert, at least 1.
        hidden: widths of the perceptron's hidden layers.
        dropout: share of hidden units dropped in training, in [0, 1).
        batch_norm: batch normalisation in the hidden layers.
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
    task: ClassVar[Task] = "ctr"

    dim: int = 16
    layers: int = 3
    experts: int = 4
    rank: int = 64
    hidden: tuple[int, ...] = (512, 512)
    dropout: float = 0.2
    batch_norm: bool = True
    init: Literal["published", "he"] = "published"

    def __post_init__(self) -> None:
        object.__setattr__(self, "hidden", tuple(self.hidden))
        check_least(self, dim=1, layers=0, experts=1, rank=1)
        check_perceptron(self.hidden, self.dropout)
        if self.init not in ("published", "he"):
            raise ConfigError(f"`init` must be 'published' or 'he', but got {self.init!r}.")

    def blocks(self, schema: Schema) -> tuple[Block, ...]:
        """One block, ``embedding``: there is no linear term."""
        return click_blocks(schema, self.dim, linear=False)

    def build(self, data: Dataset, seed: int) -> DCNMixModel:
        """Embeddings Xavier-uniform on the whole ``n x d`` matrix, bound ``sqrt(6 / (n + d))``."""
        source = noise(seed, "init")
        return DCNMixModel(self, click_table(data.schema, self.dim, source), source)


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


class DCNMixModel(ClickModel):
    """The head of DCN-Mix around a table."""

    def __init__(self, backbone: DCNMix, table: Table, source: torch.Generator) -> None:
        super().__init__()
        self.backbone = backbone
        self.schema = table.schema
        self.table = table
        width = self.schema.width * backbone.dim
        self.crosses = nn.ModuleList(CrossMixture(backbone, width, source) for _ in range(backbone.layers))
        gate = torch.empty(backbone.experts, width).normal_(0, math.sqrt(2 / width), generator=source)
        self.gate = nn.Parameter(gate)
        self.layers = linear_layers((width, *backbone.hidden, 1), source)
        self.norms = batch_norms(backbone.hidden if backbone.batch_norm else ())
        self.dropout = backbone.dropout

    @property
    def perceptron(self) -> Perceptron:
        """What lies on the last cross layer."""
        return Perceptron(self.layers, self.norms, self.dropout)

    def head(self, vectors: Tensor, noise: torch.Generator | None = None) -> Tensor:
        """``(B, F, d) -> (B,)`` logits."""
        return self.perceptron(self.crossed(vectors.flatten(1)), noise)

    def crossed(self, x0: Tensor) -> Tensor:
        """``x_0 -> x_L``, ``(B, f)`` both."""
        x = x0
        for cross in self.crosses:
            x = cross(x0, x, self.gate)
        return x

    def lower(self) -> Program:
        """One ``mixture`` per cross layer, then the perceptron."""
        gate = array(self.gate)
        ops, x = [Op("flatten", ("vectors",), "x0")], "x0"
        for i, cross in enumerate(cast("list[CrossMixture]", list(self.crosses))):
            tensors = {name: array(p) for name, p in cross.named_parameters()}
            ops.append(Op("mixture", ("x0", x), f"x{i + 1}", tensors={**tensors, "gate": gate}))
            x = f"x{i + 1}"
        return Program((*ops, *self.perceptron.lower(x, "logit")))
