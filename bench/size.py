"""Bytes of a real file at Criteo's shape, part by part.

Run from the repository's root: ``python bench/size.py``. 39 fields, 1,086,810 rows, 16 columns, a linear weight a row,
a DeepFM head with a perceptron of 3 x 400. Rows that keep a value keep their linear weight too (byte budgets). Every
figure is counted on the contents of a file: the vocabulary is built from one string a row. A parameter is one of the
17,388,960 values of the embedding. Writes ``bench/results/size.md``.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
from criteo_shape import FIELDS, ROWS, WIDTH, CriteoShape
from numpy.typing import NDArray

from pocketrec.format.artifact import Contents
from pocketrec.format.block import PackedRange, Storage
from pocketrec.format.entries import Index
from pocketrec.format.packed import Packed
from pocketrec.format.program import Op, Program
from pocketrec.format.vocabulary import Vocabulary, hash64
from pocketrec.schema import Field, Keys, Schema

RESULTS = Path(__file__).parent / "results"
SPARSITIES = (0.5, 0.8, 0.95, 0.99)
DIRECT_AT = 0.8
"""The sparsity at which the direct index is counted, too."""

STORAGES: tuple[Storage, ...] = ("fp32", "fp16", "int8")
KEYS: tuple[Keys, ...] = ("dense", "hashed")
HIDDEN = 400
PARAMETERS = ROWS * WIDTH
BLOCKS = (PackedRange("embedding", 0, ROWS, 0, WIDTH), PackedRange("linear", 0, ROWS, WIDTH, WIDTH + 1))


def schema_of(shape: CriteoShape, keys: Keys) -> Schema:
    """The fields, all with the same kind of keys."""
    bounds = zip(shape.sizes, shape.offsets, strict=True)
    return Schema("ctr", tuple(Field(f"C{i}", int(n), int(first), keys) for i, (n, first) in enumerate(bounds)))


def head() -> Program:
    """DeepFM's head with batch norm folded: three hidden layers, pairs, linear weights."""
    generator = np.random.default_rng(2)
    widths = [FIELDS * WIDTH, HIDDEN, HIDDEN, HIDDEN, 1]
    ops = [
        Op("columns", ("vectors",), "e", {"start": 0, "stop": WIDTH}),
        Op("columns", ("vectors",), "w", {"start": WIDTH, "stop": WIDTH + 1}),
        Op("flatten", ("e",), "x0"),
    ]
    for i, (inputs, outputs) in enumerate(itertools.pairwise(widths)):
        weight = generator.normal(size=(outputs, inputs)).astype(np.float32)
        tensors = {"weight": weight, "bias": np.zeros(outputs, np.float32)}
        ops.append(Op("linear", (f"x{i}",), f"y{i}", {}, tensors))
        ops.append(Op("relu" if outputs > 1 else "sum", (f"y{i}",), f"x{i + 1}"))
    ops += [
        Op("fm", ("e",), "pairs"),
        Op("sum", ("w",), "wide", tensors={"bias": np.zeros((), np.float32)}),
        Op("add", (f"x{len(widths) - 1}", "pairs", "wide"), "logit"),
    ]
    return Program(tuple(ops))


def row_hashes(schema: Schema) -> list[NDArray[np.uint64]]:
    """Hashes of one string a row, per field, the out-of-vocabulary row left out."""
    return [hash64([f"{f.name}:{i:08x}" for i in range(f.size - 1)]) for f in schema.fields]


def measure(
    shape: CriteoShape,
    hashes: list[NDArray[np.uint64]],
    keep: NDArray[np.bool_],
    index: Index,
    storage: Storage,
    keys: Keys,
) -> dict[str, float | str]:
    """One file's parts: the table per dense parameter, the vocabulary per stored key, head and header in bytes."""
    schema = schema_of(shape, keys)
    stored = np.asarray(keep.any(axis=1))
    vocabulary, rows = Vocabulary.build(schema, stored, lambda i: hashes[i])
    fill = np.random.default_rng(1).normal(size=(FIELDS, WIDTH + 1)).astype(np.float32)
    whole = np.concatenate([keep, stored[:, None]], axis=1)
    packed = Packed.encode(shape.weight, whole, fill, fill, BLOCKS, shape.fields, rows, storage, index=index)
    sizes = Contents("ctr", schema, vocabulary, packed, head(), {"method": "bench"}).sizes()
    linear = packed.blocks[1].size_bytes
    return {
        "removed": round(1 - float(keep.mean()), 4), "index": index, "storage": storage, "keys": keys,
        "stored_rows": int(stored.sum()),
        "table_per_parameter": (sizes["table"] - linear) / PARAMETERS, "linear_per_parameter": linear / PARAMETERS,
        "vocabulary_per_key": sizes["vocabulary"] / int(stored.sum()) if keys == "hashed" else 0.0, **sizes,
    }  # fmt: skip


def report(results: list[dict[str, float | str]]) -> str:
    """The table for people."""
    lines = [
        "# Bytes of a file at Criteo's shape",
        "",
        f"{FIELDS} fields, {ROWS:,} rows, {WIDTH} columns and a linear weight, perceptron 3 x {HIDDEN}, masks that "
        "follow Zipf frequencies. Table: values, masks, presence, directories, scales and fill rows, all that an "
        "embedding look-up needs; table and linear weights in bytes per dense parameter (fp32 dense: 4), vocabulary in "
        "bytes per stored key, the rest in bytes. Removed: share of values.",
        "",
        "| removed | index | storage | keys | rows stored | table | linear | vocabulary | head | header | file |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['removed']:.0%} | {r['index']} | {r['storage']} | {r['keys']} | {r['stored_rows']:,} "
        f"| {r['table_per_parameter']:.4f} | {r['linear_per_parameter']:.4f} | {r['vocabulary_per_key']:.2f} "
        f"| {r['head']:,} | {r['header']:,} | {r['file']:,} |"
        for r in results
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, write."""
    shape = CriteoShape()
    hashes = row_hashes(schema_of(shape, "hashed"))
    results = []
    for sparsity in SPARSITIES:
        keep = shape.keep(sparsity)
        keep[shape.offsets + shape.sizes - 1] = False
        indexes: tuple[Index, ...] = ("compact", "direct") if sparsity == DIRECT_AT else ("compact",)
        results += [measure(shape, hashes, keep, i, s, k) for i in indexes for s in STORAGES for k in KEYS]
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "size.md").write_text(report(results))
    print(report(results))


if __name__ == "__main__":
    main()
