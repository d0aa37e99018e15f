"""A head in a few bits: the rows of its matrices get the bits that their errors are worth in the loss.

To second order an error ``D`` in row ``o`` of a matrix adds ``g_o D A D^T`` to twice the loss, with ``A`` the second
moment of what the matrix is given and ``g_o`` that of the gradient of what it makes, both over training rows by the
model's own probabilities: the units of :mod:`pocketrec.attribution.fisher`, so that one price serves table and head.
Rows are rounded entry after entry, and what is left to come makes up for the errors so far.

Reference: Martens and Grosse, "Optimizing neural networks with Kronecker-factored approximate curvature", 2015, section
3 (the product form); Hassibi and Stork, "Second order derivatives for network pruning: optimal brain surgeon", 1993,
equation 5 (making up for an error).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pocketrec.attribution.lowered import LoweredHead
from pocketrec.attribution.samples import ClickSamples, training_rows
from pocketrec.data.dataset import Dataset
from pocketrec.errors import UnsupportedOp
from pocketrec.format.matrix import CodedMatrix, row_bytes
from pocketrec.format.program import Op, Program
from pocketrec.format.quantiser import MOST_BITS, edges, levels
from pocketrec.models.backbone import ClickModel

SAMPLES = 1 << 14
"""Training rows that are read, at most."""
LEAST_ENTRIES = 256
"""Entries of a tensor that is worth coding."""
RIDGE = 1e-2
"""Share of the mean of ``A``'s diagonal that is added to it."""

_AT_ONCE = 1024
_REFITS = 4
_COLUMNS = 32
_LARGEST_HALF = 6e4

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class HeadMoments:
    """What errors in the matrices of a head cost; matrices by ``op.name``, ``K`` of one tensor.

    Attributes:
        inputs: ``A``, ``(K, i, i)``.
        slopes: ``g``, ``(K, o)``.
    """

    inputs: Mapping[str, Floats]
    slopes: Mapping[str, Floats]

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What a run stores."""
        inputs = {f"inputs.{name}": a for name, a in self.inputs.items()}
        return inputs | {f"slopes.{name}": a for name, a in self.slopes.items()}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> HeadMoments:
        """Read what ``arrays`` wrote."""

        def part(kind: str) -> dict[str, Floats]:
            return {n.removeprefix(f"{kind}."): a for n, a in arrays.items() if n.startswith(f"{kind}.")}

        return cls(part("inputs"), part("slopes"))


def moments(model: ClickModel, data: Dataset, seed: int) -> HeadMoments:
    """One pass over some training rows."""
    program = model.lower()
    head, weight = LoweredHead.of(program), model.table.weight().detach()
    samples = ClickSamples(training_rows(data.train), SAMPLES, seed)
    number = {id(op): i for i, op in enumerate(program.ops)}
    inputs: dict[str, Tensor] = {}
    slopes: dict[str, Tensor] = {}
    for start in range(0, len(samples), _AT_ONCE):
        rows = samples.batch(start, min(start + _AT_ONCE, len(samples)), 0).rows
        p = head.logits(weight[rows]).sigmoid()
        head.pull((p * (1 - p)).sqrt())
        for op, name, x, slope in head.products():
            key = f"{number[id(op)]}.{name}"
            x, slope = (t if t.ndim == 3 else t[None] for t in (x, slope))
            share = slope.square().sum(dim=2, keepdim=True)
            square = (x * share).transpose(1, 2) @ x
            inputs[key] = inputs.get(key, 0) + square / len(samples)
            slopes[key] = slopes.get(key, 0) + slope.square().sum(dim=1) / len(samples)
    scaled = {n: (a / slopes[n].sum(dim=1).clamp_min(1e-30)[:, None, None]).numpy() for n, a in inputs.items()}
    return HeadMoments(scaled, {n: g.numpy() for n, g in slopes.items()})


@dataclass(frozen=True)
class HeadCosts:
    """A head, and what each row of its matrices loses and takes by its bits.

    Args:
        program: the head.
        moments: of its matrices.
        loss: of all rows by their bits, ``(R, 9)``.
    """

    program: Program
    moments: HeadMoments
    loss: Floats

    @classmethod
    def of(cls, program: Program, moments: HeadMoments) -> HeadCosts:
        """Round every row to every number of bits."""
        blank = cls(program, moments, np.empty((0, MOST_BITS + 1), np.float32))
        return replace(blank, loss=np.concatenate([blank.loss, *blank._losses()]))

    def arrays(self) -> dict[str, NDArray[Any]]:
        """What a run stores: everything but the program."""
        return {"loss": self.loss, **self.moments.arrays()}

    @classmethod
    def from_arrays(cls, program: Program, arrays: Mapping[str, NDArray[Any]]) -> HeadCosts:
        """Read what ``arrays`` wrote."""
        return cls(program, HeadMoments.from_arrays(arrays), arrays["loss"])

    @cached_property
    def matrices(self) -> list[tuple[int, str]]:
        """Op and name of each tensor that is coded."""
        return [
            (i, name)
            for i, op in enumerate(self.program.ops)
            for name, tensor in sorted(op.tensors.items())
            if tensor.ndim > 1 and tensor.size >= LEAST_ENTRIES and f"{i}.{name}" in self.moments.inputs
        ]

    def _losses(self) -> Iterator[Floats]:
        """Of the rows of each matrix by their bits; more of them never lose more."""
        for i, name in self.matrices:
            for part, metric, slope in self._parts(self.program, i, name):
                errors = np.empty((len(part), MOST_BITS + 1), np.float32)
                for bits in range(MOST_BITS + 1):
                    error = part - RoundedRows.of(part, metric, np.full(len(part), bits, np.uint8)).values
                    errors[:, bits] = slope * np.einsum("oi,oi->o", error @ metric, error)
                yield np.minimum.accumulate(errors, axis=1)

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """Bits of a row in the file by the bits of its entries, ``(R, 9)``."""
        found = []
        for i, name in self.matrices:
            tensor = self.program.ops[i].tensors[name]
            own = [8 * row_bytes(tensor.shape[-1], bits) for bits in range(MOST_BITS + 1)]
            found.append(np.broadcast_to(own, (tensor.size // tensor.shape[-1], MOST_BITS + 1)))
        return np.concatenate([np.empty((0, MOST_BITS + 1), np.int64), *found])

    @cached_property
    def fixed_bytes(self) -> int:
        """Bytes of everything else in the head."""
        coded = {f"head.{i}.{name}" for i, name in self.matrices}
        return sum(_short(t).nbytes for name, t in self.program.tensors().items() if name not in coded)

    def bits(self, price: float) -> NDArray[np.uint8]:
        """Of each row at a price, ``(R,)``."""
        return (self.loss + price * self.sizes).argmin(axis=1).astype(np.uint8)

    def spent(self, price: float) -> float:
        """Bits of all rows at a price."""
        chosen = self.bits(price)
        return float(self.sizes[np.arange(len(chosen)), chosen].sum())

    def coded(self, program: Program, bits: NDArray[np.uint8]) -> Program:
        """A head of the same shape, its rows rounded to so many bits ``(R,)``, and all else to float16."""
        ops = [replace(op, tensors={n: _short(t) for n, t in op.tensors.items()}) for op in program.ops]
        first = 0
        for i, name in self.matrices:
            tensor = program.ops[i].tensors[name]
            rows: list[RoundedRows] = []
            for part, metric, _ in self._parts(program, i, name):
                rows.append(RoundedRows.of(part, metric, bits[first : first + len(part)]))
                first += len(part)
            codes, kinds, scale = (np.concatenate([getattr(r, n) for r in rows]) for n in ("codes", "bits", "scale"))
            matrix = CodedMatrix.encode(codes, kinds, scale)
            ops[i] = _with(ops[i], name, matrix, tensor.shape)
        return Program(tuple(ops))

    def _parts(self, program: Program, i: int, name: str) -> Iterator[tuple[Floats, Floats, Floats]]:
        """Each matrix ``(o, i)`` of a tensor, its ``A`` and its ``g``."""
        tensor, key = program.ops[i].tensors[name], f"{i}.{name}"
        parts = tensor if tensor.ndim == 3 else tensor[None]
        return zip(parts, self.moments.inputs[key], self.moments.slopes[key], strict=True)


def _with(op: Op, name: str, matrix: CodedMatrix, shape: tuple[int, ...]) -> Op:
    """The op with a coded tensor."""
    tensors = {**op.tensors, name: matrix.decoded().reshape(shape)}
    return replace(op, tensors=tensors, codes={**op.codes, name: matrix})


def _short(tensor: NDArray[Any]) -> NDArray[Any]:
    """In float16 where that holds it; a single number stays as it is."""
    return tensor.astype(np.float16) if tensor.ndim and np.abs(tensor).max(initial=0) <= _LARGEST_HALF else tensor


@dataclass(frozen=True)
class RoundedRows:
    """Rows of a matrix, rounded.

    Attributes:
        bits: ``(o,)``.
        scale: float16 ``(o,)``.
        codes: ``(o, i)``.
        values: what they mean, ``(o, i)``.
    """

    bits: NDArray[np.uint8]
    scale: NDArray[np.float16]
    codes: NDArray[np.uint8]
    values: Floats

    @classmethod
    def of(cls, matrix: Floats, metric: Floats, bits: NDArray[np.uint8]) -> RoundedRows:
        """Round ``matrix (o, i)`` so that errors cost least by ``metric (i, i)``."""
        scale = _scales(matrix, bits)
        step = scale.astype(np.float32)
        groups = [(int(b), np.flatnonzero((bits == b) & (step > 0))) for b in range(1, MOST_BITS + 1)]
        bits = np.where(step > 0, bits, 0).astype(np.uint8)
        order = np.argsort(-np.diag(metric), kind="stable")
        push = _pushes(metric[np.ix_(order, order)])
        left = matrix[:, order]
        codes = np.zeros(matrix.shape, np.uint8)
        values = np.zeros(matrix.shape, np.float32)
        for start in range(0, len(order), _COLUMNS):
            block = slice(start, start + _COLUMNS)
            inner, own = left[:, block], push[block, block]
            errors = np.empty_like(inner)
            for j, column in enumerate(order[block]):
                for b, rows in groups:
                    if rows.size:
                        found = np.searchsorted(edges(b), inner[rows, j] / step[rows])
                        codes[rows, column] = found
                        values[rows, column] = levels(b)[found] * step[rows]
                errors[:, j] = inner[:, j] - values[:, column]
                inner[:, j + 1 :] -= errors[:, j, None] * own[j, j + 1 :]
            left[:, start + _COLUMNS :] -= errors @ push[block, start + _COLUMNS :]
        return cls(bits, scale, codes, values)


def _pushes(metric: NDArray[np.floating]) -> Floats:
    """What an error of 1 in an entry takes off each later one, ``(i, i)``: rows of ``U`` over their diagonal.

    ``U`` is the upper Cholesky factor of the inverse metric.
    """
    width = len(metric)
    ridge = RIDGE * max(float(np.trace(metric)) / width, 1e-20)
    inverse = np.linalg.inv(metric.astype(np.float64) + ridge * np.eye(width))
    upper = np.linalg.cholesky((inverse + inverse.T) / 2).T
    return (upper / np.diag(upper)[:, None]).astype(np.float32)


def _scales(matrix: Floats, bits: NDArray[np.uint8]) -> NDArray[np.float16]:
    """Scale of each row's levels of least squared error, ``(o,)``."""
    scale = np.sqrt(np.square(matrix).mean(axis=1))
    for b in np.unique(bits[bits > 0]).tolist():
        rows = np.flatnonzero((bits == b) & (scale > 0))
        part = matrix[rows]
        for _ in range(_REFITS):
            found = levels(b)[np.searchsorted(edges(b), part / scale[rows, None])]
            fitted = (found * part).sum(axis=1) / np.maximum(np.square(found).sum(axis=1), 1e-30)
            scale[rows] = np.where(fitted > 0, fitted, scale[rows])
    return np.where(bits > 0, scale, 0).astype(np.float16)


class CodedHead(ClickModel):
    """A click model whose head is the coded one; it is not trained.

    Args:
        source: whose head was coded; its table is taken.
        program: the coded head.
        bits: of the rows.
    """

    def __init__(self, source: ClickModel, program: Program, bits: NDArray[np.uint8]) -> None:
        super().__init__()
        self.backbone, self.schema, self.table = source.backbone, source.schema, source.table
        self.source, self.program, self.bits = source, program, bits
        self._run = LoweredHead.of(program)

    def head(self, vectors: Tensor, noise: torch.Generator | None = None) -> Tensor:
        """``(B, F, D) -> (B,)`` logits.

        Raises:
            UnsupportedOp: asked to train.
        """
        if noise is not None:
            raise UnsupportedOp("A coded head is final and cannot be trained; train the model that it was made of.")
        return self._run.logits(vectors)

    def lower(self) -> Program:
        """The coded head."""
        return self.program
