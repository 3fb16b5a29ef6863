"""Corrective unlearning on the page: accuracies against the share of the spoiled rows that is known."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from ..measures.corrective import COLUMNS
from ..selection import By, Course, Selection, courses, select
from .export import FORMULA
from .sections import link
from .svg import COLOURS, LETTER, SHAPES, Axis, line, marker, path, picture, room, shortened, text
from .table import DASH, deviation, finite, mean, number

WIDE, NARROW, MOST, BETWEEN = 1216.0, 340.0, 594.0, 28.0  # pixels: page, phone, one plot at most, between two
APART = 15.0  # pixels between two labels
RULES: tuple[By, ...] = ("deployable", "oracle")
DRAWN = ("corrective/acc_corr", "corrective/acc_retain", "corrective/attack_success")
NUMBERS = {c.key: (c.title, c.help) for c in COLUMNS if c.key in DRAWN}  # key -> (title, what it is)
MARKERS = (0, 1, 2, 3, 4, 5, 7, 6)  # yellow makes the faintest line, so it comes last
ABOUT = ("γ", "model", "chosen by", "settings", "of")  # the first columns of the table
REFERENCES = ("original", "clean", "retrained")
WORDS: dict[str, str] = {
    "deployable": "Settings chosen by what a developer has: the forget set with the labels it came with, and "
    "validation rows.",
    "oracle": "Settings chosen by true labels of the test rows, which nobody has: what tuning could reach at best.",
    "both": "Both ways of choosing settings, by what a developer has and by true labels, choose the same ones.",
}

Row = tuple[list[str], list[list[float]]]  # what a row is about, and for each number the percent of every seed
Points = list[tuple[float, list[float]]]  # (gamma, percent of every seed)


@dataclass(frozen=True)
class Line:
    """One line of a plot, with its label.

    Attributes:
        name: what stands behind its end.
        index: of the marker of a method; None for a reference.
        kind: class of a reference's line.
        points: by ascending gamma.
    """

    name: str
    index: int | None
    kind: str
    points: Points


def sections(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A section for each group of forget rules that differ in gamma alone, of which there are two or more.

    Returns:
        {"anchor", "settings" (words that tell the groups apart), "figures" (dicts of "title", "words" and the drawings
        "wide" and "narrow"), "heads" and "rows" (the table, as text), "left_out" (sentences) and "downloads"}.
    """
    found = [course for course in courses(results.get("rules") or []) if len(course.rules) > 1]
    names = list(dict.fromkeys(m["name"] for c in found for _, rule in c.rules for m in rule.get("methods") or []))
    told = {k for c in found for k, v in c.settings.items() if any(o.settings.get(k) != v for o in found)}
    return [
        {"anchor": f"corrective-{i}", "settings": ", ".join(f"{k}={course.settings.get(k)}" for k in sorted(told))}
        | _section(course, {name: MARKERS[j % SHAPES] + SHAPES * (j // SHAPES) for j, name in enumerate(names)})
        for i, course in enumerate(found)
    ]


def _section(course: Course, marks: Mapping[str, int]) -> dict[str, Any]:
    chosen = {by: [(gamma, rule, select(rule, by)) for gamma, rule in course.rules] for by in RULES}
    entries = {by: [[c.entry for c in selection.choices] for _, _, selection in each] for by, each in chosen.items()}
    shown: dict[str, list[tuple[float, Mapping[str, Any], Selection]]]
    if entries["deployable"] == entries["oracle"]:
        shown = {"both": chosen["deployable"]}
    else:  # a score that no setting has chooses nothing
        shown = {by: each for by, each in chosen.items() if any(entries[by])}
    keys = [key for key in NUMBERS if any(_values(m, key) for _, rule in course.rules for m in _groups(rule))]
    figures = [
        {"title": {"both": "Chosen by either score"}.get(by, f"Chosen by the {by} score"), "words": WORDS[by]}
        | {size: _drawn(selections, marks, keys, width) for size, width in (("wide", WIDE), ("narrow", NARROW))}
        for by, selections in shown.items()
    ]
    heads = [*ABOUT, *(NUMBERS[key][0] for key in keys)]
    rows = [row for i in range(len(course.rules)) for row in _rows({by: s[i] for by, s in shown.items()}, keys, i == 0)]
    return {
        "figures": figures,
        "helps": [NUMBERS[key] for key in keys],
        "heads": heads,
        "rows": [[*about, *(_text(v) if v else DASH for v in values)] for about, values in rows],
        "left_out": _left_out(shown),
        "downloads": [link("CSV", "corrective.csv", "text/csv", _csv(rows, keys))],
    }


def _groups(rule: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [*(rule.get("models") or {}).values(), *(rule.get("methods") or [])]


def _values(group: Mapping[str, Any], key: str) -> list[float]:
    """A group's number of every seed, in percent."""
    return [100 * v for v in finite((group.get("metrics") or {}).get(key))]


# the drawings


def _drawn(
    selections: Sequence[tuple[float, Mapping[str, Any], Selection]],
    marks: Mapping[str, int],
    keys: Sequence[str],
    width: float,
) -> str:
    """The plots of one way to choose, side by side on the page and one below the other on a phone."""
    across = len(keys) if width > NARROW else 1
    each = min(MOST, (width - BETWEEN * (across - 1)) / across)
    plots = [_plot(_lines(selections, marks, key), NUMBERS[key][0], each) for key in keys]
    high = max(height for _, height in plots)
    deep = -(-len(plots) // across) * (high + BETWEEN) - BETWEEN
    places = [((i % across) * (each + BETWEEN), (i // across) * (high + BETWEEN)) for i in range(len(plots))]
    body = "".join(
        f'<g transform="translate({x:.1f} {y:.1f})">{drawn}</g>'
        for (drawn, _), (x, y) in zip(plots, places, strict=True)
    )
    said = " and ".join(NUMBERS[key][0] for key in keys)
    return picture(
        round(across * (each + BETWEEN) - BETWEEN, 1), round(deep, 1), body, f"{said} against the identified share"
    )


def _lines(
    selections: Sequence[tuple[float, Mapping[str, Any], Selection]], marks: Mapping[str, int], key: str
) -> list[Line]:
    found = []
    for kind in REFERENCES:
        points = [(g, _values((rule.get("models") or {}).get(kind) or {}, key)) for g, rule, _ in selections]
        found.append(Line(kind, None, kind, [(g, v) for g, v in points if v]))
    for name, index in marks.items():
        chosen = [(g, selection.of(name)) for g, _, selection in selections]
        points = [(g, _values(choice.entry, key)) for g, choice in chosen if choice is not None]
        found.append(Line(name, index, f"s{colour(index)}", [(g, v) for g, v in points if v]))
    return [each for each in found if each.points]


def colour(index: int) -> int:
    """The colour of a marker, for its line."""
    return (index + 3 * (index // SHAPES)) % COLOURS


def _plot(drawn: Sequence[Line], title: str, width: float) -> tuple[str, float]:
    """One plot and its height: lines over gamma, a whisker from the lowest to the highest seed, names at the right."""
    beside = min(0.4 * width, 44 + LETTER * 13 * max(len(each.name) for each in drawn))
    height = max(300.0, 80 + APART * len(drawn))
    left, right, top, bottom = 38.0, width - beside, 26.0, height - 44.0
    values = [v for each in drawn for _, seeds in each.points for v in seeds]
    gammas = sorted({g for each in drawn for g, _ in each.points})
    x, y = Axis(0.0, 1.0, left, right), Axis(*_ends(values), bottom, top)
    parts = [text(4, 13, f"{title} (%)", kind="axis"), text(right, bottom + 34, "identified share γ", "end", "axis")]
    for value in y.ticks(26):
        parts += [line(left, y(value), right, y(value), "grid"), text(left - 6, y(value) + 4, f"{value:g}", "end")]
    written = -100.0
    for gamma in gammas:
        parts.append(line(x(gamma), bottom, x(gamma), bottom + 4, "base"))
        if x(gamma) - written >= 20:
            parts.append(text(x(gamma), bottom + 17, f"{gamma:g}", "middle"))
            written = x(gamma)
    parts.append(line(left, bottom, right, bottom, "base"))
    spots = [[(x(g), y(_mean(seeds))) for g, seeds in each.points] for each in drawn]
    bodies = [_one(each, own, y) for each, own in zip(drawn, spots, strict=True)]
    references = [each.index is None for each in drawn]  # their dashes stay visible on top of lines that they cover
    parts += [body for last in (False, True) for body, own in zip(bodies, references, strict=True) if own == last]
    tips = [own[-1] for own in spots]
    slots = spread([tip for _, tip in tips], APART, top + 4, bottom)
    for each, tip, slot in zip(drawn, tips, slots, strict=True):
        parts.append(line(tip[0] + 6, tip[1], right + 16, slot, "leader faint"))
        if each.index is not None:
            parts.append(marker(each.index, right + 29, slot, 4.5))
        else:
            parts.append(line(right + 18, slot, right + 40, slot, f"l-{each.kind}"))
        name = shortened(each.name, room(beside - 44, 13))
        parts.append(text(right + 43, slot + 4, name, kind="item", title=each.name))
    return "".join(parts), height


def _one(each: Line, spots: Sequence[tuple[float, float]], y: Axis) -> str:
    """A line, the range of the seeds at each of its points, and the markers of a method."""
    kind = f"l-{each.kind}" if each.index is None else f"{each.kind} curve"
    parts = [path(spots, kind)] if len(spots) > 1 else []
    for (at, middle), (gamma, seeds) in zip(spots, each.points, strict=True):
        if len(seeds) > 1:
            parts.append(line(at, y(min(seeds)), at, y(max(seeds)), f"{kind} range"))
        if each.index is not None:
            parts.append(marker(each.index, at, middle, 4.5))
        elif len(spots) == 1:
            parts.append(line(at - 6, middle, at + 6, middle, kind))
        told = escape(f"{each.name} at {gamma:g}: {_text(seeds)} %")
        parts.append(f'<circle class="hover" cx="{at:.1f}" cy="{middle:.1f}" r="9"><title>{told}</title></circle>')
    return "".join(parts)


def spread(wanted: Sequence[float], apart: float, low: float, high: float) -> list[float]:
    """Places for labels as near to the wanted ones as their distance allows, between the two ends where they fit."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = [min(max(wanted[i], low), high) for i in order]
    for j in range(1, len(placed)):
        placed[j] = max(placed[j], placed[j - 1] + apart)
    if placed and placed[-1] > high:  # push back upwards what was pushed out below
        placed[-1] = high
        for j in range(len(placed) - 2, -1, -1):
            placed[j] = min(placed[j], placed[j + 1] - apart)
    back = dict(zip(order, placed, strict=True))
    return [back[i] for i in range(len(wanted))]


def _ends(values: Sequence[float]) -> tuple[float, float]:
    """Ends of an axis of percent: a little room around the values, inside 0 and 100."""
    low, high = min(values), max(values)
    pad = max(1.0, 0.06 * (high - low))
    return max(0.0, low - pad), min(100.0, high + pad)


def _mean(values: Sequence[float]) -> float:
    found = mean(values)
    assert found is not None
    return found


# the table


def _text(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    spread_ = deviation(values)
    return number(mean(values), "%") + (f" ± {number(spread_, '%')}" if spread_ is not None else "")


def _rows(
    selections: Mapping[str, tuple[float, Mapping[str, Any], Selection]], keys: Sequence[str], first: bool
) -> list[Row]:
    """The rows of one gamma: the references, then for each method what the ways to choose have chosen."""
    gamma, rule, _ = next(iter(selections.values()))
    rows: list[Row] = []
    for kind in REFERENCES:
        group = (rule.get("models") or {}).get(kind) or {}
        shown = first or kind == "retrained"  # the others are the same models for every gamma
        values = [_values(group, key) for key in keys]
        if shown and any(values):
            rows.append(([f"{gamma:g}" if kind == "retrained" else "", kind, "", "", ""], values))
    names = dict.fromkeys(choice.name for _, _, selection in selections.values() for choice in selection.choices)
    for name in names:
        picks = {by: selection.of(name) for by, (_, _, selection) in selections.items()}
        found = {by: choice for by, choice in picks.items() if choice is not None}
        entries = [choice.entry for choice in found.values()]
        if len(found) > 1 and all(entry is entries[0] for entry in entries):
            found = {"both": next(iter(found.values()))}
        for by, choice in found.items():
            about = [f"{gamma:g}", name, by, choice.setting, str(choice.settings)]
            rows.append((about, [_values(choice.entry, key) for key in keys]))
    return rows


def _left_out(shown: Mapping[str, Iterable[tuple[float, Any, Selection]]]) -> list[str]:
    """What could not be chosen; each setting and reason once, with the shares at which that was so."""
    found: dict[tuple[str, str], list[str]] = {}
    for selections in shown.values():
        for gamma, _, selection in selections:
            for title, reason in selection.left_out:
                at = found.setdefault((title, reason), [])
                if f"{gamma:g}" not in at:
                    at.append(f"{gamma:g}")
    return [f"{title} at γ = {', '.join(at)}: {reason}" for (title, reason), at in found.items()]


def _csv(rows: Sequence[Row], keys: Sequence[str]) -> str:
    """The table with every seed's percent in a column of its own."""
    seeds = max((len(found) for _, values in rows for found in values), default=0)
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*ABOUT, *(f"{key} {i + 1}" for key in keys for i in range(seeds))])
    for about, values in rows:
        words = [f"'{word}" if word.startswith(FORMULA) else word for word in about]
        padded = [found[i] if i < len(found) else "" for found in values for i in range(seeds)]
        writer.writerow([*words, *padded])
    return out.getvalue()
