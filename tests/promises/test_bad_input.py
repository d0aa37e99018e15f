"""Input that is not what the format promises: a typed, one-line error with place and way out, and nothing written."""

from __future__ import annotations

import gzip
from collections import Counter

import numpy as np
import polars as pl
import pytest

from pocketrec import registry
from pocketrec.data.dataset import Dataset
from pocketrec.data.encode import encode
from pocketrec.errors import ConfigError, DataError
from pocketrec.sources.adjacency import Adjacency
from pocketrec.sources.criteo import Criteo
from pocketrec.sources.interactions import Interactions
from pocketrec.sources.synthetic import Synthetic
from pocketrec.sources.table import Table

READERS = sorted(set(registry.modules("sources")) - {"synthetic"})
HEADER = "a,b,label\n"
GOOD = "".join(f"w{i},{i},{i % 2}\n" for i in range(40))


def refused(source, path, out, error=DataError, **options) -> str:
    """The message of the refusal, which must come on one line and leave nothing behind."""
    before = sorted(p.name for p in out.parent.iterdir())
    with pytest.raises(error) as caught:
        encode(source, path, out, **options)
    assert sorted(p.name for p in out.parent.iterdir()) == before
    message = str(caught.value)
    assert "\n" not in message
    return message


def write(folder, content: str | bytes, name="log.csv"):
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


# The file


@pytest.mark.parametrize("name", READERS)
def test_no_file_a_folder_and_no_bytes(tmp_path, out, name):
    source = registry.load("sources", name)()
    assert "but there is none; check the path" in refused(source, tmp_path / "absent", out)
    (tmp_path / "folder").mkdir()
    assert "expected a file, but got a folder" in refused(source, tmp_path / "folder", out)
    assert "the file is empty (0 bytes)" in refused(source, write(tmp_path, ""), out)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    "content", [b"\n\n\n", b"\x00" * 100, b"\xff\xfe" * 50, b"PAR1", b"\x1f\x8b\x08", b"PK\x03\x04\n" * 9]
)
def test_content_of_another_kind(tmp_path, out, name, content):
    refused(registry.load("sources", name)(), write(tmp_path, content), out)


def test_header_only(tmp_path, out):
    assert "expected rows, but there are none" in refused(Table(), write(tmp_path, HEADER), out)
    assert "expected rows, but there are none" in refused(Table(), write(tmp_path, HEADER + "\n\n"), out)
    pl.DataFrame({"a": [], "label": []}).write_parquet(tmp_path / "empty.parquet")
    assert "expected rows, but there are none" in refused(Table(), tmp_path / "empty.parquet", out)


def test_missing_label_column_names_the_nearest(tmp_path, out):
    path = write(tmp_path, HEADER + GOOD)
    assert "expected a column 'lable', but the columns are a, b, label; did you mean 'label'?" in refused(
        Table(label="lable"), path, out
    )
    assert "expected a column 'user'" in refused(Interactions(), path, out)
    assert "did you mean 'b'" not in refused(Table(drop=("zzz",)), path, out)


def test_wrong_separator(tmp_path, out):
    path = write(tmp_path, (HEADER + GOOD).replace(",", ";"))
    assert "separator ',' gives one, 'a;b;label'" in refused(Table(separator=","), path, out)
    assert "wrong number of columns (expected 40, but got 1)" in refused(Criteo(), path, out)


def test_repeated_column(tmp_path, out):
    assert "'a' is repeated" in refused(Table(), write(tmp_path, "a,a,label\n1,2,0\n"), out)


def test_cut_and_broken_compression(tmp_path, out):
    whole = gzip.compress((HEADER + GOOD * 500).encode())
    assert "fetch it again" in refused(Table(), write(tmp_path, whole[:-20], "cut.csv.gz"), out)
    broken = bytearray(whole)
    broken[len(whole) // 2] ^= 255
    assert "fetch it again" in refused(Table(), write(tmp_path, bytes(broken), "broken.csv.gz"), out)
    pl.DataFrame({"a": range(1000), "label": [0, 1] * 500}).write_parquet(tmp_path / "whole.parquet")
    cut = write(tmp_path, (tmp_path / "whole.parquet").read_bytes()[:-50], "cut.parquet")
    assert "expected a readable parquet file" in refused(Table(), cut, out)


def test_a_line_without_end(tmp_path, out, monkeypatch):
    monkeypatch.setattr("pocketrec.data.lines.BLOCK_BYTES", 1 << 10)
    monkeypatch.setattr("pocketrec.data.lines.LINE_BYTES", 1 << 16)
    assert "a line of over 65,536 bytes" in refused(Table(), write(tmp_path, HEADER + "x" * (1 << 18)), out)


def test_a_ten_megabyte_cell_is_only_a_value(tmp_path, out):
    value = "x" * 10_000_000
    data = encode(Table(drop=("b",)), write(tmp_path, f"{HEADER}{value},1,1\n{GOOD}"), out, split="1:0:0")
    assert data.values(0)[0] == value


# Labels


@pytest.mark.parametrize("label", ["", "yes", "nan", "NaN", "inf", "-inf", "-1", "2", "0.5", " 1", "01", "1e0"])
@pytest.mark.parametrize("line", [2, 30])
def test_labels_of_text(tmp_path, out, label, line):
    rows = GOOD.splitlines()
    rows[line - 2] = f"x,7,{label}"
    message = refused(Table(), write(tmp_path, HEADER + "\n".join(rows)), out, max_bad=1.0)
    assert f"log.csv:{line}: label 'label' must be 0 or 1, but got {label!r}" in message


@pytest.mark.parametrize("label", [None, float("nan"), float("inf"), -1.0, 2.0, 0.5])
def test_labels_of_parquet(tmp_path, out, label):
    labels = [0.0, 1.0] * 20
    labels[16] = label
    pl.DataFrame({"a": range(40), "label": labels}, strict=False).write_parquet(tmp_path / "log.parquet")
    assert "log.parquet:17: label 'label' must be 0 or 1" in refused(Table(), tmp_path / "log.parquet", out)


@pytest.mark.parametrize("labels", [[0, 1], [0.0, 1.0], [False, True], ["0", "1"], ["false", "True"], ["0.0", "1.0"]])
def test_labels_that_are_fine(tmp_path, out, labels):
    pl.DataFrame({"a": range(40), "label": labels * 20}).write_parquet(tmp_path / "log.parquet")
    data = encode(Table(), tmp_path / "log.parquet", out)
    assert data.test.labels.tolist() == [(n - 1) % 2 for n in data.test.rows.tolist()]


def test_a_bad_label_of_the_test_file_names_that_file(tmp_path, out):
    train = write(tmp_path, HEADER + GOOD)
    test = write(tmp_path, HEADER + "x,1,9\n", "test.csv")
    assert "test.csv:2: label 'label'" in refused(Table(), train, out, test=test)


# Rows


def test_too_many_bad_rows_name_the_first(tmp_path, out):
    rows = GOOD.splitlines() * 100
    for i in (1500, 700, 3000, 3001, 3002):
        rows[i] = "too,few"
    path = write(tmp_path, HEADER + "\n".join(rows))
    message = refused(Table(), path, out)
    assert "log.csv:702: wrong number of columns (expected 3, but got 2)" in message
    assert "5 of the first 4,000 rows are bad, at most 0.1% may be" in message
    data = encode(Table(), path, out, max_bad=0.01)
    assert data.dropped == {"wrong number of columns": 5}


def test_every_kind_of_bad_row_is_counted_exactly(tmp_path, out):
    rng = np.random.default_rng(0)
    mutations = {
        b"w": "wrong number of columns", b"w,1,0,9": "wrong number of columns", b"w\x00,1,0": "NUL byte",
        b"w\xff,1,0": "invalid UTF-8", b"": "blank line", b'"w,1,0': "quote not closed on its line",
    }  # fmt: skip
    lines, expected = [], Counter()
    for i in range(100_000):
        if rng.random() < 0.2:
            mutation = list(mutations)[rng.integers(len(mutations))]
            expected[mutations[mutation]] += 1
            lines.append(mutation)
        else:
            lines.append(b"w%d,%d,%d" % (i % 100, i % 9, i % 2))
    end = [b"\n", b"\r\n"]
    content = HEADER.encode() + b"".join(line + end[i % 2] for i, line in enumerate(lines))
    data = encode(Table(), write(tmp_path, b"\xef\xbb\xbf" + content), out, max_bad=1.0)
    assert data.dropped == expected
    assert data.rows_in == len(lines) == sum(len(s) for s in data.splits.values()) + sum(expected.values())
    assert set(data.values(0)) <= {f"w{i}" for i in range(100)}


def test_a_number_column_with_a_word_is_a_bad_row(tmp_path, out):
    path = write(tmp_path, HEADER + GOOD + "x,word,1\n")
    assert "log.csv:42: not a number (got ('word',))" in refused(Table(number=("b",)), path, out)
    assert "log.csv:42: not a whole number (got ('word',))" in refused(Table(dense=("b",)), path, out)


def test_interactions_of_words_and_negative_ids(tmp_path, out):
    path = write(tmp_path, "user,item\n0,1\nann,2\n1,-1\n")
    assert "log.csv:3: not a whole number of at least 0 (got ('ann', '2'))" in refused(Interactions(), path, out)
    assert "not a list of whole numbers" in refused(Adjacency(), write(tmp_path, "0 1\nann 2\n"), out)


def test_one_row_and_no_training_row(tmp_path, out):
    assert "the split leaves none of 1 rows for training" in refused(Table(), write(tmp_path, HEADER + "x,1,1\n"), out)
    data = encode(Table(), write(tmp_path, HEADER + "x,1,1\n"), out, split="1:0:0")
    assert len(data.train) == 1


def test_a_field_with_one_value_and_a_split_of_unknown_values(tmp_path, out):
    train = write(tmp_path, HEADER + "same,3,1\n" * 20)
    data = encode(Table(), train, out, test=write(tmp_path, HEADER + "new,9,0\n", "test.csv"))
    assert [f.size for f in data.schema.fields] == [2, 2]
    assert data.test.ids.tolist() == [[f.oov_row for f in data.schema.fields]]


# Arguments


@pytest.mark.parametrize(
    "options",
    [
        {"split": "8:1"}, {"split": "0:1:1"}, {"split": "a:b:c"}, {"counting": "all"}, {"order": "random"},
        {"max_bad": 2}, {"seed": -1}, {"users": 3}, {"threshold": 0}, {"valid_fraction": 0.1}, {"valid": "x"},
    ],
)  # fmt: skip
def test_arguments_out_of_range(tmp_path, out, options):
    name = next(iter(options))
    assert f"`{name}`" in refused(Table(), write(tmp_path, HEADER + GOOD), out, ConfigError, **options)


def test_no_raw_file_only_for_generators(out):
    with pytest.raises(ConfigError, match="needs a raw file"):
        encode(Table(), None, out)
    assert len(encode(Synthetic(rows=100), None, out).train) == 80


def test_no_data_set_there(tmp_path):
    with pytest.raises(DataError, match="encode"):
        Dataset.open(tmp_path / "absent")
    write(tmp_path, "{", "dataset.json")
    with pytest.raises(DataError, match="damaged"):
        Dataset.open(tmp_path)
