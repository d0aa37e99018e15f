"""Milliseconds per training step of DeepFM at 4.3 million rows: lazy Adam against fused dense Adam.

    python bench/lazy_adam_speed.py

All variants take turns, step by step, on the same batches, once with one thread and once with two. Peak memory comes
from one child process per variant. Writes ``bench/results/lazy_adam_speed.csv`` and ``.md``.
"""

from __future__ import annotations

import argparse
import csv
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import torch
from configs import RESULTS, peak_mib
from torch import Tensor

from pocketrec.backbones.deepfm import DeepFM
from pocketrec.models.backbone import noise
from pocketrec.native import library
from pocketrec.randomness import generator
from pocketrec.schema import Field, Schema
from pocketrec.training.optim import DenseAdam, LazyAdam

ROWS, FIELDS, BATCH, BATCHES = 4_340_000, 39, 2048, 40
BACKBONE = DeepFM(dim=16, hidden=(400, 400, 400))
EXPONENT = 1.1
WARM_UP = 3
VARIANTS = {
    "dense fp32": (DenseAdam, "fp32"),
    "dense bf16": (DenseAdam, "bf16"),
    "lazy fp32": (LazyAdam, "fp32"),
    "lazy bf16": (LazyAdam, "bf16"),
}
Batch = tuple[Tensor, Tensor]


def table_schema() -> Schema:
    """Fields whose sizes are even on a log scale, from 10 to about a million."""
    sizes = np.geomspace(10, 1.1e6, FIELDS).astype(int)
    sizes[-1] += ROWS - sizes.sum()
    offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    fields = (Field(f"f{i}", int(s), int(o)) for i, (s, o) in enumerate(zip(sizes, offsets, strict=True)))
    return Schema("ctr", tuple(fields))


def draw_batches(schema: Schema) -> list[Batch]:
    """Ids by a Zipf law cut at each field's size (the continuous law, inverted); random labels."""
    draw = generator(0, "bench")
    ids = np.empty((BATCH * BATCHES, FIELDS), dtype=np.int32)
    power = 1 - EXPONENT
    for column, field in zip(ids.T, schema.fields, strict=True):
        top = (field.size + 1) ** power
        column[:] = field.offset + np.floor((1 + draw.random(len(ids)) * (top - 1)) ** (1 / power)).astype(np.int64) - 1
    labels = draw.integers(0, 2, len(ids)).astype(np.float32)
    return list(zip(torch.from_numpy(ids).split(BATCH), torch.from_numpy(labels).split(BATCH), strict=True))


def stepper(name: str, schema: Schema) -> Callable[[Batch, int], None]:
    """A function that takes one training step of a variant on a model of its own."""
    kind, precision = VARIANTS[name]
    data = SimpleNamespace(schema=schema)
    optimizer = kind(BACKBONE.build(data, 0), 1e-3, 1e-6)  # pyright: ignore[reportArgumentType]

    def step(batch: Batch, number: int) -> None:
        with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext():
            loss = optimizer.model.loss(batch, noise(0, "noise", number))
        loss.backward()
        optimizer.step()

    return step


def time_steps(threads: int, rounds: int) -> dict[str, np.ndarray]:
    """Milliseconds of each step of each variant, in turns, without the first ones."""
    torch.set_num_threads(threads)
    schema = table_schema()
    batches = draw_batches(schema)
    steps = {name: stepper(name, schema) for name in VARIANTS}
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for number in range(WARM_UP + rounds):
        for name, step in steps.items():
            started = time.perf_counter()
            step(batches[number % BATCHES], number)
            times[name].append(1000 * (time.perf_counter() - started))
    return {name: np.array(values[WARM_UP:]) for name, values in times.items()}


def report_memory(name: str) -> None:
    """Print the peak memory of this process, in MiB, after a few steps of one variant."""
    torch.set_num_threads(1)
    schema = table_schema()
    step = stepper(name, schema)
    for number, batch in enumerate(draw_batches(schema)[:4]):
        step(batch, number)
    print(round(peak_mib()))


def peak_memory(name: str) -> int:
    """Peak MiB of a child process that trains one variant."""
    command = [sys.executable, __file__, "--memory", name]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def write(times: dict[int, dict[str, np.ndarray]], memory: dict[str, int], distinct: float) -> None:
    """One csv row per step; one table with medians, spreads and ratios."""
    with (RESULTS / "lazy_adam_speed.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("threads", "variant", "round", "ms"))
        for threads, variants in times.items():
            for name, values in variants.items():
                rows.writerows((threads, name, i, f"{v:.2f}") for i, v in enumerate(values))
    lines = [
        "# Lazy Adam against fused dense Adam: milliseconds per training step",
        "",
        f"`python bench/lazy_adam_speed.py`: DeepFM, {ROWS:,} rows x {BACKBONE.dim + 1}, {FIELDS} fields, MLP 400x3,",
        f"dropout {BACKBONE.dropout}, batch {BATCH}, Zipf exponent {EXPONENT}: {distinct:,.0f} distinct rows a batch.",
        "A step is forward, backward and update; variants take turns step by step. bf16: matrix products of the MLP",
        "only. Ratio: median of dense fp32 over the median of the row (of dense bf16 in brackets). Peak memory: of a",
        "process of its own.",
        f"Torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, kernel: {library.available()}.",
        "",
        "| threads | variant | median ms | 10-90 % | steps | ratio | peak MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for threads, variants in times.items():
        medians = {name: float(np.median(values)) for name, values in variants.items()}
        for name, values in variants.items():
            low, high = np.percentile(values, [10, 90])
            ratio, ratio16 = (medians[f"dense {p}"] / medians[name] for p in ("fp32", "bf16"))
            lines.append(
                f"| {threads} | {name} | {medians[name]:.1f} | {low:.1f}-{high:.1f} | {len(values)} | "
                f"{ratio:.2f} ({ratio16:.2f}) | {memory[name]:,} |"
            )
    (RESULTS / "lazy_adam_speed.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--memory", choices=list(VARIANTS))
    arguments = parser.parse_args()
    if arguments.memory:
        report_memory(arguments.memory)
    else:
        found = {threads: time_steps(threads, arguments.rounds) for threads in (1, 2)}
        sizes = [len(torch.unique(ids)) for ids, _ in draw_batches(table_schema())]
        write(found, {name: peak_memory(name) for name in VARIANTS}, float(np.mean(sizes)))
