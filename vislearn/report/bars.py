"""Bars: seconds per method, accuracy per class, and one value for each model under each name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from .svg import LETTER, Axis, box, line, marker, picture, room, shortened, text
from .table import DASH, number


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


@dataclass(frozen=True)
class Bar:
    """One model's value under one name: the mean over seeds and the ends of what the seeds gave."""

    name: str
    index: int | None  # fixes the marker of a method, -1 the original; None is the retrained models
    value: float | None
    ends: tuple[float, float] | None = None
    title: str = ""


def model_bars(items: Sequence[Bar], low: float, high: float, label: str, width: float) -> str:
    """A bar for each model from zero, with the retrained models' value drawn through all of them.

    Args:
        items: from top to bottom.
        low: left end of the axis, at most zero.
        high: right end of the axis, at least zero.
        label: what stands on the axis.
        width: of the drawing, in pixels.
    """
    letters = min(max(len(item.name) for item in items), room(0.42 * width))
    left, right, row, head = 20 + letters * LETTER * 12.5 + 6, width - 46.0, 19.0, 8.0
    bottom = head + row * len(items)
    x = Axis(low, high, left, right)
    parts = []
    for value in x.ticks(30):
        parts += [
            line(x(value), head - 4, x(value), bottom, "grid"),
            text(x(value), bottom + 15, f"{value:g}", "middle"),
        ]
    aim = next((item for item in items if item.index is None and item.value is not None), None)
    if aim is not None and aim.ends:
        a, b = x(aim.ends[0]), x(aim.ends[1])
        parts.append(box(a, head - 4, max(1.5, b - a), bottom - head + 4, "band", "range of the retrained models"))
    values = []  # above the dashed line
    for i, item in enumerate(items):
        y = head + row * i + row / 2
        if item.index is not None:
            parts.append(marker(item.index, 8, y, 4.5))
        words = shortened(item.name, letters)
        cut = f"<title>{escape(item.name)}</title>" if words != item.name else ""
        parts.append(f'<text class="item" x="20" y="{y + 4:.1f}">{escape(words)}{cut}</text>')
        if item.value is None:
            values.append(text(x(0) + 4, y + 4, DASH, "start", "value over", title=item.title))
            continue
        kind = "k-retrained" if item.index is None else "k-original" if item.index < 0 else "k-unlearned"
        start, end = sorted((x(0), x(item.value)))
        parts.append(box(start, y - 5, max(1.0, end - start), 10, kind, item.title))
        tip = end
        if item.ends and item.ends[1] > item.ends[0]:
            parts.append(line(x(item.ends[0]), y, x(item.ends[1]), y, "whisker"))
            tip = max(end, x(item.ends[1]))
        values.append(text(tip + 5, y + 4, number(item.value, ""), "start", "value over"))
    if aim is not None and aim.value is not None:
        parts.append(line(x(aim.value), head - 4, x(aim.value), bottom, "reference"))
    parts += [*values, line(x(0), head - 4, x(0), bottom, "base"), text(right, bottom + 31, label, "end", "axis")]
    return picture(width, bottom + 37, "".join(parts), f"{label} for each model")
