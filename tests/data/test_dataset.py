"""Encoding: ids, counts, splits, order, digest, and what survives a kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from fractions import Fraction

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pocketrec.data import splits
from pocketrec.data.dataset import Dataset
from pocketrec.data.encode import encode
from pocketrec.errors import ConfigError, DataError
from pocketrec.format.vocabulary import hash64
from pocketrec.sources.interactions import Interactions
from pocketrec.sources.synthetic import Synthetic
from pocketrec.sources.table import Table

ROWS = [(f"c{(i * i) % 17}", i % 5 + 3, i % 2) for i in range(300)]


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "log.csv"
    write_log(path, ROWS)
    return path


def write_log(path, rows):
    path.write_text("word,number,label\n" + "".join(f"{a},{b},{y}\n" for a, b, y in rows))


def local(split, field):
    return np.array(split.ids[:, field]) - split.dataset.schema.fields[field].offset


# Vocabulary, counts, order


@given(
    words=st.lists(st.text("abcé\u4e2d", max_size=2), min_size=10, max_size=60),
    threshold=st.integers(1, 3),
    counting=st.sampled_from(["train", "published"]),
    order=st.sampled_from(["appearance", "count"]),
    seed=st.integers(0, 5),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ids_and_counts_by_a_plain_reader(tmp_path_factory, words, threshold, counting, order, seed):
    folder = tmp_path_factory.mktemp("words")
    pl.DataFrame({"w": words, "label": [i % 2 for i in range(len(words))]}).write_parquet(folder / "log")
    data = encode(
        Table(), folder / "log", folder / "out", threshold=threshold, counting=counting, order=order, seed=seed
    )
    train = [words[i - 1] for i in data.train.rows]
    counted = Counter(train if counting == "train" else words)
    kept = [w for w in counted if counted[w] >= threshold]
    if order == "count":
        kept.sort(key=lambda w: (-counted[w], w))
    assert data.values(0) == kept
    assert data.hashes(0).tolist() == hash64(kept).tolist()
    ids = {w: i for i, w in enumerate(kept)}
    for split in data.splits.values():
        assert split.ids[:, 0].tolist() == [ids.get(words[i - 1], len(kept)) for i in split.rows]
        assert split.labels.tolist() == [(i - 1) % 2 for i in split.rows]
    assert data.counts.tolist() == np.bincount(data.train.ids[:, 0], minlength=len(kept) + 1).tolist()


def test_ids_are_global_and_each_field_ends_in_its_oov_row(log, tmp_path):
    data = encode(Table(), log, tmp_path / "out", threshold={"word": 30})
    word, number = data.schema.fields
    assert (word.keys, number.keys, number.first, number.size) == ("hashed", "dense", 3, 6)
    assert word.oov_row == word.stop - 1 == number.offset - 1
    for split in data.splits.values():
        assert split.ids.dtype == np.int32
        for f, field in enumerate(data.schema.fields):
            assert (split.ids[:, f] >= field.offset).all()
            assert (split.ids[:, f] < field.stop).all()
    assert data.counts[word.oov_row] > 0
    assert data.values(1) == ["3", "4", "5", "6", "7"]


def test_a_field_may_hold_nothing_but_its_oov_row(log, tmp_path):
    data = encode(Table(), log, tmp_path / "out", threshold=1000)
    assert [f.size for f in data.schema.fields] == [1, 1]
    assert data.values(0) == []
    assert data.hashes(0).shape == (0,)
    assert data.counts.tolist() == [240, 240]


def test_threshold_must_name_fields(log, tmp_path):
    with pytest.raises(ConfigError, match="must name fields"):
        encode(Table(), log, tmp_path / "out", threshold={"wrod": 2})
    with pytest.raises(ConfigError, match="at least 1"):
        encode(Table(), log, tmp_path / "out", threshold=0)
    assert [p.name for p in tmp_path.iterdir()] == ["log.csv"]


def test_test_rows_leave_no_trace_in_vocabulary_and_counts(log, tmp_path):
    clean = encode(Table(), log, tmp_path / "clean")
    noisy_rows = list(ROWS)
    for line in [*clean.test.rows, *clean.valid.rows]:
        noisy_rows[line - 2] = (f"noise{line}", 999_999, 1)
    write_log(tmp_path / "noisy.csv", noisy_rows)
    noisy = encode(Table(), tmp_path / "noisy.csv", tmp_path / "noisy")
    assert noisy.schema == clean.schema
    assert noisy.values(0) == clean.values(0)
    assert (noisy.counts == clean.counts).all()
    assert (noisy.train.ids == clean.train.ids).all()
    assert (local(noisy.test, 0) == noisy.schema.fields[0].size - 1).all()


def test_published_counting_sees_all_rows(tmp_path):
    write_log(tmp_path / "log.csv", [(f"w{i}", 1, i % 2) for i in range(100)])
    assert len(encode(Table(), tmp_path / "log.csv", tmp_path / "a").values(0)) == 80
    leak = encode(Table(), tmp_path / "log.csv", tmp_path / "b", counting="published")
    assert leak.values(0) == [f"w{i}" for i in range(100)]
    assert leak.counts.sum() == 2 * 80


# Splits


@given(rows=st.integers(1, 3000), seed=st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_permutation_is_one(rows, seed):
    image = splits.permutation(rows, seed)(np.arange(rows))
    assert np.array_equal(np.sort(image), np.arange(rows))


def test_permutation_looks_random():
    rows = 100_000
    image = splits.permutation(rows, 7)(np.arange(rows))
    assert abs(np.corrcoef(np.arange(rows), image)[0, 1]) < 0.02
    assert abs(np.corrcoef(image[:-1], image[1:])[0, 1]) < 0.02
    assert (image != splits.permutation(rows, 8)(np.arange(rows))).mean() > 0.999


def test_split_by_seed_has_the_published_sizes_and_keeps_the_order(log, tmp_path):
    one, two = (encode(Table(), log, tmp_path / str(seed), seed=seed) for seed in (0, 1))
    assert {n: len(s) for n, s in one.splits.items()} == {"train": 240, "valid": 30, "test": 30}
    lines = np.concatenate([s.rows for s in one.splits.values()])
    assert np.array_equal(np.sort(lines), np.arange(2, 302))
    assert all((np.diff(s.rows) > 0).all() for s in one.splits.values())
    assert one.test.rows.tolist() != two.test.rows.tolist()


def test_split_by_files_and_fraction(log, tmp_path):
    write_log(tmp_path / "test.csv", ROWS[:50])
    data = encode(Table(), log, tmp_path / "out", test=tmp_path / "test.csv", valid_fraction=0.1)
    assert {n: len(s) for n, s in data.splits.items()} == {"train": 270, "valid": 30, "test": 50}
    assert data.rows_in == 350
    whole = encode(Table(), log, tmp_path / "whole", test=tmp_path / "test.csv", valid=tmp_path / "test.csv")
    assert {n: len(s) for n, s in whole.splits.items()} == {"train": 300, "valid": 50, "test": 50}
    assert (whole.valid.ids == whole.test.ids).all()
    bare = encode(Table(), log, tmp_path / "bare", test=tmp_path / "test.csv")
    assert len(bare.valid) == 0
    assert bare.valid.ids.shape == (0, 2)
    assert bare.report()["notes"] == ["the valid split is empty"]


def test_split_by_column(tmp_path):
    lines = "".join(f"w{i % 3},{('train', 'valid', 'test')[i % 3]},{i % 2}\n" for i in range(30))
    (tmp_path / "log.csv").write_text("w,part,label\n" + lines)
    data = encode(Table(split_column="part"), tmp_path / "log.csv", tmp_path / "out")
    assert [f.name for f in data.schema.fields] == ["w"]
    assert data.values(0) == ["w0"]
    assert {n: len(s) for n, s in data.splits.items()} == {"train": 10, "valid": 10, "test": 10}
    (tmp_path / "bad.csv").write_text("w,part,label\nx,dev,1\n")
    with pytest.raises(DataError, match=r"bad.csv:2: column 'part' must say train, valid or test, but got 'dev'"):
        encode(Table(split_column="part"), tmp_path / "bad.csv", tmp_path / "bad")


def test_split_by_column_and_by_file_contradict(log, tmp_path):
    with pytest.raises(ConfigError, match="both decide the splits"):
        encode(Table(split_column="number"), log, tmp_path / "out", test=log)


@given(counts=st.lists(st.integers(0, 35), min_size=1, max_size=12), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_held_out_pairs_per_user(counts, seed):
    users = np.repeat(np.arange(len(counts)), counts)
    users = np.random.default_rng(seed).permutation(users)
    held = splits.per_user(users, Fraction(1, 10), seed, "valid")
    taken = np.bincount(users[held], minlength=len(counts))
    for n, t in zip(counts, taken, strict=True):
        assert t == (max(1, n // 10) if n > 1 else 0)


# Interactions


def write_pairs(path, pairs):
    pl.DataFrame(pairs, schema={"user": pl.Int64, "item": pl.Int64}, orient="row").write_parquet(path)
    return path


def test_interactions_are_sorted_distinct_and_counted(tmp_path):
    rng = np.random.default_rng(0)
    pairs = list(zip(rng.integers(0, 20, 400).tolist(), rng.integers(0, 30, 400).tolist(), strict=True))
    train = write_pairs(tmp_path / "train.parquet", pairs)
    test = write_pairs(tmp_path / "test.parquet", [*[(u, 33) for u in range(20)], pairs[0], (3, 33)])
    data = encode(Interactions(), train, tmp_path / "out", test=test)
    distinct = set(pairs)
    assert data.schema.task == "cf"
    assert [f.size for f in data.schema.fields] == [20, 34]
    assert data.train.labels is None
    assert data.dropped == {"duplicate pair": 400 - len(distinct) + 1, "already in train": 1}
    assert data.rows_in == 422 == sum(len(s) for s in data.splits.values()) + sum(data.dropped.values())
    kept = [(int(u), int(i) - 20) for s in (data.train, data.valid) for u, i in s.ids]
    assert set(kept) == distinct
    for split in data.splits.values():
        assert [tuple(r) for r in split.ids.tolist()] == sorted(tuple(r) for r in split.ids.tolist())
    assert np.array_equal(data.counts, np.bincount(data.train.ids.ravel(), minlength=54))
    first = [pairs.index((int(u), int(i) - 20)) + 1 for u, i in data.train.ids]
    assert data.train.rows.tolist() == first
    assert data.report()["notes"] == ["1 items of the test split never occur in training"]


def test_interactions_sizes_may_be_given_but_must_cover(tmp_path):
    path = write_pairs(tmp_path / "train.parquet", [(0, 1), (0, 2), (1, 5), (1, 0)] * 2)
    data = encode(Interactions(), path, tmp_path / "a", users=10, items=20)
    assert [f.size for f in data.schema.fields] == [10, 20]
    with pytest.raises(DataError, match="`items` must be above the largest id, 5, but got 5"):
        encode(Interactions(), path, tmp_path / "b", items=5)


# The folder


def test_rows_in_is_rows_kept_plus_dropped(tmp_path):
    lines = [f"w{i},{i % 9},{i % 2}" for i in range(2000)]
    lines[7], lines[90], lines[91] = "ragged,row", "", "a,b,c,d"
    (tmp_path / "log.csv").write_text("w,n,label\n" + "\n".join(lines) + "\n")
    data = encode(Table(), tmp_path / "log.csv", tmp_path / "out", max_bad=0.01)
    assert data.dropped == {"wrong number of columns": 2, "blank line": 1}
    assert data.rows_in == 2000 == sum(len(s) for s in data.splits.values()) + sum(data.dropped.values())


def test_report_is_the_stable_document(log, tmp_path):
    report = encode(Table(), log, tmp_path / "out").report()
    assert set(report) >= {"dataset", "digest", "rows", "dropped", "fields"}
    assert report["rows"] == {"train": 240, "valid": 30, "test": 30}
    assert report["fields"][1] == {"name": "number", "cardinality": 6, "keys": "dense"}
    json.dumps(report)


def test_one_class_is_reported_not_refused(tmp_path):
    write_log(tmp_path / "log.csv", [(f"w{i}", 1, 1) for i in range(50)])
    notes = encode(Table(), tmp_path / "log.csv", tmp_path / "out").report()["notes"]
    assert notes[0] == "every label of the train split is 1"


def test_digest_covers_every_part(log, tmp_path):
    base = encode(Table(), log, tmp_path / "base")
    assert encode(Table(), log, tmp_path / "again").digest == base.digest
    digests = {base.digest}
    for number, (row, change) in enumerate([(5, ("c1", 4, 1)), (6, ("zz", 4, 0)), (7, ("c15", 3, 1))]):
        rows = list(ROWS)
        rows[row] = change
        write_log(tmp_path / "changed.csv", rows)
        digests.add(encode(Table(), tmp_path / "changed.csv", tmp_path / f"d{number}").digest)
    digests.add(encode(Table(), log, tmp_path / "seed", seed=1).digest)
    digests.add(encode(Table(), log, tmp_path / "order", order="count").digest)
    assert len(digests) == 6


def test_the_same_call_opens_what_is_there_and_another_refuses(log, tmp_path):
    first = encode(Table(), log, tmp_path / "out")
    stamp = (tmp_path / "out" / "dataset.json").stat().st_mtime_ns
    assert encode(Table(), log, tmp_path / "out").digest == first.digest
    assert (tmp_path / "out" / "dataset.json").stat().st_mtime_ns == stamp
    with pytest.raises(ConfigError, match="was not made by this call"):
        encode(Table(), log, tmp_path / "out", seed=1)
    (tmp_path / "empty").mkdir()
    assert encode(Table(), log, tmp_path / "empty").digest == first.digest


def test_synthetic_ids_stay_within_their_fields(tmp_path):
    data = encode(Synthetic(rows=3000, cardinalities=(100_000, 10)), None, tmp_path / "out")
    assert [f.size for f in data.schema.fields] == [100_001, 11]
    assert data.counts.sum() == 2 * len(data.train)
    assert data.train.teacher.shape == data.train.labels.shape


def test_many_batches_count_as_one(tmp_path, monkeypatch, log):
    whole = encode(Table(), log, tmp_path / "whole")
    monkeypatch.setattr("pocketrec.data.lines.BLOCK_BYTES", 64)
    monkeypatch.setattr("pocketrec.data.clicks.BATCH_ROWS", 7)
    assert encode(Table(), log, tmp_path / "pieces").digest == whole.digest


def test_open_names_what_is_damaged(log, tmp_path):
    out = tmp_path / "out"
    encode(Table(), log, out)
    with pytest.raises(DataError, match=r"there is no dataset\.json"):
        Dataset.open(tmp_path)
    content = (out / "train.ids.npy").read_bytes()
    (out / "train.ids.npy").write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"train.ids.npy: expected \d+ bytes, but got \d+"):
        Dataset.open(out)
    (out / "train.ids.npy").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    Dataset.open(out)
    with pytest.raises(DataError, match=r"train.ids.npy: expected digest"):
        Dataset.open(out, verify=True)
    (out / "train.ids.npy").unlink()
    with pytest.raises(DataError, match="there is no such file"):
        Dataset.open(out)
    document = (out / "dataset.json").read_text()
    for damaged in (document[:-5], document.replace('"size":6', '"size":7'), "[]", "{}"):
        (out / "dataset.json").write_text(damaged)
        with pytest.raises(DataError):
            Dataset.open(out)


CHILD = """
import sys
from pathlib import Path
from pocketrec.data.encode import encode
from pocketrec.sources.table import Table
print(encode(Table(), sys.argv[1], sys.argv[2]).digest)
"""


def run_child(log, out, **environment):
    command = [sys.executable, "-c", CHILD, str(log), str(out)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


KILLS = """
import os, sys
from pocketrec.data.encode import encode
from pocketrec.sources.table import Table

def child(out, crash_at):
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    os.environ.update(crash_at)
    encode(Table(), sys.argv[1], out)
    os._exit(0)

number = 1
while (status := child(f"{sys.argv[2]}/{number}", {"POCKETREC_CRASH_AT": str(number)})) != 0:
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == 9
    assert child(f"{sys.argv[2]}/{number}", {}) == 0
    number += 1
"""


def test_a_kill_at_every_boundary_costs_nothing(log, tmp_path):
    """One process that never encodes itself forks a child for each kill; the last child meets no boundary."""
    folder = tmp_path / "kills"
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(log), str(folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    encoded = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    assert len(encoded) > 20
    contents = [{p.name: p.read_bytes() for p in out.iterdir()} for out in encoded]
    assert all(c == contents[0] for c in contents)
    assert not [p for p in folder.iterdir() if p.name.endswith(".partial")]


def test_hash_seed_changes_nothing(log, tmp_path):
    digests = {run_child(log, tmp_path / s, PYTHONHASHSEED=s).stdout for s in ("0", "1", "12345")}
    assert len(digests) == 1
    assert len(digests.pop().strip()) == 64
