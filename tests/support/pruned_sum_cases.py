"""Two pruned codebooks, and the same with thresholds."""

from __future__ import annotations

import torch

from pocketrec.families.compositional.pruned_sum import NonZeros, PrunedCodebooks, PrunedSumPlan, SoftCodebooks
from pocketrec.training.hooks import Rule


def books(rows: int = 23, bucket: int = 6, width: int = 4, kept: int = 30, operation="add") -> PrunedCodebooks:
    return PrunedSumPlan(rows, width, bucket, kept, operation).build(torch.Generator().manual_seed(0))


def soft(part: PrunedCodebooks, first: float = -6.0, kind="batch", gamma: float = 1.0, eta: float = 100.0):
    thresholds = torch.full(part.books.shape, first)
    return SoftCodebooks(part, thresholds, Rule(1e-2, 1e-5), NonZeros(kind, gamma, eta), 1)
