"""Methods as points in a plane of two things one wants at once, with the front that none of them beats."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from .svg import Axis, LogAxis, box, line, marker, path, picture, place_labels, room, shortened, text
from .table import number

Plane = tuple[Axis | LogAxis, Axis]
Frame = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Point:
    """One method in the plane: values in the printed unit, ends of the whiskers where they are known."""

    name: str
    index: int  # fixes shape and colour; -1 is the original model
    x: float
    y: float
    x_ends: tuple[float, float] | None = None
    y_ends: tuple[float, float] | None = None
    flagged: bool = False
    title: str = ""


def bend(gaps: Sequence[float]) -> float:
    """The power of a gap axis, from 1/3 to 1, that brings the middle one of these gaps near half the height."""
    high = max(gaps, default=0.0)
    middle = sorted(gaps)[len(gaps) // 2] if gaps else 0.0
    if high == 0 or middle >= 0.4 * high:
        return 1.0
    return max(1 / 3, math.log(0.5) / math.log(middle / high)) if middle > 0 else 1 / 3


def front(points: Sequence[Point], more: bool) -> list[Point]:
    """The methods that no other beats in x without losing in y, by x; flagged ones and the original are no rivals.

    Args:
        points: low y is good.
        more: whether high x is good, else low x.
    """
    rivals = [p for p in points if p.index >= 0 and not p.flagged]
    sign = -1 if more else 1

    def beaten(p: Point) -> bool:
        return any(sign * q.x <= sign * p.x and q.y <= p.y and (sign * q.x < sign * p.x or q.y < p.y) for q in rivals)

    return sorted((p for p in rivals if not beaten(p)), key=lambda p: p.x)


def tradeoff(
    points: Sequence[Point],
    utility: tuple[float, float] | None,
    floor: tuple[float, float] | None,
    names: tuple[str, str, str],
    width: float,
    height: float,
    most: float = math.inf,
    power: float = 1.0,
) -> str:
    """Forget quality against utility.

    Args:
        points: the methods, and the original model where its gap is known.
        utility: lowest and highest utility among the retrained models, in the unit of x.
        floor: mean and upper end of the gap between two retrained models, in the unit of y.
        names: what stands on x, what on y, and the unit of y ("pp" is written out).
        width: of the drawing, in pixels.
        height: of the drawing, in pixels.
        most: the largest value that x can take.
        power: of the scale of y, see `bend`.
    """
    frame = (46.0, 46.0, width - 14.0, height - 46.0)
    sound = [p for p in points if not p.flagged] or list(points)
    edges = [p.x for p in sound] + [e for p in sound for e in p.x_ends or ()] + list(utility or ())
    pad = max(0.07 * (max(edges) - min(edges)), 0.4 if max(edges) > 2 else 1e-3)
    x = Axis(min(edges) - pad, min(max(edges) + pad, most + pad / 3), frame[0], frame[2])
    y = Axis(0.0, _top(sound, floor), frame[3], frame[1], power)
    across = [value for value in x.ticks() if value <= most]
    places = max((len(f"{value:g}".partition(".")[2]) for value in across), default=0)
    marks = [(value, f"{value:.{places}f}") for value in across]
    behind = []
    if utility:
        wide = max(2.0, x(utility[1]) - x(utility[0]))
        said = "utility of the retrained models"
        behind.append(box(x(utility[0]), frame[1], wide, frame[3] - frame[1], "band", said))
        middle = min(frame[2] - 32, max(frame[0] + 32, (x(utility[0]) + x(utility[1])) / 2))
        behind.append(text(middle, frame[1] - 6, "retrained", "middle", "note"))
    best = front(points, more=True)
    steps = _steps(best, (x, y), frame, more=True)
    body = _plane(points, (x, y), frame, names, marks, floor, behind, steps, best)
    return picture(width, height, body, f"{names[1]} against {names[0]}; lower is closer to the retrained models")


def against_time(
    points: Sequence[Point],
    retraining: float | None,
    floor: tuple[float, float] | None,
    names: tuple[str, str, str],
    width: float,
    height: float,
    power: float = 1.0,
) -> str:
    """A gap against the seconds it took, which stand on a logarithmic scale; arguments as those of `tradeoff`."""
    frame = (46.0, 46.0, width - 14.0, height - 46.0)
    sound = [p for p in points if not p.flagged] or list(points)
    edges = [p.x for p in points] + ([retraining] if retraining else [])
    x = LogAxis(min(edges) / 1.6, max(edges) * 1.6, frame[0], frame[2])
    y = Axis(0.0, _top(sound, floor), frame[3], frame[1], power)
    marks = [(value, f"{value:g}") for value in x.ticks(46)]
    behind = []
    if retraining:
        behind.append(line(x(retraining), frame[1], x(retraining), frame[3], "reference"))
        behind.append(text(min(x(retraining), frame[2] - 20), frame[1] - 6, "retraining", "middle", "note"))
    best = front(points, more=False)
    steps = _steps(best, (x, y), frame, more=False)
    body = _plane(points, (x, y), frame, names, marks, floor, behind, steps, best)
    return picture(width, height, body, f"{names[1]} against {names[0]}; lower and further left is better")


def _top(points: Sequence[Point], floor: tuple[float, float] | None) -> float:
    return max(*(v for p in points for v in (p.y, *(p.y_ends or ()))), *(floor or ()), 1e-6) * 1.12


def _steps(best: Sequence[Point], plane: Plane, frame: Frame, more: bool) -> list[tuple[float, float]]:
    """The edge of what the front beats: up and to the left of it where high x is good, else up and to the right."""
    if len(best) < 2:
        return []
    x, y = plane
    spots = [(x(p.x), y(p.y)) for p in best]
    corners = [(b[0], a[1]) if not more else (a[0], b[1]) for a, b in pairwise(spots)]
    run = [spot for pair in zip(spots, corners, strict=False) for spot in pair] + [spots[-1]]
    first = (frame[0], spots[0][1]) if more else (spots[0][0], frame[1])
    last = (spots[-1][0], frame[1]) if more else (frame[2], spots[-1][1])
    return [first, *run, last]


def _plane(
    points: Sequence[Point],
    plane: Plane,
    frame: Frame,
    names: tuple[str, str, str],
    marks: Sequence[tuple[float, str]],
    floor: tuple[float, float] | None,
    behind: Sequence[str],
    steps: Sequence[tuple[float, float]],
    best: Sequence[Point],
) -> str:
    (x, y), (left, top, right, bottom) = plane, frame
    parts = [text(left - 38, 14, names[1], kind="axis"), text(right, bottom + 38, names[0], "end", "axis")]
    for value, words in marks:
        parts += [line(x(value), top, x(value), bottom, "grid"), text(x(value), bottom + 17, words, "middle")]
    for value in y.ticks(26):
        parts += [line(left, y(value), right, y(value), "grid"), text(left - 8, y(value) + 4, f"{value:g}", "end")]
    if floor:
        said = f"retrained against retrained: gaps up to {number(floor[1], names[2])}"
        parts.append(box(left, y(floor[1]), right - left, bottom - y(floor[1]), "floor", said))
        parts.append(line(left, y(floor[1]), right, y(floor[1]), "floor-edge"))
    parts += [*behind, line(left, bottom, right, bottom, "base"), path(steps, "front")]
    spots = [(x(p.x), y(p.y)) for p in points]
    taken = [(px - 8, py - 8, px + 8, py + 8) for px, py in spots]
    taken += [(min(a, c) - 1, min(b, d) - 1, max(a, c) + 1, max(b, d) + 1) for (a, b), (c, d) in pairwise(steps)]
    for p, (px, py) in zip(points, spots, strict=True):  # names keep off the lines too, which are thin, so if they can
        if p.x_ends:
            taken.append((x(p.x_ends[0]), py - 1, x(p.x_ends[1]), py + 1))
        if p.y_ends:
            taken.append((px - 1, y(p.y_ends[1]), px + 1, y(p.y_ends[0])))
    parts += [_whiskers(p, px, py, x, y) for p, (px, py) in zip(points, spots, strict=True)]
    for p, (px, py) in zip(points, spots, strict=True):
        style = "mark flagged" if p.flagged else "mark"
        parts.append(f'<g class="{style}"><title>{escape(p.title)}</title>{marker(p.index, px, py)}</g>')
    bold = frozenset(i for i, p in enumerate(points) if p in best)
    most = min(28, max(15, room(0.33 * (right - left), 13)))
    labels = [_label(p, x, y, most) for p in points]
    parts += place_labels(labels, spots, taken, (left, top, right, bottom - 2), bold=bold)
    return "".join(parts)


def _label(p: Point, x: Axis | LogAxis, y: Axis, most: int) -> str:
    """The name; a point that is drawn at the edge because it lies outside says where it is."""
    name, outside = shortened(p.name, most), []
    if not x.low <= p.x <= x.high:
        outside.append(f"{'←' if p.x < x.low else '→'} {number(p.x, '%')}")
    if p.y > y.high:
        outside.append(f"↑ {number(p.y, '%')}")
    return f"{name} ({', '.join(outside)})" if outside else name


def _whiskers(p: Point, px: float, py: float, x: Axis | LogAxis, y: Axis) -> str:
    drawn = []
    if p.x_ends and x.low <= p.x <= x.high:
        drawn.append(line(x(p.x_ends[0]), py, x(p.x_ends[1]), py, "whisker"))
    if p.y_ends and p.y <= y.high:
        drawn.append(line(px, y(p.y_ends[0]), px, y(p.y_ends[1]), "whisker"))
    return "".join(drawn)


def strip(mean: float, ends: tuple[float, float] | None, floor: float | None, top: float, index: int | None) -> str:
    """A mean gap and its interval on the scale that all rows of a table share; the floor is shaded."""
    x = Axis(0.0, max(top, 1e-6), 5.0, 91.0, power=1 / 3)
    parts = [box(x(0), 1, x(floor) - x(0), 12, "floor")] if floor is not None else []
    parts.append(line(x(0), 1, x(0), 13, "base"))
    if ends:
        parts.append(line(x(ends[0]), 7, x(ends[1]), 7, "whisker"))
    if index is not None:
        parts.append(marker(index, x(mean), 7, 3.6))
    else:
        parts.append(line(x(mean), 2, x(mean), 12, "tickmark"))
    return f'<svg class="strip" width="96" height="14" viewBox="0 0 96 14" aria-hidden="true">{"".join(parts)}</svg>'
