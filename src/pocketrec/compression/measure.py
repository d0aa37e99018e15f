"""Quality and cost of a file, or of a trained model as the reference: what is exported is what is measured.

A file is read as a device reads it: ids are resolved through the file's own vocabulary, vectors come from its packed
table, logits from its head. Scores are streamed in batches; a split is never held in memory but for its scores.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pocketrec import registry, runtime, settings
from pocketrec.errors import ArtifactError, ConfigError, DataError, UnsupportedOp
from pocketrec.evaluation.beyond_accuracy import beyond
from pocketrec.evaluation.full_ranking import AllPairs
from pocketrec.evaluation.metrics import Csr, Ranking, auc, logloss, ranking, to_csr
from pocketrec.format.artifact import Artifact
from pocketrec.format.program import Program

if TYPE_CHECKING:
    from pocketrec.data.dataset import Dataset, Split
    from pocketrec.models.backbone import Backbone, Model

BATCH = 4096
"""Rows per batch of a stream."""

CALLS = 1000
"""Timed calls per latency figure."""

Ids = NDArray[np.int32]
Floats = NDArray[np.float32]
Ledger = Callable[..., None]
"""Takes the fields of one record as keywords, for instance ``Run.ledger``."""


@dataclass(frozen=True)
class Measurement:
    """What came out.

    Attributes:
        quality: ``auc`` and ``logloss``, or ``ndcg@k``, ``recall@k`` and ``recall_capped@k``; ``None`` where undefined.
        bytes: the file and its parts, which sum to ``file``; ``graph`` on top where the data set's graph is needed.
        latency_us: per batch size, median ``p50`` and ``p99`` of ``calls`` timed calls, in microseconds; ``threads``
            are those of look-ups, while matrix products run on as many as numpy or torch are set to.
        digest: SHA-256 that names what was measured.
        logits: ``(N,)`` per row of the split, where predictions were asked for.
        ranking: figures per user, for ranking data.
        beyond: what the lists are like beyond accuracy, for ranking data; see
            :mod:`pocketrec.evaluation.beyond_accuracy`.
    """

    quality: Mapping[str, float | None]
    bytes: Mapping[str, int]
    latency_us: Mapping[str, Mapping[str, float]]
    digest: str
    logits: Floats | None = None
    ranking: Ranking | None = None
    beyond: Mapping[str, float | None] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The document of ``pocketrec measure --json``."""
        latency = {batch: dict(figures) for batch, figures in self.latency_us.items()}
        more = {"beyond": dict(self.beyond)} if self.beyond else {}
        return {"quality": dict(self.quality), **more, "bytes": dict(self.bytes), "latency_us": latency}


def measure(
    target: str | Path | Model,
    split: Split,
    *,
    k: int = 20,
    threads: int = 1,
    ledger: Ledger | None = None,
    latency: bool = True,
    predictions: bool = False,
    mask_valid: bool = False,
) -> Measurement:
    """Quality, bytes and latency of an artifact file or of a trained model on one split.

    Args:
        target: path of an artifact, every byte of which is verified first, or a model in memory.
        split: rows to score (click data), or the interactions to find (ranking data).
        k: length of a recommendation list, at least 1.
        threads: threads of look-ups and ranking, at least 1.
        ledger: told of every read of a test split, before it happens.
        latency: time the target too.
        predictions: keep the logit of every row.
        mask_valid: also leave validation items out of the lists; the published protocol leaves out training items only.

    Raises:
        ArtifactError: the file is damaged or not an artifact.
        ConfigError: ``k`` or ``threads`` is below 1.
        DataError: the split is empty, or its fields are not those of the target.

    Example:
        >>> measure("deepfm.safetensors", data.test).quality  # doctest: +SKIP
        {'auc': 0.8072, 'logloss': 0.5241}
    """
    if k < 1 or threads < 1:
        raise ConfigError(f"`k` and `threads` must be at least 1, but got k={k}, threads={threads}.")
    if not len(split):
        raise DataError(f"The {split.name} split has no rows; measure another split, or encode with one.")
    subject = _subject(target, split.dataset, threads)
    if ledger is not None and split.name == "test":
        ledger(reader="measure", digest=subject.digest, data=split.dataset.digest, split=split.name, rows=len(split))
    if split.dataset.schema.task == "ctr":
        return _measure_clicks(subject, split, threads, latency=latency, predictions=predictions)
    return _measure_ranking(subject, split, k, threads, latency=latency, mask_valid=mask_valid)


@dataclass(frozen=True)
class _Subject:
    """One target, opened: click models have ``logits`` and ``score``, ranking models ``pairs``.

    Attributes:
        digest: names the contents.
        bytes: of the file and its parts.
        logits: ids ``(B, F)`` -> ``(B,)``; equal rows get equal logits wherever they stand, so ties stay ties.
        score: the same as fast as the target can, to be timed.
        pairs: the head, and final vectors ``(U, d), (I, d)``.
    """

    digest: str
    bytes: Mapping[str, int]
    logits: Callable[[Ids], Floats]
    score: Callable[[Ids], Floats]
    pairs: Callable[[], tuple[Program, Floats, Floats]]


def _measure_clicks(subject: _Subject, split: Split, threads: int, *, latency: bool, predictions: bool) -> Measurement:
    """AUC and log-loss of all rows at once, from streamed logits."""
    labels = split.labels
    if labels is None:
        raise DataError("Click data needs labels, but the split has none; encode it with a label column.")
    logits = np.concatenate([subject.logits(ids) for ids in _batches(split.ids)])
    quality = {"auc": auc(labels, logits), "logloss": logloss(labels, logits)}
    timed: dict[str, dict[str, float]] = {}
    if latency:
        sample = next(_batches(split.ids))
        for size in (1, 64):
            wrapped = [sample.take(range(i, i + size), 0, mode="wrap") for i in range(CALLS)]
            timed[f"batch_{size}"] = _time(lambda i, batches=wrapped: subject.score(batches[i]), threads)
    return Measurement(quality, subject.bytes, timed, subject.digest, logits=logits if predictions else None)


def _measure_ranking(
    subject: _Subject, split: Split, k: int, threads: int, *, latency: bool, mask_valid: bool
) -> Measurement:
    """Full ranking of all items for every user of the split."""
    head, users, items = subject.pairs()
    data = split.dataset
    hidden = [data.train, data.valid] if mask_valid and split.name == "test" else [data.train]
    seen = interactions(*hidden)
    truth = interactions(split)
    result = ranking(users, items, seen, truth, k, head=head, threads=threads)
    lists = beyond(result.lists, interactions(data.train), truth, len(items))
    timed: dict[str, dict[str, float]] = {}
    if latency:
        pairs = AllPairs(head, users, items)
        timed["batch_1"] = _time(lambda i: _recommend(pairs, i % len(users), k), threads)
    return Measurement(result.quality(), subject.bytes, timed, subject.digest, ranking=result, beyond=lists)


def _recommend(pairs: AllPairs, user: int, k: int) -> NDArray[np.int64]:
    """Positions of the best ``k`` items for one user, as a device would find them."""
    scores = pairs.scores(np.array([user]))[0]
    return np.argpartition(-scores, min(k, len(scores)) - 1)[:k]


def interactions(*splits: Split) -> Csr:
    """The items of each user in the splits of one ranking data set, as a CSR pattern of local item ids."""
    users, items = splits[0].dataset.schema.fields
    pairs = np.concatenate([np.asarray(s.ids) for s in splits])
    return to_csr(pairs[:, 0], pairs[:, 1] - items.offset, users.size)


def _batches(ids: Ids) -> Iterator[Ids]:
    for start in range(0, len(ids), BATCH):
        yield np.array(ids[start : start + BATCH])


def _time(call: Callable[[int], object], threads: int) -> dict[str, float]:
    """Microseconds per call: median and 99th percentile of ``CALLS`` calls after a tenth of them as warm-up."""
    for i in range(CALLS // 10):
        call(i)
    nanoseconds = np.empty(CALLS)
    for i in range(CALLS):
        start = time.perf_counter_ns()
        call(i)
        nanoseconds[i] = time.perf_counter_ns() - start
    p50, p99 = np.quantile(nanoseconds, (0.5, 0.99)) / 1000
    return {"p50": round(float(p50), 3), "p99": round(float(p99), 3), "calls": CALLS, "threads": threads}


def _subject(target: str | Path | Model, data: Dataset, threads: int) -> _Subject:
    if isinstance(target, str | Path):
        return _file_subject(runtime.open(target), data, threads)
    return _model_subject(target, data)


# ---- files -----------------------------------------------------------------------------------------------------------


def _file_subject(recommender: runtime.Recommender, data: Dataset, threads: int) -> _Subject:
    """A file, every byte of it verified, and how the data set's ids read it."""
    artifact = recommender.artifact
    artifact.verify()
    rows = artifact.vocabulary.file_rows(data.hashes, data.schema)

    fields = np.arange(data.schema.width)

    def logits(ids: Ids) -> Floats:
        exact: Any = artifact.packed.lookup(rows[ids], fields, threads=threads).astype(np.float64)
        return artifact.program(exact).astype(np.float32)

    def score(ids: Ids) -> Floats:
        return recommender.logits(rows[ids])

    def pairs() -> tuple[Program, Floats, Floats]:
        parts = [rows[f.offset : f.stop, None] for f in data.schema.fields]
        found = [artifact.packed.lookup(part, np.array([i]), threads=threads)[:, 0] for i, part in enumerate(parts)]
        table = np.concatenate(found)
        final = _propagate(artifact, data, table) if artifact.kind == "ego" else table
        return artifact.program, *_split_vectors(final, data)

    graph = {"graph": _graph_bytes(data)} if artifact.kind == "ego" else {}
    return _Subject(artifact.digest, {**artifact.sizes(), **graph}, logits, score, pairs)


def _propagate(artifact: Artifact, data: Dataset, table: Floats) -> Floats:
    """Final vectors of an ego file: its backbone is rebuilt, the graph comes from the data set."""
    import torch

    from pocketrec.models.backbone import RankingModel

    model = _backbone(artifact.info).build(data, 0)
    if not isinstance(model, RankingModel):
        raise ArtifactError("An ego file must name a ranking backbone, but this one does not; compress it again.")
    with torch.inference_mode():
        return model.propagate(torch.from_numpy(table)).numpy()


def _backbone(info: Mapping[str, Any]) -> Backbone:
    """The backbone that a file's ``info`` names."""
    try:
        name, config = info["backbone"]["name"], dict(info["backbone"]["config"])
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError("An ego file must name its backbone, but this one does not; compress it again.") from error
    return settings.from_json(registry.load("backbones", name), config)


def _graph_bytes(data: Dataset) -> int:
    """Bytes of the training interactions as a symmetric adjacency: int32 columns and row pointers, fp32 row scales."""
    return 4 * (2 * len(data.train) + 2 * data.schema.rows + 1)


# ---- models ----------------------------------------------------------------------------------------------------------


def _model_subject(model: Model, data: Dataset) -> _Subject:
    """A trained model in memory: the dense reference."""
    import torch

    from pocketrec.models.backbone import ClickModel, RankingModel

    def logits(ids: Ids) -> Floats:
        if not isinstance(model, ClickModel):
            raise UnsupportedOp("Click data needs a click model, but this one ranks.")
        with torch.inference_mode():
            return model(torch.from_numpy(ids)).numpy()

    def pairs() -> tuple[Program, Floats, Floats]:
        if not isinstance(model, RankingModel):
            raise UnsupportedOp("Ranking data needs a ranking model, but this one predicts clicks.")
        with torch.inference_mode():
            final = model.propagate(model.table.weight()).numpy()
        return model.lower(), *_split_vectors(final, data)

    return _Subject(_model_digest(model), _model_bytes(model), logits, logits, pairs)


def _model_digest(model: Model) -> str:
    """SHA-256 over the names and values of all weights."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        hasher.update(name.encode())
        hasher.update(np.ascontiguousarray(tensor.detach().cpu().numpy()).data)
    return hasher.hexdigest()


def _model_bytes(model: Model) -> dict[str, int]:
    """Bytes that the model would take as a file without vocabulary; a dense table counts as plain fp32."""
    from pocketrec.models.table import DenseTable

    table = model.table
    size = table.schema.rows * table.width * 4 if isinstance(table, DenseTable) else table.pack().size_bytes
    head = sum(t.nbytes for t in model.lower().tensors().values())
    return {"file": size + head, "table": size, "vocabulary": 0, "head": head, "header": 0}


def _split_vectors(table: Floats, data: Dataset) -> tuple[Floats, Floats]:
    users, items = data.schema.fields
    return table[: users.size], table[items.offset : items.stop]
