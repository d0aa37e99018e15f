"""How much the loss feels a rounded row: expected Fisher information of looked-up vectors.

To second order, an error ``D`` in the vector of row ``i`` adds ``D^T H_i D / 2`` to the mean loss, where ``H_i`` is the
sum over samples of ``p (1 - p) J^T J / N``, with ``J`` the gradient of the sample's logit and ``p`` its probability by
the model: no label is read, and no noise comes from labels. It is kept as ``n + F D^2`` numbers, ``H_i`` about
``trace_i / sum_j trace_j * metric_f``, from which any basis can be chosen later.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pocketrec.attribution.estimators import Stream
from pocketrec.attribution.games import ClickGame, RankingGame
from pocketrec.attribution.lowered import LoweredHead
from pocketrec.attribution.samples import ClickSamples, RankingSamples, Samples, training_rows
from pocketrec.data.dataset import Dataset
from pocketrec.errors import DivergedError
from pocketrec.files import boundary
from pocketrec.models.backbone import ClickModel, Model, RankingModel
from pocketrec.training.steps import Checkpoint

_SAMPLES_AT_ONCE = 1024
_PAIRS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Sensitivity:
    """What errors in a table's rows cost.

    Attributes:
        metric: second moment of the gradients of each field's vectors, float32 ``(F, D, D)``.
        trace: of each row's share in it, float32 ``(n,)``; those of a field add up to the trace of its metric.
    """

    metric: NDArray[np.float32]
    trace: NDArray[np.float32]

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What a run stores."""
        return {"metric": self.metric, "trace": self.trace}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Sensitivity:
        """Read what ``arrays`` wrote."""
        return cls(arrays["metric"], arrays["trace"])


def sensitivity(
    model: Model, data: Dataset, *, samples: int | None, probes: int, seed: int, checkpoint: Checkpoint | None = None
) -> Sensitivity:
    """One pass over the training rows.

    Args:
        model: Click model, or ranking model, whose loss is BPR.
        data: Its data; nothing but training rows is read.
        samples: Training rows to read, at most; by default all.
        probes: Random signs given to the samples of a model that propagates its table, where a sample reads all rows.
        seed: Root of all draws.
        checkpoint: State of an interrupted run, and where to keep it.

    Raises:
        DivergedError: A gradient is not finite.
    """
    split = training_rows(data.train)
    moments = _FisherSums(model, checkpoint)
    if isinstance(model, RankingModel) and model.propagates:
        _propagated(model, RankingSamples(split, samples, seed), probes, seed, moments)
    else:
        clicks = isinstance(model, ClickModel)
        head = LoweredHead.of(model.lower())
        drawn: Samples = (ClickSamples if clicks else RankingSamples)(split, samples, seed)
        _looked_up(ClickGame(head) if clicks else RankingGame(head), model, drawn, moments)
    return moments.result()


class _FisherSums:
    """Running sums; can be stored and taken up again."""

    def __init__(self, model: Model, checkpoint: Checkpoint | None) -> None:
        self.fields = torch.from_numpy(model.schema.field_of_row.astype(np.int64))
        stored = checkpoint.load() if checkpoint is not None else None
        rows, width = model.schema.rows, model.table.width
        self.checkpoint = checkpoint
        self.metric = torch.zeros(model.schema.width, width, width, dtype=torch.float64)
        self.trace, self.done = torch.zeros(rows), 0
        if stored is not None:
            self.metric, self.trace = (torch.from_numpy(np.array(stored[k])) for k in ("metric", "trace"))
            self.done = int(stored["done"][0])

    def add(self, rows: Tensor, fields: Tensor, gradients: Tensor) -> None:
        """One gradient ``(B, P, D)`` for each player row ``(B, P)`` of a sample; players have ``fields (P,)``."""
        products = torch.einsum("bpi,bpj->pij", gradients, gradients)
        self.metric.index_add_(0, fields, products.double())
        self.trace.index_add_(0, rows.reshape(-1), gradients.square().sum(dim=2).reshape(-1))

    def add_table(self, gradients: Tensor) -> None:
        """One gradient of the whole table ``(n, D)``."""
        for field, part in enumerate(gradients.split(torch.bincount(self.fields).tolist())):
            self.metric[field] += (part.T @ part).double()
        self.trace += gradients.square().sum(dim=1)

    def advance(self, count: int) -> None:
        """So many samples or probes are done; store the state if it is time to."""
        self.done += count
        boundary("step")
        if self.checkpoint is not None and self.checkpoint.due():
            done = np.array([self.done])
            self.checkpoint.save({"metric": self.metric.numpy(), "trace": self.trace.numpy(), "done": done})

    def result(self) -> Sensitivity:
        """The means."""
        metric, trace = (self.metric / self.done).float().numpy(), (self.trace / self.done).numpy()
        if not (np.isfinite(metric).all() and np.isfinite(trace).all()):
            raise DivergedError("Gradients must be finite, but the model gives NaN or infinity; train again.")
        return Sensitivity(metric, trace)


def _looked_up(game: ClickGame | RankingGame, model: Model, samples: Samples, moments: _FisherSums) -> None:
    weight = model.table.weight().detach()
    for start in range(moments.done, len(samples), _SAMPLES_AT_ONCE):
        rows = samples.batch(start, min(start + _SAMPLES_AT_ONCE, len(samples)), 0).rows
        moments.add(rows, samples.fields, game.spread(weight[rows]))
        moments.advance(len(rows))


def _propagated(model: RankingModel, samples: RankingSamples, probes: int, seed: int, moments: _FisherSums) -> None:
    """Gradients of all samples at once, each with a random sign: their products have the same expectation."""
    stream = Stream(seed, "probes")
    for probe in range(moments.done, probes):
        weight = model.table.weight().detach().requires_grad_()
        with torch.enable_grad():
            final = model.propagate(weight)
        values, slope = final.detach(), torch.zeros_like(final)
        signs = stream.signs(probe, 1, len(samples))[0]
        for start in range(0, len(samples), _PAIRS_AT_ONCE):
            stop = min(start + _PAIRS_AT_ONCE, len(samples))
            rows = samples.batch(start, stop, 0).rows
            user, positive, negative = (values[rows[:, i]] for i in range(3))
            p = (user * (positive - negative)).sum(dim=1).sigmoid()
            share = torch.where(signs[start:stop] < 0, -1.0, 1.0).mul_((p * (1 - p)).sqrt_()).unsqueeze(1)
            slope.index_add_(0, rows[:, 0], (positive - negative).mul_(share))
            user.mul_(share)
            slope.index_add_(0, rows[:, 1], user)
            slope.index_add_(0, rows[:, 2], user, alpha=-1)
        moments.add_table(torch.autograd.grad(final, weight, slope / len(samples) ** 0.5)[0])
        moments.advance(1)
