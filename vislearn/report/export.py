"""Any table of the report as LaTeX (booktabs) and as CSV.

    to_latex(results, "class-3", "membership")

LaTeX prints what the page prints, two lines a cell; CSV holds the numbers unrounded, one cell each. A missing number is
an en dash in LaTeX and an empty cell in CSV, and both say why it is missing.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import UserError
from .table import DASH, SECTIONS, columns, filled, interval, rows

# what TeX reads as a command, and signs that its default fonts lack
SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "^": r"\^{}", "~": r"\~{}", "<": r"$<$", ">": r"$>$", "|": r"$|$", '"': r"\textquotedbl{}",
    "\N{PLUS-MINUS SIGN}": r"$\pm$", "\N{MULTIPLICATION SIGN}": r"$\times$", "\N{MINUS SIGN}": r"$-$",
    "\N{RIGHTWARDS ARROW}": r"$\to$", "\N{ALMOST EQUAL TO}": r"$\approx$", DASH: "--",
    "\N{NON-BREAKING HYPHEN}": "-", "\N{HORIZONTAL ELLIPSIS}": r"\ldots{}",
    **{letter: rf"${name}$" for letter, name in zip("αβγδεθλμστ", (r"\alpha", r"\beta", r"\gamma", r"\delta",
        r"\varepsilon", r"\theta", r"\lambda", r"\mu", r"\sigma", r"\tau"), strict=True)},
}  # fmt: skip
UNITS = {"pp": "points", "x": "\N{MULTIPLICATION SIGN}"}
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # how a spreadsheet knows a formula


def to_latex(results: Mapping[str, Any], rule: str, section: str = "headline") -> str:
    r"""A table of the report as a `tabular` that needs \usepackage{booktabs}.

    A cell holds the mean over seeds with its standard deviation, and below it the gap to the retrained models with its
    interval. Bold is the best of the column, an approximate sign stands before what is within the floor.

    Args:
        results: the content of results.json.
        rule: id of the forget rule.
        section: "headline", "forgetting", "utility", "membership", "representation", "robustness" or "cost".

    Raises:
        UserError: there is no such rule, no such section, or no number in it.
    """
    return latex(*_table(results, rule, section), caption=f"{rule}, {section}")


def to_csv(results: Mapping[str, Any], rule: str, section: str = "headline") -> str:
    """A table of the report as comma-separated values with one line of heads; arguments as those of `to_latex`.

    Every column of the page becomes up to six: mean, standard deviation (sd), gap, its ends, and whether it is within
    the floor, in the unit that is printed (percent, not fractions). Cells that a spreadsheet would take for a formula
    begin with an apostrophe.
    """
    return table_csv(*_table(results, rule, section))


def _table(results: Mapping[str, Any], rule: str, section: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    known = [str(r["id"]) for r in results.get("rules") or []]
    if rule not in known:
        raise UserError(f"these results hold no forget rule {rule!r}; there is: {', '.join(known) or 'none'}")
    if section not in SECTIONS:
        raise UserError(f"the report has no section {section!r}; there is: {', '.join(SECTIONS)}")
    table = [row for row in rows(results) if row["rule"] == rule]
    heads = filled(table, columns(results, section))
    if not heads:
        raise UserError(f"section {section!r} holds no number under {rule!r}; evaluate with a dearer tier")
    return table, heads


def latex(table: Sequence[dict[str, Any]], heads: Sequence[dict[str, Any]], caption: str = "") -> str:
    """The rows of one rule in these columns; see `to_latex`."""
    titles = [escaped(head["title"]) for head in heads]
    units = [escaped(UNITS.get(head["unit"], head["unit"])) for head in heads]
    lines = [
        f"% {_one_line(caption)}" if caption else "",
        r"% needs \usepackage{booktabs}; first line: mean and standard deviation over seeds; second line: gap to the",
        r"% retrained models [interval]; bold: best of the column; \approx: within the floor",
        rf"\begin{{tabular}}{{l{'r' * len(heads)}}}",
        r"\toprule",
        _line(["Model", *titles]),
        _line(["", *(f"({unit})" if unit else "" for unit in units)]) if any(units) else "",
        r"\midrule",
    ]
    for kinds in (("original", "retrained", "floor"), ("method",)):
        mine = [row for row in table if row["kind"] in kinds]
        lines += [_line([escaped(name_of(row)), *(_latex_cell(row, head) for head in heads)]) for row in mine]
        lines += [r"\midrule"] if kinds[0] == "original" and len(mine) < len(table) else []
    lines += [r"\bottomrule", r"\end{tabular}"]
    for why, cells in missing(table, heads).items():
        lines.append(f"% no number: {_one_line('; '.join(cells))}: {_one_line(why)}")
    lines += [f"% {_one_line(name_of(row))}: {_one_line(flag)}" for row in table for flag in row["flags"]]
    return "\n".join(line for line in lines if line) + "\n"


def name_of(row: Mapping[str, Any]) -> str:
    """What a table calls a row: a method by its title, which holds its settings."""
    return str(row["title"])


def missing(table: Sequence[dict[str, Any]], heads: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Reason -> the cells ("row, column") that hold no number for it."""
    found: dict[str, list[str]] = {}
    for row in table:
        for head in heads:
            cell = row["cells"][head["key"]]
            if cell["mean"] is None and not cell["gap"]:
                found.setdefault(cell["why"], []).append(f"{name_of(row)}, {head['title']}")
    return found


def _line(cells: Sequence[str]) -> str:
    first = f"{{}}{cells[0]}" if cells[0].startswith(("[", "*")) else cells[0]  # else an argument of the \\ before it
    return " & ".join([first, *cells[1:]]) + r" \\"


def _latex_cell(row: Mapping[str, Any], head: Mapping[str, Any]) -> str:
    cell = row["cells"][head["key"]]
    if cell["mean"] is None and not cell["gap"]:
        return "--"
    near = r"$\approx$" if cell["within_floor"] else ""
    gap = escaped(cell["gap_text"])
    if cell["form"] == "value" and row["kind"] == "floor":
        return rf"{{\scriptsize {gap}}}"
    value = _negative(escaped(cell["text"]))
    value = rf"\textbf{{{value}}}" if cell["best"] else value
    if cell["form"] != "value":
        value = f"{near}{value}"
    elif cell["spread_text"]:
        value += rf"\,$\pm$\,{escaped(cell['spread_text'])}"
    below = f"{near if cell['form'] == 'value' else ''}{gap}"
    return rf"\shortstack[r]{{{value}\\{{\scriptsize {below}}}}}" if below else value


def _negative(number: str) -> str:
    return f"$-${number[1:]}" if number.startswith("-") and number != "--" else number


def escaped(words: Any) -> str:
    """Any text as TeX prints it."""
    return "".join(SPECIAL.get(letter, letter) for letter in _one_line(words))


def _one_line(words: Any) -> str:
    return " ".join(str(words).split())


def table_csv(table: Sequence[dict[str, Any]], heads: Sequence[dict[str, Any]]) -> str:
    """The rows of one rule in these columns; see `to_csv`."""
    numbers = [_numbers(table, head) for head in heads]
    names = ["model", "kind", "seeds", "status", *(name for found in numbers for name in found), "flags", "missing"]
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([_text(name) for name in names])
    for i, row in enumerate(table):
        why = missing([row], heads)
        own = f"{name_of(row)}, "
        lost = [f"{cell.removeprefix(own)}: {reason}" for reason, cells in why.items() for cell in cells]
        seeds = " ".join(str(seed) for seed in row["seeds"])
        writer.writerow(
            [_text(name_of(row)), row["kind"], _text(seeds), row["status"]]
            + [_exact(found[name][i]) for found in numbers for name in found]
            + [_text("; ".join(row["flags"])), _text("; ".join(lost))]
        )
    return out.getvalue()


def _numbers(table: Sequence[dict[str, Any]], head: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The columns that one column of the page becomes: head -> a number or None for each row."""
    unit = UNITS.get(head["unit"], head["unit"])
    cells = [row["cells"][head["key"]] for row in table]
    gaps = [cell["gap"] or {} for cell in cells]
    ends = [interval(gap) or (None, None) for gap in gaps]
    key, apart = head["key"], any(cell["form"] != "value" for cell in cells)
    own = f"{key} ({unit})" if unit else key
    means = [gap.get("mean") for gap in gaps]
    found: dict[str, list[Any]] = {own: means if apart else [cell["mean"] for cell in cells]}
    prefix = key if apart else f"{key} gap"
    if not apart:
        found |= {f"{key} sd": [cell["spread"] for cell in cells], prefix: means}
    found |= {f"{prefix} low": [low for low, _ in ends], f"{prefix} high": [high for _, high in ends]}
    found[f"{key} within floor"] = [
        int(cell["within_floor"]) if row["kind"] == "method" and cell["gap"] else None
        for cell, row in zip(cells, table, strict=True)
    ]
    return {name: values for name, values in found.items() if name == own or any(v is not None for v in values)}


def _exact(value: Any) -> str:
    return "" if value is None else repr(value)


def _text(words: str) -> str:
    return f"'{words}" if words.startswith(FORMULA) else words
