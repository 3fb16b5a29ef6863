"""Run deep regression unlearning at one scale, and say which numbers and findings come out again.

python sweeps/deep_regression/reproduce.py --scale smoke [--root FOLDER] [--store FOLDER] [--seeds 1] [--relearn]
"""

import argparse
import math
import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # for the data module of the digits, in this process and in the workers
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH", ""))))

from vislearn import artifacts, reproduction  # noqa: E402
from vislearn.benchmark import Resolver, with_rule  # noqa: E402
from vislearn.marked import replaced  # noqa: E402
from vislearn.metrics.gap import interval  # noqa: E402
from vislearn.metrics.regression import anamnesis_index  # noqa: E402
from vislearn.recipe import as_yaml  # noqa: E402
from vislearn.reproduction import (  # noqa: E402
    Rule,
    Verdict,
    cell,
    check,
    expected,
    facts,
    finish,
    leave,
    of_cells,
    parser,
    rises,
    shown,
    together,
    words,
)
from vislearn.store import Store  # noqa: E402

ORDER = ("original", "FineTune", "GaussianAmnesiac", "Blindspot", "retrained")
TITLES = {"test_retain/mae": "test retain MAE", "test_forget/mae": "test forget MAE",
          "forget/wasserstein": "W1 to retrained (D_f)", "forget/mia_svc_official": "attack share, forget"}  # fmt: skip
ERROR, RETAIN, W1 = "test_forget/mae", "test_retain/mae", "forget/wasserstein"
WORSE = 1.07  # retain error of a method that keeps its utility, over the original's
NO_REFERENCE = "no reference"


def order(rule: Rule) -> Verdict:
    pairs = list(pairwise(ORDER))
    apart = [rule.difference(a, b, ERROR) for a, b in pairs]
    said = "; ".join(f"{b} - {a} {shown(d)}" for (a, b), d in zip(pairs, apart, strict=True))
    return together([rises(d) for d in apart]), said


def closest(rule: Rule) -> Verdict:
    """Nearer to retrained than each other method, in forget error and in W1."""
    found = []
    for name in ("FineTune", "GaussianAmnesiac"):
        found.append((f"error of Blindspot - {name}", rises(d := rule.difference(name, "Blindspot", ERROR)), shown(d)))
        mine, theirs = rule.interval("Blindspot", W1), rule.interval(name, W1)
        told = None
        if mine and theirs and None not in (*mine, *theirs):
            told = True if mine[2] < theirs[1] else False if mine[1] > theirs[2] else None  # type: ignore[operator]
        found.append((f"W1 of Blindspot and of {name}", told, f"{shown(mine)}, {shown(theirs)}"))
    return together([told for _, told, _ in found]), "; ".join(f"{what} {text}" for what, _, text in found)


def utility(rule: Rule) -> Verdict:
    a, b = (rule.values(name, RETAIN) for name in ("original", "Blindspot"))
    if not a or len(a) != len(b):
        return None, "no values"
    over = interval([math.log(y / x / WORSE) for x, y in zip(a, b, strict=True)])
    below = rises((-over[0], *(None if end is None else -end for end in (over[2], over[1]))))
    return below, "retain error over the original's: " + ", ".join(f"{y / x:.3f}" for x, y in zip(a, b, strict=True))


CHECKS = {"order": order, "closest": closest, "utility": utility}


def compared(rule: Rule, known: dict[str, Any]) -> list[dict[str, Any]]:
    """Every cell: ours, theirs, and the verdict; without theirs our numbers alone."""
    rows = []
    for key, title in TITLES.items():
        for name in ("original", "retrained", "FineTune", "GaussianAmnesiac", "Blindspot"):
            ours, theirs = rule.interval(name, key), known["cells"].get(key, {}).get(name)
            if ours is None and theirs is None:
                continue
            verdict = cell(ours, rule.values(name, key), theirs, known["n"]) if theirs else NO_REFERENCE
            rows.append({"what": title, "model": name, "ours": ours, "reference": theirs, "verdict": verdict})
    return rows


def relearned(results: dict[str, Any], rule: dict[str, Any], store: Store) -> dict[str, list[float | None]]:
    """Anamnesis indices, method by method and seed by seed: each model against the retrained one of its place."""
    data = Resolver().data(results["recipe"] | {"data": with_rule(results["recipe"]["data"], rule["config"])})
    data.setup()
    torch.manual_seed(0)
    batches, validation = list(data.loader("train")), list(data.loader("val_forget", train=False))
    groups = Rule(rule).models

    def models(name: str) -> list[Any]:
        return [artifacts.artifact_subject(store[key]).model for key in groups[name]["keys"]]

    originals, retrained = models("original"), models("retrained")
    return {name: [anamnesis_index(m, r, o, batches, validation).value
                   for m, r, o in zip(models(name), retrained, originals, strict=False)]
            for name in groups if name not in ("original", "retrained")}  # fmt: skip


def table(title: str, rows: Sequence[dict[str, Any]], checks: Sequence[dict[str, Any]]) -> list[str]:
    """Cells and findings as Markdown."""
    lines = [f"**To forget: {title}.**", "", "| | model | reference | ours, 95 % interval | |", "|---|---|---|---|---|"]
    for row in rows:
        theirs = row["reference"]
        known = "–" if theirs is None else f"{theirs['mean']:g}"
        spread = f" ± {theirs['sd']:g}" if theirs and theirs["sd"] is not None else ""
        lines.append(f"| {row['what']} | `{row['model']}` | {known}{spread} | "
                     f"{shown(row['ours'])} | {row['verdict']} |")  # fmt: skip
    lines += ["", *(f"- {c['says']}: **{c['verdict']}** ({c['numbers']})" for c in checks), ""]
    return lines


def run(file: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The results of one benchmark file, cut to the seeds that were asked for."""
    if options.seeds:
        plan = yaml.safe_load(file.read_text())
        plan |= {name: plan[name][: options.seeds] for name in ("seeds", "retrain_seeds")}
        file = Path(options.store) / f"deep-regression-{options.scale}-{file.name}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(as_yaml(plan))
    return reproduction.benchmarked(file, options)


def findings_of(parts: Sequence[dict[str, Any]], known: dict[str, Any]) -> list[dict[str, Any]]:
    """The findings of every recipe and rule, and for recipes with reference numbers that all of them come out."""
    out = []
    for part in parts:
        where = f"{part['rule']}: " if len(parts) > 1 else ""
        out += [finding | {"says": f"{where}{finding['says']}"} for finding in part["findings"]]
        said = [row["verdict"] for row in part["cells"] if row["verdict"] != NO_REFERENCE]
        if said:
            told, numbers = of_cells(said)
            out.append({"id": "cells", "says": f"{where}errors, distances and attack are those of the reference",
                        "source": known["recipes"][part["recipe"]]["source"], "published": "see expected.json",
                        "verdict": words(told), "numbers": numbers})  # fmt: skip
    return out


def written(scale: str, lines: Sequence[str]) -> None:
    """Put the tables of a scale into the README."""
    readme, body = HERE / "README.md", "\n".join(lines).removesuffix("\n")
    readme.write_text(replaced(readme.read_text(), f"<!-- {scale} -->", f"<!-- /{scale} -->", body))


def main(argv: Sequence[str] | None = None) -> int:
    options_of = parser(HERE, __doc__)
    options_of.add_argument("--seeds", type=int, help="only so many originals and retrained models; by default all")
    options_of.add_argument(
        "--relearn", action="store_true", help="the anamnesis index too, which trains every model again"
    )
    options = options_of.parse_args(argv)
    theirs = expected(HERE)
    out, lines, made = [], [], []
    for file in sorted((HERE / options.scale).glob("*.yaml")):
        results, known = run(file, options), theirs["recipes"][f"{options.scale}/{file.stem}"]
        made.append(results)
        for each in results["rules"]:
            rule = Rule(each)
            rows, checks = compared(rule, known), check(theirs["findings"], CHECKS, rule)
            entry = {"recipe": f"{options.scale}/{file.stem}", "rule": each["title"],
                     "seconds": round(results["seconds"]), "cells": rows, "findings": checks,
                     "reports": {m["name"]: m["report"] for m in each["methods"] if m["status"] == "done"}}  # fmt: skip
            if options.relearn:
                entry["anamnesis"] = {"ours": relearned(results, each, Store(Path(options.store))),
                                      "reference": known["anamnesis"]}  # fmt: skip
            out.append(entry)
            lines += table(each["title"], rows, checks)
    print("\n".join(lines))
    if options.json is None:
        written(options.scale, lines)
    return finish(options, findings_of(out, theirs), **facts(*made), recipes=out)


if __name__ == "__main__":
    leave(main)
