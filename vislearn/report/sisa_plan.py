"""The page of `vislearn sisa plan`: cost and speed-up over shards, cost over the size of a batch, and the formulas."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from html import escape
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..folders import whole
from ..sisa_plan import MOST_SHARDS
from .corrective import spread
from .page import environment
from .svg import LETTER, Axis, LogAxis, box, line, marker, path, picture, room, shortened, text

WIDE, NARROW, HIGH = 588.0, 340.0, 330.0  # pixels: half of the page, a phone, the height of a plot
APART = 15.0  # pixels between two names
HUES = (0, 1, 2, 3, 4, 5, 7)  # yellow makes too faint a line
SAID = {True: "agree", False: "differ", None: "all streams alike"}


@dataclass(frozen=True)
class Curve:
    """One line of a plot.

    Attributes:
        name: what stands behind its end.
        kind: class of its line in the style sheet.
        points: (x, y), x rising.
    """

    name: str
    kind: str
    points: Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Plot:
    """What a plot shows.

    Attributes:
        curves: the lines.
        names: what stands on x and on y.
        low: end of the y axis.
        high: the other.
        percent: whether y is a share that is printed in percent.
        shade: x from which the plot is shaded; None for nowhere.
        dot: where the plan is, and its name; None where it is not on the plot.
        log: whether the y axis is logarithmic.
    """

    curves: Sequence[Curve]
    names: tuple[str, str]
    low: float
    high: float
    percent: bool = False
    shade: float | None = None
    dot: tuple[float, float, str] | None = None
    log: bool = True


def write_plan(found: Mapping[str, Any], page: Path) -> None:
    """Draw what `sisa_planner.study` found into one self-contained HTML file.

    Raises:
        UserError: the file cannot be written.
    """
    content = environment().get_template("sisa_plan.html").render(**context(found))
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        with whole(page) as beside:
            beside.write_text(content, encoding="utf-8")
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write the page {page}: {reason}; choose another place with --page=FILE") from None


def context(found: Mapping[str, Any]) -> dict[str, Any]:
    """Everything the template prints."""
    plan, asked = found["plan"], found["stream"]
    plots = [_cost(found), _speedup(found), _batches(found)]
    titles = [
        ("What the requests cost", "All requests of the stream, for shards and slices of any number. Dashed: one model "
         "on all rows, trained again each time. Shaded: more shards than the paper found bearable."),
        ("How many times cheaper than retraining", "The same as a ratio to retraining one model each time."),
        ("One batch of requests", "What one batch costs against one retraining after it, by its size, with "
         f"{asked_slices(found)}. At three requests for each shard nearly all shards are hit, and nothing is gained."),
    ]  # fmt: skip
    if accuracy := _accuracy(found):
        plots.append(accuracy)
        titles.append(("Accuracy as measured", "By the number of shards. Dashed: what may be lost against the fewest."))
    stored = json.dumps(found).encode()
    return {
        "created": datetime.now().isoformat(sep=" ", timespec="minutes"), "plan": plan, "stream": asked,
        "figures": [{"title": title, "words": said, "wide": drawn(p, WIDE), "narrow": drawn(p, NARROW)}
                    for p, (title, said) in zip(plots, titles, strict=True)],
        "lines": [_line(each) for each in found["lines"]], "streams": found["lines"][0]["streams"],
        "rounds": found["rounds"], "count": count,
        "said": SAID, "short": short, "download": base64.b64encode(stored).decode(),
    }  # fmt: skip


def asked_slices(found: Mapping[str, Any]) -> str:
    """`5 slices`, as the plot over batches has them."""
    slices = found["batches"]["slices"]
    return f"{slices} slice{'' if slices == 1 else 's'}"


def _line(each: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the table of formulas, in words."""
    off = each["paper_off"]
    part, size = each["simulated_requests"], each["batch"]
    return {
        "what": each["what"], "rows": f"{each['rows']:,}", "parts": f"{each['shards']} × {each['slices']}",
        "requests": f"{part:,}{'' if size == 1 else ' together' if size >= part else f', {size:,} at a time'}",
        "paper": "–" if each["paper"] is None else f"{each['paper']:,.0f}",
        "off": "" if off is None else "0 %" if abs(off) < 5e-4 else f"{100 * off:+.1f} %",
        "exact": f"{each['exact_of_these']:,.0f}",
        "simulated": f"{each['simulated']:,.0f} ± {count(each['error'])}",
        "agree": SAID[each["agree"]] + ("" if part == each["requests"] else f" (the first of {each['requests']:,})"),
        "differ": each["agree"] is False,
    }  # fmt: skip


# the plots


def _of_slices(found: Mapping[str, Any], key: str) -> list[Curve]:
    """One line for each number of slices."""
    return [
        Curve(f"R = {each['slices']}", f"s{HUES[i % len(HUES)]} curve",
              [(s, v) for s, v in zip(each["shards"], each[key], strict=True) if v])
        for i, each in enumerate(found["curves"]["slices"])
    ]  # fmt: skip


def _ends(curves: Sequence[Curve]) -> tuple[float, float]:
    """Ends of a logarithmic axis: 1, 2 or 5 times a power of ten."""
    values = [v for curve in curves for _, v in curve.points] or [1.0]
    low, high = 10.0 ** math.floor(math.log10(min(values))), 10.0 ** math.floor(math.log10(max(values)))
    low = max(low * s for s in (1, 2, 5) if low * s <= min(values) * (1 + 1e-9))
    return low, max(2 * low, min(high * s for s in (1, 2, 5, 10) if high * s >= max(values) * (1 - 1e-9)))


def _dot(found: Mapping[str, Any], key: str) -> tuple[float, float, str] | None:
    plan = found["plan"]
    return (plan["shards"], plan[key], f"S = {plan['shards']}, R = {plan['slices']}") if plan[key] else None


def _cost(found: Mapping[str, Any]) -> Plot:
    curves, retraining = _of_slices(found, "cost"), found["curves"]["retraining"]
    if retraining:
        across = [s for each in found["curves"]["slices"] for s in each["shards"]]
        curves.append(Curve("retraining", "l-retrained", [(min(across), retraining), (max(across), retraining)]))
    return Plot(curves, ("shards S", "rows × epochs"), *_ends(curves), shade=MOST_SHARDS, dot=_dot(found, "cost"))


def _speedup(found: Mapping[str, Any]) -> Plot:
    curves = _of_slices(found, "speedup")
    return Plot(curves, ("shards S", "times cheaper"), *_ends(curves), shade=MOST_SHARDS, dot=_dot(found, "speedup"))


def _batches(found: Mapping[str, Any]) -> Plot:
    curves = [
        Curve(f"S = {each['shards']}", f"s{HUES[i % len(HUES)]} curve",
              list(zip(each["requests"], each["share"], strict=True)))
        for i, each in enumerate(found["batches"]["curves"])
    ]  # fmt: skip
    most = max([1.0, *(v for curve in curves for _, v in curve.points)])
    return Plot(curves, ("requests of the batch K", "cost / retraining (%)"), 0.0, most, percent=True, log=False)


def _accuracy(found: Mapping[str, Any]) -> Plot | None:
    measured = {int(s): a for s, a in found["accuracy"]["measured"].items()}
    if not measured:
        return None
    least, shards = measured[min(measured)] - found["accuracy"]["max_drop"], found["plan"]["shards"]
    curves = [Curve("measured", "s0 curve", list(measured.items())),
              Curve("limit", "l-retrained", [(min(measured), least), (max(measured), least)])]  # fmt: skip
    values = [*measured.values(), least]
    room_ = max(0.01, 0.1 * (max(values) - min(values)))
    dot = (shards, measured[shards], f"S = {shards}") if shards in measured else None
    return Plot(curves, ("shards S", "accuracy (%)"), min(values) - room_, min(1.0, max(values) + room_), percent=True,
                dot=dot, log=False)  # fmt: skip


def drawn(plot: Plot, width: float) -> str:
    """A plot with a logarithmic x axis, as SVG; names stand at the right ends of their lines."""
    longest = max((len(curve.name) for curve in plot.curves), default=0)
    beside = min(0.34 * width, 24 + LETTER * 13 * longest)
    left, right, top, bottom = 50.0, width - beside, 26.0, HIGH - 44.0
    places = [at for curve in plot.curves for at, _ in curve.points] or [1.0]
    x = LogAxis(min(places) / 1.05, max(places) * 1.05, left, right)
    y = (LogAxis if plot.log else Axis)(plot.low, plot.high, bottom, top)
    parts = []
    if plot.shade is not None and plot.shade < x.high:
        start = x(max(plot.shade, x.low))
        parts.append(box(start, top, right - start, bottom - top, "band"))
    for value in y.ticks(26):
        said = f"{100 * value:g}" if plot.percent else short(value)
        parts += [line(left, y(value), right, y(value), "grid"), text(left - 6, y(value) + 4, said, "end")]
    for value in x.ticks(30):
        parts += [line(x(value), bottom, x(value), bottom + 4, "base"),
                  text(x(value), bottom + 17, short(value), "middle")]  # fmt: skip
    parts += [line(left, bottom, right, bottom, "base"), text(4, 13, plot.names[1], kind="axis")]
    parts.append(text(right, bottom + 34, plot.names[0], "end", "axis"))
    spots = [[(x(at), y(v)) for at, v in curve.points] for curve in plot.curves]
    for curve, own in zip(plot.curves, spots, strict=True):
        parts.append(path(own, curve.kind))
        for (at, v), (px, py) in zip(curve.points, own, strict=True):
            said = f"{100 * v:.3g} %" if plot.percent else short(v)
            told = escape(f"{curve.name}, {plot.names[0]} {at:g}: {said}")
            parts.append(f'<circle class="hover" cx="{px:.1f}" cy="{py:.1f}" r="7"><title>{told}</title></circle>')
    named = [(curve, own[-1]) for curve, own in zip(plot.curves, spots, strict=True) if own]
    slots = spread([tip[1] for _, tip in named], APART, top + 4, bottom)
    for (curve, tip), slot in zip(named, slots, strict=True):
        parts.append(line(tip[0] + 3, tip[1], right + 10, slot, "leader faint"))
        parts.append(text(right + 13, slot + 4, shortened(curve.name, room(beside - 14, 13)), kind="item"))
    if plot.dot is not None:
        at, v, name = plot.dot
        parts.append(marker(0, x(at), y(v), 5.5))
        aside = -1 if x(at) > 0.5 * (left + right) else 1
        values = [each for _, each in plot.curves[0].points] or [v]
        falls = values[0] > values[-1]
        under = falls == (aside < 0)  # beside a line that falls there is room at the upper right and at the lower left
        where = (x(at) + 8 * aside, y(v) + (18 if under else -10))
        parts.append(text(*where, name, "end" if aside < 0 else "start", "name first"))
    return picture(width, HIGH, "".join(parts), f"{plot.names[1]} over {plot.names[0]}")


def count(value: float) -> str:
    """A number of rows: whole where it is large, two digits where it is small."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def short(value: float) -> str:
    """`250k`, `1.2M`: a number in few letters."""
    for scale, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.3g}"
