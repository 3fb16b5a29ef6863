"""The same tables in the terminal, in as many columns as fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .table import DASH, SECTIONS, columns, filled, grouped, rows, said_once, shared_notes

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

# What leaves last when the terminal is narrow; everything else goes from the right to the left first.
KEPT = ("gap/mean", "forget/accuracy", "test_retain/accuracy", "retain/accuracy", "forget/mia_entropy", "time/unlearn")
# where rows were spoiled, forgetting them is not the aim but what comes right by it
KEPT_CORRECTIVE = ("corrective/acc_corr", "corrective/acc_retain", "corrective/attack_success", "corrective/recovery",
                   "time/unlearn")  # fmt: skip
UNITS = {"pp": "points", "x": "x", "": ""}
NAME_WIDTH = 20
PLAIN = str.maketrans({"±": "~", DASH: "-", "−": "-", "’": "'", "×": "x", "→": ">", "←": "<"})


def print_table(results: Mapping[str, Any], console: Console | None = None) -> None:
    """Print one table per forget rule, its flags and warnings in words below it.

    A cell holds the mean over seeds and its standard deviation, and below that the gap to the retrained models. In a
    narrow terminal the intervals go first, then the deviations, then columns from the right, and a line says which.

    Args:
        results: the content of results.json.
        console: where to print; the standard output by default.
    """
    from rich.console import Console

    console = console or Console()
    heads, table = columns(results), rows(results)
    for rule in results.get("rules") or []:
        mine = [row for row in table if row["rule"] == rule["id"]]
        _print_rule(rule, mine, filled(mine, heads), console)
    more = sections_of(results, table)
    if more:
        _say(console, f"\nmore on the page: {', '.join(more)}", "dim")


def sections_of(results: Mapping[str, Any], table: Sequence[dict[str, Any]]) -> list[str]:
    """The sections of the page that hold a number or a curve, beyond the headline table."""
    drawn = {str(graph.get("section")) for graph in results.get("graphs") or []}
    return [name for name in SECTIONS[1:] if name in drawn or filled(table, columns(results, name))]


def _print_rule(rule: Mapping[str, Any], table: Sequence[dict[str, Any]], heads: list[dict], console: Console) -> None:
    sets = rule.get("sets") or {}
    sizes = ", ".join(f"{sets[name]} {name}" for name in ("forget", "retain") if name in sets)
    _say(console, f"\nto forget: {rule['title']}" + (f"  ({sizes} rows)" if sizes else ""), "bold")
    shown, detail = fitting(table, heads, console.width)
    console.print(_table(table, shown, detail, _ascii(console)))
    lost = [head["title"] for head in heads if head not in shown]
    if lost:
        _say(console, f"not shown in {console.width} columns: {'; '.join(lost)}", "dim")
    lines = {
        2: "mean ± deviation over seeds; below it the gap to retrained [interval]",
        1: "mean ± deviation over seeds; below it the gap to retrained",
        0: "mean over seeds; below it the gap to retrained",
    }
    _say(console, f"{lines[detail]}; * best without a flag", "dim")
    _say(console, "floor: the gap of retrained against retrained; = a mean gap within it", "dim")
    once = shared_notes(table)
    for row in table:
        for name, sentence in grouped(row["flags"]):
            words = sentence if name == "note" else f"{name}: {sentence}".removesuffix(": ")
            _say(console, f"! {row['label']}: {words}", "yellow")
        for sentence in (note for note in row["notes"] if note not in once):
            _say(console, f"- {row['label']} says: {sentence}")
    floor_note = [rule["floor_note"]] if not rule.get("floor") and rule.get("floor_note") else []
    for sentence in dict.fromkeys([*said_once(rule.get("warnings") or [], once), *floor_note]):
        _say(console, f"- {sentence}")


def fitting(table: Sequence[dict[str, Any]], heads: list[dict], width: int) -> tuple[list[dict], int]:
    """The columns that fit into `width`, and how much a cell says: 2 with intervals, 1 with deviations, 0 without.

    A deviation is worth more than a column of the second rank, and a column of the first rank more than it.
    """
    kept = KEPT_CORRECTIVE if any(head["key"] in KEPT_CORRECTIVE[:-1] for head in heads) else KEPT
    for detail in (2, 1, 0):
        shown = list(heads)
        while True:
            if _name_width(table) + sum(2 + _width(table, head, detail) for head in shown) <= width:
                return shown, detail
            loose = [head for head in shown if head["key"] not in kept]
            if detail == 0 and not loose:
                loose = shown[1:]
            if detail == 2 or not loose:
                break
            shown.remove(loose[-1])
    return shown, 0


def _name_width(table: Sequence[dict[str, Any]]) -> int:
    return min(NAME_WIDTH, max(len(_name(row)) for row in table))


def _width(table: Sequence[dict[str, Any]], head: dict[str, Any], detail: int) -> int:
    lines = [line for row in table for line in _lines(row, head, detail)]
    lines += [*head["title"].split(), UNITS.get(head["unit"], head["unit"])]
    return max(len(line) for line in lines)


def _lines(row: dict[str, Any], head: dict[str, Any], detail: int) -> tuple[str, str]:
    """What a cell prints on its two lines."""
    cell = row["cells"][head["key"]]
    gap = cell["gap_text"] if detail == 2 else cell["gap_text"].partition(" [")[0]
    if head["key"].startswith("gap/"):
        gap = cell["gap_text"] if detail == 2 else ""
    elif row["kind"] == "floor":
        return (gap or DASH, "")
    value = cell["text"] + (f" ±{cell['spread_text']}" if cell["spread_text"] and detail > 0 else "")
    lead = head["key"] == "gap/mean"
    return (f"{value}{'*' if cell['best'] else ''}{' =' if lead and cell['within_floor'] else ''}", gap)


def _table(table: Sequence[dict[str, Any]], shown: Sequence[dict[str, Any]], detail: int, plain: bool) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    made.add_column("", width=_name_width(table), overflow="fold")
    for head in shown:
        width = _width(table, head, detail)
        title = _plain(f"{head['title']}\n{UNITS.get(head['unit'], head['unit'])}".rstrip(), plain)
        made.add_column(Text(title), justify="right", vertical="top", width=width, overflow="fold")
    last = next((row for row in reversed(table) if row["kind"] != "method"), None)
    for row in table:
        cells = [_cell(*_lines(row, head, detail), row["cells"][head["key"]]["best"], plain) for head in shown]
        style = {"method": "bold", "floor": "italic"}.get(row["kind"], "")
        made.add_row(Text(_plain(_name(row), plain), style=style), *cells, end_section=row is last)
    return made


def _name(row: dict[str, Any]) -> str:
    return "Floor" if row["kind"] == "floor" else f"{'! ' if row['flags'] else ''}{row['label']}"


def _cell(first: str, second: str, best: bool, plain: bool) -> Text:
    from rich.text import Text

    text = Text(_plain(first, plain), style="bold" if best else "")
    return text.append(_plain(f"\n{second}", plain), style="not bold dim") if second else text


def _say(console: Console, sentence: str, style: str = "") -> None:
    from rich.text import Text

    console.print(Text(_plain(sentence, _ascii(console)), style=style), soft_wrap=False)


def _ascii(console: Console) -> bool:
    return not console.encoding.lower().startswith("utf")


def _plain(sentence: str, plain: bool) -> str:
    """The sentence itself, or for a terminal without Unicode the nearest ASCII."""
    return sentence.translate(PLAIN).encode("ascii", "replace").decode() if plain else sentence
