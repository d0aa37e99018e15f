"""Optimisers: dense Adam, and lazy Adam, which follows the same rule but touches only the rows that a batch reads."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pocketrec.errors import ConfigError, UnsupportedOp
from pocketrec.models.backbone import Model
from pocketrec.models.table import DenseTable, Lookup
from pocketrec.training.hooks import LearningTable
from pocketrec.training.row_adam import BETAS, EPS, RowAdam, RowState

TABLE = "table."
"""Before the names of the table's parameters in those of the model."""

SYNCHRONISE_ROWS = 1 << 16
"""Rows that are brought up to date at a time: a bound on memory."""


class Optimizer(ABC):
    """Minimises the loss of ``model``: compute it, call ``backward`` on it, then ``step``.

    ``model`` is the model on which the loss must be computed; it shares all weights with the one given.
    """

    model: Model[Lookup]

    @abstractmethod
    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Name and gradient of every tensor that the last ``backward`` reached."""

    @abstractmethod
    def table_gradients(self) -> dict[str, Tensor]:
        """Gradients of the table's parameters, by their names in the table."""

    @abstractmethod
    def step(self) -> None:
        """Update the weights from the gradients, and forget these."""

    @abstractmethod
    def set_rate(self, learning_rate: float) -> None:
        """The learning rate from the next step on, but for parameters that have a rate of their own."""

    @abstractmethod
    def forget(self, rows: Mapping[str, Tensor]) -> None:
        """Bring rows ``(k,)`` of the table's parameters up to date and make their moments zero."""

    @abstractmethod
    def synchronise(self) -> None:
        """Make the weights what they would be if every step had updated all of them."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """All that the next step depends on besides the weights; ``restore`` takes it back."""

    @abstractmethod
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what ``state`` returned."""


class DenseAdam(Optimizer):
    """Adam with coupled weight decay on all trainable parameters, in one fused pass.

    An :class:`~pocketrec.training.hooks.LearningTable` may have other rules for some of its parameters.

    Args:
        model: the model to train.
        learning_rate: step size, above 0.
        weight_decay: ``lambda``, at least 0.

    Reference:
        Adam: A Method for Stochastic Optimization, 2015, algorithm 1.
    """

    def __init__(self, model: Model[Lookup], learning_rate: float, weight_decay: float) -> None:
        self.model = model
        self._named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        table = model.table
        rules = table.rules() if isinstance(table, LearningTable) else {}
        self._clip = table.clip if isinstance(table, LearningTable) else 0.0
        own = {TABLE + name: rule for name, rule in rules.items()}
        common = [p for name, p in self._named.items() if name not in own]
        self._adam = _fused_adam(common, learning_rate, weight_decay)
        self._scheduled = list(self._adam.param_groups)
        for name, rule in own.items():
            if rule.kind == "adam":
                rate = learning_rate if rule.learning_rate is None else rule.learning_rate
                group = {"params": [self._named[name]], "lr": rate, "weight_decay": rule.weight_decay}
                self._adam.add_param_group(group)
                if rule.learning_rate is None:
                    self._scheduled.append(self._adam.param_groups[-1])
        self._plain = [(self._named[name], rule) for name, rule in own.items() if rule.kind == "sgd"]
        self._rate = learning_rate

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Gradients of the last ``backward``."""
        return ((name, p.grad) for name, p in self._named.items() if p.grad is not None)

    def table_gradients(self) -> dict[str, Tensor]:
        """Those of the last ``backward``."""
        return {name.removeprefix(TABLE): g for name, g in self.gradients() if name.startswith(TABLE)}

    def step(self) -> None:
        """Update the weights."""
        if self._clip > 0:
            nn.utils.clip_grad_norm_(self._named.values(), self._clip)
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        for parameter, rule in self._plain:
            _descend(parameter, self._rate if rule.learning_rate is None else rule.learning_rate, rule.weight_decay)

    def set_rate(self, learning_rate: float) -> None:
        """Set it in every group that follows the training's."""
        self._rate = learning_rate
        for group in self._scheduled:
            group["lr"] = learning_rate

    def forget(self, rows: Mapping[str, Tensor]) -> None:
        """Zero the moments of single rows; plain descent has none."""
        _forget(self._adam, self._named, rows)

    def synchronise(self) -> None:
        """Nothing is ever late."""

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts."""
        return _moments(self._adam, self._named)

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what ``state`` returned."""
        _restore_moments(self._adam, self._named, state)


class LazyAdam(Optimizer):
    """Adam that touches only the rows a batch reads, with closed-form catch-up; dense on the head.

    Cost and memory traffic of a step do not depend on the number of rows. See :mod:`pocketrec.training.row_adam` for
    the rule.

    Args:
        model: a model around a :class:`~pocketrec.models.table.DenseTable` that looks rows up.
        learning_rate: step size, above 0.
        weight_decay: ``lambda``, at least 0.

    Raises:
        ConfigError: the table is not dense, or has more to say in its training than a row can be told.
        UnsupportedOp: the model asks for the whole table, as graph models do.
    """

    def __init__(self, model: Model[Lookup], learning_rate: float, weight_decay: float) -> None:
        if not isinstance(model.table, DenseTable):
            raise ConfigError(
                f"`optimizer='lazy_adam'` needs a DenseTable, but the model has a {type(model.table).__name__}; "
                "use 'adam'."
            )
        _require_plain(model.table)
        self._table = RowState.start(model.table.matrix.detach())
        self._rows = RowAdam(self._table, learning_rate, weight_decay)
        self._steps = 0
        self._reads: list[_Read] = []
        self.model = model.with_table(_Lookups(model.table, self))
        self._named = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        self._adam = _fused_adam(list(self._named.values()), learning_rate, weight_decay)

    def read(self, ids: Tensor) -> Tensor:
        """Vectors ``(..., D)`` of ids ``(...)``, brought up to date; a leaf whose gradient ``step`` applies."""
        rows, place = self._rows.distinct(ids)
        self._rows.catch_up(rows, self._steps)
        vectors = F.embedding(ids, self._table.weight).requires_grad_()
        self._reads.append(_Read(ids, rows, place, vectors))
        return vectors

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Gradients of the last ``backward``."""
        yield from ((name, p.grad) for name, p in self._named.items() if p.grad is not None)
        yield from (("table.matrix", r.vectors.grad) for r in self._reads if r.vectors.grad is not None)

    def table_gradients(self) -> dict[str, Tensor]:
        """``matrix``: sparse ``(n, D)``, with the rows that were read."""
        shape = self._table.weight.shape
        if not (read := self._with_gradients()):
            return {}
        rows, place, gradients = self._gradient(read)
        sums = gradients.new_zeros(len(rows), shape[1])
        sums.index_add_(0, place.flatten().long(), gradients.reshape(-1, shape[1]))
        return {"matrix": torch.sparse_coo_tensor(rows[None], sums, shape, check_invariants=False).coalesce()}

    def _with_gradients(self) -> list[tuple[_Read, Tensor]]:
        """Look-ups that the last ``backward`` reached."""
        return [(r, r.vectors.grad) for r in self._reads if r.vectors.grad is not None]

    def step(self) -> None:
        """Update the head and the rows that were read."""
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        self._steps += 1
        if read := self._with_gradients():
            self._rows.update(*self._gradient(read), self._steps)
        self._reads.clear()

    def _gradient(self, read: list[tuple[_Read, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
        """Distinct rows ``(U,)``, and the gradients ``(..., D)`` with their places in them."""
        if len(read) == 1:
            [(only, gradient)] = read
            return only.rows, only.place, gradient
        rows, place = self._rows.distinct(torch.cat([r.ids.flatten() for r, _ in read]))
        return rows, place, torch.cat([gradient.flatten(0, -2) for _, gradient in read])

    def set_rate(self, learning_rate: float) -> None:
        """Refuse another rate than that of the start, at which rows are caught up."""
        if learning_rate != self._rows.learning_rate:
            raise UnsupportedOp(
                f"Lazy Adam catches rows up at the constant rate {self._rows.learning_rate:g}, but got "
                f"{learning_rate:g}; use optimizer='adam'."
            )

    def forget(self, rows: Mapping[str, Tensor]) -> None:
        """Bring rows of the matrix up to date, and zero their moments."""
        if (which := rows.get("matrix")) is not None:
            distinct = which.long().unique()
            self._rows.catch_up(distinct, self._steps)
            self._table.first.index_fill_(0, distinct, 0.0)
            self._table.second.index_fill_(0, distinct, 0.0)
        _forget(self._adam, self._named, {name: r for name, r in rows.items() if name != "matrix"})

    def synchronise(self) -> None:
        """Bring every row up to date, in blocks of rows."""
        for rows in torch.arange(len(self._table.weight), device=self._table.weight.device).split(SYNCHRONISE_ROWS):
            self._rows.catch_up(rows, self._steps)

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts."""
        table = {name: getattr(self._table, name) for name in ("first", "second", "updated")}
        return {
            **_moments(self._adam, self._named),
            **{f"table.{name}": tensor for name, tensor in table.items()},
            "steps": torch.tensor(self._steps),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Take back what ``state`` returned."""
        _restore_moments(self._adam, self._named, state)
        self._table.first.copy_(state["table.first"])
        self._table.second.copy_(state["table.second"])
        self._table.updated.copy_(state["table.updated"])
        self._steps = int(state["steps"])


def _require_plain(table: DenseTable) -> None:
    """Refuse a table whose training needs more than its rows, one by one."""
    learning = isinstance(table, LearningTable) and (
        type(table).drawn is not LearningTable.drawn
        or type(table).penalty is not LearningTable.penalty
        or bool(table.rules())
        or table.clip > 0
    )
    if learning or type(table).forward is not DenseTable.forward:
        raise ConfigError(
            f"`optimizer='lazy_adam'` trains single rows of a matrix by one rule, but {type(table).__name__} looks up, "
            "draws, penalises, clips or updates in its own way; use 'adam'."
        )


@dataclass(frozen=True)
class _Read:
    """One look-up: the ids, the distinct rows among them, the place of each id in these, and the vectors."""

    ids: Tensor
    rows: Tensor
    place: Tensor
    vectors: Tensor


class _Lookups(Lookup):
    """A dense table seen through a lazy optimiser: rows are brought up to date when they are read."""

    def __init__(self, table: DenseTable, optimizer: LazyAdam) -> None:
        super().__init__()
        self.schema, self.blocks, self._optimizer = table.schema, table.blocks, optimizer

    def forward(self, ids: Tensor) -> Tensor:
        """Look up: ``(...) -> (..., D)``."""
        return self._optimizer.read(ids)

    def weight(self) -> Tensor:
        """Not offered."""
        raise UnsupportedOp(
            "`optimizer='lazy_adam'` needs a model that looks rows up, but this one reads the whole table; use 'adam'."
        )


def _fused_adam(parameters: list[nn.Parameter], learning_rate: float, weight_decay: float) -> torch.optim.Adam:
    """Torch's Adam in one pass over all parameters, of which there may be none."""
    group = [{"params": parameters}]
    return torch.optim.Adam(group, lr=learning_rate, betas=BETAS, eps=EPS, weight_decay=weight_decay, fused=True)


@torch.no_grad()
def _descend(parameter: nn.Parameter, learning_rate: float, weight_decay: float) -> None:
    """A step of plain gradient descent."""
    if parameter.grad is not None:
        parameter.sub_(learning_rate * (parameter.grad + weight_decay * parameter))
        parameter.grad = None


def _moments(adam: torch.optim.Adam, named: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Adam's state by parameter name; empty before the first step."""
    return {
        f"{name}.{key}": value for name, p in named.items() if p in adam.state for key, value in adam.state[p].items()
    }


def _forget(adam: torch.optim.Adam, named: Mapping[str, nn.Parameter], rows: Mapping[str, Tensor]) -> None:
    """Zero the moments of rows of a table's parameters."""
    for name, which in rows.items():
        if TABLE + name not in named:
            known = ", ".join(n.removeprefix(TABLE) for n in named if n.startswith(TABLE)) or "none"
            raise ConfigError(f"`forget` must name trained parameters of the table ({known}), but got {name!r}.")
        state = adam.state.get(named[TABLE + name], {})
        for key in ("exp_avg", "exp_avg_sq"):
            if key in state:
                state[key].index_fill_(0, which.long(), 0.0)


def _restore_moments(adam: torch.optim.Adam, named: Mapping[str, nn.Parameter], state: Mapping[str, Tensor]) -> None:
    """Put back what :func:`_moments` returned."""
    for name, p in named.items():
        keys = ("step", "exp_avg", "exp_avg_sq")
        if f"{name}.step" in state:
            adam.state[p] = {key: state[f"{name}.{key}"].clone() for key in keys}
