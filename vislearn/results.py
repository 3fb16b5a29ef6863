"""What the page and the terminal table draw, as plain data: the content of results.json."""

import datetime
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import evaluation as ev
from .artifacts import machine, versions
from .comparison import slug
from .data import ForgetDataModule
from .measures import all_columns


def results_of(
    rules: list[dict[str, Any]], data: ForgetDataModule, config: dict[str, Any], command: Sequence[str], **more: Any
) -> dict[str, Any]:
    """What the page and the terminal table draw."""
    ledger, rules = data.split(), told_apart(rules)
    return {
        "created": datetime.datetime.now().isoformat(timespec="seconds"), "command": shlex.join(command),
        "machine": machine() | versions(), "recipe": config,
        "data": {"name": data.name, "classes": list(data.classes), "fingerprint": ledger["fingerprint"],
                 "sizes": {s: len(data.indices[s]) for s in ev.SPLITS}},
        "columns": columns(rules), "graphs": drawn(rules), "rules": rules, "failures": [], **more,
    }  # fmt: skip


def told_apart(rules: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rules with titles and ids that no two of them share: equal titles are followed by the settings that differ.

    Of paths the folders are shown that tell them apart. Titles that differ in signs alone, as `targets <= 30` and
    `targets >= 30` do, have one id, and a number after it.
    """
    out = [dict(rule) for rule in rules]
    for title, count in Counter(rule["title"] for rule in rules).items():
        if count == 1:
            continue
        same = [rule for rule in out if rule["title"] == title]
        settings = [(rule.get("config") or {}).get("init_args") or {} for rule in same]
        ends = [""] * count
        for name in dict.fromkeys(name for each in settings for name in each):
            values = [str(each[name]) if name in each else "" for each in settings]
            if len(set(values)) > 1:
                if name == "path":
                    values = apart(values)
                ends = [f"{end}, {name} {v}" if v else end for end, v in zip(ends, values, strict=True)]
        if len(set(ends)) < count:  # the same rule, or one whose settings are not known
            ends = [f"{end}, rule {number}" for number, end in enumerate(ends, 1)]
        for rule, end in zip(same, ends, strict=True):
            rule["title"] = f"{title}{end}"
            rule["id"] = slug(rule["title"])
    taken: Counter[str] = Counter()
    for rule in out:
        taken[rule["id"]] += 1
        if taken[rule["id"]] > 1:
            rule["id"] = f"{rule['id']}--{taken[rule['id']]}"
    return out


def apart(paths: Sequence[str]) -> list[str]:
    """Paths without the folders at their beginning that all of them have."""
    parts = [Path(path).parts for path in paths]
    shared = next((i for i, names in enumerate(zip(*parts, strict=False)) if len(set(names)) > 1), 0)
    return [str(Path(*each[shared:])) for each in parts]


def columns(rules: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The columns for which there is a number; the accuracy on all test rows only where the test set is not split.

    Ends of intervals over rows stay in the numbers and out of the tables.
    """
    groups = [m for r in rules for m in (*r["models"].values(), *r["methods"])]
    present = {k for m in groups for k in (*m["metrics"], *m.get("to_retrained", {}))}
    if "test_retain/accuracy" in present:
        present.discard("test/accuracy")
    ends = {k for k in present if k.rpartition("_")[2] in ("low", "high") and k.rpartition("_")[0] in present}
    each = [(c, sorted(k for k in present - ends if fits(c.key, k))) for c in (*all_columns(), *ev.COST)]
    return [vars(c) | {"key": key, "title": titled(c, key)} for c, keys in each for key in keys]


def fits(pattern: str, key: str) -> bool:
    """Whether a column's key names a number: the same, or all that begin as the key before its `*`."""
    return pattern == key or (pattern.endswith("*") and key.startswith(pattern[:-1]))


def titled(column: ev.Column, key: str) -> str:
    """The column's title, with what the `*` of its key stands for."""
    return f"{column.title} {key[len(column.key) - 1:].replace('_', ' ')}" if column.key.endswith("*") else column.title


def drawn(rules: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The graphs for which there is a curve."""
    present = {k for r in rules for m in (*r["models"].values(), *r["methods"]) for k in m.get("curves", {})}
    return [vars(g) for g in ev.graphs() if g.key in present]


def printable(rule: dict[str, Any]) -> dict[str, Any]:
    """The least that the terminal table needs."""
    return {"title": rule["title"], "kind": "evaluate", "rules": [rule], "columns": columns([rule]), "failures": []}


def audit_results(rule: dict[str, Any], data: ForgetDataModule, config: dict, command: Sequence[str]) -> dict[str, Any]:
    """Results of `evaluate`, in the benchmark's shape."""
    return results_of([rule], data, config, command, title=f"Audit on {data.name}", kind="evaluate", seconds=0.0)
