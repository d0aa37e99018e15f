"""Distillation: students that learn what another model says, instead of the labels.

In imitation a computed table learns the vectors of a trained one, before the loss of its own goes on with it.

A network that computes vectors needs hundreds of passes before they are any good, and each pass of a ranking model
computes all of them. To fit given vectors needs those of a batch only, so that this start costs a fraction.

A model that propagates may imitate what comes of the rows instead, ``P e``: many tables have nearly the same final
vectors, and a small one comes closer to these than to any table in particular. That reads the whole table in each step,
but a few hundred such steps are worth several epochs of training.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from hashlib import sha256
from typing import Any, Generic, cast

import torch
from torch import Tensor, nn
from typing_extensions import TypeVar

from pocketrec.data.dataset import Dataset, Split
from pocketrec.errors import UnsupportedOp
from pocketrec.families.retraining import Goal, Start
from pocketrec.format.program import Program
from pocketrec.models.backbone import ClickModel, L, Model, RankingModel, T_co
from pocketrec.models.table import Lookup
from pocketrec.training.evaluate import validate
from pocketrec.training.loop import Training
from pocketrec.training.run import Run

Inner = Model[Lookup]
"""The model inside a :class:`Student`."""

I_co = TypeVar("I_co", bound=Model[Lookup], default=Model[Lookup], covariant=True)
"""The model inside a student."""

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
    draft: Model[L],
    target: Tensor,
    data: Dataset,
    run: Run,
    stages: tuple[Training, ...],
    goal: Goal = "rows",
) -> Model[L]:
    """A model whose table has learned the rows of another one, or the final vectors; its head rests.

    Args:
        name: Of the method.
        draft: The model around the table that learns; it is left as it is.
        target: Rows of the trained table, ``(n, D)``.
        data: Training and validation rows.
        run: Keeps the result.
        stages: Of the training.
        goal: See :class:`~pocketrec.families.retraining.Start`.

    Returns:
        ``draft`` around the table that has learned.
    """
    lesson = TableRows(target)
    if goal == "final" and isinstance(draft, RankingModel):
        lesson = FinalVectors(draft.propagate(target))
    student = student_of(draft, draft.table, lesson)
    return draft.with_table(run.fit(f"{name}-imitation", student, data, stages).table)


class Target(nn.Module, ABC):
    """What a :class:`Student` learns: the loss, and its batches. Its tensors are a part of what identifies a training.

    Attributes:
        lasting: whether the student ends with the weights of its last epoch, not of the best one on validation.
    """

    lasting: bool = False

    def batches(
        self, model: Inner, data: Dataset, batch_size: int, seed: int, epoch: int, shuffle: bool, split: Split | None
    ) -> Iterator[tuple[Tensor, ...]]:
        """By default those of the model inside the student; see :meth:`pocketrec.models.backbone.Model.batches`."""
        return model.batches(data, batch_size, seed, epoch, shuffle=shuffle, split=split)

    @abstractmethod
    def loss(self, student: Model[Lookup], batch: tuple[Tensor, ...], noise: torch.Generator) -> Tensor:
        """How far the student is from the target on a batch; labels are not read."""


class Student(Model[T_co], Generic[T_co, I_co]):
    """A model that learns a target instead of the labels; head, propagation and scores are those of a model inside.

    The inner model rests: its parameters are not trained unless they are told to require a gradient again. It is always
    in evaluation mode, without dropout and with fixed batch norms.

    Args:
        inner: the model whose head it has; it is left as it is.
        table: what is trained.
        target: what is learned.
    """

    inner: I_co

    def __init__(self, inner: I_co, table: T_co, target: Target) -> None:
        super().__init__()
        self.backbone, self.schema, self.table = inner.backbone, inner.schema, table
        self.lasting = target.lasting
        headed: Any = inner.with_table(table)
        del headed.table
        self.inner = deepcopy(headed).requires_grad_(False)
        self.target = target

    def batches(
        self, data: Dataset, batch_size: int, seed: int, epoch: int, *, shuffle: bool = True, split: Split | None = None
    ) -> Iterator[tuple[Tensor, ...]]:
        """Those of the target."""
        return self.target.batches(self.inner, data, batch_size, seed, epoch, shuffle, split)

    def loss(self, batch: tuple[Tensor, ...], noise: torch.Generator) -> Tensor:
        """That of the target."""
        return self.target.loss(self, batch, noise)

    def lower(self) -> Program:
        """The head of the model inside."""
        return self.inner.lower()


class ClickStudent(Student[T_co, ClickModel[Lookup]], ClickModel[T_co]):
    """A click model that learns a target."""

    def head(self, vectors: Tensor, noise: torch.Generator | None = None) -> Tensor:
        """``(B, F, D) -> (B,)`` logits, always in evaluation mode."""
        return self.inner.head(vectors)


class RankingStudent(Student[T_co, RankingModel[Lookup]], RankingModel[T_co]):
    """A ranking model that learns a target."""

    def propagate(self, weight: Tensor) -> Tensor:
        """Final rows, as the model inside makes them."""
        return self.inner.propagate(weight)

    def scores(self, users: Tensor, items: Tensor) -> Tensor:
        """Scores of the model inside."""
        return self.inner.scores(users, items)


def student_of(inner: Model[Lookup], table: L, target: Target) -> ClickStudent[L] | RankingStudent[L]:
    """The student for a kind of model; see :class:`Student`."""
    if isinstance(inner, ClickModel):
        return ClickStudent(inner, table, target)
    if isinstance(inner, RankingModel):
        return RankingStudent(inner, table, target)
    raise UnsupportedOp(f"Only click models and ranking models can learn a target, but got {type(inner).__name__}.")


class TableRows(Target):
    """The rows of a matrix, by how often the training meets them.

    The loss is the mean squared error of the rows of a batch, as a share of the matrix's mean square.

    Args:
        matrix: ``(n, D)``.
    """

    lasting = True

    matrix: Tensor
    digest: Tensor

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix, persistent=False)
        content = sha256(matrix.numpy().tobytes()).digest()
        self.register_buffer("digest", torch.frombuffer(bytearray(content), dtype=torch.uint8))

    def loss(self, student: Model[Lookup], batch: tuple[Tensor, ...], noise: torch.Generator) -> Tensor:
        """``mean (e_i - t_i)^2 / mean t^2`` over the ids ``i`` of a batch."""
        ids = batch[0].long()
        return (student.table(ids).float() - self.matrix[ids]).square().mean() / self.matrix.square().mean()


class FinalVectors(TableRows):
    """The final vectors of a ranking model: ``mean (P e - z)^2 / mean z^2`` over all rows in each step."""

    def batches(
        self, model: Inner, data: Dataset, batch_size: int, seed: int, epoch: int, shuffle: bool, split: Split | None
    ) -> Iterator[tuple[Tensor, ...]]:
        """Nothing to look up, ``STEPS`` times."""
        nothing = torch.empty(0, 0, dtype=torch.int64)
        return ((nothing,) for _ in range(STEPS))

    def loss(self, student: Model[Lookup], batch: tuple[Tensor, ...], noise: torch.Generator) -> Tensor:
        """The error as a share of the target's mean square; no rows are drawn."""
        final = cast("RankingStudent[Lookup]", student).propagate(student.table.weight())
        return (final - self.matrix).square().mean() / self.matrix.square().mean()


M = TypeVar("M", bound=Model)


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
