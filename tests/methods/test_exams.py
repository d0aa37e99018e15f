"""Every registered plug-in sits the exam of its axis; and the exam catches plug-ins that break a law."""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
import polars as pl
import pytest
import torch

from pocketrec import registry, testing
from pocketrec.compression.ladder import Finished, Method
from pocketrec.data.source import Batch, Column, Scan, Source
from pocketrec.families.pruning import PruningLadder
from pocketrec.methods.mag_prune import MagPrune
from pocketrec.testing import ExamFailed, Lab, backbone, method, plugin, source
from pocketrec.training.loop import Training

DELICATE = ("check_training_lowers_the_loss", "check_scores_are_row_by_row", "check_lowered_head_agrees")
"""Checks whose verdict depends on trained numbers."""


def numbers(rows: int, columns: int) -> list[list[int]]:
    return np.random.default_rng(0).integers(0, 6, (rows, columns)).tolist()


def lines(rows, separator: str) -> str:
    return "".join(separator.join(map(str, row)) + "\n" for row in rows)


AVAZU = (
    "id,click,hour,C1,banner_pos,site_id,site_domain,site_category,app_id,app_domain,app_category,device_id,device_ip,"
    "device_model,device_type,device_conn_type,C14,C15,C16,C17,C18,C19,C20,C21\n"
)
RAW = {
    "adjacency": ("train.txt", lines([[u, *range(u % 3, 12, 2)] for u in range(20)], " ")),
    "avazu": ("train.csv", AVAZU + lines([[i, i % 2, *row] for i, row in enumerate(numbers(60, 22))], ",")),
    "criteo": ("train.txt", lines([[i % 2, *row] for i, row in enumerate(numbers(60, 39))], "\t")),
    "interactions": ("pairs.csv", "user,item\n" + lines([[i % 12, i % 17] for i in range(150)], ",")),
    "kdd12": ("training.txt", lines([[i % 3, *row] for i, row in enumerate(numbers(60, 11))], "\t")),
    "libfm": ("rows.libfm", lines([[i % 2, *(f"{v}:1" for v in row)] for i, row in enumerate(numbers(60, 5))], " ")),
    "table": ("rows.csv", "label,a,b,c\n" + lines([[i % 2, i % 5, i / 7, f"v{i % 4}"] for i in range(60)], ",")),
}


def examined(axis):
    return [
        pytest.param(
            name,
            check,
            id=f"{name}-{check.__name__.removeprefix('check_')}",
            marks=[pytest.mark.delicate] if check.__name__ in DELICATE else [],
        )
        for name in registry.modules(axis)
        for check in testing.checks(axis)
    ]


@pytest.fixture(scope="module")
def source_lab(tmp_path_factory):
    def lab(name: str) -> Lab:
        folder = tmp_path_factory.mktemp(name)
        if name not in RAW:
            return Lab(folder)
        file, text = RAW[name]
        (folder / file).write_text(text)
        return Lab(folder, raw=folder / file)

    return lab


@pytest.mark.parametrize(("name", "check"), examined("sources"))
def test_source(name, check, source_lab):
    plug = registry.load("sources", name)
    check(plug(rows=500, cardinalities=(20, 5)) if name == "synthetic" else plug(), source_lab(name))


@pytest.mark.parametrize(("name", "check"), examined("backbones"))
def test_backbone(name, check, lab):
    check(registry.load("backbones", name)(), lab)


@pytest.mark.parametrize(("name", "check"), examined("methods"))
def test_method(name, check, lab):
    examinee = registry.load("methods", name)()
    check(examinee.small() if check.__module__ == method.__name__ else examinee, lab)


@pytest.mark.parametrize("axis", registry.AXES)
def test_every_axis_has_twenty_checks_with_a_reason(axis):
    checks = testing.checks(axis)
    assert len(checks) >= 20
    assert all(check.__doc__ for check in checks)


class Faulty(Method):
    """Does what a faulty method does; ``fault`` says which law it breaks."""

    name: ClassVar[str] = "faulty"


@dataclass(frozen=True)
class Meddler(Faulty):
    """Writes into the model."""

    def prepare(self, model, data, run):
        with torch.no_grad():
            model.table.weight()[0] += 1
        return MagPrune().prepare(model, data, run)


@dataclass(frozen=True)
class Gambler(Faulty):
    """Draws from a global generator."""

    def prepare(self, model, data, run):
        random.random()
        return MagPrune().prepare(model, data, run)


@dataclass(frozen=True)
class Peeker(Faulty):
    """Reads the test split."""

    def prepare(self, model, data, run):
        len(data.test)
        return MagPrune().prepare(model, data, run)


@dataclass(frozen=True)
class Forgetter(Faulty):
    """Gives another table each time."""

    calls: list = field(default_factory=list, compare=False)

    def prepare(self, model, data, run):
        self.calls.append(1)
        scores = np.random.default_rng(len(self.calls)).random(model.table.weight().shape, np.float32)
        fill = np.zeros((data.schema.width, scores.shape[1]), np.float32)
        return PruningLadder(model.table, scores, fill, data.counts)


@dataclass(frozen=True)
class Hoarder(Faulty):
    """Keeps more than it was asked to."""

    def prepare(self, model, data, run):
        ladder = MagPrune().prepare(model, data, run)
        return _Hoard(**{name: getattr(ladder, name) for name in ladder.__dataclass_fields__})


class _Hoard(PruningLadder):
    def table(self, room):
        return super().table(room if room.values is None else replace(room, values=room.values + 5))


class Grower(Faulty):
    """Makes tables of the right size, and finishes larger ones."""

    def prepare(self, model, data, run):
        ladder = MagPrune().prepare(model, data, run)
        return Finished(ladder, lambda draft, room: draft.with_table(ladder.table(replace(room, **more(room)))))


def more(room):
    return {"size_bytes": room.most + 4000} if room.values is None else {"values": room.values + 5}


@dataclass(frozen=True)
class Late(Method):
    """Trains what it is given, and makes its exact cut afterwards: other entries than those of its draft stay."""

    name: ClassVar[str] = "late"
    trains: ClassVar[bool] = True

    def prepare(self, model, data, run):
        def cut(draft, room):
            trained = run.fit("late", model, data, Training(epochs=1, batch_size=64, learning_rate=0.1))
            return trained.with_table(MagPrune().prepare(trained, data, run).table(room))

        return Finished(MagPrune().prepare(model, data, run), cut)


@pytest.mark.parametrize(
    ("check", "faulty"),
    [
        (method.check_model_is_left_alone, Meddler()),
        (method.check_globals_are_left_alone, Gambler()),
        (method.check_same_seed_same_bytes, Forgetter()),
        (method.check_a_stored_run_serves_again, Forgetter()),
        (method.check_removes_what_was_asked, Hoarder()),
        (method.check_final_tables_stay_in_their_room, Grower()),
        (method.check_files_are_within_budget, Grower()),
        (plugin.check_needs_no_argument, MagPrune()),
    ],
    ids=lambda value: getattr(value, "__name__", type(value).__name__),
)
def test_faulty_methods_fail(check, faulty, tmp_path):
    if faulty == MagPrune():
        check(faulty, Lab(tmp_path))
        return
    with pytest.raises(ExamFailed):
        check(faulty, Lab(tmp_path))


@pytest.mark.parametrize(
    "check",
    [
        method.check_removes_what_was_asked,
        method.check_final_tables_stay_in_their_room,
        method.check_shares_are_kept,
        method.check_files_are_within_budget,
        method.check_same_seed_same_bytes,
    ],
)
def test_a_method_may_cut_after_its_training(check, lab):
    check(Late(), lab)


def test_reading_the_test_split_fails(tmp_path):
    with pytest.raises(KeyError, match="test"):
        method.check_reads_no_test_rows(Peeker(), Lab(tmp_path))


@dataclass(frozen=True)
class Swallower(Source):
    """Drops a row and tells nobody; gives other rows each time; has a hole."""

    fault: str = "none"
    calls: list = field(default_factory=list, compare=False)

    name: ClassVar[str] = "swallower"
    generates: ClassVar[bool] = True

    def scan(self, path=None, columns=None):
        self.calls.append(1)
        values = ["a", "b", None if self.fault == "hole" else "c"] * 10
        if self.fault == "moody":
            values[0] = f"call {len(self.calls)}"
        frame = pl.DataFrame({"x": values, "label": [0, 1, 0] * 10})
        numbered = np.arange(30, 0, -1) if self.fault == "backwards" else np.arange(1, 31)
        return Scan((Column("x"),), iter([Batch(frame, numbered)]), label="label")


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("hole", source.check_features_are_never_null),
        ("moody", source.check_reads_the_same_twice),
        ("backwards", source.check_lines_go_up),
    ],
)
def test_faulty_sources_fail(fault, check, tmp_path):
    check(Swallower(), Lab(tmp_path))
    with pytest.raises(ExamFailed):
        check(Swallower(fault), Lab(tmp_path))


def test_a_head_that_lowers_wrongly_fails(tmp_path, monkeypatch):
    lab, deepfm = Lab(tmp_path), registry.load("backbones", "deepfm")()
    backbone.check_lowered_head_agrees(deepfm, lab)
    model = lab.model(deepfm)
    with torch.no_grad():
        model.layers[0].bias[0] = 3.0
    stale = registry.load("backbones", "deepfm")().build(lab.clicks, 0).lower()
    monkeypatch.setattr(type(model), "lower", lambda self: stale)
    with pytest.raises(ExamFailed):
        backbone.check_lowered_head_agrees(deepfm, lab)


def test_a_configuration_that_is_not_frozen_fails(tmp_path):
    @dataclass
    class Loose(Method):
        """Can be changed."""

        name: ClassVar[str] = "loose"

        def prepare(self, model, data, run):
            raise NotImplementedError

    with pytest.raises(ExamFailed):
        plugin.check_is_frozen(Loose(), Lab(tmp_path))
    with pytest.raises(ExamFailed):
        plugin.check_example_runs(Loose(), Lab(tmp_path))
