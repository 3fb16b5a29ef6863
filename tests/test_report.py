"""The report: what the page and the table say, and what they do with missing, failed and hostile input."""

from __future__ import annotations

import base64
import copy
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from report_example import CLASSES, example
from rich.console import Console

from vislearn.errors import UserError
from vislearn.report import print_table, rows, write_page
from vislearn.report.figures import forgotten_classes
from vislearn.report.page import context, lede, render, summary
from vislearn.report.table import columns, filled, gap_text, grouped, number, split_flag

VOID = {"meta", "link", "br", "input", "img", "hr", "wbr"}


class Tree(HTMLParser):
    """Checks that elements are closed in order, and collects the text, the ids and what is linked to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        known = dict(attrs)
        self.tags.append((tag, known))
        if known.get("id"):
            self.ids.append(str(known["id"]))
        self.links += [str(known[name]) for name in ("href", "src") if known.get(name)]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"style", "script"} & set(self.open):
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def read(page: str) -> Tree:
    tree = Tree()
    tree.feed(page)
    assert not tree.open, f"left open: {tree.open}"
    return tree


def methods_of(results: dict[str, Any], rule: str) -> list[dict[str, Any]]:
    return [row for row in rows(results) if row["rule"] == rule and row["kind"] == "method"]


def printed(results: dict[str, Any], width: int, encoding: str = "utf-8") -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    print_table(results, Console(file=stream, width=width))
    stream.seek(0)
    return stream.read()


@pytest.fixture(scope="module")
def page() -> str:
    return render(example())


# rows


def test_rows_come_as_reference_floor_then_methods_by_mean_gap() -> None:
    table = [row for row in rows(example()) if row["rule"] == "class-3"]
    assert [row["kind"] for row in table[:3]] == ["original", "retrained", "floor"]
    gaps = [row["cells"]["gap/mean"]["mean"] for row in table[3:]]
    assert gaps[-1] is None
    assert table[-1]["status"] == "failed"
    assert gaps[:-1] == sorted(gaps[:-1])


def test_a_cell_holds_percent_and_the_deviation_with_n_minus_one() -> None:
    results = example()
    results["rules"][0]["methods"][0]["metrics"]["retain/accuracy"] = [0.90, 0.92, 0.94]
    (row,) = (row for row in methods_of(results, "class-3") if row["name"] == "FineTune")
    cell = row["cells"]["retain/accuracy"]
    assert (cell["text"], cell["spread_text"]) == ("92.0", "2.0")
    assert cell["mean"] == pytest.approx(92.0)
    assert cell["spread"] == pytest.approx(2.0)


def test_gaps_are_points_already_and_are_not_scaled_again() -> None:
    results = example()
    results["rules"][0]["methods"][0]["gap"]["retain/accuracy"] = {"mean": 3.1, "low": 1.0, "high": 6.2, "pairs": 9}
    (row,) = (row for row in methods_of(results, "class-3") if row["name"] == "FineTune")
    assert row["cells"]["retain/accuracy"]["gap_text"] == "3.1 [1.0, 6.2]"


@pytest.mark.parametrize("value", [None, math.nan, math.inf])
def test_a_missing_number_is_a_dash_with_a_reason_and_never_zero(value: float | None) -> None:
    results = example()
    results["rules"][0]["methods"][0]["metrics"]["retain/accuracy"] = [value] * 3
    (row,) = (row for row in methods_of(results, "class-3") if row["name"] == "FineTune")
    cell = row["cells"]["retain/accuracy"]
    assert cell["mean"] is None
    assert cell["text"] == "–"
    assert cell["why"]


def test_a_mean_over_fewer_seeds_says_so() -> None:
    (row,) = (row for row in methods_of(example(), "class-3") if row["name"] == "BadTeacher")
    cell = row["cells"]["forget/mia_entropy"]
    assert (cell["count"], cell["of"]) == (2, 3)
    (said,) = (w for w in context(example())["rules"][0]["warnings"] if w.startswith("BadTeacher"))
    assert "2 of 3" in said


def test_best_is_the_smallest_gap_and_never_a_flagged_row() -> None:
    table = {row["name"]: row for row in methods_of(example(), "class-3")}
    assert table["GradientAscent"]["cells"]["forget/accuracy"]["gap"]["mean"] < 0.1  # collapsed, so it would win
    assert not any(cell["best"] for cell in table["GradientAscent"]["cells"].values())
    assert table["SSD"]["cells"]["time/unlearn"]["best"]
    assert table["SSD"]["cells"]["time/speedup"]["best"]
    best = min((row for row in table.values() if row["status"] == "done" and not row["flags"]),
               key=lambda row: row["cells"]["retain/accuracy"]["gap"]["mean"])  # fmt: skip
    assert best["cells"]["retain/accuracy"]["best"]


def test_equal_print_shares_the_best_mark() -> None:
    results = example()
    for method, gap in zip(results["rules"][0]["methods"], (0.62, 0.9, 0.64), strict=False):
        method["gap"]["forget/loss"] = {"mean": gap, "low": None, "high": None}
        method["flags"] = []
    results["columns"] = [c | {"unit": "%"} for c in results["columns"] if c["key"] == "forget/loss"]
    results["rules"][0]["methods"] = results["rules"][0]["methods"][:3]
    marks = {row["name"]: row["cells"]["forget/loss"]["best"] for row in methods_of(results, "class-3")}
    assert marks == {"FineTune": True, "GradientAscent": False, "NegGradPlus": True}


def test_within_the_floor_compares_with_its_upper_end_or_its_mean() -> None:
    results = example()
    rule = results["rules"][0]
    rule["methods"] = rule["methods"][:1]
    rule["methods"][0]["gap"]["mean"] = {"mean": 0.9, "low": 0.5, "high": 1.4}
    for ends, within in (((0.1, 1.0), True), ((0.1, 0.8), False), ((None, None), False), (None, False)):
        rule["floor"] = {"mean": {"mean": 0.4, "low": ends[0], "high": ends[1]}} if ends else None
        assert methods_of(results, "class-3")[0]["cells"]["gap/mean"]["within_floor"] is within


def test_a_warning_of_the_method_itself_is_a_note_and_appears_once() -> None:
    (row,) = (row for row in methods_of(example(), "random-10") if row["name"] == "SSD")
    assert row["flags"] == ["identical to the original: no weight was changed"]
    assert row["notes"] == ["alpha=10 is at or above the ceiling 8.7: nothing can be selected"]


def test_a_method_named_twice_is_told_apart_by_what_differs() -> None:
    results = example()
    for method, alpha in zip(results["rules"][0]["methods"], (1, 5, 10), strict=False):
        method.update(name="SSD", config={"init_args": {"dampening": 1.0, "alpha": alpha, "fisher": f"f{alpha}"}})
    results["rules"][0]["methods"][6]["name"] = "Other"
    labels = {row["label"] for row in methods_of(results, "class-3")}
    assert {"SSD (alpha=1)", "SSD (alpha=5)", "SSD (alpha=10)", "SCRUB"} <= labels
    for method in results["rules"][0]["methods"][:3]:
        method["config"] = {}
    assert "FineTune (epochs=5, lr=0.05)" in {row["label"] for row in methods_of(results, "class-3")}


def test_columns_without_a_number_leave_the_table_of_their_rule() -> None:
    results = example()
    table = [row for row in rows(results) if row["rule"] == "random-10"]
    keys = [head["key"] for head in filled(table, columns(results))]
    assert keys[0] == "gap/mean"
    assert "test_forget/accuracy" not in keys
    assert "test/accuracy" in keys


@pytest.mark.parametrize(("value", "unit", "text"), [
    (0.0, "%", "0.0"), (0.04, "%", "<0.1"), (100.0, "%", "100.0"), (0.0471, "s", "0.047"), (12.93, "s", "12.9"),
    (275.3, "x", "275"), (6.24, "x", "6.2"), (0.3684, "nats", "0.368"), (3.2e7, "nats", "3.2e+07"), (None, "%", "–"),
])  # fmt: skip
def test_number(value: float | None, unit: str, text: str) -> None:
    assert number(value, unit) == text


def test_gap_text_without_an_interval_has_no_brackets() -> None:
    assert gap_text({"mean": 3.14, "low": None, "high": None}, "%") == "3.1"
    assert gap_text(None, "%") == ""


def test_split_flag() -> None:
    assert split_flag("collapsed: all one class: 8") == ("collapsed", "all one class: 8")
    assert split_flag("no name before it") == ("note", "no name before it")
    assert split_flag("alpha=1 is too small: nothing moved") == ("note", "alpha=1 is too small: nothing moved")


def test_flags_of_one_name_stand_together() -> None:
    flags = ["collapsed: to 10 % (1 of 3 seeds)", "failed: no memory", "collapsed: to 20 % (1 of 3 seeds)"]
    assert grouped(flags) == [
        ("collapsed", "to 10 % (1 of 3 seeds); to 20 % (1 of 3 seeds)"),
        ("failed", "no memory"),
    ]


# the page


def test_the_page_is_one_file_that_reaches_for_nothing(page: str) -> None:
    tree = read(page)
    assert all(link.startswith(("#", "data:")) for link in tree.links), tree.links
    assert not re.search(r"@import|url\((?!#)|https?://(?!www\.w3\.org/2000/svg)", page)
    assert not [tag for tag, _ in tree.tags if tag in ("iframe", "object", "embed")]


def test_every_inner_link_has_its_target_and_ids_are_unique(page: str) -> None:
    tree = read(page)
    assert len(set(tree.ids)) == len(tree.ids)
    assert {link[1:] for link in tree.links if link.startswith("#")} <= set(tree.ids)


def test_everything_of_the_results_can_be_reached(page: str) -> None:
    results, text = example(), read(page).text
    for rule in results["rules"]:
        assert rule["title"] in text
        for model in (*rule["models"].values(), *rule["methods"]):
            assert all(key in text for key in model["keys"])
        for method in rule["methods"]:
            assert method["error"] in text
            assert all(flag.partition(": ")[2] in text for flag in method["flags"])
            assert yaml.safe_dump(method["config"]["class_path"]).split("\n")[0] in text
        assert all(warning in text for warning in rule["warnings"])
    for column in results["columns"]:
        assert column["title"].replace("-", "\u2011") in text
        assert column["help"][1:] in text
    assert results["data"]["fingerprint"] in text
    assert results["command"] in text
    assert all(str(value) in text for value in results["machine"].values())
    assert results["failures"][0]["log"] in text


def test_the_numbers_come_back_out_of_the_page(page: str) -> None:
    (link,) = (link for link in read(page).links if link.startswith("data:application/json"))
    assert json.loads(base64.b64decode(link.partition(",")[2])) == json.loads(json.dumps(example()))


def test_dashes_say_why(page: str) -> None:
    dashes = [known for tag, known in read(page).tags if tag == "td" and known.get("class") == "none"]
    assert len(dashes) > 20
    assert all(known.get("title") for known in dashes)


def test_commands_name_the_artifact_and_another_store() -> None:
    results = example()
    results["command"] = "vislearn benchmark --store 'my runs'"
    (key, *_) = results["rules"][0]["methods"][0]["keys"]
    text = read(render(results)).text
    assert f"vislearn unlearn -c 'my runs/{key}/config.yaml' --store 'my runs'" in text
    assert f"vislearn unlearn -c artifacts/{key}/config.yaml " in read(render(example())).text


def test_text_of_the_user_is_escaped() -> None:
    evil = "<script>alert('x')</script>&\"'"
    results = example()
    results["title"] = results["command"] = results["data"]["name"] = evil
    results["data"]["classes"] = [f"{name}{evil}" for name in CLASSES]
    results["columns"][0]["title"] = results["columns"][0]["help"] = evil
    for rule in results["rules"]:
        rule["title"] = evil
        rule["warnings"] = [evil]
        for method in rule["methods"]:
            method.update(name=evil, title=evil + method["name"], flags=[f"{evil}: {evil}"])
            method.update(error=evil, report={evil: evil})
            method["config"]["init_args"] = {evil: evil}
    results["failures"] = [{"title": evil, "error": evil, "log": evil}]
    page = render(results)
    assert "<script>alert" not in page
    assert page.count("<script") == 1
    read(page)


def test_a_method_that_failed_for_one_seed_keeps_the_others() -> None:
    results = example()
    method = results["rules"][0]["methods"][0]
    method.update(status="failed", error="a worker was killed")
    row = methods_of(results, "class-3")[-1]
    assert row["name"] in ("FineTune", "EUk")
    (row,) = (r for r in methods_of(results, "class-3") if r["name"] == "FineTune")
    assert row["cells"]["retain/accuracy"]["mean"] is not None
    assert row["flags"][0] == "failed: a worker was killed"


def test_without_retrained_models_there_is_no_gap_and_the_page_says_so() -> None:
    results = example()
    for rule in results["rules"]:
        rule["models"]["retrained"] = {"keys": [], "seeds": [], "metrics": {}, "per_class": []}
        rule.update(floor=None, floor_note="0 retrained models: no floor can be given; 2 more needed for one")
        for method in rule["methods"]:
            method["gap"] = {}
    tree = read(render(results))
    assert "no floor can be given; 2 more needed" in tree.text
    assert "without a retrained model to compare with" in tree.text
    assert "no retrained model to compare with" in rows(results)[3]["cells"]["gap/mean"]["why"]
    assert "no floor can be given" in printed(results, 100)


def test_one_seed_has_no_spread_and_no_interval() -> None:
    results = example()
    for rule in results["rules"]:
        rule["floor"] = {}
        for model in (*rule["models"].values(), *rule["methods"]):
            model["seeds"] = model["seeds"][:1]
            model["metrics"] = {k: v[:1] for k, v in model["metrics"].items()}
        for method in rule["methods"]:
            method["gap"] = {k: g | {"low": None, "high": None, "note": "one pair"} for k, g in method["gap"].items()}
    table = [row for row in rows(results) if row["kind"] == "method" and row["status"] == "done"]
    assert all(cell["spread_text"] == "" for row in table for cell in row["cells"].values())
    tree = read(render(results))
    assert "one seed only, so no spread" in tree.text


def test_a_regression_audit_without_classes_or_times_draws() -> None:
    results = {
        "title": "Audit", "kind": "evaluate", "command": "vislearn evaluate -c r.yaml", "data": {"name": "Ages"},
        "columns": [{"key": "forget/mae", "title": "Forget MAE", "help": "", "unit": "", "better": "retrained"},
                    {"key": "test/mae", "title": "Test MAE", "help": "", "unit": "", "better": "retrained"}],
        "rules": [{"id": "band", "title": "ages 0 to 9", "kind": "IndexForget", "floor": {}, "models": {
            "original": {"keys": ["o.ckpt"], "seeds": [0], "metrics": {"forget/mae": [2.0], "test/mae": [3.0]}},
            "retrained": {"keys": ["r.ckpt"], "seeds": [1], "metrics": {"forget/mae": [4.0], "test/mae": [3.1]}}},
            "methods": [{"name": "unlearned", "title": "u.ckpt", "keys": ["u.ckpt"], "seeds": [0],
                         "metrics": {"forget/mae": [3.7], "test/mae": [3.2]},
                         "gap": {"forget/mae": {"mean": 0.3, "low": None, "high": None}}}]}],
    }  # fmt: skip
    tree = read(render(results))
    assert "Gap in Forget MAE" in tree.text
    assert "Test accuracy per class" not in tree.text
    assert "vislearn evaluate -c r.yaml" in tree.text
    assert "MAE" in printed(results, 80)


def test_nothing_at_all_still_makes_a_page() -> None:
    tree = read(render({"title": "Empty", "rules": [], "columns": [], "failures": []}))
    assert "No result has been made yet." in tree.text


def test_a_hundred_classes_show_the_forgotten_and_the_furthest() -> None:
    results = example()
    results["data"]["classes"] = [f"class{i}" for i in range(100)]
    for rule in results["rules"]:
        for model in (*rule["models"].values(), *rule["methods"]):
            model["per_class"] = [0.5] * 100
        rule["methods"][0]["per_class"] = [0.1 if i == 77 else 0.5 for i in range(100)]
    found = context(results)["rules"][0]["per_class"]
    (panel,) = (p for p in found["panels"] if p["title"].startswith("FineTune"))
    assert ">class77<" in panel["narrow"]
    assert ">class3<" in panel["narrow"]
    assert "10 of 100 classes" in found["notes"]["narrow"]


def test_write_page_makes_folders_and_leaves_no_other_file(tmp_path: Path) -> None:
    write_page(example(), tmp_path / "reports" / "page.html")
    assert [p.name for p in (tmp_path / "reports").iterdir()] == ["page.html"]
    assert (tmp_path / "reports" / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_write_page_says_in_one_line_that_a_place_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the report page") as caught:
        write_page(example(), tmp_path / "file" / "page.html")
    assert "\n" not in str(caught.value)


def test_the_page_does_not_change_the_results() -> None:
    results = example()
    before = copy.deepcopy(results)
    render(results)
    printed(results, 100)
    assert results == before


# words


def test_lede_states_methods_data_rules_and_seeds() -> None:
    assert lede(example()) == (
        "Eight unlearning methods, each asked to make a model of Digits (1,294 training rows) forget class 3 (three) "
        "and, separately, random 10 %; three seeds each, compared with three models retrained without those rows."
    )


def test_summary_names_the_closest_and_who_could_change_places() -> None:
    results = example()
    rule = results["rules"][0]
    rule["floor"] = {"mean": {"mean": 0.5, "low": 0.2, "high": 1.0}}
    rule["methods"] = rule["methods"][:3]
    gaps = ((0.8, 0.3, 1.2), (1.5, 1.1, 2.0), (4.0, 3.0, 5.0))
    for method, (mean, low, high) in zip(rule["methods"], gaps, strict=True):
        method["gap"]["mean"] = {"mean": mean, "low": low, "high": high}
        method["flags"] = []
    said = " ".join(summary(rule, [row for row in rows(results) if row["rule"] == "class-3"]))
    assert "FineTune comes closest to the retrained models, with a mean gap of 0.8 (0.3 to 1.2)" in said
    assert "The interval of GradientAscent overlaps with that" in said
    assert "Two retrained models differ by 0.5 (0.2 to 1.0): FineTune is within that." in said
    assert "flagged" not in said


@pytest.mark.parametrize(("kind", "classes", "found"), [
    ("ClassForget", [3], {3}), ("ClassForget", ["three", 9], {3, 9}), ("ClassForget", [99], set()),
    ("RandomForget", [3], set()),
])  # fmt: skip
def test_forgotten_classes(kind: str, classes: list[Any], found: set[int]) -> None:
    rule = {"kind": kind, "config": {"class_path": kind, "init_args": {"classes": classes}}}
    assert forgotten_classes(rule, CLASSES) == found


# the terminal


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_the_table_fits(width: int) -> None:
    text = printed(example(), width)
    assert max(len(line) for line in text.splitlines()) <= width
    assert "SCRUB" in text
    assert "…" not in text


def test_the_terminal_says_what_it_leaves_out_and_keeps_the_order() -> None:
    text = printed(example(), 80)
    assert "not shown in 80 columns: " in text
    at = [text.index(f"\n{row['label']}") for row in methods_of(example(), "class-3") if not row["flags"]]
    assert at == sorted(at)


def test_wide_terminals_show_intervals() -> None:
    assert re.search(r"\d\.\d \[\d\.\d, \d\.\d\]", printed(example(), 240))
    assert "not shown" not in printed(example(), 240)


def test_flags_stand_below_the_table() -> None:
    text = " ".join(printed(example(), 100).split())
    assert "! GradientAscent: collapsed: every row is called class 8 (eight)" in text
    assert "! EUk: failed: k=3 but the model has 2 weight layers" in text
    assert text.count("alpha=10 is at or above the ceiling") == 1


def test_a_terminal_without_unicode_gets_ascii() -> None:
    assert printed(example(), 100, encoding="ascii").isascii()
