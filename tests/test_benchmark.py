"""`vislearn benchmark` from a file to its page: what is missing is made, failures are named, again makes nothing."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from vislearn.benchmark import Resolver, with_rule
from vislearn.errors import UserError
from vislearn.main import main
from vislearn.plan import Tuned, read_method, read_plan, shipped
from vislearn.store import Store

PLAN = """
title: Small
recipe:
  model: {class_path: Classifier, init_args: {arch: mlp, lr: 0.1}}
  data: {class_path: Digits, init_args: {batch_size: 128}}
  trainer: {max_epochs: 8}
forget:
  - {class_path: ClassForget, init_args: {classes: [3]}}
  - {class_path: RandomForget, init_args: {fraction: 0.1}}
seeds: [0]
retrain_seeds: [1, 2]
methods:
  - FineTune: tuned
  - GradientAscent: {lr: 1.0e+30}
  - SSD
  - mine.Nothing
  - mine.ForClasses
tuned: found.yaml
workers: 2
"""
TUNED = """
class: {FineTune: {epochs: 1}}
random: {FineTune: {epochs: 1, lr: 1e-3}}
"""
MINE = '''
from vislearn.method import UnlearningMethod


class Nothing(UnlearningMethod):
    """Leave the model as it is."""

    needs = frozenset({"forget"})

    def unlearn(self, model, data, trainer):
        return model


class ForClasses(Nothing):
    """Leave the model as it is, if a class is to be forgotten."""

    scenarios = frozenset({"class"})
'''


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the benchmark has run once."""
    folder = tmp_path_factory.mktemp("benchmark")
    (folder / "plan.yaml").write_text(PLAN)
    (folder / "found.yaml").write_text(TUNED)
    (folder / "mine.py").write_text(MINE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        with pytest.raises(SystemExit) as done:
            main(["benchmark", "-c", "plan.yaml"])
    assert done.value.code == 1  # one method fails, and the exit code says so
    return folder


def results(folder: Path) -> dict:
    return json.loads((folder / "artifacts" / "reports" / "small.json").read_text())


def test_every_rule_has_every_method(ran: Path) -> None:
    rules = results(ran)["rules"]
    assert [r["kind"] for r in rules] == ["ClassForget", "RandomForget"]
    for rule in rules:
        assert [m["name"] for m in rule["methods"]] == [
            "FineTune", "GradientAscent", "SSD", "Nothing", "ForClasses",
        ]  # fmt: skip
        assert rule["models"]["retrained"]["seeds"] == [1, 2]
        assert rule["floor"]["forget/accuracy"]["pairs"] == 1
    assert "test_forget/accuracy" in rules[0]["methods"][0]["metrics"]
    assert "test_forget/accuracy" not in rules[1]["methods"][0]["metrics"]


def test_a_diverged_method_is_named_and_stops_nothing(ran: Path) -> None:
    found = results(ran)
    assert [f["title"].split()[0] for f in found["failures"]] == ["GradientAscent", "GradientAscent"]
    assert all("diverged" in f["error"] for f in found["failures"])
    for rule in found["rules"]:
        method = rule["methods"][1]
        assert method["status"] == "diverged"
        assert method["keys"] == []
        assert method["metrics"] == {}


def test_a_method_that_does_not_apply_is_named_and_is_no_failure(ran: Path) -> None:
    found = results(ran)
    assert all("ForClasses" not in f["title"] for f in found["failures"])
    assert [rule["methods"][4]["status"] for rule in found["rules"]] == ["done", "not applicable"]
    assert "whole classes" in found["rules"][1]["methods"][4]["error"]


def test_tuned_settings_are_those_of_the_kind_of_forget_set(ran: Path) -> None:
    tuned = [rule["methods"][0] for rule in results(ran)["rules"]]
    assert [m["config"]["init_args"]["lr"] for m in tuned] == [0.01, 0.001]  # the paper's where the file says nothing
    assert [m["settings"] for m in tuned] == ["tuned", "tuned"]
    assert [m["settings"] for m in results(ran)["rules"][0]["methods"]][1:3] == ["as given", "paper default"]
    page = (ran / "artifacts" / "reports" / "small.html").read_text()
    assert "FineTune (tuned)" in page
    assert "SSD (paper default)" in page
    assert '<span class="settings">paper default</span>' in page


def test_a_model_that_did_not_change_is_called_identical(ran: Path) -> None:
    for rule in results(ran)["rules"]:
        assert any("identical to the original" in flag for flag in rule["methods"][3]["flags"])


def test_retrained_models_have_not_seen_the_forgotten_class(ran: Path) -> None:
    rule = results(ran)["rules"][0]
    assert rule["models"]["retrained"]["metrics"]["forget/accuracy"] == [0.0, 0.0]
    assert rule["models"]["original"]["metrics"]["forget/accuracy"][0] > 0.8


def test_the_page_stands_alone(ran: Path) -> None:
    page = (ran / "artifacts" / "reports" / "small.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    assert "GradientAscent" in page


def test_again_makes_nothing(ran: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ran)
    before = {k: Store("artifacts")[k].path.stat().st_mtime_ns for k in Store("artifacts").keys()}  # noqa: SIM118
    start = time.perf_counter()
    with pytest.raises(SystemExit) as done:
        main(["benchmark", "-c", "plan.yaml", "--methods", "FineTune,SSD"])
    assert done.value.code == 0
    assert time.perf_counter() - start < 30
    out = capsys.readouterr().out
    assert "0 to make" in out
    assert "report: " in out
    assert {k: Store("artifacts")[k].path.stat().st_mtime_ns for k in Store("artifacts").keys()} == before  # noqa: SIM118


def test_dry_run_lists_and_stops(
    ran: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ran)
    with pytest.raises(SystemExit) as done:
        main(["benchmark", "-c", "plan.yaml", "--store", "empty", "--dry-run"])
    assert done.value.code == 0
    assert "14 models, 14 to make" in capsys.readouterr().out
    assert Store("empty").keys() == []


@pytest.fixture(scope="module")
def resolve() -> Resolver:
    """Building its parser takes as long as reading a file."""
    return Resolver()


@pytest.mark.parametrize("name", shipped())
def test_shipped_files_are_sound(name: str, resolve: Resolver) -> None:
    """Every rule with the recipe, and every method with the settings of every rule: they know nothing of each other."""
    plan = read_plan(name)
    assert len(plan.retrain_seeds) >= 2
    configs: list[dict[str, Any]] = []
    for rule in plan.forget:
        full = resolve(**{**plan.recipe, "data": with_rule(plan.recipe["data"], rule)})
        assert full["data"]["init_args"]["forget"]["class_path"].startswith("vislearn.forget.")
        for method in plan.methods:
            config, _ = Tuned(plan.tuned).settle(read_method(method)[1], "random" if "Random" in str(rule) else "class")
            configs += [] if config in configs else [config]
    for config in configs:
        assert type(resolve.method(config)).__module__.startswith("vislearn.methods.")


@pytest.mark.parametrize(
    ("item", "path", "arguments", "title"),
    [
        ("SSD", "SSD", None, None),
        ({"SSD": {"alpha": 5}}, "SSD", {"alpha": 5}, None),
        ({"SSD": None}, "SSD", {}, None),
        ({"class_path": "a.B", "init_args": {"c": 1}, "title": "t"}, "a.B", {"c": 1}, "t"),
    ],
)
def test_method_entries(item: object, path: str, arguments: object, title: object) -> None:
    found, config = read_method(item)
    assert (found, config["class_path"], config.get("init_args")) == (title, path, arguments)


def test_tuned_needs_a_file() -> None:
    with pytest.raises(UserError, match="key 'tuned'"):
        Tuned(None).settle({"class_path": "SSD", "init_args": "tuned"}, "class")
    with pytest.raises(UserError, match="nowhere"):
        Tuned("nowhere.yaml")
    with pytest.raises(UserError, match="the word tuned"):
        read_method({"SSD": "tunned"})


@pytest.mark.parametrize("item", [3, {"SSD": {}, "ASSD": {}}])
def test_method_entries_that_are_none(item: object) -> None:
    with pytest.raises(UserError, match="class"):
        read_method(item)
