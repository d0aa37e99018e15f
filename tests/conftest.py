"""Shared fixtures: the exam's laboratory, and the place of the real data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
settings.register_profile("no clock", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("no clock")


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    from pocketrec.testing import Lab

    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder named by POCKETREC_DATA, or a skip with the reason."""
    folder = os.environ.get("POCKETREC_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("POCKETREC_DATA does not name a folder with the public data sets")
    return Path(folder)
