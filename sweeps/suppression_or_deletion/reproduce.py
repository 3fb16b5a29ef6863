"""Steer inner layers of unlearned models at one scale, and say whether the forgotten class was suppressed or deleted.

    python sweeps/suppression_or_deletion/reproduce.py --scale smoke|cpu|paper [--root DIR] [--store DIR]

The models are those of one benchmark file. The measures are `restoration` and `readability` of the thorough tier, run
here on the stored models, because the tier as a whole would train shadow models too.
"""

from collections.abc import Sequence
from pathlib import Path

from vislearn.measures.restoration import readability, restoration
from vislearn.reproduction import (
    Rule,
    Verdict,
    benchmarked,
    check,
    expected,
    facts,
    falls,
    finish,
    leave,
    most,
    paired,
    parser,
    rises,
    shown,
    stored,
)

HERE = Path(__file__).parent
FORGOTTEN = 0.1  # of the class is right at most
NET, RANDOM, EXPERTS = "restoration_net", "restoration_random", "restoration"
KEYS = ("accuracy", NET, EXPERTS, RANDOM, "restoration_wrong_class", "restoration_rate", "restoration_direct",
        "restoration_patch", "readout", "layer_of_deletion")  # fmt: skip


def key(name: str) -> str:
    return f"test_forget/{name}"


def forgot(rule: Rule) -> list[str]:
    """The methods that forgot the class."""
    means = {name: rule.mean(name, key("accuracy")) for name in rule.methods}
    return [name for name, mean in means.items() if mean is not None and mean <= FORGOTTEN]


def suppressed(rule: Rule) -> Verdict:
    apart = {name: rule.difference("retrained", name, key(NET)) for name in forgot(rule)}
    said = "; ".join(f"{name} {shown(d, 100)}" for name, d in apart.items())
    return most(rises(d) for d in apart.values()), f"net points above retrained: {said or 'no method forgot'}"


def readable(rule: Rule) -> Verdict:
    """By seed, against half of what is read in the original of the same seed."""
    half = [v / 2 for v in rule.values("original", key("readout"))]
    apart = {name: paired(half, rule.values(name, key("readout"))) for name in forgot(rule)}
    means = {name: rule.mean(name, key("readout")) for name in ("original", "retrained", *apart)}
    said = "; ".join(f"{name} {100 * mean:.1f}" for name, mean in means.items() if mean is not None)
    return most(rises(d) for d in apart.values()), f"% of the class read in the middle layer: {said}"


def evidence(rule: Rule) -> Verdict:
    """Of the methods in which anything is restored."""
    names = [name for name in forgot(rule) if (rule.mean(name, key(EXPERTS)) or 0) > 0]
    apart = {name: paired(rule.values(name, key(RANDOM)), rule.values(name, key(EXPERTS))) for name in names}
    said = "; ".join(f"{name} {shown(d, 100)}" for name, d in apart.items())
    return most(rises(d) for d in apart.values()), f"experts - random, points: {said or 'nothing was restored'}"


def scratch(rule: Rule) -> Verdict:
    ours = rule.interval("retrained", key(NET))
    return falls(ours, 0.1), f"{shown(ours, 100)} points"


def pretrained(rule: Rule) -> Verdict:
    ours = rule.interval("retrained", key("restoration_rate"))
    return rises(ours, 0.5), f"{shown(ours, 100)} %"


CHECKS = {"suppressed": suppressed, "readable": readable, "evidence": evidence, "scratch": scratch,
          "pretrained": pretrained}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(HERE, __doc__).parse_args(argv)
    results = benchmarked(HERE / f"{options.scale}.yaml", options)
    rule = Rule(results["rules"][0])
    found = stored(results, rule, options.store).measured(restoration, readability)
    rule.add(found)
    told = check(expected(HERE)["findings"], CHECKS, rule, scale=options.scale)
    numbers = {name: {k: v for k in map(key, KEYS) if (v := rule.values(name, k))} for name in rule.models}
    notes = {name: list(dict.fromkeys(note for f in each for note in f.notes)) for name, each in found.items()}
    return finish(options, told, **facts(results), numbers=numbers, notes=notes)


if __name__ == "__main__":
    leave(main)
