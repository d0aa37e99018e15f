"""What a table does in its own training, against Adam written out in numpy; and the rate that falls by a cosine."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from interruptions import Cut
from numpy.testing import assert_allclose
from torch import nn

from pocketrec.backbones.deepfm import DeepFM
from pocketrec.backbones.mf import MF
from pocketrec.errors import ConfigError, UnsupportedOp
from pocketrec.families.compositional.region import regions
from pocketrec.families.compositional.table import ComposedTable, Composition
from pocketrec.models.table import DenseTable
from pocketrec.training.hooks import LearningTable, Rule
from pocketrec.training.loop import Training
from pocketrec.training.optim import DenseAdam, LazyAdam
from pocketrec.training.run import Run
from pocketrec.training.train import train

SETTINGS = {"epochs": 2, "batch_size": 64, "learning_rate": 1e-2, "weight_decay": 0.0}
EVERY = 3
"""Steps between two rows that start again."""

seen: list[dict[str, np.ndarray]] = []
"""Gradients that tables were shown, step by step."""


class Restarting(LearningTable, DenseTable):
    """At every third step the row that has been of least use is set to zero and forgotten."""

    lasting = True

    use: torch.Tensor
    steps: torch.Tensor

    def __init__(self, dense: DenseTable) -> None:
        super().__init__(dense.schema, dense.blocks, dense.matrix.detach().clone())
        self.register_buffer("use", torch.zeros(self.schema.rows))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def before_step(self, gradients):
        self.steps += 1
        seen.append({name: g.to_dense().numpy().copy() for name, g in gradients.items()})
        self.use += gradients["matrix"].to_dense().abs().sum(dim=1)

    def worst(self):
        due = int(self.steps) % EVERY == 0
        return self.use.argmin(keepdim=True) if due else torch.zeros(0, dtype=torch.int64)

    def forget(self):
        return {"matrix": self.worst()}

    @torch.no_grad()
    def after_step(self):
        rows = self.worst()
        self.matrix[rows] = 0
        self.use[rows] += 1


class Shifted(Restarting):
    """Also with a vector added to all rows, by a rule of its own, and a penalty."""

    def __init__(self, dense: DenseTable, rule: Rule) -> None:
        super().__init__(dense)
        self.shift = nn.Parameter(torch.full((self.width,), 0.1))
        self.rule = rule

    def extra_repr(self):
        return str(self.rule)

    def rules(self):
        return {"shift": self.rule}

    def forward(self, ids):
        return self.matrix[ids] + self.shift

    def weight(self):
        return self.matrix + self.shift

    def penalty(self, ids, epoch):
        return 1e-3 * self.shift.square().sum()


class Adam:
    """Algorithm 1 of the paper with coupled decay, in float64."""

    def __init__(self, weight, decay):
        self.weight, self.decay, self.step = weight.astype(np.float64), decay, 0
        self.first, self.second = np.zeros(weight.shape), np.zeros(weight.shape)

    def update(self, gradient, rate):
        self.step += 1
        gradient = gradient + self.decay * self.weight
        self.first = 0.9 * self.first + 0.1 * gradient
        self.second = 0.999 * self.second + 0.001 * gradient**2
        first, second = self.first / (1 - 0.9**self.step), self.second / (1 - 0.999**self.step)
        self.weight = self.weight - rate * first / (np.sqrt(second) + 1e-8)


def replayed(start, gradients, rates, decay, *, forgetful=True):
    """The matrix that the shown gradients make of ``start``, with what :class:`Restarting` does to it."""
    adam, use = Adam(start, decay), np.zeros(len(start), np.float32)
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        use += np.abs(gradient).sum(axis=1)
        adam.update(gradient, rate)
        if step % EVERY == 0:
            row = use.argmin()
            adam.weight[row] = 0
            use[row] += 1
            if forgetful:
                adam.first[row] = adam.second[row] = 0
    return adam.weight


@pytest.fixture
def data(lab):
    return lab.data("ctr")


def around(data, make):
    model = DeepFM(dim=4, hidden=(8,), dropout=0.0).build(data, 0)
    return model.with_table(make(model.table))


def fitted(model, data, training, run=None):
    seen.clear()
    return (run or Run(None)).fit("learn", model, data, training)


@pytest.mark.parametrize("decay", [0.0, 1e-3])
def test_dense_adam_shows_gradients_and_forgets_rows(data, decay):
    model = around(data, Restarting)
    start = model.table.matrix.detach().numpy().copy()
    table = fitted(model, data, Training(**SETTINGS | {"weight_decay": decay})).table
    gradients = [step["matrix"] for step in seen]
    assert len(gradients) == 2 * -(-len(data.train) // 64) == int(table.steps)
    rates = [1e-2] * len(gradients)
    assert_allclose(table.matrix.detach(), replayed(start, gradients, rates, decay), rtol=1e-4, atol=1e-6)
    remembering = replayed(start, gradients, rates, decay, forgetful=False)
    assert np.abs(remembering - table.matrix.detach().numpy()).max() > 1e-3
    assert np.array_equal(model.table.matrix.detach().numpy(), start)


def test_lazy_adam_does_the_same_to_single_rows(data):
    model = around(data, Restarting)
    start = model.table.matrix.detach().numpy().copy()
    table = fitted(model, data, Training(**SETTINGS, optimizer="lazy_adam")).table
    gradients = [step["matrix"] for step in seen]
    assert any((g == 0).all(axis=1).any() for g in gradients)
    rates = [1e-2] * len(gradients)
    expected = replayed(start, gradients, rates, 0.0)
    assert_allclose(table.matrix.detach(), expected, rtol=1e-3, atol=1e-5)
    remembering = replayed(start, gradients, rates, 0.0, forgetful=False)
    assert np.abs(remembering - expected).max() > 1e-3


def test_gradients_of_lazy_adam_are_those_of_dense_adam(data):
    found = []
    for optimizer in ("adam", "lazy_adam"):
        fitted(around(data, Restarting), data, Training(**SETTINGS, optimizer=optimizer))
        found.append(seen[0]["matrix"])
    assert_allclose(*found, rtol=1e-5, atol=1e-8)
    assert found[0].any()


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("rate", [None, 0.003])
def test_parameters_follow_the_rate_of_the_training_or_their_own(data, schedule, rate):
    model = around(data, lambda dense: Shifted(dense, Rule(rate, weight_decay=0.02)))
    start = {name: p.detach().numpy().copy() for name, p in model.table.named_parameters()}
    training = Training(**SETTINGS | {"weight_decay": 1e-4}, schedule=schedule)
    table = fitted(model, data, training).table
    steps = len(seen)
    cosine = 0.5 * (1 + np.cos(np.pi * np.arange(steps) / steps))
    rates = 1e-2 * (cosine if schedule == "cosine" else np.ones(steps))
    matrix = replayed(start["matrix"], [step["matrix"] for step in seen], rates, 1e-4)
    assert_allclose(table.matrix.detach(), matrix, rtol=1e-4, atol=1e-6)
    shift = Adam(start["shift"], 0.02)
    for step, own in zip(seen, rates if rate is None else [rate] * steps, strict=True):
        shift.update(step["shift"], own)
    assert_allclose(table.shift.detach(), shift.weight, rtol=1e-4, atol=1e-6)


def test_plain_descent_follows_the_rate_of_the_training(data):
    model = around(data, lambda dense: Shifted(dense, Rule(kind="sgd")))
    table = fitted(model, data, Training(**SETTINGS, schedule="cosine")).table
    steps = len(seen)
    rates = 1e-2 * 0.5 * (1 + np.cos(np.pi * np.arange(steps) / steps))
    expected = 0.1 - sum(rate * step["shift"].astype(np.float64) for rate, step in zip(rates, seen, strict=True))
    assert_allclose(table.shift.detach(), expected, rtol=1e-5)


@pytest.mark.parametrize(("optimizer", "schedule"), [("adam", "cosine"), ("lazy_adam", "constant")])
def test_a_learning_table_that_is_cut_short_goes_on_to_the_same_bytes(data, tmp_path, optimizer, schedule):
    def model():
        make = Restarting if optimizer == "lazy_adam" else lambda dense: Shifted(dense, Rule(weight_decay=0.1))
        return around(data, make)

    training = Training(**SETTINGS, optimizer=optimizer, schedule=schedule)
    expected = fitted(model(), data, training)
    steps = len(seen)
    for cut in (1, EVERY, steps // 2, steps - 1):
        left = SimpleNamespace(steps=cut)

        def stop(stage, done, total, figures, left=left):
            left.steps -= 1
            if left.steps == 0:
                raise Cut

        with pytest.raises(Cut), Run(tmp_path / f"{cut}", checkpoint_calls=1, progress=stop) as run:
            fitted(model(), data, training, run)
        with Run(tmp_path / f"{cut}", checkpoint_calls=1) as run:
            again = fitted(model(), data, training, run)
        assert 0 < len(seen) < steps
        for name, tensor in expected.state_dict().items():
            assert torch.equal(tensor, again.state_dict()[name]), name


class Bias(Composition):
    """One vector for all slots, with all hooks."""

    rows, width, shown = 3, 2, ()

    def __init__(self):
        super().__init__()
        self.vector = nn.Parameter(torch.ones(1, 2))

    def forward(self, slots):
        return self.vector.expand(len(slots), 2)

    def before_step(self, gradients):
        self.shown = tuple(gradients)

    def forget(self):
        return {"vector": torch.tensor([0])}

    values = pack = None


Bias.__abstractmethods__ = frozenset()


def test_compositions_have_the_hooks_of_their_table(lab):
    data = lab.data("cf")
    blocks = MF(dim=8).blocks(data.schema)
    areas = regions(blocks, "block")
    parts = [(area, Bias(), np.arange(area.rows)) for area in areas]
    table = ComposedTable(data.schema, blocks, parts, torch.zeros(data.schema.rows, 8))
    table.before_step({"parts.0.vector": torch.ones(1), "parts.1.vector": torch.ones(1), "plain.0": torch.ones(1)})
    assert [part.shown for part in table.compositions] == [("vector",), ("vector",)]
    assert {name: rows.tolist() for name, rows in table.forget().items()} == {
        "parts.0.vector": [0],
        "parts.1.vector": [0],
    }


def test_what_no_optimiser_can_do_is_named(data):
    model = around(data, Restarting)
    with pytest.raises(ConfigError, match=r"trained parameters of the table \(matrix\), but got 'rows'"):
        DenseAdam(model, 1e-3, 0.0).forget({"rows": torch.tensor([0])})
    with pytest.raises(ConfigError, match="but got 'rows'"):
        LazyAdam(model, 1e-3, 0.0).forget({"rows": torch.tensor([0])})
    with pytest.raises(ConfigError, match="Shifted looks up, draws, penalises"):
        LazyAdam(around(data, lambda dense: Shifted(dense, Rule())), 1e-3, 0.0)
    with pytest.raises(UnsupportedOp, match=r"constant rate 0\.001, but got 0\.002"):
        LazyAdam(model, 1e-3, 0.0).set_rate(2e-3)
    with pytest.raises(ConfigError, match="but got schedule='cosine'"):
        Training(optimizer="lazy_adam", schedule="cosine")
    with pytest.raises(ConfigError, match="`schedule` must be one of constant, cosine"):
        Training(schedule="linear")


def test_a_model_without_a_head_of_its_own_is_trained_lazily(lab):
    data = lab.data("cf")
    dense, lazy = (train(MF(dim=8), data, None, Training(**SETTINGS, optimizer=o)) for o in ("adam", "lazy_adam"))
    assert_allclose(lazy.table.weight().detach(), dense.table.weight().detach(), rtol=1e-2, atol=1e-4)
