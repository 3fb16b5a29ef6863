"""Run deep regression unlearning at one scale, and say which numbers and findings come out again.

python sweeps/deep_regression/reproduce.py --scale smoke [--root FOLDER] [--store FOLDER] [--seeds 1] [--relearn]
"""

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from scipy import stats

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # for the data module of the digits, in this process and in the workers
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HERE), os.environ.get("PYTHONPATH", ""))))

from vislearn import runs  # noqa: E402
from vislearn.benchmark import Resolver, with_rule  # noqa: E402
from vislearn.benchmark import main as benchmark  # noqa: E402
from vislearn.metrics.gap import interval  # noqa: E402
from vislearn.metrics.regression import anamnesis_index  # noqa: E402
from vislearn.store import Store  # noqa: E402

ORDER = ("original", "FineTune", "GaussianAmnesiac", "Blindspot", "retrained")
TITLES = {"test_retain/mae": "test retain MAE", "test_forget/mae": "test forget MAE",
          "forget/wasserstein": "W1 to retrained (D_f)", "forget/mia_svc_official": "attack share, forget"}  # fmt: skip
ERROR, RETAIN, W1 = "test_forget/mae", "test_retain/mae", "forget/wasserstein"
WORSE = 1.07  # retain error of a method that keeps its utility, over the original's
Verdict = tuple[bool | None, str]  # None where it cannot be told

Interval = tuple[float, float | None, float | None]


class Rule:
    """The numbers of one forget rule, by model."""

    def __init__(self, rule: dict[str, Any]) -> None:
        self.rule = rule
        self.models = {name: rule["models"][name] for name in ("original", "retrained")}
        self.models |= {m["name"]: m for m in rule["methods"] if m["status"] == "done"}

    def values(self, name: str, key: str) -> list[float]:
        """One value a seed."""
        return self.models.get(name, {"metrics": {}})["metrics"].get(key, [])

    def interval(self, name: str, key: str) -> Interval | None:
        """Mean and 95 % interval: over seeds, or for distances over pairs with retrained models."""
        if values := self.values(name, key):
            return interval(values)
        apart = self.models.get(name, {}).get("to_retrained", {}).get(key)
        return (apart["mean"], apart["low"], apart["high"]) if apart else None

    def difference(self, one: str, other: str, key: str) -> Interval | None:
        """Mean and 95 % interval of other - one; by seed where both started from the same originals, else Welch's."""
        a, b = (np.array(self.values(name, key)) for name in (one, other))
        if not len(a) or not len(b):
            return None
        if "retrained" not in (one, other) and len(a) == len(b):
            return interval((b - a).tolist())
        mean = float(b.mean() - a.mean())
        if min(len(a), len(b)) < 2:
            return mean, None, None
        both = stats.ttest_ind(b, a, equal_var=False).confidence_interval(0.95)
        return mean, float(both.low), float(both.high)


def rises(difference: Interval | None, least: float = 0.0) -> bool | None:
    """Whether a difference is above `least`: None where its interval holds it, or there is none."""
    if difference is None or difference[1] is None or difference[2] is None:
        return None
    return True if difference[1] > least else False if difference[2] < least else None


def together(told: Sequence[bool | None]) -> bool | None:
    """All of several statements: false where one is, true where all are."""
    return False if False in told else None if None in told else True


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


def shown(value: Interval | None) -> str:
    if value is None:
        return "–"
    mean, low, high = value
    return f"{mean:.3g}" + (f" [{low:.3g}, {high:.3g}]" if low is not None and high is not None else "")


def cell(ours: Interval | None, values: Sequence[float], theirs: dict[str, Any], n: int) -> str:
    """Whether a number is reproduced.

    Against several seeds: the 95 % intervals of both means meet. Against a single run: it lies where one more run of
    ours would, with 95 % probability. Without an interval of ours it cannot be told.
    """
    if ours is None or ours[1] is None or ours[2] is None:
        return "cannot be told"
    low, high = ours[1], ours[2]
    if theirs["sd"] is not None and n > 1:
        half = float(stats.t.ppf(0.975, n - 1)) * theirs["sd"] / math.sqrt(n)
    elif len(values) > 1:  # from the interval of a mean to that of one more value
        half, wide = 0.0, math.sqrt(1 + len(values))
        low, high = (ours[0] + wide * (end - ours[0]) for end in (low, high))
    else:
        half = 0.0
    return "reproduced" if low <= theirs["mean"] + half and high >= theirs["mean"] - half else "not reproduced"


def compared(rule: Rule, expected: dict[str, Any]) -> list[dict[str, Any]]:
    """Every cell: ours, theirs, and the verdict; without theirs our numbers alone."""
    rows = []
    for key, title in TITLES.items():
        for name in ("original", "retrained", "FineTune", "GaussianAmnesiac", "Blindspot"):
            ours, theirs = rule.interval(name, key), expected["cells"].get(key, {}).get(name)
            if ours is None and theirs is None:
                continue
            verdict = cell(ours, rule.values(name, key), theirs, expected["n"]) if theirs else "no reference"
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
        return [runs.artifact_subject(store[key]).model for key in groups[name]["keys"]]

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
    """The results of one benchmark file; what is stored already is not made again."""
    page = Path(options.store) / "reports" / f"deep-regression-{options.scale}-{file.stem}.html"
    if options.seeds:
        plan = yaml.safe_load(file.read_text())
        plan |= {name: plan[name][: options.seeds] for name in ("seeds", "retrain_seeds")}
        file = Path(options.store) / f"deep-regression-{options.scale}-{file.name}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(plan, sort_keys=False))
    root = ["--root", options.root] if options.root and options.scale != "smoke" else []
    benchmark(["-c", str(file), "--store", options.store, "--page", str(page), *root])
    return json.loads(page.with_suffix(".json").read_text())


def written(scale: str, lines: Sequence[str]) -> None:
    """Put the tables of a scale into the README."""
    readme, begin, end = HERE / "README.md", f"<!-- {scale} -->", f"<!-- /{scale} -->"
    before, found, after = readme.read_text().partition(begin)
    if not found:
        sys.exit(f"error: {readme} has no line {begin}")
    readme.write_text(f"{before}{begin}\n" + "\n".join(lines) + f"{end}{after.partition(end)[2]}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=["smoke", "cpu", "paper"], default="smoke")
    parser.add_argument("--root", help="folder of the images (cpu, paper)")
    parser.add_argument("--store", default="artifacts", help="folder of the stored models")
    parser.add_argument("--seeds", type=int, help="only so many originals and retrained models; by default all")
    parser.add_argument(
        "--relearn", action="store_true", help="the anamnesis index too, which trains every model again"
    )
    options = parser.parse_args(argv)
    expected = json.loads((HERE / "expected.json").read_text())
    out, lines = [], []
    for file in sorted((HERE / options.scale).glob("*.yaml")):
        results, known = run(file, options), expected["recipes"][f"{options.scale}/{file.stem}"]
        for each in results["rules"]:
            rule = Rule(each)
            rows, checks = compared(rule, known), []
            for finding in expected["findings"]:
                told, said = CHECKS[finding["id"]](rule)
                verdict = "cannot be told" if told is None else "reproduced" if told else "not reproduced"
                checks.append(finding | {"verdict": verdict, "numbers": said})
            entry = {"recipe": f"{options.scale}/{file.stem}", "rule": each["title"], "machine": results["machine"],
                     "seconds": round(results["seconds"]), "cells": rows, "findings": checks,
                     "reports": {m["name"]: m["report"] for m in each["methods"] if m["status"] == "done"}}  # fmt: skip
            if options.relearn:
                entry["anamnesis"] = {"ours": relearned(results, each, Store(Path(options.store))),
                                      "reference": known["anamnesis"]}  # fmt: skip
            out.append(entry)
            lines += table(each["title"], rows, checks)
    print("\n".join(lines))
    (HERE / f"results_{options.scale}.json").write_text(json.dumps(out, indent=1) + "\n")
    written(options.scale, lines)


if __name__ == "__main__":
    main()
