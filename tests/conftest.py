"""What several folders share: small click logs and visits, models of them, instruction sets, and the exam's laboratory.

Data sets are encoded once a session and never written to; models are built once a file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from pocketrec.native import library

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


def synthetic(folder: Path, rows: int, cardinalities: tuple[int, ...], hashed: bool, threshold: int | None = None):
    """Clicks drawn by a known model, encoded."""
    from pocketrec.data.encode import encode
    from pocketrec.sources.synthetic import Synthetic

    options = {} if threshold is None else {"threshold": threshold}
    return encode(Synthetic(rows=rows, cardinalities=cardinalities, hashed=hashed), None, folder / "data", **options)


@pytest.fixture(scope="session")
def clicks(tmp_path_factory):
    """1,500 clicks of three fields of text, some of whose values are too rare to have a row."""
    return synthetic(tmp_path_factory.mktemp("clicks"), 1500, (120, 30, 6), hashed=True, threshold=2)


@pytest.fixture(scope="session")
def wide_clicks(tmp_path_factory):
    """3,000 clicks of four fields of text, one with 300 values."""
    return synthetic(tmp_path_factory.mktemp("clicks"), 3000, (300, 80, 20, 5), hashed=True)


@pytest.fixture(scope="session")
def dense_clicks(tmp_path_factory):
    """1,500 clicks of three fields of whole numbers."""
    return synthetic(tmp_path_factory.mktemp("clicks"), 1500, (60, 20, 5), hashed=False)


@pytest.fixture(scope="session")
def few_clicks(tmp_path_factory):
    """400 clicks of two fields of whole numbers."""
    return synthetic(tmp_path_factory.mktemp("clicks"), 400, (40, 9), hashed=False)


@pytest.fixture(scope="module")
def model(clicks):
    """A DeepFM of width 4 on ``clicks``, not trained."""
    from pocketrec.backbones.deepfm import DeepFM

    return DeepFM(dim=4, hidden=(8,)).build(clicks, 0)


@pytest.fixture(scope="module")
def wide_model(wide_clicks):
    """A DeepFM of width 8 on ``wide_clicks``, not trained."""
    from pocketrec.backbones.deepfm import DeepFM

    return DeepFM(dim=8, hidden=(8,)).build(wide_clicks, 0)


def drawn_lists(folder: Path) -> Path:
    """Adjacency lists of 30 users with 8 of 40 items each, drawn."""
    rng = np.random.default_rng(0)
    lines = [" ".join(map(str, [u, *sorted(rng.choice(40, 8, replace=False))])) for u in range(30)]
    (folder / "train.txt").write_text("\n".join(lines) + "\n")
    return folder / "train.txt"


@pytest.fixture(scope="session")
def visits(tmp_path_factory):
    """Visits of 30 users to 8 of 40 items each, all for training or validation."""
    from pocketrec.data.encode import encode
    from pocketrec.sources.adjacency import Adjacency

    folder = tmp_path_factory.mktemp("visits")
    return encode(Adjacency(), drawn_lists(folder), folder / "data")


@pytest.fixture(scope="session")
def tested_visits(tmp_path_factory):
    """The same with a tenth for validation, and one more visit of each user for testing."""
    from pocketrec.data.encode import encode
    from pocketrec.sources.adjacency import Adjacency

    folder = tmp_path_factory.mktemp("visits")
    test = folder / "test.txt"
    test.write_text("\n".join(f"{u} {(u * 7) % 40}" for u in range(30)) + "\n")
    return encode(Adjacency(), drawn_lists(folder), folder / "data", test=test, valid_fraction=0.1)


@pytest.fixture(scope="session")
def even_visits(tmp_path_factory):
    """Visits of 30 users to 8 of 25 items each, at even steps."""
    from study_cases import pairs_file

    from pocketrec.data.encode import encode
    from pocketrec.sources.adjacency import Adjacency

    folder = tmp_path_factory.mktemp("visits")
    return encode(Adjacency(), pairs_file(folder), folder / "data")


@pytest.fixture(params=[*library.LEVELS, "numpy"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each instruction set in turn (capped at what the processor has), then numpy alone."""
    if request.param == "numpy":
        monkeypatch.setattr(library, "compiled", lambda: None)
    else:
        library.limit(request.param)
    yield request.param
    library.limit(library.LEVELS[-1])
