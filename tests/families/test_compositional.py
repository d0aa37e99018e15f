"""QR, TT-Rec, DHE and PTQ: published counts, the laws of each method, and files that read as the tables do."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import pocketrec as pr
from pocketrec import registry
from pocketrec.compression.budget import Room
from pocketrec.compression.compress import compress
from pocketrec.errors import ArtifactError, BudgetError, ConfigError
from pocketrec.families.compositional.hash_network import HashNetwork, NetworkPlan
from pocketrec.families.compositional.ladder import ComposedLadder
from pocketrec.families.compositional.region import Region, regions, slots_of
from pocketrec.families.compositional.table import ComposedTable
from pocketrec.families.compositional.tensor_train import TensorTrain, TrainPlan, rank_bounds, train_values
from pocketrec.format import vocabulary
from pocketrec.format.artifact import Artifact
from pocketrec.format.block import PackedRange
from pocketrec.format.computed import encode_factor, factor_bytes
from pocketrec.format.layouts.hash_mlp import codes, constants, hashes, most_slots
from pocketrec.format.layouts.quantised import pack_codes, unpack_codes
from pocketrec.format.layouts.tensor_train import row_factors, width_factors
from pocketrec.format.packed import Packed
from pocketrec.methods.cerp import CERP
from pocketrec.methods.dhe import DHE
from pocketrec.methods.ptq import PTQ, QuantisedTable
from pocketrec.methods.qr import QR, QRPlan, least_rows, table_rows
from pocketrec.methods.tt_rec import TTRec
from pocketrec.models.backbone import noise
from pocketrec.models.table import Block, DenseTable, oov_rows
from pocketrec.schema import Field, Schema
from pocketrec.training.run import Run

TRAINING = (pr.Training(epochs=2, batch_size=256),)
METHODS = [
    QR(),
    QR(operation="concat", large="quotient", order="id"),
    DHE(depth=2, functions=16),
    DHE(depth=1, functions=8, norm="after", last_layer="bn_mish", code="gaussian", order="id"),
    TTRec(),
    TTRec(cores=2, cache_share=0, order="id"),
]
NAMES = [f"{m.name}-{i}" for i, m in enumerate(METHODS)]


def place(rows: int, width: int) -> PackedRange:
    return PackedRange("table", 0, rows, 0, width)


def in_file(part, rows: int, width: int, storage="fp32") -> np.ndarray:
    """All vectors of a composition, through the arrays of a file."""
    block = part.pack(place(rows, width), storage, None)
    zeros = np.zeros((1, width), np.float32)
    packed = Packed(rows, (block,), zeros, zeros)
    again = Packed.from_arrays(packed.meta(), packed.arrays())
    return again.lookup(np.arange(rows)[:, None], np.zeros(1, np.int32))[:, 0]


CRITEO, AVAZU, GOWALLA, YELP = (1_086_810,), (4_428_511,), (29_858, 40_981), (31_668, 38_048)


@pytest.mark.parametrize(
    ("tables", "width", "divisor", "published"),
    [
        (CRITEO, 16, 2, 8_694_512),
        (CRITEO, 16, 5, 3_477_872),
        (CRITEO, 16, 20, 869_776),
        (AVAZU, 16, 2, 35_428_128),
        (AVAZU, 16, 5, 14_171_328),
        (AVAZU, 16, 20, 3_543_136),
        (GOWALLA, 64, 2, 2_267_136),
        (GOWALLA, 64, 5, 907_456),
        (GOWALLA, 64, 20, 229_312),
        (YELP, 64, 2, 2_231_168),
        (YELP, 64, 5, 893_056),
        (YELP, 64, 20, 225_728),
    ],
)
def test_published_counts_of_qr(tables, width, divisor, published):
    assert sum(QRPlan(rows, width, divisor).values for rows in tables) == published


@pytest.mark.parametrize(
    ("tables", "width", "cores", "ranks", "cached", "published"),
    [
        (CRITEO, 16, 3, (192, 192), 0, 9_362_304),
        (CRITEO, 16, 3, (128, 96), 0, 3_153_152),
        (CRITEO, 16, 4, (64, 64, 64), 12_780, 869_440),
        (AVAZU, 16, 3, (320, 320), 272_255, 35_428_080),
        (AVAZU, 16, 3, (192, 192), 181_302, 14_171_232),
        (GOWALLA, 64, 3, (96, 80), 0, 2_195_520),
        (GOWALLA, 64, 3, (48, 64), 0, 890_496),
        (YELP, 64, 3, (96, 96), 0, 2_301_312),
        (YELP, 64, 4, (32, 128, 64), 0, 896_256),
    ],
)
def test_published_counts_of_tt_rec(tables, width, cores, ranks, cached, published):
    plans = [
        TrainPlan(n, row_factors(n, cores), width_factors(width, cores), ranks, cached=np.arange(cached))
        for n in tables
    ]
    assert sum(plan.values for plan in plans) == published


@pytest.mark.parametrize(
    ("tables", "hidden", "width", "published"),
    [
        (1, (1536,) * 4, 16, 8_693_808),
        (1, (1024,) * 3, 16, 3_171_376),
        (1, (384,) * 4, 16, 846_384),
        (1, (2688,) * 5, 16, 31_737_264),
        (1, (1792,) * 5, 16, 14_735_664),
        (1, (896,) * 4, 16, 3_351_088),
        (2, (512,) * 3, 64, 2_172_288),
        (2, (256, 256, 128, 128), 64, 775_040),
        (4, (256,) * 4, 32, 1_880_448),
        (4, (160,) * 3, 32, 886_784),
    ],
)
def test_published_counts_of_dhe(tables, hidden, width, published):
    assert tables * DHE(last_layer="bn_mish").values((1024, *hidden, width)) == published


@pytest.mark.parametrize(
    ("plan", "width"),
    [
        (QRPlan(101, 6, 7), 6),
        (QRPlan(101, 6, 7, "concat"), 6),
        (TrainPlan(29, (3, 2, 5), (2, 1, 3), (4, 5), cached=np.array([3, 8])), 6),
        (NetworkPlan(20, (8, 5, 4, 6), 100, "uniform", "before", "bn_mish", 1), 6),
        (NetworkPlan(20, (8, 5, 4, 6), 100, "uniform", "none", "linear", 1), 6),
    ],
)
def test_a_plan_counts_the_parameters_that_it_builds(plan, width):
    part = plan.build(noise(0, "test"))
    assert plan.values == part.values() == sum(p.numel() for p in part.parameters())
    for storage in ("fp32", "fp16", "int8"):
        assert part.pack(place(part.rows, width), storage, None).size_bytes == plan.size_bytes(storage)


@settings(deadline=None)
@given(rows=st.integers(1, 5000), data=st.data())
def test_qr_pairs_are_a_bijection_and_budgets_are_kept(rows, data):
    method = QR(large=data.draw(st.sampled_from(["remainder", "quotient"])))
    most = data.draw(st.integers(0, rows + 2))
    divisor = method.divisor_of(rows, most)
    possible = [p for p in range(1, rows + 1) if p + -(-rows // p) <= most]
    assert divisor == ((max if method.large == "remainder" else min)(possible) if possible else None)
    assert (divisor is None) == (most < least_rows(rows))
    if divisor is not None:
        i = np.arange(rows)
        pairs = i % divisor, i // divisor
        assert len(set(zip(*(p.tolist() for p in pairs), strict=True))) == rows
        assert (pairs[1] * divisor + pairs[0] == i).all()
        assert pairs[1].max() == -(-rows // divisor) - 1


@settings(deadline=None)
@given(st.integers(4, 10_000), st.floats(0.01, 0.99))
def test_qr_with_a_large_remainder_table_wastes_at_most_a_few_rows(rows, share):
    most = int(rows * share)
    divisor = QR().divisor_of(rows, most)
    if divisor is not None:
        quotient = -(-rows // divisor)
        assert most - quotient <= divisor + quotient <= most


@given(rows=st.integers(1, 5000), data=st.data())
def test_the_mirror_of_a_divisor_needs_no_more_rows(rows, data):
    divisor = data.draw(st.integers(1, rows))
    mirror = -(-rows // divisor)
    assert least_rows(rows) <= table_rows(rows, mirror) <= table_rows(rows, divisor)
    assert table_rows(rows, divisor) == len({i % divisor for i in range(rows)}) + len(
        {i // divisor for i in range(rows)}
    )


@pytest.mark.parametrize(("operation", "neutral"), [("mult", 1.0), ("add", 0.0)])
def test_qr_with_a_divisor_of_all_rows_says_every_matrix(operation, neutral):
    part = QRPlan(30, 5, 30, operation).build(noise(1, "qr"))
    matrix = torch.randn(30, 5, generator=noise(2, "matrix"))
    with torch.no_grad():
        part.remainder.copy_(matrix)
        part.quotient.fill_(neutral)
    assert torch.equal(part.weight(), matrix)


@settings(deadline=None)
@given(
    st.sampled_from(["mult", "add", "concat"]),
    st.integers(1, 50),
    st.lists(st.integers(0, 49), min_size=1, max_size=12),
    st.integers(0, 99),
)
def test_gradients_of_qr_are_the_closed_form(operation, divisor, slots, seed):
    part = QRPlan(50, 4, divisor, operation).build(noise(seed, "qr"))
    upstream = torch.randn(len(slots), 4, generator=noise(seed, "upstream"))
    (part(torch.tensor(slots)) * upstream).sum().backward()
    r, q = part.remainder.detach(), part.quotient.detach()
    expected = torch.zeros_like(r), torch.zeros_like(q)
    for i, g in zip(slots, upstream, strict=True):
        j, k = i % divisor, i // divisor
        slopes = (g * q[k], g * r[j]) if operation == "mult" else (g, g) if operation == "add" else (g[:2], g[2:])
        expected[0][j] += slopes[0]
        expected[1][k] += slopes[1]
    torch.testing.assert_close((part.remainder.grad, part.quotient.grad), expected)


@pytest.mark.parametrize("operation", ["mult", "add", "concat"])
def test_qr_reads_what_it_says(operation):
    part = QRPlan(50, 4, 7, operation, "uniform").build(noise(1, "qr"))
    r, q = part.remainder.detach().numpy(), part.quotient.detach().numpy()
    join = {"mult": np.multiply, "add": np.add, "concat": lambda a, b: np.concatenate([a, b])}[operation]
    expected = np.stack([join(r[i % 7], q[i // 7]) for i in range(50)])
    np.testing.assert_array_equal(part.weight().detach().numpy(), expected)
    np.testing.assert_array_equal(part(torch.arange(50)).detach().numpy(), expected)
    np.testing.assert_array_equal(in_file(part, 50, 4), expected)
    assert (r >= math.sqrt(1 / 50)).all()
    assert (r < 1).all()


def test_qr_with_ones_reads_the_quotient_row():
    part = QRPlan(20, 3, 4).build(noise(1, "qr"))
    with torch.no_grad():
        part.remainder.fill_(1)
    torch.testing.assert_close(part(torch.arange(20)), part.quotient[torch.arange(20) // 4])


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


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 10_000), width=st.sampled_from([1, 4, 16, 64]), cores=st.integers(2, 4), data=st.data())
def test_tt_rec_keeps_every_budget_and_fills_it_with_cached_rows(rows, width, cores, data):
    region = Region("embedding", 0, rows, 0, width)
    share = data.draw(st.sampled_from([0.0, 0.2, 0.7]))
    method = TTRec(cores=cores, cache_share=share)
    values = data.draw(st.integers(1, rows * width))
    plan = method.plan(region, values, np.arange(rows))
    assert (plan is None) == (values < method.least(region))
    if plan is not None:
        assert plan.values <= values
        assert not share or values - plan.values < width or len(plan.cached) == rows
        assert all(rank <= bound for rank, bound in zip(plan.ranks, rank_bounds(plan.rows, plan.widths), strict=True))


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


def test_accesses_of_click_data_are_the_counts_times_epochs(clicks, model):
    method = TTRec(cache_by="accesses", warm_up=2)
    run = Run(None, training=TRAINING)
    draft = model.with_table(method.prepare(model, clicks, run).table(Room(values=model.table.values() // 2)))
    (part,) = draft.table.compositions
    (ended,) = method.train(draft, clicks, run).table.compositions
    slots = slots_of(draft.table.regions[0], clicks, "file")
    times = np.bincount(slots[clicks.train.ids.reshape(-1)], minlength=clicks.schema.rows)
    np.testing.assert_array_equal(ended.accesses.numpy() % times.clip(1), 0)
    assert set((ended.accesses.numpy()[times > 0] // times[times > 0]).tolist()) <= {1, 2}
    assert set(ended.cached_slots.tolist()) == set(part.plan.cached.tolist())


@settings(deadline=None)
@given(st.integers(0, most_slots(1_000_000) - 1), st.integers(0, 2**40))
def test_hashes_are_exact(slot, salt):
    a, b, p = constants(8, 1_000_000, salt)
    assert all(0 < int(x) < 10**9 for x in a)
    assert all(16_000_000 < int(x) < 17_000_000 for x in p)
    assert np.all(p[:, None] % np.arange(2, 4124))
    exact = [(int(x) * (slot + 1) + int(y)) % int(z) % 1_000_000 for x, y, z in zip(a, b, p, strict=True)]
    assert hashes(np.array([slot]), 8, 1_000_000, salt)[0].tolist() == exact


def splitmix(salt: int, count: int) -> list[int]:
    """The words of a salt, in Python's whole numbers."""
    golden, mask = 0x9E3779B97F4A7C15, 2**64 - 1

    def mixed(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return z ^ (z >> 31)

    start = mixed(salt + golden & mask)
    return [mixed(start + k * golden & mask) for k in range(1, count + 1)]


@settings(deadline=None)
@given(st.integers(0, 2**40), st.integers(1, 9), st.integers(2, 300))
def test_hash_functions_are_the_same_in_every_process_and_on_every_machine(salt, functions, buckets):
    words = splitmix(salt, 3 * functions)
    primes = [n for n in range(16 * buckets + 1, 17 * buckets) if all(n % k for k in range(2, math.isqrt(n) + 1))]
    if primes:
        expected = (
            [w % (10**9 - 1) + 1 for w in words[:functions]],
            [w % 10**9 for w in words[functions : 2 * functions]],
            [primes[w % len(primes)] for w in words[2 * functions :]],
        )
        assert tuple(column.tolist() for column in constants(functions, buckets, salt)) == expected


def test_codes_are_spread_and_differ_by_salt():
    one, other = (codes(np.arange(4000), 16, 1_000_000, salt, "uniform") for salt in (1, 2))
    assert np.abs(one).max() <= 1
    assert np.abs(one.mean(axis=0)).max() < 0.06
    np.testing.assert_allclose(one.var(axis=0), 1 / 3, atol=0.03)
    across = np.abs(np.corrcoef(one.T, other.T)[:16, 16:])
    assert across.mean() < 0.02
    assert across.max() < 0.2
    normal = codes(np.arange(4000), 16, 1_000_000, 1, "gaussian")
    assert abs(normal.mean()) < 0.02
    assert normal.var() == pytest.approx(1, abs=0.03)
    np.testing.assert_array_equal(codes(np.array([17, 5]), 16, 1_000_000, 1, "uniform"), one[[17, 5]])


@given(st.integers(0, 10**6))
def test_every_block_hashes_with_a_salt_of_its_own(salt):
    corners = [(0, 30, 0, 4), (30, 70, 0, 4), (0, 30, 4, 8), (30, 70, 4, 8)]
    plans = [DHE(salt=salt).plan(Region("block", *corner), 10**6) for corner in corners]
    again = [DHE(salt=salt + 1).plan(Region("block", *corner), 10**6) for corner in corners]
    assert len({plan.salt for plan in (*plans, *again)}) == 8
    assert plans == [DHE(salt=salt).plan(Region("other", *corner), 10**6) for corner in corners]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 4), st.sampled_from([1, 16, 64]), st.integers(1, 400_000), st.sampled_from(["linear", "bn_mish"]))
def test_dhe_width_is_the_largest_within_the_budget(depth, width, values, last):
    method = DHE(depth=depth, last_layer=last)
    widths = method.widths(width, values)
    assert (widths is None) == (values < method.least(Region("e", 0, 9, 0, width)))
    if widths is not None:
        assert method.values(widths) <= values
        wider = (widths[0], *[w + 1 for w in widths[1:-1]], width)
        assert method.values(wider) > values


@pytest.mark.parametrize("norm", ["before", "after", "none"])
@pytest.mark.parametrize("last", ["linear", "bn_mish"])
def test_dhe_files_fold_the_normalisation_in(norm, last):
    part = NetworkPlan(40, (16, 9, 8, 6), 1000, "uniform", norm, last, 3).build(noise(0, "dhe"))
    generator = noise(1, "statistics")
    for layer in part.norms:
        for tensor in (layer.running_mean, layer.running_var, layer.weight.data, layer.bias.data):
            tensor.uniform_(0.5, 1.5, generator=generator)
    weight = part.weight().detach().numpy()
    np.testing.assert_allclose(in_file(part, 40, 6), weight, atol=2e-5)
    alone = torch.cat([part(torch.tensor([i])) for i in range(40)]).detach().numpy()
    np.testing.assert_allclose(alone, weight, atol=2e-5)


def test_dhe_trains_on_the_statistics_of_distinct_ids_and_survives_a_single_one():
    part: HashNetwork = NetworkPlan(40, (16, 9, 6), 1000, "uniform", "before", "linear", 3).build(noise(0, "dhe"))
    live = part.drawn()
    once, often = live(torch.tensor([1, 2, 3])), live(torch.tensor([1, 2, 3, 3, 3]))
    torch.testing.assert_close(once, often[:3])
    assert torch.isfinite(live(torch.tensor([5, 5]))).all()
    assert float(part.norms[0].running_mean.abs().sum()) > 0


@settings(max_examples=30, deadline=None)
@given(st.sets(st.integers(0, 39), max_size=12), st.lists(st.integers(0, 39), min_size=1, max_size=12))
def test_hot_vectors_of_dhe_are_read_from_memory_and_follow_the_network(hot, slots):
    plan = NetworkPlan(40, (16, 9, 6), 1000, "uniform", "before", "linear", 3)
    part: HashNetwork = replace(plan, hot=np.array(sorted(hot), np.int64)).build(noise(0, "dhe"))
    assert part.plan == plan
    ids, calls, network = torch.tensor(slots), [], part._network
    part._network = lambda x: calls.append(len(x)) or network(x)  # type: ignore[method-assign]
    cold = len(set(slots) - hot)
    with torch.no_grad():
        expected = network(part.store.of(ids))
        for known in ([len(hot)] if hot else [], []):
            torch.testing.assert_close(part(ids), expected)
            assert calls == known + [cold] * (cold > 0)
            calls.clear()
        part.biases[-1] += 1
        torch.testing.assert_close(part(ids), expected + 1)
        part.norms[0].running_mean += 1
        torch.testing.assert_close(part(ids), network(part.store.of(ids)))
        calls.clear()
    part(ids)
    part.drawn()(ids)
    assert calls == [len(set(slots))] * 2
    np.testing.assert_allclose(in_file(part, 40, 6), part.weight().detach().numpy(), atol=2e-5)


def test_hot_rows_of_dhe_are_the_frequent_ones_and_cost_four_bytes_each_in_a_file(clicks, model, tmp_path):
    sizes, files = {}, {}
    for hot in (0, 7, 10**9):
        method = DHE(hidden=(9,), functions=16, hot=hot)
        small = compress(model, clicks, method, "sparsity=0.5", training=TRAINING)
        (part,), files[hot] = small.table.compositions, tmp_path / f"{hot}.safetensors"
        small.save(files[hot])
        sizes[hot] = small.sizes["table"]
        frequent = np.argsort(-clicks.counts, kind="stable")[:hot]
        slots = slots_of(small.table.regions[0], clicks, "file")
        np.testing.assert_array_equal(part.plan.hot, np.sort(slots[frequent]))
        with pytest.raises(BudgetError) as caught:
            method.prepare(model, clicks, Run(None)).table(Room(size_bytes=10))
        assert caught.value.least_bytes == sizes[hot]
    assert sizes[7] - sizes[0] == 4 * 7
    assert sizes[10**9] - sizes[0] == 4 * clicks.schema.rows
    read = {}
    for hot, path in files.items():
        recommender = pr.open(path)
        rows = recommender.artifact.vocabulary.file_rows(clicks.hashes)[clicks.valid.ids[:200]]
        first = recommender.logits(rows)
        np.testing.assert_array_equal(first, recommender.logits(rows))
        read[hot] = first
    for hot in (7, 10**9):
        np.testing.assert_allclose(read[hot], read[0], atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 39), min_size=1, max_size=9), st.booleans())
def test_gradients_of_dhe_are_those_of_a_network_that_sees_every_occurrence(slots, normed):
    """Without statistics, going through the network once or often makes no difference; with them, all stays finite."""
    plan = NetworkPlan(40, (8, 5, 4, 6), 100, "uniform", "before" if normed else "none", "linear", 1)
    part: HashNetwork = plan.build(noise(0, "dhe"))
    upstream = torch.randn(len(slots), 6, generator=noise(1, "upstream"))
    (part.drawn()(torch.tensor(slots)) * upstream).sum().backward()
    found = [p.grad for p in part.parameters()]
    assert all(bool(torch.isfinite(gradient).all()) for gradient in found)
    if not normed:
        x = torch.from_numpy(codes(np.array(slots), 8, 100, 1, "uniform"))
        for i, (weight, bias) in enumerate(zip(part.weights, part.biases, strict=True)):
            x = F.linear(x if i == 0 else x * torch.tanh(torch.log1p(torch.exp(x))), weight, bias)
        expected = torch.autograd.grad((x * upstream).sum(), list(part.parameters()))
        torch.testing.assert_close(found, list(expected), rtol=1e-4, atol=1e-5)


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 20), st.integers(2, 8), st.integers(0, 99))
def test_codes_of_few_bits_are_packed_and_unpacked(rows, width, bits, seed):
    found = np.random.default_rng(seed).integers(0, 2**bits, (rows, width), dtype=np.uint8)
    packed = pack_codes(found, bits)
    assert packed.shape == (rows, -(-width * bits // 8))
    np.testing.assert_array_equal(unpack_codes(packed, width, bits), found)


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.sampled_from(["fp32", "fp16", "int8"]))
def test_factors_take_the_bytes_that_were_promised(rows, columns, storage):
    values = np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float32)
    arrays = encode_factor("core", values, storage)
    assert sum(a.nbytes for a in arrays.values()) == factor_bytes((rows, columns), storage)


@pytest.fixture(scope="module")
def clicks(tmp_path_factory):
    source = pr.sources.Synthetic(rows=3000, cardinalities=(300, 80, 20, 5), hashed=True)
    return pr.encode(source, None, tmp_path_factory.mktemp("clicks") / "data")


@pytest.fixture(scope="module")
def model(clicks):
    return pr.backbones.DeepFM(dim=8, hidden=(8,)).build(clicks, 0)


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_files_score_as_the_trained_model_does(method, model, clicks, tmp_path):
    small = compress(model, clicks, method, "sparsity=0.6", training=TRAINING)
    assert isinstance(small.table, ComposedTable)
    assert small.table.values() <= model.table.values() - int(0.6 * model.table.values())
    small.save(tmp_path / "file")
    recommender = pr.open(tmp_path / "file")
    rows = recommender.artifact.vocabulary.file_rows(clicks.hashes)[clicks.valid.ids[:200]]
    expected = small.model(torch.from_numpy(clicks.valid.ids[:200].copy())).detach().numpy()
    np.testing.assert_allclose(recommender.logits(rows), expected, atol=1e-5)
    unknown = np.full((1, clicks.schema.width), -1)
    known = torch.tensor([[f.oov_row for f in clicks.schema.fields]])
    np.testing.assert_allclose(recommender.logits(unknown), small.model(known).detach().numpy(), atol=1e-5)


@pytest.mark.delicate
@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_training_changes_the_table_and_lowers_the_loss(method, model, clicks):
    run = Run(None, training=TRAINING)
    ladder = method.prepare(model, clicks, run)
    room = Room(values=model.table.values() // 2)
    draft = ladder.table(room)
    final = ladder.finish(model.with_table(draft), room)
    assert not torch.equal(draft.weight(), final.table.weight())
    curve = [record["loss"] for record in run.logged() if record.get("stage") == method.name and "loss" in record]
    assert curve[-1] < curve[0]


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_sizes_are_known_before_training(method, model, clicks):
    ladder = method.prepare(model, clicks, Run(None))
    for storage in ("fp32", "fp16", "int8"):
        with pytest.raises(BudgetError) as caught:
            ladder.table(Room(size_bytes=10, storage=storage))
        for size in (caught.value.least_bytes, 2 * caught.value.least_bytes):
            table = ladder.table(Room(size_bytes=size, storage=storage))
            stored = np.flatnonzero(table.stored().numpy())
            rows = vocabulary.Vocabulary.build(clicks.schema, table.stored().numpy(), clicks.hashes)[1]
            assert table.pack(storage, rows).size_bytes <= size
            assert len(stored) == len(rows)
    with pytest.raises(BudgetError) as caught:
        ladder.table(Room(values=1))
    least = caught.value.least_values
    assert 1 < ladder.table(Room(values=least)).values() <= least
    with pytest.raises(BudgetError):
        ladder.table(Room(values=least - 1))


def test_slots_are_places_in_the_file_and_unknown_rows_come_last(clicks):
    region = regions(pr.backbones.DeepFM(dim=8).blocks(clicks.schema), "block")[0]
    slots = slots_of(region, clicks, "file")
    assert sorted(slots.tolist()) == list(range(clicks.schema.rows))
    unknown = oov_rows(clicks.schema).numpy()
    named = vocabulary.Vocabulary.build(clicks.schema, ~unknown, clicks.hashes)[1]
    np.testing.assert_array_equal(slots[named], np.arange(len(named)))
    assert slots[unknown].min() == len(named)


def test_places_in_the_file_are_sorted_once(model, clicks, monkeypatch):
    data, sorts = pr.Dataset.open(clicks.path), []
    monkeypatch.setattr(vocabulary, "_ordered", lambda *call, own=vocabulary._ordered: sorts.append(1) or own(*call))
    for method in (pr.methods.DHE(functions=8, order="file"), pr.methods.TTRec(order="file")):
        method.prepare(model, data, Run(None)).table(Room(size_bytes=4 * model.table.values()))
    assert len(sorts) == 1


@pytest.mark.parametrize("scope", ["block", "joint"])
@pytest.mark.parametrize("name", ["qr", "dhe", "tt_rec"])
def test_any_tiling_of_blocks_will_do(name, scope, clicks, model):
    """Two row ranges times two column ranges, as in NeuMF."""
    n = clicks.schema.rows
    cut = clicks.schema.fields[0].stop
    blocks = tuple(
        Block(f"{rows}{columns}", a, b, left, right)
        for rows, a, b in (("u", 0, cut), ("i", cut, n))
        for columns, left, right in (("gmf", 0, 4), ("mlp", 4, 10))
    )
    dense = DenseTable(clicks.schema, blocks, torch.zeros(n, 10))
    method = registry.load("methods", name)(scope=scope)
    ladder = method.prepare(model, clicks, Run(None))
    ladder = replace(ladder, start=model.with_table(dense))
    table = ladder.table(Room(values=n * 5))
    assert len(table.regions) == (4 if scope == "block" else 2)
    assert table.values() <= n * 5
    weight = table.weight()
    assert weight.shape == (n, 10)
    assert (weight.abs().sum(dim=1) > 0).all()
    ids = torch.tensor([[0, cut], [n - 1, cut - 1]])
    torch.testing.assert_close(table(ids), weight[ids])
    rows = vocabulary.Vocabulary.build(clicks.schema, table.stored().numpy(), clicks.hashes)[1]
    packed = table.pack("fp32", rows)
    fields = clicks.schema.field_of_row[rows]
    for f in range(clicks.schema.width):
        mine = np.flatnonzero(fields == f)
        found = packed.lookup(mine[:, None], np.array([f], np.int32))[:, 0]
        np.testing.assert_allclose(found, weight.detach().numpy()[rows[mine]], atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_budget_of_every_tiling_is_kept_and_unreachable_ones_name_the_least(data):
    users, items, half = (data.draw(st.integers(2, most)) for most in (60, 60, 4))
    fields = (Field("user", users, 0, "dense", oov=False), Field("item", items, users, "dense", oov=False))
    schema, ranges = Schema("cf", fields), data.draw(st.sampled_from([((0, 1),), ((0, 1), (1, 3))]))
    blocks = tuple(
        Block(f"{f.name}{left}", f.offset, f.stop, 2 * half * left, 2 * half * right)
        for f in fields
        for left, right in ranges
    )
    dense = DenseTable(schema, blocks, torch.zeros(users + items, 2 * half * ranges[-1][1]))
    method = data.draw(
        st.sampled_from(
            [QR(), QR(operation="concat", large="quotient"), TTRec(), TTRec(cores=2, cache_share=0), CERP(),
             DHE(depth=1, functions=4), DHE(depth=2, functions=8, last_layer="bn_mish"), QR(divisor=3),
             TTRec(ranks=(2, 3)), DHE(hidden=(3, 2), functions=4), CERP(bucket=7)]
        )
    )  # fmt: skip

    def plan(region, values):
        return method.plan(region, values, np.arange(region.rows))

    start, scope = SimpleNamespace(schema=schema, table=dense), data.draw(st.sampled_from(["block", "joint"]))
    ladder = ComposedLadder(
        name=method.name, start=start, data=SimpleNamespace(), run=Run(None), scope=scope, order="id",
        plan=plan, least=method.least, train=lambda m: m,
    )  # fmt: skip
    values = data.draw(st.integers(0, dense.values()))
    with pytest.raises(BudgetError) as caught:
        ladder.table(Room(values=-1))
    fewest = caught.value.least_values
    with pytest.raises(BudgetError):
        ladder.table(Room(values=fewest - 1))
    values = max(values, fewest)
    table = ladder.table(Room(values=values))
    assert table.values() <= values
    for region, part in zip(table.regions, table.compositions, strict=True):
        assert part.values() <= -(-values * region.values // dense.values())
        if not isinstance(method, CERP):
            assert part.values() == sum(p.numel() for p in part.parameters())
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, schema.rows, (3, 2, 4)))
    torch.testing.assert_close(table(ids), table.weight()[ids])


def test_a_fixed_configuration_has_one_size(clicks, model):
    rows, width = clicks.schema.rows, 8
    network = 16 * 7 + 7 * 5 + 5 * width + 3 * (7 + 5) + width
    train = train_values(row_factors(rows, 3), width_factors(width, 3), (4, 3))
    for method, size in (
        (QR(divisor=2), (2 + -(-rows // 2)) * width),
        (QR(divisor=rows + 5), (rows + 1) * width),
        (TTRec(ranks=(4, 3), cache_share=0), train),
        (DHE(hidden=(7, 5), functions=16), network),
    ):
        ladder = method.prepare(model, clicks, Run(None))
        with pytest.raises(BudgetError) as caught:
            ladder.table(Room(values=size - 1))
        assert caught.value.least_values == size
        for values in (size, size + 1, 2 * size):
            assert ladder.table(Room(values=values)).values() == size
        with pytest.raises(BudgetError) as caught:
            ladder.table(Room(size_bytes=10))
        assert ladder.table(Room(size_bytes=caught.value.least_bytes)).values() == size
    ladder = TTRec(ranks=(4, 3)).prepare(model, clicks, Run(None))
    for values in (train, train + width - 1, train + 5 * width):
        assert ladder.table(Room(values=values)).values() == train + (values - train) // width * width


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 8), st.sampled_from(["column", "block"]), st.integers(0, 3))
def test_every_code_is_the_nearest_on_an_even_grid(seed, bits, scale, constant):
    random = np.random.default_rng(seed)
    schema = Schema("ctr", (Field("a", 9, 0), Field("b", 4, 9)))
    weight = (random.normal(size=(13, 4)) * random.uniform(0.01, 10)).astype(np.float32)
    weight[:, constant] = 0.25
    table = QuantisedTable(schema, (Block("embedding", 0, 13, 0, 4),), weight, bits, scale)
    found = table.weight().numpy()
    for field in schema.fields:
        rows = slice(field.offset, field.stop)
        for c in range(4):
            group = weight if scale == "block" else weight[rows, c]
            step = (group.max().astype(np.float64) - group.min()) / (2**bits - 1)
            assert np.abs(found[rows, c] - weight[rows, c]).max() <= step / 2 + 1e-5 * np.abs(group).max()
            place = (found[rows, c] - group.min()) / step if step else np.zeros(1)
            np.testing.assert_allclose(place, np.rint(place), atol=1e-3)
    again = QuantisedTable(schema, table.blocks, found, bits, scale).weight().numpy()
    np.testing.assert_allclose(again, found, atol=1e-5 * float(np.abs(weight).max()))
    if scale == "column":
        np.testing.assert_array_equal(found[:, constant], 0.25)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 8), st.sampled_from(["column", "block"]), st.floats(-3, 3))
def test_a_rounded_zero_point_has_zero_on_its_grid(seed, bits, scale, shift):
    random = np.random.default_rng(seed)
    schema = Schema("ctr", (Field("a", 9, 0), Field("b", 4, 9)))
    weight = (random.normal(size=(13, 4)) + shift).astype(np.float32)
    table = QuantisedTable(schema, (Block("embedding", 0, 13, 0, 4),), weight, bits, scale, "rounded")
    found = table.weight().numpy()
    for field in schema.fields:
        rows = slice(field.offset, field.stop)
        for c in range(4):
            group = weight if scale == "block" else weight[rows, c]
            low, high = float(group.min()), float(group.max())
            step = (high - low) / (2**bits - 1)
            zero = round(-low / step)
            place = found[rows, c] / step
            np.testing.assert_allclose(place, np.rint(place), atol=1e-2)
            codes = np.clip(np.rint((weight[rows, c] + zero * step) / step), 0, 2**bits - 1)
            near = np.abs((weight[rows, c] / step) % 1 - 0.5) < 1e-3
            np.testing.assert_allclose(found[rows, c][~near], ((codes - zero) * step)[~near], atol=1e-4)
            assert np.abs(found[rows, c] - weight[rows, c]).max() <= step * (1 + 1e-3)
    np.testing.assert_array_equal(in_file_of(table), found)


def in_file_of(table: QuantisedTable) -> np.ndarray:
    """All vectors of a quantised table, through the arrays of a file."""
    packed = table.pack()
    again = Packed.from_arrays(packed.meta(), packed.arrays())
    fields = table.schema.fields
    parts = [again.lookup(np.arange(f.offset, f.stop)[:, None], np.array([i])) for i, f in enumerate(fields)]
    return np.concatenate(parts)[:, 0]


def test_quantised_tables_are_within_half_a_step(clicks, model):
    weight = model.table.weight().detach()
    for bits in (8, 4):
        table = PTQ(bits=bits).prepare(model, clicks, Run(None)).table(Room(values=model.table.values()))
        step = (weight.max() - weight.min()) / (2**bits - 1)
        embedding = (table.weight() - weight)[:, :8]
        assert float(embedding.abs().max()) <= 0.5 * float(step) + 1e-6
        assert table.values() == model.table.values()
    with pytest.raises(BudgetError) as caught:
        compress(model, clicks, PTQ(), "sparsity=0.5")
    assert caught.value.least_values == model.table.values()
    with pytest.raises(BudgetError) as caught:
        compress(model, clicks, PTQ(bits=4), "1%")
    assert compress(model, clicks, PTQ(bits=4), "90%").sizes["table"] == caught.value.least_bytes


def test_damaged_blocks_are_refused():
    part = QRPlan(50, 4, 7).build(noise(1, "qr"))
    block = part.pack(place(50, 4), "fp32", None)
    zeros = np.zeros((1, 4), np.float32)
    packed = Packed(50, (block,), zeros, zeros)
    arrays, meta = packed.arrays(), packed.meta()
    for change in ({"divisor": 0}, {"divisor": 8}, {"slots": 49}, {"operation": "div"}):
        damaged = {**meta["blocks"][0], "settings": {**meta["blocks"][0]["settings"], **change}}
        with pytest.raises(ArtifactError):
            Packed.from_arrays({**meta, "blocks": [damaged]}, arrays)
    with pytest.raises(ArtifactError):
        Packed.from_arrays({**meta, "blocks": [{**meta["blocks"][0], "layout": ["product"]}]}, arrays)


@pytest.mark.parametrize(
    "settings",
    [{"operation": "div"}, {"init": "zeros"}, {"large": "both"}],
)
def test_bad_words_are_refused(settings):
    with pytest.raises(ConfigError):
        QR(**settings)


@pytest.mark.parametrize(
    ("method", "bad"),
    [
        (QR, {"divisor": 0}),
        (TTRec, {"ranks": (4,)}),
        (TTRec, {"ranks": (4, 0)}),
        (TTRec, {"ranks": (4, 4), "cores": 2}),
        (DHE, {"hidden": (8, 0)}),
        (DHE, {"hot": -1}),
        (TTRec, {"cache_by": "luck"}),
        (PTQ, {"zero": "none"}),
    ],
)
def test_fixed_configurations_out_of_range_are_named(method, bad):
    with pytest.raises(ConfigError, match=f"`{next(iter(bad))}` must"):
        method(**bad)


def test_a_file_of_each_layout_is_read_without_torch(clicks, model, tmp_path):
    paths = []
    for i, method in enumerate([*METHODS[::2], PTQ(bits=4)]):
        paths.append(tmp_path / f"{i}.safetensors")
        compress(model, clicks, method, "70%", training=TRAINING).save(paths[-1])
        Artifact(paths[-1]).verify()
    code = (
        "import sys\nfrom pocketrec import runtime\n"
        "for path in sys.argv[1:]:\n"
        "    model = runtime.open(path)\n"
        "    print(model.score({f.name: None for f in model.schema.fields}))\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *map(str, paths)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == len(paths)


def test_an_interrupted_warm_up_goes_on(clicks, model, tmp_path):
    method = METHODS[4]
    whole = compress(model, clicks, method, "sparsity=0.6", training=TRAINING)
    folder = tmp_path / "run"
    compress(model, clicks, method, "sparsity=0.6", run=folder, training=TRAINING)
    steps = sorted((folder / "steps").glob("tt_rec-*.safetensors"))
    assert steps
    for step in steps:
        step.unlink()
    again = compress(model, clicks, method, "sparsity=0.6", run=folder, training=TRAINING)
    assert torch.equal(whole.table.weight(), again.table.weight())


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
