"""What a user would pick instead: faiss OPQ of the final vectors of LightGCN, at the bytes of the plan ``bytes-cf``.

Run from the repository's root, with the store of the study's trained models:
``python bench/opq.py STORE gowalla`` (needs ``faiss-cpu`` and POCKETREC_DATA). Users are coded at one length, as
lists do not depend on it, so that one codebook serves users and items. Bytes are those of codes, codebooks and
rotation. Each file is judged on validation, and once on test, by the measurement that judges every method. All seeds
of the plan are taken. Writes ``bench/results/opq-DATA.md``.
"""

from __future__ import annotations

import argparse
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pocketrec.compression.measure import measure
from pocketrec.data.dataset import Split
from pocketrec.models.backbone import Model
from pocketrec.models.baked import BakedModel
from pocketrec.models.table import DenseTable
from pocketrec.study.cells import Workspace, dense
from pocketrec.study.jobs import Job
from pocketrec.study.plan import Plan
from pocketrec.study.recipe import ORIGINAL

RESULTS = Path(__file__).parent / "results"
CODES = {"10%": (24, 72), "5%": (11, 66), "2%": (4, 64)}
"""Bytes of a row, and columns after the rotation, for about each share of the dense bytes."""
SAMPLE = 20_000


def _faiss() -> Any:
    """The library, of the extra ``compare``."""
    return import_module("faiss")


def coded(vectors: NDArray[np.float32], size: int, width: int, seed: int) -> tuple[NDArray[np.float32], int]:
    """Vectors as OPQ decodes them, and the bytes of all that it stores."""
    sample = vectors[np.random.default_rng(seed).choice(len(vectors), SAMPLE, replace=False)]
    faiss = _faiss()
    rotation = faiss.OPQMatrix(vectors.shape[1], size, width)
    rotation.niter, rotation.niter_pq = 6, 3
    rotation.train(sample)
    quantiser = faiss.ProductQuantizer(width, size, 8)
    quantiser.train(np.ascontiguousarray(rotation.apply(sample)))
    found = rotation.reverse_transform(quantiser.decode(quantiser.compute_codes(rotation.apply(vectors))))
    return found, len(vectors) * size + 4 * 256 * width + 4 * vectors.shape[1] * width


def ndcg(model: Model, split: Split) -> float:
    """NDCG@20 over a split's users."""
    found = measure(model, split, latency=False).quality["ndcg@20"]
    if found is None:
        raise SystemExit("a split has no users to judge by")
    return found


def main() -> None:
    """Code, measure, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("store", type=Path)
    parser.add_argument("data", help="label of the plan")
    options = parser.parse_args()
    torch.set_num_threads(1)
    _faiss().omp_set_num_threads(1)
    lines = ["| seed | budget | bytes | share | NDCG@20 valid | kept | NDCG@20 test | kept |", "|" + "---|" * 8]
    with tempfile.TemporaryDirectory() as folder:
        plan = Plan.read("bytes-cf")
        bench = Workspace(plan, Path(folder), options.store)
        for seed in plan.seeds_of(plan.data[options.data]):
            job = Job("cell", options.data, "lightgcn", ORIGINAL, "dense", seed)
            data, model = bench.data(job), BakedModel.of(dense(bench, job, {}))
            vectors = model.table.weight().detach().numpy()
            users = data.schema.fields[0].size
            scaled = vectors.copy()
            length = np.sqrt(np.square(vectors[users:]).sum(axis=1).mean())
            scaled[:users] *= length / np.linalg.norm(vectors[:users], axis=1, keepdims=True)
            whole = [ndcg(model, split) for split in (data.valid, data.test)]
            for budget, (size, width) in CODES.items():
                found, stored = coded(scaled, size, width, seed)
                small = model.with_table(DenseTable(model.schema, model.table.blocks, torch.from_numpy(found)))
                own = [ndcg(small, split) for split in (data.valid, data.test)]
                figures = [f"{o:.4f} | {o / w:.3f}" for o, w in zip(own, whole, strict=True)]
                row = f"| {seed} | {budget} | {stored:,} | {stored / vectors.nbytes:.2%} | {' | '.join(figures)} |"
                print(row, flush=True)
                lines.append(row)
    text = (__doc__ or "").split("\n")[0]
    (RESULTS / f"opq-{options.data}.md").write_text(f"# OPQ on {options.data}\n\n{text}\n\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
