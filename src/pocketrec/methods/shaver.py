"""Shaver: single-shot pruning by Shapley attribution, for any budget."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from pocketrec import settings
from pocketrec.attribution.estimators import LevelSampling, Owen, Permutation
from pocketrec.attribution.games import ClickGame, RankingGame
from pocketrec.attribution.lowered import LoweredHead, Precision
from pocketrec.attribution.samples import ClickSamples, RankingSamples, training_rows
from pocketrec.attribution.scores import Score, Scores, Scoring, ranking_keys
from pocketrec.attribution.whole_table import attribute_lists, attribute_propagated
from pocketrec.compression.ladder import Finished, Ladder, Method, Model, Run
from pocketrec.errors import ConfigError
from pocketrec.evaluation.full_ranking import product_weight
from pocketrec.families.pruning import Dataset, Fill, PrunedTable, PruningLadder, fill_rows
from pocketrec.families.sharing import BlockSharing
from pocketrec.models.backbone import ClickModel, RankingModel
from pocketrec.training.loop import fingerprint
from pocketrec.training.steps import Arrays, Checkpoint


@dataclass(frozen=True)
class Shaver(Method):
    """Keep the entries that the loss would miss most, judged by their Shapley values over the training rows.

    One scoring run per model, fill and estimator serves every budget, score and exponent. Nothing is retrained unless
    ``tune`` asks for it.

    Args:
        fill: What removed entries read, and the placeholder of the game: the frequency-weighted field mean
            (``codebook``), the ``plain`` mean, ``zero``.
        score: Ranking score: ``abs`` of the mean value, ``rms``, ``geo`` (their geometric mean), ``signed``.
        exponent: The score is divided by the row's training count to this power.
        estimator: ``owen`` (a few gradients per sample) or ``permutation`` (unbiased, much slower).
        draws: Antithetic pairs per sample, at least 1.
        levels: Of the Owen gradients: ``uniform``, ``centre``, or ``anchored`` (most accurate, dearest).
        samples: Training rows to score in a pass, at most; by default all.
        passes: Most passes over them; fewer once the stop rule holds.
        tolerance: Stop after a pass once the largest standard error is below this share of the range of values.
        top: For ranking by inner products, the game: the scores of each user's ``top`` items by the dense model, exact
            and without sampling; 0, and other heads, play for the BPR loss of training pairs.
        balance: Of that game, where the table is propagated: an item counts by its frequency in the lists to this
            power less.
        ego_exponent: As ``exponent``, for that game through the propagation.
        baked_exponent: As ``exponent``, for that game on baked vectors.
        masks: Antithetic pairs of table masks, for the BPR loss of ranking models that propagate their table.
        batch_size: Samples at once.
        precision: Of the matrix products while scoring, ``fp32`` or ``bf16``.
        shards: Parts of each pass that are scored and kept on their own, so that helpers of the run can share them, and
            added up in order: the sums depend on how many there are, by rounding only, and on nothing else. What is
            scored in one game, lists and tables that are propagated, is not parted.
        scope: ``joint`` ranks all counted blocks together, ``block`` prunes each to the same share.
        tune: Train on with the mask fixed and the head frozen: ``none``, the ``table``, or table and ``codebook``.

    Example:
        >>> Shaver(fill="zero", score="rms").estimator
        'owen'

    Reference:
        Tran et al., "On-device content-based recommendation with single-shot embedding pruning: a cooperative game
        perspective" (Shaver), 2024. Departures: training rows only; Owen gradients instead of one permutation.
    """

    name: ClassVar[str] = "shaver"
    bounds: ClassVar = {
        "draws": 1, "passes": 1, "masks": 1, "batch_size": 1, "shards": 1, "samples": 1, "top": 0, "balance": 0,
        "tolerance": 0,
    }  # fmt: skip

    fill: Fill = "codebook"
    score: Score = "geo"
    exponent: float = 0.25
    estimator: Literal["owen", "permutation"] = "owen"
    draws: int = 1
    levels: LevelSampling = "uniform"
    samples: int | None = None
    passes: int = 1
    tolerance: float = 0.01
    top: int = 10
    balance: float = 0.5
    ego_exponent: float = -0.5
    baked_exponent: float = 0.3
    masks: int = 32
    batch_size: int = 1024
    precision: Precision = "fp32"
    shards: int = 1
    scope: BlockSharing = "joint"
    tune: Literal["none", "table", "codebook"] = "none"

    def check(self) -> None:
        """Exponents are finite."""
        for name in ("exponent", "ego_exponent", "baked_exponent"):
            if not np.isfinite(value := getattr(self, name)):
                raise ConfigError(f"`{name}` must be finite, but got {name}={value}.")

    def prepare(self, model: Model, data: Dataset, run: Run) -> Ladder:
        """Score once; the run keeps the score tables."""
        _, fill = self._filled(model, data)
        scores = self.scores(model, data, run)
        keys = ranking_keys(scores, data.counts, self.score, self._exponent(model))
        ladder = PruningLadder(model.table, keys, fill.numpy(), data.counts, self.scope)
        if self.tune == "none":
            return ladder
        return Finished(ladder, lambda draft, room: tuned(draft, data, run, codebook=self.tune == "codebook"))

    def scores(self, model: Model, data: Dataset, run: Run) -> Scores:
        """Shapley values of every entry: computed at most once per run, model, data set and scoring settings."""
        if self.shards > 1 and not self._in_one_game(model):
            scores = self._merged(model, data, run)
        else:
            key = {"model": fingerprint(model), "data": data.digest, **self._scoring(model)}
            stored = run.once("shapley", key, lambda checkpoint: self._attribute(model, data, run, checkpoint))
            scores = Scores.from_arrays(stored)
        run.log(stage="shapley", samples=scores.samples, efficiency_gap=scores.gap)
        run.progress("shapley", scores.samples, scores.samples, {"efficiency gap": scores.gap})
        return scores

    def _filled(self, model: Model, data: Dataset) -> tuple[Tensor, Tensor]:
        """The matrix ``(n, D)``, and what its removed entries read, ``(F, D)``."""
        weight = model.table.weight().detach()
        return weight, torch.from_numpy(fill_rows(self.fill, weight.numpy(), data.schema, data.counts))

    def _scoring(self, model: Model) -> dict[str, Any]:
        """The settings that the score tables depend on; ranking and tuning come later."""
        if self._plays_lists(model):
            own = replace(Shaver(), fill=self.fill, top=self.top, balance=self._balance(model))
            return {"game": "lists", **settings.key(own)}
        scored = ("fill", "estimator", "draws", "levels", "samples", "passes", "tolerance", "masks", "batch_size")
        own = replace(Shaver(), **{n: getattr(self, n) for n in (*scored, "precision")})
        return {"game": "samples", **settings.key(own)}

    def _plays_lists(self, model: Model) -> TypeGuard[RankingModel]:
        return self.top > 0 and isinstance(model, RankingModel) and product_weight(model.lower()) is not None

    def _in_one_game(self, model: Model) -> TypeGuard[RankingModel]:
        return self._plays_lists(model) or _propagates(model)

    def _exponent(self, model: Model) -> float:
        if not self._plays_lists(model):
            return self.exponent
        return self.ego_exponent if _propagates(model) else self.baked_exponent

    def _balance(self, model: RankingModel) -> float:
        return self.balance if model.propagates else 0.0

    def _attribute(self, model: Model, data: Dataset, run: Run, checkpoint: Checkpoint) -> Arrays:
        if not self._in_one_game(model):
            return self._games(model, data, run.seed).scores(self.passes, self.tolerance, checkpoint).arrays()
        split, (_, fill) = training_rows(data.train), self._filled(model, data)
        if self._plays_lists(model):
            return attribute_lists(model, fill, split, top=self.top, balance=self._balance(model)).arrays()
        pairs = RankingSamples(split, self.samples, run.seed)
        return attribute_propagated(model, fill, pairs, masks=self.masks, seed=run.seed, checkpoint=checkpoint).arrays()

    def _games(self, model: Model, data: Dataset, seed: int) -> Scoring:
        """One game per training sample."""
        weight, fill = self._filled(model, data)
        clicks = isinstance(model, ClickModel)
        head = LoweredHead.of(model.lower(), self.precision)
        samples = ClickSamples if clicks else RankingSamples
        return Scoring(
            ClickGame(head) if clicks else RankingGame(head),
            weight,
            fill,
            samples(training_rows(data.train), self.samples, seed),
            Owen(self.draws, self.levels) if self.estimator == "owen" else Permutation(self.draws),
            seed,
            self.batch_size,
        )

    def _merged(self, model: Model, data: Dataset, run: Run) -> Scores:
        """The scores from shards, each a step of the run."""
        once = {n: v for n, v in self._scoring(model).items() if n not in ("passes", "tolerance")}
        key = {"model": fingerprint(model), "data": data.digest, **once}

        def shards(pass_index: int) -> list[Arrays]:
            keys = [{**key, "pass": pass_index, "shard": [i, self.shards]} for i in range(self.shards)]
            return run.map("shapley", keys, partial(self._shard, model, data, run.seed))

        return self._games(model, data, run.seed).merged(shards, self.passes, self.tolerance)

    def _shard(self, model: Model, data: Dataset, seed: int, key: Any, checkpoint: Checkpoint) -> Arrays:
        """The sums of one shard of a pass."""
        index, shards = key["shard"]
        return self._games(model, data, seed).shard(key["pass"], index, shards, checkpoint).arrays()


def _propagates(model: Model) -> TypeGuard[RankingModel]:
    return isinstance(model, RankingModel) and model.propagates


def tuned(model: Model, data: Dataset, run: Run, *, codebook: bool) -> Model:
    """The model around its pruned table, trained on: the mask stays, the head is frozen, early stopping on validation.

    Args:
        model: Around the table to tune; it is left as it is.
        data: Training and validation rows.
        run: Keeps the tuned table.
        codebook: Whether the fill rows are trained, too.
    """
    table = model.table
    if not isinstance(table, PrunedTable):
        raise ConfigError(f"Tuning needs a pruned table, but got {type(table).__name__}.")
    base = nn.Parameter(table.base.detach().clone())
    fill = nn.Parameter(table.fill.detach().clone()) if codebook else table.fill
    start = PrunedTable(table.schema, table.blocks, base, table.keep, fill, table.absent)
    trainable = deepcopy(model.with_table(start))
    for name, parameter in trainable.named_parameters():
        parameter.requires_grad_(name.startswith("table."))
    fitted = run.fit("tune", trainable, data).table
    learned = {name: parameter.detach() for name, parameter in fitted.named_parameters()}
    fill = learned.get("fill", table.fill)
    return model.with_table(
        PrunedTable.from_counts(table.schema, table.blocks, learned["base"], table.keep, fill, data.counts)
    )
