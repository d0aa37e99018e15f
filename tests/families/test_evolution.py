"""OptEmbed and OptEmbed-D: the straight-through step, alpha, the evolution, feasibility, and what survives."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interruptions import Cut
from scipy import stats
from table_cases import CLICK_BLOCKS, FOUR, PAIRS, SCHEMA

from pocketrec.backbones.deepfm import DeepFM
from pocketrec.backbones.lightgcn import LightGCN
from pocketrec.backbones.neumf import NeuMF
from pocketrec.compression.budget import Room
from pocketrec.compression.compress import compress
from pocketrec.errors import BudgetError, ConfigError
from pocketrec.families.evolution import Evolution, fit_lengths
from pocketrec.families.mixed_dimension import (
    Supernet,
    Units,
    alpha_for,
    even_lengths,
    length_odds,
    mean_length,
    unit_step,
    validation_figures,
)
from pocketrec.methods.opt_embed import OptEmbed
from pocketrec.methods.opt_embed_d import OptEmbedD
from pocketrec.models.table import DenseTable
from pocketrec.randomness import generator
from pocketrec.settings import build, key
from pocketrec.training.evaluate import validate
from pocketrec.training.hooks import Rule
from pocketrec.training.loop import Training
from pocketrec.training.run import Run

TRAINING = Training(epochs=2, batch_size=64, learning_rate=1e-2)
SHORT = {"search": Evolution(generations=3)}


def net(schema=SCHEMA, blocks=CLICK_BLOCKS, rows="field", by="field") -> Supernet:
    width = max(b.right for b in blocks)
    weight = torch.randn(schema.rows, width, generator=torch.Generator().manual_seed(0))
    units = Units.of(schema, blocks, by)
    return Supernet(DenseTable(schema, blocks, weight), units, rows, Rule(0.1, kind="sgd"), 1e-3)


class Kept:
    """A checkpoint that keeps the last state in memory, and may break off."""

    def __init__(self, state=None, stop: int = 10**9) -> None:
        self.state, self.left = state, stop

    def load(self):
        return self.state

    def due(self) -> bool:
        return True

    def save(self, arrays) -> None:
        self.state = dict(arrays)
        self.left -= 1
        if self.left == 0:
            raise InterruptedError


def test_the_step_and_its_straight_through_gradient():
    table = [(-1.5, 0, 0.0), (-1.0, 0, 0.4), (-0.41, 0, 0.4), (-0.4, 0, 0.4), (-0.1, 0, 1.6), (0.0, 0, 2.0),
             (0.1, 1, 1.6), (0.25, 1, 1.0), (0.4, 1, 0.4), (0.7, 1, 0.4), (1.0, 1, 0.4), (1.01, 1, 0.0)]  # fmt: skip
    u = torch.tensor([row[0] for row in table], dtype=torch.float64, requires_grad=True)
    value = unit_step(u)
    value.sum().backward()
    assert value.tolist() == [row[1] for row in table]
    np.testing.assert_allclose(u.grad, [row[2] for row in table], atol=1e-12)


@pytest.mark.parametrize(
    ("longest", "sparsity", "alpha"),
    [
        (16, 0.5, 1.02387), (16, 0.7, 1.22473), (16, 0.8, 1.44561), (16, 0.9, 2.66666),
        (32, 0.5, 1.00589), (32, 0.8, 1.17979), (32, 0.9, 1.45450), (32, 0.95, 2.66667),
        (64, 0.5, 1.00147), (64, 0.7, 1.04480), (64, 0.8, 1.08184), (64, 0.9, 1.18514), (64, 0.95, 1.45455),
    ],
)  # fmt: skip
def test_alpha_has_the_known_solutions(longest, sparsity, alpha):
    found = alpha_for((1 - sparsity) * longest, longest)
    assert found == pytest.approx(alpha, abs=1e-5)
    closed = found / (found - 1) - longest / (found**longest - 1)
    assert closed == pytest.approx((1 - sparsity) * longest, rel=1e-8)


@settings(deadline=None)
@given(st.integers(2, 64), st.floats(0.001, 0.999))
def test_alpha_leaves_no_residual_and_falls_with_the_mean(longest, share):
    mean = 1 + share * (longest - 1)
    alpha = alpha_for(mean, longest)
    assert abs(mean_length(alpha, longest) - mean) < 1e-9
    assert mean_length(alpha * 1.01, longest) < mean < mean_length(alpha / 1.01, longest)
    assert math.isclose(mean_length(1.0, longest), (longest + 1) / 2)


@pytest.mark.parametrize("mean", [1.0, 0.8, 16.0, 20.0])
def test_means_out_of_reach_are_refused(mean):
    with pytest.raises(BudgetError, match="cannot have the mean"):
        alpha_for(mean, 16)


def test_candidates_follow_the_odds():
    evolution, longest = Evolution(), np.full(20000, 16)
    for sampling, mean in (("alpha", 3.2), ("uniform", 8.5)):
        evolution = Evolution(sampling=sampling)
        odds = {16: evolution._odds(16, 3.2)}
        drawn = evolution._draw(longest, odds, np.random.default_rng(0))
        counts = np.bincount(drawn, minlength=17)[1:]
        assert stats.chisquare(counts, odds[16] * len(longest)).pvalue > 1e-3
        assert drawn.mean() == pytest.approx(mean, abs=0.1)
    np.testing.assert_allclose(length_odds(1.0, 16), 1 / 16)


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 12), st.floats(0, 1))
def test_fitted_candidates_meet_the_budget_and_leave_no_room(seed, units, share):
    random = np.random.default_rng(seed)
    longest, sizes = random.integers(1, 9, units), random.integers(0, 30, units)
    most = int(sizes.sum() + share * (longest @ sizes - sizes.sum()))
    genes = fit_lengths(random.integers(1, longest + 1), longest, sizes, most, random)
    assert genes @ sizes <= most
    assert bool(((genes >= 1) & (genes <= longest)).all())
    grow = (genes < longest) & (sizes > 0)
    assert not bool((sizes[grow] <= most - genes @ sizes).any())


def test_a_budget_below_one_column_each_is_refused():
    with pytest.raises(BudgetError) as caught:
        fit_lengths(np.array([1, 1]), np.array([4, 4]), np.array([10, 5]), 14, np.random.default_rng(0))
    assert caught.value.least_values == 15


def test_evolution_is_elitist_and_finds_the_best_of_an_easy_figure():
    longest, sizes = np.full(6, 8), np.array([5, 4, 3, 2, 1, 1])
    worth = np.array([9.0, 1.0, 7.0, 1.0, 1.0, 1.0])

    def judged(young):
        return [float(np.sqrt(genes) @ worth) for genes in young]

    evolution = Evolution(generations=60, patience=60)
    found = evolution.search(longest, sizes, 60, judged, 0, Kept())
    assert bool((np.diff(found["figures"]) >= 0).all())
    assert found["genes"] @ sizes <= 60
    random = np.random.default_rng(1)
    others = [fit_lengths(random.integers(1, 9, 6), longest, sizes, 60, random) for _ in range(600)]
    assert judged([found["genes"]])[0] >= np.quantile(judged(others), 0.99)
    again = evolution.search(longest, sizes, 60, judged, 0, Kept())
    np.testing.assert_array_equal(found["genes"], again["genes"])


def test_the_original_search_forgets_all_but_the_best():
    longest, sizes, seen = np.full(6, 8), np.array([5, 4, 3, 2, 1, 1]), []

    def judged(young):
        figures = [float((genes**0.3) @ (genes % 3)) for genes in young]
        seen.append((young, figures))
        return figures

    evolution = Evolution(generations=12, patience=12, crossover="original", mutation=0.0)
    found = evolution.search(longest, sizes, 60, judged, 0, Kept())
    best = [max(figures) for _, figures in seen]
    assert found["figures"].tolist() == np.maximum.accumulate(best).tolist()
    assert judged([found["genes"]])[0] == max(best)
    parents = [p for _, p in sorted(zip(seen[3][1], seen[3][0], strict=True), key=lambda pair: -pair[0])[:15]]
    odds = {8: evolution._odds(8, 60 / 16)}
    children = evolution._children(np.array(parents), longest, odds, generator(0, "evolution", 4))
    for child in children[:10]:
        assert any(
            np.array_equal(child, np.r_[one[:cut], other[cut:]])
            for one in parents for other in parents for cut in range(7)
        )  # fmt: skip
    assert key(Evolution()) == {"name": "Evolution"}
    assert key(evolution) == {
        "name": "Evolution", "generations": 12, "patience": 12, "crossover": "original", "mutation": 0.0
    }  # fmt: skip


@pytest.mark.parametrize("most", [30, 47, 61, 90])
def test_even_lengths_are_level_and_as_long_as_the_budget_allows(most):
    units = Units.of(PAIRS, FOUR, "row")
    on = units.unit >= 0
    sizes = units.sizes(on)
    candidates = even_lengths(units, FOUR, on, most)
    assert len(candidates) == 1 + len(FOUR)
    for genes, long in zip(
        candidates, [range(30), *(units.unit[b.start : b.stop, b.left // 3] for b in FOUR)], strict=True
    ):
        inside = np.isin(np.arange(30), list(long))
        (level,) = set(genes[inside])
        assert set(genes[~inside]) <= {1}
        assert genes @ sizes <= most
        assert level == 3 or genes @ sizes + sizes[inside].sum() > most


def test_given_candidates_join_the_first_generation_and_may_win():
    evolution = Evolution(population=4, generations=2, children=2)
    longest, sizes = np.full(40, 8), np.ones(40, np.int64)
    given = np.where(np.arange(40) < 5, 8, 1)

    def judged(young):
        return [float((genes[:5] == 8).all()) for genes in young]

    found = evolution.search(longest, sizes, 75, judged, 0, Kept(), [given])
    assert (found["genes"][:5] == 8).all()
    assert found["figures"].tolist() == [1.0, 1.0]
    assert evolution.search(longest, sizes, 75, judged, 0, Kept())["figures"][0] == 0


@pytest.mark.parametrize("kind", ["elitist", "original"])
def test_an_evolution_that_is_cut_short_goes_on_to_the_same_end(kind):
    longest, sizes = np.full(6, 8), np.array([5, 4, 3, 2, 1, 1])

    def judged(young):
        return [float((genes**0.3).sum()) for genes in young]

    evolution = Evolution(generations=9, patience=9, crossover=kind)
    whole = evolution.search(longest, sizes, 60, judged, 3, Kept())
    for stop in range(1, 9):
        cut = Kept(stop=stop)
        with pytest.raises(InterruptedError):
            evolution.search(longest, sizes, 60, judged, 3, cut)
        rest = evolution.search(longest, sizes, 60, judged, 3, Kept(cut.state))
        np.testing.assert_array_equal(whole["figures"], rest["figures"])
        np.testing.assert_array_equal(whole["genes"], rest["genes"])


@settings(deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(["field", "row"]), st.booleans())
def test_masks_are_prefixes_and_counted_by_the_formula(seed, by, four):
    schema, blocks = (PAIRS, FOUR) if four else (SCHEMA, CLICK_BLOCKS)
    random = np.random.default_rng(seed)
    units = Units.of(schema, blocks, by)
    genes = random.integers(1, units.longest + 1)
    on = random.random(units.unit.shape) < 0.7
    keep = units.mask(units.lengths(genes, on), 6 if four else 5)
    assert keep.sum() == genes @ units.sizes(on)
    for left, right in units.groups:
        part = keep[:, left:right]
        assert bool((part[:, 1:] <= part[:, :-1]).all())
    longer = units.mask(units.lengths(np.minimum(genes + 1, units.longest), on), keep.shape[1])
    assert bool((keep <= longer).all())
    fields = len(schema.fields) * len(units.groups)
    assert len(units.longest) == (fields if by == "field" else schema.rows * len(units.groups))


@pytest.mark.parametrize("rows", ["field", "row"])
def test_rows_are_gated_alike_in_look_up_and_matrix(rows):
    table = net(rows=rows)
    with torch.no_grad():
        table.threshold += 3.0
    ids = torch.tensor([[0, 13, 17], [3, 12, 19]])
    weight = table.weight()
    assert torch.equal(table(ids), weight[ids])
    norms = table.base.detach()[:, :4].abs().sum(dim=1)
    np.testing.assert_array_equal((weight[:, :4] != 0).any(dim=1), norms > 3)
    assert torch.equal(weight[:, 4], table.base[:, 4])
    np.testing.assert_allclose(table.margins()[:, 0], norms - 3, rtol=1e-6)


def test_pressure_lifts_thresholds_and_the_loss_holds_them_down():
    table = net()
    table.penalty(torch.zeros(1, 1), 0).backward()
    np.testing.assert_allclose(table.threshold.grad, -1e-3)
    table = net()
    with torch.no_grad():
        table.base[0, :4] = torch.tensor([0.1, 0.05, 0.0, 0.05])
    table(torch.tensor([[0]])).sum().backward()
    assert float(table.threshold.grad[0, 0]) == pytest.approx(-(0.2 * (2 - 4 * 0.2)), rel=1e-5)


def test_a_step_draws_a_length_per_sample_of_click_data_and_per_row_of_ranking_data():
    drawn = net().drawn(torch.Generator().manual_seed(0))
    ids = torch.zeros(400, 1, dtype=torch.long)
    lengths = (drawn(ids)[:, 0, :4] != 0).sum(dim=1)
    assert stats.chisquare(np.bincount(lengths, minlength=5)[1:]).pvalue > 1e-3
    drawn = net(PAIRS, FOUR, None, "row").drawn(torch.Generator().manual_seed(0))
    assert torch.equal(drawn(torch.arange(15)), drawn.weight())
    assert len(set((drawn.weight() != 0).sum(dim=1).tolist())) > 1
    prefix = (drawn.weight()[:, :3] != 0).int()
    assert bool((prefix[:, 1:] <= prefix[:, :-1]).all())


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 2**31), st.lists(st.integers(0, 14), min_size=1, max_size=9))
def test_a_step_moves_what_it_reads_and_nothing_behind_a_prefix(seed, ids):
    table = net(PAIRS, FOUR, None, "row")
    drawn = table.drawn(torch.Generator().manual_seed(seed))
    upstream = torch.randn(len(ids), 6, generator=torch.Generator().manual_seed(seed + 1))
    (drawn(torch.tensor(ids)) * upstream).sum().backward()
    expected = np.zeros((15, 6), np.float32)
    for row, slope in zip(ids, upstream.numpy(), strict=True):
        expected[row] += slope
    prefix = (drawn.weight() != 0).numpy()
    np.testing.assert_allclose(table.base.grad, np.where(prefix, expected, 0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.8, 0.95])
def test_sizes_are_exact_and_fields_have_one_length(clicks, model, sparsity):
    run = Run(None)
    small = compress(model, clicks, OptEmbed(**SHORT), f"sparsity={sparsity}", run=run, training=TRAINING)
    total = clicks.schema.rows * 4
    assert small.values == total - int(total * sparsity)
    keep = small.table.keep[:, :4].int()
    assert bool((keep[:, 1:] <= keep[:, :-1]).all())
    start = DeepFM(dim=4, hidden=(8,)).build(clicks, 0)
    draft = OptEmbed(**SHORT).prepare(model, clicks, run.with_training(TRAINING)).table(Room(values=small.values))
    assert torch.equal(draft.base, start.table.weight())


def test_no_row_is_left_out_by_opt_embed_d_so_few_columns_are_out_of_reach(visits, clicks, model):
    ranking = LightGCN(dim=4, layers=1).build(visits, 0)
    training = Training(epochs=2, batch_size=64, weight_decay=0.0)
    method = OptEmbedD(search=Evolution(generations=2))
    run = Run(None)
    small = compress(ranking, visits, method, "sparsity=0.6", run=run, training=training)
    assert small.values == 280 - int(280 * 0.6)
    assert bool(small.table.keep[:, 0].all())
    assert len(set(small.table.keep.sum(dim=1).tolist())) > 1
    with pytest.raises(BudgetError) as caught:
        compress(ranking, visits, method, "sparsity=0.8", run=run)
    assert caught.value.least_values == 70
    least = compress(ranking, visits, method, "sparsity=0.75", run=run)
    assert least.values == 70
    with pytest.raises(BudgetError) as caught:
        compress(model, clicks, OptEmbedD(**SHORT), "sparsity=0.95", training=TRAINING)
    assert caught.value.least_values == clicks.schema.rows


def test_a_width_of_sixteen_cannot_be_cut_by_95_percent_without_leaving_rows_out(clicks):
    model, rows = DeepFM(dim=16, hidden=(8,)).build(clicks, 0), clicks.schema.rows
    run = Run(None)
    with pytest.raises(BudgetError, match=f"{rows:,}") as caught:
        compress(model, clicks, OptEmbedD(**SHORT), "sparsity=0.95", run=run, training=TRAINING)
    assert caught.value.least_values == rows == 16 * rows - int(16 * rows * 0.9375)
    assert compress(model, clicks, OptEmbedD(**SHORT), "sparsity=0.9375", run=run, training=TRAINING).values == rows
    small = compress(model, clicks, OptEmbed(**SHORT), "sparsity=0.95", training=TRAINING)
    assert small.values == 16 * rows - int(16 * rows * 0.95)


def test_four_blocks_have_lengths_of_their_own(visits):
    ranking = NeuMF(dim=4, hidden=(8,)).build(visits, 0)
    training = Training(epochs=2, batch_size=64, weight_decay=0.0)
    small = compress(ranking, visits, OptEmbedD(search=Evolution(generations=2)), "sparsity=0.5", training=training)
    assert small.values == 280
    left, right = (small.table.keep[:, part].sum(dim=1) for part in (slice(0, 4), slice(4, 8)))
    assert not torch.equal(left, right)


def test_judging_together_is_judging_one_by_one(clicks, model):
    units = Units.of(clicks.schema, model.table.blocks, "field")
    weight = model.table.weight().detach()
    on = np.random.default_rng(0).random(units.unit.shape) < 0.9
    random = np.random.default_rng(1)
    lengths = [units.lengths(random.integers(1, 5, len(units.longest)), on) for _ in range(5)]
    gate = torch.from_numpy(units.mask(units.lengths(units.longest, on), 5))
    gate[:, 4] = True
    together = validation_figures(model, torch.where(gate, weight, 0), units, lengths, clicks.valid)
    for one, figure in zip(lengths, together, strict=True):
        keep = torch.from_numpy(units.mask(one, 5))
        keep[:, 4] = True
        table = DenseTable(clicks.schema, model.table.blocks, torch.where(keep, weight, 0))
        assert validate(model.with_table(table), clicks.valid) == pytest.approx(figure, abs=1e-9)


def test_phases_that_are_cut_short_go_on_to_the_same_bytes(clicks, model, tmp_path):
    method, short = OptEmbed(**SHORT), {"training": TRAINING}
    expected = compress(model, clicks, method, "sparsity=0.8", **short).table.weight()
    for cut in (5, 25, 40):
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


@pytest.mark.parametrize("method", [OptEmbed, OptEmbedD])
@pytest.mark.parametrize("bad", [{"population": 0}, {"patience": 0}, {"mutation": 1.5}, {"epochs": 0}])
def test_settings_out_of_range_are_named(method, bad):
    (name,) = bad
    with pytest.raises(ConfigError, match=f"`search`: `{name}` must"):
        build(method, {f"search.{name}": bad[name]})
