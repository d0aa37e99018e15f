"""The runtime says what the whole table says, for known, unknown and hostile values, and needs numpy only."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from artifact_cases import Case, click, ranking
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pocketrec import runtime
from pocketrec.errors import ConfigError, DataError, UnsupportedOp
from pocketrec.format.artifact import Contents
from pocketrec.format.block import PackedRange
from pocketrec.format.packed import Packed
from pocketrec.format.program import Op, Program
from pocketrec.format.vocabulary import Vocabulary, hash64
from pocketrec.schema import Field, Schema

USERS, ITEMS = 300, 40


@pytest.fixture(scope="module")
def click_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path]:
    case = click(USERS, ITEMS, 4, "fp32")
    path = tmp_path_factory.mktemp("runtime") / "click.safetensors"
    case.contents.write(path)
    return case, path


@pytest.fixture(scope="module")
def baked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path]:
    case = ranking(20, 300)
    path = tmp_path_factory.mktemp("runtime") / "baked.safetensors"
    case.contents.write(path)
    return case, path


def table_rows(case: Case, user: Any, item: Any) -> list[int]:
    """Rows of the whole table that a raw row reads; the out-of-vocabulary row, which is absent, for unknown values."""
    users, items = case.contents.schema.fields
    local = int(user[1:]) if user in {f"u{i}" for i in range(USERS)} else users.size - 1
    inside = isinstance(item, int) and 0 <= item - items.first < items.size - 1
    return [local, items.offset + (item - items.first if inside else items.size - 1)]


def probabilities(case: Case, rows: list[list[int]]) -> NDArray[np.float64]:
    logits = case.contents.program(case.table[np.array(rows)]).astype(np.float64)
    return 1 / (1 + np.exp(-logits))


# ---- click models ------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, USERS + 5).map("u{}".format) | st.text(max_size=5) | st.none(),
            st.integers(5, 60) | st.integers(-(2**70), 2**70) | st.none(),
        ),
        max_size=20,
    )
)
def test_scores_are_those_of_the_whole_table(click_file: tuple[Case, Path], raw: list[tuple[Any, Any]]) -> None:
    case, path = click_file
    model = runtime.open(path)
    rows = [{"user": user, "item": item, "ignored": 1} for user, item in raw]
    expected = probabilities(case, [table_rows(case, *r) for r in raw]) if raw else np.zeros(0)
    np.testing.assert_allclose(model.score_many(rows), expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose([model.score(row) for row in rows], expected, rtol=1e-6, atol=1e-7)
    columns = {"user": [u for u, _ in raw], "item": [i for _, i in raw]}
    np.testing.assert_array_equal(model.score_many(columns), model.score_many(rows))


def test_one_hundred_thousand_random_ids_read_the_absent_row(click_file: tuple[Case, Path]) -> None:
    case, path = click_file
    model = runtime.open(path)
    generator = np.random.default_rng(0)
    extremes = [np.iinfo(np.int64).min, np.iinfo(np.int64).max, -1, 0, 9, 10 + ITEMS, case.contents.schema.rows]
    items = np.concatenate([np.array(extremes), generator.integers(-(2**63), 2**63 - 1, 100_000)])
    users = [f"stranger {i}" for i in range(len(items))]
    scores = model.score_many({"user": users, "item": items})
    expected = probabilities(case, [table_rows(case, None, None)])[0]
    np.testing.assert_allclose(scores, expected, rtol=1e-6)
    assert len(set(scores.tolist())) == 1


def test_scores_do_not_depend_on_the_batch(click_file: tuple[Case, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    _, path = click_file
    rows = {"user": [f"u{i % 350}" for i in range(1000)], "item": [i % 60 for i in range(1000)]}
    whole = runtime.open(path).score_many(rows)
    monkeypatch.setattr(runtime, "BATCH_ROWS", 7)
    np.testing.assert_allclose(runtime.open(path).score_many(rows), whole, rtol=1e-6)


def test_extreme_logits_are_probabilities(tmp_path: Path) -> None:
    schema = Schema("ctr", (Field("x", 3, 0, "dense"),))
    values = np.array([[1e30], [-1e30], [0]], np.float32)
    zeros = np.zeros((1, 1), np.float32)
    vocabulary, rows = Vocabulary.build(schema, np.ones(3, bool), lambda i: hash64([]))
    packed = Packed.encode(values, None, zeros, zeros, (PackedRange("x", 0, 3, 0, 1),), schema.field_of_row, rows)
    program = Program((Op("sum", ("vectors",), "z"),))
    Contents("ctr", schema, vocabulary, packed, program, {}).write(tmp_path / "a")
    assert runtime.open(tmp_path / "a").score_many({"x": [0, 1, 2]}).tolist() == [1, 0, 0.5]


def test_rows_that_cannot_be_read_are_data_errors(click_file: tuple[Case, Path]) -> None:
    model = runtime.open(click_file[1])
    with pytest.raises(DataError, match="'item' is missing"):
        model.score({"user": "u1"})
    with pytest.raises(DataError, match="'item' is missing"):
        model.score_many([{"user": "u1", "item": 10}, {"user": "u1"}])
    with pytest.raises(DataError, match="'item' is missing"):
        model.score_many({"user": ["u1"]})
    with pytest.raises(DataError, match="equal length"):
        model.score_many({"user": ["u1", "u2"], "item": [10]})
    with pytest.raises(DataError, match="'item' takes text"):
        model.score({"user": "u1", "item": 10.5})


def test_a_click_model_does_not_recommend(click_file: tuple[Case, Path]) -> None:
    with pytest.raises(UnsupportedOp, match="click model"):
        runtime.open(click_file[1]).recommend("u1")


# ---- ranking models ----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    user=st.integers(-3, 25) | st.integers(0, 19).map(str) | st.just("nobody"),
    k=st.integers(1, 400),
    exclude=st.lists(st.integers(95, 405) | st.integers(100, 399).map(str), max_size=30),
)
def test_recommend_is_brute_force_with_ties_by_item(
    baked: tuple[Case, Path], user: Any, k: int, exclude: list[Any]
) -> None:
    case, path = baked
    known = str(user).lstrip("-").isdigit() and 0 <= int(user) < 20
    vector = case.table[int(user)] if known else case.contents.packed.absent[0]
    scores = case.table[20:] @ vector
    left = {int(i) for i in exclude}
    order = sorted((i for i in range(300) if 100 + i not in left), key=lambda i: (-scores[i], i))[:k]
    found = runtime.open(path).recommend(user, k, exclude)
    assert [item for item, _ in found] == [100 + i for i in order]
    np.testing.assert_allclose([score for _, score in found], scores[order], rtol=1e-6)


def test_a_ranking_score_is_the_inner_product(baked: tuple[Case, Path]) -> None:
    case, path = baked
    model = runtime.open(path)
    assert model.score({"user": 3, "item": 107}) == case.table[3] @ case.table[27]
    assert model.recommend(3, 1)[0][1] == max(case.table[20:] @ case.table[3])


@pytest.mark.parametrize("k", [0, -1, 1.5, True, "3", None])
def test_k_must_be_a_positive_integer(baked: tuple[Case, Path], k: Any) -> None:
    with pytest.raises(ConfigError, match="`k`"):
        runtime.open(baked[1]).recommend(0, k)


def test_an_ego_file_neither_scores_nor_recommends(tmp_path: Path) -> None:
    ranking(kind="ego").contents.write(tmp_path / "a")
    model = runtime.open(tmp_path / "a")
    with pytest.raises(UnsupportedOp, match="propagated"):
        model.recommend(0)
    with pytest.raises(UnsupportedOp, match="propagated"):
        model.score({"user": 0, "item": 100})


def test_hashed_items_cannot_be_named(tmp_path: Path) -> None:
    schema = Schema("cf", (Field("user", 1, 0, "dense", oov=False), Field("item", 2, 1, oov=False)))
    vocabulary, rows = Vocabulary.build(schema, np.ones(3, bool), lambda i: hash64(["a", "b"]))
    zeros = np.zeros((2, 1), np.float32)
    blocks = (PackedRange("all", 0, 3, 0, 1),)
    packed = Packed.encode(np.ones((3, 1), np.float32), None, zeros, zeros, blocks, schema.field_of_row, rows)
    Contents("baked", schema, vocabulary, packed, Program((Op("dot", ("vectors",), "s"),)), {}).write(tmp_path / "a")
    model = runtime.open(tmp_path / "a")
    assert model.score({"user": 0, "item": "a"}) == 1
    with pytest.raises(UnsupportedOp, match="hashes of its item ids"):
        model.recommend(0)


# ---- the command -------------------------------------------------------------------------------------------------


def test_neither_torch_nor_polars_is_loaded(click_file: tuple[Case, Path], baked: tuple[Case, Path]) -> None:
    code = (
        "import sys; from pocketrec import runtime\n"
        "runtime.open(sys.argv[1]).score({'user': 'u1', 'item': 10}); runtime.open(sys.argv[2]).recommend(1)\n"
        "assert not {'torch', 'polars', 'typer', 'scipy', 'safetensors'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(click_file[1]), str(baked[1])], check=True)


def test_the_command_runs_as_a_module(click_file: tuple[Case, Path]) -> None:
    arguments = ["score", str(click_file[1]), "--row", '{"user": "u1", "item": 12}']
    done = subprocess.run([sys.executable, "-W", "error", "-m", "pocketrec.runtime", *arguments], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == runtime.open(click_file[1]).score({"user": "u1", "item": 12})


def test_a_closed_pipe_is_no_error(baked: tuple[Case, Path]) -> None:
    command = f"'{sys.executable}' -m pocketrec.runtime recommend '{baked[1]}' --user 1 -k 300 | true"
    done = subprocess.run(["/bin/sh", "-c", command], capture_output=True, check=True)
    assert done.stderr == b""


def test_an_interrupt_is_an_exit_code(click_file: tuple[Case, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(rows: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(runtime.Recommender, "score_many", lambda self, rows: interrupted(rows))
    assert runtime.main(["score", str(click_file[1]), "--row", "{}"]) == 130


def test_score_reads_lines(click_file: tuple[Case, Path], capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"user": f"u{i}", "item": i} for i in range(30)]
    monkeypatch.setattr(sys, "stdin", [json.dumps(row) + "\n" for row in rows])
    assert runtime.main(["score", str(click_file[1])]) == 0
    printed = [float(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == runtime.open(click_file[1]).score_many(rows).tolist()


def test_recommend_prints_items_and_scores(baked: tuple[Case, Path], capsys: Any) -> None:
    assert runtime.main(["recommend", str(baked[1]), "--user", "3", "-k", "2", "--exclude", "101", "102"]) == 0
    printed = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert [(int(item), float(score)) for item, score in printed] == runtime.open(baked[1]).recommend(3, 2, [101, 102])


def test_inspect_prints_json(click_file: tuple[Case, Path], capsys: Any) -> None:
    assert runtime.main(["inspect", str(click_file[1]), "--verify"]) == 0
    assert json.loads(capsys.readouterr().out) == runtime.open(click_file[1]).artifact.describe()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["score", "FILE", "--row", "not json"], 3),
        (["score", "FILE", "--row", "[1]"], 3),
        (["score", "FILE", "--row", '{"user": "u1"}'], 3),
        (["score", "FILE", "--row", "[" * 100_000], 3),
        (["recommend", "FILE", "--user", "1"], 2),
        (["inspect", "TEXT"], 3),
        (["inspect", "NOTHING"], 4),
    ],
)
def test_errors_are_one_line_with_an_exit_code(
    click_file: tuple[Case, Path], tmp_path: Path, capsys: Any, arguments: list[str], code: int
) -> None:
    (tmp_path / "text").write_text("hello world")
    names = {"FILE": click_file[1], "TEXT": tmp_path / "text", "NOTHING": tmp_path / "nothing"}
    assert runtime.main([str(names.get(a, a)) for a in arguments]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
