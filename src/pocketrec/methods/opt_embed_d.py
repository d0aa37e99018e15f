"""OptEmbed-D: how many columns each row, or each field, needs; no row is left out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from pocketrec.families.evolution import DenseTable, Evolution, Retrain, Rule, Start, Supernet, SupernetMethod, Units


@dataclass(frozen=True)
class OptEmbedD(SupernetMethod):
    """Train a supernet with random prefix lengths, evolve the length of every user and item, train them again.

    As OptEmbed without row thresholds: every vector keeps at least one column, so a table of width ``d`` cannot be made
    smaller than ``1 / d``. Ranking models have one length per row and block, click models one per field.

    Example:
        >>> OptEmbedD().search.generations
        30

    Reference:
        Lyu et al., "OptEmbed: learning optimal embedding table for click-through rate prediction", 2022, section 3.3;
        lengths of users and items as in the benchmark of lightweight embeddings (2024).
    """

    name: ClassVar[str] = "opt_embed_d"
    drops: ClassVar[bool] = False

    search: Evolution = field(default=Evolution())
    retrain: Retrain = field(default=Retrain(head="initial"))
    start: Start = field(default=Start())

    def units(self, dense: DenseTable) -> Units:
        """Each row of ranking models has a length in each block, each field of click models one."""
        return Units.of(dense.schema, dense.blocks, "row" if dense.schema.task == "cf" else "field")

    def supernet(self, dense: DenseTable, units: Units, steps: int) -> Supernet:
        """Without thresholds."""
        return Supernet(dense, units, None, Rule(1.0, kind="sgd"), 0.0)
