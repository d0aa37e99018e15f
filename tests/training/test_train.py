from __future__ import annotations

import importlib
import os
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from pocketrec.backbones.deepfm import DeepFM
from pocketrec.errors import ArtifactError, ConfigError, DataError, DivergedError
from pocketrec.schema import Field, Schema
from pocketrec.training.evaluate import logits, validate
from pocketrec.training.loop import Training, history
from pocketrec.training.run import Run
from pocketrec.training.train import load, train

SCHEMA = Schema("ctr", (Field("a", 40, 0), Field("b", 7, 40), Field("c", 3, 47)))
MODULE = importlib.import_module("pocketrec.training.loop")
BACKBONE = DeepFM(dim=4, hidden=(16, 8), dropout=0.2)
SHORT = Training(epochs=3, batch_size=64, learning_rate=1e-2)


@dataclass(frozen=True)
class MemorySplit:
    ids: np.ndarray
    labels: np.ndarray
    dataset: object = None

    def __len__(self) -> int:
        return len(self.ids)


def clicks(train: int = 600, valid: int = 200, seed: int = 0) -> SimpleNamespace:
    """A log in memory whose labels follow the ids, with the interface of a data set."""
    draw = np.random.default_rng(seed)
    effect = draw.normal(0, 1.5, SCHEMA.rows)

    def split(rows: int) -> MemorySplit:
        ids = np.stack([draw.integers(f.offset, f.stop, rows) for f in SCHEMA.fields], axis=1).astype(np.int32)
        odds = 1 / (1 + np.exp(-effect[ids].sum(axis=1)))
        return MemorySplit(ids, (draw.random(rows) < odds).astype(np.float32))

    return SimpleNamespace(
        schema=SCHEMA, train=split(train), valid=split(valid), digest=f"{train}-{valid}-{seed}", path=Path("memory")
    )


def weights(model) -> dict[str, np.ndarray]:
    return {name: t.numpy() for name, t in model.state_dict().items()}


def same(one, other) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.delicate
@pytest.mark.parametrize("optimizer", ["adam", "lazy_adam"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_learns_and_is_a_function_of_its_seed(optimizer, precision):
    data = clicks()
    training = replace(SHORT, optimizer=optimizer, precision=precision, epochs=6)
    one, again = (train(BACKBONE, data, Run(None, seed=1), training) for _ in range(2))
    other = train(BACKBONE, data, Run(None, seed=2), training)
    assert same(one, again)
    assert not same(one, other)
    assert validate(one, data.valid) > 0.7 > validate(BACKBONE.build(data, 1), data.valid)
    assert all(p.dtype == torch.float32 for p in one.parameters())


@pytest.mark.delicate
def test_result_is_the_best_epoch_and_patience_ends_the_loop(tmp_path):
    data = clicks(train=150, valid=300)
    training = replace(SHORT, epochs=40, learning_rate=5e-2, patience=3)
    model = train(BACKBONE, data, tmp_path, training)
    figures = [e.metric for e in history(tmp_path)]
    assert len(figures) < 40
    assert len(figures) - 1 - int(np.argmax(figures)) == 3
    assert validate(model, data.valid) == max(figures)
    assert validate(model, data.valid) == pytest.approx(roc_auc_score(data.valid.labels, logits(model, data.valid)))


def test_without_validation_rows_the_last_epoch_is_kept(tmp_path):
    data = clicks(valid=0)
    train(BACKBONE, data, tmp_path, SHORT)
    assert [e.metric for e in history(tmp_path)] == [None] * 3


def test_batches_cover_every_row_once_and_leave_no_single_row():
    model = BACKBONE.build(clicks(), 0)
    for rows in (1, 2, 64, 65, 66, 128, 129):
        data = clicks(train=rows)
        batches = list(model.batches(data, 64, 0, 0))
        assert sum(len(y) for _, y in batches) == rows
        assert rows == 1 or min(len(y) for _, y in batches) >= 2
        assert sorted(map(tuple, torch.cat([x for x, _ in batches]).tolist())) == sorted(
            map(tuple, data.train.ids.tolist())
        )
    data = clicks()
    in_order = torch.cat([x for x, _ in model.batches(data, 64, 0, 0, shuffle=False)])
    assert np.array_equal(in_order, data.train.ids)
    first, second = (torch.cat([x for x, _ in model.batches(data, 64, 0, epoch)]) for epoch in (0, 1))
    assert not torch.equal(first, second)


def test_a_finished_training_is_read_not_repeated(tmp_path, monkeypatch):
    data = clicks()
    model = train(BACKBONE, data, tmp_path, SHORT)
    monkeypatch.setattr("pocketrec.training.train.fit", lambda *_: pytest.fail("trained again"))
    assert same(model, train(BACKBONE, data, tmp_path, SHORT))
    for changed in (replace(SHORT, epochs=2), replace(SHORT, weight_decay=0.0)):
        with pytest.raises(pytest.fail.Exception):
            train(BACKBONE, data, tmp_path, changed)
    with pytest.raises(pytest.fail.Exception):
        train(BACKBONE, clicks(seed=1), tmp_path, SHORT)


def test_shared_cache_serves_every_run(tmp_path, monkeypatch):
    data = clicks()
    cache = tmp_path / "cache"
    cache.mkdir()
    monkeypatch.setenv("POCKETREC_CACHE", str(cache))
    model = train(BACKBONE, data, tmp_path / "one", SHORT)
    monkeypatch.setattr("pocketrec.training.train.fit", lambda *_: pytest.fail("trained again"))
    assert same(model, train(BACKBONE, data, tmp_path / "two", SHORT))
    assert same(model, train(BACKBONE, data, None, SHORT))
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()
    assert history(tmp_path / "two") == history(tmp_path / "one")


def test_load_gives_the_model_back(tmp_path):
    data = clicks()
    model = train(BACKBONE, data, Run(tmp_path, seed=5), SHORT)
    again, _ = load(tmp_path, data)
    assert same(model, again)
    assert again.backbone == BACKBONE
    with pytest.raises(DataError, match="was trained on"):
        load(tmp_path, clicks(seed=9))
    with pytest.raises(ArtifactError, match="holds no trained model"):
        load(tmp_path / "steps", data)


def test_fit_leaves_its_model_alone_and_resumes_from_the_run(tmp_path):
    data = clicks()
    model = BACKBONE.build(data, 0)
    before = {k: v.copy() for k, v in weights(model).items()}
    with Run(tmp_path) as run:
        tuned = run.fit("tune", model, data, SHORT)
        again = run.fit("tune", model, data, SHORT)
    assert all(np.array_equal(before[k], v) for k, v in weights(model).items())
    assert same(tuned, again)
    assert not same(tuned, model)
    assert same(tuned, Run(None).fit("tune", model, data, SHORT))
    assert len(list((tmp_path / "steps").glob("*.safetensors"))) == 1


def test_who_watches_sees_every_epoch_of_a_fit_that_was_cut_short_or_is_read(tmp_path):
    data, seen = clicks(), []

    def dies(stage, epoch, metric):
        if epoch == 1:
            raise KeyboardInterrupt

    def fit(watch):
        with Run(tmp_path / "run", checkpoint_calls=1, watch=watch) as run:
            run.fit("short", BACKBONE.build(data, 0), data, SHORT)

    with pytest.raises(KeyboardInterrupt):
        fit(dies)
    for _ in ("goes on", "is read"):
        fit(lambda *told: seen.append(told))
    assert seen[:3] == seen[3:]
    assert [(stage, epoch) for stage, epoch, _ in seen[:3]] == [("short", 0), ("short", 1), ("short", 2)]


@pytest.mark.parametrize("where", ["table.matrix", "layers.0.weight", "bias"])
def test_divergence_names_step_and_tensor(where, tmp_path):
    data = clicks()

    def poison(stage, done, total, figures):
        if done == 3:
            with torch.no_grad():
                dict(model.named_parameters())[where].fill_(float("nan"))

    model = BACKBONE.build(data, 0)
    with pytest.raises(DivergedError, match=rf"epoch 1, step 4.*{where}"):
        fit_in_place(model, data, Run(None, progress=poison))


def fit_in_place(model, data, run):
    with run.working(None, "x") as checkpoint:
        return MODULE.fit(run, "train", model, data, SHORT, checkpoint)


def test_a_gradient_that_is_not_finite_is_caught_in_its_step():
    data = clicks()
    model = BACKBONE.build(data, 0)
    calls = []
    model.layers[1].weight.register_hook(lambda g: calls.append(1) or (g * float("inf") if len(calls) == 2 else g))
    with pytest.raises(DivergedError, match=r"epoch 1, step 2: the gradient of layers\.1\.weight"):
        fit_in_place(model, data, Run(None))
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize(
    "bad",
    [
        {"epochs": 0}, {"batch_size": 1}, {"learning_rate": 0.0}, {"learning_rate": float("nan")},
        {"weight_decay": -1.0}, {"optimizer": "sgd"}, {"precision": "fp8"}, {"patience": 0},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Training(**bad)


def test_wrong_task_and_empty_data_are_named():
    visits = SimpleNamespace(schema=Schema("cf", (Field("u", 3, 0, "dense"), Field("i", 4, 3, "dense"))), digest="v")
    with pytest.raises(ConfigError, match="task 'ctr'"):
        train(BACKBONE, visits)
    with pytest.raises(DataError, match="at least one training row"):
        train(BACKBONE, clicks(train=0))


def test_training_leaves_global_state_alone():
    before = (torch.get_rng_state(), np.random.get_state()[1].copy(), torch.get_num_threads())  # noqa: NPY002
    train(BACKBONE, clicks(), Run(None, threads=2), SHORT)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002
    assert torch.get_num_threads() == before[2]


def small_training(folder: Path, optimizer: str, checkpoint_calls: int = 3) -> None:
    training = replace(SHORT, epochs=2, optimizer=optimizer)
    with Run(folder, checkpoint_calls=checkpoint_calls) as run:
        train(BACKBONE, clicks(train=300), run, training)


def final_bytes(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name not in ("log.journal", "lock")}


def forked(folder: Path, optimizer: str, crash_at: int) -> int:
    """Exit status of a forked process that trains until its ``crash_at``-th boundary; 0 where it finishes."""
    child = os.fork()
    if child == 0:
        os.environ["POCKETREC_CRASH_AT"] = str(crash_at)
        status = 1
        try:
            small_training(folder, optimizer)
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("optimizer", ["adam", "lazy_adam"])
def test_kill_at_every_boundary_then_the_same_command_gives_the_same_bytes(optimizer, tmp_path):
    small_training(tmp_path / "whole", optimizer)
    expected = final_bytes(tmp_path / "whole")
    kills = 0
    while True:
        folder = tmp_path / f"killed{kills}"
        status = forked(folder, optimizer, kills + 1)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        small_training(folder, optimizer)
        assert final_bytes(folder) == expected, f"boundary {kills + 1}"
        kills += 1
    assert kills > 20
    assert final_bytes(folder) == expected
