"""Published parameter counts: each row of ``published/golden_param_counts.csv`` in exactly its configuration."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pocketrec.backbones.deepfm import DeepFM
from pocketrec.backbones.lightgcn import LightGCN
from pocketrec.backbones.neumf import NeuMF
from pocketrec.compression.budget import Budget
from pocketrec.compression.compress import sized
from pocketrec.compression.ladder import Ladder
from pocketrec.compression.small import Small
from pocketrec.families.compositional.region import Region, regions
from pocketrec.methods.dhe import DHE
from pocketrec.methods.mag_prune import MagPrune
from pocketrec.methods.qr import QR
from pocketrec.methods.tt_rec import TTRec
from pocketrec.models.table import Block, DenseTable
from pocketrec.schema import Field, Schema

Row = Mapping[str, str]
with (Path(__file__).parent / "published" / "golden_param_counts.csv").open(newline="") as file:
    GOLDEN: list[Row] = list(csv.DictReader(file))

ROWS = {
    "criteo": (1_086_810,),
    "avazu": (4_428_511,),
    "kdd12": (6_019_761,),
    "gowalla": (29_858, 40_981),
    "yelp2018": (31_668, 38_048),
    "cf": (29_858, 40_981),
}
"""Rows of each table; a network of DHE has the same size for any number."""


def golden(*methods: str) -> pytest.MarkDecorator:
    """The rows of some methods, one test each."""
    rows = [row for row in GOLDEN if row["method"] in methods]
    return pytest.mark.parametrize("row", rows, ids=lambda r: f"{r['scope']}-{r['method']}-{r['target_sparsity']}")


def tiling(scope: str) -> tuple[Schema, tuple[Block, ...]]:
    """Fields and blocks of the backbone that a scope names; click models have linear weights beside."""
    data, _, backbone = scope.partition("-")
    if len(ROWS[data]) == 1:
        schema = Schema("ctr", (Field("all", ROWS[data][0], 0),))
        return schema, DeepFM(dim=16).blocks(schema)
    users, items = ROWS[data]
    schema = Schema(
        "cf", (Field("user", users, 0, "dense", oov=False), Field("item", items, users, "dense", oov=False))
    )
    return schema, (NeuMF() if backbone == "neumf" else LightGCN()).blocks(schema)


def tables(row: Row) -> tuple[Region, ...]:
    """The dense tables that a row replaces."""
    return regions(tiling(row["scope"])[1], "block")


def numbers(row: Row, name: str, text: str = r"[\dx,-]+") -> list[tuple[int, ...]]:
    """What a configuration says of a name, each time: ``p=125x125x128`` is one tuple of three."""
    found = re.findall(rf"\b{name}[= ]({text})", row["configuration"])
    return [tuple(map(int, re.split("[x,-]", part))) for part in found]


def test_every_row_is_tested():
    assert {row["method"] for row in GOLDEN} == {"original", "magprune", "qr", "ttrec", "dhe"}
    assert len(GOLDEN) == 39


@golden("original")
def test_dense_tables(row):
    assert sum(table.values for table in tables(row)) == int(row["params"])


class Asked(Ladder):
    """Notes how many values it is asked for."""

    def __init__(self) -> None:
        self.values: list[int] = []

    def table(self, room):
        self.values.append(room.values)


@golden("magprune")
def test_values_that_are_kept(row):
    schema, blocks = tiling(row["scope"])
    table = DenseTable(schema, blocks, torch.empty(schema.rows, 17, device="meta"))
    model, asked = SimpleNamespace(table=table, with_table=lambda table: None), Asked()
    budget = Budget("sparsity", int(row["target_sparsity"]) / 100)
    sized(asked, Small(model, None, MagPrune(), budget, "fp32"))  # type: ignore[arg-type]
    assert asked.values == [int(row["params"])]


@golden("qr")
def test_pairs_of_tables(row):
    ((divisor,),) = numbers(row, "p")
    method, params = QR(divisor=divisor), int(row["params"])
    plans = [method.plan(table, params) for table in tables(row)]
    assert [plan.divisor for plan in plans] == [divisor] * len(plans)
    assert sum(plan.values for plan in plans) == sum(method.least(table) for table in tables(row)) == params
    assert all(method.plan(table, method.least(table) - 1) is None for table in tables(row))


@golden("ttrec")
def test_trains(row):
    (ranks,), (widths,), cached = numbers(row, "ranks"), numbers(row, "q"), numbers(row, "cache", r"\d+")
    dense, params = sum(table.values for table in tables(row)), int(row["params"])
    budget = dense - int(dense * int(row["target_sparsity"]) / 100)
    method = TTRec(cores=len(ranks) + 1, ranks=ranks, cache_share=0.1 if cached else 0)
    plans = [method.plan(table, max(budget, params), np.arange(table.rows)) for table in tables(row)]
    assert [plan.rows for plan in plans] == (numbers(row, "p") or numbers(row, "(?:user|item)"))
    assert {plan.widths for plan in plans} == {widths}
    assert {plan.ranks for plan in plans} == {ranks}
    assert [(len(plan.cached),) for plan in plans if len(plan.cached)] == cached
    assert sum(plan.values for plan in plans) == params
    assert all(method.plan(table, method.least(table) - 1, np.arange(table.rows)) is None for table in tables(row))


@golden("dhe")
def test_networks(row):
    ((functions,),), ((width,),) = numbers(row, "k"), numbers(row, "out")
    (hidden,) = numbers(row, "hidden")
    if "x" in row["configuration"]:
        hidden = hidden[:1] * hidden[1]
    clicks = len(tables(row)) == 1
    method = DHE(functions=functions, hidden=hidden, norm="before" if clicks else "after", last_layer="bn_mish")
    plans = [method.plan(table, int(row["params"])) for table in tables(row)]
    assert {plan.widths for plan in plans} == {(functions, *hidden, width)}
    assert sum(plan.values for plan in plans) == sum(method.least(t) for t in tables(row)) == int(row["params"])
    assert all(method.plan(table, method.least(table) - 1) is None for table in tables(row))
