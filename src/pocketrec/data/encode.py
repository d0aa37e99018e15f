"""Encode a raw log into a data set."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

from pocketrec.data.clicks import Counting, IdOrder, write_clicks
from pocketrec.data.dataset import DOCUMENT, Dataset, file_digest, read_description, write_description
from pocketrec.data.pairs import write_pairs
from pocketrec.data.source import Scan, Source, require_file
from pocketrec.data.splits import by_ratio, parse_fraction, parse_ratio
from pocketrec.data.staging import staged_folder
from pocketrec.data.tally import RawFile, RowProgress, Tally
from pocketrec.errors import ConfigError
from pocketrec.files import canonical_json


def encode(
    source: Source,
    raw: str | Path | None,
    out: str | Path,
    *,
    test: str | Path | None = None,
    valid: str | Path | None = None,
    valid_fraction: float | None = None,
    split: str = "8:1:1",
    threshold: int | Mapping[str, int] = 1,
    counting: Counting = "train",
    order: IdOrder = "appearance",
    users: int | None = None,
    items: int | None = None,
    max_bad: float = 0.001,
    seed: int = 0,
    progress: RowProgress | None = None,
) -> Dataset:
    """Encode a raw log into the folder ``out`` and open it.

    The folder appears whole or not at all. Where it already holds the result of the same call on the same bytes, that
    is opened; where it holds anything else, nothing is touched.

    Args:
        source: the raw format, e.g. ``pocketrec.sources.Criteo()``; it names label and columns.
        raw: the raw file; ``None`` for a generator.
        out: folder to write.
        test: file of the test split.
        valid: file of the validation split.
        valid_fraction: share of the training file that validates, where ``test`` is given; ``cf``: of each user's pairs
            (``max(1, floor(n_u * share))``, at least one is left for training), default 0.1 there.
        split: weights of train, valid and test, where no file and no column decides; ``cf``: per user.
        threshold: least count of a value that gets an id of its own, for all fields or by field name, at least 1.
            ``dense`` fields keep the whole range of their integers; with more than 1 an ``integer`` field is hashed.
        counting: ``train`` counts training rows; ``published`` counts all rows, as the papers did (a leak).
        order: of ids: first ``appearance`` among the counted rows, or by ``count``, then string. Dense integer fields
            keep the order of their integers.
        users: ``cf``: number of users, at least 1 + the largest id (the default).
        items: ``cf``: number of items, likewise.
        max_bad: largest share of bad rows in one file, in [0, 1].
        seed: seed of the splits.
        progress: told (what, rows done).

    Raises:
        ConfigError: an argument is out of range, contradicts another, or ``out`` holds something else.
        DataError: the raw files do not hold what the source promises; nothing is written.

    Example:
        >>> import tempfile, pocketrec.sources
        >>> source = pocketrec.sources.Synthetic(rows=1000, cardinalities=(50, 20))
        >>> data = encode(source, None, Path(tempfile.mkdtemp()) / "clicks")
        >>> len(data.train), data.schema.rows
        (800, 72)
    """
    out = Path(out)
    options = {
        "valid_fraction": valid_fraction,
        "split": split,
        "threshold": threshold if isinstance(threshold, int) else dict(threshold),
        "counting": counting,
        "order": order,
        "users": users,
        "items": items,
        "max_bad": max_bad,
        "seed": seed,
    }
    _check(source, options, raw=raw, test=test, valid=valid)
    parts = _parts(raw, test=test, valid=valid, valid_fraction=valid_fraction)
    recipe = {
        "source": {"name": source.name, **asdict(source)},  # pyright: ignore[reportArgumentType]
        "raw": {p.split or "all": file_digest(require_file(p.path)) for p in parts if raw is not None},
        **options,
    }
    if (done := _finished(out, recipe, source)) is not None:
        return done
    tally = Tally(max_bad)
    tell = progress or (lambda what, rows: None)
    scans = _scans(source, parts)
    with staged_folder(out) as folder:
        if source.task == "cf":
            schema, notes = write_pairs(
                folder,
                scans,
                users=users,
                items=items,
                **_held_out(split, parts, valid_fraction),
                seed=seed,
                tally=tally,
                progress=tell,
            )
        else:
            ratio = _ratio(split, parts, valid_fraction)
            schema, notes = write_clicks(
                folder,
                scans,
                lambda rows: by_ratio(rows, ratio, seed),
                threshold=threshold,
                counting=counting,
                order=order,
                tally=tally,
                progress=tell,
            )
        write_description(folder, schema, tally, notes, recipe)
    return Dataset.open(out)


def _check(source: Source, options: Mapping[str, Any], **files: str | Path | None) -> None:
    """Refuse arguments that are out of range or contradict each other."""
    for name, known in (("counting", get_args(Counting)), ("order", get_args(IdOrder))):
        if options[name] not in known:
            raise ConfigError(f"`{name}` must be one of {', '.join(known)}, but got {options[name]!r}.")
    if not 0 <= options["max_bad"] <= 1:
        raise ConfigError(f"`max_bad` must be in [0, 1], but got {options['max_bad']}.")
    if options["seed"] < 0:
        raise ConfigError(f"`seed` must be at least 0, but got {options['seed']}.")
    foreign = [("threshold", 1)] if source.task == "cf" else [("users", None), ("items", None)]
    for name, default in foreign:
        if options[name] != default:
            raise ConfigError(f"`{name}` has no meaning for task {source.task!r}, but got {options[name]!r}.")
    if files["raw"] is None and not source.generates:
        raise ConfigError(f"Source {source.name!r} needs a raw file, but got None.")
    if files["valid"] is not None and options["valid_fraction"] is not None:
        raise ConfigError("`valid` and `valid_fraction` both decide what validates; give one of them.")
    if files["valid"] is not None and files["test"] is None:
        raise ConfigError("`valid` needs `test`: give both files, or split one file by seed.")
    if options["valid_fraction"] is not None and files["test"] is None:
        raise ConfigError("`valid_fraction` needs `test`; without it, `split` says all three shares.")


def _parts(
    raw: str | Path | None, *, test: str | Path | None, valid: str | Path | None, valid_fraction: float | None
) -> list[RawFile]:
    """The raw files, training rows first."""
    decided = test is not None and not valid_fraction
    parts = [RawFile(Path(raw or ""), "train" if decided else None)]
    for name, path in (("valid", valid), ("test", test)):
        if path is not None:
            parts.append(RawFile(Path(path), name))
    return parts


def _scans(source: Source, parts: list[RawFile]) -> list[tuple[RawFile, Scan]]:
    first = source.scan(parts[0].path)
    if first.split is not None and len(parts) > 1:
        raise ConfigError(f"Column {first.split!r} and the given files both decide the splits; give one of them.")
    return [(parts[0], first), *((part, source.scan(part.path, first.columns)) for part in parts[1:])]


def _ratio(split: str, parts: list[RawFile], valid_fraction: float | None) -> tuple[int, int, int]:
    """Weights of train, valid and test among the rows whose split is drawn."""
    if len(parts) == 1:
        return parse_ratio(split)
    share = parse_fraction("valid_fraction", valid_fraction or 0)
    return share.denominator - share.numerator, share.numerator, 0


def _held_out(split: str, parts: list[RawFile], valid_fraction: float | None) -> dict[str, Fraction]:
    """Shares of each user's pairs that are drawn for test and, of the rest, for validation."""
    if len(parts) == 1:
        train, valid, test = parse_ratio(split)
        return {"test_fraction": Fraction(test, train + valid + test), "valid_fraction": Fraction(valid, train + valid)}
    default = 0.1 if len(parts) == 2 else 0
    share = default if valid_fraction is None else valid_fraction
    return {"test_fraction": Fraction(0), "valid_fraction": parse_fraction("valid_fraction", share)}


def _finished(out: Path, recipe: Mapping[str, Any], source: Source) -> Dataset | None:
    """The data set in ``out`` if the same call made it; ``None`` if there is nothing or an empty folder.

    Settings that the source has gained since had their defaults then.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if (out / DOCUMENT).is_file():
        known = read_description(out)["recipe"]
        settled = asdict(type(source)())  # pyright: ignore[reportArgumentType]
        if {**known, "source": {**settled, **known["source"]}} == json.loads(canonical_json(recipe)):
            return Dataset.open(out)
    raise ConfigError(f"{out} exists and was not made by this call; remove it or choose another folder.")
