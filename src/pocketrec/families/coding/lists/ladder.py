"""Every budget of a ranking model from the items at the margin of its lists."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from pocketrec.attribution.list_margin import ListMargin
from pocketrec.compression.budget import Room
from pocketrec.compression.ladder import Ladder
from pocketrec.data.dataset import Dataset
from pocketrec.errors import UnsupportedOp
from pocketrec.families.coding.lists.gain_shape import GainShape
from pocketrec.families.coding.lists.plan import TrellisPlan
from pocketrec.families.coding.lists.table import TrellisTable
from pocketrec.families.coding.lists.touch_up import touch_up_lists
from pocketrec.format.layouts.trellis import Records, Shape
from pocketrec.models.backbone import Model
from pocketrec.models.table import Table
from pocketrec.training.run import Run


@dataclass(frozen=True)
class ListCodingLadder(Ladder):
    """Tables of users as sums of items, see :mod:`pocketrec.families.coding.lists.gain_shape`.

    Args:
        model: The dense model.
        margin: What errors cost.
        values: Meets budgets in values.
        data: Its validation rows judge a touch-up.
        run: Keeps touch-ups; its seed is that of the samples that shared vectors are learned on.
        touch_up: Most epochs at each rate of :func:`~pocketrec.families.coding.lists.touch_up.touch_up_lists`; 0 for no
            training.
    """

    model: Model
    margin: ListMargin
    values: Ladder
    data: Dataset
    run: Run
    touch_up: int

    def table(self, room: Room) -> Table:
        """A blank table of at most so many bytes, whose codes :meth:`finish` finds; or one of at most so many values.

        Raises:
            BudgetError: Not even the gains of items fit.
            UnsupportedOp: The lists shall be touched up, and the room is in values.
        """
        if room.values is None:
            return self._blank(room)
        if self.touch_up:
            raise UnsupportedOp(
                "Rankers can be touched up at budgets in bytes only, but this one is in values; leave `touch_up` at 0."
            )
        return self.values.table(room)

    def _blank(self, room: Room) -> TrellisTable:
        """The largest table without codes; all rows are stored."""
        fields, width = self.model.schema.fields, self.model.table.width
        beside = self._mean.nbytes + room.key_bytes(self.model.schema, [f.size - f.oov for f in fields])
        least = beside + self._coder.least().size_bytes(width)
        if room.most < least:
            raise room.below(least, f"that the gains of {fields[1].size:,} rows of {fields[1].name!r} need")
        plan = self._coder.plan(room.most - beside)
        return self._table(plan.shape, plan.blank(width))

    def finish(self, model: Model, room: Room) -> Model:
        """The model with the codes of its rows, touched up where it shall be."""
        draft = model.table
        if not isinstance(draft, TrellisTable):
            return model
        plan = TrellisPlan(draft.shape, draft.records.classes)
        coded = model.with_table(self._table(plan.shape, self._coder.encode(plan)))
        if not self.touch_up:
            return coded
        return touch_up_lists(coded, self.model, self.margin, self.data, self.run, self.touch_up)

    def _table(self, shape: Shape, records: Records) -> TrellisTable:
        return TrellisTable(self.model.schema, self.model.table.blocks, self._mean, shape, records)

    @cached_property
    def _sides(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Vectors of users and items."""
        weight = self.model.table.weight().detach().numpy()
        users, items = (weight[f.offset : f.stop - f.oov] for f in self.model.schema.fields)
        return users, items

    @cached_property
    def _mean(self) -> NDArray[np.float16]:
        """What a user and an item that the file does not know read, ``(2, D)``."""
        return np.stack([side.mean(axis=0) for side in self._sides]).astype(np.float16)

    @cached_property
    def _coder(self) -> GainShape:
        return GainShape(*self._sides, self.margin, self.run.seed)
