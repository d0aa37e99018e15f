from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from test_train import BACKBONE, SHORT, clicks, final_bytes, same

from pocketrec.errors import RunLocked, StorageError
from pocketrec.training.run import Run
from pocketrec.training.steps import Stopped
from pocketrec.training.train import train


def counting(calls: list[int], value: float = 1.0):
    def compute(checkpoint):
        calls.append(1)
        return {"x": np.full(3, value)}

    return compute


@pytest.mark.parametrize("stored", [True, False])
def test_once_computes_once_per_name_key_and_seed(stored, tmp_path):
    calls: list[int] = []
    path = tmp_path / "run" if stored else None
    with Run(path) as run:
        for _ in range(3):
            assert run.once("step", {"a": 1}, counting(calls))["x"].tolist() == [1.0] * 3
        assert len(calls) == 1
        run.once("step", {"a": 2}, counting(calls))
        run.once("other", {"a": 1}, counting(calls))
        assert len(calls) == 3
    if stored:
        with Run(path) as run:
            run.once("step", {"a": 1}, counting(calls))
        assert len(calls) == 3
        with Run(path, seed=1) as run:
            run.once("step", {"a": 1}, counting(calls))
        assert len(calls) == 4
        assert not list(path.glob("steps/*.partial"))


def test_a_step_goes_on_from_its_checkpoint(tmp_path):
    done: list[int] = []

    def compute(checkpoint, stop_at=None):
        state = checkpoint.load()
        start = 0 if state is None else int(state["at"])
        for at in range(start, 5):
            if at == stop_at:
                raise RuntimeError("pulled the plug")
            done.append(at)
            checkpoint.save({"at": np.array(at + 1)})
        return {"sum": np.array(sum(range(5)))}

    with Run(tmp_path) as run:
        with pytest.raises(RuntimeError):
            run.once("sum", {}, lambda c: compute(c, stop_at=3))
        assert run.once("sum", {}, compute)["sum"] == 10
    assert done == [0, 1, 2, 3, 4]


def test_what_a_step_took_adds_up_over_its_starts_and_is_told_whenever_it_is_read(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def compute(checkpoint, stop_at=None):
        state = checkpoint.load()
        for at in range(0 if state is None else int(state["at"]), 3):
            if at == stop_at:
                raise RuntimeError("pulled the plug")
            now[0] += 4
            checkpoint.save({"at": np.array(at + 1)})
        return {"x": np.zeros(1)}

    with Run(tmp_path / "one", store=tmp_path / "store", peak=lambda: 5.0) as run:
        with pytest.raises(RuntimeError):
            run.once("sleep", {}, lambda c: compute(c, stop_at=2))
        assert run.logged() == []
        run.once("sleep", {}, compute)
        (first,) = run.logged()
    assert (first["seconds"], first["spent"]) == (12, 4)
    with Run(tmp_path / "two", store=tmp_path / "store") as run:
        run.once("sleep", {}, compute)
        (again,) = run.logged()
    assert {**again, "spent": first["spent"]} == first
    assert again["spent"] == 0
    assert (again["stage"], again["peak_mib"]) == ("sleep", 5.0)


def test_nothing_is_told_of_a_step_that_noted_nothing(tmp_path):
    with Run(tmp_path) as run:
        run.once("step", {}, counting([]))
        (tmp_path / "steps" / "log.journal").unlink()
        run.once("step", {}, counting([]))
        assert [e["seconds"] is None for e in run.logged()] == [False, True]
    with Run(None) as run:
        run.once("step", {}, counting([]))
        assert run.logged()[0]["seconds"] >= 0


def test_a_checkpoint_of_another_step_is_not_loaded(tmp_path):
    partial = tmp_path / "x.partial"
    run = Run(tmp_path)
    with run.working(partial, "one") as checkpoint:
        checkpoint.save({"x": np.zeros(1)})
    with run.working(partial, "two") as checkpoint:
        assert checkpoint.load() is None
    run.close()


def test_checkpoints_are_due_by_calls_and_by_time(tmp_path):
    with Run(tmp_path, checkpoint_calls=3) as run, run.working(tmp_path / "p", "i") as checkpoint:
        assert [checkpoint.due() for _ in range(6)] == [False, False, True] * 2
    with Run(tmp_path, checkpoint_seconds=0.0) as run, run.working(tmp_path / "p", "i") as checkpoint:
        assert checkpoint.due()
    with Run(None, checkpoint_seconds=0.0).working(None, "i") as checkpoint:
        assert not checkpoint.due()


def test_one_process_at_a_time(tmp_path):
    with Run(tmp_path), pytest.raises(RunLocked):
        Run(tmp_path)
    Run(tmp_path).close()


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="file"):
        Run(tmp_path / "file")


@pytest.mark.parametrize("stored", [True, False])
def test_ledger_and_log_keep_their_order(stored, tmp_path):
    with Run(tmp_path if stored else None) as run:
        assert run.reads() == []
        run.ledger(file="a", auc=0.5)
        run.ledger(file="b", auc=0.6)
        run.log(seconds=1.5)
        assert run.reads() == [{"file": "a", "auc": 0.5}, {"file": "b", "auc": 0.6}]
        assert run.logged() == [{"seconds": 1.5}]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_met_at_the_next_checkpoint_and_reaches_the_old_handler(number, tmp_path):
    met: list[int] = []
    before = signal.signal(number, lambda n, _: met.append(n))
    try:

        def compute(checkpoint):
            os.kill(os.getpid(), number)
            assert not met
            assert checkpoint.due()
            checkpoint.save({"x": np.zeros(1)})
            raise AssertionError("must have stopped")

        with Run(tmp_path) as run, pytest.raises(Stopped):
            run.once("step", {}, compute)
        assert met == [number]
        assert len(list(tmp_path.glob("steps/*.partial"))) == 1
    finally:
        signal.signal(number, before)


def test_outside_the_main_thread_signals_are_left_alone(tmp_path):
    found: list[object] = []
    worker = threading.Thread(target=lambda: found.append(Run(None).once("s", {}, counting([]))))
    worker.start()
    worker.join()
    assert len(found) == 1


@pytest.mark.parametrize("at", [1, 7, 20])
def test_interrupted_training_goes_on_to_the_same_bytes(at, tmp_path):
    data = clicks()
    train(BACKBONE, data, tmp_path / "whole", SHORT)

    def interrupt(stage, done, total, figures):
        if done == at:
            os.kill(os.getpid(), signal.SIGINT)

    with Run(tmp_path / "cut", progress=interrupt) as run, pytest.raises(KeyboardInterrupt):
        train(BACKBONE, data, run, SHORT)
    assert (tmp_path / "cut/training.partial").exists()
    train(BACKBONE, data, tmp_path / "cut", SHORT)
    assert final_bytes(tmp_path / "cut") == final_bytes(tmp_path / "whole")


def test_a_stale_checkpoint_is_no_start_for_a_changed_training(tmp_path):
    data = clicks()

    def interrupt(stage, done, total, figures):
        if done == 7:
            os.kill(os.getpid(), signal.SIGINT)

    with Run(tmp_path, progress=interrupt) as run, pytest.raises(KeyboardInterrupt):
        train(BACKBONE, data, run, SHORT)
    changed = replace(SHORT, learning_rate=2e-2)
    assert same(train(BACKBONE, data, tmp_path, changed), train(BACKBONE, data, None, changed))
    assert not (tmp_path / "training.partial").exists()


def test_progress_is_told_every_step():
    seen: list[tuple[str, int, int]] = []
    data = SimpleNamespace(**vars(clicks(train=130)))
    train(BACKBONE, data, Run(None, progress=lambda *a: seen.append(a[:3])), replace(SHORT, epochs=2))
    assert [done for _, done, _ in seen] == [1, 2, 3, 4, 5, 6]
    assert {(stage, total) for stage, _, total in seen} == {("train", 6)}
