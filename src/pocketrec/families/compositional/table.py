"""Tables whose vectors are computed from few learned numbers, and the ladder that makes one for any budget.

The counted blocks of a table become *regions*, each with a :class:`Composition` of its own: a module that computes the
vector of every slot in ``[0, rows)``. By default a row's slot is its place in the file, where the values of a hashed
field lie in the order of their fingerprints; so a file finds its slots for nothing. Uncounted blocks stay dense.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING, ClassVar, Protocol, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pocketrec.errors import ConfigError
from pocketrec.families.compositional.region import Region
from pocketrec.format.block import FileBlock, PackedRange, Storage, file_range
from pocketrec.format.entries import Index
from pocketrec.format.packed import Packed
from pocketrec.models.table import Block, Table
from pocketrec.schema import Schema
from pocketrec.training.hooks import LearningTable, Rule

if TYPE_CHECKING:
    pass


class Composition(nn.Module, ABC):
    """Computes the vectors of ``rows`` slots from its parameters.

    Attributes:
        lasting: see :class:`~pocketrec.training.hooks.LearningTable`.
        clip: see there.
        penalised: whether there is a ``penalty``.
        forms: Ways to hold it for inference; the first is the composition as it is.
    """

    rows: int
    width: int
    forms: tuple[str, ...] = ("composed",)
    lasting: bool = False
    clip: float = 0.0
    penalised: bool = False

    @abstractmethod
    def forward(self, slots: Tensor) -> Tensor:
        """Slots ``(m,)`` int64 -> float32 ``(m, width)``."""

    def weight(self) -> Tensor:
        """Every vector, ``(rows, width)``."""
        return self(torch.arange(self.rows, device=next(self.parameters()).device))

    def drawn(self) -> Self:
        """The composition of a training step, on the same weights."""
        return self

    def whole(self) -> Composition:
        """What imitates a trained table before a search prunes it: all that the composition may ever read."""
        return self

    def form(self, name: str) -> Self:
        """The same vectors in another of the ``forms``."""
        return self

    def rules(self) -> Mapping[str, Rule]:
        """Parameters that are updated by rules of their own."""
        return {}

    def penalty(self, slots: Tensor, epoch: int) -> Tensor | float:
        """Its own term of the loss for the slots of a batch, ``(m,)``."""
        return 0.0

    def before_step(self, gradients: Mapping[str, Tensor]) -> None:
        """See :meth:`~pocketrec.training.hooks.LearningTable.before_step`."""

    def forget(self) -> Mapping[str, Tensor]:
        """See :meth:`~pocketrec.training.hooks.LearningTable.forget`."""
        return {}

    def after_step(self) -> None:
        """Look at the weights after each step; may change its own."""

    def facts(self) -> Mapping[str, float]:
        """Figures that say how it is made, by name."""
        return {}

    @abstractmethod
    def values(self) -> int:
        """Learned scalars."""

    @abstractmethod
    def pack(self, place: PackedRange, storage: Storage, slots: NDArray[np.uint32] | None) -> FileBlock:
        """The block of a file at ``place``, in file rows; ``slots (rows of the file,)`` unless they just count up."""


class CompositionPlan(Protocol):
    """The settings of a composition that fits a budget."""

    @property
    def values(self) -> int:
        """Learned scalars."""
        ...

    def size_bytes(self, storage: Storage) -> int:
        """Bytes of its arrays in a file, ``slots`` left out."""
        ...

    def build(self, source: torch.Generator) -> Composition:
        """A freshly initialised composition."""
        ...


class ComposedTable(LearningTable, Table):
    """A table of compositions, one per region, beside dense uncounted blocks.

    Args:
        schema: Fields and their rows.
        blocks: How the matrix is tiled.
        parts: Each region's composition and its slots ``(rows of the region,)``.
        weight: Where uncounted blocks start from, ``(n, D)``.
    """

    computed: ClassVar[bool] = True

    def __init__(
        self,
        schema: Schema,
        blocks: tuple[Block, ...],
        parts: Sequence[tuple[Region, Composition, NDArray[np.int64]]],
        weight: Tensor,
    ) -> None:
        super().__init__()
        self.schema, self.blocks = schema, blocks
        self.regions = tuple(region for region, _, _ in parts)
        self.parts = nn.ModuleList(part for _, part, _ in parts)
        self.forms = parts[0][1].forms
        self.plain_blocks = tuple(b for b in blocks if not b.counted)
        self.plain = nn.ParameterList(
            nn.Parameter(weight[b.start : b.stop, b.left : b.right].detach().clone()) for b in self.plain_blocks
        )
        self.lasting = any(part.lasting for _, part, _ in parts)
        self.clip = max((part.clip for _, part, _ in parts), default=0.0)
        for i, (_, _, slots) in enumerate(parts):
            self.register_buffer(f"slots{i}", torch.from_numpy(slots), persistent=False)

    def extra_repr(self) -> str:
        """The settings of each composition."""
        return "; ".join(f"{r} {p.extra_repr()}" for r, p in zip(self.regions, self.compositions, strict=True))

    def forward(self, ids: Tensor) -> Tensor:
        """Look up: ``(...) -> (..., D)``."""
        flat = ids.reshape(-1).long()
        columns = [self._columns(flat, areas) for areas in self._columns_of_areas()]
        return torch.cat(columns, dim=1).view(*ids.shape, self.width)

    def weight(self) -> Tensor:
        """The whole matrix ``(n, D)``."""
        columns = [torch.cat([self._whole(area, i) for area, i in areas]) for areas in self._columns_of_areas()]
        return columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)

    def drawn(self, noise: torch.Generator) -> ComposedTable:
        """The table of a training step: its compositions as they train, on the same weights."""
        return self._holding(part.drawn() for part in self.compositions)

    def whole(self) -> ComposedTable:
        """The table with nothing pruned."""
        return self._holding(part.whole() for part in self.compositions)

    def form(self, name: str) -> ComposedTable:
        """The same compositions in another of their ``forms``."""
        if name not in self.forms:
            raise ConfigError(f"`name` must be one of {', '.join(self.forms)}, but got {name!r}.")
        return self._holding(part.form(name) for part in self.compositions)

    def _holding(self, parts: Iterable[Composition]) -> ComposedTable:
        """This table with other compositions on the same weights."""
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        other._modules = {**self._modules, "parts": nn.ModuleList(parts)}
        return other

    def rules(self) -> Mapping[str, Rule]:
        """Those of all compositions."""
        return {f"parts.{i}.{name}": r for i, p in enumerate(self.compositions) for name, r in p.rules().items()}

    def penalty(self, ids: Tensor, epoch: int) -> Tensor | float:
        """The terms of all compositions, over every occurrence of an id; each user of ranking data counts once."""
        total: Tensor | float = 0.0
        if any(part.penalised for part in self.compositions):
            once = 1 if self.schema.task == "cf" else 0
            flat = torch.cat([ids[:, :once].unique(), ids[:, once:].flatten()]).long()
            for i, (region, part) in enumerate(zip(self.regions, self.compositions, strict=True)):
                inside = flat[(flat >= region.start) & (flat < region.stop)] - region.start
                total = total + part.penalty(self._slots(i)[inside], epoch)
        return total

    def before_step(self, gradients: Mapping[str, Tensor]) -> None:
        """Each composition looks at its gradients."""
        for i, part in enumerate(self.compositions):
            mark = f"parts.{i}."
            part.before_step({n.removeprefix(mark): g for n, g in gradients.items() if n.startswith(mark)})

    def forget(self) -> Mapping[str, Tensor]:
        """Those of all compositions."""
        return {f"parts.{i}.{name}": r for i, p in enumerate(self.compositions) for name, r in p.forget().items()}

    def after_step(self) -> None:
        """Each composition looks at its weights."""
        for part in self.compositions:
            part.after_step()

    def with_parts(self, parts: Sequence[Composition], weight: Tensor) -> ComposedTable:
        """The same regions and slots with other compositions; uncounted blocks start from ``weight (n, D)``."""
        slots = [self._slots(i).cpu().numpy() for i in range(len(self.regions))]
        return ComposedTable(self.schema, self.blocks, list(zip(self.regions, parts, slots, strict=True)), weight)

    def values(self) -> int:
        """Learned scalars of all compositions."""
        return sum(part.values() for part in self.compositions)

    def facts(self) -> Mapping[str, float]:
        """Means of the compositions' facts, weighted by rows; of several regions, each one's own follows."""
        own = [(region, part.facts()) for region, part in zip(self.regions, self.compositions, strict=True)]
        found: dict[str, float] = {}
        for name in dict.fromkeys(name for _, facts in own for name in facts):
            known = [(region, facts[name]) for region, facts in own if name in facts]
            found[name] = sum(r.rows * value for r, value in known) / sum(r.rows for r, _ in known)
            if len(own) > 1:
                found |= {f"{name} {region.name}": value for region, value in known}
        return found

    @torch.no_grad()
    def pack(
        self, storage: Storage = "fp32", rows: NDArray[np.int64] | None = None, index: Index = "compact"
    ) -> Packed:
        """A block of a layout of its own for each region; ``index`` makes no difference: nothing is searched."""
        fill = np.zeros((self.schema.width, self.width), np.float32)
        absent = fill.copy()
        known = [(i, f.oov_row) for i, f in enumerate(self.schema.fields) if f.oov_row is not None]
        if known:
            absent[[i for i, _ in known]] = self(torch.tensor([row for _, row in known])).numpy()
        blocks = [self._pack_region(i, storage, rows) for i in range(len(self.regions))]
        blocks += [self._pack_plain(i, storage, rows) for i in range(len(self.plain))]
        order = {(b.left, b.start): i for i, b in enumerate(self.blocks)}
        blocks.sort(key=lambda b: order.get((b.left, b.start), 0))
        return Packed(self.schema.rows if rows is None else len(rows), tuple(blocks), fill, absent)

    def _pack_region(self, index: int, storage: Storage, rows: NDArray[np.int64] | None) -> FileBlock:
        region, part = self.regions[index], self.compositions[index]
        start, stop = file_range(region, rows)
        local = np.arange(region.rows) if rows is None else rows[start:stop] - region.start
        slots = self._slots(index).cpu().numpy()[local]
        counted_up = np.array_equal(slots, np.arange(len(slots)))
        place = PackedRange(region.name, start, stop, region.left, region.right)
        return part.pack(place, storage, None if counted_up else slots.astype(np.uint32))

    def _pack_plain(self, index: int, storage: Storage, rows: NDArray[np.int64] | None) -> FileBlock:
        block, matrix = self.plain_blocks[index], self.plain[index].detach().numpy()
        weight = np.zeros((self.schema.rows, block.width), np.float32)
        weight[block.start : block.stop] = matrix
        none = np.zeros((self.schema.width, block.width), np.float32)
        range_ = PackedRange(block.name, block.start, block.stop, 0, block.width)
        fields = self.schema.field_of_row
        (packed,) = Packed.encode(weight, None, none, none, (range_,), fields, rows, storage).blocks
        return replace(packed, left=block.left, right=block.right)  # pyright: ignore[reportArgumentType]

    @property
    def compositions(self) -> list[Composition]:
        """One per region."""
        return cast("list[Composition]", list(self.parts))

    def _slots(self, index: int) -> Tensor:
        return getattr(self, f"slots{index}")

    def _columns_of_areas(self) -> list[list[tuple[Region | Block, int]]]:
        """Every region with its number, and every uncounted block with its own: by columns, in them by rows."""
        composed = [(region, i) for i, region in enumerate(self.regions)]
        plain = [(block, i) for i, block in enumerate(self.plain_blocks)]
        areas = sorted([*composed, *plain], key=lambda area: (area[0].left, area[0].start))
        return [list(group) for _, group in groupby(areas, key=lambda area: area[0].left)]

    def _read(self, area: Region | Block, index: int, local: Tensor) -> Tensor:
        """Vectors of rows ``local (m,)`` of an area, ``(m, width)``."""
        if isinstance(area, Block):
            return self.plain[index][local]
        return self.compositions[index](self._slots(index)[local]).float()

    def _whole(self, area: Region | Block, index: int) -> Tensor:
        """All rows of an area."""
        if isinstance(area, Block):
            return self.plain[index]
        weight, slots = self.compositions[index].weight().float(), self._slots(index)
        in_order = torch.equal(slots, torch.arange(len(slots), device=slots.device))
        return weight if in_order else weight[slots]

    def _columns(self, flat: Tensor, areas: list[tuple[Region | Block, int]]) -> Tensor:
        """Vectors of ids ``(m,)`` in the columns that these areas share."""
        area, index = areas[0]
        if len(areas) == 1 and area.start == 0 and area.stop == self.schema.rows:
            return self._read(area, index, flat)
        vectors = torch.zeros(len(flat), area.width, device=flat.device)
        for area, index in areas:
            inside = torch.nonzero((flat >= area.start) & (flat < area.stop)).squeeze(1)
            vectors = vectors.index_copy(0, inside, self._read(area, index, flat[inside] - area.start))
        return vectors
