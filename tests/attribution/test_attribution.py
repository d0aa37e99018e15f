"""Shapley estimators against exact enumeration, closed forms and the axioms."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import comb

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from pocketrec.attribution.estimators import LevelSampling, Owen, Permutation, Stream
from pocketrec.attribution.games import ClickGame, Game, RankingGame
from pocketrec.attribution.lowered import LoweredHead
from pocketrec.attribution.samples import SampleBatch
from pocketrec.attribution.scores import Scoring, attribute
from pocketrec.errors import ConfigError, DivergedError, UnsupportedOp
from pocketrec.format.program import Op, Program


def deepfm(fields: int, dim: int, hidden: tuple[int, ...], seed: int, scale: float = 0.7) -> Program:
    """A small random DeepFM with linear weights in the last column."""
    rng = np.random.default_rng(seed)
    ops = [
        Op("columns", ("vectors",), "e", {"start": 0, "stop": dim}),
        Op("columns", ("vectors",), "w", {"start": dim, "stop": dim + 1}),
        Op("sum", ("w",), "linear", tensors={"bias": np.array(0.1, np.float32)}),
        Op("fm", ("e",), "fm"),
        Op("flatten", ("e",), "h0"),
    ]
    width, last = fields * dim, "h0"
    for i, size in enumerate((*hidden, 1)):
        weight = rng.normal(0, scale * (2 / width) ** 0.5, (size, width)).astype(np.float32)
        bias = rng.normal(0, 0.1, size).astype(np.float32)
        ops.append(Op("linear", (last,), f"a{i}", {}, {"weight": weight, "bias": bias}))
        last, width = f"a{i}", size
        if i < len(hidden):
            ops.append(Op("relu", (last,), f"h{i + 1}"))
            last = f"h{i + 1}"
    ops += [Op("sum", (last,), "mlp"), Op("add", ("linear", "fm", "mlp"), "logit")]
    return Program(tuple(ops))


DOT = Program((Op("dot", ("vectors",), "score"),))
FM = Program((Op("fm", ("vectors",), "logit"),))


@dataclass(frozen=True)
class LogitGame(Game):
    """The logit itself: linear or multilinear wherever the head is."""

    head: LoweredHead

    def value(self, vectors: Tensor, labels: Tensor) -> Tensor:
        return self.head.logits(vectors)

    def gradient(self, vectors: Tensor, labels: Tensor) -> Tensor:
        self.head.logits(vectors)
        return self.head.pull(torch.ones(len(vectors)))


@dataclass(frozen=True)
class Rows:
    """Click samples held in memory."""

    ids: Tensor
    targets: Tensor

    @property
    def fields(self) -> Tensor:
        return torch.arange(self.ids.shape[1])

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, start: int, stop: int, pass_index: int) -> SampleBatch:
        return SampleBatch(pass_index * len(self) + start, self.ids[start:stop], self.targets[start:stop])


def exact(game: Game, vectors: Tensor, placeholder: Tensor, labels: Tensor) -> Tensor:
    """Shapley values by enumeration of all coalitions: ``(B, P, D)``."""
    players = placeholder.numel()
    coalitions = torch.tensor(list(product((False, True), repeat=players)))
    result = torch.zeros(len(vectors), players, dtype=torch.float64)
    size = coalitions.sum(1)
    weight = torch.tensor([1.0 / (players * comb(players - 1, s)) for s in range(players)], dtype=torch.float64)
    code = (coalitions.long() * 2 ** torch.arange(players - 1, -1, -1)).sum(1)
    for b in range(len(vectors)):
        points = torch.where(coalitions, vectors[b].flatten(), placeholder.flatten())
        values = game.value(points.view(-1, *placeholder.shape), labels[b].expand(len(points))).double()
        for p in range(players):
            without = code[~coalitions[:, p]]
            gain = values[without + 2 ** (players - 1 - p)] - values[without]
            result[b, p] = (gain * weight[size[without]]).sum()
    return result.view(len(vectors), *placeholder.shape)


def vectors(seed: int, *shape: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


@pytest.mark.parametrize("program", [deepfm(4, 3, (8, 5), 0), deepfm(3, 2, (6,), 1)])
def test_head_equals_numpy_program_and_autograd(program: Program) -> None:
    fields, dim = (4, 3) if program.ops[0].attributes["stop"] == 3 else (3, 2)
    x = vectors(2, 16, fields, dim + 1)
    head = LoweredHead.of(program)
    logits = head.logits(x)
    np.testing.assert_allclose(logits.numpy(), program(x.numpy()), rtol=2e-5, atol=2e-6)
    slope = vectors(3, 16)
    point = x.clone().requires_grad_()
    expected = torch.autograd.grad(LoweredHead.of(program).logits(point), point, slope)[0]
    torch.testing.assert_close(head.pull(slope), expected, rtol=1e-5, atol=1e-6)


def test_head_of_dot_and_fm_equals_autograd() -> None:
    for program, fields in ((DOT, 2), (FM, 5)):
        x, slope = vectors(4, 8, fields, 3), vectors(5, 8)
        head = LoweredHead.of(program)
        head.logits(x)
        point = x.clone().requires_grad_()
        expected = torch.autograd.grad(LoweredHead.of(program).logits(point), point, slope)[0]
        torch.testing.assert_close(head.pull(slope), expected)


@pytest.mark.delicate
def test_bf16_head_is_near_fp32() -> None:
    program = deepfm(6, 4, (32, 32), 6)
    x = vectors(7, 256, 6, 5)
    full, half = LoweredHead.of(program), LoweredHead.of(program, "bf16")
    assert torch.corrcoef(torch.stack((full.logits(x), half.logits(x))))[0, 1] > 0.999
    slope = torch.ones(256)
    pair = torch.stack((full.pull(slope).flatten(), half.pull(slope).flatten()))
    assert torch.corrcoef(pair)[0, 1] > 0.99


def test_op_without_gradient_is_a_typed_error() -> None:
    head = LoweredHead.of(Program((Op("future", ("vectors",), "logit"),)))
    with pytest.raises(UnsupportedOp, match="future"):
        head.logits(vectors(0, 2, 2, 2))


@pytest.mark.parametrize("program", [deepfm(4, 3, (8, 5), 8), deepfm(4, 3, (), 9), FM])
def test_incremental_walk_equals_plain_walk(program: Program) -> None:
    width = 3 if program is FM else 4
    x, c = vectors(10, 12, 4, width), vectors(11, 4, width)
    labels = (vectors(12, 12) > 0).float()
    game = ClickGame(LoweredHead.of(program))
    stream = Stream(0, "walk")
    fast = Permutation().estimate(game, x, c, labels, stream, 0)

    class Plain(ClickGame):
        walk = Game.walk

    slow = Permutation().estimate(Plain(LoweredHead.of(program)), x, c, labels, stream, 0)
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=2e-6)


def test_permutation_telescopes_per_sample_and_in_total() -> None:
    x, c = vectors(13, 64, 6, 5), vectors(14, 6, 5) * 0.2
    labels = (vectors(15, 64) > 0).float()
    game = ClickGame(LoweredHead.of(deepfm(6, 4, (16, 16), 16)))
    phi = Permutation(walks=2).estimate(game, x, c, labels, Stream(1, "t"), 0)
    drop = game.value(x, labels) - game.value(c.expand_as(x), labels)
    torch.testing.assert_close(phi.sum(dim=(1, 2)), drop, rtol=1e-5, atol=1e-5)
    assert abs(phi.sum().item() - drop.sum().item()) < 1e-5 * abs(drop.sum().item()) + 1e-5


@pytest.mark.parametrize("estimator", [Owen(2), Owen(1, "centre"), Owen(1, "anchored"), Permutation()])
def test_null_players_get_nothing(estimator: Owen | Permutation) -> None:
    x, c = vectors(17, 8, 4, 4), vectors(18, 4, 4)
    x[:, 1, 2] = c[1, 2]
    x[:, 3] = c[3]
    game = ClickGame(LoweredHead.of(deepfm(4, 3, (8,), 19)))
    phi = estimator.estimate(game, x, c, torch.ones(8), Stream(2, "n"), 0)
    assert phi[:, 1, 2].abs().max() < 1e-6
    assert phi[:, 3].abs().max() < 1e-6
    assert phi[:, 0].abs().min() > 0


@pytest.mark.parametrize("estimator", [Owen(), Owen(1, "centre"), Owen(1, "anchored"), Permutation(antithetic=False)])
def test_linear_head_is_exact_in_one_draw(estimator: Owen | Permutation) -> None:
    weight = vectors(20, 1, 12)
    program = Program(
        (
            Op("flatten", ("vectors",), "x"),
            Op("linear", ("x",), "y", {}, {"weight": weight.numpy(), "bias": np.zeros(1, np.float32)}),
            Op("sum", ("y",), "logit"),
        )
    )
    x, c = vectors(21, 5, 4, 3), vectors(22, 4, 3)
    phi = estimator.estimate(LogitGame(LoweredHead.of(program)), x, c, torch.ones(5), Stream(3, "l"), 0)
    torch.testing.assert_close(phi, weight.view(4, 3) * (x - c), rtol=1e-5, atol=1e-5)


class ProductGame(Game):
    """Worth: the product of all scalars plus that of the first three; multilinear of the highest degree there is."""

    def value(self, vectors: Tensor, labels: Tensor) -> Tensor:
        flat = vectors.flatten(1)
        return flat.prod(dim=1) + flat[:, :3].prod(dim=1)

    def gradient(self, vectors: Tensor, labels: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = vectors.detach().requires_grad_()
            return torch.autograd.grad(self.value(leaf, labels).sum(), leaf)[0]


@pytest.mark.parametrize(
    ("game", "shape", "levels"),
    [
        (LogitGame(LoweredHead.of(FM)), (4, 2), "uniform"),
        (LogitGame(LoweredHead.of(FM)), (4, 2), "centre"),
        (LogitGame(LoweredHead.of(DOT)), (2, 4), "uniform"),
        (LogitGame(LoweredHead.of(DOT)), (2, 4), "centre"),
        (ProductGame(), (2, 3), "uniform"),
    ],
)
def test_owen_is_exact_in_expectation_on_multilinear_heads(
    game: Game, shape: tuple[int, int], levels: LevelSampling
) -> None:
    x, c = vectors(23, 1, *shape), vectors(24, *shape)
    truth = exact(game, x, c, torch.ones(1))
    draws = Owen(1, levels).estimate(game, x.expand(20000, *shape), c, torch.ones(20000), Stream(4, "o"), 0).double()
    error = draws.std(dim=0) / 20000**0.5
    assert ((draws.mean(dim=0) - truth[0]).abs() < 4 * error + 1e-5).all()


def test_permutation_equals_enumeration_on_eight_players() -> None:
    x, c = vectors(25, 1, 2, 4), vectors(26, 2, 4)
    game = ClickGame(LoweredHead.of(deepfm(2, 3, (6,), 27)))
    truth = exact(game, x, c, torch.ones(1))
    draws = Permutation().estimate(game, x.expand(8000, 2, 4), c, torch.ones(8000), Stream(5, "b"), 0).double()
    error = draws.std(dim=0) / 8000**0.5
    assert ((draws.mean(dim=0) - truth[0]).abs() < 4 * error).all()


def test_ranking_game_is_bpr_of_two_pairs() -> None:
    x = vectors(28, 9, 3, 4).requires_grad_()
    user, positive, negative = x.unbind(1)
    margin = (user * positive).sum(-1) - (user * negative).sum(-1)
    loss = functional.softplus(-margin)
    game = RankingGame(LoweredHead.of(DOT))
    torch.testing.assert_close(game.value(x.detach(), torch.ones(9)), -loss.detach())
    expected = -torch.autograd.grad(loss.sum(), x)[0]
    torch.testing.assert_close(game.gradient(x.detach(), torch.ones(9)), expected)


def test_ranking_game_walks_telescope() -> None:
    x, c = vectors(29, 7, 3, 4), torch.zeros(3, 4)
    game = RankingGame(LoweredHead.of(DOT))
    phi = Permutation().estimate(game, x, c, torch.ones(7), Stream(6, "r"), 0)
    drop = game.value(x, torch.ones(7)) - game.value(c.expand_as(x), torch.ones(7))
    torch.testing.assert_close(phi.sum(dim=(1, 2)), drop, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("game_type", [ClickGame, RankingGame])
def test_pair_is_the_sum_of_two_gradients(game_type: type[ClickGame] | type[RankingGame]) -> None:
    program, shape = (DOT, (3, 4)) if game_type is RankingGame else (deepfm(4, 3, (8, 5), 34), (4, 4))
    centre, offset, labels = vectors(35, 9, *shape), vectors(36, 9, *shape), (vectors(37, 9) > 0).float()
    game = game_type(LoweredHead.of(program))
    expected = game.gradient(centre + offset, labels) + game.gradient(centre - offset, labels)
    torch.testing.assert_close(game.pair(centre, offset, labels), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.delicate
@pytest.mark.parametrize("levels", ["uniform", "centre", "anchored"])
def test_owen_is_nearer_to_the_truth_with_more_pairs(levels: LevelSampling) -> None:
    x, c = vectors(38, 24, 3, 4), vectors(39, 3, 4)
    labels = (vectors(40, 24) > 0).float()
    game = ClickGame(LoweredHead.of(deepfm(3, 3, (6,), 41)))
    truth = exact(game, x, c, labels)
    errors = [
        (Owen(pairs, levels).estimate(game, x, c, labels, Stream(7, "m"), 0) - truth).square().mean()
        for pairs in (1, 16, 256)
    ]
    assert errors[0] > 2 * errors[1]
    assert errors[2] < 0.1 * truth.square().mean()


@given(st.integers(0, 2**32), st.integers(0, 10**9), st.integers(1, 40), st.integers(1, 50))
def test_stream_does_not_depend_on_the_partition(seed: int, position: int, samples: int, count: int) -> None:
    stream = Stream(seed, "p")
    whole = stream.words(position, samples, count)
    cut = samples // 2
    parts = (stream.words(position, cut, count), stream.words(position + cut, samples - cut, count))
    np.testing.assert_array_equal(whole, np.concatenate(parts))


def click_problem(samples: int = 700) -> tuple[ClickGame, Tensor, Tensor, Rows]:
    rng = np.random.default_rng(30)
    ids = torch.from_numpy(rng.integers(0, 10, (samples, 4)) + 10 * np.arange(4))
    labels = torch.from_numpy(rng.integers(0, 2, samples).astype(np.float32))
    return ClickGame(LoweredHead.of(deepfm(4, 3, (8,), 31))), vectors(32, 45, 4), vectors(33, 4, 4), Rows(ids, labels)


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 900))
def test_batch_size_changes_rounding_only(batch_size: int) -> None:
    game, weight, fill, rows = click_problem()
    whole = attribute(game, weight, fill, rows, Owen(), batch_size=700)
    parts = attribute(game, weight, fill, rows, Owen(), batch_size=batch_size)
    np.testing.assert_allclose(parts.mean, whole.mean, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(parts.square, whole.square, rtol=1e-4, atol=1e-6)


@pytest.mark.delicate
def test_scores_add_up_and_unseen_rows_score_zero() -> None:
    game, weight, fill, rows = click_problem()
    scores = attribute(game, weight, fill, rows, Permutation(), batch_size=1000)
    e = weight[rows.ids]
    drop = game.value(e, rows.targets) - game.value(fill.expand_as(e), rows.targets)
    assert scores.mean.sum() == pytest.approx(drop.mean().item(), rel=1e-3)
    assert abs(scores.gap) < 1e-3
    assert not scores.mean[40:].any()
    assert (scores.square >= scores.mean**2 * 0.99).all()


def test_owen_reports_its_gap() -> None:
    game, weight, fill, rows = click_problem()
    scores = attribute(game, weight, fill, rows, Owen(pairs=8), batch_size=1000)
    assert scores.gap == pytest.approx((scores.explained - scores.drop) / abs(scores.drop))
    assert abs(scores.gap) > 0
    anchored = attribute(game, weight, fill, rows, Owen(8, "anchored"), batch_size=1000)
    assert anchored.explained == pytest.approx(anchored.drop, abs=1e-5)


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 20), st.sampled_from([16, 50, 900]), st.sampled_from([Owen(), Permutation()]))
def test_shards_add_up_to_the_whole_within_rounding(
    shards: int, batch_size: int, estimator: Owen | Permutation
) -> None:
    game, weight, fill, rows = click_problem(130)
    scoring = Scoring(game, weight, fill, rows, estimator, batch_size=batch_size)
    whole = scoring.scores(passes=2, tolerance=0.0)
    merged = scoring.merged(lambda p: [scoring.shard(p, i, shards).arrays() for i in range(shards)], 2, 0.0)
    assert merged.samples == whole.samples == 260
    assert (merged.explained, merged.drop) == pytest.approx((whole.explained, whole.drop), rel=1e-12)
    terms = 2 * np.bincount(rows.ids.ravel(), minlength=len(weight))[:, None]
    largest = np.sqrt(terms * 260 * whole.square.astype(np.float64)) / 260
    rounding = 2 * terms * np.finfo(np.float32).eps
    assert (np.abs(merged.mean - whole.mean) <= rounding * largest).all()
    assert (np.abs(merged.square - whole.square) <= rounding * whole.square).all()


def test_a_shard_that_was_cut_short_ends_with_the_same_bytes() -> None:
    game, weight, fill, rows = click_problem()
    scoring = Scoring(game, weight, fill, rows, Owen(), batch_size=50)
    whole = scoring.shard(1, 2, 3)
    memory = Memory(3)
    with pytest.raises(KeyboardInterrupt):
        scoring.shard(1, 2, 3, memory)
    again = scoring.shard(1, 2, 3, memory)
    assert whole.samples == 250
    for name, array in whole.arrays().items():
        assert array.tobytes() == again.arrays()[name].tobytes()


class Memory:
    """A checkpoint that dies after some saves."""

    def __init__(self, lives: int) -> None:
        self.lives = lives
        self.state: dict[str, np.ndarray] | None = None

    def due(self) -> bool:
        return True

    def load(self) -> dict[str, np.ndarray] | None:
        return self.state

    def save(self, arrays: dict[str, np.ndarray]) -> None:
        self.state = {k: v.copy() for k, v in arrays.items()}
        self.lives -= 1
        if self.lives == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("lives", [1, 6, 7, 8, 14])
def test_interrupted_scoring_ends_with_the_same_bytes(lives: int) -> None:
    game, weight, fill, rows = click_problem()
    settings = {"batch_size": 100, "passes": 2, "tolerance": 0.0}
    whole = attribute(game, weight, fill, rows, Owen(), **settings)
    memory = Memory(lives)
    with pytest.raises(KeyboardInterrupt):
        attribute(game, weight, fill, rows, Owen(), checkpoint=memory, **settings)
    again = attribute(game, weight, fill, rows, Owen(), checkpoint=memory, **settings)
    assert whole.samples == again.samples == 1400
    for name, array in whole.arrays().items():
        assert array.tobytes() == again.arrays()[name].tobytes()


def test_stop_rule_ends_after_a_full_pass() -> None:
    game, weight, fill, rows = click_problem()
    assert attribute(game, weight, fill, rows, Owen(), passes=50, tolerance=1e9).samples == 700
    assert attribute(game, weight, fill, rows, Owen(), passes=3, tolerance=0.0).samples == 2100


def test_not_a_number_is_a_divergence() -> None:
    game, weight, fill, rows = click_problem()
    weight[3, 1] = float("nan")
    with pytest.raises(DivergedError, match="finite"):
        attribute(game, weight, fill, rows, Owen())


def test_bad_settings_are_named() -> None:
    with pytest.raises(ConfigError, match="pairs=0"):
        Owen(pairs=0)
    with pytest.raises(ConfigError, match="walks=-1"):
        Permutation(walks=-1)
