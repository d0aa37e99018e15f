"""Layouts by themselves: exact hashes and their codes, packed codes of few bits, sizes of factors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketrec.errors import BudgetError, ConfigError, DivergedError
from pocketrec.format.computed import encode_factor, factor_bytes
from pocketrec.format.layouts.hash_mlp import codes, constants, hashes, most_slots
from pocketrec.format.layouts.pruned_sum import encode_pruned
from pocketrec.format.layouts.quantised import pack_codes, unpack_codes
from pocketrec.format.layouts.trellis import Records, Shape
from pocketrec.format.layouts.trellis import encode as encode_trellis
from pocketrec.format.sections import Section, coder
from pocketrec.format.sections import encode as encode_sections
from pocketrec.format.trellis_codes import CODES, rate_bits


@settings(deadline=None)
@given(st.integers(0, most_slots(1_000_000) - 1), st.integers(0, 2**40))
def test_hashes_are_exact(slot, salt):
    a, b, p = constants(8, 1_000_000, salt)
    assert all(0 < int(x) < 10**9 for x in a)
    assert all(16_000_000 < int(x) < 17_000_000 for x in p)
    assert np.all(p[:, None] % np.arange(2, 4124))
    exact = [(int(x) * (slot + 1) + int(y)) % int(z) % 1_000_000 for x, y, z in zip(a, b, p, strict=True)]
    assert hashes(np.array([slot]), 8, 1_000_000, salt)[0].tolist() == exact


def splitmix(salt: int, count: int) -> list[int]:
    """The words of a salt, in Python's whole numbers."""
    golden, mask = 0x9E3779B97F4A7C15, 2**64 - 1

    def mixed(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        return z ^ (z >> 31)

    start = mixed(salt + golden & mask)
    return [mixed(start + k * golden & mask) for k in range(1, count + 1)]


@settings(deadline=None)
@given(st.integers(0, 2**40), st.integers(1, 9), st.integers(2, 300))
def test_hash_functions_are_the_same_in_every_process_and_on_every_machine(salt, functions, buckets):
    words = splitmix(salt, 3 * functions)
    primes = [n for n in range(16 * buckets + 1, 17 * buckets) if all(n % k for k in range(2, math.isqrt(n) + 1))]
    if primes:
        expected = (
            [w % (10**9 - 1) + 1 for w in words[:functions]],
            [w % 10**9 for w in words[functions : 2 * functions]],
            [primes[w % len(primes)] for w in words[2 * functions :]],
        )
        assert tuple(column.tolist() for column in constants(functions, buckets, salt)) == expected


def test_codes_are_spread_and_differ_by_salt():
    one, other = (codes(np.arange(4000), 16, 1_000_000, salt, "uniform") for salt in (1, 2))
    assert np.abs(one).max() <= 1
    assert np.abs(one.mean(axis=0)).max() < 0.06
    np.testing.assert_allclose(one.var(axis=0), 1 / 3, atol=0.03)
    across = np.abs(np.corrcoef(one.T, other.T)[:16, 16:])
    assert across.mean() < 0.02
    assert across.max() < 0.2
    normal = codes(np.arange(4000), 16, 1_000_000, 1, "gaussian")
    assert abs(normal.mean()) < 0.02
    assert normal.var() == pytest.approx(1, abs=0.03)
    np.testing.assert_array_equal(codes(np.array([17, 5]), 16, 1_000_000, 1, "uniform"), one[[17, 5]])


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(1, 20), st.integers(2, 8), st.integers(0, 99))
def test_codes_of_few_bits_are_packed_and_unpacked(rows, width, bits, seed):
    found = np.random.default_rng(seed).integers(0, 2**bits, (rows, width), dtype=np.uint8)
    packed = pack_codes(found, bits)
    assert packed.shape == (rows, -(-width * bits // 8))
    np.testing.assert_array_equal(unpack_codes(packed, width, bits), found)


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.sampled_from(["fp32", "fp16", "int8"]))
def test_factors_take_the_bytes_that_were_promised(rows, columns, storage):
    values = np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float32)
    arrays = encode_factor("core", values, storage)
    assert sum(a.nbytes for a in arrays.values()) == factor_bytes((rows, columns), storage)


@pytest.mark.parametrize("storage", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_never_stored(storage, bad):
    values = np.array([[0.5, bad], [1.0, 2.0]], np.float32)
    with pytest.raises(DivergedError, match="must be finite, but the table holds NaN or infinity; train again"):
        encode_factor("core", values, storage)
    kept = np.ones((2, 2), bool)
    with pytest.raises(DivergedError, match="must be finite, but the table holds NaN or infinity; train again"):
        encode_pruned(values, kept, 1, storage)
    kept[0, 1] = False
    assert np.isfinite(encode_pruned(values, kept, 1, storage)["values"]).all()


def test_values_beyond_half_precision_are_refused_for_it_alone():
    values = np.array([[65504.0, 70000.0], [1.0, 2.0]], np.float32)
    words = "fp16 holds values up to 65,504, but the table has 70000; use fp32 or int8"
    for write in (lambda s: encode_factor("core", values, s), lambda s: encode_pruned(values, values > 0, 1, s)):
        with pytest.raises(ConfigError, match=words):
            write("fp16")
        assert write("fp32")
        assert write("int8")
    values[0, 1] = 0
    assert encode_factor("core", values, "fp16")["core"][0, 0] == 65504


def test_sections_and_rankings_of_half_a_gibibyte_are_refused_before_they_are_written():
    directions, rows = 64, 1 << 23
    section = Section(
        0, coder(np.full((1, directions), 8), np.ones((1, directions))), np.ones((directions, 64), np.int8)
    )
    kinds, none = np.zeros(rows, np.uint8), np.broadcast_to(np.uint8(0), (rows, directions))
    with pytest.raises(BudgetError, match="codes of a field must take less than 512 MiB, but take 536,870,912 B"):
        encode_sections([section], [kinds], [none])
    rate = max(range(1, len(CODES) + 1), key=lambda rate: rate_bits(rate, 1024))
    shape = Shape(0, rows, 0, (rate,), 0, 0, 0, 0)
    some = np.zeros(0, np.uint8)
    ranking = Records(
        classes=kinds, gains=some, shapes=some.astype(np.uint16), item_scales=some, item_codes=some, atoms=some[None],
        user_scales=some, user_codes=some, centroids=np.zeros((1, 1024), np.uint8), scales=np.zeros(7, np.float32),
    )  # fmt: skip
    taken = rows * (4 + rate_bits(rate, 1024)) // 8
    with pytest.raises(BudgetError, match=f"items must take less than 512 MiB, but take {taken:,} B"):
        encode_trellis(shape, ranking)
