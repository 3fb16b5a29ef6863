"""A stream of three tasks of two classes, and what tests of strategies do with it step by step."""

from collections.abc import Sequence
from typing import Any

import torch
from lightning import seed_everything
from torch import Tensor
from toy_stream import quiet_trainer

from vislearn.data import Labels, Memory
from vislearn.learner import Classifier, Learner
from vislearn.strategy import Strategy
from vislearn.tasks import TaskStream

PER_CLASS, CLASSES = 12, 6


class Blocks(TaskStream):
    """72 training and 24 test images of 8x8 pixels; class c has a bright block of its own. A row is i % 6."""

    num_classes, channels, image_size, classes = CLASSES, 1, 8, tuple("abcdef")
    mean, std = (0.3,), (0.3,)
    tasks = (range(2), range(2, 4), range(4, 6))

    def __init__(self, batch_size: int = 8, **kwargs: Any) -> None:
        super().__init__(batch_size=batch_size, val_fraction=0.0, **kwargs)

    def labels(self, train: bool) -> Labels:
        return Labels(torch.arange(CLASSES * (PER_CLASS if train else 4)) % CLASSES, self.classes)

    def source(self, train: bool) -> Memory:
        y = self.labels(train).targets
        x = torch.randint(0, 90, (len(y), 1, 8, 8), generator=torch.Generator().manual_seed(int(train)))
        for c in range(CLASSES):
            i, j = 4 * (c // 3), 3 * (c % 3)
            x[y == c, :, i : i + 4, j : j + 3] += 120
        return Memory(x.to(torch.uint8))


def stream(**kwargs: Any) -> Blocks:
    data = Blocks(**kwargs)
    data.setup()
    return data


def classifier(arch: str = "mlp", seed: int = 1, **kwargs: Any) -> Classifier:
    seed_everything(seed, verbose=False)
    return Classifier(arch, num_classes=CLASSES, in_channels=1, image_size=8, **kwargs)


def lesson(strategy: Strategy, data: Blocks, task: int) -> Blocks:
    """What a strategy is given to learn a task from."""
    rows = data.task_rows(task)
    return data.view({"train": rows, "retain": rows}, also=strategy.rows)


def learn(strategy: Strategy, model: Learner, data: Blocks, tasks: Sequence[int], seed: int = 3) -> Learner:
    """Learn tasks in turn; each from a seed of its own, as after a restart."""
    for task in tasks:
        seed_everything(seed + task, verbose=False)
        model = strategy.learn(model, lesson(strategy, data, task), task, quiet_trainer())
        strategy.note_learned(task)
    return model


def begun(strategy: Any, model: Learner, data: Blocks, setting: Any = "task") -> Any:
    strategy.check(model, data, setting)
    strategy.begin(model, data, setting)
    return strategy


def accuracy(strategy: Strategy, model: Learner, data: Blocks, task: int, setting: str = "task") -> float:
    x, y = next(iter(data.loader(data.task_rows(task, "test"), train=False, batch_size=99, held_out=True)))
    with torch.no_grad():
        outputs = strategy.outputs(model, x, data, task if setting == "task" else None)
    target = data.within(y, task) if setting == "task" else y
    return (outputs.argmax(1) == target).float().mean().item()


def rows_in(state: Any) -> set[int]:
    """Every number in the integer tensors of a state."""
    if isinstance(state, dict):
        return set().union(*(rows_in(v) for v in state.values()))
    return set(state.tolist()) if isinstance(state, Tensor) and state.dtype == torch.int64 else set()


def same(one: Learner, other: Learner) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return all(torch.equal(a[k], b[k]) for k in a)
