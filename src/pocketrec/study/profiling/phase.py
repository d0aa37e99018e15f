"""One phase of a model's life in a process of its own: the time that it takes, and what its memory is made of.

``python -m pocketrec.study.profiling.phase FILE`` does the :class:`Workload` in a JSON file and prints its findings as
JSON. Memory is what Linux counts as resident: private pages, and those pages of mapped files that were touched.

``packages``
    The interpreter and the libraries that the phase imports.
``vocabulary``
    What it takes to resolve raw values on top of that: the file's own vocabulary, or one of every row of the data set;
    for phases that train or search, which read encoded ids, the opened data set.
``model``
    Table, head and graph, ready to be used.
``runtime``
    The peak above all that while the phase runs: activations, gradients, moments, scores, rows that are read.
``total``
    Their sum: the peak.

What it took to get ready (a replayed compression, buffers of reading) is freed and handed back before the phase runs,
and the kernel's high-water mark starts anew there; where the kernel refuses that, ``runtime`` includes it. A file is
checked in chunks of 1 MiB as it is read: what shares a chunk counts with what is read first. Torch-free until a phase
needs torch: the runtime's phases never do, which is checked.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from pocketrec import registry, settings
from pocketrec.errors import ConfigError, PocketRecError, UnsupportedOp
from pocketrec.format.arrays import open_arrays
from pocketrec.native import topk
from pocketrec.study.profiling.memory import reset, resident
from pocketrec.study.profiling.stopwatch import Stopwatch, Timing, nothing, timed

if TYPE_CHECKING:
    from pocketrec.compression.budget import Room
    from pocketrec.compression.ladder import Ladder, Method
    from pocketrec.compression.small import Small
    from pocketrec.data.dataset import Dataset
    from pocketrec.evaluation.full_ranking import AllPairs
    from pocketrec.format.artifact import Artifact
    from pocketrec.models.backbone import Backbone, Model
    from pocketrec.training.loop import Training

LIST = 20
"""Length of a recommendation list."""


@dataclass(frozen=True)
class Workload:
    """What to time; a JSON document says all of it.

    Attributes:
        kind: which of the functions below does it.
        phase: what it is called in the records.
        data: folder of the encoded data set.
        backbone: ``name`` and ``config``.
        training: stages of the uncompressed model, empty for the initial weights; and of a method that trains, empty
            for the defaults of the task.
        method: name and settings, or ``None`` for the uncompressed model.
        budget: of the method.
        seed: of model and method.
        threads: of torch, matrix products and look-ups.
        repeats: timed calls, or steps of a training at least.
        store: of trained models and finished steps.
        device: where torch works.
        batch: rows of a call or a step; ``None`` where all rows are meant.
        share: of an epoch's steps that are timed.
        form: of the table, one of its ``forms``.
        file: a written file.
        rows: arrays of the file rows to look up.
    """

    kind: str
    phase: str
    data: str
    backbone: dict[str, Any]
    training: list[dict[str, Any]]
    method: dict[str, Any] | None
    budget: str
    seed: int
    threads: int
    repeats: int
    store: str
    device: str = "cpu"
    batch: int | None = None
    share: float = 1.0
    form: str = ""
    file: str = ""
    rows: str = ""


class Memory:
    """Resident memory of this process, part by part, in MiB."""

    def __init__(self) -> None:
        self._parts: dict[str, float] = {}
        self._level = 0.0
        self._held: list[object] = []

    def mark(self, part: str, *held: object) -> None:
        """What came since the last mark is ``part``; freed memory is handed back first, ``held`` stays to the end."""
        self._held.extend(held)
        gc.collect()
        if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
            trim(0)
        now = max(self._level, resident("VmRSS"))
        self._parts[part], self._level = now - self._level, now
        reset()

    def parts(self) -> dict[str, float]:
        """All parts; the peak since the last mark is run time."""
        peak = max(self._level, resident("VmHWM"))
        return {**self._parts, "runtime": peak - self._level, "total": peak}


class Phase(Protocol):
    """Does a task; marks ``packages``, ``vocabulary`` and ``model`` on the way."""

    def __call__(self, task: Workload, memory: Memory) -> list[Timing]:
        """Records of what was timed."""
        ...


# ---- training and searching ------------------------------------------------------------------------------------------


def _train(task: Workload, memory: Memory) -> list[Timing]:
    """Steps of the uncompressed model's training."""
    data, run = _ready(task, memory)
    model = _backbone(task).build(data, task.seed).to(task.device)
    memory.mark("model")
    with run.timing():
        run.fit("original", model, data, _training(task.training))
    return run.records(task.phase)


def _search(task: Workload, memory: Memory) -> list[Timing]:
    """Prepare a method and size its table."""
    data, run = _ready(task, memory)
    model, method = _start(task, data, run), _method(task)
    memory.mark("model")
    with run.timing():
        _sized(task, model, data, method, run)
    return run.records(task.phase)


def _finish(task: Workload, memory: Memory) -> list[Timing]:
    """Train the table of the right size."""
    data, run = _ready(task, memory)
    ladder, (small, room) = _sized(task, _start(task, data, run), data, _method(task), run)
    memory.mark("model")
    with run.timing():
        ladder.finish(small.model, room)
    return run.records(task.phase)


def _ready(task: Workload, memory: Memory) -> tuple[Dataset, Stopwatch]:
    """The opened data set, and a run that times."""
    from pocketrec.compression import compress  # noqa: F401
    from pocketrec.data.dataset import Dataset
    from pocketrec.training import loop  # noqa: F401

    settle = _settle(task)
    _rehearse(training=True)
    run = Stopwatch(
        seed=task.seed,
        threads=task.threads,
        device=task.device,
        store=task.store,
        batch=task.batch,
        share=task.share,
        least=task.repeats,
        settle=settle,
        training=_training(task.training),
    )
    memory.mark("packages")
    data = Dataset.open(task.data)
    memory.mark("vocabulary")
    return data, run


def _sized(
    task: Workload, model: Model, data: Dataset, method: Method, run: Stopwatch
) -> tuple[Ladder, tuple[Small, Room]]:
    """The ladder of a method, and the table of the right size with its room."""
    from pocketrec.compression.budget import Budget
    from pocketrec.compression.compress import sized
    from pocketrec.compression.small import Small

    budget = Budget.parse(task.budget)
    ladder = method.prepare(model, data, run)
    return ladder, sized(ladder, Small(model, data, method, budget, budget.storage))


# ---- inference with torch --------------------------------------------------------------------------------------------


def _build(task: Workload, memory: Memory) -> list[Timing]:
    """Bring the table into another form, a cache for instance."""
    _, model = _loaded(task, memory)
    memory.mark("model")
    return [timed(task.phase, lambda i: model.table.form(task.form), task.repeats, _settle(task))]


def _infer(task: Workload, memory: Memory) -> list[Timing]:
    """Logits of a prepared batch, or the final vectors of all users and items."""
    import torch

    data, model = _loaded(task, memory)
    model = model.with_table(model.table.form(task.form))
    memory.mark("model")
    with torch.inference_mode():
        return [timed(task.phase, _forward(task, model, data), task.repeats, _settle(task))]


def _forward(task: Workload, model: Any, data: Dataset) -> Callable[[int], object]:
    """One call of the model."""
    import torch

    if task.batch is None:
        return lambda i: model.propagate(model.table.weight())
    batches = torch.from_numpy(prepared(data, task.batch, task.repeats)).to(task.device)
    return lambda i: model(batches[i])


def prepared(data: Dataset, batch: int, repeats: int) -> NDArray[np.int32]:
    """Ids of ``repeats`` different batches ``(repeats, batch, F)``, of rows outside the test split."""
    ids = (data.valid if len(data.valid) else data.train).ids
    return np.take(ids, range(batch * repeats), axis=0, mode="wrap").reshape(repeats, batch, -1)


def _loaded(task: Workload, memory: Memory) -> tuple[Dataset, Model]:
    """A trained, compressed model on its device, and a vocabulary of all rows beside it."""
    from pocketrec.compression.compress import compress
    from pocketrec.data.dataset import Dataset
    from pocketrec.format.vocabulary import Vocabulary
    from pocketrec.models.table import oov_rows
    from pocketrec.training.run import Run

    _settle(task)
    _rehearse(training=False)
    memory.mark("packages")
    data = Dataset.open(task.data)
    memory.mark("vocabulary", Vocabulary.build(data.schema, (~oov_rows(data.schema)).numpy(), data.hashes))
    run = Run(None, seed=task.seed, threads=task.threads, store=task.store)
    model = _start(task, data, run)
    if task.method is not None:
        training = _training(task.training)
        model = compress(model, data, _method(task), task.budget, run=run.with_training(training)).model
    return data, model.to(task.device)


def _start(task: Workload, data: Dataset, run: Any) -> Model:
    """The trained model that a method shrinks, the fresh one that it trains itself, or the original."""
    model = _backbone(task).build(data, task.seed).to(run.device)
    trains = task.method is not None and registry.load("methods", task.method["name"]).trains
    return model if trains or not task.training else run.fit("original", model, data, _training(task.training))


# ---- inference from a file -------------------------------------------------------------------------------------------


def _serve(task: Workload, memory: Memory) -> list[Timing]:
    """Logits of a prepared batch, or all vectors of a baked file, by the runtime."""
    from pocketrec import runtime

    memory.mark("packages")
    recommender = runtime.open(task.file)
    artifact = _opened(recommender.artifact, memory)
    rows, _ = open_arrays(task.rows)
    if task.batch is None:
        record = timed(task.phase, lambda i: _vectors(artifact, rows, task.threads), task.repeats)
    else:
        record = timed(task.phase, lambda i: recommender.logits(rows["batches"][i]), task.repeats)
    return [record]


def _serve_scores(task: Workload, memory: Memory) -> list[Timing]:
    """Scores of all items for a batch of users, then the best of such scores, from final vectors."""
    from pocketrec.evaluation.full_ranking import USERS

    pairs, chosen = _users(task, memory)
    scores = pairs.scores(chosen[0])

    def rank(call: int) -> None:
        for top in range(0, len(scores), USERS):
            part = scores[top : top + USERS]
            topk.best(part, *_unseen(len(part)), LIST)

    score = timed("scoring", lambda i: pairs.scores(chosen[i]), task.repeats)
    return [score, timed("ranking", rank, task.repeats)]


def _serve_lists(task: Workload, memory: Memory) -> list[Timing]:
    """The best items for a batch of users in one pass, from final vectors."""
    pairs, chosen = _users(task, memory)
    unseen = _unseen(chosen.shape[1])
    return [timed(task.phase, lambda i: pairs.topk(chosen[i], unseen, LIST, threads=task.threads), task.repeats)]


def _users(task: Workload, memory: Memory) -> tuple[AllPairs, NDArray[np.int64]]:
    """The head around a file's final vectors, and the users ``(repeats, batch)`` of each call."""
    from pocketrec import runtime
    from pocketrec.evaluation.full_ranking import AllPairs

    memory.mark("packages")
    artifact = _opened(runtime.open(task.file).artifact, memory)
    rows, _ = open_arrays(task.rows)
    pairs = AllPairs(artifact.program, *_vectors(artifact, rows, task.threads))
    users = len(rows["field0"])
    batch = task.batch or users
    return pairs, np.arange(batch * task.repeats).reshape(task.repeats, batch) % users


def _unseen(users: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """The CSR pattern of users who have seen nothing."""
    return np.zeros(users + 1, np.int64), np.empty(0, np.int32)


def _propagate(task: Workload, memory: Memory) -> list[Timing]:
    """Final vectors of a file whose table still has to be propagated: look-ups, then the backbone's graph."""
    import torch

    from pocketrec import runtime
    from pocketrec.data.dataset import Dataset

    _settle(task)
    _rehearse(training=False)
    memory.mark("packages")
    artifact = runtime.open(task.file).artifact
    _ = artifact.vocabulary
    memory.mark("vocabulary")
    model: Any = _backbone(task).build(Dataset.open(task.data), 0)
    del model.table
    _ = artifact.packed
    memory.mark("model")
    rows, _ = open_arrays(task.rows)

    def vectors(call: int) -> object:
        return model.propagate(torch.from_numpy(np.concatenate(_vectors(artifact, rows, task.threads))))

    with torch.inference_mode():
        return [timed(task.phase, vectors, task.repeats)]


def _opened(artifact: Artifact, memory: Memory) -> Artifact:
    """Vocabulary, table and head read and checked."""
    _ = artifact.vocabulary
    memory.mark("vocabulary")
    _ = artifact.packed, artifact.program
    memory.mark("model")
    return artifact


def _vectors(artifact: Artifact, rows: dict[str, NDArray[Any]], threads: int) -> list[NDArray[np.float32]]:
    """Vectors of all rows of each field."""
    return [
        artifact.packed.lookup(rows[f"field{i}"][:, None], np.array([i]), threads=threads)[:, 0]
        for i in range(len(artifact.schema.fields))
    ]


# ---- the process -----------------------------------------------------------------------------------------------------

PHASES: dict[str, Phase] = {
    "train": _train,
    "search": _search,
    "finish": _finish,
    "build": _build,
    "infer": _infer,
    "propagate": _propagate,
    "serve": _serve,
    "serve scores": _serve_scores,
    "serve lists": _serve_lists,
}
TORCH_FREE = ("serve", "serve scores", "serve lists")


def _settle(task: Workload) -> Callable[[], None]:
    """Torch set up for the task; what waits for its device."""
    import torch

    torch.set_num_threads(task.threads)
    return partial(torch.cuda.synchronize, task.device) if task.device.startswith("cuda") else nothing


def _rehearse(*, training: bool) -> None:
    """Have torch load now what it loads late, so that it counts among the packages."""
    import torch
    from torch import nn

    layer = nn.utils.skip_init(nn.Linear, 1, 1)
    if training:
        adam = torch.optim.Adam(layer.parameters(), fused=True)
        layer(torch.zeros(1, 1)).sum().backward()
        adam.step()


def _device_peak(task: Workload) -> dict[str, float]:
    """Peak of the device's allocator since the process started, where the device is a GPU."""
    if not task.device.startswith("cuda"):
        return {}
    import torch

    return {"device_peak_mib": torch.cuda.max_memory_allocated(task.device) / 2**20}


def _backbone(task: Workload) -> Backbone:
    return settings.from_json(registry.load("backbones", task.backbone["name"]), task.backbone["config"])


def _method(task: Workload) -> Method:
    if task.method is None:
        raise ConfigError(f"Phase {task.phase!r} needs a method, but the task names none; give it one.")
    own = {n: v for n, v in task.method.items() if n != "name"}
    return settings.from_json(registry.load("methods", task.method["name"]), own)


def _training(stages: Sequence[dict[str, Any]]) -> tuple[Training, ...]:
    from pocketrec.training.loop import Training

    return tuple(settings.from_json(Training, stage) for stage in stages)


def run(task: Workload) -> Timing:
    """Do a task in this process: ``phases``, ``peak_mib``, and ``torch``: whether it was loaded.

    Raises:
        UnsupportedOp: a phase of the runtime has loaded torch.
    """
    memory = Memory()
    phases = PHASES[task.kind](task, memory)
    torch = "torch" in sys.modules
    if torch and task.kind in TORCH_FREE:
        raise UnsupportedOp(f"Phase {task.phase!r} must run without torch, but torch was loaded.")
    return {"phases": phases, "peak_mib": memory.parts(), "torch": torch, **_device_peak(task)}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command ``python -m pocketrec.study.profiling.phase``; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m pocketrec.study.profiling.phase", description="Time one phase.")
    parser.add_argument("file", type=Path, help="the task as JSON")
    options = parser.parse_args(arguments)
    try:
        result = run(Workload(**json.loads(options.file.read_text(encoding="utf-8"))))
    except PocketRecError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    sys.stdout.write(f"{json.dumps(result)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
