"""Checks that every method must pass, each on every registered backbone."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch

from pocketrec import runtime
from pocketrec.compression.budget import Budget
from pocketrec.compression.compress import compress, sized
from pocketrec.compression.ladder import Method
from pocketrec.compression.measure import measure
from pocketrec.compression.small import Small
from pocketrec.data.dataset import Dataset
from pocketrec.errors import BudgetError
from pocketrec.families.compositional.table import ComposedTable
from pocketrec.format.artifact import Artifact
from pocketrec.format.block import Storage
from pocketrec.models.backbone import Model, RankingModel
from pocketrec.models.baked import BakedModel
from pocketrec.models.table import DenseTable, Table
from pocketrec.testing.lab import Lab, fingerprint, refused, require, same, untouched_globals
from pocketrec.training.evaluate import logits
from pocketrec.training.run import Run

BUDGETS = ("sparsity=0.3", "sparsity=0.9", "60%", "30%")
FACTOR_ROUNDINGS = 8
"""How many roundings of its factors a computed vector may be off by."""


def check_removes_what_was_asked(method: Method, lab: Lab) -> None:
    """``sparsity=s`` keeps at most ``values - int(values * s)`` scalars, or is refused with a least that is more."""
    for model, data in _subjects(lab):
        dense = model.table.values()
        for share in (0.3, 0.9):
            reached = _reachable(method, model, data, lab, f"sparsity={share}")
            values, most = _small(method, model, data, lab, reached).values, dense - int(dense * reached.amount)
            require(reached.amount <= share, f"sparsity={share} to be refused only if the least is more", reached)
            require(values <= most, f"at most {most} values", values)


def check_table_lookup_is_its_weight(method: Method, lab: Lab) -> None:
    """``table(ids) == weight()[ids]``, for every row; vectors that are computed agree to 1e-5 of the largest entry."""
    for small in _smalls(method, lab):
        ids = torch.arange(small.data.schema.rows)
        same("look-up and weight", small.table(ids), small.table.weight(), within=_rounding(small.table))


def check_forms_read_alike(method: Method, lab: Lab) -> None:
    """However a table is held for inference, it reads the same vectors, up to rounding."""
    for small in _smalls(method, lab):
        weight = small.table.weight()
        for name in small.table.forms:
            same(f"the table held as {name!r}", small.table.form(name).weight(), weight, within=1e-5)


def check_lookup_shapes(method: Method, lab: Lab) -> None:
    """Ids of shape (0, F), (1, F), (7, F) give float32 vectors (.., F, D)."""
    for small in _smalls(method, lab):
        for rows in (0, 1, 7):
            ids = torch.from_numpy(np.array(small.data.train.ids[:rows]))
            vectors = small.table(ids)
            expected = (*ids.shape, small.table.width)
            require(vectors.shape == expected and vectors.dtype == torch.float32, f"float32 {expected}", vectors.shape)


def check_integer_types_agree(method: Method, lab: Lab) -> None:
    """int32 and int64 ids read the same vectors."""
    for small in _smalls(method, lab):
        ids = torch.from_numpy(np.array(small.data.train.ids[:16]))
        same("int32 and int64 look-ups", small.table(ids.int()), small.table(ids.long()))


def check_absent_rows_read_alike(method: Method, lab: Lab) -> None:
    """The absent law: in each field, rows stored nowhere read what the out-of-vocabulary row reads."""
    for small in _smalls(method, lab):
        weight, stored = small.table.weight(), small.table.stored()
        for field in small.data.schema.fields:
            absent = weight[field.offset : field.stop][~stored[field.offset : field.stop]]
            if len(absent):
                same(f"absent rows of {field.name}", absent, absent[-1:].expand_as(absent))


def check_unknown_rows_are_stored_nowhere(method: Method, lab: Lab) -> None:
    """The out-of-vocabulary row is read through ``absent``, so no file has to find it."""
    for small in _smalls(method, lab):
        stored = small.table.stored()
        for field in small.data.schema.fields:
            if field.oov_row is not None:
                require(not bool(stored[field.oov_row]), f"row {field.oov_row} of {field.name} not to be stored")


def check_model_is_left_alone(method: Method, lab: Lab) -> None:
    """Compressing changes no tensor of the dense model."""
    for model, data in _subjects(lab):
        before = fingerprint(model)
        _small(method, model, data, lab, _reachable(method, model, data, lab, "sparsity=0.5"))
        require(fingerprint(model) == before, "the dense model to be as before")


def check_data_is_left_alone(method: Method, lab: Lab) -> None:
    """Compressing changes no byte of the data set."""
    for model, data in _subjects(lab):
        _small(method, model, data, lab, _reachable(method, model, data, lab, "sparsity=0.5"))
        Dataset.open(data.path, verify=True)


def check_globals_are_left_alone(method: Method, lab: Lab) -> None:
    """Compressing draws from no global generator."""
    for model, data in _distinct(lab):
        budget = _reachable(method, model, data, lab, "sparsity=0.5")
        with untouched_globals():
            compress(model, data, method, budget, training=lab.training)


def check_reads_no_test_rows(method: Method, lab: Lab) -> None:
    """A method works where there is no test split, and comes to the same table."""
    for model, data in _distinct(lab):
        budget = _reachable(method, model, data, lab, "sparsity=0.5")
        blind = compress(model, lab.without_test(data.schema.task), method, budget, training=lab.training)
        seeing = compress(model, data, method, budget, training=lab.training)
        same("tables with and without a test split", blind.table.weight(), seeing.table.weight())


def check_same_seed_same_bytes(method: Method, lab: Lab) -> None:
    """Two runs with one seed write the same file."""
    for model, data in _distinct(lab):
        budget = _reachable(method, model, data, lab, "30%")
        files = [
            _written(compress(model, data, method, budget, run=Run(None, seed=5), training=lab.training), lab)
            for _ in range(2)
        ]
        require(files[0].read_bytes() == files[1].read_bytes(), "the same seed to give the same bytes")


def check_order_of_budgets_is_irrelevant(method: Method, lab: Lab) -> None:
    """A budget's table does not depend on the budgets before it."""
    for model, data in _distinct(lab):
        budgets = [_reachable(method, model, data, lab, budget) for budget in ("sparsity=0.3", "sparsity=0.9")]
        up = compress(model, data, method, budgets, training=lab.training)
        down = compress(model, data, method, budgets[::-1], training=lab.training)
        for one, other in zip(up, reversed(down), strict=True):
            same(f"tables at {one.budget}", one.table.weight(), other.table.weight())


def check_a_stored_run_serves_again(method: Method, lab: Lab) -> None:
    """What a run has kept gives the same bytes as a fresh preparation."""
    for model, data in _distinct(lab):
        folder, budget = lab.place(), _reachable(method, model, data, lab, "30%")
        first = _written(compress(model, data, method, budget, run=folder, training=lab.training), lab)
        again = _written(compress(model, data, method, budget, run=folder, training=lab.training), lab)
        require(first.read_bytes() == again.read_bytes(), "a stored run to give the same bytes")


def check_smaller_budgets_keep_less(method: Method, lab: Lab) -> None:
    """Values and table bytes fall with the budget."""
    for model, data in _subjects(lab):
        budgets = [_reachable(method, model, data, lab, budget) for budget in ("60%", "40%", "20%")]
        smalls = compress(model, data, method, budgets, run=lab.run)
        values, sizes = [s.values for s in smalls], [s.sizes["table"] for s in smalls]
        require(values == sorted(values, reverse=True), "values that fall with the budget", values)
        require(sizes == sorted(sizes, reverse=True), "bytes that fall with the budget", sizes)


def check_shares_are_kept(method: Method, lab: Lab) -> None:
    """``p%`` is at most that share of the dense fp32 table's bytes, side arrays included, or refused with the least."""
    for model, data in _subjects(lab):
        dense = 4 * sum(b.values for b in model.table.blocks)
        for percent in (60, 30):
            reached = _reachable(method, model, data, lab, f"{percent}%")
            size, most = _small(method, model, data, lab, reached).sizes["table"], int(reached.amount * dense)
            require(reached.amount >= percent / 100, f"{percent}% to be refused only if the least is more", reached)
            require(size <= most, f"at most {most} table bytes", size)


def check_final_tables_stay_in_their_room(method: Method, lab: Lab) -> None:
    """After ``finish`` a table still fits what it was made for, in values and in bytes of the packed form."""
    for model, data in _subjects(lab):
        ladder = method.prepare(model, data, lab.run)
        for text in ("sparsity=0.9", "30%"):
            budget = _reachable(method, model, data, lab, text)
            small, room = sized(ladder, Small(model, data, method, budget, budget.storage))
            final = replace(small, model=ladder.finish(small.model, room))
            taken = final.sizes["table"] if room.values is None else final.values
            require(taken <= room.most, f"a final table within {room}", taken)


def check_files_are_within_budget(method: Method, lab: Lab) -> None:
    """A budget in bytes bounds the file on the disk; little is wasted of it, below what can be used.

    That is at most 1 KiB, or a quarter of the dense fp32 table where this is more: rows of a small table of long rows
    are coded in classes, and the next finer class may take as much.
    """
    for model, data in _subjects(lab):
        with refused("a budget of 10 B") as errors:
            _small(method, model, data, lab, "10 B")
        largest = _small(method, model, data, lab, _reachable(method, model, data, lab, "60%")).sizes["file"]
        reached = _small(method, model, data, lab, f"{largest} B").sizes["file"]
        limit = (errors[0].least_bytes + reached) // 2  # type: ignore[attr-defined]
        size = _written(_small(method, model, data, lab, f"{limit} B"), lab).stat().st_size
        waste = max(1024, 4 * sum(b.values for b in model.table.blocks) // 4)
        require(limit - waste < size <= limit, f"a file of at most and almost {limit} bytes", size)


def check_impossible_budgets_are_refused(method: Method, lab: Lab) -> None:
    """A budget of a few bytes raises :class:`BudgetError` and names the least that can be reached."""
    for model, data in _subjects(lab):
        for budget in ("0.001%", "10 B"):
            with refused(f"a budget of {budget}") as errors:
                _small(method, model, data, lab, budget)
            error = errors[0]
            require(isinstance(error, BudgetError), "a BudgetError", repr(error))
            require(bool(error.least_bytes), "the least reachable size in the error", error.least_bytes)  # type: ignore[attr-defined]


def check_the_least_size_is_reached(method: Method, lab: Lab) -> None:
    """The size that the error names is one that the method reaches."""
    for model, data in _subjects(lab):
        with refused("a budget of 10 B") as errors:
            _small(method, model, data, lab, "10 B")
        least = errors[0].least_bytes  # type: ignore[attr-defined]
        size = _written(_small(method, model, data, lab, f"{least} B"), lab).stat().st_size
        require(size <= least, f"a file of at most {least} bytes", size)


def check_files_say_what_tables_say(method: Method, lab: Lab) -> None:
    """Every row of a file in fp32 holds what the torch table reads; absent rows too.

    Tables that look vectors up agree in every bit; vectors that are computed, to 1e-5 of the largest entry.
    """
    for small in _smalls(method, lab, storage="fp32"):
        same("vectors in the file", small.table.weight(), _file_weight(small, lab), within=_rounding(small.table))


def check_short_storage_is_close(method: Method, lab: Lab) -> None:
    """fp16 and int8 files differ from fp32 by at most their rounding.

    The vectors of a :class:`~pocketrec.families.compositional.table.ComposedTable` may be off by a few roundings of
    their factors.
    """
    storages: tuple[tuple[Storage, float], ...] = (("fp16", 1e-3), ("int8", 1 / 127))
    for storage, relative in storages:
        for small in _smalls(method, lab, storage=storage):
            weight = small.table.weight().detach()
            roundings = FACTOR_ROUNDINGS if isinstance(small.table, ComposedTable) else 1
            within = roundings * relative * float(weight.abs().max())
            same(f"vectors in {storage}", weight, _file_weight(small, lab), within=within)


def check_click_scores_agree(method: Method, lab: Lab) -> None:
    """A click file scores raw rows as the torch model scores their ids, to 1e-5 in logits."""
    for small in _smalls(method, lab, storage="fp32"):
        if small.data.schema.task == "ctr":
            measured = measure(_written(small, lab), small.data.test, latency=False, predictions=True)
            same("logits from the file", logits(small.model, small.data.test), measured.logits, within=1e-5)  # type: ignore[arg-type]


def check_ranking_files_recommend(method: Method, lab: Lab) -> None:
    """A baked ranking file recommends ``k`` distinct items by falling score; who trains refuses a baked model."""
    for model, data in _subjects(lab):
        if isinstance(model, RankingModel):
            baked = BakedModel.of(model)
            if method.trains and isinstance(baked, BakedModel):
                with refused("a baked model, for a method that trains"):
                    compress(model, data, method, "sparsity=0.5", bake=True, training=lab.training)
                continue
            small = compress(
                baked, data, method, _reachable(method, baked, data, lab, "sparsity=0.5"), training=lab.training
            )
            best = runtime.open(_written(small, lab)).recommend(0, 5)
            scores = [score for _, score in best]
            require(len({item for item, _ in best}) == 5, "five distinct items", best)
            require(scores == sorted(scores, reverse=True), "scores that fall", scores)


def check_state_survives(method: Method, lab: Lab) -> None:
    """A table's state, copied away and loaded back, reads the same."""
    for small in _smalls(method, lab):
        state = copy.deepcopy(small.table.state_dict())
        before = small.table.weight().detach().clone()
        small.table.load_state_dict(state)
        same("the table after a round trip of its state", before, small.table.weight())


def check_damaged_weights_are_refused(method: Method, lab: Lab) -> None:
    """A table with NaN is refused when it is ranked or when it is written, never passed on.

    A method that trains does not read the table that it replaces: its own is finite.
    """
    for model, data in _distinct(lab):
        weight = model.table.weight().detach().clone()
        weight[:, 0] = float("nan")
        damaged = model.with_table(DenseTable(model.schema, model.table.blocks, weight))
        budget = _reachable(method, model, data, lab, "sparsity=0.3")
        if method.trains:
            table = _small(method, damaged, data, lab, budget).table
            require(bool(torch.isfinite(table.weight()).all()), "a finite table from a model with NaN")
            continue
        with refused("a table with NaN"):
            _written(compress(damaged, data, method, budget, training=lab.training), lab)


def check_read_only_weights_will_do(method: Method, lab: Lab) -> None:
    """A table that is mapped from a read-only file can be compressed."""
    for model, data in _distinct(lab):
        path = lab.place().with_suffix(".npy")
        np.save(path, model.table.weight().detach().numpy())
        mapped = torch.from_numpy(np.load(path, mmap_mode="c"))
        other = model.with_table(DenseTable(model.schema, model.table.blocks, mapped))
        budget = _reachable(method, model, data, lab, "sparsity=0.5")
        one, two = (compress(m, data, method, budget, training=lab.training) for m in (model, other))
        same("tables from memory and from a file", one.table.weight(), two.table.weight())


def check_files_verify(method: Method, lab: Lab) -> None:
    """A written file passes the check of every byte, and says which method made it."""
    for small in _smalls(method, lab):
        artifact = Artifact(_written(small, lab))
        artifact.verify()
        require(artifact.info["method"]["name"] == method.name, f"a file that names {method.name}", artifact.info)


def _subjects(lab: Lab) -> Iterator[tuple[Model, Dataset]]:
    """A trained model of every registered backbone, and its data."""
    for backbone in lab.backbones:
        yield lab.model(backbone), lab.data(backbone.task)


def _distinct(lab: Lab) -> Iterator[tuple[Model, Dataset]]:
    """One model for each way to tile a table and to read it: enough for checks that prepare anew each time."""
    seen = set()
    for model, data in _subjects(lab):
        blocks = tuple((b.start, b.left, b.counted) for b in model.table.blocks)
        kind = (blocks, isinstance(model, RankingModel) and model.propagates)
        if kind not in seen:
            seen.add(kind)
            yield model, data


def _reachable(
    method: Method, model: Model, data: Dataset, lab: Lab, text: str, storage: Storage | None = None
) -> Budget:
    """The budget, or the least that the method says it reaches, where that is more."""
    budget = Budget.parse(text)
    try:
        _small(method, model, data, lab, budget, storage)
    except BudgetError as error:
        if budget.kind == "sparsity":
            values = model.table.values()
            require(error.least_values is not None, "the least values in the error", error)
            return Budget("sparsity", 1 - (cast("int", error.least_values) - 0.5) / values)
        dense = 4 * sum(b.values for b in model.table.blocks)
        require(error.least_bytes is not None, "the least bytes in the error", error)
        return Budget("share", (cast("int", error.least_bytes) + 0.5) / dense)
    return budget


def _small(
    method: Method, model: Model, data: Dataset, lab: Lab, budget: str | Budget, storage: Storage | None = None
) -> Small:
    """A compressed model; the preparation is shared by all checks of one lab."""
    return compress(model, data, method, budget, run=lab.run, storage=storage)


def _smalls(method: Method, lab: Lab, storage: Storage | None = None) -> Iterator[Small]:
    """Every backbone at every budget of the exam, or at the least that the method reaches with this storage."""
    for model, data in _subjects(lab):
        for budget in BUDGETS:
            yield _small(method, model, data, lab, _reachable(method, model, data, lab, budget, storage), storage)


def _rounding(table: Table) -> float:
    """How far apart two ways of reading a table may be: nothing, unless its vectors are computed."""
    return 1e-5 * float(table.weight().detach().abs().max()) if table.computed else 0.0


def _written(small: Small, lab: Lab) -> Path:
    path = lab.place().with_suffix(".safetensors")
    small.save(path)
    return path


def _file_weight(small: Small, lab: Lab) -> np.ndarray:
    """The whole matrix as the written file holds it, ``(n, D)``, read through the file's vocabulary."""
    artifact = Artifact(_written(small, lab))
    rows = artifact.vocabulary.file_rows(small.data.hashes)
    parts = [
        artifact.packed.lookup(rows[field.offset : field.stop, None], np.array([i]))[:, 0]
        for i, field in enumerate(small.data.schema.fields)
    ]
    return np.concatenate(parts)
