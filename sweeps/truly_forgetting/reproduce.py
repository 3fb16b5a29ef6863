"""Look into the features of unlearned models at one scale, and say whether accuracy told the truth.

    python sweeps/truly_forgetting/reproduce.py --scale smoke|cpu|paper [--root DIR] [--store DIR]

The models are those of one benchmark file. The measures are those of the standard tier that read features, run here on
the stored models: CKA to the original and to the retrained models, k-NN and a linear probe.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from vislearn import artifacts, benchmark
from vislearn.data import ForgetDataModule
from vislearn.downstream import rank_classes
from vislearn.errors import UserError
from vislearn.jobs import run_all
from vislearn.measures.representation import (
    alike_original,
    alike_retrained,
    linear_probe,
    nearest_neighbours,
    on_downstream_data,
)
from vislearn.plan import read_plan
from vislearn.recipe import as_yaml
from vislearn.reproduction import (
    Rule,
    Stored,
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
    together,
    within,
)
from vislearn.store import Store

HERE = Path(__file__).parent
FORGET, RETAIN = "forget/accuracy", "retain/accuracy"
TO_ORIGINAL, TO_RETRAINED, PROBE, KNN = "forget/cka_original", "forget/cka_retrained", "forget/probe", "retain/knn"
DOWNSTREAM = "downstream/knn"
KEYS = (FORGET, RETAIN, TO_ORIGINAL, TO_RETRAINED, "retain/cka_original", "retain/cka_retrained", PROBE, "retain/probe",
        "forget/knn", KNN, DOWNSTREAM, "downstream/probe")  # fmt: skip
CLOSE = 0.05  # of accuracies
TOP = "TOP"  # in a file: the classes that the original model sees most in the downstream data
TASK = {"class_path": "CIFAR10", "init_args": {"batch_size": 128}}


def excellent(rule: Rule) -> list[str]:
    """The methods whose mean accuracies are those of retraining."""
    out = []
    for name in rule.methods:
        pairs = [(rule.mean(name, k), rule.mean("retrained", k)) for k in (FORGET, RETAIN)]
        if all(a is not None and b is not None and abs(a - b) <= CLOSE for a, b in pairs):
            out.append(name)
    return out


def forgot(rule: Rule) -> list[str]:
    """The methods that name the class as seldom as the retrained models."""
    theirs = rule.mean("retrained", FORGET) or 0.0
    means = {name: rule.mean(name, FORGET) for name in rule.methods}
    return [name for name, mean in means.items() if mean is not None and mean <= theirs + CLOSE]


def masked(rule: Rule) -> Verdict:
    told, said = [], []
    for name in excellent(rule):
        control = rule.difference("retrained", name, TO_ORIGINAL)
        own = paired(rule.values(name, TO_RETRAINED), rule.values(name, TO_ORIGINAL))
        told.append(together([rises(control), rises(own)]))
        said.append(f"{name} {shown(rule.interval(name, TO_ORIGINAL))} and {shown(rule.interval(name, TO_RETRAINED))}")
    theirs = shown(rule.interval("retrained", TO_ORIGINAL))
    return most(told), f"CKA to original and to retrained: {'; '.join(said) or 'no method'}; retrained {theirs}"


def wrecked(rule: Rule) -> Verdict:
    """The ascent that forgot most, where there are several."""
    names = [n for n in rule.methods if n.startswith("GradientAscent")]
    if not names:
        return None, "gradient ascent has not run"
    name = min(names, key=lambda n: rule.mean(n, FORGET) or 0.0)
    apart = rule.difference("retrained", name, KNN)
    left = rule.mean(name, FORGET) or 0.0
    return falls(apart), f"k-NN of {name} - retrained {shown(apart, 100)} points, {100 * left:.1f} % of D_f left"


def probe(rule: Rule) -> Verdict:
    before = [0.9 * v for v in rule.values("original", PROBE)]
    apart = {name: paired(before, rule.values(name, PROBE)) for name in forgot(rule)}
    said = "; ".join(f"{name} {shown(rule.interval(name, PROBE), 100)}" for name in ("original", *apart))
    return most(rises(d) for d in apart.values()), f"% of the class by a probe: {said}"


def retrained_probe(rule: Rule) -> Verdict:
    ours = rule.interval("retrained", PROBE)
    return rises(ours, 0.9), f"{shown(ours, 100)} %"


def downstream(rule: Rule) -> Verdict:
    costs, keeps = (rule.difference("original", name, DOWNSTREAM) for name in ("retrained", "RandomLabels"))
    said = f"against the original: retrained {shown(costs, 100)}, RandomLabels {shown(keeps, 100)} points"
    return together([falls(costs), within(keeps, 0.01)]), said


CHECKS = {"masked": masked, "wrecked": wrecked, "probe": probe, "retrained_probe": retrained_probe,
          "downstream": downstream}  # fmt: skip


def add_pairs(rule: Rule, found: Stored) -> None:
    """CKA to the retrained models, for each model the mean over them; of a retrained one, to the others."""
    retrained = found.models["retrained"]
    for name, subjects in found.models.items():
        values: dict[str, list[float]] = {}
        for subject, bench in zip(subjects, found.benches.of(subjects), strict=True):
            others = [r for r in retrained if r is not subject]
            each = [alike_retrained(subject, other, bench).numbers for other in others]
            for key in ("forget/cka_retrained", "retain/cka_retrained"):
                if each and all(key in numbers for numbers in each):
                    values.setdefault(key, []).append(sum(numbers[key] for numbers in each) / len(each))
        rule.models[name]["metrics"] |= {k: v for k, v in values.items() if len(v) == len(subjects)}


def with_top(file: Path, task: ForgetDataModule | None, options: argparse.Namespace) -> Path:
    """The file with the classes that the downstream task needs most, found by the first original model."""
    plan = yaml.safe_load(file.read_text())
    places = [r for r in plan["forget"] if TOP in r["init_args"]["classes"]]
    if not places or task is None:
        return file
    first = read_plan(str(file))
    if options.root:
        first.recipe["data"] = benchmark.with_arguments(first.recipe["data"], root=options.root)
    first.forget, first.methods, first.retrain_seeds, first.seeds = plan["forget"][:1], [], [], first.seeds[:1]
    store, resolve = Store(Path(options.store)), benchmark.Resolver()
    sheet = benchmark.lay_out(first, store, resolve)
    benchmark.write_jobs(sheet, store)
    if failed := [o for o in run_all(sheet.jobs, store, workers=options.workers) if o.error]:
        raise UserError(f"{failed[0].job.title}: {failed[0].error}")
    model = artifacts.load_learner(store[sheet.originals[first.seeds[0]]]).eval()
    ranked = rank_classes(model, task, sheet.data[0])
    for rule in places:
        rule["init_args"]["classes"] = ranked.top(len(plan["forget"][0]["init_args"]["classes"]))
    out = Path(options.store) / f"truly-forgetting-{file.name}"
    out.write_text(as_yaml(plan))
    ranked.save(out.with_suffix(".json"))
    return out


def asked(results: Mapping[str, Any], each: dict[str, Any], task: ForgetDataModule | None, store: str) -> Rule:
    """A rule with what was found about the features of its models."""
    rule = Rule(each)
    found = stored(results, rule, store)
    for bench in found.benches.of(found.models["original"]):
        bench.downstream = task
    rule.add(found.measured(alike_original, nearest_neighbours, linear_probe, on_downstream_data))
    add_pairs(rule, found)
    return rule


def main(argv: Sequence[str] | None = None) -> int:
    options = parser(HERE, __doc__).parse_args(argv)
    task = None
    if options.scale == "paper":
        config = benchmark.with_arguments(TASK, **({"root": options.root} if options.root else {}))
        task = benchmark.Resolver().data({"data": config})
        task.setup()
    results = benchmarked(with_top(HERE / f"{options.scale}.yaml", task, options), options)
    told, numbers = [], {}
    for each in results["rules"]:
        rule = asked(results, each, task, options.store)
        where = f"{each['title']}: " if len(results["rules"]) > 1 else ""
        made = check(expected(HERE)["findings"], CHECKS, rule, scale=options.scale)
        told += [finding | {"says": where + finding["says"]} for finding in made]
        numbers[each["title"]] = {n: {k: v for k in KEYS if (v := rule.values(n, k))} for n in rule.models}
    return finish(options, told, **facts(results), numbers=numbers)


if __name__ == "__main__":
    leave(main)
