from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketrec.backbones.deepfm import DeepFM
from pocketrec.errors import ConfigError, DataError, UnsupportedOp
from pocketrec.models.backbone import Model, noise
from pocketrec.schema import Field, Schema
from pocketrec.training.optim import DenseAdam, LazyAdam
from pocketrec.training.row_adam import BETAS, EPS, RowAdam, RowState

SCHEMA = Schema("ctr", (Field("a", 30, 0), Field("b", 20, 30)))
DATA = SimpleNamespace(schema=SCHEMA)


def adam(w, m, v, gradients, start, rate, decay):
    """Adam with coupled weight decay, step by step in float64: the oracle."""
    b1, b2 = BETAS
    for step, gradient in enumerate(gradients, start + 1):
        g = gradient + decay * w
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        unbias = math.sqrt(1 - b2**step)
        w = w - rate * unbias / (1 - b1**step) * m / (np.sqrt(v) + EPS * unbias)
    return w, m, v


@pytest.fixture(params=["torch", "compiled"])
def rows_adam(request):
    """Makes a RowAdam of the wanted implementation around given arrays."""

    def make(w, m, v, updated, rate, decay) -> RowAdam:
        w, m, v = (torch.tensor(x, dtype=torch.float32) for x in (w, m, v))
        rule = RowAdam(RowState(w, m, v, torch.tensor(updated, dtype=torch.int32)), rate, decay)
        if request.param == "torch":
            rule._library = None
        elif rule._library is None:
            pytest.skip("the kernel is not compiled")
        return rule

    return make


def state_of(rule: RowAdam) -> tuple[np.ndarray, ...]:
    return tuple(t.numpy() for t in (rule.table.weight, rule.table.first, rule.table.second))


def plausible(seed: int, rows: int, scale: float, start: int, decay: float):
    """Weights and moments as ``start`` steps with gradients of a scale leave them."""
    draw = np.random.default_rng(seed)
    w = draw.normal(0, 0.05, (rows, 5))
    gradients = draw.normal(0, scale, (min(start, 400), rows, 5))
    return adam(w, 0 * w, 0 * w, gradients, max(0, start - 400), 1e-3, decay)


@pytest.mark.parametrize("decay", [0.0, 1e-5])
def test_update_is_a_step_of_adam(rows_adam, decay):
    draw = np.random.default_rng(0)
    w, m, v = plausible(0, 40, 1e-3, 9, decay)
    ids = draw.integers(0, 40, (16, 3))
    gradients = draw.normal(0, 1e-3, (16, 3, 5))
    total = np.zeros((40, 5))
    np.add.at(total, ids, gradients)
    rule = rows_adam(w, m, v, np.full(40, 9), 1e-2, decay)
    rows, place = rule.distinct(torch.from_numpy(ids))
    rule.update(rows, place, torch.tensor(gradients, dtype=torch.float32), 10)
    touched = np.unique(ids)
    expected = adam(w[touched], m[touched], v[touched], [total[touched]], 9, 1e-2, decay)
    for came, wanted, before in zip(state_of(rule), expected, (w, m, v), strict=True):
        np.testing.assert_allclose(came[touched], wanted, rtol=1e-4, atol=1e-12)
        rest = np.setdiff1d(np.arange(40), touched)
        np.testing.assert_array_equal(came[rest], before[rest].astype(np.float32))
    assert (rule.table.updated.numpy() == np.where(np.isin(np.arange(40), touched), 10, 9)).all()


@settings(max_examples=40, deadline=None)
@given(start=st.sampled_from([5, 50, 800, 5000]), missed=st.integers(1, 600), scale=st.sampled_from([1e-2, 1e-4, 1e-5]))
def test_without_decay_catch_up_is_exact_up_to_eps(start, missed, scale):
    w, m, v = plausible(start, 10, scale, start, 0.0)
    expected = adam(w, m, v, [0.0] * missed, start, 1e-3, 0.0)
    rule = RowAdam(
        RowState(
            *(torch.tensor(x, dtype=torch.float32) for x in (w, m, v)), torch.full((10,), start, dtype=torch.int32)
        ),
        1e-3,
        0.0,
    )
    rule.catch_up(torch.arange(10), start + missed)
    way = np.abs(expected[0] - w).max()
    np.testing.assert_allclose(state_of(rule)[0], expected[0], atol=2e-2 * way + 1e-7)
    np.testing.assert_allclose(state_of(rule)[1], expected[1], rtol=1e-3, atol=1e-12)
    np.testing.assert_allclose(state_of(rule)[2], expected[2], rtol=1e-3, atol=1e-20)


@pytest.mark.delicate
@pytest.mark.parametrize("decay", [1e-6, 1e-5])
@pytest.mark.parametrize(("start", "missed"), [(400, 1), (400, 20), (400, 300), (3000, 100), (3000, 3000)])
@pytest.mark.parametrize("scale", [1e-4, 1e-5])
def test_with_decay_catch_up_stays_near_step_by_step_adam(rows_adam, decay, start, missed, scale):
    w, m, v = plausible(start, 60, scale, start, decay)
    expected = adam(w, m, v, [0.0] * missed, start, 1e-3, decay)
    rule = rows_adam(w, m, v, np.full(60, start), 1e-3, decay)
    rule.catch_up(torch.arange(60), start + missed)
    way = np.abs(expected[0] - w).mean()
    assert np.abs(state_of(rule)[0] - expected[0]).mean() < 0.03 * way
    assert np.median(np.abs(state_of(rule)[2] / expected[2] - 1)) < 0.01


@pytest.mark.parametrize("missed", [50, 500, 20_000])
def test_a_row_that_is_never_read_shrinks_as_under_dense_adam(rows_adam, missed):
    w = np.random.default_rng(0).normal(0, 0.05, (20, 5))
    rule = rows_adam(w, 0 * w, 0 * w, np.zeros(20), 1e-3, 1e-6)
    rule.catch_up(torch.arange(20), missed)
    expected = adam(w, 0 * w, 0 * w, [0.0] * min(missed, 3000), 0, 1e-3, 1e-6)[0]
    assert all(np.isfinite(x).all() for x in state_of(rule))
    assert np.abs(state_of(rule)[0] - expected).mean() < 0.08 * np.abs(w).mean()


def test_compiled_and_torch_agree():
    if RowAdam(RowState.start(torch.zeros(1, 1)), 1e-3, 0.0)._library is None:
        pytest.skip("the kernel is not compiled")
    for decay in (0.0, 1e-6, 1e-4):
        w, m, v = plausible(1, 500, 1e-5, 300, decay)
        updated = np.random.default_rng(1).integers(1, 301, 500)
        results = []
        for compiled in (True, False):
            table = RowState(*(torch.tensor(x, dtype=torch.float32) for x in (w, m, v)), torch.tensor(updated).int())
            rule = RowAdam(table, 1e-3, decay)
            rule._library = rule._library if compiled else None
            rule.catch_up(torch.arange(0, 500, 2), 9000)
            results.append((*state_of(rule), table.updated.numpy()))
        for one, other in zip(*results, strict=True):
            np.testing.assert_allclose(one, other, rtol=2e-4, atol=1e-9)


def test_distinct_rows_and_places(rows_adam):
    rule = rows_adam(np.zeros((50, 2)), np.zeros((50, 2)), np.zeros((50, 2)), np.zeros(50), 1e-3, 0.0)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 50, (30, 4)).astype(np.int32))
    for _ in range(2):
        rows, place = rule.distinct(ids)
        assert torch.equal(rows[place.long()], ids.long())
        assert len(torch.unique(rows)) == len(rows) == len(torch.unique(ids))
    if rule._library is not None:
        for bad in (-1, 50):
            with pytest.raises(DataError, match=r"\[0, 50\)"):
                rule.distinct(torch.tensor([3, bad]))
        assert rule.distinct(torch.tensor([3, 3]))[0].tolist() == [3]


def steps(model: Model, optimizer, batches) -> None:
    for number, batch in enumerate(batches):
        optimizer.model.loss(batch, noise(0, "noise", number)).backward()
        optimizer.step()
    optimizer.synchronise()


def clicks(rows: int, count: int, seed: int = 0):
    draw = np.random.default_rng(seed)
    for _ in range(count):
        ids = np.stack([f.offset + f.size * draw.random(rows) ** 3 for f in SCHEMA.fields], axis=1).astype(np.int32)
        yield torch.from_numpy(ids), torch.from_numpy(((ids.sum(axis=1) + draw.integers(0, 20, rows)) % 2).astype("f4"))


def test_dense_adam_is_the_oracle_rule():
    model = DeepFM(dim=4, hidden=(8,)).build(DATA, 0)
    before = {name: p.detach().numpy().astype(np.float64) for name, p in model.named_parameters()}
    optimizer = DenseAdam(model, 1e-2, 1e-3)
    batch = next(clicks(32, 1))
    model.loss(batch, noise(0, "noise", 0)).backward()
    gradients = {name: g.numpy().copy() for name, g in optimizer.gradients()}
    optimizer.step()
    for name, p in model.named_parameters():
        expected = adam(before[name], 0 * before[name], 0 * before[name], [gradients[name]], 0, 1e-2, 1e-3)[0]
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.delicate
def test_lazy_equals_dense_where_every_row_is_read():
    everything = [(torch.tensor([[i, 30 + i % 20] for i in range(30)]), torch.ones(30)) for _ in range(20)]
    models = [DeepFM(dim=4, hidden=(8,)).build(DATA, 0) for _ in range(2)]
    steps(models[0], DenseAdam(models[0], 1e-2, 1e-4), everything)
    steps(models[1], LazyAdam(models[1], 1e-2, 1e-4), everything)
    torch.testing.assert_close(models[1].table.weight(), models[0].table.weight(), rtol=1e-3, atol=1e-5)


@pytest.mark.delicate
@pytest.mark.parametrize("decay", [0.0, 1e-6])
def test_lazy_follows_dense_where_few_rows_are_read(decay):
    models = [DeepFM(dim=4, hidden=(8,), dropout=0.0).build(DATA, 0) for _ in range(2)]
    start = models[0].table.weight().detach().clone()
    steps(models[0], DenseAdam(models[0], 1e-3, decay), clicks(8, 300))
    steps(models[1], LazyAdam(models[1], 1e-3, decay), clicks(8, 300))
    way = (models[0].table.weight() - start).detach().abs().mean()
    gap = (models[0].table.weight() - models[1].table.weight()).detach().abs().mean()
    assert gap < 0.05 * way


def test_state_and_restore_continue_the_same_way():
    batches = list(clicks(8, 12))
    whole, first, second = (DeepFM(dim=4, hidden=(8,)).build(DATA, 0) for _ in range(3))
    for kind in (DenseAdam, LazyAdam):
        full = kind(whole, 1e-2, 1e-5)
        steps(whole, full, batches[:6])
        steps(whole, full, batches[6:])
        half = kind(first, 1e-2, 1e-5)
        steps(first, half, batches[:6])
        second.load_state_dict(first.state_dict())
        rest = kind(second, 1e-2, 1e-5)
        rest.restore({name: t.clone() for name, t in half.state().items()})
        steps(second, rest, batches[6:])
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True))
        first.load_state_dict(DeepFM(dim=4, hidden=(8,)).build(DATA, 0).state_dict())
        whole.load_state_dict(first.state_dict())


def test_two_look_ups_in_one_loss_add_their_gradients():
    models = [DeepFM(dim=4, hidden=(8,), dropout=0.0).build(DATA, 0) for _ in range(2)]
    one, two = clicks(8, 2)
    for model, kind in zip(models, (DenseAdam, LazyAdam), strict=True):
        optimizer = kind(model, 1e-2, 0.0)
        seen = optimizer.model
        (seen.table(one[0]).square().sum() + 2 * seen.table(two[0]).sum()).backward()
        optimizer.step()
    touched = torch.unique(torch.cat([one[0], two[0]]))
    a, b = (m.table.weight()[touched] for m in models)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_what_lazy_adam_cannot_train_is_named():
    model = DeepFM(dim=4, hidden=(8,)).build(DATA, 0)
    lazy = LazyAdam(model, 1e-3, 0.0)
    with pytest.raises(UnsupportedOp, match="whole table"):
        lazy.model.table.weight()
    with pytest.raises(ConfigError, match="needs a DenseTable"):
        LazyAdam(lazy.model, 1e-3, 0.0)
