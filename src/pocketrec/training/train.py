"""Train a backbone from scratch into a run's folder, and load what it left."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from pocketrec import registry, settings
from pocketrec.data.dataset import Dataset
from pocketrec.errors import ArtifactError, ConfigError, DataError
from pocketrec.files import digest
from pocketrec.format.arrays import open_arrays, save_arrays
from pocketrec.models.backbone import Backbone, Model
from pocketrec.training.document import read_document, write_document
from pocketrec.training.loop import Training, fit, load_learned, stored_epochs
from pocketrec.training.run import Run
from pocketrec.training.steps import Arrays


def train(
    backbone: Backbone, data: Dataset, run: Run | str | Path | None = None, training: Training | None = None
) -> Model:
    """Train a backbone from scratch; the run's folder gets ``model.safetensors`` and ``run.json``.

    The model is known by the digest of backbone, settings, data set and seed: the same training in the same folder is
    read, not repeated, and all runs with one store share it.

    Args:
        backbone: configuration of the recommender.
        data: the encoded data set; its test split is not read.
        run: a :class:`~pocketrec.training.run.Run`, a folder, or ``None`` to keep nothing.
        training: settings; by default those of the backbone's task.

    Returns:
        The model with the weights of the best epoch on validation.

    Raises:
        ConfigError: the backbone is made for another task.
        DataError: the training split is empty.
        DivergedError: a loss or gradient is not finite; the last checkpoint stays.
        RunLocked: another process works in the folder.

    Example:
        >>> model = train(DeepFM(dim=16), Dataset.open("data/criteo"), "runs/base")  # doctest: +SKIP
    """
    if not isinstance(run, Run):
        with Run(run) as opened:
            return train(backbone, data, opened, training)
    if backbone.task != data.schema.task:
        raise ConfigError(
            f"{type(backbone).__name__} is made for task {backbone.task!r}, but the data set is of task "
            f"{data.schema.task!r}; choose another backbone."
        )
    training = training or Training.default(backbone.task)
    model = backbone.build(data, run.seed).to(run.device)
    load_learned(model, _trained(run, model, data, training))
    return model


def load(path: str | Path, data: Dataset | None = None) -> tuple[Model, Dataset]:
    """The model that :func:`train` left in a run's folder, and its data set.

    Args:
        path: the folder.
        data: the data set; by default it is opened where it was at training.

    Raises:
        ArtifactError: the folder holds no trained model, or a damaged one.
        DataError: the data set is not the one of the training.
    """
    document = read_document(Path(path))
    trained = document["training"]
    if data is None:
        data = Dataset.open(document["dataset"])
    if data.digest != trained["data"]:
        raise DataError(
            f"{path} was trained on the data set {trained['data'][:12]}, but {data.path} is {data.digest[:12]}."
        )
    name, config = trained["backbone"]["name"], trained["backbone"]["config"]
    model = settings.from_json(registry.load("backbones", name), config).build(data, trained["seed"])
    arrays, meta = open_arrays(Path(path) / "model.safetensors")
    if meta.get("key", meta["training"]) != document.get("key", trained):
        raise ArtifactError(f"{path}: model.safetensors and run.json are of different trainings; train again.")
    load_learned(model, arrays)
    return model, data


def _trained(run: Run, model: Model, data: Dataset, training: Training) -> Arrays:
    """Learned tensors of a training: from the run's folder, from the shared cache, or computed now."""
    beside = {"data": data.digest, "seed": run.seed}
    config = {"name": model.backbone.name, "config": settings.to_json(model.backbone)}
    document = {"backbone": config, "training": settings.to_json(training), **beside}
    key = digest({"backbone": settings.key(model.backbone), "training": settings.key(training), **beside})
    places = _places(run, key)
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
    shared = places[-1] if places else Path()
    with run.claimed(shared), run.working(_partial(run, shared), key) as checkpoint:
        known = next((arrays for place in places if (arrays := _stored(place, key)) is not None), None)
        arrays = known or fit(run, "train", model, data, training, checkpoint)
        for place in places:
            if _stored(place, key) is None:
                save_arrays(place, arrays, {"training": document, "key": key})
        if run.path is not None:
            epochs = [asdict(e) for e in stored_epochs(arrays["history"])]
            past = {"dataset": str(data.path.resolve()), "history": epochs}
            write_document(run.path, {"training": document, "key": key, **past})
        checkpoint.clear()
    return arrays


def _places(run: Run, key: str) -> list[Path]:
    """Where a trained model is kept: the run's folder, and the store."""
    places = [] if run.path is None else [run.path / "model.safetensors"]
    return places if run.store is None else [*places, run.store / f"{key}.safetensors"]


def _partial(run: Run, shared: Path) -> Path | None:
    """Where a training leaves its checkpoint."""
    if run.path is not None:
        return run.path / "training.partial"
    return None if run.store is None else shared.with_suffix(".partial")


def _stored(place: Path, key: str) -> Arrays | None:
    """The arrays at a place, if they are of this training."""
    if not place.exists():
        return None
    arrays, meta = open_arrays(place)
    return arrays if meta.get("key") == key else None
