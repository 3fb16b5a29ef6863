"""Forget rules of one benchmark that describe themselves alike stay apart, on the terminal and on the page."""

import copy
from pathlib import Path
from typing import Any

import pytest
from report_example import example

from vislearn.report import print_table, write_page
from vislearn.report.export import to_csv
from vislearn.results import told_apart


def rule(title: str, **settings: Any) -> dict[str, Any]:
    return {"id": "same", "title": title, "config": {"class_path": "Some", "init_args": settings}}


def titles(*rules: dict[str, Any]) -> list[str]:
    return [r["title"] for r in told_apart(rules)]


def test_rules_of_one_title_are_followed_by_what_differs() -> None:
    one, other = rule("a tenth", fraction=0.1, seed=0), rule("a tenth", fraction=0.1, seed=1)
    assert titles(one, rule("cats"), other) == ["a tenth, seed 0", "cats", "a tenth, seed 1"]
    assert [r["id"] for r in told_apart([one, other])] == ["a-tenth--seed-0", "a-tenth--seed-1"]
    assert one["title"] == "a tenth", "the caller's stay as they are"
    assert titles(rule("a tenth"), rule("a tenth", seed=1)) == ["a tenth", "a tenth, seed 1"]


def test_files_of_one_name_are_followed_by_their_folders() -> None:
    paths = [f"/long/way/{name}/set/forget.txt" for name in ("random", "worst")]
    assert titles(*(rule("rows of forget.txt", path=p) for p in paths)) == [
        "rows of forget.txt, path random/set/forget.txt", "rows of forget.txt, path worst/set/forget.txt"
    ]  # fmt: skip


def test_rules_that_nothing_tells_apart_are_numbered() -> None:
    assert titles(rule("cats", classes=[3]), rule("cats", classes=[3])) == ["cats, rule 1", "cats, rule 2"]
    assert titles({"id": "a", "title": "a", "config": {}}, {"id": "a", "title": "a"}) == ["a, rule 1", "a, rule 2"]


def test_titles_that_differ_in_signs_alone_have_ids_of_their_own() -> None:
    found = told_apart([{"id": "targets----30", "title": f"targets {sign}= 30"} for sign in "<>"])
    assert [r["title"] for r in found] == ["targets <= 30", "targets >= 30"]
    assert [r["id"] for r in found] == ["targets----30", "targets----30--2"]


def test_each_rule_has_its_own_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = example()
    first = results["rules"][0]
    second = copy.deepcopy(first)
    for at, each in enumerate((first, second)):
        each["config"] = {"class_path": "IndexForget", "init_args": {"path": f"{at}/forget.txt"}}
        each["methods"] = [m | {"name": f"{m['name']}{at}", "title": f"{m['title']}{at}"} for m in each["methods"][:1]]
    name = first["methods"][0]["name"]
    results["rules"] = told_apart([first, second])
    print_table(results)
    said = capsys.readouterr().out
    assert said.count(name) == said.count(second["methods"][0]["name"]) == 1
    assert "path 0/forget.txt" in said
    write_page(results, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text().count("path 1/forget.txt") > 0
    table = to_csv(results, results["rules"][1]["id"])
    assert second["methods"][0]["title"] in table
    assert first["methods"][0]["title"] not in table
