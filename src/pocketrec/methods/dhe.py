"""DHE: deep hash embedding."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from pocketrec.compression.ladder import Method
from pocketrec.data.dataset import Dataset
from pocketrec.errors import ConfigError
from pocketrec.families.compositional.ladder import ComposedLadder
from pocketrec.families.compositional.region import FrequencyOrder, Region, RegionScope, SlotOrder
from pocketrec.families.compositional.table import Composition
from pocketrec.families.distillation import Imitated, Lesson
from pocketrec.format.block import PackedRange, Storage
from pocketrec.format.computed import encode_factor
from pocketrec.format.layouts.hash_mlp import CODES, HashMlpBlock, codes, network_bytes
from pocketrec.models.backbone import Model
from pocketrec.randomness import derive
from pocketrec.training.loop import Training
from pocketrec.training.run import Run

NormPlace = Literal["before", "after", "none"]
LastLayer = Literal["linear", "bn_mish"]
CodeDistribution = Literal["uniform", "gaussian"]

FORMS = ("stored codes", "on-demand codes")
NOTHING = np.empty(0, np.int64)
CODE_BYTES = 512 << 20
"""Hash codes of a table are kept in memory up to this size; beyond it they are computed at each look-up."""


@dataclass(frozen=True)
class DHE(Method):
    """No table at all: a network turns a dense hash code of the id into its vector.

    The code has ``functions`` universal hashes of the id; the network has ``depth`` hidden layers of equal width, each
    ``linear -> batch norm -> Mish``. The width is the largest that fits the budget, and the last layers are one wider
    where that fits, too. Where a layer would be narrower than an eighth of the code, the code is halved.

    Batch norm sees each distinct id of a batch once, or all rows where a model reads its whole table.

    Args:
        depth: hidden layers, at least 1.
        hidden: widths of the hidden layers of every region, at least 1 each, as published runs fix them; ``depth`` is
            theirs then, and the code is never halved. By default from the budget.
        functions: hash functions ``k``, at least 2 and even; fewer where the budget is too small to read them.
        buckets: values of a hash, at least 2.
        code: ``uniform`` in [-1, 1], or ``gaussian``.
        norm: batch norm ``before`` Mish (as published click models do) or ``after`` it (as published ranking models
            do), or ``none``.
        last_layer: ``linear``, or ``bn_mish``: normalisation and Mish on the output, too, as published runs do.
        multiple: widths are multiples of this where they are not smaller; 32 in published runs.
        salt: of the hash functions, at least 0; each block has its own in any case.
        hot: rows of each region, the most frequent in training, whose vectors are kept once they are computed, at least
            0: 4 bytes each in a file, which says which they are, and ``4 d`` in memory; nothing is learned for them.
        scope: ``block`` has a network for each counted block, ``joint`` one for all rows.
        order: what is hashed: the place in the ``file`` (free), or the ``id`` (4 bytes a row where fields are hashed).
        imitation: epochs in which the vectors of the given, trained model are learned first; 0 to start from random
            numbers and a fresh head, as published.
        imitation_rate: learning rate of these epochs, above 0; a fifth of it in the last quarter of them.
        imitated: what is learned then: the ``rows`` of the trained table, or the ``final`` vectors that a ranking model
            makes of them, 50 steps an epoch.
        training: stages of training; none for the defaults of the task.

    Example:
        >>> DHE().widths(width=16, values=3_477_792)
        (1024, 1082, 1082, 1083, 16)

    Reference:
        Kang et al., "Learning to embed categorical features without embedding tables for recommendation" (DHE), 2021.
    """

    name: ClassVar[str] = "dhe"
    trains: ClassVar[bool] = True

    depth: int = 3
    hidden: tuple[int, ...] = ()
    functions: int = 1024
    buckets: int = 1_000_000
    code: CodeDistribution = "uniform"
    norm: NormPlace = "before"
    last_layer: LastLayer = "linear"
    multiple: int = 1
    salt: int = 0
    hot: int = 0
    scope: RegionScope = "block"
    order: SlotOrder = "file"
    imitation: int = 0
    imitation_rate: float = 0.002
    imitated: Imitated = "rows"
    training: tuple[Training, ...] = ()

    def __post_init__(self) -> None:
        Lesson(self.imitation, self.imitation_rate, self.imitated)
        object.__setattr__(self, "hidden", tuple(self.hidden))
        if self.hidden and min(self.hidden) < 1:
            raise ConfigError(f"`hidden` must have widths of at least 1, but got hidden={self.hidden}.")
        for name, least in (("depth", 1), ("functions", 2), ("buckets", 2), ("multiple", 1), ("salt", 0), ("hot", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"`{name}` must be at least {least}, but got {name}={getattr(self, name)}.")
        if self.functions % 2 or self.buckets > 10**7:
            raise ConfigError(
                f"`functions` must be even and `buckets` at most 10,000,000, but got functions={self.functions} and "
                f"buckets={self.buckets}."
            )
        for name, known in (
            ("code", CODES),
            ("norm", ("before", "after", "none")),
            ("last_layer", ("linear", "bn_mish")),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(f"`{name}` must be one of {', '.join(known)}, but got {getattr(self, name)!r}.")

    def prepare(self, model: Model, data: Dataset, run: Run) -> ComposedLadder:
        """Nothing is computed before the budget is known."""
        frequent = FrequencyOrder(data, self.order)

        def plan(region: Region, values: int) -> DHEPlan | None:
            return self.plan(region, values, frequent.of(region)[: self.hot] if self.hot else NOTHING)

        return ComposedLadder.of(
            self.name, model, data, run,
            scope=self.scope, order=self.order, training=self.training, plan=plan, least=self.least,
            lesson=Lesson(self.imitation, self.imitation_rate, self.imitated),
        )  # fmt: skip

    def plan(self, region: Region, values: int, hot: NDArray[np.int64] = NOTHING) -> DHEPlan | None:
        """The network of a region that holds at most ``values`` scalars.

        Args:
            region: Rows and columns.
            values: Scalars, at most.
            hot: Slots whose vectors are kept.
        """
        widths = self.widths(region.width, values)
        if widths is None:
            return None
        salt = derive(self.salt, "hash", region.start, region.left) >> 24
        plan = DHEPlan(region.rows, widths, self.buckets, self.code, self.norm, self.last_layer, salt + 1)
        return replace(plan, hot=np.sort(hot))

    def least(self, region: Region) -> int:
        """Scalars of the smallest network of a region."""
        return self.values(self._fixed(region.width) or (2, *[1] * self.depth, region.width))

    def values(self, widths: tuple[int, ...]) -> int:
        """Scalars of a network: weights, biases, and gain and shift of every batch norm.

        Example:
            >>> DHE(last_layer="bn_mish").values((1024, 1536, 1536, 1536, 1536, 16))
            8693808
        """
        return network_values(widths, self.norm, self.last_layer)

    def widths(self, width: int, values: int) -> tuple[int, ...] | None:
        """Widths of the largest network within ``values``, from the code to the vector; ``None`` if there is none."""
        if fixed := self._fixed(width):
            return fixed if self.values(fixed) <= values else None
        functions = self.functions
        while functions > 2 and self._hidden(functions, width, values) < max(1, functions // 8):
            functions = max(2, functions // 4 * 2)
        hidden = self._hidden(functions, width, values)
        if hidden < 1:
            return None
        step = self.multiple if hidden >= self.multiple else 1
        widths = [functions, *[hidden // step * step] * self.depth, width]
        for layer in range(self.depth, 0, -1):
            wider = [*widths[:layer], widths[layer] + step, *widths[layer + 1 :]]
            widths = wider if self.values(tuple(wider)) <= values else widths
        return tuple(widths)

    def _fixed(self, width: int) -> tuple[int, ...]:
        """The widths that the settings fix, if they do."""
        return (self.functions, *self.hidden, width) if self.hidden else ()

    def _hidden(self, functions: int, width: int, values: int) -> int:
        """The largest common width of the hidden layers within ``values``; 0 if there is none."""
        low, high = 0, max(1, values)
        while low < high:
            middle = (low + high + 1) // 2
            if self.values((functions, *[middle] * self.depth, width)) <= values:
                low = middle
            else:
                high = middle - 1
        return low


def network_values(widths: tuple[int, ...], norm: NormPlace, last_layer: LastLayer) -> int:
    """See :meth:`DHE.values`."""
    linear = sum(i * o + o for i, o in pairwise(widths))
    normed = widths[1:] if last_layer == "bn_mish" else widths[1:-1]
    return linear + (2 * sum(normed) if norm != "none" else 0)


@dataclass(frozen=True)
class DHEPlan:
    """A network for ``rows`` slots."""

    rows: int
    widths: tuple[int, ...]
    buckets: int
    code: CodeDistribution
    norm: NormPlace
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

    def build(self, source: torch.Generator) -> DHEComposition:
        """The network, freshly drawn."""
        return DHEComposition(self, source)


class CodeStore:
    """The hash codes of all slots, computed once and never copied.

    Args:
        rows: Slots.
        compute: Codes of slots ``(m,)``, ``(m, k)``.
        kept: Whether codes stay in memory.
    """

    def __init__(self, rows: int, compute: Callable[[NDArray[np.int64]], NDArray[np.float32]], *, kept: bool) -> None:
        self._rows = rows
        self._compute = compute
        self._kept = kept
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


class DHEComposition(Composition):
    """``hash code -> [linear -> batch norm -> Mish] x depth -> linear``; running statistics but in training steps.

    Look-ups that need no gradient read the vectors of hot slots from memory, computed anew after each change of the
    network.
    """

    forms = ("composed", *FORMS)
    place: Tensor

    def __init__(self, plan: DHEPlan, source: torch.Generator) -> None:
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
        return str(self.plan)

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
        return HashMlpBlock(
            place.name, place.start, place.stop, place.left, place.right, "hash_mlp", storage, settings, arrays
        )

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
