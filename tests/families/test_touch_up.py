"""Touch-up against the coded table, the teacher and the file."""

from __future__ import annotations

from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interruptions import Cut
from numpy.testing import assert_allclose, assert_array_equal
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from trellis_cases import coded

from pocketrec.attribution.list_margin import LIST, lists, margin
from pocketrec.backbones.dcn_mix import DCNMix
from pocketrec.backbones.deepfm import DeepFM
from pocketrec.backbones.gmf import GMF
from pocketrec.backbones.lightgcn import LightGCN
from pocketrec.backbones.mf import MF
from pocketrec.backbones.neumf import NeuMF
from pocketrec.compression.compress import compress
from pocketrec.compression.measure import measure
from pocketrec.errors import ConfigError, UnsupportedOp
from pocketrec.families.coding.clicks import touch_up as click_touch_up
from pocketrec.families.coding.clicks.head import CodedHead
from pocketrec.families.coding.clicks.touch_up import TrainableCodedTable, touched_up
from pocketrec.families.coding.lists import touch_up as list_touch_up
from pocketrec.families.coding.lists.table import TrellisTable
from pocketrec.families.coding.lists.touch_up import Lists
from pocketrec.families.coding.lists.trainable import TrainableTrellisTable
from pocketrec.families.distillation import student_of
from pocketrec.methods.rate_distortion import RateDistortion
from pocketrec.models.baked import BakedModel
from pocketrec.models.table import Block
from pocketrec.schema import Field, Schema
from pocketrec.testing.lab import fingerprint
from pocketrec.training.evaluate import logits, validate
from pocketrec.training.run import Run

BACKBONES = [DeepFM(hidden=(48, 48)), DCNMix(layers=2, experts=2, rank=8, hidden=(32,))]
PLAIN, TOUCHED = RateDistortion(), RateDistortion(touch_up=3)


def divergence(model, teacher, split) -> float:
    """Mean Kullback-Leibler divergence of the teacher's probabilities from the model's, in nats."""
    p, q = (1 / (1 + np.exp(-logits(m, split).astype(np.float64))) for m in (teacher, model))
    return float((p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean())


@pytest.mark.parametrize("share", ["20%", "8%", "4%"])
def test_a_loose_table_reads_and_settles_as_the_coded_one(lab, share):
    coded = compress(lab.model(BACKBONES[0]), lab.data("ctr"), PLAIN, share).table
    loose = TrainableCodedTable(coded)
    assert_allclose(loose.weight().detach(), coded.weight(), atol=1e-6)
    settled = loose.settled(coded)
    assert_array_equal(settled.weight(), coded.weight())
    ids = torch.from_numpy(np.array(lab.data("ctr").train.ids[:5]))
    assert_array_equal(loose(ids).detach(), loose(ids.long()).detach())
    assert loose(ids[:0]).shape == (0, *loose(ids).shape[1:])


@pytest.mark.delicate
def test_the_loss_is_least_at_the_teacher_and_trains_what_is_shared(lab):
    model, data = lab.model(BACKBONES[0]), lab.data("ctr")
    small = compress(model, data, PLAIN, "8%")
    student = touched_up(small.model, model, TrainableCodedTable(small.table))
    batch = next(student.batches(data, 256, 0, 0))
    loss = student.loss(batch, torch.Generator())
    p = model(batch[0]).sigmoid()
    entropy = -(p * p.log() + (1 - p) * (1 - p).log()).mean()
    assert loss > entropy
    loss.backward()
    learned = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert {"table.centre", "table.stretch", "table.basis"} < learned
    assert not any(name.startswith("target") for name in learned)
    assert "inner.bias" not in learned
    assert "inner.layers.0.weight" in learned


@pytest.mark.delicate
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_touched_up_model_comes_nearer_to_the_dense_one(lab, tmp_path, backbone, monkeypatch):
    monkeypatch.setattr(click_touch_up, "BATCH", 64)
    model, data = lab.model(backbone), lab.data("ctr")
    before = fingerprint(model)
    small, touched = (compress(model, data, m, "6%", run=tmp_path / "run") for m in (PLAIN, TOUCHED))
    assert fingerprint(model) == before
    plain, better = (validate(s.model, data.valid) for s in (small, touched))
    assert better >= plain
    assert touched.sizes["table"] == small.sizes["table"]
    if better > plain:
        assert divergence(touched.model, model, data.train) < divergence(small.model, model, data.train)
    touched.save(tmp_path / "touched")
    found = measure(tmp_path / "touched", data.test, latency=False, predictions=True).logits
    assert_allclose(logits(touched.model, data.test), found, atol=1e-4)


def test_a_coded_head_is_touched_up_in_the_same_bytes(lab, tmp_path):
    model, data = lab.model(BACKBONES[0]), lab.data("ctr")
    limit = compress(model, data, replace(PLAIN, code_head=False), "8%").sizes["file"] // 2
    small, touched = (compress(model, data, m, f"{limit} B", run=tmp_path / "run") for m in (PLAIN, TOUCHED))
    assert isinstance(touched.model, CodedHead)
    assert {n: touched.sizes[n] for n in ("table", "head", "vocabulary")} == {
        n: small.sizes[n] for n in ("table", "head", "vocabulary")
    }
    assert touched.save(tmp_path / "touched")["file"] <= limit
    found = measure(tmp_path / "touched", data.test, latency=False, predictions=True).logits
    assert_allclose(logits(touched.model, data.test), found, atol=1e-4)


def trellised(shape, records, width) -> TrellisTable:
    """A table of users and items, each with a row for the unknown."""
    users, items = shape.users + 1, shape.items + 1
    schema = Schema("cf", (Field("user", users, 0, "dense"), Field("item", items, users, "dense")))
    blocks = (Block("user", 0, users, 0, width), Block("item", users, users + items, 0, width))
    return TrellisTable(schema, blocks, np.ones((2, width), np.float16), shape, records)


@given(coded())
@settings(max_examples=60, deadline=None)
def test_records_are_decoded_as_their_file_is_read(case):
    shape, records, width = case
    table = trellised(shape, records, width)
    stored = table.stored().numpy()
    packed = table.pack(rows=np.flatnonzero(stored))
    rows = np.arange(packed.rows)[:, None]
    assert_array_equal(table.weight()[stored], packed.lookup_numpy(rows, np.zeros(1, np.int32))[:, 0])
    assert_array_equal(table.weight()[~stored], np.ones((2, width)))


@given(coded())
@settings(max_examples=40, deadline=None)
def test_a_loose_trellis_reads_and_settles_as_the_coded_one(case):
    shape, records, width = case
    table = trellised(shape, records, width)
    loose = TrainableTrellisTable(table)
    assert_allclose(loose.weight().detach(), table.weight(), rtol=1e-4, atol=1e-4)
    ids = torch.tensor([[0, 1], [table.schema.rows - 1, 0]])
    assert_array_equal(loose(ids).detach(), loose.weight().detach()[ids])
    settled = loose.settled(table)
    for part in fields(records):
        assert_array_equal(getattr(settled.records, part.name), getattr(records, part.name))


@given(coded(), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_what_is_trained_is_what_the_file_holds(case, seed):
    """Whatever the weights, the settled table reads as the loose one, and takes as many bytes."""
    shape, records, width = case
    table = trellised(shape, records, width)
    loose, noise = TrainableTrellisTable(table), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in loose.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=noise)
    settled = loose.settled(table)
    assert_allclose(settled.weight(), loose.weight().detach(), rtol=1e-3, atol=1e-3)
    assert settled.pack().size_bytes == table.pack().size_bytes
    assert settled.values() == table.values()


@given(st.integers(0, 2**32 - 1), st.floats(0.01, 100))
@settings(max_examples=40, deadline=None)
def test_users_have_the_length_of_least_divergence(seed, size):
    rng = np.random.default_rng(seed)
    target, found = 2 * rng.normal(size=(2, 5, 60))
    found = size * (found + 0.5 * target)
    counts = np.where(rng.random((5, 60)) < 0.1, -np.inf, rng.normal(size=(5, 60)))
    p = np.exp(log_softmax(target + counts, axis=1))
    grow = list_touch_up.logit_scale(*(torch.from_numpy(a) for a in (found, p, counts))).numpy()

    def loss(logarithm, row):
        logs = log_softmax(np.exp(logarithm) * found[row] + counts[row])
        return -float(p[row][p[row] > 0] @ logs[p[row] > 0])

    reach = 6 * np.log(2)
    for row in range(5):
        start = -np.log(np.sqrt(p[row] @ (found[row] - p[row] @ found[row]) ** 2))
        bounds = (start - reach, start + reach)
        best = minimize_scalar(loss, bounds=bounds, args=(row,), method="bounded", options={"xatol": 1e-6})
        assert loss(np.log(grow[row, 0]), row) <= best.fun + 1e-2


def ranker(lab, backbone):
    """A ranking model whose final vectors are its table."""
    return BakedModel.of(lab.model(backbone))


def students(model, data, share):
    """A coded model, and the student that learns the dense model's lists from there."""
    small = compress(model, data, PLAIN, share)
    return small, student_of(model, TrainableTrellisTable(small.table), Lists(model, margin(model, lists(model, data))))


@pytest.mark.delicate
@pytest.mark.parametrize("backbone", [MF(), GMF(), LightGCN()])
def test_the_loss_of_lists_is_least_at_the_teacher(lab, backbone, monkeypatch):
    """A student that is the teacher, but for lengths of users, has no loss; a coded one has."""
    model, data = ranker(lab, backbone), lab.data("cf")
    _, student = students(model, data, "10%")
    batch = next(student.batches(data, 8, 0, 0))
    loss = student.loss(batch, torch.Generator().manual_seed(0))
    assert loss > 1e-3
    loss.backward()
    assert {n for n, p in student.named_parameters() if p.grad is not None} == {
        f"table.{n}" for n in ("shared", "gains", "stretch", "coefficients")
    }
    first, second = data.schema.fields
    vectors = model.table.weight().detach()

    def teacher(users):
        return 3 * vectors[first.offset + users], vectors[second.offset :]

    monkeypatch.setattr(student.table, "vectors", teacher)
    assert abs(float(student.loss(batch, torch.Generator().manual_seed(0)))) < 1e-4


@pytest.mark.delicate
@pytest.mark.parametrize("backbone", [MF(dim=16), LightGCN(dim=16)])
def test_touched_up_lists_come_nearer_to_the_dense_ones_in_the_same_bytes(lab, tmp_path, backbone, monkeypatch):
    monkeypatch.setattr(list_touch_up, "BATCH", 6)
    model, data = ranker(lab, backbone), lab.without_test("cf")
    before = fingerprint(model)
    small, touched = (
        compress(model, data, m, "10%", run=tmp_path / "run") for m in (PLAIN, replace(TOUCHED, touch_up=8))
    )
    assert fingerprint(model) == before
    plain, better = (validate(s.model, data.valid) for s in (small, touched))
    assert better >= plain
    for part in ("table", "head", "vocabulary"):
        assert touched.sizes[part] == small.sizes[part]
    _, student = students(model, data, "10%")
    users = (torch.arange(len(student.target.lists)),)

    def loss(table):
        student.table = TrainableTrellisTable(table)
        return float(student.loss(users, torch.Generator().manual_seed(1)).detach())

    if better > plain:
        assert loss(touched.table) < loss(small.table)
    assert touched.save(tmp_path / "touched")["table"] == small.save(tmp_path / "small")["table"]
    found = measure(tmp_path / "touched", lab.data("cf").valid, latency=False).quality["ndcg@20"]
    assert found == pytest.approx(better, abs=1e-6)


def test_a_touch_up_that_is_cut_short_goes_on_to_the_same_bytes(lab, tmp_path, monkeypatch):
    model, data = ranker(lab, MF(dim=8)), lab.data("cf")
    monkeypatch.setattr(list_touch_up, "BATCH", 7)
    expected = compress(model, data, TOUCHED, "10%")
    expected.save(tmp_path / "expected")
    for cut in (1, 9, 20):
        steps = SimpleNamespace(left=cut)

        def stop(stage, done, total, figures, steps=steps):
            steps.left -= 1
            if steps.left == 0:
                raise Cut

        with pytest.raises(Cut), Run(tmp_path / f"{cut}", checkpoint_calls=1, progress=stop) as run:
            compress(model, data, TOUCHED, "10%", run=run)
        compress(model, data, TOUCHED, "10%", run=tmp_path / f"{cut}").save(tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == (tmp_path / "expected").read_bytes()


def test_users_with_short_lists_are_touched_up_too(lab):
    """Fewer items than a list has, and none of them left for some users."""
    model, data = ranker(lab, MF()), lab.data("cf")
    small = compress(model, data, PLAIN, "20%")
    found = margin(model, lists(model, data))
    items = found.items.copy()
    items[:, LIST // 2 :] = -1
    items[0] = -1
    student = student_of(model, TrainableTrellisTable(small.table), Lists(model, replace(found, items=items)))
    (users,) = next(student.batches(data, 100, 0, 0, shuffle=False))
    assert_array_equal(users, np.arange(len(items)))
    loss = student.loss((users,), torch.Generator())
    loss.backward()
    assert np.isfinite(float(loss.detach()))
    assert all(bool(p.grad.isfinite().all()) for p in student.table.parameters())


def test_what_cannot_be_touched_up_is_refused(lab):
    data = lab.data("cf")
    for backbone in (LightGCN(), NeuMF()):
        with pytest.raises(UnsupportedOp, match="inner products"):
            compress(lab.model(backbone), data, TOUCHED, "20%")
    with pytest.raises(UnsupportedOp, match="bytes only"):
        compress(ranker(lab, MF()), data, TOUCHED, "sparsity=0.8")
    with pytest.raises(ConfigError, match="touch_up"):
        RateDistortion(touch_up=-1)
