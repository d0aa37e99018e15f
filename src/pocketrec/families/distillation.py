"""Imitation: a computed table learns the vectors of a trained one, before the loss of its own goes on with it.

A network that computes vectors needs hundreds of passes before they are any good, and each pass of a ranking model
computes all of them. To fit given vectors needs those of a batch only, so that this start costs a fraction.

A model that propagates may imitate what comes of the rows instead, ``P e``: many tables have nearly the same final
vectors, and a small one comes closer to these than to any table in particular. That reads the whole table in each step,
but a few hundred such steps are worth several epochs of training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from hashlib import sha256
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from pocketrec.data.dataset import Dataset
from pocketrec.errors import UnsupportedOp
from pocketrec.families.retraining import Goal, Start
from pocketrec.format.program import Program
from pocketrec.models.backbone import ClickModel, Model, RankingModel
from pocketrec.models.table import Table
from pocketrec.packed import Index, Packed, Storage
from pocketrec.training.evaluate import validate
from pocketrec.training.loop import Training
from pocketrec.training.run import Run

if TYPE_CHECKING:
    from pocketrec.data.dataset import Dataset
    from pocketrec.training.loop import Training


COOLING = 5
"""By how much the learning rate falls for the last quarter of the epochs."""

STEPS = 50
"""Steps of an epoch in which final vectors are imitated; each reads the whole table."""


def lessons(start: Start, rate: float, first: Training) -> tuple[Training, ...]:
    """The stages in which a ``taught`` table learns.

    Args:
        start: how long, and how fast.
        rate: the method's learning rate, where the start says none.
        first: stage of the training that follows, of which batches and precision are taken.
    """
    last, fast = start.epochs // 4, rate if start.rate is None else start.rate
    parts = ((start.epochs - last, fast), (last, fast / COOLING))
    return tuple(
        replace(first, epochs=n, patience=n, learning_rate=rate, weight_decay=0.0, optimizer="adam")
        for n, rate in parts
        if n
    )


def imitated(
    name: str,
    draft: Model,
    target: Tensor,
    data: Dataset,
    run: Run,
    stages: tuple[Training, ...],
    goal: Goal = "rows",
) -> Model:
    """``draft`` with the table that has learned ``target (n, D)``, or its final vectors; its head as it is."""
    if isinstance(draft, ClickModel):
        student: Imitation = ImitatedClicks(draft, target)
    elif goal == "final":
        student = ImitatedFinals(draft, cast("RankingModel", draft).propagate(target))
    else:
        student = ImitatedRanks(draft, target)
    return draft.with_table(run.fit(f"{name}-imitation", student, data, stages).table)


class Imitation(Model):
    """A model whose table learns the rows of a matrix, by how often the training meets them; the head rests.

    The loss is the mean squared error of the rows of a batch, as a share of the matrix's mean square.

    Args:
        student: around the table that learns; it is left as it is.
        target: ``(n, D)``.
    """

    lasting = True

    target: Tensor
    digest: Tensor

    def __init__(self, student: Model, target: Tensor) -> None:
        super().__init__()
        self.backbone = student.backbone
        self.schema = student.schema
        self.table = student.table
        headed = student.with_table(student.table)
        del headed.table
        self.student = deepcopy(headed).requires_grad_(False)
        self.register_buffer("target", target, persistent=False)
        content = sha256(target.numpy().tobytes()).digest()
        self.register_buffer("digest", torch.frombuffer(bytearray(content), dtype=torch.uint8))

    def batches(
        self, data: Dataset, batch_size: int, seed: int, epoch: int, *, shuffle: bool = True
    ) -> Iterator[tuple[Tensor, ...]]:
        """Those of the student."""
        return self.student.batches(data, batch_size, seed, epoch, shuffle=shuffle)

    def loss(self, batch: tuple[Tensor, ...], noise: torch.Generator) -> Tensor:
        """``mean (e_i - t_i)^2 / mean t^2`` over the ids ``i`` of a batch."""
        ids = batch[0].long()
        return (self.table(ids).float() - self.target[ids]).square().mean() / self.target.square().mean()

    def lower(self) -> Program:
        """The student's head."""
        return self.student.lower()


class ImitatedClicks(Imitation, ClickModel):
    """A click model's imitation."""

    def head(self, vectors: Tensor, noise: torch.Generator | None = None) -> Tensor:
        """The student's logits ``(B,)``."""
        return cast("ClickModel", self.student).head(vectors)


class ImitatedRanks(Imitation, RankingModel):
    """A ranking model's imitation."""

    def propagate(self, weight: Tensor) -> Tensor:
        """The student's final rows."""
        return cast("RankingModel", self.student).propagate(weight)

    def scores(self, users: Tensor, items: Tensor) -> Tensor:
        """The student's scores."""
        return cast("RankingModel", self.student).scores(users, items)


class ImitatedFinals(ImitatedRanks):
    """A ranking model's imitation of final vectors: ``mean (P e - z)^2 / mean z^2`` over all rows in each step."""

    def batches(
        self, data: Dataset, batch_size: int, seed: int, epoch: int, *, shuffle: bool = True
    ) -> Iterator[tuple[Tensor, ...]]:
        """Nothing to look up, ``STEPS`` times."""
        nothing = torch.empty(0, 0, dtype=torch.int64)
        return ((nothing,) for _ in range(STEPS))

    def loss(self, batch: tuple[Tensor, ...], noise: torch.Generator) -> Tensor:
        """The error as a share of the target's mean square; no rows are drawn."""
        return (self.propagate(self.table.weight()) - self.target).square().mean() / self.target.square().mean()


M = TypeVar("M", bound=Model)


class Unsettled(Table):
    """A table being touched up, which has no file form."""

    def pack(
        self, storage: Storage = "fp32", rows: NDArray[np.int64] | None = None, index: Index = "compact"
    ) -> Packed:
        """Raises :class:`~pocketrec.errors.UnsupportedOp`."""
        raise UnsupportedOp("A table being touched up has no file form; settle it first.")


class Distilled(ClickModel):
    """A model that learns the probabilities of another one, in evaluation mode: no dropout, fixed batch norms.

    The loss is the mean cross-entropy of ``sigmoid(teacher)`` and the student's logit. Scalars of the head stay: a file
    has them in its header, whose length they would change.

    Args:
        student: whose head is trained; it is left as it is.
        table: what else is trained.
        teacher: the dense model.
    """

    def __init__(self, student: ClickModel, table: Table, teacher: ClickModel) -> None:
        super().__init__()
        self.backbone = student.backbone
        self.schema = student.schema
        self.table = table
        headed = student.with_table(table)
        del headed.table
        self.student = deepcopy(headed)
        for parameter in self.student.parameters():
            parameter.requires_grad_(parameter.ndim > 0)
        self.teacher = deepcopy(teacher).requires_grad_(False)

    def head(self, vectors: Tensor, noise: torch.Generator | None = None) -> Tensor:
        """``(B, F, D) -> (B,)`` logits, always in evaluation mode."""
        return self.student.head(vectors)

    def loss(self, batch: tuple[Tensor, ...], noise: torch.Generator) -> Tensor:
        """Mean cross-entropy in nats against the teacher; labels are not read."""
        with torch.no_grad():
            target = self.teacher(batch[0]).sigmoid()
        return F.binary_cross_entropy_with_logits(self(batch[0]), target)

    def lower(self) -> Program:
        """The student's head."""
        return self.student.lower()


def stages(epochs: int, batch_size: int, rates: Sequence[float]) -> list[Training]:
    """At most ``epochs`` at each of the learning rates."""
    return [
        Training(epochs=epochs, batch_size=batch_size, learning_rate=rate, weight_decay=0.0, patience=2)
        for rate in rates
    ]


def better(model: M, touched: M, data: Dataset) -> M:
    """The touched model where validation says that it is better, or has nothing to say."""
    before, after = validate(model, data.valid), validate(touched, data.valid)
    return model if before is not None and after is not None and before >= after else touched
