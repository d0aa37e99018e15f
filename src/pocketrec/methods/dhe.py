"""DHE: deep hash embedding."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from pocketrec import settings
from pocketrec.compression.budget import largest_fitting
from pocketrec.errors import ConfigError
from pocketrec.families.compositional import hash_network
from pocketrec.families.compositional.hash_network import CodeDistribution, LastLayer, NetworkPlan, Norm
from pocketrec.families.compositional.ladder import CompositionalMethod, Start
from pocketrec.families.compositional.region import NOTHING, Region, SlotOrder, Slots
from pocketrec.families.sharing import BlockSharing
from pocketrec.randomness import derive


@dataclass(frozen=True)
class DHE(CompositionalMethod):
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

    Example:
        >>> DHE().widths(width=16, values=3_477_792)
        (1024, 1082, 1082, 1083, 16)

    Reference:
        Kang et al., "Learning to embed categorical features without embedding tables for recommendation" (DHE), 2021.
    """

    name: ClassVar[str] = "dhe"
    teaching_rate: ClassVar[float] = 0.002
    bounds: ClassVar = {"depth": 1, "functions": 2, "buckets": 2, "multiple": 1, "salt": 0, "hot": 0}

    depth: int = 3
    hidden: tuple[int, ...] = ()
    functions: int = 1024
    buckets: int = 1_000_000
    code: CodeDistribution = "uniform"
    norm: Norm = "before"
    last_layer: LastLayer = "linear"
    multiple: int = 1
    salt: int = 0
    hot: int = 0
    scope: BlockSharing = "block"
    order: SlotOrder = "file"
    start: Start = field(default=Start())

    def check(self) -> None:
        """Widths are positive, hashes even and few."""
        settings.check_widths(self, "hidden")
        if self.functions % 2 or self.buckets > 10**7:
            raise ConfigError(
                f"`functions` must be even and `buckets` at most 10,000,000, but got functions={self.functions} and "
                f"buckets={self.buckets}."
            )

    @property
    def keeps(self) -> bool:
        """Whether there are hot slots."""
        return self.hot > 0

    def plan(self, region: Region, values: int, frequent: Slots = NOTHING) -> NetworkPlan | None:
        """The network of a region that holds at most ``values`` scalars; the first of ``frequent`` are hot."""
        if (widths := self.widths(region.width, values)) is None:
            return None
        salt = derive(self.salt, "hash", region.start, region.left) >> 24
        plan = NetworkPlan(region.rows, widths, self.buckets, self.code, self.norm, self.last_layer, salt + 1)
        return replace(plan, hot=np.sort(frequent[: self.hot]))

    def least(self, region: Region) -> int:
        """Scalars of the smallest network of a region."""
        return self.values(self._fixed(region.width) or (2, *[1] * self.depth, region.width))

    def values(self, widths: tuple[int, ...]) -> int:
        """Scalars of a network: weights, biases, and gain and shift of every batch norm.

        Example:
            >>> DHE(last_layer="bn_mish").values((1024, 1536, 1536, 1536, 1536, 16))
            8693808
        """
        return hash_network.network_values(widths, self.norm, self.last_layer)

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

        def fits(hidden: int) -> bool:
            return self.values((functions, *[hidden] * self.depth, width)) <= values

        return largest_fitting(0, max(1, values), fits)
