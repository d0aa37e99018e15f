"""Damaged and foreign files through the command: one line, the documented exit code, never a traceback."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from pocketrec import cli
from pocketrec.compression.budget import Budget
from pocketrec.compression.compress import compress
from pocketrec.errors import ArtifactError, BudgetError
from pocketrec.format.arrays import save_arrays
from pocketrec.methods.mag_prune import MagPrune
from pocketrec.training.run import Run
from pocketrec.training.train import load

ARTIFACT = "small/mag_prune-60pct.safetensors"
ROWS = "".join(f"w{i % 9},{i % 7},{i % 2}\n" for i in range(200))
SMALL = ["--dim", "2", "--hidden", "4", "--epochs", "1", "--batch-size", "64"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A data set, a run and an artifact."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "log.csv").write_text("word,number,label\n" + ROWS)
    for step in (
        ["encode", "table", folder / "log.csv", folder / "data"],
        ["train", folder / "data", "--run", folder / "run", *SMALL],
        ["compress", folder / "run", "--method", "mag_prune", "--budget", "60%", "--out", folder / "small"],
    ):
        cli.main([str(a) for a in step])
    return folder


@pytest.fixture
def work(made, tmp_path, monkeypatch):
    """A copy of it to damage, as the present folder."""
    shutil.copytree(made, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def refused(capsys):
    """The line on stderr with which the command leaves."""

    def call(code, *arguments):
        with pytest.raises(SystemExit) as left:
            cli.main([*arguments])
        out, err = capsys.readouterr()
        assert (left.value.code, out, err.count("\n")) == (code, "", 1), err
        return err

    return call


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def damage(run):
    """What opening the run says of it."""
    try:
        load(run)
    except ArtifactError as error:
        return str(error)
    return ""


def sample(path, count=40):
    """Bits of a file, the first and the last among them."""
    return np.linspace(0, 8 * path.stat().st_size - 1, count).astype(int).tolist()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "empty"),
        ("word,number,label\n", "there are none"),
        ("word,number\na,1\n", "label"),
        ("word,number,label\na,1,yes\n", "log.csv:2"),
        ("word,number,label\na,1,nan\n", "log.csv:2"),
        ("word,number,label\na,1,0\nb,2,2\n", "log.csv:3"),
        ("word,number,label\n" + ROWS + "too,few\n", "wrong number of columns"),
        ("word|number|label\n" + ROWS.replace(",", "|"), "separator"),
    ],
)
def test_raw_logs(work, refused, content, words):
    (work / "log.csv").write_text(content)
    assert words in refused(3, "encode", "table", "log.csv", "out", "--separator", ",")
    assert not (work / "out").exists()


def test_a_folder_as_raw_log(refused, work):
    assert "got a folder" in refused(3, "encode", "table", "data", "out")


@pytest.mark.parametrize("verb", [("inspect", "--verify"), ("measure", "--data", "data")])
def test_every_sampled_bit_and_cut_of_an_artifact(work, refused, verb):
    path = work / ARTIFACT
    whole = path.read_bytes()
    for bit in sample(path):
        flip(path, bit)
        assert ARTIFACT in refused(3, verb[0], ARTIFACT, *verb[1:])
        path.write_bytes(whole[: bit // 8])
        assert ARTIFACT in refused(3, verb[0], ARTIFACT, *verb[1:])
        path.write_bytes(whole)


@pytest.mark.parametrize("name", [ARTIFACT, "run/model.safetensors"])
def test_a_pickle_under_another_name(work, refused, name):
    (work / name).write_bytes(b"\x80\x04\x95" + b"c__builtin__\nexec\n" * 20)
    verb = ["inspect", name] if name == ARTIFACT else ["compress", "run", "--budget", "50%", "--out", "o"]
    assert "pickle, which PocketRec never loads" in refused(3, *verb)


@pytest.mark.parametrize("name", ["train.ids.npy", "counts.npy", "dataset.json"])
def test_a_damaged_data_set(work, refused, name):
    path = work / "data" / name
    for bit in sample(path, 10):
        flip(path, bit)
        assert name in refused(3, "inspect", "data", "--verify")
        flip(path, bit)
    path.write_bytes(path.read_bytes()[:-1])
    assert name in refused(3, "train", "data", "--run", "other")


@pytest.mark.parametrize("name", ["run.json", "model.safetensors"])
def test_a_damaged_run(work, refused, name):
    path = work / "run" / name
    for bit in sample(path):
        flip(path, bit)
        assert name in damage(work / "run") or "crc32" not in path.read_bytes()[:4096].decode(errors="replace")
        flip(path, bit)
    path.write_bytes(path.read_bytes()[:-2])
    assert name in refused(3, "compress", "run", "--budget", "50%", "--out", "o")


def test_a_damaged_checkpoint_is_named_and_once_removed_the_work_goes_on(work, refused):
    path = work / "other" / "training.partial"
    path.parent.mkdir()
    save_arrays(path, {"position": np.zeros(9, np.uint8)}, {"identity": "x"})
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    line = refused(3, "train", "data", "--run", "other", *SMALL)
    assert "training.partial is damaged" in line
    assert "remove it" in line
    path.unlink()
    cli.main(["train", "data", "--run", "other", *SMALL])
    assert (work / "other/model.safetensors").read_bytes() == (work / "run/model.safetensors").read_bytes()


def test_two_processes_in_one_folder(work, refused):
    with Run(work / "run"):
        assert "in use by another process" in refused(4, "compress", "run", "--budget", "50%", "--out", "o")
        assert "in use by another process" in refused(4, "train", "data", "--run", "run", *SMALL)


@pytest.mark.parametrize("budget", ["10 B", "0.001%"])
def test_a_budget_out_of_reach_names_one_that_is_not(work, refused, budget):
    model, data = load("run")
    with pytest.raises(BudgetError) as caught:
        compress(model, data, MagPrune(), budget)
    least = caught.value.least_bytes
    assert least is not None
    line = refused(2, "compress", "run", "--method", "mag_prune", "--budget", budget, "--out", "o")
    assert f"{least:,}" in line
    if budget == "10 B":
        assert compress(model, data, MagPrune(), Budget("bytes", least)).sizes["file"] <= least
