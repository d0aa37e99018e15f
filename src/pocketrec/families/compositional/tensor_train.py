"""Tensor trains with a cache of frequent rows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from pocketrec import settings
from pocketrec.families.compositional.table import Composition
from pocketrec.format.block import PackedRange, Storage
from pocketrec.format.computed import encode_factor
from pocketrec.format.layouts.tensor_train import TensorTrainBlock, core_shapes, train_bytes

CoreInit = Literal["corrected", "approx_normal"]

CHUNK = 2048
"""Vectors that are multiplied out together: their slices stay in cache."""


def train_values(rows: tuple[int, ...], widths: tuple[int, ...], ranks: tuple[int, ...]) -> int:
    """Scalars of the cores.

    Example:
        >>> train_values((125, 125, 128), (2, 2, 4), (192, 192))
        9362304
    """
    return sum(n * width for n, width in core_shapes(rows, widths, ranks))


def rank_bounds(rows: tuple[int, ...], widths: tuple[int, ...]) -> tuple[int, ...]:
    """The ranks at which a train says every matrix exactly."""
    cells = [n * d for n, d in zip(rows, widths, strict=True)]
    return tuple(min(math.prod(cells[:k]), math.prod(cells[k:])) for k in range(1, len(cells)))


@dataclass(frozen=True)
class TrainPlan:
    """Cores and cache for ``slots`` slots."""

    slots: int
    rows: tuple[int, ...]
    widths: tuple[int, ...]
    ranks: tuple[int, ...]
    init: CoreInit = "corrected"
    cached: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64), repr=False, compare=False)
    tallied: bool = field(default=False, repr=False)

    @property
    def width(self) -> int:
        """Columns."""
        return math.prod(self.widths)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Shape of each core."""
        return core_shapes(self.rows, self.widths, self.ranks)

    @property
    def values(self) -> int:
        """Scalars of cores and cache."""
        return train_values(self.rows, self.widths, self.ranks) + len(self.cached) * self.width

    def size_bytes(self, storage: Storage) -> int:
        """Bytes of cores and cache in a file."""
        return train_bytes(self.shapes, len(self.cached), self.width, storage)

    def build(self, source: torch.Generator) -> TensorTrain:
        """The cores, freshly drawn, and the cache as they say."""
        return TensorTrain(self, [_core(shape, self, source) for shape in self.shapes])


def _core(shape: tuple[int, int], plan: TrainPlan, source: torch.Generator) -> Tensor:
    """A core, freshly drawn; ``corrected`` or ``approx_normal``."""
    variance = 1 / (3 * plan.slots)
    if plan.init == "corrected":
        std = (variance / math.prod(plan.ranks)) ** (1 / (2 * len(plan.rows)))
        return torch.empty(shape).normal_(0, std, generator=source)
    uniform = torch.empty(shape, dtype=torch.float64).uniform_(-1, 1, generator=source)
    least = math.erf(2 / math.sqrt(2))
    tail = torch.erfinv(least + (1 - least) * uniform.abs()).clamp(max=5.0) * math.sqrt(2)
    return (tail * uniform.sign() * variance ** (1 / 6)).float()


class TensorTrain(Composition):
    """A tensor train and a cache; where the plan is ``tallied``, it counts the look-ups of its warm-up.

    The first half of the cores is multiplied out once for all ids of a look-up, and kept between look-ups that need no
    gradient; so each distinct id costs one small matrix product.
    """

    place: Tensor
    cached_slots: Tensor
    accesses: Tensor | None

    def __init__(self, plan: TrainPlan, cores: list[Tensor]) -> None:
        super().__init__()
        self.rows, self.width, self.plan = plan.slots, plan.width, plan
        self.split = -(-len(plan.rows) // 2)
        self.right_rows = math.prod(plan.rows[self.split :])
        self.cores = nn.ParameterList(nn.Parameter(core) for core in cores)
        self.warm = False
        self.cached = len(plan.cached)
        self.register_buffer("place", torch.full((plan.slots,), -1), persistent=False)
        self.register_buffer("cached_slots", torch.from_numpy(plan.cached), persistent=False)
        tallied = torch.zeros(plan.slots, dtype=torch.int64) if plan.tallied and self.cached else None
        self.register_buffer("accesses", tallied)
        self._halves: tuple[tuple[Any, ...], Tensor, Tensor] | None = None
        if self.cached:
            self.cache = nn.Parameter(torch.zeros(self.cached, self.width))
            self.fill(warm=False)

    def __getstate__(self) -> dict[str, Any]:
        """What a copy gets: its cores are others, so it computes their products anew."""
        return {**vars(self), "_halves": None}

    def extra_repr(self) -> str:
        """All settings, and whether the cache is in use."""
        return f"{settings.text(self.plan)}, cached={self.cached}, warm={self.warm}"

    @torch.no_grad()
    def fill(self, *, warm: bool) -> None:
        """Take the cache out of use (``warm``), or fill it with what the cores say and use it."""
        self.warm = warm
        if self.cached:
            self.cached_slots = self._frequent()
            self.place = torch.full_like(self.place, -1)
            self.place[self.cached_slots] = torch.arange(self.cached, device=self.place.device)
            self.cache.requires_grad_(not warm)
            self.cache.copy_(self._computed(self.cached_slots))

    def _frequent(self) -> Tensor:
        """Slots of the cache, rising: those of the plan, or those most often looked up so far."""
        if self.accesses is None:
            return self.cached_slots
        planned = np.zeros(self.rows, dtype=bool)
        planned[self.plan.cached] = True
        order = np.lexsort((~planned, -self.accesses.cpu().numpy()))
        return torch.from_numpy(np.sort(order[: self.cached])).to(self.cached_slots.device)

    def forward(self, slots: Tensor) -> Tensor:
        """Slots ``(m,)`` -> ``(m, width)``; each distinct slot is computed once."""
        distinct, back = torch.unique(slots, return_inverse=True)
        if self.accesses is not None and self.warm and torch.is_grad_enabled():
            self.accesses += torch.bincount(slots, minlength=self.rows)
        if self.warm or not self.cached:
            return F.embedding(back, self._computed(distinct))
        place = self.place[distinct]
        cold, hot = torch.nonzero(place < 0).squeeze(1), torch.nonzero(place >= 0).squeeze(1)
        vectors = self._computed(distinct[cold])
        both = vectors.new_empty(len(distinct), self.width)
        both = both.index_copy(0, cold, vectors).index_copy(0, hot, self.cache[place[hot]])
        return F.embedding(back, both)

    def weight(self) -> Tensor:
        """Every vector, ``(rows, width)``: one large matrix product."""
        left, right = self._both_halves()
        product = torch.matmul(left.flatten(0, 1), right.flatten(0, 1).T)
        shape = (*left.shape[:2], *right.shape[:2])
        weight = product.view(shape).transpose(1, 2).reshape(-1, self.width)[: self.rows].float()
        if self.warm or not self.cached:
            return weight
        return weight.index_copy(0, self.cached_slots, self.cache)

    def after_step(self) -> None:
        """The weights have changed, and a fused optimiser leaves their versions as they were."""
        self._halves = None

    def values(self) -> int:
        """Scalars of cores and cache."""
        return self.plan.values

    def pack(self, place: PackedRange, storage: Storage, slots: NDArray[np.uint32] | None) -> TensorTrainBlock:
        """Layout ``tensor_train``."""
        arrays: dict[str, NDArray[Any]] = {} if slots is None else {"slots": slots}
        for k, core in enumerate(self.cores):
            arrays |= encode_factor(f"core{k}", core.detach().cpu().numpy(), storage)
        if self.cached:
            arrays["cached_slots"] = self.cached_slots.cpu().numpy().astype(np.uint32)
            arrays |= encode_factor("cache", self.cache.detach().cpu().numpy(), storage)
        plan = self.plan
        settings = {
            "slots": plan.slots, "rows": list(plan.rows), "widths": list(plan.widths), "ranks": list(plan.ranks),
            "cached": self.cached,
        }  # fmt: skip
        return TensorTrainBlock(*place, "tensor_train", storage, settings, arrays=arrays)

    def _computed(self, distinct: Tensor) -> Tensor:
        """Vectors of slots from the cores."""
        left, right = self._both_halves()
        vectors = [_joined(left, right, part) for part in distinct.split(CHUNK)]
        return vectors[0] if len(vectors) == 1 else torch.cat(vectors)

    def _both_halves(self) -> tuple[Tensor, Tensor]:
        """Products of each half of the cores, ``(n', d', r)`` and ``(n'', d'', r)``."""
        versions = tuple((core._version, core.device) for core in self.cores)
        if torch.is_grad_enabled():
            self._halves = None
            return self._half(0, self.split), self._right()
        if self._halves is None or self._halves[0] != versions:
            self._halves = (versions, self._half(0, self.split), self._right())
        return self._halves[1:]

    def _right(self) -> Tensor:
        half = self._half(self.split, len(self.cores))
        return half.reshape(self.right_rows, self.plan.ranks[self.split - 1], -1).transpose(1, 2).contiguous()

    def _half(self, start: int, stop: int) -> Tensor:
        """All products of neighbouring cores, ``(n, r_left * d, r_right)``."""
        ranks = (1, *self.plan.ranks, 1)
        result = self.cores[start].view(self.plan.rows[start], -1, ranks[start + 1])
        for k in range(start + 1, stop):
            rows = self.plan.rows[k]
            piece = self.cores[k].view(rows, ranks[k], -1).transpose(0, 1).flatten(1)
            product = torch.matmul(result.flatten(0, 1), piece).view(*result.shape[:2], rows, -1)
            result = product.transpose(1, 2).reshape(len(result) * rows, -1, ranks[k + 1])
        return result


def _joined(left: Tensor, right: Tensor, slots: Tensor) -> Tensor:
    """Vectors ``(m, d' d'')`` of slots ``(m,)`` from the products of both halves of the cores."""
    row = torch.div(slots, len(right), rounding_mode="floor")
    first = F.embedding(row, left.flatten(1)).view(-1, *left.shape[1:])
    second = F.embedding(slots - row * len(right), right.flatten(1)).view(-1, *right.shape[1:])
    return torch.bmm(first, second.transpose(1, 2)).flatten(1).float()
