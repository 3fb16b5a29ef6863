"""The report's plots: marks that can be told apart, labels that can be read, scales that are what they say."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest

from vislearn.report import bars, scatter, svg


def test_the_first_eight_markers_differ_in_shape_and_in_colour() -> None:
    drawn = [svg.marker(i, 10, 10) for i in range(8)]
    colours = [re.search(r'class="(c\d)"', mark) for mark in drawn]
    assert len({c.group(1) for c in colours if c}) == 8
    assert len({re.sub(r'class="c\d"', "", mark) for mark in drawn}) == 8
    assert len({svg.marker(i, 10, 10) for i in range(64)}) == 64


def test_labels_of_close_points_do_not_cover_each_other() -> None:
    points = [scatter.Point(f"Method{i}", i, 96.0 + 0.05 * i, 0.5 + 0.03 * i) for i in range(6)]
    points.append(scatter.Point("far", 6, 90.0, 20.0))
    drawn = scatter.tradeoff(points, (95.8, 96.4), (0.3, 0.8), ("Test acc. (%)", "Gap (points)", "pp"), 716, 470)
    spots = [
        (float(x), float(y), svg.LETTER * 13 * len(name))
        for x, y, name in re.findall(r'<text class="name(?: first)?" x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]+)<', drawn)
    ]
    assert len(spots) == 7
    for i, (x1, y1, w1) in enumerate(spots):
        for x2, y2, w2 in spots[:i]:
            assert abs(y1 - y2) >= 10 or x1 + w1 <= x2 + 1 or x2 + w2 <= x1 + 1


def test_a_flagged_point_far_out_stays_at_the_edge_and_says_where_it_is() -> None:
    points = [scatter.Point("A", 0, 96.0, 0.5), scatter.Point("B", 1, 97.0, 1.0)]
    points.append(scatter.Point("C", 2, 10.2, 88.0, flagged=True))
    drawn = scatter.tradeoff(points, None, None, ("x", "y", "pp"), 340, 400)
    assert "C (← 10.2, ↑ 88.0)" in drawn
    assert all(0 <= float(x) <= 340 for x in re.findall(r' x="(-?[\d.]+)"', drawn))


def test_axis_maps_its_ends_and_keeps_small_gaps_apart() -> None:
    axis = svg.Axis(0.0, 100.0, 400.0, 0.0, power=1 / 3)
    assert (axis(0.0), axis(100.0)) == (400.0, 0.0)
    assert axis(0.0) - axis(1.0) > 50
    assert axis.ticks()[0] == 0.0
    assert svg.round_steps(94.2, 98.1, 4) == [95.0, 96.0, 97.0, 98.0]


@pytest.mark.parametrize(("gaps", "power"), [((0.5, 0.8, 1.0, 70.0), 1 / 3), ((80.0, 95.0, 98.0), 1.0), ((), 1.0)])
def test_the_scale_is_bent_only_where_most_gaps_are_small(gaps: tuple[float, ...], power: float) -> None:
    assert scatter.bend(gaps) == pytest.approx(power)


def test_cost_is_logarithmic() -> None:
    items = [bars.Cost(str(s), i, [s], None, "") for i, s in enumerate((0.1, 1.0, 10.0))]
    widths = [float(w) for w in re.findall(r'class="bar" [^>]*width="([\d.]+)"', bars.cost(items, None, 440))]
    assert widths[2] - widths[1] == pytest.approx(widths[1] - widths[0], abs=0.2)


def test_a_class_without_test_rows_is_a_dash_and_zero_is_a_line() -> None:
    drawn = bars.class_bars(["a", "b"], [("original", [0.0, None])], frozenset({1}), "t", 340)
    assert "–" in drawn
    assert 'height="1.0"' in drawn
    assert "forgotten" in drawn


@pytest.mark.parametrize(("more", "names"), [(True, ["a", "c"]), (False, ["a", "b"])])
def test_the_front_is_what_no_other_method_beats(more: bool, names: list[str]) -> None:
    points = [
        scatter.Point("a", 0, 5.0, 1.0), scatter.Point("b", 1, 2.0, 3.0), scatter.Point("c", 2, 9.0, 4.0),
        scatter.Point("d", 3, 5.0, 2.0), scatter.Point("flagged", 4, 99.0, 0.0, flagged=True),
        scatter.Point("flagged", 4, 0.0, 0.0, flagged=True), scatter.Point("original", -1, 5.0, 0.1),
    ]  # fmt: skip
    assert sorted(p.name for p in scatter.front(points, more)) == names


def test_equal_methods_share_the_front() -> None:
    points = [scatter.Point("a", 0, 5.0, 1.0), scatter.Point("b", 1, 5.0, 1.0)]
    assert {p.name for p in scatter.front(points, more=True)} == {"a", "b"}


def test_the_front_is_drawn_through_its_methods_and_their_names_stand_out() -> None:
    points = [scatter.Point("a", 0, 95.0, 1.0), scatter.Point("b", 1, 97.0, 3.0), scatter.Point("c", 2, 94.0, 4.0)]
    drawn = scatter.tradeoff(points, None, None, ("x", "y", "pp"), 716, 470)
    steps = re.search(r'<polyline class="front" points="([^"]+)"', drawn)
    assert steps
    corners = [tuple(float(v) for v in spot.split(",")) for spot in steps.group(1).split()]
    assert len(corners) == 5
    assert all(a[0] == b[0] or a[1] == b[1] for a, b in pairwise(corners))
    assert set(re.findall(r'class="name first"[^>]*>(\w)<', drawn)) == {"a", "b"}


def test_time_is_logarithmic_and_every_point_is_inside() -> None:
    points = [scatter.Point(str(s), i, s, 5.0 - i) for i, s in enumerate((0.01, 1.0, 100.0))]
    drawn = scatter.against_time(points, 1000.0, (0.2, 0.5), ("seconds", "gap", "pp"), 448, 470)
    axis = svg.LogAxis(0.01, 100.0, 0.0, 100.0)
    assert (axis(0.01), axis(1.0), axis(100.0), axis(1e9)) == pytest.approx((0.0, 50.0, 100.0, 100.0))
    assert axis.ticks(20) == [0.01, 0.1, 1.0, 10.0, 100.0]
    assert all(0 <= float(x) <= 448 for x in re.findall(r' x1?="(-?[\d.]+)"', drawn))


@pytest.mark.parametrize(("name", "most", "short"), [
    ("SSD (alpha=10)", 14, "SSD (alpha=10)"), ("ProjectedGradient (alpha=10)", 16, "ProjectedGr…=10)"),
])  # fmt: skip
def test_a_shortened_name_keeps_what_tells_it_apart(name: str, most: int, short: str) -> None:
    assert svg.shortened(name, most) == short
    assert len(svg.shortened(name, most)) <= most


def test_bars_start_at_zero_on_both_sides() -> None:
    items = [bars.Bar("a", 0, 2.0), bars.Bar("b", 1, -1.0), bars.Bar("c", None, None, None, "none")]
    drawn = bars.model_bars(items, -1.0, 2.0, "value", 340)
    drawn_bars = re.findall(r'<rect class="k-unlearned" x="([\d.]+)"[^>]*width="([\d.]+)"', drawn)
    found = {float(x): float(w) for x, w in drawn_bars}
    (right, wide), (left, narrow) = sorted(found.items(), reverse=True)
    assert left + narrow == pytest.approx(right, abs=0.2)
    assert wide == pytest.approx(2 * narrow, abs=0.2)
    assert "–" in drawn
