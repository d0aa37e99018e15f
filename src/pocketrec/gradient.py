"""Gradients of a lowered head with respect to the looked-up vectors, and nothing else.

:class:`Head` runs a :class:`~pocketrec.program.Program` with torch and pulls a slope back to ``vectors``. Each op has a
hand-written vector-Jacobian product: no autograd graph, no weight gradients. Scoring needs little else, and is bound by
the matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pocketrec.errors import UnsupportedOp
from pocketrec.program import Op, Program

Precision = Literal["fp32", "bf16"]
DTYPES: Mapping[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Node:
    """One op: ``run`` keeps what ``pull`` needs; ``pull`` maps the output's gradient to one gradient per input."""

    def __init__(self, op: Op, dtype: torch.dtype) -> None:
        self.op = op
        self.dtype = dtype
        self.inputs: tuple[Tensor, ...] = ()

    def run(self, *inputs: Tensor) -> Tensor:
        """The op's value; same mathematics as its numpy reference."""
        self.inputs = inputs
        return self.value(*inputs)

    def value(self, *inputs: Tensor) -> Tensor:
        """The mathematics of ``run``, without keeping the inputs."""
        raise UnsupportedOp(f"Head op {self.op.kind!r} has no torch form; add it to pocketrec.gradient.")

    def pull(self, slope: Tensor) -> tuple[Tensor, ...]:
        """From the output's gradient, one gradient per input."""
        raise UnsupportedOp(f"Head op {self.op.kind!r} has no gradient; add it to pocketrec.gradient.")


class _Columns(Node):
    """``y = x[..., start:stop]``; the gradient is zero in every other column."""

    @property
    def columns(self) -> slice:
        return slice(int(self.op.attributes["start"]), int(self.op.attributes["stop"]))

    def value(self, *inputs: Tensor) -> Tensor:
        return inputs[0][..., self.columns]

    def pull(self, slope: Tensor) -> tuple[Tensor, ...]:
        gradient = torch.zeros_like(self.inputs[0])
        gradient[..., self.columns] = slope
        return (gradient,)


class _Flatten(Node):
    """``(B, F, d) -> (B, F d)``."""

    def value(self, *inputs: Tensor) -> Tensor:
        return inputs[0].flatten(1)

    def pull(self, slope: Tensor) -> tuple[Tensor, ...]:
        return (slope.view(self.inputs[0].shape),)


class _Linear(Node):
    """``y = x W^T + b``; ``dx = dy W``. Products in the chosen precision, a single output always in float32."""

    def __init__(self, op: Op, dtype: torch.dtype) -> None:
        weight = torch.tensor(op.tensors["weight"])
        super().__init__(op, torch.float32 if len(weight) == 1 else dtype)
        self.weight = weight.to(self.dtype)
        self.bias = torch.tensor(op.tensors["bias"]).to(self.dtype)

    def value(self, *inputs: Tensor) -> Tensor:
        return torch.addmm(self.bias, inputs[0].to(self.dtype), self.weight.T)

    def pull(self, slope: Tensor) -> tuple[Tensor, ...]:
        return (torch.mm(slope.to(self.dtype), self.weight),)


class _Relu(Node):
    """``y = max(x, 0)``; ``dx = dy [y > 0]``."""

    def value(self, *inputs: Tensor) -> Tensor:
        self.positive = inputs[0].clamp_min(0)
        return self.positive

    def pull(self, slope: Tensor) -> tuple[Tensor, ...]:
        return (torch.ops.aten.threshold_backward(slope.to(self.positive.dtype), self.positive, 0),)


class _Fm(Node):
    """``y = 0.5 sum_j [(sum_f x_fj)^2 - sum_f x_fj^2]``; ``dx_fj = dy (sum_g x_gj - x_fj)``."""

    def value(self, *inputs: Tensor) -> Tensor:
        x = inputs[0]
        self.total = x.sum(dim=1, keepdim=True)
        return 0.5 * (self.total.square().sum(dim=(1, 2)) - x.square().sum(dim=(1, 2)))

    def pull(self, slope: Tensor) -> tuple[Tensor, ...]:
        return ((self.total - self.inputs[0]).mul_(slope[:, None, None]),)


class _Sum(Node):
    """``(B, ...) -> (B,)``; the gradient is the slope everywhere."""

    def value(self, *inputs: Tensor) -> Tensor:
        return inputs[0].flatten(1).sum(dim=1, dtype=torch.float32) + float(self.op.attributes.get("bias", 0.0))

    def pull(self, slope: Tensor) -> tuple[Tensor, ...]:
        x = self.inputs[0]
        return (slope.view(-1, *(1 for _ in x.shape[1:])).expand(x.shape),)


class _Add(Node):
    """Sum of inputs; each gets the slope."""

    def value(self, *inputs: Tensor) -> Tensor:
        return torch.stack(inputs).sum(dim=0)

    def pull(self, slope: Tensor) -> tuple[Tensor, ...]:
        return (slope,) * len(self.inputs)


class _Dot(Node):
    """``y = x_0 . x_1``; the gradient swaps the two."""

    def value(self, *inputs: Tensor) -> Tensor:
        return (inputs[0][:, 0] * inputs[0][:, 1]).sum(dim=-1)

    def pull(self, slope: Tensor) -> tuple[Tensor, ...]:
        return (self.inputs[0].flip(1).mul_(slope[:, None, None]),)


_NODES: Mapping[str, Callable[[Op, torch.dtype], Node]] = {
    "columns": _Columns,
    "flatten": _Flatten,
    "linear": _Linear,
    "relu": _Relu,
    "fm": _Fm,
    "sum": _Sum,
    "add": _Add,
    "dot": _Dot,
}


@dataclass(frozen=True)
class Head:
    """A lowered program in torch: ``logits`` forward, ``pull`` back to ``vectors (B, F, D)``.

    ``precision`` is that of the matrix products; everything else is float32.

    Example:
        >>> import numpy as np
        >>> head = Head.of(Program((Op("dot", ("vectors",), "score"),)))
        >>> head.logits(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))
        tensor([11.])
        >>> head.pull(torch.ones(1))
        tensor([[[3., 4.],
                 [1., 2.]]])
    """

    nodes: tuple[Node, ...]

    @classmethod
    def of(cls, program: Program, precision: Precision = "fp32") -> Head:
        """Compile; an op without a gradient raises :class:`~pocketrec.errors.UnsupportedOp`."""
        return cls(tuple(_NODES.get(op.kind, Node)(op, DTYPES[precision]) for op in program.ops))

    def logits(self, vectors: Tensor) -> Tensor:
        """``(B, F, D) -> (B,)``; what ``pull`` needs is kept until the next call."""
        values = {"vectors": vectors}
        for node in self.nodes:
            values[node.op.output] = node.run(*(values[name] for name in node.op.inputs))
        return values[self.nodes[-1].op.output]

    def pull(self, slope: Tensor) -> Tensor:
        """Vector-Jacobian product at the last ``logits`` call: ``slope (B,) -> (B, F, D)``."""
        gradients = {self.nodes[-1].op.output: slope}
        for node in reversed(self.nodes):
            if node.op.output not in gradients:
                continue
            for name, gradient in zip(node.op.inputs, node.pull(gradients.pop(node.op.output)), strict=True):
                gradients[name] = gradients[name] + gradient if name in gradients else gradient
        return gradients["vectors"].float()
