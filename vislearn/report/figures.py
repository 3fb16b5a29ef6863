"""From one rule's results to its plots: which numbers are drawn, in what order and under which words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from . import bars, scatter
from .table import finite, gap_of, interval, is_number, mean, number, scaled

WIDE, LEFT, RIGHT, NARROW = 1216, 716, 448, 340  # pixels: page, its two columns, phone
UTILITY = ("test_retain/accuracy", "test/accuracy")
FORGET = "forget/accuracy"


def forgotten_classes(rule: Mapping[str, Any], classes: Sequence[str]) -> frozenset[int]:
    """Positions of the classes that a rule forgets as a whole; empty for every rule but ClassForget."""
    if rule.get("kind") != "ClassForget":
        return frozenset()
    config = rule.get("config") or {}
    named = (config.get("init_args") or config).get("classes") or []
    found = set()
    for name in named:
        if isinstance(name, int) and 0 <= name < len(classes):
            found.add(name)
        elif str(name) in classes:
            found.add(list(classes).index(str(name)))
    return frozenset(found)


def _axis_keys(methods: Sequence[dict[str, Any]], heads: Sequence[dict[str, Any]]) -> tuple[dict | None, dict]:
    """The columns on the x axis (utility, None when nothing serves) and on the y axis (forget quality)."""
    by_key = {head["key"]: head for head in heads}

    def known(key: str) -> bool:
        return key in by_key and any(row["cells"][key]["mean"] is not None for row in methods)

    def gap_known(key: str) -> bool:
        return key in by_key and any(row["cells"][key]["gap"] for row in methods)

    tests = [key for key in by_key if key.startswith(("test_retain/", "test/", "retain/"))]
    x = next((key for key in (*UTILITY, *tests) if known(key)), None)
    forgets = [key for key in by_key if key.startswith("forget/")]
    y = next((key for key in (FORGET, *forgets) if gap_known(key)), "gap/mean")
    return by_key[x] if x else None, by_key[y]


def tradeoff(
    rule: Mapping[str, Any], table: Sequence[dict[str, Any]], heads: Sequence[dict[str, Any]], marks: Mapping[str, int]
) -> dict[str, Any] | None:
    """Forget quality against utility: {"wide", "narrow", "flagged", "bent", "front"}, or None where nothing has both.

    `front` names the methods that no other one beats, where more than one can be compared.
    """
    methods = [row for row in table if row["kind"] == "method"]
    x, y = _axis_keys(methods, heads)
    if x is None:
        return None
    unit = "pp" if y["unit"] == "%" else y["unit"]
    points = [_point(row, x, y, marks[row["title"]]) for row in methods if _drawable(row, x, y)]
    if not points:
        return None
    models = rule.get("models") or {}
    original = _original(models, x, y)
    floor = gap_of(rule.get("floor"), y["key"])
    utility = scaled(((models.get("retrained") or {}).get("metrics") or {}).get(x["key"]), x["unit"])
    names = (f"{x['title']} {_bracket(x['unit'])}".strip(), f"Gap in {y['title']} {_bracket(unit)}".strip(), unit)
    if y["key"].startswith("gap/"):
        names = (names[0], f"{y['title']} {_bracket(unit)}".strip(), unit)
    ends = (float(floor["mean"]), (interval(floor) or (0.0, float(floor["mean"])))[1]) if floor else None
    spread = (min(utility), max(utility)) if utility else None
    everything = [*points, *([original] if original else [])]
    most = 100.0 if x["unit"] == "%" else math.inf
    power = scatter.bend([p.y for p in points if not p.flagged])
    drawn = {
        size: scatter.tradeoff(everything, spread, ends, names, width, height, most, power)
        for size, width, height in (("wide", LEFT, 470), ("narrow", NARROW, 400))
    }
    return {**drawn, **_about(points, power, more=True)}


def _about(points: Sequence[scatter.Point], power: float, more: bool) -> dict[str, Any]:
    rivals = [p for p in points if not p.flagged]
    best = [p.name for p in scatter.front(points, more)] if len(rivals) > 1 else []
    return {"flagged": any(p.flagged for p in points), "bent": power < 1, "front": best}


def against_time(
    rule: Mapping[str, Any], table: Sequence[dict[str, Any]], marks: Mapping[str, int]
) -> dict[str, Any] | None:
    """Mean gap against seconds of unlearning, in the form of `tradeoff`; None below two methods with both."""
    points = []
    for row in (row for row in table if row["kind"] == "method" and row["status"] == "done"):
        seconds = [s for s in finite((row["source"].get("metrics") or {}).get("time/unlearn")) if s > 0]
        gap = row["cells"]["gap/mean"]["gap"]
        if not seconds or not gap:
            continue
        middle, times = math.fsum(seconds) / len(seconds), (min(seconds), max(seconds))
        said = f"{row['title']}: {number(middle, 's')} s, mean gap {number(gap['mean'], 'pp')}"
        place = (row["label"], marks[row["title"]], middle, float(gap["mean"]))
        points.append(scatter.Point(*place, times, interval(gap), bool(row["flags"]), said))
    if len(points) < 2:
        return None
    stored = (rule.get("models") or {}).get("retrained") or {}
    floor = gap_of(rule.get("floor"), "gap/mean")
    ends = (float(floor["mean"]), (interval(floor) or (0.0, float(floor["mean"])))[1]) if floor else None
    power = scatter.bend([p.y for p in points if not p.flagged])
    names = ("seconds of unlearning", "Mean gap (percentage points)", "pp")
    took = mean([s for s in finite(stored.get("seconds")) if s > 0])
    drawn = {
        size: scatter.against_time(points, took, ends, names, width, height, power)
        for size, width, height in (("wide", RIGHT, 470), ("narrow", NARROW, 400))
    }
    return {**drawn, **_about(points, power, more=False)}


def _bracket(unit: str) -> str:
    return {"": "", "x": "(×)", "pp": "(percentage points)"}.get(unit, f"({unit})")


def _drawable(row: dict[str, Any], x: dict[str, Any], y: dict[str, Any]) -> bool:
    return row["cells"][x["key"]]["mean"] is not None and row["cells"][y["key"]]["gap"] is not None


def _point(row: dict[str, Any], x: dict[str, Any], y: dict[str, Any], index: int) -> scatter.Point:
    across, up = row["cells"][x["key"]], row["cells"][y["key"]]["gap"]
    spread = across["spread"]
    ends = (across["mean"] - spread, across["mean"] + spread) if spread is not None else None
    gap = number(up["mean"], "pp" if y["unit"] == "%" else y["unit"])
    said = f"{row['title']}: {x['title']} {across['text']}, gap {gap}"
    return scatter.Point(row["label"], index, across["mean"], up["mean"], ends, interval(up), bool(row["flags"]), said)


def _original(models: Mapping[str, Any], x: dict[str, Any], y: dict[str, Any]) -> scatter.Point | None:
    """Where doing nothing would stand: the original model, its gap taken over all pairs with retrained models."""
    mine = (models.get("original") or {}).get("metrics") or {}
    theirs = (models.get("retrained") or {}).get("metrics") or {}
    across, up = mean(scaled(mine.get(x["key"]), x["unit"])), scaled(mine.get(y["key"]), y["unit"])
    aims = scaled(theirs.get(y["key"]), y["unit"])
    if across is None or not up or not aims:
        return None
    pairs = [abs(a - b) for a in up for b in aims]
    gap = sum(pairs) / len(pairs)
    return scatter.Point(
        "original", -1, across, gap, None, (min(pairs), max(pairs)), False, f"original: no unlearning, gap {gap:.1f}"
    )


def cost(rule: Mapping[str, Any], table: Sequence[dict[str, Any]], marks: Mapping[str, int]) -> dict[str, str] | None:
    """Seconds per method: {"wide", "narrow", "prepare"}, or None where no time was measured."""
    items, retrainings = [], []
    for row in (row for row in table if row["kind"] == "method" and row["status"] == "done"):
        metrics = row["source"].get("metrics") or {}
        seconds = [s for s in scaled(metrics.get("time/unlearn"), "s") if s > 0]
        if not seconds:
            continue
        speed = mean(scaled(metrics.get("time/speedup"), "x"))
        retrainings += [float(a) * float(b) for a, b in _pairs(metrics)]
        items.append(
            bars.Cost(
                row["label"],
                marks[row["title"]],
                seconds,
                mean(scaled(metrics.get("time/prepare"), "s")) or None,
                _remark(seconds, speed),
            )
        )
    if not items:
        return None
    stored = (rule.get("models") or {}).get("retrained") or {}
    retraining = mean(finite(stored.get("seconds"))) or mean(retrainings)
    return {size: bars.cost(items, retraining, width) for size, width in (("wide", RIGHT), ("narrow", NARROW))} | {
        "prepare": "yes" if any(item.prepare for item in items) else ""
    }


def _pairs(metrics: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    both = zip(metrics.get("time/unlearn") or [], metrics.get("time/speedup") or [], strict=False)
    return [(a, b) for a, b in both if is_number(a) and is_number(b)]


def _remark(seconds: list[float], speed: float | None) -> str:
    taken = f"{number(mean(seconds), 's')} s"
    if speed is None or speed <= 0:
        return taken
    return f"{taken}, {number(speed, 'x')}× faster" if speed >= 1 else f"{taken}, {number(1 / speed, 'x')}× slower"


def per_class(
    rule: Mapping[str, Any], table: Sequence[dict[str, Any]], classes: Sequence[str]
) -> dict[str, Any] | None:
    """Per-class accuracy on test: {"panels": [{"title", "wide", "narrow"}], "note"}, or None without numbers."""
    models = rule.get("models") or {}
    gone = forgotten_classes(rule, classes)
    panels, notes = [], {}
    for row in (row for row in table if row["kind"] == "method"):
        mine = _percent(row["source"].get("per_class"), len(classes))
        if mine is None:
            continue
        every = [
            (name, _percent((models.get(name) or {}).get("per_class"), len(classes)))
            for name in ("original", "retrained")
        ]
        series = [(name, values) for name, values in every if values is not None] + [("unlearned", mine)]
        panel = {"title": row["title"]}
        for size, width, most in (("wide", WIDE, 36), ("narrow", NARROW, 10)):
            kept = _kept(series, gone, most)
            marked = frozenset(i for i, c in enumerate(kept) if c in gone)
            chosen = [(name, [values[c] for c in kept]) for name, values in series]
            said = f"accuracy on test per class after {row['title']}"
            panel[size] = bars.class_bars([classes[c] for c in kept], chosen, marked, said, width)
            if len(kept) < len(classes):
                notes[size] = (
                    f"{len(kept)} of {len(classes)} classes, forgotten ones first, then the furthest from retrained."
                )
        panels.append(panel)
    return {"panels": panels, "notes": notes, "forgotten": [classes[c] for c in sorted(gone)]} if panels else None


def _percent(values: Any, count: int) -> list[float | None] | None:
    if not values or not count:
        return None
    return [100 * v if is_number(v) else None for v in list(values)[:count]] + [None] * (count - len(values))


def _kept(series: Sequence[tuple[str, list[float | None]]], gone: frozenset[int], most: int) -> list[int]:
    """All classes where they fit; else the forgotten ones and those whose accuracy moved most, in their own order."""
    mine = series[-1][1]
    if len(mine) <= most:
        return list(range(len(mine)))
    aim = dict(series).get("retrained") or [None] * len(mine)

    def moved(i: int) -> float:
        a, b = mine[i], aim[i]
        return abs(a - b) if a is not None and b is not None else -1.0

    order = sorted(range(len(mine)), key=lambda i: (i not in gone, -moved(i)))
    return sorted(order[:most])
