"""A study's folder by its record format, with made-up models: known quality, known failures, known gaps."""

from __future__ import annotations

import json
from unittest import mock

import numpy as np

from pocketrec.evaluation.beyond_accuracy import beyond
from pocketrec.evaluation.metrics import auc, logloss, to_csr
from pocketrec.files import Journal
from pocketrec.format.arrays import save_arrays

BUDGETS = ("sparsity=0.5", "sparsity=0.8", "sparsity=0.95")
LOSS = {"sparsity=0.5": 0.1, "sparsity=0.8": 0.3, "sparsity=0.95": 1.0}
HARM = {"mag_prune": 1.6, "pep": 0.5, "qr": 1.2, "shaver": 0.25}
SEEDS = (0, 1, 2)
CLICKS = {"criteo": 1_086_810 * 16, "avazu": 4_428_511 * 16}
VISITS = {"gowalla": 4_533_696}
PAIRS = (*((name, "deepfm") for name in CLICKS), *((name, "lightgcn") for name in VISITS))


def write_study(folder, *, rows=900, users=300, predictions=True, seeds=SEEDS, gaps=True):
    """Two click sets and a ranking set; ``qr`` fails once, ``pep`` lacks a seed, and one method never ran."""
    with mock.patch("os.fsync"):
        return _write(folder, rows, users, predictions, seeds, gaps)


def _write(folder, rows, users, predictions, seeds, gaps):
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("predictions", "labels"):
        (folder / name).mkdir(exist_ok=True)
    data = {name: {"source": name, "split_by_seed": False} for name in (*CLICKS, *VISITS)}
    plan = {
        "name": "made-up",
        "seeds": list(seeds),
        "budgets": list(BUDGETS),
        "trials": 5,
        "data": data,
        "backbones": {"deepfm": {"plugin": "deepfm"}, "lightgcn": {"plugin": "lightgcn"}},
        "methods": {name: {"plugin": name} for name in HARM},
        "jobs": [job for pair in PAIRS for job in _jobs(*pair, seeds)],
    }
    (folder / "plan.json").write_text(json.dumps(plan))
    versions = {"python": "3.11.2", "torch": "2.13.0", "numpy": "2.4.0"}
    (folder / "machine.json").write_text(json.dumps({"cpu": "made-up processor", "cores": 2, "versions": versions}))
    journal, ledger = Journal(folder / "journal"), Journal(folder / "ledger")
    for name, values in CLICKS.items():
        _clicks(folder, journal, ledger, name, values, rows, seeds, predictions, gaps)
    for name, values in VISITS.items():
        _visits(folder, journal, ledger, name, values, users, seeds, predictions)
    _efficiency(journal)
    return folder


def _grid(seeds):
    for seed in seeds:
        yield "original", "dense", seed
    for method in HARM:
        for budget in BUDGETS:
            for seed in seeds:
                yield method, budget, seed


def _jobs(data, backbone, seeds):
    yield from ({**_record(data, backbone, *cell), "kind": "cell"} for cell in _grid(seeds))
    for method, budget in (("original", "dense"), *(("pep", b) for b in BUDGETS)):
        yield {**_record(data, backbone, method, budget, 0), "kind": "choice"}
    for method in ("original", *HARM):
        yield {**_record(data, backbone, method, "sparsity=0.8", 0), "kind": "efficiency"}


def _record(data, backbone, method, budget, seed):
    labels = {"data": data, "backbone": backbone, "method": method, "budget": budget, "seed": seed}
    return {**labels, "key": f"{data}-{backbone}-{method}-{budget}-{seed}".replace("=", "-")}


def _clicks(folder, journal, ledger, name, values, rows, seeds, predictions, gaps):
    rng = np.random.default_rng(len(name))
    truth = rng.normal(size=rows)
    labels = (rng.random(rows) < 1 / (1 + np.exp(-truth))).astype(np.float32)
    for seed in seeds:
        save_arrays(folder / "labels" / f"{name}-{seed}.safetensors", {"labels": labels})
    _trials(journal, name, "deepfm", "auc")
    for method, budget, seed in _grid(seeds):
        base = _record(name, "deepfm", method, budget, seed)
        if gaps and (method, budget, seed) == ("qr", "sparsity=0.95", 1):
            journal.append({**base, "kind": "failed", "job": "cell", "error": "DivergedError: the loss is not finite"})
        if gaps and (
            (method, budget) == ("qr", "sparsity=0.95") or (method, budget, seed) == ("pep", "sparsity=0.8", 2)
        ):
            continue
        harm = LOSS.get(budget, 0.0) * HARM.get(method, 0.0)
        # the same noise for all models of a seed, so that differences are paired
        shared = np.random.default_rng([seed, 1]).normal(size=rows)
        own = np.random.default_rng([seed, sorted(HARM).index(method) if method in HARM else 9]).normal(size=rows)
        logits = (truth + 0.4 * shared + harm * own).astype(np.float32)
        path = f"predictions/{base['key']}.safetensors"
        if predictions:
            save_arrays(folder / path, {"logits": logits})
        test = {"auc": auc(labels, logits), "logloss": logloss(labels, logits)}
        journal.append(_cell(base, test, {}, values, path if predictions else None, ("batch_1", "batch_64")))
        ledger.append({**base, "reader": "measure", "split": "test", "again": seed == 1 and method == "pep"})


def _visits(folder, journal, ledger, name, values, users, seeds, predictions):
    rng = np.random.default_rng(7)
    seen = to_csr(np.repeat(np.arange(users), 8), rng.zipf(1.4, 8 * users) % 300, users)
    truth = to_csr(np.repeat(np.arange(users), 3), rng.zipf(1.4, 3 * users) % 300, users)
    hard = rng.random(users)
    _trials(journal, name, "lightgcn", "ndcg@20")
    for method, budget, seed in _grid(seeds):
        base = _record(name, "lightgcn", method, budget, seed)
        if method == "qr" and budget == "sparsity=0.5":
            continue
        harm = LOSS.get(budget, 0.0) * HARM.get(method, 0.0)
        noise = np.random.default_rng([seed, 3]).normal(0, 0.02, users)
        ndcg = np.clip(0.3 * hard * np.exp(-harm) + noise, 0, 1)
        arrays = {"ndcg": ndcg, "recall": np.clip(1.1 * ndcg, 0, 1), "recall_capped": np.clip(1.2 * ndcg, 0, 1)}
        path = f"predictions/{base['key']}.safetensors"
        if predictions:
            save_arrays(folder / path, arrays)
        lists = np.array(
            [np.random.default_rng([u, seed]).permutation(300 - int(200 * harm / 2))[:20] for u in range(users)]
        )
        test = {f"{figure}@20": float(per_user.mean()) for figure, per_user in arrays.items()}
        test |= {"ndcg@10": 0.9 * test["ndcg@20"], "recall@10": 0.7 * test["recall@20"]}
        cell = _cell(base, test, beyond(lists, seen, truth, 300), values, path if predictions else None, ("batch_1",))
        facts = {"overlap": 0.25, "overlap user": 0.2 + 0.1 * seed} if method == "qr" else {}
        journal.append({**cell, **({"facts": facts} if facts else {})})
        ledger.append({**base, "reader": "measure", "split": "test", "again": False})


def _cell(base, test, lists, values, predictions, batches):
    dense = base["budget"] == "dense"
    kept = 1.0 if dense else 1 - float(base["budget"].partition("=")[2])
    left = int(values * kept)
    table = 4 * values if dense else int(left * 4.4) + 100_000
    parts = {"table": table, "vocabulary": 0 if dense else 90_000, "head": 64_000, "header": 0 if dense else 1500}
    metric = next(iter(test.values()))
    trained = dense or base["method"] in ("pep", "qr")
    curve = (
        [[0.6 - 0.02 * e, metric - 0.03 * np.exp(-e / 2) + 0.001 * base["seed"]] for e in range(8)] if trained else []
    )
    slow = 40 if dense else 55 + 10 * sorted(HARM).index(base["method"])
    training = [{"epochs": 8, "learning_rate": 0.0021, "weight_decay": 1e-6}] if trained else []
    return {
        **base,
        "kind": "cell",
        "params": {
            "backbone": {"name": base["backbone"], "dim": 16, "hidden": [64, 64]},
            "method": {} if dense else {"name": base["method"], "n_min": 1 + len(base["budget"]) % 2, "scope": "joint"},
            "training": training,
        },
        "valid": dict(test),
        "test": test,
        "beyond": lists,
        "bytes": {**parts, "file": sum(parts.values())},
        "values": left,
        "sparsity": 1 - left / values,
        "peak_mib": 700.0 + base["seed"],
        "seconds": {"train": 120.5 if trained else 0.0, "compress": 3.2, "measure": 0.7},
        "curve": curve,
        "latency_us": {b: {"p50": slow * (9.0 if b == "batch_64" else 1.0), "p99": slow * 12.0} for b in batches},
        "predictions": predictions,
        "digest": base["key"],
    }


def _trials(journal, data, backbone, metric):
    del metric
    rng = np.random.default_rng(1)
    for method, budgets in (("original", ("dense",)), ("pep", BUDGETS)):
        for budget in budgets:
            for n in range(5):
                point = {"training.learning_rate": float(10 ** rng.uniform(-4, -2))}
                if method == "pep":
                    point["method.n_min"] = int(rng.integers(0, 3))
                state = "pruned" if n == 3 else "complete"
                journal.append(
                    {**_record(data, backbone, method, budget, 0), "kind": "trial", "trial": n, "params": point,
                     "metric": float(0.2 + rng.normal(0, 0.01)), "state": state, "curve": [], "seconds": 3.0}
                )  # fmt: skip


def _efficiency(journal):
    phases = {
        "original": ("train", "inference dense"),
        "pep": ("find mask", "retrain", "inference masked", "inference packed"),
        "shaver": ("find mask", "inference masked", "inference packed"),
        "qr": ("train", "inference codes"),
    }
    for data, backbone in (("criteo", "deepfm"), ("gowalla", "lightgcn")):
        for profile, batch in (("server", 2048), ("edge", 64)):
            for m, (method, names) in enumerate(phases.items()):
                for i, phase in enumerate(names):
                    p50 = (40.0 + 9 * m if not phase.startswith("inference") else 2.0 + m + i) * (
                        5 if profile == "edge" else 1
                    )
                    peak = {"packages": 180.0, "vocabulary": 20.0 + m, "model": 70.0 / (1 + m), "runtime": 30.0 + 5 * i}
                    journal.append(
                        {**_record(data, backbone, method, "sparsity=0.8", 0), "kind": "efficiency", "phase": phase,
                         "profile": profile, "batch": batch, "threads": 1,
                         "ms": {"p50": p50, "p10": p50 * 0.9, "p90": p50 * 1.2, "repeats": 20},
                         "peak_mib": {**peak, "total": sum(peak.values())},
                         "extrapolated": profile == "edge" and phase in ("train", "retrain")}
                    )  # fmt: skip
