"""What is exported is what is measured: files against the models they were made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import polars as pl
import pytest
import torch

from pocketrec import sources
from pocketrec.backbones import DeepFM
from pocketrec.compression.measure import CALLS, interactions, measure
from pocketrec.data.encode import encode
from pocketrec.errors import ArtifactError, ConfigError, DataError, UnsupportedOp
from pocketrec.evaluation.beyond_accuracy import beyond
from pocketrec.evaluation.metrics import auc, logloss, ranking
from pocketrec.format.artifact import Contents
from pocketrec.format.program import Op, Program
from pocketrec.format.vocabulary import Vocabulary
from pocketrec.models.backbone import Backbone, RankingModel
from pocketrec.models.pruned import PrunedTable
from pocketrec.models.table import Block, DenseTable
from pocketrec.training.run import Run


@dataclass(frozen=True)
class Scaled(Backbone):
    """A ranking model whose propagation multiplies by a factor."""

    name: ClassVar[str] = "scaled"
    task: ClassVar[str] = "cf"
    factor: float = 2.0

    def blocks(self, schema):
        return tuple(Block(f.name, f.offset, f.stop, 0, 4) for f in schema.fields)

    def build(self, data, seed):
        weight = torch.empty(data.schema.rows, 4).normal_(generator=torch.Generator().manual_seed(seed))
        return ScaledModel(self, DenseTable(data.schema, self.blocks(data.schema), weight))


class ScaledModel(RankingModel):
    def __init__(self, backbone, table):
        super().__init__()
        self.backbone, self.table, self.schema = backbone, table, table.schema

    def batches(self, data, batch_size, seed, epoch, *, shuffle=True):
        raise UnsupportedOp("This model is not trained.")

    def loss(self, batch, noise):
        raise UnsupportedOp("This model is not trained.")

    def propagate(self, weight):
        return weight * self.backbone.factor

    def scores(self, users, items):
        return users @ items.T

    def lower(self):
        return Program((Op("dot", ("vectors",), "score"),))


@pytest.fixture(scope="module")
def shop_clicks(tmp_path_factory):
    """Two string fields and a dense one; some test values are unseen in training."""
    folder = tmp_path_factory.mktemp("clicks")
    rng = np.random.default_rng(0)
    n = 6000
    frame = pl.DataFrame(
        {
            "label": rng.integers(0, 2, n),
            "shop": [f"s{v}" for v in rng.zipf(1.5, n) % 400],
            "site": [f"p{v}" for v in rng.integers(0, 30, n)],
            "hour": rng.integers(0, 24, n),
        }
    )
    frame.write_parquet(folder / "log.parquet")
    return encode(sources.Table(dense=("hour",)), folder / "log.parquet", folder / "data")


@pytest.fixture(scope="module")
def drawn_pairs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("visits")
    rng = np.random.default_rng(1)
    pairs = np.unique(rng.integers(0, (60, 90), (3000, 2)), axis=0)
    pl.DataFrame({"user": pairs[:, 0], "item": pairs[:, 1]}).write_parquet(folder / "pairs.parquet")
    return encode(sources.Interactions(), folder / "pairs.parquet", folder / "data", users=60, items=90)


@pytest.fixture(scope="module")
def shop_model(shop_clicks):
    built = DeepFM(dim=8, hidden=(16,)).build(shop_clicks, 0)
    built.table.matrix.data.normal_(generator=torch.Generator().manual_seed(3))
    return built


def pruned(model, data, share):
    rng = np.random.default_rng(2)
    table = model.table
    keep = torch.from_numpy(rng.random(tuple(table.matrix.shape)) < share)
    keep[rng.random(data.schema.rows) < 0.5] = False
    fill = torch.from_numpy(rng.normal(size=(data.schema.width, table.width)).astype(np.float32))
    return model.with_table(PrunedTable(data.schema, table.blocks, table.matrix.data, keep, fill, fill * 0.5))


def write(model, data, path, kind="ctr", storage="fp32", info=None):
    stored = model.table.stored().numpy()
    vocabulary, rows = Vocabulary.build(data.schema, stored, data.hashes)
    packed = model.table.pack(storage, rows)
    Contents(kind, data.schema, vocabulary, packed, model.lower(), info or {}).write(path)
    return path


@pytest.mark.parametrize("share", [1.0, 0.6, 0.05])
def test_a_file_measures_as_its_model(shop_clicks, shop_model, tmp_path, share):
    small = pruned(shop_model, shop_clicks, share)
    path = write(small, shop_clicks, tmp_path / "m.safetensors")
    from_file = measure(path, shop_clicks.test, latency=False, predictions=True)
    from_model = measure(small, shop_clicks.test, latency=False, predictions=True)
    np.testing.assert_allclose(from_file.logits, from_model.logits, rtol=2e-5, atol=2e-5)
    assert from_file.quality["auc"] == pytest.approx(from_model.quality["auc"], abs=1e-6)


def test_figures_are_the_metrics_of_the_logits(shop_clicks, shop_model):
    result = measure(shop_model, shop_clicks.valid, latency=False, predictions=True)
    labels = shop_clicks.valid.labels
    assert result.quality == {"auc": auc(labels, result.logits), "logloss": logloss(labels, result.logits)}
    assert measure(shop_model, shop_clicks.valid, latency=False).logits is None


def test_bytes_of_a_file_sum_to_its_size(shop_clicks, shop_model, tmp_path):
    path = write(shop_model, shop_clicks, tmp_path / "m.safetensors")
    sizes = measure(path, shop_clicks.test, latency=False).bytes
    assert sizes["file"] == path.stat().st_size
    assert sizes["file"] == sum(sizes[part] for part in ("table", "vocabulary", "head", "header"))
    dense = measure(shop_model, shop_clicks.test, latency=False).bytes
    assert dense["table"] == shop_clicks.schema.rows * 9 * 4
    assert dense["file"] == sum(dense[part] for part in ("table", "vocabulary", "head", "header"))


def test_a_file_resolves_ids_of_another_encoding_by_value(shop_clicks, shop_model, tmp_path):
    """The same log encoded in another order of ids measures the same, through the file's vocabulary."""
    path = write(shop_model, shop_clicks, tmp_path / "m.safetensors")
    raw = shop_clicks.path.parent / "log.parquet"
    other = encode(sources.Table(dense=("hour",)), raw, tmp_path / "data", order="count")
    assert (other.test.ids != shop_clicks.test.ids).any()
    expected = measure(path, shop_clicks.test, latency=False, predictions=True)
    assert (measure(path, other.test, latency=False, predictions=True).logits == expected.logits).all()


def test_latency_states_its_calls(shop_clicks, shop_model, tmp_path):
    path = write(shop_model, shop_clicks, tmp_path / "m.safetensors")
    timed = measure(path, shop_clicks.valid).latency_us
    assert set(timed) == {"batch_1", "batch_64"}
    for figures in timed.values():
        assert figures["calls"] == CALLS >= 1000
        assert 0 < figures["p50"] <= figures["p99"]
        assert figures["threads"] == 1


def test_only_reads_of_a_test_split_are_noted(shop_clicks, shop_model, tmp_path):
    run = Run(None)
    path = write(shop_model, shop_clicks, tmp_path / "m.safetensors")
    for split in (shop_clicks.valid, shop_clicks.test, shop_clicks.test):
        result = measure(path, split, latency=False, ledger=run.ledger)
    assert [r["split"] for r in run.reads()] == ["test", "test"]
    assert run.reads()[0] == {
        "reader": "measure",
        "digest": result.digest,
        "data": shop_clicks.digest,
        "split": "test",
        "rows": len(shop_clicks.test),
    }


def test_to_json_is_the_documented_document(shop_clicks, shop_model):
    document = measure(shop_model, shop_clicks.test, latency=False, predictions=True).to_json()
    assert set(document) == {"quality", "bytes", "latency_us"}
    assert set(document["bytes"]) == {"file", "table", "vocabulary", "head", "header"}


def test_model_digests_follow_the_weights(shop_clicks, shop_model):
    digest = measure(shop_model, shop_clicks.test, latency=False).digest
    assert digest == measure(shop_model, shop_clicks.test, latency=False).digest
    assert digest != measure(pruned(shop_model, shop_clicks, 0.5), shop_clicks.test, latency=False).digest


def test_a_ranking_model_is_ranked_by_its_final_vectors(drawn_pairs):
    model = Scaled().build(drawn_pairs, 0)
    result = measure(model, drawn_pairs.test, k=10)
    final = model.table.matrix.detach().numpy() * 2
    expected = ranking(final[:60], final[60:], interactions(drawn_pairs.train), interactions(drawn_pairs.test), 10)
    assert result.quality == expected.quality()
    assert (result.ranking.ndcg == expected.ndcg).all()
    assert set(result.latency_us) == {"batch_1"}
    seen, truth = interactions(drawn_pairs.train), interactions(drawn_pairs.test)
    assert result.beyond == beyond(expected.lists, seen, truth, len(final) - 60)
    assert result.to_json()["beyond"] == result.beyond


def test_validation_items_are_left_out_only_on_request(drawn_pairs):
    model = Scaled().build(drawn_pairs, 0)
    final = model.table.matrix.detach().numpy()
    both = ranking(
        final[:60], final[60:], interactions(drawn_pairs.train, drawn_pairs.valid), interactions(drawn_pairs.test), 20
    ).quality()
    published = measure(model, drawn_pairs.test, latency=False).quality
    assert measure(model, drawn_pairs.test, latency=False, mask_valid=True).quality == both
    assert published["ndcg@20"] < both["ndcg@20"]


def test_a_baked_file_measures_as_its_model(drawn_pairs, tmp_path):
    model = Scaled(factor=1.0).build(drawn_pairs, 0)
    path = write(model, drawn_pairs, tmp_path / "baked.safetensors", kind="baked")
    assert (
        measure(path, drawn_pairs.test, latency=False).quality
        == measure(model, drawn_pairs.test, latency=False).quality
    )
    assert "graph" not in measure(path, drawn_pairs.test, latency=False).bytes


def test_an_ego_file_is_propagated_by_its_backbone(drawn_pairs, tmp_path, monkeypatch):
    monkeypatch.setattr("pocketrec.registry.load", lambda axis, name: {"scaled": Scaled}[name])
    model = Scaled(factor=3.0).build(drawn_pairs, 0)
    info = {"backbone": {"name": "scaled", "config": {"factor": 3.0}}}
    path = write(model, drawn_pairs, tmp_path / "ego.safetensors", kind="ego", info=info)
    result = measure(path, drawn_pairs.test, latency=False)
    assert result.quality == measure(model, drawn_pairs.test, latency=False).quality
    assert result.bytes["graph"] >= 8 * len(drawn_pairs.train)
    nameless = write(model, drawn_pairs, tmp_path / "nameless.safetensors", kind="ego")
    with pytest.raises(ArtifactError, match="backbone"):
        measure(nameless, drawn_pairs.test)


def test_what_does_not_fit_is_refused(shop_clicks, drawn_pairs, shop_model, tmp_path):
    path = write(shop_model, shop_clicks, tmp_path / "m.safetensors")
    with pytest.raises(DataError, match="its own data"):
        measure(path, drawn_pairs.test)
    with pytest.raises(ConfigError, match="k=0"):
        measure(path, shop_clicks.test, k=0)
    with pytest.raises(UnsupportedOp):
        measure(Scaled().build(drawn_pairs, 0), shop_clicks.test)
    with pytest.raises(UnsupportedOp):
        measure(shop_model, drawn_pairs.test)
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ArtifactError, match="damaged"):
        measure(path, shop_clicks.test)
