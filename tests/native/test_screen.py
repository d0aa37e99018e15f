"""Screened top-k: eight-bit screening must never change a list."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketrec.native import library, topk

HIGHEST = library.level()
pytestmark = pytest.mark.skipif(HIGHEST != "vnni", reason="this processor has no VNNI, or the kernel was not built")


@pytest.fixture(autouse=True)
def _lift_limit():
    yield
    library.limit("vnni")


def lists(level, users, items, seen, k, threads=1):
    library.limit(level)
    assert library.level() == level
    return topk.topk(users, items, *seen, k, threads=threads)


def seen_of(rng, users, items, share):
    rows = [np.flatnonzero(rng.random(items) < share).astype(np.int32) for _ in range(users)]
    return np.cumsum([0, *map(len, rows)]), np.concatenate(rows)


def assert_same(users, items, seen, k, threads=1):
    expected = lists("avx2", users, items, seen, k)
    got = lists("vnni", users, items, seen, k, threads)
    assert (got[0] == expected[0]).all()
    assert (got[1] == expected[1]).all()


@settings(max_examples=120, deadline=None)
@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 300),
    st.integers(1, 200),
    st.integers(1, 70),
    st.integers(1, 30),
    st.sampled_from(["normal", "outliers", "ties", "tiny", "sizes", "collapsed"]),
)
def test_lists_are_those_of_fp32_bit_for_bit(seed, n_users, n_items, width, k, shape):
    rng = np.random.default_rng(seed)
    users = rng.normal(size=(n_users, width)).astype(np.float32)
    items = rng.normal(size=(n_items, width)).astype(np.float32)
    if shape == "outliers":
        items[:, 0] *= 1e4
        users[:, -1] *= 1e3
    if shape == "ties":
        users, items = np.round(users), np.round(items)
    if shape == "tiny":
        users, items = users * 1e-12, items * 1e-12
    if shape == "sizes":
        items *= rng.lognormal(0, 4, (n_items, 1)).astype(np.float32)
    if shape == "collapsed":
        items[rng.random(n_items) < 0.9] = 0
        users[rng.random(n_users) < 0.5] = 0
    assert_same(users, items, seen_of(rng, n_users, n_items, 0.2), k)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30, 1e-30])
def test_values_without_a_bound_are_ranked_in_fp32(value):
    rng = np.random.default_rng(0)
    users, items = rng.normal(size=(20, 8)).astype(np.float32), rng.normal(size=(50, 8)).astype(np.float32)
    items[7] = value
    users[3] = value
    assert_same(users, items, seen_of(rng, 20, 50, 0.1), 5)


def test_many_tiles_and_threads():
    rng = np.random.default_rng(1)
    users, items = rng.normal(size=(301, 33)).astype(np.float32), rng.normal(size=(9001, 33)).astype(np.float32)
    for threads in (1, 3):
        assert_same(users, items, seen_of(rng, 301, 9001, 0.01), 20, threads)
