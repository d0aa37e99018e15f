"""Cost of Shapley scoring at Criteo shape: Owen gradients against plain one-permutation scoring.

    python bench/scoring_speed.py

39 fields, 1.09 million rows of width 16 and a linear weight, MLP 400x3, Zipf(1.1) ids, random weights: the cost does
not depend on their values. All variants run in one process on one thread, interleaved over rounds; the least processor
time of each counts. The published way (one permutation of the 624 embedding entries per sample, each removal a full
forward pass of the head) costs the same in every step of its walk, so only some steps are run and the rest is
extrapolated. "plain" sets one coordinate per step and runs the head; "published imputer" also keeps a mask and fills
the vectors through it in every step, as the released code does.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

from pocketrec.attribution.estimators import Owen, Permutation, Stream
from pocketrec.attribution.games import ClickGame, Game
from pocketrec.attribution.lowered import LoweredHead, Precision
from pocketrec.attribution.samples import SampleBatch
from pocketrec.attribution.scores import ScoreSums, attribute
from pocketrec.format.program import Op, Program

FIELDS, ROWS, DIM, HIDDEN = 39, 1_086_810, 16, (400, 400, 400)
PLAYERS = FIELDS * DIM
RESULTS = Path(__file__).parent / "results"


def deepfm(rng: np.random.Generator) -> Program:
    """A DeepFM head of random weights."""
    ops = [
        Op("columns", ("vectors",), "e", {"start": 0, "stop": DIM}),
        Op("columns", ("vectors",), "w", {"start": DIM, "stop": DIM + 1}),
        Op("sum", ("w",), "linear"),
        Op("fm", ("e",), "fm"),
        Op("flatten", ("e",), "h0"),
    ]
    width = PLAYERS
    for i, size in enumerate((*HIDDEN, 1)):
        weight = rng.normal(0, (2 / width) ** 0.5, (size, width)).astype(np.float32)
        ops.append(Op("linear", (f"h{i}",), f"a{i}", {}, {"weight": weight, "bias": np.zeros(size, np.float32)}))
        ops.append(Op("relu", (f"a{i}",), f"h{i + 1}") if i < len(HIDDEN) else Op("sum", (f"a{i}",), "mlp"))
        width = size
    return Program((*ops, Op("add", ("linear", "fm", "mlp"), "logit")))


@dataclass(frozen=True)
class Clicks:
    """Zipf ids and random labels."""

    ids: Tensor
    labels: Tensor
    fields: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, start: int, stop: int, pass_index: int) -> SampleBatch:
        """See pocketrec.attribution.samples.Samples."""
        return SampleBatch(start, self.ids[start:stop], self.labels[start:stop])


def zipf_clicks(samples: int, rng: np.random.Generator) -> Clicks:
    """Ids of exponent 1.1 in each field."""
    sizes = np.full(FIELDS, ROWS // FIELDS)
    sizes[: ROWS - sizes.sum()] += 1
    offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    columns = []
    for size, offset in zip(sizes, offsets, strict=True):
        cumulative = np.cumsum(np.arange(1, size + 1) ** -1.1)
        columns.append(offset + np.searchsorted(cumulative, rng.random(samples) * cumulative[-1]))
    labels = torch.from_numpy((rng.random(samples) < 0.25).astype(np.float32))
    return Clicks(torch.from_numpy(np.stack(columns, axis=1)), labels, torch.arange(FIELDS))


def seconds_per_thousand_owen(
    head: LoweredHead, weight: Tensor, clicks: Clicks, batch_size: int, tally: ScoreSums
) -> float:
    """Look-up, one antithetic pair, scatter into both score tables."""
    game, estimator, stream = ClickGame(head), Owen(), Stream(0, "speed")
    placeholder = torch.zeros(FIELDS, DIM + 1)
    started = time.thread_time()
    for start in range(0, len(clicks), batch_size):
        batch = clicks.batch(start, start + batch_size, 0)
        vectors = torch.nn.functional.embedding(batch.rows, weight)
        tally.add(batch.rows, estimator.estimate(game, vectors, placeholder, batch.labels, stream, start))
    return (time.thread_time() - started) / len(clicks) * 1000


def seconds_per_thousand_walk(step: Callable[[int], None], steps: int, samples: int) -> float:
    """Time some steps of a walk over a batch; a whole walk has one step per embedding entry."""
    started = time.thread_time()
    for i in range(steps):
        step(i)
    return (time.thread_time() - started) / steps * PLAYERS / samples * 1000


def plain_step(
    game: Game, vectors: Tensor, labels: Tensor, order: Tensor, tables: ScoreSums, ids: Tensor
) -> Callable[[int], None]:
    """One removal per sample: set, run the head, scatter the difference."""
    walk = Game.walk(game, vectors, labels)
    last = [game.value(vectors, labels)]

    def step(i: int) -> None:
        player = order[:, i] // DIM * (DIM + 1) + order[:, i] % DIM
        value = walk(player, torch.zeros(len(vectors)))
        scatter(tables, ids, order[:, i], last[0] - value)
        last[0] = value

    return step


def imputer_step(
    game: Game, vectors: Tensor, labels: Tensor, order: Tensor, tables: ScoreSums, ids: Tensor
) -> Callable[[int], None]:
    """As the released code: a mask over all entries, and the vectors filled through it."""
    row = torch.arange(len(vectors))
    kept = torch.ones(len(vectors), FIELDS * (DIM + 1), dtype=torch.bool)
    fill = torch.zeros(FIELDS * (DIM + 1))
    last = [game.value(vectors, labels)]

    def step(i: int) -> None:
        kept[row, order[:, i] // DIM * (DIM + 1) + order[:, i] % DIM] = False
        imputed = vectors.flatten(1).clone()
        imputed[~kept] = fill.expand_as(imputed)[~kept]
        value = game.value(imputed.view_as(vectors), labels)
        scatter(tables, ids, order[:, i], last[0] - value)
        last[0] = value

    return step


def scatter(tables: ScoreSums, ids: Tensor, player: Tensor, delta: Tensor) -> None:
    """Add one value per sample to its entry of both score tables."""
    index = ids[torch.arange(len(ids)), player // DIM] * (DIM + 1) + player % DIM
    tables.total.view(-1).index_add_(0, index, delta)
    tables.square.view(-1).index_add_(0, index, delta * delta)


def main() -> None:
    """Measure and write bench/results/scoring_speed.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8, help="steps of a walk that are run")
    parser.add_argument("--samples", type=int, default=8192, help="samples per round of owen")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    rng = np.random.default_rng(0)
    program, clicks = deepfm(rng), zipf_clicks(args.samples, rng)
    weight = torch.from_numpy(rng.normal(0, 0.1, (ROWS, DIM + 1)).astype(np.float32))
    tally = ScoreSums((ROWS, DIM + 1), None)
    order = Stream(0, "order").orders(0, args.samples, PLAYERS)
    heads: dict[Precision, LoweredHead] = {"fp32": LoweredHead.of(program), "bf16": LoweredHead.of(program, "bf16")}
    process = psutil.Process()
    base = process.memory_info().rss

    variants: dict[str, Callable[[], float]] = {}
    for batch in (1024, 8192):
        part = clicks.batch(0, batch, 0)
        vectors = torch.nn.functional.embedding(part.rows, weight)
        for name, make in (("plain", plain_step), ("published imputer", imputer_step)):
            step = make(ClickGame(heads["fp32"]), vectors, part.labels, order[:batch], tally, part.rows)
            variants[f"{name}, one permutation, fp32, batch {batch}"] = lambda step=step, batch=batch: (
                seconds_per_thousand_walk(step, args.steps, batch)
            )
    for precision, head in heads.items():
        for batch in (256, 512, 1024):
            variants[f"owen, one antithetic pair, {precision}, batch {batch}"] = lambda head=head, batch=batch: (
                seconds_per_thousand_owen(head, weight, clicks, batch, tally)
            )
    best = dict.fromkeys(variants, float("inf"))
    for _ in range(args.rounds):
        for name, run in variants.items():
            best[name] = min(best[name], run())
    walk_started = time.thread_time()
    some = clicks.batch(0, 256, 0)
    Permutation(antithetic=False).estimate(
        ClickGame(heads["fp32"]), torch.nn.functional.embedding(some.rows, weight), torch.zeros(FIELDS, DIM + 1),
        some.labels, Stream(0, "walk"), 0,
    )  # fmt: skip
    best["own oracle: permutation, incremental, fp32, batch 256"] = (time.thread_time() - walk_started) / 256 * 1000
    scores = attribute(ClickGame(heads["bf16"]), weight, torch.zeros(FIELDS, DIM + 1), clicks, Owen())
    write(best, scores.mean.nbytes, base, process.memory_info().rss, peak_rss())


def peak_rss() -> int:
    """High-water mark of the process, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def write(best: dict[str, float], table: int, base: int, after: int, peak: int) -> None:
    """Ratios against the better batch size of each baseline."""
    plain = min(s for n, s in best.items() if n.startswith("plain"))
    published = min(s for n, s in best.items() if n.startswith("published"))
    lines = [
        "# Cost of Shapley scoring",
        "",
        "`python bench/scoring_speed.py`: 39 fields, 1,086,810 rows of 16 + 1, MLP 400x3, Zipf(1.1) ids, one thread,",
        "all variants interleaved in one process; least processor time. Walks are timed on some of 624 equal steps",
        "and extrapolated.",
        "",
        f"torch {torch.__version__}, {platform.machine()}, load average {psutil.getloadavg()[0]:.1f}.",
        "",
        "| variant | CPU s per 1,000 samples | against plain | against published imputer |",
        "|---|---|---|---|",
        *(f"| {n} | {s:.4f} | {plain / s:.1f} | {published / s:.1f} |" for n, s in best.items()),
        "",
        f"Memory: {base / 2**20:,.0f} MiB with torch, data, table, both score tables ({table / 2**20:,.0f} MiB each); "
        f"{after / 2**20:,.0f} MiB after scoring; peak {peak / 2**20:,.0f} MiB, which includes the batches of 8,192 of "
        "the baselines and a second pair of score tables for the run through `attribute`.",
        "",
    ]
    (RESULTS / "scoring_speed.md").write_text("\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
