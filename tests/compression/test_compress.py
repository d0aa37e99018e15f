"""What a budget and a room may be, and ladders that do not keep to theirs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest

from pocketrec.backbones import DeepFM, LightGCN
from pocketrec.compression.budget import Budget, Room
from pocketrec.compression.compress import compress
from pocketrec.compression.ladder import Finished, Method
from pocketrec.compression.measure import measure
from pocketrec.data.encode import encode
from pocketrec.errors import ArtifactError, BudgetError, ConfigError, DataError
from pocketrec.methods.random import Random
from pocketrec.models.pruned import PrunedTable
from pocketrec.sources.synthetic import Synthetic


@pytest.mark.parametrize(
    "text", ["", "5", "0%", "101%", "-3%", "sparsity=1", "sparsity=-0.1", "sparsity", "0 B", "3 mb", "x MiB", "1e400%"]
)
def test_budgets_that_say_nothing_are_refused(text):
    with pytest.raises(ConfigError, match=r"`budget` must be like 'sparsity=0.95' \(0 <= s < 1\), '5%'"):
        Budget.parse(text)


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("sparsity=0.95", Budget("sparsity", 0.95)),
        (" sparsity = 0 ", Budget("sparsity", 0.0)),
        ("5%", Budget("share", 0.05)),
        ("100 %", Budget("share", 1.0)),
        ("4MiB", Budget("bytes", 4 << 20)),
        ("1.5 KiB", Budget("bytes", 1536)),
        ("1e3 B", Budget("bytes", 1000)),
    ],
)
def test_budgets_are_read(text, budget):
    assert Budget.parse(text) == Budget.parse(budget) == budget


@pytest.mark.parametrize("bounds", [{}, {"values": 3, "size_bytes": 3}])
def test_a_room_is_bounded_once(bounds):
    with pytest.raises(ConfigError, match="must have either `values` or `size_bytes`, but got values="):
        Room(**bounds)


@dataclass(frozen=True)
class Growing(Method):
    """Random values, to which the last step adds rows back: the first ``times`` times that it is asked."""

    name: ClassVar[str] = "growing"
    times: int = 1

    def prepare(self, model, data, run):
        def last(model, room):
            rooms.append(room.most)
            table, keep = model.table, model.table.keep.clone()
            if len(rooms) <= self.times:
                keep[:60] = True
            grown = PrunedTable(table.schema, table.blocks, table.base, keep, table.fill, table.absent)
            return model.with_table(grown)

        rooms: list[int] = []
        object.__setattr__(self, "rooms", rooms)
        return Finished(Random().prepare(model, data, run), last)


def test_a_table_that_grows_at_the_end_is_cut_again_to_the_room_that_is_left(clicks, model, tmp_path):
    method = Growing()
    limit = compress(model, clicks, Random(), "sparsity=0.6").sizes["file"]
    small = compress(model, clicks, method, f"{limit} B", storage="fp32")
    first, second = method.rooms  # type: ignore[attr-defined]
    assert second < first
    assert small.save(tmp_path / "x.safetensors")["file"] == (tmp_path / "x.safetensors").stat().st_size <= limit


def test_a_method_that_always_grows_is_told_to_keep_to_its_room(clicks, model):
    limit = compress(model, clicks, Random(), "sparsity=0.6").sizes["file"]
    with pytest.raises(BudgetError, match=rf"growing must finish a file within {limit:,} B, but is [\d,]+ B above it"):
        compress(model, clicks, Growing(times=99), f"{limit} B", storage="fp32")


def test_a_split_without_rows_is_not_measured(tmp_path):
    data = encode(Synthetic(rows=200, cardinalities=(9, 4)), None, tmp_path / "data", split="1:0:0")
    with pytest.raises(DataError, match="The valid split has no rows; measure another split, or encode with one"):
        measure(DeepFM(dim=2, hidden=(2,)).build(data, 0), data.valid, latency=False)


def test_a_file_of_a_graph_must_name_a_ranking_backbone(visits, tmp_path):
    small = compress(LightGCN(dim=4, layers=1).build(visits, 0), visits, Random(), "50%")
    contents = small.contents
    backbone = {"name": "deepfm", "config": {}}
    replace(contents, info={**contents.info, "backbone": backbone}).write(tmp_path / "x.safetensors")
    with pytest.raises(ArtifactError, match="must name a ranking backbone, but this one does not; compress it again"):
        measure(tmp_path / "x.safetensors", visits.valid, latency=False)
