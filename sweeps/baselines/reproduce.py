"""Run the methods of SalUn, l1-sparse and SCRUB at one scale, and say which of their tables' findings come out again.

    python sweeps/baselines/reproduce.py --scale smoke|cpu|paper [--root DIR] [--store DIR]

Each scale is one benchmark file beside this script. UA is 100 less the accuracy on D_f, RA that on D_r, TA that on test
rows (of the kept classes under a class rule), MIA the share of D_f that the confidence attack calls no member.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
    together,
)

HERE = Path(__file__).parent
UA, RA, MIA = "forget/accuracy", "retain/accuracy", "forget/mia_svc_confidence"
TENTH = "random 10 %"

Rules = Mapping[str, Rule]  # by title; the class under its kind


def test(rule: Rule) -> str:
    """Where TA stands: on the kept classes under a class rule."""
    return "test_retain/accuracy" if rule.rule["kind"] == "ClassForget" else "test/accuracy"


def gaps(rule: Rule, name: str) -> list[float]:
    return rule.gaps(name, (UA, RA, test(rule), MIA))


def closer(rule: Rule, name: str, other: str) -> tuple[bool | None, str]:
    """Whether a method's gap is below another's, seed by seed."""
    apart = paired(gaps(rule, name), gaps(rule, other))
    return rises(apart), f"{other} - {name} {shown(apart)}"


def salun(rules: Rules) -> Verdict:
    rule = rules[TENTH]
    told = [closer(rule, "SalUn", other) for other in rule.methods if other not in ("SalUn", "PruneFirst")]
    return together(t for t, _ in told), f"gaps: {'; '.join(said for _, said in told)}"


def relabel(rules: Rules) -> Verdict:
    apart = rules[TENTH].difference("retrained", "RandomLabels", MIA)
    return falls(apart), f"called members, RandomLabels - retrained: {shown(apart, 100)} points"


def finetune(rules: Rules) -> Verdict:
    apart = {n: rules[TENTH].difference("retrained", n, UA) for n in ("FineTune", "GradientAscent")}
    said = "; ".join(f"{name} {shown(d, 100)}" for name, d in apart.items())
    return together(rises(d) for d in apart.values()), f"D_f accuracy - retrained: {said} points"


def l1(rules: Rules) -> Verdict:
    told, said = closer(rules[TENTH], "L1Sparse", "FineTune")
    return told, f"gaps: {said}"


def l1_cost(rules: Rules) -> Verdict:
    apart = rules[TENTH].difference("L1Sparse", "FineTune", "test/accuracy")
    return rises(apart), f"TA, FineTune - L1Sparse: {shown(apart, 100)} points"


def sparse(rules: Rules) -> Verdict:
    told = {name: closer(rules[name], "PruneFirst", "FineTune") for name in (TENTH, "class")}
    return together(t for t, _ in told.values()), "gaps: " + "; ".join(f"{n}: {said}" for n, (_, said) in told.items())


def whole_class(rules: Rules) -> Verdict:
    ours = [rules["class"].interval("retrained", key) for key in (UA, MIA)]
    return together(falls(v, 0.02) for v in ours), f"right {shown(ours[0], 100)} %, members {shown(ours[1], 100)} %"


def class_order(rules: Rules) -> Verdict:
    apart = rules["class"].difference("GradientAscent", "FineTune", UA)
    return rises(apart), f"D_f accuracy, FineTune - GradientAscent: {shown(apart, 100)} points"


def scrub(rules: Rules) -> Verdict:
    """Tied where the interval of a difference holds 0."""
    rule = rules["class"]
    told = [closer(rule, "SCRUB", other) for other in rule.methods if other != "SCRUB"]
    verdict = False if any(t is False for t, _ in told) else True if any(t for t, _ in told) else None
    return verdict, f"gaps: {'; '.join(said for _, said in told)}"


def cells(rules: Rules) -> Verdict:
    said = [row["verdict"] for name, rule in rules.items() for row in compared(rule, name)]
    return of_cells(said)


CHECKS = {"salun": salun, "relabel": relabel, "finetune": finetune, "l1": l1, "l1_cost": l1_cost, "sparse": sparse,
          "class": whole_class, "class_order": class_order, "scrub": scrub, "cells": cells}  # fmt: skip


def in_percent(rule: Rule, name: str) -> dict[str, list[float]]:
    """UA, RA, TA and MIA of each seed, as the papers print them."""
    keys = {"UA": UA, "RA": RA, "TA": test(rule), "MIA": MIA}
    found = {title: rule.values(name, key) for title, key in keys.items()}
    return {t: [100 * (1 - v if t in ("UA", "MIA") else v) for v in values] for t, values in found.items() if values}


def compared(rule: Rule, name: str) -> list[dict[str, Any]]:
    """Every number of the papers' tables for this rule beside ours."""
    tables = expected(HERE)["tables"]
    table = tables.get(rule.rule["title"] if name == "class" else name, {})
    rows = []
    for model, numbers in table.items():
        for title, (mean, sd) in numbers.items() if isinstance(numbers, dict) else ():
            ours = in_percent(rule, model).get(title, []) if model in rule.models else []
            interval = paired([0.0] * len(ours), ours)
            rows.append({"model": model, "what": title, "ours": ours, "published": [mean, sd],
                         "verdict": cell(interval, ours, {"mean": mean, "sd": sd}, table["n"])})  # fmt: skip
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(HERE, __doc__).parse_args(argv)
    results = benchmarked(HERE / f"{options.scale}.yaml", options)
    rules = {"class" if r["kind"] == "ClassForget" else r["title"]: Rule(r) for r in results["rules"]}
    found = check(expected(HERE)["findings"], CHECKS, rules, scale=options.scale)
    numbers = {title: {name: in_percent(rule, name) | {"gap": gaps(rule, name)} for name in rule.models}
               for title, rule in rules.items()}  # fmt: skip
    rows = {title: compared(rule, title) for title, rule in rules.items()} if options.scale == "paper" else {}
    return finish(options, found, **facts(results), numbers=numbers, cells=rows)


if __name__ == "__main__":
    leave(main)
