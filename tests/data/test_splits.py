"""Batches of any split, and splits cut in two: what a search learns from, and what it is judged by."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from pocketrec.backbones.deepfm import DeepFM
from pocketrec.backbones.mf import MF
from pocketrec.backbones.neumf import NeuMF
from pocketrec.data.dataset import Dataset, Split
from pocketrec.data.sampling import triples
from pocketrec.errors import DataError
from pocketrec.testing import Lab


@st.composite
def splits(draw) -> Split:
    """Any number of rows with one field, which are told apart by their line in the raw file."""
    rows = draw(st.integers(0, 60))
    ids = np.arange(rows, dtype=np.int32)[:, None] % 7
    labels = draw(st.sampled_from([None, (np.arange(rows) % 2).astype(np.float32)]))
    teacher = draw(st.sampled_from([None, np.arange(rows, dtype=np.float32)]))
    lines = np.sort(
        np.array(draw(st.lists(st.integers(1, 10**6), min_size=rows, max_size=rows, unique=True)), np.int64)
    )
    return Split("valid", object.__new__(Dataset), ids, labels, lines, teacher)


@given(splits(), st.integers(0, 2**40))
@settings(max_examples=80, deadline=None)
def test_halves_are_disjoint_complete_and_the_same_on_every_call(split, seed):
    first, second = split.halves(seed)
    assert 0 <= len(first) - len(second) <= 1
    assert not set(first.rows) & set(second.rows)
    for half, again in zip((first, second), split.halves(seed), strict=True):
        places = np.searchsorted(split.rows, half.rows)
        assert (np.diff(places) > 0).all()
        assert half.name == split.name
        for column in ("ids", "labels", "rows", "teacher"):
            whole, part = getattr(split, column), getattr(half, column)
            assert (part is None) == (whole is None)
            if part is not None:
                assert part.dtype == whole.dtype
                assert_array_equal(part, whole[places])
                assert_array_equal(part, getattr(again, column))
    assert_array_equal(np.sort(np.concatenate([first.rows, second.rows])), split.rows)


def test_halves_depend_on_the_seed_and_are_those_of_chance(lab):
    train = lab.data("ctr").train
    firsts = np.array([np.isin(train.rows, train.halves(seed)[0].rows) for seed in range(40)])
    assert len({half.tobytes() for half in firsts}) == 40
    share = firsts.mean(axis=0)
    assert abs(share.mean() - 0.5) < 0.01
    assert share.std() == pytest.approx(np.sqrt(0.25 / 40), rel=0.25)


def test_validation_can_be_a_loss(lab):
    data = lab.data("ctr")
    model = DeepFM(dim=4, hidden=(8,), dropout=0.0).build(data, 0)
    half, other = data.valid.halves(1)
    read = list(model.batches(data, 16, 0, 0, split=half, shuffle=False))
    assert_array_equal(torch.cat([ids for ids, _ in read]), half.ids)
    assert_array_equal(torch.cat([labels for _, labels in read]), half.labels)
    assert set(half.rows) | set(other.rows) == set(data.valid.rows)
    loss = model.loss(read[0], torch.Generator())
    loss.backward()
    assert model.table.matrix.grad.abs().sum() > 0
    assert list(model.batches(data, 16, 0, 0, split=replace(half, ids=half.ids[:0], labels=half.labels[:0]))) == []


@pytest.mark.parametrize("backbone", [MF(dim=4), NeuMF(dim=4, hidden=(4,))])
def test_negatives_of_validation_are_no_training_items(lab, backbone):
    data = lab.data("cf")
    model, known = backbone.build(data, 0), {tuple(pair) for s in (data.train, data.valid) for pair in s.ids.tolist()}
    drawn = torch.cat([batch[0] for epoch in range(20) for batch in model.batches(data, 8, 0, epoch, split=data.valid)])
    assert len(drawn) == 20 * len(data.valid)
    assert {tuple(pair) for pair in drawn[:, :2].tolist()} == {tuple(pair) for pair in data.valid.ids.tolist()}
    users, negatives = drawn[:, :1].expand(len(drawn), drawn.shape[1] - 2), drawn[:, 2:]
    pairs = torch.stack([users, negatives], dim=-1).flatten(0, 1)
    assert not {tuple(pair) for pair in pairs.tolist()} & known


def test_orders_of_two_splits_are_drawn_apart(lab):
    data = lab.data("ctr")
    model = DeepFM(dim=4, hidden=(8,)).build(data, 0)
    as_valid = replace(data.train, name="valid")
    one, other = (torch.cat([b[0] for b in model.batches(data, 64, 0, 0, split=s)]) for s in (data.train, as_valid))
    assert_array_equal(np.unique(one, axis=0), np.unique(other, axis=0))
    assert not torch.equal(one, other)


def test_a_split_of_another_data_set_is_refused(lab, tmp_path):
    other = Lab(tmp_path).visits
    data = lab.data("ctr")
    model = DeepFM(dim=4, hidden=(8,)).build(data, 0)
    with pytest.raises(DataError, match="need a split of it, but got one of"):
        next(iter(model.batches(data, 16, 0, 0, split=other.valid)))


def test_a_user_who_has_seen_everything_has_no_negative():
    with pytest.raises(DataError, match="user 0 has all 2"):
        triples(np.array([[0, 1]]), 1, 3, 0, 0, seen=np.array([[0, 2]]))
    assert triples(np.array([[0, 1]]), 1, 4, 0, 0, seen=np.array([[0, 2]])).tolist() == [[0, 1, 3]]
