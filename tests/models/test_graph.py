"""Propagation against scipy's sparse algebra and torch's autograd."""

from copy import deepcopy

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketrec.errors import DataError
from pocketrec.models.graph import Buffers, Graph
from pocketrec.native import library

USERS, ITEMS = 23, 31
ROWS = USERS + ITEMS


def random_pairs(seed: int, edges: int = 150, users: int = USERS, items: int = ITEMS) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.integers(0, users, edges), users + random.integers(0, items, edges)


def normalised(users: np.ndarray, items: np.ndarray, rows: int) -> sp.csr_matrix:
    """``D^-1/2 A D^-1/2`` by the definition, in float64."""
    adjacency = np.zeros((rows, rows))
    adjacency[users, items] = adjacency[items, users] = 1
    degree = adjacency.sum(axis=1)
    factor = np.where(degree > 0, 1 / np.sqrt(np.maximum(degree, 1)), 0)
    return sp.csr_matrix(factor[:, None] * adjacency * factor)


def mean_of_layers(matrix: sp.csr_matrix, ego: np.ndarray, layers: int) -> np.ndarray:
    powers = [ego]
    for _ in range(layers):
        powers.append(matrix @ powers[-1])
    return np.mean(powers, axis=0)


@pytest.fixture(params=["kernel", "torch"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "torch":
        monkeypatch.setattr(library, "available", lambda: False)
    elif not library.available():
        pytest.skip("the kernel is not built")
    return request.param


def dense(graph: Graph) -> sp.csr_matrix:
    factor = sp.diags(graph.scale.astype(np.float64))
    ones = np.ones(len(graph.indices))
    return factor @ sp.csr_matrix((ones, graph.indices, graph.indptr), shape=(graph.rows, graph.rows)) @ factor


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32), edges=st.integers(1, 300))
def test_adjacency_is_the_normalised_one_symmetric_with_spectral_radius_at_most_one(seed, edges):
    users, items = random_pairs(seed, edges)
    graph = Graph.of(users, items, ROWS)
    matrix = dense(graph)
    assert abs(matrix - matrix.T).max() < 1e-7
    np.testing.assert_allclose(matrix.toarray(), normalised(users, items, ROWS).toarray(), atol=1e-6)
    assert np.abs(np.linalg.eigvalsh(matrix.toarray())).max() <= 1 + 1e-6
    assert all((np.diff(row) > 0).all() for row in np.split(graph.indices, graph.indptr[1:-1]))


def test_a_repeated_pair_is_one_edge():
    once, twice = Graph.of(np.array([0]), np.array([1]), 2), Graph.of(np.array([0, 0]), np.array([1, 1]), 2)
    np.testing.assert_array_equal(once.indices, twice.indices)
    np.testing.assert_array_equal(once.scale, twice.scale)


@pytest.mark.parametrize("users", [[-1], [9]])
def test_ids_outside_the_table_are_refused(users):
    with pytest.raises(DataError, match=r"Ids must be in \[0, 3\)"):
        Graph.of(np.array(users), np.array([1]), 3)


@pytest.mark.parametrize("layers", [0, 1, 2, 3, 4])
def test_propagation_is_the_mean_of_matrix_powers(backend, layers):
    users, items = random_pairs(1)
    graph = Graph.of(users, items, ROWS)
    ego = torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(0))
    expected = mean_of_layers(normalised(users, items, ROWS), ego.double().numpy(), layers)
    rows = torch.tensor([3, 40, 0, 53, 17])
    np.testing.assert_allclose(graph.propagate(ego, layers).numpy(), expected, atol=1e-6)
    final, picked = graph.propagate_rows(ego, layers, rows)
    np.testing.assert_allclose(final.numpy(), expected[rows], atol=1e-6)
    assert torch.equal(picked, ego[rows])


@pytest.mark.parametrize("layers", [0, 1, 2, 3, 4])
def test_backward_is_the_gradient_that_autograd_finds(backend, layers):
    users, items = random_pairs(2)
    graph = Graph.of(users, items, ROWS)
    random = torch.Generator().manual_seed(0)
    ego = torch.randn(ROWS, 5, generator=random)
    rows = torch.randperm(ROWS, generator=random)[:20]
    slope, ego_slope = torch.randn(ROWS, 5, generator=random), torch.randn(20, 5, generator=random)

    reference = ego.clone().requires_grad_()
    matrix = torch.from_numpy(normalised(users, items, ROWS).toarray()).float()
    final = torch.stack([torch.linalg.matrix_power(matrix, power) @ reference for power in range(layers + 1)]).mean(0)
    (everywhere,) = torch.autograd.grad((final * slope).sum(), reference, retain_graph=True)
    loss = (final[rows] * slope[rows]).sum() + (reference[rows] * ego_slope).sum()
    (somewhere,) = torch.autograd.grad(loss, reference)

    ours = ego.clone().requires_grad_()
    (found,) = torch.autograd.grad((graph.propagate(ours, layers) * slope).sum(), ours)
    torch.testing.assert_close(found, everywhere, atol=1e-5, rtol=1e-5)
    final, picked = graph.propagate_rows(ours, layers, rows)
    (found,) = torch.autograd.grad((final * slope[rows]).sum() + (picked * ego_slope).sum(), ours)
    torch.testing.assert_close(found, somewhere, atol=1e-5, rtol=1e-5)


def test_bfloat16_storage_is_near_and_the_same_in_kernel_and_torch(monkeypatch):
    users, items = random_pairs(3)
    ego = torch.randn(ROWS, 64, generator=torch.Generator().manual_seed(0))
    exact = Graph.of(users, items, ROWS).propagate(ego, 3)
    found = Graph.of(users, items, ROWS).propagate(ego, 3, storage=torch.bfloat16)
    monkeypatch.setattr(library, "available", lambda: False)
    fallback = Graph.of(users, items, ROWS).propagate(ego, 3, storage=torch.bfloat16)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, atol=0.02, rtol=0.02)
    assert not torch.equal(found, exact)
    torch.testing.assert_close(found, fallback, atol=2e-3, rtol=2e-3)


def test_a_copy_of_a_graph_that_was_used_has_memory_of_its_own(backend):
    users, items = random_pairs(5)
    graph = Graph.of(users, items, ROWS)
    ego = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(0))
    wanted = graph.propagate(ego, 2)
    other = deepcopy(graph)
    assert torch.equal(other.propagate(ego, 2), wanted)
    assert other.workspace is not graph.workspace


def test_nodes_without_edges_keep_their_share_and_give_no_nan(backend):
    graph = Graph.of(np.array([0]), np.array([3]), 5)
    ego = torch.ones(5, 2, requires_grad=True)
    final = graph.propagate(ego, 3)
    assert torch.isfinite(final).all()
    torch.testing.assert_close(final[[1, 2, 4]], torch.full((3, 2), 0.25))
    final.sum().backward()
    assert ego.grad is not None
    torch.testing.assert_close(ego.grad[[1, 2, 4]], torch.full((3, 2), 0.25))


def test_an_empty_graph_only_shrinks():
    graph = Graph.of(np.zeros(0, np.int64), np.zeros(0, np.int64), 3)
    torch.testing.assert_close(graph.propagate(torch.ones(3, 2), 1), torch.full((3, 2), 0.5))


def test_results_do_not_depend_on_earlier_calls():
    users, items = random_pairs(4)
    graph = Graph.of(users, items, ROWS)
    ego = torch.randn(ROWS, 7, generator=torch.Generator().manual_seed(0))
    first = graph.propagate(ego, 3)
    kept = first.clone()
    graph.propagate(2 * ego, 3, storage=torch.bfloat16)
    graph.propagate_rows(3 * ego, 3, torch.arange(4))
    assert torch.equal(first, kept)
    assert torch.equal(graph.propagate(ego, 3), kept)


def test_workspace_gives_the_shape_and_type_that_is_asked_for():
    space = Buffers()
    big = space.take("a", (4, 3), torch.float32)
    small = space.take("a", (2, 3), torch.float32)
    assert small.shape == (2, 3)
    assert small.data_ptr() == big.data_ptr()
    assert space.take("a", (2, 3), torch.bfloat16).dtype == torch.bfloat16
    assert space.take("b", (2, 3), torch.bfloat16).data_ptr() != space.take("a", (2, 3), torch.bfloat16).data_ptr()


def test_propagation_works_again_after_a_measurement() -> None:
    graph = Graph.of(np.array([0, 0, 1]), np.array([2, 3, 3]), rows=4)
    ego = torch.ones(4, 1, requires_grad=True)
    with torch.inference_mode():
        measured = graph.propagate(ego, layers=2)
    final = graph.propagate(ego, layers=2)
    final.sum().backward()
    assert torch.equal(final.detach(), measured)


def test_a_copied_workspace_takes_no_buffers_along():
    workspace = Buffers()
    first = workspace.take("kernel", (8,), torch.float32).fill_(1)
    again = deepcopy(workspace)
    assert not again._buffers
    again.take("kernel", (8,), torch.float32).fill_(2)
    assert first.tolist() == [1] * 8
