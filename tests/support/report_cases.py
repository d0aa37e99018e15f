"""Tables of a report, and stored figures beside them."""

from __future__ import annotations

import csv

from pocketrec.format.arrays import open_arrays


def rows(folder, name):
    with (folder / "report" / f"{name}.csv").open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def stored(folder, data, backbone, method, budget, seed):
    key = f"{data}-{backbone}-{method}-{budget}-{seed}".replace("=", "-")
    return open_arrays(folder / "predictions" / f"{key}.safetensors")[0]


def row_of(found, method, budget="uncompressed"):
    return next(r for r in found if (r["method"], r["budget"]) == (method, budget))


def tables_of(study):
    return {p.name: p.read_bytes() for p in (study / "report").iterdir() if p.suffix in (".md", ".csv")}
