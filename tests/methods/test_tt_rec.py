"""TT-Rec: published counts, budgets filled with cached rows, and the warm-up that chooses them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compositional_cases import AVAZU, CRITEO, GOWALLA, METHODS, TRAINING, YELP
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketrec.compression.budget import Room
from pocketrec.compression.compress import compress
from pocketrec.families.compositional.region import Region, slots_of
from pocketrec.families.compositional.tensor_train import TrainPlan, rank_bounds
from pocketrec.format.layouts.tensor_train import row_factors, width_factors
from pocketrec.methods.tt_rec import TTRec
from pocketrec.training.run import Run


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


def test_accesses_of_click_data_are_the_counts_times_epochs(wide_clicks, wide_model):
    method = TTRec(cache_by="accesses", warm_up=2)
    run = Run(None, training=TRAINING)
    draft = wide_model.with_table(
        method.prepare(wide_model, wide_clicks, run).table(Room(values=wide_model.table.values() // 2))
    )
    (part,) = draft.table.compositions
    (ended,) = method.train(draft, wide_clicks, run).table.compositions
    slots = slots_of(draft.table.regions[0], wide_clicks, "file")
    times = np.bincount(slots[wide_clicks.train.ids.reshape(-1)], minlength=wide_clicks.schema.rows)
    np.testing.assert_array_equal(ended.accesses.numpy() % times.clip(1), 0)
    assert set((ended.accesses.numpy()[times > 0] // times[times > 0]).tolist()) <= {1, 2}
    assert set(ended.cached_slots.tolist()) == set(part.plan.cached.tolist())


def test_an_interrupted_warm_up_goes_on(wide_clicks, wide_model, tmp_path):
    method = METHODS[4]
    whole = compress(wide_model, wide_clicks, method, "sparsity=0.6", training=TRAINING)
    folder = tmp_path / "run"
    compress(wide_model, wide_clicks, method, "sparsity=0.6", run=folder, training=TRAINING)
    steps = sorted((folder / "steps").glob("tt_rec-*.safetensors"))
    assert steps
    for step in steps:
        step.unlink()
    again = compress(wide_model, wide_clicks, method, "sparsity=0.6", run=folder, training=TRAINING)
    assert torch.equal(whole.table.weight(), again.table.weight())
