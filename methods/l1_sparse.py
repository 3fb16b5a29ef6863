"""Sparsity as a help in unlearning: the l1 penalty while fine-tuning, and pruning first (Jia et al., 2023)."""

from collections.abc import Iterable
from typing import Any, Literal

import lightning
import torch
from lightning import Callback, LightningModule
from torch import Tensor, nn

from vislearn.data import ForgetDataModule
from vislearn.errors import UserError
from vislearn.learner import Learner
from vislearn.method import UnlearningMethod
from vislearn.saliency import hold_outside
from vislearn.trainer import Trainer

from .fine_tune import FineTune
from .retrain import Retrain

SHRUNK = 0.1  # share of the l1 norm below which the penalty has taken the model apart


class L1Sparse(FineTune):
    r"""Fine-tune on the retain set with an l1 penalty that fades out.

    Minimises in epoch :math:`e = 0, \dots, E - 1`

    .. math::
        \mathrm{CE}(\theta_u; D_r) + \alpha (1 - e / E) \|\theta_u\|_1

    (the learner's own loss for regressors). The penalty moves every weight towards zero by about
    lr alpha (1 - e / E) / (1 - momentum) a step, whatever its size: alpha is right when that, summed over all steps, is
    of the order of the weights themselves. The paper's group searched 1e-6 to 1e-4 on CIFAR-10 with ResNet-18; the
    default of the code, 0.2, is a placeholder that destroys any network.

    Reference:
        Jia, Liu, Ram, Yao, Liu, Liu, Sharma, Liu. Model Sparsity Can Simplify Machine Unlearning. NeurIPS 2023.
        arXiv:2304.04934.

    Args:
        alpha: weight of the penalty in the first epoch, 0 or more; 0 is fine-tuning.
        penalise: "all" parameters, biases and normalisations included, as in the authors' code; or "weights", those of
            convolutions, linear layers and other tensors of two and more dimensions.
        epochs: passes over the retain set.
        lr: constant learning rate of SGD.
        **kwargs: see :class:`vislearn.method.GradientMethod`.
    """

    def __init__(
        self, alpha: float = 5e-5, penalise: Literal["all", "weights"] = "all", epochs: int = 10, lr: float = 0.01,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(epochs=epochs, lr=lr, **kwargs)
        if not 0 <= alpha < float("inf"):
            raise UserError(f"alpha is the weight of the penalty, 0 or more, not {alpha:g}; for example "
                            "--method.alpha=5e-5")  # fmt: skip
        if penalise not in ("all", "weights"):
            raise UserError(f"penalise is 'all' or 'weights', not '{penalise}' (--method.penalise)")
        self.alpha, self.penalise = alpha, penalise

    def unlearn(self, model: Learner, data: ForgetDataModule, trainer: Trainer) -> Learner:
        self.report.clear()
        before = l1_norm(self.penalised(model)).item()
        model = super().unlearn(model, data, trainer)
        after = l1_norm(self.penalised(model)).item()
        self.report.update(l1_before=before, l1_after=after)
        if after < SHRUNK * before:
            self.warn(f"the penalty left {after / before:.1%} of the l1 norm of the weights; try a smaller "
                      f"--method.alpha than {self.alpha:g}")  # fmt: skip
        return model

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        weight = self.alpha * (1 - self.current_epoch / self.epochs)
        return super().training_step(batch, batch_idx) + weight * l1_norm(self.penalised(self.model))

    def penalised(self, model: Learner) -> list[Tensor]:
        """The parameters of the penalty; frozen ones have no part in it."""
        return [p for p in model.parameters() if p.requires_grad and (self.penalise == "all" or p.ndim > 1)]


class PruneFirst(UnlearningMethod):
    r"""Set the smallest weights to zero, then unlearn what is left with another method.

    One-shot global magnitude pruning: of all weights of convolutions and linear layers together, the given share that
    is smallest in absolute value becomes zero. The method that follows may not revive them: they are zero again after
    each of its steps, and in the result.

    Reference:
        Jia, Liu, Ram, Yao, Liu, Liu, Sharma, Liu. Model Sparsity Can Simplify Machine Unlearning. NeurIPS 2023.
        arXiv:2304.04934 ("prune first, then unlearn").

    Departures: the authors go back to the weights of epoch 8 of the original's training and train the sparse network
    again before anything is to be forgotten. Only the finished original is at hand here, so neither is possible, and
    the method that follows has to repair what pruning breaks: with the paper's rate one that trains on the retain set
    can, one that only reads the forget set cannot. The authors prune convolutions alone (``prune="conv"``).

    Args:
        method: what unlearns the pruned model; fine-tuning by default.
        rate: share of the weights that become zero, in (0, 1).
        prune: "all" weights of convolutions and linear layers compete, or those of convolutions alone ("conv").
    """

    def __init__(
        self, method: UnlearningMethod | None = None, rate: float = 0.95, prune: Literal["all", "conv"] = "all"
    ) -> None:
        super().__init__()
        if not 0 < rate < 1:
            raise UserError(f"rate is the share of the weights that become zero, in (0, 1), not {rate:g}; the paper's "
                            "is --method.rate=0.95")  # fmt: skip
        if prune not in ("all", "conv"):
            raise UserError(f"prune is 'all' or 'conv', not '{prune}' (--method.prune)")
        self.method: UnlearningMethod = method or FineTune()
        if isinstance(self.method, Retrain) and not self.method.warm_start:
            raise UserError("Retrain starts from new weights, so pruning the old ones changes nothing; give another "
                            "--method.method, for example FineTune")  # fmt: skip
        self.rate, self.prune = rate, prune
        self.needs, self.labels = self.method.needs, self.method.labels  # type: ignore[misc] # those of this instance

    def check(self, model: Learner, data: ForgetDataModule) -> None:
        super().check(model, data)
        self.method.check(model, data)
        if not prunable(model, self.prune):
            raise UserError("this network has no convolution to prune; give --method.prune=all")

    def unlearn(self, model: Learner, data: ForgetDataModule, trainer: Trainer) -> Learner:
        self.report.clear()
        masks = magnitude_masks(prunable(model, self.prune), self.rate)
        zero_outside(model, masks)
        self.report.update(
            pruned=sum(int((~m).sum()) for m in masks.values()), prunable=sum(m.numel() for m in masks.values())
        )
        if not {"retain", "train"} & self.needs:
            self.warn(f"{type(self.method).__name__} reads no retain row, so nothing repairs what pruning broke")
        self.method.prepare(model, data, lambda name, make: make())  # what is kept belongs to the dense original
        hold = Hold(model, masks)
        trainer.add_callbacks(hold)
        try:
            model = self.method.unlearn(model, data, trainer)
        finally:
            trainer.callbacks = [c for c in trainer.callbacks if c is not hold]  # type: ignore[attr-defined]
        zero_outside(model, masks)  # what no optimizer made, such as noise
        for message in self.method.report.get("warnings", []):
            self.warn(message)
        self.report[type(self.method).__name__] = {k: v for k, v in self.method.report.items() if k != "warnings"}
        return model


class Hold(Callback):
    """Keeps pruned weights at zero in every optimizer of a training."""

    def __init__(self, model: nn.Module, masks: dict[str, Tensor]) -> None:
        self.model, self.masks = model, masks

    def on_train_start(self, trainer: lightning.Trainer, module: LightningModule) -> None:
        zero_outside(self.model, self.masks)
        free = {name: torch.ones_like(p, dtype=torch.bool) for name, p in self.model.named_parameters()}
        for optimizer in trainer.optimizers:
            hold_outside(optimizer, self.model, free | self.masks)


def l1_norm(parameters: Iterable[Tensor]) -> Tensor:
    """Sum of the absolute values of all entries; its gradient at 0 is 0."""
    return torch.stack([p.abs().sum() for p in parameters]).sum()


def prunable(model: nn.Module, prune: Literal["all", "conv"]) -> dict[str, Tensor]:
    """Parameter name -> weight of each convolution and, with "all", of each linear layer."""
    convolution = nn.modules.conv._ConvNd
    kinds = convolution if prune == "conv" else (convolution, nn.Linear)
    owners = dict(model.named_modules())
    return {name: p for name, p in model.named_parameters()
            if name.endswith(".weight") and isinstance(owners[name.removesuffix(".weight")], kinds)}  # fmt: skip


def magnitude_masks(weights: dict[str, Tensor], rate: float) -> dict[str, Tensor]:
    """False for the round(rate * n) of all n entries together that are smallest in absolute value; ties: the first."""
    flat = torch.cat([w.detach().abs().flatten() for w in weights.values()])
    kept = torch.ones_like(flat, dtype=torch.bool)
    kept[flat.sort(stable=True).indices[: round(rate * len(flat))]] = False
    parts = kept.split([w.numel() for w in weights.values()])
    return {name: part.view(w.shape) for (name, w), part in zip(weights.items(), parts, strict=True)}


@torch.no_grad()
def zero_outside(model: nn.Module, masks: dict[str, Tensor]) -> None:
    """Set to zero what the masks leave out."""
    for name, p in model.named_parameters():
        if name in masks:
            p.masked_fill_(~masks[name].to(p.device), 0)
