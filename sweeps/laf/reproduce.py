"""Run label-agnostic forgetting as its authors' code does, and set every number against theirs.

    python sweeps/laf/reproduce.py --scale smoke|cpu|paper [--seeds 0 1 2] [--root DIR] [--json FILE]

`smoke` and `cpu` take the handwritten digits of scikit-learn, `paper` CIFAR-10 (--root). A number counts as reproduced
when the 95 % interval of the difference between our mean and theirs (Welch) holds 0, or when the difference is no more
than one row of the set. Where one side has a single run, the other side's deviation stands for its own; with a single
seed of ours the interval is wide, and the verdict is "consistent" at best. Single runs on both sides give no interval.
"""

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import seed_everything
from scipy import stats
from torch import Tensor
from vislearn.methods.laf import LAF, LAFR

from vislearn.artifacts import machine, versions
from vislearn.cli import quiet
from vislearn.data import ForgetDataModule, Labels, Memory
from vislearn.datamodules import CIFAR10
from vislearn.evaluation import predict
from vislearn.forget import ClassForget, Forget, checked
from vislearn.learner import Classifier, Learner
from vislearn.measure import Bench, Subject
from vislearn.measures.label_agnostic import label_agnostic_attack
from vislearn.metrics.accuracy import accuracy
from vislearn.remembered import remembered
from vislearn.reproduction import expected, finish, leave, of_cells, parser, words
from vislearn.runs import seed_unlearning
from vislearn.trainer import DEFAULTS, Trainer

HERE = Path(__file__).parent
METHODS = {"LAF": LAF, "LAFR": LAFR}


class Digits28(ForgetDataModule):
    """Handwritten digits brought from 8x8 to 28x28 pixels in [0, 1]; row i is a test row when 4 divides i."""

    num_classes, channels, image_size, classes = 10, 1, 28, tuple("0123456789")

    def rows(self, train: bool) -> tuple[Tensor, Tensor]:
        from sklearn.datasets import load_digits

        found = load_digits()
        x = torch.from_numpy(found.images).float()[:, None] / 16
        x = torch.nn.functional.interpolate(x, size=(28, 28), mode="bilinear")
        chosen = (torch.arange(len(x)) % 4 != 0) == train
        return x[chosen], torch.from_numpy(found.target).long()[chosen]

    def source(self, train: bool) -> Memory:
        return Memory(self.rows(train)[0])

    def labels(self, train: bool) -> Labels:
        return Labels(self.rows(train)[1], self.classes)


class ShareOfClasses(Forget):
    """Of each class in the upper half this share of the rows, rounded down."""

    def __init__(self, share: float = 0.4, seed: int = 0) -> None:
        self.share, self.seed = share, seed

    def indices(self, labels: Labels, candidates: Tensor) -> Tensor:
        generator, chosen = torch.Generator().manual_seed(self.seed), []
        for label in range(len(labels.classes) // 2, len(labels.classes)):
            own = candidates[labels.targets[candidates] == label]
            chosen.append(own[torch.randperm(len(own), generator=generator)[: int(self.share * len(own))]])
        return checked(self, torch.cat(chosen).sort().values, candidates, len(labels))


def rule(task: str) -> Forget:
    """What a task of the recipe forgets."""
    return ShareOfClasses() if task == "random" else ClassForget([0])


class Trained(Classifier):
    """The authors' training: Adam, with weight decay in the gradient."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), 1e-4, weight_decay=1e-4)


def data_module(name: str, forget: Forget | None, root: Path) -> ForgetDataModule:
    options: dict[str, Any] = {"batch_size": 32, "val_fraction": 0.0, "forget": forget}
    data = Digits28(**options) if name == "digits" else CIFAR10(root=root, **options)
    data.setup()
    return data


def trainer() -> Trainer:
    return Trainer(**DEFAULTS)


def train(data: ForgetDataModule, arch: str, seed: int, epochs: int = 20) -> Learner:
    seed_everything(seed, verbose=False)
    model = Trained(arch, num_classes=10, in_channels=data.channels, image_size=data.image_size)
    trainer().run_epochs(model, data, epochs)
    return model.eval()


def measured(model: Learner, data: ForgetDataModule) -> dict[str, float]:
    """Accuracy in percent on every set that there is, and the attack's success rate."""
    subject = Subject(predict(model, data))
    sets = {name: ids for name, ids in data.indices.items() if name not in ("train", "val")}
    found = {}
    for name in sets:
        p = subject.on(name, sets)
        found[name] = 100 * accuracy(p.outputs, p.targets)
    attack = label_agnostic_attack(subject, Bench(sets, subject)).numbers
    return found | {name.split("/")[1]: 100 * value for name, value in attack.items()}


def run(scale: Mapping[str, Any], seeds: Sequence[int], options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Task and model -> what each seed gave."""
    arch, root = "cnn_laf" if scale["data"] == "digits" else "resnet18_laf", Path(options.root or "data")
    found: dict[str, list[dict[str, Any]]] = {}

    @lru_cache(maxsize=1)
    def original(seed: int) -> Learner:
        return train(data_module(scale["data"], None, root), arch, seed)

    def known(data: ForgetDataModule, seed: int) -> dict[str, Any]:
        return measured(original(seed), data)

    def retrained(data: ForgetDataModule, seed: int) -> dict[str, Any]:
        return measured(train(data, arch, seed), data)

    def unlearned(data: ForgetDataModule, seed: int, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
        method = METHODS[name](**settings)
        model = copy.deepcopy(original(seed))
        seed_unlearning(seed)
        start = time.perf_counter()
        model = method.unlearn(model, data, trainer())
        seconds = time.perf_counter() - start
        drifts = {key: method.report[key] for key in ("retain_drift", "forget_drift")}
        said = {"warnings": method.report.get("warnings", [])}
        return measured(model, data) | {"seconds": seconds} | drifts | said

    def keep(task: str, name: str, seed: int, make: Callable[..., Any], *settings: Mapping[str, Any]) -> None:
        asked = {"data": scale["data"], "task": task, "model": name, "seed": seed, "settings": settings}
        numbers = remembered(options, asked, make)
        found.setdefault(f"{scale['data']}/{task}/{name}", []).append({"seed": seed} | numbers)
        each = "  ".join(f"{key} {value:.2f}" for key, value in numbers.items() if isinstance(value, float))
        print(f"seed {seed}  {task:20} {name:10} {each}", flush=True)

    for seed in seeds:
        for task, settings in scale["tasks"].items():
            data = data_module(scale["data"], rule(task), root)
            if task in ("class", "random"):
                keep(task, "original", seed, partial(known, data, seed))
                keep(task, "retrained", seed, partial(retrained, data, seed))
            for name in scale["methods"]:
                chosen = settings | (scale["repair"] if name == "LAFR" else {})
                keep(task, name, seed, partial(unlearned, data, seed, name, chosen), chosen)
    return found


def verdict(ours: Sequence[float], theirs: Sequence[float], runs: int, row: float) -> tuple[str, float]:
    """Whether a number came out, and half the width of the 95 % interval of the difference.

    Args:
        ours: percent, one per seed.
        theirs: mean, and the standard deviation where there are several runs.
        runs: their number.
        row: percent that one row of the set is worth.
    """
    difference, n = abs(statistics.mean(ours) - theirs[0]), len(ours)
    spread = [statistics.stdev(ours) if n > 1 else None, theirs[1] if len(theirs) > 1 else None]
    known = [s for s in spread if s is not None]
    if not known:
        return ("reproduced" if difference <= row else "cannot say"), math.nan
    a, b = (known[0] if s is None else s for s in spread)
    va, vb = a**2 / n, b**2 / runs
    if va + vb == 0:
        return ("reproduced" if difference <= row else "not reproduced"), 0.0
    freedom = (va + vb) ** 2 / (va**2 / max(1, n - 1) + vb**2 / max(1, runs - 1))
    half = float(stats.t.ppf(0.975, freedom)) * math.sqrt(va + vb)
    if difference > max(half, row):
        return "not reproduced", half
    return ("reproduced" if n > 1 else "consistent"), half


def references() -> dict[str, Any]:
    """The groups of reference numbers."""
    return {name: group for name, group in expected(HERE).items() if name != "about"}


def table(found: Mapping[str, list[dict[str, Any]]], sizes: Mapping[str, int]) -> list[dict[str, Any]]:
    """One line for every number that there is a reference for."""
    lines = []
    for name, group in references().items():
        for cell in found.keys() & group.keys():
            for metric, theirs in zip(group["metrics"], group[cell], strict=False):
                ours = [each[metric] for each in found[cell] if metric in each]
                if theirs[0] is None or not ours:
                    continue
                said, half = verdict(
                    ours, theirs, group["runs"], 100 / sizes.get(f"{cell.split('/')[1]}/{metric}", 100)
                )
                lines.append({"group": name, "cell": cell, "metric": metric, "reference": theirs, "ours": ours,
                              "verdict": said, "mean": statistics.mean(ours), "source": group["source"],
                              "half_width": None if math.isnan(half) else half})  # fmt: skip
    return sorted(lines, key=lambda line: (line["cell"], line["metric"]))


def findings_of(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One finding for each source of reference numbers: that all of them come out."""
    out = []
    for name, group in references().items():
        told, numbers = of_cells(line["verdict"] for line in lines if line["group"] == name)
        out.append({"id": name, "says": group["says"], "source": group["source"], "verdict": words(told),
                    "published": "see expected.json", "numbers": numbers})  # fmt: skip
    return out


def main() -> int:
    options_of = parser(HERE, __doc__, jobs=False)
    options_of.add_argument("--seeds", type=int, nargs="+", help="by default those of the recipe")
    arguments = options_of.parse_args()
    quiet()
    scale = yaml.safe_load((HERE / "recipe.yaml").read_text())[arguments.scale]
    seeds = arguments.seeds or scale["seeds"]
    found = run(scale, seeds, arguments)
    sizes = {}
    for task in scale["tasks"]:
        indices = data_module(scale["data"], rule(task), Path(arguments.root or "data")).indices
        sizes |= {f"{task}/{name}": len(ids) for name, ids in indices.items()}
    lines = table(found, sizes)
    for line in lines:
        theirs = " ± ".join(f"{v:.2f}" for v in line["reference"])
        width = "" if line["half_width"] is None else f" (difference within {line['half_width']:.2f})"
        print(f"{line['cell']:28} {line['metric']:12} theirs {theirs:14} ours {line['mean']:6.2f}{width}  "
              f"{line['verdict']}")  # fmt: skip
    return finish(arguments, findings_of(lines), machine() | versions(), {"original": seeds, "retrained": seeds},
                  runs=found, cells=lines)  # fmt: skip


if __name__ == "__main__":
    leave(main)
