"""Metrics against scikit-learn, brute force and closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_expit
from sklearn.metrics import log_loss, roc_auc_score

from pocketrec.errors import DataError, DivergedError
from pocketrec.evaluation import metrics
from pocketrec.evaluation.full_ranking import INNER_PRODUCT
from pocketrec.evaluation.metrics import RankingTargets, auc, logloss, mean_ndcg, ranking, take_rows, to_csr
from pocketrec.format.program import Op, Program

seeds = st.integers(0, 2**32 - 1)


@settings(max_examples=1000, deadline=None)
@given(st.integers(0, 30), st.integers(1, 12), seeds)
def test_auc_agrees_with_scikit_learn_with_ties(n, levels, seed):
    rng = np.random.default_rng(seed)
    labels = np.r_[0, 1, rng.integers(0, 2, n)]
    scores = rng.integers(-levels, levels, n + 2) / 7
    assert auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.floats(allow_nan=False)), max_size=12))
def test_auc_counts_pairs(rows):
    positive = [s for y, s in rows if y]
    negative = [s for y, s in rows if not y]
    pairs = [1.0 if p > q else 0.5 if p == q else 0.0 for p in positive for q in negative]
    got = auc([float(y) for y, _ in rows], [s for _, s in rows])
    assert got is None if not pairs else got == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)


def test_auc_of_one_class_or_nothing_is_none():
    assert auc([1, 1], [0.1, 0.2]) is None
    assert auc([0.0], [3.0]) is None
    assert auc([], []) is None


@settings(max_examples=1000, deadline=None)
@given(st.integers(1, 30), seeds)
def test_logloss_agrees_with_scikit_learn(n, seed):
    rng = np.random.default_rng(seed)
    labels, logits = rng.integers(0, 2, n), rng.normal(0, 1.5, n)
    expected = log_loss(labels, 1 / (1 + np.exp(-logits)), labels=[0, 1])
    assert logloss(labels, logits) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.floats(-700, 700)), min_size=1, max_size=12))
def test_logloss_of_extreme_logits_keeps_every_digit(rows):
    expected = -np.mean([log_expit(z if y else -z) for y, z in rows])
    assert logloss([float(y) for y, _ in rows], [z for _, z in rows]) == pytest.approx(expected, rel=1e-12)


def test_logloss_at_probabilities_zero_and_one():
    assert logloss([0, 1], [-math.inf, math.inf]) == 0
    assert logloss([1, 1], [-math.inf, 0]) == math.inf
    assert logloss([1], [-1000.0]) == 1000.0


@pytest.mark.parametrize("metric", [auc, logloss])
def test_metrics_refuse_bad_labels_shapes_and_nan(metric):
    with pytest.raises(DataError, match="0 or 1"):
        metric([0, 2], [0.1, 0.2])
    with pytest.raises(DataError, match="0 or 1"):
        metric([0, math.nan], [0.1, 0.2])
    with pytest.raises(DataError, match=r"\(n,\)"):
        metric([0, 1], [0.1])
    with pytest.raises(DivergedError, match="row 1"):
        metric([0, 1], [0.1, math.nan])


def interactions(rng, users, items, share):
    return [np.flatnonzero(rng.random(items) < share) for _ in range(users)]


def pattern(rows):
    owner = np.repeat(np.arange(len(rows)), [len(r) for r in rows])
    return to_csr(owner, np.concatenate(rows).astype(np.int64), len(rows))


def brute_force(user_vectors, item_vectors, seen, truth, k):
    """Per-user figures in plain python; ties by item id."""
    figures = {}
    for u, wanted in enumerate(truth):
        if not len(wanted):
            continue
        scores = {i: float(user_vectors[u] @ v) for i, v in enumerate(item_vectors) if i not in set(seen[u])}
        listed = sorted(scores, key=lambda i: (-scores[i], i))[:k]
        gain = sum(1 / math.log2(r + 2) for r, i in enumerate(listed) if i in set(wanted))
        ideal = sum(1 / math.log2(r + 2) for r in range(min(len(wanted), k)))
        hits = len(set(listed) & set(wanted))
        figures[u] = (gain / ideal, hits / len(wanted), hits / min(len(wanted), k))
    return figures


@settings(max_examples=150, deadline=None)
@given(seeds, st.integers(1, 8), st.integers(1, 25))
def test_ranking_agrees_with_brute_force(seed, users, k):
    """Small integer vectors make many exact ties; lists may be longer than what is left to rank."""
    rng = np.random.default_rng(seed)
    user_vectors = rng.integers(-1, 2, (users, 3)).astype(np.float32)
    item_vectors = rng.integers(-1, 2, (20, 3)).astype(np.float32)
    seen, truth = interactions(rng, users, 20, 0.3), interactions(rng, users, 20, 0.2)
    expected = brute_force(user_vectors, item_vectors, seen, truth, k)
    got = ranking(user_vectors, item_vectors, pattern(seen), pattern(truth), k)
    assert got.users.tolist() == list(expected)
    np.testing.assert_allclose(
        np.c_[got.ndcg, got.recall, got.recall_capped], list(expected.values()) or np.zeros((0, 3)), atol=1e-12
    )
    assert (got.recall_capped >= got.recall).all()


def test_perfect_lists_score_one_even_when_truth_is_longer_than_k():
    user_vectors = np.eye(3, dtype=np.float32)
    truth = [np.arange(0, 30), np.arange(30, 32), np.arange(32, 52)]
    item_vectors = np.zeros((60, 3), dtype=np.float32)
    for u, items in enumerate(truth):
        item_vectors[items, u] = 1
    got = ranking(user_vectors, item_vectors, pattern([np.zeros(0, np.int64)] * 3), pattern(truth), 20)
    assert got.ndcg.tolist() == [1.0, 1.0, 1.0]
    assert got.recall_capped.tolist() == [1.0, 1.0, 1.0]
    assert got.recall.tolist() == [20 / 30, 1.0, 1.0]


def test_ranking_does_not_depend_on_the_block():
    rng = np.random.default_rng(0)
    user_vectors = rng.normal(size=(500, 16)).astype(np.float32)
    item_vectors = rng.normal(size=(700, 16)).astype(np.float32)
    seen, truth = pattern(interactions(rng, 500, 700, 0.05)), pattern(interactions(rng, 500, 700, 0.004))
    results = [ranking(user_vectors, item_vectors, seen, truth, block=b) for b in (1, 64, 100, 512, 10_000)]
    for other in results[1:]:
        assert (results[0].ndcg == other.ndcg).all()
        assert (results[0].recall == other.recall).all()


def test_seen_items_are_never_recommended():
    """Every seen item is in the truth set, and nothing else: no list may hit it."""
    rng = np.random.default_rng(1)
    seen = pattern(interactions(rng, 50, 30, 0.5))
    got = ranking(rng.normal(size=(50, 4)).astype("f"), rng.normal(size=(30, 4)).astype("f"), seen, seen, 20)
    assert not got.recall.any()
    assert not got.ndcg.any()


def test_a_ranking_cut_short_is_the_shorter_ranking():
    rng = np.random.default_rng(2)
    users, items = rng.normal(size=(40, 4)).astype("f"), rng.normal(size=(12, 4)).astype("f")
    seen, truth = pattern(interactions(rng, 40, 12, 0.2)), pattern(interactions(rng, 40, 12, 0.3))
    whole = ranking(users, items, seen, truth, 20)
    for k in (1, 5, 10, 20):
        short, cut = ranking(users, items, seen, truth, k), whole.at(k)
        assert cut.quality() == short.quality()
        np.testing.assert_array_equal(cut.lists, short.lists)
        np.testing.assert_array_equal(cut.ndcg, short.ndcg)
    for k in (0, 21):
        with pytest.raises(DataError, match=f"k={k}"):
            whole.at(k)


def test_no_user_with_truth_gives_null():
    empty = pattern([np.zeros(0, np.int64)] * 4)
    got = ranking(np.ones((4, 2), np.float32), np.ones((5, 2), np.float32), empty, empty)
    assert got.quality() == {"ndcg@20": None, "recall@20": None, "recall_capped@20": None}


def test_ranking_refuses_what_does_not_fit():
    vectors, two = np.ones((2, 3), np.float32), pattern([np.array([0]), np.array([1])])
    with pytest.raises(DataError, match="one d"):
        ranking(vectors, np.ones((2, 4), np.float32), two, two)
    with pytest.raises(DataError, match="one per user"):
        ranking(vectors, vectors, pattern([np.array([0])]), two)
    with pytest.raises(DataError, match="item ids"):
        ranking(vectors, vectors, two, pattern([np.array([7]), np.array([0])]))
    with pytest.raises(DataError, match="k=0"):
        ranking(vectors, vectors, two, two, 0)
    with pytest.raises(DivergedError, match="item"):
        ranking(vectors, np.full((2, 3), np.nan, np.float32), two, two)


def test_csr_helpers_sort_deduplicate_and_take_rows():
    indptr, indices = to_csr(np.array([2, 0, 2, 2, 0]), np.array([5, 1, 3, 5, 0]), 4)
    assert indptr.tolist() == [0, 2, 2, 4, 4]
    assert indices.tolist() == [0, 1, 3, 5]
    taken = take_rows((indptr, indices), np.array([2, 1, 0]))
    assert taken[0].tolist() == [0, 2, 2, 4]
    assert taken[1].tolist() == [3, 5, 0, 1]


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(17, 60), st.integers(1, 6), st.booleans())
def test_the_mean_without_lists_is_that_of_the_lists(seed, users, items, k, tower):
    random = np.random.default_rng(seed)
    seen, truth = (
        to_csr(*np.nonzero(random.random((users, items)) < rate * random.random(items)), users) for rate in (0.5, 0.3)
    )
    u, v = (random.normal(size=(n, 4)).astype(np.float32).round(random.integers(0, 3)) for n in (users, items))
    head = tower_of(random) if tower else INNER_PRODUCT
    expected = ranking(u, v, seen, truth, k, head=head).quality()[f"ndcg@{k}"]
    tried = {}
    for popular in (8, 10**6):
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(metrics, "POPULAR", popular)
            patched.setattr(metrics, "ranking", lambda *a, n=popular, **s: tried.setdefault(n, ranking(*a, **s)))
            assert mean_ndcg(u, v, RankingTargets.of(seen, truth, items), k, head=head) == expected
    if expected is not None:
        assert set(tried[8].users) <= set(tried[10**6].users) == set(np.flatnonzero(np.diff(truth[0])))


def tower_of(random: np.random.Generator) -> Program:
    """A perceptron on both vectors."""
    first, last = (random.normal(size=shape).astype(np.float32) for shape in ((3, 8), (1, 3)))
    return Program(
        (
            Op("flatten", ("vectors",), "flat"),
            Op("linear", ("flat",), "one", tensors={"weight": first, "bias": np.zeros(3, np.float32)}),
            Op("relu", ("one",), "two"),
            Op("linear", ("two",), "three", tensors={"weight": last, "bias": np.ones(1, np.float32)}),
            Op("sum", ("three",), "score"),
        )
    )


def test_users_whose_wanted_items_are_outscored_by_popular_ones_are_not_ranked(monkeypatch):
    monkeypatch.setattr(metrics, "POPULAR", 4)
    u, v = np.ones((3, 1), np.float32), np.array([[9], [8], [7], [6], *[[1]] * 6], np.float32)
    wanted = RankingTargets.of(
        to_csr(np.array([2, 2]), np.array([0, 1]), 3), to_csr(np.arange(3), np.array([9, 1, 5]), 3), 10
    )
    assert wanted.popular.tolist() == [0, 1, 2, 3]
    ranked = []
    monkeypatch.setattr(metrics, "ranking", lambda *a, **s: ranked.append(ranking(*a, **s)) or ranked[-1])
    assert mean_ndcg(u, v, wanted, 2) == pytest.approx((0 + 1 / np.log2(3) + 0) / 3)
    assert ranked[0].users.tolist() == [1]
