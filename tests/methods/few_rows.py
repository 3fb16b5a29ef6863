"""A few rows, a linear learner and a Trainer for the preference objectives: what a step does can be worked out."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vislearn.data import ForgetDataModule, Labels, Memory
from vislearn.learner import Learner
from vislearn.trainer import Trainer

CLASSES = 3


class FewRows(ForgetDataModule):
    """60 rows of 4 features: the class is the largest of the first three, the value their sum with some noise."""

    num_classes, channels, image_size, classes = CLASSES, 1, 2, ("a", "b", "c")

    def __init__(self, values: bool = False, **kwargs: Any) -> None:
        super().__init__(**{"batch_size": 8, "val_fraction": 0.2, "augment": False} | kwargs)
        self.values = values

    def rows(self, train: bool) -> Tensor:
        return torch.randn(60 if train else 12, 4, generator=torch.Generator().manual_seed(int(train)))

    def source(self, train: bool) -> Memory:
        return Memory(self.rows(train))

    def labels(self, train: bool) -> Labels:
        x = self.rows(train)
        if self.values:
            noise = torch.randn(len(x), generator=torch.Generator().manual_seed(7))
            return Labels(x.sum(1) + 0.1 * noise, ())
        return Labels(x[:, :CLASSES].argmax(1), self.classes)


class Linear(Learner):
    """One linear layer, started well."""

    def __init__(self, values: bool = False, norm: bool = False) -> None:
        super().__init__()
        self.values = values
        self.norm = nn.BatchNorm1d(4) if norm else nn.Identity()
        self.layer = nn.Linear(4, 1 if values else CLASSES)
        with torch.no_grad():
            self.layer.bias.zero_()
            self.layer.weight.copy_(torch.ones(1, 4) if values else 4 * torch.eye(CLASSES, 4))

    @property
    def is_classifier(self) -> bool:  # type: ignore[override]
        return not self.values

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(self.norm(x))
        return out.squeeze(1) if self.values else out

    def features(self, x: Tensor) -> Tensor:
        return x

    def loss(self, outputs: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        if self.values:
            return F.mse_loss(outputs, y, reduction=reduction)
        return F.cross_entropy(outputs, y, reduction=reduction)


def few_rows(rule: Any, **kwargs: Any) -> FewRows:
    data = FewRows(forget=rule, **kwargs)
    data.setup()
    return data


def trainer(**kwargs: Any) -> Trainer:
    return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                   enable_model_summary=False, max_epochs=1, **kwargs)  # fmt: skip


def unlearn(method: Any, model: Learner, data: FewRows, check: bool = True, **kwargs: Any) -> Learner:
    """What the bench does with a method, on a copy of the model."""
    if check:
        method.check(model, data)
    torch.manual_seed(0)
    with data.reading(method.needs):
        return method.unlearn(copy.deepcopy(model), data, trainer(**kwargs))


def probabilities(model: Learner, data: FewRows, name: str = "forget") -> Tensor:
    """Probability of the label of every row of a set, (n,)."""
    x, y = next(iter(data.loader(name, train=False, batch_size=1000)))
    with torch.no_grad():
        return model(x).softmax(1).gather(1, y[:, None]).squeeze(1)
