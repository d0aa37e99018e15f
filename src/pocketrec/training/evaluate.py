"""The validation figure of a model: AUC, or NDCG@20."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from pocketrec.data.dataset import Split
from pocketrec.errors import ConfigError
from pocketrec.evaluation.metrics import auc, mean_ndcg
from pocketrec.models.backbone import ClickModel, Model, RankingModel
from pocketrec.models.table import Lookup

EVALUATION_ROWS = 8192
"""Rows per block when a click model is judged; no figure depends on it."""


def validate(model: Model[Lookup], split: Split) -> float | None:
    """AUC of a click model, NDCG@20 of a ranking model; ``None`` where the split is empty or has one class."""
    if len(split) == 0:
        return None
    if isinstance(model, ClickModel) and split.labels is not None:
        return auc(split.labels, logits(model, split))
    if isinstance(model, RankingModel):
        return _ndcg(model, split)
    raise ConfigError(f"Expected a ranking model, or a click model with labels, but got {type(model).__name__}.")


@torch.no_grad()
def logits(model: ClickModel[Lookup], split: Split) -> NDArray[np.float32]:
    """Logits of every row of a split, ``(N,)``, in evaluation mode."""
    device = next(model.parameters()).device
    blocks = [
        model(torch.from_numpy(split.ids[start : start + EVALUATION_ROWS].copy()).to(device)).cpu().numpy()
        for start in range(0, len(split), EVALUATION_ROWS)
    ]
    return np.concatenate(blocks)


@torch.no_grad()
def _ndcg(model: RankingModel[Lookup], split: Split) -> float | None:
    """Mean NDCG@20 over users with a validation item; training items are not ranked."""
    vectors = model.propagate(model.table.weight()).cpu().numpy()
    users = split.dataset.schema.fields[0].size
    return mean_ndcg(
        vectors[:users], vectors[users:], split.wanted, head=model.lower(), threads=torch.get_num_threads()
    )
