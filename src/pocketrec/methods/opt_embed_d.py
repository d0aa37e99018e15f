"""OptEmbed-D: how many columns each row, or each field, needs; no row is left out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, get_args

from pocketrec.compression.ladder import Method
from pocketrec.data.dataset import Dataset
from pocketrec.errors import ConfigError
from pocketrec.families.evolution import Evolution, EvolvedLadder, InitialPopulation
from pocketrec.families.mixed_dimension import LengthSampling, Supernet, Units, check_epochs
from pocketrec.families.retraining import HeadStart, Origin, ValueStart, initial_model, search_training
from pocketrec.models.backbone import Model
from pocketrec.training.hooks import Rule
from pocketrec.training.loop import Training
from pocketrec.training.run import Run


@dataclass(frozen=True)
class OptEmbedD(Method):
    """Train a supernet with random prefix lengths, evolve the length of every user and item, train them again.

    As OptEmbed without row thresholds: every vector keeps at least one column, so a table of width ``d`` cannot be made
    smaller than ``1 / d``. Ranking models have one length per row and block, click models one per field.

    Args:
        search_epochs: most epochs of the supernet, at least 1; by default half of those of the first training stage.
        sampling: lengths of candidates: ``alpha`` draws short ones as often as the budget asks, ``uniform`` all alike.
        population: candidates of the first generation, at least 1.
        beginning: candidates are ``drawn``, as published, or there are ``even`` lengths among the first: one for all,
            and one for each block alone, the others at one column. Millions of random lengths are all alike: no search
            of a few hundred of them finds that users deserve more columns than items.
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
        >>> OptEmbedD().generations
        30

    Reference:
        Lyu et al., "OptEmbed: learning optimal embedding table for click-through rate prediction", 2022, section 3.3;
        lengths of users and items as in the benchmark of lightweight embeddings (2024).
    """

    name: ClassVar[str] = "opt_embed_d"
    trains: ClassVar[bool] = True

    search_epochs: int | None = None
    sampling: LengthSampling = "alpha"
    population: int = 20
    beginning: InitialPopulation = "drawn"
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
        if self.beginning not in get_args(InitialPopulation):
            raise ConfigError(f"`beginning` must be one of drawn, even, but got {self.beginning!r}.")

    def evolution(self) -> Evolution:
        """Settings of the search among lengths."""
        return Evolution(
            self.population, self.generations, self.parents, self.children, self.mutation, self.patience, self.sampling
        )

    def prepare(self, model: Model, data: Dataset, run: Run) -> EvolvedLadder:
        """Train the supernet, once for all budgets."""
        start, dense = initial_model(model, data, run, self.origin)
        units = Units.of(data.schema, dense.blocks, "row" if data.schema.task == "cf" else "field")
        search = search_training(self.training, data.schema.task, self.search_epochs)
        supernet = Supernet(dense, units, None, Rule(1.0, kind="sgd"), 0.0)
        net = run.fit("supernet", start.with_table(supernet), data, search)
        ladder = EvolvedLadder(
            net, start, dense, units, False, self.evolution(), self.head, self.training, data, run, self.beginning
        )
        return ladder if self.restart == "first" else ladder.found()
