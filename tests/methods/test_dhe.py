"""DHE: published counts, widths within budgets, salts, and hot rows."""

from __future__ import annotations

import numpy as np
import pytest
from compositional_cases import TRAINING
from hypothesis import given, settings
from hypothesis import strategies as st

import pocketrec as pr
from pocketrec.compression.budget import Room
from pocketrec.compression.compress import compress
from pocketrec.errors import BudgetError
from pocketrec.families.compositional.region import Region, slots_of
from pocketrec.methods.dhe import DHE
from pocketrec.training.run import Run


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


def test_hot_rows_of_dhe_are_the_frequent_ones_and_cost_four_bytes_each_in_a_file(wide_clicks, wide_model, tmp_path):
    sizes, files = {}, {}
    for hot in (0, 7, 10**9):
        method = DHE(hidden=(9,), functions=16, hot=hot)
        small = compress(wide_model, wide_clicks, method, "sparsity=0.5", training=TRAINING)
        (part,), files[hot] = small.table.compositions, tmp_path / f"{hot}.safetensors"
        small.save(files[hot])
        sizes[hot] = small.sizes["table"]
        frequent = np.argsort(-wide_clicks.counts, kind="stable")[:hot]
        slots = slots_of(small.table.regions[0], wide_clicks, "file")
        np.testing.assert_array_equal(part.plan.hot, np.sort(slots[frequent]))
        with pytest.raises(BudgetError) as caught:
            method.prepare(wide_model, wide_clicks, Run(None)).table(Room(size_bytes=10))
        assert caught.value.least_bytes == sizes[hot]
    assert sizes[7] - sizes[0] == 4 * 7
    assert sizes[10**9] - sizes[0] == 4 * wide_clicks.schema.rows
    read = {}
    for hot, path in files.items():
        recommender = pr.open(path)
        rows = recommender.artifact.vocabulary.file_rows(wide_clicks.hashes)[wide_clicks.valid.ids[:200]]
        first = recommender.logits(rows)
        np.testing.assert_array_equal(first, recommender.logits(rows))
        read[hot] = first
    for hot in (7, 10**9):
        np.testing.assert_allclose(read[hot], read[0], atol=1e-5)
