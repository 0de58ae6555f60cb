"""What the benchmark of the training curves makes of them; test_training_curves.py walks so."""

import csv
import io
import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from curves import TAGS, Curve
from training_curves import CONTROL, GROUPS, Row, draw, summarise


def curve(first, last, relative=0.0):
    steps = range(first, last + 1)
    values = {at: (5 - at / 100) * (1 + relative * at) for at in steps}
    return Curve(dict.fromkeys(TAGS, values))


def rows():
    one = curve(1, 10)
    return [
        Row("CP2", GROUPS[0], curve(1, 10, 1e-8), one),
        Row("CP2, then CP4", GROUPS[2], curve(6, 10, -2e-8), one),
        Row(CONTROL, "control", curve(1, 10, 1e-3), one),
    ]


def test_a_row_tells_the_largest_difference_over_its_own_steps():
    whole, resumed, control = summarise(rows())
    assert (whole["first_step"], whole["last_step"]) == (1, 10)
    assert (resumed["first_step"], resumed["last_step"]) == (6, 10)
    for row, largest in ((whole, 1e-7), (resumed, 2e-7), (control, 1e-2)):
        assert row["largest_difference"].keys() == TAGS.keys()
        for value in row["largest_difference"].values():
            assert math.isclose(value, largest, rel_tol=1e-2)
    assert whole["flags"] == "--context-parallel-size 2"
    assert whole["loss"] == [4.99, 4.9]


def test_the_figures_data_hold_every_value_of_every_run():
    drawing = draw(rows())
    table = list(csv.DictReader(io.StringIO(drawing.csv)))
    assert len(table) == (10 + 5 + 10) * len(TAGS)
    assert {row["run"] for row in table} == {"CP2", "CP2, then CP4", CONTROL}
    assert float(table[-1]["relative_difference"]) == pytest.approx(1e-2)
