"""QR: published counts, divisors within budgets, the closed form of its gradients, and damaged blocks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from compositional_cases import AVAZU, CRITEO, GOWALLA, YELP, in_file, place
from hypothesis import given, settings
from hypothesis import strategies as st

from pocketrec.errors import ArtifactError, ConfigError
from pocketrec.format.packed import Packed
from pocketrec.methods.qr import QR, QRPlan, least_rows, table_rows
from pocketrec.models.backbone import noise


@pytest.mark.parametrize(
    ("tables", "width", "divisor", "published"),
    [
        (CRITEO, 16, 2, 8_694_512),
        (CRITEO, 16, 5, 3_477_872),
        (CRITEO, 16, 20, 869_776),
        (AVAZU, 16, 2, 35_428_128),
        (AVAZU, 16, 5, 14_171_328),
        (AVAZU, 16, 20, 3_543_136),
        (GOWALLA, 64, 2, 2_267_136),
        (GOWALLA, 64, 5, 907_456),
        (GOWALLA, 64, 20, 229_312),
        (YELP, 64, 2, 2_231_168),
        (YELP, 64, 5, 893_056),
        (YELP, 64, 20, 225_728),
    ],
)
def test_published_counts_of_qr(tables, width, divisor, published):
    assert sum(QRPlan(rows, width, divisor).values for rows in tables) == published


@settings(deadline=None)
@given(rows=st.integers(1, 5000), data=st.data())
def test_qr_pairs_are_a_bijection_and_budgets_are_kept(rows, data):
    method = QR(large=data.draw(st.sampled_from(["remainder", "quotient"])))
    most = data.draw(st.integers(0, rows + 2))
    divisor = method.divisor_of(rows, most)
    possible = [p for p in range(1, rows + 1) if p + -(-rows // p) <= most]
    assert divisor == ((max if method.large == "remainder" else min)(possible) if possible else None)
    assert (divisor is None) == (most < least_rows(rows))
    if divisor is not None:
        i = np.arange(rows)
        pairs = i % divisor, i // divisor
        assert len(set(zip(*(p.tolist() for p in pairs), strict=True))) == rows
        assert (pairs[1] * divisor + pairs[0] == i).all()
        assert pairs[1].max() == -(-rows // divisor) - 1


@settings(deadline=None)
@given(st.integers(4, 10_000), st.floats(0.01, 0.99))
def test_qr_with_a_large_remainder_table_wastes_at_most_a_few_rows(rows, share):
    most = int(rows * share)
    divisor = QR().divisor_of(rows, most)
    if divisor is not None:
        quotient = -(-rows // divisor)
        assert most - quotient <= divisor + quotient <= most


@given(rows=st.integers(1, 5000), data=st.data())
def test_the_mirror_of_a_divisor_needs_no_more_rows(rows, data):
    divisor = data.draw(st.integers(1, rows))
    mirror = -(-rows // divisor)
    assert least_rows(rows) <= table_rows(rows, mirror) <= table_rows(rows, divisor)
    assert table_rows(rows, divisor) == len({i % divisor for i in range(rows)}) + len(
        {i // divisor for i in range(rows)}
    )


@pytest.mark.parametrize(("operation", "neutral"), [("mult", 1.0), ("add", 0.0)])
def test_qr_with_a_divisor_of_all_rows_says_every_matrix(operation, neutral):
    part = QRPlan(30, 5, 30, operation).build(noise(1, "qr"))
    matrix = torch.randn(30, 5, generator=noise(2, "matrix"))
    with torch.no_grad():
        part.remainder.copy_(matrix)
        part.quotient.fill_(neutral)
    assert torch.equal(part.weight(), matrix)


@settings(deadline=None)
@given(
    st.sampled_from(["mult", "add", "concat"]),
    st.integers(1, 50),
    st.lists(st.integers(0, 49), min_size=1, max_size=12),
    st.integers(0, 99),
)
def test_gradients_of_qr_are_the_closed_form(operation, divisor, slots, seed):
    part = QRPlan(50, 4, divisor, operation).build(noise(seed, "qr"))
    upstream = torch.randn(len(slots), 4, generator=noise(seed, "upstream"))
    (part(torch.tensor(slots)) * upstream).sum().backward()
    r, q = part.remainder.detach(), part.quotient.detach()
    expected = torch.zeros_like(r), torch.zeros_like(q)
    for i, g in zip(slots, upstream, strict=True):
        j, k = i % divisor, i // divisor
        slopes = (g * q[k], g * r[j]) if operation == "mult" else (g, g) if operation == "add" else (g[:2], g[2:])
        expected[0][j] += slopes[0]
        expected[1][k] += slopes[1]
    torch.testing.assert_close((part.remainder.grad, part.quotient.grad), expected)


@pytest.mark.parametrize("operation", ["mult", "add", "concat"])
def test_qr_reads_what_it_says(operation):
    part = QRPlan(50, 4, 7, operation, "uniform").build(noise(1, "qr"))
    r, q = part.remainder.detach().numpy(), part.quotient.detach().numpy()
    join = {"mult": np.multiply, "add": np.add, "concat": lambda a, b: np.concatenate([a, b])}[operation]
    expected = np.stack([join(r[i % 7], q[i // 7]) for i in range(50)])
    np.testing.assert_array_equal(part.weight().detach().numpy(), expected)
    np.testing.assert_array_equal(part(torch.arange(50)).detach().numpy(), expected)
    np.testing.assert_array_equal(in_file(part, 50, 4), expected)
    assert (r >= math.sqrt(1 / 50)).all()
    assert (r < 1).all()


def test_qr_with_ones_reads_the_quotient_row():
    part = QRPlan(20, 3, 4).build(noise(1, "qr"))
    with torch.no_grad():
        part.remainder.fill_(1)
    torch.testing.assert_close(part(torch.arange(20)), part.quotient[torch.arange(20) // 4])


def test_damaged_blocks_are_refused():
    part = QRPlan(50, 4, 7).build(noise(1, "qr"))
    block = part.pack(place(50, 4), "fp32", None)
    zeros = np.zeros((1, 4), np.float32)
    packed = Packed(50, (block,), zeros, zeros)
    arrays, meta = packed.arrays(), packed.meta()
    for change in ({"divisor": 0}, {"divisor": 8}, {"slots": 49}, {"operation": "div"}):
        damaged = {**meta["blocks"][0], "settings": {**meta["blocks"][0]["settings"], **change}}
        with pytest.raises(ArtifactError):
            Packed.from_arrays({**meta, "blocks": [damaged]}, arrays)
    with pytest.raises(ArtifactError):
        Packed.from_arrays({**meta, "blocks": [{**meta["blocks"][0], "layout": ["product"]}]}, arrays)


@pytest.mark.parametrize(
    "settings",
    [{"operation": "div"}, {"init": "zeros"}, {"large": "both"}],
)
def test_bad_words_are_refused(settings):
    with pytest.raises(ConfigError):
        QR(**settings)
