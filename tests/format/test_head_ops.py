"""Every head op three times: the numpy reference, torch by the book, and the hand-written gradient against autograd."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pocketrec import registry
from pocketrec.attribution.incremental import IncrementalLogits
from pocketrec.attribution.lowered import LoweredHead
from pocketrec.format.program import OPS, Op, Program
from pocketrec.models.backbone import RankingModel

BATCH, FIELDS, DIM = 5, 2, 3
FLAT = FIELDS * DIM


def drawn(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(0, 0.7, shape).astype(np.float32)


MIXTURE = {
    "down": drawn(8, FLAT),
    "core": drawn(2, 4, 4),
    "up": drawn(FLAT, 8),
    "gate": drawn(2, FLAT),
    "bias": drawn(FLAT),
}
LINEAR = {"weight": drawn(4, FLAT), "bias": drawn(4)}
CROSS = {"weight": drawn(FLAT, FLAT), "bias": drawn(FLAT)}
FLATTEN = Op("flatten", ("vectors",), "x")
SUM = Op("sum", ("y",), "out", tensors={"bias": np.array(0.25, np.float32)})


def by_experts(x: Tensor) -> Tensor:
    """The mixture as it is written: one expert after the other."""
    total = x
    for k in range(2):
        down, up = torch.tensor(MIXTURE["down"])[4 * k : 4 * k + 4], torch.tensor(MIXTURE["up"])[:, 4 * k : 4 * k + 4]
        core, gate = torch.tensor(MIXTURE["core"])[k], torch.tensor(MIXTURE["gate"])[k]
        inner = torch.tanh(torch.tanh(x @ down.T) @ core.T) @ up.T
        total = total + (x @ gate)[:, None] * (x * (inner + torch.tensor(MIXTURE["bias"])))
    return total


def linear(x: Tensor, tensors: dict[str, np.ndarray]) -> Tensor:
    return x @ torch.tensor(tensors["weight"]).T + torch.tensor(tensors["bias"])


CASES = {
    "columns": (
        [Op("columns", ("vectors",), "y", {"start": 1, "stop": 3}), SUM],
        lambda v: v[..., 1:3].sum((1, 2)) + 0.25,
    ),
    "flatten": ([FLATTEN, Op("sum", ("x",), "out")], lambda v: v.sum((1, 2))),
    "linear": (
        [FLATTEN, Op("linear", ("x",), "y", tensors=LINEAR), SUM],
        lambda v: linear(v.flatten(1), LINEAR).sum(1) + 0.25,
    ),
    "relu": ([FLATTEN, Op("relu", ("x",), "y"), SUM], lambda v: v.flatten(1).relu().sum(1) + 0.25),
    "fm": ([Op("fm", ("vectors",), "out")], lambda v: (v[:, 0] * v[:, 1]).sum(1)),
    "sum": ([Op("sum", ("vectors",), "out")], lambda v: v.sum((1, 2))),
    "add": ([Op("sum", ("vectors",), "x"), Op("add", ("x", "x"), "out")], lambda v: 2 * v.sum((1, 2))),
    "dot": (
        [Op("dot", ("vectors",), "out", tensors={"bias": np.array(0.5, np.float32), "weight": drawn(DIM)})],
        lambda v: (torch.tensor(drawn(DIM)) * v[:, 0] * v[:, 1]).sum(1) + 0.5,
    ),
    "nonzero_mean": (
        [FLATTEN, Op("nonzero_mean", ("x",), "y"), SUM],
        lambda v: v.sum((1, 2)) / (v != 0).sum((1, 2)).clamp_min(1) + 0.25,
    ),
    "cross": (
        [FLATTEN, Op("cross", ("x", "x"), "z", tensors=CROSS), Op("cross", ("x", "z"), "y", tensors=CROSS), SUM],
        lambda v: crossed(v.flatten(1)).sum(1) + 0.25,
    ),
    "mixture": (
        [FLATTEN, Op("mixture", ("x", "x"), "y", tensors=MIXTURE), SUM],
        lambda v: by_experts(v.flatten(1)).sum(1) + 0.25,
    ),
}


def crossed(x: Tensor) -> Tensor:
    first = x * linear(x, CROSS) + x
    return x * linear(first, CROSS) + first


@pytest.fixture(params=sorted(CASES))
def case(request):
    ops, oracle = CASES[request.param]
    return Program(tuple(ops)), oracle


def vectors() -> Tensor:
    values = torch.tensor(drawn(BATCH, FIELDS, DIM))
    values[0, 0] = 0
    values[1] = 0
    return values


def test_every_op_has_a_case():
    assert set(CASES) == set(OPS)


def test_numpy_and_torch_equal_the_formula(case):
    program, oracle = case
    expected = oracle(vectors())
    torch.testing.assert_close(
        torch.from_numpy(np.asarray(program(vectors().numpy()), np.float32)), expected, rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(LoweredHead.of(program).logits(vectors()), expected, rtol=1e-5, atol=1e-5)


def test_float64_vectors_give_the_same_in_higher_precision(case):
    program, oracle = case
    wide = program(vectors().double().numpy())
    np.testing.assert_allclose(wide, oracle(vectors()).numpy(), rtol=1e-5, atol=1e-5)


def test_the_hand_gradient_is_that_of_autograd(case):
    program, oracle = case
    leaf, slope = vectors().requires_grad_(), torch.tensor(drawn(BATCH))
    expected = torch.autograd.grad(oracle(leaf), leaf, slope)[0]
    head = LoweredHead.of(program)
    head.logits(vectors())
    torch.testing.assert_close(head.pull(slope), expected, rtol=1e-4, atol=1e-5)


def test_a_gradient_of_two_parts_is_the_sum_of_theirs(case):
    program, _ = case
    both, slope = torch.cat((vectors(), 0.5 * vectors())), torch.tensor(drawn(2 * BATCH))
    head = LoweredHead.of(program)
    head.logits(both)
    apart = head.pull(slope).unflatten(0, (2, -1)).sum(0)
    head.logits(both)
    torch.testing.assert_close(head.pull(slope, parts=2), apart, rtol=1e-4, atol=1e-5)


def test_a_walk_follows_single_coordinates(case):
    program, oracle = case
    start = vectors() + 0.1
    walk = IncrementalLogits(LoweredHead.of(program), start)
    current = start.clone()
    for player in range(FLAT):
        new = torch.tensor(drawn(BATCH)) * (player + 1)
        current.view(BATCH, -1)[:, player] = new
        came = walk.set(torch.full((BATCH,), player), new)
        torch.testing.assert_close(came, oracle(current), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", registry.modules("backbones"))
def test_the_gradient_of_every_head_is_that_of_its_torch_model(name, lab):
    model = lab.model(registry.load("backbones", name)())
    data = lab.data(model.backbone.task)
    weight = model.table.weight().detach()
    final = model.propagate(weight).detach() if isinstance(model, RankingModel) else weight
    leaf = final[torch.from_numpy(np.array(data.train.ids[:32], np.int64))].clone().requires_grad_()
    ranks = isinstance(model, RankingModel)
    expected = model.scores(leaf[:, 0], leaf[:, 1]).diagonal() if ranks else model.head(leaf)
    slope = torch.tensor(drawn(32))
    head = LoweredHead.of(model.lower())
    torch.testing.assert_close(head.logits(leaf.detach()), expected.detach(), rtol=1e-4, atol=1e-5)
    gradient = torch.autograd.grad(expected, leaf, slope)[0]
    torch.testing.assert_close(head.pull(slope), gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", registry.modules("backbones"))
def test_a_program_keeps_its_weights_when_the_model_trains_on(name, lab):
    backbone = registry.load("backbones", name)()
    model = backbone.build(lab.data(backbone.task), 0)
    program = model.lower()
    before = {key: tensor.copy() for key, tensor in program.tensors().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert all(np.array_equal(tensor, before[key]) for key, tensor in program.tensors().items())
