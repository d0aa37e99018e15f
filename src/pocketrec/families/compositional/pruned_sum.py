"""Two codebooks whose rows add up to vectors, pruned and in search of what to prune."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pocketrec import settings
from pocketrec.families.compositional.table import Composition
from pocketrec.families.pruning import largest, ordered
from pocketrec.families.thresholds import Falls, shrink
from pocketrec.format.block import PackedRange, Storage
from pocketrec.format.layouts.pruned_sum import (
    Operation,
    PrunedSumBlock,
    codebook_rows,
    encode_pruned,
    part_width,
    pruned_sum_bytes,
)
from pocketrec.models.first_values import xavier
from pocketrec.training.hooks import Rule

Regulariser = Literal["batch", "rowwise"]
Spread = Literal["constant", "uniform", "normal", "power"]

POWER = 2.0
"""Exponent ``a`` of the density ``a v^(a - 1)`` on [0, 1] from which ``spread="power"`` draws."""


def spread_of(shape: tuple[int, ...], spread: Spread, source: torch.Generator) -> Tensor:
    """Numbers in [0, 1] that the first threshold is multiplied with."""
    if spread == "constant":
        return torch.ones(shape)
    if spread == "normal":
        drawn = torch.empty(shape).normal_(generator=source)
        low, high = drawn.min(), drawn.max()
        return (drawn - low) / (high - low).clamp_min(1e-12)
    drawn = torch.empty(shape).uniform_(generator=source)
    return drawn if spread == "uniform" else drawn ** (1 / POWER)


@dataclass(frozen=True)
class PrunedSumPlan:
    """Two codebooks for ``rows`` slots of ``width`` columns, with ``kept`` entries together."""

    rows: int
    width: int
    bucket: int
    kept: int
    operation: Operation = "add"

    @property
    def values(self) -> int:
        """Entries kept."""
        return self.kept

    def size_bytes(self, storage: Storage) -> int:
        """Bytes of both codebooks in a file."""
        width = part_width(self.width, self.operation)
        return pruned_sum_bytes(self.rows, self.bucket, width, self.kept, storage)

    def build(self, source: torch.Generator) -> PrunedCodebooks:
        """Codebooks freshly drawn, Xavier-uniform each; until the search has chosen, the largest entries are kept."""
        width = part_width(self.width, self.operation)
        books = torch.empty(sum(codebook_rows(self.rows, self.bucket)), width)
        xavier(books[: self.bucket], source)
        xavier(books[self.bucket :], source)
        keep = largest(ordered(books.abs().numpy().reshape(-1)), self.kept).reshape(books.shape)
        return PrunedCodebooks(self.rows, self.bucket, books, torch.from_numpy(keep), self.operation)


class Codebooks(Composition):
    """Sums of two rows of one matrix ``books``: the first codebook, and the second behind it.

    With ``operation="concat"`` the rows are halves, side by side.
    """

    def __init__(self, rows: int, bucket: int, books: Tensor, operation: Operation = "add") -> None:
        super().__init__()
        self.rows = rows
        self.width = books.shape[1] * (2 if operation == "concat" else 1)
        self.bucket = bucket
        self.operation: Operation = operation
        self.share = -(-rows // bucket)
        self.books = nn.Parameter(books)

    @abstractmethod
    def read(self, rows: Tensor | slice) -> Tensor:
        """Rows of the codebooks as they count in a sum, ``(..., width)``."""

    @abstractmethod
    def pruned(self) -> PrunedCodebooks:
        """The codebooks with what is kept now."""

    def forward(self, slots: Tensor) -> Tensor:
        """Slots ``(m,)`` -> ``(m, width)``."""
        return self._join(self.read(slots % self.bucket), self.read(self.bucket + slots // self.share))

    def weight(self) -> Tensor:
        """Every vector, ``(rows, width)``, without a look-up."""
        return self._join(*self._pairs(self.read(slice(None))))

    def _join(self, first: Tensor, second: Tensor) -> Tensor:
        """The vectors of rows of the first codebook and of the second."""
        return torch.cat([first, second], dim=-1) if self.operation == "concat" else first + second

    def facts(self) -> Mapping[str, float]:
        """``overlap``: how far the supports ``A_i`` of ``P[i mod b]`` and ``B_i`` of ``Q[i div c]`` coincide.

        ``overlap = sum_i |A_i & B_i| / sum_i |A_i | B_i|`` over all slots ``i``, in [0, 1]: of the coordinates that
        either codebook fills, the share that both fill. There is none where nothing is kept, or for halves side by
        side, which have no coordinate in common.
        """
        if self.operation == "concat":
            return {}
        left, right = self._pairs(self.pruned().keep)
        either = int((left | right).sum())
        return {"overlap": int((left & right).sum()) / either} if either else {}

    def _pairs(self, books: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of both codebooks that each slot reads, ``(rows, width)`` each."""
        first, second = books[: self.bucket], books[self.bucket :]
        left = first.expand(self.share, *first.shape).flatten(0, 1)[: self.rows]
        right = second[:, None].expand(len(second), self.share, books.shape[1]).flatten(0, 1)[: self.rows]
        return left, right

    def pack(self, place: PackedRange, storage: Storage, slots: NDArray[np.uint32] | None) -> PrunedSumBlock:
        """Layout ``pruned_sum``."""
        pruned = self.pruned()
        books, keep = pruned.books.detach().cpu().numpy(), pruned.keep.cpu().numpy()
        arrays = encode_pruned(books, keep, self.bucket, storage) | ({} if slots is None else {"slots": slots})
        settings: dict[str, Any] = {"slots": self.rows, "bucket": self.bucket, "kept": int(keep.sum())}
        if self.operation != "add":
            settings["operation"] = self.operation
        return PrunedSumBlock(*place, "pruned_sum", storage, settings, arrays=arrays)


class PrunedCodebooks(Codebooks):
    """Codebooks of which only the entries in ``keep`` are read, and learned.

    Attributes:
        most: entries that a search leaves.
    """

    keep: Tensor

    def __init__(self, rows: int, bucket: int, books: Tensor, keep: Tensor, operation: Operation = "add") -> None:
        super().__init__(rows, bucket, books, operation)
        self.register_buffer("keep", keep)
        self.most = int(keep.sum())

    def extra_repr(self) -> str:
        """What the shapes do not say."""
        return f"pruned, rows={self.rows}, bucket={self.bucket}, {self.operation}"

    def read(self, rows: Tensor | slice) -> Tensor:
        """Kept entries; the others are zero."""
        return torch.where(self.keep[rows], self.books[rows], 0)

    def whole(self) -> PrunedCodebooks:
        """All entries, of which as many as here are to be left."""
        every = torch.ones_like(self.keep)
        full = PrunedCodebooks(self.rows, self.bucket, self.books.detach(), every, self.operation)
        full.most = self.most
        return full

    def pruned(self) -> PrunedCodebooks:
        """Itself."""
        return self

    def values(self) -> int:
        """Entries kept."""
        return int(self.keep.sum())

    def with_keep(self, keep: Tensor, books: Tensor | None = None) -> PrunedCodebooks:
        """The same first values, or other ones, under another mask."""
        values = (self.books if books is None else books).detach()
        return PrunedCodebooks(self.rows, self.bucket, torch.where(keep, values, 0), keep, self.operation)


@dataclass(frozen=True)
class NonZeros:
    """The term of the loss that counts non-zeros."""

    kind: Regulariser
    gamma: float
    eta: float

    def __call__(self, vectors: Tensor, epoch: int) -> Tensor:
        """``-gamma / 2^epoch sum |tanh(eta e)|^2``."""
        return -self.gamma * 0.5**epoch * torch.tanh(self.eta * vectors).square().sum()


class SoftCodebooks(Codebooks):
    """Codebooks with a soft threshold for every entry.

    Args:
        start: where they start from.
        thresholds: first ``s`` of every entry.
        rule: how ``s`` is updated.
        count: the term of the loss.
        every: steps between two checks.
    """

    lasting = True

    def __init__(self, start: PrunedCodebooks, thresholds: Tensor, rule: Rule, count: NonZeros, every: int) -> None:
        super().__init__(start.rows, start.bucket, start.books.detach().clone(), start.operation)
        self.threshold = nn.Parameter(thresholds)
        self.rule, self.count = rule, count
        self.penalised = count.gamma > 0
        self.falls = Falls((len(start.books), start.books.shape[1]), every)

    def extra_repr(self) -> str:
        """Settings of the search."""
        search = f"{settings.text(self.count)}, {settings.text(self.rule)}, every={self.falls.every}, clip={self.clip}"
        return f"soft, rows={self.rows}, bucket={self.bucket}, {search}, {self.operation}"

    def read(self, rows: Tensor | slice) -> Tensor:
        """Shrunk entries."""
        return shrink(self.books[rows], self.threshold[rows])

    def rules(self) -> Mapping[str, Rule]:
        """Thresholds have their own rate and decay."""
        return {"threshold": self.rule}

    def penalty(self, slots: Tensor, epoch: int) -> Tensor:
        """The count over the vectors of ``slots``, or over the codebooks put together row by row."""
        if self.count.kind == "batch":
            return self.count(self(slots), epoch)
        books = self.read(slice(None))
        second = nn.functional.pad(books[self.bucket :], (0, 0, 0, 2 * self.bucket - len(books)))
        return self.count(self._join(books[: self.bucket], second), epoch)

    def after_step(self) -> None:
        """Note now and then what is below its threshold."""
        self.falls.observe(self.margins)

    def margins(self) -> Tensor:
        """``|p| - sigmoid(s)`` now."""
        return self.books.detach().abs() - self.threshold.detach().sigmoid()

    def alive(self) -> NDArray[np.int64]:
        """Entries above their threshold after 0, 1, ... checks."""
        return self.falls.alive(torch.ones_like(self.books, dtype=torch.bool))

    def choose(self, kept: int) -> Tensor:
        """Mask of the ``kept`` entries that stayed longest."""
        keys = self.falls.keys(self.margins())
        return torch.from_numpy(largest(ordered(keys.reshape(-1)), kept).reshape(keys.shape))

    def pruned(self) -> PrunedCodebooks:
        """What is above its threshold, as it reads now."""
        keep = self.margins() > 0
        return PrunedCodebooks(self.rows, self.bucket, self.read(slice(None)).detach(), keep, self.operation)

    def values(self) -> int:
        """Entries above their threshold."""
        return int((self.margins() > 0).sum())
