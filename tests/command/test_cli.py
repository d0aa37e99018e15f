"""The command: its JSON documents, its exit codes, its flags, and that it goes on where it was."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import click
import numpy as np
import pytest

import pocketrec
from pocketrec import cli, settings
from pocketrec.command import options, shown
from pocketrec.command import verbs as commands
from pocketrec.errors import ArtifactError, BudgetError, ConfigError, DataError, DivergedError, RunLocked, StorageError
from pocketrec.files import Journal
from pocketrec.format.artifact import Artifact
from pocketrec.training.loop import Training

PARTS = {"file", "table", "vocabulary", "head", "header"}
CLICKS = ["--rows", "2000", "--cardinalities", "60,20,7"]
SMALL = ["--dim", "4", "--hidden", "8", "--epochs", "2", "--batch-size", "256"]


@pytest.fixture
def pocketrec_command(capsys):
    """Run the command in this process: (exit code, stdout, stderr)."""

    def call(*arguments):
        code = 0
        before = signal.getsignal(signal.SIGTERM)
        try:
            cli.main([str(a) for a in arguments])
        except SystemExit as left:
            code = left.code
        finally:
            signal.signal(signal.SIGTERM, before)
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A data set, a run and two artifacts, made by the command."""
    folder = tmp_path_factory.mktemp("work")
    steps = [
        ["encode", "synthetic", folder / "data", *CLICKS],
        ["train", folder / "data", "--run", folder / "run", *SMALL],
        ["compress", folder / "run", "--method", "mag_prune", "--budget", "40%", "--out", folder / "small"],
    ]
    for step in steps:
        cli.main([str(a) for a in step])
    return folder


@pytest.fixture(scope="module")
def ranking(tmp_path_factory):
    """A ranking run and a baked artifact."""
    folder = tmp_path_factory.mktemp("ranking")
    rng = np.random.default_rng(0)
    pairs = sorted({(int(u), int(i)) for u, i in zip(rng.integers(0, 20, 300), rng.integers(0, 25, 300), strict=True)})
    (folder / "pairs.csv").write_text("user,item\n" + "".join(f"{u},{i}\n" for u, i in pairs))
    for step in (
        ["encode", "interactions", folder / "pairs.csv", folder / "data"],
        ["train", folder / "data", "--backbone", "lightgcn", "--run", folder / "run", "--dim", "8", "--epochs", "2"],
        ["compress", folder / "run", "--method", "mag_prune", "--budget", "sparsity=0.5", "--bake", "--out", folder],
    ):
        cli.main([str(a) for a in step])
    return folder


def test_encode_document(pocketrec_command, tmp_path):
    code, out, err = pocketrec_command("encode", "synthetic", tmp_path / "data", *CLICKS, "--json")
    document = json.loads(out)
    assert (code, err) == (0, "")
    assert {"dataset", "digest", "rows", "dropped", "fields"} <= set(document)
    assert document["rows"] == {"train": 1600, "valid": 200, "test": 200}
    assert document["fields"][0].keys() >= {"name", "cardinality"}
    assert len(document["digest"]) == 64


def test_train_document(pocketrec_command, work, tmp_path):
    code, out, _ = pocketrec_command("train", work / "data", "--run", tmp_path / "run", *SMALL, "--json")
    document = json.loads(out)
    assert code == 0
    assert document.keys() == {"run", "quality", "seconds", "epochs"}
    assert document["quality"].keys() == {"auc"}
    assert 0 < document["quality"]["auc"] < 1
    assert document["epochs"] == 2
    assert document["seconds"] > 0


def test_compress_document(pocketrec_command, work, tmp_path):
    budgets = ("sparsity=0.5", "60%", "6 kB")
    flags = [part for budget in budgets for part in ("--budget", budget)]
    code, out, _ = pocketrec_command(
        "compress", work / "run", "--method", "mag_prune", *flags, "--out", tmp_path, "--json"
    )
    artifacts = json.loads(out)["artifacts"]
    assert code == 0
    assert [a["budget"] for a in artifacts] == list(budgets)
    for artifact in artifacts:
        assert artifact.keys() == {"budget", "path", "bytes", "values", "sparsity", "seconds"}
        assert artifact["bytes"].keys() == PARTS
        assert sum(size for part, size in artifact["bytes"].items() if part != "file") == artifact["bytes"]["file"]
        assert Path(artifact["path"]).stat().st_size == artifact["bytes"]["file"]
    assert artifacts[0]["sparsity"] >= 0.5
    assert artifacts[2]["bytes"]["file"] <= 6000


def test_a_ladder_of_files_comes_from_one_scoring(pocketrec_command, work, tmp_path):
    shutil.copytree(work / "run", tmp_path / "run")
    budgets = {"4.4kB": 4_400, "4.2 kB": 4_200, "4kB": 4_000}
    flags = [part for budget in budgets for part in ("--budget", budget)]
    method = ("--method", "rate_distortion", "--data", work / "data")
    code, out, _ = pocketrec_command("compress", tmp_path / "run", *method, *flags, "--out", tmp_path, "--json")
    assert code == 0
    for artifact in json.loads(out)["artifacts"]:
        limit = budgets[artifact["budget"]]
        assert limit - 100 <= Path(artifact["path"]).stat().st_size <= limit
    steps = list((tmp_path / "run" / "steps").glob("fisher-*.safetensors"))
    logged = [r for r in Journal(tmp_path / "run" / "log.journal").read() if r.get("stage") == "fisher"]
    assert len(steps) == 1
    assert len(logged) == len(budgets)
    assert len({r["step"] for r in logged}) == 1


@pytest.mark.parametrize("target", ["run", "small/mag_prune-40pct.safetensors"])
def test_measure_document(pocketrec_command, work, target):
    ledger = (work / target if target == "run" else (work / target).parent) / "ledger.journal"
    before = ledger.read_text().count('"split":"test"') if ledger.exists() else 0
    code, out, _ = pocketrec_command("measure", work / target, "--data", work / "data", "--json")
    document = json.loads(out)
    assert code == 0
    assert document.keys() == {"quality", "bytes", "latency_us"}
    assert document["quality"].keys() == {"auc", "logloss"}
    assert document["bytes"].keys() == PARTS
    assert document["latency_us"]
    assert ledger.read_text().count('"split":"test"') == before + 1


def test_ranking_documents(pocketrec_command, ranking):
    artifact = ranking / "mag_prune-sparsity-0.5.safetensors"
    _, out, _ = pocketrec_command("measure", artifact, "--data", ranking / "data", "--json")
    assert json.loads(out)["quality"].keys() == {"ndcg@20", "recall@20", "recall_capped@20"}
    _, out, _ = pocketrec_command("recommend", artifact, "--user", "3", "-k", "5", "--exclude", "1,2", "--json")
    document = json.loads(out)
    assert document["user"] == "3"
    assert len(document["items"]) == 5
    assert not {1, 2} & {entry["item"] for entry in document["items"]}
    scores = [entry["score"] for entry in document["items"]]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize(
    ("path", "kind"), [("data", "dataset"), ("run", "run"), ("small/mag_prune-40pct.safetensors", "artifact")]
)
@pytest.mark.parametrize("verify", [[], ["--verify"]])
def test_inspect_document(pocketrec_command, work, path, kind, verify):
    code, out, _ = pocketrec_command("inspect", work / path, "--json", *verify)
    assert code == 0
    assert json.loads(out)["kind"] == kind


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "data"],
        ["inspect", "run"],
        ["inspect", "small/mag_prune-40pct.safetensors"],
        ["measure", "small/mag_prune-40pct.safetensors", "--data", "data"],
        ["compress", "run", "--method", "mag_prune", "--budget", "50%", "--out", "other"],
        ["train", "data", "--run", "run", *SMALL],
        ["encode", "synthetic", "data", *CLICKS],
    ],
)
def test_documents_for_people(pocketrec_command, work, monkeypatch, arguments):
    monkeypatch.chdir(work)
    code, out, err = pocketrec_command(*arguments)
    assert (code, err) == (0, "")
    assert not out.startswith("{")
    assert out.strip()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["compres"], 2, "No such command"),
        (["train", "nowhere", "--run", "r"], 3, "nowhere"),
        (["train", "nowhere"], 2, "--run"),
        (["train", "data", "--run", "r2", "--dim", "0"], 2, "`dim`"),
        (["train", "data", "--run", "r2", "--dim", "wide"], 2, "--dim"),
        (["train", "data", "--run", "r2", "--backbone", "deepfn"], 2, "did you mean 'deepfm'"),
        (["train", "data", "--run", "r2", "--backbone", "lightgcn"], 2, "task"),
        (["encode", "synthetik", "out"], 2, "did you mean 'synthetic'"),
        (["encode", "table", "missing.csv", "out"], 3, "missing.csv"),
        (["compress", "run", "--budget", "tiny", "--out", "o"], 2, "4MiB"),
        (["compress", "run", "--method", "mag_prune", "--budget", "10 B", "--out", "o"], 2, "smallest file"),
        (["compress", "data", "--budget", "5%", "--out", "o"], 3, "data"),
        (["measure", "data/dataset.json", "--data", "data"], 3, "dataset.json"),
        (["recommend", "small/mag_prune-40pct.safetensors", "--user", "1"], 2, "click model"),
        (["inspect", "nothing"], 4, "nothing"),
        (["inspect", "small"], 3, "small"),
    ],
)
def test_errors_are_one_line_and_a_code(pocketrec_command, work, monkeypatch, arguments, code, words):
    monkeypatch.chdir(work)
    came, out, err = pocketrec_command(*arguments)
    assert came == code, err
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("pocketrec: ")
    assert words in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), 2),
        (BudgetError("x"), 2),
        (DataError("x"), 3),
        (ArtifactError("x"), 3),
        (DivergedError("x"), 4),
        (StorageError("x"), 4),
        (RunLocked("x"), 4),
        (MemoryError(), 4),
        (OSError(28, "No space left on device"), 4),
        (KeyboardInterrupt(), 130),
        (cli.Terminated(), 143),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 2),
    ],
)
def test_exit_codes(pocketrec_command, monkeypatch, error, code):
    def fail(_arguments):
        raise error

    monkeypatch.setattr(commands, "run", fail)
    came, out, err = pocketrec_command("inspect", "x")
    assert (came, out, err.count("\n")) == (code, "", 1)


def test_a_bug_shows_its_traceback(monkeypatch):
    monkeypatch.setattr(commands, "run", lambda _arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["inspect", "x"])


@pytest.mark.parametrize(("module", "extra"), [("click", "train"), ("rich", "train")])
def test_a_base_install_says_which_extra_is_needed(module, extra):
    code = f"""
import sys
sys.modules[{module!r}] = None
from pocketrec import cli
cli.main(["--help"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_environment())
    assert done.returncode == 2
    assert f"pip install 'pocketrec[{extra}]'" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_training_goes_on_and_ends_with_the_same_bytes(pocketrec_command, tmp_path, number, code):
    def arguments(folder):
        epochs = ["--epochs", "15", "--patience", "15"]
        return [str(a) for a in ("train", tmp_path / "data", "--run", tmp_path / folder, *SMALL, *epochs)]

    pocketrec_command("encode", "synthetic", tmp_path / "data", "--rows", "8000", "--cardinalities", "500,50")
    process = subprocess.Popen(
        [sys.executable, "-m", "pocketrec.cli", *arguments("run")],
        env=_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 600
    while not (tmp_path / "run" / "log.journal").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(number)
    message = process.communicate(timeout=600)[1]
    assert process.returncode == code, message
    assert message.count("\n") == 1
    assert pocketrec_command(*arguments("run"))[0] == 0
    assert pocketrec_command(*arguments("whole"))[0] == 0
    files = [(tmp_path / folder / "model.safetensors").read_bytes() for folder in ("run", "whole")]
    assert files[0] == files[1]


@dataclass(frozen=True)
class Plug:
    """A plug-in with every kind of field.

    Args:
        size: how large it is,
            on two lines.
        kind: which one.
        names: some names.
    """

    size: int = 3
    rate: float | None = None
    kind: Literal["big", "small"] = "big"
    names: tuple[str, ...] = ()
    widths: tuple[int, ...] = (4, 2)
    strict: bool = True


def parse(*arguments):
    command = click.Command("plug", params=[options.option(s) for s in settings.leaves(Plug)])
    return options.build(Plug, command.make_context("plug", list(arguments)).params)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], Plug()),
        (["--size", "7"], Plug(size=7)),
        (["--rate", "1e-3"], Plug(rate=0.001)),
        (["--kind", "small"], Plug(kind="small")),
        (["--names", "a, b"], Plug(names=("a", "b"))),
        (["--widths", "8"], Plug(widths=(8,))),
        (["--widths", ""], Plug(widths=())),
        (["--no-strict"], Plug(strict=False)),
    ],
)
def test_flags_come_from_the_dataclass(arguments, expected):
    assert parse(*arguments) == expected


def test_help_comes_from_the_docstring():
    by_name = {s.name: s for s in settings.leaves(Plug)}
    assert by_name["size"].help == "how large it is, on two lines."
    assert "[default: 3]" in options.option(by_name["size"]).help
    assert "[default: 4,2]" in options.option(by_name["widths"]).help
    assert "[default: none]" in options.option(by_name["rate"]).help
    assert "[default: on]" in options.option(by_name["strict"]).help


def test_verbs_list_the_flags_of_the_chosen_plug_in(pocketrec_command):
    _, deepfm, _ = pocketrec_command("train", "--help")
    _, lightgcn, _ = pocketrec_command("train", "--backbone", "lightgcn", "--help")
    _, shaver, _ = pocketrec_command("compress", "--method=shaver", "--help")
    assert "--dropout" in deepfm
    assert "--temperature" in lightgcn
    assert "--dropout" not in lightgcn
    assert "--estimator" in shaver


def test_a_method_that_trains_takes_the_flags_of_a_training(pocketrec_command, work, tmp_path):
    method = ["--method", "pep", "--budget", "sparsity=0.5", "--search-epochs", "1", "--retrain-values", "found"]
    training = ["--epochs", "3", "--batch-size", "128", "--learning-rate", "0.01", "--patience", "3"]
    code, _, err = pocketrec_command("compress", work / "run", *method, *training, "--out", tmp_path)
    assert code == 0, err
    info = Artifact(tmp_path / "pep-sparsity-0.5.safetensors").info
    assert info["training"] == [
        settings.to_json(Training(epochs=3, batch_size=128, learning_rate=0.01, patience=3)),
    ]
    assert (info["method"]["search"]["epochs"], info["method"]["retrain"]["values"]) == (1, "found")
    logged = [r for r in Journal(work / "run" / "log.journal").read() if "epoch" in r and r["stage"] != "train"]
    assert [r["stage"] for r in logged] == ["search", *["retrain"] * 3]
    code, _, err = pocketrec_command("compress", work / "run", *method, "--search-epochs", "0", "--out", tmp_path)
    assert code == 2
    assert "`search`: `epochs` must be at least 1, but got epochs=0" in err


def test_a_method_that_trains_nothing_has_no_flags_of_a_training(pocketrec_command, work, tmp_path):
    flags = ["--budget", "5%", "--epochs", "3", "--out", tmp_path]
    code, _, err = pocketrec_command("compress", work / "run", "--method", "mag_prune", *flags)
    assert code == 2
    assert "--epochs" in err


def test_a_flag_that_a_plug_in_has_itself_is_spelt_otherwise_for_its_training():
    spelt = options.spelt(settings.leaves(Training), ["--epochs", "--dim"])
    assert [flag for _, flag in spelt][:2] == ["--training-epochs", "--batch-size"]
    assert options.given({"training_epochs": 3, "epochs": 5}, settings.leaves(Training), ["--epochs"]) == {"epochs": 3}


def test_artifact_names_are_plain():
    assert commands.artifact_name("shaver", "5%") == "shaver-5pct.safetensors"
    assert commands.artifact_name("shaver", "4 MiB") == "shaver-4MiB.safetensors"
    assert commands.artifact_name("shaver", "sparsity=0.95") == "shaver-sparsity-0.95.safetensors"


def test_tables_are_aligned():
    assert shown.table(("name", "n"), [("a", "1"), ("bb", "10")]).split("\n") == ["name   n", "a      1", "bb    10"]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(pocketrec.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
