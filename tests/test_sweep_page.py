"""The page of a sweep: which trials are drawn on which axes, in what order, and what is said of the others."""

import io
import re

import pytest
from rich.console import Console

from vislearn.report import sweep as report
from vislearn.report.parallel import ParallelAxis, curve
from vislearn.sweep import Trial

CONFIG = {
    "method": "random",
    "metric": {"name": "gap/mean", "goal": "minimize"},
    "parameters": {
        "method.alpha": {"distribution": "log_uniform_values", "min": 1.0, "max": 100.0},
        "method": {"parameters": {"order": {"values": ["class", None]}}},
        "seed": {"value": 7},
    },
}


def trial(number, alpha, metric, state="finished", order="class", **more):
    point = {"method.alpha": alpha, "method": {"order": order}, "seed": 7}
    return Trial(number, point, f"r{number}", state, 1, metric, **more)


TRIALS = [
    trial(1, 1.0, 9.0),
    trial(2, 10.0, 2.0, "stopped", None),
    trial(3, 100.0, 4.5, artifact="artifacts/abc"),
    trial(4, 50.0, None, "failed", error="it <diverged>"),
    trial(5, 20.0, None, "running"),
]


def made(trials=TRIALS, **changes):
    return report.results(CONFIG | changes, trials, "sweeps/toy/sweep.yaml", ["vislearn", "sweep", "a b.yaml"], 3, 5.0)


def test_the_best_is_first_whatever_the_goal():
    found = made()
    assert [t["number"] for t in report.ranked(found)] == [2, 3, 1]
    found["metric"]["goal"] = "maximize"
    assert [t["number"] for t in report.ranked(found)] == [1, 3, 2]
    assert found["trials"][1]["values"] == {"method.alpha": 10.0, "method.order": None, "seed": 7}
    assert [p["name"] for p in report.varying(found)] == ["method.alpha", "method.order"]


def test_the_page_says_what_it_does_not_draw():
    page = str(report._template().render(**report.context(made())))
    assert page.count('<path class="p ') == 3
    assert 'class="p p-best" d="M' in page
    assert page.index('p-best" d="M') > page.rindex('<path class="p p5"')  # the best on top
    assert "it &lt;diverged&gt;" in page
    assert "Not ended: trial 5;" in page
    assert "seed=7" in page
    assert "stopped early" in page
    assert "vislearn sweep &#39;a b.yaml&#39;" in page
    assert "The lowest gap/mean is 2, of trial 2 with alpha=10, order=null." in page
    assert "<script" not in page


@pytest.mark.parametrize(
    "trials", [[], TRIALS[3:], TRIALS[:1], [trial(1, 1.0, None)], [trial(1, 2.0, 5.0), trial(2, 3.0, 5.0)]]
)
def test_few_trials_make_a_page_too(trials):
    page = str(report._template().render(**report.context(made(trials))))
    assert "vislearn sweep" in page
    assert "nan" not in re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)


def test_axes_follow_from_how_values_were_drawn():
    listed = {"values": [1, 5, 50], "log": False}
    assert report.axis_of("a", [1, 50], {"values": None, "log": True}).log
    assert report.axis_of("a", [1, 50], listed).log
    assert report.axis_of("a", [1, 50], listed).marks == [1.0, 5.0, 50.0]
    assert not report.axis_of("a", [1, 5], {"values": [1, 5, 9], "log": False}).log
    assert not report.axis_of("a", [0.0, 5.0], {"values": [0, 5, 90], "log": False}).log
    steps = report.axis_of("a", [True, None], {"values": [None, True, "x"], "log": False})
    assert (list(steps.steps), list(steps.values)) == (["null", "true", "x"], [1.0, 0.0])


def test_lines_that_meet_are_spread_and_stay_with_their_mark():
    axis = ParallelAxis("a", [1.0, 1.0, 2.0, 1.0], marks=[1.0, 2.0])
    spots, scale = axis.spots(), axis.scale()
    assert len(set(spots)) == 4
    assert spots[2] == scale(2.0)
    assert all(abs(spots[i] - scale(1.0)) < abs(scale(2.0) - scale(1.0)) / 2 for i in (0, 1, 3))
    assert spots[1] == scale(1.0)  # the middle one of three
    assert ParallelAxis("a", [3.0, 3.0]).spots()[0] == pytest.approx((44 + 386) / 2)  # equal ends are pushed apart
    log = ParallelAxis("a", [1.0, 10.0, 100.0], log=True).spots()
    assert log[1] == pytest.approx((log[0] + log[2]) / 2)
    assert curve([(0.0, 1.0), (100.0, 5.0)]) == "M0.0,1.0 C42.0,1.0 58.0,5.0 100.0,5.0"


def test_short_names_stay_different():
    assert report.short(["method.alpha", "data.seed"]) == ["alpha", "seed"]
    assert report.short(["method.lr", "model.lr"]) == ["method.lr", "model.lr"]


def test_the_terminal_has_the_same_trials():
    out = io.StringIO()
    report.print_table(made(), Console(file=out, width=100))
    lines = [line.split() for line in out.getvalue().splitlines()]
    assert lines[0] == ["trial", "alpha", "order", "gap/mean", "seconds"]
    assert [line[0] for line in lines[2:5]] == ["2", "3", "1"]
    assert lines[2][1:4] == ["10", "null", "2"]
    assert "! trial 4: it <diverged>" in out.getvalue()
