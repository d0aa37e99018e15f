"""A study on a real Ray cluster of several nodes on this machine, against the same study in one process."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
import warnings
from functools import partial
from pathlib import Path

import psutil
import pytest
from study_cases import plan
from study_cases import records as all_records

pytest.importorskip("ray")

from pocketrec.backbones.deepfm import DeepFM
from pocketrec.data.encode import encode
from pocketrec.distributed.cluster import helpers
from pocketrec.errors import ConfigError, StorageError
from pocketrec.files import Journal
from pocketrec.methods.shaver import Shaver
from pocketrec.sources.synthetic import Synthetic
from pocketrec.study.cells import Workspace
from pocketrec.study.driver import on_cluster
from pocketrec.study.plan import parse
from pocketrec.study.runner import claim, run_study
from pocketrec.training.run import Run

pytestmark = [pytest.mark.xdist_group("cluster"), pytest.mark.timeout(1200)]

TOML = """
name = "small"
budgets = ["sparsity=0.5"]
seeds = [0, 1]
trials = 2
at_once = 2

[data.clicks]
source = "synthetic"
rows = 1500
cardinalities = [60, 20, 5]

[backbone.deepfm]
dim = 4
hidden = [8]

[backbone.deepfm.training]
epochs = 2
batch_size = 64
learning_rate = { low = 1e-3, high = 1e-1, log = true }

[method.mag_prune]
[method.shaver]
shards = 3
batch_size = 128
score = { choices = ["geo", "abs"] }
"""
PLAN = parse(tomllib.loads(TOML))


records = partial(all_records, clock=("seconds", "latency_us", "peak_mib"))


class Nodes:
    """A cluster of two nodes with one processor each, to which this process is connected."""

    def __init__(self) -> None:
        import ray
        from ray.cluster_utils import Cluster

        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        handler = signal.getsignal(signal.SIGTERM)
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.nodes = [self.add() for _ in range(2)]
        ray.init(self.cluster.address, log_to_driver=False, logging_level="ERROR")
        signal.signal(signal.SIGTERM, handler)

    def add(self):
        return self.cluster.add_node(num_cpus=1, include_dashboard=False)

    def kill(self, worker: int) -> None:
        """The node of a worker process: it, its raylet and all its other workers, without warning."""
        node = next(n for n in self.nodes if raylet(n) in psutil.Process(worker).parents())
        for process in (raylet(node), *raylet(node).children(recursive=True)):
            process.kill()

    def mend(self) -> None:
        """Two nodes again."""
        for node in [n for n in self.nodes if not raylet(n).is_running()]:
            self.cluster.remove_node(node)
            self.nodes[self.nodes.index(node)] = self.add()

    def close(self) -> None:
        import ray

        ray.shutdown()
        self.cluster.shutdown()


def raylet(node) -> psutil.Process:
    return psutil.Process(node.all_processes["raylet"][0].process.pid)


@pytest.fixture(scope="module")
def nodes():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=ResourceWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning, module="ray")
        found = Nodes()
    yield found
    found.close()


@pytest.fixture(scope="module")
def serial(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("serial")
    assert run_study(PLAN, folder)["failed"] == 0
    return folder


def test_a_study_on_a_cluster_has_the_records_of_one_process(nodes, serial, tmp_path):
    told = []
    counts = run_study(PLAN, tmp_path, workers=on_cluster("auto"), progress=lambda *step: told.append(step[:3]))
    assert counts["failed"] == 0
    assert records(tmp_path) == records(serial)
    assert told[-1] == ("jobs", counts["done"], counts["done"])
    assert predictions(tmp_path) == predictions(serial)


def predictions(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in (folder / "predictions").iterdir()}


def test_a_node_that_dies_midway_changes_nothing(nodes, serial, tmp_path):
    killed = []

    def kill_once_under_way() -> None:
        while not killed:
            for lock in (tmp_path / "runs").glob("*/lock"):
                with contextlib.suppress(OSError, ValueError, IndexError, psutil.Error):
                    worker = int(lock.read_text().split()[1])
                    psutil.Process(worker).suspend()
                    if lock.exists():
                        nodes.kill(worker)
                        killed.append(lock.parent.name)
                        return
                    psutil.Process(worker).resume()
            time.sleep(0.002)

    killer = threading.Thread(target=kill_once_under_way)
    killer.start()
    counts = run_study(PLAN, tmp_path, workers=on_cluster("auto"))
    killer.join()
    nodes.mend()
    assert len(killed) == 1
    assert counts["failed"] == 0
    assert records(tmp_path) == records(serial)


def test_a_job_that_raises_is_a_failed_record(nodes, tmp_path):
    broken = plan({"data.clicks": {"source": "criteo", "raw": "nowhere.parquet"}}, trials=0)
    counts = run_study(broken, tmp_path / "cluster", workers=on_cluster("auto"))
    assert counts == run_study(broken, tmp_path / "serial")
    assert counts["done"] == 0
    assert records(tmp_path / "cluster") == records(tmp_path / "serial")


def test_shards_are_the_same_bytes_whoever_plays_them(nodes, tmp_path):
    data = encode(Synthetic(rows=1500, cardinalities=(60, 20, 5)), None, tmp_path / "data")
    model = DeepFM(dim=4, hidden=(8,)).build(data, 0)
    method = Shaver(shards=3, passes=2, tolerance=0.0, batch_size=100)
    with Run(tmp_path / "serial") as run:
        alone = method.scores(model, data, run)
    with helpers("auto") as hands, Run(tmp_path / "helped", helpers=hands) as run:
        helped = method.scores(model, data, run)
        assert run.helpers is hands
    for name, array in alone.arrays().items():
        assert array.tobytes() == helped.arrays()[name].tobytes()
    assert {p.name for p in (tmp_path / "serial" / "steps").glob("*.safetensors")} == {
        p.name for p in (tmp_path / "helped" / "steps").glob("*.safetensors")
    }


def test_a_worker_that_does_not_see_the_folder_stops_the_study(nodes, tmp_path, monkeypatch):
    monkeypatch.setattr("pocketrec.study.driver.atomic_write", lambda path, content: None)
    with pytest.raises(StorageError, match="does not see"):
        run_study(PLAN, tmp_path, workers=on_cluster("auto"))
    assert not list((tmp_path / "locks").iterdir())


def test_a_job_that_fits_on_no_node_is_refused(nodes, tmp_path):
    with pytest.raises(ConfigError, match="3 CPUs"):
        run_study(PLAN.shifted(threads=3), tmp_path, workers=on_cluster("auto"))


@pytest.mark.parametrize("address", ["local:0", "local:", "here", "ray://nowhere", "local:two"])
def test_an_address_that_is_none_is_refused(address):
    with pytest.raises(ConfigError, match="local:N"):
        on_cluster(address)


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_nobody_at_an_address_is_said_without_asking_ray(scheme, tmp_path, monkeypatch):
    import ray

    asked = []
    monkeypatch.setattr(ray, "init", lambda *address, **_: asked.append(address))
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(ConfigError, match="none answers"):
            run_study(PLAN, tmp_path, workers=on_cluster(f"{scheme}127.0.0.1:{port}"))
    assert not asked


@pytest.fixture
def heard():
    """Children hear SIGINT even where the tests run in the background of a shell, which has it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard")
def test_a_signal_ends_the_command_cleanly_and_the_study_goes_on(serial, tmp_path):
    (tmp_path / "small.toml").write_text(TOML)
    out = tmp_path / "study"
    command = [sys.executable, "-m", "pocketrec.cli", "bench", str(tmp_path / "small.toml"), "--out", str(out)]
    out.mkdir()
    context = Workspace(PLAN, out, out / "store")
    with (
        claim(context, context.grid.jobs[-1]),  # so that the study cannot end before the signal
        subprocess.Popen(
            [*command, "--cluster", "local:2", "--no-report"], start_new_session=True, stderr=subprocess.PIPE, text=True
        ) as process,
    ):
        while process.poll() is None and not list((out / "store").glob("*.safetensors")):
            time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)
        try:
            _, said = process.communicate(timeout=600)
        finally:
            process.kill()
    assert process.returncode == 130, said
    assert said == "pocketrec: interrupted; run the same command again to go on.\n"
    _, alive = psutil.wait_procs(children, timeout=300)
    assert not alive
    before = Journal(out / "journal").read()
    assert len(before) < len(records(serial))
    assert not [r for r in before if r["kind"] == "failed"]
    assert run_study(PLAN, out)["failed"] == 0
    assert records(out) == records(serial)
