"""A process that loads everything once and runs each requested command in a fork of itself.

One JSON request a line on stdin: ``{"arguments": [...], "folder": ..., "environment": {...}}``; one JSON answer a line
on stdout: ``{"status": ..., "out": ..., "err": ...}``. The parent computes nothing, so its forks are as fresh processes
are. Steps checkpoint at every second boundary instead of every minute, and at the end of every epoch, however long that
took: no boundary hangs on the clock. Nothing is synced: a kill takes nothing from the kernel, only a power loss does.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch.profiler

from pocketrec import cli, registry
from pocketrec.command import verbs as commands  # noqa: F401
from pocketrec.compression import compress, measure  # noqa: F401
from pocketrec.data import dataset  # noqa: F401
from pocketrec.training import loop  # noqa: F401
from pocketrec.training.run import Run
from pocketrec.training.steps import Checkpoint

for axis in registry.AXES:
    for name in registry.modules(axis):
        registry.load(axis, name)
torch.optim.Adam([torch.zeros(1)])
gc.freeze()
os.fsync = lambda fd: None
Run.__init__.__kwdefaults__["checkpoint_calls"] = 2
Run.__init__.__kwdefaults__["checkpoint_seconds"] = float("inf")
Checkpoint.worth = lambda self: self.due() or self.path is not None


def forked(request: dict[str, Any], streams: tuple[Path, Path]) -> int:
    """Exit status of the command in a child; negative for the signal that killed it."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    status = 1
    try:
        os.chdir(request["folder"])
        os.environ.update(request["environment"])
        for fd, path in enumerate(streams, start=1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
        cli.main(request["arguments"])
        status = 0
    except SystemExit as left:
        status = int(left.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def serve(folder: Path) -> None:
    """Answer requests until stdin ends; ``folder`` takes the children's output."""
    streams = (folder / "out", folder / "err")
    for line in sys.stdin:
        status = forked(json.loads(line), streams)
        out, err = (path.read_text(encoding="utf-8") for path in streams)
        sys.stdout.write(json.dumps({"status": status, "out": out, "err": err}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
