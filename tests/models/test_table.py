"""Tables: the look-up law, the absent law in torch and in the packed form, and the choice of absent rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from pocketrec.errors import ConfigError
from pocketrec.format.entries import Index
from pocketrec.models.pruned import PrunedTable
from pocketrec.models.table import Block, DenseTable
from pocketrec.schema import Field, Schema


def schema_of(sizes: list[int], oov: bool = True) -> Schema:
    offsets = np.cumsum([0, *sizes])
    return Schema("ctr", tuple(Field(f"f{i}", s, int(offsets[i]), oov=oov) for i, s in enumerate(sizes)))


def click_blocks(schema: Schema, width: int) -> tuple[Block, ...]:
    return (
        Block("embedding", 0, schema.rows, 0, width),
        Block("linear", 0, schema.rows, width, width + 1, counted=False),
    )


def pruned(seed: int, sizes: list[int], width: int, rate: float, oov: bool) -> tuple[PrunedTable, np.ndarray]:
    rng = np.random.default_rng(seed)
    schema = schema_of(sizes, oov)
    shape = (schema.rows, width + 1)
    base = torch.from_numpy(rng.normal(size=shape).astype(np.float32))
    keep = torch.from_numpy(rng.random(shape) < rate)
    fill = torch.from_numpy(rng.normal(size=(len(sizes), width + 1)).astype(np.float32))
    counts = rng.integers(0, 20, schema.rows)
    return PrunedTable.from_counts(schema, click_blocks(schema, width), base, keep, fill, counts), counts


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**31), sizes=st.lists(st.integers(1, 30), min_size=1, max_size=4), width=st.integers(1, 20),
    rate=st.sampled_from([0.0, 0.05, 0.5, 1.0]), oov=st.booleans(), index=st.sampled_from(["compact", "direct"]),
)  # fmt: skip
def test_torch_and_packed_read_the_same_rows(
    seed: int, sizes: list[int], width: int, rate: float, oov: bool, index: Index
) -> None:
    table, _ = pruned(seed, sizes, width, rate, oov)
    schema, rows = table.schema, np.arange(table.schema.rows)
    whole = table.weight().numpy()
    assert np.array_equal(table(torch.from_numpy(rows)).numpy(), whole)
    for chosen in (rows, np.flatnonzero(table.stored().numpy())):
        packed = table.pack(rows=chosen, index=index)
        file_rows = np.full(schema.rows, -1)
        file_rows[chosen] = np.arange(len(chosen))
        for f, field in enumerate(schema.fields):
            found = packed.lookup(file_rows[field.offset : field.stop, None], np.array([f]))[:, 0]
            assert np.array_equal(found, whole[field.offset : field.stop])


def test_every_removed_row_and_the_oov_row_read_absent() -> None:
    table, _ = pruned(0, [20, 9], 4, 0.1, oov=True)
    whole, present = table.weight(), table.stored()
    assert not present[19]
    assert not present[28]
    fields = torch.from_numpy(table.schema.field_of_row)
    assert torch.equal(whole[~present], table.absent[fields[~present]])


def test_the_oov_rows_own_vector_is_absent_only_where_it_is_read_more_than_the_removed_rows() -> None:
    schema = schema_of([3, 3])
    base = torch.arange(12.0).reshape(6, 2)
    keep = torch.tensor([[1, 0], [0, 0], [1, 0], [1, 1], [0, 0], [1, 1]], dtype=torch.bool)
    fill = torch.full((2, 2), -1.0)
    blocks = (Block("embedding", 0, 6, 0, 2),)
    own = PrunedTable.from_counts(schema, blocks, base, keep, fill, np.array([9, 4, 5, 9, 7, 7]))
    assert own.absent.tolist() == [[4, -1], [-1, -1]]
    keep[2] = False
    nothing = PrunedTable.from_counts(schema, blocks, base, keep, fill, np.array([9, 4, 50, 9, 7, 7]))
    assert nothing.absent.tolist() == [[-1, -1], [-1, -1]]


def test_values_counts_kept_scalars_of_counted_blocks() -> None:
    table, _ = pruned(1, [20, 9], 4, 0.3, oov=True)
    assert table.values() == int(table.keep[:, :4].sum())
    assert DenseTable(table.schema, table.blocks, table.base).values() == 29 * 4


def test_base_is_shared_and_gradients_reach_it_and_the_fill() -> None:
    schema = schema_of([3])
    base, fill = nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.zeros(1, 2))
    keep = torch.tensor([[1, 0], [0, 0], [0, 0]], dtype=torch.bool)
    table = PrunedTable(schema, (Block("embedding", 0, 3, 0, 2),), base, keep, fill, torch.zeros(1, 2))
    assert table.base is base
    table(torch.tensor([0, 1])).sum().backward()
    assert base.grad is not None
    assert base.grad.tolist() == [[1, 0], [0, 0], [0, 0]]
    assert fill.grad is not None
    assert fill.grad.tolist() == [[0, 1]]


@pytest.mark.parametrize("storage", ["fp32", "fp16", "int8"])
def test_a_dense_table_packs_every_row_and_its_oov_row_as_absent(storage: str) -> None:
    schema = schema_of([5, 4])
    weight = torch.from_numpy(np.random.default_rng(2).normal(size=(9, 4)).astype(np.float32))
    table = DenseTable(schema, click_blocks(schema, 3), weight)
    rows = np.flatnonzero(table.stored().numpy())
    assert rows.tolist() == [0, 1, 2, 3, 5, 6, 7]
    packed = table.pack(storage, rows)
    found = packed.lookup(np.array([[0, 4], [3, 6], [-1, -1]]), np.array([0, 1]))
    expected = weight.numpy()[[[0, 5], [3, 7], [4, 8]]]
    np.testing.assert_allclose(found, expected, atol={"fp32": 0, "fp16": 2e-3, "int8": 2e-2}[storage])
    assert [b.layout for b in packed.blocks] == ["dense", "dense"]


def test_a_dense_table_without_oov_reads_zeros_for_absent_ids() -> None:
    schema = Schema("cf", (Field("user", 2, 0, "dense", oov=False), Field("item", 3, 2, "dense", oov=False)))
    blocks = (Block("users", 0, 2, 0, 2), Block("items", 2, 5, 0, 2))
    packed = DenseTable(schema, blocks, torch.arange(10.0).reshape(5, 2)).pack()
    assert packed.lookup(np.array([[1, 4], [-1, 9]]), np.array([0, 1])).tolist() == [[[2, 3], [8, 9]], [[0, 0], [0, 0]]]


def test_misshapen_tensors_are_refused() -> None:
    schema = schema_of([3])
    with pytest.raises(ConfigError, match=r"`weight` must be torch.float32 \(3, 2\)"):
        DenseTable(schema, (Block("embedding", 0, 3, 0, 2),), torch.zeros(3, 3))
