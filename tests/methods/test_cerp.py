"""CERP: published buckets, the spread of thresholds, exact sizes, the published rule, and searches cut short."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interruptions import Cut
from pruned_sum_cases import books, soft
from scipy import stats

import pocketrec as pr
from pocketrec.backbones.deepfm import DeepFM
from pocketrec.backbones.lightgcn import LightGCN
from pocketrec.backbones.neumf import NeuMF
from pocketrec.compression.budget import Room
from pocketrec.compression.compress import compress
from pocketrec.errors import BudgetError, ConfigError
from pocketrec.families.compositional.region import Region
from pocketrec.families.retraining import Retrain, Start
from pocketrec.families.thresholds import ThresholdSearch
from pocketrec.format.layouts.pruned_sum import codebook_rows
from pocketrec.methods.cerp import CERP
from pocketrec.training.evaluate import logits
from pocketrec.training.loop import Training
from pocketrec.training.run import Run
from pocketrec.training.train import train

TRAINING = Training(epochs=4, batch_size=64, learning_rate=1e-2)


def test_halves_side_by_side_reach_sizes_and_files_as_sums_do(clicks, model, tmp_path):
    small = compress(model, clicks, CERP(operation="concat"), "sparsity=0.5", training=TRAINING)
    total = clicks.schema.rows * 4
    assert small.values == total - total // 2
    (part,) = small.table.compositions
    assert part.books.shape[1] == 2
    small.save(tmp_path / "x.safetensors")
    measured = pr.measure(tmp_path / "x.safetensors", clicks.valid, latency=False, predictions=True)
    np.testing.assert_allclose(measured.logits, logits(small.model, clicks.valid), atol=1e-5)
    with pytest.raises(ConfigError, match="even width"):
        compress(DeepFM(dim=3, hidden=(8,)).build(clicks, 0), clicks, CERP(operation="concat"), "sparsity=0.5")


@pytest.mark.parametrize("spread", ["constant", "uniform", "normal", "power"])
def test_first_thresholds_are_the_start_times_a_share_of_their_own(clicks, model, spread, monkeypatch):
    run, began = Run(None, training=Training(epochs=1, batch_size=512)), {}
    fit = run.fit
    monkeypatch.setattr(
        run, "fit", lambda name, start, *rest: began.setdefault(name, start) and fit(name, start, *rest)
    )
    method = CERP(search=ThresholdSearch(first=-20.0), spread=spread)
    compress(model, clicks, method, "sparsity=0.5", run=run)
    (part,) = began["search"].table.compositions
    share = part.threshold.detach().double().numpy().reshape(-1) / -20
    assert 0 <= share.min() <= share.max() <= 1
    if spread == "constant":
        np.testing.assert_array_equal(share, 1)
        return
    law = {"uniform": stats.uniform.cdf, "power": lambda v: v**2}.get(spread)
    if law is None:
        assert (share.min(), share.max()) == (0, 1)
        law = stats.norm(share.mean(), share.std()).cdf
    assert stats.kstest(share, law).pvalue > 1e-3


@pytest.mark.parametrize(
    ("rows", "width", "bucket", "values"),
    [
        (1_086_810, 16, 320_000, 10_240_000),
        (1_086_810, 16, 140_000, 4_480_000),
        (4_428_511, 16, 1_200_000, 38_400_000),
        (4_428_511, 16, 610_000, 19_520_000),
        (4_428_511, 16, 600_000, 19_200_000),
        (29_858, 64, 10_000, 1_280_000),
        (40_981, 64, 5_500, 704_000),
    ],
)
def test_published_buckets_hold_what_is_published_as_far_as_rows_are_read(rows, width, bucket, values):
    first, second = codebook_rows(rows, bucket)
    assert first == bucket
    assert values - second * width - first * width == (bucket - second) * width >= 0
    plan = CERP(bucket=bucket).plan(Region("all", 0, rows, 0, width), 3 * values)
    assert plan.bucket == bucket
    assert plan.kept == (first + second) * width <= values


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(1, 8), st.floats(0, 1))
def test_the_default_bucket_holds_the_budget_and_keeps_ids_apart(rows, width, share):
    values = int(rows * width * share)
    bucket = CERP().bucket_of(rows, width, values)
    assert sum(codebook_rows(rows, bucket)) * width >= values
    assert -(-rows // bucket) <= bucket or bucket == rows
    assert CERP().bucket_of(rows, width, values // 2) <= bucket


@pytest.mark.parametrize("storage", ["fp32", "int8"])
@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.95])
def test_sizes_are_exact_and_the_file_scores_the_same(clicks, model, sparsity, storage, tmp_path):
    small = compress(model, clicks, CERP(), f"sparsity={sparsity}", storage=storage, training=TRAINING)
    total = clicks.schema.rows * 4
    assert small.values == total - int(total * sparsity)
    (part,) = small.table.compositions
    assert bool((part.books[~part.keep] == 0).all())
    small.save(tmp_path / "x.safetensors")
    measured = pr.measure(tmp_path / "x.safetensors", clicks.valid, latency=False, predictions=True)
    expected = logits(small.model, clicks.valid)
    np.testing.assert_allclose(measured.logits, expected, atol=1e-5 if storage == "fp32" else 0.05)


@pytest.mark.parametrize("scope", ["block", "joint"])
def test_four_blocks_have_a_pair_each_or_one_per_column_range(visits, scope):
    model = NeuMF(dim=4, hidden=(8,)).build(visits, 0)
    training = Training(epochs=2, batch_size=64, weight_decay=0.0)
    small = compress(model, visits, CERP(scope=scope), "sparsity=0.5", training=training)
    assert len(small.table.compositions) == (4 if scope == "block" else 2)
    assert small.values == 70 * 8 // 2
    ids = torch.arange(70)
    assert torch.equal(small.table(ids), small.table.weight())


def test_users_count_once_in_the_regulariser(visits):
    model = NeuMF(dim=4, hidden=(8,)).build(visits, 0)
    draft = CERP().prepare(model, visits, Run(None)).table(Room(values=280))
    table = draft.with_parts([soft(part, eta=3.0) for part in draft.compositions], draft.weight().detach())
    ids = torch.tensor([[4, 31, 40], [4, 32, 40], [2, 31, 69]])
    weight = table.weight().detach()
    rows = [2, 4, 31, 32, 31, 40, 40, 69]
    assert float(table.penalty(ids, 1).detach()) == pytest.approx(
        -0.5 * float(torch.tanh(3 * weight[rows]).square().sum()), rel=1e-5
    )


@pytest.mark.delicate
def test_the_published_rule_overshoots_or_fails(clicks, model):
    slow = CERP(search=ThresholdSearch(stop="published", first=-100.0, rate=1e-3))
    with pytest.raises(BudgetError, match="search longer"):
        compress(model, clicks, slow, "sparsity=0.8", training=TRAINING)
    quick = CERP(search=ThresholdSearch(stop="published"), gamma=0.0)
    small = compress(model, clicks, quick, "sparsity=0.4", training=TRAINING)
    assert 0 < small.values <= clicks.schema.rows * 4 - int(clicks.schema.rows * 4 * 0.4)


def test_codebooks_imitate_whole_and_the_search_prunes_them_to_size(visits):
    part = books()
    whole = part.whole()
    assert whole.keep.all()
    assert whole.most == part.values() < whole.values()
    assert torch.equal(whole.books, part.books)
    backbone = LightGCN(dim=4, layers=2)
    teacher = train(backbone, visits, None, Training(epochs=2, batch_size=64, learning_rate=1e-2))
    run = Run(None)
    method = CERP(start=Start("taught", epochs=4, goal="final"), retrain=Retrain(values="found"))
    small = compress(teacher, visits, method, "sparsity=0.6", run=run, training=TRAINING)
    assert small.values == teacher.table.values() - math.ceil(0.6 * teacher.table.values())
    assert {entry["stage"] for entry in run.logged()} >= {"cerp-imitation", "search", "retrain"}


def test_a_search_that_is_cut_short_goes_on_to_the_same_bytes(clicks, model, tmp_path):
    method, short = CERP(search=ThresholdSearch(checks=7)), {"training": TRAINING}
    expected = compress(model, clicks, method, "sparsity=0.8", **short).table.weight()
    for cut in (3, 29, 60):
        steps = SimpleNamespace(left=cut)

        def stop(stage, done, total, figures, steps=steps):
            steps.left -= 1
            if steps.left == 0:
                raise Cut

        with pytest.raises(Cut), Run(tmp_path / f"{cut}", checkpoint_calls=1, progress=stop) as run:
            compress(model, clicks, method, "sparsity=0.8", run=run, **short)
        with Run(tmp_path / f"{cut}") as run:
            small = compress(model, clicks, method, "sparsity=0.8", run=run, **short)
            assert torch.equal(small.table.weight(), expected)


def test_the_overlap_of_a_table_is_the_mean_of_its_blocks_by_rows(visits):
    model = NeuMF(dim=4, hidden=(8,)).build(visits, 0)
    small = compress(model, visits, CERP(), "sparsity=0.5", training=TRAINING)
    table, facts = small.model.table, small.model.table.facts()
    own = [part.facts()["overlap"] for part in table.compositions]
    assert len(own) > 1
    assert [facts[f"overlap {region.name}"] for region in table.regions] == own
    assert facts["overlap"] == pytest.approx(np.average(own, weights=[r.rows for r in table.regions]))
    assert all(0 <= value <= 1 for value in facts.values())
    assert NeuMF(dim=4, hidden=(8,)).build(visits, 0).table.facts() == {}


@pytest.mark.parametrize(
    "bad",
    [{"bucket": 0}, {"slack": 1.0}, {"gamma": -1.0}, {"eta": 0.0},
     {"operation": "mult"}, {"spread": "xavier"}],
)  # fmt: skip
def test_settings_out_of_range_are_named(bad):
    (name,) = bad
    with pytest.raises(ConfigError, match=f"`{name}` must"):
        CERP(**bad)
