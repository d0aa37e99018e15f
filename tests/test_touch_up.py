"""Touch-up against the coded table, the teacher and the file."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal

from pocketrec.backbones.dcn_mix import DCNMix
from pocketrec.backbones.deepfm import DeepFM
from pocketrec.backbones.lightgcn import LightGCN
from pocketrec.coding.head import CodedHead
from pocketrec.coding.touchup import Distilled, LooseTable
from pocketrec.errors import ConfigError, UnsupportedOp
from pocketrec.measure import measure
from pocketrec.method import compress
from pocketrec.methods.rate_distortion import RateDistortion
from pocketrec.testing.lab import fingerprint
from pocketrec.train import logits, validate

BACKBONES = [DeepFM(hidden=(48, 48)), DCNMix(layers=2, experts=2, rank=8, hidden=(32,))]
PLAIN, TOUCHED = RateDistortion(), RateDistortion(touch_up=3)


def divergence(model, teacher, split) -> float:
    """Mean Kullback-Leibler divergence of the teacher's probabilities from the model's, in nats."""
    p, q = (1 / (1 + np.exp(-logits(m, split).astype(np.float64))) for m in (teacher, model))
    return float((p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean())


@pytest.mark.parametrize("share", ["20%", "8%", "4%"])
def test_a_loose_table_reads_and_settles_as_the_coded_one(lab, share):
    coded = compress(lab.model(BACKBONES[0]), lab.data("ctr"), PLAIN, share).table
    loose = LooseTable(coded)
    assert_allclose(loose.weight().detach(), coded.weight(), atol=1e-6)
    assert_array_equal(loose.stored(), coded.stored())
    assert loose.values() == coded.values()
    settled = loose.settled(coded)
    assert_array_equal(settled.weight(), coded.weight())
    ids = torch.from_numpy(np.array(lab.data("ctr").train.ids[:5]))
    assert_array_equal(loose(ids).detach(), loose(ids.long()).detach())
    assert loose(ids[:0]).shape == (0, *loose(ids).shape[1:])
    with pytest.raises(UnsupportedOp, match="settle"):
        loose.pack()


def test_the_loss_is_least_at_the_teacher_and_trains_what_is_shared(lab):
    model, data = lab.model(BACKBONES[0]), lab.data("ctr")
    small = compress(model, data, PLAIN, "8%")
    student = Distilled(small.model, LooseTable(small.table), model)
    batch = next(student.batches(data, 256, 0, 0))
    loss = student.loss(batch, torch.Generator())
    p = model(batch[0]).sigmoid()
    entropy = -(p * p.log() + (1 - p) * (1 - p).log()).mean()
    assert loss > entropy
    loss.backward()
    learned = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert {"table.centre", "table.stretch", "table.basis"} < learned
    assert not any(name.startswith("teacher") for name in learned)
    assert "student.bias" not in learned


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_touched_up_model_comes_nearer_to_the_dense_one(lab, tmp_path, backbone):
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


def test_what_cannot_be_touched_up_is_refused(lab):
    with pytest.raises(UnsupportedOp, match="click models"):
        compress(lab.model(LightGCN()), lab.data("cf"), TOUCHED, "20%")
    with pytest.raises(ConfigError, match="touch_up"):
        RateDistortion(touch_up=-1)
