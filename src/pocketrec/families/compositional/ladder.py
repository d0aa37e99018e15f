"""A freshly initialised table of compositions for any budget, trained when it is finished."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import ClassVar

import numpy as np

from pocketrec.compression.budget import Room, largest_fitting, values_below
from pocketrec.compression.ladder import Ladder
from pocketrec.data.dataset import Dataset
from pocketrec.errors import ConfigError
from pocketrec.families.compositional.region import NOTHING, FrequencyOrder, Region, SlotOrder, Slots, regions, slots_of
from pocketrec.families.compositional.table import ComposedTable, CompositionPlan
from pocketrec.families.distillation import imitated, lessons
from pocketrec.families.retraining import Start, TrainingMethod, initial_model
from pocketrec.families.sharing import BlockSharing
from pocketrec.format.block import side_size_for
from pocketrec.format.entries import size_for
from pocketrec.models.backbone import Model, noise
from pocketrec.models.table import Block, DenseTable, Table, oov_rows
from pocketrec.training.run import Run

Draft = Model[ComposedTable]
"""A model as its training starts."""


class CompositionalMethod(TrainingMethod):
    """A method whose vectors are computed: what it says of a region and a number of values, and how it trains.

    Args:
        start: ``fresh``, as published, or ``taught`` by the trained model.
        scope: ``block`` has one for each counted block, ``joint`` one for all rows.
        order: which rows are neighbours: by their place in the ``file`` (free there), or by ``id``.
    """

    starts: ClassVar[tuple[str, ...]] = ("fresh", "taught")
    teaching_rate: ClassVar[float] = 0.01
    """Learning rate of a ``taught`` start that says none."""

    start: Start
    scope: BlockSharing
    order: SlotOrder

    @property
    def keeps(self) -> bool:
        """Whether a plan keeps the vectors of some frequent slots."""
        return False

    @abstractmethod
    def plan(self, region: Region, values: int, frequent: Slots = NOTHING) -> CompositionPlan | None:
        """The largest composition of a region within a number of values; ``None`` below the least.

        Args:
            region: rows and columns.
            values: scalars, at most.
            frequent: all slots, the most frequent first, for a method that ``keeps`` some.
        """

    @abstractmethod
    def least(self, region: Region) -> int:
        """The fewest values of a region."""

    def train(self, draft: Draft, data: Dataset, run: Run) -> Model:
        """The final model from the one that training starts from."""
        return run.fit(self.name, draft, data)

    def prepare(self, model: Model, data: Dataset, run: Run) -> ComposedLadder:
        """Nothing is computed before the budget is known."""
        start, dense = initial_model(model, data, run, self.start)
        frequent = FrequencyOrder(data, self.order)

        def plan(region: Region, values: int) -> CompositionPlan | None:
            return self.plan(region, values, frequent.of(region) if self.keeps else NOTHING)

        def train(draft: Draft) -> Model:
            ready = self._taught(draft, dense, data, run) if self.start.kind == "taught" else draft
            return self.train(ready, data, run)

        return ComposedLadder(
            name=self.name, start=start, data=data, run=run, scope=self.scope, order=self.order,
            plan=plan, least=self.least, train=train,
        )  # fmt: skip

    def _taught(self, draft: Draft, dense: DenseTable, data: Dataset, run: Run) -> Draft:
        """The draft with all that its compositions may ever read, once it has learned the dense table."""
        stages = lessons(self.start, self.teaching_rate, run.stages(data.schema.task)[0])
        pupil = draft.with_table(draft.table.whole())
        return imitated(self.name, pupil, dense.matrix.detach(), data, run, stages, self.start.goal)


@dataclass(frozen=True, kw_only=True)
class ComposedLadder(Ladder):
    """A freshly initialised table of compositions for any budget; ``finish`` trains it, with a fresh head.

    Args:
        name: Of the method.
        start: The model as its training starts, around its dense table.
        data: Training and validation rows.
        run: Keeps each trained model, and gives the seed.
        scope: ``block`` gives each counted block its share and a composition of its own; ``joint`` gives one to all
            rows of the same columns.
        order: What a slot is, see :func:`slots_of`.
        plan: The largest composition of a region within a number of values; ``None`` below the least.
        least: The least values of a region.
        train: The final model from the model that training starts from.
    """

    name: str
    start: Model
    data: Dataset
    run: Run
    scope: BlockSharing
    order: SlotOrder
    plan: Callable[[Region, int], CompositionPlan | None]
    least: Callable[[Region], int]
    train: Callable[[Draft], Model]

    def table(self, room: Room) -> ComposedTable:
        """The largest compositions that fit, each region at most its share; bytes hold all uncounted blocks as well.

        Raises:
            BudgetError: Not even the least compositions fit.
        """
        plans = self._plans(self._values_within(room) if room.values is None else self._enough(room.values))
        parts = [
            (region, plan.build(noise(self.run.seed, self.name, i)), slots)
            for i, (region, plan, slots) in enumerate(zip(self._regions, plans, self._slots, strict=True))
        ]
        table: Table = self.start.table
        return ComposedTable(self.start.schema, table.blocks, parts, table.weight().detach())

    def _enough(self, values: int) -> int:
        """So many values, if the least compositions need no more."""
        if values < self._least:
            what = f"that {self.name} needs for a table of {self.start.table.values():,}"
            raise values_below(values, self._least, what)
        return values

    def _values_within(self, room: Room) -> int:
        """Most values whose compositions pack, with all uncounted blocks, into a room of bytes."""

        def size(values: int) -> int:
            return self._size(self._plans(values), room)

        low, high = self._least, max(self._least, sum(r.values for r in self._regions))
        if (least := size(low)) > room.most:
            rows = f"{self.start.schema.rows:,} rows of width {self.start.table.width}"
            raise room.below(least, f"of the smallest table that {self.name} can make of {rows}")
        return largest_fitting(low, high, lambda values: size(values) <= room.most)

    def finish(self, model: Model, room: Room) -> Model:
        """Train the table and a fresh head."""
        if not isinstance(model.table, ComposedTable):
            raise ConfigError(f"{self.name} trains a composed table, but got {type(model.table).__name__}.")
        return self.train(self.start.with_table(model.table))

    @cached_property
    def _regions(self) -> tuple[Region, ...]:
        return regions(self.start.table.blocks, self.scope)

    @cached_property
    def _slots(self) -> tuple[Slots, ...]:
        return tuple(slots_of(region, self.data, self.order) for region in self._regions)

    @cached_property
    def _least(self) -> int:
        """Fewest values of which every region's share is enough."""
        total = sum(r.values for r in self._regions)
        least = [self.least(r) for r in self._regions]
        values = max(-(-n * total // r.values) for n, r in zip(least, self._regions, strict=True))
        while any(share < n for share, n in zip(self._shares(values), least, strict=True)):
            values += 1
        return values

    def _shares(self, values: int) -> list[int]:
        """The part of ``values`` that each region gets: proportional to its size, summing exactly to ``values``."""
        ends = np.cumsum([0, *(r.values for r in self._regions)]).tolist()
        return [values * b // ends[-1] - values * a // ends[-1] for a, b in pairwise(ends)]

    def _plans(self, values: int) -> list[CompositionPlan]:
        plans = [self.plan(r, n) for r, n in zip(self._regions, self._shares(values), strict=True)]
        return [plan for plan in plans if plan is not None]

    def _size(self, plans: Sequence[CompositionPlan], room: Room) -> int:
        """Bytes of the packed table, and of its keys where they share the room."""
        schema, table = self.start.schema, self.start.table
        unknown = sum(f.oov_row is not None for f in schema.fields)
        size = side_size_for(schema.width, table.width, unknown) + 4 * self._slots_in_file
        size += sum(plan.size_bytes(room.storage) for plan in plans)
        for block, named in self._plain:
            size += size_for(named, named, named * block.width, block.width, schema.width, room.storage)
        return size + room.key_bytes(schema, [f.size - f.oov for f in schema.fields])

    @cached_property
    def _plain(self) -> list[tuple[Block, int]]:
        """Uncounted blocks, and how many rows of them a file stores."""
        named = ~oov_rows(self.start.schema).numpy()
        blocks = [b for b in self.start.table.blocks if not b.counted]
        return [(b, int(np.count_nonzero(named[b.start : b.stop]))) for b in blocks]

    @cached_property
    def _slots_in_file(self) -> int:
        """Rows of which a file has to say the slot."""
        if self.order == "file":
            return 0
        named = ~oov_rows(self.start.schema).numpy()
        told = 0
        for region, slots in zip(self._regions, self._slots, strict=True):
            if not np.array_equal(slots, slots_of(region, self.data, "file")):
                told += int(np.count_nonzero(named[region.start : region.stop]))
        return told
