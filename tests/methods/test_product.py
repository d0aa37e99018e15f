"""Every method with the backbones of the papers: trained, packed, saved, opened without torch; files say the same."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from pocketrec import registry
from pocketrec.compression.compress import compress
from pocketrec.compression.ladder import Method
from pocketrec.compression.measure import measure
from pocketrec.compression.small import Small
from pocketrec.data.dataset import Dataset
from pocketrec.format.arrays import open_arrays, save_arrays
from pocketrec.format.artifact import Artifact
from pocketrec.models.backbone import ClickModel, RankingModel
from pocketrec.testing import Lab
from pocketrec.training.evaluate import logits
from pocketrec.training.loop import Training
from pocketrec.training.run import Run

BACKBONES = ("deepfm", "dcn_mix", "neumf", "lightgcn")
KINDS = {"deepfm": "ctr", "dcn_mix": "ctr", "neumf": "baked", "lightgcn": "ego"}
TRAINING = (Training(epochs=1, batch_size=256, learning_rate=1e-2),)

READ = """
import sys
import numpy as np
from pocketrec import runtime
from pocketrec.format.arrays import open_arrays, save_arrays

wanted, _ = open_arrays(sys.argv[1])
found = {}
for name, rows in wanted.items():
    recommender = runtime.open(f"{sys.argv[2]}/{name}.safetensors")
    if recommender.kind == "ego":
        found[name] = recommender.artifact.packed.lookup(rows, np.arange(2))
    else:
        found[name] = recommender.logits(rows)
save_arrays(sys.argv[3], found, {})
assert "torch" not in sys.modules
"""


@dataclass(frozen=True)
class Made:
    """A compressed model, and what its file says of rows ``ids`` when torch is away."""

    small: Small
    path: Path
    ids: np.ndarray
    said: np.ndarray


def method_of(name: str) -> Method:
    """The method at its defaults."""
    return registry.load("methods", name)()


def rows_of(data: Dataset) -> np.ndarray:
    """Ids of rows to score: a part of the validation rows."""
    return np.array(data.valid.ids[:50])


@pytest.fixture(scope="module")
def product(lab: Lab, tmp_path_factory) -> dict[tuple[str, str], Made]:
    """Every cell; one process reads all files."""
    folder = tmp_path_factory.mktemp("product")
    run, smalls, rows = Run(None, training=TRAINING), {}, {}
    narrow = {b.name: b for b in lab.backbones}
    for method in registry.modules("methods"):
        for backbone in BACKBONES:
            model, data = lab.model(narrow[backbone]), lab.data(narrow[backbone].task)
            cell = f"{method}-{backbone}"
            smalls[cell] = compress(model, data, method_of(method), "70%", run=run, storage="fp32")
            smalls[cell].save(folder / f"{cell}.safetensors")
            vocabulary = Artifact(folder / f"{cell}.safetensors").vocabulary
            rows[cell] = vocabulary.file_rows(data.hashes)[rows_of(data)]
    save_arrays(folder / "wanted", rows, {})
    command = [sys.executable, "-c", READ, str(folder / "wanted"), str(folder), str(folder / "found")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, _ = open_arrays(folder / "found")
    return {
        tuple(cell.split("-")): Made(small, folder / f"{cell}.safetensors", rows_of(small.data), found[cell])
        for cell, small in smalls.items()
    }


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("method", registry.modules("methods"))
def test_a_file_without_torch_says_what_the_model_says(product, method: str, backbone: str) -> None:
    made = product[method, backbone]
    model, ids = made.small.model.eval(), torch.from_numpy(made.ids)
    assert made.small.table.values() <= model.backbone.build(made.small.data, 0).table.values()
    assert made.path.stat().st_size == made.small.sizes["file"]
    assert Artifact(made.path).kind == KINDS[backbone]
    with torch.no_grad():
        if KINDS[backbone] == "ego":
            expected = model.table(ids)
        elif isinstance(model, ClickModel):
            expected = model(ids)
        else:
            assert isinstance(model, RankingModel)
            users, items = model.propagate(model.table.weight()).tensor_split([made.small.data.schema.fields[0].size])
            expected = model.scores(users[ids[:, 0]], items[ids[:, 1] - len(users)]).diagonal()
    np.testing.assert_allclose(made.said, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("method", registry.modules("methods"))
def test_a_measured_file_has_the_figures_of_the_model(product, method: str, backbone: str) -> None:
    made = product[method, backbone]
    small, split = made.small, made.small.data.valid
    measured = measure(made.path, split, latency=False, predictions=True)
    if isinstance(small.model, ClickModel):
        np.testing.assert_allclose(measured.logits, logits(small.model, split), atol=1e-5)
        return
    assert isinstance(small.model, RankingModel)
    with torch.no_grad():
        vectors = small.model.propagate(small.model.table.weight())
        scores = small.model.scores(*vectors.tensor_split([small.data.schema.fields[0].size])).numpy().copy()
    first = small.data.schema.fields[0].size
    scores[small.data.train.ids[:, 0], small.data.train.ids[:, 1] - first] = -np.inf
    figures = []
    for user in np.unique(split.ids[:, 0]):
        truth = set((split.ids[split.ids[:, 0] == user, 1] - first).tolist())
        best = np.argsort(-scores[user], kind="stable")[:20]
        gains = [1 / np.log2(rank + 2) for rank, item in enumerate(best) if item in truth]
        figures.append(sum(gains) / sum(1 / np.log2(rank + 2) for rank in range(min(20, len(truth)))))
    assert measured.quality["ndcg@20"] == pytest.approx(np.mean(figures), abs=1e-6)
