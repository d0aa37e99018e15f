"""Score and recommend from a file, with numpy alone: neither torch nor polars is imported.

``python -m pocketrec.runtime score|recommend|inspect FILE`` does the same from a shell, in a base install.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from pocketrec.errors import ArtifactError, ConfigError, DataError, PocketRecError, UnsupportedOp
from pocketrec.format.artifact import Artifact
from pocketrec.format.program import Program

BATCH_ROWS = 4096
"""Rows that are looked up and scored at a time."""


def open(path: str | Path) -> Recommender:
    """Open a file for scoring; only its header is read, the rest is memory-mapped and checked on first use.

    Raises:
        ArtifactError: the bytes are not a file of PocketRec, or they are damaged.
        StorageError: the file system refused.

    Example:
        >>> from pocketrec import runtime
        >>> runtime.open("deepfm.safetensors").score({"user": "u17", "item": "i3"})  # doctest: +SKIP
        0.271...
    """
    return Recommender(Artifact(Path(path)))


class Recommender:
    """A recommender that reads one file.

    Values may be text as in the raw log, integers, or ``None`` for a missing cell. A value that the file does not know,
    pruned away or never seen, reads the ``absent`` row of its field.
    """

    def __init__(self, artifact: Artifact) -> None:
        self.artifact, self.schema, self.kind = artifact, artifact.schema, artifact.kind

    def score(self, row: Mapping[str, Any]) -> float:
        """Score of one row: the click probability of a click model, the ranking score of a ``baked`` ranking model.

        Args:
            row: a value for every field, by name; other keys are ignored.

        Raises:
            DataError: a field is missing, or its value is of a wrong type.
            UnsupportedOp: the file is of kind ``ego``.
        """
        rows = self.artifact.vocabulary.lookup_row([self._value(row, f.name) for f in self.schema.fields])
        return float(self._link(self.logits(rows[None]))[0])

    def score_many(
        self, rows: Mapping[str, Sequence[Any] | NDArray[Any]] | Sequence[Mapping[str, Any]]
    ) -> NDArray[np.float64]:
        """Scores of many rows, shape ``(n,)``; see :meth:`score`.

        Args:
            rows: columns of equal length by field name, or a sequence of rows.
        """
        if not isinstance(rows, Mapping):
            rows = {f.name: [self._value(row, f.name) for row in rows] for f in self.schema.fields}
        columns = [self._value(rows, f.name) for f in self.schema.fields]
        if len({len(c) for c in columns}) > 1:
            lengths = {f.name: len(c) for f, c in zip(self.schema.fields, columns, strict=True)}
            raise DataError(f"`rows` must have columns of equal length, but got {lengths}.")
        found = [self.artifact.vocabulary.lookup(i, column) for i, column in enumerate(columns)]
        return self._link(self.logits(np.stack(found, axis=1)))

    def logits(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """What the head says of file rows ``(n, F)``, ``-1`` for absent: logits or ranking scores, shape ``(n,)``.

        Raises:
            UnsupportedOp: the file is of kind ``ego``.
        """
        self._refuse_ego("Scoring")
        out = np.empty(len(rows), dtype=np.float32)
        for start in range(0, len(rows), BATCH_ROWS):
            part = rows[start : start + BATCH_ROWS]
            out[start : start + len(part)] = self._run(part)
        return out

    def recommend(self, user: Any, k: int = 20, exclude: Iterable[Any] = ()) -> list[tuple[int, float]]:
        """The ``k`` best items for a user with their scores, best first; equal scores by rising item id.

        Args:
            user: raw user id; an unknown user reads the absent row.
            k: how many, at least 1; fewer come back where the file has fewer items.
            exclude: raw item ids to leave out, for instance the user's history, which is not in the file.

        Raises:
            UnsupportedOp: the file is not of kind ``baked``, or its item ids are not integers.
            ConfigError: ``k`` is not a positive integer.
        """
        if self.kind == "ctr":
            raise UnsupportedOp(
                f"{self.artifact.path} is a click model, which scores rows; call score instead of recommend."
            )
        self._refuse_ego("recommend")
        if isinstance(k, bool) or not isinstance(k, int | np.integer) or k < 1:
            raise ConfigError(f"`k` must be an integer of at least 1, but got {k!r}.")
        items = self.schema.fields[1]
        if items.keys != "dense":
            raise UnsupportedOp(
                f"{self.artifact.path} holds hashes of its item ids, not the ids; recode them as integers."
            )
        scores = self._item_scores(user)
        left_out = self.artifact.vocabulary.lookup(1, list(exclude)) - self._first_item
        scores[left_out[left_out >= 0]] = -np.inf
        best = _top(scores, min(k, len(scores)))
        return [(items.first + int(i), float(scores[i])) for i in best if scores[i] > -np.inf]

    @cached_property
    def _head(self) -> Program:
        """The head, once it is known to fit the table and the vocabulary."""
        program, packed, width = self.artifact.program, self.artifact.packed, self.schema.width
        fits = packed.rows == self.artifact.vocabulary.rows and len(packed.fill) == width
        with self._damage():
            fits = fits and np.shape(program(np.zeros((1, width, packed.width), np.float32))) == (1,)
        if not fits:
            raise ArtifactError(f"{self.artifact.path} has a table, vocabulary and head that do not fit each other.")
        return program

    def _run(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """What the head says of the vectors of file rows ``(B, F)``, shape ``(B,)``."""
        head = self._head
        with self._damage():
            return head(self.artifact.packed.lookup(rows, np.arange(self.schema.width)))

    @contextmanager
    def _damage(self) -> Iterator[None]:
        """Errors of the arithmetic on what a file holds are errors of the file; overflows are numbers like others."""
        try:
            with np.errstate(all="ignore"):
                yield
        except (ArithmeticError, DataError, IndexError, KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{self.artifact.path} has a table or a head that cannot run: {error!r}.") from error

    @property
    def _first_item(self) -> int:
        """File row of the first item."""
        return self.artifact.vocabulary.keys[0]

    def _item_scores(self, user: Any) -> NDArray[np.float32]:
        """Scores of all items for one user, shape ``(items,)``, block by block."""
        first, count = self._first_item, self.artifact.vocabulary.keys[1]
        row = self.artifact.vocabulary.lookup(0, [user])
        scores = np.empty(count, dtype=np.float32)
        for start in range(0, count, BATCH_ROWS):
            block = np.arange(first + start, first + min(start + BATCH_ROWS, count))
            pairs = np.stack([np.broadcast_to(row, block.shape), block], axis=1)
            scores[start : start + len(block)] = self._run(pairs)
        return scores

    def _link(self, logits: NDArray[np.float32]) -> NDArray[np.float64]:
        """Logits -> probabilities for a click model; ranking scores as they are."""
        wide = logits.astype(np.float64)
        return 0.5 * (1 + np.tanh(0.5 * wide)) if self.kind == "ctr" else wide

    def _refuse_ego(self, what: str) -> None:
        """An ``ego`` file needs the training graph before it can rank."""
        if self.kind == "ego":
            raise UnsupportedOp(
                f"{what} needs final vectors, but {self.artifact.path} is of kind 'ego': its vectors still have to be "
                "propagated over the training graph; measure it with its data set, or compress to a baked file."
            )

    def _value(self, row: Mapping[str, Any], name: str) -> Any:
        """The entry of a field, or a :class:`DataError` that names it."""
        if name not in row:
            raise DataError(f"Expected a value for each field, but {name!r} is missing; pass None where it is unknown.")
        return row[name]


def _top(scores: NDArray[np.float32], k: int) -> NDArray[np.int64]:
    """Positions of the ``k`` largest scores, falling; ties by rising position."""
    threshold = np.partition(scores, len(scores) - k)[len(scores) - k] if k else np.float32(0)
    above, equal = np.flatnonzero(scores > threshold), np.flatnonzero(scores == threshold)
    best = np.concatenate([above, equal[: k - len(above)]])
    return best[np.lexsort((best, -scores[best]))]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command ``python -m pocketrec.runtime``; returns its exit code."""
    options = _parser().parse_args(arguments)
    try:
        for line in options.run(options):
            sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
    except PocketRecError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _parser() -> argparse.ArgumentParser:
    """Three verbs on one file."""
    parser = argparse.ArgumentParser(
        prog="python -m pocketrec.runtime", description="Use a PocketRec file; needs numpy only."
    )
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    score = verbs.add_parser("score", help="one score a line, for rows given as JSON objects")
    score.add_argument("--row", action="append", help="a row; default: one a line from standard input")
    score.set_defaults(run=_score)
    recommend = verbs.add_parser("recommend", help="the best items for a user, with scores")
    recommend.add_argument("--user", required=True)
    recommend.add_argument("-k", type=int, default=20)
    recommend.add_argument("--exclude", nargs="*", default=[], metavar="ITEM")
    recommend.set_defaults(run=_recommend)
    inspect = verbs.add_parser("inspect", help="what the file holds, as JSON")
    inspect.add_argument("--verify", action="store_true", help="check every byte")
    inspect.set_defaults(run=_inspect)
    for verb in (score, recommend, inspect):
        verb.add_argument("file", type=Path)
    return parser


def _score(options: argparse.Namespace) -> Iterator[str]:
    """Scores of JSON rows, in batches."""
    model = open(options.file)
    rows = map(_row, options.row if options.row is not None else sys.stdin)
    while batch := list(islice(rows, BATCH_ROWS)):
        yield from (repr(float(score)) for score in model.score_many(batch))


def _row(text: str) -> Mapping[str, Any]:
    """One row from its JSON text."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"A row must be a JSON object, but got {text.strip()[:80]!r}: {error}.") from error
    if not isinstance(row, dict):
        raise DataError(f"A row must be a JSON object, but got {text.strip()[:80]!r}.")
    return cast("Mapping[str, Any]", row)


def _recommend(options: argparse.Namespace) -> Iterator[str]:
    """Item and score, separated by a tab."""
    for item, score in open(options.file).recommend(options.user, options.k, options.exclude):
        yield f"{item}\t{score!r}"


def _inspect(options: argparse.Namespace) -> Iterator[str]:
    """The header, told as JSON."""
    artifact = open(options.file).artifact
    if options.verify:
        artifact.verify()
    yield json.dumps(artifact.describe(), indent=2)


if __name__ == "__main__":
    sys.exit(main())
