"""A stream of three easy tasks, a small network, and strategies and a method that do little: for tests of streams."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vislearn.data import ForgetDataModule, Labels, Memory
from vislearn.learner import Learner
from vislearn.method import UnlearningMethod
from vislearn.strategy import GradientStrategy
from vislearn.tasks import TaskStream

TASKS = (range(2), range(2, 4), range(4, 7))  # the last one has three classes


class Lines(TaskStream):
    """140 training and 56 test images of 8x8 pixels and 7 classes: class c has a bright line c. A row is i % 7."""

    num_classes, channels, image_size = 7, 1, 8
    classes = ("a", "b", "c", "d", "e", "f", "g")
    mean, std = (0.3,), (0.3,)
    tasks = TASKS

    def __init__(self, batch_size: int = 16, **kwargs: Any) -> None:
        super().__init__(batch_size=batch_size, **kwargs)

    def source(self, train: bool) -> Memory:
        y = self.labels(train).targets
        x = torch.randint(0, 100, (len(y), 1, 8, 8), generator=torch.Generator().manual_seed(int(train)))
        x[torch.arange(len(y)), 0, y] += 120
        return Memory(x.to(torch.uint8))

    def labels(self, train: bool) -> Labels:
        return Labels(torch.arange(140 if train else 56) % 7, self.classes)


class Plain(ForgetDataModule):
    """The same rows without tasks."""

    num_classes, channels, image_size, classes = 7, 1, 8, Lines.classes
    mean, std = (0.3,), (0.3,)
    source, labels = Lines.source, Lines.labels


class Small(Learner):
    """Two layers with batch normalisation between them."""

    def __init__(self, num_classes: int = 7, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_classes = num_classes
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU())
        self.head = nn.Linear(16, num_classes)

    def features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def loss(self, outputs: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        return F.cross_entropy(outputs, y, reduction=reduction)


class Forgetful(GradientStrategy):
    """Trains on the rows of each task; keeps nothing, and has no unlearning of its own."""

    def __init__(self, epochs: int = 3, lr: float = 0.01) -> None:
        super().__init__(epochs=epochs, lr=lr, optimizer="adam")


class Keeping(Forgetful):
    """Keeps some rows of each task and trains on them beside those of the current one; forgets by zeroing outputs.

    Args:
        size: rows of each task that are kept, drawn at random.
    """

    keeps_rows = True

    def __init__(self, size: int = 8, epochs: int = 3, lr: float = 0.01) -> None:
        super().__init__(epochs, lr)
        self.size = size
        self.memory: dict[int, Tensor] = {}

    @property
    def rows(self) -> Tensor:
        return torch.cat([torch.empty(0, dtype=torch.int64), *self.memory.values()]).sort().values

    def learn(self, model: Learner, data: TaskStream, task: int, trainer: Any) -> Learner:
        model = super().learn(model, data, task, trainer)
        rows = data.ids("train")
        self.memory[task] = rows[torch.randperm(len(rows))[: self.size]]
        self.report = {"kept": len(self.rows)}
        return model

    def train_stream(self, data: TaskStream) -> Iterable[Any]:
        return data.loader(torch.cat([data.ids("train"), self.rows]), batch_size=self.batch_size)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x), y)

    def unlearn(self, model: Learner, data: TaskStream, tasks: Sequence[int], trainer: Any) -> Learner:
        silence(model, [c for t in tasks for c in data.tasks[t]])
        return model

    def purge(self, rows: Tensor) -> None:
        kept = {t: own[~torch.isin(own, rows)] for t, own in self.memory.items()}
        self.memory = {t: own for t, own in kept.items() if len(own)}

    def state(self) -> dict[str, Any]:
        return super().state() | {"memory": self.memory}

    def restore(self, model: Learner, data: TaskStream, state: dict[str, Any]) -> None:
        super().restore(model, data, state)
        self.memory = dict(state["memory"])


class Silence(UnlearningMethod):
    """Zeroes the outputs of the forgotten classes; reads no row."""

    needs = frozenset()

    def unlearn(self, model: Learner, data: ForgetDataModule, trainer: Any) -> Learner:
        silence(model, data.forget.held_out(Labels(torch.arange(data.num_classes), data.classes)).nonzero().flatten())
        return model


def silence(model: Any, classes: Any) -> None:
    with torch.no_grad():
        model.head.weight[classes] = 0
        model.head.bias[classes] = 0
