"""A made-up study and its report, written once."""

from __future__ import annotations

import signal
from unittest import mock

import pytest
from study_folder import write_study

from pocketrec import report


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Nothing here has to survive a power loss, and the command's signal handler is taken back."""
    before = signal.getsignal(signal.SIGTERM)
    with mock.patch("os.fsync"):
        yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("study") / "whole")


@pytest.fixture(scope="session")
def written(folder):
    with mock.patch("os.fsync"):
        return report.write(folder, replicates=300)


@pytest.fixture(scope="session")
def page(written):
    return written.page.read_text(encoding="utf-8")
