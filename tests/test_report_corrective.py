"""The page's section on corrective unlearning: when it is there, what it draws, and what its table says."""

from __future__ import annotations

import base64
import copy
import csv
import io
import re
from itertools import pairwise
from typing import Any

import pytest
from report_corrective import GAMMAS, METHODS, corrective
from report_example import example
from test_report import read

from vislearn.report.corrective import APART, colour, sections, spread
from vislearn.report.page import context, render
from vislearn.report.svg import marker


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return corrective()


@pytest.fixture(scope="module")
def section(results: dict[str, Any]) -> dict[str, Any]:
    (found,) = sections(results)
    return found


def titled(section: dict[str, Any], model: str, gamma: str = "") -> list[list[str]]:
    return [row for row in section["rows"] if row[1] == model and (not gamma or row[0] == gamma)]


def test_only_results_with_two_shares_have_it() -> None:
    assert sections(example()) == []
    assert 'class="corrective"' not in render(example())
    assert sections(corrective(gammas=(0.1,))) == []
    assert len(sections(corrective(gammas=(0.1, 1.0)))) == 1


def test_the_page_holds_it_once_and_stays_whole(results: dict[str, Any]) -> None:
    page = render(results)
    tree = read(page)
    assert page.count('<section class="corrective"') == 1
    assert "#corrective-0" in tree.links
    assert len(set(tree.ids)) == len(tree.ids)
    assert {link[1:] for link in tree.links if link.startswith("#")} <= set(tree.ids)
    assert all(link.startswith(("#", "data:")) for link in tree.links)
    assert page.index('id="corrective-0"') < page.index('id="r0"')


def test_two_ways_to_choose_are_two_figures(section: dict[str, Any]) -> None:
    assert [f["title"] for f in section["figures"]] == ["Chosen by the deployable score", "Chosen by the oracle score"]
    deployable, oracle = (f["wide"] for f in section["figures"])
    assert deployable != oracle
    for drawing in (deployable, oracle):
        assert drawing.count("(%)") == 3
        for name in (*dict(m[:2] for m in METHODS), "original", "clean", "retrained"):
            assert drawing.count(f">{name}<title>") == 3


def test_one_choice_is_one_figure() -> None:
    results = corrective()
    for rule in results["rules"]:
        rule["methods"] = [m for m in rule["methods"] if m["name"] != "SSD" or "100" in m["title"]]
        rule["methods"] = [m for m in rule["methods"] if "alpha=1)" not in m["title"]]
    (found,) = sections(results)
    assert [f["title"] for f in found["figures"]] == ["Chosen by either score"]
    assert {row[2] for row in found["rows"]} == {"", "both"}


def test_the_table_says_what_was_chosen_from_how_many(section: dict[str, Any]) -> None:
    assert [row[:5] for row in titled(section, "SSD", "0.1")] == [
        ["0.1", "SSD", "deployable", "alpha=1, dampening=0.1", "3"],
        ["0.1", "SSD", "oracle", "alpha=10, dampening=1", "3"],
    ]
    assert [row[2:5] for row in titled(section, "SCRUB")] == [["both", "alpha=0.001", n] for n in "1222"]
    assert [row[0] for row in titled(section, "retrained")] == [f"{g:g}" for g in GAMMAS]
    assert len(titled(section, "original")) == len(titled(section, "clean")) == 1
    assert section["left_out"] == ["SCRUB (alpha=1) at γ = 0.1: diverged: the loss is nan at step 12"]


def test_numbers_of_the_table_are_percent(results: dict[str, Any]) -> None:
    given = copy.deepcopy(results)
    given["rules"][0]["models"]["retrained"]["metrics"]["corrective/acc_corr"] = [0.1, 0.2, 0.3]
    (found,) = sections(given)
    assert titled(found, "retrained", "0.1")[0][5] == "20.0 ± 10.0"


def test_the_file_holds_every_seed(section: dict[str, Any], results: dict[str, Any]) -> None:
    text = base64.b64decode(section["downloads"][0]["href"].partition("base64,")[2]).decode()
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == len(section["rows"])
    found = next(r for r in rows if r["model"] == "clean")
    stored = results["rules"][0]["models"]["clean"]["metrics"]["corrective/acc_retain"]
    assert [float(found[f"corrective/acc_retain {i}"]) for i in (1, 2, 3)] == pytest.approx([100 * v for v in stored])


def test_without_attack_there_are_two_plots() -> None:
    (found,) = sections(corrective(backdoor=False))
    assert found["figures"][0]["wide"].count("(%)") == 2
    assert len(found["heads"]) == 7


def test_missing_models_and_numbers_leave_the_others(results: dict[str, Any]) -> None:
    given = copy.deepcopy(results)
    for rule in given["rules"]:
        rule["models"].pop("clean")
        rule["models"]["retrained"] = {"seeds": [], "metrics": {}}
    given["rules"][1]["methods"][0]["metrics"]["corrective/acc_corr"] = [None, None, None]
    (found,) = sections(given)
    assert "l-clean" not in found["figures"][0]["wide"]
    assert "l-retrained" not in found["figures"][0]["wide"]
    assert titled(found, "FineTune", "0.2")[0][5] == "–"
    render(given)


def test_rules_without_methods_draw_the_references() -> None:
    results = corrective()
    for rule in results["rules"]:
        rule["methods"] = []
    (found,) = sections(results)
    assert ">retrained<title>" in found["figures"][0]["wide"]


def test_names_are_escaped(results: dict[str, Any]) -> None:
    given = copy.deepcopy(results)
    for rule in given["rules"]:
        rule["methods"][0] |= {"name": "<b>x", "title": "<b>x (=1+1)"}
    page = render(given)
    assert "<b>x" not in page.replace("base64,", "")
    assert "&lt;b&gt;x" in page
    (found,) = sections(given)
    assert ",'=1+1," in base64.b64decode(found["downloads"][0]["href"].partition("base64,")[2]).decode()


def test_groups_of_rules_are_told_apart() -> None:
    results = corrective()
    for rule in copy.deepcopy(results["rules"]):
        rule["config"]["init_args"]["seed"] = 7
        rule["id"] += "-seven"
        results["rules"].append(rule)
    assert [s["settings"] for s in context(results)["corrective"]] == ["seed=0", "seed=7"]


def test_everything_is_drawn_inside_the_picture(section: dict[str, Any]) -> None:
    for figure in section["figures"]:
        for size in ("wide", "narrow"):
            width, height = map(float, re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', figure[size]).groups())
            moved = [tuple(map(float, m)) for m in re.findall(r"translate\(([\d.]+) ([\d.]+)\)", figure[size])]
            plots = re.split(r"<g transform=", figure[size])[1:]
            assert len(moved) == len(plots) == 3
            for (dx, dy), plot in zip(moved, plots, strict=True):
                names = [(float(x), float(y)) for x, y in re.findall(r'"item" x="([\d.]+)" y="([\d.]+)"', plot)]
                assert len(names) == 10
                assert all(dx + x + 60 <= width and dy + y <= height for x, y in names)
                ys = sorted(y for _, y in names)
                assert all(b - a >= APART - 0.11 for a, b in pairwise(ys))


@pytest.mark.parametrize("index", [0, 7, 8, 17])
def test_a_line_has_the_colour_of_its_marker(index: int) -> None:
    assert f'class="c{colour(index)}"' in marker(index, 0, 0)


def test_labels_keep_their_distance_and_their_order() -> None:
    assert spread([10, 100, 50], 15, 0, 200) == [10, 100, 50]
    assert spread([50, 51, 52], 15, 0, 200) == [50, 65, 80]
    assert spread([198, 199, 20], 15, 0, 200) == [185, 200, 20]
    assert spread([], 15, 0, 200) == []
