"""Checks that every backbone must pass."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pocketrec.data.dataset import Dataset
from pocketrec.format.program import OPS, Program
from pocketrec.models.backbone import Backbone, ClickModel, Model, RankingModel, noise
from pocketrec.models.table import DenseTable
from pocketrec.testing.lab import Lab, fingerprint, require, same, untouched_globals

BATCH = 64


def check_blocks_tile_the_table(backbone: Backbone, lab: Lab) -> None:
    """Blocks cover every cell of the logical matrix exactly once and have distinct names."""
    schema = lab.data(backbone.task).schema
    blocks = backbone.blocks(schema)
    cover = np.zeros((schema.rows, max(b.right for b in blocks)), np.int64)
    for block in blocks:
        cover[block.start : block.stop, block.left : block.right] += 1
    require(
        bool((cover == 1).all()), "every cell in exactly one block", f"{cover.min()} to {cover.max()} blocks a cell"
    )
    require(len({b.name for b in blocks}) == len(blocks), "blocks with distinct names")
    require(any(b.counted for b in blocks), "at least one counted block")


def check_builds_a_dense_table(backbone: Backbone, lab: Lab) -> None:
    """A fresh model has one dense table with the backbone's blocks, and knows backbone and schema."""
    data = lab.data(backbone.task)
    model = backbone.build(data, seed=0)
    require(type(model.table) is DenseTable, "a DenseTable", type(model.table).__name__)
    require(model.table.blocks == backbone.blocks(data.schema), "the table to have the backbone's blocks")
    require(model.backbone == backbone and model.schema == data.schema, "the model to know backbone and schema")
    kind = ClickModel if backbone.task == "ctr" else RankingModel
    require(isinstance(model, kind), f"a {kind.__name__} for task {backbone.task!r}", type(model).__name__)


def check_same_seed_same_model(backbone: Backbone, lab: Lab) -> None:
    """Initial weights are a pure function of the seed."""
    data = lab.data(backbone.task)
    prints = [fingerprint(backbone.build(data, seed)) for seed in (3, 3, 4)]
    require(prints[0] == prints[1], "the same seed to give the same weights")
    require(prints[0] != prints[2], "another seed to give other weights")


def check_build_leaves_globals_alone(backbone: Backbone, lab: Lab) -> None:
    """Building, batching, loss and gradient draw from no global generator."""
    data = lab.data(backbone.task)
    with untouched_globals():
        model = backbone.build(data, seed=0)
        model.loss(_batch(model, data), noise(0, "exam")).backward()


def check_batches_are_pure(backbone: Backbone, lab: Lab) -> None:
    """The batches of an epoch are a function of the seed and the epoch; other epochs have another order."""
    data = lab.data(backbone.task)
    model = backbone.build(data, seed=0)
    first, again, other = (_flat(model.batches(data, BATCH, 0, epoch)) for epoch in (1, 1, 2))
    require(_equal(first, again), "the same epoch to give the same batches")
    require(not _equal(first, other), "another epoch to give another order")


def check_batches_differ_by_seed(backbone: Backbone, lab: Lab) -> None:
    """Another seed gives another order."""
    data = lab.data(backbone.task)
    model = backbone.build(data, seed=0)
    require(
        not _equal(_flat(model.batches(data, BATCH, 0, 1)), _flat(model.batches(data, BATCH, 1, 1))),
        "another seed to give another order",
    )


def check_batches_cover_the_training_rows(backbone: Backbone, lab: Lab) -> None:
    """One epoch reads every training row once, and no other."""
    data = lab.data(backbone.task)
    model = backbone.build(data, seed=0)
    read = torch.cat([_pairs(backbone, batch) for batch in model.batches(data, BATCH, 0, 0)]).numpy()
    expected = np.asarray(data.train.ids)
    same("the rows of one epoch", read[np.lexsort(read.T)], expected[np.lexsort(expected.T)])


def check_batches_of_any_split(backbone: Backbone, lab: Lab) -> None:
    """One epoch of another split, or of half of one, reads each of its rows once; the training split is the default."""
    data = lab.data(backbone.task)
    model = backbone.build(data, seed=0)
    for split in (data.valid, *data.valid.halves(0), data.train.halves(0)[0]):
        read = torch.cat([_pairs(backbone, batch) for batch in model.batches(data, BATCH, 0, 0, split=split)]).numpy()
        expected = np.asarray(split.ids)
        same("the rows of one epoch of a split", read[np.lexsort(read.T)], expected[np.lexsort(expected.T)])
    named, default = (_flat(model.batches(data, BATCH, 0, 1, split=split)) for split in (data.train, None))
    require(_equal(named, default), "the training split to be read by default")


def check_loss_is_a_finite_scalar(backbone: Backbone, lab: Lab) -> None:
    """The loss of a fresh model is one finite float32 number."""
    data = lab.data(backbone.task)
    model = backbone.build(data, seed=0)
    loss = model.loss(_batch(model, data), noise(0, "exam"))
    require(loss.shape == () and loss.dtype == torch.float32, "a float32 scalar", f"{loss.dtype} {tuple(loss.shape)}")
    require(bool(torch.isfinite(loss)), "a finite loss", loss.item())


def check_gradients_are_finite(backbone: Backbone, lab: Lab) -> None:
    """Every trainable parameter gets a finite gradient, the table one that is not zero."""
    data = lab.data(backbone.task)
    model = backbone.build(data, seed=0)
    model.loss(_batch(model, data), noise(0, "exam")).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            gradient = parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
            require(bool(torch.isfinite(gradient).all()), f"a finite gradient of {name}")
    table = model.table.weight().grad
    require(table is not None and bool(table.abs().sum() > 0), "the loss to depend on the table")


def check_noise_is_the_only_randomness(backbone: Backbone, lab: Lab) -> None:
    """The loss is a function of the weights, the batch and the noise generator."""
    data = lab.data(backbone.task)
    losses = []
    for _ in range(2):
        model = backbone.build(data, seed=0)
        losses.append(model.loss(_batch(model, data), noise(0, "exam")).detach())
    same("the loss with equal noise", losses[0], losses[1])


def check_training_lowers_the_loss(backbone: Backbone, lab: Lab) -> None:
    """Twenty steps down the gradient of one batch lower its loss."""
    data = lab.data(backbone.task)
    model = backbone.build(data, seed=0)
    batch = _batch(model, data)
    steps = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(20):
        steps.zero_grad()
        loss = model.loss(batch, noise(0, "exam"))
        loss.backward()
        steps.step()
        losses.append(loss.item())
    require(losses[-1] < losses[0], f"the loss to fall from {losses[0]:.4f}", f"{losses[-1]:.4f}")


def check_batch_is_not_changed(backbone: Backbone, lab: Lab) -> None:
    """The loss does not write into its arguments."""
    data = lab.data(backbone.task)
    model = backbone.build(data, seed=0)
    batch = _batch(model, data)
    before = [tensor.clone() for tensor in batch]
    model.loss(batch, noise(0, "exam"))
    require(_equal(before, list(batch)), "the batch to be as before the loss")


def check_scores_have_one_shape(backbone: Backbone, lab: Lab) -> None:
    """Zero, one and seven rows give that many finite float32 scores."""
    model = lab.model(backbone)
    for rows in (0, 1, 7):
        scores = _scores(model, _ids(lab.data(backbone.task), rows))
        require(scores.shape == (rows,) and scores.dtype == torch.float32, f"({rows},) float32", tuple(scores.shape))
        require(bool(torch.isfinite(scores).all()), "finite scores")


def check_integer_types_agree(backbone: Backbone, lab: Lab) -> None:
    """int32 and int64 ids give the same scores."""
    model, ids = lab.model(backbone), _ids(lab.data(backbone.task), 16)
    same("scores of int32 and int64 ids", _scores(model, ids.int()), _scores(model, ids.long()))


def check_scores_are_row_by_row(backbone: Backbone, lab: Lab) -> None:
    """In evaluation a row's score does not depend on its neighbours in the batch."""
    model, ids = lab.model(backbone), _ids(lab.data(backbone.task), 12)
    alone = torch.cat([_scores(model, ids[i : i + 1]) for i in range(len(ids))])
    same("scores in a batch and alone", _scores(model, ids), alone, within=1e-5)


def check_unknown_rows_are_scored(backbone: Backbone, lab: Lab) -> None:
    """The out-of-vocabulary row of every field has a finite score."""
    schema = lab.data(backbone.task).schema
    unknown = torch.tensor([[f.stop - 1 for f in schema.fields]])
    require(bool(torch.isfinite(_scores(lab.model(backbone), unknown)).all()), "a finite score of unknown values")


def check_lowers_to_known_ops(backbone: Backbone, lab: Lab) -> None:
    """The head is data: ops of the closed list, each reading what an earlier one wrote."""
    program = lab.model(backbone).lower()
    written = {"vectors"}
    for op in program.ops:
        require(op.kind in OPS, f"an op among {', '.join(OPS)}", op.kind)
        require(set(op.inputs) <= written, f"{op.kind} to read written values", f"{set(op.inputs) - written}")
        written.add(op.output)


def check_lowered_head_agrees(backbone: Backbone, lab: Lab) -> None:
    """The numpy program gives the scores of the torch model, within 1e-4 of the largest."""
    model, data = lab.model(backbone), lab.data(backbone.task)
    ids = _ids(data, 64)
    expected = _scores(model, ids)
    came = model.lower()(_final(model)[ids].numpy())
    same("lowered scores", expected, came, within=1e-4 * max(1.0, float(expected.abs().max())))


def check_lowered_head_survives_json(backbone: Backbone, lab: Lab) -> None:
    """A program written as JSON and tensors and read back is the same program."""
    program = lab.model(backbone).lower()
    again = Program.from_json(program.to_json(), program.tensors())
    vectors = _final(lab.model(backbone))[_ids(lab.data(backbone.task), 8)].numpy()
    same("scores after a round trip of the program", program(vectors), again(vectors))


def check_lowering_changes_nothing(backbone: Backbone, lab: Lab) -> None:
    """``lower`` reads the model only."""
    model = lab.model(backbone)
    before = fingerprint(model)
    model.lower()
    require(fingerprint(model) == before, "lower() to leave the model as it was")


def check_another_table_shares_the_head(backbone: Backbone, lab: Lab) -> None:
    """``with_table`` gives the same head around another table and leaves the model alone."""
    model = lab.model(backbone)
    before = fingerprint(model)
    zeros = DenseTable(model.schema, model.table.blocks, torch.zeros_like(model.table.weight().detach()))
    other = model.with_table(zeros)
    require(other.table is zeros and model.table is not zeros, "the new table in the copy only")
    require(fingerprint(model) == before, "the model to be as before")
    heads = [{n: p for n, p in m.named_parameters() if not n.startswith("table.")} for m in (model, other)]
    require(all(heads[0][n] is heads[1][n] for n in heads[0]), "the head's parameters to be shared")


def check_state_survives(backbone: Backbone, lab: Lab) -> None:
    """The state of one model loaded into a fresh one gives the same scores."""
    model, data = lab.model(backbone), lab.data(backbone.task)
    fresh = backbone.build(data, seed=99)
    fresh.load_state_dict(copy.deepcopy(model.state_dict()))
    ids = _ids(data, 16)
    same("scores after a round trip of the state", _scores(model, ids), _scores(fresh, ids))


def check_reads_no_test_rows(backbone: Backbone, lab: Lab) -> None:
    """Building and batching touch the training split only."""
    data = lab.without_test(backbone.task)
    model = backbone.build(data, seed=0)
    _flat(itertools.islice(model.batches(data, BATCH, 0, 0), 1))


def _batch(model: Model, data: Dataset) -> tuple[Tensor, ...]:
    return next(iter(model.batches(data, BATCH, 0, 0)))


def _flat(batches: Any) -> list[Tensor]:
    return [tensor for batch in batches for tensor in batch]


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def _pairs(backbone: Backbone, batch: tuple[Tensor, ...]) -> Tensor:
    """What of a batch comes from the data: its ids, or its (user, positive item) pairs."""
    return batch[0] if backbone.task == "ctr" else batch[0][:, :2]


def _ids(data: Dataset, rows: int) -> Tensor:
    return torch.from_numpy(np.array(data.train.ids[:rows], np.int64))


@torch.no_grad()
def _final(model: Model) -> Tensor:
    """The vectors that the lowered program reads, ``(n, D)``."""
    weight = model.table.weight()
    return (model.propagate(weight) if isinstance(model, RankingModel) else weight).detach()


@torch.no_grad()
def _scores(model: Model, ids: Tensor) -> Tensor:
    """Scores of rows of ids, ``(B,)``, in evaluation mode."""
    if isinstance(model, RankingModel):
        final = _final(model)
        users, items = final[ids[:, 0].long()], final[ids[:, 1].long()]
        return model.scores(users, items).diagonal()
    require(isinstance(model, ClickModel), "a ClickModel or a RankingModel", type(model).__name__)
    return model(ids)  # type: ignore[operator]
