"""The tables: which rows and columns there are, how a number prints, and which one is best."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

DASH = "–"  # a number that is not there
MEAN_GAP: dict[str, Any] = {
    "key": "gap/mean",
    "title": "Mean gap",
    "help": "mean of the gaps to the retrained models over the headline columns; the order of the table",
    "unit": "pp",
    "better": "low",
}
TIMES = "time/"
SECTIONS = ("headline", "forgetting", "utility", "membership", "representation", "robustness", "cost")


def finite(values: Iterable[Any] | None) -> list[float]:
    """The numbers among `values`; None, NaN, infinities and text are left out."""
    return [float(v) for v in values or () if is_number(v)]


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number (a bool is none)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def mean(values: Sequence[float]) -> float | None:
    """Arithmetic mean, None of nothing."""
    return math.fsum(values) / len(values) if values else None


def deviation(values: Sequence[float]) -> float | None:
    """Standard deviation with n - 1; None below two values."""
    if len(values) < 2:
        return None
    centre = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - centre) ** 2 for v in values) / (len(values) - 1))


def decimals(value: float, unit: str) -> int:
    """Digits after the point for `value` (in the printed unit), so that about three figures are left."""
    if unit in ("%", "pp"):
        return 1
    if value == 0 or unit == "x":
        return 0 if abs(value) >= 10 else 1
    figures = 1 if abs(value) < (1 if unit == "s" else 0.1) else 2
    return min(4, max(0, figures - math.floor(math.log10(abs(value)))))


def number(value: float | None, unit: str, places: int | None = None) -> str:
    """`value`, already in the printed unit, as text without the unit; an en dash for None."""
    if value is None:
        return DASH
    if abs(value) >= 1e5:
        return f"{value:.1e}"
    places = decimals(value, unit) if places is None else places
    text = f"{value:.{places}f}"
    if float(text) == 0 and value != 0:
        return f"<{10**-places:.{places}f}" if value > 0 else f"{0:.{places}f}"
    return text


def scaled(values: Iterable[Any] | None, unit: str) -> list[float]:
    """Stored numbers in the printed unit: fractions become percent, all others stay."""
    return [100 * v for v in finite(values)] if unit == "%" else finite(values)


def columns(results: Mapping[str, Any], section: str | None = "headline") -> list[dict[str, Any]]:
    """The columns of a section in the order they print, of all sections for None.

    A column that names no section belongs to the headline, which begins with the mean gap.
    """
    blank = {"unit": "", "better": None, "help": "", "section": "headline"}
    given = [{**blank, "title": c["key"], **c} for c in results.get("columns") or []]
    lead = next((c for c in given if c["key"] == "gap/mean"), MEAN_GAP)
    rest = [{**c, "unit": "pp"} if c["key"].startswith("gap/") and c["unit"] == "%" else c for c in given]
    every = [
        {**lead, "unit": "pp" if lead["unit"] == "%" else lead["unit"], "section": "headline"},
        *(c | {"section": c["section"] if c["section"] in SECTIONS else "headline"} for c in rest),
    ]
    return [
        c
        for i, c in enumerate(every)
        if (i == 0 or c["key"] != "gap/mean") and (section is None or c["section"] == section)
    ]


def filled(table: Sequence[Mapping[str, Any]], heads: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The columns that hold at least one value in the rows of one rule; the mean gap always stays."""
    return [
        head
        for head in heads
        if head["key"] == "gap/mean" or any(row["cells"][head["key"]]["text"] != DASH for row in table)
    ]


def gap_of(source: Mapping[str, Any] | None, key: str) -> dict[str, Any] | None:
    """The gap or floor stored under a column's key; None when there is none or it holds no number."""
    source = source or {}
    if key.startswith("gap/"):
        name = key.removeprefix("gap/")
        found = source.get(name) or source.get(name.replace("_", "/", 1))
    else:
        found = source.get(key)
    return found if found and is_number(found.get("mean")) else None


def interval(gap: Mapping[str, Any]) -> tuple[float, float] | None:
    """The two ends of a gap's interval, None when one is missing."""
    low, high = gap.get("low"), gap.get("high")
    return (float(low), float(high)) if is_number(low) and is_number(high) else None  # type: ignore[arg-type]


def gap_text(gap: Mapping[str, Any] | None, unit: str) -> str:
    """A gap as "3.1 [1.0, 6.2]"; without the brackets where the interval is missing, "" for None."""
    if gap is None:
        return ""
    unit = "pp" if unit == "%" else unit
    ends = interval(gap)
    places = decimals(max(gap["mean"], *(ends or (0.0,))), unit)
    text = number(gap["mean"], unit, places)
    if ends is None or all(number(end, unit, places) == text for end in ends):
        return text
    return f"{text} [{number(ends[0], unit, places)}, {number(ends[1], unit, places)}]"


def rows(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every row of every rule's table, in printed order.

    Per rule: the original model, the retrained models, clean models if there are any, the floor, then the methods by
    mean gap; methods without one come after those, failed ones last.

    Returns:
        One dict a row: `rule` (id), `kind` ("original", "retrained", "clean", "floor" or "method"), `name`, `title`,
        `label` (the name; where it stands twice, with the settings that differ), `seeds`, `status`, `error`, `flags`
        and `notes` (sentences), `source` (the dict it was made of) and `cells`, by column key. A cell holds the numbers
        in the printed unit (`mean`, `spread`, `count`, `gap`), their text (`text`, `spread_text`, `gap_text`), `best`,
        `within_floor`, in `why` the reason for a missing number, else "", and in `form` what it holds: a "value" of the
        model beside its gap, the "gap" itself, or the "distance" to the retrained models.
    """
    heads = columns(results, None)
    found = []
    for rule in results.get("rules") or []:
        models = rule.get("models") or {}
        for kind, title in (("original", "Original"), ("retrained", "Retrained"), ("clean", "Clean")):
            if kind == "clean" and kind not in models:  # trained without the manipulation: where there is one
                continue
            found.append(_row(rule, kind, title, models.get(kind) or {}, heads))
        found.append(_floor_row(rule, heads))
        methods = [_row(rule, "method", m.get("title") or m["name"], m, heads) for m in rule.get("methods") or []]
        _label(methods)
        methods.sort(key=_order)
        _mark_best(methods, heads, rule)
        found.extend(methods)
    return found


def _label(methods: Sequence[dict[str, Any]]) -> None:
    """Set `label`: the name, with as few of the settings as tell methods of the same name apart."""
    for name in dict.fromkeys(row["name"] for row in methods):
        same = [row for row in methods if row["name"] == name]
        marks = [row["source"].get("settings") for row in same]
        settings = [_settings(row["source"].get("config")) for row in same]
        keys = [k for k in dict.fromkeys(k for s in settings for k in s) if len({s.get(k) for s in settings}) > 1]
        # a search or the paper chose the settings: said always; settings of the plan only as far as they tell apart
        said = [[mark] if mark in ("tuned", "paper default") else [] for mark in marks]
        labels = [f"{name} ({', '.join(parts)})" if parts else name for parts in said]
        for count in range(1, len(keys) + 1):
            if len(set(labels)) == len(same):
                break
            chosen = [[f"{k}={s[k]}" for k in keys[:count] if k in s] for s in settings]
            parts = [own or given for own, given in zip(said, chosen, strict=True)]
            labels = [f"{name} ({', '.join(each)})" if each else name for each in parts]
        unique = len(set(labels)) == len(same)
        for row, label in zip(same, labels, strict=True):
            row["label"] = label if unique else row["title"]


def _settings(config: Any) -> dict[str, str]:
    config = config if isinstance(config, Mapping) else {}
    arguments = config.get("init_args") or {}
    return {str(k): f"{v:g}" if isinstance(v, float) else str(v) for k, v in arguments.items()}


def _order(row: dict[str, Any]) -> tuple[bool, bool, float]:
    gap = row["cells"]["gap/mean"]["mean"]
    return row["status"] != "done", gap is None, gap or 0.0


def _row(
    rule: Mapping[str, Any], kind: str, title: str, source: Mapping[str, Any], heads: list[dict]
) -> dict[str, Any]:
    status = source.get("status", "done")
    error = source.get("error") or ""
    notes = list(dict.fromkeys(_listed(source.get("notes"))))
    notes += [own for own in _own_warnings(source.get("report")) if not any(note.startswith(own) for note in notes)]
    flags = [str(flag) for flag in source.get("flags") or []]
    # what a method says of itself is a note; it does not make its numbers meaningless
    said = [flag for flag in flags if any(flag == note or flag.startswith(f"{note} (") for note in notes)]
    flags = [flag for flag in flags if flag not in said]
    notes = said + [note for note in notes if not any(s == note or s.startswith(f"{note} (") for s in said)]
    if status != "done":
        flags.insert(0, f"{status}: {error or 'no reason was recorded'}")
    row = {
        "rule": rule["id"],
        "kind": kind,
        "name": source.get("name", title) if kind == "method" else title,
        "title": title,
        "label": title,
        "seeds": list(source.get("seeds") or []),
        "status": status,
        "error": error,
        "flags": flags,
        "notes": notes,
        "source": source,
    }
    apart = distances(rule)
    row["cells"] = {
        head["key"]: (_distance_cell if head["key"] in apart else _cell)(row, source, head, rule) for head in heads
    }
    return row


def distances(rule: Mapping[str, Any]) -> set[str]:
    """Keys of the columns that say how far a model is from the retrained ones, instead of something of its own."""
    groups = [*(rule.get("models") or {}).values(), *(rule.get("methods") or [])]
    held = [group.get("to_retrained") for group in groups if group] + [rule.get("floor_to_retrained")]
    return {key for found in held for key in found or ()}


def _floor_row(rule: Mapping[str, Any], heads: list[dict]) -> dict[str, Any]:
    floor = rule.get("floor")
    note = rule.get("floor_note") or "the floor needs at least two retrained models of different seeds"
    cells, apart = {}, distances(rule)
    for head in heads:
        if head["key"] in apart:
            gap = gap_of(rule.get("floor_to_retrained"), head["key"])
            why = "" if gap else "the distance between retrained models needs at least two of them"
            cells[head["key"]] = {**_empty(why), "form": "distance"} | (_as_value(gap, head["unit"]) if gap else {})
            cells[head["key"]]["gap"] = gap
            continue
        gap = gap_of(floor, head["key"])
        why = "" if gap else (note if not floor else f"no floor is stated for {head['title']}")
        cells[head["key"]] = {**_empty(why), "gap": gap, "gap_text": gap_text(gap, head["unit"])}
        if head["key"].startswith("gap/") and gap:
            cells[head["key"]] |= _as_value(gap, head["unit"]) | {"form": "gap"}
    row = {"kind": "floor"} | dict.fromkeys(("name", "title", "label"), "Retrained against retrained")
    empty: dict[str, Any] = {"seeds": [], "status": "done", "error": "", "flags": [], "notes": [], "source": {}}
    return {"rule": rule["id"], **row, **empty, "cells": cells}


def _empty(why: str) -> dict[str, Any]:
    blank = {"mean": None, "spread": None, "count": 0, "gap": None, "text": DASH, "spread_text": "", "gap_text": ""}
    return {**blank, "best": False, "within_floor": False, "why": why, "form": "value"}


def _as_value(gap: Mapping[str, Any], unit: str) -> dict[str, Any]:
    """A gap shown as the value of its own column: the number large, the interval small."""
    text, _, ends = gap_text(gap, unit).partition(" ")
    return {"mean": float(gap["mean"]), "text": text, "gap_text": ends, "count": gap.get("pairs") or 1}


def _cell(
    row: dict[str, Any], source: Mapping[str, Any], head: dict[str, Any], rule: Mapping[str, Any]
) -> dict[str, Any]:
    key, unit = head["key"], head["unit"]
    gap, floor = gap_of(source.get("gap"), key), gap_of(rule.get("floor"), key)
    within = bool(gap and floor and gap["mean"] <= (interval(floor) or (0.0, floor["mean"]))[1])
    if key.startswith("gap/"):
        if gap is None:
            return {**_empty(_why_no_gap(row, rule)), "form": "gap"}
        return {**_empty(""), **_as_value(gap, unit), "gap": gap, "within_floor": within, "form": "gap"}
    stored = (source.get("metrics") or {}).get(key)
    stored = stored if isinstance(stored, list | tuple) else [stored]
    values = scaled(stored, unit)
    if not values:
        return _empty(_why_missing(row, head, stored))
    centre, spread = mean(values), deviation(values)
    places = decimals(centre or 0.0, unit)
    return {
        **_empty(""),
        "mean": centre,
        "spread": spread,
        "count": len(values),
        "of": max(len(stored), len(row["seeds"])),
        "gap": gap,
        "text": number(centre, unit, places),
        "spread_text": "" if spread is None else number(spread, unit, places),
        "gap_text": gap_text(gap, unit),
        "within_floor": within,
    }


def _distance_cell(
    row: dict[str, Any], source: Mapping[str, Any], head: dict[str, Any], rule: Mapping[str, Any]
) -> dict[str, Any]:
    found = gap_of(source.get("to_retrained"), head["key"])
    if found is None:
        if row["kind"] == "retrained":
            why = "this is a distance to the retrained models; between themselves it stands in the row below"
        elif row["status"] != "done":
            why = row["flags"][0]
        elif not ((rule.get("models") or {}).get("retrained") or {}).get("seeds"):
            why = "there is no retrained model to compare with"
        else:
            why = f"{head['title']} is not defined here or was not computed"
        return {**_empty(why), "form": "distance"}
    floor = gap_of(rule.get("floor_to_retrained"), head["key"])
    value = {**_empty(""), **_as_value(found, head["unit"]), "gap": found, "form": "distance"}
    return value | {"within_floor": bool(floor) and _as_near(found["mean"], floor or {}, head["better"])}


def _as_near(value: float, floor: Mapping[str, Any], better: str | None) -> bool:
    """Whether a distance is one that two retrained models may have as well."""
    low, high = interval(floor) or (floor["mean"], floor["mean"])
    if better not in ("retrained", "low", "high"):
        return False
    return bool((better == "high" or value <= high) and (better == "low" or value >= low))


def _why_no_gap(row: dict[str, Any], rule: Mapping[str, Any]) -> str:
    if row["kind"] != "method":
        return "a gap is stated for methods; the row below the retrained models holds their own"
    if row["status"] != "done":
        return row["flags"][0]
    if not ((rule.get("models") or {}).get("retrained") or {}).get("metrics"):
        return "there is no retrained model to compare with"
    return "the gap could not be computed; see the notes under the row"


def _why_missing(row: dict[str, Any], head: dict[str, Any], stored: Sequence[Any]) -> str:
    if row["kind"] == "method" and row["status"] != "done":
        return row["flags"][0]
    if row["kind"] != "method" and head["key"].startswith(TIMES):
        took = mean(finite(row["source"].get("seconds")))
        return "stated for methods only" + (f"; training took {number(took, 's')} s" if took else "")
    if head["key"] == "time/prepare":
        return "this method computes nothing in advance"
    if not row["source"].get("metrics"):
        return f"there is no {row['kind']} model" if row["kind"] != "method" else "nothing was evaluated"
    if any(value is not None for value in stored):
        return "the value is not a finite number for any seed"
    return f"{head['title']} is not defined here or was not computed"


def _own_warnings(report: Any) -> list[str]:
    """What a method's own report warns of, each sentence once; `report` is one dict or one a seed."""
    reports = report if isinstance(report, list | tuple) else [report]
    given = [w for r in reports if isinstance(r, Mapping) for w in _listed(r.get("warnings"))]
    return list(dict.fromkeys(given))


def _listed(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [str(v) for v in value or ()]


def _mark_best(methods: list[dict[str, Any]], heads: list[dict[str, Any]], rule: Mapping[str, Any]) -> None:
    """Set `best` per column, ties included; rows that failed or carry a flag never win."""
    sound = [row for row in methods if row["status"] == "done" and not row["flags"]]
    for head in heads:
        key = head["key"]
        if head["better"] not in ("retrained", "high", "low"):
            continue
        by_gap = head["better"] == "retrained"
        floor = gap_of(rule.get("floor_to_retrained"), key)
        scores = [(row, _score(row["cells"][key], by_gap, floor)) for row in sound]
        known = [(row, score) for row, score in scores if score is not None]
        if len(known) < 2:  # the best of one says nothing
            continue
        pick = max if head["better"] == "high" else min
        unit = "pp" if by_gap and head["unit"] == "%" else head["unit"]
        winner = number(pick(score for _, score in known), unit)
        for row, score in known:
            row["cells"][key]["best"] = number(score, unit) == winner


def _score(cell: dict[str, Any], by_gap: bool, floor: Mapping[str, Any] | None) -> float | None:
    """What decides which row is best: the value, or how far it is from the aim."""
    if not by_gap:
        return None if cell["mean"] is None else float(cell["mean"])
    if cell["form"] == "distance":  # the aim is the distance that retrained models have from each other
        return abs(float(cell["mean"]) - float(floor["mean"])) if cell["gap"] and floor else None
    return float(cell["gap"]["mean"]) if cell["gap"] else None


def shared_notes(table: Sequence[Mapping[str, Any]]) -> list[str]:
    """The notes that every method of a rule has, which are worth saying once; none with fewer than two methods."""
    done = [row["notes"] for row in table if row["kind"] == "method" and row["status"] == "done"]
    return [note for note in done[0] if all(note in notes for notes in done)] if len(done) > 1 else []


def said_once(warnings: Sequence[str], shared: Sequence[str]) -> list[str]:
    """A rule's warnings and the notes of all its methods, where a note of the references too is said of all models."""
    out, twins = list(warnings), [f"{kind}: {{}}" for kind in ("original", "retrained")]
    for note in shared:
        same = [twin.format(note) for twin in twins if twin.format(note) in out]
        out = [sentence for sentence in out if sentence not in same]
        out.append(f"all {'models' if len(same) == len(twins) else 'methods'}: {note}")
    return out


def grouped(flags: Sequence[str]) -> list[tuple[str, str]]:
    """Flags as (short name, sentences): what seeds report under one name, with other numbers, stands together."""
    found: dict[str, list[str]] = {}
    for name, sentence in map(split_flag, flags):
        found.setdefault(name, []).append(sentence)
    return [(name, "; ".join(filter(None, sentences))) for name, sentences in found.items()]


def split_flag(flag: str) -> tuple[str, str]:
    """A flag's short name and its sentence: "collapsed: all one class" gives ("collapsed", "all one class")."""
    name, colon, sentence = flag.partition(":")
    if not colon or len(name) > 48 or "=" in name:
        return "note", flag
    return name.strip(), sentence.strip()
