"""OptEmbed: which rows to keep, and how many columns each field needs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from pocketrec.compression.ladder import Method
from pocketrec.data.dataset import Dataset
from pocketrec.errors import ConfigError
from pocketrec.families.evolution import Evolution, EvolvedLadder, SearchAlgorithm
from pocketrec.families.mixed_dimension import LengthSampling, Supernet, ThresholdSharing, Units, check_epochs
from pocketrec.families.retraining import HeadStart, Origin, ValueStart, initial_model, search_training
from pocketrec.models.backbone import Model
from pocketrec.training.hooks import Rule
from pocketrec.training.loop import Training
from pocketrec.training.run import Run


@dataclass(frozen=True)
class OptEmbed(Method):
    """Train a supernet with random prefix lengths and row thresholds; evolve the lengths of fields; train them again.

    A row is kept while its L1 norm is above its threshold, ``1[|e_i|_1 > t]`` with a straight-through gradient; the
    loss has the term ``pressure sum exp(-t)``. Every sample and field draws a length in each step, so that the supernet
    knows short vectors. Then an elitist evolution finds the length of each field for a budget, by the validation figure
    of the frozen supernet. Rows go or come back, by their margin ``|e|_1 - t``, where lengths alone miss the budget.

    Args:
        threshold: who shares a row threshold: each ``field``, or each ``feature``.
        pressure: weight of the thresholds in the loss, at least 0.
        threshold_rate: learning rate of plain descent on ``t``, above 0; by default such that the pressure alone would
            lift it to the mean first norm.
        search_epochs: most epochs of the supernet, at least 1; by default half of those of the first training stage.
        sampling: lengths of candidates: ``alpha`` draws short ones as often as the budget asks, ``uniform`` all alike.
        search: ``elitist`` remembers the best of all generations; ``original`` takes parents from the last one alone,
            and crosses them at one place, as first published.
        population: candidates of the first generation, at least 1.
        generations: most generations, at least 1.
        parents: best candidates that have children, at least 1.
        children: by crossover, and as many by mutation, at least 1.
        mutation: share of genes that a mutation draws again, in [0, 1].
        patience: generations without a better candidate before the search ends, at least 1; published runs never end.
        head: ``initial`` starts the retraining where the supernet started, ``fresh`` with a new head.
        restart: where the retraining starts: at the ``first`` values, as published, with the ``head`` that is asked
            for; or at the values and the head that the search ``found``.
        origin: where the supernet starts: ``fresh``, as published, or at the weights of the ``trained`` model given.
        training: stages of training; the supernet takes its settings from the first; none for the task's default.

    Example:
        >>> OptEmbed(sampling="uniform", patience=30).trains
        True

    Reference:
        Lyu et al., "OptEmbed: learning optimal embedding table for click-through rate prediction", 2022, equations
        5-12; ``alpha`` as in the benchmark of lightweight embeddings (2024). Departures: elitism (see ``search``);
        exact sizes.
    """

    name: ClassVar[str] = "opt_embed"
    trains: ClassVar[bool] = True

    threshold: ThresholdSharing = "field"
    pressure: float = 1e-3
    threshold_rate: float | None = None
    search_epochs: int | None = None
    sampling: LengthSampling = "alpha"
    search: SearchAlgorithm = "elitist"
    population: int = 20
    generations: int = 30
    parents: int = 15
    children: int = 10
    mutation: float = 0.1
    patience: int = 8
    head: HeadStart = "initial"
    restart: ValueStart = "first"
    origin: Origin = "fresh"
    training: tuple[Training, ...] = ()

    def __post_init__(self) -> None:
        check_epochs(self.search_epochs)
        self.evolution()
        if not 0 <= self.pressure < math.inf:
            raise ConfigError(f"`pressure` must be at least 0, but got pressure={self.pressure}.")
        if self.threshold_rate is not None and not 0 < self.threshold_rate < math.inf:
            raise ConfigError(f"`threshold_rate` must be above 0, but got threshold_rate={self.threshold_rate}.")

    def evolution(self) -> Evolution:
        """Settings of the search among lengths."""
        return Evolution(
            self.population, self.generations, self.parents, self.children, self.mutation, self.patience,
            self.sampling, self.search,
        )  # fmt: skip

    def prepare(self, model: Model, data: Dataset, run: Run) -> EvolvedLadder:
        """Train the supernet, once for all budgets."""
        start, dense = initial_model(model, data, run, self.origin)
        units = Units.of(data.schema, dense.blocks, "field")
        search = search_training(self.training, data.schema.task, self.search_epochs)
        steps = search.epochs * max(1, math.ceil(len(data.train) / search.batch_size))
        norm = sum(float(dense.matrix[:, left:right].detach().abs().sum(dim=1).mean()) for left, right in units.groups)
        rate = self.threshold_rate or max(1e-8, norm / (len(units.groups) * max(self.pressure, 1e-6) * steps))
        supernet = Supernet(dense, units, self.threshold, Rule(rate, kind="sgd"), self.pressure)
        net = run.fit("supernet", start.with_table(supernet), data, search)
        ladder = EvolvedLadder(net, start, dense, units, True, self.evolution(), self.head, self.training, data, run)
        return ladder if self.restart == "first" else ladder.found()
