"""How the stored artifacts were made: ``python tests/format/stored/write.py FOLDER``, in the format of its day.

This is documentation; tests do not run it, and the files beside it are never written again: later versions must read
them. It makes the files of the format that the package writes now, and none that the folder has. A new layout, storage
or op gets new files, and a new format too: what ``FORMATS`` has for the earlier ones says how theirs were made.

Each ``NAME.safetensors`` is one artifact of a small trained model. Beside it ``NAME.expected.safetensors`` says how the
version that wrote it read it, by the compiled kernel (numpy agreed to 1e-6 of max(1, |x|)):

``rows (n, F)``
    File rows of the raw inputs, which stand as JSON in the metadata ``inputs``: known, rare, unknown, missing values.
``fields (R,)``, ``vectors (R, D)``
    The whole decoded table, and the field of each file row.
``absent (F, D)``
    What an absent row of each field reads.
``scores (n,)``
    Logits or ranking scores of the inputs; not for kind ``ego``.
``items (U, k)``, ``list_scores (U, k)``
    Lists of the users ``users (U,)``, of kind ``baked``.
``stored.NAME``
    Every array of table and vocabulary that holds integers (codes, masks, offsets, directories), as it was read.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import polars as pl
import torch
from safetensors.numpy import save_file

import pocketrec as pr
from pocketrec import methods
from pocketrec.data.source import Batch, Column, Scan, Source
from pocketrec.format.artifact import FORMAT
from pocketrec.format.layouts.hash_mlp import HashMlpBlock, codes
from pocketrec.randomness import generator
from pocketrec.schema import Task

SHOPS, DAYS, ITEMS, ROWS = 160, 7, 90, 3000
USERS, FILMS = 60, 270
TEACH = pr.Training(epochs=3, batch_size=256, learning_rate=1e-2)
SHORT = (pr.Training(epochs=1, batch_size=256, learning_rate=1e-2),)
SLOW = (pr.Training(epochs=8, batch_size=256, learning_rate=3e-2, weight_decay=1e-2),)
"""Small weights, so that rounding is not magnified."""

SMALL: dict[str, dict[str, Any]] = {
    "deepfm": {"dim": 8, "hidden": (16, 8)},
    "dcn_mix": {"dim": 4, "hidden": (8, 8), "rank": 4},
    "dcnv2": {"dim": 4, "hidden": (8, 8)},
    "fm": {"dim": 8},
    "mlp": {"dim": 6, "hidden": (16, 8)},
    "neumf": {"dim": 8, "hidden": (8, 4)},
    "pair_mlp": {"dim": 8, "hidden": (8, 4)},
    "mf": {"dim": 8},
    "gmf": {"dim": 8},
    "lightgcn": {"dim": 8},
}


@dataclass(frozen=True)
class Clicks(Source):
    """Clicks with two hashed fields and one of dense integers from 0 on."""

    name: ClassVar[str] = "clicks"
    generates: ClassVar[bool] = True

    def scan(self, path: Path | None = None, columns: tuple[Column, ...] | None = None) -> Scan:
        """See :meth:`Source.scan`."""
        rng = generator(0, "stored clicks")
        shop, day, item = rng.zipf(1.2, ROWS) % SHOPS, rng.integers(0, DAYS, ROWS), rng.integers(0, ITEMS, ROWS)
        effects = rng.normal(0, 1.2, SHOPS)[shop] + rng.normal(0, 0.7, DAYS)[day] + rng.normal(0, 1.2, ITEMS)[item]
        label = (rng.random(ROWS) < 1 / (1 + np.exp(-effects))).astype(np.int8)
        frame = pl.DataFrame(
            {"shop": [f"s{v}" for v in shop], "day": [f"d{v}" for v in day], "item": item, "label": label}
        )
        found = (Column("shop"), Column("day"), Column("item", "dense", ITEMS))
        return Scan(found, iter([Batch(frame, np.arange(1, ROWS + 1))]), label="label")


@dataclass(frozen=True)
class Visits(Source):
    """Interactions: each user likes a third of the films."""

    name: ClassVar[str] = "visits"
    task: ClassVar[Task] = "cf"
    generates: ClassVar[bool] = True

    def scan(self, path: Path | None = None, columns: tuple[Column, ...] | None = None) -> Scan:
        """See :meth:`Source.scan`."""
        rng = generator(0, "stored visits")
        users, films = [], []
        for user in range(USERS):
            liked = np.where(np.arange(FILMS) % 3 == user % 3, 5.0, 1.0) / (1 + np.arange(FILMS)) ** 0.3
            chosen = np.sort(rng.choice(FILMS, 24, replace=False, p=liked / liked.sum()))
            users += [user] * len(chosen)
            films += chosen.tolist()
        frame = pl.DataFrame({"user": users, "item": films})
        found = (Column("user", "dense", USERS), Column("item", "dense", FILMS))
        return Scan(found, iter([Batch(frame, np.arange(1, len(users) + 1))]))


@dataclass(frozen=True)
class Made:
    """How one file is made.

    Attributes:
        backbone: of the model.
        method: how its table is made small; ``None`` leaves it dense.
        budget: see ``compress``.
        how: storage, index, bake.
    """

    backbone: str
    method: Any
    budget: str = "50%"
    how: dict[str, Any] = dataclasses.field(default_factory=dict)


def storages() -> Iterator[tuple[str, Made]]:
    """The layouts of entries with every storage."""
    for storage in ("fp32", "fp16", "int8"):
        yield f"dense-{storage}-fm", Made("fm", None, how={"storage": storage})
        yield f"bitmap-{storage}-deepfm", Made("deepfm", methods.Shaver(), "sparsity=0.6", {"storage": storage})
        how = {"storage": storage, "index": "direct"}
        yield f"direct-{storage}-mlp", Made("mlp", methods.MagPrune(), "sparsity=0.6", how)
    yield "bitmap-byte-budget-fm", Made("fm", methods.FrequencyDistance(), "5000B", {"storage": "int8"})
    yield "bitmap-wide-mf", Made("mf", methods.Random(), "sparsity=0.5", {"storage": "fp32", "bake": True})
    yield "dense-ego-lightgcn", Made("lightgcn", None, how={"storage": "int8"})


def composed() -> Iterator[tuple[str, Made]]:
    """The layouts of computed vectors with their operations and storages."""
    fp32, fp16, int8 = ({"storage": storage} for storage in ("fp32", "fp16", "int8"))
    for bits in range(2, 9):
        backbone, bake = ("fm", {}) if bits % 2 else ("mf", {"bake": True})
        yield f"quantised-{bits}-{backbone}", Made(backbone, methods.PTQ(bits=bits), "100%", bake)
    yield "quantised-rounded-fm", Made("fm", methods.PTQ(bits=4, scale="block", zero="rounded"), "100%")
    yield "product-mult-fm", Made("fm", methods.QR(operation="mult", training=SHORT), how=fp32)
    yield "product-add-fm", Made("fm", methods.QR(operation="add", order="id", training=SHORT), how=int8)
    yield "product-concat-mlp", Made("mlp", methods.QR(operation="concat", scope="joint", training=SHORT), how=fp16)
    yield "product-mult-gmf", Made("gmf", methods.QR(training=SHORT), "sparsity=0.4", fp32)
    yield "tensor-train-cache-fm", Made("fm", methods.TTRec(training=SHORT), how=fp32)
    yield (
        "tensor-train-int8-fm",
        Made("fm", methods.TTRec(cores=2, cache_share=0, order="id", training=SHORT), how=int8),
    )
    yield "tensor-train-fp16-mf", Made("mf", methods.TTRec(cores=4, training=SHORT), how=fp16)
    net = {"functions": 8, "depth": 1, "training": SLOW}
    yield "hash-mlp-linear-fm", Made("fm", methods.DHE(**net, hot=5), how=fp32)
    gauss = methods.DHE(**net, code="gaussian", last_layer="bn_mish", norm="after", order="id")
    yield "hash-mlp-mish-affine-fm", Made("fm", gauss, how=int8)
    yield "hash-mlp-mish-mf", Made("mf", methods.DHE(**net, last_layer="bn_mish", norm="before"), how=fp16)
    cerp = {"search_epochs": 1, "training": SHORT}
    yield "pruned-sum-add-fm", Made("fm", methods.CERP(**cerp), how=fp32)
    yield "pruned-sum-concat-mlp", Made("mlp", methods.CERP(operation="concat", order="id", **cerp), how=int8)
    yield "pruned-sum-add-mf", Made("mf", methods.CERP(**cerp), how=fp16)
    yield "opt-embed-fm", Made("fm", methods.OptEmbed(population=4, generations=2, training=SHORT), how=fp32)
    coded = methods.RateDistortion()
    yield "transform-deepfm", Made("deepfm", coded, "12%")
    yield "transform-coded-head-deepfm", Made("deepfm", coded, "5000B")
    yield "transform-sparsity-fm", Made("fm", coded, "sparsity=0.5")
    yield "transform-neumf", Made("neumf", coded, "15%")
    yield "transform-sparsity-neumf", Made("neumf", coded, "sparsity=0.5")
    yield "trellis-lightgcn", Made("lightgcn", coded, "10%", {"bake": True})
    yield "trellis-classes-lightgcn", Made("lightgcn", coded, "20%", {"bake": True})
    yield "trellis-sums-mf", Made("mf", coded, "45%", {"bake": True})
    yield "trellis-small-mf", Made("mf", coded, "5%", {"bake": True})


def heads() -> Iterator[tuple[str, Made]]:
    """Every head that a backbone lowers to."""
    for backbone in ("deepfm", "dcn_mix", "dcnv2", "mlp", "fm", "neumf", "gmf", "pair_mlp", "mf", "lightgcn"):
        how = {"storage": "int8", "bake": backbone in ("gmf", "mf", "lightgcn")}
        yield f"head-{backbone.replace('_', '-')}", Made(backbone, methods.MagPrune(), "40%", how)


def numbers() -> Iterator[tuple[str, Made]]:
    """Single numbers of a head as arrays, in files with and without blank places behind their headers."""
    small, coded = methods.FrequencyDistance(), methods.RateDistortion()
    yield "format2-bitmap-deepfm", Made("deepfm", small, "8000B", {"storage": "int8"})
    yield "format2-bitmap-fm", Made("fm", methods.MagPrune(), "40%", {"storage": "fp16"})
    yield "format2-bitmap-gmf", Made("gmf", methods.MagPrune(), "40%", {"storage": "int8", "bake": True})
    yield "format2-bitmap-neumf", Made("neumf", methods.Random(), "9000B", {"storage": "int8"})
    yield "format2-dense-ego-lightgcn", Made("lightgcn", None, how={"storage": "int8"})
    yield "format2-transform-coded-head-deepfm", Made("deepfm", coded, "5000B")
    yield "format2-trellis-mf", Made("mf", coded, "6000B", {"bake": True})


FORMATS = {1: (storages, composed, heads), 2: (numbers,)}
"""What was made in each format."""


def plugin(name: str) -> Any:
    """A backbone with few units."""
    from pocketrec import registry

    cls = registry.load("backbones", name)
    names = {field.name for field in dataclasses.fields(cls)}
    return cls(**{n: v for n, v in SMALL[name].items() if n in names})


class Workshop:
    """Data and models, each made once, and files of them."""

    def __init__(self, folder: Path, out: Path) -> None:
        self.out = out
        self.clicks = pr.encode(Clicks(), None, folder / "clicks", threshold=2)
        self.visits = pr.encode(Visits(), None, folder / "visits")
        self.model = cache(self._model)

    def _model(self, name: str) -> tuple[pr.Model, pr.Dataset]:
        backbone = plugin(name)
        data = self.clicks if backbone.task == "ctr" else self.visits
        return pr.train(backbone, data, pr.Run(None, seed=1), TEACH), data

    def write(self, name: str, made: Made) -> None:
        """The file and what is expected of it."""
        model, data = self.model(made.backbone)
        if made.method is None:
            small = pr.compress(model, data, methods.MagPrune(), "sparsity=0", **made.how)
            small = dataclasses.replace(small, model=model)
        else:
            small = pr.compress(model, data, made.method, made.budget, run=pr.Run(None, seed=2), **made.how)
        path = self.out / f"{name}.safetensors"
        sizes = small.save(path)
        arrays, inputs = expected(path)
        save_file(arrays, path.with_suffix(".expected.safetensors"), {"inputs": json.dumps(inputs)})
        layouts = sorted({b.to_json()["layout"] for b in pr.open(path).artifact.packed.blocks})
        sys.stdout.write(f"{name}: {sizes['file']} B, {', '.join(layouts)}\n")


def expected(path: Path) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    """What the file says."""
    reader = pr.open(path)
    artifact, names = reader.artifact, [f.name for f in reader.schema.fields]
    inputs = raw_clicks() if reader.kind == "ctr" else raw_pairs()
    found = [artifact.vocabulary.lookup_row([row[n] for n in names]) for row in inputs]
    fields = np.repeat(np.arange(len(names)), artifact.vocabulary.keys)
    arrays = {
        "rows": np.array(found, np.int64),
        "fields": fields.astype(np.int64),
        "vectors": table(artifact, fields, np.arange(len(fields))),
        "absent": table(artifact, np.arange(len(names)), np.full(len(names), -1)),
    }
    if reader.kind != "ego":
        arrays["scores"] = reader.logits(arrays["rows"])
    if reader.kind == "baked":
        lists = [reader.recommend(user, 12, range(user)) for user in (0, 7, USERS - 1)]
        arrays["users"] = np.array([0, 7, USERS - 1])
        arrays["items"] = np.array([[item for item, _ in ranked] for ranked in lists])
        arrays["list_scores"] = np.array([[score for _, score in ranked] for ranked in lists], np.float32)
    stored = {**artifact.packed.arrays(), **artifact.vocabulary.arrays()}
    arrays |= {f"stored.{n}": np.array(a) for n, a in stored.items() if np.issubdtype(a.dtype, np.integer)}
    return arrays, inputs


def table(artifact: Any, fields: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Vectors of file rows, by the kernel; numpy has to agree."""
    found = [artifact.packed.lookup(rows[i : i + 1, None], fields[i : i + 1])[0, 0] for i in range(len(rows))]
    check = [artifact.packed.lookup_numpy(rows[i : i + 1, None], fields[i : i + 1])[0, 0] for i in range(len(rows))]
    np.testing.assert_allclose(found, check, rtol=1e-6, atol=1e-6)
    vectors = np.array(found, np.float32)
    for block in artifact.packed.blocks:
        if isinstance(block, HashMlpBlock):
            positions = block.positions(rows)
            hit = positions >= 0
            vectors[hit, block.left : block.right] = wide(block, positions[hit])
    return vectors


def wide(block: HashMlpBlock, slots: np.ndarray) -> np.ndarray:
    """What a network says, in float64: float32 errs by some 5e-7, on each processor otherwise."""
    s = block.settings
    x = codes(slots, s["functions"], s["buckets"], s["salt"], s["code"]).astype(np.float64)
    for i in range(len(block.widths) - 1):
        x = x @ block.factor(f"weight{i}").astype(np.float64) + block.arrays[f"bias{i}"]
        if i + 2 < len(block.widths) or s["end"] != "linear":
            x = x * np.tanh(np.logaddexp(0, x))
    return x * block.arrays["gain"] + block.arrays["shift"] if s["end"] == "mish_affine" else x


def raw_clicks() -> list[dict[str, Any]]:
    """Rows with known, unknown and missing values; integers as numbers and as text."""
    rng = generator(0, "stored inputs")
    rows: list[dict[str, Any]] = [
        {"shop": f"s{rng.integers(SHOPS)}", "day": f"d{rng.integers(DAYS)}", "item": int(rng.integers(ITEMS))}
        for _ in range(36)
    ]
    unknown = {"shop": "nowhere", "day": "d9", "item": 10**6}
    missing = {"shop": None, "day": None, "item": None}
    return [*rows, unknown, missing, {**rows[0], "shop": "nowhere"}, {**rows[1], "item": str(rows[1]["item"])}]


def raw_pairs() -> list[dict[str, Any]]:
    """Pairs of users and items, some of them unknown."""
    rng = generator(1, "stored inputs")
    rows: list[dict[str, Any]] = [
        {"user": int(rng.integers(USERS)), "item": int(rng.integers(FILMS))} for _ in range(36)
    ]
    return [
        *rows,
        {"user": 10**6, "item": 0},
        {"user": 0, "item": 10**6},
        {"user": -1, "item": -1},
        {"user": "3", "item": "4"},
    ]


def main() -> None:
    """Write all files into a folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", default="", help="names that start so")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        shop = Workshop(Path(folder), arguments.out)
        for name, made in (pair for files in FORMATS[FORMAT] for pair in files()):
            if name.startswith(arguments.only) and not (arguments.out / f"{name}.safetensors").exists():
                shop.write(name, made)


if __name__ == "__main__":
    main()
