"""The permutation estimator against exact Shapley values, on games that can be enumerated.

    python bench/shapley_brute_force.py

200 seeded games, each one sample of a small DeepFM with 4 to 12 players: all coalitions are evaluated (exact), and the
estimator of the package draws single permutations, at least 4,000 per game. Per player, z is the error of the mean
in standard errors; under an unbiased estimator 99.7 % of |z| lie below 3. Owen gradients are reported beside it: with
so few, so large players they are biased, as their documentation says.
"""

from __future__ import annotations

import csv
import time
from math import comb
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pocketrec.attribution.estimators import Estimator, Owen, Permutation, Stream
from pocketrec.attribution.games import ClickGame
from pocketrec.attribution.lowered import LoweredHead
from pocketrec.format.program import Op, Program

GAMES, DRAWS, SEED = 200, 4096, 0
SHAPES = ((2, 1), (3, 1), (2, 2), (3, 2), (2, 3), (4, 2), (3, 3), (5, 1), (6, 1), (2, 5), (4, 1))
"""(fields, embedding width); a linear weight per field is a player, too."""
RESULTS = Path(__file__).parent / "results"


def deepfm(fields: int, dim: int, rng: np.random.Generator) -> Program:
    """A random DeepFM with two hidden layers."""
    ops = [
        Op("columns", ("vectors",), "e", {"start": 0, "stop": dim}),
        Op("columns", ("vectors",), "w", {"start": dim, "stop": dim + 1}),
        Op("sum", ("w",), "linear", tensors={"bias": np.array(rng.normal(), np.float32)}),
        Op("fm", ("e",), "fm"),
        Op("flatten", ("e",), "h0"),
    ]
    width = fields * dim
    for i, size in enumerate((8, 6, 1)):
        weight = rng.normal(0, (2 / width) ** 0.5, (size, width)).astype(np.float32)
        bias = rng.normal(0, 0.2, size).astype(np.float32)
        ops.append(Op("linear", (f"h{i}",), f"a{i}", {}, {"weight": weight, "bias": bias}))
        ops.append(Op("relu", (f"a{i}",), f"h{i + 1}") if i < 2 else Op("sum", (f"a{i}",), "mlp"))
        width = size
    return Program((*ops, Op("add", ("linear", "fm", "mlp"), "logit")))


def exact(game: ClickGame, vectors: Tensor, placeholder: Tensor, label: Tensor) -> np.ndarray:
    """Shapley values by enumeration: ``sum_S |S|! (P - |S| - 1)! / P! (v(S + i) - v(S))``."""
    players = placeholder.numel()
    codes = np.arange(2**players)
    inside = (codes[:, None] >> np.arange(players)) & 1 == 1
    points = torch.where(torch.from_numpy(inside), vectors.flatten(), placeholder.flatten())
    values = game.value(points.view(-1, *placeholder.shape), label.expand(len(points))).double().numpy()
    size = inside.sum(axis=1)
    share = np.array([1 / (players * comb(players - 1, s)) for s in range(players)])
    result = np.empty(players)
    for player in range(players):
        without = codes[~inside[:, player]]
        result[player] = (share[size[without]] * (values[without | 1 << player] - values[without])).sum()
    return result


def z_values(estimator: Estimator, game: ClickGame, vectors: Tensor, c: Tensor, label: Tensor, seed: int) -> np.ndarray:
    """Errors of the mean over the draws, in standard errors, and the truth."""
    many = vectors.expand(DRAWS, *c.shape)
    values = estimator.estimate(game, many, c, label.expand(DRAWS), Stream(seed, "brute force"), 0)
    draws = values.flatten(1).double().numpy()
    error = draws.std(axis=0, ddof=1) / DRAWS**0.5
    return (draws.mean(axis=0) - exact(game, vectors, c, label)) / np.maximum(error, 1e-9)


def main() -> None:
    """Play the games and write bench/results/shapley_brute_force.{md,csv}."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    started, rows = time.perf_counter(), []
    efficiency = 0.0
    for index in range(GAMES):
        rng = np.random.default_rng([SEED, index])
        fields, dim = SHAPES[index % len(SHAPES)]
        game = ClickGame(LoweredHead.of(deepfm(fields, dim, rng)))
        vectors = torch.from_numpy(rng.normal(size=(1, fields, dim + 1)).astype(np.float32))
        c = torch.from_numpy(rng.normal(0, 0.3, (fields, dim + 1)).astype(np.float32))
        label = torch.tensor([float(index % 2)])
        one = Permutation().estimate(game, vectors, c, label, Stream(index, "efficiency"), 0).sum()
        drop = game.value(vectors, label) - game.value(c[None], label)
        efficiency = max(efficiency, abs(float(one - drop)))
        permutation = z_values(Permutation(antithetic=False), game, vectors, c, label, index)
        owen = z_values(Owen(), game, vectors, c, label, index)
        rows += [
            (index, fields * (dim + 1), player, float(p), float(o))
            for player, (p, o) in enumerate(zip(permutation, owen, strict=True))
        ]
    with (RESULTS / "shapley_brute_force.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["game", "players", "player", "z_permutation", "z_owen"])
        table.writerows((g, n, i, f"{p:.4f}", f"{o:.4f}") for g, n, i, p, o in rows)
    z = np.array([r[3] for r in rows])
    lines = [
        "# Shapley values against brute force",
        "",
        f"`python bench/shapley_brute_force.py`: {GAMES} games of up to {max(r[1] for r in rows)} players, {DRAWS:,} "
        f"permutations each, {len(rows):,} player z-values, {time.perf_counter() - started:.0f} s.",
        "",
        "| | permutation | a standard normal |",
        "|---|---|---|",
        f"| share of abs(z) < 3 | {(abs(z) < 3).mean():.4f} | 0.9973 |",
        f"| share of abs(z) < 2 | {(abs(z) < 2).mean():.4f} | 0.9545 |",
        f"| mean, standard deviation of z | {z.mean():.3f}, {z.std():.3f} | 0, 1 |",
        f"| largest abs(z) | {abs(z).max():.2f} | |",
        "",
        f"Efficiency: sum of values minus (loss(empty) - loss(full)), largest over games: {efficiency:.1e}.",
        f"Owen gradients on the same games (few, large players; an approximation here): abs(z) < 3 for "
        f"{np.mean([abs(r[4]) < 3 for r in rows]):.3f}.",
        "",
    ]
    (RESULTS / "shapley_brute_force.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
