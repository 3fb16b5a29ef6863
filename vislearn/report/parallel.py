"""Trials on parallel axes: a line a trial through its parameters to its metric, darker the better."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from itertools import pairwise

from .svg import LETTER, Axis, LogAxis, line, picture, room, shortened, text

MOST = 12  # parameters that are drawn
APART, LEAST = 1216.0, 118.0  # pixels: width of the page, least distance of two axes
TOP, BOTTOM = 44.0, 386.0
SHADES = 6  # of the page's blue, without the two that are nearly paper


@dataclass(frozen=True)
class ParallelAxis:
    """One axis.

    Args:
        name: what stands above it.
        values: a number a line; for steps their positions.
        log: whether the scale is logarithmic.
        marks: the numbers that are marked; round ones by default.
        steps: words at the positions 0, 1, ...; empty for numbers.
    """

    name: str
    values: Sequence[float]
    log: bool = False
    marks: Sequence[float] | None = None
    steps: Sequence[str] = field(default=())

    def scale(self) -> Axis | LogAxis:
        """From a value to a pixel; equal ends are pushed apart."""
        if self.steps:
            return Axis(-0.5, len(self.steps) - 0.5, BOTTOM, TOP)
        low, high = min([*self.values, *(self.marks or ())]), max([*self.values, *(self.marks or ())])
        if self.log:
            return LogAxis(low, high, BOTTOM, TOP) if high > low else LogAxis(low / 2, high * 2, BOTTOM, TOP)
        return Axis(low, high, BOTTOM, TOP) if high > low else Axis(low - 1, high + 1, BOTTOM, TOP)

    def ticks(self) -> list[tuple[float, str]]:
        """(value, words) of what is marked."""
        if self.steps:
            return [(float(i), words) for i, words in enumerate(self.steps)]
        values = self.marks if self.marks is not None else self.scale().ticks(36)
        return [(value, f"{value:g}") for value in values]

    def spots(self) -> list[float]:
        """Pixels of the lines; those that meet in one step or mark are spread a little, so that none is hidden."""
        scale = self.scale()
        if not self.steps and self.marks is None:
            return [scale(value) for value in self.values]
        places = sorted(scale(value) for value in {*self.values, *(v for v, _ in self.ticks())})
        gap = min((b - a for a, b in pairwise(places)), default=40.0)
        room_ = min(26.0, 0.5 * gap)
        at: dict[float, int] = {}
        counts = {value: list(self.values).count(value) for value in set(self.values)}
        found = []
        for value in self.values:
            at[value] = at.get(value, 0) + 1
            share = (at[value] - 0.5) / counts[value] - 0.5
            found.append(scale(value) + room_ * share)
        return found


def parallel(axes: Sequence[ParallelAxis], metric: Sequence[float], more: bool, titles: Sequence[str]) -> str:
    """The drawing: the last axis is the metric's.

    Args:
        axes: from left to right, each with a value a trial.
        metric: of each trial.
        more: whether a high metric is a good one.
        titles: what a pointer reads over each line.
    """
    left = 12.0 + LETTER * 12 * max((min(18, len(words)) for _, words in axes[0].ticks()), default=4)
    right = 24.0 + LETTER * 12 * max(len(words) for _, words in axes[-1].ticks())
    step = max(LEAST, (APART - left - right) / (len(axes) - 1))
    width = left + step * (len(axes) - 1) + right
    places = [left + step * i for i in range(len(axes))]
    spots = [axis.spots() for axis in axes]
    order = sorted(range(len(metric)), key=lambda i: metric[i] if more else -metric[i])  # the best on top
    parts = []
    for rank, i in enumerate(order):
        best = rank == len(order) - 1
        at = list(zip(places, [own[i] for own in spots], strict=True))
        kind = "p-best" if best else f"p{(SHADES - 1) * rank // max(1, len(order) - 2)}"
        parts.append(f'<path class="p {kind}" d="{curve(at)}"><title>{escape(titles[i])}</title></path>')
    for number, (axis, x) in enumerate(zip(axes, places, strict=True)):
        parts += _axis(axis, x, step, last=number == len(axes) - 1, first=number == 0, more=more)
    return picture(round(width, 1), BOTTOM + 26, "".join(parts), f"{len(metric)} trials on {len(axes)} parallel axes")


def curve(spots: Sequence[tuple[float, float]]) -> str:
    """A path that leaves and meets every axis level, so that an eye can follow it through."""
    drawn = [f"M{spots[0][0]:.1f},{spots[0][1]:.1f}"]
    for (x1, y1), (x2, y2) in pairwise(spots):
        bend = (x2 - x1) * 0.42
        drawn.append(f"C{x1 + bend:.1f},{y1:.1f} {x2 - bend:.1f},{y2:.1f} {x2:.1f},{y2:.1f}")
    return " ".join(drawn)


def _axis(axis: ParallelAxis, x: float, step: float, last: bool, first: bool, more: bool) -> list[str]:
    scale = axis.scale()
    goal = (" ↑" if more else " ↓") if last else " (log)" if axis.log else ""
    name = shortened(axis.name, max(6, room(step - 14, 13) - len(goal))) + goal
    anchor = "end" if last else "start" if first else "middle"
    place = x + (0 if not (first or last) else 14 if last else -8)
    parts = [line(x, TOP - 6, x, BOTTOM + 6, "base"), text(place, 16, name, anchor, "axis", title=axis.name)]
    written = math.inf
    for value, words in axis.ticks():
        y = scale(value)
        parts.append(line(x - 4, y, x, y, "base"))
        if written - y >= 13:
            side = (x + 7, "start") if last else (x - 7, "end")
            shown = shortened(words, 18 if first else room(step * 0.6, 12))
            parts.append(text(side[0], y + 4, shown, side[1], "tick over", title=words))
            written = y
    return parts
