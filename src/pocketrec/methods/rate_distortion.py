"""Rate-distortion coding: every row gets the bits that its loss is worth, from one scoring pass, for any budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from pocketrec import settings
from pocketrec.attribution.fisher import Sensitivity, sensitivity
from pocketrec.attribution.list_margin import lists, margin, ranks_by_products
from pocketrec.compression.ladder import Ladder, Method, Model, Room, Run
from pocketrec.data.dataset import Dataset
from pocketrec.errors import UnsupportedOp
from pocketrec.families.coding.clicks.allocation import Assignment, FieldCoordinates, allocate, bit_price
from pocketrec.families.coding.clicks.head import CodedHead, HeadCosts, moments
from pocketrec.families.coding.clicks.table import CodedTable, spans
from pocketrec.families.coding.clicks.touch_up import touch_up
from pocketrec.families.coding.lists.ladder import ListCodingLadder
from pocketrec.format.sections import Section, fixed_bytes
from pocketrec.models.backbone import ClickModel
from pocketrec.models.table import Table
from pocketrec.schema import Schema
from pocketrec.training.loop import fingerprint

_KEY_BITS = 36.0
"""About what a key takes in a vocabulary."""


@dataclass(frozen=True)
class RateDistortion(Method):
    """Spend a byte budget over rows and directions where it saves most loss; nothing is retrained.

    Rows are coded around their field's mean, in the principal axes of what the loss sees of them: the residuals,
    whitened by the second moment of the loss's gradient. Embedding and linear weights are coded together. Each row
    takes one of a few classes, from nothing to 16 bits for every direction, by the Lagrangian ``loss + lambda * bits``;
    everything that the file holds is paid for. ``storage`` and ``index`` have no say; a sparsity keeps the leading
    directions of rows, in 8 bits each.

    A ranking model whose final vectors are its table, baked or without a graph, and whose scores are inner products is
    coded for its lists: items as a gain times a shared vector and a trellis code of the rest, users as sums of a few
    items and one more code. An error costs what it changes in scores near the end of users' lists; no ``samples`` and
    ``probes`` are drawn. The lengths of users' vectors are not kept, since no list depends on them.

    One pass over the training rows serves every budget. Where the budget is for the whole file, the head of a click
    model is coded by the same Lagrangian.

    Args:
        samples: Training rows to read, at most; by default all.
        probes: Random projections of the gradient, for ranking models that propagate their table, at least 1.
        code_head: Whether a budget for the whole file may code the head of a click model, too.
        touch_up: Most epochs, at each of two learning rates, of training what rows share against the dense model's
            outputs; 0 does not train. For click models means, scales, directions and head against probabilities; for
            rankers shared vectors, gains and scales against the scores in their lists.

    Example:
        >>> RateDistortion(samples=100_000).probes
        8

    Reference:
        Reverse water-filling: Cover and Thomas, "Elements of Information Theory", 2006, theorem 10.3.3. Rounding by
        second-order loss: LeCun et al., "Optimal brain damage", 1990, equation 3.
    """

    name: ClassVar[str] = "rate_distortion"
    bounds: ClassVar = {"samples": 1, "probes": 1, "touch_up": 0}

    samples: int | None = None
    probes: int = 8
    code_head: bool = True
    touch_up: int = 0

    def prepare(self, model: Model, data: Dataset, run: Run) -> Ladder:
        """Gather what errors cost; the run keeps it.

        Raises:
            UnsupportedOp: a ranking model shall be touched up whose scores are no inner products of its table's rows.
        """
        by_products = ranks_by_products(model)
        if self.touch_up and not (by_products or isinstance(model, ClickModel)):
            raise UnsupportedOp(
                "Only click models, and rankers whose scores are inner products of final vectors, can be touched up, "
                f"but got {type(model).__name__}; bake a model with a graph, or leave `touch_up` at 0."
            )
        if by_products:
            known = {"model": fingerprint(model), "data": data.digest}
            found = margin(model, run.once("margin", known, lambda checkpoint: lists(model, data)))
            whole = RateDistortionLadder(self, model, data, run, found.sensitivity(model.schema.fields))
            return ListCodingLadder(model, found, whole, data, run, self.touch_up)
        stored = run.once(
            "fisher",
            self.key(model, data),
            lambda checkpoint: sensitivity(
                model, data, samples=self.samples, probes=self.probes, seed=run.seed, checkpoint=checkpoint
            ).arrays(),
        )
        return RateDistortionLadder(self, model, data, run, Sensitivity.from_arrays(stored))

    def key(self, model: Model, data: Dataset) -> dict[str, Any]:
        """What the scoring pass depends on."""
        own = RateDistortion(samples=self.samples, probes=self.probes)
        return {"model": fingerprint(model), "data": data.digest, **settings.key(own)}


@dataclass(frozen=True)
class RateDistortionLadder(Ladder):
    """Every budget from one table of sensitivities.

    Args:
        method: Its settings.
        model: The dense model.
        data: Its data.
        run: Keeps what is measured of the head, and every touch-up.
        cost: What errors in the table's rows cost.
    """

    method: RateDistortion
    model: Model
    data: Dataset
    run: Run
    cost: Sensitivity

    @property
    def dense(self) -> Table:
        """The dense table."""
        return self.model.table

    @property
    def schema(self) -> Schema:
        """Fields of the table."""
        return self.dense.schema

    def table(self, room: Room) -> CodedTable:
        """The table of least expected loss that packs into so many bytes, or of at most so many coded values.

        Values are the leading directions of the rows that need them, in 8 bits each.

        Raises:
            BudgetError: Not even the table of nothing but field means fits.
        """
        found = self._of_bytes(room) if room.values is None else self._of_values(room.values)
        return CodedTable.of(self.schema, self.dense.blocks, self._centre, self._sources, found)

    def _of_values(self, values: int) -> list[Assignment]:
        """At most so many coded scalars."""

        def size(sections: Sequence[Section], counts: Sequence[NDArray[np.int64]]) -> int:
            coded = (np.count_nonzero(s.bits, axis=1) @ c[: len(s.bits)] for s, c in zip(sections, counts, strict=True))
            return int(sum(coded))

        return allocate(self._sources, values, size, rate="values")

    def _of_bytes(self, room: Room) -> list[Assignment]:
        """The least expected loss within the room."""
        fixed = self._fixed_bytes

        def size(sections: Sequence[Section], counts: Sequence[NDArray[np.int64]]) -> int:
            coded = sum(s.size_bits(c) for s, c in zip(sections, counts, strict=True)) // 8
            return fixed + coded + room.key_bytes(self.schema, [int(c.sum()) for c in counts])

        if room.most < (least := self._least_bytes(room)):
            fields = f"{self.schema.width} fields of width {self.dense.width}"
            raise room.below(least, f"that the means of {fields} need")
        return allocate(self._sources, room.most, size, rate="bits", row_bits=_KEY_BITS if room.keys else 0.0)

    def headed(self, model: Model, room: Room) -> Model:
        """A click model with its head coded at the price at which head and table fill the bytes."""
        market = self._head
        if market is None or not isinstance(model, ClickModel):
            return model
        spare = 8 * (room.most - market.fixed_bytes - self._least_bytes(room))
        bits = market.bits(bit_price(self._sources, spare, market.spent, row_bits=_KEY_BITS))
        return CodedHead(model, market.coded(model.lower(), bits), bits)

    def finish(self, model: Model, room: Room) -> Model:
        """The model touched up, where the method is told to; a coded head keeps the bits of its rows."""
        if not (self.method.touch_up and isinstance(model, ClickModel) and isinstance(self.model, ClickModel)):
            return model
        head = model if isinstance(model, CodedHead) else None
        plain = model if head is None else head.source.with_table(model.table)
        touched = touch_up(plain, self.model, self.data, self.run, self.method.touch_up)
        if head is None or self._head is None:
            return touched
        return CodedHead(touched, self._head.coded(touched.lower(), head.bits), head.bits)

    @cached_property
    def _head(self) -> HeadCosts | None:
        """What the rows of the head's matrices lose and take, where it may be coded."""
        model = self.model
        if not (self.method.code_head and isinstance(model, ClickModel)):
            return None
        key = {"model": fingerprint(model), "data": self.data.digest}
        head = model.lower()
        market = self.run.once(
            "head-loss", key, lambda checkpoint: HeadCosts.of(head, moments(model, self.data, self.run.seed)).arrays()
        )
        return HeadCosts.from_arrays(head, market)

    @cached_property
    def _fixed_bytes(self) -> int:
        """Bytes of a table of nothing but field means."""
        blocks = len(spans(self.dense.blocks))
        return 2 * self._centre.size + fixed_bytes(self.schema.width) + (blocks - 1) * fixed_bytes(0)

    def _least_bytes(self, room: Room) -> int:
        """The same, with its keys where they share the room."""
        return self._fixed_bytes + room.key_bytes(self.schema, [0] * self.schema.width)

    @cached_property
    def _shares(self) -> NDArray[np.float32]:
        """Each row's part of its field's metric, ``(n,)``."""
        totals = np.array([max(float(np.trace(m)), 1e-30) for m in self.cost.metric], np.float32)
        return self.cost.trace / totals[self.schema.field_of_row]

    @cached_property
    def _centre(self) -> NDArray[np.float16]:
        """Mean of each field by what its rows weigh, ``(F, D)``."""
        weight = self.dense.finite()
        centre = np.zeros((self.schema.width, weight.shape[1]))
        for i, field in enumerate(self.schema.fields):
            rows = slice(field.offset, field.stop)
            share = self._shares[rows].astype(np.float64)
            if (total := share.sum()) > 0:
                centre[i] = (share / total) @ weight[rows]
        return centre.astype(np.float16)

    @cached_property
    def _sources(self) -> list[FieldCoordinates]:
        """The rows of each field but the out-of-vocabulary row."""
        weight = self.dense.weight().detach().numpy()
        found = []
        for i, field in enumerate(self.schema.fields):
            rows = np.arange(field.offset, field.stop - field.oov)
            residuals = weight[rows] - self._centre[i].astype(np.float32)
            found.append(
                FieldCoordinates.of(rows, field.keys == "hashed", residuals, self._shares[rows], self.cost.metric[i])
            )
        return found
