"""Look-ups in tables that ``rate_distortion`` has coded, against ``nn.Embedding`` over the dense table.

    POCKETREC_DATA=... python bench/coded_lookup.py --store cache/models

Timed is the call that a device makes: ``Packed.lookup(rows, fields)`` of a saved, memory-mapped file, from file rows
int64 ``(B, F)`` to new vectors float32 ``(B, F, D)``; and ``embedding(ids)`` in inference mode, ids int64 ``(B, F)`` as
a tensor made before, over one dense float32 table with the linear weights as its last column. Files are made by
``compress``: of trained models of the plans ``bytes`` and ``bytes-cf`` (trained where the store has none), and of
random weights at Criteo's shape whose columns fall in size as those of a trained table do. *skewed* ids are training
rows (at Criteo's shape Zipf(1.1)), *uniform* ones are drawn evenly from each field.

One thread. In every round each reader takes a turn over the same fresh batches, the first reader rotating; a turn is
timed as a whole by the thread's processor time. A ratio is that of two turns of one round; given are medians over the
rounds, and the range of the middle 80 %.

Writes ``bench/results/coded_lookup.md``.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from criteo_shape import CriteoShape
from numpy.typing import NDArray
from rate_distortion_speed import Shape

from pocketrec.compression.compress import compress
from pocketrec.data.dataset import Dataset
from pocketrec.format.artifact import Artifact
from pocketrec.format.packed import Packed
from pocketrec.methods.rate_distortion import RateDistortion
from pocketrec.models.backbone import Model
from pocketrec.models.baked import BakedModel
from pocketrec.native import library
from pocketrec.study.cells import dense
from pocketrec.study.jobs import Job
from pocketrec.study.plan import Plan
from pocketrec.study.recipe import ORIGINAL
from pocketrec.study.runner import prepare
from pocketrec.training.run import Run

RESULTS = Path(__file__).parent / "results"
STUDIED = {"ml-1m": ("bytes", "deepfm"), "criteo-80k": ("bytes", "deepfm"), "gowalla": ("bytes-cf", "lightgcn")}
"""Data sets whose trained models are coded: plan and backbone."""
SHAPE = "criteo shape"
SHARES = {SHAPE: ("4%", "2%", "1%")} | dict.fromkeys(STUDIED, ("10%", "5%", "2%"))
BATCHES = {1: 200, 64: 40, 2048: 2}
"""Calls in a turn, by batch size."""
POOL = 1 << 20
"""Rows drawn beforehand, at most."""
SAMPLES = 100_000
"""Of the scoring pass at Criteo's shape."""
BASE = "nn.Embedding"
NUMPY = "numpy"
LEVELS: tuple[library.Level, ...] = ("avx512", "avx2", "portable")

Ids = NDArray[np.int64]
Reader = Callable[[int], Any]


@dataclass(frozen=True)
class Case:
    """A table, dense and coded.

    Attributes:
        name: of the data set.
        share: of the dense bytes that the coded table may take.
        weight: the dense table, ``(n, D)``.
        packed: the coded table, as its file holds it.
        file_rows: file row of each row of the dense table, ``(n,)``.
        draws: ids ``(POOL, F)`` by how they were drawn.
    """

    name: str
    share: str
    weight: torch.Tensor
    packed: Packed
    file_rows: Ids
    draws: dict[str, Ids]


def trained(name: str, folder: Path, store: Path) -> tuple[Model, Any]:
    """A dense model whose final vectors a file holds, and its data."""
    plan, backbone = STUDIED[name]
    context = prepare(Plan.read(plan), folder, store)
    job = Job("cell", name, backbone, ORIGINAL, "dense", 0)
    data, model = context.data(job), dense(context, job, {})
    return (BakedModel.of(model) if backbone == "lightgcn" else model), data


def shaped(folder: Path) -> tuple[Model, Any]:
    """Random weights at Criteo's shape."""
    data = Shape(folder)
    data.write(SAMPLES)
    return data.model(), data


def draws(name: str, data: Dataset, size: int) -> dict[str, Ids]:
    """Ids ``(size, F)`` by how they were drawn."""
    generator, fields = np.random.default_rng(0), data.schema.fields
    uniform = [f.offset + generator.integers(0, f.size - f.oov, size) for f in fields]
    if name == SHAPE:
        skewed = CriteoShape().batch(size, 1)
    else:
        skewed = np.asarray(data.train.ids)[generator.integers(0, len(data.train.ids), size)]
    return {"skewed": skewed.astype(np.int64), "uniform": np.stack(uniform, axis=1)}


def cases(name: str, store: Path, files: Path) -> Iterator[Case]:
    """The tables of one data set; files are made where they are missing."""
    folder = files / name.replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    model, data = shaped(folder) if name == SHAPE else trained(name, folder, store)
    paths = {share: folder / f"{share.rstrip('%')}.safetensors" for share in SHARES[name]}
    missing = [share for share, path in paths.items() if not path.exists()]
    run = Run(None, seed=0, threads=1, store=None if name == SHAPE else store)
    for share, small in zip(missing, compress(model, data, RateDistortion(), missing, run=run), strict=True):
        small.save(paths[share])
    drawn = draws(name, data, POOL // data.schema.width)
    for share, path in paths.items():
        artifact = Artifact(path)
        rows = artifact.vocabulary.file_rows(data.hashes)
        yield Case(name, share, model.table.weight().detach().float(), artifact.packed, rows, drawn)


def readers(case: Case, ids: Ids, size: int) -> dict[str, tuple[Reader, library.Level]]:
    """Every reader of batches by their number, and the instruction set to limit the kernel to; the base first."""
    count, fields = len(ids) // size, np.arange(ids.shape[1], dtype=np.int32)
    whole = ids[: count * size].reshape(count, size, -1)
    tensors, rows = list(torch.from_numpy(whole)), list(np.ascontiguousarray(case.file_rows[whole]))
    embedding = torch.nn.Embedding.from_pretrained(case.weight)
    packed, top = case.packed, LEVELS[0]
    found: dict[str, tuple[Reader, library.Level]] = {BASE: (lambda i: embedding(tensors[i]), top)}
    for level in LEVELS:
        found[f"kernel, {level}"] = (lambda i: packed.lookup(rows[i], fields)), level
    found[NUMPY] = (lambda i: packed.lookup_numpy(rows[i], fields)), top
    return found


@torch.inference_mode()
def time_turns(
    found: dict[str, tuple[Reader, library.Level]], size: int, pool: int, rounds: int
) -> NDArray[np.float64]:
    """Microseconds of a call by round and reader, ``(rounds, readers)``."""
    names, generator = list(found), np.random.default_rng(size)
    times = np.zeros((rounds + 1, len(names)))
    for turn in range(-1, rounds):
        batches = generator.integers(0, pool, BATCHES[size]).tolist()
        for place in range(len(names)):
            which = (place + turn) % len(names)
            read, level = found[names[which]]
            library.limit(level)
            own = batches[: max(1, len(batches) // 20)] if names[which] == NUMPY else batches
            for i in own[:2]:
                read(i)
            start = time.thread_time()
            for i in own:
                read(i)
            times[turn, which] = (time.thread_time() - start) * 1e6 / len(own)
    library.limit(library.LEVELS[-1])
    return times[:rounds]


def records(case: Case, rounds: int) -> Iterator[dict[str, Any]]:
    """One record for each way to draw, batch size and reader."""
    for kind, ids in case.draws.items():
        for size in BATCHES:
            found = readers(case, ids, size)
            times = time_turns(found, size, len(ids) // size, rounds if size < 2048 else max(rounds // 4, 5))
            for name, own in zip(found, times.T, strict=True):
                middle, ratios = partial(np.percentile, q=[50, 10, 90]), own / times[:, 0]
                yield {
                    "table": case.name, "layout": case.packed.blocks[0].to_json()["layout"], "share": case.share,
                    "bytes": case.packed.size_bytes, "rows": len(case.weight), "fields": ids.shape[1],
                    "width": case.weight.shape[1], "ids": kind, "batch": size, "reader": name,
                    **dict(zip(("median_us", "p10_us", "p90_us"), middle(own).round(2).tolist(), strict=True)),
                    **dict(zip(("ratio", "ratio_p10", "ratio_p90"), middle(ratios).round(2).tolist(), strict=True)),
                    "rounds": len(own),
                }  # fmt: skip


def report(results: list[dict[str, Any]]) -> str:
    """The tables for people."""
    load = f"load average at the end {psutil.getloadavg()[0]:.1f} on {psutil.cpu_count()} processors"
    told = (__doc__ or "").split("\n\n")[2:-1]
    lines = ["# Look-ups in coded tables", "", "\n\n".join(told), "", f"Microseconds; {load}."]
    batch = [r for r in results if r["batch"] == 64 and r["reader"] == f"kernel, {LEVELS[0]}"]
    lines += ["", f"Batches of 64, `kernel, {LEVELS[0]}`, times `{BASE}`:", "",
              "| table | layout | share | ids | median | 10-90 % |", "|" + "---|" * 6]  # fmt: skip
    lines += [
        f"| {r['table']} | {r['layout']} | {r['share']} | {r['ids']} | {r['ratio']:.2f} "
        f"| {r['ratio_p10']:.2f}-{r['ratio_p90']:.2f} |"
        for r in batch
    ]
    for name in dict.fromkeys(r["table"] for r in results):
        part = [r for r in results if r["table"] == name]
        first = part[0]
        lines += ["", f"## {name}: {first['rows']:,} rows of {first['width']}, {first['fields']} fields", "",
                  "| share | ids | batch | reader | median | 10-90 % | ratio | 10-90 % |",
                  "|" + "---|" * 8]  # fmt: skip
        lines += [
            f"| {r['share']} | {r['ids']} | {r['batch']} | {r['reader']} | {r['median_us']} "
            f"| {r['p10_us']}-{r['p90_us']} | {r['ratio']:.2f} | {r['ratio_p10']:.2f}-{r['ratio_p90']:.2f} |"
            for r in part
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True, help="folder of trained models and finished steps")
    parser.add_argument("--files", type=Path, help="folder that keeps the coded files (default: made anew)")
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    torch.set_num_threads(1)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in (*STUDIED, SHAPE):
            for case in cases(name, args.store, args.files or Path(folder)):
                results += records(case, args.rounds)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "coded_lookup.md").write_text(report(results))
    print(report(results))


if __name__ == "__main__":
    main()
