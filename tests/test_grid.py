"""Grids in benchmark files: which entries they stand for, and what is no grid."""

from typing import Any

import pytest

from vislearn.errors import UserError
from vislearn.grid import expand
from vislearn.plan import read_method


@pytest.mark.parametrize(
    "entry",
    ["SSD", {"SSD": {"alpha": 5}}, {"SSD": "tuned"}, {"SSD": None}, {"class_path": "SSD"}, 7,
     {"title": "x", "class_path": "mine.SSD", "init_args": {"alpha": [1, 2]}}],
)  # fmt: skip
def test_entries_without_a_grid_stay(entry: Any) -> None:
    assert expand(entry) == [entry]
    assert expand(entry)[0] is entry


def test_a_grid_is_a_product_in_its_own_order() -> None:
    entry = {"SSD": {"fisher": "sample", "grid": {"alpha": [1, 10], "dampening": [0.1, 1]}}}
    assert expand(entry) == [
        {"SSD": {"fisher": "sample", "alpha": a, "dampening": d}} for a in (1, 10) for d in (0.1, 1)
    ]
    assert "grid" in entry["SSD"]  # what was given is not changed


def test_a_list_of_grids_is_their_union() -> None:
    grid = [{"alpha": 1, "dampening": [0.1, 1]}, {"alpha": [1, 2], "dampening": [1]}]
    points = [read_method(e)[1]["init_args"] for e in expand({"SSD": {"grid": grid}})]
    assert points == [{"alpha": 1, "dampening": 0.1}, {"alpha": 1, "dampening": 1}, {"alpha": 2, "dampening": 1}]


def test_values_that_are_lists_themselves() -> None:
    points = [e["SCRUB"] for e in expand({"SCRUB": {"grid": {"decay_epochs": [[1, 2], [3]]}}})]
    assert points == [{"decay_epochs": [1, 2]}, {"decay_epochs": [3]}]


def test_long_form_and_title() -> None:
    entry = {"title": "Mine", "class_path": "mine.M", "init_args": {"b": 2, "grid": {"a": [1, 3]}}}
    assert expand(entry) == [
        {"title": f"Mine (a={a})", "class_path": "mine.M", "init_args": {"b": 2, "a": a}} for a in (1, 3)
    ]
    assert [e["title"] for e in expand({"title": "T", "SSD": {"grid": {"alpha": [1, 2]}}})] == [
        "T (alpha=1)", "T (alpha=2)"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"grid": []}, "SSD: the grid is empty; give it values, for example grid"),
        ({"grid": {}}, "a grid is {argument: .values.}, not {}"),
        ({"grid": "tuned"}, "not 'tuned'"),
        ({"grid": [1, 2]}, "not 1"),
        ({"grid": {"alpha": []}}, "SSD: the grid has no value for alpha"),
        ({"alpha": 3, "grid": {"alpha": [1, 2]}}, "alpha is in the grid and beside it"),
    ],
)
def test_refusals(arguments: dict, says: str) -> None:
    with pytest.raises(UserError, match=says) as refused:
        expand({"SSD": arguments})
    assert "\n" not in str(refused.value)
