"""Lines and heat maps: how a number runs over steps, sizes, thresholds or layers, one small plot for each method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from .svg import LETTER, Axis, LogAxis, box, line, path, picture, room, shortened, text
from .table import DASH

ROC_LOW = 1e-3  # where a ROC curve's axes begin
Value = float | None
STEEP = 60  # degrees by which words are turned that do not fit side by side
BESIDE = 38.0  # pixels right of a heat map, into which turned words reach


@dataclass(frozen=True)
class Series:
    """One group of models along x: the mean over seeds, and the lowest and highest of them; None where unknown."""

    kind: str  # "original", "retrained" or "unlearned"
    x: Sequence[float]
    mean: Sequence[Value]
    low: Sequence[Value]
    high: Sequence[Value]


def line_plot(
    series: Sequence[Series],
    ticks: Sequence[tuple[float, str]],
    ends: tuple[float, float, float, float],
    names: tuple[str, str],
    width: float,
    height: float,
) -> str:
    """One line a group, told apart by their dashes, each in the range of its seeds.

    Args:
        series: the groups.
        ticks: where the x axis is marked, and the words there.
        ends: of the axes: lowest and highest x, lowest and highest y.
        names: what stands on x and on y.
        width: of the drawing, in pixels.
        height: of the drawing without words that have to be slanted, in pixels.
    """
    left, right, top, bottom = 44.0, width - 12.0, 26.0, height - 44.0
    x, y = Axis(*ends[:2], left, right), Axis(*ends[2:], bottom, top)
    parts = []
    for value in y.ticks(24):
        parts += [line(left, y(value), right, y(value), "grid"), text(left - 6, y(value) + 4, f"{value:g}", "end")]
    shown, slanted, deep = _fitting(ticks, x)
    for value, words in shown:
        turn = f' transform="rotate(-{STEEP} {x(value) + 3:.1f} {bottom + 12:.1f})"' if slanted else ""
        parts.append(line(x(value), top, x(value), bottom, "grid"))
        place = (x(value) + 3, bottom + 12, words, "end") if slanted else (x(value), bottom + 16, words, "middle")
        parts.append(text(*place, "tick", turn))
    parts += [line(left, bottom, right, bottom, "base"), *_groups(series, x, y)]
    parts += [text(4, 13, names[1], kind="axis"), text(right, bottom + 34 + deep, names[0], "end", "axis")]
    return picture(width, height + deep, "".join(parts), f"{names[1]} over {names[0]}")


def roc_plot(series: Sequence[Series], names: tuple[str, str], width: float, height: float) -> str:
    """True against false positive rate, both logarithmic from 0.001; the diagonal is what guessing gives."""
    left, right, top, bottom = 44.0, width - 12.0, 26.0, height - 44.0
    x, y = LogAxis(ROC_LOW, 1.0, left, right), LogAxis(ROC_LOW, 1.0, bottom, top)
    parts = []
    for value in (0.001, 0.01, 0.1, 1.0):
        anchor = "end" if value == 1 else "middle"
        parts += [line(x(value), top, x(value), bottom, "grid"), line(left, y(value), right, y(value), "grid")]
        parts += [text(x(value) + (4 if value == 1 else 0), bottom + 16, f"{value:g}", anchor)]
        parts += [text(left - 6, y(value) + 4, f"{value:g}", "end")]
    parts += [line(left, bottom, right, top, "guess"), line(left, bottom, right, bottom, "base")]
    parts += _groups(series, x, y)
    parts += [text(4, 13, names[1], kind="axis"), text(right, bottom + 34, names[0], "end", "axis")]
    return picture(width, height, "".join(parts), f"{names[1]} against {names[0]}, both logarithmic")


def _groups(series: Sequence[Series], x: Axis | LogAxis, y: Axis | LogAxis) -> list[str]:
    bands = [_band(s, x, y) for s in series if s.kind != "original"]
    lines = [
        path([None if v is None else (x(at), y(v)) for at, v in zip(s.x, s.mean, strict=True)], f"l-{s.kind}")
        for s in series
    ]
    return bands + lines


def _band(s: Series, x: Axis | LogAxis, y: Axis | LogAxis) -> str:
    """The range of the seeds as a surface, one for each stretch without a break."""
    drawn: list[str] = []
    run: list[tuple[float, float, float]] = []
    rows = [*zip(s.x, s.low, s.high, strict=True), (0.0, None, None)]
    for at, low, high in rows:
        if low is not None and high is not None:
            run.append((x(at), y(low), y(high)))
            continue
        if len(run) > 1 and any(a != b for _, a, b in run):
            edge = [(px, lo) for px, lo, _ in run] + [(px, hi) for px, _, hi in reversed(run)]
            points = " ".join(f"{px:.1f},{py:.1f}" for px, py in edge)
            drawn.append(f'<polygon class="b-{s.kind}" points="{points}"/>')
        run = []
    return "".join(drawn)


def _fitting(ticks: Sequence[tuple[float, str]], x: Axis) -> tuple[list[tuple[float, str]], bool, float]:
    """The ticks that are written, whether they are slanted, and how much height that takes."""
    size = LETTER * 12
    if len(ticks) < 2:
        return list(ticks), False, 0.0
    step = min(abs(x(b[0]) - x(a[0])) for a, b in pairwise(ticks))
    longest = max(len(words) for _, words in ticks) * size
    if longest <= step - 5:
        return list(ticks), False, 0.0
    if all(_numeric(words) for _, words in ticks):  # of numbers every second or third says enough
        every = math.ceil((longest + 5) / step)
        return [tick for i, tick in enumerate(ticks) if i % every == 0], False, 0.0
    every = math.ceil(15 / step)
    most = int(x(ticks[0][0]) / (size * math.cos(math.radians(STEEP))))  # the first one must not leave the picture
    words = [(at, shortened(name, most)) for i, (at, name) in enumerate(ticks) if i % every == 0]
    return words, True, max(len(w) for _, w in words) * size * math.sin(math.radians(STEEP)) - 4


def _numeric(words: str) -> bool:
    try:
        float(words)
    except ValueError:
        return False
    return True


@dataclass(frozen=True)
class HeatRow:
    """One model's row of a heat map: a value a column, and what a pointer reads over each."""

    name: str
    values: Sequence[Value]
    titles: Sequence[str]


LEVELS = 8


def level(value: float, low: float, high: float) -> int:
    """Which of the LEVELS shades a value between low and high has."""
    share = (value - low) / (high - low) if high > low else 0.0
    return min(LEVELS - 1, max(0, int(share * LEVELS)))


def heat(
    rows: Sequence[HeatRow],
    columns: Sequence[str],
    ends: tuple[float, float],
    label: str,
    width: float,
    places: int,
    references: int = 0,
) -> str:
    """Models by names, the value printed in each cell; what does not fit into the width goes below.

    Args:
        rows: from top to bottom.
        columns: the names.
        ends: lowest and highest value of the shades.
        label: what the values are.
        width: of the drawing, in pixels.
        places: digits after the point.
        references: how many rows stand above the rule that parts them from the methods.
    """
    letters = min(max(len(row.name) for row in rows), room(max(110.0, min(250.0, 0.34 * width))))
    left, tall = letters * LETTER * 12.5 + 10, 23.0
    fit = max(1, int((width - left - BESIDE) / 44))
    chunks = math.ceil(len(columns) / fit)
    fit = math.ceil(len(columns) / chunks)
    cell = min(74.0, (width - left - BESIDE) / fit)
    parts, top = [_scale(left, ends, label, places, width)], 40.0
    for start in range(0, len(columns), fit):
        names = columns[start : start + fit]
        longest = max(len(name) for name in names) * LETTER * 12
        slanted = longest > cell - 5
        names = [shortened(name, 18) for name in names] if slanted else list(names)
        rise = max(len(n) for n in names) * LETTER * 12 * math.sin(math.radians(STEEP)) + 8 if slanted else 16.0
        top += rise
        for j, name in enumerate(names):
            at = left + cell * (j + 0.5)
            turn = f' transform="rotate(-{STEEP} {at:.1f} {top - 6:.1f})"' if slanted else ""
            parts.append(text(at, top - 6, name, "start" if slanted else "middle", "tick", turn, columns[start + j]))
        for i, row in enumerate(rows):
            words = shortened(row.name, letters)
            parts.append(text(left - 8, top + tall / 2 + 4, words, "end", "item", title=row.name))
            for j in range(len(names)):
                parts.append(_cell(row, start + j, left + cell * j, top, (cell, tall), ends, places))
            top += tall
            if i + 1 == references < len(rows):
                parts.append(line(0, top + 2, left + cell * len(names), top + 2, "base"))
                top += 4
        top += 14
    return picture(width, top - 8, "".join(parts), f"{label} for each model and layer")


def _cell(
    row: HeatRow, at: int, x: float, y: float, size: tuple[float, float], ends: tuple[float, float], places: int
) -> str:
    value, middle = row.values[at], (x + size[0] / 2, y + size[1] / 2 + 4)
    if value is None:
        return text(*middle, DASH, "middle", "tick", title=row.titles[at])
    shade = level(value, *ends)
    body = box(x + 0.5, y + 0.5, size[0] - 1, size[1] - 1, f"h{shade}", row.titles[at])
    return body + text(*middle, f"{value:.{places}f}", "middle", f"t{shade}")


def _scale(left: float, ends: tuple[float, float], label: str, places: int, width: float) -> str:
    """The shades and their ends, above the map."""
    step = 17.0
    left = min(left, width - 20 - LEVELS * step - 90)
    low, high = (f"{end:.{places}f}" for end in ends)
    start = left + len(low) * LETTER * 12 + 6
    boxes = [box(start + step * i, 20, step, 11, f"h{i}") for i in range(LEVELS)]
    words = text(left, 13, label, kind="axis") + text(left, 30, low) + text(start + step * LEVELS + 6, 30, high)
    return f"<g>{words}{''.join(boxes)}</g>"


def key(kind: str) -> str:
    """A short stretch of a group's line, for the legend."""
    body = "" if kind in ("original", "guess") else f'<rect class="b-{kind}" x="0" y="2" width="30" height="10"/>'
    body += f'<polyline class="{escape(kind if kind == "guess" else f"l-{kind}")}" points="0,7 30,7"/>'
    return f'<svg class="key" width="30" height="14" viewBox="0 0 30 14" aria-hidden="true">{body}</svg>'
