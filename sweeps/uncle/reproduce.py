"""Run UnCLe over streams of requests, in the authors' form and in ours, and ask the paper's findings again.

    python sweeps/uncle/reproduce.py --scale smoke|cpu|paper [--seeds 0 1 2] [--variants default release] [--root DIR]

`smoke` takes the handwritten digits of scikit-learn. `cpu` takes CIFAR-10 in DIR. `paper` takes CIFAR-100 and
Tiny-ImageNet in DIR, and image folders DIR/mnist, svhn, kmnist, notmnist and fashion_mnist; what is not there is left
out and said. Accuracies are in percent: RA over the tasks that are learned at the end, FA over those forgotten then.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from lightning import seed_everything
from vislearn.methods.uncle import UnCLe

from vislearn.artifacts import machine, versions
from vislearn.cli import quiet
from vislearn.datamodules import CIFAR10, CIFAR100, Digits, ImageFolder, Joined, Permuted, SplitClasses, TinyImageNet
from vislearn.errors import UserError
from vislearn.hypernetwork import HyperClassifier
from vislearn.remembered import remembered
from vislearn.reproduction import Verdict, cell, check, expected, finish, leave, parser, together
from vislearn.tasks import TaskStream
from vislearn.trainer import DEFAULTS, Trainer

HERE = Path(__file__).parent
PLAIN: dict[str, Any] = {"val_fraction": 0.0, "augment": False}
FIVE = ("svhn", "mnist", "kmnist", "notmnist", "fashion_mnist")
# name -> (folder of the data, seed) -> the stream; permutations and classes depend on the seed of the run, as released
DATA: dict[str, Callable[[Path, int], TaskStream]] = {
    "permuted_digits": lambda root, seed: Permuted(Digits(), 5, seed, **PLAIN),
    "split_cifar10": lambda root, seed: SplitClasses(CIFAR10(root), 5, **PLAIN),
    "permuted_mnist": lambda root, seed: Joined([Permuted(ImageFolder(root / "mnist", 28), 10, seed)], 64, **PLAIN),
    "five": lambda root, seed: Joined([ImageFolder(root / name) for name in FIVE], 64, **PLAIN),
    "cifar100": lambda root, seed: Joined([SplitClasses(CIFAR100(root), 10, order_seed=seed)], 64, **PLAIN),
    "tiny_imagenet": lambda root, seed: SplitClasses(TinyImageNet(root), 20, order_seed=seed, **PLAIN),
}
Runs = dict[str, list[dict[str, Any]]]  # "<part>/<stream>/<variant>" -> one entry a seed


def merged(*settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of model or strategy, the later ones in front."""
    out: dict[str, Any] = {}
    for each in settings:
        out |= each
    return out


def run(
    scale: Mapping[str, Any], seeds: Sequence[int], variants: Sequence[str], options: argparse.Namespace
) -> tuple[Runs, list[str]]:  # fmt: skip
    """Carry out every stream; and in words what could not be."""
    found: Runs = {}
    missing = []
    parts = scale.get("parts") or {scale["data"]: {"requests": scale["requests"]}}
    for part, own in parts.items():
        for seed in seeds:
            try:
                data = DATA[part](Path(options.root or "data"), seed)
                data.setup()
            except UserError as error:
                missing.append(f"{part}: {error}")
                break
            for stream, requests in own["requests"].items():
                for variant in variants:
                    given = [scale, own, scale["variants"][variant]]
                    model, strategy = (merged(*(g.get(k, {}) for g in given)) for k in ("model", "strategy"))
                    name = f"{part}/{stream}/{variant}"
                    asked = {"requests": requests, "model": model, "strategy": strategy, "seed": seed}
                    one = remembered(options, {"data": part, **asked}, partial(carried_out, copy.copy(data), **asked))
                    found.setdefault(name, []).append(one)
                    print(f"seed {seed}  {name:34} RA {one['RA']:5.1f}  FA {one['FA']:5.1f}  at once "
                          f"{one['FA_at_once']:5.1f}  UNI {min(one['UNI']):6.3f}  spill {max(one['spill']):4.1f}  "
                          f"relapse {one['relapse']:5.1f}  {one['seconds']:.0f} s", flush=True)  # fmt: skip
    return found, missing


def carried_out(
    data: TaskStream, requests: str, model: Mapping[str, Any], strategy: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    """The numbers of one stream, accuracies in percent and the rest in points."""
    seed_everything(seed, verbose=False)
    start = time.perf_counter()
    results = Trainer(**DEFAULTS).continual(HyperClassifier(**model), data, UnCLe(**strategy), requests)[1]
    m, steps = results["metrics"], results["steps"]
    forgettings = [(step, str(t)) for step in steps if step["kind"] == "U" for t in step["tasks"]]
    apart = [abs(r["from_chance"]) for r in results["relapse"]]
    return {
        "seed": seed, "RA": 100 * m["retain_accuracy"], "FA": 100 * m["forget_accuracy"],
        "FA_at_once": 100 * m["forget_accuracy_at_once"],
        "UNI": [step["uniformity"][t]["uni_release"] for step, t in forgettings],
        "learned": [100 * step["accuracy"][str(step["tasks"][0])] for step in steps if step["kind"] == "L"],
        "at_once": [100 * step["accuracy"][t] for step, t in forgettings],
        "spill": [s["total"] for s in results["spill"]], "spill_per_task": [s["per_task"] for s in results["spill"]],
        "relapse": m["relapse_rise_points"] or 0.0, "from_chance": statistics.mean(apart) if apart else 0.0,
        "accuracy": results["accuracy"], "reports": [step["report"] for step in steps],
        "warnings": results["warnings"], "seconds": time.perf_counter() - start,
    }  # fmt: skip


class Found:
    """The numbers by variant, of a scale that has one stream; by their whole names of any other."""

    def __init__(self, runs: Runs, requests: Sequence[str]) -> None:
        self.runs, self.requests = runs, requests
        self.of = {name.rsplit("/", 1)[1]: each for name, each in runs.items()}

    def values(self, variant: str, key: str, pick: Callable[[Any], float] = float) -> list[float]:
        """One number a seed; none where the variant did not run."""
        return [pick(one[key]) for one in self.of.get(variant, [])]

    def bounded(self, *of: tuple[str, str, Callable[[Any], float], Callable[[float], bool]]) -> Verdict:
        """Whether numbers of variants keep their bounds with every seed."""
        told, said = [], []
        for variant, key, pick, right in of:
            values = self.values(variant, key, pick)
            told.append(all(right(v) for v in values) if values else None)
            said.append(f"{variant} {key} {', '.join(f'{v:.3g}' for v in values) or 'not run'}")
        return together(told), "; ".join(said)


def checks() -> dict[str, Callable[[Found], Verdict]]:
    """The findings by their ids in expected.json."""
    b = expected(HERE)["bounds"]

    def norm(found: Found) -> Verdict:
        fresh, norm = (found.values(v, "FA_at_once") for v in ("release", "release_norm"))
        said = f"right after the request: fresh noise {shown(fresh)}, length {shown(norm)} %"
        if not fresh or len(fresh) != len(norm):
            return None, said
        return all(n - f >= b["worse"] for f, n in zip(fresh, norm, strict=True)), said

    def fixed(found: Found) -> Verdict:
        told, said = found.bounded(("release_fixed", "FA", float, lambda v: v <= b["FA"]))
        fresh, fixed = (found.values(v, "RA") for v in ("release", "release_fixed"))
        if not fresh or len(fresh) != len(fixed):
            return None, said
        return together([told, statistics.mean(fixed) < statistics.mean(fresh)]), f"{said}; RA {shown(fixed)}, with " \
            f"fresh noise {shown(fresh)} %"  # fmt: skip

    def release(found: Found) -> Verdict:
        from vislearn.metrics.gap import interval

        told, said = [], []
        theirs = next(r for r in expected(HERE)["reference"] if r["what"].startswith("release, seeds"))["values"]
        for key, values in theirs.items():
            ours = found.values("release", key)
            mean, sd = statistics.mean(values), statistics.stdev(values)
            verdict = cell(interval(ours), ours, {"mean": mean, "sd": sd}, len(values)) if ours else None
            told.append({"reproduced": True, "not reproduced": False}.get(verdict or ""))
            said.append(f"{key} {shown(ours)} %")
        return together(told), "; ".join(said)

    def comes_again(found: Found) -> Verdict:
        told, said = [], []
        for one in found.of.get("default", []):
            first = learned_again(one, found.requests)
            told += [again >= before - 5 for before, again in first]
            said += [f"{before:.1f} then {again:.1f}" for before, again in first]
        return together(told), ", ".join(said) + " %"

    def published(found: Found) -> Verdict:
        from vislearn.metrics.gap import interval

        told: list[bool | None] = []
        said = []
        for group in expected(HERE)["paper"]:
            ones = found.runs.get(f"{group['part']}/{group['stream']}/release", [])
            for key in {"RA", "FA"} & group["values"].keys():
                ours = [one[key] for one in ones]
                verdict = cell(interval(ours), ours, {"mean": group["values"][key], "sd": None}, 3) if ours else None
                told.append({"reproduced": True, "not reproduced": False}.get(verdict or ""))
                said.append(f"{group['part']} {key} {shown(ours)} and {group['values'][key]} %")
        return together(told), "; ".join(said)

    return {
        "retains": lambda f: f.bounded(("default", "RA", float, lambda v: v >= b["RA"])),
        "forgets": lambda f: f.bounded(("default", "FA", float, lambda v: v <= b["FA"]),
                                       ("default", "at_once", max, lambda v: v <= b["FA"])),
        "uniform": lambda f: f.bounded(("default", "UNI", min, lambda v: v >= b["UNI"])),
        "spills": lambda f: f.bounded(("default", "spill", max, lambda v: v <= b["spill"])),
        "norm": norm,
        "discard": lambda f: f.bounded(("release_discard", "UNI", max, lambda v: v < 0.9)),
        "fixed": fixed,
        "anchored": lambda f: f.bounded(("anchored", "from_chance", float, lambda v: v <= 3),
                                        ("release_anchored", "from_chance", float, lambda v: v <= 3)),
        "release": release,
        "comes_again": comes_again,
        "at_chance": lambda f: f.bounded(("default", "at_once", max, lambda v: v <= 55),
                                         ("default", "at_once", min, lambda v: v >= 45)),
        "published": published,
    }  # fmt: skip


def learned_again(one: Mapping[str, Any], requests: Sequence[str]) -> list[tuple[float, float]]:
    """(accuracy right after learning for the first time, and for another time) of tasks that are learned again."""
    first: dict[str, float] = {}
    out = []
    for text, accuracy in zip([r for r in requests if r[0] == "L"], one["learned"], strict=True):
        if text in first:
            out.append((first[text], accuracy))
        first.setdefault(text, accuracy)
    return out


def shown(values: Sequence[float]) -> str:
    return ", ".join(f"{v:.1f}" for v in values) or "not run"


def main() -> int:
    options_of = parser(HERE, __doc__, jobs=False)
    options_of.add_argument("--seeds", type=int, nargs="+", help="by default those of the recipe")
    options_of.add_argument("--variants", nargs="+", help="by default all of the recipe")
    options = options_of.parse_args()
    quiet()
    scale = yaml.safe_load((HERE / "recipe.yaml").read_text(encoding="utf-8"))[options.scale]
    variants = options.variants or list(scale["variants"])
    unknown = [v for v in variants if v not in scale["variants"]]
    if unknown:
        raise UserError(f"there is no variant {unknown[0]} at this scale; there are {', '.join(scale['variants'])} "
                        "(--variants)")  # fmt: skip
    seeds = options.seeds or scale["seeds"]
    runs, missing = run(scale, seeds, variants, options)
    if not runs:
        raise UserError("; ".join(missing))
    found = Found(runs, scale.get("requests", {}).get("a", "").split(","))
    return finish(options, check(expected(HERE)["findings"], checks(), found, scale=options.scale),
                  machine() | versions(), seeds, missing, runs=runs)  # fmt: skip


if __name__ == "__main__":
    leave(main)
