"""What encoding refuses, in words that name value and way out, and what is refused of folders that were changed."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from pocketrec.data.dataset import DOCUMENT, FORMAT, Dataset
from pocketrec.data.encode import encode
from pocketrec.errors import ConfigError, DataError
from pocketrec.files import digest
from pocketrec.sources.interactions import Interactions
from pocketrec.sources.table import Table


@pytest.fixture
def log(tmp_path) -> Path:
    path = tmp_path / "log.csv"
    path.write_text("word,number,label\n" + "".join(f"w{i % 7},{i % 5},{i % 2}\n" for i in range(100)))
    return path


@pytest.fixture
def pairs(tmp_path) -> Path:
    path = tmp_path / "pairs.csv"
    path.write_text("user,item\n" + "".join(f"{i % 9},{i % 11}\n" for i in range(99)))
    return path


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"counting": "valid"}, "`counting` must be one of train, published, but got 'valid'."),
        ({"order": "size"}, "`order` must be one of appearance, count, but got 'size'."),
        ({"max_bad": 1.5}, "`max_bad` must be in [0, 1], but got 1.5."),
        ({"max_bad": -0.1}, "`max_bad` must be in [0, 1], but got -0.1."),
        ({"seed": -1}, "`seed` must be at least 0, but got -1."),
        ({"users": 9}, "`users` has no meaning for task 'ctr', but got 9."),
        ({"items": 9}, "`items` has no meaning for task 'ctr', but got 9."),
        ({"valid": "v", "test": "t", "valid_fraction": 0.1}, "`valid` and `valid_fraction` both decide what validates"),
        ({"valid": "v"}, "`valid` needs `test`"),
        ({"valid_fraction": 0.1}, "`valid_fraction` needs `test`; without it, `split` says all three shares."),
        ({"split": "8:1"}, "`split` must be three whole numbers like '8:1:1', the first above 0, but got '8:1'."),
        ({"split": "0:1:1"}, "the first above 0, but got '0:1:1'."),
        ({"split": "8:-1:1"}, "but got '8:-1:1'."),
    ],
)
def test_arguments_that_are_out_of_range_or_contradict_are_refused(log, tmp_path, options: dict[str, Any], words):
    with pytest.raises(ConfigError) as caught:
        encode(Table(), log, tmp_path / "out", **options)
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_rankings_know_no_thresholds_and_hold_out_less_than_all(pairs, tmp_path):
    with pytest.raises(ConfigError, match="`threshold` has no meaning for task 'cf', but got 2"):
        encode(Interactions(), pairs, tmp_path / "out", threshold=2)
    with pytest.raises(ConfigError, match="`valid_fraction` must be at least 0 and below 1, but got 1"):
        encode(Interactions(), pairs, tmp_path / "out", test=pairs, valid_fraction=1.0)
    assert not (tmp_path / "out").exists()


def test_nothing_held_out_leaves_every_pair_for_training(pairs, tmp_path):
    test = tmp_path / "test.csv"
    test.write_text("user,item\n" + "".join(f"{i},{i + 11}\n" for i in range(9)))
    data = encode(Interactions(), pairs, tmp_path / "out", test=test, valid_fraction=0.0)
    assert [len(data.splits[name]) for name in ("train", "valid", "test")] == [99, 0, 9]


def test_a_source_of_clicks_must_name_its_label(log, tmp_path):
    class Unlabelled(Table):
        def scan(self, path, columns=None):
            return replace(super().scan(path, columns), label=None)

    with pytest.raises(ConfigError, match="must name its label column"):
        encode(Unlabelled(), log, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_more_rows_than_an_id_can_count_are_refused(tmp_path):
    log = tmp_path / "log.csv"
    log.write_text("number,word,label\n" + "".join(f"{i % 2 * 3_000_000_000},w{i},{i % 2}\n" for i in range(40)))
    with pytest.raises(DataError, match="Field 'number': its integers span 3,000,000,001 ids; call it a `category`"):
        encode(Table(dense=("number",)), log, tmp_path / "out")
    log.write_text("number,word,label\n" + "".join(f"{i % 2 * (2**31 - 9)},w{i},{i % 2}\n" for i in range(40)))
    with pytest.raises(DataError, match=r"Expected at most 2,147,483,647 table rows, but got .*; raise `threshold`"):
        encode(Table(dense=("number",)), log, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ids_of_pairs_above_a_thousand_million_are_refused(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("user,item\n0,1\n1,0\n2,1073741824\n")
    with pytest.raises(DataError, match="Expected between 1 and 1,073,741,824 items, but the ids give 1,073,741,825"):
        encode(Interactions(), path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fields_of_whole_numbers_have_no_hashes(log, tmp_path):
    data = encode(Table(), log, tmp_path / "out")
    assert [field.keys for field in data.schema.fields] == ["hashed", "dense"]
    with pytest.raises(ConfigError, match="Field 'number' has dense integer keys and no hashes; use its `first`"):
        data.hashes(1)


def test_a_copy_is_the_same_folder(log, tmp_path):
    data = encode(Table(), log, tmp_path / "out")
    twin = copy.copy(data)
    assert twin is not data
    assert (twin.digest, twin.path.resolve()) == (data.digest, data.path.resolve())
    np.testing.assert_array_equal(twin.train.ids, data.train.ids)


def test_an_array_that_is_none_is_refused(log, tmp_path):
    path = encode(Table(), log, tmp_path / "out").path / "train.ids.npy"
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(DataError, match=r"train\.ids\.npy: expected an array, but got: .*; encode the raw log again"):
        Dataset.open(tmp_path / "out")


def test_a_newer_format_is_refused(log, tmp_path):
    path = encode(Table(), log, tmp_path / "out").path / DOCUMENT
    document = json.loads(path.read_text())
    document["format"] = FORMAT + 1
    document["digest"] = digest({key: document[key] for key in ("format", "schema", "files")})
    del document["seal"]
    path.write_text(json.dumps({**document, "seal": digest(document)}))
    with pytest.raises(DataError, match=f"expected format {FORMAT}, but got {FORMAT + 1}; use a newer version"):
        Dataset.open(tmp_path / "out")


def test_a_header_whose_quote_is_not_closed_is_refused(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text('"word,number,label\na,1,0\nb,2,1\n')
    with pytest.raises(DataError, match=r"log\.csv:1: expected a header line, but got a quote that is not closed"):
        encode(Table(), path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_parquet_that_is_damaged_inside_is_refused(tmp_path):
    path = tmp_path / "log.parquet"
    rows = np.random.default_rng(0).integers(0, 1000, (5000, 2))
    pl.DataFrame({"a": rows[:, 0], "b": rows[:, 1], "label": rows[:, 0] % 2}).write_parquet(path, compression="zstd")
    content = bytearray(path.read_bytes())
    content[4:4000] = bytes(3996)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"log\.parquet: expected a readable parquet file, but got: .*; fetch or write"):
        encode(Table(), path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
