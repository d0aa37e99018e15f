from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pocketrec.backbones.deepfm import DeepFM
from pocketrec.errors import ConfigError
from pocketrec.format.program import Program
from pocketrec.models.backbone import noise
from pocketrec.schema import Field, Schema

SCHEMA = Schema("ctr", (Field("a", 5, 0), Field("b", 7, 5), Field("c", 3, 12)))
DATA = SimpleNamespace(schema=SCHEMA)


def random_ids(rows: int, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return np.stack([draw.integers(f.offset, f.stop, rows) for f in SCHEMA.fields], axis=1).astype(np.int32)


def trained_like(backbone: DeepFM, seed: int = 0):
    """A model whose batch-norm state and weights are far from their initial values."""
    model = backbone.build(DATA, seed)
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=source) + 0.1)
    return model


@pytest.mark.parametrize("batch_norm", [True, False])
@pytest.mark.parametrize("hidden", [(), (8,), (16, 8, 4)])
def test_lowered_program_equals_the_evaluation_forward(hidden, batch_norm):
    model = trained_like(DeepFM(dim=4, hidden=hidden, batch_norm=batch_norm))
    ids = random_ids(50)
    with torch.no_grad():
        expected = model(torch.from_numpy(ids)).numpy()
        vectors = model.table(torch.from_numpy(ids)).numpy()
    program = model.lower()
    again = Program.from_json(program.to_json(), program.tensors())
    np.testing.assert_allclose(program(vectors), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(again(vectors), program(vectors))


def test_forward_is_the_formula():
    model = trained_like(DeepFM(dim=4, hidden=(6,)))
    ids = random_ids(20)
    table = model.table.weight().detach().numpy().astype(np.float64)
    first, last = model.layers[0], model.layers[1]
    norm = model.norms[0]
    for row, logit in zip(ids, model(torch.from_numpy(ids)).tolist(), strict=True):
        e, w = table[row, :4], table[row, 4]
        pairs = sum(e[f] @ e[g] for f in range(3) for g in range(f + 1, 3))
        z = first.weight.detach().numpy() @ e.ravel() + first.bias.detach().numpy()
        scaled = (z - norm.running_mean.numpy()) / np.sqrt(norm.running_var.numpy() + norm.eps)
        h = np.maximum(scaled * norm.weight.detach().numpy() + norm.bias.detach().numpy(), 0)
        mlp = last.weight.detach().numpy() @ h + last.bias.detach().numpy()
        assert logit == pytest.approx(w.sum() + model.bias.item() + pairs + mlp[0], abs=1e-4)


def test_initialisation_is_xavier_on_the_whole_matrix_and_small_linear_weights():
    schema = Schema("ctr", (Field("a", 20_000, 0),))
    matrix = DeepFM(dim=16, hidden=()).build(SimpleNamespace(schema=schema), 0).table.weight().detach()
    bound = (6 / (20_000 + 16)) ** 0.5
    assert 0.999 * bound < matrix[:, :16].abs().max() <= bound
    assert matrix[:, :16].std() == pytest.approx(bound / 3**0.5, rel=0.01)
    assert matrix[:, 16].std() == pytest.approx(0.01, rel=0.05)
    published = DeepFM(dim=16, hidden=(), linear_std=1.0).build(SimpleNamespace(schema=schema), 0)
    assert published.table.weight()[:, 16].std().item() == pytest.approx(1.0, rel=0.05)


def test_building_is_a_function_of_the_seed_and_leaves_global_state_alone():
    before = torch.get_rng_state()
    one, same, other = (DeepFM(hidden=(8,)).build(DATA, seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[k], same[k]) for k in one)
    assert not torch.equal(one["table.matrix"], other["table.matrix"])
    assert not torch.equal(one["layers.0.weight"], other["layers.0.weight"])


def test_dropout_is_a_function_of_its_noise_and_keeps_the_mean():
    model = DeepFM(dim=4, hidden=(64,), dropout=0.3, batch_norm=False).build(DATA, 0)
    vectors = model.table(torch.from_numpy(random_ids(100)))
    a, b, c = (model.head(vectors, noise(0, "dropout", step)) for step in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    mean = torch.stack([model.head(vectors, noise(0, "dropout", step)) for step in range(400)]).mean(0)
    torch.testing.assert_close(mean, model.head(vectors), atol=0.02, rtol=0)


def test_blocks_tile_the_table_and_linear_weights_are_not_counted():
    embedding, linear = DeepFM(dim=8).blocks(SCHEMA)
    assert (embedding.left, embedding.right, embedding.counted) == (0, 8, True)
    assert (linear.left, linear.right, linear.counted) == (8, 9, False)
    assert DeepFM(dim=8, hidden=()).build(DATA, 0).table.values() == SCHEMA.rows * 8


@pytest.mark.parametrize("bad", [{"dim": 0}, {"hidden": (0,)}, {"dropout": 1.0}, {"linear_std": -1.0}])
def test_settings_out_of_range_are_named(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        DeepFM(**bad)
