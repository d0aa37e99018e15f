"""Scores of all pairs against the program run on each pair, and lists against a plain sort."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from pocketrec.errors import ConfigError
from pocketrec.evaluation.full_ranking import INNER_PRODUCT, ITEMS, USERS, AllPairs, product_weight
from pocketrec.evaluation.metrics import ranking, to_csr
from pocketrec.format.program import Op, Program
from pocketrec.native import library, topk

U, I, D = USERS + 5, 2 * ITEMS + 7, 6  # noqa: E741


def drawn(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape) + sum(shape)).normal(0, 0.8, shape).astype(np.float32)


def layer(inputs: int, outputs: int) -> dict[str, np.ndarray]:
    return {"weight": drawn(outputs, inputs), "bias": drawn(outputs)}


PAIR = Op("flatten", ("vectors",), "pair")
HEADS = {
    "inner product": INNER_PRODUCT,
    "weighted": Program(
        (Op("dot", ("vectors",), "s", tensors={"bias": np.array(0.5, np.float32), "weight": drawn(D)}),)
    ),
    "some columns": Program(
        (
            Op("columns", ("vectors",), "c", {"start": 1, "stop": 3}),
            Op("dot", ("c",), "s", tensors={"bias": np.array(-1.0, np.float32)}),
        )
    ),
    "perceptron": Program(
        (
            PAIR,
            Op("linear", ("pair",), "a", tensors=layer(2 * D, 5)),
            Op("relu", ("a",), "b"),
            Op("linear", ("b",), "c", tensors=layer(5, 1)),
            Op("sum", ("c",), "s"),
        )
    ),
    "mean over non-zeros": Program(
        (
            PAIR,
            Op("nonzero_mean", ("pair",), "mean"),
            Op("linear", ("mean",), "a", tensors=layer(2 * D, 4)),
            Op("relu", ("a",), "b"),
            Op("sum", ("b",), "s"),
        )
    ),
    "two branches": Program(
        (
            Op("columns", ("vectors",), "left", {"start": 0, "stop": 2}),
            Op("dot", ("left",), "product", {}, {"weight": drawn(2)}),
            Op("columns", ("vectors",), "right", {"start": 2, "stop": D}),
            Op("flatten", ("right",), "pair"),
            Op("linear", ("pair",), "a", tensors=layer(2 * (D - 2), 8)),
            Op("relu", ("a",), "b"),
            Op("linear", ("b",), "c", tensors=layer(8, 4)),
            Op("relu", ("c",), "d"),
            Op("linear", ("d",), "e", tensors=layer(4, 1)),
            Op("sum", ("e",), "deep", tensors={"bias": np.array(0.5, np.float32)}),
            Op("add", ("product", "deep"), "s"),
        )
    ),
    "no part of one entity": Program(
        (PAIR, Op("cross", ("pair", "pair"), "x", tensors=layer(2 * D, 2 * D)), Op("sum", ("x",), "s"))
    ),
    "a mean of pairs": Program((PAIR, Op("nonzero_mean", ("pair",), "mean"), Op("sum", ("mean",), "s"))),
    "factorisation machine": Program((Op("fm", ("vectors",), "s"),)),
}


@pytest.fixture(params=sorted(HEADS))
def head(request) -> Program:
    return HEADS[request.param]


@pytest.fixture(params=[True, False], ids=["compiled", "numpy"], autouse=True)
def compiled(request, monkeypatch) -> None:
    if not request.param:
        monkeypatch.setattr(library, "compiled", lambda: None)


def entities() -> tuple[np.ndarray, np.ndarray]:
    users, items = drawn(U, D), drawn(I, D)
    users[0], items[0], items[1, :3] = 0, 0, 0
    items[ITEMS + 3] = items[5]
    items[-1] = items[5]
    return users, items


def one_by_one(head: Program, users: np.ndarray, items: np.ndarray) -> np.ndarray:
    return np.stack([head(np.stack([np.broadcast_to(user, items.shape), items], axis=1)) for user in users])


def seen() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(1)
    return to_csr(random.integers(0, U, 900), random.integers(0, I, 900), U)


def test_scores_are_those_of_each_pair(head):
    users, items = entities()
    rows = np.array([3, 0, U - 1, 3])
    came = AllPairs(head, users, items).scores(rows)
    np.testing.assert_allclose(came, one_by_one(head, users[rows], items), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 2])
def test_lists_are_a_sort_of_the_scores(head, threads):
    users, items = entities()
    pairs, hidden = AllPairs(head, users, items), seen()
    ids, values = pairs.topk(np.arange(U), hidden, 9, threads=threads)
    exact = pairs.scores(np.arange(U))
    for user in range(U):
        exact[user, hidden[1][hidden[0][user] : hidden[0][user + 1]]] = -np.inf
        order = np.argsort(-exact[user], kind="stable")[:9]
        np.testing.assert_allclose(values[user], exact[user, order], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(exact[user, ids[user]], values[user], rtol=1e-4, atol=1e-4)


@pytest.mark.delicate
def test_equal_items_have_equal_scores_wherever_they_stand(head):
    users, items = entities()
    scores = AllPairs(head, users, items).scores(np.arange(U))
    assert np.array_equal(scores[:, 5], scores[:, ITEMS + 3])
    assert np.array_equal(scores[:, 5], scores[:, -1])


@pytest.mark.delicate
def test_a_list_does_not_depend_on_the_other_users(head):
    users, items = entities()
    truth = to_csr(np.arange(U), np.arange(U), U)
    one, other = (ranking(users, items, seen(), truth, 7, head=head, block=block) for block in (64, 4096))
    assert np.array_equal(one.lists, other.lists)


def test_fewer_items_than_asked_for(head):
    users, items = entities()
    nothing = to_csr(np.zeros(0, np.int64), np.zeros(0, np.int64), 2)
    ids, values = AllPairs(head, users, items[:4]).topk(np.arange(2), nothing, 6)
    assert (ids[:, 4:] == -1).all()
    assert np.isneginf(values[:, 4:]).all()
    assert sorted(ids[0, :4].tolist()) == [0, 1, 2, 3]


def test_no_users_and_nan(head):
    users, items = entities()
    pairs = AllPairs(head, users, items)
    assert pairs.topk(np.arange(0), (np.zeros(1, np.int64), np.zeros(0, np.int32)), 3)[0].shape == (0, 3)
    damaged = users.copy()
    damaged[1] = np.nan
    nothing = (np.zeros(2, np.int64), np.zeros(0, np.int32))
    assert (AllPairs(head, damaged, items).topk(np.array([1]), nothing, 3)[0] == -1).all()


def test_only_one_inner_product_has_weights():
    assert {name for name, head in HEADS.items() if product_weight(head) is not None} == {"inner product", "weighted"}


def test_the_best_of_a_matrix_of_ties():
    scores = np.zeros((2, 5), np.float32)
    scores[1, 3] = 1
    ids, _ = topk.best(scores, np.array([0, 1, 1]), np.array([0], np.int32), 3)
    assert ids.tolist() == [[1, 2, 3], [3, 0, 1]]


@pytest.mark.parametrize("level", library.LEVELS)
@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("widths", [(1, 1), (7, 1), (5, 9, 1), (33, 17, 8, 1)])
@pytest.mark.parametrize("items", [1, 31, 32, 100])
def test_towers_climb_layer_by_layer(level, counted, widths, items):
    library.limit(level)
    users, offered, bias = drawn(19, widths[0]), drawn(items, widths[0]), drawn(widths[0])
    counts = (np.arange(19, dtype=np.float32), np.arange(items, dtype=np.float32)) if counted else None
    layers = [(drawn(o, i), drawn(o)) for i, o in pairwise(widths)]
    x = users[:, None].astype(np.float64) + offered
    if counts is not None:
        x /= np.maximum(counts[0][:, None] + counts[1], 1)[..., None]
    x += bias
    for weight, shift in layers:
        x = np.maximum(x, 0) @ weight.T + shift
    came = [topk.tower(users, offered, bias, layers, counts=counts, threads=threads) for threads in (1, 3)]
    library.limit(library.LEVELS[-1])
    np.testing.assert_allclose(came[0], x[..., 0], rtol=1e-4, atol=1e-4)
    assert np.array_equal(*came)


def test_towers_refuse_layers_that_do_not_fit_and_pass_nan_on():
    ones = np.ones((2, 3), np.float32)
    with pytest.raises(ConfigError, match="layers"):
        topk.tower(ones, ones, ones[0], [(ones, ones[0, :2])])
    with pytest.raises(ConfigError, match="layers"):
        topk.tower(ones, ones, ones[0], [])
    damaged = ones.copy()
    damaged[1, 1] = np.nan
    came = topk.tower(damaged, ones, ones[0], [(ones[:1], ones[0, :1])])
    assert np.isnan(came[1]).all()
    assert not np.isnan(came[0]).any()
