"""PocketRec: fit the embedding tables of recommender systems into any memory budget and ship them to devices.

Example:
    >>> import pocketrec as pr
    >>> pr.Budget.parse("4 MiB").amount
    4194304

Public names load their module on first use, so ``import pocketrec`` is cheap and loads neither torch nor polars.
"""

from __future__ import annotations

import importlib
from typing import Any

from pocketrec.registry import AXES

__version__ = "0.1.0"

_HOME = {
    "compression.budget": "Budget",
    "compression.compress": "compress",
    "compression.ladder": "Method",
    "compression.measure": "Measurement measure",
    "data.dataset": "Dataset Split",
    "data.encode": "encode",
    "errors": "ArtifactError BudgetError ConfigError DataError DivergedError PocketRecError RunLocked StorageError "
    "UnsupportedOp",
    "families.evolution": "Evolution",
    "families.retraining": "Retrain Start",
    "families.thresholds": "ThresholdSearch",
    "format.artifact": "Contents",
    "models.backbone": "Backbone ClickModel Model RankingModel",
    "models.pruned": "PrunedTable",
    "models.table": "Block DenseTable Table",
    "runtime": "open",
    "schema": "Field Schema",
    "training.loop": "Training",
    "training.run": "Run",
    "training.train": "load train",
}
"""Names by module; ``__init__.pyi`` has the same for type checkers."""

_MODULE = {name: module for module, names in _HOME.items() for name in names.split()}

__all__ = sorted([*_MODULE, *AXES])  # pyright: ignore[reportUnsupportedDunderAll]


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
