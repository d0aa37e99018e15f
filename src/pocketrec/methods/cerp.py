"""CERP: two pruned codebooks whose sums are the vectors."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pocketrec.compression.ladder import Method
from pocketrec.data.dataset import Dataset
from pocketrec.errors import BudgetError, ConfigError
from pocketrec.families.compositional.ladder import ComposedLadder
from pocketrec.families.compositional.region import Region, RegionScope, SlotOrder
from pocketrec.families.compositional.table import ComposedTable, Composition
from pocketrec.families.distillation import Imitated, Lesson
from pocketrec.families.pruning import largest, ordered
from pocketrec.families.retraining import HeadStart, ValueStart, retraining_model, search_training
from pocketrec.families.thresholds import Falls, check_search, first_threshold, rising_rate, shrink
from pocketrec.format.block import PackedRange, Storage
from pocketrec.format.layouts.pruned_sum import (
    OPERATIONS,
    Operation,
    PrunedSumBlock,
    codebook_rows,
    encode_pruned,
    part_width,
    pruned_sum_bytes,
)
from pocketrec.models.backbone import Model, noise
from pocketrec.models.first_values import xavier
from pocketrec.training.hooks import Rule
from pocketrec.training.loop import Training
from pocketrec.training.run import Run

Regulariser = Literal["batch", "rowwise"]
Spread = Literal["constant", "uniform", "normal", "power"]

POWER = 2.0
"""Exponent ``a`` of the density ``a v^(a - 1)`` on [0, 1] from which ``spread="power"`` draws."""


@dataclass(frozen=True)
class CERP(Method):
    """Every vector is the sum of two codebook rows, ``e_i = P[i mod b] + Q[i div ceil(n / b)]``, both pruned.

    Or, with ``operation="concat"``, two rows of half the width side by side.

    In the search, each entry of the codebooks has a soft threshold of its own, lifted as in PEP, and the loss has the
    term ``-gamma / 2^epoch sum |tanh(eta e)|^2`` over the vectors of the batch: a smooth count of their non-zeros,
    which favours codebooks that complement each other. The entries that stay longest survive, as many as asked for, and
    start again from their first values. Bucket and search belong to one budget.

    Args:
        operation: how two rows become a vector: ``add``, or ``concat`` (two halves side by side).
        bucket: rows ``b`` of each codebook, at least 1; by default from the budget.
        slack: values of both codebooks over the values kept, above 1, for the default bucket.
        regulariser: vectors that are counted: those of the ``batch``, or the row-by-row sums of the codebooks
            (``rowwise``), as some published runs did.
        gamma: its weight in the first epoch, at least 0.
        eta: steepness of the count, above 0.
        start: first ``s`` of the thresholds, below 0; by default they start at 1/20 of the mean first magnitude.
        spread: first ``s`` of each single threshold: ``start`` for all (``constant``), or ``start`` times a number of
            its own in [0, 1]: ``uniform``, ``normal`` (scaled to that range) or ``power`` (density ``2 v``).
        reach: threshold that the default rate aims at, in (0, 0.5]; only where ``threshold_rate`` is left open. The
            search ends below it: at about .08 for .3, since Adam remembers the larger decay of its beginning.
        threshold_rate: learning rate of ``s``, above 0; by default such that the threshold rises towards ``reach``.
        threshold_decay: weight decay of ``s``, above 0: nothing is pruned without.
        search_epochs: epochs of the search, at least 1; by default half of those of the first training stage.
        checks: how often the search notes what is below its threshold, at least 1.
        stop: ``exact`` keeps as many entries as asked for, ``published`` those of the first check with at most so many.
        clip: largest norm of the search's gradient; 0 does not clip.
        head: ``fresh`` trains a new head on the masks, ``initial`` the search's head from its start.
        restart: where the retraining starts: at the ``first`` values, as published, with the ``head`` that is asked
            for; or at the values and the head that the search ``found``.
        scope: ``block`` has a pair of codebooks for each counted block, ``joint`` one for all rows.
        order: which ids share rows: by their place in the ``file`` (free there), or by ``id`` (order of appearance).
        imitation: epochs in which the codebooks learn from the given, trained model before the search; 0 to start from
            random numbers, as published.
        imitation_rate: learning rate of these epochs, above 0; a fifth of it in the last quarter of them.
        imitated: what is learned then: the ``rows`` of the trained table, or the ``final`` vectors that a ranking model
            makes of them, 50 steps an epoch.
        training: stages of training; the search takes its settings from the first; none for the task's default.

    Example:
        >>> CERP().bucket_of(rows=1_086_810, width=16, values=3_477_792)
        135852

    Reference:
        Liang et al., "Learning compact compositional embeddings via regularized pruning for recommendation" (CERP),
        2023, equations 3-9. Departures: exact sizes; thresholds that start near the weights.
    """

    name: ClassVar[str] = "cerp"
    trains: ClassVar[bool] = True

    operation: Operation = "add"
    bucket: int | None = None
    slack: float = 1.25
    regulariser: Regulariser = "batch"
    gamma: float = 1e-4
    eta: float = 100.0
    start: float | None = None
    spread: Spread = "constant"
    reach: float = 0.3
    threshold_rate: float | None = None
    threshold_decay: float = 1e-5
    search_epochs: int | None = None
    checks: int = 200
    stop: Literal["exact", "published"] = "exact"
    clip: float = 100.0
    head: HeadStart = "fresh"
    restart: ValueStart = "first"
    scope: RegionScope = "block"
    order: SlotOrder = "file"
    imitation: int = 0
    imitation_rate: float = 0.01
    imitated: Imitated = "rows"
    training: tuple[Training, ...] = ()

    def __post_init__(self) -> None:
        self._lesson()
        for name, known in (("operation", OPERATIONS), ("spread", get_args(Spread))):
            if getattr(self, name) not in known:
                raise ConfigError(f"`{name}` must be one of {', '.join(known)}, but got {getattr(self, name)!r}.")
        if self.bucket is not None and self.bucket < 1:
            raise ConfigError(f"`bucket` must be at least 1, but got bucket={self.bucket}.")
        if not 1 < self.slack < math.inf:
            raise ConfigError(f"`slack` must be above 1, but got slack={self.slack}.")
        for name in ("gamma", "clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"`{name}` must be at least 0, but got {name}={getattr(self, name)}.")
        if not 0 < self.eta < math.inf:
            raise ConfigError(f"`eta` must be above 0, but got eta={self.eta}.")
        check_search(self.start, self.reach, self.threshold_rate, self.threshold_decay, self.search_epochs, self.checks)

    def prepare(self, model: Model, data: Dataset, run: Run) -> ComposedLadder:
        """Nothing is computed before the budget is known."""
        return ComposedLadder.of(
            self.name, model, data, run,
            scope=self.scope, order=self.order, training=self.training, plan=self.plan, least=lambda region: 0,
            train=lambda draft: self._train(draft, data, run), lesson=self._lesson(),
        )  # fmt: skip

    def _lesson(self) -> Lesson:
        return Lesson(self.imitation, self.imitation_rate, self.imitated)

    def plan(self, region: Region, values: int) -> CERPPlan:
        """The codebooks of a region, and how many of their entries are kept."""
        width = part_width(region.width, self.operation)
        bucket = self.bucket_of(region.rows, width, values)
        kept = min(values, sum(codebook_rows(region.rows, bucket)) * width)
        return CERPPlan(region.rows, region.width, bucket, kept, self.operation)

    def bucket_of(self, rows: int, width: int, values: int) -> int:
        """Rows of ``width`` of each codebook: both hold ``slack * values`` entries; no two ids share both rows."""
        if self.bucket is not None:
            return min(self.bucket, rows)
        bucket = max(math.ceil(self.slack * values / (2 * width)), math.isqrt(max(0, rows - 1)) + 1)
        while bucket < rows and sum(codebook_rows(rows, bucket)) * width < values:
            bucket += 1
        return min(bucket, rows)

    def _train(self, draft: Model, data: Dataset, run: Run) -> Model:
        """Search from the draft's codebooks, choose as many entries as it keeps, and train these from their start."""
        table = cast("ComposedTable", draft.table)
        drafts = [cast("PrunedCodebooks", part) for part in table.compositions]
        search = search_training(self.training, data.schema.task, self.search_epochs)
        steps = search.epochs * max(1, math.ceil(len(data.train) / search.batch_size))
        plain = draft.table.weight().detach()
        sources = [noise(run.seed, "thresholds", i) for i in range(len(drafts))]
        softened = [self._soft(part, steps, source) for part, source in zip(drafts, sources, strict=True)]
        soft = table.with_parts(softened, plain)
        net = run.fit("search", draft.with_table(soft), data, search)
        found = cast("ComposedTable", net.table)
        searched = [cast("SoftCodebooks", part) for part in found.compositions]
        chosen = [
            part.with_keep(soft.choose(part.most, self.stop), soft.books if self.restart == "found" else None)
            for part, soft in zip(drafts, searched, strict=True)
        ]
        if self.restart == "found":
            pruned = found.with_parts(chosen, found.weight().detach())
            return run.fit("retrain", net.with_table(pruned), data, self.training or None)
        start = retraining_model(draft, self.head, data, run)
        pruned = table.with_parts(chosen, plain if self.head == "initial" else start.table.weight().detach())
        return run.fit("retrain", start.with_table(pruned), data, self.training or None)

    def _soft(self, part: PrunedCodebooks, steps: int, source: torch.Generator) -> SoftCodebooks:
        """The codebooks of a draft, ready for the search."""
        first = first_threshold(part.books.detach()) if self.start is None else self.start
        rate = self.threshold_rate or rising_rate(first, self.reach, steps)
        count = _Count(self.regulariser, self.gamma, self.eta)
        thresholds = first * spread_of(part.books.shape, self.spread, source)
        soft = SoftCodebooks(part, thresholds, Rule(rate, self.threshold_decay), count, max(1, steps // self.checks))
        soft.clip = self.clip
        return soft


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
class CERPPlan:
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
        return PrunedSumBlock(
            place.name, place.start, place.stop, place.left, place.right, "pruned_sum", storage, settings, arrays
        )


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
        return f"pruned, rows={self.rows}, bucket={self.bucket}{_unusual(self.operation)}"

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


def _unusual(operation: Operation) -> str:
    """What a representation says of an operation: nothing of a sum."""
    return "" if operation == "add" else f", {operation}"


@dataclass(frozen=True)
class _Count:
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

    def __init__(self, start: PrunedCodebooks, thresholds: Tensor, rule: Rule, count: _Count, every: int) -> None:
        super().__init__(start.rows, start.bucket, start.books.detach().clone(), start.operation)
        self.threshold = nn.Parameter(thresholds)
        self.rule = rule
        self.count = count
        self.penalised = count.gamma > 0
        self.falls = Falls((len(start.books), start.books.shape[1]), every)

    def extra_repr(self) -> str:
        """Settings of the search."""
        return (
            f"soft, rows={self.rows}, bucket={self.bucket}, {self.count}, {self.rule}, every={self.falls.every}, "
            f"clip={self.clip}{_unusual(self.operation)}"
        )

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

    def choose(self, kept: int, stop: str) -> Tensor:
        """Mask of the ``kept`` entries that stayed longest, or of those of the first check with at most so many.

        Raises:
            BudgetError: with ``stop="published"``, the search ended with more.
        """
        if stop == "published":
            alive = self.falls.alive(torch.ones_like(self.books, dtype=torch.bool))
            reached = np.flatnonzero(alive <= kept)
            if not len(reached):
                raise BudgetError(
                    f"The search ended with {alive[-1]:,} values above their threshold, more than the {kept:,} asked "
                    "for; search longer, raise `threshold_rate`, or use stop='exact'.",
                    least_values=int(alive[-1]),
                )
            kept = int(alive[reached[0]])
        keys = self.falls.keys(self.margins())
        return torch.from_numpy(largest(ordered(keys.reshape(-1)), kept).reshape(keys.shape))

    def pruned(self) -> PrunedCodebooks:
        """What is above its threshold, as it reads now."""
        keep = self.margins() > 0
        return PrunedCodebooks(self.rows, self.bucket, self.read(slice(None)).detach(), keep, self.operation)

    def values(self) -> int:
        """Entries above their threshold."""
        return int((self.margins() > 0).sum())
