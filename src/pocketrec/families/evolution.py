"""Evolutionary search among lengths under a budget, and training of the winner."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pocketrec import settings
from pocketrec.compression.budget import Room, values_below
from pocketrec.compression.ladder import Ladder
from pocketrec.data.dataset import Dataset
from pocketrec.errors import ConfigError
from pocketrec.families.mixed_dimension import (
    Genes,
    Judge,
    LengthOdds,
    LengthSampling,
    Supernet,
    Units,
    alpha_for,
    even_lengths,
    length_odds,
    uncounted_values,
    validation_figures,
)
from pocketrec.families.pruning import PruningLadder, carry_uncounted, rank_keys
from pocketrec.families.retraining import HeadStart, Retrain, TrainingMethod, initial_model, retrain, search_training
from pocketrec.families.retraining import Start as Start
from pocketrec.models.backbone import Model
from pocketrec.models.pruned import PrunedTable
from pocketrec.models.table import DenseTable, Lookup
from pocketrec.randomness import generator
from pocketrec.training.hooks import Rule as Rule
from pocketrec.training.loop import fingerprint
from pocketrec.training.run import Run
from pocketrec.training.steps import Checkpoint

SearchAlgorithm = Literal["elitist", "original"]

InitialPopulation = Literal["drawn", "even"]


@dataclass(frozen=True)
class Evolution:
    """Settings of the search among lengths.

    In every generation the best ``parents`` of all so far have ``children`` by crossover (each gene from either of two)
    and as many by mutation (each gene drawn again with probability ``mutation``). A candidate that is too large loses
    columns of random units, one that is too small gains some.

    Args:
        epochs: most epochs of the supernet, at least 1; by default half of those of the first training stage.
        sampling: lengths of candidates: ``alpha`` draws short ones as often as the budget asks, ``uniform`` all alike.
        crossover: ``elitist`` remembers the best of all generations; ``original`` takes parents from the last one
            alone, and crosses them at one place, as first published.
        beginning: first candidates are ``drawn``, as published, or there are ``even`` lengths among them: one for all,
            and one for each block alone, the others at one column. Millions of random lengths are all alike: no search
            of a few hundred of them finds that users deserve more columns than items.
        population: candidates of the first generation, at least 1.
        generations: most generations, at least 1.
        parents: best candidates that have children, at least 1.
        children: by crossover, and as many by mutation, at least 1.
        mutation: share of genes that a mutation draws again, in [0, 1].
        patience: generations without a better candidate before the search ends, at least 1; published runs never end.
    """

    epochs: int | None = None
    sampling: LengthSampling = "alpha"
    crossover: SearchAlgorithm = "elitist"
    beginning: InitialPopulation = "drawn"
    population: int = 20
    generations: int = 30
    parents: int = 15
    children: int = 10
    mutation: float = 0.1
    patience: int = 8

    def __post_init__(self) -> None:
        settings.check(self, epochs=1, population=1, generations=1, parents=1, children=1, patience=1)
        if not 0 <= self.mutation <= 1:
            raise ConfigError(f"`mutation` must lie in [0, 1], but got mutation={self.mutation}.")

    def search(
        self,
        longest: Genes,
        sizes: Genes,
        most: int,
        judge: Judge,
        seed: int,
        checkpoint: Checkpoint,
        given: Sequence[Genes] = (),
    ) -> dict[str, NDArray[Any]]:
        """See :class:`~pocketrec.families.mixed_dimension.Searcher`; a round is a generation."""
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
            young = [fit_lengths(genes, longest, sizes, most, random) for genes in drawn]
            memory = len(best) if self.crossover == "elitist" else 0
            pool = np.concatenate([best[:memory], young])
            scores = np.concatenate([scores[:memory], judge(young)])
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

    def _draw(self, longest: Genes, odds: LengthOdds, random: np.random.Generator) -> Genes:
        genes = np.empty(len(longest), np.int64)
        for h, p in odds.items():
            units = np.flatnonzero(longest == h)
            genes[units] = random.choice(np.arange(1, h + 1), len(units), p=p)
        return genes

    def _first(self, longest: Genes, odds: LengthOdds, random: np.random.Generator) -> list[Genes]:
        return [self._draw(longest, odds, random) for _ in range(self.population)]

    def _children(self, best: Genes, longest: Genes, odds: LengthOdds, random: np.random.Generator) -> list[Genes]:
        children = []
        for _ in range(self.children):
            one, other = best[random.integers(len(best), size=2)]
            if self.crossover == "elitist":
                first = random.random(len(one)) < 0.5
            else:
                first = np.arange(len(one)) < random.integers(len(one) + 1)
            children.append(np.where(first, one, other))
        for _ in range(self.children):
            one = best[random.integers(len(best))]
            children.append(np.where(random.random(len(one)) < self.mutation, self._draw(longest, odds, random), one))
        return children


def fit_lengths(genes: Genes, longest: Genes, sizes: Genes, most: int, random: np.random.Generator) -> Genes:
    """The same lengths made to fit: random units lose a column until they cost at most ``most``, then gain what fits.

    Raises:
        BudgetError: even lengths of 1 cost more.
    """
    if (least := int(sizes.sum())) > most:
        raise values_below(most, least, "of one column each")
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


class SupernetMethod(TrainingMethod):
    """Trains a supernet, then searches lengths for each budget.

    Attributes:
        drops: whether whole rows may be left out.
    """

    drops: ClassVar[bool]

    search: Evolution
    retrain: Retrain

    def small(self) -> Self:
        """With few candidates and generations: no law depends on how good they are."""
        few = replace(self.search, population=4, generations=3, children=2)
        return replace(cast("Any", self), search=few)

    def prepare(self, model: Model, data: Dataset, run: Run) -> EvolvedLadder:
        """Train the supernet, once for all budgets."""
        start, dense = initial_model(model, data, run, self.start)
        search = search_training(run, data, self.search.epochs)
        units = self.units(dense)
        supernet = self.supernet(dense, units, search.steps(len(data.train)))
        net = run.fit("supernet", start.with_table(supernet), data, search)
        ladder = EvolvedLadder(
            net=net, start=start, dense=dense, units=units, drops=self.drops,
            evolution=self.search, head=self.retrain.head, data=data, run=run,
        )  # fmt: skip
        return ladder if self.retrain.values == "first" else ladder.found()

    @abstractmethod
    def units(self, dense: DenseTable) -> Units:
        """Which entries share a length."""

    @abstractmethod
    def supernet(self, dense: DenseTable, units: Units, steps: int) -> Supernet:
        """The table to search in, for so many steps."""


@dataclass(frozen=True, kw_only=True)
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
        data: training and validation rows.
        run: keeps every search and every retrained model, and says how to train.
    """

    net: Model[Supernet]
    start: Model[Lookup]
    dense: DenseTable
    units: Units
    drops: bool
    evolution: Evolution
    head: HeadStart
    data: Dataset
    run: Run

    def table(self, room: Room) -> PrunedTable:
        """The best lengths for about as many values as fit; then exactly so many entries, by rising column.

        Raises:
            BudgetError: rows must not be left out, and the budget is below one column each.
        """
        about = self._ranked(None).table(room)
        return self._ranked(self._keep(about.values() if room.values is None else room.values)).table(room)

    def finish(self, model: Model, room: Room) -> Model:
        """Train what is kept from its first values on."""
        return retrain(self.start, model.table, self.head, self.data, self.run)

    def found(self) -> EvolvedLadder:
        """The same search, but retraining starts from the weights and the head of the supernet."""
        dense = DenseTable(self.dense.schema, self.dense.blocks, self.net.table.base.detach())
        return replace(self, start=self.net, dense=dense, head="initial")

    def _keep(self, values: int) -> NDArray[np.bool_]:
        """Entries that the best lengths for a budget keep, ``(n, D)``."""
        on = self._rows(values)
        key = {
            "net": fingerprint(self.net),
            "values": values,
            "evolution": settings.key(self.evolution),
            "drops": self.drops,
        }
        sizes = self.units.sizes(on)
        if int(sizes.sum()) == 0:
            return np.zeros(self.dense.matrix.shape, dtype=bool)
        weight = self.net.table.base.detach()
        given = even_lengths(self.units, self.dense.blocks, on, values) if self.evolution.beginning == "even" else ()
        found = self.run.once(
            "evolution",
            {**key, "data": self.data.digest},
            lambda checkpoint: self.evolution.search(
                self.units.longest,
                sizes,
                values,
                lambda young: validation_figures(
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
        full = self.units.mask(self.units.lengths(self.units.longest, on), self.dense.width) | uncounted_values(
            self.dense
        )
        return torch.where(torch.from_numpy(full), weight, 0)

    def _rows(self, values: int) -> NDArray[np.bool_]:
        """Rows that are kept, ``(n, G)``: those above their threshold, fewer or more where the budget asks for it."""
        counted = self.units.unit >= 0
        if not self.drops:
            return counted
        margins = np.where(counted, self.net.table.margins(), -np.inf)
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
            margins[:, left:right] = self.net.table.margins()[:, group, None]
            columns[:, left:right] = -np.arange(right - left)
        chosen = np.zeros(columns.shape, dtype=bool) if keep is None else keep
        keys = carry_uncounted(rank_keys(margins, columns, chosen), self.dense.blocks)
        fill = np.zeros((self.data.schema.width, self.dense.width), np.float32)
        return PruningLadder(self.dense, keys, fill, self.data.counts, n_min=0 if self.drops else 1)
