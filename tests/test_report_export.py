"""Tables as LaTeX and CSV: what is written comes back out, whatever names and numbers are in it."""

from __future__ import annotations

import base64
import csv
import io
import re
from typing import Any

import pytest
from report_example import example
from report_rich import rich

from vislearn.errors import UserError
from vislearn.report import rows, to_csv, to_latex
from vislearn.report.export import escaped
from vislearn.report.page import context
from vislearn.report.table import SECTIONS

EVIL = r"a\b{c}$d$ & 100 % #1 _x^2 ~ <y> |z| \"q\" ±"
SIGNS = {
    r"\textbackslash{}": "\\", r"\^{}": "^", r"\~{}": "~", r"\textquotedbl{}": '"', r"\ldots{}": "…", r"$\pm$": "±",
    r"$\times$": "×", r"$-$": "−", r"$\approx$": "≈", r"$<$": "<", r"$>$": ">", r"$|$": "|", r"$\alpha$": "α",
    "--": "–", **{"\\" + sign: sign for sign in "{}$&#%_"},
}  # fmt: skip


def read_latex(source: str) -> list[list[str]]:
    """The cells of a tabular, as TeX would separate them: by & and \\\\ that stand outside braces and escapes."""
    body = source[source.index(r"\toprule") : source.index(r"\bottomrule")]
    body = re.sub(r"\\(toprule|midrule)\n", "", body)
    table, row, cell, depth, at = [], [], "", 0, 0
    while at < len(body):
        two = body[at : at + 2]
        if two == "\\\\" and depth == 0:
            table.append([*row, cell.strip()])
            row, cell, at = [], "", at + 2
        elif two[0] == "\\" and len(two) == 2:
            cell, at = cell + two, at + 2
        elif two[0] == "&" and depth == 0:
            row, cell, at = [*row, cell.strip()], "", at + 1
        else:
            depth += {"{": 1, "}": -1}.get(two[0], 0)
            assert depth >= 0
            cell, at = cell + two[0], at + 1
    assert depth == 0
    assert not cell.strip()
    return table


def plain(cell: str) -> str:
    """What TeX prints of a cell without the boxes that only place it."""
    signs = sorted(SIGNS, key=len, reverse=True)
    return re.sub("|".join(map(re.escape, signs)), lambda found: SIGNS[found.group()], cell.removeprefix("{}"))


def read_csv(source: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(source)))


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return rich()


@pytest.mark.parametrize("section", SECTIONS)
def test_latex_has_every_row_and_column_and_balanced_braces(results: dict[str, Any], section: str) -> None:
    table = read_latex(to_latex(results, "class-3", section))
    names = [row["title"] for row in rows(results) if row["rule"] == "class-3"]
    body = [row for row in table if plain(row[0]) in names]
    assert [plain(row[0]) for row in body] == names
    assert {len(row) for row in table} == {len(table[0])}
    assert len(table) == len(body) + 2  # titles and units


def test_latex_prints_what_the_page_prints(results: dict[str, Any]) -> None:
    table = read_latex(to_latex(results, "class-3", "membership"))
    titles = [plain(cell) for cell in table[0]]
    scrub = next(row for row in table if row[0].startswith("SCRUB"))
    (row,) = (r for r in rows(results) if r["rule"] == "class-3" and r["name"] == "SCRUB")
    cell = row["cells"]["forget/mia_loss"]
    found = scrub[titles.index("Loss threshold")]
    near = r"$\approx$" if cell["within_floor"] else ""
    gap = cell["gap_text"].replace("<", "$<$")
    assert found == rf"\shortstack[r]{{{cell['text']}\,$\pm$\,{cell['spread_text']}\\{{\scriptsize {near}{gap}}}}}"


def test_bold_is_the_best_and_a_dash_says_why(results: dict[str, Any]) -> None:
    source = to_latex(results, "class-3", "robustness")
    best = [cell["text"] for row in rows(results) if row["rule"] == "class-3"
            for key, cell in row["cells"].items() if cell["best"] and key in ("forget/restored", "forget/trace",
                                                          "forget/accuracy_4bit", "forget/relearned_10")]  # fmt: skip
    assert sorted(re.findall(r"\\textbf\{([^}]*)\}", source)) == sorted(best)
    assert "% no number: GradientAscent (epochs=5, lr=0.01), Trace detection: " in source
    assert read_latex(source)[-1][1:] == ["--"] * 4  # the method that failed
    assert "% EUk (k=3, epochs=5): failed: k=3 but the model has 2 weight layers" in source


@pytest.mark.parametrize("words", [EVIL, r"\\ & \\", "50 % of {all}", "α=0.1", "x…y", "#", ""])
def test_escaped_text_comes_back(words: str) -> None:
    found = escaped(words)
    assert plain(found) == " ".join(words.split())
    assert found.count("{") == found.count("}")


@pytest.mark.parametrize("name", [EVIL, "[x]", "*", "a\nb"])
def test_names_of_the_user_do_not_break_the_tabular(results: dict[str, Any], name: str) -> None:
    given = example()
    for method in given["rules"][0]["methods"]:
        method["title"] = name + method["name"]
    given["columns"][0]["title"] = name
    table = read_latex(to_latex(given, "class-3"))
    assert {len(row) for row in table} == {len(table[0])}
    assert plain(table[0][2]) == " ".join(name.split())
    assert not re.search(r"\\\\\n[\[*]", to_latex(given, "class-3"))
    assert all(line.startswith("%") or not line.startswith("[") for line in to_latex(given, "class-3").splitlines())
    assert read_csv(to_csv(given, "class-3"))[3]["model"].endswith(name + rows(given)[3]["name"])


def test_csv_holds_the_unrounded_numbers_in_printed_units(results: dict[str, Any]) -> None:
    table = {row["model"].split(" (")[0]: row for row in read_csv(to_csv(results, "class-3", "membership"))}
    (method,) = (m for m in results["rules"][0]["methods"] if m["name"] == "SCRUB")
    stored, gap = method["metrics"]["forget/mia_loss"], method["gap"]["forget/mia_loss"]
    assert float(table["SCRUB"]["forget/mia_loss (%)"]) == pytest.approx(100 * sum(stored) / 3, abs=1e-9)
    assert float(table["SCRUB"]["forget/mia_loss gap"]) == gap["mean"]
    assert float(table["SCRUB"]["forget/mia_loss gap low"]) == gap["low"]
    floor = results["rules"][0]["floor"]["forget/mia_loss"]
    assert float(table["Retrained against retrained"]["forget/mia_loss gap"]) == floor["mean"]
    assert table["SCRUB"]["forget/mia_loss within floor"] == str(int(gap["mean"] <= floor["high"]))


def test_a_distance_in_csv_is_the_value_with_its_ends(results: dict[str, Any]) -> None:
    table = {row["model"].split(" (")[0]: row for row in read_csv(to_csv(results, "class-3", "forgetting"))}
    (method,) = (m for m in results["rules"][0]["methods"] if m["name"] == "SCRUB")
    stored = method["to_retrained"]["forget/kl_to_retrained"]
    assert float(table["SCRUB"]["forget/kl_to_retrained (nats)"]) == stored["mean"]
    assert float(table["SCRUB"]["forget/kl_to_retrained high"]) == stored["high"]
    assert table["Retrained"]["forget/kl_to_retrained (nats)"] == ""
    floor = results["rules"][0]["floor_to_retrained"]["forget/kl_to_retrained"]
    assert float(table["Retrained against retrained"]["forget/kl_to_retrained (nats)"]) == floor["mean"]


def test_a_missing_number_is_an_empty_cell_with_its_reason(results: dict[str, Any]) -> None:
    table = {row["model"].split(" (")[0]: row for row in read_csv(to_csv(results, "class-3", "membership"))}
    assert table["EUk"]["forget/mia_loss (%)"] == ""
    assert "2 weight layers" in table["EUk"]["missing"]
    assert table["EUk"]["status"] == "failed"
    assert table["FineTune"]["forget/lira_auc"] == ""
    assert "LiRA, AUC" in table["FineTune"]["missing"]
    assert table["SCRUB"]["missing"] == ""


def test_a_spreadsheet_sees_no_formula(results: dict[str, Any]) -> None:
    given = example()
    given["rules"][0]["methods"][0]["title"] = "=HYPERLINK(1)"
    assert "'=HYPERLINK(1)" in {row["model"] for row in read_csv(to_csv(given, "class-3"))}


@pytest.mark.parametrize(("rule", "section", "said"), [
    ("class-4", "headline", "there is: class-3, random-10, subclass-rocket"),
    ("class-3", "privacy", "there is: headline, forgetting"),
    ("subclass-rocket", "membership", "holds no number"),
])  # fmt: skip
def test_what_is_not_there_is_named(results: dict[str, Any], rule: str, section: str, said: str) -> None:
    for write in (to_latex, to_csv):
        with pytest.raises(UserError, match=said) as caught:
            write(results, rule, section)
        assert "\n" not in str(caught.value)


def test_the_page_offers_what_the_functions_write(results: dict[str, Any]) -> None:
    (rule, *_) = context(results)["rules"]
    for name, downloads in [("headline", rule["downloads"]), *((s["name"], s["downloads"]) for s in rule["sections"])]:
        tex, sheet = (base64.b64decode(d["href"].partition("base64,")[2]).decode() for d in downloads)
        assert sheet == to_csv(results, "class-3", name)
        assert read_latex(tex) == read_latex(to_latex(results, "class-3", name))
        assert [d["file"] for d in downloads] == [f"class-3-{name}.tex", f"class-3-{name}.csv"]
