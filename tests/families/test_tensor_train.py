"""Tensor trains: contraction of cores, gradients, first values, the cache, and copies."""

from __future__ import annotations

import itertools
import math
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from compositional_cases import in_file
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketrec.families.compositional.tensor_train import TensorTrain, TrainPlan, rank_bounds, train_values
from pocketrec.format.layouts.tensor_train import row_factors
from pocketrec.models.backbone import noise


def contraction(part: TensorTrain, i: int) -> np.ndarray:
    """The vector of a slot, by loops over digits, columns and ranks."""
    plan, digits, rest = part.plan, [], i
    for n in reversed(plan.rows):
        digits.insert(0, rest % n)
        rest //= n
    ranks = (1, *plan.ranks, 1)
    cores = [
        c.detach().double().numpy()[g].reshape(ranks[k], plan.widths[k], ranks[k + 1])
        for k, (c, g) in enumerate(zip(part.cores, digits, strict=True))
    ]
    out = np.empty(plan.widths)
    for columns in itertools.product(*map(range, plan.widths)):
        product = np.ones((1, 1))
        for core, column in zip(cores, columns, strict=True):
            product = product @ core[:, column]
        out[columns] = product.item()
    return out.reshape(-1)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_tt_rec_is_the_contraction_of_its_cores(data):
    count = data.draw(st.integers(2, 4))
    rows, widths = (tuple(data.draw(st.integers(1, 4)) for _ in range(count)) for _ in range(2))
    ranks = tuple(data.draw(st.integers(1, 5)) for _ in range(count - 1))
    slots = data.draw(st.integers(1, math.prod(rows)))
    part = TrainPlan(slots, rows, widths, ranks).build(noise(2, "tt"))
    expected = np.stack([contraction(part, i) for i in range(slots)])
    some = torch.tensor(data.draw(st.lists(st.integers(0, slots - 1), min_size=1, max_size=9)))
    scale = {"rtol": 1e-4, "atol": 1e-6 * float(np.abs(expected).max() + 1e-30)}
    np.testing.assert_allclose(part.weight().detach().numpy(), expected, **scale)
    np.testing.assert_allclose(part(some).detach().numpy(), expected[some.numpy()], **scale)
    with torch.no_grad():
        np.testing.assert_allclose(part(some).numpy(), expected[some.numpy()], **scale)
    np.testing.assert_allclose(in_file(part, slots, math.prod(widths)), expected, **scale)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 5), min_size=2, max_size=4), st.data())
def test_digits_count_the_slots_the_first_core_slowest(rows, data):
    """Cores whose products are ``2^i`` of slot ``i``, as mixed-radix places say."""
    slots = data.draw(st.integers(1, math.prod(rows)))
    part = TrainPlan(slots, tuple(rows), (1,) * len(rows), (1,) * (len(rows) - 1)).build(noise(0, "tt"))
    with torch.no_grad():
        for k, core in enumerate(part.cores):
            core.copy_(torch.exp2(torch.arange(rows[k]) * (math.prod(rows[k + 1 :]) / 8))[:, None])
    found = 8 * torch.log2(part.weight().detach()[:, 0])
    torch.testing.assert_close(found, torch.arange(slots).float(), atol=1e-2, rtol=0)
    torch.testing.assert_close(8 * torch.log2(part(torch.arange(slots)).detach()[:, 0]), found, atol=1e-2, rtol=0)
    np.testing.assert_allclose(8 * np.log2(in_file(part, slots, 1)[:, 0]), found, atol=1e-2)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_gradients_of_a_train_are_contractions_with_another_core(data):
    """A vector is linear in each core: the slope along a direction is the vector with the direction as that core."""
    count = data.draw(st.integers(2, 4))
    rows, widths = (tuple(data.draw(st.integers(1, 3)) for _ in range(count)) for _ in range(2))
    ranks = tuple(data.draw(st.integers(1, 3)) for _ in range(count - 1))
    part = TrainPlan(math.prod(rows), rows, widths, ranks).build(noise(2, "tt"))
    slots = data.draw(st.lists(st.integers(0, math.prod(rows) - 1), min_size=1, max_size=6))
    with torch.no_grad():
        for core in part.cores:
            core.normal_(generator=noise(3, "core"))
    upstream = torch.randn(len(slots), math.prod(widths), generator=noise(4, "upstream"))
    (part(torch.tensor(slots)) * upstream).sum().backward()
    for k, core in enumerate(part.cores):
        direction, kept = torch.randn(core.shape, generator=noise(k, "direction")), core.detach().clone()
        core.data = direction
        terms = [contraction(part, i) * g for i, g in zip(slots, upstream.double().numpy(), strict=True)]
        core.data = kept
        scale = 1e-5 * (1 + float(np.abs(terms).sum()))
        assert float((core.grad * direction).sum()) == pytest.approx(float(np.sum(terms)), rel=1e-4, abs=scale)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_a_train_of_full_rank_says_every_matrix_and_a_short_one_as_the_singular_values_allow(data):
    count = data.draw(st.integers(2, 3))
    rows, widths = (tuple(data.draw(st.integers(2, 4)) for _ in range(count)) for _ in range(2))
    bounds = rank_bounds(rows, widths)
    matrix = np.random.default_rng(data.draw(st.integers(0, 99))).normal(size=(math.prod(rows), math.prod(widths)))
    ranks = tuple(data.draw(st.integers(1, bound)) for bound in bounds)
    for chosen, exact in ((bounds, True), (ranks, False)):
        part = TrainPlan(len(matrix), rows, widths, chosen).build(noise(3, "tt"))
        cores, lost = decomposed(matrix, rows, widths, chosen)
        with torch.no_grad():
            for parameter, core in zip(part.cores, cores, strict=True):
                parameter.copy_(torch.from_numpy(core))
        error = np.linalg.norm(part.weight().detach().numpy() - matrix)
        assert error <= lost + 1e-5 * np.linalg.norm(matrix)
        assert not exact or error <= 1e-5 * np.linalg.norm(matrix)


def decomposed(matrix, rows, widths, ranks):
    """Cores by singular value decompositions from the left, and the root of the discarded squared mass."""
    count = len(rows)
    tensor = matrix.reshape(*rows, *widths).transpose([axis for k in range(count) for axis in (k, count + k)])
    cores, lost, left, rest = [], 0.0, 1, tensor
    for k in range(count - 1):
        u, s, v = np.linalg.svd(rest.reshape(left * rows[k] * widths[k], -1), full_matrices=False)
        rank = ranks[k]
        u, s, v = (
            np.pad(a[..., :rank], [(0, 0)] * (a.ndim - 1) + [(0, max(0, rank - a.shape[-1]))]) for a in (u, s, v.T)
        )
        lost += float(np.linalg.norm(rest) ** 2 - (s**2).sum())
        cores.append(u.reshape(left, rows[k], widths[k] * rank).transpose(1, 0, 2).reshape(rows[k], -1))
        left, rest = rank, s[:, None] * v.T
    cores.append(rest.reshape(left, rows[-1], widths[-1]).transpose(1, 0, 2).reshape(rows[-1], -1))
    return cores, math.sqrt(max(lost, 0.0))


@settings(max_examples=10, deadline=None)
@given(st.integers(16, 32), st.integers(16, 32))
def test_the_corrected_start_has_the_variance_of_the_target(first, second):
    part = TrainPlan(10**6, (2000, 2000, 2000), (2, 2, 4), (first, second)).build(noise(5, "tt"))
    found = math.prod(float(c.detach().double().square().mean()) for c in part.cores) * first * second
    assert found == pytest.approx(1 / (3 * 10**6), rel=0.05)


def test_the_published_start_is_as_large_as_was_derived():
    part = TrainPlan(1_000_000, (100, 100, 100), (2, 2, 4), (32, 32), "approx_normal").build(noise(5, "tt"))
    values = torch.cat([c.detach().flatten() for c in part.cores]).double() * (3 * 1_000_000) ** (1 / 6)
    assert float(values.abs().min()) >= 2 - 1e-4
    assert float(values.square().mean()) == pytest.approx(5.746, rel=0.01)


def test_the_cache_starts_as_the_cores_say_and_is_then_read():
    part = TrainPlan(60, (3, 4, 5), (2, 2, 2), (3, 3), cached=np.array([7, 11, 40])).build(noise(0, "tt"))
    expected = np.stack([contraction(part, i) for i in range(60)])
    np.testing.assert_allclose(part.weight().detach().numpy(), expected, atol=1e-6)
    with torch.no_grad():
        part.cache.fill_(5)
    ids = torch.tensor([40, 7, 0, 40])
    np.testing.assert_allclose(part(ids).detach().numpy()[[0, 1, 3]], 5)
    np.testing.assert_allclose(part(ids).detach().numpy()[2], expected[0], atol=1e-6)
    assert (part.weight()[7] == 5).all()
    np.testing.assert_array_equal(in_file(part, 60, 8)[[7, 11, 40]], 5)
    part.fill(warm=True)
    np.testing.assert_allclose(part(ids).detach().numpy(), expected[ids.numpy()], atol=1e-6)
    assert not part.cache.requires_grad


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 59), max_size=40), st.integers(0, 99))
def test_a_cache_by_accesses_holds_the_slots_that_were_looked_up_most_in_the_warm_up(slots, seed):
    planned = np.sort(np.random.default_rng(seed).choice(60, 5, replace=False))
    plan = TrainPlan(60, (3, 4, 5), (2, 2, 2), (3, 3), cached=planned, tallied=True)
    part, plain = plan.build(noise(0, "tt")), replace(plan, tallied=False).build(noise(0, "tt"))
    assert part.extra_repr() != plain.extra_repr()
    assert plain.accesses is None
    part.fill(warm=True)
    for start in range(0, len(slots), 7):
        part(torch.tensor(slots[start : start + 7]))
        with torch.no_grad():
            part(torch.arange(60))
    part.weight()
    times = np.bincount(slots, minlength=60)
    assert part.accesses.tolist() == times.tolist()
    part.fill(warm=False)
    chosen = sorted(range(60), key=lambda i: (-times[i], i not in planned, i))[:5]
    assert part.cached_slots.tolist() == sorted(chosen)
    part(torch.arange(60))
    assert part.accesses.tolist() == times.tolist()
    with torch.no_grad():
        part.cache.copy_(torch.arange(5)[:, None].expand(5, 8))
        torch.testing.assert_close(part(part.cached_slots), part.cache)
    torch.testing.assert_close(part.weight()[part.cached_slots], part.cache)
    np.testing.assert_allclose(in_file(part, 60, 8), part.weight().detach().numpy(), atol=1e-6)


def test_the_multiplied_cores_follow_an_optimiser_that_leaves_no_trace():
    part = TrainPlan(60, (3, 4, 5), (2, 2, 2), (3, 3)).build(noise(0, "tt"))
    adam, ids = torch.optim.Adam(part.parameters(), lr=0.1, fused=True), torch.arange(60)
    for _ in range(3):
        with torch.no_grad():
            before = part(ids)
        part(ids).square().sum().backward()
        adam.step()
        with torch.no_grad():
            assert not torch.equal(part(ids), before)
            torch.testing.assert_close(part(ids), part.weight())
            np.testing.assert_allclose(part(ids).numpy()[7], contraction(part, 7), rtol=1e-4)


def test_published_shapes():
    assert row_factors(1_086_810, 3) == (125, 125, 128)
    assert row_factors(4_428_511, 3) == (150, 150, 200)
    assert row_factors(40_981, 3) == (25, 40, 41)
    assert row_factors(38_048, 3) == (29, 32, 41)
    assert row_factors(38_048, 4) == (10, 15, 13, 20)
    assert train_values((2, 3), (1, 5), (4,)) == 2 * 4 + 3 * 20


def test_a_copy_of_a_train_reads_its_own_cores():
    """A copy whose cores are overwritten must not read products of the old ones, however often they were written."""
    plan = TrainPlan(30, (2, 3, 5), (1, 2, 2), (2, 2), "corrected")
    first, other = (plan.build(torch.Generator().manual_seed(seed)) for seed in (0, 1))
    for _ in range(4):
        with torch.no_grad():
            first.weight()
            twin = deepcopy(first)
            for core, value in zip(twin.cores, other.cores, strict=True):
                core.copy_(value)
            assert torch.equal(twin.weight(), other.weight())
            for core in first.cores:
                core.mul_(1)
