"""Methods with several phases, killed at every boundary: whatever is left behind, the rest comes to the same bytes."""

from __future__ import annotations

import shutil
from importlib import import_module
from pathlib import Path

import pytest

from pocketrec import files
from pocketrec.backbones.deepfm import DeepFM
from pocketrec.backbones.mf import MF
from pocketrec.compression.compress import compress
from pocketrec.compression.ladder import Method
from pocketrec.families.evolution import Evolution
from pocketrec.families.thresholds import ThresholdSearch
from pocketrec.methods.cerp import CERP
from pocketrec.methods.dhe import DHE
from pocketrec.methods.opt_embed import OptEmbed
from pocketrec.methods.opt_embed_d import OptEmbedD
from pocketrec.methods.pep import PEP
from pocketrec.methods.qr import QR
from pocketrec.methods.tt_rec import TTRec
from pocketrec.training.loop import Training
from pocketrec.training.run import Run

TRAINING = (Training(epochs=2, batch_size=128, learning_rate=1e-2),)
FEW = Evolution(population=3, generations=3, children=1, parents=2)
CASES: list[tuple[str, Method, list[str]]] = [
    ("ctr", QR(), ["qr"]),
    ("ctr", TTRec(cores=2, cache_by="accesses"), ["tt_rec_warm_up", "tt_rec"]),
    ("cf", DHE(functions=8, depth=1, hot=4), ["dhe"]),
    ("cf", PEP(search=ThresholdSearch(checks=3)), ["search", "retrain"]),
    ("ctr", CERP(search=ThresholdSearch(checks=3)), ["search", "retrain"]),
    ("ctr", OptEmbed(search=FEW), ["supernet", "evolution", "retrain"]),
    ("cf", OptEmbedD(search=FEW), ["supernet", "evolution", "retrain"]),
]


def content(folder: Path) -> dict[str, bytes]:
    """All files of a run, but the log of times and locks."""
    paths = [p for p in folder.rglob("*") if p.is_file() and p.suffix != ".journal" and p.name != "lock"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(paths)}


class Tape:
    """A copy of a run's folder for every boundary at which it differs from before: all that a kill there leaves."""

    def __init__(self, folder: Path, copies: Path) -> None:
        self.folder, self.copies = folder, copies
        self.left: list[Path] = []
        self.names: list[str] = []
        self._last: dict[str, bytes] = {}

    def boundary(self, name: str) -> None:
        """Take a copy."""
        self.names.append(name)
        now = content(self.folder)
        if now != self._last:
            self.left.append(self.copies / f"{len(self.left)}")
            shutil.copytree(self.folder, self.left[-1], ignore=shutil.ignore_patterns("lock"))
            self._last = now


@pytest.mark.parametrize(("task", "method", "phases"), CASES, ids=[method.name for _, method, _ in CASES])
def test_what_a_kill_at_any_boundary_leaves_goes_on_to_the_same_bytes(
    task: str, method: Method, phases: list[str], few_clicks, even_visits, tmp_path, monkeypatch
) -> None:
    data, backbone = (few_clicks, DeepFM(dim=4, hidden=(4,))) if task == "ctr" else (even_visits, MF(dim=4))
    model = backbone.build(data, 0)

    def bytes_from(folder: Path) -> bytes:
        """The file that a run in this folder ends with."""
        with Run(folder, checkpoint_calls=2) as run:
            small = compress(model, data, method, "sparsity=0.5", run=run, training=TRAINING)
            small.save(tmp_path / "small.safetensors")
            stages = [r["stage"] for r in run.logged() if "step" in r]
        assert stages[-len(phases) :] == phases
        return (tmp_path / "small.safetensors").read_bytes()

    tape = Tape(tmp_path / "run", tmp_path)
    with monkeypatch.context() as patched:
        for module in (files, import_module("pocketrec.training.loop")):
            patched.setattr(module, "boundary", tape.boundary)
        expected = bytes_from(tape.folder)
    steps = content(tape.folder)
    assert {"step", "renamed"} <= set(tape.names)
    assert len(tape.left) > 6 * len(phases)
    for left in tape.left:
        assert bytes_from(left) == expected, left.name
        assert content(left) == steps, left.name
