"""Exact selection for any budget, against a stable sort and against the packed table's true size."""

from __future__ import annotations

from contextlib import suppress

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pocketrec.compression.budget import Room
from pocketrec.errors import BudgetError, ConfigError, DivergedError
from pocketrec.families.pruning import PruningLadder, fill_rows, largest, ordered, protect
from pocketrec.families.sharing import BlockSharing
from pocketrec.format.block import Storage
from pocketrec.format.entries import Index
from pocketrec.format.vocabulary import Vocabulary
from pocketrec.models.pruned import PrunedTable
from pocketrec.models.table import Block, DenseTable
from pocketrec.schema import Field, Schema


def click_schema(sizes: tuple[int, ...], dense: int = 1) -> Schema:
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    fields = tuple(
        Field(f"f{i}", size, int(offsets[i]), keys="dense" if i < dense else "hashed") for i, size in enumerate(sizes)
    )
    return Schema("ctr", fields)


def click_ladder(seed: int, *, ties: bool = False, scope: str = "joint", n_min: int = 0) -> PruningLadder:
    rng = np.random.default_rng(seed)
    schema, dim = click_schema(tuple(rng.integers(2, 60, 4))), int(rng.integers(1, 12))
    blocks = (
        Block("embedding", 0, schema.rows, 0, dim),
        Block("linear", 0, schema.rows, dim, dim + 1, counted=False),
    )
    weight = rng.normal(size=(schema.rows, dim + 1)).astype(np.float32)
    counts = rng.zipf(1.3, schema.rows).astype(np.int64) % 1000
    scores = np.abs(weight) if not ties else rng.integers(0, 4, weight.shape).astype(np.float32)
    fill = fill_rows("codebook", weight, schema, counts)
    return PruningLadder(DenseTable(schema, blocks, torch.from_numpy(weight)), scores, fill, counts, scope, n_min)


def ranking_ladder(seed: int, scope: str = "joint", n_min: int = 0) -> PruningLadder:
    rng = np.random.default_rng(seed)
    users, items, dim = int(rng.integers(2, 50)), int(rng.integers(2, 50)), 8
    schema = Schema(
        "cf", (Field("user", users, 0, "dense", oov=False), Field("item", items, users, "dense", oov=False))
    )
    blocks = (Block("user", 0, users, 0, dim), Block("item", users, users + items, 0, dim))
    weight = rng.normal(size=(schema.rows, dim)).astype(np.float32)
    fill = np.zeros((2, dim), np.float32)
    counts = np.ones(schema.rows, np.int64)
    table = DenseTable(schema, blocks, torch.from_numpy(weight))
    return PruningLadder(table, np.abs(weight), fill, counts, scope, n_min)


def packed_size(table: PrunedTable, storage: Storage, *, index: Index = "compact", vocabulary: bool = False) -> int:
    """The true size, by packing."""
    schema = table.schema

    def hashes(field: int) -> NDArray[np.uint64]:
        size = schema.fields[field].size - 1
        return np.random.default_rng(field).integers(0, 2**63, size, dtype=np.uint64)

    words, rows = Vocabulary.build(schema, table.stored().numpy(), hashes)
    return table.pack(storage, rows, index).size_bytes + (words.size_bytes if vocabulary else 0)


@given(st.lists(st.floats(-3, 3, width=16), max_size=60), st.integers(0, 60))
def test_largest_equals_a_stable_sort(values: list[float], count: int) -> None:
    keys = np.array(values, np.float32)
    count = min(count, len(keys))
    expected = np.ones(len(keys), bool)
    expected[np.argsort(keys, kind="stable")[: len(keys) - count]] = False
    np.testing.assert_array_equal(largest(ordered(keys), count), expected)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=2, max_size=40))
def test_ordered_keeps_the_order(values: list[float]) -> None:
    keys = np.array(values, np.float32)
    codes = ordered(keys)
    np.testing.assert_array_equal(codes[:, None] < codes, keys[:, None] < keys)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_that_are_not_finite_are_refused(bad: float) -> None:
    with pytest.raises(DivergedError, match="finite"):
        ordered(np.array([1, bad, 2], np.float32))


@given(st.integers(0, 10**6), st.floats(0, 1), st.booleans())
@settings(max_examples=60, deadline=None)
def test_values_budget_is_met_exactly(seed: int, share: float, ties: bool) -> None:
    ladder = click_ladder(seed, ties=ties)
    block = ladder.dense.blocks[0]
    values = block.values - int(block.values * share)
    table = ladder.table(Room(values=values))
    assert table.values() == values
    assert table.keep[:, block.right :].all()
    kept = ladder.scores[:, : block.right][table.keep[:, : block.right].numpy()]
    removed = ladder.scores[:, : block.right][~table.keep[:, : block.right].numpy()]
    assert not len(kept) or not len(removed) or kept.min() >= removed.max()


@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_masks_are_nested(seed: int, one: float, other: float) -> None:
    ladder = click_ladder(seed, ties=True)
    low, high = sorted(int(ladder.dense.blocks[0].values * s) for s in (one, other))
    assert not (ladder.table(Room(values=low)).keep & ~ladder.table(Room(values=high)).keep).any()


@given(st.integers(0, 10**6), st.integers(0, 4), st.sampled_from(["joint", "block"]), st.floats(0.5, 1))
@settings(max_examples=30, deadline=None)
def test_selection_moves_with_the_rows(seed: int, n_min: int, scope: BlockSharing, share: float) -> None:
    ladder = ranking_ladder(seed, scope, n_min)
    rng, values = np.random.default_rng(seed + 1), int(ladder.scores.size * share)
    order = np.concatenate([b.start + rng.permutation(b.stop - b.start) for b in ladder.dense.blocks])
    moved = PruningLadder(ladder.dense, ladder.scores[order], ladder.fill, ladder.counts, scope, n_min)
    np.testing.assert_array_equal(moved.table(Room(values=values)).keep, ladder.table(Room(values=values)).keep[order])


@given(st.integers(0, 10**6), st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_kept_entries_are_untouched_and_removed_ones_read_the_placeholder(seed: int, share: float) -> None:
    ladder = click_ladder(seed)
    dim, fields = ladder.dense.blocks[0].right, torch.from_numpy(ladder.schema.field_of_row.astype(np.int64))
    table = ladder.table(Room(values=int(ladder.dense.blocks[0].values * share)))
    named = torch.ones(ladder.schema.rows, dtype=torch.bool)
    named[[f.oov_row for f in ladder.schema.fields]] = False
    expected = torch.where(table.keep, ladder.dense.weight(), table.fill[fields])
    assert torch.equal(table.weight()[named], expected[named])
    everything, nothing = (
        ladder.table(Room(values=int(v))).weight()[named] for v in (ladder.dense.blocks[0].values, 0)
    )
    assert torch.equal(everything, ladder.dense.weight()[named])
    assert torch.equal(nothing[:, :dim], torch.from_numpy(ladder.fill)[fields][named][:, :dim])


@pytest.mark.parametrize("seed", range(5))
def test_block_scope_gives_each_block_its_share(seed: int) -> None:
    ladder = ranking_ladder(seed, "block")
    total = sum(b.values for b in ladder.dense.blocks)
    table = ladder.table(Room(values=total - int(total * 0.8)))
    assert table.values() == total - int(total * 0.8)
    for block in ladder.dense.blocks:
        kept = int(table.keep[block.start : block.stop].sum())
        assert abs(kept - block.values * 0.2) <= 1


@pytest.mark.parametrize("scope", ["joint", "block"])
@pytest.mark.parametrize("n_min", [1, 2, 3])
def test_every_row_keeps_n_min(scope: str, n_min: int) -> None:
    ladder = ranking_ladder(7, scope, n_min)
    total = sum(b.values for b in ladder.dense.blocks)
    table = ladder.table(Room(values=total // 2))
    assert table.values() == total // 2
    assert (table.keep.sum(dim=1) >= n_min).all()
    for row in range(ladder.schema.rows):
        kept = set(np.flatnonzero(table.keep[row].numpy()))
        assert set(np.argsort(ladder.scores[row])[-n_min:]) <= kept


def test_n_min_that_breaks_the_budget_is_a_budget_error() -> None:
    ladder = ranking_ladder(8, n_min=4)
    with pytest.raises(BudgetError, match="n_min=4") as caught:
        ladder.table(Room(values=10))
    assert caught.value.least_values == 4 * ladder.schema.rows
    with pytest.raises(ConfigError, match="n_min=9"):
        ranking_ladder(8, n_min=9)


def test_protect_picks_the_largest_of_each_row() -> None:
    keys = np.array([[3, 1, 2], [5, 5, 5]], np.int32)
    protected = protect(keys, 1) == np.iinfo(np.int32).max
    np.testing.assert_array_equal(protected, [[True, False, False], [False, False, True]])


@pytest.mark.parametrize("storage", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("vocabulary", [False, True])
@given(
    seed=st.integers(0, 10**6),
    share=st.floats(0.02, 1.2),
    ties=st.booleans(),
    index=st.sampled_from(["compact", "direct"]),
)
@settings(max_examples=40, deadline=None)
def test_bytes_budget_holds_and_is_used(
    storage: Storage, vocabulary: bool, seed: int, share: float, ties: bool, index: Index
) -> None:
    ladder = click_ladder(seed, ties=ties)
    limit = int(share * 4 * ladder.scores.size)
    with suppress(BudgetError):
        _check_fit(ladder, limit, storage, index, vocabulary)
        return
    with pytest.raises(BudgetError) as caught:
        ladder.table(Room(size_bytes=limit, storage=storage, index=index, keys=vocabulary))
    assert caught.value.least_bytes is not None
    assert caught.value.least_bytes > limit
    least = ladder.table(Room(size_bytes=caught.value.least_bytes, storage=storage, index=index, keys=vocabulary))
    assert packed_size(least, storage, index=index, vocabulary=vocabulary) <= caught.value.least_bytes


def _check_fit(ladder: PruningLadder, limit: int, storage: Storage, index: Index, vocabulary: bool) -> None:
    """The table fits, and the next entry would not, but for the absent rows and the steps of the offsets."""
    table = ladder.table(Room(size_bytes=limit, storage=storage, index=index, keys=vocabulary))
    assert packed_size(table, storage, index=index, vocabulary=vocabulary) <= limit
    flat = table.keep.numpy() | ~(np.arange(ladder.schema.rows) != ladder.schema.offsets[1:, None] - 1).all(0)[:, None]
    order = np.argsort(ladder.scores.ravel(), kind="stable")
    best = [i for i in order[::-1] if not flat.ravel()[i]]
    if best:
        keep = table.keep.clone()
        keep.view(-1)[best[0]] = True
        wider = PrunedTable.from_counts(ladder.schema, ladder.dense.blocks, table.base, keep, table.fill, ladder.counts)
        own = (4 + 4 * table.width) * ladder.schema.width
        slack = own + 4 * ladder.schema.rows // 64
        assert packed_size(wider, storage, index=index, vocabulary=vocabulary) > limit - slack


@pytest.mark.parametrize("storage", ["fp32", "int8"])
def test_size_is_exact_without_ties(storage: Storage) -> None:
    ladder = ranking_ladder(9)
    for limit in range(700, 4 * ladder.scores.size, 97):
        table = ladder.table(Room(size_bytes=limit, storage=storage))
        size = packed_size(table, storage)
        assert size <= limit
        if not table.keep.all():
            assert limit - size < 64


def test_fill_rows_are_closed_form_means() -> None:
    schema = click_schema((5, 7, 3))
    rng = np.random.default_rng(1)
    weight = rng.normal(size=(15, 4)).astype(np.float32)
    counts = rng.integers(0, 9, 15)
    counts[12:] = 0
    codebook = fill_rows("codebook", weight, schema, counts)
    for i, field in enumerate(schema.fields[:2]):
        rows = slice(field.offset, field.stop)
        np.testing.assert_allclose(codebook[i], np.average(weight[rows], axis=0, weights=counts[rows]), rtol=1e-5)

        def error(c: NDArray[np.float32], rows: slice = rows) -> float:
            return float((counts[rows, None] * (weight[rows] - c) ** 2).sum())

        for _ in range(20):
            assert error(codebook[i] + rng.normal(size=4) * 0.01) >= error(codebook[i]) - 1e-5
    assert not codebook[2].any()
    np.testing.assert_allclose(fill_rows("plain", weight, schema, counts)[2], weight[12:].mean(axis=0), rtol=1e-5)
    assert not fill_rows("zero", weight, schema, counts).any()
