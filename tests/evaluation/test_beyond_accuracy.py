"""Figures beyond accuracy against plain loops and closed forms."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketrec.errors import DataError
from pocketrec.evaluation import beyond_accuracy as module
from pocketrec.evaluation.beyond_accuracy import beyond, coverage, diversity, gini, novelty, popularity_bias
from pocketrec.evaluation.metrics import to_csr

seeds = st.integers(0, 2**32 - 1)


def pattern(rows):
    owner = np.repeat(np.arange(len(rows)), [len(r) for r in rows])
    return to_csr(owner, np.array([i for r in rows for i in r], dtype=np.int64), len(rows))


def brute_force(lists, seen, truth, items):
    """Every figure in plain python, pair by pair."""
    shown = [[int(i) for i in row if i >= 0] for row in lists]
    flat = [i for row in shown for i in row]
    who = [{u for u, row in enumerate(seen) if i in row} for i in range(items)]

    def cosine(i, j):
        norm = math.sqrt(len(who[i]) * len(who[j]))
        return len(who[i] & who[j]) / norm if norm else 0.0

    inner = [np.mean([1 - cosine(i, j) for i, j in combinations(row, 2)]) for row in shown if len(row) > 1]
    held = [i for row in truth for i in row]
    reference = np.mean([len(who[i]) for i in held]) if held else 0
    times = Counter(flat)
    exposure = [times[i] for i in range(items)]
    apart = sum(abs(a - b) for a in exposure for b in exposure)
    return {
        "coverage": len(set(flat)) / items,
        "novelty": np.mean([-math.log2(max(len(who[i]), 1) / len(seen)) for i in flat]) if flat else None,
        "diversity": np.mean(inner) if inner else None,
        "popularity": np.mean([len(who[i]) for i in flat]) / reference if flat and reference else None,
        "gini": apart / (2 * items * sum(exposure)) if flat else None,
    }


@settings(max_examples=150, deadline=None)
@given(seeds, st.integers(1, 9), st.integers(2, 12), st.integers(1, 6), st.sampled_from([1, 7, 1 << 22]))
def test_all_figures_agree_with_plain_loops(seed, users, items, k, cells):
    rng = np.random.default_rng(seed)
    seen = [np.flatnonzero(rng.random(items) < 0.3).tolist() for _ in range(users)]
    truth = [np.flatnonzero(rng.random(items) < 0.2).tolist() for _ in range(users)]
    lists = np.full((rng.integers(0, users + 1), k), -1)
    for row in lists:
        length = min(items, int(rng.integers(0, k + 1)))
        row[:length] = rng.permutation(items)[:length]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CELLS", cells)
        got = beyond(lists, pattern(seen), pattern(truth), items)
    for name, expected in brute_force(lists, seen, truth, items).items():
        assert got[f"{name}@{k}"] == (None if expected is None else pytest.approx(expected, abs=1e-12)), name


def test_closed_forms():
    """Four users have item 0, one has item 1, nobody has item 2; items 3 and 4 have the same single user."""
    seen = pattern([[0, 1], [0], [0], [0, 3, 4]])
    counts = np.bincount(seen[1], minlength=5)
    assert counts.tolist() == [4, 1, 0, 1, 1]
    assert novelty(np.array([[0, 1]]), counts, 4) == 1.0
    assert novelty(np.array([[2]]), counts, 4) == 2.0
    assert diversity(np.array([[3, 4]]), seen, 5) == pytest.approx(0.0, abs=1e-15)
    assert diversity(np.array([[2, 0]]), seen, 5) == pytest.approx(1.0)
    assert diversity(np.array([[0, 1]]), seen, 5) == pytest.approx(0.5)
    assert popularity_bias(np.array([[0], [0]]), counts, np.array([1, 3])) == 4.0
    assert coverage(np.array([[0, 1], [1, -1]]), 5) == 0.4


def test_gini_spans_from_even_to_one_item_for_all():
    assert gini(np.array([3, 3, 3, 3])) == 0.0
    assert gini(np.array([0, 0, 0, 9])) == 0.75
    assert gini(np.zeros(4, np.int64)) is None


def test_lists_of_other_shapes_or_items_are_refused():
    seen = pattern([[0], [1]])
    with pytest.raises(DataError, match="below 2"):
        beyond(np.array([[2]]), seen, seen, 2)
    with pytest.raises(DataError, match="Lists"):
        beyond(np.array([0, 1]), seen, seen, 2)
