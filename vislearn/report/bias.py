"""What a method forgot of a biased class: accuracy on aligned and conflicting rows, and a probe of the attribute."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

from ..metrics.bias import reading
from .svg import LETTER, Axis, box, glyph, line, marker, picture, room, shortened, text
from .table import finite, number

WIDE, NARROW = 1216.0, 340.0  # pixels: page, phone
ROW, HEAD = 30.0, 30.0
KEPT = "bias forgotten, class kept"
MARKS = {"aligned": 0, "conflicting": 3, "probe": 2}  # shape and colour
PANELS = {  # what is marked on its axis: title, and mark -> key
    "forget": ("Rows to forget (D_f), % right", {m: f"bias/forget_{m}" for m in ("aligned", "conflicting")}),
    "test_forget": ("Unseen rows of it, % right", {m: f"bias/test_forget_{m}" for m in ("aligned", "conflicting")}),
    "probe": ("Bias read out of features, % right", {"probe": "bias/probe_forget"}),
    "probe_kept": ("Bias read out of features, % right", {"probe": "bias/probe"}),
}


@dataclass(frozen=True)
class Spot:
    """A number in percent: the mean over seeds, and the least and the largest of them."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Line:
    """One model: what it is, what was forgotten, and its numbers by panel and mark."""

    label: str
    kind: str  # "original", "retrained", "method", ...
    words: str = ""
    spots: dict[str, dict[str, Spot]] = field(default_factory=dict)


def shortcut(rule: Mapping[str, Any], table: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The picture of one rule: {"wide", "narrow", "legend", "kept"}; None for data without a bias attribute.

    `kept` names the methods after which the class is known by its conflicting rows.

    Args:
        rule: the rule's results.
        table: the rule's rows in printed order.
    """
    lines = [found for row in table if row["kind"] != "floor" and (found := _line(row, rule)).spots]
    panels = [name for name in PANELS if any(name in each.spots for each in lines)]
    if not {"forget", "test_forget"} & set(panels) or all(each.kind != "method" for each in lines):
        return None
    if "probe" in panels and "probe_kept" in panels:
        panels.remove("probe_kept")  # the one on other rows says less of what was to be forgotten
    words = {"aligned": "aligned rows", "conflicting": "conflicting rows", "probe": "probe of the bias attribute"}
    drawn = [mark for mark in MARKS if any(mark in each.spots.get(p, {}) for each in lines for p in panels)]
    return {
        "wide": _wide(lines, panels),
        "narrow": "".join(_narrow(lines, panel) for panel in panels),
        "legend": [(glyph(MARKS[mark]), words[mark]) for mark in drawn],
        "kept": [each.label for each in lines if each.words == KEPT],
    }


def _line(row: Mapping[str, Any], rule: Mapping[str, Any]) -> Line:
    spots: dict[str, dict[str, Spot]] = {}
    for panel, (_, keys) in PANELS.items():
        found = {mark: spot for mark, key in keys.items() if (spot := _spot(row["source"], key)) is not None}
        if found:
            spots[panel] = found
    if row["kind"] != "method":
        return Line(row["label"], row["kind"], "", spots)
    said, own = "", spots.get("forget", {})
    if len(own) == 2:
        retrained = (rule.get("models") or {}).get("retrained") or {}
        aims = [_spot(retrained, f"bias/forget_{mark}") for mark in ("aligned", "conflicting")]
        a, c = (aim.mean / 100 if aim else 0.0 for aim in aims)
        said = reading(own["aligned"].mean / 100, own["conflicting"].mean / 100, (a, c))
    return Line(row["label"], "method", said, spots)


def _spot(source: Mapping[str, Any], key: str) -> Spot | None:
    values = [100 * v for v in finite((source.get("metrics") or {}).get(key))]
    return Spot(math.fsum(values) / len(values), min(values), max(values)) if values else None


def _wide(lines: Sequence[Line], panels: Sequence[str]) -> str:
    """All panels side by side, each model on a line through all of them."""
    most = min(max(len(each.label) for each in lines), room(230))
    left = most * LETTER * 12.5 + 16
    right = WIDE - 190.0
    step = min(330.0, (right - left) / len(panels))
    height = HEAD + ROW * len(lines) + 24
    parts = _shades(lines, left + step * len(panels) + 180)
    for i, panel in enumerate(panels):
        kind = "axis" if step > 270 else "tick"
        parts.append(text(left + step * i + 6, 13, PANELS[panel][0], "start", kind))
        parts += _panel(lines, panel, left + step * i + 6, left + step * (i + 1) - 30)
    parts += _names(lines, most)
    for i, each in enumerate(lines):
        kind = "item first" if each.words == KEPT else "note"
        parts.append(text(left + step * len(panels) - 4, _middle(i) + 4, each.words, "start", kind))
    return picture(left + step * len(panels) + 180, height, "".join(parts), _told(lines))


def _narrow(lines: Sequence[Line], panel: str) -> str:
    """One panel, for a phone."""
    most = min(max(len(each.label) for each in lines), room(120))
    left = most * LETTER * 12.5 + 10
    title = text(0, 13, PANELS[panel][0], "start", "axis")
    parts = [title, *_shades(lines, NARROW), *_panel(lines, panel, left + 6, NARROW - 12)]
    parts += _names(lines, most)
    return picture(NARROW, HEAD + ROW * len(lines) + 24, "".join(parts), f"{PANELS[panel][0]} for each model")


def _shades(lines: Sequence[Line], width: float) -> list[str]:
    """A band behind the models that kept the class."""
    shaded = [i for i, each in enumerate(lines) if each.words == KEPT]
    return [box(0, _middle(i) - ROW / 2, width, ROW, "forgotten") for i in shaded]


def _names(lines: Sequence[Line], most: int) -> list[str]:
    parts = []
    for i, each in enumerate(lines):
        words = shortened(each.label, most)
        parts.append(text(2, _middle(i) + 4, words, "start", "item", title=each.label if words != each.label else ""))
    return parts


def _panel(lines: Sequence[Line], panel: str, start: float, end: float) -> list[str]:
    """One axis from 0 to 100 % with the marks of every model, and the distance between two marks as a line."""
    x = Axis(0.0, 100.0, start, end)
    bottom = HEAD + ROW * len(lines)
    parts = []
    for value in (0, 25, 50, 75, 100):
        parts.append(line(x(value), HEAD - 8, x(value), bottom, "grid"))
        if value != 25 and value != 75:
            parts.append(text(x(value), bottom + 16, f"{value}", "middle"))
    aim = next((each.spots.get(panel, {}).get("probe") for each in lines if each.kind == "retrained"), None)
    if aim is not None:
        parts.append(line(x(aim.mean), HEAD - 8, x(aim.mean), bottom, "reference"))
    for i, each in enumerate(lines):
        spots, y = each.spots.get(panel, {}), _middle(i)
        if len(spots) == 2:
            a, b = (x(spot.mean) for spot in spots.values())
            parts.append(line(min(a, b), y, max(a, b), y, "whisker"))
        for spot, off in zip(spots.values(), (-8.0, 8.0), strict=False):
            if spot.high > spot.low:
                parts.append(line(x(spot.low), y + off, x(spot.high), y + off, "leader"))
        for mark, spot in spots.items():
            said = f"{each.label}, {mark}: {number(spot.mean, '%')} %"
            drawn = marker(MARKS[mark], x(spot.mean), y, 5.5)
            parts.append(f"<g><title>{escape(said)}</title>{drawn}</g>")
    return parts


def _middle(i: int) -> float:
    return HEAD + ROW * (i + 0.5)


def _told(lines: Sequence[Line]) -> str:
    """What is drawn, for those who cannot see it."""
    said = [f"{each.label}: {each.words}" for each in lines if each.words]
    return f"accuracy on aligned and conflicting rows of what is forgotten, for each model; {'; '.join(said)}"
