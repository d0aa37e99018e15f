"""The training rows of a data set as games, and their Shapley values as ranking keys.

Click models and baked ranking models look up a few rows per sample: one game per sample
(:func:`~pocketrec.attribution.scores.attribute`). A ranking model that propagates its table reads all of it for every
sample: one game per batch, whose players are all entries of the table (:func:`attribute_propagated`). What a ranking
model would recommend is a single game over the whole table, solved in closed form (:func:`attribute_lists`).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from pocketrec.attribution.estimators import Stream
from pocketrec.attribution.samples import RankingSamples
from pocketrec.attribution.scores import Scores, ScoreSums
from pocketrec.data.dataset import Split
from pocketrec.errors import UnsupportedOp
from pocketrec.evaluation.full_ranking import product_weight
from pocketrec.evaluation.metrics import to_csr
from pocketrec.models.backbone import RankingModel
from pocketrec.native import topk
from pocketrec.training.steps import Checkpoint


def attribute_propagated(
    model: RankingModel,
    fill: Tensor,
    samples: RankingSamples,
    *,
    masks: int,
    seed: int = 0,
    batch_size: int = 1 << 18,
    checkpoint: Checkpoint | None = None,
) -> Scores:
    """Owen estimates for a table that is propagated: each game is one batch, its players all entries of the table.

    ``phi = (W - C) * mean_k [g(z_k) + g(1 - z_k)] / 2`` with ``z_k ~ Bernoulli(q_k)`` and ``g(z)`` the gradient,
    through the propagation, of minus the BPR loss at ``C + z (W - C)``; the ``q_k`` are stratified over (0, 1/2). Each
    mask meets the next ``batch_size`` pairs.

    Args:
        model: Propagates the table.
        fill: Placeholder per field, ``(2, D)``.
        samples: Training pairs.
        masks: Antithetic pairs of masks, at least 1.
        seed: Root of all draws.
        batch_size: Pairs per mask.
        checkpoint: State of an interrupted run, and where to keep it.
    """
    weight = model.table.weight().detach()
    placeholder = fill[torch.from_numpy(model.schema.field_of_row.astype(np.int64))]
    difference = weight - placeholder
    stream = Stream(seed, "table masks")
    tally = ScoreSums((weight.shape[0], weight.shape[1]), checkpoint)
    per_pass = -(-len(samples) // batch_size)
    for mask in range(tally.samples, masks):
        start = mask % per_pass * batch_size
        rows = samples.batch(start, min(start + batch_size, len(samples)), mask // per_pass).rows
        coalition = _coalition(stream, mask, masks, weight.shape)
        full, empty = -_bpr(model.propagate(weight), rows), -_bpr(model.propagate(placeholder), rows)
        gradient = _table_gradient(model, placeholder + difference * coalition, rows)
        gradient += _table_gradient(model, weight - difference * coalition, rows)
        values = gradient.mul_(difference).div_(2)
        tally.audit += [values.sum().item(), (full - empty).item(), 1]
        tally.add_table(values)
        tally.save()
    return tally.scores()


def _coalition(stream: Stream, mask: int, masks: int, shape: torch.Size) -> Tensor:
    """Bernoulli(q) per entry, ``q`` from the mask's stratum of (0, 1/2)."""
    bits = stream.shorts(mask, 1, shape.numel() + 1)[0]
    uniform = (int(bits[0]) + 2**15 + 0.5) / 2**16
    threshold = round((mask + uniform) / (2 * masks) * 2**16) - 2**15
    return (bits[1:] < threshold).view(shape)


@torch.no_grad()
def _bpr(final: Tensor, rows: Tensor) -> Tensor:
    """Mean BPR loss of triples ``(B, 3)``."""
    user, positive, negative = (final[rows[:, i]] for i in range(3))
    return functional.softplus((user * (negative - positive)).sum(dim=1)).mean()


def _table_gradient(model: RankingModel, weight: Tensor, rows: Tensor) -> Tensor:
    """Gradient of minus the mean BPR loss with respect to the table, ``(n, D)``."""
    weight = weight.requires_grad_()
    with torch.enable_grad():
        final = model.propagate(weight)
    slope = torch.zeros_like(final)
    values = final.detach()
    user, positive, negative = (values[rows[:, i]] for i in range(3))
    share = torch.sigmoid((user * (negative - positive)).sum(dim=1, keepdim=True)) / len(rows)
    slope.index_add_(0, rows[:, 0], (positive - negative).mul_(share))
    user.mul_(share)
    slope.index_add_(0, rows[:, 1], user)
    slope.index_add_(0, rows[:, 2], user, alpha=-1)
    return torch.autograd.grad(final, weight, slope)[0]


def attribute_lists(model: RankingModel, fill: Tensor, split: Split, *, top: int, balance: float = 0.0) -> Scores:
    """Shapley values of one game: the scores that a table gives to what the dense table would recommend.

    ``v(S) = mean over users u and their top items i of s_ui(S) / n_i^balance``, with ``n_i`` the number of lists that
    hold item ``i``; training items are left out. Inner products of linearly propagated rows are quadratic in the
    table, and for a quadratic game the gradient at the centre is exact::

        phi = (W - C) * grad v((W + C) / 2)

    so that one propagation and its gradient score every entry, without sampling.

    Args:
        model: Scores by inner products, weighted or not.
        fill: Placeholder per field, ``(2, D)``.
        split: Training pairs.
        top: Length of a list, at least 1.
        balance: What a popular item counts less in each list, at least 0.

    Raises:
        UnsupportedOp: The head is not an inner product.
    """
    product = product_weight(model.lower())
    if product is None:
        raise UnsupportedOp("Lists are scored by inner products, but this head is another; set `top=0`.")
    gains = torch.from_numpy(np.array(product))
    users = model.schema.fields[0].size
    weight = model.table.weight().detach()
    placeholder = fill[torch.from_numpy(model.schema.field_of_row.astype(np.int64))]
    lists, shares = _lists(model.propagate(weight), gains, split, top, balance)

    def value(table: Tensor) -> Tensor:
        final = model.propagate(table)
        wanted = functional.embedding_bag(lists, final[users:], mode="sum", per_sample_weights=shares)
        return (final[:users] * gains * wanted).sum()

    centre = ((weight + placeholder) / 2).requires_grad_()
    values = (weight - placeholder).mul_(torch.autograd.grad(value(centre), centre)[0])
    with torch.no_grad():
        drop = value(weight) - value(placeholder)
    return Scores(values.numpy(), values.square().numpy(), lists.numel(), values.sum().item(), drop.item())


def _lists(final: Tensor, gains: Tensor, split: Split, top: int, balance: float) -> tuple[Tensor, Tensor]:
    """Local ids of each user's best unseen items ``(U, top)``, and what each counts; ranks without an item count 0."""
    users, items = split.dataset.schema.fields
    liking, offered = (final[: users.size] * gains).numpy(), final[users.size :].numpy()
    pairs = np.asarray(split.ids)
    seen = to_csr(pairs[:, 0], pairs[:, 1] - items.offset, users.size)
    threads = torch.get_num_threads()
    found, _ = topk.topk(liking, offered, *seen, top, threads=threads)
    there, lists = found >= 0, np.maximum(found, 0).astype(np.int64)
    frequency = np.maximum(np.bincount(lists[there], minlength=items.size), 1).astype(np.float32)
    shares = np.where(there, frequency[lists] ** np.float32(-balance), np.float32(0)) / np.float32(lists.size)
    return torch.from_numpy(lists), torch.from_numpy(shares)
