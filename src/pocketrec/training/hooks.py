"""Hooks of a table that takes part in its own training: what the loop asks it besides look-ups."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pocketrec.models.table import Lookup


@dataclass(frozen=True)
class Rule:
    """How one parameter of a table is updated, instead of as ``Training`` says for the rest of the model.

    Args:
        learning_rate: step size; ``None`` for that of the training.
        weight_decay: ``lambda`` of the coupled L2 penalty, at least 0.
        kind: ``adam``, or ``sgd`` without momentum.
    """

    learning_rate: float | None = None
    weight_decay: float = 0.0
    kind: Literal["adam", "sgd"] = "adam"


class LearningTable(Lookup, ABC):
    """A table with something to say in its training; every hook has a default that says nothing.

    Its buffers are learned as its parameters are: they are kept with every checkpoint and with the result. Settings
    that training depends on belong into ``extra_repr``, which is a part of the model's fingerprint.

    A step asks, in this order: ``drawn`` and ``penalty`` for the loss, ``before_step``, the update of all weights by
    their ``rules``, ``forget``, ``after_step``. Checkpoints lie between two steps. Lazy Adam trains the matrix of a
    :class:`~pocketrec.models.table.DenseTable` row by row and asks only ``before_step``, ``forget`` and ``after_step``.

    Attributes:
        lasting: whether the result is the state after the last epoch, instead of the best one on validation, and
            training never ends early.
        clip: the largest norm of the whole model's gradient; 0 does not clip.
    """

    lasting: bool = False
    clip: float = 0.0

    def drawn(self, noise: torch.Generator) -> Lookup:
        """The table of one training step, on the same weights; ``noise`` is its only source of randomness."""
        return self

    def penalty(self, ids: Tensor, epoch: int) -> Tensor | float:
        """The table's own term of the loss for a batch of ids ``(B, C)``."""
        return 0.0

    def rules(self) -> Mapping[str, Rule]:
        """Parameters with a rule of their own, by their names in the table."""
        return {}

    def before_step(self, gradients: Mapping[str, Tensor]) -> None:
        """Look at the gradients of its parameters before each update, by their names in the table.

        They are those of the loss: without weight decay, not yet clipped, and not to be changed. That of a matrix under
        lazy Adam is sparse (coalesced), with the rows that the batch has read.
        """

    def forget(self) -> Mapping[str, Tensor]:
        """Rows ``(k,)`` of its parameters, by name, whose moments become zero after each update.

        That is what they were before the first step; the number of steps goes on.
        """
        return {}

    def after_step(self) -> None:
        """Look at the weights after each update; may change its parameters and buffers, in place.

        Under lazy Adam only rows that the batch has read, or that were forgotten, are up to date and may be changed.
        """
