"""A Ray cluster: how one is reached, what a task takes of a node, and helpers that compute parts of a run's steps."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster
from ray.exceptions import RayError, RayTaskError

from pocketrec.errors import ConfigError, StorageError
from pocketrec.training.run import Helpers, Run
from pocketrec.training.steps import StepPart

RETRIES = 5
"""How often a task is run again when its node or process dies."""

CONNECT_SECONDS = 5.0
"""How long an address may take to answer."""


@contextmanager
def helpers(address: str, threads: int = 1) -> Iterator[Helpers]:
    """Helpers of a :class:`~pocketrec.training.run.Run`: what it can do in parts, tasks of a cluster do.

    Args:
        address: ``local:N``, ``ray://HOST:PORT``, ``HOST:PORT`` or ``auto``.
        threads: of each task.

    Example:
        >>> with helpers("local:2") as hands, Run("runs/base", helpers=hands) as run:  # doctest: +SKIP
        ...     small = compress(model, data, Shaver(shards=8), "5%", run=run)
    """
    with connection(address)(Share(threads, 0)):
        yield partial(compute_parts, threads)


@dataclass(frozen=True)
class Share:
    """What a task takes of a node."""

    threads: int
    gpus: int

    def task(self, function: Callable[..., Any]) -> Any:
        """A function as a Ray task."""
        return ray.remote(num_cpus=self.threads, num_gpus=self.gpus, max_retries=RETRIES)(function)

    def fitting(self) -> int:
        """How many tasks fit on the nodes that live."""
        return sum(self._on(node["Resources"]) for node in ray.nodes() if node["Alive"])

    def _on(self, resources: dict[str, float]) -> int:
        jobs = int(resources.get("CPU", 0)) // self.threads
        return min(jobs, int(resources.get("GPU", 0)) // self.gpus) if self.gpus else jobs


# ---- connections -----------------------------------------------------------------------------------------------------


def connection(address: str) -> Callable[[Share], AbstractContextManager[None]]:
    """What connects to an address."""
    if found := re.fullmatch(r"local:([1-9]\d{0,3})", address):
        return partial(_local, int(found[1]))
    if found := re.fullmatch(r"(?:ray://)?(?!local:)([^/:\s]+):(\d{1,5})", address):
        return partial(_remote, address, (found[1], int(found[2])))
    if address == "auto":
        return partial(_remote, address, None)
    raise ConfigError(
        "A cluster must be local:N for N workers on this machine, ray://HOST:PORT, HOST:PORT or auto, but got "
        f"{address!r}."
    )


@contextmanager
def _local(nodes: int, share: Share) -> Iterator[None]:
    """A cluster of this machine: a head that does no jobs, and nodes for one job each."""
    if ray.is_initialized():
        raise ConfigError("This process works on a Ray cluster already; use `auto`, or leave it first.")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    cluster = Cluster()
    try:
        with _handlers_kept():
            _start(cluster, nodes, share)
        with _connected(str(cluster.address)):
            yield
    finally:
        cluster.shutdown()


def _start(cluster: Cluster, nodes: int, share: Share) -> None:
    try:
        cluster.add_node(num_cpus=0, include_dashboard=False)
        for _ in range(nodes):
            cluster.add_node(num_cpus=share.threads, num_gpus=share.gpus, include_dashboard=False)
    except Exception as error:
        raise StorageError(
            f"Ray could not start {nodes} nodes on this machine: {error} Start fewer, or try again when less runs here."
        ) from error


@contextmanager
def _remote(address: str, endpoint: tuple[str, int] | None, _: Share) -> Iterator[None]:
    """A cluster that runs; Ray itself takes minutes to say that there is none."""
    if endpoint is not None:
        try:
            socket.create_connection(endpoint, CONNECT_SECONDS).close()
        except (OSError, OverflowError) as error:
            raise _unanswered(address, error) from error
    with _connected(address):
        yield


@contextmanager
def _connected(address: str) -> Iterator[None]:
    """This process as a driver; where it is one already, it stays one."""
    if ray.is_initialized():
        yield
        return
    with _handlers_kept():
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.ERROR)
        except (ConnectionError, RuntimeError, TimeoutError) as error:
            raise _unanswered(address, error) from error
    try:
        yield
    finally:
        ray.shutdown()


def _unanswered(address: str, error: Exception) -> ConfigError:
    return ConfigError(
        f"Expected a Ray cluster at {address}, but none answers ({error}); start one with `ray start --head`, correct "
        "the address, or use local:N."
    )


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Ray takes SIGTERM for itself, and says much; the signal is given back when the block is left."""
    handler = signal.getsignal(signal.SIGTERM)
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


def compute_parts(threads: int, run: Run, name: str, keys: Sequence[Any], part: StepPart) -> None:
    """Have the parts of a step computed by tasks; what a lost cluster leaves undone is for the run itself."""
    if run.steps is None:
        return
    task, sent, steps = Share(threads, 0).task(_compute), ray.put(part), run.steps.resolve()
    try:
        ray.get([task.remote(run.seed, threads, steps, name, key, sent) for key in keys])
    except RayTaskError as error:
        raise error.cause from error
    except RayError:
        return


def _compute(seed: int, threads: int, steps: Path, name: str, key: Any, part: StepPart) -> None:
    """Task: one part of a step, left in the store."""
    with Run(None, seed=seed, threads=threads, store=steps) as run:
        run.once(name, key, partial(part, key))
