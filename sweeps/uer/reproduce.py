"""Learn streams of tasks online by UER and by its variants, and set the final accuracies side by side.

    python sweeps/uer/reproduce.py --scale smoke|cpu|paper [--seeds 0 1 2] [--memory 20 100] [--root DIR] [--json FILE]

`smoke` takes the handwritten digits of scikit-learn; the others CIFAR (--root). Every variant starts from the same
weights, split and order of classes of a seed, so differences are paired by seed.
"""

import argparse
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning import seed_everything
from torch import Tensor, nn
from torch.nn import functional as F
from vislearn.methods.uer import UER, bias_diagnostics, cosines, dot_logits

from vislearn.artifacts import machine, versions
from vislearn.cli import quiet
from vislearn.data import ForgetDataModule, Labels, Memory
from vislearn.datamodules import CIFAR10, CIFAR100, SplitClasses
from vislearn.learner import Classifier
from vislearn.metrics.continual import forgetting
from vislearn.metrics.gap import interval
from vislearn.networks import Network, ResNet, initialise
from vislearn.remembered import remembered
from vislearn.reproduction import (
    Interval,
    Verdict,
    cell,
    check,
    expected,
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
from vislearn.stream_requests import parse
from vislearn.tasks import TaskStream
from vislearn.trainer import DEFAULTS, Trainer

HERE = Path(__file__).parent
Numbers = dict[str, list[float]]  # one value a seed
Found = Mapping[int, Mapping[str, Numbers]]  # memory -> model -> number


class Digits16(ForgetDataModule):
    """Handwritten digits brought from 8x8 to 16x16 pixels in [0, 1]; a fifth, drawn by the seed, are test rows."""

    num_classes, channels, image_size, classes = 10, 1, 16, tuple("0123456789")

    def __init__(self, seed: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seed = seed

    def rows(self, train: bool) -> Tensor:
        """(n,) scans of a split."""
        order = torch.randperm(len(scans()[1]), generator=torch.Generator().manual_seed(self.seed))
        return order[len(order) // 5 :] if train else order[: len(order) // 5]

    def source(self, train: bool) -> Memory:
        return Memory(scans()[0][self.rows(train)])

    def labels(self, train: bool) -> Labels:
        return Labels(scans()[1][self.rows(train)], self.classes)


@lru_cache(maxsize=1)
def scans() -> tuple[Tensor, Tensor]:
    """(n, 1, 16, 16) images and (n,) digits."""
    from sklearn.datasets import load_digits

    found = load_digits()
    x = F.interpolate(torch.from_numpy(found.images).float()[:, None] / 16, size=(16, 16), mode="bilinear")
    return x, torch.from_numpy(found.target).long()


class SmallCNN(Network):
    """Three convolutions of 16, 32 and 64 channels with batch norm, the maps of the last brought to 2x2."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.body = nn.Sequential()
        for before, width in ((1, 16), (16, 32), (32, 64)):
            self.body.extend([nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
                              nn.MaxPool2d(2)])  # fmt: skip
        self.head = nn.Linear(4 * 64, outputs)
        initialise(self)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def pool(self, z: Tensor) -> Tensor:
        return z.flatten(1)


class OnlineClassifier(Classifier):
    """The small network for grey images; for colours the reduced ResNet-18 of online continual learning."""

    def construct(self) -> None:
        assert self.num_classes is not None
        self.network = SmallCNN(self.num_classes) if self.in_channels == 1 else ResNet(
            (2, 2, 2, 2), (20, 40, 80, 160), self.num_classes, 3, "batch", project=True
        )  # fmt: skip


def stream(scale: Mapping[str, Any], seed: int, root: str | None) -> TaskStream:
    """The tasks of a seed."""
    options: dict[str, Any] = {} if root is None else {"root": Path(root)}
    base: ForgetDataModule
    if scale["data"] == "digits":
        base = Digits16(seed)
    else:
        kind = {"cifar10": CIFAR10, "cifar100": CIFAR100}[scale["data"]]
        base = kind(pixels=scale["pixels"], **options)
    data = SplitClasses(base, scale.get("tasks", 5), order_seed=seed, val_fraction=0.0, augment=False, split_seed=seed,
                        train_rows=scale.get("train_rows"))  # fmt: skip
    data.setup()
    return data


@torch.no_grad()
def read(model: Classifier, data: TaskStream, device: str) -> tuple[Tensor, Tensor]:
    """Features (n, d) and classes (n,) of all test rows."""
    loader, parts = data.loader("test", train=False, batch_size=500), []
    model.to(device).eval()
    for x, y in loader:
        parts.append((model.features(x.to(device)).cpu(), y))
    model.cpu()
    return torch.cat([h for h, _ in parts]), torch.cat([y for _, y in parts])


def on_tasks(strategy: UER, h: Tensor, y: Tensor, model: Classifier, data: TaskStream, prediction: str) -> list[float]:
    """Accuracy on every task that was learned, over all classes learned so far, in percent."""
    weight, bias = model.head.weight.detach(), model.head.bias.detach()
    logits = dot_logits(h, weight, bias) if prediction == "dot" else cosines(h, weight)
    known = [c for task in strategy.learned for c in data.tasks[task]]
    closed = ~torch.isin(torch.arange(logits.shape[1]), torch.tensor(known))
    right = logits.masked_fill(closed, -torch.inf).argmax(1) == y
    return [100 * right[data.task_of(y) == task].double().mean().item() for task in strategy.learned]


def run(data: TaskStream, memory: int, options: Mapping[str, Any], seed: int) -> dict[str, dict[str, float]]:
    """What one variant ends with, by prediction."""
    seed_everything(seed, verbose=False)
    model = OnlineClassifier(num_classes=data.num_classes, in_channels=data.channels, image_size=data.image_size)
    strategy, trainer, tasks = UER(memory=memory, **options), Trainer(**DEFAULTS), range(len(data.tasks))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    strategy.check(model, data, "class")
    strategy.begin(model, data, "class")
    matrices = {name: torch.full((len(tasks), len(tasks)), torch.nan) for name in ("dot", "cosine")}
    for task in tasks:
        rows = data.task_rows(task)
        strategy.learn(model, data.view({"train": rows, "retain": rows}, also=strategy.rows), task, trainer)
        strategy.note_learned(task)
        h, y = read(model, data, device)
        for name, matrix in matrices.items():
            matrix[task, : task + 1] = torch.tensor(on_tasks(strategy, h, y, model, data, name))
    found, requests = {}, parse([f"L{task}" for task in tasks])
    new = list(data.tasks[-1])
    diagnosed = bias_diagnostics(h, y, model.head.weight, new, range(new[0]), model.head.bias)
    for name, matrix in matrices.items():
        found[name] = {"final": matrix[-1].mean().item(), "learned": matrix.diag().mean().item(),
                       "forgetting": forgetting(matrix, requests) or 0.0}  # fmt: skip
    found["dot"] |= diagnosed
    return found


def run_all(
    scale: Mapping[str, Any], seeds: Sequence[int], memories: Sequence[int], options: argparse.Namespace
) -> Found:  # fmt: skip
    """Every variant with every memory and seed."""
    found: dict[int, dict[str, Numbers]] = {memory: {} for memory in memories}
    for seed in seeds:
        data = stream(scale, seed, options.root)
        about = {k: v for k, v in scale.items() if k not in ("seeds", "memory", "variants")}
        for memory in memories:
            for name, variant in scale["variants"].items():
                start = time.perf_counter()
                asked = {**about, "memory": memory, "variant": variant, "seed": seed}
                ended = remembered(options, asked, partial(run, data, memory, variant, seed))
                for prediction, numbers in ended.items():
                    title = name if prediction == "dot" else f"{name}, cosine prediction"
                    kept = found[memory].setdefault(title, {})
                    for key, value in numbers.items():
                        kept.setdefault(key, []).append(value)
                print(f"seed {seed}  memory {memory:4}  {name:16} {kept_final(found[memory], name)}  "
                      f"{time.perf_counter() - start:.1f} s", flush=True)  # fmt: skip
    return found


def kept_final(found: Mapping[str, Numbers], name: str) -> str:
    each = (f"{found[title]['final'][-1]:5.1f}" for title in (name, f"{name}, cosine prediction"))
    return " / ".join(each)


# verdicts: at the first memory


def apart(found: Mapping[str, Numbers], one: str, other: str, key: str = "final") -> Interval | None:
    """Mean and interval of other - one."""
    return paired(found[one][key], found[other][key])


def above(found: Mapping[str, Numbers], one: str, least: float) -> Verdict:
    gap = apart(found, one, "UER")
    enough = None if gap is None or gap[1] is None else gap[0] >= least
    return together([rises(gap), enough]), f"UER - {one} {shown(gap)} points"


def beats_replay(found: Mapping[str, Numbers]) -> Verdict:
    return above(found, "plain replay", 3)


def beats_reversed(found: Mapping[str, Numbers]) -> Verdict:
    return above(found, "reversed", 3)


def forgets_less(found: Mapping[str, Numbers]) -> Verdict:
    gap = apart(found, "plain replay", "UER", "forgetting")
    return falls(gap), f"UER - plain replay {shown(gap)} points"


def tau(found: Mapping[str, Numbers]) -> Verdict:
    gap = apart(found, "UER", "UER, tau 1")
    return falls(gap), f"tau 1 - tau 0.09 {shown(gap)} points"


def prediction(found: Mapping[str, Numbers]) -> Verdict:
    gap = apart(found, "UER", "UER, cosine prediction")
    enough = None if gap is None or gap[1] is None else gap[0] <= -10
    return together([falls(gap), enough]), f"cosine - dot {shown(gap)} points"


def learns_less_at_once(found: Mapping[str, Numbers]) -> Verdict:
    gap = apart(found, "plain replay", "UER", "learned")
    return falls(gap), f"UER - plain replay {shown(gap)} points"


def newest(found: Mapping[str, Numbers]) -> Verdict:
    gap = apart(found, "plain replay", "UER", "old_errors_to_new")
    return falls(gap), f"UER - plain replay {shown(gap, 100)} points"


def numbers(found: Mapping[str, Numbers], theirs: Mapping[str, Any], n: int) -> Verdict:
    said, each = [], []
    for name, (mean, sd) in theirs.items():
        values = found[name]["final"]
        ours = interval(values)
        said.append(cell(ours, values, {"mean": mean, "sd": sd}, n))
        each.append(f"{name} {shown(ours)} ({mean:g}: {said[-1]})")
    told, counted = of_cells(said)
    return told, f"{counted}; {'; '.join(each)}"


def main(argv: Sequence[str] | None = None) -> int:
    options_of = parser(HERE, __doc__, jobs=False)
    options_of.add_argument("--seeds", type=int, nargs="+", help="by default those of the recipe")
    options_of.add_argument("--memory", type=int, nargs="+", help="rows that are kept; the findings are asked at the "
                            "first (default: the recipe's)")  # fmt: skip
    options = options_of.parse_args(argv)
    quiet()
    scale = yaml.safe_load((HERE / "recipe.yaml").read_text())[options.scale]
    seeds, memories = options.seeds or scale["seeds"], options.memory or scale["memory"]
    found = run_all(scale, seeds, memories, options)
    reference, first = expected(HERE), found[memories[0]]
    theirs = reference["numbers"].get(str(memories[0]), {})
    checks = {"beats_replay": beats_replay, "beats_reversed": beats_reversed, "forgets_less": forgets_less, "tau": tau,
              "prediction": prediction, "learns_less_at_once": learns_less_at_once, "newest": newest,
              "numbers": lambda found: numbers(found, theirs, reference["numbers"]["n"])}  # fmt: skip
    for memory, models in found.items():
        for name, kept in models.items():
            said = "  ".join(f"{key} {shown(interval(kept[key]))}" for key in ("final", "forgetting", "learned"))
            print(f"memory {memory:4}  {name:35} {said}")
    return finish(options, check(reference["findings"], checks, first, scale=options.scale), machine() | versions(),
                  {"stream": list(seeds)}, numbers={str(m): models for m, models in found.items()})  # fmt: skip


if __name__ == "__main__":
    leave(main)
