"""Coded heads against brute force, finite differences and the file."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from pocketrec import runtime
from pocketrec.attribution.lowered import LoweredHead
from pocketrec.backbones.dcn_mix import DCNMix
from pocketrec.backbones.dcnv2 import DCNv2
from pocketrec.backbones.deepfm import DeepFM
from pocketrec.compression import file_fit
from pocketrec.compression.compress import compress
from pocketrec.compression.measure import measure
from pocketrec.errors import ArtifactError, BudgetError, UnsupportedOp
from pocketrec.families.coding.clicks.head import CodedHead, HeadCosts, RoundedRows, moments
from pocketrec.format.artifact import Artifact
from pocketrec.format.matrix import CodedMatrix, row_bytes
from pocketrec.format.program import Program
from pocketrec.format.quantiser import levels
from pocketrec.methods.rate_distortion import RateDistortion
from pocketrec.training.evaluate import logits

BACKBONES = [DeepFM(hidden=(48, 48)), DCNMix(layers=2, experts=2, rank=8, hidden=(32,)), DCNv2(hidden=(32,))]


@st.composite
def coded(draw):
    """Codes, bits and scales of a matrix."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows, width = draw(st.integers(0, 20)), draw(st.integers(1, 40))
    bits = rng.integers(0, 9, rows)
    codes = rng.integers(0, 256, (rows, width)) % (1 << bits)[:, None]
    return codes.astype(np.uint8), bits.astype(np.uint8), rng.uniform(0.01, 3, rows).astype(np.float16)


@given(coded())
@settings(deadline=None)
def test_a_matrix_reads_what_its_codes_mean_in_the_bytes_that_were_told(case):
    codes, bits, scale = case
    matrix = CodedMatrix.encode(codes, bits, scale)
    rows = [levels(int(b))[c] * np.float32(s) for c, b, s in zip(codes, bits, scale, strict=True)]
    expected = np.array(rows, np.float32).reshape(codes.shape)
    assert_array_equal(matrix.decoded(), expected)
    assert sum(a.nbytes for a in matrix.arrays().values()) == sum(row_bytes(codes.shape[1], int(b)) for b in bits)
    again = CodedMatrix.from_arrays(codes.shape[1], matrix.arrays())
    assert_array_equal(again.decoded(), expected)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("bits", lambda a: a + np.uint8(9)),
        ("bits", lambda a: a[:-1]),
        ("bits", lambda a: a.astype(np.int64)),
        ("scale", lambda a: a[:-1]),
        ("scale", lambda a: a.astype(np.float32)),
        ("codes", lambda a: a[1:]),
        ("codes", lambda a: a[None]),
    ],
)
def test_a_damaged_matrix_is_refused(name, change):
    matrix = CodedMatrix.encode(np.ones((3, 7), np.uint8), np.array([3, 0, 1], np.uint8), np.ones(3, np.float16))
    arrays = matrix.arrays()
    with pytest.raises(ArtifactError):
        CodedMatrix.from_arrays(7, {**arrays, name: change(arrays[name])})


def problem(seed: int, rows: int = 6, width: int = 5):
    """A matrix and a second moment of what it is given."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(50, width)) @ rng.normal(size=(width, width))
    return rng.normal(size=(rows, width)).astype(np.float32), (x.T @ x / 50).astype(np.float32)


def test_making_up_for_errors_beats_rounding():
    for seed in range(5):
        matrix, metric = problem(seed, 40, 24)
        for bits in (2, 3, 4):
            kinds = np.full(40, bits, np.uint8)
            made_up = matrix - RoundedRows.of(matrix, metric, kinds).values
            rounded = matrix - RoundedRows.of(matrix, np.diag(np.diag(metric)), kinds).values
            costs = [np.einsum("oi,ij,oj->", e, metric, e) for e in (made_up, rounded)]
            assert costs[0] < 0.8 * costs[1]


def test_without_correlation_rows_are_rounded_to_the_nearest_level():
    matrix, _ = problem(0)
    found = RoundedRows.of(matrix, np.diag([5.0, 1.0, 3.0, 2.0, 4.0]).astype(np.float32), np.full(6, 3, np.uint8))
    all_levels = levels(3) * found.scale.astype(np.float32)[:, None]
    nearest = np.abs(matrix[:, :, None] - all_levels[:, None]).argmin(axis=2)
    assert_array_equal(found.codes, nearest)


def test_rows_of_zeros_and_of_no_bits_cost_a_byte():
    matrix = np.vstack([np.zeros(5), np.ones(5)]).astype(np.float32)
    found = RoundedRows.of(matrix, np.eye(5, dtype=np.float32), np.array([4, 0], np.uint8))
    assert not found.bits.any()
    assert not found.values.any()


@pytest.mark.delicate
@pytest.mark.parametrize("backbone", BACKBONES)
def test_products_are_inputs_and_gradients_of_the_matrices(lab, backbone):
    """For three samples in four: a step across a ReLU's kink has another slope, and rounding decides who takes it."""
    model, data = lab.model(backbone), lab.data("ctr")
    vectors = model.table(torch.from_numpy(np.array(data.train.ids[:32]))).detach()
    program = model.lower()
    head = LoweredHead.of(program)
    head.logits(vectors)
    head.pull(torch.ones(32))
    exact, step, seen = vectors.double().numpy(), 1e-4, 0
    for op, name, inputs, slopes in list(head.products()):
        tensor = op.tensors[name].astype(np.float64)
        x, slope = (t.double().numpy().reshape(-1, *t.shape[-2:]) for t in (inputs, slopes))
        direction = np.random.default_rng(0).normal(size=(len(x), slope.shape[2], x.shape[2]))
        moved = []
        for sign in (1, -1):
            changed = replace(op, tensors={**op.tensors, name: tensor + sign * step * direction.reshape(tensor.shape)})
            moved.append(Program(tuple(changed if o is op else o for o in program.ops))(exact))
        expected = np.einsum("kbo,koi,kbi->b", slope, direction, x)
        slopes = (moved[0] - moved[1]) / (2 * step)
        agree = np.isclose(slopes, expected, rtol=1e-2, atol=2e-2 * np.abs(expected).max())
        assert agree.mean() >= 0.75
        seen += 1
    assert seen >= 3


@pytest.mark.delicate
def test_expected_loss_is_the_measured_one(lab):
    model, data = lab.model(DeepFM(hidden=(64, 64))), lab.data("ctr")
    market = HeadCosts.of(model.lower(), moments(model, data, 0))
    vectors = model.table(torch.from_numpy(np.array(data.train.ids[:4000]))).detach().double().numpy()
    dense = market.program(vectors)
    p = 1 / (1 + np.exp(-dense))
    for bits in (4, 5, 6):
        kinds = np.full(len(market.loss), bits, np.uint8)
        errors = market.coded(market.program, kinds)(vectors) - dense
        measured = float((p * (1 - p) * errors**2).mean())
        assert measured == pytest.approx(float(market.loss[:, bits].sum()), rel=0.7)


def test_bits_fall_with_the_price_and_sizes_are_exact(lab):
    model = lab.model(BACKBONES[1])
    market = HeadCosts.of(model.lower(), moments(model, lab.data("ctr"), 0))
    before = np.inf
    for exponent in range(-40, 1, 8):
        bits = market.bits(2.0**exponent)
        program = market.coded(model.lower(), bits)
        size = sum(t.nbytes for t in program.tensors().values())
        assert size <= before
        assert size <= market.fixed_bytes + market.spent(2.0**exponent) / 8
        before = size


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("amount", [0.2, 0.5])
def test_file_and_model_score_alike(lab, tmp_path, backbone, amount):
    data, model = lab.data("ctr"), lab.model(backbone)
    method = RateDistortion()
    with pytest.raises(BudgetError) as error:
        compress(model, data, method, "10 B")
    whole = compress(model, data, replace(method, code_head=False), "20%").sizes["file"]
    limit = int(error.value.least_bytes + amount * (whole / 4 - error.value.least_bytes))
    small = compress(model, data, method, f"{limit} B")
    assert isinstance(small.model, CodedHead)
    assert 0.99 * limit - 256 <= small.save(tmp_path / "small")["file"] <= limit
    found = measure(tmp_path / "small", data.test, latency=False, predictions=True).logits
    assert_allclose(logits(small.model, data.test), found, atol=1e-4)
    program = Artifact(tmp_path / "small").program
    for op, own in zip(program.ops, small.model.lower().ops, strict=True):
        for name, tensor in op.tensors.items():
            assert_array_equal(tensor, own.tensors[name])
    recommender = runtime.open(tmp_path / "small")
    rows = recommender.artifact.vocabulary.file_rows(data.hashes)[np.array(data.test.ids[:64])]
    assert_allclose(recommender.logits(rows), found[:64], atol=1e-4)


def test_a_head_that_leaves_no_room_for_a_table_is_given_fewer_bits(lab, monkeypatch):
    data, model, method = lab.data("ctr"), lab.model(BACKBONES[0]), RateDistortion()
    with pytest.raises(BudgetError) as error:
        compress(model, data, method, "10 B")
    monkeypatch.setattr(file_fit, "_GROWTH", -300)
    limit = error.value.least_bytes + 60
    assert error.value.least_bytes <= compress(model, data, method, f"{limit} B").sizes["file"] <= limit


def test_a_head_stays_where_it_is_not_to_be_coded(lab):
    small = compress(lab.model(BACKBONES[0]), lab.data("ctr"), RateDistortion(code_head=False), "300kB")
    assert not any(op.codes for op in small.model.lower().ops)
    assert not any(
        op.codes for op in compress(lab.model(BACKBONES[0]), lab.data("ctr"), RateDistortion(), "10%").model.lower().ops
    )


def test_a_coded_head_is_not_trained(lab):
    small = compress(lab.model(BACKBONES[0]), lab.data("ctr"), RateDistortion(), "100kB")
    with pytest.raises(UnsupportedOp, match="final"):
        small.model.head(torch.zeros(1, small.table.schema.width, small.table.width), torch.Generator())
