"""Soft thresholds: how they shrink, what lifts them, and the record of what has fallen below them."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pocketrec.errors import ConfigError
from pocketrec.families.pruning import rank_keys


def shrink(values: Tensor, threshold: Tensor) -> Tensor:
    """``sign(e) relu(|e| - sigmoid(s))``; gradients of what is below its threshold are zero.

    Example:
        >>> shrink(torch.tensor([-2.0, 0.4]), torch.zeros(1))
        tensor([-1.5000, 0.0000])
    """
    return values.sign() * torch.relu(values.abs() - threshold.sigmoid())


def first_threshold(values: Tensor) -> float:
    """``s`` at which the threshold is 1/20 of the mean magnitude."""
    return math.log(float(values.abs().mean().clamp_min(1e-12)) / 20)


def rising_rate(first: float, reach: float, steps: int) -> float:
    """The learning rate with which coupled weight decay lifts ``s`` from ``first`` towards ``logit(reach)``.

    Adam normalises the decay's size away: ``s`` rises by one learning rate a step at first. The decay gets smaller as
    ``s`` rises, but the second moment remembers, so that later steps are shorter: from ``-8`` towards ``logit(.3)``
    the search ends at a threshold of about .08.
    """
    return max(1e-6, (math.log(reach / (1 - reach)) - first) / steps)


def check_search(
    start: float | None, reach: float, rate: float | None, decay: float, epochs: int | None, checks: int
) -> None:
    """Raise :class:`~pocketrec.errors.ConfigError` for settings of a search that are out of range."""
    if start is not None and not -math.inf < start < 0:
        raise ConfigError(f"`start` must be below 0, but got start={start}.")
    if not 0 < reach <= 0.5:
        raise ConfigError(f"`reach` must lie in (0, 0.5], but got reach={reach}.")
    for name, value in (("threshold_rate", rate), ("threshold_decay", decay)):
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"`{name}` must be above 0, but got {name}={value}.")
    for name, value in (("search_epochs", epochs), ("checks", checks)):
        if value is not None and value < 1:
            raise ConfigError(f"`{name}` must be at least 1, but got {name}={value}.")


class Falls(nn.Module):
    """Which entries are below their threshold, and since which check; one check at every ``every``-th step.

    ``fallen`` is the number of the check since which an entry has been below (0: it is above), ``margin`` its
    ``|e| - sigmoid(s)`` at that check. One record ranks entries for every size: those still above come first, then
    those that fell last; within a check the margin decides.

    Args:
        shape: of the matrix.
        every: steps between two checks.
    """

    fallen: Tensor
    margin: Tensor
    steps: Tensor

    def __init__(self, shape: tuple[int, int], every: int) -> None:
        super().__init__()
        self.every = every
        self.register_buffer("fallen", torch.zeros(shape, dtype=torch.int32))
        self.register_buffer("margin", torch.zeros(shape))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def observe(self, margins: Callable[[], Tensor]) -> None:
        """Count a step, and check where one is due."""
        self.steps += 1
        step = int(self.steps)
        if step % self.every:
            return
        margin = margins()
        fresh = (margin <= 0) & (self.fallen == 0)
        self.margin[fresh] = margin[fresh]
        self.fallen[fresh] = step // self.every
        self.fallen[margin > 0] = 0

    def keys(self, margin: Tensor) -> NDArray[np.float32]:
        """Ranking keys of all entries, from their present margins and the record."""
        above = (self.fallen == 0).numpy()
        fallen = np.where(above, np.iinfo(np.int32).max, self.fallen.numpy())
        return rank_keys(np.where(above, margin.detach().numpy(), self.margin.numpy()), fallen)

    def alive(self, cells: Tensor) -> NDArray[np.int64]:
        """Entries among ``cells`` above their threshold after 0, 1, ... checks."""
        fallen = np.bincount(self.fallen[cells].numpy(), minlength=int(self.steps) // self.every + 1)
        fallen[0] = 0
        return int(cells.sum()) - np.cumsum(fallen)
