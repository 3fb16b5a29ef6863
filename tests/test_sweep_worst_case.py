"""The sweep on worst-case forget sets: its scales name what there is, and its findings say what the numbers are."""

from typing import Any

import pytest
from scripts import SWEEPS, script

from vislearn import methods
from vislearn.cli import parameters
from vislearn.plan import read_method
from vislearn.recipe import load_yaml
from vislearn.worst_case import Settings

WORSE = ("RandomLabels", "BoundaryExpand", "BoundaryShrink", "SalUn")


@pytest.fixture(scope="module")
def reproduce() -> Any:
    return script("worst_case/reproduce")


@pytest.mark.parametrize("name", ["smoke", "cpu", "paper"])
def test_a_scale_names_methods_arguments_and_settings(reproduce: Any, name: str) -> None:
    scale = load_yaml(SWEEPS / "worst_case" / f"{name}.yaml")
    entries = [read_method(m)[1] for m in reproduce.settings_of(scale)]
    assert [e["class_path"] for e in entries] == list(reproduce.METHODS)
    for entry in entries:
        arguments = entry.get("init_args", {})
        assert set(arguments) <= parameters(getattr(methods, entry["class_path"])), entry
        getattr(methods, entry["class_path"])(**arguments)
        if name == "cpu" and not entry["class_path"].startswith("Boundary"):
            assert arguments["epochs"] <= 2
    assert Settings(**scale["search"]).budget == 0.1


def results(gaps: dict[str, float], retrained: dict[str, float], spread: float = 0.1) -> dict[str, Any]:
    each = {name: {"gap": {"mean": g, "low": g - spread, "high": g + spread}} for name, g in gaps.items()}
    return {"retrained": {name: {"mean": v} for name, v in retrained.items()}, "methods": each}


def test_findings(reproduce: Any) -> None:
    curve = {"curve": [{"overlap_start": 100}], "rows": 1000, "candidates": 10000, "overlap_by_chance": 100.0}
    random = results(dict.fromkeys(reproduce.METHODS, 5.0), {"UA": 5.0, "MIA": 13.0})
    worst = results({name: 25.0 if name in WORSE else 1.0 for name in reproduce.METHODS}, {"UA": 0.1, "MIA": 1.0})
    found = reproduce.checks({"random": random, "worst": worst}, curve)
    assert len(found) == 3 + len(reproduce.METHODS)
    assert all(check["reproduced"] is True for check in found)
    found = reproduce.checks({"random": worst, "worst": random}, curve | {"curve": [{"overlap_start": 1000}]})
    assert all(check["reproduced"] is False for check in found)
    del random["methods"]["SalUn"], random["retrained"]["MIA"]
    random["retrained"]["UA"]["mean"] = 0.0  # a share of nothing
    unknown = [c for c in reproduce.checks({"random": random, "worst": worst}, curve) if c["reproduced"] is None]
    assert [c["claim"].split()[0] for c in unknown] == ["UA", "MIA", "SalUn"]


def test_intervals_that_meet_are_said(reproduce: Any) -> None:
    curve = {"curve": [{"overlap_start": 100}], "rows": 1000, "candidates": 10000, "overlap_by_chance": 100.0}
    sides = {name: results({"SCRUB": g}, {}, spread=3.0) for name, g in (("random", 5.0), ("worst", 4.0))}
    (check,) = (c for c in reproduce.checks(sides, curve) if c["claim"].startswith("SCRUB"))
    assert check["found"] == "mean gap 5.00 on random rows, 4.00 on the worst; the intervals meet"
    assert check["reproduced"] is None, "an order that the seeds do not tell"


def test_numbers_of_seeds(reproduce: Any) -> None:
    found = reproduce.numbers({"forget/accuracy": [0.9, 1.0], "test/accuracy": [0.5], "retain/accuracy": []})
    assert found["UA"] == pytest.approx([10.0, 0.0])
    assert found["TA"] == [50.0]
    assert set(found) == {"UA", "TA"}
    assert reproduce.with_interval([3.0])["half"] is None
    assert reproduce.with_interval([1.0, 2.0])["half"] == pytest.approx(12.706 / 2, rel=1e-4)
