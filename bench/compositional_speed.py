"""Look-ups of compositional tables at Criteo's shape, the plain way and ours; and a training step of each method.

Run from the repository's root: ``OMP_NUM_THREADS=1 python bench/compositional_speed.py`` (MovieLens-1M in the folder
that ``POCKETREC_DATA`` names). One thread, one process, readers in rotation, fresh batches of Zipf(1.1) ids; processor
time of the thread. Look-ups need no gradient.

- TT-Rec, ranks (128, 96): *plain* gathers a slice of each core for every id and multiplies them; *numpy* is what reads
  a file; *ours* multiplies the first two cores out once, for all ids, and takes each distinct id once.
- DHE, 1,024 hashes and layers 512-256-16: *plain* hashes every id with int64 remainders and runs the network on it;
  *ours* takes each distinct id once, with all codes, or with the vectors of the 5 % most frequent rows, in memory.
- QR, divisor 5: two gathers and a product; there is nothing to gain.

A training step is loss, backward and update on one batch of 2,048 rows of MovieLens-1M with DeepFM at sparsity 0.8, as
the training loop does it. Writes ``bench/results/compositional_speed.md``.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from configs import ML_1M, ML_1M_TRAINING, RESULTS, ml_1m
from criteo_shape import FIELDS, ROWS, WIDTH, CriteoShape
from torch import Tensor
from torch.nn import functional as F

from pocketrec.compression.budget import Room
from pocketrec.compression.ladder import Method
from pocketrec.data.dataset import Dataset
from pocketrec.families.compositional.hash_network import HashNetwork, NetworkPlan
from pocketrec.families.compositional.table import Composition
from pocketrec.families.compositional.tensor_train import TensorTrain, TrainPlan
from pocketrec.families.retraining import MaskedTable
from pocketrec.format.block import PackedRange
from pocketrec.format.layouts.hash_mlp import constants
from pocketrec.format.packed import Packed
from pocketrec.methods.cerp import CERP
from pocketrec.methods.dhe import DHE
from pocketrec.methods.mag_prune import MagPrune
from pocketrec.methods.opt_embed import OptEmbed
from pocketrec.methods.opt_embed_d import OptEmbedD
from pocketrec.methods.pep import PEP
from pocketrec.methods.qr import QR, QRPlan
from pocketrec.methods.tt_rec import TTRec
from pocketrec.models.backbone import Model, noise
from pocketrec.models.table import Lookup
from pocketrec.training.hooks import LearningTable
from pocketrec.training.optim import DenseAdam
from pocketrec.training.run import M, Run

BATCHES = (64, 2048)
PLAIN_IDS = 1024
"""Ids that the plain ways take at a time: a slice of a core for each of 80,000 ids is 8 GB."""

HOT_SHARE = 0.05
Reader = Callable[[Tensor], Any]


def plain_tt(part: TensorTrain) -> Reader:
    """Per id, the product of one slice of each core."""

    def read(slots: Tensor) -> Tensor:
        vectors = []
        for ids in slots.split(PLAIN_IDS):
            digits = np.unravel_index(ids.numpy(), part.plan.rows)
            product = torch.ones(len(ids), 1, 1)
            ranks = (1, *part.plan.ranks, 1)
            for k, (core, digit) in enumerate(zip(part.cores, digits, strict=True)):
                piece = core[torch.from_numpy(digit)].view(len(ids), ranks[k], -1)
                product = torch.bmm(product, piece).view(len(ids), -1, ranks[k + 1])
            vectors.append(product.view(len(ids), WIDTH))
        return torch.cat(vectors)

    return read


def plain_dhe(part: HashNetwork) -> Reader:
    """Per id, all hashes in int64, then the network."""
    plan = part.plan
    a, b, p = (torch.from_numpy(c) for c in constants(plan.widths[0], plan.buckets, plan.salt))

    def read(slots: Tensor) -> Tensor:
        vectors = []
        for ids in slots.split(PLAIN_IDS):
            x = 2 * ((((ids + 1)[:, None] * a + b) % p) % plan.buckets) / (plan.buckets - 1) - 1
            for i, (weight, bias) in enumerate(zip(part.weights, part.biases, strict=True)):
                x = F.linear(x, weight, bias)
                if i < len(part.norms):
                    x = F.mish(part._normalise(x, part.norms[i]))  # pyright: ignore
            vectors.append(x)
        return torch.cat(vectors)

    return read


def from_file(part: Composition) -> Reader:
    """The numpy reference, as it reads a file."""
    zeros = np.zeros((1, WIDTH), np.float32)
    packed = Packed(ROWS, (part.pack(PackedRange("embedding", 0, ROWS, 0, WIDTH), "fp32", None),), zeros, zeros)
    field = np.zeros(1, np.int32)
    return lambda slots: torch.from_numpy(packed.lookup(slots.numpy()[:, None], field)[:, 0])


def readers(shape: CriteoShape) -> dict[str, dict[str, Reader]]:
    """Ways to look up, by method; the plain one, the base of the ratios, first."""
    source = noise(0, "bench")
    tt = TrainPlan(ROWS, (125, 125, 128), (2, 2, 4), (128, 96)).build(source)
    plan = NetworkPlan(ROWS, (1024, 512, 256, WIDTH), 1_000_000, "uniform", "before", "linear", 1)
    frequent = [rows[: max(1, int(HOT_SHARE * len(rows)))] for rows in shape.order]
    dhe, hot = plan.build(source), replace(plan, hot=np.sort(np.concatenate(frequent))).build(noise(0, "bench"))
    hot.load_state_dict(dhe.state_dict())
    dense = torch.nn.Embedding.from_pretrained(torch.from_numpy(shape.weight[:, :WIDTH].copy()))
    qr = QRPlan(ROWS, WIDTH, 5).build(source)
    return {
        "TT-Rec": {"plain": plain_tt(tt), "numpy, from a file": from_file(tt), "ours": tt},
        "DHE": {
            "plain": plain_dhe(dhe), "ours": dhe, "ours, 5 % hot": hot,
            "numpy, from a file": from_file(dhe), "numpy, from a file, 5 % hot": from_file(hot),
        },
        "QR": {"dense table": dense, "ours": qr},
    }  # fmt: skip


def rows_of(samples: list[float], base: list[float] | None) -> dict[str, Any]:
    """Median, spread, and the ratio of medians."""
    low, median, high = np.percentile(samples, [10, 50, 90])
    ratio = 1.0 if base is None else float(np.median(base)) / median
    return {"median_us": round(median, 1), "p10_us": round(low, 1), "p90_us": round(high, 1),
            "ratio": round(ratio, 2), "repeats": len(samples)}  # fmt: skip


@torch.no_grad()
def look_ups(rounds: int) -> list[dict[str, Any]]:
    """One record for each method, way and batch size."""
    shape, results = CriteoShape(), []
    for method, ways in readers(shape).items():
        for size in BATCHES:
            times: dict[str, list[float]] = {way: [] for way in ways}
            for step in range(-1, rounds if size == min(BATCHES) else max(3, rounds // 4)):
                ids = torch.from_numpy(shape.batch(size, step + 1).reshape(-1))
                found = {}
                for way, read in ways.items():
                    start = time.thread_time()
                    found[way] = read(ids)
                    if step >= 0:
                        times[way].append((time.thread_time() - start) * 1e6)
                if method != "QR":
                    base, *others = found.values()
                    for other in others:
                        torch.testing.assert_close(other, base, rtol=1e-3, atol=1e-6)
            base_times = next(iter(times.values()))
            results += [
                {"what": "look-up", "method": method, "way": way, "batch": size, **rows_of(t, base_times)}
                for way, t in times.items()
            ]
    return results


def models(data: Dataset) -> dict[str, Model[Lookup]]:
    """The dense model, and each method's at sparsity 0.8."""
    dense = ML_1M.build(data, 0)
    budget = dense.table.values() - int(0.8 * dense.table.values())
    methods = {"QR": QR(), "TT-Rec, no cache": TTRec(cache_share=0), "TT-Rec": TTRec(), "DHE": DHE()}
    made: dict[str, Model[Lookup]] = {"dense": dense}
    for name, method in methods.items():
        draft = ML_1M.build(data, 0)
        made[name] = draft.with_table(method.prepare(draft, data, Run(None)).table(Room(values=budget)))
    pruned = MagPrune().prepare(dense, data, Run(None)).table(Room(values=budget))
    made["any mask, retraining"] = dense.with_table(MaskedTable(pruned, data.counts))
    for method in (PEP(), CERP(), OptEmbed(), OptEmbedD()):
        made[f"{type(method).__name__}, search"] = searching(method, data, budget)
    return made


class Caught(Exception):
    """The first model that a method trains."""

    def __init__(self, model: Model[Lookup]) -> None:
        super().__init__()
        self.model = model


class First(Run):
    """A run that trains nothing, but tells what it was asked to."""

    def fit(self, name: str, model: M, data: Dataset, training: Any = None) -> M:
        """Raise :class:`Caught`."""
        raise Caught(model)


def searching(method: Method, data: Dataset, budget: int) -> Model[Lookup]:
    """The model that a method trains in its search."""
    model, run = ML_1M.build(data, 0), First(None)
    try:
        ladder = method.prepare(model, data, run)
        room = Room(values=budget)
        ladder.finish(model.with_table(ladder.table(room)), room)
    except Caught as caught:
        return caught.model
    raise SystemExit(f"expected {method.name} to train, but it does not")


def training_steps(rounds: int) -> list[dict[str, Any]]:
    """One record for each model: a step of the training loop."""
    data = ml_1m(0)
    settings = ML_1M_TRAINING
    made = models(data)
    optimizers = {name: DenseAdam(m, settings.learning_rate, settings.weight_decay) for name, m in made.items()}
    times: dict[str, list[float]] = {name: [] for name in made}
    batches = made["dense"].batches(data, settings.batch_size, 0, 0)
    for step, batch in zip(range(-2, rounds), batches, strict=False):
        for name, model in made.items():
            start = time.thread_time()
            table, random = model.table, noise(0, "noise", step + 2)
            if isinstance(table, LearningTable):
                drawn = model.with_table(table.drawn(noise(0, "table", step + 2)))
                (drawn.loss(batch, random) + table.penalty(batch[0], 0)).backward()
            else:
                model.loss(batch, random).backward()
            optimizers[name].step()
            if isinstance(table, LearningTable):
                table.after_step()
            if step >= 0:
                times[name].append((time.thread_time() - start) * 1e6)
    return [
        {"what": "training step", "method": name, "way": "", "batch": settings.batch_size, **rows_of(t, times["dense"])}
        for name, t in times.items()
    ]


def report(results: list[dict[str, Any]]) -> str:
    """The tables for people."""
    lines = [
        "# Compositional tables: look-ups and training steps",
        "",
        f"One thread, microseconds of the thread's processor time, everything in one run. Look-ups: {FIELDS} fields, "
        f"{ROWS:,} rows, {WIDTH} columns, fresh Zipf(1.1) batches; the ratio's base is the first way. Training steps: "
        "MovieLens-1M, DeepFM, sparsity 0.8; the ratio's base is the dense model.",
        "",
    ]
    for what in ("look-up", "training step"):
        lines += [f"## {what.capitalize()}", "", "| method | way | batch | median | 10-90 % | ratio | repeats |",
                  "|---|---|---|---|---|---|---|"]  # fmt: skip
        lines += [
            f"| {r['method']} | {r['way']} | {r['batch']} | {r['median_us']} | {r['p10_us']}-{r['p90_us']} "
            f"| {r['ratio']:.2f} | {r['repeats']} |"
            for r in results
            if r["what"] == what
        ]
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    results = look_ups(rounds) + training_steps(rounds)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "compositional_speed.md").write_text(report(results))
    print(report(results))


if __name__ == "__main__":
    main()
