"""Heads as data: a closed list of ops, each with a numpy reference of a few lines.

A backbone *lowers* its head to a :class:`Program`; the artifact stores it in its header, the runtime executes it with
numpy, and the attribution engine differentiates it. Adding an op is a visible, reviewed event; nothing else knows
backbones by name. Torch-free.

An op reads named values and writes one named value. The value ``"vectors"`` is the look-up's result, shape
``(B, F, D)``; the program's last op writes the logit or score, shape ``(B,)``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pocketrec.errors import ArtifactError, UnsupportedOp
from pocketrec.format.matrix import CodedMatrix

Array = NDArray[np.float32]
_ZERO = np.float32(0)
_BIASED = ("sum", "dot")
"""Ops that add a single number."""


@dataclass(frozen=True)
class Op:
    """One step: ``output = kind(inputs; tensors, attributes)``.

    Attributes:
        attributes: sizes that the backbone's configuration sets.
        tensors: everything that is learned, single numbers too: those have no axes, ``()``.
        codes: tensors that a file holds in a few bits, as rows of entries of the last axis; ``tensors`` has what they
            mean. Those of an op with codes may be float16.
    """

    kind: str
    inputs: tuple[str, ...]
    output: str
    attributes: Mapping[str, int] = field(default_factory=dict)
    tensors: Mapping[str, Array] = field(default_factory=dict)
    codes: Mapping[str, CodedMatrix] = field(default_factory=dict)


def _columns(op: Op, vectors: Array) -> Array:
    """``(B, F, D) -> (B, F, stop - start)``: a block's columns."""
    return vectors[..., int(op.attributes["start"]) : int(op.attributes["stop"])]


def _flatten(op: Op, x: Array) -> Array:
    """``(B, F, d) -> (B, F * d)``."""
    return x.reshape(len(x), -1)


def _linear(op: Op, x: Array) -> Array:
    """``(B, i) -> (B, o)``: ``x W^T + b`` with ``weight (o, i)``, ``bias (o,)``."""
    return x @ op.tensors["weight"].T + op.tensors["bias"]


def _relu(op: Op, x: Array) -> Array:
    """``max(x, 0)``."""
    return np.maximum(x, 0)


def _fm(op: Op, x: Array) -> Array:
    """``(B, F, d) -> (B,)``: pairwise products ``0.5 * sum_j [(sum_f x_fj)^2 - sum_f x_fj^2]``."""
    return 0.5 * (x.sum(axis=1) ** 2 - (x**2).sum(axis=1)).sum(axis=-1)


def _sum(op: Op, x: Array) -> Array:
    """``(B, ...) -> (B,)``: sum over all other axes, plus ``bias ()`` or zero."""
    return x.reshape(len(x), -1).sum(axis=1) + op.tensors.get("bias", _ZERO)


def _add(op: Op, *xs: Array) -> Array:
    """Sum of its inputs, all ``(B,)``."""
    total = xs[0].astype(np.float32)
    for x in xs[1:]:
        total += x.astype(np.float32, copy=False)
    return total


def _dot(op: Op, x: Array) -> Array:
    """``(B, 2, d) -> (B,)``: ``sum_j h_j x_0j x_1j + b`` with ``weight h (d,)`` or ones, ``bias b ()`` or zero."""
    product = x[:, 0] * x[:, 1]
    weighted = product * op.tensors["weight"] if "weight" in op.tensors else product
    return weighted.sum(axis=-1) + op.tensors.get("bias", _ZERO)


def _nonzero_mean(op: Op, x: Array) -> Array:
    """``(B, i) -> (B, i)``: each row divided by its number of non-zero entries (by one where it has none)."""
    counts = np.maximum(np.count_nonzero(x, axis=1), 1).astype(np.float32)
    return x / counts[:, None]


def _cross(op: Op, x0: Array, x: Array) -> Array:
    """``(B, f), (B, f) -> (B, f)``: ``x_0 * (W x + b) + x`` with ``weight (f, f)``, ``bias (f,)``."""
    crossed: Array = x @ op.tensors["weight"].T + op.tensors["bias"]
    return x0 * crossed + x


def _mixture(op: Op, x0: Array, x: Array) -> Array:
    """``(B, f), (B, f) -> (B, f)``: ``x + x_0 * sum_k (w_k . x) (U_k tanh(C_k tanh(V_k^T x)) + b)``.

    Tensors: ``down (K r, f)`` holds the ``V_k^T``, ``core (K, r, r)`` the ``C_k``, ``up (f, K r)`` the ``U_k``,
    ``gate (K, f)`` the ``w_k``, ``bias (f,)``.
    """
    core = op.tensors["core"]
    inner = np.tanh(x @ op.tensors["down"].T).reshape(len(x), *core.shape[:2]).swapaxes(0, 1)
    inner = np.tanh(inner @ core.swapaxes(1, 2)).swapaxes(0, 1)
    gates = x @ op.tensors["gate"].T
    update = (inner * gates[..., None]).reshape(len(x), -1) @ op.tensors["up"].T
    return x + x0 * (update + gates.sum(axis=1, keepdims=True) * op.tensors["bias"])


OPS: Mapping[str, Callable[..., Array]] = {
    "columns": _columns,
    "flatten": _flatten,
    "linear": _linear,
    "relu": _relu,
    "fm": _fm,
    "sum": _sum,
    "add": _add,
    "dot": _dot,
    "nonzero_mean": _nonzero_mean,
    "cross": _cross,
    "mixture": _mixture,
}
"""The closed list. ``sigmoid`` is not an op: programs end in logits, and the caller chooses the link."""


@dataclass(frozen=True)
class Program:
    """An ordered tuple of ops; calling it on ``vectors (B, F, D)`` gives logits or scores ``(B,)``."""

    ops: tuple[Op, ...]

    def __call__(self, vectors: Array) -> Array:
        """Run with numpy."""
        values: dict[str, Array] = {"vectors": vectors}
        for op in self.ops:
            values[op.output] = kernel(op.kind)(op, *(values[name] for name in op.inputs))
        return values[self.ops[-1].output]

    def to_json(self) -> list[dict[str, Any]]:
        """Ops without their tensors; tensor ``t`` of op ``i`` is named ``head.<i>.<t>`` in a file.

        Where a tensor is coded, ``codes`` has its shape, and its arrays are ``head.<i>.<t>.<array>``.
        """
        return [
            {"kind": o.kind, "inputs": list(o.inputs), "output": o.output, "attributes": dict(o.attributes),
             "tensors": sorted(o.tensors),
             **({"codes": {name: list(o.tensors[name].shape) for name in sorted(o.codes)}} if o.codes else {})}
            for o in self.ops
        ]  # fmt: skip

    def tensors(self) -> dict[str, NDArray[Any]]:
        """All tensors, or their codes, by their file name."""
        found: dict[str, NDArray[Any]] = {}
        for i, op in enumerate(self.ops):
            for name, tensor in sorted(op.tensors.items()):
                coded = op.codes.get(name)
                parts = {"": tensor} if coded is None else {f".{n}": a for n, a in coded.arrays().items()}
                found |= {f"head.{i}.{name}{part}": array for part, array in parts.items()}
        return found

    @classmethod
    def from_json(cls, document: list[dict[str, Any]], tensors: Mapping[str, Array]) -> Program:
        """Read what ``to_json`` and ``tensors`` wrote.

        In files of format 1 a ``bias`` is an attribute, since no other single number was learned.

        Raises:
            UnsupportedOp: an op is unknown.
            ArtifactError: the bias of an op is there twice, or has axes where it must be a single number.
        """
        ops: list[Op] = []
        for i, o in enumerate(document):
            kernel(o["kind"])
            shapes = o.get("codes", {})
            codes = {name: _coded(f"head.{i}.{name}", shape, tensors) for name, shape in shapes.items()}
            named = {
                name: codes[name].decoded().reshape(shapes[name]) if name in codes else tensors[f"head.{i}.{name}"]
                for name in o["tensors"]
            }
            attributes = dict(o["attributes"])
            if "bias" in attributes:
                if "bias" in named:
                    raise ArtifactError(
                        f"Op {i} must have one bias, but has an attribute and a tensor; export it again."
                    )
                with np.errstate(over="ignore"):
                    named["bias"] = np.array(attributes.pop("bias"), np.float32)
            if o["kind"] in _BIASED and named.get("bias", _ZERO).shape:
                shape = named["bias"].shape
                raise ArtifactError(f"The bias of op {i} must be one number, but has shape {shape}; export it again.")
            ops.append(Op(o["kind"], tuple(o["inputs"]), o["output"], attributes, named, codes))
        return cls(tuple(ops))


def _coded(name: str, shape: list[int], tensors: Mapping[str, NDArray[Any]]) -> CodedMatrix:
    """The coded tensor of a file."""
    return CodedMatrix.from_arrays(shape[-1], {part: tensors[f"{name}.{part}"] for part in ("bits", "codes", "scale")})


def kernel(kind: str) -> Callable[..., Array]:
    """The numpy reference of an op, or :class:`UnsupportedOp` with the list of those that exist."""
    if kind not in OPS:
        raise UnsupportedOp(f"Head op must be one of {', '.join(OPS)}, but got {kind!r}; update PocketRec.")
    return OPS[kind]
