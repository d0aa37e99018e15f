"""The network of hash codes: folded normalisation, statistics of distinct ids, hot vectors, gradients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from compositional_cases import in_file
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from pocketrec.families.compositional.hash_network import HashNetwork, NetworkPlan
from pocketrec.format.layouts.hash_mlp import codes
from pocketrec.models.backbone import noise


@pytest.mark.parametrize("norm", ["before", "after", "none"])
@pytest.mark.parametrize("last", ["linear", "bn_mish"])
def test_dhe_files_fold_the_normalisation_in(norm, last):
    part = NetworkPlan(40, (16, 9, 8, 6), 1000, "uniform", norm, last, 3).build(noise(0, "dhe"))
    generator = noise(1, "statistics")
    for layer in part.norms:
        for tensor in (layer.running_mean, layer.running_var, layer.weight.data, layer.bias.data):
            tensor.uniform_(0.5, 1.5, generator=generator)
    weight = part.weight().detach().numpy()
    np.testing.assert_allclose(in_file(part, 40, 6), weight, atol=2e-5)
    alone = torch.cat([part(torch.tensor([i])) for i in range(40)]).detach().numpy()
    np.testing.assert_allclose(alone, weight, atol=2e-5)


def test_dhe_trains_on_the_statistics_of_distinct_ids_and_survives_a_single_one():
    part: HashNetwork = NetworkPlan(40, (16, 9, 6), 1000, "uniform", "before", "linear", 3).build(noise(0, "dhe"))
    live = part.drawn()
    once, often = live(torch.tensor([1, 2, 3])), live(torch.tensor([1, 2, 3, 3, 3]))
    torch.testing.assert_close(once, often[:3])
    assert torch.isfinite(live(torch.tensor([5, 5]))).all()
    assert float(part.norms[0].running_mean.abs().sum()) > 0


@settings(max_examples=30, deadline=None)
@given(st.sets(st.integers(0, 39), max_size=12), st.lists(st.integers(0, 39), min_size=1, max_size=12))
def test_hot_vectors_of_dhe_are_read_from_memory_and_follow_the_network(hot, slots):
    plan = NetworkPlan(40, (16, 9, 6), 1000, "uniform", "before", "linear", 3)
    part: HashNetwork = replace(plan, hot=np.array(sorted(hot), np.int64)).build(noise(0, "dhe"))
    assert part.plan == plan
    ids, calls, network = torch.tensor(slots), [], part._network
    part._network = lambda x: calls.append(len(x)) or network(x)  # type: ignore[method-assign]
    cold = len(set(slots) - hot)
    with torch.no_grad():
        expected = network(part.store.of(ids))
        for known in ([len(hot)] if hot else [], []):
            torch.testing.assert_close(part(ids), expected)
            assert calls == known + [cold] * (cold > 0)
            calls.clear()
        part.biases[-1] += 1
        torch.testing.assert_close(part(ids), expected + 1)
        part.norms[0].running_mean += 1
        torch.testing.assert_close(part(ids), network(part.store.of(ids)))
        calls.clear()
    part(ids)
    part.drawn()(ids)
    assert calls == [len(set(slots))] * 2
    np.testing.assert_allclose(in_file(part, 40, 6), part.weight().detach().numpy(), atol=2e-5)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 39), min_size=1, max_size=9), st.booleans())
def test_gradients_of_dhe_are_those_of_a_network_that_sees_every_occurrence(slots, normed):
    """Without statistics, going through the network once or often makes no difference; with them, all stays finite."""
    plan = NetworkPlan(40, (8, 5, 4, 6), 100, "uniform", "before" if normed else "none", "linear", 1)
    part: HashNetwork = plan.build(noise(0, "dhe"))
    upstream = torch.randn(len(slots), 6, generator=noise(1, "upstream"))
    (part.drawn()(torch.tensor(slots)) * upstream).sum().backward()
    found = [p.grad for p in part.parameters()]
    assert all(bool(torch.isfinite(gradient).all()) for gradient in found)
    if not normed:
        x = torch.from_numpy(codes(np.array(slots), 8, 100, 1, "uniform"))
        for i, (weight, bias) in enumerate(zip(part.weights, part.biases, strict=True)):
            x = F.linear(x if i == 0 else x * torch.tanh(torch.log1p(torch.exp(x))), weight, bias)
        expected = torch.autograd.grad((x * upstream).sum(), list(part.parameters()))
        torch.testing.assert_close(found, list(expected), rtol=1e-4, atol=1e-5)
