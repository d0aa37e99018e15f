"""Prefix lengths by evolution: a supernet that knows vectors of every length, and the search among its parts.

A *unit* is what shares one length: the rows of a field, or one row, in the columns of one counted block. A unit of
length ``l`` keeps the first ``l`` of its columns; a row may be left out altogether.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pocketrec.active import ActiveTable, Rule
from pocketrec.backbone import ClickModel, Model
from pocketrec.errors import BudgetError, ConfigError
from pocketrec.masked import Head, retrain
from pocketrec.method import Ladder
from pocketrec.metrics import auc
from pocketrec.packed import Index, Packed, Storage
from pocketrec.pruning import PruningLadder, carry_uncounted, rank_keys
from pocketrec.randomness import generator
from pocketrec.run import Checkpoint, Run
from pocketrec.schema import Schema
from pocketrec.table import Block, DenseTable, PrunedTable, Table
from pocketrec.train import EVALUATION_ROWS, Training, fingerprint, validate

if TYPE_CHECKING:
    from pocketrec.dataset import Dataset, Split

Genes = NDArray[np.int64]
Odds = Mapping[int, NDArray[np.float64]]
By = Literal["field", "row"]
Rows = Literal["field", "feature"]
Sampling = Literal["alpha", "uniform"]
Search = Literal["elitist", "original"]
Beginning = Literal["drawn", "even"]
"""The first generation: lengths drawn at random, or even ones beside them."""


def mean_length(alpha: float, longest: int) -> float:
    """Mean of lengths ``i`` in 1..h drawn with ``p_i = alpha^(h-i) / sum_j alpha^(h-j)``; falls as alpha grows."""
    weights = length_odds(alpha, longest)
    return float(weights @ np.arange(1, longest + 1))


def length_odds(alpha: float, longest: int) -> NDArray[np.float64]:
    """``p_i`` of the lengths 1..h.

    Example:
        >>> length_odds(2.0, 3).round(3).tolist()
        [0.571, 0.286, 0.143]
    """
    powers = math.log(alpha) * np.arange(longest - 1, -1, -1)
    odds = np.exp(powers - powers.max())
    return odds / odds.sum()


def alpha_for(mean: float, longest: int) -> float:
    """``alpha`` with which lengths 1..h have this mean, by bisection.

    Raises:
        BudgetError: the mean is not inside (1, h).

    Example:
        >>> round(alpha_for(0.2 * 16, 16), 5)
        1.44561
    """
    if not 1 < mean < longest:
        raise BudgetError(f"Lengths of 1 to {longest} cannot have the mean {mean:g}; choose a budget in between.")
    low, high = -700.0 / longest, 700.0
    while mean_length(math.exp(high), longest) > mean:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        if mean_length(math.exp(middle), longest) > mean:
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)


@dataclass(frozen=True)
class Units:
    """Which entries share a length.

    Attributes:
        groups: column ranges ``(left, right)`` of counted blocks.
        unit: unit of every row in every group, ``(n, G)``; -1 where no counted block is.
        longest: columns of each unit, ``(U,)``.
    """

    groups: tuple[tuple[int, int], ...]
    unit: NDArray[np.int64]
    longest: Genes

    @classmethod
    def of(cls, schema: Schema, blocks: Sequence[Block], by: By) -> Units:
        """Units of a table: each field or each row, in each counted block."""
        counted = [b for b in blocks if b.counted]
        groups = tuple(sorted({(b.left, b.right) for b in counted}))
        unit = np.full((schema.rows, len(groups)), -1, np.int64)
        for block in counted:
            group = groups.index((block.left, block.right))
            rows = np.arange(block.start, block.stop)
            unit[rows, group] = rows if by == "row" else schema.field_of_row[rows]
        for group in range(1, len(groups)):
            unit[:, group] += np.where(unit[:, group] >= 0, unit[:, group - 1].max() + 1, 0)
        found, places = np.unique(unit[unit >= 0], return_inverse=True)
        longest = np.zeros(len(found), np.int64)
        unit[unit >= 0] = places
        for group, (left, right) in enumerate(groups):
            longest[unit[unit[:, group] >= 0, group]] = right - left
        return cls(groups, unit, longest)

    def sizes(self, on: NDArray[np.bool_]) -> Genes:
        """Rows of each unit that are ``on (n, G)``: what one more column costs, ``(U,)``."""
        return np.bincount(self.unit[on & (self.unit >= 0)], minlength=len(self.longest))

    def lengths(self, genes: Genes, on: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Length of every row in every group, ``(n, G)``; 0 where it is not ``on``."""
        return np.where(on & (self.unit >= 0), genes[self.unit], 0)

    def mask(self, lengths: NDArray[np.int64], width: int) -> NDArray[np.bool_]:
        """Kept entries ``(n, D)``; none outside counted blocks."""
        keep = np.zeros((len(lengths), width), dtype=bool)
        for group, (left, right) in enumerate(self.groups):
            keep[:, left:right] = np.arange(right - left) < lengths[:, group, None]
        return keep


class _Step(torch.autograd.Function):
    """``1[u > 0]``, with ``2 - 4|u|`` up to 0.4, ``0.4`` up to 1 and 0 beyond as its derivative."""

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        ctx.save_for_backward(u)
        return (u > 0).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        (u,) = ctx.saved_tensors
        size = u.abs()
        near, far = size <= 0.4, size <= 1
        return slopes[0] * torch.where(near, 2 - 4 * size, torch.where(far, 0.4, 0.0))


def step(u: Tensor) -> Tensor:
    """``1[u > 0]`` with a straight-through gradient."""
    return _Step.apply(u)  # pyright: ignore[reportReturnType]


class Supernet(ActiveTable):
    """A table that trains with random prefix lengths, and with learned thresholds on the rows' L1 norms if asked for.

    A row reads zero in a group of columns where its norm there is not above the threshold. Click models draw a length
    for every sample and field, ranking models one for every row, in each step.

    Args:
        dense: first values; copied.
        units: which entries share a length.
        rows: who shares a threshold: each ``field``, each ``feature``, or ``None`` for no thresholds.
        rule: how thresholds are updated.
        pressure: weight of ``sum exp(-t)`` in the loss.
    """

    offset: Tensor
    group: Tensor
    fields: Tensor

    def __init__(self, dense: DenseTable, units: Units, rows: Rows | None, rule: Rule, pressure: float) -> None:
        super().__init__()
        self.schema = dense.schema
        self.blocks = dense.blocks
        self.groups = units.groups
        self.rows = rows
        self.rule = rule
        self.pressure = pressure
        self.base = nn.Parameter(dense.matrix.detach().clone())
        height = {"field": self.schema.width, "feature": self.schema.rows, None: 0}[rows]
        self.threshold = nn.Parameter(torch.zeros(height, len(self.groups)))
        offset, group = torch.full((self.width,), -1), torch.zeros(self.width, dtype=torch.int64)
        for index, (left, right) in enumerate(self.groups):
            offset[left:right], group[left:right] = torch.arange(right - left), index
        self.register_buffer("offset", offset)
        self.register_buffer("group", group)
        self.register_buffer("fields", torch.from_numpy(self.schema.field_of_row.copy()).long())

    def extra_repr(self) -> str:
        """Settings of the search."""
        return f"rows={self.rows}, groups={self.groups}, rule={self.rule}, pressure={self.pressure}"

    def rules(self) -> Mapping[str, Rule]:
        """Thresholds are updated by plain gradient descent."""
        return {"threshold": self.rule}

    def penalty(self, ids: Tensor, epoch: int) -> Tensor:
        """``pressure sum exp(-t)``."""
        return self.pressure * torch.exp(-self.threshold).sum()

    def forward(self, ids: Tensor) -> Tensor:
        """Look up: ``(...) -> (..., D)``."""
        return self._gate(self.base[ids], ids)

    def weight(self) -> Tensor:
        """The whole matrix ``(n, D)``."""
        return self._gate(self.base, slice(None))

    def _gate(self, vectors: Tensor, ids: Tensor | slice) -> Tensor:
        """Zero where the row is not above its threshold."""
        if self.rows is None:
            return vectors
        gates = step(self._margins(vectors, ids))
        return torch.where(self.offset < 0, vectors, vectors * gates[..., self.group])

    def _margins(self, vectors: Tensor, ids: Tensor | slice) -> Tensor:
        """``|e|_1 - t`` in each group, ``(..., G)``."""
        norms = torch.stack([vectors[..., left:right].abs().sum(dim=-1) for left, right in self.groups], dim=-1)
        if self.rows is None:
            return norms
        return norms - self.threshold[ids if self.rows == "feature" else self.fields[ids]]

    def margins(self) -> NDArray[np.float32]:
        """``|e|_1 - t`` of every row, or its norm where there are no thresholds: ``(n, G)``."""
        return self._margins(self.base.detach(), slice(None)).detach().numpy()

    def drawn(self, noise: torch.Generator) -> Table:
        """The table with random lengths."""
        return _Drawn(self, noise)

    def values(self) -> int:
        """Scalars of the counted blocks: a supernet removes nothing yet."""
        return sum(b.values for b in self.blocks if b.counted)

    def stored(self) -> Tensor:
        """As a dense table."""
        return self._dense().stored()

    def pack(
        self, storage: Storage = "fp32", rows: NDArray[np.int64] | None = None, index: Index = "compact"
    ) -> Packed:
        """As a dense table of what it reads."""
        return self._dense().pack(storage, rows, index)

    def _dense(self) -> DenseTable:
        return DenseTable(self.schema, self.blocks, self.weight().detach())


class _Drawn(Table):
    """A supernet with the random lengths of one step."""

    def __init__(self, net: Supernet, noise: torch.Generator) -> None:
        super().__init__()
        self.schema = net.schema
        self.blocks = net.blocks
        self.net = net
        self.noise = noise
        self.by_row = self._draw(self.schema.rows) if self.schema.task == "cf" else None

    def forward(self, ids: Tensor) -> Tensor:
        """Look up: ``(...) -> (..., D)``."""
        return self._cut(self.net(ids), self._draw(*ids.shape) if self.by_row is None else self.by_row[ids])

    def weight(self) -> Tensor:
        """The whole matrix ``(n, D)``."""
        return self._cut(self.net.weight(), self._draw(self.schema.rows) if self.by_row is None else self.by_row)

    def _draw(self, *shape: int) -> Tensor:
        """Uniform lengths ``(*shape, G)``."""
        drawn = [torch.randint(1, right - left + 1, shape, generator=self.noise) for left, right in self.net.groups]
        return torch.stack(drawn, dim=-1).to(self.net.base.device)

    def _cut(self, vectors: Tensor, lengths: Tensor) -> Tensor:
        return torch.where(self.net.offset < lengths[..., self.net.group], vectors, 0)

    def values(self) -> int:
        """As the supernet."""
        return self.net.values()

    def stored(self) -> Tensor:
        """As the supernet."""
        return self.net.stored()

    def pack(
        self, storage: Storage = "fp32", rows: NDArray[np.int64] | None = None, index: Index = "compact"
    ) -> Packed:
        """As the supernet."""
        return self.net.pack(storage, rows, index)


@torch.no_grad()
def judge(
    model: Model, weight: Tensor, units: Units, lengths: Iterable[NDArray[np.int64]], split: Split
) -> list[float]:
    """The validation figure of every candidate, the model reading ``weight (n, D)`` cut to its lengths ``(n, G)``.

    Candidates of a click model whose fields have one length each share the look-ups: a block of rows is read once.
    Those of a ranking model share the patterns of the split; side by side, their propagations would take as long.
    """
    table = model.table
    if not isinstance(model, ClickModel) or split.labels is None or len(split) == 0:
        kept = (np.where(_uncounted(table), True, units.mask(one, table.width)) for one in lengths)
        cut = (DenseTable(table.schema, table.blocks, torch.where(torch.from_numpy(k), weight, 0)) for k in kept)
        return [validate(model.with_table(one), split) or 0.0 for one in cut]
    whole, fields = _uncounted(table), table.schema.field_of_row
    keep, masks = [], []
    for one in lengths:
        longest = np.zeros((table.schema.width, one.shape[1]), np.int64)
        np.maximum.at(longest, fields, one)
        masks.append(torch.from_numpy(whole | units.mask(longest, table.width)).float())
        keep.append(np.zeros(len(split), np.float32))
    for start in range(0, len(split), EVALUATION_ROWS):
        ids = torch.from_numpy(split.ids[start : start + EVALUATION_ROWS].copy())
        vectors = weight[ids]
        for mask, logits in zip(masks, keep, strict=True):
            logits[start : start + len(ids)] = model.head(vectors * mask).numpy()
    return [auc(split.labels, logits) or 0.0 for logits in keep]


def _uncounted(table: Table) -> NDArray[np.bool_]:
    """Columns of no counted block, ``(D,)``."""
    columns = np.ones(table.width, dtype=bool)
    for block in table.blocks:
        if block.counted:
            columns[block.left : block.right] = False
    return columns


@dataclass(frozen=True)
class Evolution:
    """Settings of the search among lengths.

    In every generation the best ``parents`` of all so far have ``children`` by crossover (each gene from either of two)
    and as many by mutation (each gene drawn again with probability ``mutation``). A candidate that is too large loses
    columns of random units, one that is too small gains some.

    The ``original`` search has no memory but of the best candidate: parents come from the last generation alone, and
    crossover takes the genes up to a random place from one parent, those behind it from the other.
    """

    population: int = 20
    generations: int = 30
    parents: int = 15
    children: int = 10
    mutation: float = 0.1
    patience: int = 8
    sampling: Sampling = "alpha"
    kind: Search = "elitist"

    def __post_init__(self) -> None:
        if self.kind not in get_args(Search):
            raise ConfigError(f"`search` must be one of {', '.join(get_args(Search))}, but got {self.kind!r}.")
        for name in ("population", "generations", "parents", "children", "patience"):
            if getattr(self, name) < 1:
                raise ConfigError(f"`{name}` must be at least 1, but got {name}={getattr(self, name)}.")
        if not 0 <= self.mutation <= 1:
            raise ConfigError(f"`mutation` must lie in [0, 1], but got mutation={self.mutation}.")

    def to_json(self) -> dict[str, Any]:
        """What the result of a search depends on; the elitist kind goes without saying."""
        return {name: value for name, value in asdict(self).items() if (name, value) != ("kind", "elitist")}

    def search(
        self,
        longest: Genes,
        sizes: Genes,
        most: int,
        judged: Callable[[list[Genes]], list[float]],
        seed: int,
        checkpoint: Checkpoint,
        given: Sequence[Genes] = (),
    ) -> dict[str, NDArray[Any]]:
        """The best lengths ``genes (U,)`` with ``genes @ sizes <= most``, and the best ``figures`` by generation.

        Args:
            longest: most columns of each unit.
            sizes: what a column of each unit costs.
            most: the budget, at least ``sizes.sum()``.
            judged: figures of candidates.
            seed: of the run.
            checkpoint: keeps every generation.
            given: candidates of the first generation beside those drawn.
        """
        odds = {int(h): self._odds(int(h), most / max(1, int(sizes.sum()))) for h in np.unique(longest)}
        state = checkpoint.load() or {}
        best, scores = state.get("genes", np.zeros((0, len(longest)), np.int64)), state.get("scores", np.zeros(0))
        figures = state.get("figures", np.zeros(0)).tolist()
        champion = state.get("champion", best[:1])
        while len(figures) < self.generations and not self._stale(figures):
            random = generator(seed, "evolution", len(figures))
            first = not len(best)
            drawn = self._first(longest, odds, random) if first else self._children(best, longest, odds, random)
            drawn = [*(given if first else ()), *drawn]
            young = [fitted(genes, longest, sizes, most, random) for genes in drawn]
            memory = len(best) if self.kind == "elitist" else 0
            pool = np.concatenate([best[:memory], young])
            scores = np.concatenate([scores[:memory], judged(young)])
            order = np.argsort(-scores, kind="stable")[: self.parents]
            best, scores = pool[order], scores[order]
            if not figures or scores[0] > figures[-1]:
                champion = best[:1]
            figures.append(max([float(scores[0]), *figures[-1:]]))
            if checkpoint.due():
                checkpoint.save({"genes": best, "scores": scores, "figures": np.array(figures), "champion": champion})
        return {"genes": champion[0], "figures": np.array(figures)}

    def _stale(self, figures: list[float]) -> bool:
        return len(figures) > self.patience and figures[-1] <= figures[-1 - self.patience]

    def _odds(self, longest: int, mean: float) -> NDArray[np.float64]:
        """How often each length is drawn: such that the mean is the budget's, or all alike."""
        if self.sampling == "uniform" or longest == 1:
            return np.full(longest, 1 / longest)
        return length_odds(alpha_for(min(max(mean, 1 + 1e-3), longest - 1e-3), longest), longest)

    def _draw(self, longest: Genes, odds: Odds, random: np.random.Generator) -> Genes:
        genes = np.empty(len(longest), np.int64)
        for h, p in odds.items():
            units = np.flatnonzero(longest == h)
            genes[units] = random.choice(np.arange(1, h + 1), len(units), p=p)
        return genes

    def _first(self, longest: Genes, odds: Odds, random: np.random.Generator) -> list[Genes]:
        return [self._draw(longest, odds, random) for _ in range(self.population)]

    def _children(self, best: Genes, longest: Genes, odds: Odds, random: np.random.Generator) -> list[Genes]:
        children = []
        for _ in range(self.children):
            one, other = best[random.integers(len(best), size=2)]
            if self.kind == "elitist":
                first = random.random(len(one)) < 0.5
            else:
                first = np.arange(len(one)) < random.integers(len(one) + 1)
            children.append(np.where(first, one, other))
        for _ in range(self.children):
            one = best[random.integers(len(best))]
            children.append(np.where(random.random(len(one)) < self.mutation, self._draw(longest, odds, random), one))
        return children


def fitted(genes: Genes, longest: Genes, sizes: Genes, most: int, random: np.random.Generator) -> Genes:
    """The same lengths made to fit: random units lose a column until they cost at most ``most``, then gain what fits.

    Raises:
        BudgetError: even lengths of 1 cost more.
    """
    if (least := int(sizes.sum())) > most:
        raise BudgetError(
            f"A budget of {most:,} values is below the {least:,} of one column each; raise the budget.",
            least_values=least,
        )
    genes = genes.copy()
    while (excess := int(genes @ sizes) - most) > 0:
        order = random.permutation(np.flatnonzero((genes > 1) & (sizes > 0)))
        before = np.cumsum(sizes[order]) - sizes[order]
        genes[order[before < excess]] -= 1
    while True:
        room = most - int(genes @ sizes)
        order = random.permutation(np.flatnonzero((genes < longest) & (sizes > 0) & (sizes <= room)))
        if not len(order):
            return genes
        genes[order[np.cumsum(sizes[order]) <= room]] += 1


def even_lengths(units: Units, blocks: Sequence[Block], on: NDArray[np.bool_], most: int) -> list[Genes]:
    """Lengths as even as the budget allows: over all units, and over those of each counted block alone.

    In the latter the other blocks keep one column of each unit, or nothing remains for this one.

    Args:
        units: Which entries share a length.
        blocks: Of the table.
        on: Rows that are kept, ``(n, G)``.
        most: The budget, at least one column of each unit.
    """
    sizes = units.sizes(on)
    every = np.ones(len(units.longest), dtype=bool)
    chosen = [every]
    for block in (b for b in blocks if b.counted):
        inside = np.zeros_like(every)
        group = units.groups.index((block.left, block.right))
        inside[units.unit[block.start : block.stop, group]] = True
        if not inside.all():
            chosen.append(inside)
    return [_level(np.where(inside, units.longest, 1), sizes, most) for inside in chosen]


def _level(longest: Genes, sizes: Genes, most: int) -> Genes:
    """The greatest common length within ``most``, or the longest where that is shorter."""
    low, high = 1, int(longest.max())
    while low < high:
        middle = (low + high + 1) // 2
        if int(np.minimum(middle, longest) @ sizes) <= most:
            low = middle
        else:
            high = middle - 1
    return np.minimum(low, longest)


def check_epochs(epochs: int | None) -> None:
    """Raise :class:`~pocketrec.errors.ConfigError` for a number of epochs that is none."""
    if epochs is not None and epochs < 1:
        raise ConfigError(f"`search_epochs` must be at least 1, but got search_epochs={epochs}.")


@dataclass(frozen=True)
class EvolvedLadder(Ladder):
    """For every budget the best lengths of a supernet, trained again from the start.

    Args:
        net: the model around its trained supernet.
        start: the model as the retraining starts.
        dense: its table.
        units: which entries share a length.
        drops: whether whole rows may be left out, those with the least margin first.
        evolution: settings of the search.
        head: where the head of the retraining starts.
        training: stages of the retraining.
        data: training and validation rows.
        run: keeps every search and every retrained model.
        beginning: whether even lengths are among the first candidates.
    """

    net: Model
    start: Model
    dense: DenseTable
    units: Units
    drops: bool
    evolution: Evolution
    head: Head
    training: tuple[Training, ...]
    data: Dataset
    run: Run
    beginning: Beginning = "drawn"

    def at_values(self, values: int) -> PrunedTable:
        """Exactly ``values`` entries: the best lengths, and what they leave free by rising column.

        Raises:
            BudgetError: rows must not be left out, and the budget is below one column each.
        """
        self._ranked(None).at_values(values)
        return self._ranked(self._keep(values)).at_values(values)

    def at_bytes(
        self, size_bytes: int, storage: Storage, *, index: Index = "compact", vocabulary: bool = False
    ) -> PrunedTable:
        """The lengths for about as many values as fit, and of these entries as many as fit."""
        about = self._ranked(None).at_bytes(size_bytes, storage, index=index, vocabulary=vocabulary)
        ranked = self._ranked(self._keep(about.values()))
        return ranked.at_bytes(size_bytes, storage, index=index, vocabulary=vocabulary)

    def finish(self, model: Model) -> Model:
        """Train what is kept from its first values on."""
        if not isinstance(model.table, PrunedTable):
            raise ConfigError(f"Retraining needs a pruned table, but got {type(model.table).__name__}.")
        return retrain(self.start, model.table, self.head, self.data, self.run, self.training)

    def found(self) -> EvolvedLadder:
        """The same search, but retraining starts from the weights and the head of the supernet."""
        dense = DenseTable(self.dense.schema, self.dense.blocks, self._supernet().base.detach())
        return replace(self, start=self.net, dense=dense, head="initial")

    def _supernet(self) -> Supernet:
        if not isinstance(self.net.table, Supernet):
            raise ConfigError(f"The search must leave a supernet, but got {type(self.net.table).__name__}.")
        return self.net.table

    def _keep(self, values: int) -> NDArray[np.bool_]:
        """Entries that the best lengths for a budget keep, ``(n, D)``."""
        on = self._rows(values)
        key = {
            "net": fingerprint(self.net),
            "values": values,
            "evolution": self.evolution.to_json(),
            "drops": self.drops,
        } | ({} if self.beginning == "drawn" else {"beginning": self.beginning})
        sizes = self.units.sizes(on)
        if int(sizes.sum()) == 0:
            return np.zeros(self.dense.matrix.shape, dtype=bool)
        weight = self._supernet().base.detach()
        given = even_lengths(self.units, self.dense.blocks, on, values) if self.beginning == "even" else ()
        found = self.run.once(
            "evolution",
            {**key, "data": self.data.digest},
            lambda checkpoint: self.evolution.search(
                self.units.longest,
                sizes,
                values,
                lambda young: judge(
                    self.net, self._gated(weight, on), self.units,
                    (self.units.lengths(genes, on) for genes in young), self.data.valid,
                ),
                self.run.seed,
                checkpoint,
                given,
            ),
        )  # fmt: skip
        return self.units.mask(self.units.lengths(found["genes"], on), self.dense.width)

    def _gated(self, weight: Tensor, on: NDArray[np.bool_]) -> Tensor:
        """The weights without the rows that are left out."""
        full = self.units.mask(self.units.lengths(self.units.longest, on), self.dense.width) | _uncounted(self.dense)
        return torch.where(torch.from_numpy(full), weight, 0)

    def _rows(self, values: int) -> NDArray[np.bool_]:
        """Rows that are kept, ``(n, G)``: those above their threshold, fewer or more where the budget asks for it."""
        counted = self.units.unit >= 0
        if not self.drops:
            return counted
        margins = np.where(counted, self._supernet().margins(), -np.inf)
        on = margins > 0
        longest = np.where(counted, self.units.longest[self.units.unit], 0)
        order = np.argsort(-margins, axis=None, kind="stable")
        wide = np.cumsum(longest.reshape(-1)[order])
        least = int(np.searchsorted(wide, min(values, int(wide[-1])))) + 1
        chosen = np.zeros(margins.size, dtype=bool)
        chosen[order[: min(max(int(on.sum()), least), values)]] = True
        return chosen.reshape(margins.shape) & counted

    def _ranked(self, keep: NDArray[np.bool_] | None) -> PruningLadder:
        """Entries by: whether they are kept, rising column, falling margin of the row."""
        margins = np.zeros(self.dense.matrix.shape, np.float32)
        columns = np.zeros(self.dense.matrix.shape, np.int64)
        for group, (left, right) in enumerate(self.units.groups):
            margins[:, left:right] = self._supernet().margins()[:, group, None]
            columns[:, left:right] = -np.arange(right - left)
        chosen = np.zeros(columns.shape, dtype=bool) if keep is None else keep
        keys = carry_uncounted(rank_keys(margins, columns, chosen), self.dense.blocks)
        fill = np.zeros((self.data.schema.width, self.dense.width), np.float32)
        return PruningLadder(self.dense, keys, fill, self.data.counts, n_min=0 if self.drops else 1)
