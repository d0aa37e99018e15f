"""LightGCN's losses against a naive implementation by the book, and its sampler against the definition."""

import dataclasses
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketrec.backbones.lightgcn import LightGCN, LightGCNModel
from pocketrec.data.dataset import Dataset
from pocketrec.data.encode import encode
from pocketrec.data.sampling import triples
from pocketrec.errors import ConfigError, DataError
from pocketrec.models.backbone import noise
from pocketrec.native import library
from pocketrec.sources.interactions import Interactions

USERS, ITEMS, DIM = 40, 60, 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder: Path = tmp_path_factory.mktemp("pairs")
    random = np.random.default_rng(0)
    pairs = np.unique(np.stack([random.integers(0, USERS, 600), random.integers(0, ITEMS, 600)], axis=1), axis=0)
    pl.DataFrame({"user": pairs[:, 0], "item": pairs[:, 1]}).write_parquet(folder / "pairs.parquet")
    return encode(Interactions(), folder / "pairs.parquet", folder / "data")


def model(data: Dataset, **settings: object) -> LightGCNModel:
    return LightGCN(dim=DIM, **settings).build(data, seed=0)


def naive_loss(model: LightGCNModel, weight: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
    """The loss, written as the formulas are, on the dense normalised adjacency."""
    config, graph = model.backbone, model.graph
    adjacency = torch.zeros(graph.rows, graph.rows)
    for row in range(graph.rows):
        adjacency[row, graph.indices[graph.indptr[row] : graph.indptr[row + 1]]] = 1
    degree = adjacency.sum(dim=1)
    factor = torch.where(degree > 0, degree.clamp_min(1).rsqrt(), 0)
    matrix = factor[:, None] * adjacency * factor
    layers = [weight]
    for _ in range(config.layers):
        layers.append(matrix @ layers[-1])
    final = sum(layers) / len(layers)
    user, positive, negative = batch.T
    score = (final[user] * final[positive]).sum(1) - (final[user] * final[negative]).sum(1)
    ranking = -torch.nn.functional.logsigmoid(score).mean()
    norm = sum(weight[ids].square().sum() for ids in (user, positive, negative)) / (2 * len(batch))
    members = final[torch.cat([user.unique(), positive.unique()])]
    unit = members / members.norm(dim=1, keepdim=True)
    ratios = torch.exp(unit @ unit.T / config.temperature)
    contrast = -torch.log(np.exp(1 / config.temperature) / ratios.sum(dim=1)).mean()
    return ranking + config.regularisation * norm + config.contrast * contrast


@pytest.mark.parametrize("layers", [0, 1, 3])
@pytest.mark.parametrize("contrast", [0.0, 0.7])
@pytest.mark.parametrize("compiled", [True, False])
def test_loss_and_gradient_equal_the_naive_ones(data, monkeypatch, layers, contrast, compiled):
    if not compiled:
        monkeypatch.setattr(library, "available", lambda: False)
    ours = model(data, layers=layers, contrast=contrast, regularisation=0.3, init="normal")
    (batch,) = next(ours.batches(data, 64, seed=0, epoch=0))
    loss = ours.loss((batch,), noise(0, "noise"))
    loss.backward()
    weight = ours.table.weight().detach().clone().requires_grad_()
    expected = naive_loss(ours, weight, batch)
    expected.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.table.weight().grad, weight.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.delicate
def test_bf16_loss_and_gradient_are_near(data):
    exact = model(data, contrast=0.7, init="normal")
    rounded = model(data, contrast=0.7, init="normal")
    batch = next(exact.batches(data, 64, seed=0, epoch=0))
    expected = exact.loss(batch, noise(0, "noise"))
    expected.backward()
    with torch.autocast("cpu", torch.bfloat16):
        loss = rounded.loss(batch, noise(0, "noise"))
    loss.backward()
    slope, reference = rounded.table.weight().grad, exact.table.weight().grad
    assert loss.dtype == torch.float32
    assert abs(loss.item() - expected.item()) < 5e-3
    assert 0 < float((slope - reference).norm()) < 0.03 * float(reference.norm())


def test_no_layers_is_matrix_factorisation(data):
    ours = model(data, layers=0)
    weight = ours.table.weight()
    assert torch.equal(ours.propagate(weight), weight)
    users, items = ours.propagate(weight).detach().split([USERS, ITEMS])
    torch.testing.assert_close(ours.scores(users, items), (users[:, None] * items[None]).sum(-1))


@settings(max_examples=50, deadline=None)
@given(size=st.integers(1, 40), width=st.integers(1, 9), seed=st.integers(0, 2**32))
def test_contrast_is_zero_for_one_vector_positive_for_more_and_ignores_lengths(data, size, width, seed):
    ours = model(data)
    vectors = torch.randn(size, width, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    value = ours.contrast(vectors)
    value.backward()
    unit = torch.nn.functional.normalize(vectors.detach().double(), dim=1)
    exact = torch.exp((unit @ unit.T - 1) / 0.2).sum(dim=1).log().mean().item()
    assert (exact > 1e-9) == (size > 1)
    assert abs(value.item() - exact) < 2e-6
    torch.testing.assert_close(ours.contrast(3 * vectors), value, atol=1e-5, rtol=1e-5)
    along = (vectors.grad * vectors).sum(dim=1)
    torch.testing.assert_close(along, torch.zeros(size), atol=1e-5, rtol=0)


def test_contrast_gradient_in_blocks_is_that_of_autograd(data, monkeypatch):
    vectors = torch.randn(50, DIM, generator=torch.Generator().manual_seed(0), requires_grad=True)
    unit = torch.nn.functional.normalize(vectors, dim=1)
    expected = (torch.logsumexp(unit @ unit.T / 0.2, dim=1) - 1 / 0.2).mean()
    (reference,) = torch.autograd.grad(expected, vectors)
    monkeypatch.setattr("pocketrec.backbones.lightgcn.BLOCK", 16)
    value = model(data).contrast(vectors)
    (found,) = torch.autograd.grad(value, vectors)
    torch.testing.assert_close(value, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found, reference, atol=1e-6, rtol=1e-4)


def test_a_vector_of_zeros_gives_no_nan(data):
    vectors = torch.zeros(3, DIM, requires_grad=True)
    model(data).contrast(vectors).backward()
    assert torch.isfinite(vectors.grad).all()


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), epoch=st.integers(0, 100), shuffle=st.booleans())
def test_triples_hold_every_pair_once_with_a_negative_that_is_none(seed, epoch, shuffle):
    random = np.random.default_rng(seed)
    pairs = np.unique(np.stack([random.integers(0, 7, 30), 7 + random.integers(0, 9, 30)], axis=1), axis=0)
    pairs = pairs[: max(1, len(pairs) - 3)]
    if np.bincount(pairs[:, 0]).max() == 9:
        return
    drawn = triples(pairs, 7, 16, seed, epoch, shuffle=shuffle)
    known = set(map(tuple, pairs.tolist()))
    found = drawn[:, :2] if not shuffle else np.unique(drawn[:, :2], axis=0)
    np.testing.assert_array_equal(found, pairs)
    assert not any((user, negative) in known for user, _, negative in drawn.tolist())
    assert ((drawn[:, 2] >= 7) & (drawn[:, 2] < 16)).all()
    np.testing.assert_array_equal(drawn, triples(pairs, 7, 16, seed, epoch, shuffle=shuffle))


def test_negatives_are_uniform_over_what_is_left():
    pairs = np.array([[0, 1], [0, 3]])
    drawn = np.concatenate([triples(pairs, 1, 6, 0, epoch)[:, 2] for epoch in range(3000)])
    counts = np.bincount(drawn, minlength=6)
    assert counts[[0, 1, 3]].sum() == 0
    expected = len(drawn) / 3
    assert ((counts[[2, 4, 5]] - expected) ** 2 / expected).sum() < 13.8


def test_a_user_with_every_item_has_no_negative():
    with pytest.raises(DataError, match="user 1 has all 2"):
        triples(np.array([[0, 2], [1, 2], [1, 3]]), 2, 4, 0, 0)


def test_batches_depend_on_seed_and_epoch_alone(data):
    ours = model(data)

    def epoch(seed: int, number: int, size: int = 32) -> torch.Tensor:
        return torch.cat([batch for (batch,) in ours.batches(data, size, seed, number)])

    torch.testing.assert_close(epoch(1, 2), epoch(1, 2, size=50))
    assert not torch.equal(epoch(1, 2), epoch(1, 3))
    assert not torch.equal(epoch(1, 2), epoch(2, 2))
    assert len(epoch(0, 0)) == len(data.train)


def test_build_is_reproducible_and_uses_training_pairs_alone(data):
    first, second = model(data), model(data)
    assert torch.equal(first.table.weight(), second.table.weight())
    assert not torch.equal(first.table.weight(), LightGCN(dim=DIM).build(data, seed=1).table.weight())
    assert len(first.graph.indices) == 2 * len(data.train)
    bound = np.sqrt(6 / (USERS + ITEMS + DIM))
    assert first.table.weight().abs().max().item() <= bound
    assert 0.08 < model(data, init="normal").table.weight().std().item() < 0.12


@pytest.mark.delicate
def test_a_few_steps_lower_the_loss(data):
    ours = model(data, layers=1, contrast=0.05)
    adam = torch.optim.Adam(ours.parameters(), lr=0.05)
    losses = []
    for epoch in range(20):
        for batch in ours.batches(data, 128, seed=0, epoch=epoch):
            adam.zero_grad()
            loss = ours.loss(batch, noise(0, "noise"))
            loss.backward()
            adam.step()
            losses.append(loss.item())
    assert np.mean(losses[-4:]) < 0.6 * np.mean(losses[:4])


def test_the_lowered_program_scores_as_the_model_does(data):
    ours = model(data)
    final = ours.propagate(ours.table.weight()).detach()
    vectors = torch.stack([final[:5], final[USERS : USERS + 5]], dim=1)
    expected = ours.scores(final[:5], final[USERS : USERS + 5]).diagonal()
    np.testing.assert_allclose(ours.lower()(vectors.numpy()), expected.numpy(), rtol=1e-6)


def test_blocks_are_users_and_items(data):
    user, item = LightGCN(dim=DIM).blocks(data.schema)
    assert (user.name, user.start, user.stop) == ("user", 0, USERS)
    assert (item.name, item.start, item.stop) == ("item", USERS, USERS + ITEMS)
    assert user.values + item.values == (USERS + ITEMS) * DIM


@pytest.mark.parametrize(
    "wrong",
    [
        {"dim": 0}, {"layers": -1}, {"regularisation": -1.0}, {"contrast": float("nan")}, {"temperature": 0.0},
        {"init": "zeros"},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(ConfigError, match=f"`{next(iter(wrong))}`"):
        dataclasses.replace(LightGCN(), **wrong)
