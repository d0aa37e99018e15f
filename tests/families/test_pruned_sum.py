"""Pruned codebooks: which ids share which rows, gradients, the regulariser, overlaps, and the packed sum."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pruned_sum_cases import books, soft

from pocketrec.errors import ArtifactError
from pocketrec.families.compositional.pruned_sum import PrunedCodebooks
from pocketrec.format.block import PackedRange
from pocketrec.format.layouts.pruned_sum import PrunedSumBlock, codebook_places, codebook_rows, pruned_sum_bytes


@given(st.integers(1, 400), st.data())
def test_rows_are_reused_evenly_and_pairs_are_unique_iff_the_bucket_is_wide(rows, data):
    bucket = data.draw(st.integers(1, rows))
    share = -(-rows // bucket)
    first, second = codebook_places(np.arange(rows), rows, bucket)
    uses = np.bincount(first, minlength=bucket)
    assert len(uses) == bucket
    assert set(uses) <= {rows // bucket, -(-rows // bucket)}
    used = np.bincount(second - bucket)
    assert len(used) == codebook_rows(rows, bucket)[1] <= bucket
    assert set(used[:-1]) <= {share}
    assert 0 < used[-1] <= share
    pairs = len(set(zip(first.tolist(), second.tolist(), strict=True)))
    assert (pairs == rows) == (share <= bucket)


@given(st.integers(1, 200), st.data())
def test_the_whole_matrix_is_every_look_up(rows, data):
    bucket = data.draw(st.integers(1, rows))
    part = books(rows, bucket, 3, data.draw(st.integers(0, 3 * sum(codebook_rows(rows, bucket)))))
    assert torch.equal(part.weight(), part(torch.arange(rows)))
    first, second = codebook_places(np.arange(rows), rows, bucket)
    masked = np.where(part.keep.numpy(), part.books.detach().numpy(), 0)
    np.testing.assert_array_equal(part.weight().detach().numpy(), masked[first] + masked[second])


@given(st.integers(1, 200), st.data())
def test_halves_side_by_side_are_one_row_of_each_codebook(rows, data):
    bucket = data.draw(st.integers(1, rows))
    part = books(rows, bucket, 6, data.draw(st.integers(0, 3 * sum(codebook_rows(rows, bucket)))), "concat")
    first, second = codebook_places(np.arange(rows), rows, bucket)
    masked = np.where(part.keep.numpy(), part.books.detach().numpy(), 0)
    expected = np.concatenate([masked[first], masked[second]], axis=1)
    np.testing.assert_array_equal(part.weight().detach().numpy(), expected)
    np.testing.assert_array_equal(part(torch.arange(rows)).detach().numpy(), expected)
    assert part.facts() == {}
    assert part.extra_repr() != books(rows, bucket, 6, 0).extra_repr()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 90), st.data(), st.sampled_from(["fp32", "fp16", "int8"]), st.integers(1, 11))
def test_the_packed_block_reads_as_the_table_and_has_the_size_foretold(rows, data, storage, width):
    bucket = data.draw(st.integers(1, rows))
    kept = data.draw(st.integers(0, width * sum(codebook_rows(rows, bucket))))
    operation = data.draw(st.sampled_from(["add", "concat"]))
    part = books(rows, bucket, width * (2 if operation == "concat" else 1), kept, operation)
    block = part.pack(PackedRange("x", 0, rows, 0, part.width), storage, None)
    assert block.size_bytes == pruned_sum_bytes(rows, bucket, width, kept, storage)
    block.check(1)
    again = PrunedSumBlock(**{**block.to_json(), "arrays": block.arrays})
    slots = np.random.default_rng(0).integers(0, rows, 17)
    expected = part(torch.from_numpy(slots)).detach().numpy()
    scale = float(part.books.detach().abs().max())
    within = {"fp32": 0.0, "fp16": 2e-3, "int8": 1 / 126}[storage] * scale
    assert np.abs(again.vectors(slots) - expected).max() <= within


def test_a_damaged_block_is_refused():
    block = books().pack(PackedRange("x", 0, 23, 0, 4), "fp32", None)
    sound = {"slots": 23, "bucket": 6, "kept": 30}
    for change in ({"bucket": 0}, {"kept": 10**6}, {"operation": "div"}, {"operation": "concat"}):
        settings_ = {**sound, **change}
        with pytest.raises(ArtifactError, match="impossible shape"):
            PrunedSumBlock(**{**block.to_json(), "settings": settings_, "arrays": block.arrays}).check(1)
    arrays = {**block.arrays, "values": block.arrays["values"][1:]}
    with pytest.raises(ArtifactError, match=r"x\.values"):
        PrunedSumBlock(**{**block.to_json(), "arrays": arrays}).check(1)


@settings(deadline=None)
@given(st.integers(0, 2**31), st.floats(1, 200), st.integers(0, 5))
def test_the_regulariser_is_bounded_and_halves(seed, eta, epoch):
    part = soft(books(), eta=eta)
    slots = torch.from_numpy(np.random.default_rng(seed).integers(0, 23, 9))
    value = part.penalty(slots, epoch).item()
    assert -9 * 4 * 0.5**epoch - 1e-4 <= value <= 0
    assert value == pytest.approx(part.penalty(slots, 0).item() * 0.5**epoch, rel=1e-5)
    expected = -sum(math.tanh(eta * e) ** 2 for e in part(slots).detach().flatten().tolist()) * 0.5**epoch
    assert value == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_the_gradient_of_the_regulariser_is_that_of_finite_differences():
    part = soft(books(), eta=3.0).double()
    slots = torch.tensor([0, 5, 22, 5])
    part.penalty(slots, 0).backward()
    for at in ((0, 1), (5, 0), (9, 2)):
        sides = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                part.books[at] += step
                sides.append(float(part.penalty(slots, 0)))
                part.books[at] -= step
        assert float(part.books.grad[at]) == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-4, abs=1e-8)


def test_row_by_row_sums_pair_rows_of_one_number():
    part = soft(books(rows=23, bucket=8), kind="rowwise", eta=2.0)
    read = part.read(slice(None)).detach().numpy()
    pairs = [read[j] + (read[8 + j] if 8 + j < len(read) else 0) for j in range(8)]
    assert part.penalty(torch.zeros(0, dtype=torch.long), 0).item() == pytest.approx(
        -float((np.tanh(2.0 * np.array(pairs)) ** 2).sum()), rel=1e-5
    )


def test_supports_unite_in_the_sum():
    part = books(kept=25)
    first, second = codebook_places(np.arange(23), 23, 6)
    keep = part.keep.numpy()
    np.testing.assert_array_equal(part.weight().detach().numpy() != 0, keep[first] | keep[second])


@given(st.integers(1, 60), st.integers(0, 99))
def test_one_codebook_of_all_rows_says_every_matrix(rows, seed):
    matrix = torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed))
    noise = torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed + 1))
    keep = torch.arange(2 * rows)[:, None].expand(2 * rows, 3) < rows
    part = PrunedCodebooks(rows, rows, torch.cat([matrix, noise]), keep)
    assert torch.equal(part.weight(), matrix)
    assert torch.equal(part(torch.arange(rows)), matrix)


@settings(deadline=None)
@given(st.lists(st.integers(0, 22), min_size=1, max_size=12), st.integers(0, 2**31))
def test_gradients_reach_kept_entries_of_the_rows_that_are_read(slots, seed):
    part = books(kept=25)
    upstream = np.random.default_rng(seed).normal(size=(len(slots), 4)).astype(np.float32)
    (part(torch.tensor(slots)) * torch.from_numpy(upstream)).sum().backward()
    expected = np.zeros(part.books.shape, np.float32)
    for i, g in zip(slots, upstream, strict=True):
        expected[i % 6] += g
        expected[6 + i // 4] += g
    np.testing.assert_allclose(part.books.grad, np.where(part.keep, expected, 0), rtol=1e-5, atol=1e-6)


@given(st.integers(1, 60), st.data())
def test_the_overlap_counts_coordinates_that_both_codebooks_fill(rows, data):
    bucket = data.draw(st.integers(1, rows))
    part = books(rows, bucket, 3, data.draw(st.integers(0, 3 * sum(codebook_rows(rows, bucket)))))
    share, keep, both, either = -(-rows // bucket), part.keep.tolist(), 0, 0
    for i in range(rows):
        for a, b in zip(keep[i % bucket], keep[bucket + i // share], strict=True):
            both, either = both + (a and b), either + (a or b)
    assert part.facts() == ({"overlap": both / either} if either else {})
