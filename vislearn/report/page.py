"""The results as one HTML file that needs nothing else: no network, no fonts, no folder beside it."""

from __future__ import annotations

import base64
import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..folders import whole
from . import bias, corrective, figures, lines, scatter, templates
from .graphs import KINDS
from .sections import downloads, sections
from .svg import glyph
from .table import DASH, columns, filled, gap_of, gap_text, grouped, interval, number, rows, said_once, shared_notes

SET_WORDS = {
    "forget": "to forget",
    "retain": "to retain",
    "val": "for validation",
    "val_forget": "of them like the forgotten",
    "val_retain": "like the retained",
    "test": "for test",
    "test_forget": "of them like the forgotten",
    "test_retain": "like the retained",
}


def write_page(results: dict[str, Any], path: Path | str) -> None:
    """Draw `results` (the content of results.json) into one self-contained HTML file.

    The file is written beside and renamed, so that an interrupted run leaves the old page whole.

    Raises:
        UserError: the file cannot be written.
    """
    path = Path(path)
    page = render(results)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as beside:
            beside.write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(
            f"cannot write the report page {path}: {error.strerror}; name a file in a folder you may write to"
        ) from error


def render(results: dict[str, Any]) -> str:
    """The page as text."""
    return str(environment().get_template("page.html").render(**context(results)))


@lru_cache(maxsize=1)
def environment() -> Any:
    """What the pages of results are compiled in: every page's environment, with the keys of figures and the script."""
    from markupsafe import Markup

    made = templates.environment()
    made.filters["yaml"] = as_yaml
    made.filters["breakable"] = lambda name: Markup("<wbr>").join(_pieces(str(name)))
    made.globals |= {"dash": DASH, "keys": {kind: Markup(lines.key(kind)) for kind in (*KINDS, "guess")}}
    made.globals["script"] = Markup(templates.source("page.js"))
    return made


def context(results: dict[str, Any]) -> dict[str, Any]:
    """Everything the template prints, under the names it prints it by."""
    heads, table = columns(results), rows(results)
    rules = results.get("rules") or []
    titles = [m.get("title") or m["name"] for rule in rules for m in rule.get("methods") or []]
    marks = {title: i for i, title in enumerate(dict.fromkeys(titles))}
    stored = json.dumps(_plain(results), ensure_ascii=True).encode()
    data = results.get("data") or {}
    return {
        "title": results.get("title") or data.get("name") or "Results",
        "kind": results.get("kind") or "benchmark",
        "lede": lede(results),
        "created": _date(results.get("created")),
        "duration": _duration(results.get("seconds")),
        "tier": _tier(results.get("evaluation")),
        "heads": [{**head, "help": _help(head, heads, rules)} for head in heads],
        "intervals": _interval_words(rules),
        "corrective": corrective.sections(results),
        "rules": [
            _rule(results, rule, i, [r for r in table if r["rule"] == rule["id"]], heads, marks)
            for i, rule in enumerate(rules)
        ],
        "failures": results.get("failures") or [],
        "command": results.get("command") or "",
        "machine": {k: v for k, v in (results.get("machine") or {}).items() if v not in (None, "")},
        "data": {
            "name": data.get("name") or "",
            "fingerprint": data.get("fingerprint") or "",
            "sizes": data.get("sizes") or {},
        },
        "set_names": _set_names(results),
        "recipe": results.get("recipe") or {},
        "download": base64.b64encode(stored).decode(),
    }


def _pieces(name: str, most: int = 22) -> list[str]:
    """A name cut where a line may end: a long one before its capitals and behind its signs."""
    if len(name) <= most:
        return [name]
    return [piece for piece in re.split(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[_.,=/-])", name) if piece]


def lede(results: Mapping[str, Any]) -> str:
    """What was compared with what, in one sentence."""
    rules = results.get("rules") or []
    methods = list(dict.fromkeys(m["name"] for rule in rules for m in rule.get("methods") or []))
    data = results.get("data") or {}
    if len(methods) == len(rules) == 0:
        return "No result has been made yet."
    what = f"{_count([len(methods)]).capitalize()} unlearning methods, each" if len(methods) != 1 else f"{methods[0]},"
    trained = (data.get("sizes") or {}).get("train")
    place = f"a model of {data['name']}" if data.get("name") else "a model"
    place += f" ({trained:,} training rows)" if trained else ""
    forgot = " and, separately, ".join(rule["title"] for rule in rules)
    seeds = sorted({len(m.get("seeds") or []) for rule in rules for m in rule.get("methods") or []} - {0})
    aims = sorted({len(((rule.get("models") or {}).get("retrained") or {}).get("seeds") or []) for rule in rules})
    over = f"{_count(seeds)} seed{'s' if seeds != [1] else ''} each" if seeds else ""
    if not aims or aims[-1] == 0:
        beside = "without a retrained model to compare with"
    else:
        beside = f"compared with {_count(aims)} model{'' if aims == [1] else 's'} retrained without those rows"
    return f"{what} asked to make {place} forget {forgot}; {', '.join(part for part in (over, beside) if part)}."


def _count(values: Sequence[int]) -> str:
    small = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
    if len(values) == 1:
        return small[values[0]] if values[0] < len(small) else str(values[0])
    return f"{values[0]} to {values[-1]}"


def _rule(
    results: Mapping[str, Any],
    rule: Mapping[str, Any],
    at: int,
    table: list[dict],
    heads: list[dict],
    marks: dict[str, int],
) -> dict[str, Any]:
    shown = filled(table, heads)
    lead = [r["cells"]["gap/mean"] for r in table if r["cells"]["gap/mean"]["gap"]]
    sound = [r["cells"]["gap/mean"] for r in table if r["cells"]["gap/mean"]["gap"] and not r["flags"]] or lead
    top = max((e for c in sound for e in (c["mean"], *(interval(c["gap"]) or ()))), default=1.0)
    floor = gap_of(rule.get("floor"), "gap/mean")
    shade = (interval(floor) or (0.0, float(floor["mean"])))[1] if floor else None
    once = shared_notes(table)
    for i, row in enumerate(table):
        index = marks.get(row["title"]) if row["kind"] == "method" else None
        cell = row["cells"]["gap/mean"]
        row |= {
            "anchor": f"r{at}-{i}",
            "glyph": glyph(index if index is not None else -1) if row["kind"] in ("method", "original") else "",
            "settings": _settings(row),
            "strip": scatter.strip(cell["mean"], interval(cell["gap"]), shade, top, index) if cell["gap"] else "",
            "badges": grouped(row["flags"]),
            "own_notes": [note for note in row["notes"] if note not in once],
            "gaps": _gap_table(row["source"], columns(results, None)),
            "commands": _commands(results, row),
        }
    data = results.get("data") or {}
    parts = sections(results, rule, table, marks, f"r{at}")
    return {
        "anchor": f"r{at}",
        "title": rule["title"],
        "sets": _sizes(rule.get("sets") or {}),
        "sizes": rule.get("sets") or {},
        "config": rule.get("config") or {},
        "heads": shown,
        "hidden": [h["title"] for h in heads if h not in shown],
        "references": [r for r in table if r["kind"] != "method"],
        "methods": [r for r in table if r["kind"] == "method"],
        "short": summary(rule, table),
        "warnings": _warnings(rule, table),
        "tradeoff": figures.tradeoff(rule, table, shown, marks),
        "time": figures.against_time(rule, table, marks),
        "sections": parts,
        "downloads": downloads(rule, table, shown, "headline"),
        "per_class": figures.per_class(rule, table, data.get("classes") or ()),
        "bias": bias.shortcut(rule, table),
        "absent": absent(rule),
    }


def absent(rule: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """Why numbers are not there, by the models that lack them; what all of them lack is said once, first."""
    groups = {name: list(m.get("absent") or ()) for name, m in (rule.get("models") or {}).items()}
    groups |= {m.get("title") or m["name"]: list(m.get("absent") or ()) for m in rule.get("methods") or []}
    said = [reasons for reasons in groups.values() if reasons]
    everywhere = [note for note in (said[0] if said else []) if all(note in reasons for reasons in groups.values())]
    found = [("all models", everywhere)]
    found += [(name, [note for note in reasons if note not in everywhere]) for name, reasons in groups.items()]
    return [(name, reasons) for name, reasons in found if reasons]


def _sizes(sets: Mapping[str, int]) -> list[tuple[str, int]]:
    """The sizes in words, in the order in which the words make sense."""
    known = [name for name in SET_WORDS if name in sets]
    return [(SET_WORDS.get(name, name), sets[name]) for name in [*known, *(n for n in sets if n not in SET_WORDS)]]


def _settings(row: Mapping[str, Any]) -> str:
    """Who chose the settings, or what a title adds to the name: "alpha=10" of "SSD (alpha=10)"."""
    mark = row["source"].get("settings")
    if mark in ("tuned", "paper default"):  # what was to be tuned may have kept its paper's settings
        return str(mark)
    rest = str(row["title"]).removeprefix(str(row["name"])).strip()
    return rest[1:-1] if rest.startswith("(") and rest.endswith(")") else rest


def summary(rule: Mapping[str, Any], table: Sequence[dict[str, Any]]) -> list[str]:
    """Two or three plain sentences about a rule's table."""
    methods = [row for row in table if row["kind"] == "method"]
    sound = [row for row in methods if row["cells"]["gap/mean"]["gap"] and not row["flags"]]
    said = []
    floor = gap_of(rule.get("floor"), "gap/mean")
    if sound:
        said += _closest(sound)
    if sound and floor:
        inside = [row["label"] for row in sound if row["cells"]["gap/mean"]["within_floor"]]
        verdict = (
            f"{_list(inside)} {'are' if len(inside) > 1 else 'is'} within that."
            if inside
            else "no method is within that."
        )
        said.append(f"Two retrained models differ by {_spoken(floor)}: {verdict}")
    flagged = sum(bool(row["flags"]) for row in methods)
    if flagged:
        verb = "are" if flagged > 1 else "is"
        said.append(f"{flagged} of {len(methods)} results {verb} flagged: read the note under the row first.")
    return said


def _closest(sound: Sequence[dict[str, Any]]) -> list[str]:
    """Who leads the table, and whether the seeds are enough to say so."""
    cells = [row["cells"]["gap/mean"] for row in sound]
    first = [row["label"] for row, cell in zip(sound, cells, strict=True) if cell["text"] == cells[0]["text"]]
    said = (
        f"{_list(first)} {'come' if len(first) > 1 else 'comes'} closest to the retrained models, with a mean gap of "
    )
    said += f"{_spoken(cells[0]['gap']) if len(first) == 1 else cells[0]['text']} percentage points."
    lead = interval(cells[0]["gap"])
    rivals = [
        row["label"]
        for row, cell in zip(sound, cells, strict=True)
        if row["label"] not in first and lead and (interval(cell["gap"]) or (math.inf,))[0] <= lead[1]
    ]
    if not rivals:
        return [said]
    who = f"{len(rivals)} others" if len(rivals) > 3 else _list(rivals)
    many = len(rivals) > 1
    overlap = f"The {'intervals' if many else 'interval'} of {who} {'overlap' if many else 'overlaps'} with that"
    return [said, f"{overlap}, so more seeds could change the order."]


def _list(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _spoken(gap: Mapping[str, Any]) -> str:
    ends = interval(gap)
    return number(gap["mean"], "pp") + (f" ({number(ends[0], 'pp')} to {number(ends[1], 'pp')})" if ends else "")


def _warnings(rule: Mapping[str, Any], table: Sequence[dict[str, Any]]) -> list[str]:
    """The rule's own warnings, and what the numbers themselves cannot support."""
    said = said_once([str(w) for w in rule.get("warnings") or []], shared_notes(table))
    if not rule.get("floor"):
        said.append(
            str(rule.get("floor_note") or "there is no floor: it needs two retrained models of different seeds")
        )
    single = [
        row["label"] for row in table if row["kind"] == "method" and row["status"] == "done" and len(row["seeds"]) == 1
    ]
    if single:
        said.append(f"one seed only, so no spread: {', '.join(single)}")
    for row in table:
        lost = {f"{c['count']} of {c['of']}" for c in row["cells"].values() if c.get("of", 0) > c["count"] > 0}
        if lost:
            said.append(
                f"{row['label']}: some means leave out seeds without a number ({', '.join(sorted(lost))} seeds remain)"
            )
    return list(dict.fromkeys(said))


def _gap_table(source: Mapping[str, Any], heads: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """Every gap and every distance to the retrained models, as it stands behind a row."""
    units = {head["key"]: head for head in heads}
    gaps, apart = source.get("gap") or {}, source.get("to_retrained") or {}
    found = []
    for key, gap in [*gaps.items(), *apart.items()]:
        head = units.get("gap/mean" if key == "mean" else key, {"title": key, "unit": ""})
        unit = "pp" if head["unit"] == "%" else head["unit"]
        if not gap:
            continue
        found.append(
            {
                "title": head["title"],
                "text": gap_text(gap_of({key: gap}, key), unit) or DASH,
                "of_means": number(gap.get("of_means"), unit),
                "pairs": str(gap.get("pairs") or DASH),
                "note": gap.get("note") or gap.get("interval") or "",
            }
        )
    return found


def _commands(results: Mapping[str, Any], row: Mapping[str, Any]) -> list[str]:
    """The commands that make a row's models again; from the stored configuration where there is an artifact."""
    given = row["source"].get("commands") or row["source"].get("command")
    if given:
        return [given] if isinstance(given, str) else [str(c) for c in given]
    if results.get("kind") == "evaluate" or not row["source"].get("keys"):
        return [results["command"]] if results.get("command") else []
    verb = "unlearn" if row["kind"] == "method" else "fit"
    named = re.search(r"--store[= ]('[^']+'|\S+)", results.get("command") or "")
    store = named.group(1).strip("'") if named else "artifacts"
    end = "" if store == "artifacts" else f" --store {shlex.quote(store)}"
    keys = row["source"]["keys"]
    return [f"vislearn {verb} -c {shlex.quote(f'{store}/{key}/config.yaml')}{end}" for key in keys]


def _help(head: Mapping[str, Any], heads: Sequence[Mapping[str, Any]], rules: Sequence[Mapping[str, Any]]) -> str:
    """A column's definition; the mean gap says of which columns it is the mean."""
    if head["key"] != "gap/mean":
        return str(head["help"])
    titles = {other["key"]: other["title"] for other in heads}  # of the headline, whose mean it is
    every = [(m.get("gap") or {}).get("mean") or {} for rule in rules for m in rule.get("methods") or []]
    parts = list(dict.fromkeys(key for gap in every for key in gap.get("of") or ()))
    return str(head["help"]) + (f" (here: {', '.join(titles.get(key, key) for key in parts)})" if parts else "")


def _interval_words(rules: Sequence[Mapping[str, Any]]) -> list[str]:
    every = [g for rule in rules for m in rule.get("methods") or [] for g in (m.get("gap") or {}).values() if g]
    return list(dict.fromkeys(str(g["interval"]) for g in every if g.get("interval")))


def _set_names(results: Mapping[str, Any]) -> list[str]:
    names = [n for rule in results.get("rules") or [] for n in rule.get("sets") or {}]
    return list(dict.fromkeys([*((results.get("data") or {}).get("sizes") or {}), *names]))


def as_yaml(value: Any) -> str:
    """Nested plain values as YAML, in their own order."""
    from ..recipe import as_yaml as written

    return written(_plain(value, strict=False), allow_unicode=True, default_flow_style=None, width=96).rstrip()


def _plain(value: Any, strict: bool = True) -> Any:
    """The same value made of what JSON can hold: no NaN and no infinity, no tuples, no paths."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v, strict) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(v, strict) for v in value]
    if strict and isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _date(created: Any) -> str:
    try:
        when = datetime.fromisoformat(str(created))
    except ValueError:
        return str(created or "")
    return f"{when.day} {when:%B %Y}, {when:%H:%M}"


def _tier(evaluation: Any) -> str:
    """How dear an evaluation was made, how long that took and what had been announced."""
    given = evaluation if isinstance(evaluation, Mapping) else {}
    if not given.get("tier"):
        return ""
    took, said = _duration(given.get("seconds")), str(given.get("expected") or "")
    about = ", ".join(part for part in (took, f"expected {said}" if said else "") if part)
    return f"{given['tier']} evaluation" + (f" ({about})" if about else "")


def _duration(seconds: Any) -> str:
    if not isinstance(seconds, int | float) or not math.isfinite(seconds):
        return ""
    whole = round(seconds)
    if whole < 60:
        return f"{number(float(seconds), 's')} s"
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s"
