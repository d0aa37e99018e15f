"""Raw values find their rows, absent ones find none, and a string key costs about 5 bytes."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pocketrec.errors import ArtifactError, DataError
from pocketrec.format import vocabulary
from pocketrec.format.vocabulary import Vocabulary, hash64, size_for
from pocketrec.schema import Field, Schema

Hashes = Callable[[int], NDArray[np.uint64]]


def schema(*sizes: int, dense: tuple[int, ...] = (), first: int = 0, oov: bool = True) -> Schema:
    """Fields with ``sizes`` named values, and an out-of-vocabulary row each."""
    fields, offset = [], 0
    for i, size in enumerate(sizes):
        keys = "dense" if i in dense else "hashed"
        fields.append(Field(f"f{i}", size + oov, offset, keys, first if i in dense else 0, oov))
        offset = fields[-1].stop
    return Schema("ctr", tuple(fields))


def random_hashes(shape: Schema, seed: int = 0) -> Hashes:
    generator = np.random.default_rng(seed)
    columns = [generator.integers(0, 2**64, f.size - f.oov, dtype=np.uint64) for f in shape.fields]
    return columns.__getitem__


def inverse(rows: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Position of each table row in ``rows``, or -1."""
    result = np.full(size, -1)
    result[rows] = np.arange(len(rows))
    return result


def test_hash64_is_blake2b_of_utf8() -> None:
    values = ["", "a", "ü", "x" * 1000, "\ud800"]
    expected = [
        int.from_bytes(hashlib.blake2b(v.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
        for v in values
    ]
    assert hash64(values).tolist() == expected
    assert hash64([]).shape == (0,)


@settings(max_examples=60, deadline=None)
@given(
    texts=st.lists(st.lists(st.text(max_size=6), unique=True, min_size=1, max_size=40), min_size=1, max_size=4),
    stored=st.randoms(use_true_random=False),
    share=st.floats(0, 1),
)
def test_stored_values_are_found_and_others_are_not(texts: list[list[str]], stored: Any, share: float) -> None:
    shape = schema(*map(len, texts))
    mask = np.array([stored.random() < share for _ in range(shape.rows)], dtype=bool)
    built, rows = Vocabulary.build(shape, mask, lambda i: hash64(texts[i]))
    expected = inverse(rows, shape.rows)
    for i, field in enumerate(shape.fields):
        found = built.lookup(i, texts[i])
        np.testing.assert_array_equal(found, expected[field.offset : field.stop - 1])
        np.testing.assert_array_equal(found >= 0, mask[field.offset : field.stop - 1])
        assert expected[field.stop - 1] == -1
        assert built.lookup(i, ["never seen before"]).tolist() == [-1]
    np.testing.assert_array_equal(built.file_rows(lambda i: hash64(texts[i])), expected)
    np.testing.assert_array_equal(shape.field_of_row[rows], built.fields())
    assert built.rows == len(rows)


@pytest.mark.parametrize("keys", [1, 7, 8, 9, 16, 17, 1000, 65_537])
def test_every_key_of_a_field_is_found(keys: int) -> None:
    shape = schema(keys, keys)
    hashes = random_hashes(shape, keys)
    built, rows = Vocabulary.build(shape, np.ones(shape.rows, bool), hashes)
    expected = inverse(rows, shape.rows)
    for i, field in enumerate(shape.fields):
        np.testing.assert_array_equal(built.lookup_hashes(i, hashes(i)), expected[field.offset : field.stop - 1])


def test_two_hundred_thousand_keys_take_five_bytes_each_and_are_built_without_a_call_for_each() -> None:
    shape = schema(*[28_000] * 39)
    hashes = random_hashes(shape)
    stored = np.random.default_rng(1).random(shape.rows) < 0.2
    calls = 0

    def count(frame: object, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        built, rows = Vocabulary.build(shape, stored, hashes)
    finally:
        sys.setprofile(before)
    assert len(rows) > 200_000
    assert built.size_bytes <= 5 * len(rows)
    assert calls < len(rows) / 10


def test_dense_integers_cost_nothing() -> None:
    shape = schema(1000, 50, dense=(0, 1), first=7)
    built, rows = Vocabulary.build(shape, np.zeros(shape.rows, bool), random_hashes(shape))
    assert built.size_bytes == 0
    assert built.arrays() == {}
    assert rows.tolist() == [*range(1000), *range(1001, 1051)]
    assert built.lookup(1, [7, "7", 56, "56", 57, 6, None, "", "x", "7.0"]).tolist() == [
        1000, 1000, 1049, 1049, -1, -1, -1, -1, -1, -1,
    ]  # fmt: skip
    assert built.false_match_rate(0) == 0


def test_one_hundred_thousand_random_integers_read_absent_or_their_row() -> None:
    shape = schema(1000, dense=(0,), first=-5)
    built, _ = Vocabulary.build(shape, np.ones(shape.rows, bool), random_hashes(shape))
    generator = np.random.default_rng(2)
    extremes = np.array([np.iinfo(np.int64).min, np.iinfo(np.int64).max, -1, -5, -6, 994, 995, 0])
    values = np.concatenate(
        [extremes, generator.integers(-(2**63), 2**63 - 1, 100_000), generator.integers(-9, 999, 1000)]
    )
    expected = [v + 5 if -5 <= v < 995 else -1 for v in values.tolist()]
    assert built.lookup(0, values).tolist() == expected
    assert built.lookup(0, values.tolist()).tolist() == expected
    assert built.lookup(0, [str(v) for v in values.tolist()]).tolist() == expected
    unsigned = np.array([0, 3, 994, 995, 2**64 - 1], dtype=np.uint64)
    assert built.lookup(0, unsigned).tolist() == [5, 8, 999, -1, -1]
    assert built.lookup(0, [2**100, -(2**100)]).tolist() == [-1, -1]


def test_false_matches_are_as_rare_as_stated() -> None:
    shape = schema(50_000)
    built, _ = Vocabulary.build(shape, np.ones(shape.rows, bool), random_hashes(shape))
    assert built.false_match_rate(0) < 8 / 2**32
    strangers = np.random.default_rng(3).integers(0, 2**64, 1_000_000, dtype=np.uint64)
    assert (built.lookup_hashes(0, strangers) >= 0).sum() <= 2
    assert (built.lookup(0, [f"stranger {i}" for i in range(100_000)]) >= 0).sum() <= 1


def test_a_false_match_needs_the_bucket_and_all_32_bits() -> None:
    shape = schema(1 << 12)
    hashes = random_hashes(shape)
    built, _ = Vocabulary.build(shape, np.ones(shape.rows, bool), hashes)
    inverse_of_multiplier = pow(0x9E3779B97F4A7C15, -1, 2**64)
    bits = 9
    for bit in range(64):
        twins = [(((int(h) * 0x9E3779B97F4A7C15) ^ (1 << bit)) * inverse_of_multiplier) % 2**64 for h in hashes(0)[:50]]
        found = built.lookup_hashes(0, np.array(twins, dtype=np.uint64))
        assert (found >= 0).all() == (bit < 64 - bits - 32)


def test_one_row_is_looked_up_across_fields() -> None:
    texts = [["a", "b"], [], ["x", "y", "12"]]
    shape = schema(2, 5, 3, dense=(1,))
    built, _ = Vocabulary.build(shape, np.ones(shape.rows, bool), lambda i: hash64(texts[i]))
    for row in (["a", 3, "y"], ["b", "4", 12], ["?", 5, None], ["y", None, "a"]):
        each = [int(built.lookup(i, [value])[0]) for i, value in enumerate(row)]
        assert built.lookup_row(row).tolist() == each
    assert built.lookup(2, [12, np.int64(12)]).tolist() == built.lookup(2, ["12", "12"]).tolist()


def test_a_missing_cell_is_the_empty_text() -> None:
    shape = schema(2)
    built, _ = Vocabulary.build(shape, np.ones(shape.rows, bool), lambda i: hash64(["", "a"]))
    assert built.lookup(0, [None])[0] == built.lookup(0, [""])[0] >= 0


@pytest.mark.parametrize("value", [1.5, True, b"a", ["a"], np.float32(1), np.bool_(True)])
@pytest.mark.parametrize("dense", [(), (0,)])
def test_values_of_other_types_are_data_errors(value: Any, dense: tuple[int, ...]) -> None:
    shape = schema(2, dense=dense)
    built, _ = Vocabulary.build(shape, np.ones(shape.rows, bool), lambda i: hash64(["a", "b"]))
    with pytest.raises(DataError, match="'f0'"):
        built.lookup(0, [value])


def test_a_collision_is_mixed_away(monkeypatch: pytest.MonkeyPatch) -> None:
    shape = schema(3)
    twin = pow(0x9E3779B97F4A7C15, -1, 2**64)
    hashes = np.array([twin * 5 % 2**64, twin * 6 % 2**64, twin << 40 & (2**64 - 1)], dtype=np.uint64)
    built, rows = Vocabulary.build(shape, np.ones(4, bool), lambda i: hashes)
    assert built.attempt > 0
    np.testing.assert_array_equal(built.lookup_hashes(0, hashes), inverse(rows, 4)[:3])
    monkeypatch.setattr(vocabulary, "_ATTEMPTS", 1)
    with pytest.raises(DataError, match="same 64-bit hash"):
        Vocabulary.build(shape, np.ones(4, bool), lambda i: hashes)


def test_a_pruned_value_is_never_taken_for_a_stored_one() -> None:
    shape = schema(2)
    unit = pow(0x9E3779B97F4A7C15, -1, 2**64)
    hashes = np.array([unit * 5 % 2**64, unit * 6 % 2**64], dtype=np.uint64)
    built, _ = Vocabulary.build(shape, np.array([True, False, False]), lambda i: hashes)
    assert built.attempt > 0
    assert built.lookup_hashes(0, hashes).tolist() == [0, -1]


def test_equal_hashes_are_a_data_error() -> None:
    with pytest.raises(DataError, match="same 64-bit hash"):
        Vocabulary.build(schema(2), np.ones(3, bool), lambda i: np.array([9, 9], np.uint64))


def test_stored_must_cover_all_rows() -> None:
    with pytest.raises(DataError, match="one entry for each of 3 rows"):
        Vocabulary.build(schema(2), np.ones(2, bool), lambda i: hash64(["a", "b"]))


def test_it_reads_back_what_it_wrote_and_refuses_lies() -> None:
    shape = schema(500, 10, 3, dense=(1,))
    hashes = random_hashes(shape)
    stored = np.arange(shape.rows) % 3 > 0
    built, _ = Vocabulary.build(shape, stored, hashes)
    document, arrays = built.to_json(), built.arrays()
    again = Vocabulary.from_json(shape, document, arrays)
    for i in (0, 2):
        np.testing.assert_array_equal(again.lookup_hashes(i, hashes(i)), built.lookup_hashes(i, hashes(i)))
    directory, remainders = arrays["vocabulary.directory"], arrays["vocabulary.remainders"]
    falling = directory.copy()
    falling[1] = 2**31
    lies: list[tuple[Any, dict[str, Any]]] = [
        (document | {"keys": [1]}, arrays),
        (document | {"keys": [501, 10, 2]}, arrays),
        (document | {"keys": [True, 10, 2]}, arrays),
        (document | {"keys": "abc"}, arrays),
        (document | {"attempt": -1}, arrays),
        (document | {"attempt": 10**9}, arrays),
        (document | {"attempt": 0.5}, arrays),
        (document | {"more": 1}, arrays),
        ({}, arrays),
        (document, {}),
        (document, arrays | {"vocabulary.directory": directory[:-1]}),
        (document, arrays | {"vocabulary.directory": falling}),
        (document, arrays | {"vocabulary.directory": directory + np.uint32(1)}),
        (document, arrays | {"vocabulary.directory": directory.astype(np.int32)}),
        (document, arrays | {"vocabulary.remainders": remainders[1:]}),
        (document, arrays | {"vocabulary.remainders": remainders[None]}),
    ]
    for lie, parts in lies:
        with pytest.raises(ArtifactError, match="vocabulary"):
            Vocabulary.from_json(shape, lie, parts)


def test_rows_of_another_data_set_are_found_by_their_values() -> None:
    shape, other = schema(3, 4, dense=(1,), first=10), schema(2, 3, dense=(1,), first=12)
    texts = {id(shape): ["a", "b", "c"], id(other): ["c", "z"]}
    built, _ = Vocabulary.build(shape, np.ones(shape.rows, bool), lambda i: hash64(texts[id(shape)]))
    expected = [*built.lookup(0, ["c", "z"]).tolist(), -1, *built.lookup(1, [12, 13, 14]).tolist(), -1]
    assert built.file_rows(lambda i: hash64(texts[id(other)]), other).tolist() == expected
    with pytest.raises(DataError, match=r"f1 \(dense\), but this data is 'ctr' with f0 \(hashed\), f1 \(hashed\)"):
        built.file_rows(lambda i: hash64(["c", "z"]), schema(2, 2))


@given(st.lists(st.integers(0, 300), min_size=1, max_size=5), st.sets(st.integers(0, 4)))
def test_the_size_is_known_beforehand(keys: list[int], dense: set[int]) -> None:
    shape = schema(*keys, dense=tuple(dense))
    built, _ = Vocabulary.build(shape, np.ones(shape.rows, bool), random_hashes(shape))
    assert size_for(shape, keys) == built.size_bytes


def test_no_stored_row_at_all() -> None:
    shape = schema(5, 3)
    built, rows = Vocabulary.build(shape, np.zeros(shape.rows, bool), random_hashes(shape))
    assert rows.shape == (0,)
    assert built.lookup(1, ["a", None]).tolist() == [-1, -1]
    again = Vocabulary.from_json(shape, built.to_json(), built.arrays())
    assert again.lookup(0, ["a"]).tolist() == [-1]
