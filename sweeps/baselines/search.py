"""Search each method's settings for a benchmark's recipe, and write the file that its `tuned` entries read.

    python sweeps/baselines/search.py digits --trials 12 --jobs 2

The search has originals, retrained models and forget sets of its own, so that the table its settings go into tests
them. A trial's objective is the mean gap to the retrained models, in percentage points, over the accuracies on
forget, retain and validation rows and the entropy attack; no test row is read. The first trial of every method has
the paper's settings, the second those that a file given with --also has for it (found on other data), the others are
a seeded Latin hypercube over `spaces.yaml`; the settings with the smallest gap
win, the paper's on a tie. Every trial is a line of `trials_<benchmark>.jsonl`; what is there already is not run
again.
"""

import argparse
import copy
import json
import logging
import math
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from joblib import Parallel, delayed
from scipy.stats import qmc

from vislearn import artifacts, methods, runs
from vislearn.benchmark import Resolver, lay_out, with_rule, write_jobs
from vislearn.data import ForgetDataModule, batches
from vislearn.errors import UserError
from vislearn.jobs import run_all
from vislearn.learner import Learner
from vislearn.measure import channels_last
from vislearn.method import UnlearningMethod, scenario
from vislearn.metrics.accuracy import accuracy
from vislearn.metrics.membership import entropy_attack
from vislearn.modes import evaluating
from vislearn.plan import Plan, read_plan, shipped
from vislearn.recipe import load_yaml
from vislearn.store import Store
from vislearn.trainer import DEFAULTS, Trainer

HERE = Path(__file__).parent
FIRST_SEED, RETRAIN_SEEDS = 100, (1100, 1101, 1102)
COLLAPSE = 12.0  # points of retain accuracy below the best trial of all methods
RULES: dict[str, dict[str, Any]] = {  # none of the benchmarks' own
    "class": {"class_path": "ClassForget", "init_args": {"classes": [5]}},
    "random": {"class_path": "RandomForget", "init_args": {"fraction": 0.1, "seed": 77}},
}


def points(
    space: Mapping[str, Any], trials: int, seed: int, also: Mapping[str, Any] | None = None
) -> Iterator[dict[str, Any]]:
    """Settings drawn from a space: the paper's first, then `also` if given and not empty, then a Latin hypercube.

    A value of the space is a list of choices, {log: [low, high]}, {linear: [low, high]}, or a constant.
    """
    yield {}
    if also:
        yield dict(also)
    open_ = [name for name, values in space.items() if isinstance(values, list | dict)]
    if not open_:
        return
    for row in qmc.LatinHypercube(len(open_), rng=seed).random(max(0, trials - 1 - bool(also))):
        chosen = {name: value for name, value in space.items() if name not in open_}
        for name, u in zip(open_, row, strict=True):
            values = space[name]
            if isinstance(values, list):
                chosen[name] = values[min(int(u * len(values)), len(values) - 1)]
            elif "log" in values:
                low, high = (math.log(v) for v in values["log"])
                chosen[name] = float(f"{math.exp(low + u * (high - low)):.2g}")
            else:
                low, high = values["linear"]
                chosen[name] = float(f"{low + u * (high - low):.2g}")
        yield chosen


@torch.inference_mode()
def numbers(model: Learner, data: ForgetDataModule) -> dict[str, float]:
    """Accuracies on forget, retain and validation rows and the entropy attack, in percent; no test row is read."""
    out, outputs = {}, {}
    val = "val_retain" if "val_retain" in data.indices else "val"
    device = next(model.parameters()).device
    with evaluating(model):
        for name in ("forget", "retain", val):
            rows = [(model(channels_last(x)).float().cpu(), y.cpu())
                    for x, y in batches(data.loader(name, train=False, batch_size=256), device)]  # fmt: skip
            outputs[name] = torch.cat([r[0] for r in rows])
            out["val" if name == val else name] = 100 * accuracy(outputs[name], torch.cat([r[1] for r in rows]))
    attack = entropy_attack(outputs["retain"], outputs[val], outputs["forget"])
    return out if math.isnan(attack.score) else out | {"mia": 100 * attack.score}


class Bench:
    """The models that trials of one kind of forget set start from and are compared with."""

    def __init__(self, plan: Plan, kind: str, store: Store, resolve: Resolver, originals: int, jobs: int) -> None:
        self.kind, self.store, self.resolve, self.plan = kind, store, resolve, plan
        seeds = list(range(FIRST_SEED, FIRST_SEED + originals))
        models = replace(plan, forget=[RULES[kind]], methods=[], seeds=seeds, retrain_seeds=list(RETRAIN_SEEDS))
        sheet = lay_out(models, store, resolve)
        write_jobs(sheet, store)
        failed = [o for o in run_all(sheet.jobs, store, workers=jobs) if o.error]
        if failed:
            raise UserError(f"{failed[0].job.title}: {failed[0].error}")
        self.data, self.originals = sheet.data[0], sheet.originals
        each = [numbers(artifacts.load_learner(store[name]), self.data) for name in sheet.retrained[0].values()]
        self.target = {name: [e[name] for e in each] for name in each[0] if all(name in e for e in each)}

    def trial(self, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        """One method with one choice of settings, from every original: its gap, or why there is none."""
        torch.set_num_threads(1)
        warnings.filterwarnings("ignore")  # this is a process of its own
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        line: dict[str, Any] = {"kind": self.kind, "method": name, "settings": dict(settings),
                                "originals": len(self.originals)}  # fmt: skip
        gaps, found = [], []
        start = time.perf_counter()
        try:
            config = self.resolve(**{**self.plan.recipe, "data": with_rule(self.plan.recipe["data"], RULES[self.kind]),
                                     "method": {"class_path": name, "init_args": dict(settings)}})  # fmt: skip
            for seed, original in self.originals.items():
                mine = self.unlearned(self.resolve.method(config["method"]), original, seed)
                found.append(mine)
                each = [abs(mine[k] - v) for k, values in self.target.items() if k in mine for v in values]
                gaps.append(sum(each) / len(each))
        except UserError as error:
            return line | {"gap": None, "error": str(error)}
        mean = {k: round(float(np.mean([f[k] for f in found if k in f])), 2) for k in found[0]}
        seconds = round((time.perf_counter() - start) / len(gaps), 2)
        return line | {"gap": round(float(np.mean(gaps)), 3), "seconds": seconds} | mean

    def unlearned(self, method: UnlearningMethod, original: str, seed: int) -> dict[str, float]:
        model = artifacts.load_learner(self.store[original])
        trainer = Trainer(**{**DEFAULTS, "accelerator": "cpu", "logger": False})
        method.check(model, self.data)
        after, _ = runs.apply(model, copy.copy(self.data), method, trainer, seed, lambda name, make: make())
        if not all(torch.isfinite(p).all() for p in after.parameters()):
            raise UserError("diverged: a weight is not finite")
        return numbers(after, self.data)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", help=f"a benchmark file or the name of a shipped one: {', '.join(shipped())}")
    parser.add_argument("--trials", type=int, default=12, help="trials of a method for a kind of forget set")
    parser.add_argument("--methods", help="only these, comma-separated (default: every method with a space)")
    parser.add_argument("--originals", type=int, default=1, help="original models that a trial starts from; "
                        "settings tried on more of them go before all that were tried on fewer")  # fmt: skip
    parser.add_argument("--kinds", default="class,random", help="kinds of forget sets")
    parser.add_argument("--also", type=Path, help="file of settings found elsewhere, tried second")
    parser.add_argument("--root", help="where the data are")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--store", default="artifacts")
    options = parser.parse_args()
    plan = read_plan(options.benchmark)
    if options.root:
        plan.recipe["data"]["init_args"]["root"] = options.root
    name = Path(options.benchmark).stem
    log = HERE / f"trials_{name}.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {json.dumps([x["kind"], x["method"], x["settings"], x["originals"]], sort_keys=True) for x in lines}
    spaces = load_yaml(HERE / "spaces.yaml")
    spaces = {m: {**(spaces.get(m) or {})} for m in (options.methods or ",".join(spaces)).split(",")}
    unknown = [m for m in spaces if m not in methods.__all__]
    if unknown:
        raise UserError(f"no method {unknown[0]} in vislearn.methods; spaces.yaml names it")
    resolve = Resolver()
    for kind in options.kinds.split(","):
        bench = Bench(plan, kind, Store(Path(options.store)), resolve, options.originals, options.jobs)
        assert scenario(bench.data) == kind
        also = load_yaml(options.also)[kind] if options.also else {}
        asked = [(m, s) for m, space in spaces.items() for s in points(space, options.trials, 1, also.get(m))]
        asked = [a for a in asked if json.dumps([kind, *a, options.originals], sort_keys=True) not in done]
        target = {k: round(float(np.mean(v)), 2) for k, v in bench.target.items()}
        print(f"{kind}: {len(asked)} trials, retrained models {target}", flush=True)
        with Parallel(n_jobs=options.jobs, return_as="generator_unordered") as pool, log.open("a") as file:
            for line in pool(delayed(bench.trial)(*a) for a in asked):
                lines.append(line)
                file.write(json.dumps(line) + "\n")
                file.flush()
                print(line, flush=True)
    write_best(lines, Path(str(shipped()[name].parent if name in shipped() else HERE)) / "tuned" / f"{name}.yaml")
    return 0


def write_best(lines: list[dict[str, Any]], file: Path) -> None:
    """The settings of least gap for every kind and method; where the paper's are the best, none are written.

    Settings that break the model are taken only where all do: a small gap that is bought with the retain set is no use.
    """
    best: dict[str, dict[str, Any]] = {}
    for kind in dict.fromkeys(x["kind"] for x in lines):
        best_retain = max((x["retain"] for x in lines if x["kind"] == kind and x["gap"] is not None), default=0.0)
        for method in sorted({x["method"] for x in lines if x["kind"] == kind}):
            own = [x for x in lines if (x["kind"], x["method"]) == (kind, method) and x["gap"] is not None]
            own = [x for x in own if x["originals"] == max(y["originals"] for y in own)]
            own = [x for x in own if x["retain"] > best_retain - COLLAPSE] or own
            if own:
                first = min(own, key=lambda x: (x["gap"], bool(x["settings"])))
                best.setdefault(kind, {})[method] = first["settings"]
    file.parent.mkdir(exist_ok=True)
    said = "# Settings found by sweeps/baselines/search.py on validation rows; {} keeps the paper's.\n"
    file.write_text(said + yaml.safe_dump(best, sort_keys=True, default_flow_style=None, width=120))
    print(f"wrote {file}")


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
