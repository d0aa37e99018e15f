"""Coding of final vectors against exhaustive search, closed forms and a decoder that reads one bit after the other."""

from __future__ import annotations

import itertools
from dataclasses import replace

import constants_definition
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from numpy.testing import assert_allclose, assert_array_equal
from scipy.special import ndtri
from trellis_cases import coded, records

from pocketrec.attribution.list_margin import ListMargin, lists, margin, ranks_by_products
from pocketrec.backbones.gmf import GMF
from pocketrec.backbones.lightgcn import LightGCN
from pocketrec.backbones.mf import MF
from pocketrec.backbones.neumf import NeuMF
from pocketrec.compression.compress import compress
from pocketrec.errors import ArtifactError, BudgetError
from pocketrec.evaluation.metrics import to_csr
from pocketrec.families.coding.lists import beam
from pocketrec.families.coding.lists.gain_shape import GainShape, sparse_sums
from pocketrec.families.coding.lists.plan import DISTORTION, TrellisPlan
from pocketrec.families.coding.lists.table import TrellisTable
from pocketrec.format import trellis_codes
from pocketrec.format.artifact import Artifact
from pocketrec.format.layouts.trellis import Records, Shape, TrellisBlock, encode, geometric
from pocketrec.format.packed import Packed
from pocketrec.format.trellis_codes import CODES, Code, code_values
from pocketrec.methods.rate_distortion import RateDistortion
from pocketrec.models.baked import BakedModel
from pocketrec.native import library
from pocketrec.training.run import Run


def block(shape: Shape, own: Records, width: int) -> TrellisBlock:
    return TrellisBlock("all", 0, shape.users + shape.items, 0, width, "trellis", shape, arrays=encode(shape, own))


def spelled_out(stored: TrellisBlock) -> np.ndarray:
    """Every row of a block, from a stream of bits."""
    shape, width, arrays = stored.shape, stored.width, stored.arrays
    stream = "".join(f"{byte:08b}"[::-1] for byte in arrays["codes"].tolist())
    place = 0

    def take(bits: int) -> int:
        nonlocal place
        place += bits
        return int(stream[place - bits : place][::-1] or "0", 2)

    def rest(rate: int, scales: np.ndarray) -> np.ndarray:
        if not rate:
            return np.zeros(width)
        code, scale, state, values = CODES[rate - 1], float(scales[take(2)]), 0, []
        for _ in range(-(-width // code.span)):
            state = state >> code.bits | take(code.bits) << (code.memory - code.bits)
            values.extend(code.table[state].tolist())
        return scale * np.array(values[:width])

    gains, items, users = (
        least * ratio ** np.arange(16.0) for least, ratio in arrays["scales"][:6].reshape(3, 2).tolist()
    )
    step, coefficients = float(arrays["scales"][6]), arrays["scales"][7:].tolist()
    packed = ["".join(f"{byte:08b}"[::-1] for byte in row) for row in arrays["centroids"].tolist()]
    shared = np.array([[(int(r[4 * c : 4 * c + 4][::-1], 2) - 7.5) * step for c in range(width)] for r in packed])
    numbers, planes = [], arrays["planes"].tolist()
    for first in range(0, shape.items, 256):
        group = min(256, shape.items - first)
        words = [[planes.pop(0) for _ in range(-(-group // 8))] for _ in range(shape.planes)]
        numbers += [sum((w[i // 8] >> i % 8 & 1) << p for p, w in enumerate(words)) for i in range(group)]
    vectors, directions = [], []
    for number in numbers:
        gain, chosen = gains[take(4)], take(shape.shapes)
        vector = shared[chosen] + rest(shape.rates[number], items)
        vectors.append(gain * vector)
        directions.append(vector / max(np.linalg.norm(vector), 1e-20))
    candidates = [d for d, number in zip(directions, numbers, strict=True) if number >= shape.first]
    place = -(-place // 8) * 8
    found = []
    for _ in range(shape.users):
        chosen = [take(shape.places) for _ in range(shape.atoms)]
        vector = sum((c * candidates[k] for c, k in zip(coefficients, chosen, strict=True)), np.zeros(width))
        found.append(vector + rest(shape.rest, users))
    return np.array([*found, *vectors])


@given(coded())
@settings(max_examples=40, deadline=None)
def test_a_block_reads_what_its_bits_say(case):
    shape, own, width = case
    stored = block(shape, own, width)
    stored.check(2)
    expected = spelled_out(stored)
    packed = Packed(stored.rows, (stored,), np.ones((2, width), np.float32), np.ones((2, width), np.float32))
    rows = np.arange(-1, stored.rows + 1)[:, None]
    wanted = np.concatenate([np.ones((1, width)), expected, np.ones((1, width))])
    assert_allclose(packed.lookup_numpy(rows, np.zeros(1, np.int32))[:, 0], wanted, rtol=1e-4, atol=1e-4)
    for most in library.LEVELS:
        library.limit(most)
        assert_allclose(packed.lookup(rows, np.zeros(1, np.int32))[:, 0], wanted, rtol=1e-4, atol=1e-4)
    library.limit(library.LEVELS[-1])


@given(coded())
@settings(max_examples=40, deadline=None)
def test_the_size_is_known_from_the_counts(case):
    shape, own, width = case
    counts = np.bincount(own.classes, minlength=len(shape.rates))
    assert block(shape, own, width).size_bytes == shape.size_bytes(width, counts)


@pytest.mark.parametrize("code", CODES, ids=str)
def test_tables_are_quantiles_of_a_normal_variable_in_another_order(code):
    assert code.table.shape == (1 << code.memory, code.span)
    if code.memory == code.bits:
        return
    ranks = ndtri((np.arange(1 << code.memory) + 0.5) / (1 << code.memory))
    ranks *= np.sqrt(1 - 4.0 ** (-code.bits / code.span))
    same = np.isclose(np.sort(code.table, axis=0), ranks[:, None], atol=1e-3).mean()
    assert same == 1 or code.span == 1
    assert_array_equal(code.table * 2**14, np.rint(code.table * 2**14))


@pytest.mark.delicate
@pytest.mark.parametrize("rate", range(1, len(CODES) + 1))
def test_codes_leave_the_share_of_energy_that_plans_count_on(rate):
    rng = np.random.default_rng(rate)
    rows = rng.normal(size=(60 if CODES[rate - 1].bits < 6 else 10, 64)).astype(np.float32)
    eye = np.broadcast_to(np.eye(64, dtype=np.float32), (len(rows), 64, 64))
    found = beam.beam_search(CODES[rate - 1], rows, np.ones(len(rows)), eye, np.ones_like(rows), 24)
    left = float(np.square(rows - code_values(rate, found, 64)).mean())
    assert left == pytest.approx(DISTORTION[rate], rel=0.08 if CODES[rate - 1].bits < 6 else 0.5)


def small(bits: int, span: int, memory: int, seed: int = 0) -> Code:
    """A code that no file has, with a table like those of the others."""
    code = Code(bits, span, memory)
    vars(code)["table"] = constants_definition.trellis(bits, span, memory, seed)
    return code


SMALL = (small(1, 1, 3, 1), small(2, 1, 4, 1), small(1, 2, 4, 2), small(2, 3, 5, 3), small(2, 1, 2))


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("code", SMALL, ids=str)
def test_a_full_beam_is_exhaustive_search(code, compiled, monkeypatch):
    if not compiled:
        monkeypatch.setattr(library, "compiled", lambda: None)
    monkeypatch.setattr(beam, "_CANDIDATES", 1 << 20)
    rng = np.random.default_rng(3)
    width = 5 if code.bits < 2 or code.span > 1 else 4
    rows = rng.normal(size=(4, width)).astype(np.float32)
    mix = rng.normal(size=(4, width, width + 2))
    metrics = (mix @ mix.transpose(0, 2, 1)).astype(np.float32)
    scales = rng.uniform(0.5, 1.5, 4).astype(np.float32)
    found = beam.beam_search(code, rows, scales, *beam.factors(metrics), 1 << 12)
    ridge = beam.RIDGE * np.trace(metrics, axis1=1, axis2=2) / width

    def cost(row: int, codes: np.ndarray) -> float:
        state, values = 0, []
        for number in codes.tolist():
            state = state >> code.bits | number << (code.memory - code.bits)
            values.extend(code.table[state].tolist())
        error = rows[row] - scales[row] * np.array(values[:width])
        return float(error @ (metrics[row] + ridge[row] * np.eye(width)) @ error)

    every = np.array(list(itertools.product(range(1 << code.bits), repeat=code.steps(width))))
    for row in range(4):
        best = min(cost(row, codes) for codes in every)
        assert cost(row, found[row]) == pytest.approx(best, rel=1e-4)


@pytest.mark.delicate
@pytest.mark.parametrize("code", [CODES[0], CODES[2], CODES[3], CODES[5], CODES[7], CODES[8]], ids=str)
def test_numpy_searches_as_the_compiled_code(code, monkeypatch):
    rng = np.random.default_rng(4)
    rows, mix = rng.normal(size=(6, 17)).astype(np.float32), rng.normal(size=(6, 17, 20))
    upper, weights = beam.factors((mix @ mix.transpose(0, 2, 1)).astype(np.float32))
    fast = beam.beam_search(code, rows, np.ones(6), upper, weights, 5)
    monkeypatch.setattr(library, "compiled", lambda: None)
    assert_array_equal(beam.beam_search(code, rows, np.ones(6), upper, weights, 5), fast)


def test_factors_give_the_metric_back():
    mix = np.random.default_rng(0).normal(size=(7, 9, 12))
    metrics = (mix @ mix.transpose(0, 2, 1)).astype(np.float32)
    upper, weights = beam.factors(metrics)
    assert_allclose(np.tril(upper, -1), 0)
    assert_allclose(np.einsum("mii->mi", upper), 1, rtol=1e-6)
    ridge = beam.RIDGE * np.trace(metrics, axis1=1, axis2=2)[:, None, None] / 9 * np.eye(9)
    assert_allclose(np.einsum("mij,mj,mkj->mik", upper, weights, upper), metrics + ridge, rtol=1e-4, atol=1e-4)


def test_sums_find_what_targets_are_made_of():
    rng = np.random.default_rng(0)
    atoms = np.linalg.qr(rng.normal(size=(32, 32)))[0].astype(np.float32)
    picked = np.array([rng.choice(32, 2, replace=False) for _ in range(60)])
    targets = (0.8 * atoms[picked[:, 0]] + 0.5 * atoms[picked[:, 1]]).astype(np.float32)
    chosen, coefficients = sparse_sums(targets, atoms, 2)
    assert_array_equal(chosen, picked)
    assert_allclose(coefficients, [0.8, 0.5], atol=1e-4)


@pytest.fixture(params=[MF(dim=8), GMF(dim=8), LightGCN(dim=8)], ids=lambda b: b.name)
def ranker(request, lab):
    return BakedModel.of(lab.model(request.param))


@pytest.mark.delicate
def test_margins_by_the_text(lab, ranker):
    data = lab.data("cf")
    found = margin(ranker, lists(ranker, data))
    matrix = ranker.table.weight().detach()
    users, items = matrix[:30], matrix[30:]
    scores = ranker.scores(users, items).detach().numpy().astype(np.float64)
    seen = to_csr(data.train.ids[:, 0], data.train.ids[:, 1] - 30, 30)
    for user in range(30):
        own = set(range(40)) - set(seen[1][seen[0][user] : seen[0][user + 1]].tolist())
        order = sorted(own, key=lambda i: -scores[user, i])
        listed = found.items[user, : len(order)]
        assert sorted(listed) == sorted(order)
        assert_allclose(scores[user, listed], scores[user, order], atol=1e-6 * np.abs(scores[user]).max())
        assert (found.items[user, len(order) :] == -1).all()
        gap = scores[user, order[19]] - scores[user, order[-1]]
        weight = np.exp(np.minimum((scores[user, order] - scores[user, order[19]]) / gap, 0))
        assert_allclose(found.weights[user, : len(order)], weight / weight.sum(), rtol=2e-3)
        assert found.weights[user].sum() == pytest.approx(1, rel=1e-5)


def test_metrics_are_squared_changes_of_scores(lab, ranker):
    data = lab.data("cf")
    found = margin(ranker, lists(ranker, data))
    matrix = ranker.table.weight().detach()
    users, items = matrix[:30], matrix[30:]
    rng = np.random.default_rng(0)
    error = torch.from_numpy(rng.normal(size=matrix.shape[1]).astype(np.float32))
    before, item_after, user_after = (
        ranker.scores(u, v).detach().numpy().astype(np.float64)
        for u, v in ((users, items), (users, items + error), (users + error, items))
    )
    weights = np.zeros((30, 40))
    for user in range(30):
        there = found.items[user] >= 0
        weights[user, found.items[user][there]] = found.weights[user][there]
    own = found.item_metrics(np.arange(40)) - np.array([_share(found.users, 1.0 * t) for t in found.item_traces])
    changes = (weights * (item_after - before) ** 2).sum(axis=0) / found.length**2
    assert_allclose(np.einsum("i,mij,j->m", error, own, error), changes, rtol=1e-3, atol=1e-5 * changes.max())
    own = found.user_metrics(np.arange(30)) - np.array([_share(found.vectors, 0.3 * t) for t in found.user_traces])
    changes = (weights * (user_after - before) ** 2).sum(axis=1)
    assert_allclose(np.einsum("i,mij,j->m", error, own, error), changes, rtol=1e-3, atol=1e-5 * changes.max())


def _share(vectors: np.ndarray, trace: float) -> np.ndarray:
    mean = vectors.T @ vectors
    return mean * (trace / np.trace(mean))


def test_only_inner_products_are_coded_for_lists(lab):
    kinds = {MF(): True, GMF(): True, NeuMF(): False, LightGCN(): False}
    for backbone, expected in kinds.items():
        assert ranks_by_products(lab.model(backbone)) == expected
    assert ranks_by_products(BakedModel.of(lab.model(LightGCN())))


def vectors(users: int = 300, items: int = 500, width: int = 16, seed: int = 0):
    """Users that are sums of items, and weights that fall with the item."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(12, width))
    item = (centres[rng.integers(0, 12, items)] + 0.4 * rng.normal(size=(items, width))).astype(np.float32)
    user = (item[rng.integers(0, items, (users, 3))] * [[[0.6], [0.4], [0.3]]]).sum(axis=1).astype(np.float32)
    scores = user @ item.T
    best = np.argsort(-scores, axis=1)[:, :60].astype(np.int32)
    weights = np.full(best.shape, 1 / best.shape[1], np.float32)
    length = float(np.linalg.norm(user, axis=1).mean())
    return user, item, ListMargin(best, weights, user / np.float32(length), item, length)


@pytest.mark.delicate
@pytest.mark.parametrize("share", [0.008, 0.02, 0.05, 0.1, 0.2])
def test_plans_fill_their_budget_and_more_bytes_lose_less(share):
    user, item, cost = vectors()
    coder = GainShape(user, item, cost, 0)
    size = int(share * 4 * 16 * 800)
    plan = coder.plan(max(size, coder.least().size_bytes(16)))
    spent = plan.size_bytes(16)
    assert spent <= max(size, coder.least().size_bytes(16))
    assert spent >= 0.99 * size - 8 or share < 0.01
    assert block(plan.shape, coder.encode(plan), 16).size_bytes == spent


@pytest.mark.delicate
def test_scores_come_closer_with_every_byte():
    user, item, cost = vectors()
    coder = GainShape(user, item, cost, 0)
    exact = user / np.linalg.norm(user, axis=1, keepdims=True) @ item.T
    gaps = []
    for share in (0.02, 0.05, 0.1, 0.2):
        plan = coder.plan(int(share * 4 * 16 * 800))
        stored = block(plan.shape, coder.encode(plan), 16)
        out = np.zeros((800, 16), np.float32)
        stored.read(np.arange(800), np.zeros(800, np.int32), out)
        gaps.append(float(np.square(out[:300] / cost.length @ out[300:].T - exact).mean() / np.square(exact).mean()))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 0.01


def test_no_other_classes_lose_less_in_as_many_bits():
    user, item, cost = vectors(items=6)
    coder = GainShape(user, item, cost, 0)
    plan = coder.plan(coder.least().size_bytes(16) + 60)
    rates, bits = np.array(plan.shape.rates), np.array([trellis_codes.rate_bits(r, 16) for r in plan.shape.rates])
    weight = coder._weights(plan.shape.shapes)
    spent, own = bits[plan.classes].sum(), (weight * DISTORTION[rates[plan.classes]]).sum()
    for classes in itertools.product(range(len(rates)), repeat=6):
        if bits[list(classes)].sum() <= spent:
            assert own <= (weight * DISTORTION[rates[list(classes)]]).sum() * 1.1


@pytest.mark.parametrize("budget", ["8%", "20%", "5000 B"])
def test_file_torch_numpy_and_kernel_agree(lab, tmp_path, ranker, budget):
    data = lab.data("cf")
    small = compress(ranker, data, RateDistortion(), "3000 B" if ranker.table.width == 8 and "B" in budget else budget)
    assert isinstance(small.table, TrellisTable)
    small.save(tmp_path / "small")
    artifact = Artifact(tmp_path / "small")
    packed, rows = artifact.packed, artifact.vocabulary.file_rows(data.hashes)
    weight = small.table.weight().numpy()
    assert_array_equal(packed.lookup_numpy(rows[:, None], np.zeros(1, int))[:, 0], weight)
    for most in library.LEVELS:
        library.limit(most)
        assert_allclose(packed.lookup(rows[:, None], np.zeros(1, int))[:, 0], weight, rtol=1e-5, atol=1e-5)
    library.limit(library.LEVELS[-1])
    assert packed.size_bytes == small.sizes["table"]


def test_rows_may_be_packed_in_any_order_of_their_field(lab, ranker):
    small = compress(ranker, lab.data("cf"), RateDistortion(), "10%")
    rng = np.random.default_rng(0)
    rows = np.concatenate([rng.permutation(30), 30 + rng.permutation(40)])
    found = small.table.pack(rows=rows).lookup(np.arange(70)[:, None], np.zeros(1, np.int32))[:, 0]
    assert_allclose(found, small.table.weight().numpy()[rows], rtol=1e-5, atol=1e-6)


def test_a_budget_below_the_gains_is_refused(lab, ranker):
    with pytest.raises(BudgetError, match="gains of"):
        compress(ranker, lab.data("cf"), RateDistortion(), "0.1%")


def test_a_second_budget_reads_the_stored_lists(lab, tmp_path, monkeypatch):
    ranker, data = BakedModel.of(lab.model(LightGCN(dim=8))), lab.data("cf")
    one = compress(ranker, data, RateDistortion(), "10%", run=tmp_path / "run")
    monkeypatch.setattr("pocketrec.methods.rate_distortion.lists", lambda *_: pytest.fail("lists were made again"))
    with Run(tmp_path / "run") as run:
        again = compress(ranker, data, RateDistortion(), "10%", run=run)
    assert_array_equal(one.table.weight(), again.table.weight())


def damaged() -> TrellisBlock:
    rng = np.random.default_rng(0)
    shape = Shape(5, 300, 2, (0, 4), 1, 8, 2, 4)
    classes = (np.arange(300) % 2).astype(np.uint8)
    return block(shape, records(shape, classes, np.flatnonzero(classes), 8, rng), 8)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("planes", lambda a: a[:-1]),
        ("planes", lambda a: a ^ np.uint8(255)),
        ("planes", lambda a: a.astype(np.int64)),
        ("offsets", lambda a: a[:0]),
        ("offsets", lambda a: a + np.uint32(9999)),
        ("codes", lambda a: a[:-1]),
        ("codes", lambda a: np.concatenate([a, a])),
        ("centroids", lambda a: a[:1]),
        ("scales", lambda a: a[:-1]),
        ("scales", lambda a: a * np.float32("nan")),
    ],
)
def test_a_damaged_block_is_refused(name, change):
    sound = damaged()
    sound.check(2)
    if (
        name == "planes"
        and change(sound.arrays["planes"]).dtype == np.uint8
        and len(change(sound.arrays["planes"])) == 38
    ):
        pytest.skip("as many items of each class as before")
    with pytest.raises(ArtifactError):
        replace(sound, arrays={**sound.arrays, name: change(sound.arrays[name])}).check(2)


@pytest.mark.parametrize(
    "change", [{"rates": (0, 4, 4)}, {"rates": (0, 99)}, {"users": 6}, {"shapes": 40}, {"first": 2}, {"atoms": -1}]
)
def test_an_impossible_shape_is_refused(change):
    with pytest.raises(ArtifactError):
        replace(damaged(), shape=replace(damaged().shape, **change)).check(2)


@pytest.mark.parametrize("offset", [2**32 - 1, 10**6, 5000])
def test_places_outside_the_codes_are_not_read(offset):
    sound = damaged()
    hostile = replace(sound, arrays={**sound.arrays, "offsets": np.array([offset, 0], np.uint32)})
    packed = Packed(305, (hostile,), np.zeros((2, 8), np.float32), np.zeros((2, 8), np.float32))
    rows = np.arange(305)[:, None]
    found = packed.lookup_numpy(rows, np.zeros(1, np.int32))
    assert np.isfinite(found).all()
    assert_allclose(packed.lookup(rows, np.zeros(1, np.int32)), found, rtol=1e-4, atol=1e-5)


def test_a_blank_table_has_the_size_of_the_coded_one():
    user, item, cost = vectors()
    coder = GainShape(user, item, cost, 0)
    plan: TrellisPlan = coder.plan(3000)
    assert block(plan.shape, plan.blank(16), 16).size_bytes == plan.size_bytes(16)


def test_gains_and_scales_are_geometric():
    assert_allclose(geometric(0.5, 1.5, 2), [0.5, 0.75, 1.125, 1.6875])
