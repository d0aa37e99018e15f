"""The normalised bipartite graph of users and items, and propagation over it with its own symmetric backward.

``Ahat = D^-1/2 [[0, R], [R^T, 0]] D^-1/2`` is symmetric, and so is the propagation ``P = 1/(L+1) sum_{l<=L} Ahat^l``.
The gradient of ``z = P e`` is therefore ``P dz``: the same products with the same matrix, where autograd would build a
transpose in every step. Both directions run in Horner form on rows scaled once, ``x_0 = D^-1/2 e / (L+1)``::

    x_{k+1} = x_0 + D^-1 A x_k          (L - 1 times, all rows)
    z       = e / (L+1) + D^-1/2 A x_{L-1}    (only the rows that are asked for)

so that edges carry no values, and one factor per row stands for all of them.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from pocketrec.errors import DataError
from pocketrec.native import library, sparse


class Buffers:
    """Buffers that live from step to step: fresh pages cost more than the arithmetic done on them.

    A buffer is valid until the next ``take`` of the same name; nothing that outlives a step may live in one.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Buffers:
        """An empty one: no buffer outlives a step."""
        return Buffers()

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """An uninitialised tensor."""
        size = math.prod(shape)
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < size or buffer.dtype != dtype or buffer.device != torch.device(device):
            with torch.inference_mode(mode=False):
                buffer = self._buffers[name] = torch.empty(size, dtype=dtype, device=device)
        return buffer[:size].view(shape)


@dataclass(frozen=True, eq=False)
class Graph:
    """A symmetric adjacency without self-loops, and its normalisation.

    Attributes:
        indptr: ``(n + 1,)``.
        indices: ``(2 E,)``, ascending within a row.
        scale: ``1 / sqrt(degree)``, ``(n,)``; 0 for a node without edges.

    Example:
        >>> graph = Graph.of(np.array([0, 0, 1]), np.array([2, 3, 3]), rows=4)
        >>> graph.propagate(torch.ones(4, 1), layers=1).flatten()
        tensor([1.1036, 0.8536, 0.8536, 1.1036])

    Reference:
        LightGCN: Simplifying and Powering Graph Convolution Network for Recommendation, 2020, equations 7, 8 and 12.
    """

    indptr: NDArray[np.int64]
    indices: NDArray[np.int32]
    scale: NDArray[np.float32]
    workspace: Buffers = field(default_factory=Buffers, repr=False)

    @classmethod
    def of(cls, users: NDArray[np.integer[Any]], items: NDArray[np.integer[Any]], rows: int) -> Graph:
        """The graph of pairs of global ids, ``(E,)`` each; a pair that comes twice is one edge.

        Raises:
            DataError: an id is outside ``[0, rows)``.
        """
        ends = np.concatenate([users, items]).astype(np.int64)
        if len(ends) and not 0 <= ends.min() <= ends.max() < rows:
            raise DataError(f"Ids must be in [0, {rows}), but others came; encode the interactions again.")
        edges = np.unique(ends * rows + np.concatenate([items, users]))
        degree = np.bincount(edges // rows, minlength=rows)
        scale = np.divide(1.0, np.sqrt(degree), out=np.zeros(rows), where=degree > 0)
        indptr = np.concatenate([[0], np.cumsum(degree)])
        return cls(indptr.astype(np.int64), (edges % rows).astype(np.int32), scale.astype(np.float32))

    def __deepcopy__(self, memo: dict[int, Any]) -> Graph:
        """The same arrays, which nobody changes, with a workspace of its own."""
        return Graph(self.indptr, self.indices, self.scale)

    @property
    def rows(self) -> int:
        """Number of nodes ``n``."""
        return len(self.scale)

    def propagate(self, ego: Tensor, layers: int, *, storage: torch.dtype = torch.float32) -> Tensor:
        """``(n, d) -> (n, d)``: mean of the ego rows and of ``layers`` propagated ones; differentiable."""
        return ego if layers == 0 else _Propagate.apply(ego, self, layers, storage)  # pyright: ignore

    def propagate_rows(
        self, ego: Tensor, layers: int, rows: Tensor, *, storage: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Final and ego vectors, ``(R, d)`` each, of distinct ``rows (R,)``; differentiable in ``ego``.

        The last layer is computed for these rows alone. ``storage`` is the type that layers have between products;
        sums are float32.
        """
        return _PropagateRows.apply(ego, self, layers, rows, storage)  # pyright: ignore

    def smooth(self, first: Tensor, layers: int, rows: Tensor | None = None) -> Tensor:
        """``D^-1/2 A x_{L-1}`` from ``first = x_0 (n, d)``: a new float32 tensor ``(n, d)``, or ``(R, d)``."""
        x = first
        for layer in range(layers - 1):
            out = self.workspace.take(f"layer{layer % 2}", tuple(x.shape), x.dtype, x.device)
            x = self._multiply(x, self._square, out, add=first)
        count = self.rows if rows is None else len(rows)
        out = torch.empty(count, x.shape[1], device=x.device)
        return self._multiply(x, self.scale, out, rows=rows)

    def first(self, ego: Tensor, layers: int, storage: torch.dtype) -> Tensor:
        """``x_0 = D^-1/2 e / (L + 1)``, ``(n, d)`` in the storage type; valid until the next call."""
        shape = tuple(ego.shape)
        factor = torch.from_numpy(self.scale / np.float32(layers + 1)).to(ego.device)
        exact = self.workspace.take("exact", shape, torch.float32, ego.device)
        torch.mul(ego, factor[:, None], out=exact)
        if storage == torch.float32:
            return exact
        return self.workspace.take("first", shape, storage, ego.device).copy_(exact)

    @cached_property
    def _square(self) -> NDArray[np.float32]:
        """Diagonal of ``D^-1``."""
        return np.square(self.scale)

    def _multiply(
        self,
        x: Tensor,
        left: NDArray[np.float32],
        out: Tensor,
        *,
        rows: Tensor | None = None,
        add: Tensor | None = None,
    ) -> Tensor:
        """``out = left * (A x)[rows] + add``."""
        if library.available() and x.device.type == "cpu":
            picked = None if rows is None else rows.numpy()
            added = None if add is None else _array(add)
            sparse.spmm(
                self.indptr, self.indices, _array(x), left=left, rows=picked, add=added, out=_array(out),
                threads=torch.get_num_threads(),
            )  # fmt: skip
            return out
        product = self._matrix(x.device) @ x.float() * torch.from_numpy(left).to(x.device)[:, None]
        product = product if rows is None else product[rows]
        return out.copy_(product if add is None else product + add)

    def _matrix(self, device: torch.device) -> Tensor:
        """``A`` as a sparse tensor of torch, made once per device."""
        if device not in self._matrices:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
                self._matrices[device] = torch.sparse_csr_tensor(
                    torch.from_numpy(self.indptr.astype(np.int32)), torch.from_numpy(self.indices),
                    torch.ones(len(self.indices)), (self.rows, self.rows), device=device, check_invariants=False,
                )  # fmt: skip
        return self._matrices[device]

    @cached_property
    def _matrices(self) -> dict[torch.device, Tensor]:
        return {}


def _array(tensor: Tensor) -> NDArray[Any]:
    """The tensor's memory as an array; bfloat16 as its bits."""
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


class _Propagate(torch.autograd.Function):
    """``z = P e`` for all rows; its gradient is ``P dz``."""

    @staticmethod
    def forward(ctx: Any, ego: Tensor, graph: Graph, layers: int, storage: torch.dtype) -> Tensor:
        ctx.graph, ctx.layers, ctx.storage = graph, layers, storage
        return graph.smooth(graph.first(ego, layers, storage), layers).add_(ego, alpha=1 / (layers + 1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        graph, layers, slope = ctx.graph, ctx.layers, slopes[0]
        gradient = graph.smooth(graph.first(slope, layers, ctx.storage), layers)
        return gradient.add_(slope, alpha=1 / (layers + 1)), None, None, None


class _PropagateRows(torch.autograd.Function):
    """``z = (P e)[rows]`` and ``e[rows]``; gradient ``P S dz + S de``, where ``S`` puts rows back into zeros."""

    @staticmethod
    def forward(
        ctx: Any, ego: Tensor, graph: Graph, layers: int, rows: Tensor, storage: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        ctx.graph, ctx.layers, ctx.storage, ctx.rows = graph, layers, storage, rows
        picked = ego[rows]
        if layers == 0:
            return picked.clone(), picked
        final = graph.smooth(graph.first(ego, layers, storage), layers, rows)
        return final.add_(picked, alpha=1 / (layers + 1)), picked

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        graph, layers, rows = ctx.graph, ctx.layers, ctx.rows
        final, ego = slopes
        share = final / (layers + 1)
        if layers == 0:
            gradient = torch.zeros(graph.rows, final.shape[1], device=final.device)
        else:
            first = graph.workspace.take("rows", (graph.rows, final.shape[1]), ctx.storage, final.device).zero_()
            factor = torch.from_numpy(graph.scale).to(final.device)[rows]
            first[rows] = (share * factor[:, None]).to(ctx.storage)
            gradient = graph.smooth(first, layers)
        return gradient.index_add_(0, rows, share.add_(ego)), None, None, None, None
