"""CERP: two pruned codebooks whose sums are the vectors."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar, cast

import torch

from pocketrec.data.dataset import Dataset
from pocketrec.families.compositional.ladder import CompositionalMethod, Draft, Model, Run, Start
from pocketrec.families.compositional.pruned_sum import (
    NonZeros,
    PrunedCodebooks,
    PrunedSumPlan,
    Regulariser,
    SoftCodebooks,
    Spread,
    spread_of,
)
from pocketrec.families.compositional.region import NOTHING, Region, SlotOrder, Slots
from pocketrec.families.retraining import Retrain, retraining_model, search_training
from pocketrec.families.sharing import BlockSharing
from pocketrec.families.thresholds import ThresholdSearch
from pocketrec.format.layouts.pruned_sum import Operation, codebook_rows, part_width
from pocketrec.models.backbone import noise


@dataclass(frozen=True)
class CERP(CompositionalMethod):
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
        spread: first ``s`` of each single threshold: that of the ``search`` for all (``constant``), or that times a
            number of its own in [0, 1]: ``uniform``, ``normal`` (scaled to that range) or ``power`` (density ``2 v``).
        scope: ``block`` has a pair of codebooks for each counted block, ``joint`` one for all rows.
        order: which ids share rows: by their place in the ``file`` (free there), or by ``id`` (order of appearance).
        start: ``fresh``, as published, or ``taught`` by the trained model before the search.

    Example:
        >>> CERP().bucket_of(rows=1_086_810, width=16, values=3_477_792)
        135852

    Reference:
        Liang et al., "Learning compact compositional embeddings via regularized pruning for recommendation" (CERP),
        2023, equations 3-9. Departures: exact sizes; thresholds that start near the weights.
    """

    name: ClassVar[str] = "cerp"
    bounds: ClassVar = {"bucket": 1, "gamma": 0}
    above: ClassVar = {"slack": 1, "eta": 0}

    operation: Operation = "add"
    bucket: int | None = None
    slack: float = 1.25
    regulariser: Regulariser = "batch"
    gamma: float = 1e-4
    eta: float = 100.0
    spread: Spread = "constant"
    search: ThresholdSearch = field(default=ThresholdSearch())
    retrain: Retrain = field(default=Retrain())
    scope: BlockSharing = "block"
    order: SlotOrder = "file"
    start: Start = field(default=Start())

    def least(self, region: Region) -> int:
        """None: codebooks may be empty."""
        return 0

    def plan(self, region: Region, values: int, frequent: Slots = NOTHING) -> PrunedSumPlan:
        """The codebooks of a region, and how many of their entries are kept."""
        width = part_width(region.width, self.operation)
        bucket = self.bucket_of(region.rows, width, values)
        kept = min(values, sum(codebook_rows(region.rows, bucket)) * width)
        return PrunedSumPlan(region.rows, region.width, bucket, kept, self.operation)

    def bucket_of(self, rows: int, width: int, values: int) -> int:
        """Rows of ``width`` of each codebook: both hold ``slack * values`` entries; no two ids share both rows."""
        if self.bucket is not None:
            return min(self.bucket, rows)
        bucket = max(math.ceil(self.slack * values / (2 * width)), math.isqrt(max(0, rows - 1)) + 1)
        while bucket < rows and sum(codebook_rows(rows, bucket)) * width < values:
            bucket += 1
        return min(bucket, rows)

    def train(self, draft: Draft, data: Dataset, run: Run) -> Model:
        """Search from the draft's codebooks, choose as many entries as it keeps, and train these from their start."""
        drafts = [cast("PrunedCodebooks", part) for part in draft.table.compositions]
        search = search_training(run, data, self.search.epochs)
        plain = draft.table.weight().detach()
        softened = [
            self._soft(part, search.steps(len(data.train)), noise(run.seed, "thresholds", i))
            for i, part in enumerate(drafts)
        ]
        net = run.fit("search", draft.with_table(draft.table.with_parts(softened, plain)), data, search)
        found = net.table
        on = self.retrain.values == "found"
        chosen = [
            part.with_keep(soft.choose(self.search.kept(soft.alive(), part.most)), soft.books if on else None)
            for part, soft in zip(drafts, (cast("SoftCodebooks", part) for part in found.compositions), strict=True)
        ]
        if on:
            return run.fit("retrain", net.with_table(found.with_parts(chosen, found.weight().detach())), data)
        start = retraining_model(draft, self.retrain.head, data, run)
        weight = plain if self.retrain.head == "initial" else start.table.weight().detach()
        return run.fit("retrain", start.with_table(draft.table.with_parts(chosen, weight)), data)

    def _soft(self, part: PrunedCodebooks, steps: int, source: torch.Generator) -> SoftCodebooks:
        """The codebooks of a draft, ready for the search."""
        first = self.search.start(part.books.detach())
        thresholds = first * spread_of(part.books.shape, self.spread, source)
        count = NonZeros(self.regulariser, self.gamma, self.eta)
        soft = SoftCodebooks(part, thresholds, self.search.rule(first, steps), count, self.search.every(steps))
        soft.clip = self.search.clip
        return soft
