"""The sweep of SalUn, l1-sparse and SCRUB: each finding on numbers made by hand, where it holds and where not."""

from typing import Any

import pytest
from made_rule import made_rule
from scripts import SWEEPS, script

from vislearn.reproduction import Rule, expected

METHODS = ("FineTune", "RandomLabels", "GradientAscent", "L1Sparse", "SalUn", "SCRUB", "PruneFirst")


@pytest.fixture(scope="module")
def baselines() -> Any:
    return script("baselines/reproduce")


def model(forget: float, test: float, member: float) -> dict[str, Any]:
    """Three seeds that hardly differ."""
    keys = {"forget/accuracy": forget, "retain/accuracy": 0.99, "test/accuracy": test, "test_retain/accuracy": test,
            "forget/mia_svc_confidence": member}  # fmt: skip
    return {key: [v, v + 0.0005, v - 0.0005] for key, v in keys.items()}


TENTH = {
    "retrained": (0.95, 0.94, 0.87), "FineTune": (0.99, 0.94, 0.97), "RandomLabels": (0.93, 0.92, 0.63),
    "GradientAscent": (0.99, 0.93, 0.98), "L1Sparse": (0.96, 0.91, 0.90), "SalUn": (0.955, 0.94, 0.86),
    "SCRUB": (0.97, 0.93, 0.95), "PruneFirst": (0.97, 0.94, 0.92),
}  # fmt: skip
CLASS = {
    "retrained": (0.0, 0.95, 0.0), "FineTune": (0.78, 0.94, 0.25), "RandomLabels": (0.1, 0.9, 0.1),
    "GradientAscent": (0.07, 0.87, 0.06), "L1Sparse": (0.02, 0.91, 0.02), "SalUn": (0.01, 0.94, 0.02),
    "SCRUB": (0.002, 0.95, 0.001), "PruneFirst": (0.26, 0.94, 0.17),
}  # fmt: skip


def rules(tenth: dict[str, Any] | None = None, whole: dict[str, Any] | None = None) -> dict[str, Rule]:
    made = [{name: model(*v) for name, v in ({**base, **(other or {})}).items()}
            for base, other in ((TENTH, tenth), (CLASS, whole))]  # fmt: skip
    return {"random 10 %": made_rule(made[0], kind="RandomForget", title="random 10 %"),
            "class": made_rule(made[1], kind="ClassForget", title="class 0")}  # fmt: skip


def test_every_finding_has_its_question(baselines: Any) -> None:
    assert {f["id"] for f in expected(SWEEPS / "baselines")["findings"]} == set(baselines.CHECKS)


def test_all_findings_hold_on_numbers_that_show_them(baselines: Any) -> None:
    names = [name for name in baselines.CHECKS if name != "cells"]
    assert {name: baselines.CHECKS[name](rules())[0] for name in names} == dict.fromkeys(names, True)


@pytest.mark.parametrize(("name", "tenth", "whole"), [
    ("salun", {"SCRUB": (0.95, 0.94, 0.87)}, {}),
    ("relabel", {"RandomLabels": (0.9, 0.9, 0.95)}, {}),
    ("finetune", {"GradientAscent": (0.9, 0.9, 0.9)}, {}),
    ("l1", {"L1Sparse": (0.8, 0.7, 0.5)}, {}),
    ("l1_cost", {"L1Sparse": (0.96, 0.96, 0.9)}, {}),
    ("sparse", {}, {"PruneFirst": (0.9, 0.9, 0.9)}),
    ("class", {}, {"retrained": (0.1, 0.95, 0.0)}),
    ("class_order", {}, {"FineTune": (0.0, 0.94, 0.0)}),
    ("scrub", {}, {"SalUn": (0.0, 0.95, 0.0), "SCRUB": (0.1, 0.9, 0.1)}),
])  # fmt: skip
def test_each_finding_can_fail(baselines: Any, name: str, tenth: Any, whole: Any) -> None:
    verdict, numbers = baselines.CHECKS[name](rules(tenth, whole))
    assert verdict is False
    assert numbers


def test_a_tie_with_all_tells_nothing_of_scrub(baselines: Any) -> None:
    same = dict.fromkeys(METHODS, (0.1, 0.9, 0.1))
    assert baselines.scrub(rules(whole=same))[0] is None


def test_cells_of_the_tables(baselines: Any) -> None:
    table = expected(SWEEPS / "baselines")["tables"]["random 10 %"]
    names = [n for n, v in table.items() if isinstance(v, dict)]
    ours = {n: {"forget/accuracy": 1 - table[n]["UA"][0] / 100, "retain/accuracy": table[n]["RA"][0] / 100,
                "test/accuracy": table[n]["TA"][0] / 100,
                "forget/mia_svc_confidence": 1 - table[n]["MIA"][0] / 100} for n in names}  # fmt: skip
    spread = {n: {k: [v, v + 0.001, v - 0.001] for k, v in m.items()} for n, m in ours.items()}
    rule = made_rule(spread, kind="RandomForget", title="random 10 %")
    rows = baselines.compared(rule, "random 10 %")
    assert len(rows) == 4 * len(names)
    assert {row["verdict"] for row in rows} == {"reproduced"}
    (of,) = [r for r in rows if (r["model"], r["what"]) == ("SalUn", "MIA")]
    assert of["ours"] == pytest.approx([14.39, 14.29, 14.49])
    del spread["SalUn"]
    lacking = baselines.compared(made_rule(spread, kind="RandomForget", title="random 10 %"), "random 10 %")
    assert {r["verdict"] for r in lacking if r["model"] == "SalUn"} == {"cannot be told"}
    assert baselines.compared(made_rule(spread, title="class 3"), "class") == [], "no table is of that class"
