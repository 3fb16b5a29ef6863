"""The sweep of selective synaptic dampening: each finding on numbers made by hand, where it holds and where not."""

from typing import Any

import pytest
from made_rule import made_rule
from scripts import SWEEPS, script

from vislearn.reproduction import Rule, expected

FORGET, RETAIN, KEPT, MIA = "forget/accuracy", "retain/accuracy", "test_retain/accuracy", "forget/mia_entropy"


@pytest.fixture(scope="module")
def ssd() -> Any:
    return script("ssd/reproduce")


def model(forget: float, kept: float, **more: list[float]) -> dict[str, Any]:
    """Three seeds that hardly differ."""
    each = {key: [v, v + 0.001, v - 0.001] for key, v in ((FORGET, forget), (RETAIN, kept), (KEPT, kept), (MIA, 0.1))}
    return each | more


def one_class(**models: Any) -> Rule:
    times = {"time/unlearn": [0.1, 0.1, 0.11], "time/prepare": [0.5, 0.5, 0.5]}
    made = {
        "original": model(0.98, 0.98), "retrained": model(0.0, 0.97), "SSD": model(0.01, 0.96, **times),
        "FineTune": model(0.9, 0.97), "SSD by rows": model(0.8, 0.97), "SSD 50": model(0.96, 0.97),
        "SSD 50 unordered": model(0.0, 0.13),
    }  # fmt: skip
    return made_rule({**made, **models}, seconds=[10.0, 11.0, 9.0])


def every_class(kept: list[float]) -> list[Rule]:
    rules = [("original", model(0.98, 0.98)), ("SSD", None)]
    return [made_rule({rules[0][0]: rules[0][1], "SSD": model(0.0, k)}, config={"init_args": {"classes": [i]}})
            for i, k in enumerate(kept)]  # fmt: skip


def runs(**changed: Any) -> dict[str, list[Rule]]:
    random = made_rule({"original": model(0.99, 0.98), "SSD": model(0.985, 0.98)})
    found = {"class": [one_class()], "classes": every_class([0.95] * 7 + [0.8, 0.2, 0.1]), "random": [random]}
    return found | changed


def told(ssd: Any, name: str, given: dict[str, list[Rule]]) -> bool | None:
    verdict, numbers = ssd.CHECKS[name](given)
    assert numbers
    return verdict


def test_every_finding_has_its_question(ssd: Any) -> None:
    assert {f["id"] for f in expected(SWEEPS / "ssd")["findings"]} == set(ssd.CHECKS)


def test_all_findings_hold_on_numbers_that_show_them(ssd: Any) -> None:
    small = [name for name in ssd.CHECKS if name not in ("retrain", "cells")]
    assert {name: told(ssd, name, runs()) for name in small} == dict.fromkeys(small, True)


@pytest.mark.parametrize(("name", "models"), [
    ("forgets", {"SSD": model(0.5, 0.96)}),
    ("keeps", {"SSD": model(0.0, 0.7)}),
    ("fast", {"SSD": model(0.0, 0.9, **{"time/unlearn": [1.0, 1.0, 1.1], "time/prepare": [0.5, 0.5, 0.5]})}),
    ("competitive", {"FineTune": model(0.0, 0.97)}),
    ("estimator", {"SSD by rows": model(0.0, 0.9), "SSD": model(0.4, 0.9)}),
    ("order", {"SSD 50 unordered": model(0.9, 0.99)}),
])  # fmt: skip
def test_each_finding_can_fail(ssd: Any, name: str, models: dict[str, Any]) -> None:
    assert told(ssd, name, runs(**{"class": [one_class(**models)]})) is False


def test_collapse_takes_most_classes_clean_and_one_that_is_lost(ssd: Any) -> None:
    assert told(ssd, "collapse", runs(classes=every_class([0.95] * 10))) is False
    assert told(ssd, "collapse", runs(classes=every_class([0.1] * 10))) is False
    assert ssd.collapse(runs())[1] == "of 30 models 21 clean, 6 collapsed; 0 still know the class"
    assert told(ssd, "collapse", runs(classes=[made_rule({"original": model(1, 1)})])) is None


def test_random_rows(ssd: Any) -> None:
    forgotten = made_rule({"original": model(0.99, 0.98), "SSD": model(0.7, 0.98)})
    assert told(ssd, "random", runs(random=[forgotten])) is False


def test_numbers_of_the_papers_scale(ssd: Any) -> None:
    warm = one_class(retrained=model(0.0, 0.74))
    assert told(ssd, "retrain", runs(**{"class": [warm]})) is True
    assert told(ssd, "retrain", runs()) is False
    theirs = [v / 100 for k, v in expected(SWEEPS / "ssd")["kept_after"].items() if k != "source"]
    assert told(ssd, "cells", runs(classes=every_class(theirs))) is True
    assert ssd.cells(runs(classes=every_class([0.5, *theirs[1:]]))) == (
        False, "numbers: 9 reproduced, 1 not reproduced"
    )  # fmt: skip


def test_without_a_method_nothing_is_told(ssd: Any) -> None:
    nothing = made_rule({"original": model(1, 1), "retrained": model(0, 1)})
    for name in ("forgets", "keeps", "fast", "competitive", "estimator", "order"):
        assert told(ssd, name, runs(**{"class": [nothing]})) is None
