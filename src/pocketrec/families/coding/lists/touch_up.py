"""Touch-up of rankers: what coded users and items share, adjusted until their lists are those of the dense model.

The targets are the dense model's scores at the head of each user's list and in a sample of all items; labels would be
learned by heart. Codes stay as they are, so that the file keeps its size to the byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pocketrec.attribution.list_margin import EDGE, LEAST_GAP, LIST, ListMargin
from pocketrec.data.dataset import Dataset, Split
from pocketrec.evaluation.full_ranking import product_weight
from pocketrec.families.coding.lists.table import TrellisTable
from pocketrec.families.coding.lists.trainable import TrainableTrellisTable
from pocketrec.families.distillation import Inner, Target, better, stages, student_of
from pocketrec.models.backbone import Model
from pocketrec.models.table import Lookup
from pocketrec.randomness import generator
from pocketrec.training.run import Run

RATES = (2e-3, 2e-4)
"""Learning rates of the stages."""
BATCH = 1024
"""Users of a step."""
OTHERS = 1024
"""Items of a step that stand for those not in the lists."""
TEMPERATURE = 0.5
"""Of the softmax over scores, in gaps of a user; chosen on validation."""

_NEWTON_STEPS = 6
_TINY = 1e-20


class Lists(Target):
    """The lists of another model.

    With the dense scores ``s`` of a user and its gap ``s_k - s_5k`` (see :mod:`pocketrec.attribution.list_margin`),
    items have the probabilities ``p = softmax(s / (tau gap))``. The coded scores ``r`` make ``q = softmax(a r)``, and
    the loss is the mean of ``KL(p, q)`` in nats. Lists do not depend on a user's length, so each user has the ``a`` of
    its own least loss. Sums go over the ``5 k`` best items and a sample of all.

    Args:
        dense: the teacher; its scores are inner products of rows of its table.
        margin: the teacher's best items.
    """

    matrix: Tensor
    lists: Tensor
    weight: Tensor

    def __init__(self, dense: Model[Lookup], margin: ListMargin) -> None:
        super().__init__()
        matrix = dense.table.weight().detach().clone()
        self.register_buffer("matrix", matrix)
        weight = product_weight(dense.lower())
        weight = np.ones(matrix.shape[1], np.float32) if weight is None else weight.astype(np.float32)
        self.register_buffer("weight", torch.from_numpy(weight.copy()), persistent=False)
        lists = torch.from_numpy(margin.items[:, : EDGE * LIST].astype(np.int64))
        self.register_buffer("lists", lists, persistent=False)

    def batches(
        self, model: Inner, data: Dataset, batch_size: int, seed: int, epoch: int, shuffle: bool, split: Split | None
    ) -> Iterator[tuple[Tensor, ...]]:
        """``(users (B,),)``, each once; no split is read."""
        users = np.arange(len(self.lists))
        if shuffle:
            users = generator(seed, "order", epoch).permutation(len(users))
        for begin in range(0, len(users), batch_size):
            yield (torch.from_numpy(users[begin : begin + batch_size].copy()),)

    def loss(self, student: Model[Lookup], batch: tuple[Tensor, ...], noise: torch.Generator) -> Tensor:
        """Mean divergence of the student's lists from the teacher's."""
        (users,) = batch
        first, second = student.schema.fields
        items = second.size - second.oov
        own, drawn = self.lists[users], torch.randint(items, (OTHERS,), generator=noise).to(users.device)
        there = own >= 0
        best = own.clamp_min(0)
        with torch.no_grad():
            target = self._scores(self.matrix[first.offset + users], self.matrix[second.offset :], best, drawn)
            target = target / (TEMPERATURE * _gaps(target[:, : own.shape[1]], there))
            known = there.float().log()
            counts = torch.cat([known, known.new_full((len(users), OTHERS), np.log(items / OTHERS))], dim=1)
            logs = (target + counts).log_softmax(dim=1)
            p = logs.exp()
        found = self._scores(*cast("TrainableTrellisTable", student.table).vectors(users), best, drawn)
        own_logs = (logit_scale(found.detach(), p, counts) * found + counts).log_softmax(dim=1)
        return torch.where(p > 0, p * (logs - own_logs), 0.0).sum(dim=1).mean()

    def _scores(self, users: Tensor, items: Tensor, best: Tensor, drawn: Tensor) -> Tensor:
        """Scores of the best items ``(B, K)`` and of those drawn ``(N,)``: ``(B, K + N)``."""
        users = users * self.weight
        own = torch.bmm(F.embedding(best, items), users[:, :, None])[:, :, 0]
        return torch.cat([own, users @ F.embedding(drawn, items).T], dim=1)


def logit_scale(scores: Tensor, p: Tensor, counts: Tensor) -> Tensor:
    """By which scores ``(B, K)`` are multiplied for least divergence of their softmax from ``p``: ``(B, 1)``.

    Newton's method in one variable, in which the divergence is convex; no step more than halves or doubles it.
    """
    mean = (p * scores).sum(dim=1, keepdim=True)
    grow = 1 / (p * (scores - mean).square()).sum(dim=1, keepdim=True).clamp_min(_TINY).sqrt()
    for _ in range(_NEWTON_STEPS):
        q = (grow * scores + counts).softmax(dim=1)
        own = (q * scores).sum(dim=1, keepdim=True)
        slope = (q * (scores - own).square()).sum(dim=1, keepdim=True)
        grow = grow * (1 + (mean - own) / (grow * slope).clamp_min(_TINY)).clamp(0.5, 2)
    return grow


def _gaps(scores: Tensor, there: Tensor) -> Tensor:
    """What ``s_k - s_5k`` is among a user's best items ``(B, K)``, a small part of the mean at least: ``(B, 1)``."""
    last = there.sum(dim=1, keepdim=True).sub(1).clamp_min(0)
    bar, edge = (scores.gather(1, last.clamp_max(place - 1)) for place in (LIST, EDGE * LIST))
    return (bar - edge).clamp_min(max(LEAST_GAP * float((bar - edge).mean()), _TINY))


def touch_up_lists(model: Model, dense: Model, margin: ListMargin, data: Dataset, run: Run, epochs: int) -> Model:
    """The model after training against the dense one, or as it was where validation says that this is better.

    Args:
        model: around a :class:`~pocketrec.families.coding.lists.table.TrellisTable`.
        dense: the teacher.
        margin: the teacher's best items.
        data: its validation rows are read.
        run: keeps the result.
        epochs: most of each stage.

    Returns:
        A model of the same codes: its file has the same size.
    """
    coded = cast("TrellisTable", model.table)
    student = student_of(dense, TrainableTrellisTable(coded), Lists(dense, margin))
    fitted = run.fit("touch-up", student, data, stages(epochs, BATCH, RATES))
    return better(model, model.with_table(fitted.table.settled(coded)), data)
