"""The sweep on biased data: its files can be read, and its lines of acceptance say what the numbers are."""

import json
from typing import Any

import pytest
from scripts import SWEEPS, script

from vislearn import methods
from vislearn.cli import parameters
from vislearn.plan import read_method, read_plan

FOLDER = SWEEPS / "bias"


@pytest.fixture(scope="module")
def reproduce() -> Any:
    return script("bias/reproduce")


def test_the_benchmark_file_names_methods_and_their_arguments() -> None:
    plan = read_plan(str(FOLDER / "coloured_digits.yaml"))
    assert plan.recipe["data"]["class_path"] == "ColouredDigits"
    for entry in plan.methods:
        _, config = read_method(entry)
        cls = getattr(methods, config["class_path"])
        assert set(config["init_args"]) <= parameters(cls)
        cls(**config["init_args"])


def test_every_expected_number_says_where_it_is_from() -> None:
    expected = json.loads((FOLDER / "expected.json").read_text())
    assert {e["source"] for e in expected["paper"]} == {"secondary source"}
    assert {e["source"] for e in expected["reference"]} == {"reference"}
    assert expected["paper"][0]["values"]["CUPID"] == 6.91


def made(test: tuple[float, float], auc: float, widening: float, kept: tuple[float, float], forget: float = 8,
         known: float = 60.0) -> dict:  # fmt: skip
    groups = {"all": forget, "aligned": 5.0, "conflicting": 40.0}
    return {
        "original": {
            "forget": {"conflicting": known},
            "test_forget": {"all": 50.0, "aligned": test[0], "conflicting": test[1]},
        },
        "auc": {"0.01": auc},
        "ascent": {"widening": widening, "retain": kept[0], "forget": groups},
        "CUPID": {"retain": kept[1], "forget": groups},
    }


def test_lines_of_acceptance(reproduce: Any) -> None:
    good = [made((100, 20), 0.95, 15, (95, 94)), made((99, 50), 0.9, 12, (60, 50))]
    assert [holds for holds, _ in reproduce.accepted(good)] == [True, True, True, True, False]
    bad = [made((80, 60), 0.8, 4, (95, 94), forget=30), made((100, 20), 0.95, 15, (95, 80))]
    lines = reproduce.accepted(bad)
    assert [holds for holds, _ in lines] == [False, False, False, False, False]
    assert "20, the least of the runs (wanted: at least 40)" in lines[0][1]
    assert lines[4][1].endswith("8 (wanted: at most 5)")


def test_a_gap_that_has_no_room_to_widen_tells_nothing(reproduce: Any) -> None:
    known, unknown = (made((100, 20), 0.95, 5, (95, 94), known=k) for k in (60.0, 7.5))
    assert reproduce.accepted([made((100, 20), 0.95, 15, (95, 94)), unknown])[2] == (
        True,
        "points by which plain ascent widens the gap on the way: 15, the least of the runs (1 of 2 can tell) "
        "(wanted: at least 10)",
    )
    assert reproduce.accepted([known, unknown])[2][0] is False
    assert reproduce.accepted([unknown])[2] == (
        None,
        "points by which plain ascent widens the gap on the way: no original knows enough conflicting rows to lose 10",
    )


def test_rates_rise_from_the_smallest(reproduce: Any) -> None:
    found = list(reproduce.rates(1e-3))
    assert found[:3] == [1e-3, 2e-3, 4e-3]
    assert len(found) == 9
