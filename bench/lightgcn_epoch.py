"""A training epoch of LightGCN on Gowalla against plain autograd over a sparse adjacency.

Run from the repository's root: ``POCKETREC_DATA=... python bench/lightgcn_epoch.py``. All variants take turns in one
process, round by round, on the same batches; a round times a few whole steps (loss, gradient, fused Adam) of each. An
epoch is the median step times the number of steps. Drawing the batches is timed apart. The reference is the published
way: ``torch.sparse.mm`` per layer under autograd, all rows in every layer, losses in plain torch. Peak memory comes
from one child process per variant. Writes ``bench/results/lightgcn_epoch.md``.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from configs import RESULTS, peak_mib, ranking_data
from torch import Tensor, nn
from torch.nn import functional as F

from pocketrec.backbones.lightgcn import LightGCN, LightGCNModel
from pocketrec.models.backbone import noise
from pocketrec.native import library

BATCH = 2048
BASES = ("reference coo", "reference csr")
OURS = ("pocketrec fp32", "pocketrec bf16")
Step = Callable[[Tensor], float]


class Reference(nn.Module):
    """LightGCN as published code writes it."""

    def __init__(self, model: LightGCNModel, layout: str) -> None:
        super().__init__()
        self.config = model.config
        self.users = model.schema.fields[0].size
        self.weight = nn.Parameter(model.table.weight().detach().clone())
        graph = model.graph
        rows = np.repeat(np.arange(graph.rows), np.diff(graph.indptr))
        values = torch.from_numpy(graph.scale[rows] * graph.scale[graph.indices])
        places = torch.from_numpy(np.stack([rows, graph.indices.astype(np.int64)]))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            shape = (graph.rows, graph.rows)
            matrix = torch.sparse_coo_tensor(places, values, shape, check_invariants=False).coalesce()
            self.matrix = matrix.to_sparse_csr() if layout == "csr" else matrix

    def loss(self, triples: Tensor) -> Tensor:
        """The loss of a batch ``(B, 3)``."""
        config = self.config
        layers: list[Tensor] = [self.weight]
        for _ in range(config.layers):
            layers.append(torch.sparse.mm(self.matrix, layers[-1]))
        final = torch.stack(layers, dim=1).mean(dim=1)
        user, positive, negative = triples.T
        u, p, q = final[user], final[positive], final[negative]
        loss = F.softplus((u * q).sum(dim=1) - (u * p).sum(dim=1)).mean()
        norms = sum(self.weight[ids].square().sum() for ids in (user, positive, negative))
        loss = loss + config.regularisation * norms / (2 * len(triples))
        if config.contrast > 0:
            members = F.normalize(final[torch.cat([user.unique(), positive.unique()])], dim=1)
            ratios = torch.exp(members @ members.T / config.temperature)
            loss = loss - config.contrast * torch.log(math.exp(1 / config.temperature) / ratios.sum(dim=1)).mean()
        return loss


@dataclass(frozen=True)
class Variant:
    """One way to train: ``step`` runs a whole training step and returns its loss."""

    name: str
    contrast: float
    step: Step


def variants(model: LightGCNModel, names: tuple[str, ...]) -> Iterator[Variant]:
    """The named ways to train ``model``'s backbone, each with its own weights and moments."""
    for name in names:
        kind, form = name.split()
        if kind == "reference":
            reference = Reference(model, form)
            yield Variant(name, model.config.contrast, stepper(reference, reference.loss, bf16=False))
        else:
            fresh = model.backbone.build(ranking_data("gowalla"), seed=0)
            draw = noise(0, "noise")
            loss = lambda triples, fresh=fresh, draw=draw: fresh.loss((triples,), draw)  # noqa: E731
            yield Variant(name, model.config.contrast, stepper(fresh, loss, bf16=form == "bf16"))


def stepper(module: nn.Module, loss: Callable[[Tensor], Tensor], *, bf16: bool) -> Step:
    """A training step with fused dense Adam."""
    adam = torch.optim.Adam(module.parameters(), lr=1e-3, fused=True)

    def step(triples: Tensor) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            value = loss(triples)
        value.backward()
        adam.step()
        adam.zero_grad(set_to_none=True)
        return value.item()

    return step


def batches_of(model: LightGCNModel) -> Iterator[Tensor]:
    """Triples ``(B, 3)`` of the first epoch."""
    return (batch for (batch,) in model.batches(ranking_data("gowalla"), BATCH, 0, 0))


def drawing(model: LightGCNModel) -> float:
    """Seconds to draw the batches of one epoch."""
    started = time.perf_counter()
    for _ in batches_of(model):
        pass
    return time.perf_counter() - started


def measure(model: LightGCNModel, threads: int, rounds: int, steps: int) -> tuple[dict[str, list[float]], float]:
    """Seconds per step of each variant, by round; and the largest gap of our fp32 losses from the reference's."""
    torch.set_num_threads(threads)
    batches = cycle(list(islice(batches_of(model), 40)))
    contenders = list(variants(model, BASES + OURS))
    seconds: dict[str, list[float]] = {v.name: [] for v in contenders}
    gap = 0.0
    for number in range(rounds + 1):
        shared = list(islice(batches, steps))
        losses = {}
        for variant in contenders:
            started = time.perf_counter()
            losses[variant.name] = [variant.step(batch) for batch in shared]
            if number > 0:
                seconds[variant.name].append((time.perf_counter() - started) / steps)
        exact = np.array(losses["reference coo"])
        gap = max(gap, float(np.abs(np.array(losses["pocketrec fp32"]) - exact).max()))
    return seconds, gap


def child_peak(name: str, contrast: float) -> tuple[float, float]:
    """Peak resident memory of a process that trains a few steps this way, and of one that only loads, in MiB."""
    command = [sys.executable, __file__, "--memory", name, "--contrast", str(contrast)]
    loaded, peak = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(peak), float(loaded)


def memory(name: str, contrast: float) -> None:
    """Print peak resident memory in MiB before and after training steps."""
    model = LightGCN(contrast=contrast).build(ranking_data("gowalla"), seed=0)
    batches = list(islice(batches_of(model), 4))
    loaded = peak_mib()
    (variant,) = variants(model, (name,))
    for batch in batches:
        variant.step(batch)
    print(loaded, peak_mib())


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--memory")
    parser.add_argument("--contrast", type=float, default=0.1)
    options = parser.parse_args()
    if options.memory:
        memory(options.memory, options.contrast)
        return
    rows: list[dict[str, object]] = []
    notes: list[str] = []
    per_epoch = math.ceil(len(ranking_data("gowalla").train) / BATCH)
    for contrast in (0.0, 0.1):
        model = LightGCN(contrast=contrast).build(ranking_data("gowalla"), seed=0)
        peaks = {name: child_peak(name, contrast) for name in BASES + OURS}
        for threads in (1, 2):
            seconds, gap = measure(model, threads, options.rounds, options.steps)
            median = {name: float(np.median(values)) for name, values in seconds.items()}
            base = min(median[name] for name in BASES)
            notes.append(
                f"InfoNCE {contrast}, {threads} threads: losses of `pocketrec fp32` within {gap:.1e} of COO's."
            )
            for name, values in seconds.items():
                rows.append({
                    "infonce": contrast, "threads": threads, "variant": name,
                    "epoch_s": round(median[name] * per_epoch, 1), "step_ms": round(median[name] * 1e3, 1),
                    "min_ms": round(min(values) * 1e3, 1), "max_ms": round(max(values) * 1e3, 1),
                    "ratio": round(base / median[name], 2),
                    "ratio_of_minima": round(min(min(seconds[b]) for b in BASES) / min(values), 2),
                    "peak_mib": round(peaks[name][0]), "loaded_mib": round(peaks[name][1]),
                })  # fmt: skip
    torch.set_num_threads(1)
    notes.append(f"Drawing all batches of an epoch: {min(drawing(model) for _ in range(3)):.2f} s (one thread).")
    write(rows, notes, per_epoch, options.rounds, options.steps)


def write(rows: list[dict[str, object]], notes: list[str], per_epoch: int, rounds: int, steps: int) -> None:
    """``bench/results/lightgcn_epoch.md``."""
    head = " | ".join(rows[0])
    lines = [
        "# A training epoch of LightGCN on Gowalla", "",
        f"Batch {BATCH}, {per_epoch} steps an epoch, L = 3, d = 64; {rounds} rounds of {steps} steps, variants in "
        f"turn in one process. torch {torch.__version__}, kernel {library.level()}. `ratio` is the median step of the"
        " faster reference over that of the variant.", "",
        f"| {head} |", "|" + "---|" * len(rows[0]),
        *(f"| {' | '.join(str(v) for v in row.values())} |" for row in rows), "",
        *(f"* {note}" for note in notes),
    ]  # fmt: skip
    Path(RESULTS / "lightgcn_epoch.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
