"""What all plots are drawn with: axes, markers, lines, and labels that keep out of each other's way.

Every plot is inline SVG from plain numbers, coloured by the page's own style sheet. A plot takes the width it is drawn
for, in CSS pixels, because one shrunk to a phone has unreadable labels. Text is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

SHAPES = 8
COLOURS = 8
LETTER = 0.56  # mean width of a letter, in units of the font size; enough to keep labels apart
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True)
class Axis:
    """Maps a value to a pixel; a power below one keeps small values apart, and zero on the axis."""

    low: float
    high: float
    start: float
    end: float
    power: float = 1.0

    def __call__(self, value: float) -> float:
        value = min(self.high, max(self.low, value))
        share = (value - self.low) / (self.high - self.low)
        return self.start + (self.end - self.start) * share**self.power

    def ticks(self, apart: float = 34.0) -> list[float]:
        """Round values on the axis, at least `apart` pixels from each other."""
        if self.power == 1:
            count = max(2, int(abs(self.end - self.start) / (1.6 * apart)))
            return round_steps(self.low, self.high, count)
        kept: list[float] = []
        scale = 10 ** math.floor(math.log10(self.high))
        for value in (0.0, *(scale * s for s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5))):
            if (
                self.high >= value
                and (value == 0 or value > self.high / 500)
                and all(abs(self(value) - self(other)) >= apart for other in kept)
            ):
                kept.append(value)
        return kept


@dataclass(frozen=True)
class LogAxis:
    """Maps a positive value to a pixel by its logarithm; what lies outside is drawn at the end it left by."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        value = min(self.high, max(self.low, value))
        share = math.log(value / self.low) / math.log(self.high / self.low)
        return self.start + (self.end - self.start) * share

    def ticks(self, apart: float = 34.0) -> list[float]:
        """Powers of ten on the axis, and 2 and 5 times them where they are at least `apart` pixels from others."""
        powers = range(math.floor(math.log10(self.low)) - 1, math.ceil(math.log10(self.high)) + 1)
        kept: list[float] = []
        for factor in (1, 2, 5):
            for value in (factor * 10.0**power for power in powers):
                inside = self.low * 0.999 <= value <= self.high * 1.001
                if inside and all(abs(self(value) - self(other)) >= apart for other in kept):
                    kept.append(value)
        return sorted(kept)


def round_steps(low: float, high: float, count: int) -> list[float]:
    """About `count` multiples of 1, 2 or 5 times a power of ten, from `low` to `high`."""
    raw = (high - low) / max(1, count)
    scale = 10 ** math.floor(math.log10(raw))
    step = next(scale * s for s in (1, 2, 5, 10) if scale * s >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round((first + i) * step, 10) for i in range(int((high - first * step) / step + 1e-9) + 1)]


def marker(index: int, x: float, y: float, r: float = 6.0) -> str:
    """A marker; the first eight indices differ in shape and in colour, further ones in the pairing of the two."""
    if index < 0:
        at = f'cx="{x:.1f}" cy="{y:.1f}"'
        return f'<g class="origin"><circle {at} r="{r:.1f}"/><circle class="eye" {at} r="1.5"/></g>'
    shape, colour = index % SHAPES, (index + 3 * (index // SHAPES)) % COLOURS
    if shape == 0:
        return f'<circle class="c{colour}" cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}"/>'
    if shape == 5:  # a plus sign
        a, b = r * 1.12, r * 0.4
        turns = [
            (-b, -a),
            (b, -a),
            (b, -b),
            (a, -b),
            (a, b),
            (b, b),
            (b, a),
            (-b, a),
            (-b, b),
            (-a, b),
            (-a, -b),
            (-b, -b),
        ]
    elif shape == 6:  # a star
        turns = [_polar(r * (1.3 if i % 2 == 0 else 0.58), 36 * i) for i in range(10)]
    else:
        corners, first, scale = {1: (4, 45, 1.25), 2: (3, 0, 1.3), 3: (4, 0, 1.3), 4: (3, 180, 1.3), 7: (6, 30, 1.12)}[
            shape
        ]
        turns = [_polar(r * scale, first + 360 / corners * i) for i in range(corners)]
    path = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in turns)
    return f'<polygon class="c{colour}" points="{path}"/>'


def _polar(r: float, degrees: float) -> tuple[float, float]:
    return r * math.sin(math.radians(degrees)), -r * math.cos(math.radians(degrees))


def glyph(index: int) -> str:
    """A marker alone, for tables and headings."""
    drawn = marker(index, 8, 8, 5)
    return f'<svg class="glyph" width="16" height="16" viewBox="0 0 16 16" aria-hidden="true">{drawn}</svg>'


def picture(width: float, height: float, body: str, label: str) -> str:
    """An SVG element that never grows beyond the size it was drawn for."""
    return (
        f'<svg class="plot" role="img" aria-label="{escape(label)}" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}">{body}</svg>'
    )


def text(
    x: float, y: float, words: str, anchor: str = "start", kind: str = "tick", extra: str = "", title: str = ""
) -> str:
    """Words at a place, with further attributes and what a pointer reads over them."""
    inner = f"<title>{escape(title)}</title>" if title else ""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(words)}{inner}</text>'


def shortened(words: str, most: int) -> str:
    """At most `most` letters; the cut is before the end, which tells "SSD (alpha=1)" from "SSD (alpha=10)"."""
    if len(words) <= most:
        return words
    tail = max(0, min(4, most - 4))
    return f"{words[: max(1, most - 1 - tail)].rstrip()}…{words[len(words) - tail :]}"


def room(width: float, size: float = 12.5) -> int:
    """How many letters fit into so many pixels."""
    return max(1, int(width / (LETTER * size)))


def path(spots: Sequence[tuple[float, float] | None], kind: str) -> str:
    """A line through the spots, broken where one is None; a spot between two breaks becomes a dot."""
    drawn: list[str] = []
    run: list[tuple[float, float]] = []
    for spot in (*spots, None):
        if spot is not None:
            run.append(spot)
        elif len(run) == 1:
            drawn.append(f'<circle class="{kind} dot" cx="{run[0][0]:.1f}" cy="{run[0][1]:.1f}" r="2"/>')
            run = []
        elif run:
            at = " ".join(f"{x:.1f},{y:.1f}" for x, y in run)
            drawn.append(f'<polyline class="{kind}" points="{at}"/>')
            run = []
    return "".join(drawn)


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def box(x: float, y: float, width: float, height: float, kind: str, title: str = "") -> str:
    inner = f"<title>{escape(title)}</title>" if title else ""
    size = f'width="{max(0.0, width):.1f}" height="{max(0.0, height):.1f}"'
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" {size}>{inner}</rect>'


def place_labels(
    names: Sequence[str],
    spots: Sequence[tuple[float, float]],
    taken: list[Box],
    frame: Box,
    size: float = 13.0,
    bold: frozenset[int] = frozenset(),
) -> list[str]:
    """Write each name near its spot where it covers least; the crowded ones choose first.

    A name that had to move away gets a line to its spot; the positions in `bold` are printed so.
    """
    drawn = []
    crowd = [sum(math.dist(a, b) < 60 for b in spots) for a in spots]
    for i in sorted(range(len(spots)), key=lambda j: -crowd[j]):
        px, py = spots[i]
        wide = LETTER * size * len(names[i]) * (1.06 if i in bold else 1)
        best: tuple[float, Box, float] | None = None
        for far in (11.0, 20.0, 32.0, 48.0, 66.0, 90.0, 125.0):
            for turn in range(0, 360, 30):
                dx, dy = far * math.cos(math.radians(turn)), far * math.sin(math.radians(turn))
                x1 = px + dx - (wide if dx < -1e-6 and abs(dx) > 1 else wide / 2 if abs(dx) <= 1 else 0)
                spot = (x1, py + dy - size / 2, x1 + wide, py + dy + size / 2)
                cost = 0.35 * far + 0.01 * turn
                if best is not None and cost >= best[0]:
                    continue
                cost += sum(_overlap(spot, other) for other in taken) + 40 * _outside(spot, frame)
                if best is None or cost < best[0]:
                    best = (cost, spot, far)
        assert best is not None
        spot, far = best[1], best[2]
        taken.append(spot)
        if far > 20:
            end = min(max(px, spot[0]), spot[2]), min(max(py, spot[1] + 2), spot[3] - 2)
            drawn.append(line(px, py, *end, "leader"))
        drawn.append(text(spot[0], spot[3] - 2.5, names[i], kind="name first" if i in bold else "name"))
    return drawn


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    wide, tall = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, wide) * max(0.0, tall)


def _outside(a: tuple[float, ...], frame: tuple[float, ...]) -> float:
    return max(0.0, frame[0] - a[0]) + max(0.0, frame[1] - a[1]) + max(0.0, a[2] - frame[2]) + max(0.0, a[3] - frame[3])
