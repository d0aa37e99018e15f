"""TT-Rec: tensor-train tables with a cache of frequent rows."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, cast

import numpy as np

from pocketrec import settings
from pocketrec.compression.budget import largest_fitting
from pocketrec.data.dataset import Dataset
from pocketrec.errors import ConfigError
from pocketrec.families.compositional.ladder import CompositionalMethod, Draft, Model, Run, Start
from pocketrec.families.compositional.region import NOTHING, Region, SlotOrder, Slots
from pocketrec.families.compositional.tensor_train import CoreInit, TensorTrain, TrainPlan, rank_bounds, train_values
from pocketrec.families.sharing import BlockSharing
from pocketrec.format.layouts.tensor_train import row_factors, width_factors


@dataclass(frozen=True)
class TTRec(CompositionalMethod):
    """The table as a tensor train of a few small cores, and the most frequent rows as they are.

    Ranks are equal as far as their bounds allow, the largest that fit the budget; what they leave goes to the cache.
    The cache holds the rows that occur most often in training; it starts, after ``warm_up`` epochs on the cores alone,
    as a copy of what the cores say, and is then trained for itself.

    Args:
        cores: 2 to 4.
        ranks: ``r_1, r_2, ...`` of every region, one fewer than cores and at least 1 each, as published runs fix them;
            what they leave of the budget goes to the cache, if there is one. By default from the budget.
        cache_share: of the values, for cached rows at least, in [0, 1); 0 for no cache, as published ranking models.
        cache_by: what occurs often: by the ``counts`` of the data set, or by the ``accesses`` of the warm-up, drawn
            negatives included, as published code counts them; rows that were accessed alike go by their counts.
        warm_up: epochs before the cache is filled, at least 0.
        init: ``corrected`` (entries of the table get the variance 1/(3n), whatever the ranks) or ``approx_normal`` (the
            published one, larger by far).
        multiple: ranks are multiples of this where they are not smaller.
        scope: ``block`` has a train for each counted block, ``joint`` one for all rows.
        order: which ids share slices: neighbours in the ``file`` (free) or by ``id`` (4 bytes a row where fields are
            hashed).
        start: ``fresh``, as published, or ``taught`` by the trained model; then there is no warm-up.

    Example:
        >>> TTRec(cache_share=0).ranks_within((125, 125, 128), (2, 2, 4), 3_477_792)
        (120, 112)

    Reference:
        Yin et al., "TT-Rec: tensor train compression for deep learning recommendation models", 2021.
    """

    name: ClassVar[str] = "tt_rec"
    bounds: ClassVar = {"cores": 2, "warm_up": 0, "multiple": 1}

    cores: int = 3
    ranks: tuple[int, ...] = ()
    cache_share: float = 0.2
    cache_by: Literal["counts", "accesses"] = "counts"
    warm_up: int = 1
    init: CoreInit = "corrected"
    multiple: int = 8
    scope: BlockSharing = "block"
    order: SlotOrder = "file"
    start: Start = field(default=Start())

    def check(self) -> None:
        """Cores and ranks fit each other."""
        settings.check_share(self, "cache_share")
        if self.cores > 4:
            raise ConfigError(f"`cores` must lie in [2, 4], but got cores={self.cores}.")
        if self.ranks and (len(self.ranks) != self.cores - 1 or min(self.ranks) < 1):
            raise ConfigError(
                f"`ranks` must be {self.cores - 1} numbers of at least 1 for cores={self.cores}, but got "
                f"ranks={self.ranks}."
            )

    @property
    def keeps(self) -> bool:
        """Whether there is a cache."""
        return self.cache_share > 0

    def plan(self, region: Region, values: int, frequent: Slots = NOTHING) -> TrainPlan | None:
        """Cores and cache of a region within ``values`` scalars; the first of ``frequent`` are cached."""
        rows, widths = self._factors(region)
        most = values - int(values * self.cache_share)
        ranks = self.ranks or self.ranks_within(rows, widths, most) or self.ranks_within(rows, widths, values)
        if ranks is None or train_values(rows, widths, ranks) > values:
            return None
        plan = TrainPlan(region.rows, rows, widths, ranks, self.init)
        cached = min((values - plan.values) // region.width, region.rows) if self.cache_share else 0
        return replace(plan, cached=np.sort(frequent[:cached]), tallied=self.cache_by == "accesses")

    def least(self, region: Region) -> int:
        """Scalars of the smallest train of a region."""
        rows, widths = self._factors(region)
        return train_values(rows, widths, self.ranks or (1,) * (self.cores - 1))

    def _factors(self, region: Region) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What the rows and the columns of a region are products of, a factor for each core."""
        return row_factors(region.rows, self.cores), width_factors(region.width, self.cores)

    def ranks_within(self, rows: tuple[int, ...], widths: tuple[int, ...], values: int) -> tuple[int, ...] | None:
        """The largest ranks whose cores hold at most ``values`` scalars; ``None`` if there are none."""
        bounds = rank_bounds(rows, widths)

        def capped(rank: int) -> tuple[int, ...]:
            return tuple(min(rank, bound) for bound in bounds)

        low = largest_fitting(0, max(bounds), lambda rank: train_values(rows, widths, capped(rank)) <= values)
        if low < 1:
            return None
        step = self.multiple if low >= self.multiple else 1
        ranks = capped(low // step * step)
        grown = True
        while grown:
            grown = False
            for k, bound in enumerate(bounds):
                wider = (*ranks[:k], min(ranks[k] + step, bound), *ranks[k + 1 :])
                if wider != ranks and wider[k] <= 2 * low and train_values(rows, widths, wider) <= values:
                    ranks, grown = wider, True
        return ranks

    def train(self, draft: Draft, data: Dataset, run: Run) -> Model:
        """Warm up on the cores, fill the cache, train on; cache and cores that have been taught just go on."""
        if self.start.kind == "taught":
            return run.fit(self.name, draft, data)
        if self.warm_up and any(cast("TensorTrain", part).cached for part in draft.table.parts):
            warm = replace(run.stages(data.schema.task)[0], epochs=self.warm_up, patience=self.warm_up)
            draft = run.fit(f"{self.name}_warm_up", _filled(draft, warm=True), data, warm)
        return run.fit(self.name, _filled(draft, warm=False), data)


def _filled(draft: Draft, *, warm: bool) -> Draft:
    """The model around a copy of its table, whose caches are out of use, or filled and in use."""
    table = copy.deepcopy(draft.table)
    for part in table.parts:
        cast("TensorTrain", part).fill(warm=warm)
    return draft.with_table(table)
