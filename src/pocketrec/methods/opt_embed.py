"""OptEmbed: which rows to keep, and how many columns each field needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from pocketrec.families.evolution import DenseTable, Evolution, Retrain, Rule, Start, Supernet, SupernetMethod, Units
from pocketrec.families.sharing import RowSharing


@dataclass(frozen=True)
class OptEmbed(SupernetMethod):
    """Train a supernet with random prefix lengths and row thresholds; evolve the lengths of fields; train them again.

    A row is kept while its L1 norm is above its threshold, ``1[|e_i|_1 > t]`` with a straight-through gradient; the
    loss has the term ``pressure sum exp(-t)``. Every sample and field draws a length in each step, so that the supernet
    knows short vectors. Then an elitist evolution finds the length of each field for a budget, by the validation figure
    of the frozen supernet. Rows go or come back, by their margin ``|e|_1 - t``, where lengths alone miss the budget.

    Args:
        threshold: who shares a row threshold: each ``field``, or each ``row``.
        pressure: weight of the thresholds in the loss, at least 0.
        threshold_rate: learning rate of plain descent on ``t``, above 0; by default such that the pressure alone would
            lift it to the mean first norm.

    Example:
        >>> from pocketrec.families.evolution import Evolution
        >>> OptEmbed(search=Evolution(sampling="uniform", patience=30)).retrain.head
        'initial'

    Reference:
        Lyu et al., "OptEmbed: learning optimal embedding table for click-through rate prediction", 2022, equations
        5-12; ``alpha`` as in the benchmark of lightweight embeddings (2024). Departures: elitism (see ``crossover``);
        exact sizes.
    """

    name: ClassVar[str] = "opt_embed"
    drops: ClassVar[bool] = True
    bounds: ClassVar = {"pressure": 0}
    above: ClassVar = {"threshold_rate": 0}

    threshold: RowSharing = "field"
    pressure: float = 1e-3
    threshold_rate: float | None = None
    search: Evolution = field(default=Evolution())
    retrain: Retrain = field(default=Retrain(head="initial"))
    start: Start = field(default=Start())

    def units(self, dense: DenseTable) -> Units:
        """The rows of a field share a length."""
        return Units.of(dense.schema, dense.blocks, "field")

    def supernet(self, dense: DenseTable, units: Units, steps: int) -> Supernet:
        """With thresholds that the pressure alone would lift to the mean first norm."""
        norm = sum(float(dense.matrix[:, left:right].detach().abs().sum(dim=1).mean()) for left, right in units.groups)
        rate = self.threshold_rate or max(1e-8, norm / (len(units.groups) * max(self.pressure, 1e-6) * steps))
        return Supernet(dense, units, self.threshold, Rule(rate, kind="sgd"), self.pressure)
