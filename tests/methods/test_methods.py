"""Methods and ``compress``: budgets from the real file, kills, leaks, and what each method promises."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import pocketrec as pr
from pocketrec.attribution.samples import ClickSamples, RankingSamples, training_rows
from pocketrec.attribution.scores import ScoreSums
from pocketrec.attribution.whole_table import _table_gradient, attribute_lists, attribute_propagated
from pocketrec.compression.budget import Budget, Room
from pocketrec.compression.compress import compress
from pocketrec.compression.ladder import Method
from pocketrec.compression.small import Small
from pocketrec.data.dataset import Dataset
from pocketrec.errors import BudgetError, ConfigError, DataError, DivergedError, UnsupportedOp
from pocketrec.format.artifact import Contents
from pocketrec.format.block import Storage
from pocketrec.format.entries import Index
from pocketrec.methods import FrequencyDistance, MagPrune, Random, Shaver
from pocketrec.models.backbone import Model
from pocketrec.models.baked import BakedModel
from pocketrec.models.table import DenseTable
from pocketrec.training.evaluate import logits
from pocketrec.training.run import Run

METHODS = [MagPrune(), Random(), FrequencyDistance(), Shaver(), Shaver(fill="zero", score="abs")]
NAMES = [m.name for m in METHODS]


@pytest.fixture(scope="module")
def click_model(wide_clicks: Dataset) -> Model:
    return pr.train(pr.backbones.DeepFM(dim=4, hidden=(8,)), wide_clicks, None, pr.Training(epochs=2, batch_size=256))


@pytest.fixture(scope="module")
def ranking_model(tested_visits: Dataset) -> Model:
    backbone = pr.backbones.LightGCN(dim=8, layers=2)
    return pr.train(backbone, tested_visits, None, replace(pr.Training.default("cf"), epochs=3, batch_size=64))


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.95])
def test_sparsity_is_exact(wide_clicks: Dataset, click_model: Model, method: Method, sparsity: float) -> None:
    small = compress(click_model, wide_clicks, method, f"sparsity={sparsity}")
    total = wide_clicks.schema.rows * 4
    assert small.values == total - int(total * sparsity)
    assert small.sparsity == pytest.approx(sparsity, abs=1 / total)


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_nothing_removed_changes_nothing(wide_clicks: Dataset, click_model: Model, method: Method) -> None:
    small = compress(click_model, wide_clicks, method, "sparsity=0")
    oov = np.array([f.oov_row for f in wide_clicks.schema.fields])
    seen = ~(wide_clicks.train.ids == oov).any(axis=1)
    np.testing.assert_array_equal(
        logits(small.model, wide_clicks.train)[seen], logits(click_model, wide_clicks.train)[seen]
    )


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
@pytest.mark.parametrize(
    ("storage", "index"), [("fp32", "compact"), ("fp16", "compact"), ("int8", "compact"), ("int8", "direct")]
)
def test_file_budget_is_real(
    wide_clicks: Dataset, click_model: Model, method: Method, storage: Storage, index: Index, tmp_path: Path
) -> None:
    least = _least(lambda b: compress(click_model, wide_clicks, method, b, storage=storage, index=index))
    kept = []
    for limit in np.linspace(least, least + 8000, 7).astype(int):
        small = compress(click_model, wide_clicks, method, f"{limit} B", storage=storage, index=index)
        written = small.save(tmp_path / "x.safetensors")
        size = (tmp_path / "x.safetensors").stat().st_size
        assert size == written["file"] == small.sizes["file"]
        assert size <= limit
        kept.append(int(small.table.keep.sum()))
    assert kept == sorted(kept)


def _least(make: Callable[[Budget], Small]) -> int:
    with pytest.raises(BudgetError) as caught:
        make(Budget("bytes", 1000))
    assert caught.value.least_bytes is not None
    assert str(f"{caught.value.least_bytes:,}") in str(caught.value)
    return caught.value.least_bytes


def test_the_least_of_a_refusal_does_not_hang_on_the_digits_of_the_budget(
    wide_clicks: Dataset, click_model: Model, tmp_path: Path
) -> None:
    least = set()
    for budget in ("1B", "10B", "1000B"):
        with pytest.raises(BudgetError) as refusal:
            compress(click_model, wide_clicks, MagPrune(), budget)
        least.add(refusal.value.least_bytes)
    assert len(least) == 1
    small = compress(click_model, wide_clicks, MagPrune(), f"{least.pop()}B")
    assert small.save(tmp_path / "least")["file"] == small.budget.amount


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
@pytest.mark.parametrize("share", [0.15, 0.4, 0.8])
def test_share_of_table_bytes_holds(wide_clicks: Dataset, click_model: Model, method: Method, share: float) -> None:
    small = compress(click_model, wide_clicks, method, f"{100 * share}%", storage="fp32")
    assert small.sizes["table"] <= share * 4 * wide_clicks.schema.rows * 5
    assert small.sizes["table"] >= share * 4 * wide_clicks.schema.rows * 5 - 200


def test_share_too_small_is_a_budget_error(wide_clicks: Dataset, click_model: Model) -> None:
    rows = wide_clicks.schema.rows
    with pytest.raises(BudgetError, match="raise the budget") as caught:
        compress(click_model, wide_clicks, MagPrune(), "0.1%")
    least = compress(click_model, wide_clicks, MagPrune(), f"{100 * (caught.value.least_bytes + 1) / (4 * 5 * rows)}%")
    assert least.sizes["table"] <= caught.value.least_bytes


@pytest.mark.parametrize("method", METHODS, ids=NAMES)
@pytest.mark.parametrize(("index", "layout"), [("compact", "bitmap"), ("direct", "direct")])
def test_file_scores_as_the_model_does(
    wide_clicks: Dataset, click_model: Model, method: Method, index: Index, layout: str, tmp_path: Path
) -> None:
    small = compress(click_model, wide_clicks, method, "50%", storage="fp32", index=index)
    assert small.sizes["table"] <= 0.5 * 4 * wide_clicks.schema.rows * 5
    small.save(tmp_path / "x.safetensors")
    artifact = Contents.open(tmp_path / "x.safetensors")
    assert {b.layout for b in artifact.packed.blocks} == {layout}
    rows = artifact.vocabulary.file_rows(wide_clicks.hashes)
    vectors = artifact.packed.lookup(rows[wide_clicks.test.ids], np.arange(4, dtype=np.int32))
    np.testing.assert_allclose(artifact.program(vectors), logits(small.model, wide_clicks.test), rtol=1e-4, atol=1e-5)
    assert artifact.info["method"]["name"] == method.name


def test_magnitude_keeps_the_largest(wide_clicks: Dataset, click_model: Model) -> None:
    table = compress(click_model, wide_clicks, MagPrune(), "sparsity=0.8").table
    magnitude = click_model.table.weight().detach().abs()[:, :4]
    keep = table.keep[:, :4]
    assert magnitude[keep].min() >= magnitude[~keep].max()
    assert not table.fill.any()


def test_frequency_distance_is_its_formula(wide_clicks: Dataset, click_model: Model) -> None:
    ladder = FrequencyDistance().prepare(click_model, wide_clicks, Run(None))
    weight = click_model.table.weight().detach().numpy().astype(np.float64)
    for field in wide_clicks.schema.fields:
        rows = slice(field.offset, field.stop)
        n, e = wide_clicks.counts[rows, None], weight[rows]
        expected = n * (e - (n * e).sum(0) / n.sum()) ** 2
        np.testing.assert_allclose(ladder.scores[rows], expected, rtol=1e-3, atol=1e-5)


def test_random_follows_the_seed(wide_clicks: Dataset, click_model: Model) -> None:
    tables = [
        compress(click_model, wide_clicks, Random(), "sparsity=0.5", run=Run(None, seed=s)).table for s in (0, 0, 1)
    ]
    assert torch.equal(tables[0].keep, tables[1].keep)
    assert not torch.equal(tables[0].keep, tables[2].keep)


@pytest.mark.delicate
def test_shaver_scores_add_up(wide_clicks: Dataset, click_model: Model) -> None:
    scores = Shaver(estimator="permutation", batch_size=512).scores(click_model, wide_clicks, Run(None))
    assert scores.samples == len(wide_clicks.train)
    assert abs(scores.gap) < 1e-3
    unseen = wide_clicks.counts == 0
    assert not scores.mean[unseen].any()


def test_shaver_tells_its_efficiency_gap(wide_clicks: Dataset, click_model: Model) -> None:
    told: dict[str, float] = {}
    with Run(None, progress=lambda stage, done, total, figures: told.update(figures)) as run:
        gap = Shaver().scores(click_model, wide_clicks, run).gap
    assert told["efficiency gap"] == gap != 0


def test_a_second_budget_reads_the_stored_scores(
    wide_clicks: Dataset, click_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = compress(click_model, wide_clicks, Shaver(), "sparsity=0.9", run=tmp_path / "run")

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr(Shaver, "_attribute", refuse)
    again = compress(click_model, wide_clicks, Shaver(), ["sparsity=0.9", "10%"], run=tmp_path / "run")
    assert torch.equal(first.table.keep, again[0].table.keep)
    compress(click_model, wide_clicks, Shaver(score="abs", exponent=0.25), "sparsity=0.5", run=tmp_path / "run")
    with pytest.raises(AssertionError):
        compress(click_model, wide_clicks, Shaver(draws=2), "sparsity=0.5", run=tmp_path / "run")


def test_scores_survive_a_kill(
    wide_clicks: Dataset, click_model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = Shaver(batch_size=100)
    whole = compress(click_model, wide_clicks, method, "20%", run=tmp_path / "a")
    run, add, left = Run(tmp_path / "b", checkpoint_calls=5), ScoreSums.add, [17]

    def die(self: ScoreSums, rows: torch.Tensor, values: torch.Tensor) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise RuntimeError
        add(self, rows, values)

    monkeypatch.setattr(ScoreSums, "add", die)
    with pytest.raises(RuntimeError):
        compress(click_model, wide_clicks, method, "20%", run=run)
    small = compress(click_model, wide_clicks, method, "20%", run=run)
    assert -left[0] < 24 - 10
    run.close()
    whole.save(tmp_path / "whole")
    small.save(tmp_path / "again")
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "again").read_bytes()


@pytest.mark.parametrize("name", ["valid", "test"])
def test_only_training_rows_are_scored(wide_clicks: Dataset, name: str) -> None:
    with pytest.raises(DataError, match=name):
        training_rows(wide_clicks.splits[name])


def test_test_rows_change_nothing(wide_clicks: Dataset, click_model: Model, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(wide_clicks.path, copy)
    for file in copy.glob("test*.npy"):
        array = np.load(file, mmap_mode="r+")
        array[...] = array[::-1].copy()
    noisy = Dataset.open(copy)
    assert not np.array_equal(noisy.test.ids, wide_clicks.test.ids)
    for method in METHODS:
        ladders = [method.prepare(click_model, d, Run(None)) for d in (wide_clicks, noisy)]
        assert torch.equal(*(ladder.table(Room(values=300)).weight() for ladder in ladders))


def test_a_cap_draws_training_rows_once(wide_clicks: Dataset) -> None:
    samples = ClickSamples(wide_clicks.train, 500, 0)
    rows = samples.batch(0, 500, 0).rows.numpy()
    assert len(samples) == len(rows) == 500
    assert len(samples._picked) == len(set(samples._picked.tolist()))  # pyright: ignore
    np.testing.assert_array_equal(rows, wide_clicks.train.ids[samples._picked])  # pyright: ignore


def test_nan_in_the_table_diverges(wide_clicks: Dataset, click_model: Model) -> None:
    weight = click_model.table.weight().detach().clone()
    weight[int(wide_clicks.train.ids[0, 0]), 1] = float("nan")
    broken = click_model.with_table(DenseTable(wide_clicks.schema, click_model.table.blocks, weight))
    for method in METHODS:
        if method.name != "random":
            with pytest.raises(DivergedError):
                compress(broken, wide_clicks, method, "sparsity=0.5")


@pytest.mark.parametrize("tune", ["table", "codebook"])
def test_tuning_keeps_mask_and_budget(wide_clicks: Dataset, click_model: Model, tune: str) -> None:
    before = {k: v.clone() for k, v in click_model.state_dict().items()}
    plain = compress(click_model, wide_clicks, Shaver(), "20%")
    tuned = compress(click_model, wide_clicks, Shaver(tune=tune), "20%")
    assert torch.equal(plain.table.keep, tuned.table.keep)
    assert tuned.sizes["table"] <= 0.2 * 4 * wide_clicks.schema.rows * 5
    assert not torch.equal(plain.table.base[plain.table.keep], tuned.table.base[plain.table.keep])
    assert torch.equal(plain.table.fill, tuned.table.fill) == (tune == "table")
    assert all(torch.equal(v, before[k]) for k, v in click_model.state_dict().items())


@pytest.mark.parametrize("bake", [False, True])
@pytest.mark.parametrize("method", METHODS, ids=NAMES)
def test_ranking_models_compress(
    tested_visits: Dataset, ranking_model: Model, method: Method, bake: bool, tmp_path: Path
) -> None:
    for small in compress(ranking_model, tested_visits, method, ["sparsity=0.5", "25%", "6 KiB"], bake=bake):
        sizes = small.save(tmp_path / "x.safetensors")
        artifact = Contents.open(tmp_path / "x.safetensors")
        assert artifact.kind == ("baked" if bake else "ego")
        assert sizes["vocabulary"] == 0
        if small.budget.kind == "bytes":
            assert sizes["file"] <= small.budget.amount


def test_block_scope_splits_users_and_items(tested_visits: Dataset, ranking_model: Model) -> None:
    table = compress(ranking_model, tested_visits, MagPrune(scope="block"), "sparsity=0.8", bake=True).table
    for block in table.blocks:
        assert int(table.keep[block.start : block.stop].sum()) == pytest.approx(block.values * 0.2, abs=1)


def test_baked_vectors_are_the_propagated_ones(tested_visits: Dataset, ranking_model: Model) -> None:
    baked = BakedModel.of(ranking_model)
    expected = ranking_model.propagate(ranking_model.table.weight()).detach()
    assert torch.equal(baked.table.weight().detach(), expected)
    assert BakedModel.of(baked) is baked
    with pytest.raises(UnsupportedOp, match="trained"):
        baked.loss((), torch.Generator())


def test_click_models_cannot_be_baked(wide_clicks: Dataset, click_model: Model) -> None:
    with pytest.raises(UnsupportedOp, match="bake"):
        compress(click_model, wide_clicks, MagPrune(), "sparsity=0.5", bake=True)


@pytest.mark.delicate
@pytest.mark.parametrize("bake", [False, True])
@pytest.mark.parametrize("balance", [0.0, 0.5])
def test_list_game_is_worth_the_mean_of_first_and_last_marginals(
    tested_visits: Dataset, ranking_model: Model, bake: bool, balance: float
) -> None:
    model = BakedModel.of(ranking_model) if bake else ranking_model
    users, items = tested_visits.schema.fields
    weight = model.table.weight().detach().double()
    fill = torch.from_numpy(np.random.default_rng(0).normal(0, 0.1, (2, weight.shape[1])))
    placeholder = fill[torch.from_numpy(tested_visits.schema.field_of_row.astype(np.int64))]
    vectors = model.propagate(weight.float())
    dense = vectors[: users.size] @ vectors[users.size :].T
    for user, item in tested_visits.train.ids:
        dense[user, item - items.offset] = -torch.inf
    lists = dense.topk(3, dim=1).indices
    share = torch.bincount(lists.flatten(), minlength=items.size)[lists].double() ** -balance / lists.numel()

    def value(table: torch.Tensor) -> float:
        final = model.propagate(table.float()).double()
        return float(((final[: users.size, None] * final[users.size :][lists]).sum(dim=2) * share).sum())

    scores = attribute_lists(model, fill.float(), tested_visits.train, top=3, balance=balance)
    assert scores.gap == pytest.approx(0, abs=1e-4)
    scale = float(np.abs(scores.mean).max())
    for row, column in ((0, 0), (1, 3), (users.size, 1), (users.size + 4, 7)):
        first, last = placeholder.clone(), weight.clone()
        first[row, column], last[row, column] = weight[row, column], placeholder[row, column]
        marginals = value(first) - value(placeholder), value(weight) - value(last)
        assert scores.mean[row, column] == pytest.approx(np.mean(marginals), rel=1e-3, abs=1e-3 * scale)


@pytest.mark.delicate
def test_ego_gradient_equals_autograd_and_scores_nearly_add_up(tested_visits: Dataset, ranking_model: Model) -> None:
    samples = RankingSamples(tested_visits.train, None, 0)
    scores = attribute_propagated(ranking_model, torch.zeros(2, 8), samples, masks=64)
    assert abs(scores.gap) < 0.2
    assert (scores.square >= 0).all()
    weight = ranking_model.table.weight().detach().clone().requires_grad_()
    rows = samples.batch(0, 100, 0).rows
    user, positive, negative = (ranking_model.propagate(weight)[rows[:, i]] for i in range(3))
    loss = torch.nn.functional.softplus((user * (negative - positive)).sum(1)).mean()
    expected = torch.autograd.grad(-loss, weight)[0]
    torch.testing.assert_close(_table_gradient(ranking_model, weight.detach(), rows), expected)


def test_negatives_are_no_training_items(tested_visits: Dataset) -> None:
    samples = RankingSamples(tested_visits.train, None, 0)
    known = {tuple(pair) for pair in tested_visits.train.ids.tolist()}
    rows = samples.batch(0, len(samples), 0).rows.tolist()
    assert all((u, p) in known and (u, q) not in known for u, p, q in rows)
    assert samples.batch(0, 50, 1).rows.tolist() != rows[:50]


@pytest.mark.parametrize("bad", [{"draws": 0}, {"samples": 0}, {"masks": 0}, {"exponent": float("nan")}])
def test_bad_settings_are_named(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Shaver(**bad)


@pytest.mark.parametrize("text", ["", "4", "sparsity=1", "sparsity=-1", "0%", "101%", "4 QB", "-4MiB", "nan%"])
def test_bad_budgets_are_config_errors(text: str) -> None:
    with pytest.raises(ConfigError, match="budget"):
        Budget.parse(text)


def test_input_model_is_left_alone(wide_clicks: Dataset, click_model: Model) -> None:
    before = {k: v.clone() for k, v in click_model.state_dict().items()}
    for method in METHODS:
        compress(click_model, wide_clicks, method, "sparsity=0.9")
    assert all(torch.equal(v, before[k]) for k, v in click_model.state_dict().items())
