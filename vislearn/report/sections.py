"""The sections of the page beyond the headline table: what each is about, its table, its graphs and its downloads."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from typing import Any

from . import export, figures, graphs
from .table import SECTIONS, columns, filled

WORDS = {
    "forgetting": "How close the model is to one that never saw the rows. The aim is the retrained models' value.",
    "utility": "What the model is still good for on rows that were to stay.",
    "membership": "Whether an attacker can tell that the forgotten rows were trained on. The aim is what the same "
    "attack says of the retrained models; neither zero nor chance is the aim.",
    "representation": "What the layers still hold. Retrained models hold much of it as well, so only the excess over "
    "them counts.",
    "robustness": "Whether what was forgotten comes back when somebody tries. Retrained models learn it back too, so "
    "only the excess over them counts.",
    "cost": "What it takes to unlearn.",
}


def sections(
    results: Mapping[str, Any],
    rule: Mapping[str, Any],
    table: Sequence[dict[str, Any]],
    marks: Mapping[str, int],
    anchor: str,
) -> list[dict[str, Any]]:
    """The sections of one rule that have something to show, in their order.

    Args:
        results: the content of results.json.
        rule: one of its rules.
        table: the rule's rows in printed order.
        marks: title of a method -> the index of its marker.
        anchor: of the rule on the page.
    """
    found = []
    for name in SECTIONS[1:]:
        given = columns(results, name)
        heads = filled(table, given)
        specs = [g for g in results.get("graphs") or [] if _section_of(g) == name]
        drawn = [g for g in (graphs.graph(spec, rule, table, marks) for spec in specs) if g]
        bars = figures.cost(rule, table, marks) if name == "cost" else None
        if not heads and not drawn and not bars:
            continue
        found.append(
            {
                "name": name,
                "title": name.capitalize(),
                "anchor": f"{anchor}-{name}",
                "words": WORDS[name],
                "heads": heads,
                "hidden": [head["title"] for head in given if head not in heads],
                "helps": [head for head in heads if head["help"]],
                "graphs": drawn,
                "cost": bars,
                "downloads": downloads(rule, table, heads, name) if heads else [],
            }
        )
    return found


def _section_of(spec: Mapping[str, Any]) -> str:
    given = str(spec.get("section") or "")
    return given if given in WORDS else "forgetting"


def downloads(
    rule: Mapping[str, Any], table: Sequence[dict[str, Any]], heads: Sequence[dict[str, Any]], name: str
) -> list[dict[str, str]]:
    """One table as files: {"kind", "file", "href" (a data URI)}."""
    file = re.sub(r"[^A-Za-z0-9]+", "-", f"{rule['id']}-{name}").strip("-") or "table"
    made = {
        "LaTeX": ("tex", "application/x-tex", export.latex(table, heads, f"{rule['title']}, {name}")),
        "CSV": ("csv", "text/csv", export.table_csv(table, heads)),
    }
    return [link(kind, f"{file}.{end}", mime, text) for kind, (end, mime, text) in made.items()]


def link(kind: str, file: str, mime: str, text: str) -> dict[str, str]:
    """A file inside the page, as its download links take it."""
    data = base64.b64encode(text.encode(errors="replace")).decode()
    return {"kind": kind, "file": file, "href": f"data:{mime};charset=utf-8;base64,{data}"}
