"""The only training loop, for click prediction and for ranking.

Batches and noise are pure functions of ``(seed, epoch, step)``, so a killed training goes on from its last checkpoint
and ends with the same bytes. After every epoch the model is judged on the validation split (AUC, or NDCG@20); the
weights of the best epoch are the result. An :class:`~pocketrec.training.hooks.LearningTable` takes part by its hooks.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pocketrec import settings
from pocketrec.data.dataset import Dataset
from pocketrec.errors import ConfigError, DataError, DivergedError
from pocketrec.files import boundary, canonical_json
from pocketrec.format.arrays import buffer
from pocketrec.models.backbone import Model, noise
from pocketrec.models.table import Lookup
from pocketrec.schema import Task
from pocketrec.training.document import read_document
from pocketrec.training.evaluate import validate
from pocketrec.training.hooks import LearningTable
from pocketrec.training.optim import DenseAdam, LazyAdam, Optimizer

if TYPE_CHECKING:
    from pocketrec.training.run import M, Run
    from pocketrec.training.steps import Arrays, Checkpoint


@dataclass(frozen=True)
class Training:
    """Settings of the loop; the plain defaults are those of click prediction.

    ``Training.default("cf")`` differs: 40 epochs, all of them run, and no weight decay (the loss has its own).

    Args:
        epochs: most passes over the training rows, at least 1.
        batch_size: rows of a step, at least 2.
        learning_rate: of Adam, above 0.
        weight_decay: ``lambda`` of Adam's coupled L2 penalty on all parameters, at least 0.
        optimizer: ``adam`` (dense, fused) or ``lazy_adam`` (only the rows of the batch, with catch-up).
        precision: ``fp32``, or ``bf16`` for the matrix products of the loss; weights, moments, losses and every
            evaluation stay fp32.
        patience: epochs without a better validation figure before the loop ends, at least 1.
        shuffle: a new order of rows in each epoch; ``False`` reads them in file order, as published runs do.
        schedule: ``constant`` rate, or ``cosine``: the share ``(1 + cos(pi t / T)) / 2`` of it in step ``t`` of ``T``,
            for dense Adam; parameters whose table gives them a rate of their own keep that.

    Reference:
        Loshchilov and Hutter, SGDR: Stochastic Gradient Descent with Warm Restarts, 2017, equation 5, without restarts.
    """

    version: ClassVar[int] = 1

    epochs: int = 15
    batch_size: int = 2048
    learning_rate: float = 1e-3
    weight_decay: float = 1e-6
    optimizer: Literal["adam", "lazy_adam"] = "adam"
    precision: Literal["fp32", "bf16"] = "fp32"
    patience: int = 2
    shuffle: bool = True
    schedule: Literal["constant", "cosine"] = "constant"

    def __post_init__(self) -> None:
        settings.check(self, epochs=1, batch_size=2, patience=1, weight_decay=0)
        settings.check_above(self, learning_rate=0)
        if self.schedule != "constant" and self.optimizer == "lazy_adam":
            raise ConfigError(
                f"`optimizer='lazy_adam'` catches rows up at a constant rate, but got schedule={self.schedule!r}; "
                "use optimizer='adam'."
            )

    def rate(self, share: float) -> float:
        """The learning rate when a ``share`` in [0, 1] of all steps is done.

        Example:
            >>> Training(learning_rate=0.01, schedule="cosine").rate(0.5)
            0.005
        """
        return self.learning_rate * (0.5 + 0.5 * math.cos(math.pi * share) if self.schedule == "cosine" else 1.0)

    def steps(self, rows: int) -> int:
        """Steps of all epochs over so many training rows.

        Example:
            >>> Training(epochs=3, batch_size=100).steps(250)
            9
        """
        return self.epochs * max(1, math.ceil(rows / self.batch_size))

    @classmethod
    def default(cls, task: Task) -> Training:
        """The settings that a task starts from.

        Example:
            >>> Training.default("cf").epochs
            40
        """
        return cls() if task == "ctr" else cls(epochs=40, weight_decay=0.0, patience=40)


@dataclass(frozen=True)
class Epoch:
    """What one epoch came to: mean training loss, and the validation figure (``None`` where it is not defined)."""

    loss: float
    metric: float | None


@dataclass
class _Position:
    """Where a training stands; with the tensors, all that its future depends on."""

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    best: int = -1
    history: list[Epoch] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> _Position:
        return cls(**{**document, "history": [Epoch(**e) for e in document["history"]]})


def history(path: str | Path) -> list[Epoch]:
    """The epochs of the training in a run's folder."""
    return [Epoch(**e) for e in read_document(Path(path))["history"]]


def fit_step(run: Run, name: str, model: M, data: Dataset, training: Training | Sequence[Training] | None) -> M:
    """See :meth:`pocketrec.training.run.Run.fit`."""
    if training is None:
        training = run.stages(data.schema.task)
    if not isinstance(training, Training):
        for stage in training:
            model = fit_step(run, name, model, data, stage)
        return model
    key = {"model": fingerprint(model), "training": settings.key(training), "data": data.digest}
    computed = False

    def compute(checkpoint: Checkpoint) -> Arrays:
        nonlocal computed
        computed = True
        return fit(run, name, deepcopy(model).to(run.device), data, training, checkpoint)

    arrays = run.once(name, key, compute)
    fitted = deepcopy(model)
    epochs = stored_epochs(arrays["history"])
    if not computed:
        _tell_past(run, name, epochs)
    load_learned(fitted, arrays)
    run.log(stage=name, curve=[[e.loss, e.metric] for e in epochs])
    return fitted


def _tell_past(run: Run, stage: str, epochs: Iterable[Epoch]) -> None:
    """Show whoever watches the epochs that were not trained now, so that it judges as if they were."""
    for number, epoch in enumerate(epochs):
        run.watch(stage, number, epoch.metric)


def fingerprint(model: Model[Lookup]) -> str:
    """SHA-256 over the :func:`~pocketrec.settings.key` of the configuration and every tensor of a model."""
    table = f"{type(model.table).__name__}{model.table.extra_repr()}"
    state = sha256(canonical_json([type(model).__name__, settings.key(model.backbone), table]))
    for name, tensor in model.state_dict(keep_vars=True).items():
        state.update(f"{name}{tuple(tensor.shape)}{tensor.requires_grad}".encode())
        state.update(buffer(tensor.detach().cpu().numpy()))
    return state.hexdigest()


def fit(
    run: Run, stage: str, model: Model[Lookup], data: Dataset, training: Training, checkpoint: Checkpoint
) -> Arrays:
    """Train ``model`` in place; its best learned tensors by name, and ``history (epochs, 2)`` of loss and metric."""
    if len(data.train) == 0:
        raise DataError("Training needs at least one training row, but the split is empty; encode more rows.")
    loop = _Loop(run, stage, model, data, training, checkpoint)
    loop.resume()
    while not loop.finished():
        loop.epoch()
    return loop.result()


class _Loop:
    """One training under way."""

    def __init__(
        self, run: Run, stage: str, model: Model[Lookup], data: Dataset, training: Training, checkpoint: Checkpoint
    ) -> None:
        self.run, self.stage, self.model, self.data = run, stage, model, data
        self.training, self.checkpoint = training, checkpoint
        self.at = _Position()
        self.optimizer = _optimizer(model, training)
        self.per_epoch = max(1, math.ceil(len(data.train) / training.batch_size))
        self.best: dict[str, Tensor] = {}

    def finished(self) -> bool:
        """Whether all epochs are run, or patience is at its end."""
        stale = self.at.epoch - 1 - self.at.best
        return self.at.epoch >= self.training.epochs or (self.at.best >= 0 and stale >= self.training.patience)

    def epoch(self) -> None:
        """The rest of the present epoch, its verdict, and a checkpoint where it is worth one."""
        started = time.monotonic()
        batches = self.model.batches(
            self.data, self.training.batch_size, self.run.seed, self.at.epoch, shuffle=self.training.shuffle
        )
        for batch in islice(batches, self.at.step, None):
            self._step(tuple(t.to(self.run.device) for t in batch))
        self.optimizer.synchronise()
        self._judge(time.monotonic() - started)
        if self.checkpoint.worth():
            self.save()

    def _step(self, batch: tuple[Tensor, ...]) -> None:
        """One update, and a checkpoint where it is due."""
        at = self.at
        with _precision(self.training.precision, self.run.device):
            loss = self._loss(batch)
        value = float(loss.detach())
        self._require_finite("loss", value)
        loss.backward()
        for name, gradient in self.optimizer.gradients():
            self._require_finite(f"gradient of {name}", float(gradient.sum()))
        self._update()
        at.loss_sum += value
        at.step += 1
        boundary("step")
        if self.checkpoint.due():
            self.save()
        self._report(value)

    def _update(self) -> None:
        """The optimiser's step, and what a learning table does before and after it."""
        table, optimizer = self.model.table, self.optimizer
        optimizer.set_rate(self.training.rate(self._done() / (self.training.epochs * self.per_epoch)))
        if not isinstance(table, LearningTable):
            optimizer.step()
            return
        table.before_step(optimizer.table_gradients())
        optimizer.step()
        optimizer.forget(table.forget())
        table.after_step()

    def _loss(self, batch: tuple[Tensor, ...]) -> Tensor:
        """The model's loss, and the table's own term if it has one."""
        at, model = self.at, self.optimizer.model
        random = noise(self.run.seed, "noise", at.epoch, at.step)
        if not isinstance(model.table, LearningTable):
            return model.loss(batch, random)
        drawn = model.table.drawn(noise(self.run.seed, "table", at.epoch, at.step))
        return model.with_table(drawn).loss(batch, random) + model.table.penalty(batch[0], at.epoch)

    def _report(self, loss: float) -> None:
        total = self.training.epochs * self.per_epoch
        self.run.progress(self.stage, self._done(), total, {"epoch": self.at.epoch + 1, "loss": loss})

    def _done(self) -> int:
        """Steps that are done, as if every epoch had ``per_epoch``."""
        return self.at.epoch * self.per_epoch + min(self.at.step, self.per_epoch)

    def _judge(self, seconds: float) -> None:
        """Measure the epoch on the validation split and keep its weights if they are the best so far."""
        at = self.at
        metric = validate(self.model, self.data.valid)
        epoch = Epoch(at.loss_sum / max(1, at.step), metric)
        best = at.history[at.best].metric if at.best >= 0 else None
        at.history.append(epoch)
        lasting = self.model.lasting or (isinstance(self.model.table, LearningTable) and self.model.table.lasting)
        if lasting or metric is None or best is None or metric > best:
            at.best = at.epoch
            self.best = {name: t.detach().clone() for name, t in _learned(self.model).items()}
        self.run.log(stage=self.stage, epoch=at.epoch, seconds=seconds, **asdict(epoch))
        self.run.watch(self.stage, at.epoch, metric)
        at.epoch, at.step, at.loss_sum = at.epoch + 1, 0, 0.0

    def _require_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            broken = [name for name, t in _learned(self.model).items() if not torch.isfinite(t).all()]
            raise DivergedError(
                f"Training diverged at epoch {self.at.epoch + 1}, step {self.at.step + 1}: the {what} is not finite"
                + (f", nor is {broken[0]}" if broken else "")
                + "; lower the learning rate, or look for damaged input."
            )

    def save(self) -> None:
        """Checkpoint: weights, optimiser, best weights, position."""
        groups = {"model": _learned(self.model), "optimizer": self.optimizer.state(), "best": self.best}
        arrays = {f"{group}.{name}": _array(t) for group, tensors in groups.items() for name, t in tensors.items()}
        arrays["position"] = np.frombuffer(canonical_json(self.at.to_json()), dtype=np.uint8)
        self.checkpoint.save(arrays)

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one."""
        arrays = self.checkpoint.load()
        if arrays is None:
            return
        self.at = _Position.from_json(json.loads(arrays["position"].tobytes()))
        load_learned(self.model, _group(arrays, "model"))
        self.optimizer.restore({k: torch.from_numpy(a.copy()) for k, a in _group(arrays, "optimizer").items()})
        self.best = {k: torch.from_numpy(a.copy()) for k, a in _group(arrays, "best").items()}
        _tell_past(self.run, self.stage, self.at.history)

    def result(self) -> Arrays:
        """Best weights by name, and the history."""
        figures = [(e.loss, math.nan if e.metric is None else e.metric) for e in self.at.history]
        return {name: _array(t) for name, t in self.best.items()} | {"history": np.array(figures, dtype=np.float64)}


def _optimizer(model: Model[Lookup], training: Training) -> Optimizer:
    kind = LazyAdam if training.optimizer == "lazy_adam" else DenseAdam
    return kind(model, training.learning_rate, training.weight_decay)


def _precision(precision: str, device: str) -> AbstractContextManager[Any]:
    """Matrix products in bfloat16 inside the block, or nothing."""
    return torch.autocast(torch.device(device).type, torch.bfloat16) if precision == "bf16" else nullcontext()


def _learned(model: Model[Lookup]) -> dict[str, Tensor]:
    """Every tensor that training changes: trainable parameters, and buffers of the head or of a learning table."""
    learning = isinstance(model.table, LearningTable)
    return {
        name: tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if (tensor.requires_grad if isinstance(tensor, nn.Parameter) else learning or not name.startswith("table."))
    }


@torch.no_grad()
def load_learned(model: Model[Lookup], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Copy learned tensors into a model."""
    for name, tensor in _learned(model).items():
        tensor.copy_(torch.from_numpy(np.array(arrays[name])))


def stored_epochs(history: NDArray[np.float64]) -> list[Epoch]:
    """The history as it was, from its array."""
    return [Epoch(loss, None if math.isnan(metric) else metric) for loss, metric in history.tolist()]


def _group(arrays: Arrays, prefix: str) -> Arrays:
    """The arrays of one group, without the group's name."""
    return {name.removeprefix(f"{prefix}."): a for name, a in arrays.items() if name.startswith(f"{prefix}.")}


def _array(tensor: Tensor) -> NDArray[Any]:
    return tensor.detach().cpu().numpy()
