"""SalUn and random labels against the authors' code, before and after the fix of the mask."""

from typing import Any

import pytest
import torch
from lightning import LightningDataModule
from torch import Tensor
from toy_stream import Wrapped
from vislearn.methods.random_labels import OneAfterTheOther
from vislearn.methods.salun import SalUn

from vislearn import saliency
from vislearn.learner import Learner
from vislearn.trainer import Trainer

from .harness import Case, of_kind, rows


class AsAsked(LightningDataModule):
    """Gives what the module in training asks for."""

    def train_dataloader(self) -> Any:
        module: Any = self.trainer.lightning_module  # type: ignore[union-attr]
        return module.train_stream(self)


def in_order(case: Case, name: str) -> list[tuple[Tensor, Tensor]]:
    x = case[f"x_{name}"]
    return list(rows(x, case[f"y_{name}"], torch.arange(len(x)), case.meta["hyperparameters"]["batch_size"]))


def under_net(arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"net.{name}": tensor for name, tensor in arrays.items()}


@of_kind("saliency_mask")
def test_saliency_masks(case: Case) -> None:
    scores = saliency.scores(Wrapped(case.network()), in_order(case, "forget"))
    for name, theirs in under_net(case.under("grad_accum.")).items():
        case.close("grad_accum", scores[name], theirs.abs(), name)
    ratios = case.meta["hyperparameters"]["ratios"]
    assert ratios
    for ratio in ratios:
        masks = saliency.masks(scores, ratio)
        theirs = under_net(case.under(f"mask_{ratio}."))
        assert masks.keys() == theirs.keys()
        for name, mask in masks.items():
            case.close("mask", mask.long(), theirs[name], f"{ratio} {name}")
        assert sum(int(m.sum()) for m in masks.values()) == case.meta["hyperparameters"]["kept"][str(ratio)]


class Recorded(SalUn):
    """SalUn with the rows, the random labels and the mask of a case."""

    def __init__(self, case: Case, **kwargs: Any) -> None:
        h = case.meta["hyperparameters"]
        super().__init__(
            epochs=h["epochs"], lr=h["lr"], momentum=h["momentum"], weight_decay=h["weight_decay"], **kwargs
        )
        self.case = case
        self.labels_left = [y for each in case["random_labels"] for y in each.split(h["batch_size"])]

    def train_stream(self, data: Any) -> Any:
        return OneAfterTheOther(forget=in_order(self.case, "forget"), retain=in_order(self.case, "retain"))

    def saliency_masks(self, model: Learner, data: Any) -> dict[str, Tensor]:
        return {name: mask.bool() for name, mask in under_net(self.case.under("mask.")).items()}

    def relabel(self, y: Tensor, classes: int) -> Tensor:
        return self.labels_left.pop(0)


@of_kind("random_label_epoch")
@pytest.mark.parametrize(
    ("prefix", "options"),
    [("theta_masked.", {"masking": "update"}), ("theta_masked_legacy.", {"masking": "gradient"}),
     ("theta_unmasked.", {"saliency": 1.0})],
    ids=["since the fix", "before the fix", "no mask"],
)  # fmt: skip
def test_random_label_epochs(case: Case, prefix: str, options: dict[str, Any]) -> None:
    trainer = Trainer(accelerator="cpu", precision="64-true", logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    method: Any = Recorded(case, **options)
    unlearned = method.unlearn(Wrapped(case.network()), AsAsked(), trainer)
    assert not method.labels_left
    theirs = under_net(case.under(prefix))
    for name, p in unlearned.named_parameters():
        case.close("theta", p, theirs[name], f"{prefix}{name}")
