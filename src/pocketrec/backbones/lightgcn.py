"""LightGCN: ranking by inner products of propagated user and item vectors, with a contrastive term."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pocketrec import settings
from pocketrec.format.program import Op, Program
from pocketrec.models.backbone import Backbone, noise
from pocketrec.models.first_values import pair_blocks, xavier
from pocketrec.models.graph import Buffers, Graph
from pocketrec.models.pair_scoring import PairedModel
from pocketrec.models.table import Block, DenseTable, Table
from pocketrec.schema import Schema, Task

if TYPE_CHECKING:
    from pocketrec.data.dataset import Dataset

BLOCK = 256
"""Rows of the similarity matrix that are computed together: they stay in cache, and no figure depends on it."""


@dataclass(frozen=True)
class LightGCN(Backbone):
    """Configuration of LightGCN with InfoNCE.

    With ego vectors ``e``, final vectors ``z = 1/(L+1) sum_{l<=L} Ahat^l e``, a batch of ``B`` users ``u`` with a
    positive ``p`` and negatives ``q_1 ... q_K``, and ``S`` its distinct users and distinct positives::

        loss = BPR + lambda REG + gamma NCE
        BPR  = mean sum_k softplus(z_u . z_qk - z_u . z_p)
        REG  = sum (|e_u|^2 + |e_p|^2 + sum_k |e_qk|^2) / (2 B)
        NCE  = mean_{a in S} log sum_{b in S} exp((cos(z_a, z_b) - 1) / tau)

    The graph holds training pairs alone, also when the model is measured.

    Args:
        dim: width ``d`` of a vector, at least 1.
        layers: ``L``, at least 0; 0 is matrix factorisation.
        regularisation: ``lambda``, at least 0.
        contrast: ``gamma``, at least 0; 0 is plain LightGCN.
        temperature: ``tau``, above 0.
        negatives: ``K``, of each training pair, at least 1; CERP trains with 5.
        init: ``xavier`` (uniform, bound ``sqrt(6 / (n + d))``) or ``normal`` (standard deviation 0.1, as in the
            original).

    Example:
        >>> LightGCN(layers=2).layers
        2

    Reference:
        LightGCN: Simplifying and Powering Graph Convolution Network for Recommendation, 2020, equations 7-8 and 15;
        the contrastive term as in the benchmark of lightweight embeddings (2024).
    """

    name: ClassVar[str] = "lightgcn"
    task: ClassVar[Task] = "cf"

    dim: int = 64
    layers: int = 3
    regularisation: float = 5e-4
    contrast: float = 0.1
    temperature: float = 0.2
    negatives: int = 1
    init: Literal["xavier", "normal"] = "xavier"

    def __post_init__(self) -> None:
        settings.check(self, dim=1, layers=0, regularisation=0, contrast=0, negatives=1)
        settings.check_above(self, temperature=0)

    def blocks(self, schema: Schema) -> tuple[Block, ...]:
        """One block of rows for users, one for items."""
        return pair_blocks(schema, self.dim)

    def build(self, data: Dataset, seed: int) -> LightGCNModel:
        """A fresh table, and the graph of the training pairs."""
        schema = data.schema
        weight = torch.empty(schema.rows, self.dim)
        if self.init == "xavier":
            xavier(weight, noise(seed, "init"))
        else:
            weight.normal_(0, 0.1, generator=noise(seed, "init"))
        graph = Graph.of(data.train.ids[:, 0], data.train.ids[:, 1], schema.rows)
        return LightGCNModel(self, DenseTable(schema, self.blocks(schema), weight), graph)


class LightGCNModel(PairedModel):
    """The graph and the losses around a table; the head has no weights."""

    def __init__(self, backbone: LightGCN, table: Table, graph: Graph) -> None:
        super().__init__()
        self.backbone = self.config = backbone
        self.schema, self.table, self.graph = table.schema, table, graph
        self.workspace = Buffers()

    def loss(self, batch: tuple[Tensor, ...], noise: torch.Generator) -> Tensor:
        """``BPR + lambda REG + gamma NCE`` of ``batch = (ids (B, 2 + K),)``; bf16 under autocast, sums in float32."""
        config, ids = self.config, batch[0]
        rows, place, counts = torch.unique(ids, return_inverse=True, return_counts=True)
        final, ego = self.graph.propagate_rows(self.table.weight(), config.layers, rows, storage=_storage(ids.device))
        user, positive, negatives = (F.embedding(column, final) for column in place.tensor_split((1, 2), dim=1))
        loss = F.softplus((user * (negatives - positive)).sum(dim=2)).sum(dim=1).mean()
        loss = loss + config.regularisation / (2 * len(ids)) * (counts * ego.square().sum(dim=1)).sum()
        if config.contrast > 0:
            members = torch.unique(place[:, :2])
            loss = loss + config.contrast * self.contrast(F.embedding(members, final))
        return loss

    def contrast(self, vectors: Tensor) -> Tensor:
        """``NCE`` of the rows ``(S, d)``, a scalar; products in bf16 under autocast."""
        return _Contrast.apply(vectors, self.config.temperature, self.workspace, _storage(vectors.device))  # pyright: ignore

    def propagate(self, weight: Tensor) -> Tensor:
        """``z = 1/(L+1) sum_{l<=L} Ahat^l weight``, float32; under autocast, layers are held in its type."""
        return self.graph.propagate(weight, self.config.layers, storage=_storage(weight.device))

    def scores(self, users: Tensor, items: Tensor) -> Tensor:
        """Inner products ``(B, d), (I, d) -> (B, I)``."""
        return users @ items.T

    def lower(self) -> Program:
        """One inner product of the two final vectors."""
        return Program((Op("dot", ("vectors",), "score"),))


def _storage(device: torch.device) -> torch.dtype:
    """What autocast asks for on this device, else float32."""
    kind = device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32


class _Contrast(torch.autograd.Function):
    """``mean_a log r_a``, ``r_a = sum_b K_ab``, ``K_ab = exp((n_a . n_b - 1) / tau)``, ``n_a = z_a / |z_a|``.

    ``K`` is symmetric, so the gradient in ``n_a`` is ``sum_b K_ab (1 / r_a + 1 / r_b) n_b / (tau S)``: one pass over
    blocks of rows gives ``K``, ``r`` and the first term, a second one the other. The gradient is ready with the value.
    """

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, temperature: float, workspace: Buffers, dtype: torch.dtype) -> Tensor:
        size, device = len(vectors), vectors.device
        norms = vectors.norm(dim=1, keepdim=True).clamp_min(1e-12)
        unit = vectors / norms
        right = unit.to(dtype)
        left = (unit / temperature).to(dtype)
        kernel = workspace.take("kernel", (size, size), dtype, device)
        total = torch.empty(size, 1, device=device)
        slope = torch.empty_like(unit)
        for start in range(0, size, BLOCK):
            rows = slice(start, start + BLOCK)
            block = torch.mm(left[rows], right.T, out=kernel[rows])
            block.sub_(1 / temperature).exp_()
            total[rows] = block.sum(dim=1, keepdim=True, dtype=torch.float32)
            slope[rows] = torch.mm(block, right) / total[rows]
        slope += torch.mm(kernel, (unit / total).to(dtype))
        slope -= (slope * unit).sum(dim=1, keepdim=True) * unit
        ctx.save_for_backward(slope.div_(norms * (temperature * size)))
        return total.log().mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (slope,) = ctx.saved_tensors
        return slopes[0] * slope, None, None, None
