"""The verbs of the command: each reads its flags, calls one function of the library and shows one document.

The document goes to stdout, as JSON with ``--json`` and as a short table without; everything else goes to stderr. The
modules that a verb needs are loaded when it runs, so that ``pocketrec --help`` loads neither torch nor polars.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pocketrec import registry, settings
from pocketrec.command import options, shown
from pocketrec.command.progress import Watcher
from pocketrec.errors import ConfigError, DataError

if TYPE_CHECKING:
    from pocketrec.schema import Task
    from pocketrec.study.runner import Workers
    from pocketrec.training.loop import Training
    from pocketrec.training.run import Run
    from pocketrec.training.steps import Progress

Document = Mapping[str, Any]
_PATH = click.Path(path_type=Path)
_STORAGE = "How kept values are stored.  [default: fp32 for a sparsity, else int8]"
_INDEX = "How a row is found: in the fewest bytes, or in the least time."


def run(arguments: list[str]) -> None:
    """Parse ``arguments`` and run the verb; a usage error becomes a :class:`ConfigError`."""
    try:
        with app.make_context("pocketrec", arguments) as context:
            app.invoke(context)
    except click.exceptions.Exit:
        return
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
    except click.ClickException as error:
        raise ConfigError(f"{error.format_message()} (pocketrec --help)") from error


@dataclass(frozen=True)
class Session:
    """The flags that every verb has."""

    json: bool
    seed: int
    threads: int | None
    device: str

    def show(self, document: Document, text: Callable[[], str]) -> None:
        """One document on stdout: JSON, or a text for people."""
        click.echo(json.dumps(document, allow_nan=False) if self.json else text())

    def run(self, path: Path | None, progress: Progress | None = None) -> Run:
        """The run of this session in the folder ``path``."""
        from pocketrec.training.run import Run

        return Run(path, seed=self.seed, threads=self.threads, device=self.device, progress=progress)


def verb(function: Callable[..., None]) -> Callable[..., None]:
    """Give a verb the flags of a :class:`Session`, passed as its first argument."""

    @click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout, all else on stderr.")
    @click.option("--seed", type=int, default=0, show_default=True, help="All randomness is derived from it.")
    @click.option("--threads", type=click.IntRange(min=1), help="Threads of torch and of the kernel.  [default: all]")
    @click.option("--device", default="cpu", show_default=True, help="Where models are trained and scored.")
    @wraps(function)
    def wrapped(as_json: bool, seed: int, threads: int | None, device: str, **flags: Any) -> None:
        function(Session(as_json, seed, threads, device), **flags)

    return wrapped


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="pocketrec")
def app() -> None:
    """Fit the embedding tables of recommender systems into any memory budget, and ship them as one file."""


class SourceGroup(click.Group):
    """``encode``: one subcommand per source, made from its fields when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all sources; none is loaded."""
        return list(registry.modules("sources"))

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command:
        """The subcommand of one source."""
        return encode_command(registry.load("sources", cmd_name))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the sources without loading them."""
        with formatter.section("Sources"):
            formatter.write_text(", ".join(self.list_commands(ctx)))


@app.group(cls=SourceGroup)
def encode() -> None:
    """Encode a raw log into a data set: pocketrec encode SOURCE RAW OUT."""


def encode_command(source: type[Any]) -> click.Command:
    """``encode SOURCE RAW OUT``, with the source's fields and the keywords of ``pocketrec.encode`` as flags."""
    from pocketrec.data.encode import encode as encode_log

    own = settings.leaves(source)
    more = settings.keywords(encode_log, skip={"seed", "progress", *(s.name for s in own)})

    @verb
    def command(session: Session, out: Path, raw: Path | None = None, **flags: Any) -> None:
        plugin = options.build(source, flags)
        with Watcher() as watcher:
            given = options.given(flags, more)
            data = encode_log(plugin, raw, out, seed=session.seed, progress=watcher.rows, **given)
        session.show(data.report(), lambda: shown.dataset(data.report()))

    made = click.command(source.name, help=_summary(source))(command)
    made.params = [
        *([] if source.generates else [click.Argument(["raw"], type=_PATH)]),
        click.Argument(["out"], type=_PATH),
        *(options.option(s) for s in (*own, *more)),
        *made.params,
    ]
    return made


def _training_settings(plugin: type[Any]) -> tuple[settings.Setting, ...]:
    """The flags of a training beside those of a plug-in that trains, with the defaults of a backbone's task."""
    from pocketrec.training.loop import Training

    if not getattr(plugin, "trains", True):
        return ()
    task = getattr(plugin, "task", None)
    usual = None if task is None else settings.flat(Training.default(task))
    return tuple(
        dataclasses.replace(s, default="as the task has it" if usual is None else usual[s.name])
        for s in settings.leaves(Training)
    )


def _training(plugin: type[Any], task: Task, flags: Mapping[str, Any]) -> Training | None:
    """The training that the flags ask for; ``None`` where they ask for nothing."""
    from pocketrec.training.loop import Training

    own = [s.flag for s in settings.leaves(plugin)]
    changes = options.given(flags, _training_settings(plugin), own)
    return dataclasses.replace(Training.default(task), **changes) if changes else None


@app.command(cls=options.PluginCommand, axis="backbones", flag="backbone", also=_training_settings)
@click.argument("data", type=_PATH)
@click.option("--backbone", default="deepfm", show_default=True, help="Which recommender; with --help, its flags.")
@click.option("--run", "folder", type=_PATH, required=True, help="Folder of the run; made, or gone on with.")
@verb
def train(session: Session, data: Path, backbone: str, folder: Path, **flags: Any) -> None:
    """Train a recommender on the data set DATA into a run."""
    from pocketrec.data.dataset import Dataset
    from pocketrec.training.loop import history
    from pocketrec.training.train import train as train_model

    plugin = options.build(registry.load("backbones", backbone), flags)
    training = _training(type(plugin), plugin.task, flags)
    with Watcher() as watcher, session.run(folder, watcher) as run:
        train_model(plugin, Dataset.open(data), run, training)
        seconds = sum(record["seconds"] for record in run.logged() if record["stage"] == "train")
    epochs = history(folder)
    metrics = [e.metric for e in epochs if e.metric is not None]
    quality = {"auc" if plugin.task == "ctr" else "ndcg@20": max(metrics, default=None)}
    document = {"run": str(folder), "quality": quality, "seconds": seconds, "epochs": len(epochs)}
    session.show(document, lambda: shown.pairs(document))


@app.command(cls=options.PluginCommand, axis="methods", flag="method", also=_training_settings)
@click.argument("folder", metavar="RUN", type=_PATH)
@click.option(
    "--method",
    default="rate_distortion",
    show_default=True,
    help="How the smaller table is found; with --help, its flags.",
)
@click.option("--budget", "budgets", multiple=True, required=True, help="sparsity=0.95, 5% or 4MiB; may be repeated.")
@click.option("--out", type=_PATH, required=True, help="Folder of the artifacts, one file for each budget.")
@click.option("--storage", type=click.Choice(["fp32", "fp16", "int8"]), help=_STORAGE)
@click.option("--index", type=click.Choice(["compact", "direct"]), default="compact", show_default=True, help=_INDEX)
@click.option("--bake", is_flag=True, help="Ranking models: propagate first, and compress what a device needs.")
@click.option("--data", type=_PATH, help="The data set.  [default: where it was at training]")
@verb
def compress(
    session: Session, folder: Path, method: str, budgets: tuple[str, ...], out: Path, data: Path | None, **flags: Any
) -> None:
    """Compress the model of a run to each budget and write one file for each."""
    from pocketrec.compression.compress import compress as compress_model
    from pocketrec.data.dataset import Dataset
    from pocketrec.training.train import load

    plugin = options.build(registry.load("methods", method), flags)
    model, dataset = load(folder, Dataset.open(data) if data else None)
    how = {"storage": flags["storage"], "index": flags["index"], "bake": flags["bake"]}
    training = _training(type(plugin), dataset.schema.task, flags)
    artifacts = []
    out.mkdir(parents=True, exist_ok=True)
    with Watcher() as watcher, session.run(folder, watcher) as run:
        for budget in budgets:
            started = time.monotonic()
            small = compress_model(model, dataset, plugin, budget, run=run, training=training, **how)
            path = out / artifact_name(method, budget)
            sizes = small.save(path)
            seconds = time.monotonic() - started
            artifacts.append({"budget": budget, "path": str(path), "bytes": sizes, "values": small.values,
                              "sparsity": small.sparsity, "seconds": seconds})  # fmt: skip
    session.show({"artifacts": artifacts}, lambda: shown.artifacts(artifacts))


def artifact_name(method: str, budget: str) -> str:
    """``shaver-5pct.safetensors``: a plain file name for a method and a budget."""
    plain = re.sub(r"[^A-Za-z0-9.]+", "-", budget.replace("%", "pct").replace(" ", ""))
    return f"{method}-{plain}.safetensors"


@app.command()
@click.argument("target", metavar="ARTIFACT|RUN", type=_PATH)
@click.option("--data", type=_PATH, required=True, help="The data set.")
@click.option("--split", type=click.Choice(["train", "valid", "test"]), default="test", show_default=True)
@click.option("-k", type=click.IntRange(min=1), default=20, show_default=True, help="Length of a recommendation list.")
@click.option("--run", "folder", type=_PATH, help="Where the ledger of test reads lies.  [default: beside ARTIFACT]")
@verb
def measure(session: Session, target: Path, data: Path, split: str, k: int, folder: Path | None) -> None:
    """Measure quality, bytes and latency of an artifact from its file, or of the dense model of a run."""
    from pocketrec.compression.measure import measure as measure_target
    from pocketrec.data.dataset import Dataset
    from pocketrec.files import Journal
    from pocketrec.training.train import load

    dataset = Dataset.open(data)
    trained = (target / "run.json").is_file()
    ledger = Journal((folder or (target if trained else target.parent)) / "ledger.journal")
    measured = measure_target(
        load(target, dataset)[0] if trained else target,
        dataset.splits[split],
        k=k,
        threads=session.threads or 1,
        ledger=lambda **record: ledger.append(record),
    )
    document = measured.to_json()
    session.show(document, lambda: shown.pairs(document))


@app.command()
@click.argument("artifact", type=_PATH)
@click.option("--user", required=True, help="Raw id of the user.")
@click.option("-k", type=click.IntRange(min=1), default=20, show_default=True, help="How many items.")
@click.option("--exclude", default="", help="Raw ids of items to leave out, comma-separated.")
@verb
def recommend(session: Session, artifact: Path, user: str, k: int, exclude: str) -> None:
    """Recommend the k best items for a user, from the file alone."""
    from pocketrec import runtime

    left_out = [item.strip() for item in exclude.split(",") if item.strip()]
    found = runtime.open(artifact).recommend(user, k, left_out)
    document = {"user": user, "items": [{"item": item, "score": score} for item, score in found]}
    session.show(document, lambda: shown.pairs(document))


@app.command()
@click.argument("path", type=_PATH)
@click.option("--verify", is_flag=True, help="Also check every byte.")
@verb
def inspect(session: Session, path: Path, verify: bool) -> None:
    """Show what a data set, a run or an artifact is."""
    document = _inspected(path, verify)
    session.show(document, lambda: shown.pairs(document))


def _inspected(path: Path, verify: bool) -> Document:
    """What lies at ``path``, by what is in it."""
    if (path / "dataset.json").is_file():
        from pocketrec.data.dataset import Dataset

        return {"kind": "dataset", **Dataset.open(path, verify=verify).report()}
    if (path / "run.json").is_file():
        from pocketrec.training.document import read_document

        return {"kind": "run", "run": str(path), **read_document(path)}
    if path.is_dir():
        raise DataError(f"{path}: expected a data set, a run or an artifact, but got another folder.")
    from pocketrec.format.artifact import Contents

    artifact = Contents.open(path)
    if verify:
        artifact.verify()
    document = artifact.describe()
    return {**document, "kind": "artifact", "path": str(path), "model": document["kind"]}


@app.command()
@click.argument("plan", metavar="FILE")
@click.option("--out", type=_PATH, required=True, help="Folder of the study; made, or gone on with.")
@click.option("--dry-run", is_flag=True, help="Show the grid, the time and the disk that it will take; do nothing.")
@click.option("--store", type=_PATH, help="Folder of trained models that studies share.  [default: inside the study]")
@click.option("--cluster", help="Work on a cluster: local:N for N workers here, or an address like ray://host:10001.")
@click.option("--report/--no-report", default=True, show_default=True, help="Write the report at the end.")
@verb
def bench(
    session: Session, plan: str, out: Path, dry_run: bool, store: Path | None, cluster: str | None, report: bool
) -> None:
    """Run the study of a plan, a TOML FILE or the name of a shipped one, and report it.

    What is finished is not done again: a killed study goes on. --seed shifts all seeds of the plan.
    """
    from pocketrec.study.estimate import estimate
    from pocketrec.study.plan import Plan
    from pocketrec.study.runner import run_study as run_study

    study = Plan.read(plan).shifted(session.seed, session.threads, session.device)
    if dry_run:
        expected = estimate(study, out, store)
        session.show(expected.to_json(), expected.to_text)
        return
    started = time.monotonic()
    with Watcher() as watcher:
        counts = run_study(study, out, store=store, progress=watcher, workers=_workers(cluster))
    document = {"study": str(out), **counts, "seconds": time.monotonic() - started}
    if report:
        from pocketrec.report import write

        document["report"] = str(write(out).page)
    session.show(document, lambda: shown.pairs(document))


def _workers(cluster: str | None) -> Workers | None:
    """Who does the jobs: this process, or a cluster."""
    if cluster is None:
        return None
    from pocketrec.study.driver import on_cluster

    return on_cluster(cluster)


@app.command()
@click.argument("folder", metavar="DIR", type=_PATH)
@verb
def report(session: Session, folder: Path) -> None:
    """Write tables and one page of the study in DIR into DIR/report; finished or not, nothing is trained."""
    from pocketrec.report import write

    document = write(folder, seed=session.seed).to_json()
    session.show(document, lambda: shown.pairs({**document, "tables": len(document["tables"])}))


@app.command()
@click.option("--out", type=_PATH, default=Path("demo"), show_default=True, help="Folder of everything that is made.")
@verb
def demo(session: Session, out: Path) -> None:
    """Run the main job on a synthetic click log: train, compress to a ladder of budgets, table and picture."""
    from pocketrec.command import demo as main_job

    with Watcher() as watcher:
        report = main_job.run(out, seed=session.seed, threads=session.threads, watcher=watcher)
    session.show(report.to_json(), report.to_text)


def _summary(plugin: type[Any]) -> str:
    return (plugin.__doc__ or "").strip().split("\n")[0]
