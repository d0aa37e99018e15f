"""Steps within steps: a search that trains inside its own step goes on where it was cut, to the same bytes."""

from __future__ import annotations

import numpy as np
import pytest
from test_train import BACKBONE, clicks

from pocketrec.training.evaluate import validate
from pocketrec.training.loop import Training
from pocketrec.training.run import Run

RATES = (1e-3, 3e-3, 1e-2)


class Cut(Exception):
    """Where a process would be killed."""


def searched(run: Run, data, cut_at: int | None = None) -> dict:
    """The figure of a training at each rate, kept after each; stops before the training ``cut_at``."""

    def compute(checkpoint):
        figures = (checkpoint.load() or {"figures": np.zeros(0)})["figures"].tolist()
        while len(figures) < len(RATES):
            if len(figures) == cut_at:
                raise Cut
            training = Training(epochs=1, batch_size=64, learning_rate=RATES[len(figures)])
            model = run.fit("inner", BACKBONE.build(data, 0), data, training)
            figures.append(validate(model, data.valid) or 0.0)
            checkpoint.save({"figures": np.array(figures)})
        return {"figures": np.array(figures)}

    return run.once("outer", {"rates": RATES, "data": data.digest}, compute)


@pytest.mark.parametrize("cut_at", range(len(RATES)))
def test_a_search_that_is_cut_goes_on_to_the_same_figures_and_trains_nothing_twice(cut_at, tmp_path):
    data = clicks()
    with Run(tmp_path / "whole") as run:
        expected = searched(run, data)
    with Run(tmp_path / "cut") as run, pytest.raises(Cut):
        searched(run, data, cut_at)
    with Run(tmp_path / "cut") as run:
        found = searched(run, data)
        again = searched(run, data)
        trained = [entry for entry in run.logged() if entry["stage"] == "inner" and entry.get("epoch") == 0]
    assert np.array_equal(found["figures"], expected["figures"])
    assert np.array_equal(again["figures"], expected["figures"])
    assert len(trained) == len(RATES)


def test_an_inner_step_that_is_cut_leaves_the_outer_one_free_to_go_on(tmp_path):
    data = clicks()

    def stop(stage, done, total, figures):
        if stage == "inner" and done > 2:
            raise Cut

    with Run(tmp_path / "cut", progress=stop) as run, pytest.raises(Cut):
        searched(run, data)
    with Run(tmp_path / "cut") as run, Run(tmp_path / "whole") as other:
        assert np.array_equal(searched(run, data)["figures"], searched(other, data)["figures"])
