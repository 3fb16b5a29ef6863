"""Run selective synaptic dampening at one scale, and say which of its findings come out again.

    python sweeps/ssd/reproduce.py --scale smoke|cpu|paper [--root DIR] [--store DIR]

Each scale has three benchmark files: one class beside the baselines of the SSD benchmark (class), every class in turn
(classes), and rows drawn at random (random).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from vislearn.reproduction import (
    Rule,
    Verdict,
    benchmarked,
    cell,
    check,
    expected,
    facts,
    falls,
    finish,
    leave,
    of_cells,
    paired,
    parser,
    rises,
    shown,
    within,
)

HERE = Path(__file__).parent
FORGET, RETAIN, KEPT = "forget/accuracy", "retain/accuracy", "test_retain/accuracy"
GAP = (FORGET, RETAIN, KEPT, "forget/mia_entropy")
CLEAN, LOST, COLLAPSED = 0.05, 0.1, 0.3  # forget accuracy at most; accuracy lost on kept classes at most, more than

Runs = Mapping[str, Sequence[Rule]]  # the rules of each file


def forgets(runs: Runs) -> Verdict:
    apart = runs["class"][0].difference("retrained", "SSD", FORGET)
    return within(apart, 0.05), f"SSD - retrained {shown(apart, 100)} points"


def keeps(runs: Runs) -> Verdict:
    apart = runs["class"][0].difference("retrained", "SSD", KEPT)
    return rises(apart, -0.02), f"SSD - retrained {shown(apart, 100)} points"


def fast(runs: Runs) -> Verdict:
    rule = runs["class"][0]
    mine = [sum(pair) for pair in zip(rule.values("SSD", "time/unlearn"), rule.values("SSD", "time/prepare"),
                                      strict=False)]  # fmt: skip
    theirs = [s for s in rule.models["retrained"]["seconds"] if s]
    if not mine or not theirs:
        return None, "no times"
    share = [m / (sum(theirs) / len(theirs)) for m in mine]
    apart = paired([0.0] * len(share), share)
    return falls(apart, 0.1), f"{shown(apart, 100)} % of the time of retraining"


def competitive(runs: Runs) -> Verdict:
    rule = runs["class"][0]
    apart = paired(rule.gaps("SSD", GAP), rule.gaps("FineTune", GAP))
    return rises(apart), f"gap of fine-tuning - gap of SSD {shown(apart)} points"


def collapse(runs: Runs) -> Verdict:
    """Counts models, one a class and seed."""
    clean = collapsed = gone = models = 0
    for rule in runs["classes"]:
        before, after = rule.values("original", KEPT), rule.values("SSD", KEPT)
        for b, a, forgotten in zip(before, after, rule.values("SSD", FORGET), strict=False):
            models += 1
            gone += forgotten <= CLEAN
            clean += forgotten <= CLEAN and b - a <= LOST
            collapsed += b - a > COLLAPSED
    if not models:
        return None, "SSD has not run"
    return 2 * clean > models and collapsed > 0, (
        f"of {models} models {clean} clean, {collapsed} collapsed; {models - gone} still know the class"
    )


def random(runs: Runs) -> Verdict:
    apart = runs["random"][0].difference("original", "SSD", FORGET)
    return within(apart, 0.02), f"SSD - original {shown(apart, 100)} points"


def estimator(runs: Runs) -> Verdict:
    apart = runs["class"][0].difference("SSD", "SSD by rows", FORGET)
    return rises(apart), f"D_f by rows - by batches {shown(apart, 100)} points"


def order(runs: Runs) -> Verdict:
    apart = runs["class"][0].difference("SSD 50 unordered", "SSD 50", KEPT)
    return rises(apart), f"kept accuracy grouped - not grouped {shown(apart, 100)} points"


def retrain(runs: Runs) -> Verdict:
    ours = runs["class"][0].interval("retrained", KEPT)
    return falls(ours, expected(HERE)["retrain_column"]["value"] / 100), f"{shown(ours, 100)} %"


def cells(runs: Runs) -> Verdict:
    known = expected(HERE)["kept_after"]
    names = [name for name in known if name != "source"]
    said = []
    for rule in runs["classes"]:
        name = names[rule.rule["config"]["init_args"]["classes"][0]]
        theirs = {"mean": known[name] / 100, "sd": None}
        said.append(cell(rule.interval("SSD", KEPT), rule.values("SSD", KEPT), theirs, 1))
    return of_cells(said)


CHECKS = {"forgets": forgets, "keeps": keeps, "fast": fast, "competitive": competitive, "collapse": collapse,
          "random": random, "estimator": estimator, "order": order, "retrain": retrain, "cells": cells}  # fmt: skip


def numbers(rule: Rule) -> dict[str, dict[str, list[float]]]:
    """What the results file keeps of every model."""
    keys = (*GAP, "test_forget/accuracy", "time/unlearn", "time/prepare")
    return {name: {k: v for k in keys if (v := rule.values(name, k))} for name in rule.models}


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(HERE, __doc__).parse_args(argv)
    files = sorted((HERE / options.scale).glob("*.yaml"))
    made = {file.stem: benchmarked(file, options) for file in files}
    runs = {name: [Rule(each) for each in results["rules"]] for name, results in made.items()}
    found = check(expected(HERE)["findings"], CHECKS, runs, scale=options.scale)
    kept = {name: {rule.rule["title"]: numbers(rule) for rule in rules} for name, rules in runs.items()}
    return finish(options, found, **facts(*made.values()), runs=kept)


if __name__ == "__main__":
    leave(main)
