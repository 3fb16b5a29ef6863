"""The choice among settings: by either score, between how many, and what cannot be chosen."""

import copy
from typing import Any

import pytest
from report_corrective import GAMMAS, corrective

from vislearn.errors import UserError
from vislearn.selection import courses, gamma_of, select


def entry(name: str, deployable: list[Any] | None, oracle: list[Any], **more: Any) -> dict[str, Any]:
    metrics = {"corrective/oracle": oracle} | ({} if deployable is None else {"corrective/deployable": deployable})
    settings = more.pop("settings", {})
    words = ", ".join(f"{k}={v}" for k, v in settings.items())
    about = {"name": name, "title": f"{name} ({words})" if words else name, "status": "done"}
    return {**about, "config": {"init_args": settings}, "metrics": metrics, **more}


def rule(*methods: dict[str, Any]) -> dict[str, Any]:
    return {"methods": list(methods), "models": {}}


def test_each_score_chooses_its_own() -> None:
    a = entry("SSD", [0.9, 0.5], [0.2, 0.2], settings={"alpha": 1})
    b = entry("SSD", [0.6, 0.6], [0.4, 0.2], settings={"alpha": 10})
    lone = entry("BadTeacher", [0.1, 0.1], [0.1, 0.1])
    given = rule(a, lone, b)
    deployable, oracle = select(given), select(given, "oracle")
    assert [(c.name, c.score, c.settings) for c in deployable.choices] == [("SSD", 0.7, 2), ("BadTeacher", 0.1, 1)]
    assert deployable.of("SSD").entry is a
    assert oracle.of("SSD").entry is b
    assert oracle.of("SSD").score == pytest.approx(0.3)
    assert [c.setting for c in oracle.choices] == ["alpha=10", "as listed"]
    assert deployable.of("SCRUB") is None


def test_the_first_of_equals_wins() -> None:
    methods = [entry("SSD", [0.5], [0.5], settings={"alpha": i}) for i in range(3)]
    assert select(rule(*methods)).of("SSD").entry is methods[0]


def test_what_cannot_be_chosen_says_why() -> None:
    given = rule(
        entry("SSD", [0.9, None], [0.1, 0.1], settings={"alpha": 1}),
        entry("SSD", [0.9, float("nan")], [0.1, 0.1], settings={"alpha": 2}),
        entry("SSD", [0.2, 0.2], [0.1, 0.1], settings={"alpha": 3}),
        entry("SCRUB", None, [0.1]),
        entry("JiT", [0.9], [0.9], status="diverged", error="the loss is nan"),
        {"name": "ROCR", "title": "ROCR", "status": "not applicable", "error": "for classes"},
    )
    found = select(given)
    assert [(c.name, c.settings) for c in found.choices] == [("SSD", 1)]
    assert found.of("SSD").setting == "alpha=3"
    assert found.left_out == (
        ("SSD (alpha=1)", "the score of 1 of 2 seeds is missing"),
        ("SSD (alpha=2)", "the score of 1 of 2 seeds is missing"),
        ("SCRUB", "it has no such score"),
        ("JiT", "diverged: the loss is nan"),
        ("ROCR", "not applicable: for classes"),
    )


def test_only_the_arguments_that_differ_are_said() -> None:
    same = {"fisher": "batch", "batch_size": 64}
    methods = [entry("SSD", [a], [a], settings={**same, "alpha": a, "dampening": 2 * a}) for a in (0.25, 0.5)]
    assert select(rule(*methods)).of("SSD").setting == "alpha=0.5, dampening=1"


def test_another_score_is_refused() -> None:
    with pytest.raises(UserError, match="deployable or oracle, not 'test'"):
        select(rule(), "test")  # type: ignore[arg-type]


def test_courses_hold_the_rules_that_differ_in_gamma_alone() -> None:
    rules = corrective()["rules"]
    (one,) = courses(reversed(rules))
    assert [gamma for gamma, _ in one.rules] == list(GAMMAS)
    assert one.rules[0][1] is rules[0]
    assert one.settings == {"seed": 0, "draws": "nested"}
    other = copy.deepcopy(rules)
    for each in other:
        each["config"]["init_args"]["seed"] = 1
    assert [(c.settings["seed"], len(c.rules)) for c in courses([*rules, *other])] == [(0, 4), (1, 4)]


def test_other_rules_and_rules_without_numbers_are_in_no_course() -> None:
    rules = corrective()["rules"]
    rules[0]["config"]["class_path"] = "vislearn.forget.RandomForget"
    rules[1]["config"] = {}
    for group in (*rules[2]["models"].values(), *rules[2]["methods"]):
        group["metrics"] = {}
    assert [gamma_of(r) for r in rules] == [None, None, 0.5, 1.0]
    assert [[gamma for gamma, _ in c.rules] for c in courses(rules)] == [[1.0]]


def test_a_model_that_collapsed_is_chosen_only_where_all_did() -> None:
    ruined = entry("SSD", [0.9], [0.9], settings={"alpha": 1}, flags=["collapsed: retain accuracy fell"])
    sound = entry("SSD", [0.4], [0.4], settings={"alpha": 2}, flags=["no different from the original model"])
    assert select(rule(ruined, sound)).of("SSD").entry is sound
    assert select(rule(sound, ruined)).of("SSD").settings == 2
    assert select(rule(ruined)).of("SSD").entry is ruined
