"""Layouts by themselves: exact hashes and their codes, packed codes of few bits, sizes of factors."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketrec.format.computed import encode_factor, factor_bytes
from pocketrec.format.layouts.hash_mlp import codes, constants, hashes, most_slots
from pocketrec.format.layouts.quantised import pack_codes, unpack_codes


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
