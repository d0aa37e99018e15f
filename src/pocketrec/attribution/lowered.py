"""Gradients of a lowered head with respect to the looked-up vectors, and nothing else.

:class:`LoweredHead` runs a :class:`~pocketrec.format.program.Program` with torch and pulls a slope back to
``vectors``. Each op has a hand-written vector-Jacobian product: no autograd graph, no weight gradients. Scoring needs
little else, and is bound by the matrix products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pocketrec.errors import UnsupportedOp
from pocketrec.format.program import Op, Program

Precision = Literal["fp32", "bf16"]
DTYPES: Mapping[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Node:
    """One op: ``run`` keeps what ``pull`` needs; ``pull`` maps the output's gradient to one gradient per input."""

    def __init__(self, op: Op, dtype: torch.dtype) -> None:
        self.op, self.dtype = op, dtype
        self.inputs: tuple[Tensor, ...] = ()

    def run(self, *inputs: Tensor) -> Tensor:
        """The op's value; same mathematics as its numpy reference."""
        self.inputs = inputs
        return self.value(*inputs)

    def value(self, *inputs: Tensor) -> Tensor:
        """The mathematics of ``run``, without keeping the inputs."""
        raise UnsupportedOp(f"Head op {self.op.kind!r} has no torch form; add it to pocketrec.attribution.lowered.")

    def pull(self, slope: Tensor) -> tuple[Tensor, ...]:
        """From the output's gradient, one gradient per input."""
        raise UnsupportedOp(f"Head op {self.op.kind!r} has no gradient; add it to pocketrec.attribution.lowered.")

    def pull_sum(self, slope: Tensor, parts: int) -> Tensor:
        """``pull`` to the only input, summed over ``parts`` equal parts of the batch."""
        gradient = self.pull(slope)[0]
        return gradient.unflatten(0, (parts, -1)).sum(dim=0) if parts > 1 else gradient

    def products(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        """Of each matrix, by name, what the last ``run`` gave it and the gradient of what it made.

        ``(B, i)`` and ``(B, o)``, or ``(K, B, i)`` and ``(K, B, o)`` for ``K`` matrices of one tensor.
        """
        return {}


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
        self.slope = slope
        return (torch.mm(slope.to(self.dtype), self.weight),)

    def products(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        return {"weight": (self.inputs[-1], self.slope)}


class FirstLinear(_Linear):
    """A linear layer of some flattened columns, as one of all columns: no copy of the columns, forward or backward.

    The weight of every other column is zero; the gradient is that of the whole vectors.
    """

    def __init__(self, op: Op, dtype: torch.dtype, columns: range) -> None:
        super().__init__(op, dtype)
        self.columns = columns

    def value(self, *inputs: Tensor) -> Tensor:
        """``(B, F, D) -> (B, o)``; the weight is laid out for ``D`` columns at the first call."""
        width = inputs[0].shape[-1]
        if self.weight.shape[1] != inputs[0][0].numel():
            padded = torch.zeros(len(self.weight), inputs[0].shape[1], width, dtype=self.weight.dtype)
            padded[..., self.columns.start : self.columns.stop] = self.weight.view(*padded.shape[:2], -1)
            self.weight = padded.flatten(1)
        return super().value(inputs[0].flatten(1))

    def pull(self, slope: Tensor) -> tuple[Tensor, ...]:
        """``(B, o) -> (B, F, D)``."""
        return (super().pull(slope)[0].unflatten(1, self.inputs[0].shape[1:]),)

    def pull_sum(self, slope: Tensor, parts: int) -> Tensor:
        """One product for all parts: they share the weight."""
        return self.pull(slope.unflatten(0, (parts, -1)).sum(dim=0) if parts > 1 else slope)[0]

    def products(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        """The columns that it reads."""
        return {"weight": (self.inputs[0][..., _slice(self.columns)].flatten(1), self.slope)}


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

    def pull_sum(self, slope: Tensor, parts: int) -> Tensor:
        """``sum_p dy_p sum_g x_pgj - sum_p dy_p x_pfj``."""
        slope = slope[:, None, None]
        gradient = (self.total * slope).unflatten(0, (parts, -1)).sum(dim=0).expand(-1, self.inputs[0].shape[1], -1)
        for part, share in zip(self.inputs[0].chunk(parts), slope.chunk(parts), strict=True):
            gradient = torch.addcmul(gradient, part, share, value=-1)
        return gradient


class _Sum(Node):
    """``(B, ...) -> (B,)``; the gradient is the slope everywhere."""

    def value(self, *inputs: Tensor) -> Tensor:
        return inputs[0].flatten(1).sum(dim=1, dtype=torch.float32) + float(self.op.tensors.get("bias", 0.0))

    def pull(self, slope: Tensor) -> tuple[Tensor, ...]:
        x = self.inputs[0]
        return (slope.view(-1, *(1 for _ in x.shape[1:])).expand(x.shape),)


class _Add(Node):
    """Sum of inputs; each gets the slope."""

    def value(self, *inputs: Tensor) -> Tensor:
        return torch.stack(inputs).sum(dim=0)

    def pull(self, slope: Tensor) -> tuple[Tensor, ...]:
        return (slope,) * len(self.inputs)


class Dot(Node):
    """``y = sum_j h_j x_0j x_1j + b``; the gradient swaps the two, times ``h (d,)``."""

    def __init__(self, op: Op, dtype: torch.dtype) -> None:
        super().__init__(op, dtype)
        self.weight = torch.tensor(op.tensors["weight"]) if "weight" in op.tensors else None

    def value(self, *inputs: Tensor) -> Tensor:
        """``(B, 2, d) -> (B,)``."""
        product = inputs[0][:, 0] * inputs[0][:, 1]
        product = product if self.weight is None else product * self.weight
        return product.sum(dim=-1) + float(self.op.tensors.get("bias", 0.0))

    def pull(self, slope: Tensor) -> tuple[Tensor, ...]:
        """``(B,) -> (B, 2, d)``."""
        gradient = self.inputs[0].flip(1).mul_(slope[:, None, None])
        return (gradient if self.weight is None else gradient.mul_(self.weight),)


class _NonzeroMean(Node):
    """``y = x / n`` with ``n`` the number of non-zero entries of the row, which no gradient sees."""

    def value(self, *inputs: Tensor) -> Tensor:
        self.count = inputs[0].count_nonzero(dim=1).clamp_min(1)[:, None]
        return inputs[0] / self.count

    def pull(self, slope: Tensor) -> tuple[Tensor, ...]:
        return (slope / self.count,)


class _Cross(_Linear):
    """``y = x_0 * (W x + b) + x``; ``dx_0 = dy * (W x + b)``, ``dx = dy + (dy * x_0) W``."""

    def value(self, *inputs: Tensor) -> Tensor:
        self.gain = super().value(inputs[1]).float()
        return torch.addcmul(inputs[1], inputs[0], self.gain)

    def pull(self, slope: Tensor) -> tuple[Tensor, ...]:
        return slope * self.gain, slope + super().pull(slope * self.inputs[0])[0].float()


class _Mixture(Node):
    """``y = x + x_0 * (U (g * c) + s b)``, ``c = tanh(C v)``, ``v = tanh(V^T x)``, ``g = w x``, ``s = sum g``."""

    def __init__(self, op: Op, dtype: torch.dtype) -> None:
        super().__init__(op, dtype)
        names = ("down", "core", "up", "gate", "bias")
        self.down, self.core, self.up, self.gate, self.bias = (torch.tensor(op.tensors[n]).to(dtype) for n in names)

    def value(self, *inputs: Tensor) -> Tensor:
        x = inputs[1].to(self.dtype)
        experts, rank, _ = self.core.shape
        self.inner = torch.mm(x, self.down.T).tanh_().view(-1, experts, rank).transpose(0, 1)
        self.outer = torch.bmm(self.inner, self.core.transpose(1, 2)).tanh_()
        self.gates = torch.mm(x, self.gate.T)
        weighted = (self.outer.transpose(0, 1) * self.gates[..., None]).flatten(1)
        self.gain = (torch.mm(weighted, self.up.T) + self.gates.sum(dim=1, keepdim=True) * self.bias).float()
        return torch.addcmul(inputs[1], inputs[0], self.gain)

    def pull(self, slope: Tensor) -> tuple[Tensor, ...]:
        gain = (slope * self.inputs[0]).to(self.dtype)
        weighted = torch.mm(gain, self.up).view(len(slope), *self.core.shape[:2]).transpose(0, 1)
        gates = (weighted * self.outer).sum(dim=2).T + torch.mv(gain, self.bias)[:, None]
        outer = weighted * self.gates.T[..., None] * (1 - self.outer.square())
        inner = torch.bmm(outer, self.core) * (1 - self.inner.square())
        self.slopes = inner, outer, gain, gates
        pulled = torch.mm(inner.transpose(0, 1).flatten(1), self.down).addmm_(gates, self.gate)
        return slope * self.gain, slope + pulled.float()

    def products(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        inner, outer, gain, gates = self.slopes
        weighted = (self.outer.transpose(0, 1) * self.gates[..., None]).flatten(1)
        return {
            "down": (self.inputs[1], inner.transpose(0, 1).flatten(1)),
            "core": (self.inner, outer),
            "up": (weighted, gain),
            "gate": (self.inputs[1], gates),
        }


_NODES: Mapping[str, Callable[[Op, torch.dtype], Node]] = {
    "flatten": _Flatten,
    "linear": _Linear,
    "relu": _Relu,
    "fm": _Fm,
    "sum": _Sum,
    "add": _Add,
    "dot": Dot,
    "nonzero_mean": _NonzeroMean,
    "cross": _Cross,
    "mixture": _Mixture,
}


@dataclass(frozen=True)
class LoweredStep:
    """A node, and for each input that is a view of the vectors its columns."""

    node: Node
    output: str
    inputs: tuple[str | slice, ...]

    def read(self, vectors: Tensor, values: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The node's inputs."""
        return tuple(vectors[..., i] if isinstance(i, slice) else values[i] for i in self.inputs)


class LoweredHead:
    """A lowered program in torch: ``logits`` forward, ``pull`` back to ``vectors (B, F, D)``.

    ``precision`` is that of the matrix products; everything else is float32. Columns of the vectors are read and their
    gradients written in place.

    Example:
        >>> head = LoweredHead.of(Program((Op("dot", ("vectors",), "score"),)))
        >>> head.logits(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))
        tensor([11.])
        >>> head.pull(torch.ones(1))
        tensor([[[3., 4.],
                 [1., 2.]]])
    """

    def __init__(self, program: Program, precision: Precision = "fp32") -> None:
        self.program, self.output = program, program.ops[-1].output
        self.steps = tuple(_steps(program, DTYPES[precision]))
        self._shape = torch.Size()

    @classmethod
    def of(cls, program: Program, precision: Precision = "fp32") -> LoweredHead:
        """Compile; running an op without a gradient raises :class:`~pocketrec.errors.UnsupportedOp`."""
        return cls(program, precision)

    def logits(self, vectors: Tensor) -> Tensor:
        """``(B, F, D) -> (B,)``; what ``pull`` needs is kept until the next call."""
        self._shape = vectors.shape
        values: dict[str, Tensor] = {}
        for step in self.steps:
            values[step.output] = step.node.run(*step.read(vectors, values))
        return values[self.output]

    def products(self) -> Iterator[tuple[Op, str, Tensor, Tensor]]:
        """Op and name of every matrix with :meth:`Node.products`, after ``logits`` and ``pull``."""
        for step in self.steps:
            for name, (inputs, slopes) in step.node.products().items():
                yield step.node.op, name, inputs, slopes

    def pull(self, slope: Tensor, parts: int = 1) -> Tensor:
        """Vector-Jacobian product at the last ``logits`` call: ``slope (B,) -> (B, F, D)``.

        With ``parts``, that of as many equal parts of the batch summed: ``(B / parts, F, D)``.
        """
        gradients = {self.output: slope}
        found: list[tuple[slice, Tensor]] = []
        for step in reversed(self.steps):
            if step.output not in gradients:
                continue
            gradient = gradients.pop(step.output)
            if isinstance(step.inputs[0], slice):
                found.append((step.inputs[0], step.node.pull_sum(gradient, parts)))
                continue
            for source, pulled in zip(step.inputs, step.node.pull(gradient), strict=True):
                gradients[str(source)] = gradients[str(source)] + pulled if source in gradients else pulled
        return _total(found, torch.Size((len(slope) // parts, *self._shape[1:])))


def _total(found: list[tuple[slice, Tensor]], shape: torch.Size) -> Tensor:
    """The sum of gradients of columns."""
    whole = next((i for i, (_, gradient) in enumerate(found) if gradient.shape == shape), None)
    total = torch.zeros(shape) if whole is None else _owned(found.pop(whole)[1])
    for columns, gradient in found:
        total[..., columns] += gradient
    return total


def _owned(gradient: Tensor) -> Tensor:
    """A float32 tensor that may be written."""
    return gradient.clone() if gradient.dtype == torch.float32 and not gradient.is_contiguous() else gradient.float()


def _steps(program: Program, dtype: torch.dtype) -> Iterator[LoweredStep]:
    """The nodes in order, column views resolved, linear layers of flattened views fused with them."""
    views: dict[str, range] = {}
    flat: dict[str, range] = {}
    elsewhere = {name for op in program.ops if op.kind != "linear" for name in op.inputs}
    for op in program.ops:
        source = op.inputs[0]
        view = range(_ALL) if source == "vectors" else views.get(source)
        if op.kind == "columns" and view is not None:
            views[op.output] = view[int(op.attributes["start"]) : int(op.attributes["stop"])]
        elif op.kind == "flatten" and view is not None:
            flat[op.output] = view
            if op.output in elsewhere:
                yield LoweredStep(_Flatten(op, dtype), op.output, (_slice(view),))
        elif op.kind == "linear" and source in flat:
            yield LoweredStep(FirstLinear(op, dtype, flat[source]), op.output, (slice(None),))
        else:
            inputs = (slice(None) if i == "vectors" else _slice(views[i]) if i in views else i for i in op.inputs)
            yield LoweredStep(_NODES.get(op.kind, Node)(op, dtype), op.output, tuple(inputs))


_ALL = 1 << 62


def _slice(view: range) -> slice:
    return slice(view.start, view.stop)
