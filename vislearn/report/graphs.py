"""From stored curves to plots: which models are drawn, on which axes, and what is said about those that are not."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

from . import bars, lines
from .svg import glyph, round_steps
from .table import is_number, number

WIDE, NARROW, PANEL, BARS = 1216, 340, 280, 340  # pixels: page, phone, one small plot, one plot of bars
GRID = [10 ** (-3 + 3 * i / 60) for i in range(61)]  # false positive rates at which ROC curves are read
KINDS = ("original", "retrained", "unlearned")

Curves = list[dict[str, Any]]
X = float | str


def graph(
    spec: Mapping[str, Any], rule: Mapping[str, Any], table: Sequence[dict[str, Any]], marks: Mapping[str, int]
) -> dict[str, Any] | None:
    """One graph of one rule, or None where no model has its curve.

    Args:
        spec: the entry of `results["graphs"]`.
        rule: the rule's results.
        table: the rule's rows in printed order.
        marks: title of a method -> the index of its marker.

    Returns:
        {"title", "help", "kind", "missing" (sentences), "legend" (kinds of lines) and "panels": dicts of "title",
        "glyph", and the drawings "wide" and "narrow" ("" where the wide one serves both)}.
    """
    groups = [(row, _curves(row, rule, spec["key"])) for row in table if row["kind"] != "floor"]
    held = [(row, curves) for row, curves in groups if curves]
    kind = spec.get("kind") or "line"
    methods = [row for row, _ in held if row["kind"] == "method"]
    if not held or (kind in ("line", "roc") and not methods):
        return None
    draw: Callable[..., tuple[list[dict[str, Any]], list[str]]]
    draw = {"roc": _roc, "bars": _bars, "heat": _heat}.get(kind, _line)
    panels, legend = draw(spec, held, marks)
    about = {key: str(spec.get(key) or "") for key in ("key", "title", "help")}
    absent = [row["label"] for row, curves in groups if not curves]
    missing = [f"Without this curve: {', '.join(absent)}."] if absent else []
    return {**about, "kind": kind, "panels": panels, "legend": legend, "missing": missing}


def _curves(row: Mapping[str, Any], rule: Mapping[str, Any], key: str) -> Curves:
    """The curves with at least one finite number, one a seed."""
    source = row["source"] if row["kind"] == "method" else (rule.get("models") or {}).get(row["kind"]) or {}
    found = (source.get("curves") or {}).get(key) or []
    found = [found] if isinstance(found, Mapping) else found
    return [c for c in found if c.get("x") and any(is_number(v) for v in c.get("y") or ())]


def _words(x: X) -> str:
    return x if isinstance(x, str) else f"{x:g}"


def pointwise(curves: Curves, xs: Sequence[X]) -> list[list[float]]:
    """The values of all seeds at each x; a seed without a finite number there is left out."""
    at = [{x: y for x, y in zip(c["x"], c["y"], strict=False) if is_number(y)} for c in curves]
    return [[float(one[x]) for one in at if x in one] for x in xs]


def _summarised(kind: str, xs: Sequence[float], values: Sequence[Sequence[float]]) -> lines.Series:
    mean = [math.fsum(v) / len(v) if v else None for v in values]
    return lines.Series(
        kind, xs, mean, [min(v) if v else None for v in values], [max(v) if v else None for v in values]
    )


def _places(held: Sequence[tuple[dict, Curves]]) -> list[X]:
    """Every x of all curves: numbers ascending, names in the order they came in."""
    found = list(dict.fromkeys(x for _, curves in held for c in curves for x in c["x"]))
    return sorted(found) if all(is_number(x) for x in found) else found


def even(xs: Sequence[X]) -> bool:
    """Whether the places on the axis are drawn at equal steps: names are, and few numbers over many magnitudes."""
    if any(isinstance(x, str) for x in xs):
        return True
    positive = [float(x) for x in xs if float(x) > 0]
    return 3 <= len(xs) <= 9 and bool(positive) and max(positive) >= 20 * min(positive)


def _line(spec: Mapping[str, Any], held: Sequence[tuple[dict, Curves]], marks: Mapping[str, int]) -> tuple[list, list]:
    xs = _places(held)
    equal = even(xs)
    at = [float(i) for i in range(len(xs))] if equal else [float(x) for x in xs]
    if equal:
        ticks = [(float(i), _words(x)) for i, x in enumerate(xs)]
    else:
        ticks = [(v, f"{v:g}") for v in (round_steps(min(at), max(at), 5) if len(at) > 1 else at)]
    drawn = [(row, _series(row, curves, xs, at)) for row, curves in held]
    every = [v for _, s in drawn for v in (*s.low, *s.high) if v is not None]
    ends = (min(at) - 0.3 * equal, max(at) + (0.3 if equal else 0.0 if len(at) > 1 else 1.0), *span(every))
    names = (str(spec.get("x") or ""), str(spec.get("y") or ""))
    return _panels(drawn, marks, lambda series, width: lines.line_plot(series, ticks, ends, names, width, 0.76 * width))


def _series(row: Mapping[str, Any], curves: Curves, xs: Sequence[X], at: Sequence[float]) -> lines.Series:
    """The group's own points only, so that seeds measured at other places leave no break in its line."""
    kind = row["kind"] if row["kind"] in KINDS else "unlearned"
    own = {x for c in curves for x in c["x"]}
    kept = [(x, place) for x, place in zip(xs, at, strict=True) if x in own]
    return _summarised(kind, [place for _, place in kept], pointwise(curves, [x for x, _ in kept]))


def span(values: Sequence[float]) -> tuple[float, float]:
    """The ends of an axis for these values: zero and one where they are near, else a little room."""
    low, high = min(values), max(values)
    pad = 0.06 * (high - low) or 0.05 * abs(high) or 0.5
    bottom = 0.0 if 0 <= low <= 0.5 * high else low - pad
    top = 1.0 if 0.9 < high <= 1 and low >= 0 else high + pad
    return bottom, top


def _roc(spec: Mapping[str, Any], held: Sequence[tuple[dict, Curves]], marks: Mapping[str, int]) -> tuple[list, list]:
    drawn = []
    for row, curves in held:
        kind = row["kind"] if row["kind"] in KINDS else "unlearned"
        each = [roc_at(c["x"], c["y"], GRID) for c in curves]
        values = [[v for v in at if v is not None] for at in zip(*each, strict=True)]
        drawn.append((row, _summarised(kind, GRID, values)))
    names = (str(spec.get("x") or "false positive rate"), str(spec.get("y") or "true positive rate"))
    panels, legend = _panels(drawn, marks, lambda series, width: lines.roc_plot(series, names, width, 0.96 * width))
    return panels, [*legend, "guess"]


def roc_at(x: Sequence[Any], y: Sequence[Any], rates: Sequence[float]) -> list[float | None]:
    """True positive rate at each false positive rate: that of the last vertex that does not exceed it."""
    vertices = sorted((float(a), float(b)) for a, b in zip(x, y, strict=False) if is_number(a) and is_number(b))
    left = [a for a, _ in vertices]
    highest = list(accumulate((b for _, b in vertices), max))
    found = [bisect_right(left, rate * (1 + 1e-9)) for rate in rates]
    return [highest[i - 1] if i else None for i in found]


def _panels(
    drawn: Sequence[tuple[dict, lines.Series]],
    marks: Mapping[str, int],
    draw: Callable[[list[lines.Series], float], str],
) -> tuple[list[dict[str, Any]], list[str]]:
    """One plot a method, each with the references behind it, all on the same axes."""
    references = [series for row, series in drawn if row["kind"] != "method"]
    methods = [(row, series) for row, series in drawn if row["kind"] == "method"]
    width = PANEL if len(methods) > 1 else NARROW
    panels = [
        {
            "title": row["label"],
            "glyph": glyph(marks.get(row["title"], 0)),
            "flagged": bool(row["flags"]),
            "wide": draw([*references, series], width),
            "narrow": "",
        }
        for row, series in methods
    ]
    return panels, [*(series.kind for series in references), "unlearned"]


def _bars(spec: Mapping[str, Any], held: Sequence[tuple[dict, Curves]], marks: Mapping[str, int]) -> tuple[list, list]:
    xs = _places(held)
    values = {id(row): pointwise(curves, xs) for row, curves in held}
    every = [v for found in values.values() for at in found for v in at]
    low, high = min(0.0, *every), max(0.0, *every)
    high = 1.0 if low == high == 0 else high
    label = str(spec.get("y") or "")
    panels = []
    for i, x in enumerate(xs):
        items = [_bar(row, values[id(row)][i], marks) for row, _ in held]
        name = x if isinstance(x, str) else f"{spec.get('x') or ''} {x:g}".strip()
        drawing = bars.model_bars(items, low, high, label, BARS)
        panels.append({"title": name, "glyph": "", "flagged": False, "wide": drawing, "narrow": ""})
    return panels, []


def _bar(row: Mapping[str, Any], values: Sequence[float], marks: Mapping[str, int]) -> bars.Bar:
    index = marks.get(row["title"], 0) if row["kind"] == "method" else -1 if row["kind"] == "original" else None
    if not values:
        return bars.Bar(row["label"], index, None, None, f"{row['label']}: no value was stored")
    mean = math.fsum(values) / len(values)
    said = f"{row['label']}: {number(mean, '')}, {_seeds(values)}"
    return bars.Bar(row["label"], index, mean, (min(values), max(values)), said)


def _seeds(values: Sequence[float]) -> str:
    if len(values) == 1:
        return "one model"
    return f"{len(values)} models from {number(min(values), '')} to {number(max(values), '')}"


def _heat(spec: Mapping[str, Any], held: Sequence[tuple[dict, Curves]], marks: Mapping[str, int]) -> tuple[list, list]:
    xs = _places(held)
    rows, every = [], []
    for row, curves in held:
        found = pointwise(curves, xs)
        means = [math.fsum(v) / len(v) if v else None for v in found]
        told = [_seeds(v) if v else "no value was stored" for v in found]
        said = [f"{row['label']}, {_words(x)}: {words}" for x, words in zip(xs, told, strict=True)]
        rows.append(lines.HeatRow(row["label"], means, said))
        every += [v for v in means if v is not None]
    low, high = min(every), max(every)
    places = 3 if high - low < 0.03 else 2 if max(abs(low), abs(high)) < 10 else 1
    step = 10.0**-places
    ends = (math.floor(low / step) * step, math.ceil(high / step) * step)
    first = sum(row["kind"] != "method" for row, _ in held)
    columns, label = [_words(x) for x in xs], str(spec.get("y") or "")
    wide, narrow = (lines.heat(rows, columns, ends, label, width, places, first) for width in (WIDE, NARROW))
    return [{"title": "", "glyph": "", "flagged": False, "wide": wide, "narrow": narrow}], []
