"""PocketRec: fit the embedding tables of recommender systems into any memory budget and ship them to devices.

Example:
    >>> import pocketrec as pr
    >>> pr.Budget.parse("4 MiB").amount
    4194304

Public names load their module on first use, so ``import pocketrec`` is cheap and loads neither torch nor polars.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

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
    "artifact": ("Contents",),
    "backbone": ("Backbone", "ClickModel", "Model", "RankingModel"),
    "dataset": ("Dataset", "Split", "encode"),
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
    "evolution": ("Evolution",),
    "masked": ("Retrain", "Start"),
    "measure": ("Measurement", "measure"),
    "method": ("Budget", "Method", "compress"),
    "run": ("Run",),
    "runtime": ("open",),
    "schema": ("Field", "Schema"),
    "soft": ("ThresholdSearch",),
    "table": ("Block", "DenseTable", "PrunedTable", "Table"),
    "train": ("Training", "load", "train"),
}
_MODULE = {name: module for module, names in _HOME.items() for name in names}
_AXES = ("sources", "backbones", "methods")

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


class _Package(ModuleType):
    """The package's own type: importing the submodule ``pocketrec.training.loop`` must not hide the function ``train``."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _MODULE and isinstance(value, ModuleType):
            return
        super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name in _AXES:
        return importlib.import_module(f"pocketrec.{name}")
    if name not in _MODULE:
        raise AttributeError(f"module 'pocketrec' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"pocketrec.{_MODULE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])


sys.modules[__name__].__class__ = _Package
