"""Bytes per dense parameter of a packed table at Criteo's shape, column by column.

Run from the repository's root: ``python bench/size.py``. 39 fields, 1,086,810 rows, 16 columns; a parameter is one of
the 17,388,960 values of the embedding, linear weights are not counted. With ``dense`` keys the file holds every row
and needs no vocabulary; with ``hashed`` keys it holds the stored rows and a key for each. Linear weights are either
all kept (``sparsity=`` budgets) or kept with their row (byte budgets). Writes ``bench/results/size.md`` and ``.json``.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from criteo_shape import FIELDS, ROWS, WIDTH, CriteoShape
from numpy.typing import NDArray

from pocketrec.packed import Packed, PackedRange, Storage

RESULTS = Path(__file__).parent / "results"
STORAGES: tuple[Storage, ...] = ("fp32", "fp16", "int8")
VOCABULARY_BYTES = 6
"""Upper bound per stored string key; ``measure`` shows the exact figure of a real file."""


def measure(shape: CriteoShape, keep: NDArray[np.bool_], storage: Storage, keys: str, linear: str) -> dict[str, Any]:
    """Pack once; bytes per dense parameter by part."""
    with_linear = np.ones(ROWS, dtype=bool) if linear == "all" else keep.any(axis=1)
    whole = np.concatenate([keep, with_linear[:, None]], axis=1)
    rows = None if keys == "dense" else np.flatnonzero(with_linear)
    fill = np.random.default_rng(1).normal(size=(FIELDS, WIDTH + 1)).astype(np.float32)
    blocks = (PackedRange("embedding", 0, ROWS, 0, WIDTH), PackedRange("linear", 0, ROWS, WIDTH, WIDTH + 1))
    begin = time.perf_counter()
    packed = Packed.encode(shape.weight, whole, fill, fill, blocks, shape.fields, rows, storage)
    seconds = time.perf_counter() - begin
    embedding, linear_block = packed.blocks
    sides = packed.size_bytes - embedding.size_bytes - linear_block.size_bytes
    parameters = ROWS * WIDTH
    return {
        "sparsity": round(1 - keep.mean(), 4), "storage": storage, "keys": keys, "linear_weights": linear,
        "table": (embedding.size_bytes + sides) / parameters, "linear": linear_block.size_bytes / parameters,
        "vocabulary": 0.0 if keys == "dense" else VOCABULARY_BYTES * packed.rows / parameters,
        "rows_with_values": float(keep.any(axis=1).mean()), "seconds": seconds,
    }  # fmt: skip


def main() -> None:
    """Measure, print, write."""
    shape = CriteoShape()
    results = [
        measure(shape, keep, storage, keys, linear)
        for keep in (shape.keep(sparsity) for sparsity in (0.5, 0.8, 0.95))
        for storage in STORAGES
        for keys in ("dense", "hashed")
        for linear in ("all", "with row")
    ]
    lines = [
        "# Bytes per dense parameter at Criteo's shape",
        "",
        f"{FIELDS} fields, {ROWS:,} rows, {WIDTH} columns, Zipf mask. `table` is all that an embedding look-up needs: "
        "values, masks, presence, directories, scales, fill and absent rows. The vocabulary is the promised bound of "
        f"{VOCABULARY_BYTES} bytes a key; head and header do not depend on the table's size.",
        "",
        "| values removed | storage | keys | linear weights | rows kept | table | linear | vocabulary | pack, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['sparsity']:.0%} | {r['storage']} | {r['keys']} | {r['linear_weights']} | {r['rows_with_values']:.1%} "
        f"| {r['table']:.4f} | {r['linear']:.4f} | {r['vocabulary']:.4f} | {r['seconds']:.2f} |"
        for r in results
    ]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "size.md").write_text("\n".join(lines) + "\n")
    (RESULTS / "size.json").write_text(json.dumps(results, indent=1) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
