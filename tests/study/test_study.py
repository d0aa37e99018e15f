from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path

import numpy as np
import optuna
import pytest
from sklearn.metrics import log_loss, roc_auc_score
from study_cases import CLICKS, pairs_file, plan, records

from pocketrec.data.dataset import Dataset
from pocketrec.errors import ConfigError
from pocketrec.files import Journal
from pocketrec.format.arrays import open_arrays
from pocketrec.methods import MagPrune
from pocketrec.models.table import Block
from pocketrec.study.anatomy import anatomy
from pocketrec.study.cells import Workspace, _opened, cost
from pocketrec.study.estimate import estimate
from pocketrec.study.jobs import Grid
from pocketrec.study.plan import PLANS, Plan
from pocketrec.study.profiling.memory import reset
from pocketrec.study.recipe import build_backbone
from pocketrec.study.runner import run_study
from pocketrec.study.search import Trial, search
from pocketrec.training.run import Run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    counts = run_study(plan(anatomy=True), folder, store=folder / "store")
    assert counts == {"done": len(Grid(plan(anatomy=True)).jobs), "failed": 0}
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"backbone.deepfm.droput": 0.1}, ["backbone.deepfm.droput", "dropout"]),
        ({"seed": [1]}, ["seed", "seeds"]),
        ({"method.shavr": {}}, ["method.shavr", "shaver"]),
        ({"data.clicks.sorce": "x"}, ["data.clicks.sorce", "source"]),
        ({"backbone.deepfm.training.epoch": 3}, ["training.epoch", "epochs"]),
        ({"backbone.deepfm.dim": "wide"}, ["backbone.deepfm.dim", "integer"]),
        ({"backbone.deepfm.dim": 0}, ["backbone.deepfm", "dim"]),
        ({"backbone.deepfm.dropout": {"low": 0.5, "high": 0.1}}, ["backbone.deepfm.dropout", "low < high"]),
        ({"backbone.deepfm.dropout": {"low": 0.5, "hihg": 0.1}}, ["dropout.hihg", "high"]),
        ({"backbone.deepfm.dropout": {"choices": []}}, ["dropout", "choices"]),
        ({"backbone.deepfm.dropout": {"choices": ["much"]}}, ["dropout", "number"]),
        ({"backbone.deepfm.on.click": {"dim": 2}}, ["on.click", "clicks"]),
        ({"backbone.deepfm.training": [{}, {"learning_rate": {"low": 0.1, "high": 1}}]}, ["first stage"]),
        ({"method.mag_prune.training": {"epochs": 1}}, ["method.mag_prune.training"]),
        ({"method.other": {"like": "shavr"}}, ["method.other.like", "mag_prune"]),
        ({"budgets": ["12"]}, ["budget", "12"]),
        ({"budgets": []}, ["budgets"]),
        ({"seeds": [1, 1]}, ["seeds"]),
        ({"seeds": "all"}, ["seeds"]),
        ({"trials": -1}, ["trials"]),
        ({"data": {}}, ["data.NAME"]),
        ({"data.clicks": {"source": "criteo"}}, ["data.clicks.raw"]),
        ({"method.original": {"is": "random"}}, ["method.original"]),
        ({"backbone": {"lightgcn": {}}}, ["backbone", "task"]),
        ({"efficiency": ["phone"]}, ["efficiency", "server"]),
        ({"method.random.only": ["click"]}, ["method.random.only", "clicks"]),
        ({"method.random.budgets": ["7%"]}, ["method.random.budgets", "sparsity=0.5"]),
        ({"brief": ["7%"]}, ["brief", "sparsity=0.5"]),
    ],
)
def test_a_wrong_plan_is_refused_with_its_key(changes, words):
    with pytest.raises(ConfigError) as caught:
        plan(changes)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_file_that_is_no_plan_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="smoke"):
        Plan.read(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("budgets = [")
    with pytest.raises(ConfigError, match="not TOML"):
        Plan.read(tmp_path / "bad.toml")


@pytest.mark.parametrize("path", sorted(PLANS.glob("*.toml")), ids=lambda p: p.stem)
def test_shipped_plans_are_sound(path):
    shipped = Plan.read(path.stem)
    jobs = Grid(shipped).jobs
    assert len(set(jobs)) == len(jobs) == len({Grid(shipped).key(j) for j in jobs})


def test_a_later_stage_is_as_the_first_but_for_what_it_says():
    stages = [{"epochs": 3, "learning_rate": {"low": 0.1, "high": 1.0}}, {"epochs": 2}]
    recipe = plan({"backbone.deepfm.training": stages}).backbones["deepfm"]
    assert recipe.stages({"training.learning_rate": 0.5}) == (
        {"epochs": 3, "learning_rate": 0.5},
        {"epochs": 2, "learning_rate": 0.5},
    )


def test_a_method_like_another_differs_in_what_it_says():
    both = {"method.pep": {"search": {"epochs": 2}, "budgets": ["50%"], "backbone": {"deepfm": {"dropout": 0.3}}}}
    own = {**both["method.pep"], "is": "pep", "retrain": {"values": "found"}}
    like = {"like": "pep", "retrain": {"values": "found"}}
    said, alike = plan(both | {"method.found": own}), plan(both | {"method.found": like})
    assert said.to_json() == alike.to_json()
    assert alike.methods["found"].plugin == "pep"


def test_a_training_can_be_named_and_referred_to():
    stages = [{"epochs": 3, "learning_rate": {"low": 0.1, "high": 1.0}}, {"epochs": 2}]
    named = {"training": {"long": stages}, "backbone.deepfm.training": "long", "method.pep": {"training": "long"}}
    said = plan({"backbone.deepfm.training": stages, "method.pep": {"training": stages}})
    assert plan(named).to_json() == said.to_json()
    with pytest.raises(ConfigError, match=r"`backbone.deepfm.training.lang` is no training of the plan; .*`long`"):
        plan({"training": {"long": stages}, "backbone.deepfm.training": "lang"})


def test_a_default_that_is_said_leaves_the_keys():
    said = {"method.pep": {"search": {"reach": 0.3}, "scope": "joint"}, "backbone.deepfm.linear_std": 0.01}
    grids = [Grid(plan(changes)) for changes in ({"method.pep": {}}, said, {**said, "method.pep.search.reach": 0.2})]
    (cell,) = (j for j in grids[0].jobs if (j.method, j.kind, j.budget, j.seed) == ("pep", "cell", "50%", 0))
    keys = [grid.key(cell) for grid in grids]
    assert keys[0] == keys[1] != keys[2]


def test_changes_for_one_data_set():
    recipe = plan({"backbone.deepfm.on": {"clicks": {"dim": 2, "training": {"epochs": 1}}}}).backbones["deepfm"]
    there = recipe.at("clicks")
    assert (there.config({})["dim"], recipe.config({})["dim"]) == (2, 4)
    assert (there.stages({})[0]["epochs"], there.stages({})[0]["batch_size"]) == (1, 256)


def test_changes_for_one_data_set_leave_the_keys_of_others():
    other = {"data.other": {"source": "synthetic", "rows": 500}}
    changed = {"backbone.deepfm.on": {"clicks": {"dim": 2}}, "method.random.on": {"clicks": {"scope": "block"}}}
    before, after = Grid(plan(other)), Grid(plan({**other, **changed}))
    assert {j.data for j in after.jobs if after.key(j) != before.key(j)} == {"clicks"}


def test_a_method_can_be_for_some_data_sets_only():
    other = {"source": "synthetic", "rows": 500}
    jobs = Grid(plan({"data.other": other, "method.random.only": ["other"]})).jobs
    assert {j.method for j in jobs if j.data == "clicks"} == {"original", "mag_prune"}
    assert {j.method for j in jobs if j.data == "other"} == {"original", "mag_prune", "random"}


def test_budgets_can_be_those_of_a_method_or_of_the_first_seed():
    budgets = ["sparsity=0.5", "sparsity=0.8"]
    jobs = Grid(plan({"method.random.budgets": budgets[1:]}, budgets=budgets, brief=budgets[:1], seeds=[3, 4])).jobs
    cells = {(j.method, j.budget, j.seed) for j in jobs if j.kind == "cell"}
    assert cells == {
        *(("original", "dense", seed) for seed in (3, 4)),
        *((method, budgets[1], seed) for method in ("random", "mag_prune") for seed in (3, 4)),
        ("mag_prune", budgets[0], 3),
    }


def test_every_job_comes_after_what_it_needs():
    grid = Grid(plan(anatomy=True, efficiency=["edge"]))
    place = {job: at for at, job in enumerate(grid.jobs)}
    assert all(place[needed] < place[job] for job in grid.jobs for needed in grid.needs(job))


def test_every_cell_is_there_once_with_its_figures(finished):
    cells = [r for r in records(finished) if r["kind"] == "cell"]
    wanted = {(m, b, s) for s in (0, 1) for m in ("random", "mag_prune") for b in CLICKS["budgets"]}
    wanted |= {("original", "dense", s) for s in (0, 1)}
    assert sorted((c["method"], c["budget"], c["seed"]) for c in cells) == sorted(wanted)
    for cell in cells:
        assert sum(cell["bytes"][p] for p in ("table", "vocabulary", "head", "header")) == cell["bytes"]["file"]
        assert 0 < cell["test"]["auc"] < 1
        assert cell["sparsity"] == (0.5 if cell["budget"] == "sparsity=0.5" else pytest.approx(cell["sparsity"]))


def test_figures_are_those_of_the_kept_predictions(finished):
    for cell in (r for r in records(finished) if r["kind"] == "cell"):
        logits = open_arrays(finished / cell["predictions"])[0]["logits"].astype(np.float64)
        labels = open_arrays(finished / "labels" / f"clicks-{cell['seed']}.safetensors")[0]["labels"]
        assert cell["test"]["auc"] == pytest.approx(roc_auc_score(labels, logits), abs=1e-12)
        assert cell["test"]["logloss"] == pytest.approx(log_loss(labels, 1 / (1 + np.exp(-logits))), abs=1e-6)


def test_the_test_split_is_read_once_per_cell(finished):
    ledger = Journal(finished / "ledger.journal").read()
    cells = [r["key"] for r in records(finished) if r["kind"] == "cell"]
    assert Counter(entry["key"] for entry in ledger) == Counter(cells)
    assert not any(entry["again"] for entry in ledger)


def test_a_choice_is_the_best_trial_on_validation_and_original_gets_the_same_effort(finished):
    found = records(finished)
    for choice in (r for r in found if r["kind"] == "choice"):
        trials = [r for r in found if r["kind"] == "trial" and r["key"] == choice["key"]]
        assert len(trials) == choice["trials"] == (3 if choice["method"] == "original" else 2)
        best = max((t for t in trials if t["state"] == "complete"), key=lambda t: t["metric"])
        assert best["metric"] == choice["metric"]
        assert best["params"] == choice["params"]
        cells = [r for r in found if r["kind"] == "cell" and _labels(r) == _labels(choice)]
        assert len(cells) == 2
    assert {r["method"] for r in found if r["kind"] == "choice"} == {"original", "mag_prune"}


def _labels(record):
    return tuple(record[name] for name in ("data", "backbone", "method", "budget"))


def test_the_searched_values_are_those_of_the_cell(finished):
    found = records(finished)
    chosen = next(r["params"] for r in found if r["kind"] == "choice" and r["method"] == "original")
    for cell in (r for r in found if r["kind"] == "cell"):
        assert cell["params"]["backbone"]["dropout"] == chosen["backbone.dropout"]
        assert cell["params"]["training"][0]["learning_rate"] == chosen["training.learning_rate"]


def test_searching_never_opens_the_test_split(tmp_path, monkeypatch):
    context = Workspace(plan(), tmp_path, tmp_path / "store")
    job = next(j for j in context.grid.jobs if j.kind == "choice")
    data = context.data(job)
    blind = Dataset.open(data.path)
    del blind.splits["test"]
    monkeypatch.setattr("pocketrec.study.cells._opened", lambda *_: blind)
    choice, trials = search(context, job, {})
    assert (choice["trials"], len(trials)) == (3, 3)
    monkeypatch.undo()
    _opened.cache_clear()


def test_a_finished_study_is_not_touched_again(finished):
    before = {p: p.stat().st_mtime_ns for p in (finished / "store").iterdir()}
    lines = (finished / "journal").read_bytes()
    run_study(plan(anatomy=True), finished, store=finished / "store")
    assert (finished / "journal").read_bytes() == lines
    assert {p: p.stat().st_mtime_ns for p in (finished / "store").iterdir()} == before


def test_another_plan_with_the_same_store_trains_nothing_twice(finished, tmp_path, monkeypatch):
    steps: list[str] = []
    whole = Run.log
    monkeypatch.setattr(Run, "log", lambda run, **r: (steps.append("epoch") if "epoch" in r else None, whole(run, **r)))
    counts = run_study(plan({"method": {"frequency_distance": {}}}), tmp_path, store=finished / "store")
    assert counts["failed"] == 0
    assert not steps
    trained, read = (
        {r["seed"]: r for r in records(folder, ()) if (r["kind"], r["method"]) == ("cell", "original")}
        for folder in (finished, tmp_path)
    )
    for seed, cell in read.items():
        assert cell["seconds"]["train"] == trained[seed]["seconds"]["train"] > 0
        assert cell["seconds"]["compress"] > 0


def test_memory_of_a_cell_is_what_its_process_held_at_most(finished):
    cells = [r for r in records(finished, ()) if r["kind"] == "cell"]
    for cell in cells if reset() else ():
        assert 50 < cell["peak_mib"] < 50_000
    steps = [
        {"stage": "fit", "step": "a", "seconds": 2.0, "peak_mib": 900.0, "spent": 0.5},
        {"stage": "fit", "curve": []},
        {"stage": "score", "step": "b", "seconds": 4.0, "peak_mib": 300.0, "spent": 4.0},
    ]
    made = cost(steps, elapsed=5.0, measured=1.0, peak=400.0)
    assert made == {"seconds": {"train": 2.0, "compress": 4.5, "measure": 1.0}, "peak_mib": 900.0}
    unknown = cost([{**steps[0], "seconds": None, "peak_mib": None}, *steps[1:]], 5.0, 1.0, 400.0)
    assert unknown == {"seconds": {"train": None, "compress": 4.5, "measure": 1.0}, "peak_mib": None}


def test_a_changed_setting_is_another_cell_and_the_others_stay(finished, tmp_path):
    old, new = Grid(plan()), Grid(plan({"method.mag_prune.scope": "block"}))
    changed = {j for j in new.jobs if new.key(j) != old.key(j)}
    assert {j.method for j in changed} == {"mag_prune"}


def test_another_study_is_refused_in_the_folder(finished):
    with pytest.raises(ConfigError, match="small"):
        run_study(Plan.read("smoke"), finished)


def test_a_crashed_cell_is_a_failed_record_and_is_tried_again(tmp_path, monkeypatch):
    small = plan({"method": {"random": {}, "mag_prune": {}}, "trials": 0})
    whole = MagPrune.prepare

    def broken(self, model, data, run):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(MagPrune, "prepare", broken)
    assert run_study(small, tmp_path) == {"done": 6, "failed": 4}
    failures = [r for r in records(tmp_path) if r["kind"] == "failed"]
    assert {(r["method"], r["error"]) for r in failures} == {("mag_prune", "RuntimeError: out of luck")}
    monkeypatch.setattr(MagPrune, "prepare", whole)
    assert run_study(small, tmp_path) == {"done": 10, "failed": 0}


def test_what_needs_a_failed_job_fails_with_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr("pocketrec.backbones.deepfm.DeepFM.build", lambda *_: 1 / 0)
    assert run_study(plan(), tmp_path)["done"] == 0
    errors = {r["error"] for r in records(tmp_path) if r["kind"] == "failed" and r["method"] == "random"}
    assert any("search clicks deepfm original dense seed 0, which failed" in e for e in errors)


def test_a_hopeless_trial_is_pruned_and_does_not_win(tmp_path):
    context = Workspace(plan(trials=6), tmp_path, tmp_path / "store")
    job = context.grid.jobs[0]
    bars = []

    def evaluate(points, bar):
        bars.append(list(bar))
        number = len(bars) - 1
        curve = [0.5, 0.6 + 0.01 * number, 0.7 + 0.01 * number]
        if number == 4:
            return [Trial("pruned", 0.9, (("original", 0, 0.1), ("original", 1, 0.1)), 0.0)]
        return [Trial("complete", curve[-1], tuple(("original", e, m) for e, m in enumerate(curve)), 0.0)]

    choice, trials = search(context, job, {}, evaluate)
    assert bars[2] == [-np.inf] * 3
    assert bars[3] == pytest.approx([0.5, 0.61, 0.71])
    assert [t["state"] for t in trials] == ["complete"] * 4 + ["pruned", "complete"]
    assert choice["metric"] == pytest.approx(0.75)


def test_trials_of_a_killed_search_are_drawn_again(tmp_path):
    def points(folder, die_at=None):
        context = Workspace(plan(trials=5), folder, folder / "store")
        seen = []

        def evaluate(named, bar):
            seen.append(dict(named[0][1]))
            if len(seen) - 1 == die_at:
                raise KeyboardInterrupt
            value = -abs(seen[-1]["backbone.dropout"] - 0.3)
            return [Trial("complete", value, (("original", 0, value),), 0.0)]

        choice, trials = search(context, context.grid.jobs[0], {}, evaluate)
        return choice, [t["params"] for t in trials]

    folder = tmp_path / "killed"
    (tmp_path / "whole").mkdir()
    folder.mkdir()
    for die_at in (0, 2):
        with pytest.raises(KeyboardInterrupt):
            points(folder, die_at)
    assert points(folder) == points(tmp_path / "whole")


@pytest.mark.parametrize("state", ["complete", "pruned", "failed"])
@pytest.mark.parametrize("call", ["report", "set_user_attr", "tell"])
def test_a_search_killed_while_it_stores_a_trial_draws_that_one_again(tmp_path, monkeypatch, call, state):
    def found(folder):
        def evaluate(named, bar):
            value = -abs(named[0][1]["backbone.dropout"] - 0.3)
            kind = state if named[0][0].endswith("-1") else "complete"
            metric = None if kind == "failed" else value
            return [Trial(kind, metric, (("original", 0, value),), 0.0, error=kind)]

        folder.mkdir(exist_ok=True)
        context = Workspace(plan(trials=3), folder, folder / "store")
        return search(context, context.grid.jobs[0], {}, evaluate)

    whole = found(tmp_path / "whole")
    owner = optuna.Study if call == "tell" else optuna.Trial
    done = getattr(owner, call)
    calls = len(fields(Trial)) if call == "set_user_attr" else 1  # of each trial
    for die_at in range(calls, 2 * calls):  # in the second one
        left = [die_at]

        def dying(*args, left=left, **named):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return done(*args, **named)

        folder = tmp_path / str(die_at)
        with monkeypatch.context() as patch:
            patch.setattr(owner, call, dying)
            with pytest.raises(KeyboardInterrupt):
                found(folder)
        assert found(folder) == whole


def test_ranking_data_with_two_stages_and_baked_vectors(tmp_path):
    document = {
        "budgets": ["sparsity=0.5"],
        "trials": 0,
        "data": {"pairs": {"source": "adjacency", "raw": str(pairs_file(tmp_path)), "bake": True}},
        "backbone": {"lightgcn": {"dim": 4, "training": [{"epochs": 2, "batch_size": 64}, {"epochs": 1}]}},
        "method": {"random": {}, "cerp": {"search": {"epochs": 1}}},
    }
    from pocketrec.study.plan import parse

    assert run_study(parse(document, "pairs"), tmp_path / "out") == {"done": 3, "failed": 0}
    cells = {r["method"]: r for r in records(tmp_path / "out")}
    assert "coverage@20" in cells["random"]["beyond"]
    assert [s["epochs"] for s in cells["original"]["params"]["training"]] == [2, 1]
    users = open_arrays(tmp_path / "out" / cells["random"]["predictions"])[0]
    assert users["ndcg"].mean() == pytest.approx(cells["random"]["test"]["ndcg@20"])
    for cell in cells.values():
        assert 0 <= cell["test"]["recall@10"] <= cell["test"]["recall@20"] <= 1
    assert ["facts" in cells[m] for m in ("original", "random", "cerp")] == [False, False, True]
    assert 0 <= cells["cerp"]["facts"]["overlap"] <= 1


def test_two_processes_share_a_study(finished, tmp_path):
    small = tmp_path / "plan.py"
    small.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1] / 'support')!r})\n"
        "from study_cases import plan\nfrom pocketrec.study.runner import run_study\n"
        f"print(run_study(plan(anatomy=True), {str(tmp_path / 'out')!r}))\n"
    )
    both = [subprocess.Popen([sys.executable, str(small)], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outs = [p.communicate(timeout=600)[0] for p in both]
    total = len(Grid(plan(anatomy=True)).jobs)
    assert outs == [f"{{'done': {total}, 'failed': 0}}\n"] * 2
    assert records(tmp_path / "out") == records(finished)
    assert len(Journal(tmp_path / "out" / "ledger.journal").read()) == 10


def test_killed_anywhere_a_study_ends_with_the_same_records(finished, tmp_path):
    script = tmp_path / "plan.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[1] / 'support')!r})\n"
        "from study_cases import plan\nfrom pocketrec.study.runner import run_study\n"
        f"run_study(plan(anatomy=True), {str(tmp_path / 'out')!r})\n"
    )
    kills = 0
    for crash_at in (20, 45, 80, 130, 200):
        environment = {**os.environ, "POCKETREC_CRASH_AT": str(crash_at)}
        ended = subprocess.run([sys.executable, str(script)], env=environment, check=False, timeout=600).returncode
        assert ended in (0, -signal.SIGKILL)
        kills += ended != 0
    assert kills >= 3
    subprocess.run([sys.executable, str(script)], check=True, timeout=600)
    assert records(tmp_path / "out") == records(finished)


def test_the_estimate_counts_what_is_missing(finished, tmp_path):
    whole = estimate(plan(anatomy=True), tmp_path / "new")
    document = whole.to_json()
    assert document["jobs"] == document["missing"] == len(Grid(plan(anatomy=True)).jobs)
    assert document["seconds"] > 0
    assert document["bytes"] > 0
    assert "mag_prune" in whole.to_text()
    rest = estimate(plan({"method.frequency_distance": {}}, anatomy=True), finished).to_json()
    assert rest["missing"] == 4
    json.dumps(document)


def test_seeds_can_be_shifted():
    shifted = plan().shifted(10, threads=2)
    assert (shifted.seeds, shifted.threads) == ((10, 11), 2)


def test_anatomy_of_a_table_against_a_loop():
    rng = np.random.default_rng(0)
    weight, counts = rng.normal(size=(50, 3)).astype(np.float32), rng.integers(0, 40, 50)
    found = anatomy(weight, counts, (Block("a", 0, 50, 0, 2), Block("w", 0, 50, 2, 3, counted=False)))
    assert [b["block"] for b in found] == ["a"]
    assert sum(b["rows"] for b in found[0]["bins"]) == 50
    for span in found[0]["bins"]:
        rows = [i for i in range(50) if span["low"] <= counts[i] <= span["high"]]
        assert len(rows) == span["rows"]
        assert span["mean"] == pytest.approx(np.mean([np.abs(weight[i, :2]).mean() for i in rows]), rel=1e-6)
    from scipy.stats import spearmanr

    expected = spearmanr(counts, np.abs(weight[:, :2]).mean(axis=1)).statistic
    assert found[0]["spearman"] == pytest.approx(expected, abs=1e-9)


def test_a_backbone_is_built_at_a_point():
    recipe = plan().backbones["deepfm"]
    assert build_backbone(recipe, {"dropout": 0.25}).dropout == 0.25


def test_a_method_that_trains_may_change_the_backbone_for_itself():
    changes = {"backbone": {"deepfm": {"dropout": 0.25, "training": {"batch_size": 32}}}}
    changed, plainly = plan({"method.qr": changes}), plan({"method.qr": {}})
    grids = Grid(changed), Grid(plainly)
    for before, after in zip(grids[1].jobs, grids[0].jobs, strict=True):
        assert (grids[0].key(after) == grids[1].key(before)) == (after.method != "qr")
    job = next(j for j in grids[0].jobs if j.kind == "cell" and j.method == "qr")
    assert grids[0].backbone(job).settings["dropout"] == 0.25
    assert grids[0].training(job).training[0]["batch_size"] == 32
    with pytest.raises(ConfigError, match="trains no model"):
        plan({"method.shaver": changes})
    with pytest.raises(ConfigError, match="deepfm"):
        plan({"method.qr": {"backbone": {"deepfn": {}}}})
