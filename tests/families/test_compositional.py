"""What QR, TT-Rec and DHE have in common: counts, tilings, budgets, training, and files that read as tables do."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from compositional_cases import METHODS, NAMES, TRAINING, place
from hypothesis import given, settings
from hypothesis import strategies as st

import pocketrec as pr
from pocketrec import registry
from pocketrec.compression.budget import Room
from pocketrec.compression.compress import compress
from pocketrec.errors import BudgetError, ConfigError
from pocketrec.families.compositional.hash_network import NetworkPlan
from pocketrec.families.compositional.ladder import ComposedLadder
from pocketrec.families.compositional.region import regions, slots_of
from pocketrec.families.compositional.table import ComposedTable
from pocketrec.families.compositional.tensor_train import TrainPlan, train_values
from pocketrec.format import vocabulary
from pocketrec.format.artifact import Artifact
from pocketrec.format.layouts.tensor_train import row_factors, width_factors
from pocketrec.methods.cerp import CERP
from pocketrec.methods.dhe import DHE
from pocketrec.methods.ptq import PTQ
from pocketrec.methods.qr import QR, QRPlan
from pocketrec.methods.tt_rec import TTRec
from pocketrec.models.backbone import noise
from pocketrec.models.table import Block, DenseTable, oov_rows
from pocketrec.schema import Field, Schema
from pocketrec.training.run import Run


@pytest.mark.parametrize(
    ("plan", "width"),
    [
        (QRPlan(101, 6, 7), 6),
        (QRPlan(101, 6, 7, "concat"), 6),
        (TrainPlan(29, (3, 2, 5), (2, 1, 3), (4, 5), cached=np.array([3, 8])), 6),
        (NetworkPlan(20, (8, 5, 4, 6), 100, "uniform", "before", "bn_mish", 1), 6),
        (NetworkPlan(20, (8, 5, 4, 6), 100, "uniform", "none", "linear", 1), 6),
    ],
)
def test_a_plan_counts_the_parameters_that_it_builds(plan, width):
    part = plan.build(noise(0, "test"))
    assert plan.values == part.values() == sum(p.numel() for p in part.parameters())
    for storage in ("fp32", "fp16", "int8"):
        assert part.pack(place(part.rows, width), storage, None).size_bytes == plan.size_bytes(storage)


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_files_score_as_the_trained_model_does(method, wide_model, wide_clicks, tmp_path):
    small = compress(wide_model, wide_clicks, method, "sparsity=0.6", training=TRAINING)
    assert isinstance(small.table, ComposedTable)
    assert small.table.values() <= wide_model.table.values() - int(0.6 * wide_model.table.values())
    small.save(tmp_path / "file")
    recommender = pr.open(tmp_path / "file")
    rows = recommender.artifact.vocabulary.file_rows(wide_clicks.hashes)[wide_clicks.valid.ids[:200]]
    expected = small.model(torch.from_numpy(wide_clicks.valid.ids[:200].copy())).detach().numpy()
    np.testing.assert_allclose(recommender.logits(rows), expected, atol=1e-5)
    unknown = np.full((1, wide_clicks.schema.width), -1)
    known = torch.tensor([[f.oov_row for f in wide_clicks.schema.fields]])
    np.testing.assert_allclose(recommender.logits(unknown), small.model(known).detach().numpy(), atol=1e-5)


@pytest.mark.delicate
@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_training_changes_the_table_and_lowers_the_loss(method, wide_model, wide_clicks):
    run = Run(None, training=TRAINING)
    ladder = method.prepare(wide_model, wide_clicks, run)
    room = Room(values=wide_model.table.values() // 2)
    draft = ladder.table(room)
    final = ladder.finish(wide_model.with_table(draft), room)
    assert not torch.equal(draft.weight(), final.table.weight())
    curve = [record["loss"] for record in run.logged() if record.get("stage") == method.name and "loss" in record]
    assert curve[-1] < curve[0]


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_sizes_are_known_before_training(method, wide_model, wide_clicks):
    ladder = method.prepare(wide_model, wide_clicks, Run(None))
    for storage in ("fp32", "fp16", "int8"):
        with pytest.raises(BudgetError) as caught:
            ladder.table(Room(size_bytes=10, storage=storage))
        for size in (caught.value.least_bytes, 2 * caught.value.least_bytes):
            table = ladder.table(Room(size_bytes=size, storage=storage))
            stored = np.flatnonzero(table.stored().numpy())
            rows = vocabulary.Vocabulary.build(wide_clicks.schema, table.stored().numpy(), wide_clicks.hashes)[1]
            assert table.pack(storage, rows).size_bytes <= size
            assert len(stored) == len(rows)
    with pytest.raises(BudgetError) as caught:
        ladder.table(Room(values=1))
    least = caught.value.least_values
    assert 1 < ladder.table(Room(values=least)).values() <= least
    with pytest.raises(BudgetError):
        ladder.table(Room(values=least - 1))


def test_slots_are_places_in_the_file_and_unknown_rows_come_last(wide_clicks):
    region = regions(pr.backbones.DeepFM(dim=8).blocks(wide_clicks.schema), "block")[0]
    slots = slots_of(region, wide_clicks, "file")
    assert sorted(slots.tolist()) == list(range(wide_clicks.schema.rows))
    unknown = oov_rows(wide_clicks.schema).numpy()
    named = vocabulary.Vocabulary.build(wide_clicks.schema, ~unknown, wide_clicks.hashes)[1]
    np.testing.assert_array_equal(slots[named], np.arange(len(named)))
    assert slots[unknown].min() == len(named)


def test_places_in_the_file_are_sorted_once(wide_model, wide_clicks, monkeypatch):
    data, sorts = pr.Dataset.open(wide_clicks.path), []
    monkeypatch.setattr(vocabulary, "_ordered", lambda *call, own=vocabulary._ordered: sorts.append(1) or own(*call))
    for method in (pr.methods.DHE(functions=8, order="file"), pr.methods.TTRec(order="file")):
        method.prepare(wide_model, data, Run(None)).table(Room(size_bytes=4 * wide_model.table.values()))
    assert len(sorts) == 1


@pytest.mark.parametrize("scope", ["block", "joint"])
@pytest.mark.parametrize("name", ["qr", "dhe", "tt_rec"])
def test_any_tiling_of_blocks_will_do(name, scope, wide_clicks, wide_model):
    """Two row ranges times two column ranges, as in NeuMF."""
    n = wide_clicks.schema.rows
    cut = wide_clicks.schema.fields[0].stop
    blocks = tuple(
        Block(f"{rows}{columns}", a, b, left, right)
        for rows, a, b in (("u", 0, cut), ("i", cut, n))
        for columns, left, right in (("gmf", 0, 4), ("mlp", 4, 10))
    )
    dense = DenseTable(wide_clicks.schema, blocks, torch.zeros(n, 10))
    method = registry.load("methods", name)(scope=scope)
    ladder = method.prepare(wide_model, wide_clicks, Run(None))
    ladder = replace(ladder, start=wide_model.with_table(dense))
    table = ladder.table(Room(values=n * 5))
    assert len(table.regions) == (4 if scope == "block" else 2)
    assert table.values() <= n * 5
    weight = table.weight()
    assert weight.shape == (n, 10)
    assert (weight.abs().sum(dim=1) > 0).all()
    ids = torch.tensor([[0, cut], [n - 1, cut - 1]])
    torch.testing.assert_close(table(ids), weight[ids])
    rows = vocabulary.Vocabulary.build(wide_clicks.schema, table.stored().numpy(), wide_clicks.hashes)[1]
    packed = table.pack("fp32", rows)
    fields = wide_clicks.schema.field_of_row[rows]
    for f in range(wide_clicks.schema.width):
        mine = np.flatnonzero(fields == f)
        found = packed.lookup(mine[:, None], np.array([f], np.int32))[:, 0]
        np.testing.assert_allclose(found, weight.detach().numpy()[rows[mine]], atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_budget_of_every_tiling_is_kept_and_unreachable_ones_name_the_least(data):
    users, items, half = (data.draw(st.integers(2, most)) for most in (60, 60, 4))
    fields = (Field("user", users, 0, "dense", oov=False), Field("item", items, users, "dense", oov=False))
    schema, ranges = Schema("cf", fields), data.draw(st.sampled_from([((0, 1),), ((0, 1), (1, 3))]))
    blocks = tuple(
        Block(f"{f.name}{left}", f.offset, f.stop, 2 * half * left, 2 * half * right)
        for f in fields
        for left, right in ranges
    )
    dense = DenseTable(schema, blocks, torch.zeros(users + items, 2 * half * ranges[-1][1]))
    method = data.draw(
        st.sampled_from(
            [QR(), QR(operation="concat", large="quotient"), TTRec(), TTRec(cores=2, cache_share=0), CERP(),
             DHE(depth=1, functions=4), DHE(depth=2, functions=8, last_layer="bn_mish"), QR(divisor=3),
             TTRec(ranks=(2, 3)), DHE(hidden=(3, 2), functions=4), CERP(bucket=7)]
        )
    )  # fmt: skip

    def plan(region, values):
        return method.plan(region, values, np.arange(region.rows))

    start, scope = SimpleNamespace(schema=schema, table=dense), data.draw(st.sampled_from(["block", "joint"]))
    ladder = ComposedLadder(
        name=method.name, start=start, data=SimpleNamespace(), run=Run(None), scope=scope, order="id",
        plan=plan, least=method.least, train=lambda m: m,
    )  # fmt: skip
    values = data.draw(st.integers(0, dense.values()))
    with pytest.raises(BudgetError) as caught:
        ladder.table(Room(values=-1))
    fewest = caught.value.least_values
    with pytest.raises(BudgetError):
        ladder.table(Room(values=fewest - 1))
    values = max(values, fewest)
    table = ladder.table(Room(values=values))
    assert table.values() <= values
    for region, part in zip(table.regions, table.compositions, strict=True):
        assert part.values() <= -(-values * region.values // dense.values())
        if not isinstance(method, CERP):
            assert part.values() == sum(p.numel() for p in part.parameters())
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, schema.rows, (3, 2, 4)))
    torch.testing.assert_close(table(ids), table.weight()[ids])


def test_a_fixed_configuration_has_one_size(wide_clicks, wide_model):
    rows, width = wide_clicks.schema.rows, 8
    network = 16 * 7 + 7 * 5 + 5 * width + 3 * (7 + 5) + width
    train = train_values(row_factors(rows, 3), width_factors(width, 3), (4, 3))
    for method, size in (
        (QR(divisor=2), (2 + -(-rows // 2)) * width),
        (QR(divisor=rows + 5), (rows + 1) * width),
        (TTRec(ranks=(4, 3), cache_share=0), train),
        (DHE(hidden=(7, 5), functions=16), network),
    ):
        ladder = method.prepare(wide_model, wide_clicks, Run(None))
        with pytest.raises(BudgetError) as caught:
            ladder.table(Room(values=size - 1))
        assert caught.value.least_values == size
        for values in (size, size + 1, 2 * size):
            assert ladder.table(Room(values=values)).values() == size
        with pytest.raises(BudgetError) as caught:
            ladder.table(Room(size_bytes=10))
        assert ladder.table(Room(size_bytes=caught.value.least_bytes)).values() == size
    ladder = TTRec(ranks=(4, 3)).prepare(wide_model, wide_clicks, Run(None))
    for values in (train, train + width - 1, train + 5 * width):
        assert ladder.table(Room(values=values)).values() == train + (values - train) // width * width


@pytest.mark.parametrize(
    ("method", "bad"),
    [
        (QR, {"divisor": 0}),
        (TTRec, {"ranks": (4,)}),
        (TTRec, {"ranks": (4, 0)}),
        (TTRec, {"ranks": (4, 4), "cores": 2}),
        (DHE, {"hidden": (8, 0)}),
        (DHE, {"hot": -1}),
        (TTRec, {"cache_by": "luck"}),
        (PTQ, {"zero": "none"}),
    ],
)
def test_fixed_configurations_out_of_range_are_named(method, bad):
    with pytest.raises(ConfigError, match=f"`{next(iter(bad))}` must"):
        method(**bad)


def test_a_file_of_each_layout_is_read_without_torch(wide_clicks, wide_model, tmp_path):
    paths = []
    for i, method in enumerate([*METHODS[::2], PTQ(bits=4)]):
        paths.append(tmp_path / f"{i}.safetensors")
        compress(wide_model, wide_clicks, method, "70%", training=TRAINING).save(paths[-1])
        Artifact(paths[-1]).verify()
    code = (
        "import sys\nfrom pocketrec import runtime\n"
        "for path in sys.argv[1:]:\n"
        "    model = runtime.open(path)\n"
        "    print(model.score({f.name: None for f in model.schema.fields}))\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *map(str, paths)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.split()) == len(paths)
