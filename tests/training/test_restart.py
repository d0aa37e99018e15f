"""Where methods that search start their retraining."""

from __future__ import annotations

import pytest
import torch

from pocketrec.backbones.deepfm import DeepFM
from pocketrec.backbones.mf import MF
from pocketrec.compression.compress import compress
from pocketrec.errors import ConfigError
from pocketrec.families.evolution import Evolution
from pocketrec.families.retraining import Retrain, Start
from pocketrec.methods.cerp import CERP
from pocketrec.methods.opt_embed import OptEmbed
from pocketrec.methods.opt_embed_d import OptEmbedD
from pocketrec.methods.pep import PEP
from pocketrec.training.loop import Training
from pocketrec.training.run import Run

TRAINING = (Training(epochs=2, batch_size=128, learning_rate=1e-2),)
SMALL = {"search": Evolution(population=3, generations=2, children=1, parents=2)}
METHODS = {PEP: {}, CERP: {}, OptEmbed: SMALL, OptEmbedD: SMALL}


@pytest.mark.delicate
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", ["ctr", "cf"])
def test_retraining_goes_on_from_what_the_search_found(dense_clicks, even_visits, method, task, monkeypatch):
    data, backbone = (dense_clicks, DeepFM(dim=4, hidden=(8,))) if task == "ctr" else (even_visits, MF(dim=4))
    run, began, ended = Run(None, training=TRAINING), {}, {}
    fit = run.fit

    def spy(name, start, data, training=None):
        began[name], ended[name] = start, fit(name, start, data, training)
        return ended[name]

    monkeypatch.setattr(run, "fit", spy)
    found = method(**METHODS[method], retrain=Retrain(values="found"))
    small = compress(backbone.build(data, 0), data, found, "sparsity=0.5", run=run)
    (search,) = set(began) - {"retrain"}
    table, net = began["retrain"].table, ended[search]
    if method is CERP:
        pairs = [
            (part.books, part.keep, soft.books)
            for part, soft in zip(table.compositions, net.table.compositions, strict=True)
        ]
    else:
        pairs = [(table.base, table.kept, net.table.base)]
    for started, kept, left in pairs:
        assert 0 < int(kept.sum()) < kept.numel()
        assert torch.equal(started.detach(), torch.where(kept, left.detach(), 0))
    head = dict(began["retrain"].named_parameters())
    for name, value in net.named_parameters():
        if not name.startswith("table."):
            assert torch.equal(head[name], value)
    total = data.schema.rows * 4
    assert small.values == total - total // 2


@pytest.mark.parametrize("method", METHODS)
def test_the_published_start_is_the_default(method):
    assert method().retrain.values == "first"


@pytest.mark.parametrize("method", [PEP, OptEmbed, OptEmbedD])
def test_a_search_can_start_from_the_trained_model(even_visits, method, monkeypatch):
    run, began = Run(None, training=TRAINING), {}
    fit = run.fit

    def spy(name, start, data, training=None):
        began[name] = start
        return fit(name, start, data, training)

    monkeypatch.setattr(run, "fit", spy)
    trained = fit("original", MF(dim=4).build(even_visits, 0), even_visits, TRAINING)
    method(**METHODS[method], start=Start("trained")).prepare(trained, even_visits, run)
    (search,) = began.values()
    assert torch.equal(search.table.base, trained.table.weight())


def test_a_start_that_a_method_does_not_know_is_refused():
    for method, kind in ((PEP, "taught"), (OptEmbed, "taught"), (CERP, "trained")):
        with pytest.raises(ConfigError, match=f"`start.kind` must be one of fresh, .*, but got '{kind}'"):
            method(start=Start(kind))
