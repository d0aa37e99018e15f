"""The command ``pocketrec``: runs a verb, and turns every expected failure into one line and an exit code.

Exit codes: 0 done, 2 the user's settings, 3 the data or a file, 4 a resource (memory, disk, lock, divergence), 130
interrupted, 143 terminated. Anything else that escapes is a bug and shows its traceback.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from pocketrec.errors import PocketRecError, StorageError

_EXTRA = {"click": "train", "rich": "train", "torch": "train", "polars": "train", "psutil": "train",
          "matplotlib": "report", "jinja2": "bench", "ray": "cluster"}  # fmt: skip


class Terminated(BaseException):
    """SIGTERM came: unwind, release locks, leave."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run ``pocketrec`` with ``arguments`` (default: the process's) and exit."""
    signal.signal(signal.SIGTERM, _terminate)
    try:
        from pocketrec.command.verbs import run

        run(list(sys.argv[1:] if arguments is None else arguments))
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRA:
            raise
        _leave(f"this needs {missing}: pip install 'pocketrec[{_EXTRA[missing]}]'", 2)
    except PocketRecError as error:
        _leave(str(error), error.exit_code)
    except MemoryError:
        _leave("out of memory; use a smaller batch size, a smaller table, or a larger machine.", 4)
    except OSError as error:
        _leave(str(error), StorageError.exit_code)
    except KeyboardInterrupt:
        _leave("interrupted; run the same command again to go on.", 130)
    except Terminated:
        _leave("terminated; run the same command again to go on.", 143)


def _terminate(_number: int, _frame: FrameType | None) -> NoReturn:
    raise Terminated


def _leave(message: str, code: int) -> NoReturn:
    line = " ".join(message.split())
    sys.stderr.write(f"pocketrec: {line}\n")
    sys.exit(code)


if __name__ == "__main__":
    main()
