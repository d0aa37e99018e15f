"""PTQ: codes nearest on an even grid, rounded zero points, and errors within half a step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketrec.compression.budget import Room
from pocketrec.compression.compress import compress
from pocketrec.errors import BudgetError
from pocketrec.format.packed import Packed
from pocketrec.methods.ptq import PTQ, QuantisedTable
from pocketrec.models.table import Block
from pocketrec.schema import Field, Schema
from pocketrec.training.run import Run


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


def test_quantised_tables_are_within_half_a_step(wide_clicks, wide_model):
    weight = wide_model.table.weight().detach()
    for bits in (8, 4):
        table = PTQ(bits=bits).prepare(wide_model, wide_clicks, Run(None)).table(Room(values=wide_model.table.values()))
        step = (weight.max() - weight.min()) / (2**bits - 1)
        embedding = (table.weight() - weight)[:, :8]
        assert float(embedding.abs().max()) <= 0.5 * float(step) + 1e-6
        assert table.values() == wide_model.table.values()
    with pytest.raises(BudgetError) as caught:
        compress(wide_model, wide_clicks, PTQ(), "sparsity=0.5")
    assert caught.value.least_values == wide_model.table.values()
    with pytest.raises(BudgetError) as caught:
        compress(wide_model, wide_clicks, PTQ(bits=4), "1%")
    assert compress(wide_model, wide_clicks, PTQ(bits=4), "90%").sizes["table"] == caught.value.least_bytes
