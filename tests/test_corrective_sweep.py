"""The recipes of the corrective benchmark, and the questions that its reproduction asks."""

from pathlib import Path
from typing import Any

import pytest
from report_corrective import corrective
from scripts import SWEEPS, script

from vislearn import methods
from vislearn.cli import parameters
from vislearn.grid import expand
from vislearn.networks import OWN
from vislearn.plan import read_method, read_plan

FOLDER = SWEEPS / "corrective"
RECIPES = sorted(FOLDER.glob("*/*.yaml"))


@pytest.fixture(scope="module")
def findings() -> Any:
    return script("corrective/findings")


def sides(findings: Any, change: Any = None) -> list[dict[str, Any]]:
    """The verdicts on hand-made results, which show every finding unless they are changed."""
    poisoning, confusion = corrective(), corrective(backdoor=False)
    for rule in poisoning["rules"]:
        rule["methods"] = [m for m in rule["methods"] if "dampening=0.1" not in m["title"]]
    for rule in confusion["rules"]:
        for m in rule["methods"]:
            if m["name"] == "SSD":
                m["metrics"]["corrective/acc_retain"] = [0.4, 0.41, 0.42]
    if change:
        change(poisoning["rules"], confusion["rules"])
    return findings.check(findings.Side.of(poisoning), findings.Side.of(confusion))


def test_recipes_come_in_pairs() -> None:
    names = {p.relative_to(FOLDER).as_posix() for p in RECIPES}
    assert len(names) == 8
    assert {n.replace("poisoning", "confusion") for n in names if "poisoning" in n} <= names


@pytest.mark.parametrize("file", RECIPES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_recipes_name_methods_arguments_and_networks(file: Path) -> None:
    plan = read_plan(str(file))
    entries = [read_method(e)[1] for m in plan.methods for e in expand(m)]
    for entry in entries:
        arguments = entry.get("init_args", {})
        assert set(arguments) <= parameters(getattr(methods, entry["class_path"])), entry
        getattr(methods, entry["class_path"])(**arguments)
    assert plan.recipe["model"]["init_args"]["arch"] in OWN
    gammas = [rule["init_args"]["gamma"] for rule in plan.forget]
    assert gammas == sorted(gammas)
    assert gammas[-1] == 1
    expected = {"smoke": 6, "cpu": 8, "paper": 39}[file.parent.name]
    assert len([e for e in entries if e["class_path"] == "SSD"]) == expected


def test_no_two_rules_of_the_full_grid_are_the_same() -> None:
    """Dampening at or above alpha is the same as both at dampening."""
    plan = read_plan(str(FOLDER / "paper" / "cifar10_poisoning.yaml"))
    points = [read_method(e)[1] for m in plan.methods for e in expand(m)]
    pairs = [(p["init_args"]["alpha"], p["init_args"]["dampening"]) for p in points if p["class_path"] == "SSD"]
    alphas = (0.1, 1, 10, 50, 100, 500, 1e3, 1e4, 1e5, 1e6)
    theirs = {(a, round(a * f, 9)) for a in alphas for f in (0.1, 0.5, 1, 5, 10)}
    same = {(max(a, d), d) for a, d in theirs}
    assert len(theirs) == 50
    assert len(pairs) == len(set(pairs)) == len(same) == 39
    assert set(pairs) == same


def test_all_findings_are_told(findings: Any) -> None:
    found = sides(findings)
    assert [(f["id"], f["verdict"]) for f in found] == [(i, "reproduced") for i in ("i", "ii", "iii", "iv", "v")]
    assert all(f["numbers"] and f["published"] and 1 <= f["tolerance"] < 6 for f in found)


def early(poisoning: list, confusion: list) -> None:
    poisoning[1]["models"]["retrained"]["metrics"]["corrective/acc_corr"] = [0.6, 0.6, 0.6]


def falls(poisoning: list, confusion: list) -> None:
    poisoning[3]["models"]["retrained"]["metrics"]["corrective/acc_corr"] = [0.4, 0.4, 0.4]


def layers(poisoning: list, confusion: list) -> None:
    for m in poisoning[3]["methods"]:
        if m["name"] == "CFk":
            m["metrics"]["corrective/acc_corr"] = [0.8, 0.8, 0.8]


def weak(poisoning: list, confusion: list) -> None:
    for m in poisoning[0]["methods"]:
        if m["name"] == "SSD":
            m["metrics"]["corrective/acc_corr"] = [0.2, 0.2, 0.2]


def wins(poisoning: list, confusion: list) -> None:
    for m in confusion[2]["methods"]:
        if m["name"] == "SSD":
            m["metrics"]["corrective/acc_retain"] = [0.91, 0.91, 0.91]


@pytest.mark.parametrize(
    ("change", "fails"), [(early, {"i", "ii"}), (falls, {"i"}), (layers, {"iii"}), (weak, {"iv"}), (wins, {"v"})]
)
def test_each_finding_can_fail(findings: Any, change: Any, fails: set[str]) -> None:
    assert {f["id"] for f in sides(findings, change) if f["verdict"] == "not reproduced"} == fails


def test_without_harm_or_a_clean_model_nothing_is_told(findings: Any) -> None:
    def unharmed(poisoning: list, confusion: list) -> None:
        for rule in poisoning:
            rule["models"]["original"]["metrics"]["corrective/acc_corr"] = [0.88, 0.88, 0.88]
        for rule in confusion:
            rule["models"].pop("clean")

    assert {f["verdict"] for f in sides(findings, unharmed)} == {"cannot be told"}


def test_a_wide_scatter_of_seeds_is_no_evidence(findings: Any) -> None:
    def scattered(poisoning: list, confusion: list) -> None:
        for rule in (*poisoning, *confusion):
            rule["models"]["original"]["metrics"]["corrective/acc_corr"] = [0.2, 0.45, 0.7]

    told = {f["id"]: f for f in sides(findings, scattered)}
    assert {told[i]["verdict"] for i in ("i", "ii", "iii", "iv")} == {"cannot be told"}
    assert "their means tell nothing" in told["i"]["numbers"]
    assert told["v"]["verdict"] == "reproduced", "it compares each model with the original that it was made from"


def test_dampening_has_to_win_with_every_seed_or_with_none(findings: Any) -> None:
    def won(*corr: float) -> Any:
        def change(poisoning: list, confusion: list) -> None:
            for rule in confusion:
                rule["models"]["original"]["metrics"] |= {
                    "corrective/acc_corr": [0.2, 0.45, 0.7], "corrective/acc_retain": [0.9, 0.9, 0.9]
                }  # fmt: skip
            (m, *_) = [m for m in confusion[1]["methods"] if m["name"] == "SSD"]
            m["metrics"] |= {"corrective/acc_corr": list(corr), "corrective/acc_retain": [0.895, 0.895, 0.895]}

        return change

    def verdict(*corr: float) -> tuple[str, str]:
        found = next(f for f in sides(findings, won(*corr)) if f["id"] == "v")
        return found["verdict"], found["numbers"]

    assert verdict(0.6, 0.6, 0.8)[0] == "not reproduced"
    assert verdict(0.6, 0.45, 0.7)[0] == "cannot be told"
    assert " 0 bring back a quarter of the harm and keep Acc_retain with every seed, 1 with some of 3" in verdict(
        0.6, 0.45, 0.7
    )[1]  # fmt: skip
    assert verdict(0.25, 0.45, 0.7)[0] == "reproduced"


def test_methods_that_did_not_run_are_said(findings: Any) -> None:
    def none(poisoning: list, confusion: list) -> None:
        for rule in (*poisoning, *confusion):
            for m in rule["methods"]:
                m |= {"status": "failed", "metrics": {}}

    told = {f["id"]: f["verdict"] for f in sides(findings, none)}
    assert told == {"i": "reproduced", "ii": "reproduced"} | dict.fromkeys(("iii", "iv", "v"), "cannot be told")


def test_the_tolerance_is_pooled_over_the_seeds(findings: Any) -> None:
    results = corrective()
    for rule in results["rules"]:
        for m in rule["models"].values():
            m["metrics"]["corrective/acc_corr"] = [0.5, 0.54]
    assert findings.Side.of(results).tolerance == pytest.approx(2 * 100 * 0.04 / 2**0.5)
