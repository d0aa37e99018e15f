"""Soft thresholds: how they shrink, what lifts them, and the record of what has fallen below them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pocketrec import settings
from pocketrec.errors import BudgetError, ConfigError
from pocketrec.families.pruning import carry_uncounted, rank_keys
from pocketrec.families.sharing import ThresholdSharing
from pocketrec.models.table import DenseTable, counted_cells
from pocketrec.training.hooks import LearningTable, Rule


def shrink(values: Tensor, threshold: Tensor) -> Tensor:
    """``sign(e) relu(|e| - sigmoid(s))``; gradients of what is below its threshold are zero.

    Example:
        >>> shrink(torch.tensor([-2.0, 0.4]), torch.zeros(1))
        tensor([-1.5000, 0.0000])
    """
    return values.sign() * torch.relu(values.abs() - threshold.sigmoid())


def first_threshold(values: Tensor) -> float:
    """``s`` at which the threshold is 1/20 of the mean magnitude."""
    return math.log(float(values.abs().mean().clamp_min(1e-12)) / 20)


def rising_rate(first: float, reach: float, steps: int) -> float:
    """The learning rate with which coupled weight decay lifts ``s`` from ``first`` towards ``logit(reach)``.

    Adam normalises the decay's size away: ``s`` rises by one learning rate a step at first. The decay gets smaller as
    ``s`` rises, but the second moment remembers, so that later steps are shorter: from ``-8`` towards ``logit(.3)``
    the search ends at a threshold of about .08.
    """
    return max(1e-6, (math.log(reach / (1 - reach)) - first) / steps)


@dataclass(frozen=True)
class ThresholdSearch:
    """How thresholds are searched.

    Args:
        epochs: of the search, at least 1; by default half of those of the first training stage.
        first: first ``s`` of the thresholds, below 0; by default they start at 1/20 of the mean first magnitude.
        reach: threshold that the default rate aims at, in (0, 0.5]; only where ``rate`` is left open. The search ends
            below it: at about .08 for .3, since Adam remembers the larger decay of its beginning.
        rate: learning rate of ``s``, above 0; by default such that the threshold rises towards ``reach``.
        decay: weight decay of ``s``, above 0: nothing is pruned without.
        checks: how often the search notes what is below its threshold, at least 1.
        stop: ``exact`` keeps as many entries as asked for, ``published`` those of the first check with at most so many.
        clip: largest norm of the search's gradient; 0 does not clip.

    Example:
        >>> ThresholdSearch(first=-15.0, rate=1e-2, stop="published").checks
        200
    """

    epochs: int | None = None
    first: float | None = None
    reach: float = 0.3
    rate: float | None = None
    decay: float = 1e-5
    checks: int = 200
    stop: Literal["exact", "published"] = "exact"
    clip: float = 100.0

    def __post_init__(self) -> None:
        settings.check(self, epochs=1, checks=1, clip=0)
        settings.check_above(self, rate=0, decay=0)
        if self.first is not None and not -math.inf < self.first < 0:
            raise ConfigError(f"`first` must be below 0, but got first={self.first}.")
        if not 0 < self.reach <= 0.5:
            raise ConfigError(f"`reach` must lie in (0, 0.5], but got reach={self.reach}.")

    def start(self, values: Tensor) -> float:
        """The first ``s`` over these values."""
        return first_threshold(values) if self.first is None else self.first

    def rule(self, first: float, steps: int) -> Rule:
        """How ``s`` is updated in a search of so many steps."""
        return Rule(self.rate or rising_rate(first, self.reach, steps), self.decay)

    def every(self, steps: int) -> int:
        """Steps between two checks."""
        return max(1, steps // self.checks)

    def kept(self, alive: NDArray[np.int64], values: int) -> int:
        """Entries to keep of those that were ``alive`` after 0, 1, ... checks: as many as asked for, or fewer.

        Raises:
            BudgetError: with ``stop="published"``, the search ended with more.
        """
        if self.stop == "exact":
            return values
        reached = np.flatnonzero(alive <= values)
        if not len(reached):
            raise BudgetError(
                f"The search ended with {alive[-1]:,} values above their threshold, more than the {values:,} asked "
                "for; search longer, raise `search.rate`, or use stop='exact'.",
                least_values=int(alive[-1]),
            )
        return int(alive[reached[0]])


class Falls(nn.Module):
    """Which entries are below their threshold, and since which check; one check at every ``every``-th step.

    ``fallen`` is the number of the check since which an entry has been below (0: it is above), ``margin`` its
    ``|e| - sigmoid(s)`` at that check. One record ranks entries for every size: those still above come first, then
    those that fell last; within a check the margin decides.

    Args:
        shape: of the matrix.
        every: steps between two checks.
    """

    fallen: Tensor
    margin: Tensor
    steps: Tensor

    def __init__(self, shape: tuple[int, int], every: int) -> None:
        super().__init__()
        self.every = every
        self.register_buffer("fallen", torch.zeros(shape, dtype=torch.int32))
        self.register_buffer("margin", torch.zeros(shape))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def observe(self, margins: Callable[[], Tensor]) -> None:
        """Count a step, and check where one is due."""
        self.steps += 1
        step = int(self.steps)
        if step % self.every:
            return
        margin = margins()
        fresh = (margin <= 0) & (self.fallen == 0)
        self.margin[fresh] = margin[fresh]
        self.fallen[fresh] = step // self.every
        self.fallen[margin > 0] = 0

    def keys(self, margin: Tensor) -> NDArray[np.float32]:
        """Ranking keys of all entries, from their present margins and the record."""
        above = (self.fallen == 0).numpy()
        fallen = np.where(above, np.iinfo(np.int32).max, self.fallen.numpy())
        return rank_keys(np.where(above, margin.detach().numpy(), self.margin.numpy()), fallen)

    def alive(self, cells: Tensor) -> NDArray[np.int64]:
        """Entries among ``cells`` above their threshold after 0, 1, ... checks."""
        fallen = np.bincount(self.fallen[cells].numpy(), minlength=int(self.steps) // self.every + 1)
        fallen[0] = 0
        return int(cells.sum()) - np.cumsum(fallen)


class SoftTable(LearningTable):
    """``sign(e) relu(|e| - sigmoid(s))`` on counted blocks, ``e`` on the others.

    Args:
        dense: first values; copied.
        granularity: who shares a threshold.
        first: ``s`` at the start.
        rule: how ``s`` is updated.
        every: steps between two checks.
        clip: largest norm of the gradient; 0 does not clip.
    """

    lasting = True

    cells: Tensor
    fields: Tensor

    def __init__(
        self, dense: DenseTable, granularity: ThresholdSharing, first: float, rule: Rule, every: int, clip: float
    ) -> None:
        super().__init__()
        self.schema, self.blocks = dense.schema, dense.blocks
        self.granularity: ThresholdSharing = granularity
        self.clip, self.rule = clip, rule
        rows, width = dense.matrix.shape
        by_row = {"row": rows, "cell": rows, "field": self.schema.width, "field_column": self.schema.width}
        by_column = granularity in ("column", "cell", "field_column")
        shape = (by_row.get(granularity, 1), width if by_column else 1)
        self.base = nn.Parameter(dense.matrix.detach().clone())
        self.threshold = nn.Parameter(torch.full(shape, first))
        self.register_buffer("fields", torch.from_numpy(self.schema.field_of_row.copy()).long())
        self.register_buffer("cells", counted_cells(self.schema, self.blocks))
        self.falls = Falls((rows, width), every)

    def extra_repr(self) -> str:
        """Settings of the search."""
        return f"{self.granularity}, every={self.falls.every}, clip={self.clip}, rule={settings.text(self.rule)}"

    def rules(self) -> Mapping[str, Rule]:
        """Thresholds have their own rate and decay."""
        return {"threshold": self.rule}

    def forward(self, ids: Tensor) -> Tensor:
        """Look up: ``(...) -> (..., D)``."""
        return self._shrink(self.base[ids], self._threshold(ids), self.fields[ids])

    def weight(self) -> Tensor:
        """The whole matrix ``(n, D)``."""
        return self._shrink(self.base, self._threshold(slice(None)), self.fields)

    def _threshold(self, rows: Tensor | slice) -> Tensor:
        """``s`` of rows, in a shape that broadcasts to their vectors."""
        if self.granularity in ("row", "cell"):
            return self.threshold[rows]
        return self.threshold[self.fields[rows]] if self.granularity.startswith("field") else self.threshold[0]

    def _shrink(self, vectors: Tensor, threshold: Tensor, fields: Tensor) -> Tensor:
        shrunk = shrink(vectors, threshold)
        return shrunk if bool(self.cells.all()) else torch.where(self.cells[fields], shrunk, vectors)

    def after_step(self) -> None:
        """Note now and then what is below its threshold."""
        self.falls.observe(self.margins)

    def margins(self) -> Tensor:
        """``|e| - sigmoid(s)`` now, ``(n, D)``; infinite outside counted blocks."""
        margin = self.base.detach().abs() - self._threshold(slice(None)).detach().sigmoid()
        return torch.where(self.cells[self.fields], margin, torch.inf)

    def keys(self) -> NDArray[np.float32]:
        """Ranking keys ``(n, D)``: entries still above their threshold, then those that fell last; by margin."""
        return carry_uncounted(self.falls.keys(self.margins()), self.blocks)

    def alive(self) -> NDArray[np.int64]:
        """Counted entries above their threshold after 0, 1, ... checks."""
        return self.falls.alive(self.cells[self.fields])
