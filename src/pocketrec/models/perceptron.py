"""The multi-layer perceptron that heads share: drawn from a generator, run, and lowered with batch norm folded in."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise, zip_longest
from typing import Any, Literal, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from pocketrec import settings
from pocketrec.format.program import Op

LinearInit = Literal["uniform", "xavier"]


@dataclass(frozen=True)
class Perceptron:
    """``[Linear -> BatchNorm -> ReLU -> Dropout] x hidden -> Linear(., 1)`` over the layers that a model holds.

    Args:
        layers: hidden layers and the output layer, from :func:`linear_layers`.
        norms: a batch norm per hidden layer, or none, from :func:`batch_norms`.
        dropout: share of hidden units dropped in training, in [0, 1).

    Example:
        >>> layers = linear_layers((4, 8, 1), torch.Generator().manual_seed(0))
        >>> Perceptron(layers, batch_norms((8,)), 0.0)(torch.zeros(3, 4)).shape
        torch.Size([3])
    """

    layers: nn.ModuleList
    norms: nn.ModuleList
    dropout: float = 0.0

    def __call__(self, x: Tensor, noise: torch.Generator | None = None) -> Tensor:
        """``(B, i) -> (B,)`` float32; with ``noise`` in training mode (batch statistics, dropout)."""
        *hidden, (last, _) = self._stack()
        for layer, norm in hidden:
            x = layer(x)
            if norm is not None:
                x = _normalise(x, norm, training=noise is not None)
            x = F.relu(x)
            if noise is not None and self.dropout > 0:
                x = x * dropout_mask(x, self.dropout, noise)
        return last(x).squeeze(-1).float()

    def lower(self, source: str, output: str = "perceptron") -> Iterator[Op]:
        """Ops from the value ``source (B, i)`` to ``output (B,)``, in evaluation mode."""
        folded = self._folded()
        for i, (weight, bias) in enumerate(folded):
            yield Op("linear", (source,), f"linear{i}", tensors={"weight": weight, "bias": bias})
            if i < len(folded) - 1:
                source = f"hidden{i + 1}"
                yield Op("relu", (f"linear{i}",), source)
        yield Op("sum", (f"linear{len(folded) - 1}",), output)

    def _stack(self) -> list[tuple[nn.Linear, nn.BatchNorm1d | None]]:
        """Each linear layer with the batch norm that follows it, if one does."""
        layers, norms = cast("list[nn.Linear]", list(self.layers)), cast("list[nn.BatchNorm1d]", list(self.norms))
        return list(zip_longest(layers, norms))

    def _folded(self) -> list[tuple[NDArray[np.float32], NDArray[np.float32]]]:
        """Weight ``(o, i)`` and bias ``(o,)`` of each layer, ``s W`` and ``s (b - mean) + beta`` under batch norm."""
        folded = []
        for layer, norm in self._stack():
            weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
            if norm is not None:
                mean, variance = _statistics(norm)
                scale = norm.weight.detach() / torch.sqrt(variance.double() + norm.eps)
                weight, bias = scale[:, None] * weight, scale * (bias - mean) + norm.bias.detach()
            folded.append((array(weight), array(bias)))
        return folded


def linear_layers(widths: tuple[int, ...], source: torch.Generator, init: LinearInit = "uniform") -> nn.ModuleList:
    """Linear layers between the widths; ``xavier`` draws the weights of all but the last Xavier-uniform."""
    inner = (linear(i, o, source, init) for i, o in pairwise(widths[:-1]))
    return nn.ModuleList((*inner, linear(widths[-2], widths[-1], source)))


def batch_norms(widths: tuple[int, ...]) -> nn.ModuleList:
    """A batch norm per width."""
    return nn.ModuleList(nn.BatchNorm1d(width) for width in widths)


def linear(inputs: int, outputs: int, source: torch.Generator, init: LinearInit = "uniform") -> nn.Linear:
    """A linear layer with weight and bias uniform in ``+-1 / sqrt(inputs)``, the framework's default.

    With ``xavier`` the weight's bound is ``sqrt(6 / (inputs + outputs))``.
    """
    layer = cast("nn.Linear", nn.utils.skip_init(nn.Linear, inputs, outputs))
    bound = 1 / math.sqrt(inputs)
    wide = math.sqrt(6 / (inputs + outputs)) if init == "xavier" else bound
    with torch.no_grad():
        layer.weight.uniform_(-wide, wide, generator=source)
        layer.bias.uniform_(-bound, bound, generator=source)
    return layer


def array(tensor: Tensor) -> NDArray[np.float32]:
    """A copy of a weight, for a program."""
    return tensor.detach().float().cpu().numpy().copy()


def dropout_mask(x: Tensor, rate: float, noise: torch.Generator) -> Tensor:
    """``0`` with probability ``rate`` (to 2^-16), else ``1 / (1 - rate)``; the same on every device."""
    seed = int(torch.randint(2**62, (), generator=noise))
    bits = np.random.Generator(np.random.SFC64(seed)).integers(0, 2**16, x.shape, dtype=np.uint16)
    kept = torch.from_numpy(bits >= round(rate * 2**16))
    return kept.to(x.device, x.dtype).mul_(1 / (1 - rate))


class Deep:
    """What configurations with a perceptron share; stands before the other base.

    Args:
        hidden: widths of the perceptron's hidden layers.
        dropout: share of hidden units dropped in training, in [0, 1).
        batch_norm: batch normalisation in the hidden layers.
    """

    hidden: tuple[int, ...]

    def __post_init__(self) -> None:
        cast("Any", super()).__post_init__()
        settings.check_widths(self, "hidden")
        settings.check_share(self, "dropout")

    def small(self) -> Self:
        """Two narrow hidden layers."""
        return replace(cast("Any", self), hidden=(16, 8))


class DeepModel:
    """What models with a perceptron share; a mixin of modules."""

    config: Any
    layers: nn.ModuleList
    norms: nn.ModuleList

    def draw(self, source: torch.Generator) -> None:
        """The perceptron on all that is looked up."""
        self.draw_perceptron(cast("Any", self).inputs, source)

    def draw_perceptron(
        self, inputs: int, source: torch.Generator, init: LinearInit = "uniform", *, norm: bool | None = None
    ) -> None:
        """Give the perceptron its first weights; batch norm as the configuration says, unless told."""
        hidden = self.config.hidden
        self.layers = linear_layers((inputs, *hidden, 1), source, init)
        self.norms = batch_norms(hidden if (self.config.batch_norm if norm is None else norm) else ())

    @property
    def perceptron(self) -> Perceptron:
        """The perceptron over the layers."""
        return Perceptron(self.layers, self.norms, self.config.dropout)


class CrossModel(DeepModel):
    """What models with cross layers share; a mixin of modules."""

    crosses: nn.ModuleList

    @abstractmethod
    def cross(self, layer: Any, x0: Tensor, x: Tensor) -> Tensor:
        """One layer, ``(B, f), (B, f) -> (B, f)``."""

    def crossed(self, x0: Tensor) -> Tensor:
        """``x_0 -> x_L``, ``(B, f)`` both."""
        x = x0
        for layer in self.crosses:
            x = self.cross(layer, x0, x)
        return x


def _normalise(x: Tensor, norm: nn.BatchNorm1d, *, training: bool) -> Tensor:
    """Batch norm with the batch's statistics in training (and a step of the running ones), else the running ones."""
    mean, variance = _statistics(norm)
    return F.batch_norm(x, mean, variance, norm.weight, norm.bias, training, norm.momentum or 0.0, norm.eps)


def _statistics(norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """Running mean and variance, ``(width,)`` each."""
    return cast("Tensor", norm.running_mean), cast("Tensor", norm.running_var)
