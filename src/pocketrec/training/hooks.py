"""Tables that take part in their own training: what the loop asks them besides look-ups."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pocketrec.models.table import Table


@dataclass(frozen=True)
class Rule:
    """How one parameter of a table is updated, instead of as ``Training`` says for the rest of the model.

    Args:
        learning_rate: step size.
        weight_decay: ``lambda`` of the coupled L2 penalty, at least 0.
        kind: ``adam``, or ``sgd`` without momentum.
    """

    learning_rate: float
    weight_decay: float = 0.0
    kind: Literal["adam", "sgd"] = "adam"


class ActiveTable(Table, ABC):
    """A table with something to say in its training; every hook has a default that says nothing.

    Its buffers are learned as its parameters are: they are kept with every checkpoint and with the result. Settings
    that training depends on belong into ``extra_repr``, which is a part of the model's fingerprint.

    Attributes:
        lasting: whether the result is the state after the last epoch, instead of the best one on validation, and
            training never ends early.
        clip: the largest norm of the whole model's gradient; 0 does not clip.
    """

    lasting: bool = False
    clip: float = 0.0

    def drawn(self, noise: torch.Generator) -> Table:
        """The table of one training step, on the same weights; ``noise`` is its only source of randomness."""
        return self

    def penalty(self, ids: Tensor, epoch: int) -> Tensor | float:
        """The table's own term of the loss for a batch of ids ``(B, C)``."""
        return 0.0

    def rules(self) -> Mapping[str, Rule]:
        """Parameters with a rule of their own, by their names in the table."""
        return {}

    def observe(self) -> None:
        """Look at the weights after each step; may change buffers."""
