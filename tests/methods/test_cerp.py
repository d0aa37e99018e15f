"""CERP: which ids share which rows, the regulariser, exact selection, and the packed sum of pruned codebooks."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

import pocketrec as pr
from pocketrec.backbones.deepfm import DeepFM
from pocketrec.backbones.lightgcn import LightGCN
from pocketrec.backbones.neumf import NeuMF
from pocketrec.compression.budget import Room
from pocketrec.compression.compress import compress
from pocketrec.errors import ArtifactError, BudgetError, ConfigError
from pocketrec.families.compositional.pruned_sum import NonZeros, PrunedCodebooks, PrunedSumPlan, SoftCodebooks
from pocketrec.families.compositional.region import Region
from pocketrec.families.retraining import Retrain, Start
from pocketrec.families.thresholds import ThresholdSearch
from pocketrec.format.block import PackedRange
from pocketrec.format.layouts.pruned_sum import PrunedSumBlock, codebook_places, codebook_rows, pruned_sum_bytes
from pocketrec.methods.cerp import CERP
from pocketrec.training.evaluate import logits
from pocketrec.training.hooks import Rule
from pocketrec.training.loop import Training
from pocketrec.training.run import Run
from pocketrec.training.train import train

TRAINING = Training(epochs=4, batch_size=64, learning_rate=1e-2)


def books(rows: int = 23, bucket: int = 6, width: int = 4, kept: int = 30, operation="add") -> PrunedCodebooks:
    return PrunedSumPlan(rows, width, bucket, kept, operation).build(torch.Generator().manual_seed(0))


def soft(part: PrunedCodebooks, first: float = -6.0, kind="batch", gamma: float = 1.0, eta: float = 100.0):
    thresholds = torch.full(part.books.shape, first)
    return SoftCodebooks(part, thresholds, Rule(1e-2, 1e-5), NonZeros(kind, gamma, eta), 1)


@pytest.fixture(scope="module")
def clicks(tmp_path_factory):
    source = pr.sources.Synthetic(rows=1500, cardinalities=(120, 30, 6), hashed=True)
    return pr.encode(source, None, tmp_path_factory.mktemp("clicks") / "data", threshold=2)


@pytest.fixture(scope="module")
def model(clicks):
    return DeepFM(dim=4, hidden=(8,)).build(clicks, 0)


@pytest.fixture(scope="module")
def visits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("visits")
    rng = np.random.default_rng(0)
    lines = [" ".join(map(str, [u, *sorted(rng.choice(40, 8, replace=False))])) for u in range(30)]
    (folder / "train.txt").write_text("\n".join(lines) + "\n")
    return pr.encode(pr.sources.Adjacency(), folder / "train.txt", folder / "data")


@given(st.integers(1, 400), st.data())
def test_rows_are_reused_evenly_and_pairs_are_unique_iff_the_bucket_is_wide(rows, data):
    bucket = data.draw(st.integers(1, rows))
    share = -(-rows // bucket)
    first, second = codebook_places(np.arange(rows), rows, bucket)
    uses = np.bincount(first, minlength=bucket)
    assert len(uses) == bucket
    assert set(uses) <= {rows // bucket, -(-rows // bucket)}
    used = np.bincount(second - bucket)
    assert len(used) == codebook_rows(rows, bucket)[1] <= bucket
    assert set(used[:-1]) <= {share}
    assert 0 < used[-1] <= share
    pairs = len(set(zip(first.tolist(), second.tolist(), strict=True)))
    assert (pairs == rows) == (share <= bucket)


@given(st.integers(1, 200), st.data())
def test_the_whole_matrix_is_every_look_up(rows, data):
    bucket = data.draw(st.integers(1, rows))
    part = books(rows, bucket, 3, data.draw(st.integers(0, 3 * sum(codebook_rows(rows, bucket)))))
    assert torch.equal(part.weight(), part(torch.arange(rows)))
    first, second = codebook_places(np.arange(rows), rows, bucket)
    masked = np.where(part.keep.numpy(), part.books.detach().numpy(), 0)
    np.testing.assert_array_equal(part.weight().detach().numpy(), masked[first] + masked[second])


@given(st.integers(1, 200), st.data())
def test_halves_side_by_side_are_one_row_of_each_codebook(rows, data):
    bucket = data.draw(st.integers(1, rows))
    part = books(rows, bucket, 6, data.draw(st.integers(0, 3 * sum(codebook_rows(rows, bucket)))), "concat")
    first, second = codebook_places(np.arange(rows), rows, bucket)
    masked = np.where(part.keep.numpy(), part.books.detach().numpy(), 0)
    expected = np.concatenate([masked[first], masked[second]], axis=1)
    np.testing.assert_array_equal(part.weight().detach().numpy(), expected)
    np.testing.assert_array_equal(part(torch.arange(rows)).detach().numpy(), expected)
    assert part.facts() == {}
    assert part.extra_repr() != books(rows, bucket, 6, 0).extra_repr()


def test_halves_side_by_side_reach_sizes_and_files_as_sums_do(clicks, model, tmp_path):
    small = compress(model, clicks, CERP(operation="concat"), "sparsity=0.5", training=TRAINING)
    total = clicks.schema.rows * 4
    assert small.values == total - total // 2
    (part,) = small.table.compositions
    assert part.books.shape[1] == 2
    small.save(tmp_path / "x.safetensors")
    measured = pr.measure(tmp_path / "x.safetensors", clicks.valid, latency=False, predictions=True)
    np.testing.assert_allclose(measured.logits, logits(small.model, clicks.valid), atol=1e-5)
    with pytest.raises(ConfigError, match="even width"):
        compress(DeepFM(dim=3, hidden=(8,)).build(clicks, 0), clicks, CERP(operation="concat"), "sparsity=0.5")


@pytest.mark.parametrize("spread", ["constant", "uniform", "normal", "power"])
def test_first_thresholds_are_the_start_times_a_share_of_their_own(clicks, model, spread, monkeypatch):
    run, began = Run(None, training=Training(epochs=1, batch_size=512)), {}
    fit = run.fit
    monkeypatch.setattr(
        run, "fit", lambda name, start, *rest: began.setdefault(name, start) and fit(name, start, *rest)
    )
    method = CERP(search=ThresholdSearch(first=-20.0), spread=spread)
    compress(model, clicks, method, "sparsity=0.5", run=run)
    (part,) = began["search"].table.compositions
    share = part.threshold.detach().double().numpy().reshape(-1) / -20
    assert 0 <= share.min() <= share.max() <= 1
    if spread == "constant":
        np.testing.assert_array_equal(share, 1)
        return
    law = {"uniform": stats.uniform.cdf, "power": lambda v: v**2}.get(spread)
    if law is None:
        assert (share.min(), share.max()) == (0, 1)
        law = stats.norm(share.mean(), share.std()).cdf
    assert stats.kstest(share, law).pvalue > 1e-3


@pytest.mark.parametrize(
    ("rows", "width", "bucket", "values"),
    [
        (1_086_810, 16, 320_000, 10_240_000),
        (1_086_810, 16, 140_000, 4_480_000),
        (4_428_511, 16, 1_200_000, 38_400_000),
        (4_428_511, 16, 610_000, 19_520_000),
        (4_428_511, 16, 600_000, 19_200_000),
        (29_858, 64, 10_000, 1_280_000),
        (40_981, 64, 5_500, 704_000),
    ],
)
def test_published_buckets_hold_what_is_published_as_far_as_rows_are_read(rows, width, bucket, values):
    first, second = codebook_rows(rows, bucket)
    assert first == bucket
    assert values - second * width - first * width == (bucket - second) * width >= 0
    plan = CERP(bucket=bucket).plan(Region("all", 0, rows, 0, width), 3 * values)
    assert plan.bucket == bucket
    assert plan.kept == (first + second) * width <= values


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(1, 8), st.floats(0, 1))
def test_the_default_bucket_holds_the_budget_and_keeps_ids_apart(rows, width, share):
    values = int(rows * width * share)
    bucket = CERP().bucket_of(rows, width, values)
    assert sum(codebook_rows(rows, bucket)) * width >= values
    assert -(-rows // bucket) <= bucket or bucket == rows
    assert CERP().bucket_of(rows, width, values // 2) <= bucket


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 90), st.data(), st.sampled_from(["fp32", "fp16", "int8"]), st.integers(1, 11))
def test_the_packed_block_reads_as_the_table_and_has_the_size_foretold(rows, data, storage, width):
    bucket = data.draw(st.integers(1, rows))
    kept = data.draw(st.integers(0, width * sum(codebook_rows(rows, bucket))))
    operation = data.draw(st.sampled_from(["add", "concat"]))
    part = books(rows, bucket, width * (2 if operation == "concat" else 1), kept, operation)
    block = part.pack(PackedRange("x", 0, rows, 0, part.width), storage, None)
    assert block.size_bytes == pruned_sum_bytes(rows, bucket, width, kept, storage)
    block.check(1)
    again = PrunedSumBlock(**{**block.to_json(), "arrays": block.arrays})
    slots = np.random.default_rng(0).integers(0, rows, 17)
    expected = part(torch.from_numpy(slots)).detach().numpy()
    scale = float(part.books.detach().abs().max())
    within = {"fp32": 0.0, "fp16": 2e-3, "int8": 1 / 126}[storage] * scale
    assert np.abs(again.vectors(slots) - expected).max() <= within


def test_a_damaged_block_is_refused():
    block = books().pack(PackedRange("x", 0, 23, 0, 4), "fp32", None)
    sound = {"slots": 23, "bucket": 6, "kept": 30}
    for change in ({"bucket": 0}, {"kept": 10**6}, {"operation": "div"}, {"operation": "concat"}):
        settings_ = {**sound, **change}
        with pytest.raises(ArtifactError, match="impossible shape"):
            PrunedSumBlock(**{**block.to_json(), "settings": settings_, "arrays": block.arrays}).check(1)
    arrays = {**block.arrays, "values": block.arrays["values"][1:]}
    with pytest.raises(ArtifactError, match=r"x\.values"):
        PrunedSumBlock(**{**block.to_json(), "arrays": arrays}).check(1)


@settings(deadline=None)
@given(st.integers(0, 2**31), st.floats(1, 200), st.integers(0, 5))
def test_the_regulariser_is_bounded_and_halves(seed, eta, epoch):
    part = soft(books(), eta=eta)
    slots = torch.from_numpy(np.random.default_rng(seed).integers(0, 23, 9))
    value = part.penalty(slots, epoch).item()
    assert -9 * 4 * 0.5**epoch - 1e-4 <= value <= 0
    assert value == pytest.approx(part.penalty(slots, 0).item() * 0.5**epoch, rel=1e-5)
    expected = -sum(math.tanh(eta * e) ** 2 for e in part(slots).detach().flatten().tolist()) * 0.5**epoch
    assert value == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_the_gradient_of_the_regulariser_is_that_of_finite_differences():
    part = soft(books(), eta=3.0).double()
    slots = torch.tensor([0, 5, 22, 5])
    part.penalty(slots, 0).backward()
    for at in ((0, 1), (5, 0), (9, 2)):
        sides = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                part.books[at] += step
                sides.append(float(part.penalty(slots, 0)))
                part.books[at] -= step
        assert float(part.books.grad[at]) == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-4, abs=1e-8)


def test_row_by_row_sums_pair_rows_of_one_number():
    part = soft(books(rows=23, bucket=8), kind="rowwise", eta=2.0)
    read = part.read(slice(None)).detach().numpy()
    pairs = [read[j] + (read[8 + j] if 8 + j < len(read) else 0) for j in range(8)]
    assert part.penalty(torch.zeros(0, dtype=torch.long), 0).item() == pytest.approx(
        -float((np.tanh(2.0 * np.array(pairs)) ** 2).sum()), rel=1e-5
    )


def test_supports_unite_in_the_sum():
    part = books(kept=25)
    first, second = codebook_places(np.arange(23), 23, 6)
    keep = part.keep.numpy()
    np.testing.assert_array_equal(part.weight().detach().numpy() != 0, keep[first] | keep[second])


@given(st.integers(1, 60), st.integers(0, 99))
def test_one_codebook_of_all_rows_says_every_matrix(rows, seed):
    matrix = torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed))
    noise = torch.randn(rows, 3, generator=torch.Generator().manual_seed(seed + 1))
    keep = torch.arange(2 * rows)[:, None].expand(2 * rows, 3) < rows
    part = PrunedCodebooks(rows, rows, torch.cat([matrix, noise]), keep)
    assert torch.equal(part.weight(), matrix)
    assert torch.equal(part(torch.arange(rows)), matrix)


@settings(deadline=None)
@given(st.lists(st.integers(0, 22), min_size=1, max_size=12), st.integers(0, 2**31))
def test_gradients_reach_kept_entries_of_the_rows_that_are_read(slots, seed):
    part = books(kept=25)
    upstream = np.random.default_rng(seed).normal(size=(len(slots), 4)).astype(np.float32)
    (part(torch.tensor(slots)) * torch.from_numpy(upstream)).sum().backward()
    expected = np.zeros(part.books.shape, np.float32)
    for i, g in zip(slots, upstream, strict=True):
        expected[i % 6] += g
        expected[6 + i // 4] += g
    np.testing.assert_allclose(part.books.grad, np.where(part.keep, expected, 0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("storage", ["fp32", "int8"])
@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.95])
def test_sizes_are_exact_and_the_file_scores_the_same(clicks, model, sparsity, storage, tmp_path):
    small = compress(model, clicks, CERP(), f"sparsity={sparsity}", storage=storage, training=TRAINING)
    total = clicks.schema.rows * 4
    assert small.values == total - int(total * sparsity)
    (part,) = small.table.compositions
    assert bool((part.books[~part.keep] == 0).all())
    small.save(tmp_path / "x.safetensors")
    measured = pr.measure(tmp_path / "x.safetensors", clicks.valid, latency=False, predictions=True)
    expected = logits(small.model, clicks.valid)
    np.testing.assert_allclose(measured.logits, expected, atol=1e-5 if storage == "fp32" else 0.05)


@pytest.mark.parametrize("scope", ["block", "joint"])
def test_four_blocks_have_a_pair_each_or_one_per_column_range(visits, scope):
    model = NeuMF(dim=4, hidden=(8,)).build(visits, 0)
    training = Training(epochs=2, batch_size=64, weight_decay=0.0)
    small = compress(model, visits, CERP(scope=scope), "sparsity=0.5", training=training)
    assert len(small.table.compositions) == (4 if scope == "block" else 2)
    assert small.values == 70 * 8 // 2
    ids = torch.arange(70)
    assert torch.equal(small.table(ids), small.table.weight())


def test_users_count_once_in_the_regulariser(visits):
    model = NeuMF(dim=4, hidden=(8,)).build(visits, 0)
    draft = CERP().prepare(model, visits, Run(None)).table(Room(values=280))
    table = draft.with_parts([soft(part, eta=3.0) for part in draft.compositions], draft.weight().detach())
    ids = torch.tensor([[4, 31, 40], [4, 32, 40], [2, 31, 69]])
    weight = table.weight().detach()
    rows = [2, 4, 31, 32, 31, 40, 40, 69]
    assert float(table.penalty(ids, 1).detach()) == pytest.approx(
        -0.5 * float(torch.tanh(3 * weight[rows]).square().sum()), rel=1e-5
    )


@pytest.mark.delicate
def test_the_published_rule_overshoots_or_fails(clicks, model):
    slow = CERP(search=ThresholdSearch(stop="published", first=-100.0, rate=1e-3))
    with pytest.raises(BudgetError, match="search longer"):
        compress(model, clicks, slow, "sparsity=0.8", training=TRAINING)
    quick = CERP(search=ThresholdSearch(stop="published"), gamma=0.0)
    small = compress(model, clicks, quick, "sparsity=0.4", training=TRAINING)
    assert 0 < small.values <= clicks.schema.rows * 4 - int(clicks.schema.rows * 4 * 0.4)


def test_codebooks_imitate_whole_and_the_search_prunes_them_to_size(visits):
    part = books()
    whole = part.whole()
    assert whole.keep.all()
    assert whole.most == part.values() < whole.values()
    assert torch.equal(whole.books, part.books)
    backbone = LightGCN(dim=4, layers=2)
    teacher = train(backbone, visits, None, Training(epochs=2, batch_size=64, learning_rate=1e-2))
    run = Run(None)
    method = CERP(start=Start("taught", epochs=4, goal="final"), retrain=Retrain(values="found"))
    small = compress(teacher, visits, method, "sparsity=0.6", run=run, training=TRAINING)
    assert small.values == teacher.table.values() - math.ceil(0.6 * teacher.table.values())
    assert {entry["stage"] for entry in run.logged()} >= {"cerp-imitation", "search", "retrain"}


class Cut(Exception):
    """Where a process would be killed."""


def test_a_search_that_is_cut_short_goes_on_to_the_same_bytes(clicks, model, tmp_path):
    method, short = CERP(search=ThresholdSearch(checks=7)), {"training": TRAINING}
    expected = compress(model, clicks, method, "sparsity=0.8", **short).table.weight()
    for cut in (3, 29, 60):
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


@given(st.integers(1, 60), st.data())
def test_the_overlap_counts_coordinates_that_both_codebooks_fill(rows, data):
    bucket = data.draw(st.integers(1, rows))
    part = books(rows, bucket, 3, data.draw(st.integers(0, 3 * sum(codebook_rows(rows, bucket)))))
    share, keep, both, either = -(-rows // bucket), part.keep.tolist(), 0, 0
    for i in range(rows):
        for a, b in zip(keep[i % bucket], keep[bucket + i // share], strict=True):
            both, either = both + (a and b), either + (a or b)
    assert part.facts() == ({"overlap": both / either} if either else {})


def test_the_overlap_of_a_table_is_the_mean_of_its_blocks_by_rows(visits):
    model = NeuMF(dim=4, hidden=(8,)).build(visits, 0)
    small = compress(model, visits, CERP(), "sparsity=0.5", training=TRAINING)
    table, facts = small.model.table, small.model.table.facts()
    own = [part.facts()["overlap"] for part in table.compositions]
    assert len(own) > 1
    assert [facts[f"overlap {region.name}"] for region in table.regions] == own
    assert facts["overlap"] == pytest.approx(np.average(own, weights=[r.rows for r in table.regions]))
    assert all(0 <= value <= 1 for value in facts.values())
    assert NeuMF(dim=4, hidden=(8,)).build(visits, 0).table.facts() == {}


@pytest.mark.parametrize(
    "bad",
    [{"bucket": 0}, {"slack": 1.0}, {"gamma": -1.0}, {"eta": 0.0},
     {"operation": "mult"}, {"spread": "xavier"}],
)  # fmt: skip
def test_settings_out_of_range_are_named(bad):
    (name,) = bad
    with pytest.raises(ConfigError, match=f"`{name}` must"):
        CERP(**bad)
