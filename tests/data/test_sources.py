"""Each raw format, read against an independent plain-Python reader or against rows written by hand."""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from pocketrec import registry
from pocketrec.data.dataset import DOCUMENT
from pocketrec.data.encode import encode
from pocketrec.data.source import Column, Source
from pocketrec.errors import ConfigError, DataError
from pocketrec.files import canonical_json, digest
from pocketrec.sources.adjacency import Adjacency
from pocketrec.sources.avazu import FIELDS as AVAZU_FIELDS
from pocketrec.sources.avazu import Avazu
from pocketrec.sources.criteo import CATEGORIES, INTEGERS, Criteo, bucket
from pocketrec.sources.interactions import Interactions
from pocketrec.sources.kdd12 import FIELDS as KDD12_FIELDS
from pocketrec.sources.kdd12 import Kdd12
from pocketrec.sources.libfm import Libfm
from pocketrec.sources.synthetic import Synthetic, zipf
from pocketrec.sources.table import Table, guess


def frames(source: Source, path) -> pl.DataFrame:
    return pl.concat([batch.frame for batch in source.scan(path).batches])


def write(folder, text: str, name: str = "log.txt"):
    path = folder / name
    path.write_bytes(text.encode())
    return path


def test_every_source_is_registered_under_its_name():
    assert set(registry.modules("sources")) >= {
        "criteo", "avazu", "kdd12", "libfm", "adjacency", "interactions", "table", "synthetic",
    }  # fmt: skip
    for name in registry.modules("sources"):
        assert issubclass(registry.load("sources", name), Source)


# Criteo


def published_bucket(cell: str) -> str:
    if cell == "":
        return "NULL"
    value = int(cell)
    return str(int(math.log(value) ** 2)) if value > 2 else str(value - 2)


@given(st.lists(st.one_of(st.just(""), st.integers(-10, 10**9).map(str)), min_size=1))
def test_criteo_buckets_are_the_published_ones(cells):
    assert bucket(pl.Series(cells, dtype=pl.String)).to_list() == [published_bucket(c) for c in cells]


def test_criteo_buckets_of_every_small_integer():
    cells = [str(v) for v in range(-5, 100_000)]
    assert bucket(pl.Series(cells)).to_list() == [published_bucket(c) for c in cells]


def test_criteo_buckets_of_the_text_are_logarithms_rounded_up():
    numbers = [*range(3, 5000), *(2**j + d for j in range(13, 52) for d in (-1, 0, 1))]
    expected = [str(next(e for e in range(64) if 2**e >= v)) for v in numbers]
    assert bucket(pl.Series(map(str, numbers)), "log2").to_list() == expected
    assert bucket(pl.Series(["", "-1", "2", "x"]), "log2").to_list() == ["NULL", "-3", "0", None]
    with pytest.raises(ConfigError, match="`buckets` must"):
        Criteo(buckets="ln")


def test_a_data_set_encoded_before_a_source_had_a_setting_is_that_of_its_default(tmp_path):
    path = write(tmp_path, "".join(f"{i % 2}\t{i}" + "\t" * 38 + "\n" for i in range(9)))
    data = encode(Criteo(), path, tmp_path / "out")
    document = json.loads((tmp_path / "out" / DOCUMENT).read_bytes())
    del document["recipe"]["source"]["buckets"], document["seal"]
    (tmp_path / "out" / DOCUMENT).write_bytes(canonical_json({**document, "seal": digest(document)}))
    assert encode(Criteo(), path, tmp_path / "out").digest == data.digest
    with pytest.raises(ConfigError, match="not made by this call"):
        encode(Criteo(buckets="log2"), path, tmp_path / "out")


def test_criteo_reads_labels_integers_and_categories(tmp_path):
    line = "1\t" + "\t".join(str(i) for i in range(13)) + "\t" + "\t".join(f"c{i}" for i in range(26))
    empty = "0" + "\t" * 39
    frame = frames(Criteo(), write(tmp_path, f"{line}\n{empty}\n"))
    assert frame.columns == ["label", *INTEGERS, *CATEGORIES]
    assert frame.row(0) == ("1", *(published_bucket(str(i)) for i in range(13)), *(f"c{i}" for i in range(26)))
    assert frame.row(1) == ("0", *["NULL"] * 13, *[""] * 26)


def test_criteo_integer_that_is_none_is_a_bad_row(tmp_path):
    good = "0" + "\t" * 39
    bad = "0\tx" + "\t" * 38
    batch = next(Criteo().scan(write(tmp_path, f"{good}\n{bad}\n{good}\n")).batches)
    assert batch.lines.tolist() == [1, 3]
    assert [(b.line, b.reason) for b in batch.bad] == [(2, "integer column does not hold an integer")]


def render(frame: pl.DataFrame, path, separator: str, *, header: bool):
    frame.write_csv(path, separator=separator, include_header=header, null_value="", quote_style="never")
    return path


@pytest.mark.realdata
@pytest.mark.parametrize(("name", "threshold"), [("raw_first_8000", 1), ("raw_first_8000", 3), ("train", 3)])
def test_criteo_real_rows_against_a_plain_reader(real_data, tmp_path, name, threshold):
    raw = pl.read_parquet(real_data / "criteo-dac80k" / f"{name}.parquet").select("label", *INTEGERS, *CATEGORIES)
    path = render(raw, tmp_path / "train.txt", "\t", header=False)
    data = encode(Criteo(), path, tmp_path / "out", threshold=threshold)
    assert data.rows_in == raw.height == sum(len(s) for s in data.splits.values())
    assert not data.dropped

    cells = [line.split("\t") for line in path.read_text().splitlines()]
    rows = [c[:1] + [published_bucket(v) for v in c[1:14]] + c[14:] for c in cells]
    train = set(data.train.rows.tolist())
    for f in (0, 4, 12, 13, 15, 38):
        counts = Counter(row[1 + f] for number, row in enumerate(rows, 1) if number in train)
        kept = [value for value, times in counts.items() if times >= threshold]
        assert data.values(f) == kept
        field = data.schema.fields[f]
        local = {value: i for i, value in enumerate(kept)}
        for split in data.splits.values():
            expected = [local.get(rows[number - 1][1 + f], len(kept)) for number in split.rows.tolist()]
            assert (split.ids[:, f] - field.offset).tolist() == expected
    for split in data.splits.values():
        assert split.labels.tolist() == [float(rows[n - 1][0]) for n in split.rows.tolist()]


# Avazu


@pytest.mark.realdata
def test_avazu_real_rows_against_a_plain_reader(real_data, tmp_path):
    raw = pl.read_parquet(real_data / "avazu-9k" / "sample.parquet").rename({"label": "click"})
    path = render(raw.select("id", "click", *AVAZU_FIELDS), tmp_path / "train.csv", ",", header=True)
    data = encode(Avazu(), path, tmp_path / "out", threshold=2, counting="published")
    assert [f.name for f in data.schema.fields] == list(AVAZU_FIELDS)
    assert data.rows_in == raw.height == sum(len(s) for s in data.splits.values())
    for f, name in enumerate(AVAZU_FIELDS):
        counts = Counter(raw[name].cast(pl.String).to_list())
        assert data.values(f) == [v for v, n in counts.items() if n >= 2]
    assert data.test.labels.tolist() == raw["click"].gather(np.array(data.test.rows) - 2).to_list()


def test_avazu_names_a_missing_column(tmp_path):
    with pytest.raises(DataError, match=r"expected a column 'click'"):
        Avazu().scan(write(tmp_path, "id,clicks,hour\n1,0,14\n"))


# KDD Cup 2012


def test_kdd12_label_is_one_click_or_more(tmp_path):
    lines = [f"{clicks}\t" + "\t".join(f"{clicks}{i}" for i in range(11)) for clicks in (0, 1, 5)]
    frame = frames(Kdd12(), write(tmp_path, "\n".join(lines)))
    assert frame["click"].to_list() == [0, 1, 1]
    assert frame.columns == ["click", *KDD12_FIELDS]
    assert frame["user_id"].to_list() == ["010", "110", "510"]


def test_kdd12_refuses_a_click_count_that_is_none(tmp_path):
    rest = "\t1" * 11
    batch = next(Kdd12().scan(write(tmp_path, f"0{rest}\n-1{rest}\nx{rest}\n")).batches)
    assert [b.line for b in batch.bad] == [2, 3]


# libFM


def test_libfm_fields_are_positions(tmp_path):
    path = write(tmp_path, "1 10:1 20:1\n0 11:1.0  21 \n")
    scan = Libfm().scan(path)
    assert scan.columns == (Column("f0", "integer"), Column("f1", "integer"))
    assert frames(Libfm(), path).rows() == [("1", "10", "20"), ("0", "11", "21")]


def test_libfm_minus_one_only_where_asked(tmp_path):
    path = write(tmp_path, "+1 3:1\n-1 4:1\n" * 20)
    assert encode(Libfm(negative="-1"), path, tmp_path / "out").train.labels.sum() > 0
    with pytest.raises(DataError, match=r"log.txt:1: label 'label' must be 0 or 1, but got '\+1'"):
        encode(Libfm(), path, tmp_path / "other")


def test_libfm_refuses_weights(tmp_path):
    batch = next(Libfm().scan(write(tmp_path, "1 3:1\n0 4:0.5\n0 5:1 6:1\n")).batches)
    assert sorted(b.line for b in batch.bad) == [2, 3]


# Adjacency and interactions


def test_adjacency_is_pairs(tmp_path):
    path = write(tmp_path, "0 5 3\n1\n2 4 \n\n3\t1\n")
    scan = Adjacency().scan(path)
    batch = next(scan.batches)
    assert batch.frame.rows() == [(0, 5), (0, 3), (2, 4), (3, 1)]
    assert batch.lines.tolist() == [1, 1, 3, 5]
    assert [b.reason for b in batch.bad] == ["blank line"]


def test_adjacency_refuses_words(tmp_path):
    batch = next(Adjacency().scan(write(tmp_path, "0 5\n1 x 2\n2 -1\n")).batches)
    assert [b.line for b in batch.bad] == [2, 3]


@pytest.mark.realdata
def test_gowalla_counts_of_the_papers(real_data, tmp_path):
    folder = real_data / "gowalla"
    data = encode(Interactions(), folder / "train.parquet", tmp_path / "out", test=folder / "test.parquet")
    assert {n: len(s) for n, s in data.splits.items()} == {"train": 737_091, "valid": 73_037, "test": 217_242}
    assert [f.size for f in data.schema.fields] == [29_858, 40_981]
    held = np.bincount(data.valid.ids[:, 0], minlength=29_858)
    total = held + np.bincount(data.train.ids[:, 0], minlength=29_858)
    assert (held == np.maximum(1, total // 10)).all()


@pytest.mark.realdata
def test_adjacency_and_interactions_agree(real_data, tmp_path):
    pairs = pl.read_parquet(real_data / "lastfm-lightgcn" / "train.parquet")
    lists = pairs.group_by("user", maintain_order=True).agg("item")
    text = "\n".join(f"{u} {' '.join(map(str, items))}" for u, items in lists.rows())
    one = encode(Interactions(), real_data / "lastfm-lightgcn" / "train.parquet", tmp_path / "a")
    two = encode(Adjacency(), write(tmp_path, text), tmp_path / "b")
    for name in one.splits:
        assert (one.splits[name].ids == two.splits[name].ids).all()


def test_interactions_from_csv_with_other_names(tmp_path):
    path = write(tmp_path, "time;uid;iid\n9;0;1\n9;1;0\n9;x;0\n")
    batch = next(Interactions(user="uid", item="iid").scan(path).batches)
    assert batch.frame.rows() == [(0, 1), (1, 0)]
    assert batch.bad[0].line == 4


# Tables


@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
def test_table_separator_is_read_from_the_header(tmp_path, separator):
    path = write(tmp_path, f"a{separator}label\nx{separator}1\n")
    assert frames(Table(), path).rows() == [("x", "1")]


def test_table_bom_crlf_quotes_and_gzip(tmp_path):
    text = '\ufeffa,label,b\r\n"x, y",1,"say ""hi"""\r\nplain,0,\r\n'
    expected = [("x, y", 'say "hi"', "1"), ("plain", "", "0")]
    assert frames(Table(), write(tmp_path, text)).rows() == expected
    packed = tmp_path / "log.csv.gz"
    packed.write_bytes(gzip.compress(text.encode()))
    assert frames(Table(), packed).rows() == expected


def test_table_csv_and_parquet_give_the_same_bytes(tmp_path):
    frame = pl.DataFrame({
        "label": [i % 2 for i in range(200)], "id": list(range(200)), "c": [f"v{i % 7}" for i in range(200)]
    })  # fmt: skip
    frame.write_csv(tmp_path / "a.csv")
    frame.write_parquet(tmp_path / "a.parquet")
    one = encode(Table(), tmp_path / "a.csv", tmp_path / "one")
    two = encode(Table(), tmp_path / "a.parquet", tmp_path / "two")
    assert (one.train.ids == two.train.ids).all()
    assert one.schema == two.schema


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        (["1", "2", ""], "integer"), (["1.5", "2", ""], "number"), (["007", "1"], "category"),
        (["1.0", "2.0"], "category"),
        (["a", "1"], "category"), (["", ""], "category"), (["nan", "1.5"], "category"), (["1e400", "1.5"], "category"),
        (["-3", "4"], "integer"), (["99999999999999999999", "1"], "category"),
    ],
)  # fmt: skip
def test_table_guesses(cells, kind):
    assert guess(pl.Series(cells)) == kind


def test_table_numbers_are_rounded_to_significant_digits(tmp_path):
    path = write(tmp_path, "x,label\n0.12345,0\n-98765.4,1\n,1\n0.0,0\n-0.0,1\n12,1\n")
    assert frames(Table(), path)["x"].to_list() == ["0.12", "-99000.0", "", "0.0", "0.0", "12.0"]
    assert frames(Table(digits=1), path)["x"].to_list()[0] == "0.1"
    assert frames(Table(category=("x",)), path)["x"].to_list()[0] == "0.12345"


def test_table_integers_are_dense_where_the_range_is_occupied(tmp_path):
    rows = "".join(f"{i % 50 + 3},{(i % 50) ** 4},{i % 2}\n" for i in range(500))
    path = write(tmp_path, f"near,far,label\n{rows}")
    near, far = encode(Table(), path, tmp_path / "a").schema.fields
    assert (near.keys, near.first, near.size) == ("dense", 3, 51)
    assert (far.keys, far.size) == ("hashed", 51)
    forced = encode(Table(category=("near",), dense=("far",)), path, tmp_path / "b").schema.fields
    assert [f.keys for f in forced] == ["hashed", "dense"]
    assert forced[1].size == 49**4 + 2


def test_table_kinds_of_the_training_file_hold_for_the_test_file(tmp_path):
    train = write(tmp_path, "x,label\n" + "1.26,0\n2.51,1\n" * 10, "train.csv")
    test = write(tmp_path, "label,extra,x\n0,9,1.3\n1,9,2\n", "test.csv")
    data = encode(Table(), train, tmp_path / "out", test=test)
    assert data.values(0) == ["1.3", "2.5"]
    assert data.test.ids.tolist() == [[0], [2]]


def test_table_dropped_columns_are_no_features(tmp_path):
    path = write(tmp_path, "a,b,label\nx,y,1\n")
    assert [c.name for c in Table(drop=("a",)).scan(path).columns] == ["b"]
    with pytest.raises(ConfigError, match="at least one feature"):
        Table(drop=("a", "b")).scan(path)


def test_table_refuses_two_kinds_for_a_column():
    with pytest.raises(ConfigError, match=r"'a' is named 2 times"):
        Table(category=("a",), number=("a",))


@pytest.mark.realdata
def test_movielens_one_million(real_data, tmp_path):
    path = real_data / "ml-1m-ctr" / "ratings.parquet"
    data = encode(Table(drop=("rating",)), path, tmp_path / "out")
    sizes = {f.name: (f.size, f.keys) for f in data.schema.fields}
    assert data.rows_in == 1_000_209
    assert sizes["user_id"] == (6041, "dense")
    assert sizes["item_id"][1] == "dense"
    assert sizes["gender"] == (3, "hashed")
    assert sizes["zip"][1] == "hashed"
    raw = pl.read_parquet(path)
    assert data.test.labels.tolist() == raw["label"].gather(np.array(data.test.rows) - 1).to_list()
    zips = np.array([*data.values(5), "?"])[data.test.ids[:, 5] - data.schema.fields[5].offset]
    same = zips == raw["zip"].gather(np.array(data.test.rows) - 1).to_numpy()
    assert (same | (zips == "?")).all()


# Synthetic


def test_zipf_has_the_stated_law():
    n, s, draws = 20, 1.3, 400_000
    values = zipf(np.random.default_rng(0).random(draws), n, s)
    edges = np.arange(1, n + 2) ** (1 - s)
    expected = (edges[:-1] - edges[1:]) / (edges[0] - edges[-1])
    counts = np.bincount(values, minlength=n)
    assert len(counts) == n
    chi2 = ((counts - draws * expected) ** 2 / (draws * expected)).sum()
    assert chi2 < 50  # 19 degrees of freedom: p < 1.3e-4 beyond


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
def test_zipf_stays_in_range(exponent):
    uniform = np.array([0.0, 0.5, 1 - 2**-53])
    assert zipf(uniform, 50_000_000, exponent).max() < 50_000_000
    assert zipf(uniform, 1, exponent).tolist() == [0, 0, 0]


def test_synthetic_teacher_by_the_formula():
    source = Synthetic(cardinalities=(7, 5, 3), rank=2, interaction=0.3, signal=2.0)
    values = np.array([[0, 1, 2], [6, 4, 0]])
    w = np.stack([source._draw(f, values[:, f], 0) for f in range(3)], axis=1)
    u = np.stack([[source._draw(f, values[:, f], k) for f in range(3)] for k in (1, 2)])
    pairs = sum((u[:, f] * u[:, g]).sum(0) for f in range(3) for g in range(f + 1, 3))
    total = math.sqrt(0.7 / 3) * w.sum(1) + math.sqrt(2 * 0.3 / (2 * 3 * 2)) * pairs
    assert np.allclose(source.teacher(values), source._bias() + 2.0 * total, atol=1e-12)


def test_synthetic_effects_are_standardised_and_rare_values_matter_as_much():
    source = Synthetic(cardinalities=(10**7, 10**7, 10**7, 10**7))
    values = np.arange(9_900_000, 10_000_000)[:, None].repeat(4, axis=1)
    logits = source.teacher(values)
    assert abs(logits.std() - source.signal) < 0.02
    draws = source._draw(0, values[:, 0], 0)
    assert abs(draws.mean()) < 0.02
    assert abs(draws.std() - 1) < 0.02


def test_synthetic_labels_follow_the_teacher(tmp_path):
    data = encode(Synthetic(rows=100_000, cardinalities=(1000, 100, 50)), None, tmp_path / "out")
    logits, labels = np.array(data.train.teacher), np.array(data.train.labels)
    for low, high in ((-9, -1), (-1, 0), (0, 1), (1, 9)):
        bin_ = (logits >= low) & (logits < high)
        expected = 1 / (1 + np.exp(-logits[bin_]))
        error = (labels[bin_] - expected).sum() / math.sqrt((expected * (1 - expected)).sum())
        assert abs(error) < 4
    assert roc_auc_score(labels, logits) > 0.75


def test_synthetic_batches_depend_on_the_seed_alone():
    one, two, other = (next(Synthetic(rows=500, generator_seed=s).scan().batches).frame for s in (1, 1, 2))
    assert one.equals(two)
    assert not one.equals(other)


def test_synthetic_hashed_and_dense_are_the_same_log(tmp_path):
    dense = encode(Synthetic(rows=2000, cardinalities=(30, 9)), None, tmp_path / "dense")
    hashed = encode(Synthetic(rows=2000, cardinalities=(30, 9), hashed=True), None, tmp_path / "hashed")
    assert [f.keys for f in hashed.schema.fields] == ["hashed", "hashed"]
    assert [f.size for f in dense.schema.fields] == [31, 10]
    assert (dense.train.labels == hashed.train.labels).all()
    names = np.array(hashed.values(0))
    assert (names[hashed.train.ids[:, 0]].astype(int) == dense.train.ids[:, 0]).all()


@pytest.mark.parametrize(
    "wrong", [{"rows": 0}, {"cardinalities": ()}, {"interaction": 1.5}, {"positives": 0.0}, {"exponent": -1.0}]
)
def test_synthetic_refuses_settings_out_of_range(wrong):
    with pytest.raises(ConfigError):
        Synthetic(**wrong)
