"""Each method meets any target by its own solver: exactly or just under, or it names the least that it reaches."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from study_cases import pairs_file

from pocketrec.backbones.deepfm import DeepFM
from pocketrec.backbones.neumf import NeuMF
from pocketrec.compression.budget import Room
from pocketrec.compression.ladder import Method
from pocketrec.data.encode import encode
from pocketrec.errors import BudgetError
from pocketrec.families.evolution import Evolution
from pocketrec.format.block import Storage
from pocketrec.format.vocabulary import Vocabulary
from pocketrec.methods.cerp import CERP
from pocketrec.methods.dhe import DHE
from pocketrec.methods.opt_embed import OptEmbed
from pocketrec.methods.opt_embed_d import OptEmbedD
from pocketrec.methods.pep import PEP
from pocketrec.methods.ptq import PTQ
from pocketrec.methods.qr import QR
from pocketrec.methods.tt_rec import TTRec
from pocketrec.models.table import Table
from pocketrec.sources.adjacency import Adjacency
from pocketrec.sources.synthetic import Synthetic
from pocketrec.training.loop import Training
from pocketrec.training.run import Run

TRAINING = (Training(epochs=2, batch_size=128, learning_rate=1e-2),)
FEW = Evolution(population=2, generations=1, children=1, parents=2)
EXACT: list[Method] = [
    PEP(),
    PEP(scope="block"),
    CERP(),
    CERP(operation="concat"),
    OptEmbed(search=FEW),
    OptEmbedD(search=FEW),
]
UNDER: list[Method] = [QR(), QR(large="quotient"), TTRec(), TTRec(cache_share=0), DHE(functions=8), DHE(depth=1), PTQ()]
METHODS = [*EXACT, *UNDER]
NAMES = [f"{method.name}-{i}" for i, method in enumerate(METHODS)]


@pytest.fixture(scope="module")
def ladders(tmp_path_factory):
    """Of each method, by task: prepared once, the dense table, and how many bytes a table takes in a file."""
    folder = tmp_path_factory.mktemp("targets")
    clicks = encode(Synthetic(rows=500, cardinalities=(150, 40, 5), hashed=True), None, folder / "clicks")
    visits = encode(Adjacency(), pairs_file(folder), folder / "visits")
    made = Ladders()
    for task, data, backbone in (
        ("ctr", clicks, DeepFM(dim=8, hidden=(4,))),
        ("cf", visits, NeuMF(dim=4, hidden=(4,))),
    ):
        model = backbone.build(data, 0)
        for method in METHODS:
            made[method, task] = method.prepare(model, data, Run(None, training=TRAINING)), model.table, data
    return made


class Ladders(dict):
    """What hypothesis need not spell out."""

    def __repr__(self) -> str:
        return "ladders"


def packed_bytes(table: Table, data, storage: Storage) -> int:
    rows = Vocabulary.build(data.schema, table.stored().numpy(), data.hashes)[1]
    return table.pack(storage, rows).size_bytes


def reached(ask, size: int, least: str) -> tuple[int, Table]:
    """The table for a size; or the least size that the refusal names, and the table for that."""
    try:
        return size, ask(size)
    except BudgetError as error:
        return getattr(error, least), ask(getattr(error, least))


def step(method: Method, table: Table) -> int:
    """Values that a method may leave over: those of its smallest step at this size, in every block."""
    if isinstance(method, PTQ):
        return 0
    parts = table.compositions  # type: ignore[attr-defined]
    if isinstance(method, QR) and method.large == "remainder":
        return sum((len(part.quotient) + 2) * part.remainder.shape[1] for part in parts)
    if isinstance(method, TTRec) and method.cache_share:
        return sum(part.width for part in parts)
    if isinstance(method, DHE):
        return sum(sum(part.plan.widths) + 3 * len(part.plan.widths) for part in parts)
    return table.values()


@pytest.mark.parametrize("task", ["ctr", "cf"])
@pytest.mark.parametrize("method", METHODS, ids=NAMES)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1))
def test_any_number_of_values_is_met_or_refused_with_the_least(ladders, method, task, share):
    ladder, dense, _ = ladders[method, task]
    asked = int(share * dense.values())
    values, table = reached(lambda values: ladder.table(Room(values=values)), asked, "least_values")
    if values > asked:
        with pytest.raises(BudgetError):
            ladder.table(Room(values=values - 1))
    if method in EXACT:
        assert table.values() == min(values, dense.values())
    else:
        assert table.values() <= values
        assert values - table.values() <= step(method, table) or table.values() == dense.values()


@pytest.mark.parametrize("task", ["ctr", "cf"])
@pytest.mark.parametrize("method", METHODS, ids=NAMES)
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(share=st.floats(0, 1), storage=st.sampled_from(["fp32", "fp16", "int8"]))
def test_any_number_of_bytes_is_met_or_refused_with_the_least(ladders, method, task, share, storage):
    ladder, dense, data = ladders[method, task]
    asked = int(share * packed_bytes(dense, data, storage))
    size, table = reached(lambda size: ladder.table(Room(size_bytes=size, storage=storage)), asked, "least_bytes")
    assert size >= asked
    waste = size - packed_bytes(table, data, storage)
    assert waste >= 0
    if not isinstance(method, PTQ) and table.values() < dense.values():
        masks = sum(len(part.books) for part in table.compositions) if isinstance(method, CERP) else 0  # type: ignore[attr-defined]
        assert waste <= 96 + size // 500 + 2 * masks + (0 if method in EXACT else 4 * step(method, table))
