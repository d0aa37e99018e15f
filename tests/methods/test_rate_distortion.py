"""Rate-distortion coding against closed forms, brute force and a decoder that reads one bit after the other."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from torch.nn import functional

from pocketrec.attribution.fisher import sensitivity
from pocketrec.backbones.deepfm import DeepFM
from pocketrec.backbones.lightgcn import LightGCN
from pocketrec.backbones.mf import MF
from pocketrec.compression.compress import compress
from pocketrec.data.sampling import triples
from pocketrec.errors import ArtifactError, BudgetError
from pocketrec.families.coding.clicks.allocation import (
    FieldCoordinates,
    allocate,
    distortion,
    principal_axes,
    water_bits,
)
from pocketrec.format import sections
from pocketrec.format.layouts.transform import TransformBlock
from pocketrec.format.packed import Packed
from pocketrec.format.quantiser import levels
from pocketrec.format.sections import Section, coder, coder_scales, encode, fixed_bytes
from pocketrec.methods.rate_distortion import RateDistortion
from pocketrec.models.baked import BakedModel
from pocketrec.native import library
from pocketrec.training.run import Run

MAX_1960 = {1: [0.7980], 2: [0.4528, 1.510], 3: [0.2451, 0.7560, 1.344, 2.152]}
"""Positive levels for a normal variable, from table I of Max, "Quantizing for minimum distortion", 1960."""
MAX_1960_ERRORS = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499}


@st.composite
def coded(draw, width: int = 5):
    """Sections and their rows."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    sections, classes, codes = [], [], []
    for _ in range(draw(st.integers(1, 4))):
        planes = draw(st.integers(0, 3))
        count, directions = draw(st.integers(0, 1 << planes)), draw(st.integers(0, width))
        bits = rng.integers(0, 9, (count, directions))
        basis = rng.integers(-127, 128, (directions, width)).astype(np.int8)
        sections.append(Section(planes, coder(bits, rng.uniform(0.01, 2, bits.shape)), basis))
        rows = draw(st.sampled_from([0, 1, 7, 8, 255, 256, 257, 700]))
        kinds = rng.integers(0, 1 << planes, rows)
        classes.append(kinds)
        own = rng.integers(0, 256, (rows, directions))
        widths = np.vstack([bits, np.zeros((8, directions), int)])[kinds]
        codes.append((own % (1 << widths)).astype(np.uint8))
    return sections, classes, codes, width


def block(sections, classes, codes, width) -> TransformBlock:
    rows = sum(map(len, classes))
    return TransformBlock("all", 0, rows, 0, width, "transform", arrays=encode(sections, classes, codes))


def spelled_out(stored: TransformBlock) -> list[np.ndarray | None]:
    """Every row of a block, in order, from a stream of bits."""
    arrays = {name: a.tolist() for name, a in stored.arrays.items()}
    stream = "".join(f"{byte:08b}"[::-1] for byte in arrays["codes"])
    place, found = 0, []
    coders, basis, planes = iter(arrays["coders"]), iter(arrays["basis"]), iter(arrays["planes"])
    for section, (depth, count, directions) in enumerate(arrays["shapes"]):
        own = [[next(coders) for _ in range(directions)] for _ in range(count)]
        axes = np.array([[next(basis) for _ in range(stored.width)] for _ in range(directions)], np.float64)
        rows = arrays["starts"][section + 1] - arrays["starts"][section]
        for first in range(0, rows, 256):
            group = min(256, rows - first)
            words = ["".join(f"{next(planes):08b}"[::-1] for _ in range(-(-group // 8))) for _ in range(depth)]
            for row in range(group):
                which = sum(int(words[p][row]) << p for p in range(depth))
                if which >= count:
                    found.append(None)
                    continue
                vector = np.zeros(stored.width)
                for direction, number in enumerate(own[which]):
                    bits, scale = number & 15, 2.0 ** (((number >> 4) - 3072) / 128)
                    code = int(stream[place : place + bits][::-1] or "0", 2)
                    vector += levels(bits)[code] * scale * axes[direction]
                    place += bits
                found.append(vector)
        place = -(-place // 8) * 8
    return found


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_levels_are_those_of_max(bits):
    found = levels(bits)
    assert_allclose(found[len(found) // 2 :], MAX_1960[bits], atol=6e-4)
    assert_array_equal(found, -found[::-1])


@pytest.mark.parametrize("bits", MAX_1960_ERRORS)
def test_errors_are_those_of_max(bits):
    assert distortion(bits) == pytest.approx(MAX_1960_ERRORS[bits], rel=3e-3)


def test_scales_are_kept_to_a_third_of_a_percent():
    scales = np.geomspace(1e-6, 100, 999)
    numbers = coder(np.arange(999) % 9, scales)
    assert_allclose(coder_scales(numbers), scales, rtol=3e-3)
    assert_array_equal(sections.coder_bits(numbers), np.arange(999) % 9)


@given(coded())
@settings(max_examples=60, deadline=None)
def test_a_block_reads_what_its_bits_say(case):
    stored = block(*case)
    stored.check(1)
    expected = spelled_out(stored)
    rows = np.arange(-1, stored.rows + 1)
    positions = stored.positions(rows)
    there = np.array([False, *(v is not None for v in expected), False])
    assert_array_equal(positions, np.where(there, rows, -1))
    out = np.full((int(there.sum()), stored.width), 0.5, np.float32)
    stored.read(positions[there], np.zeros(len(out), np.int32), out)
    vectors = np.array([v for v in expected if v is not None]).reshape(-1, stored.width)
    assert_allclose(out, vectors + 0.5, rtol=1e-4, atol=1e-4)


@given(coded())
@settings(max_examples=60, deadline=None)
def test_the_size_is_known_from_the_counts(case):
    sections, classes, _, _ = case
    coded_bits = sum(s.size_bits(np.bincount(c, minlength=8)) for s, c in zip(sections, classes, strict=True))
    assert block(*case).size_bytes == fixed_bytes(len(sections)) + coded_bits // 8


@given(st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=3), st.floats(1e-4, 10))
@settings(deadline=None)
def test_water_filling_is_the_optimum_over_all_bits(energy, theta):
    def cost(bits):
        return sum(e * distortions[b] + theta * b for e, b in zip(energy, bits, strict=True))

    distortions = [distortion(b) for b in range(9)]
    best = min(map(cost, itertools.product(range(9), repeat=len(energy))))
    assert cost(water_bits(np.array(energy), theta)) <= best * (1 + 1e-9)


def test_axes_whiten_the_metric_and_part_the_coordinates():
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(4, 4))
    residuals, weight = rng.normal(size=(500, 4)).astype(np.float32) @ mix.astype(np.float32), rng.random(500)
    metric = mix @ mix.T + np.eye(4)
    axes = principal_axes(residuals, weight.astype(np.float32), metric)
    ridge = 1e-2 * np.trace(metric) / 4 * np.eye(4)
    assert_allclose(axes.T @ (metric + ridge) @ axes, np.eye(4), atol=1e-9)
    coordinates = residuals @ np.linalg.inv(axes).T
    moments = (coordinates * weight[:, None]).T @ coordinates
    assert_allclose(moments, np.diag(np.diag(moments)), atol=1e-3 * moments.max())
    assert (np.diff(np.diag(moments)) < 0).all()


def source(rows: int, hashed: bool, seed: int = 0) -> FieldCoordinates:
    rng = np.random.default_rng(seed)
    residuals = (rng.normal(size=(rows, 3)) * [2, 1, 0.2]).astype(np.float32)
    weight = rng.pareto(1.5, rows).astype(np.float32) + np.float32(0.01)
    return FieldCoordinates.of(np.arange(rows), hashed, residuals, weight, np.diag([1.0, 2.0, 3.0]))


def table_bytes(sections, counts) -> int:
    return sum(s.size_bits(c) for s, c in zip(sections, counts, strict=True)) // 8


def losses(origin: FieldCoordinates, section: Section) -> np.ndarray:
    """Loss of each row in each class, nothing first, ``(K + 1, m)``, decoded by the layout."""
    columns = [origin.weight * (origin.coefficients**2 @ origin.gain)]
    for which in range(len(section.coders)):
        error = origin.coefficients.copy()
        codes = section.quantise(error[:, : len(section.basis)], which)
        for j, column in enumerate(section.coefficients(codes, which).T):
            error[:, j % error.shape[1]] -= column
        columns.append(origin.weight * (error**2 @ origin.gain))
    return np.stack(columns)


@pytest.mark.delicate
def test_the_finest_classes_have_errors_below_a_thousandth():
    rng = np.random.default_rng(2)
    residuals = rng.normal(size=(3000, 5)).astype(np.float32)
    origin = FieldCoordinates.of(
        np.arange(3000), False, residuals, np.ones(3000, np.float32), np.diag([4.0, 2.0, 1.0, 1.0, 0.5])
    )
    (found,) = allocate([origin], 10**6, table_bytes)
    section = found.section
    assert section.basis.shape == (10, 5)
    coefficients = np.empty((3000, 10), np.float32)
    for which in range(len(section.coders)):
        rows = found.classes == which
        coefficients[rows] = section.coefficients(found.codes[rows], which)
    decoded = coefficients @ section.basis.astype(np.float32)
    assert np.linalg.norm(decoded - residuals) < 1e-3 * np.linalg.norm(residuals)
    (coarse,) = allocate([origin], 3000 * 5, table_bytes)
    assert len(coarse.section.basis) == 5


def test_coordinates_give_the_residuals_back():
    rng = np.random.default_rng(1)
    residuals = rng.normal(size=(50, 6)).astype(np.float32)
    metric = np.cov(rng.normal(size=(6, 40)))
    origin = FieldCoordinates.of(np.arange(50), True, residuals, np.ones(50, np.float32), metric)
    assert_allclose(origin.coefficients @ origin.basis.astype(np.float32), residuals, atol=1e-4)
    exact = np.einsum("mi,ij,mj->m", residuals, metric, residuals)
    assert_allclose(origin.lost, exact, rtol=0.15)


@pytest.mark.delicate
@pytest.mark.parametrize("hashed", [True, False])
@pytest.mark.parametrize("limit", [40, 60, 90])
def test_no_other_classes_of_rows_lose_less_in_as_many_bits(hashed, limit):
    origin = source(9, hashed)
    (found,) = allocate([origin], limit, table_bytes)
    section, kinds = found.section, found.classes.astype(int)
    if not len(section.coders):
        return
    loss, bits = losses(origin, section), np.concatenate([[0], section.bits.sum(axis=1)])
    first = 0 if hashed or len(section.coders) < 1 << section.planes else 1
    own = loss[kinds + 1, np.arange(9)].sum()
    per_row = section.planes + 1 / 8 * (section.planes > 0)
    spent = bits + (per_row * (np.arange(len(bits)) > 0) if hashed else 0)
    budget = spent[kinds + 1].sum()
    best = np.full(1, 0.0)
    total = np.zeros(1)
    for row in range(9):
        total = (total[:, None] + loss[first:, row]).ravel()
        best = (best[:, None] + spent[first:]).ravel()
        keep = np.lexsort((total, best))
        total, best = total[keep], best[keep]
        front = total < np.concatenate([[np.inf], np.minimum.accumulate(total)[:-1]])
        total, best = total[front], best[front]
    assert own <= total[best <= budget + 1e-9].min() * (1 + 1e-5)


@pytest.mark.delicate
@given(st.integers(0, 5000), st.booleans(), st.integers(0, 9))
@settings(max_examples=25, deadline=None)
def test_allocation_fills_the_budget_and_never_more(limit, hashed, seed):
    sources = [source(300, hashed, seed), source(40, not hashed, seed + 1), source(0, hashed)]
    found = allocate(sources, limit, table_bytes)
    counts = []
    for origin, one in zip(sources, found, strict=True):
        kept = len(one.section.coders)
        kinds = one.classes[one.classes >= 0] if origin.hashed else np.where(one.classes < 0, kept, one.classes)
        counts.append(np.bincount(kinds.astype(int), minlength=8))
    spent = table_bytes([f.section for f in found], counts)
    assert spent <= limit
    full = 340 * 3 + 2 * 90
    assert spent >= min(limit, full) - max(60, limit // 20)


def test_more_budget_never_loses_more():
    origin = [source(500, True)]
    lost = []
    for limit in (60, 120, 250, 500, 1000, 1600):
        (found,) = allocate(origin, limit, table_bytes)
        lost.append(losses(origin[0], found.section)[found.classes.astype(int) + 1, np.arange(500)].sum())
    assert lost == sorted(lost, reverse=True)


def test_values_are_what_is_coded():
    origin = [source(200, True)]
    for limit in (0, 1, 57, 300, 900):

        def coded_values(sections, counts):
            return int(
                sum(np.count_nonzero(s.bits, axis=1) @ c[: len(s.bits)] for s, c in zip(sections, counts, strict=True))
            )

        (found,) = allocate(origin, limit, coded_values, rate="values")
        used = coded_values([found.section], [np.bincount(found.classes[found.classes >= 0], minlength=8)])
        assert min(limit, 600) - 3 <= used <= limit


@pytest.mark.parametrize("budget", ["12%", "20%", "45%", "1375000 B", "sparsity=0.5"])
def test_file_torch_numpy_and_kernel_agree(lab, tmp_path, budget):
    from pocketrec.format.artifact import Artifact

    data = lab.data("ctr")
    small = compress(lab.model(DeepFM()), data, RateDistortion(), budget)
    small.save(tmp_path / "small")
    artifact = Artifact(tmp_path / "small")
    rows = artifact.vocabulary.file_rows(data.hashes)
    ids, fields = np.array(data.train.ids), np.arange(data.schema.width)
    packed = artifact.packed
    found = packed.lookup_numpy(rows[ids], fields)
    assert_array_equal(found, small.table(torch.from_numpy(ids).long()).numpy())
    for most in library.LEVELS:
        library.limit(most)
        assert_allclose(packed.lookup(rows[ids], fields), found, rtol=1e-6, atol=1e-7)
    library.limit(library.LEVELS[-1])
    assert packed.size_bytes == small.sizes["table"]
    again = Packed.from_arrays(packed.meta(), packed.arrays())
    assert_array_equal(again.lookup_numpy(rows[ids], fields), found)


def test_a_table_packs_all_its_rows(lab):
    small = compress(lab.model(DeepFM()), lab.data("ctr"), RateDistortion(), "15%")
    fields = small.data.schema.field_of_row
    whole = np.stack([small.table.pack().lookup(np.array([[i]]), fields[[i]])[0, 0] for i in range(len(fields))])
    assert_allclose(whole, small.table.weight().numpy(), atol=1e-6)


def test_a_budget_below_the_means_is_refused(lab):
    with pytest.raises(BudgetError, match="means of"):
        compress(lab.model(DeepFM()), lab.data("ctr"), RateDistortion(), "0.01%")


def damaged():
    case = (
        [Section(1, coder(np.array([[2, 3]]), np.ones((1, 2))), np.ones((2, 4), np.int8))],
        [np.array([0, 1, 0])],
        [np.array([[3, 7], [0, 0], [1, 5]], np.uint8)],
        4,
    )
    return block(*case)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("starts", lambda a: a[::-1].copy()),
        ("starts", lambda a: a.astype(np.int64)),
        ("starts", lambda a: a[:0]),
        ("shapes", lambda a: a + np.uint8(1)),
        ("shapes", lambda a: np.array([[200, 1, 2]], np.uint8)),
        ("coders", lambda a: a[:-1]),
        ("coders", lambda a: a | np.uint16(15)),
        ("basis", lambda a: a[:-1]),
        ("planes", lambda a: np.concatenate([a, a])),
        ("offsets", lambda a: a[:0]),
        ("codes", lambda a: a[:-1]),
        ("codes", lambda a: np.concatenate([a, a])),
        ("codes", lambda a: a.reshape(-1, 1).repeat(2, axis=1)),
    ],
)
def test_a_damaged_block_is_refused(name, change):
    sound = damaged()
    sound.check(1)
    with pytest.raises(ArtifactError):
        replace(sound, arrays={**sound.arrays, name: change(sound.arrays[name])}).check(1)


def test_places_outside_the_codes_are_not_read():
    sound = damaged()
    for offsets in (2**32 - 1, 10**6):
        hostile = replace(sound, arrays={**sound.arrays, "offsets": np.array([offsets], np.uint32)})
        out = np.zeros((2, 4), np.float32)
        hostile.read(np.array([0, 2]), np.zeros(2, np.int32), out)
        assert np.isfinite(out).all()


def exact(model, rows, margins) -> tuple[np.ndarray, np.ndarray]:
    """Metric and trace by a gradient of each sample's margin with respect to the whole table."""
    fields = model.schema.field_of_row
    weight = model.table.weight().detach()
    metric = np.zeros((model.schema.width, weight.shape[1], weight.shape[1]))
    trace = np.zeros(len(weight))
    for sample in rows:
        table = weight.clone().requires_grad_()
        margin = margins(table, sample)
        p = margin.detach().sigmoid()
        gradient = torch.autograd.grad(margin, table)[0].double().numpy() * float((p * (1 - p)).sqrt())
        for field in range(len(metric)):
            part = gradient[fields == field]
            metric[field] += part.T @ part
        trace += (gradient**2).sum(axis=1)
    return metric / len(rows), trace / len(rows)


def test_sensitivities_of_a_click_model_are_its_expected_fisher_information(lab):
    model, data = lab.model(DeepFM()), lab.data("ctr")
    rows = torch.from_numpy(np.array(data.train.ids)).long()
    metric, trace = exact(model, rows, lambda table, ids: model.head(table[ids][None])[0])
    found = sensitivity(model, data, samples=None, probes=1, seed=0)
    assert_allclose(found.metric, metric, rtol=1e-3, atol=1e-5 * metric.max())
    assert_allclose(found.trace, trace, rtol=1e-3, atol=1e-5 * trace.max())


def bpr(final, sample):
    user, positive, negative = final[sample]
    return (user * (positive - negative)).sum()


def test_sensitivities_of_pairs(lab):
    model, data = lab.model(MF()), lab.data("cf")
    rows = torch.from_numpy(triples(data.train.ids, data.schema.fields[0].size, data.schema.rows, 0, 0, shuffle=True))
    metric, trace = exact(model, rows.long(), bpr)
    found = sensitivity(model, data, samples=None, probes=1, seed=0)
    assert_allclose(found.trace, trace, rtol=1e-3, atol=1e-6)
    assert_allclose(found.metric, metric, rtol=1e-3, atol=1e-6)


@pytest.mark.delicate
def test_probes_of_a_propagated_table_are_unbiased(lab):
    model, data = lab.model(LightGCN()), lab.data("cf")
    rows = torch.from_numpy(triples(data.train.ids, data.schema.fields[0].size, data.schema.rows, 0, 0, shuffle=True))
    _, trace = exact(model, rows.long(), lambda table, sample: bpr(model.propagate(table), sample))
    found = sensitivity(model, data, samples=None, probes=400, seed=0)
    assert functional.cosine_similarity(torch.from_numpy(found.trace), torch.from_numpy(trace).float(), dim=0) > 0.98
    assert found.trace.sum() == pytest.approx(trace.sum(), rel=0.1)


def test_an_interrupted_pass_goes_on(lab):
    class Stop(Exception):
        pass

    class Keeper:
        def __init__(self, patience):
            self.state, self.patience = None, patience

        def load(self):
            return self.state

        def due(self):
            return True

        def save(self, arrays):
            self.state = {name: np.array(a) for name, a in arrays.items()}
            self.patience -= 1
            if not self.patience:
                raise Stop

    for model, data in ((lab.model(DeepFM()), lab.data("ctr")), (lab.model(LightGCN()), lab.data("cf"))):
        whole = sensitivity(model, data, samples=None, probes=3, seed=0)
        keeper = Keeper(1)
        with pytest.raises(Stop):
            sensitivity(model, data, samples=None, probes=3, seed=0, checkpoint=keeper)
        again = sensitivity(model, data, samples=None, probes=3, seed=0, checkpoint=keeper)
        assert_array_equal(again.metric, whole.metric)
        assert_array_equal(again.trace, whole.trace)


@pytest.mark.parametrize("backbone", [MF(), LightGCN()])
def test_budgets_of_ranking_models_are_filled(lab, backbone):
    data, model = lab.data("cf"), BakedModel.of(lab.model(backbone))
    for share in (0.1, 0.2):
        small = compress(model, data, RateDistortion(), f"{share:.0%}", run=Run(None))
        limit = int(share * 4 * sum(b.values for b in model.table.blocks))
        assert limit - 256 <= small.sizes["table"] <= limit
