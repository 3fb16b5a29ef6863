"""Gradient ascent on the forget set."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from vislearn.data import ForgetDataModule
from vislearn.errors import UserError
from vislearn.learner import Learner
from vislearn.method import GradientMethod
from vislearn.trainer import Trainer


class GradientAscent(GradientMethod):
    r"""Climb the loss of the forget set.

    Minimises :math:`-\mathrm{CE}(\theta_u; D_f)` with SGD; weight decay still pulls towards zero, as in the code of
    Jia et al. The loss has no lower bound: with a large rate or many epochs the model is destroyed, which the bench
    names rather than hides. With `cap` set, rows whose loss has reached it climb no further:
    :math:`-\min(\mathrm{CE}, \mathrm{cap})`, the mean over the rows of a batch.

    The authors' 5 epochs at 1e-4 are for one class of CIFAR-10; random rows need a larger rate, which has to be
    searched (the authors suggest 5e-4 to 1e-3). `report` holds the mean loss of the forget set in each epoch, as the
    steps see it: in train mode a batch of one class has batch-norm statistics of its own, under which its loss is high
    from the start, and so is what a cap is compared with; ``train_mode=False`` has the loss of evaluation.

    Reference:
        Graves et al., Amnesiac Machine Learning, AAAI 2021; Thudi et al., Unrolling SGD, EuroS&P 2022; settings as in
        Jia et al., NeurIPS 2023, arXiv:2304.04934 (5 epochs; the rate has to be searched in 1e-6 to 1e-1).

    Args:
        cap: loss of a row from which on it climbs no further; none by default. For classifiers ln(number of classes)
            is the loss of guessing.
        epochs: passes over the forget set.
        lr: constant learning rate of SGD.
        **kwargs: see :class:`vislearn.method.GradientMethod`.
    """

    needs = frozenset({"forget"})
    last: Tensor

    def __init__(self, cap: float | None = None, epochs: int = 5, lr: float = 1e-4, **kwargs: Any) -> None:
        super().__init__(epochs=epochs, lr=lr, **kwargs)
        if cap is not None and not cap > 0:
            raise UserError(f"cap is the loss from which on a row climbs no further, above 0, not {cap:g}; for ten "
                            "classes --method.cap=2.3 is that of guessing")  # fmt: skip
        self.cap = cap
        self.sums: list[Tensor] = []  # of each batch of an epoch: loss and rows

    def unlearn(self, model: Learner, data: ForgetDataModule, trainer: Trainer) -> Learner:
        self.report.clear()
        self.sums.clear()
        losses: list[float] = []
        self.report["forget_loss"] = losses
        model = super().unlearn(model, data, trainer)
        if len(losses) > 1 and losses[-1] <= losses[0]:
            self.warn(f"the loss of the forget set did not rise ({losses[0]:.3g} in the first epoch, {losses[-1]:.3g} "
                      f"in the last); try a larger --method.lr than {self.lr:g}")  # fmt: skip
        return model

    def train_stream(self, data: ForgetDataModule) -> Iterable[Any]:
        return data.loader("forget", batch_size=self.forget_batch_size)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x_f, y_f = batch
        losses = self.model.loss(self(x_f), y_f, reduction="none")
        self.last = torch.stack([losses.detach().sum(), torch.ones_like(losses).sum()])
        return ascent(losses, self.cap)

    def on_train_batch_end(self, *args: Any) -> None:
        self.sums.append(self.last)

    def on_train_epoch_end(self) -> None:
        total, rows = torch.stack(self.sums).sum(0).tolist()
        self.report["forget_loss"].append(total / rows)
        self.sums.clear()


def ascent(losses: Tensor, cap: float | None = None) -> Tensor:
    """What climbing minimises: minus the mean of the losses (b,) of the rows, each cut off at the cap."""
    return -(losses if cap is None else losses.clamp(max=cap)).mean()
