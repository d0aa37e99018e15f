"""Phases in fresh processes, their time and their memory."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pocketrec.backbones import DeepFM, LightGCN
from pocketrec.errors import ConfigError, PocketRecError, UnsupportedOp
from pocketrec.format.arrays import save_arrays
from pocketrec.format.artifact import Contents
from pocketrec.format.program import Op, Program
from pocketrec.format.vocabulary import Vocabulary
from pocketrec.methods import MagPrune, Shaver
from pocketrec.models.pruned import PrunedTable
from pocketrec.models.table import Block, DenseTable
from pocketrec.native import library
from pocketrec.schema import Field, Schema
from pocketrec.study.profiling import phase, profile, stopwatch
from pocketrec.study.profiling.phase import Workload
from pocketrec.study.profiling.stopwatch import Stopwatch, TimedLoop, quantiles, timed
from pocketrec.training.loop import Training, fingerprint
from pocketrec.training.run import Run

CLICKS, VISITS = DeepFM(dim=4, hidden=(8,)), LightGCN(dim=8)
TRAINING = Training(epochs=2, batch_size=64)
PARTS = ("packages", "vocabulary", "model", "runtime")
PACKED = ["inference packed", *(["inference packed numpy"] if library.available() else [])]
LISTS = ["scoring", "ranking", "recommending"]


@pytest.fixture
def here(monkeypatch):
    """Phases run in this process, but for the runtime's, which must not meet torch."""
    elsewhere = profile._run
    monkeypatch.setattr(phase.gc, "collect", lambda: 0)
    monkeypatch.setattr(
        profile, "_run", lambda task: elsewhere(task) if task.kind in phase.TORCH_FREE else phase.run(task)
    )


@pytest.fixture(scope="session")
def store(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("store")


def profiled(lab, store, backbone, method, name, **more):
    data = lab.data(backbone.task)
    return profile.profile(
        backbone, method, data, training=TRAINING, profile=name, repeats=3, store=store, **more
    )  # fmt: skip


def task(**more) -> Workload:
    plain = {"data": "", "backbone": {}, "training": [], "method": None, "budget": "", "seed": 0, "threads": 1}
    return Workload(**{"kind": "serve", "phase": "p", "repeats": 3, "store": "", **plain, **more})


def test_a_call_is_warmed_up_timed_and_settled():
    calls, settled = [], []
    record = timed("p", calls.append, 20, lambda: settled.append(len(calls)))
    assert calls == [0, 1, *range(20)]
    assert settled == [n for i in range(20) for n in (i + 2, i + 3)]
    assert record["phase"] == "p"
    assert record["ms"]["repeats"] == 20
    assert record["ms"]["p10"] <= record["ms"]["p50"] <= record["ms"]["p90"]


def test_long_calls_are_timed_less_often(monkeypatch):
    monkeypatch.setattr(stopwatch, "LONG_SECONDS", 0.0)
    assert timed("p", lambda i: None, 20)["ms"]["repeats"] == stopwatch.LEAST_CALLS
    assert timed("p", lambda i: None, 2)["ms"]["repeats"] == 2


def test_spread_is_the_quantiles():
    assert quantiles(list(range(11))) == {"p50": 5.0, "p10": 1.0, "p90": 9.0, "repeats": 11}


def test_energy_is_told_where_counters_can_be_read(tmp_path, monkeypatch):
    monkeypatch.setattr(stopwatch, "POWERCAP", tmp_path)
    assert "joules" not in timed("p", lambda i: None, 4)
    for name, start, span in (("intel-rapl:0", 900, 999), ("intel-rapl:1", 0, 10**9), ("intel-rapl:0:0", 0, 10**9)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{start}\n")
        (tmp_path / name / "max_energy_range_uj").write_text(f"{span}\n")

    def call(i: int) -> None:
        for name, span in (("intel-rapl:0", 1000), ("intel-rapl:1", 10**9 + 1), ("intel-rapl:0:0", 10**9)):
            counter = tmp_path / name / "energy_uj"
            counter.write_text(str((int(counter.read_text()) + 200) % span))

    assert timed("p", call, 4)["joules"] == pytest.approx(400e-6)
    (tmp_path / "intel-rapl:1" / "energy_uj").unlink()
    assert "joules" not in timed("p", lambda i: None, 4)


def test_an_epoch_is_extrapolated_from_its_steps():
    assert TimedLoop((1.0, 2.0), per_epoch=10, whole=False, epochs=3).epoch == 15
    ticks = [(0, float("nan")), (10, 1.0), (13, 1.0), (90, 2.0), (94, 2.0)]
    assert stopwatch._steps([(n * 10**6, epoch) for n, epoch in ticks]) == (3.0, 4.0)
    assert stopwatch._steps([(0, float("nan")), (7 * 10**6, 1.0)]) == (7.0,)


def test_a_stopped_training_goes_on_from_the_store(lab, tmp_path):
    model = CLICKS.build(lab.clicks, 0)
    stages = (TRAINING, replace(TRAINING, epochs=1))
    known = Run(None, store=tmp_path).fit("original", model, lab.clicks, stages)
    watch = Stopwatch(seed=0, threads=1, store=tmp_path, batch=16, share=0.2, least=2)
    started = time.perf_counter()
    with watch.timing():
        fitted = watch.fit("original", model, lab.clicks, stages)
    passed = 1000 * (time.perf_counter() - started)
    assert fingerprint(fitted) == fingerprint(known)
    assert [(len(x.steps), x.per_epoch, x.whole, x.epochs) for x in watch.loops] == [
        (5, 30, False, 2),
        (5, 30, False, 1),
    ]
    step, epoch, whole = watch.records("train")
    assert (step["phase"], epoch["phase"], whole["phase"]) == ("train step", "train epoch", "train")
    assert (step["extrapolated"], epoch["extrapolated"], whole["extrapolated"]) == (False, True, True)
    assert step["ms"]["repeats"] == 5
    trained = 2 * watch.loops[0].epoch + watch.loops[1].epoch
    assert trained <= whole["ms"]["p50"] <= trained + passed


def test_steps_are_computed_anew_while_timing(tmp_path):
    calls = []

    def compute(checkpoint):
        calls.append(1)
        return {"value": np.array(len(calls))}

    watch = Stopwatch(seed=0, threads=1, store=tmp_path)
    for _ in range(2):
        assert watch.once("step", {}, compute)["value"] == 1
    with watch.timing():
        assert watch.once("step", {}, compute)["value"] == 2
    (record,) = watch.records("find mask")
    assert record["phase"] == "find mask"
    assert not record["extrapolated"]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("backbone", "method", "name", "phases"),
    [
        (CLICKS, None, "server", {"train": [2048], "inference dense": [2048, 64], "inference packed": [2048, 64]}),
        (CLICKS, Shaver(tune="table"), "edge", {"find mask": [None], "retrain": [64], "inference packed": [64]}),
        (VISITS, MagPrune(), "server", {"find mask": [None], "inference masked": [None], "inference packed": [None]}),
        (VISITS, None, "edge", {"train": [64], "inference packed": [None], "": [64]}),
        (VISITS, MagPrune(), "edge", {"find mask": [None], "inference packed": [None]}),
    ],
)  # fmt: skip
def test_every_phase_is_told(lab, store, backbone, method, name, phases):
    found = profiled(lab, store, backbone, method, name)
    expected = []
    for label, batches in phases.items():
        loop = [f"{label} step", f"{label} epoch"] if label in ("train", "retrain") else []
        packed = PACKED if label == "inference packed" and name == "server" else [label]
        expected += [(p, b) for b in batches for p in (LISTS if not label else loop + packed)]
    assert [(r["phase"], r["batch"]) for r in found] == expected
    for record in found:
        assert set(record) - {"joules"} == {
            "phase", "profile", "batch", "threads", "ms", "peak_mib", "extrapolated", "device",
        }  # fmt: skip
        assert (record["profile"], record["threads"], record["device"]) == (name, 1, "cpu")
        assert set(record["ms"]) == {"p50", "p10", "p90", "repeats"}
        assert 0 < record["ms"]["p10"] <= record["ms"]["p50"] <= record["ms"]["p90"]
        memory = record["peak_mib"]
        assert memory["total"] == pytest.approx(sum(memory[part] for part in PARTS), abs=0.05)
        assert min(memory.values()) >= 0
        whole = record["phase"] in ("train", "retrain")
        part = name == "edge" and record["phase"].endswith("epoch") and backbone is CLICKS
        assert record["extrapolated"] == (whole or part)


@pytest.mark.usefixtures("here")
def test_a_table_joins_with_a_form_of_its_own(lab, store, monkeypatch):
    monkeypatch.setattr(PrunedTable, "forms", ("on-demand codes", "cache"))

    def form(self, name):
        return self if name == self.forms[0] else DenseTable(self.schema, self.blocks, self.weight().detach())

    monkeypatch.setattr(PrunedTable, "form", form)
    found = profiled(lab, store, CLICKS, MagPrune(), "server")
    torch_phases = [(r["phase"], r["batch"]) for r in found if "packed" not in r["phase"]]
    assert torch_phases == [
        ("find mask", None), ("build cache", None), ("inference on-demand codes", 2048),
        ("inference on-demand codes", 64), ("inference cache", 2048), ("inference cache", 64),
    ]  # fmt: skip


def test_a_table_has_only_the_forms_that_it_names(lab):
    table = CLICKS.build(lab.clicks, 0).table
    assert table.form("dense") is table
    with pytest.raises(ConfigError, match="'dense'"):
        table.form("cache")


def test_a_process_of_its_own_trains(lab, store):
    data = lab.clicks
    backbone = {"name": CLICKS.name, "config": asdict(CLICKS)}
    trained = task(
        kind="train", phase="train", data=str(data.path), backbone=backbone, training=[asdict(TRAINING)], batch=64,
        store=str(store),
    )  # fmt: skip
    Run(None, store=store).fit("original", CLICKS.build(data, 0), data, TRAINING)
    found = profile._run(trained)
    assert found["torch"]
    assert [p["phase"] for p in found["phases"]] == ["train step", "train epoch", "train"]
    assert found["peak_mib"]["packages"] > 100
    assert found["peak_mib"]["model"] < 50


def written(folder: Path, rows: int) -> Workload:
    """The task of a file with a dense table of ``rows`` rows of 64 columns."""
    folder.mkdir()
    schema = Schema("ctr", (Field("user", size=rows, offset=0, keys="dense", oov=False),))
    table = DenseTable(schema, (Block("embedding", 0, rows, 0, 64),), torch.ones(rows, 64))
    vocabulary, order = Vocabulary.build(schema, table.stored().numpy(), lambda field: np.empty(0, np.uint64))
    head = Program((Op("sum", ("vectors",), "logit"),))
    Contents("ctr", schema, vocabulary, table.pack("fp32", order), head, {}).write(folder / "file")
    save_arrays(folder / "rows", {"batches": np.zeros((3, 64, 1), np.int64)})
    return task(phase="inference packed", batch=64, file=str(folder / "file"), rows=str(folder / "rows"))


def test_a_larger_table_takes_more_memory_and_the_runtime_no_torch(tmp_path):
    small, large = (profile._run(written(tmp_path / str(rows), rows)) for rows in (10, 200_000))
    assert large["peak_mib"]["model"] - small["peak_mib"]["model"] > 0.9 * 200_000 * 64 * 4 / 2**20
    assert large["peak_mib"]["packages"] == pytest.approx(small["peak_mib"]["packages"], abs=5)
    assert not small["torch"]
    assert small["peak_mib"]["total"] < 80


def test_a_phase_of_the_runtime_that_meets_torch_is_refused(tmp_path):
    assert "torch" in sys.modules
    with pytest.raises(UnsupportedOp, match="without torch"):
        phase.run(written(tmp_path / "file", 10))


def test_numpy_alone_is_asked_for_by_name(monkeypatch):
    plain = profile._environment(task(phase="inference packed numpy", threads=3))
    assert plain["POCKETREC_KERNEL"] == "off"
    assert plain["OMP_NUM_THREADS"] == "3"
    monkeypatch.delenv("POCKETREC_KERNEL", raising=False)
    assert "POCKETREC_KERNEL" not in profile._environment(task(phase="inference packed"))


def test_a_phase_that_fails_says_why(tmp_path, capsys):
    broken = task(phase="inference packed", file=str(tmp_path / "none"))
    with pytest.raises(PocketRecError, match=r"'inference packed' failed: .*none"):
        profile._run(broken)
    (tmp_path / "task.json").write_text(json.dumps(asdict(broken)))
    assert phase.main([str(tmp_path / "task.json")]) > 1
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"profile": "phone"}, "server"), ({"threads": 0}, "thread"), ({"repeats": 0}, "repeat"), ({"share": 2}, "share")],
)  # fmt: skip
def test_wrong_arguments_are_refused(lab, wrong, words):
    with pytest.raises(ConfigError, match=words):
        profile.profile(CLICKS, None, lab.clicks, **wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_refused(lab):
    with pytest.raises(ConfigError, match="no GPU"):
        profile.profile(CLICKS, None, lab.clicks, device="cuda")


def test_the_machine_is_on_record():
    record = json.loads(json.dumps(profile.machine()))
    assert record["versions"]["torch"] == torch.__version__
    assert record["cores"] >= record["usable_cores"] >= 1
    assert record["cpu"]
    assert record["kernel"] == (library.level() or "numpy")
