"""The backbones against their formulas written out, pair by pair and expert by expert."""

from __future__ import annotations

from itertools import combinations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from pocketrec import runtime
from pocketrec.backbones.dcn_mix import DCNMix
from pocketrec.backbones.dcnv2 import DCNv2
from pocketrec.backbones.fm import FM
from pocketrec.backbones.gmf import GMF
from pocketrec.backbones.lightgcn import LightGCN
from pocketrec.backbones.mf import MF
from pocketrec.backbones.mlp import MLP
from pocketrec.backbones.neumf import NeuMF
from pocketrec.backbones.pair_mlp import PairMLP
from pocketrec.compression.compress import compress
from pocketrec.compression.measure import measure
from pocketrec.data.sampling import triples
from pocketrec.errors import ConfigError
from pocketrec.methods.mag_prune import MagPrune
from pocketrec.models.backbone import noise
from pocketrec.models.pair_scoring import Objective
from pocketrec.schema import Field, Schema
from pocketrec.training.evaluate import validate
from pocketrec.training.loop import Training
from pocketrec.training.train import train

SCHEMA = Schema("ctr", (Field("a", 5, 0), Field("b", 7, 5), Field("c", 3, 12)))
DATA = SimpleNamespace(schema=SCHEMA)
IDS = torch.tensor([[0, 5, 12], [4, 11, 14], [2, 8, 13], [0, 5, 14]])


def far(backbone, data=DATA, seed: int = 0):
    """A model whose weights and running statistics are far from their initial values."""
    model = backbone.build(data, seed)
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                spread = torch.rand(tensor.shape, generator=source)
                tensor.copy_(spread + 0.1 if "var" in name else spread - 0.4)
    return model


def deep(model, x: np.ndarray) -> float:
    """The perceptron on one row, layer by layer in float64."""
    layers, norms = list(model.layers), list(model.norms)
    for i, layer in enumerate(layers):
        x = layer.weight.detach().double().numpy() @ x + layer.bias.detach().double().numpy()
        if i == len(layers) - 1:
            return float(x[0])
        if norms:
            n = norms[i]
            x = (x - n.running_mean.numpy()) / np.sqrt(n.running_var.numpy() + n.eps)
            x = x * n.weight.detach().numpy() + n.bias.detach().numpy()
        x = np.maximum(x, 0)
    raise AssertionError


def rows(model) -> np.ndarray:
    return model.table.weight().detach().double().numpy()[IDS.numpy()]


@pytest.mark.parametrize("fields", [1, 2, 6])
def test_fm_is_the_sum_over_pairs(fields):
    schema = Schema("ctr", tuple(Field(f"f{i}", 4, 4 * i) for i in range(fields)))
    model = far(FM(dim=5), SimpleNamespace(schema=schema))
    ids = torch.arange(fields)[None] * 4 + torch.arange(3)[:, None]
    for row, logit in zip(model.table.weight().detach().double().numpy()[ids], model(ids).tolist(), strict=True):
        pairs = sum(row[f, :5] @ row[g, :5] for f, g in combinations(range(fields), 2))
        assert logit == pytest.approx(row[:, 5].sum() + model.bias.item() + pairs, abs=1e-5)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_mlp_is_the_perceptron_of_the_concatenation(batch_norm):
    model = far(MLP(dim=4, hidden=(6, 5), batch_norm=batch_norm))
    expected = [deep(model, row.ravel()) for row in rows(model)]
    np.testing.assert_allclose(model(IDS).detach(), expected, atol=1e-5)


def mixture_by_loops(model, x0: np.ndarray) -> np.ndarray:
    """DCN-Mix's cross layers for one row: a loop over layers and one over experts."""
    gate = model.gate.detach().double().numpy()
    experts, rank = model.backbone.experts, model.backbone.rank
    x = x0
    for cross in model.crosses:
        down, core, up, bias = (p.detach().double().numpy() for p in (cross.down, cross.core, cross.up, cross.bias))
        after = x
        for k in range(experts):
            v, u = down[k * rank : (k + 1) * rank].T, up[:, k * rank : (k + 1) * rank]
            expert = x0 * (u @ np.tanh(core[k] @ np.tanh(v.T @ x)) + bias)
            after = after + (gate[k] @ x) * expert
        x = after
    return x


@settings(max_examples=15, deadline=None)
@given(*(st.integers(least, most) for least, most in ((0, 3), (1, 4), (1, 5), (1, 4), (1, 4))))
def test_batched_experts_equal_a_loop_over_them(layers, experts, rank, fields, dim):
    schema = Schema("ctr", tuple(Field(f"f{i}", 4, 4 * i) for i in range(fields)))
    backbone = DCNMix(dim=dim, layers=layers, experts=experts, rank=rank, hidden=())
    model = far(backbone, SimpleNamespace(schema=schema))
    ids = torch.arange(fields)[None] * 4 + torch.arange(3)[:, None]
    x0 = model.table(ids).flatten(1).detach()
    expected = np.stack([mixture_by_loops(model, row) for row in x0.double().numpy()])
    np.testing.assert_allclose(model.crossed(x0).detach(), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model(ids).detach(), [deep(model, row) for row in expected], rtol=1e-4, atol=1e-5)


def test_experts_that_add_nothing_leave_the_input():
    model = far(DCNMix(dim=4, rank=3, hidden=()))
    with torch.no_grad():
        for cross in model.crosses:
            cross.up.zero_()
            cross.bias.zero_()
    x0 = model.table(IDS).flatten(1)
    assert torch.equal(model.crossed(x0), x0)


def test_dcn_mix_starts_as_published_or_by_he():
    schema = Schema("ctr", tuple(Field(f"f{i}", 4, 4 * i) for i in range(39)))
    width, rank = 39 * 16, 64
    for init, up, core, down in (
        ("published", (2 / (width * rank)) ** 0.5, (2 / rank**2) ** 0.5, (2 / (width * rank)) ** 0.5),
        ("he", (2 / rank) ** 0.5, (2 / rank) ** 0.5, (2 / width) ** 0.5),
    ):
        model = DCNMix(init=init, hidden=()).build(SimpleNamespace(schema=schema), 0)
        cross = model.crosses[0]
        stds = [p.std().item() for p in (cross.up, cross.core, cross.down, model.gate)]
        assert stds == pytest.approx([up, core, down, (2 / width) ** 0.5], rel=0.03)
        assert not cross.bias.any()
    assert (2 / (width * rank)) ** 0.5 == pytest.approx(0.0071, abs=5e-5)


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("structure", ["stacked", "parallel"])
def test_dcnv2_is_its_formula(structure, linear):
    model = far(DCNv2(dim=4, layers=2, structure=structure, hidden=(6,), linear=linear))
    for row, logit in zip(rows(model), model(IDS).tolist(), strict=True):
        x0 = row[:, :4].ravel()
        x = x0
        for layer in model.crosses:
            x = x0 * (layer.weight.detach().double().numpy() @ x + layer.bias.detach().double().numpy()) + x
        if structure == "stacked":
            expected = deep(model, x)
        else:
            side = model.side.weight.detach().double().numpy()[0] @ x + model.side.bias.item()
            expected = side + deep(model, x0)
        assert logit == pytest.approx(expected + (row[:, 4].sum() if linear else 0), abs=1e-4)


def pair(data, model, user: int, item: int) -> tuple[np.ndarray, np.ndarray]:
    weight = model.table.weight().detach().double().numpy()
    return weight[user], weight[data.schema.fields[1].offset + item]


def scores(model, data) -> np.ndarray:
    """Scores of users 0-2 and items 0-3."""
    weight, first = model.table.weight(), data.schema.fields[1].offset
    return model.scores(weight[:3], weight[first : first + 4]).detach().numpy()


@pytest.mark.parametrize("pretraining", [0, 2])
def test_neumf_is_its_formula(lab, pretraining):
    data, d = lab.visits, 4
    model = far(NeuMF(dim=d, hidden=(6, 5), pretraining=pretraining), data)
    h, b = model.output.weight.detach().double().numpy()[0], model.output.bias.item()
    came = scores(model, data)
    for user in range(3):
        for item in range(4):
            u, v = pair(data, model, user, item)
            expected = h @ (u[:d] * v[:d]) + b + deep(model, np.concatenate([u[d:], v[d:]]))
            assert came[user, item] == pytest.approx(expected * (0.5 if pretraining else 1), abs=1e-5)


def test_gmf_and_pair_mlp_are_their_formulas(lab):
    data = lab.visits
    gmf, mlp = far(GMF(dim=4), data), far(PairMLP(dim=4, hidden=(6,)), data)
    with torch.no_grad():
        mlp.table.matrix[0, :3] = 0
    h, b = gmf.output.weight.detach().double().numpy()[0], gmf.output.bias.item()
    products, means = scores(gmf, data), scores(mlp, data)
    for user in range(3):
        for item in range(4):
            u, v = pair(data, gmf, user, item)
            assert products[user, item] == pytest.approx(h @ (u * v) + b, abs=1e-5)
            x = np.concatenate(pair(data, mlp, user, item))
            assert means[user, item] == pytest.approx(deep(mlp, x / np.count_nonzero(x)), abs=1e-5)


def test_mf_is_lightgcn_without_layers(lab):
    data = lab.visits
    mf = MF(dim=8, negatives=3, regularisation=0.3).build(data, 1)
    graph = LightGCN(dim=8, layers=0, contrast=0.0, negatives=3, regularisation=0.3).build(data, 1)
    assert torch.equal(mf.table.weight(), graph.table.weight())
    for ours, theirs in zip(mf.batches(data, 32, 1, 0), graph.batches(data, 32, 1, 0), strict=True):
        assert torch.equal(ours[0], theirs[0])
        losses = [m.loss(b, noise(0, "n")) for m, b in ((mf, ours), (graph, theirs))]
        torch.testing.assert_close(*losses)
        gradients = [torch.autograd.grad(loss, m.table.matrix)[0] for loss, m in zip(losses, (mf, graph), strict=True)]
        torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("negatives", [1, 5])
def test_losses_are_the_formulas(negatives):
    s = torch.randn(7, 1 + negatives, generator=torch.Generator().manual_seed(0))
    bpr = sum(-F.logsigmoid(row[0] - other) for row in s for other in row[1:]) / len(s)
    one, zero = torch.ones(7, 1), torch.zeros(7, negatives)
    bce = F.binary_cross_entropy_with_logits(s[:, :1], one) + F.binary_cross_entropy_with_logits(s[:, 1:], zero)
    torch.testing.assert_close(Objective("bpr", negatives, 0.0)(s), bpr)
    torch.testing.assert_close(Objective("bce", negatives, 0.0)(s), bce)


def test_the_penalty_counts_looked_up_vectors(lab):
    data = lab.visits
    plain, heavy = (NeuMF(dim=4, regularisation=weight).build(data, 0) for weight in (0.0, 0.8))
    batch = next(iter(plain.batches(data, 16, 0, 0)))
    vectors = plain.table(batch[0])
    gap = heavy.loss(batch, noise(0, "n")) - plain.loss(batch, noise(0, "n"))
    torch.testing.assert_close(gap, 0.8 / (2 * 16) * vectors.square().sum())


def test_positives_and_negatives_share_one_forward_pass(lab, monkeypatch):
    data = lab.visits
    model = PairMLP(dim=4, hidden=(6,), negatives=3).build(data, 0)
    calls = []
    plain = type(model).head
    monkeypatch.setattr(
        type(model), "head", lambda self, v, noise=None: (calls.append(len(v)), plain(self, v, noise))[1]
    )
    (batch,) = next(iter(model.batches(data, 16, 0, 0)))
    model.loss((batch,), noise(0, "n"))
    assert calls == [16 * 4]


def test_pretraining_trains_one_branch_at_a_time(lab):
    data, d = lab.visits, 4
    model = NeuMF(dim=d, pretraining=2).build(data, 0)
    still = [("perceptron", slice(0, d))] * 2 + [("product", slice(d, 2 * d))] * 2 + [("both", None)]
    for epoch, (_, columns) in enumerate(still):
        batch = next(iter(model.batches(data, 16, 0, epoch)))
        gradient = torch.autograd.grad(model.loss(batch, noise(0, "n")), model.table.matrix)[0]
        moving = [bool(gradient[:, part].any()) for part in (slice(0, d), slice(d, 2 * d))]
        assert moving == ([True, True] if columns is None else [columns.start != 0, columns.start == 0])


@given(negatives=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_every_negative_is_new_to_its_user(negatives, seed):
    random = np.random.default_rng(seed)
    pairs = np.unique(np.stack([random.integers(0, 6, 40), random.integers(6, 16, 40)], axis=1), axis=0)
    drawn = triples(pairs, 6, 16, seed, 0, negatives=negatives)
    assert drawn.shape == (len(pairs), 2 + negatives)
    known = {tuple(pair) for pair in pairs.tolist()}
    assert all((user, item) not in known and 6 <= item < 16 for user, _, *items in drawn.tolist() for item in items)
    assert sorted(map(tuple, drawn[:, :2].tolist())) == sorted(known)


@pytest.mark.parametrize("backbone", [MF(), GMF(), NeuMF(), PairMLP(hidden=(16, 8))], ids=lambda b: b.name)
def test_files_without_a_graph_recommend_what_the_model_ranks_first(lab, backbone, tmp_path):
    data = lab.visits
    model = train(backbone, data, None, Training(epochs=3, batch_size=64, patience=3))
    small = compress(model, data, MagPrune(), "sparsity=0.3")
    small.save(tmp_path / "small.safetensors")
    file = runtime.open(tmp_path / "small.safetensors")
    assert file.kind == "baked"
    weight, first = small.model.table.weight().detach(), data.schema.fields[1].offset
    with torch.no_grad():
        expected = small.model.scores(weight[4:5], weight[first:])[0]
    best = file.recommend(4, 40)
    assert [item for item, _ in best] == torch.argsort(-expected, stable=True).tolist()
    np.testing.assert_allclose([score for _, score in best], expected.sort(descending=True).values, atol=1e-5)
    figures = [
        measure(target, data.valid, latency=False).quality for target in (tmp_path / "small.safetensors", small.model)
    ]
    assert figures[0] == pytest.approx(figures[1], abs=1e-6)
    assert figures[1]["ndcg@20"] == pytest.approx(validate(small.model, data.valid))


@pytest.mark.parametrize(
    ("backbone", "bad"),
    [
        (FM, {"dim": 0}),
        (FM, {"linear_std": -1.0}),
        (MLP, {"hidden": (0,)}),
        (MLP, {"dropout": 1.0}),
        (DCNMix, {"experts": 0}),
        (DCNMix, {"rank": 0}),
        (DCNMix, {"init": "other"}),
        (DCNv2, {"structure": "other"}),
        (DCNv2, {"layers": -1}),
        (MF, {"loss": "other"}),
        (GMF, {"negatives": 0}),
        (NeuMF, {"regularisation": -1.0}),
        (NeuMF, {"pretraining": -1}),
        (PairMLP, {"hidden": (8, 0)}),
        (LightGCN, {"negatives": 0}),
    ],
)
def test_settings_out_of_range_are_named(backbone, bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        backbone(**bad)
