"""JiT against the authors' code: one pass with its noise."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from toy_stream import Wrapped
from vislearn.methods.jit import JiT

from vislearn.datamodules import Digits
from vislearn.forget import ClassForget
from vislearn.trainer import Trainer

from .harness import Case, of_kind


class Stored(Wrapped):
    """A case's network; its loss is not to be asked for."""

    def loss(self, outputs: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        raise AssertionError("no label is read")


class Recorded(JiT):
    """JiT that takes a case's batches and noise, in their order."""

    def __init__(self, case: Case, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        x, size = case["x"], case.meta["hyperparameters"]["batch_size"]
        self.batches = DataLoader(TensorDataset(x, torch.zeros(len(x))), size)
        self.recorded: Iterator[Tensor] = (case[name] for name in sorted(case.arrays) if name.startswith("noise/"))

    def train_stream(self, data: Any) -> Any:
        return self.batches

    def noise(self, x: Tensor) -> Tensor:
        return next(self.recorded)


@of_kind("jit_lipschitz")
def test_one_pass(case: Case) -> None:
    h = case.meta["hyperparameters"]
    method = Recorded(case, sigma=h["sigma"], lr=h["lr"], n=h["n_samples"], accumulate=True)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                      enable_model_summary=False, max_epochs=1)  # fmt: skip
    unlearned = method.unlearn(Stored(case.network()), Digits(forget=ClassForget([3])), trainer)
    assert next(method.recorded, None) is None, "all of the noise was used"
    for name, p in unlearned.net.named_parameters():
        case.close("weights", p, case[f"final/{case.stored(name)}"], name)
