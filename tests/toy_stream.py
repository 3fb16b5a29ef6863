"""Methods on batches that a test names, and learners around any network: for steps worked out by hand."""

from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from vislearn.learner import Learner
from vislearn.trainer import Trainer


class InOrder(lightning.LightningDataModule):
    """Sets of rows, each read front to back, where a method asks a data module for a loader."""

    augment = False

    def __init__(self, batch_size: int, **sets: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.loaders = {name: DataLoader(TensorDataset(*rows), batch_size) for name, rows in sets.items()}

    def loader(self, name: str, *args: Any, **kwargs: Any) -> Any:
        return self.loaders[name]

    def train_dataloader(self) -> Any:
        return self.trainer.lightning_module.train_stream(self)


class Wrapped(Learner):
    """A learner that is the given network, with cross-entropy."""

    def __init__(self, net: nn.Module, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    features = forward

    def loss(self, outputs: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        return F.cross_entropy(outputs, y, reduction=reduction)


class Weighted(Wrapped):
    """The loss of a row is its output times its target: a target of 0 gives no gradient."""

    def loss(self, outputs: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        losses = outputs.squeeze(1) * y
        return losses if reduction == "none" else losses.mean()


def line(*weights: float, bias: float | None = None) -> Weighted:
    """A linear unit with these weights."""
    unit = nn.Linear(len(weights), 1, bias=bias is not None)
    with torch.no_grad():
        unit.weight.copy_(torch.tensor([weights]))
        if bias is not None:
            unit.bias.fill_(bias)
    return Weighted(unit)


def taught(model: Learner, x: Tensor, y: Tensor) -> Learner:
    """The same model, trained until it knows these rows."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        model.loss(model(x), y).backward()
        optimizer.step()
    return model


def quiet_trainer(**kwargs: Any) -> Trainer:
    return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                   enable_model_summary=False, **{"max_epochs": 1, **kwargs})  # fmt: skip
