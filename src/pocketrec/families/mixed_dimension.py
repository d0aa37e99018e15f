"""Prefix lengths by evolution: a supernet that knows vectors of every length, and the search among its parts.

A *unit* is what shares one length: the rows of a field, or one row, in the columns of one counted block. A unit of
length ``l`` keeps the first ``l`` of its columns; a row may be left out altogether.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pocketrec import settings
from pocketrec.compression.budget import largest_fitting
from pocketrec.data.dataset import Split
from pocketrec.errors import BudgetError
from pocketrec.evaluation.metrics import auc
from pocketrec.families.sharing import RowSharing
from pocketrec.models.backbone import ClickModel, Model
from pocketrec.models.table import Block, DenseTable, Lookup
from pocketrec.schema import Schema
from pocketrec.training.evaluate import EVALUATION_ROWS, validate
from pocketrec.training.hooks import LearningTable, Rule
from pocketrec.training.steps import Checkpoint

Genes = NDArray[np.int64]

LengthOdds = Mapping[int, NDArray[np.float64]]


LengthSampling = Literal["alpha", "uniform"]


class Judge(Protocol):
    """Tells how good candidates are."""

    def __call__(self, candidates: Sequence[Genes], /) -> list[float]:
        """A figure of each; the larger, the better."""
        ...


class Searcher(Protocol):
    """Looks for the best lengths under a budget, goes on from its checkpoint, and may train inside its judge."""

    def search(
        self,
        longest: Genes,
        sizes: Genes,
        most: int,
        judge: Judge,
        seed: int,
        checkpoint: Checkpoint,
        given: Sequence[Genes] = (),
    ) -> dict[str, NDArray[Any]]:
        """The best lengths ``genes (U,)`` with ``genes @ sizes <= most``, and the best ``figures`` by round.

        Args:
            longest: most columns of each unit.
            sizes: what a column of each unit costs.
            most: the budget, at least ``sizes.sum()``.
            judge: figures of candidates.
            seed: of the run.
            checkpoint: keeps every round.
            given: candidates of the first round beside those drawn.
        """
        ...


def mean_length(alpha: float, longest: int) -> float:
    """Mean of lengths ``i`` in 1..h drawn with ``p_i = alpha^(h-i) / sum_j alpha^(h-j)``; falls as alpha grows."""
    weights = length_odds(alpha, longest)
    return float(weights @ np.arange(1, longest + 1))


def length_odds(alpha: float, longest: int) -> NDArray[np.float64]:
    """``p_i`` of the lengths 1..h.

    Example:
        >>> length_odds(2.0, 3).round(3).tolist()
        [0.571, 0.286, 0.143]
    """
    powers = math.log(alpha) * np.arange(longest - 1, -1, -1)
    odds = np.exp(powers - powers.max())
    return odds / odds.sum()


def alpha_for(mean: float, longest: int) -> float:
    """``alpha`` with which lengths 1..h have this mean, by bisection.

    Raises:
        BudgetError: the mean is not inside (1, h).

    Example:
        >>> round(alpha_for(0.2 * 16, 16), 5)
        1.44561
    """
    if not 1 < mean < longest:
        raise BudgetError(f"Lengths of 1 to {longest} cannot have the mean {mean:g}; choose a budget in between.")
    low, high = -700.0 / longest, 700.0
    while mean_length(math.exp(high), longest) > mean:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if mean_length(math.exp(middle), longest) > mean:
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)


@dataclass(frozen=True)
class Units:
    """Which entries share a length.

    Attributes:
        groups: column ranges ``(left, right)`` of counted blocks.
        unit: unit of every row in every group, ``(n, G)``; -1 where no counted block is.
        longest: columns of each unit, ``(U,)``.
    """

    groups: tuple[tuple[int, int], ...]
    unit: NDArray[np.int64]
    longest: Genes

    @classmethod
    def of(cls, schema: Schema, blocks: Sequence[Block], by: RowSharing) -> Units:
        """Units of a table: each field or each row, in each counted block."""
        counted = [b for b in blocks if b.counted]
        groups = tuple(sorted({(b.left, b.right) for b in counted}))
        unit = np.full((schema.rows, len(groups)), -1, np.int64)
        for block in counted:
            group = groups.index((block.left, block.right))
            rows = np.arange(block.start, block.stop)
            unit[rows, group] = rows if by == "row" else schema.field_of_row[rows]
        for group in range(1, len(groups)):
            unit[:, group] += np.where(unit[:, group] >= 0, unit[:, group - 1].max() + 1, 0)
        found, places = np.unique(unit[unit >= 0], return_inverse=True)
        longest = np.zeros(len(found), np.int64)
        unit[unit >= 0] = places
        for group, (left, right) in enumerate(groups):
            longest[unit[unit[:, group] >= 0, group]] = right - left
        return cls(groups, unit, longest)

    def sizes(self, on: NDArray[np.bool_]) -> Genes:
        """Rows of each unit that are ``on (n, G)``: what one more column costs, ``(U,)``."""
        return np.bincount(self.unit[on & (self.unit >= 0)], minlength=len(self.longest))

    def lengths(self, genes: Genes, on: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Length of every row in every group, ``(n, G)``; 0 where it is not ``on``."""
        return np.where(on & (self.unit >= 0), genes[self.unit], 0)

    def mask(self, lengths: NDArray[np.int64], width: int) -> NDArray[np.bool_]:
        """Kept entries ``(n, D)``; none outside counted blocks."""
        keep = np.zeros((len(lengths), width), dtype=bool)
        for group, (left, right) in enumerate(self.groups):
            keep[:, left:right] = np.arange(right - left) < lengths[:, group, None]
        return keep


class _UnitStep(torch.autograd.Function):
    """``1[u > 0]``, with ``2 - 4|u|`` up to 0.4, ``0.4`` up to 1 and 0 beyond as its derivative."""

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        ctx.save_for_backward(u)
        return (u > 0).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (u,) = ctx.saved_tensors
        size = u.abs()
        near, far = size <= 0.4, size <= 1
        return slopes[0] * torch.where(near, 2 - 4 * size, torch.where(far, 0.4, 0.0))


def unit_step(u: Tensor) -> Tensor:
    """``1[u > 0]`` with a straight-through gradient."""
    return _UnitStep.apply(u)  # pyright: ignore[reportReturnType]


class Supernet(LearningTable):
    """A table that trains with random prefix lengths, and with learned thresholds on the rows' L1 norms if asked for.

    A row reads zero in a group of columns where its norm there is not above the threshold. Click models draw a length
    for every sample and field, ranking models one for every row, in each step.

    Args:
        dense: first values; copied.
        units: which entries share a length.
        rows: who shares a threshold: each ``field``, each ``row``, or ``None`` for no thresholds.
        rule: how thresholds are updated.
        pressure: weight of ``sum exp(-t)`` in the loss.
    """

    offset: Tensor
    group: Tensor
    fields: Tensor

    def __init__(self, dense: DenseTable, units: Units, rows: RowSharing | None, rule: Rule, pressure: float) -> None:
        super().__init__()
        self.schema, self.blocks, self.groups = dense.schema, dense.blocks, units.groups
        self.rows, self.rule, self.pressure = rows, rule, pressure
        self.base = nn.Parameter(dense.matrix.detach().clone())
        height = {"field": self.schema.width, "row": self.schema.rows, None: 0}[rows]
        self.threshold = nn.Parameter(torch.zeros(height, len(self.groups)))
        offset, group = torch.full((self.width,), -1), torch.zeros(self.width, dtype=torch.int64)
        for index, (left, right) in enumerate(self.groups):
            offset[left:right], group[left:right] = torch.arange(right - left), index
        self.register_buffer("offset", offset)
        self.register_buffer("group", group)
        self.register_buffer("fields", torch.from_numpy(self.schema.field_of_row.copy()).long())

    def extra_repr(self) -> str:
        """Settings of the search."""
        return f"rows={self.rows}, groups={self.groups}, rule={settings.text(self.rule)}, pressure={self.pressure}"

    def rules(self) -> Mapping[str, Rule]:
        """Thresholds are updated by plain gradient descent."""
        return {"threshold": self.rule}

    def penalty(self, ids: Tensor, epoch: int) -> Tensor:
        """``pressure sum exp(-t)``."""
        return self.pressure * torch.exp(-self.threshold).sum()

    def forward(self, ids: Tensor) -> Tensor:
        """Look up: ``(...) -> (..., D)``."""
        return self._gate(self.base[ids], ids)

    def weight(self) -> Tensor:
        """The whole matrix ``(n, D)``."""
        return self._gate(self.base, slice(None))

    def _gate(self, vectors: Tensor, ids: Tensor | slice) -> Tensor:
        """Zero where the row is not above its threshold."""
        if self.rows is None:
            return vectors
        gates = unit_step(self._margins(vectors, ids))
        return torch.where(self.offset < 0, vectors, vectors * gates[..., self.group])

    def _margins(self, vectors: Tensor, ids: Tensor | slice) -> Tensor:
        """``|e|_1 - t`` in each group, ``(..., G)``."""
        norms = torch.stack([vectors[..., left:right].abs().sum(dim=-1) for left, right in self.groups], dim=-1)
        if self.rows is None:
            return norms
        return norms - self.threshold[ids if self.rows == "row" else self.fields[ids]]

    def margins(self) -> NDArray[np.float32]:
        """``|e|_1 - t`` of every row, or its norm where there are no thresholds: ``(n, G)``."""
        return self._margins(self.base.detach(), slice(None)).detach().numpy()

    def drawn(self, noise: torch.Generator) -> Lookup:
        """The table with random lengths."""
        return _SampledNet(self, noise)


class _SampledNet(Lookup):
    """A supernet with the random lengths of one step."""

    def __init__(self, net: Supernet, noise: torch.Generator) -> None:
        super().__init__()
        self.schema, self.blocks, self.net, self.noise = net.schema, net.blocks, net, noise
        self.by_row = self._draw(self.schema.rows) if self.schema.task == "cf" else None

    def forward(self, ids: Tensor) -> Tensor:
        """Look up: ``(...) -> (..., D)``."""
        return self._cut(self.net(ids), self._draw(*ids.shape) if self.by_row is None else self.by_row[ids])

    def weight(self) -> Tensor:
        """The whole matrix ``(n, D)``."""
        return self._cut(self.net.weight(), self._draw(self.schema.rows) if self.by_row is None else self.by_row)

    def _draw(self, *shape: int) -> Tensor:
        """Uniform lengths ``(*shape, G)``."""
        drawn = [torch.randint(1, right - left + 1, shape, generator=self.noise) for left, right in self.net.groups]
        return torch.stack(drawn, dim=-1).to(self.net.base.device)

    def _cut(self, vectors: Tensor, lengths: Tensor) -> Tensor:
        return torch.where(self.net.offset < lengths[..., self.net.group], vectors, 0)


@torch.no_grad()
def validation_figures(
    model: Model[Lookup], weight: Tensor, units: Units, lengths: Iterable[NDArray[np.int64]], split: Split
) -> list[float]:
    """The validation figure of every candidate, the model reading ``weight (n, D)`` cut to its lengths ``(n, G)``.

    Candidates of a click model whose fields have one length each share the look-ups: a block of rows is read once.
    Those of a ranking model share the patterns of the split; side by side, their propagations would take as long.
    """
    table = model.table
    if not isinstance(model, ClickModel) or split.labels is None or len(split) == 0:
        kept = (np.where(uncounted_values(table), True, units.mask(one, table.width)) for one in lengths)
        cut = (DenseTable(table.schema, table.blocks, torch.where(torch.from_numpy(k), weight, 0)) for k in kept)
        return [validate(model.with_table(one), split) or 0.0 for one in cut]
    whole, fields = uncounted_values(table), table.schema.field_of_row
    keep, masks = [], []
    for one in lengths:
        longest = np.zeros((table.schema.width, one.shape[1]), np.int64)
        np.maximum.at(longest, fields, one)
        masks.append(torch.from_numpy(whole | units.mask(longest, table.width)).float())
        keep.append(np.zeros(len(split), np.float32))
    for start in range(0, len(split), EVALUATION_ROWS):
        ids = torch.from_numpy(split.ids[start : start + EVALUATION_ROWS].copy())
        vectors = weight[ids]
        for mask, logits in zip(masks, keep, strict=True):
            logits[start : start + len(ids)] = model.head(vectors * mask).numpy()
    return [auc(split.labels, logits) or 0.0 for logits in keep]


def uncounted_values(table: Lookup) -> NDArray[np.bool_]:
    """Columns of no counted block, ``(D,)``."""
    columns = np.ones(table.width, dtype=bool)
    for block in table.blocks:
        if block.counted:
            columns[block.left : block.right] = False
    return columns


def even_lengths(units: Units, blocks: Sequence[Block], on: NDArray[np.bool_], most: int) -> list[Genes]:
    """Lengths as even as the budget allows: over all units, and over those of each counted block alone.

    In the latter the other blocks keep one column of each unit, or nothing remains for this one.

    Args:
        units: Which entries share a length.
        blocks: Of the table.
        on: Rows that are kept, ``(n, G)``.
        most: The budget, at least one column of each unit.
    """
    sizes = units.sizes(on)
    every = np.ones(len(units.longest), dtype=bool)
    chosen = [every]
    for block in (b for b in blocks if b.counted):
        inside = np.zeros_like(every)
        group = units.groups.index((block.left, block.right))
        inside[units.unit[block.start : block.stop, group]] = True
        if not inside.all():
            chosen.append(inside)
    return [_level(np.where(inside, units.longest, 1), sizes, most) for inside in chosen]


def _level(longest: Genes, sizes: Genes, most: int) -> Genes:
    """The greatest common length within ``most``, or the longest where that is shorter."""
    level = largest_fitting(1, int(longest.max()), lambda length: int(np.minimum(length, longest) @ sizes) <= most)
    return np.minimum(level, longest)
