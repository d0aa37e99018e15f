"""PEP: the soft threshold, the schedule that drives it, exact selection, and retraining from the first values."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interruptions import Cut
from table_cases import CLICK_BLOCKS, FOUR, PAIRS, SCHEMA
from torch.nn import functional as F

import pocketrec as pr
from pocketrec.backbones.deepfm import DeepFM
from pocketrec.backbones.lightgcn import LightGCN
from pocketrec.compression.budget import Room
from pocketrec.compression.compress import compress
from pocketrec.errors import BudgetError, ConfigError, UnsupportedOp
from pocketrec.families.pruning import carry_uncounted, rank_keys
from pocketrec.families.retraining import MaskedTable, Retrain, initial_model
from pocketrec.families.thresholds import SoftTable, ThresholdSearch
from pocketrec.methods.pep import PEP
from pocketrec.models.backbone import noise
from pocketrec.models.pruned import PrunedTable
from pocketrec.models.table import Block, DenseTable
from pocketrec.schema import Field, Schema
from pocketrec.training.hooks import LearningTable, Rule
from pocketrec.training.loop import Training
from pocketrec.training.optim import DenseAdam
from pocketrec.training.run import Run

SHAPES = {
    "joint": (1, 1),
    "column": (1, 5),
    "row": (20, 1),
    "field": (3, 1),
    "cell": (20, 5),
    "field_column": (3, 5),
}
TRAINING = Training(epochs=4, batch_size=64, learning_rate=1e-2)


def dense(schema=SCHEMA, blocks=CLICK_BLOCKS, seed: int = 0) -> DenseTable:
    width = max(b.right for b in blocks)
    return DenseTable(schema, blocks, torch.randn(schema.rows, width, generator=torch.Generator().manual_seed(seed)))


def soft(granularity="cell", first: float = -2.0, every: int = 1, table: DenseTable | None = None) -> SoftTable:
    return SoftTable(table or dense(), granularity, first, Rule(1e-2, 1e-5), every, 0.0)


@settings(deadline=None)
@given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=20), st.floats(-8, 0, width=32), st.integers(0, 2**31))
def test_the_threshold_shrinks_oddly_without_stretching_any_distance(values, s, seed):
    schema = Schema("ctr", (Field("a", len(values), 0),))
    blocks = (Block("embedding", 0, len(values), 0, 1),)
    column = torch.tensor(values)[:, None]

    def read(weight: torch.Tensor) -> torch.Tensor:
        return soft("joint", s, table=DenseTable(schema, blocks, weight.clone())).weight().detach()

    shrunk, threshold = read(column), torch.tensor(s).sigmoid()
    torch.testing.assert_close(shrunk.abs(), (column.abs() - threshold).clamp_min(0))
    assert torch.equal(read(-column), -shrunk)
    other = column + torch.randn(column.shape, generator=torch.Generator().manual_seed(seed))
    assert bool(((read(other) - shrunk).abs() <= (other - column).abs() + 1e-6).all())


def test_a_threshold_of_nothing_is_the_identity():
    table = dense()
    assert torch.equal(soft(first=-200.0, table=table).weight(), table.weight())


@pytest.mark.parametrize("granularity", SHAPES)
def test_gradients_are_the_closed_form_and_zero_where_pruned(granularity):
    table = soft(granularity, first=-0.5)
    with torch.no_grad():
        table.threshold += 0.3 * torch.randn(table.threshold.shape, generator=torch.Generator().manual_seed(1))
    assert tuple(table.threshold.shape) == SHAPES[granularity]
    ids = torch.tensor([[0, 13, 17], [3, 12, 19], [0, 16, 18]])
    upstream = torch.randn(3, 3, 5, generator=torch.Generator().manual_seed(2))
    (table(ids) * upstream).sum().backward()
    total = torch.zeros(20, 5).index_add_(0, ids.flatten(), upstream.flatten(0, 1))
    s = table._threshold(slice(None)).detach().expand(20, 5)
    base = table.base.detach()
    kept = base.abs() > s.sigmoid()
    kept[:, 4] = True
    torch.testing.assert_close(table.base.grad, torch.where(kept, total, 0))
    slope = -base.sign() * s.sigmoid() * (1 - s.sigmoid()) * torch.where(kept, total, 0)
    slope[:, 4] = 0
    fields = torch.from_numpy(SCHEMA.field_of_row).long()
    by_row = {"joint": torch.zeros(20).long(), "column": torch.zeros(20).long(), "field": fields}
    rows = by_row.get(granularity.removesuffix("_column"), torch.arange(20))
    summed = torch.zeros(SHAPES[granularity][0], 5).index_add_(0, rows, slope)
    if SHAPES[granularity][1] == 1:
        summed = summed.sum(dim=1, keepdim=True)
    torch.testing.assert_close(table.threshold.grad, summed)


@pytest.mark.parametrize("granularity", SHAPES)
@pytest.mark.parametrize("blocks", [FOUR, FOUR[::-1]])
def test_looking_up_is_the_weight_in_any_tiling(granularity, blocks):
    table = soft(granularity, first=-1.0, table=dense(PAIRS, blocks))
    ids = torch.tensor([[0, 6], [5, 14], [3, 9]])
    assert torch.equal(table(ids), table.weight()[ids])
    above = (table.margins() > 0) & table.cells[table.fields]
    assert int(above.sum()) == int((table.weight()[table.cells[table.fields]] != 0).sum())


@pytest.mark.delicate
@settings(deadline=None, max_examples=15)
@given(st.floats(-9, -3), st.floats(0.01, 0.2), st.floats(0.005, 0.05))
def test_weight_decay_alone_lifts_the_threshold_by_a_rate_a_step(first, reach, rate):
    blocks, schema = (Block("embedding", 0, 4, 0, 2),), Schema("ctr", (Field("a", 4, 0),))
    table = SoftTable(DenseTable(schema, blocks, torch.ones(4, 2)), "cell", first, Rule(rate, 1e-3), 1, 0.0)
    head = torch.nn.Module()
    head.table = table
    optimizer = DenseAdam(head, 1e-3, 0.0)
    predicted = (math.log(reach / (1 - reach)) - first) / rate
    before = table.threshold.detach().clone()
    for _ in range(max(1, round(predicted))):
        (table.threshold.sum() * 0).backward()
        optimizer.step()
        assert bool((table.threshold > before).all())
        before = table.threshold.detach().clone()
    if predicted > 1:
        gained = float(table.threshold.detach()[0, 0]) - first
        assert gained == pytest.approx(predicted * rate, rel=0.35)


def test_the_published_schedule_takes_as_many_steps_as_were_simulated():
    """From -15 at a rate of 0.01, the threshold is 0.01 after about 1,300 steps; at full pace it would take 1,040."""
    blocks, schema = (Block("embedding", 0, 2, 0, 1),), Schema("ctr", (Field("a", 2, 0),))
    table = SoftTable(DenseTable(schema, blocks, torch.ones(2, 1)), "joint", -15.0, Rule(1e-2, 1e-5), 1, 0.0)
    head = torch.nn.Module()
    head.table = table
    optimizer, steps = DenseAdam(head, 1e-3, 0.0), 0
    while float(table.threshold.detach().sigmoid()) < 1e-2:
        (table.threshold.sum() * 0).backward()
        optimizer.step()
        steps += 1
    assert steps == pytest.approx(1300, rel=0.05)


def test_without_weight_decay_nothing_is_ever_pruned():
    head = torch.nn.Module()
    head.table = SoftTable(dense(), "cell", -150.0, Rule(1e-2, 0.0), 1, 0.0)
    optimizer = DenseAdam(head, 1e-3, 0.0)
    for _ in range(50):
        head.table.weight().square().sum().backward()
        optimizer.step()
        head.table.after_step()
    assert head.table.alive().tolist() == [80] * 51


def test_the_last_to_fall_survive_and_margins_decide_within_a_check():
    table = soft("joint", first=-30.0)
    magnitudes = torch.linspace(0.05, 1, 80)[torch.randperm(80, generator=torch.Generator().manual_seed(3))]
    with torch.no_grad():
        table.base[:, :4] = magnitudes.reshape(20, 4)
    for threshold in (0.2, 0.21, 0.4, 0.55):
        with torch.no_grad():
            table.threshold.fill_(math.log(threshold / (1 - threshold)))
        table.after_step()
    alive = [int((magnitudes > t).sum()) for t in (0.2, 0.21, 0.4, 0.55)]
    assert table.alive().tolist() == [80, *alive]
    ranked = table.keys()[:, :4].reshape(-1).argsort()
    assert ranked.tolist() == magnitudes.argsort().tolist()


def test_a_revived_entry_counts_from_its_last_fall():
    table = soft("joint")
    with torch.no_grad():
        table.base[:] = 0.3
    for threshold in (0.5, 0.1, 0.4):
        with torch.no_grad():
            table.threshold.fill_(math.log(threshold / (1 - threshold)))
        table.after_step()
    assert table.falls.fallen[:, :4].unique().tolist() == [3]
    assert table.falls.fallen[:, 4].unique().tolist() == [0]


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**31))
def test_rank_keys_order_as_python_sorts(rows, columns, seed):
    draw = np.random.default_rng(seed)
    first, second = draw.integers(0, 3, (rows, columns)), draw.integers(0, 3, (rows, columns))
    keys = rank_keys(first.astype(np.float32), second).reshape(-1)
    order = sorted(range(rows * columns), key=lambda i: (second.flat[i], first.flat[i], i))
    assert keys.argsort().tolist() == order
    assert np.isfinite(keys).all()


def test_a_linear_weight_goes_with_the_last_entry_of_its_row():
    keys = np.arange(100, dtype=np.float32).reshape(20, 5) % 17
    carried = carry_uncounted(keys, CLICK_BLOCKS)
    np.testing.assert_array_equal(carried[:, :4], keys[:, :4])
    np.testing.assert_array_equal(carried[:, 4], keys[:, :4].max(axis=1))


@settings(deadline=None)
@given(st.integers(0, 2**31), st.floats(0, 1))
def test_a_masked_table_reads_as_the_pruned_table_does(seed, share):
    draw = np.random.default_rng(seed)
    keep = torch.from_numpy(draw.random((20, 5)) < share)
    keep[draw.random(20) < 0.3] = False
    counts = draw.integers(0, 9, 20)
    pruned = PrunedTable.from_counts(
        SCHEMA, CLICK_BLOCKS, dense(seed=1).weight().detach(), keep, torch.zeros(3, 5), counts
    )
    masked = MaskedTable(pruned, counts)
    ids = torch.arange(20)
    assert torch.equal(masked(ids), pruned(ids))
    assert torch.equal(masked.weight(), pruned.weight())
    assert torch.equal(masked.pruned().weight(), pruned.weight())
    masked.weight().square().sum().backward()
    assert not bool(masked.base.grad[~keep].any())


@pytest.mark.parametrize("scope", ["joint", "block"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95])
def test_sparsity_is_exact_and_the_mask_survives_retraining(clicks, model, scope, sparsity):
    method, run = PEP(scope=scope), Run(None, training=TRAINING)
    ladder = method.prepare(model, clicks, run)
    small = compress(model, clicks, method, f"sparsity={sparsity}", run=run)
    total = clicks.schema.rows * 4
    assert small.values == total - int(total * sparsity)
    draft = ladder.table(Room(values=small.values))
    assert torch.equal(draft.keep, small.table.keep)
    assert bool((small.table.base[~draft.keep] == 0).all())
    start = DeepFM(dim=4, hidden=(8,)).build(clicks, 0).table.weight()
    assert torch.equal(draft.base[:, :4], start[:, :4])


def test_masks_of_smaller_budgets_lie_in_those_of_larger_ones(clicks, model):
    ladder = PEP().prepare(model, clicks, Run(None, training=TRAINING))
    masks = [ladder.table(Room(values=values)).keep[:, :4] for values in (600, 300, 100, 10)]
    assert all(bool((small <= large).all()) for large, small in pairwise(masks))


@pytest.mark.delicate
def test_the_published_rule_stops_at_the_first_check_below_and_may_fail(clicks, model):
    run = Run(None, training=TRAINING)
    exact = PEP(search=ThresholdSearch(reach=0.05))
    published = PEP(search=ThresholdSearch(reach=0.05, stop="published"))
    ladder = published.prepare(model, clicks, run)
    alive = published.searched(*initial_model(model, clicks, run, published.start), clicks, run)[1].alive()
    wanted = int(alive[len(alive) // 2]) + 1
    assert ladder.table(Room(values=wanted)).values() == alive[alive <= wanted][0]
    assert exact.prepare(model, clicks, run).table(Room(values=wanted)).values() == wanted
    with pytest.raises(BudgetError, match="search longer") as caught:
        ladder.table(Room(values=int(alive[-1]) - 1))
    assert ladder.table(Room(values=caught.value.least_values)).values() == alive[-1]


def test_the_published_start_prunes_nothing_in_a_short_search(clicks, model):
    method = PEP(search=ThresholdSearch(first=-150.0, rate=1e-3))
    run = Run(None, training=TRAINING)
    _, found = method.searched(*initial_model(model, clicks, run, method.start), clicks, run)
    assert found.alive()[-1] == clicks.schema.rows * 4
    assert float(found.threshold.detach().max()) < -149


def test_one_search_serves_all_budgets_and_each_is_trained_once(clicks, model):
    run = Run(None)
    for _ in range(2):
        compress(model, clicks, PEP(), ["sparsity=0.5", "sparsity=0.9"], run=run, training=TRAINING)
    trained = [(record["stage"], record.get("epoch")) for record in run.logged()]
    assert trained.count(("search", 0)) == trained.count(("search", 1)) == 1
    assert trained.count(("retrain", 0)) == 2


@pytest.mark.parametrize("head", ["fresh", "initial"])
def test_the_head_starts_again_or_where_the_search_started(clicks, model, head, monkeypatch):
    started = {}
    run = Run(None, training=TRAINING)
    fit = run.fit

    def spy(name, start, data, training=None):
        started[name] = start
        return fit(name, start, data, training)

    monkeypatch.setattr(run, "fit", spy)
    compress(model, clicks, PEP(retrain=Retrain(head=head)), "sparsity=0.5", run=run)
    search, retrain = started["search"], started["retrain"]
    same_head = torch.equal(search.layers[0].weight, retrain.layers[0].weight)
    same_linear = torch.equal(search.table.base[:, 4], retrain.table.base[:, 4])
    assert same_head is same_linear is (head == "initial")
    keep = retrain.table.kept[:, :4]
    assert torch.equal(search.table.base[:, :4][keep], retrain.table.base[:, :4][keep])


def test_a_search_that_is_cut_short_goes_on_to_the_same_bytes(clicks, model, tmp_path):
    method, short = PEP(search=ThresholdSearch(checks=7)), {"training": TRAINING}
    expected = compress(model, clicks, method, "sparsity=0.8", **short).table.weight()
    for cut in (3, 17, 29, 60, 75):
        steps = SimpleNamespace(left=cut)

        def stop(stage, done, total, figures, steps=steps):
            steps.left -= 1
            if steps.left == 0:
                raise Cut

        with pytest.raises(Cut), Run(tmp_path / f"{cut}", checkpoint_calls=1, progress=stop) as run:
            compress(model, clicks, method, "sparsity=0.8", run=run, **short)
        with Run(tmp_path / f"{cut}") as run:
            small = compress(model, clicks, method, "sparsity=0.8", run=run, **short)
            assert torch.equal(small.table.weight(), expected)


def test_ranking_models_are_pruned_and_baked_ones_refused(tmp_path):
    rng = np.random.default_rng(0)
    lines = [" ".join(map(str, [u, *sorted(rng.choice(40, 8, replace=False))])) for u in range(30)]
    (tmp_path / "train.txt").write_text("\n".join(lines) + "\n")
    visits = pr.encode(pr.sources.Adjacency(), tmp_path / "train.txt", tmp_path / "data")
    model = LightGCN(dim=8, layers=2).build(visits, 0)
    training = Training(epochs=6, batch_size=64, weight_decay=0.0, learning_rate=1e-2)
    small = compress(model, visits, PEP(granularity="column"), "sparsity=0.8", training=training)
    assert small.values == 70 * 8 - int(70 * 8 * 0.8)
    assert int((small.table.weight() != 0).sum()) == small.values
    with pytest.raises(UnsupportedOp, match="leave `bake` out"):
        compress(model, visits, PEP(), "sparsity=0.8", training=training, bake=True)


@pytest.mark.parametrize(
    "bad",
    [
        {"first": 1.0},
        {"reach": 0.0},
        {"reach": 0.6},
        {"rate": 0.0},
        {"decay": 0.0},
        {"epochs": 0},
        {"checks": 0},
        {"clip": -1.0},
    ],
)
def test_settings_out_of_range_are_named(bad):
    (name,) = bad
    with pytest.raises(ConfigError, match=f"`{name}` must"):
        ThresholdSearch(**bad)


class Hooked(LearningTable):
    """Plain descent on a bias that all vectors share, with a penalty of its own."""

    clip = 0.5

    def __init__(self) -> None:
        super().__init__()
        self.schema, self.blocks = SCHEMA, CLICK_BLOCKS
        self.base = torch.nn.Parameter(dense().weight().detach())
        self.bias = torch.nn.Parameter(torch.zeros(5))

    def rules(self):
        return {"bias": Rule(0.1, 0.5, "sgd")}

    def forward(self, ids):
        return self.base[ids] + self.bias

    def weight(self):
        return self.base + self.bias


def test_rules_and_clipping_of_a_table():
    head = torch.nn.Module()
    head.table = Hooked()
    optimizer = DenseAdam(head, 1e-3, 0.0)
    with torch.no_grad():
        head.table.bias += 1
    before = {name: p.detach().clone() for name, p in head.table.named_parameters()}
    weights = torch.randn(20, 5, generator=noise(0, "test"))
    F.mse_loss(head.table.weight(), weights, reduction="sum").backward()
    gradients = {name: p.grad.clone() for name, p in head.table.named_parameters()}
    norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
    optimizer.step()
    expected = before["bias"] - 0.1 * (gradients["bias"] * 0.5 / norm + 0.5 * before["bias"])
    torch.testing.assert_close(head.table.bias.detach(), expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(head.table.base.detach(), before["base"] - 1e-3 * gradients["base"].sign(), rtol=1e-3,
                               atol=1e-5)  # fmt: skip
    assert head.table.bias.grad is None


def test_folder_of_a_search_holds_its_steps(clicks, model, tmp_path):
    compress(model, clicks, PEP(), "sparsity=0.5", run=tmp_path / "run", training=TRAINING)
    names = sorted(p.name.rpartition("-")[0] for p in Path(tmp_path / "run" / "steps").glob("*.safetensors"))
    assert names == ["retrain", "search"]


@pytest.mark.parametrize("extra", range(0, 900, 60))
def test_a_file_stays_within_its_budget_whatever_digits_the_new_head_has(clicks, model, extra, tmp_path):
    method, short = PEP(), Training(epochs=1, batch_size=512)
    with pytest.raises(BudgetError) as caught:
        compress(model, clicks, method, "10 B", training=short)
    limit = caught.value.least_bytes + extra
    small = compress(model, clicks, method, f"{limit} B", training=short)
    assert small.save(tmp_path / "x.safetensors")["file"] <= limit
