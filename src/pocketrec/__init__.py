"""PocketRec: fit the embedding tables of recommender systems into any memory budget and ship them to devices.

Example:
    >>> import pocketrec as pr
    >>> pr.Budget.parse("4 MiB").amount
    4194304

Public names load their module on first use, so ``import pocketrec`` is cheap and loads neither torch nor polars.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pocketrec.registry import AXES

if TYPE_CHECKING:
    from pocketrec import backbones, methods, sources
    from pocketrec.compression.budget import Budget
    from pocketrec.compression.compress import compress
    from pocketrec.compression.ladder import Method
    from pocketrec.compression.measure import Measurement, measure
    from pocketrec.data.dataset import Dataset, Split
    from pocketrec.data.encode import encode
    from pocketrec.errors import (
        ArtifactError,
        BudgetError,
        ConfigError,
        DataError,
        DivergedError,
        PocketRecError,
        RunLocked,
        StorageError,
        UnsupportedOp,
    )
    from pocketrec.families.evolution import Evolution
    from pocketrec.families.retraining import Retrain, Start
    from pocketrec.families.thresholds import ThresholdSearch
    from pocketrec.format.artifact import Contents
    from pocketrec.models.backbone import Backbone, ClickModel, Model, RankingModel
    from pocketrec.models.pruned import PrunedTable
    from pocketrec.models.table import Block, DenseTable, Table
    from pocketrec.runtime import open
    from pocketrec.schema import Field, Schema
    from pocketrec.training.loop import Training
    from pocketrec.training.run import Run
    from pocketrec.training.train import load, train

__version__ = "0.1.0"

_HOME = {
    "compression.budget": ("Budget",),
    "compression.compress": ("compress",),
    "compression.ladder": ("Method",),
    "compression.measure": ("Measurement", "measure"),
    "data.dataset": ("Dataset", "Split"),
    "data.encode": ("encode",),
    "errors": (
        "ArtifactError",
        "BudgetError",
        "ConfigError",
        "DataError",
        "DivergedError",
        "PocketRecError",
        "RunLocked",
        "StorageError",
        "UnsupportedOp",
    ),
    "families.evolution": ("Evolution",),
    "families.retraining": ("Retrain", "Start"),
    "families.thresholds": ("ThresholdSearch",),
    "format.artifact": ("Contents",),
    "models.backbone": ("Backbone", "ClickModel", "Model", "RankingModel"),
    "models.pruned": ("PrunedTable",),
    "models.table": ("Block", "DenseTable", "Table"),
    "runtime": ("open",),
    "schema": ("Field", "Schema"),
    "training.loop": ("Training",),
    "training.run": ("Run",),
    "training.train": ("load", "train"),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}

__all__ = [
    "ArtifactError",
    "Backbone",
    "Block",
    "Budget",
    "BudgetError",
    "ClickModel",
    "ConfigError",
    "Contents",
    "DataError",
    "Dataset",
    "DenseTable",
    "DivergedError",
    "Evolution",
    "Field",
    "Measurement",
    "Method",
    "Model",
    "PocketRecError",
    "PrunedTable",
    "RankingModel",
    "Retrain",
    "Run",
    "RunLocked",
    "Schema",
    "Split",
    "Start",
    "StorageError",
    "Table",
    "ThresholdSearch",
    "Training",
    "UnsupportedOp",
    "backbones",
    "compress",
    "encode",
    "load",
    "measure",
    "methods",
    "open",
    "sources",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in AXES:
        return importlib.import_module(f"pocketrec.{name}")
    if name not in _MODULE:
        raise AttributeError(f"module 'pocketrec' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"pocketrec.{_MODULE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
