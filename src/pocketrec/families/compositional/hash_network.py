"""A network that turns hash codes into vectors, at home in a table."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from pocketrec import settings
from pocketrec.families.compositional.region import NOTHING
from pocketrec.families.compositional.table import Composition
from pocketrec.format.block import PackedRange, Storage
from pocketrec.format.computed import encode_factor
from pocketrec.format.layouts.hash_mlp import HashMlpBlock, codes, network_bytes

CodeDistribution = Literal["uniform", "gaussian"]
LastLayer = Literal["linear", "bn_mish"]
Norm = Literal["before", "after", "none"]

FORMS = ("stored codes", "on-demand codes")
CODE_BYTES = 512 << 20
"""Hash codes of a table are kept in memory up to this size; beyond it they are computed at each look-up."""


def network_values(widths: tuple[int, ...], norm: Norm, last_layer: LastLayer) -> int:
    """Scalars of a network: weights, biases, and gain and shift of every batch norm."""
    linear = sum(i * o + o for i, o in pairwise(widths))
    normed = widths[1:] if last_layer == "bn_mish" else widths[1:-1]
    return linear + (2 * sum(normed) if norm != "none" else 0)


@dataclass(frozen=True)
class NetworkPlan:
    """A network for ``rows`` slots."""

    rows: int
    widths: tuple[int, ...]
    buckets: int
    code: CodeDistribution
    norm: Norm
    last_layer: LastLayer
    salt: int
    hot: NDArray[np.int64] = field(default_factory=lambda: NOTHING, repr=False, compare=False)

    @property
    def values(self) -> int:
        """Scalars of the network."""
        return network_values(self.widths, self.norm, self.last_layer)

    @property
    def end(self) -> str:
        """What follows the last layer in a file."""
        if self.last_layer == "linear":
            return "linear"
        return "mish_affine" if self.norm == "after" else "mish"

    def bounds(self) -> list[tuple[int, int, float]]:
        """Inputs, outputs and the bound of the first weights of each layer: Xavier's, ``sqrt(6 / (i + o))``.

        But vectors start as small as those of a table of as many rows, ``sqrt(6 / (n + d))``: a last linear layer of
        Xavier's bound would make them a hundred times larger, and sums of products of them ten thousand times.
        """
        layers = [(i, o, math.sqrt(6 / (i + o))) for i, o in pairwise(self.widths)]
        if self.last_layer == "linear":
            inputs, width, _ = layers[-1]
            layers[-1] = inputs, width, math.sqrt(6 / ((self.rows + width) * inputs))
        return layers

    def size_bytes(self, storage: Storage) -> int:
        """Bytes of the network in a file, batch norm folded in, and of the slots that are hot."""
        return network_bytes(self.widths, self.end, storage) + 4 * len(self.hot)

    def build(self, source: torch.Generator) -> HashNetwork:
        """The network, freshly drawn."""
        return HashNetwork(self, source)


class CodeStore:
    """The hash codes of all slots, computed once and never copied.

    Args:
        rows: Slots.
        compute: Codes of slots ``(m,)``, ``(m, k)``.
        kept: Whether codes stay in memory.
    """

    def __init__(self, rows: int, compute: Callable[[NDArray[np.int64]], NDArray[np.float32]], *, kept: bool) -> None:
        self._rows, self._compute, self._kept = rows, compute, kept
        self._codes: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> CodeStore:
        return self

    def keeping(self, *, kept: bool) -> CodeStore:
        """A store of the same codes that keeps them, or does not."""
        return CodeStore(self._rows, self._compute, kept=kept)

    def every(self, device: torch.device) -> Tensor:
        """Codes of all slots, ``(rows, k)``."""
        if self._codes is None or self._codes.device != device:
            found = torch.from_numpy(self._compute(np.arange(self._rows))).to(device)
            if not self._kept:
                return found
            self._codes = found
        return self._codes

    def of(self, slots: Tensor) -> Tensor:
        """Codes of slots ``(m,)``, ``(m, k)``."""
        if self._kept:
            return self.every(slots.device)[slots]
        return torch.from_numpy(self._compute(slots.cpu().numpy())).to(slots.device)


class HashNetwork(Composition):
    """``hash code -> [linear -> batch norm -> Mish] x depth -> linear``; running statistics but in training steps.

    Look-ups that need no gradient read the vectors of hot slots from memory, computed anew after each change of the
    network.
    """

    forms = ("composed", *FORMS)
    place: Tensor

    def __init__(self, plan: NetworkPlan, source: torch.Generator) -> None:
        super().__init__()
        self.rows = plan.rows
        self.width = plan.widths[-1]
        self.plan = plan
        self.live = False
        self.weights = nn.ParameterList(_uniform(o, i, bound, source) for i, o, bound in plan.bounds())
        self.biases = nn.ParameterList(nn.Parameter(torch.zeros(o)) for o in plan.widths[1:])
        normed = plan.widths[1:] if plan.last_layer == "bn_mish" else plan.widths[1:-1]
        self.norms = nn.ModuleList(nn.BatchNorm1d(w) for w in normed if plan.norm != "none")
        k, buckets, salt, code = plan.widths[0], plan.buckets, plan.salt, plan.code
        kept = 4 * plan.rows * k <= CODE_BYTES
        self.store = CodeStore(plan.rows, lambda slots: codes(slots, k, buckets, salt, code), kept=kept)
        place = torch.full((plan.rows if len(plan.hot) else 0,), -1, dtype=torch.int32)
        place[torch.from_numpy(plan.hot)] = torch.arange(len(plan.hot), dtype=torch.int32)
        self.register_buffer("place", place, persistent=False)
        self._hot: tuple[tuple[Any, ...], Tensor] | None = None

    def extra_repr(self) -> str:
        """All settings."""
        return settings.text(self.plan)

    def drawn(self) -> Self:
        """The same network, with the statistics of the batch."""
        return self._having(live=True)

    def form(self, name: str) -> Self:
        """The same network, with all codes in memory or none."""
        return self._having(store=self.store.keeping(kept=name == "stored codes")) if name in FORMS else self

    def _having(self, **attributes: Any) -> Self:
        """The same network with other attributes."""
        other = object.__new__(type(self))
        vars(other).update(vars(self) | attributes)
        return other

    def forward(self, slots: Tensor) -> Tensor:
        """Slots ``(m,)`` -> ``(m, width)``; each distinct slot goes through the network once."""
        distinct, place = torch.unique(slots, return_inverse=True)
        return F.embedding(place, self._vectors(distinct))

    def weight(self) -> Tensor:
        """Every vector, ``(rows, width)``."""
        return self._network(self.store.every(self.biases[0].device))

    def after_step(self) -> None:
        """The weights have changed, and a fused optimiser leaves their versions as they were."""
        self._hot = None

    def _vectors(self, distinct: Tensor) -> Tensor:
        if not len(self.place) or self.live or torch.is_grad_enabled():
            return self._network(self.store.of(distinct))
        place = self.place[distinct]
        cold, hot = torch.nonzero(place < 0).squeeze(1), torch.nonzero(place >= 0).squeeze(1)
        kept = self._kept()
        vectors = kept.new_empty(len(distinct), self.width)
        vectors[hot] = kept[place[hot]]
        if len(cold):
            vectors[cold] = self._network(self.store.of(distinct[cold]))
        return vectors

    def _kept(self) -> Tensor:
        """Vectors of the hot slots, ``(hot, width)``."""
        state = [*self.parameters(), *self.norms.buffers()]
        versions = tuple((tensor._version, tensor.device) for tensor in state)
        if self._hot is None or self._hot[0] != versions:
            slots = torch.from_numpy(self.plan.hot).to(self.place.device)
            self._hot = versions, self._network(self.store.of(slots))
        return self._hot[1]

    def _network(self, x: Tensor) -> Tensor:
        norms = [*cast("list[nn.BatchNorm1d | None]", list(self.norms)), *[None] * len(self.weights)]
        last = len(self.weights) - 1
        for i, (weight, bias, norm) in enumerate(zip(self.weights, self.biases, norms, strict=False)):
            x = F.linear(x, weight, bias)
            if i == last and self.plan.last_layer == "linear":
                return x.float()
            if norm is None:
                x = F.mish(x)
            elif self.plan.norm == "before":
                x = F.mish(self._normalise(x, norm))
            else:
                x = self._normalise(F.mish(x), norm)
        return x.float()

    def _normalise(self, x: Tensor, norm: nn.BatchNorm1d) -> Tensor:
        """Batch norm; a single row has no variance and is normalised by the running statistics."""
        live = self.live and len(x) > 1
        return F.batch_norm(
            x, norm.running_mean, norm.running_var, norm.weight, norm.bias, live, norm.momentum or 0.0, norm.eps
        )

    def values(self) -> int:
        """Scalars of the network."""
        return self.plan.values

    def pack(self, place: PackedRange, storage: Storage, slots: NDArray[np.uint32] | None) -> HashMlpBlock:
        """Layout ``hash_mlp``, batch norm folded into the layers."""
        arrays: dict[str, NDArray[Any]] = {} if slots is None else {"slots": slots}
        for i, (weight, bias) in enumerate(self._folded(arrays)):
            arrays |= encode_factor(f"weight{i}", weight.T.float().numpy(), storage)
            arrays[f"bias{i}"] = bias.float().numpy()
        plan = self.plan
        if len(plan.hot):
            arrays["hot"] = plan.hot.astype(np.uint32)
        settings: dict[str, Any] = {
            "slots": plan.rows, "functions": plan.widths[0], "hidden": list(plan.widths[1:-1]), "buckets": plan.buckets,
            "salt": plan.salt, "code": plan.code, "end": plan.end,
        } | ({"hot": len(plan.hot)} if len(plan.hot) else {})  # fmt: skip
        return HashMlpBlock(*place, "hash_mlp", storage, settings, arrays=arrays)

    def _folded(self, arrays: dict[str, NDArray[Any]]) -> list[tuple[Tensor, Tensor]]:
        """Weight ``(o, i)`` and bias of each layer under batch norm, in float64; ``arrays`` gets what is left over."""
        layers = [
            (w.detach().cpu().double(), b.detach().cpu().double())
            for w, b in zip(self.weights, self.biases, strict=True)
        ]
        for i, norm in enumerate(cast("list[nn.BatchNorm1d]", list(self.norms))):
            mean, variance = (cast("Tensor", t).cpu().double() for t in (norm.running_mean, norm.running_var))
            gain = norm.weight.detach().cpu().double() / torch.sqrt(variance + norm.eps)
            shift = norm.bias.detach().cpu().double() - gain * mean
            if self.plan.norm == "before":
                weight, bias = layers[i]
                layers[i] = gain[:, None] * weight, gain * bias + shift
            elif i + 1 < len(layers):
                weight, bias = layers[i + 1]
                layers[i + 1] = weight * gain, bias + weight @ shift
            else:
                arrays |= {"gain": gain.float().numpy(), "shift": shift.float().numpy()}
        return layers


def _uniform(outputs: int, inputs: int, bound: float, source: torch.Generator) -> nn.Parameter:
    """A weight ``(o, i)``, uniform in ``+-bound``."""
    return nn.Parameter(torch.empty(outputs, inputs).uniform_(-bound, bound, generator=source))
