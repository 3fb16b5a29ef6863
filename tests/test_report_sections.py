"""The page's sections: what is in them, what their graphs draw, and that no words cover each other."""

from __future__ import annotations

import copy
import io
import math
import re
from typing import Any

import pytest
from report_example import example
from report_rich import COLUMNS, GRAPHS, LAYERS, rich
from rich.console import Console
from test_report import Tree, read

from vislearn.report import graphs, lines, print_table, rows
from vislearn.report.page import context, render
from vislearn.report.svg import LETTER
from vislearn.report.table import DASH, columns

NAMES = ["forgetting", "utility", "membership", "representation", "robustness", "cost"]


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return rich()


@pytest.fixture(scope="module")
def page(results: dict[str, Any]) -> str:
    return render(results)


@pytest.fixture(scope="module")
def tree(page: str) -> Tree:
    return read(page)


@pytest.fixture(scope="module")
def rules(results: dict[str, Any]) -> list[dict[str, Any]]:
    return context(results)["rules"]


def section(rule: dict[str, Any], name: str) -> dict[str, Any]:
    return next(s for s in rule["sections"] if s["name"] == name)


def graph(rule: dict[str, Any], key: str) -> dict[str, Any]:
    return next(g for s in rule["sections"] for g in s["graphs"] if g["key"] == key)


def cell(results: dict[str, Any], title: str, key: str, rule: str = "class-3") -> dict[str, Any]:
    (row,) = (r for r in rows(results) if r["rule"] == rule and r["title"] == title)
    return row["cells"][key]


# which sections there are


def test_sections_come_in_order_and_only_where_there_is_something(rules: list[dict[str, Any]]) -> None:
    assert [s["name"] for s in rules[0]["sections"]] == NAMES
    assert [s["name"] for s in rules[2]["sections"]] == [name for name in NAMES if name != "membership"]


def test_results_of_before_render_with_the_cost_alone() -> None:
    given = example()
    assert [[s["name"] for s in rule["sections"]] for rule in context(given)["rules"]] == [["cost"], ["cost"]]
    assert section(context(given)["rules"][0], "cost")["downloads"] == []
    for rule in given["rules"]:
        for method in rule["methods"]:
            method["metrics"].pop("time/unlearn", None)
    assert all(rule["sections"] == [] for rule in context(given)["rules"])
    assert 'class="topics"' not in render(given)


def test_columns_without_a_section_or_with_an_unknown_one_are_in_the_headline(results: dict[str, Any]) -> None:
    given = {"columns": [{"key": "a"}, {"key": "b", "section": "nowhere"}, {"key": "c", "section": "utility"}]}
    assert [c["key"] for c in columns(given)] == ["gap/mean", "a", "b"]
    assert [c["key"] for c in columns(given, "utility")] == ["c"]
    assert [c["key"] for c in columns(given, None)] == ["gap/mean", "a", "b", "c"]
    assert {c["section"] for c in columns(results)} == {"headline"}


def test_every_column_graph_and_help_is_on_the_page(tree: Tree) -> None:
    text = tree.text.replace("\u2011", "-")
    for head in COLUMNS:
        assert head["title"] in text
        assert head["help"][1:] in text
    for spec in GRAPHS:
        assert spec["title"] in text
        assert spec["help"][1:] in text
    assert "thorough evaluation (8 min 32 s, expected about 9 minutes)" in text


def test_the_page_stays_one_whole_file(page: str, tree: Tree) -> None:
    assert len(set(tree.ids)) == len(tree.ids)
    assert {link[1:] for link in tree.links if link.startswith("#")} <= set(tree.ids)
    assert all(link.startswith(("#", "data:")) for link in tree.links)
    assert not re.search(r"@import|url\((?!#)|https?://(?!www\.w3\.org/2000/svg)", page)
    drawn = "".join(re.findall(r'="[-\d. ,naif]+"', "".join(re.findall(r'<svg class="plot".*?</svg>', page, re.S))))
    assert len(drawn) > 10000
    assert "nan" not in drawn
    assert "inf" not in drawn


def test_rendering_changes_nothing_of_the_results(results: dict[str, Any]) -> None:
    before = repr(results)
    render(results)
    assert repr(results) == before


# distances to the retrained models


def test_a_distance_prints_its_mean_and_interval_and_the_floor_its_own(results: dict[str, Any]) -> None:
    given = copy.deepcopy(results)
    rule = given["rules"][0]
    rule["methods"][0]["to_retrained"]["forget/kl_to_retrained"] = {"mean": 0.5, "low": 0.4, "high": 0.61, "pairs": 9}
    rule["floor_to_retrained"]["forget/kl_to_retrained"] = {"mean": 0.2, "low": 0.1, "high": 0.55, "pairs": 3}
    title = rule["methods"][0]["title"]
    found = cell(given, title, "forget/kl_to_retrained")
    assert (found["text"], found["gap_text"], found["within_floor"]) == ("0.500", "[0.400, 0.610]", True)
    floor = cell(given, "Retrained against retrained", "forget/kl_to_retrained")
    assert (floor["text"], floor["gap_text"]) == ("0.200", "[0.100, 0.550]")
    rule["methods"][0]["to_retrained"]["forget/kl_to_retrained"]["mean"] = 0.56
    assert not cell(given, title, "forget/kl_to_retrained")["within_floor"]
    none = cell(given, "Retrained", "forget/kl_to_retrained")
    assert none["text"] == DASH
    assert "row below" in none["why"]


@pytest.mark.parametrize(("better", "value", "within"), [
    ("high", 0.95, True), ("high", 0.80, False), ("low", 0.80, True), ("low", 0.95, False), ("retrained", 0.95, False),
    ("retrained", 0.88, True), (None, 0.88, False),
])  # fmt: skip
def test_within_the_floor_depends_on_which_way_is_better(
    results: dict[str, Any], better: str | None, value: float, within: bool
) -> None:
    given = copy.deepcopy(results)
    rule, key = given["rules"][0], "features/cka_to_retrained"
    next(c for c in given["columns"] if c["key"] == key)["better"] = better
    rule["floor_to_retrained"][key] = {"mean": 0.88, "low": 0.85, "high": 0.9, "pairs": 3}
    rule["methods"][0]["to_retrained"][key] = {"mean": value, "low": value, "high": value, "pairs": 9}
    assert cell(given, rule["methods"][0]["title"], key)["within_floor"] is within


@pytest.mark.parametrize(("better", "best"), [("high", 0.99), ("low", 0.2), ("retrained", 0.9)])
def test_the_best_distance(results: dict[str, Any], better: str, best: float) -> None:
    given = copy.deepcopy(results)
    rule, key = given["rules"][0], "features/cka_to_retrained"
    rule["methods"] = [m for m in rule["methods"] if m["status"] == "done" and not m["flags"]][:3]
    next(c for c in given["columns"] if c["key"] == key)["better"] = better
    rule["floor_to_retrained"][key] = {"mean": 0.88, "low": 0.85, "high": 0.9, "pairs": 3}
    for method, value in zip(rule["methods"], (0.99, 0.2, 0.9), strict=True):
        method["to_retrained"][key] = {"mean": value, "low": None, "high": None, "pairs": 1}
    table = [r for r in rows(given) if r["rule"] == "class-3" and r["kind"] == "method"]
    assert [r["cells"][key]["mean"] for r in table if r["cells"][key]["best"]] == [best]


def test_without_retrained_models_a_distance_says_so(results: dict[str, Any]) -> None:
    given = copy.deepcopy(results)
    for rule in given["rules"]:
        rule["models"]["retrained"] = {"keys": [], "seeds": [], "metrics": {}}
        rule["floor_to_retrained"] = {}
        for method in rule["methods"]:
            method["to_retrained"] = {}
    title = given["rules"][0]["methods"][0]["title"]
    assert cell(given, title, "forget/kl_to_retrained")["why"] == "there is no retrained model to compare with"
    read(render(given))


# graphs


def test_one_small_plot_for_each_method_with_both_references_behind(rules: list[dict[str, Any]]) -> None:
    found = graph(rules[0], "forget/relearn")
    done = [row for row in rules[0]["methods"] if row["status"] == "done"]
    assert [panel["title"] for panel in found["panels"]] == [row["label"] for row in done]
    for panel in found["panels"]:
        assert all(f'class="l-{kind}"' in panel["wide"] for kind in ("original", "retrained", "unlearned"))
    assert found["legend"] == ["original", "retrained", "unlearned"]
    assert found["missing"] == ["Without this curve: EUk."]


def test_a_roc_curve_has_the_diagonal_and_its_dashes(rules: list[dict[str, Any]]) -> None:
    found = graph(rules[0], "forget/lira_roc")
    assert found["legend"][-1] == "guess"
    assert all('class="guess"' in panel["wide"] for panel in found["panels"])
    assert "RandomLabel" in found["missing"][0]


def test_true_positive_rate_is_that_of_the_last_vertex() -> None:
    x, y = [0.0, 0.002, 0.002, 0.5, 1.0], [0.0, 0.1, 0.3, 0.3, 1.0]
    assert graphs.roc_at(x, y, [0.001, 0.002, 0.4, 1.0]) == [0.0, 0.3, 0.3, 1.0]
    assert graphs.roc_at([0.5, 1.0], [0.2, 1.0], [0.1, 0.5]) == [None, 0.2]
    assert graphs.roc_at([0.0, math.nan, 1.0], [0.0, 0.9, 1.0], [0.5]) == [0.0]


def test_a_mean_leaves_out_what_is_missing_and_is_never_zero() -> None:
    curves = [{"x": [0, 1], "y": [2.0, None]}, {"x": [0, 1], "y": [4.0, math.nan]}, {"x": [0, 2], "y": [6.0, 1.0]}]
    assert graphs.pointwise(curves, [0, 1, 2]) == [[2.0, 4.0, 6.0], [], [1.0]]


@pytest.mark.parametrize(("xs", "equal"), [
    ([0, 1, 10, 100], True), (["8", "4"], True), ([0, 1, 2, 3], False), (list(range(50)), False), ([0, 0.5, 1], False),
])  # fmt: skip
def test_places_of_many_magnitudes_stand_at_equal_steps(xs: list[Any], equal: bool) -> None:
    assert graphs.even(xs) is equal


def test_a_line_breaks_where_no_seed_has_a_number() -> None:
    values = [1.0, 2.0, None, 3.0, 4.0, None, 5.0]
    one = lines.Series("unlearned", range(7), values, values, values)
    drawn = lines.line_plot([one], [(0, "0"), (6, "6")], (0, 6, 0, 5), ("x", "y"), 280, 210)
    assert drawn.count("<polyline") == 2
    assert drawn.count("<circle") == 1


def test_a_heat_map_prints_each_mean_and_a_dash_for_none(rules: list[dict[str, Any]], results: dict[str, Any]) -> None:
    (panel,) = graph(rules[0], "features/cka")["panels"]
    shown = re.findall(r'<text class="t\d"[^>]*>([^<]+)<', panel["wide"])
    retrained = [c["y"] for c in results["rules"][0]["models"]["retrained"]["curves"]["features/cka"]]
    means = [sum(each) / 3 for each in zip(*retrained, strict=True)]
    assert shown[len(LAYERS) : 2 * len(LAYERS)] == [f"{v:.2f}" for v in means]
    assert panel["wide"].count(f">{DASH}<") == 1
    assert "no value was stored" in panel["wide"]
    assert len(re.findall(r'<text class="t\d"', panel["narrow"])) == len(shown)


@pytest.mark.parametrize(("value", "shade"), [(0.0, 0), (0.124, 0), (0.126, 1), (0.999, 7), (1.0, 7), (9.0, 7)])
def test_shades_of_a_heat_map(value: float, shade: int) -> None:
    assert lines.level(value, 0.0, 1.0) == shade


def test_bars_are_grouped_by_name(rules: list[dict[str, Any]]) -> None:
    found = graph(rules[0], "features/probe")
    assert [panel["title"] for panel in found["panels"]] == ["forget", "retain", "downstream: letters"]
    models = len([row for row in rules[0]["methods"] if row["status"] == "done"]) + 1  # two references, one has none
    assert all(len(re.findall(r'<rect class="k-', panel["wide"])) == models for panel in found["panels"])


def test_a_graph_for_which_nothing_is_stored_is_absent(results: dict[str, Any]) -> None:
    given = copy.deepcopy(results)
    for rule in given["rules"]:
        for source in (*rule["models"].values(), *rule["methods"]):
            source["curves"] = {"forget/relearn": [{"x": [0, 1], "y": [None, math.nan], "seed": 0}]}
    assert all(s["graphs"] == [] for rule in context(given)["rules"] for s in rule["sections"])


def test_curves_without_references_or_of_one_seed_are_drawn() -> None:
    given = example()
    rule = given["rules"][0]
    rule["methods"][0]["curves"] = {"a": [{"x": ["p", "q"], "y": [1.0, 1.0], "seed": 0}], "b": [{"x": [3], "y": [2.0]}]}
    given["graphs"] = [
        {"key": "a", "title": "A", "help": "", "x": "", "y": "", "section": "utility", "kind": kind}
        for kind in ("line", "bars", "heat", "roc")
    ] + [{"key": "b", "title": "B", "help": "", "x": "", "y": "", "section": "utility", "kind": "line"}]
    given["graphs"] = [g for g in given["graphs"] if g["kind"] != "roc"]
    found = section(context(given)["rules"][0], "utility")
    assert [g["kind"] for g in found["graphs"]] == ["line", "bars", "heat", "line"]
    read(render(given))


# words


def words_of(drawing: str) -> list[tuple[float, float, float, float, str]]:
    """Where the words of a drawing stand, as boxes; turned ones are left out."""
    found = []
    for kind, x, y, anchor, rotated, words in re.findall(
        r'<text class="([^"]*)" x="([\d.-]+)" y="([\d.-]+)"(?: text-anchor="(\w+)")?( transform[^>]*)?>([^<]*)', drawing
    ):
        if rotated:
            continue
        size = 13 if {"name", "axis"} & set(kind.split()) else 12.5 if "item" in kind else 12
        wide, left = LETTER * size * len(words), float(x)
        left -= {"end": wide, "middle": wide / 2}.get(anchor, 0)
        found.append((left, float(y) - 0.72 * size, left + wide, float(y), words))
    return found


def collisions(drawing: str) -> list[tuple[str, str]]:
    spots = words_of(drawing)
    return [
        (a[4], b[4])
        for i, a in enumerate(spots)
        for b in spots[:i]
        if min(a[2], b[2]) - max(a[0], b[0]) > 1.5 and min(a[3], b[3]) - max(a[1], b[1]) > 1.5
    ]


def test_no_words_cover_others_in_any_drawing(page: str) -> None:
    drawn = re.findall(r'<svg class="plot".*?</svg>', page, re.S)
    assert len(drawn) > 100
    assert collisions('<text class="tick" x="5" y="9">abc</text><text class="tick" x="9" y="9">abc</text>')
    assert [found for drawing in drawn for found in collisions(drawing)] == []


def test_no_words_leave_their_drawing(page: str) -> None:
    for drawing in re.findall(r'<svg class="plot".*?</svg>', page, re.S):
        wide, tall = (float(v) for v in re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', drawing)[0])
        for left, top, right, bottom, words in words_of(drawing):
            assert left >= -1.5, words
            assert right <= wide + 1.5, words
            assert top >= -1.5, words
            assert bottom <= tall + 1.5, words


def test_text_of_the_user_is_escaped_in_sections() -> None:
    evil = "<script>alert('x')</script>&\"'"
    given = rich()
    given["evaluation"] = {"tier": evil, "seconds": None, "expected": evil}
    for spec in given["graphs"]:
        spec |= {"title": evil, "help": evil, "x": evil, "y": evil}
    for head in given["columns"]:
        head |= {"title": evil, "help": evil, "unit": evil if head["unit"] == "nats" else head["unit"]}
    for rule in given["rules"]:
        for source in (*rule["models"].values(), *rule["methods"]):
            for curves in (source.get("curves") or {}).values():
                for curve in curves:
                    curve["x"] = [f"{evil}{x}" if isinstance(x, str) else x for x in curve["x"]]
    found = render(given)
    assert "<script>alert" not in found
    assert found.count("<script") == 1
    read(found)


# notes


def test_a_note_of_every_method_is_said_once(results: dict[str, Any]) -> None:
    given = copy.deepcopy(results)
    rule = given["rules"][0]
    everywhere, methods_only = "no LiRA: it needs 16 shadow models", "no trace detection: too few models"
    for method in rule["methods"]:
        method["notes"] = [everywhere, methods_only] if method["status"] == "done" else []
    rule["methods"][0]["notes"] = [*rule["methods"][0]["notes"], "only mine"]
    rule["warnings"] += [f"{kind}: {everywhere}" for kind in ("original", "retrained")]
    drawn = context(given)["rules"][0]
    assert f"all models: {everywhere}" in drawn["warnings"]
    assert f"all methods: {methods_only}" in drawn["warnings"]
    assert not [w for w in drawn["warnings"] if w.startswith(("original:", "retrained:"))]
    assert [note for row in drawn["methods"] for note in row["own_notes"]] == ["only mine"]
    assert read(render(given)).text.count(everywhere) == 1
    stream = io.StringIO()
    print_table(given, Console(file=stream, width=300))
    assert stream.getvalue().count(everywhere) == 1


# the terminal


def test_the_terminal_keeps_the_headline_and_names_the_sections(results: dict[str, Any]) -> None:
    stream = io.StringIO()
    print_table(results, Console(file=stream, width=200))
    text = stream.getvalue()
    assert "more on the page: forgetting, utility, membership, representation, robustness, cost" in text
    assert text.count("more on the page") == 1
    assert "KLoM" not in text
    plain = io.StringIO()
    print_table(example(), Console(file=plain, width=200))
    assert "more on the page" not in plain.getvalue()
