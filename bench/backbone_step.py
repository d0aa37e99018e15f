"""Time of a training step of every backbone, and DCN-Mix against the same layers with a loop over experts.

    python bench/backbone_step.py

Click models see Criteo's 39 fields with 100,000 rows of width 16, ranking models Gowalla's 29,858 users and 40,981
items with as many training pairs, Zipf(1.1) ids, batches of 2,048. Default settings, one thread, all backbones
interleaved over rounds in one process; the least processor time of each counts. ``loss`` is the loss and its gradient,
``step`` also dense Adam on table and head. The loop is the mixture as it is written: for each expert its own gate and
its own products.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import psutil
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pocketrec import registry
from pocketrec.backbones.dcn_mix import CrossMixture, DCNMix
from pocketrec.data.dataset import Dataset
from pocketrec.models.backbone import Backbone, Model, noise
from pocketrec.schema import Field, Schema
from pocketrec.training.optim import DenseAdam

BATCH = 2048
RESULTS = Path(__file__).parent / "results"


def zipf(random: np.random.Generator, size: int, count: int) -> np.ndarray:
    """Ids below ``size`` of Zipf(1.1) frequencies."""
    return (random.zipf(1.1, count) % size).astype(np.int64)


def clicks(random: np.random.Generator) -> Dataset:
    """Criteo's fields, ten batches."""
    sizes = [100_000 // 39] * 39
    fields = tuple(Field(f"f{i}", size, i * size) for i, size in enumerate(sizes))
    ids = np.stack([f.offset + zipf(random, f.size, 10 * BATCH) for f in fields], axis=1).astype(np.int32)
    labels = (random.random(len(ids)) < 0.25).astype(np.float32)
    return named(Schema("ctr", fields), ids, labels)


def visits(random: np.random.Generator) -> Dataset:
    """Gowalla's users, items and number of training pairs."""
    users, items = 29_858, 40_981
    schema = Schema("cf", (Field("user", users, 0), Field("item", items, users)))
    pairs = np.stack([random.integers(0, users, 737_091), users + zipf(random, items, 737_091)], axis=1)
    return named(schema, np.unique(pairs, axis=0), None)


def named(schema: Schema, ids: np.ndarray, labels: np.ndarray | None) -> Dataset:
    """What backbones read of a data set, in memory."""

    class Rows(SimpleNamespace):
        def __len__(self) -> int:
            return len(ids)

    return cast("Dataset", SimpleNamespace(schema=schema, train=Rows(ids=ids, labels=labels)))


class Loop(nn.Module):
    """A cross layer that computes one expert after the other, with the weights of a :class:`CrossMixture`."""

    def __init__(self, mixture: CrossMixture) -> None:
        super().__init__()
        self.mixture = mixture

    def forward(self, x0: Tensor, x: Tensor, gate: Tensor) -> Tensor:
        """``(B, f), (B, f), (K, f) -> (B, f)``."""
        cross = self.mixture
        experts, rank, _ = cross.core.shape
        outputs, gates = [], []
        for k in range(experts):
            part = slice(k * rank, (k + 1) * rank)
            inner = torch.tanh(F.linear(x, cross.down[part]))
            inner = torch.tanh(F.linear(inner, cross.core[k]))
            outputs.append(x0 * (F.linear(inner, cross.up[:, part]) + cross.bias))
            gates.append(F.linear(x, gate[k : k + 1]))
        stacked, weights = torch.stack(outputs, dim=2), torch.stack(gates, dim=1)
        return torch.matmul(stacked, weights).squeeze(2) + x


def looped(backbone: DCNMix, data: Dataset) -> Model:
    """DCN-Mix with its cross layers replaced by loops over the same weights."""
    model = backbone.build(data, 0)
    model.crosses = nn.ModuleList(Loop(cast("CrossMixture", cross)) for cross in cast("nn.ModuleList", model.crosses))
    return model


def steps(model: Model, data: Dataset) -> tuple[Callable[[], None], Callable[[], None]]:
    """The loss with its gradient, and the whole step, each on the next batch."""
    optimizer = DenseAdam(model, 1e-3, 1e-6)
    batches = [batch for batch, _ in zip(model.batches(data, BATCH, 0, 0), range(10), strict=False)]
    count = iter(range(1 << 30))

    def loss() -> None:
        at = next(count)
        for parameter in model.parameters():
            parameter.grad = None
        model.loss(batches[at % len(batches)], noise(0, "noise", at)).backward()

    def step() -> None:
        loss()
        optimizer.step()

    return loss, step


def least(calls: dict[Any, Callable[[], None]], rounds: int) -> dict[Any, float]:
    """Least processor time of each call in milliseconds, after two of them as warm-up."""
    for call in calls.values():
        call()
        call()
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.process_time()
            call()
            best[name] = min(best[name], 1000 * (time.process_time() - start))
    return best


def same(one: Model, other: Model, data: Dataset) -> float:
    """The largest difference of the gradients of all weights, of the largest gradient."""
    batch = next(iter(one.batches(data, BATCH, 0, 0)))
    gradients = []
    for model in (one, other):
        model.loss(batch, noise(0, "noise", 0)).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    gaps = [(a - b).abs().max() / a.abs().max().clamp_min(1e-12) for a, b in zip(*gradients, strict=True)]
    return float(torch.stack(gaps).max())


def main() -> None:
    """Time, and write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    random = np.random.default_rng(0)
    data = {"ctr": clicks(random), "cf": visits(random)}
    backbones: list[Backbone] = [registry.load("backbones", name)() for name in registry.modules("backbones")]
    models = {b.name: b.build(data[b.task], 0) for b in backbones}
    gap = same(DCNMix(dropout=0.0).build(data["ctr"], 0), looped(DCNMix(dropout=0.0), data["ctr"]), data["ctr"])
    models["dcn_mix, loop over experts"] = looped(DCNMix(), data["ctr"])
    calls = {
        (name, part): call
        for name, model in models.items()
        for part, call in zip(("loss", "step"), steps(model, data[model.backbone.task]), strict=True)
    }
    took = least(calls, rounds)
    table = [
        {
            "backbone": name,
            "task": model.backbone.task,
            "head_values": sum(p.numel() for n, p in model.named_parameters() if not n.startswith("table.")),
            "loss_ms": round(took[name, "loss"], 2),
            "step_ms": round(took[name, "step"], 2),
        }
        for name, model in models.items()
    ]
    table.sort(key=lambda row: (row["task"], row["step_ms"]))
    batched, loop = (took[name, "loss"] for name in ("dcn_mix", "dcn_mix, loop over experts"))
    lines = [
        "# Time of a training step",
        "",
        "`python bench/backbone_step.py`: default settings, batches of 2,048, one thread, all backbones interleaved in",
        "one process; least processor time. Click models: 39 fields, 100,000 rows of width 16. Ranking models: 29,858",
        "users and 40,981 items of width 64, 2,048 training pairs with their negatives.",
        "",
        f"torch {torch.__version__}, {platform.machine()}, load average {psutil.getloadavg()[0]:.1f}.",
        "",
        "| backbone | task | values in the head | loss and gradient, ms | whole step, ms |",
        "|---|---|---:|---:|---:|",
        *(
            f"| {r['backbone']} | {r['task']} | {r['head_values']:,} | {r['loss_ms']:.1f} | {r['step_ms']:.1f} |"
            for r in table
        ),
        "",
        f"DCN-Mix computes all experts together: {loop / batched:.2f} times as fast as a loop over them, with",
        f"the same gradients (largest difference {gap:.0e} of the largest gradient).",
    ]
    (RESULTS / "backbone_step.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
