"""How a smaller table is found: ``prepare`` once, budget-free; a table for any budget as often as you like.

:func:`compress` is the verb: it prepares a method once, makes a table for each budget, and wraps it as a
:class:`Small` that can be saved as one file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from pocketrec.compression.budget import Budget, Room
from pocketrec.compression.file_fit import fit_file, room_of, with_ladder_table
from pocketrec.compression.ladder import Ladder, Method
from pocketrec.compression.small import Small, counted_values
from pocketrec.errors import BudgetError
from pocketrec.format.block import Storage
from pocketrec.format.entries import Index
from pocketrec.models.backbone import Model
from pocketrec.models.baked import BakedModel
from pocketrec.training.run import Run

if TYPE_CHECKING:
    from pocketrec.data.dataset import Dataset
    from pocketrec.training.loop import Training

_CUTS = 4
"""How often a table may be cut after its training, at most."""


@overload
def compress(
    model: Model,
    data: Dataset,
    method: Method,
    budget: str | Budget,
    *,
    run: Run | str | Path | None = None,
    training: Training | Sequence[Training] | None = None,
    storage: Storage | None = None,
    index: Index = "compact",
    bake: bool = False,
) -> Small: ...


@overload
def compress(
    model: Model,
    data: Dataset,
    method: Method,
    budget: Sequence[str | Budget],
    *,
    run: Run | str | Path | None = None,
    training: Training | Sequence[Training] | None = None,
    storage: Storage | None = None,
    index: Index = "compact",
    bake: bool = False,
) -> list[Small]: ...


def compress(
    model: Model,
    data: Dataset,
    method: Method,
    budget: str | Budget | Sequence[str | Budget],
    *,
    run: Run | str | Path | None = None,
    training: Training | Sequence[Training] | None = None,
    storage: Storage | None = None,
    index: Index = "compact",
    bake: bool = False,
) -> Small | list[Small]:
    """Fit the model's table into a budget, or into each of several with one preparation.

    Args:
        model: A trained model with a dense table; it is left as it is.
        data: The data set of its training; only training rows are read.
        method: How to find the smaller table.
        budget: ``"sparsity=0.95"`` (share of values removed), ``"5%"`` (of the dense table's bytes) or ``"4MiB"`` (the
            whole file), or several of them.
        run: A folder that keeps the preparation: a later budget takes seconds.
        training: How methods that train do so: settings, or several stages of them; by default those of the run, else
            of the data's task. Searches take theirs from the first stage.
        storage: ``fp32``, ``fp16`` or ``int8``; by default ``fp32`` for a sparsity, ``int8`` for a budget in bytes.
        index: ``compact`` finds a row in the fewest bytes, ``direct`` in the least time.
        bake: For ranking models: propagate first and compress the final vectors, as a device needs them.

    Raises:
        BudgetError: A budget cannot be reached; the error knows the least size that can.
        ConfigError: A budget, storage or index that is none.

    Example:
        >>> small = compress(model, data, MagPrune(), "4MiB", run="runs/mag")  # doctest: +SKIP
        >>> small.save("model.safetensors")["file"] <= 4 << 20  # doctest: +SKIP
        True
    """
    if not isinstance(run, Run):
        with Run(run) as opened:
            more: Any = {"training": training, "storage": storage, "index": index, "bake": bake}
            return compress(model, data, method, budget, run=opened, **more)
    if training is not None:
        run = run.with_training(training)
    single = isinstance(budget, (str, Budget))
    budgets = [Budget.parse(b) for b in ([budget] if single else budget)]
    if bake:
        model = BakedModel.of(model)
    ladder, trained = method.prepare(model, data, run), run.training if method.trains else ()
    dense = [Small(model, data, method, b, storage or b.storage, index, trained) for b in budgets]
    found = [_at(ladder, small) for small in dense]
    return found[0] if single else found


def _at(ladder: Ladder, dense: Small) -> Small:
    """The final table for one budget, in place of the dense one.

    A table that is cut after its training may be described by some digits more in the header: then it is cut again.
    """
    small, room = sized(ladder, dense)
    excess = 0
    for _ in range(_CUTS):
        model = ladder.finish(small.model, room)
        final = small if model is small.model else replace(small, model=model)
        excess = final.sizes["file"] - int(dense.budget.amount) if dense.budget.kind == "bytes" else 0
        if excess <= 0:
            return final
        room = replace(room, size_bytes=room.most - excess)
    raise BudgetError(
        f"{dense.method.name} must finish a file within {int(dense.budget.amount):,} B, but is {excess:,} B above it; "
        "its `finish` must keep to the room."
    )


def sized(ladder: Ladder, dense: Small) -> tuple[Small, Room]:
    """The table of the right size in place of the dense one, not yet trained where the method trains, and its room.

    ``ladder.finish(small.model, room)`` is then what :func:`compress` returns.
    """
    budget, table = dense.budget, dense.table
    if budget.kind == "bytes":
        return fit_file(ladder, dense, int(budget.amount))
    if budget.kind == "share":
        dense_bytes = 4 * sum(b.values for b in table.blocks)
        room = replace(room_of(dense, int(budget.amount * dense_bytes)), keys=False)
    else:
        values = counted_values(table)
        room = Room(values=values - int(values * budget.amount), storage=dense.storage, index=dense.index)
    return with_ladder_table(dense, ladder.table(room)), room
