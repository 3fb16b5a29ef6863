"""The page's plots: inline SVG from plain numbers, coloured by the page's own style sheet.

Every function takes the width it is drawn for, in CSS pixels, because a plot shrunk to a phone has unreadable
labels; the page holds a wide and a narrow drawing and shows the one that fits. Text is escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from .table import DASH, number

SHAPES = 8
COLOURS = 8
LETTER = 0.56  # mean width of a letter, in units of the font size; enough to keep labels apart


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


def text(x: float, y: float, words: str, anchor: str = "start", kind: str = "tick", extra: str = "") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{extra}>{escape(words)}</text>'


def shortened(words: str, most: int) -> str:
    return words if len(words) <= most else f"{words[: max(1, most - 1)]}…"


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def box(x: float, y: float, width: float, height: float, kind: str, title: str = "") -> str:
    inner = f"<title>{escape(title)}</title>" if title else ""
    size = f'width="{max(0.0, width):.1f}" height="{max(0.0, height):.1f}"'
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" {size}>{inner}</rect>'


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
    left, right, top, bottom = 46.0, width - 14.0, 46.0, height - 46.0
    sound = [p for p in points if not p.flagged] or list(points)
    edges = [p.x for p in sound] + [e for p in sound for e in p.x_ends or ()] + list(utility or ())
    pad = max(0.07 * (max(edges) - min(edges)), 0.4 if max(edges) > 2 else 1e-3)
    x = Axis(min(edges) - pad, min(max(edges) + pad, most + pad / 3), left, right)
    tops = [v for p in sound for v in (p.y, *(p.y_ends or ()))] + list(floor or ())
    y = Axis(0.0, max(*tops, 1e-6) * 1.12, bottom, top, power)
    parts = [text(left - 38, 14, names[1], kind="axis"), text(right, height - 8, names[0], "end", "axis")]
    across = [value for value in x.ticks() if value <= most]
    places = max((len(f"{value:g}".partition(".")[2]) for value in across), default=0)
    for value in across:
        parts += [
            line(x(value), top, x(value), bottom, "grid"),
            text(x(value), bottom + 17, f"{value:.{places}f}", "middle"),
        ]
    for value in y.ticks(26):
        parts += [line(left, y(value), right, y(value), "grid"), text(left - 8, y(value) + 4, f"{value:g}", "end")]
    taken: list[tuple[float, float, float, float]] = []
    if floor:
        parts.append(
            box(
                left,
                y(floor[1]),
                right - left,
                bottom - y(floor[1]),
                "floor",
                f"retrained against retrained: gaps up to {number(floor[1], names[2])}",
            )
        )
        parts.append(line(left, y(floor[1]), right, y(floor[1]), "floor-edge"))
    if utility:
        parts.append(
            box(
                x(utility[0]),
                top,
                max(2.0, x(utility[1]) - x(utility[0])),
                bottom - top,
                "band",
                "utility of the retrained models",
            )
        )
        middle = min(right - 32, max(left + 32, (x(utility[0]) + x(utility[1])) / 2))
        parts.append(text(middle, top - 6, "retrained", "middle", "note"))
    parts.append(line(left, bottom, right, bottom, "base"))
    spots = [_spot(p, x, y) for p in points]
    taken += [(px - 8, py - 8, px + 8, py + 8) for px, py in spots]
    for p, (px, py) in zip(points, spots, strict=True):
        parts.append(_whiskers(p, px, py, x, y))
    for p, (px, py) in zip(points, spots, strict=True):
        style = "mark flagged" if p.flagged else "mark"
        parts.append(f'<g class="{style}"><title>{escape(p.title)}</title>{marker(p.index, px, py)}</g>')
    parts += place_labels([_label(p, x, y) for p in points], spots, taken, (left, top, right, bottom - 2))
    return picture(
        width, height, "".join(parts), f"{names[1]} against {names[0]}; lower is closer to the retrained models"
    )


def _spot(p: Point, x: Axis, y: Axis) -> tuple[float, float]:
    return x(p.x), y(p.y)


def _label(p: Point, x: Axis, y: Axis) -> str:
    """The name; a point that is drawn at the edge because it lies outside says where it is."""
    name, outside = shortened(p.name, 28), []
    if not x.low <= p.x <= x.high:
        outside.append(f"{'←' if p.x < x.low else '→'} {number(p.x, '%')}")
    if p.y > y.high:
        outside.append(f"↑ {number(p.y, '%')}")
    return f"{name} ({', '.join(outside)})" if outside else name


def _whiskers(p: Point, px: float, py: float, x: Axis, y: Axis) -> str:
    drawn = []
    if p.x_ends and x.low <= p.x <= x.high:
        drawn.append(line(x(p.x_ends[0]), py, x(p.x_ends[1]), py, "whisker"))
    if p.y_ends and p.y <= y.high:
        drawn.append(line(px, y(p.y_ends[0]), px, y(p.y_ends[1]), "whisker"))
    return "".join(drawn)


def place_labels(
    names: Sequence[str],
    spots: Sequence[tuple[float, float]],
    taken: list[tuple[float, float, float, float]],
    frame: tuple[float, float, float, float],
    size: float = 13.0,
) -> list[str]:
    """Write each name near its spot where it covers least; the crowded ones choose first.

    `taken` and `frame` are boxes (left, top, right, bottom); a name that had to move away gets a line to its spot.
    """
    drawn = []
    crowd = [sum(math.dist(a, b) < 60 for b in spots) for a in spots]
    for i in sorted(range(len(spots)), key=lambda j: -crowd[j]):
        px, py = spots[i]
        wide = LETTER * size * len(names[i])
        best: tuple[float, tuple[float, float, float, float], float] | None = None
        for far in (11.0, 20.0, 32.0, 48.0, 66.0, 90.0, 125.0):
            for turn in range(0, 360, 30):
                dx, dy = far * math.cos(math.radians(turn)), far * math.sin(math.radians(turn))
                x1 = px + dx - (wide if dx < -1e-6 and abs(dx) > 1 else wide / 2 if abs(dx) <= 1 else 0)
                spot = (x1, py + dy - size / 2, x1 + wide, py + dy + size / 2)
                cost = (
                    0.35 * far
                    + 0.01 * turn
                    + sum(_overlap(spot, other) for other in taken)
                    + 40 * _outside(spot, frame)
                )
                if best is None or cost < best[0]:
                    best = (cost, spot, far)
        assert best is not None
        spot, far = best[1], best[2]
        taken.append(spot)
        if far > 20:
            end = min(max(px, spot[0]), spot[2]), min(max(py, spot[1] + 2), spot[3] - 2)
            drawn.append(line(px, py, *end, "leader"))
        drawn.append(text(spot[0], spot[3] - 2.5, names[i], kind="name"))
    return drawn


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    wide, tall = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(0.0, wide) * max(0.0, tall)


def _outside(a: tuple[float, ...], frame: tuple[float, ...]) -> float:
    return max(0.0, frame[0] - a[0]) + max(0.0, frame[1] - a[1]) + max(0.0, a[2] - frame[2]) + max(0.0, a[3] - frame[3])


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


@dataclass(frozen=True)
class Cost:
    """What one method takes: seconds of unlearning (one number a seed), seconds to prepare, and a remark."""

    name: str
    index: int
    seconds: list[float]
    prepare: float | None
    remark: str


def cost(items: Sequence[Cost], retraining: float | None, width: float) -> str:
    """Seconds per method as bars on a logarithmic scale, the preparation as a hatched bar below."""
    known = [s for item in items for s in (*item.seconds, item.prepare or 0.0) if s > 0] + (
        [retraining] if retraining else []
    )
    low, high = math.floor(math.log10(min(known)) - 0.02), math.ceil(math.log10(max(known)) + 0.02)
    row, head, left, right = 43.0, 26.0, 2.0, width - 10.0
    height = head + row * len(items) + 26

    def x(seconds: float) -> float:
        return left + (right - left) * (math.log10(max(seconds, 10**low)) - low) / max(1, high - low)

    parts = []
    for power in range(low, high + 1):
        anchor = "start" if power == low else "end" if power == high else "middle"
        parts.append(line(x(10**power), head - 4, x(10**power), height - 22, "grid"))
        parts.append(text(x(10**power), height - 7, f"{10.0**power:g} s", anchor))
    if retraining:
        parts.append(line(x(retraining), head - 8, x(retraining), height - 22, "reference"))
        late = x(retraining) > width / 2
        parts.append(
            text(
                x(retraining) + (4 if late else -4),
                12,
                f"retraining {number(retraining, 's')} s",
                "end" if late else "start",
                "note",
            )
        )
    for i, item in enumerate(items):
        y = head + row * i
        remark = f'<tspan class="value" dx="9">{escape(item.remark)}</tspan>'
        parts.append(marker(item.index, left + 7, y + 8, 4.5))
        name = escape(shortened(item.name, int((width - 40) / (LETTER * 13)) - len(item.remark)))
        parts.append(f'<text class="name" x="{left + 19:.1f}" y="{y + 12.5:.1f}">{name}{remark}</text>')
        if item.seconds:
            middle = math.fsum(item.seconds) / len(item.seconds)
            parts.append(box(left, y + 19, x(middle) - left, 9, "bar", f"{item.name}: {number(middle, 's')} s"))
            parts.append(line(x(min(item.seconds)), y + 23.5, x(max(item.seconds)), y + 23.5, "whisker"))
        if item.prepare:
            parts.append(
                box(left, y + 30, x(item.prepare) - left, 5, "prepare", f"prepared once: {number(item.prepare, 's')} s")
            )
    return picture(width, height, "".join(parts), "seconds of unlearning for each method, logarithmic scale")


def class_bars(
    names: Sequence[str],
    series: Sequence[tuple[str, Sequence[float | None]]],
    forgotten: frozenset[int],
    title: str,
    width: float,
    height: float = 250.0,
) -> str:
    """Percent correct per class: three bars a class (original, retrained, unlearned), forgotten classes marked.

    Args:
        names: of the classes that are drawn.
        series: (style, percent per class); None where the set holds no row of a class.
        forgotten: positions in `names`.
        title: says what is drawn, for those who cannot see it.
        width: of the drawing, in pixels.
        height: of the drawing, in pixels.
    """
    left, right, top = 34.0, width - 4.0, 22.0
    step = (right - left) / max(1, len(names))
    longest = max(len(n) for n in names) * LETTER * 12
    slanted = longest > step - 4
    bottom = height - 52
    height = bottom + (24 + min(90.0, longest * math.sin(math.radians(38))) if slanted else 24)
    y = Axis(0.0, 100.0, bottom, top)
    parts = []
    for level in (0, 25, 50, 75, 100):
        parts += [line(left, y(level), right, y(level), "grid"), text(left - 6, y(level) + 4, f"{level}", "end")]
    thick = min(20.0, step * 0.8 / len(series))
    for i, name in enumerate(names):
        middle = left + step * (i + 0.5)
        if i in forgotten:
            parts.append(box(middle - step / 2 + 1, top, step - 2, bottom - top, "forgotten"))
            word = "forgotten" if step > 52 or len(forgotten) == 1 else "×"
            parts.append(text(middle, top - 7, word, "middle", "note"))
        for j, (style, values) in enumerate(series):
            x0 = middle + (j - len(series) / 2) * thick
            value = values[i] if i < len(values) else None
            if value is None:
                parts.append(text(x0 + thick / 2, bottom - 3, DASH, "middle", "tick"))
                continue
            said = f"{name}, {style}: {number(value, '%')} %"
            parts.append(box(x0 + 0.5, y(value) - 1, thick - 1, bottom - y(value) + 1, f"k-{style}", said))
        extra = f' transform="rotate(-38 {middle:.1f} {bottom + 15:.1f})"' if slanted else ""
        parts.append(text(middle, bottom + 15, name, "end" if slanted else "middle", "tick", extra))
    parts.append(line(left, bottom, right, bottom, "base"))
    return picture(width, height, "".join(parts), title)
