"""Just in time unlearning by Lipschitz regularisation (Foster et al., 2024)."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from vislearn.data import ForgetDataModule
from vislearn.errors import UserError
from vislearn.grades import GRADES
from vislearn.learner import Learner, full
from vislearn.method import GradientMethod
from vislearn.trainer import Trainer


class JiT(GradientMethod):
    r"""Flatten the network around the forget set: its outputs are drawn to those for noisy copies of the images.

    One pass over the forget set, one step of SGD a batch, on the sum over the images of a batch of

    .. math::
        \frac{1}{n} \sum_{i=1}^n \|f(x) - f(x_i)\|_2 / \|x - x_i\|_2,
        \qquad x_i = \mathrm{clamp}(x + \sigma \epsilon_i),

    clamped to the smallest and largest value of the batch; :math:`f(x_i)` takes no gradient. Neither labels nor the
    retain set are read. The network stays in train mode, as in the authors' code: dropout is active, and batch-norm
    statistics move, with the noisy copies too. ``train_mode=False`` holds both still.

    sigma and lr as published: vision transformers 0.8 and 1.5 for a class, 1.5 and 0.5 for a subclass, 0.5 and 0.1 for
    random rows; VGG 0.5 and 3e-4 for a class, 0.01 and 3e-4 for a subclass and random rows. The defaults are the VGG's
    for a class. The loss is a sum over images, so lr belongs to the batch size, and users report that the published
    rates destroy some models: look at the retain set.

    Reference:
        Foster, Fogarty, Schoepf, Dugue, Öztireli, Brintrup. An Information Theoretic Approach to Machine Unlearning.
        arXiv:2402.01401.

    Departures: gradients are cleared before every batch, as the algorithm says; the authors' code clears them once, so
    that every step repeats all those before it (``accumulate=True``). The published rates belong to that code, whose
    k-th step holds k gradients. An image that the clamping gives back unchanged counts 0, where the code divides by 0.

    Args:
        sigma: standard deviation of the noise, above 0, in units of the normalised images.
        lr: learning rate, the paper's eta.
        n: noisy copies of each image, at least 1.
        accumulate: add up gradients over batches, as the authors' code does.
        epochs: passes over the forget set; the paper's is 1.
        momentum: momentum of SGD.
        weight_decay: weight decay of SGD.
        batch_size: rows per batch.
        **kwargs: see :class:`vislearn.method.GradientMethod`.
    """

    needs = frozenset({"forget"})
    sums_rows = True
    labels = False
    grades = frozenset(GRADES) - {"zeroth", "hybrid"}  # differences of losses would move the noisy outputs too

    def __init__(
        self, sigma: float = 0.5, lr: float = 3e-4, n: int = 25, accumulate: bool = False, epochs: int = 1,
        momentum: float = 0.0, weight_decay: float = 0.0, batch_size: int | None = 128, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(epochs=epochs, lr=lr, momentum=momentum, weight_decay=weight_decay, batch_size=batch_size,
                         **kwargs)  # fmt: skip
        if not 0 < sigma < math.inf:
            raise UserError(f"sigma must be above 0, not {sigma:g}; the paper's for a class is --method.sigma=0.5")
        if n < 1:
            raise UserError(f"n must be at least 1, not {n}; the paper's is --method.n=25")
        if accumulate and self.grade.probes:
            raise UserError("accumulate adds up the gradients of the steps, and this --method.grade has its own; leave "
                            "one of them out")  # fmt: skip
        self.sigma, self.n, self.accumulate = sigma, n, accumulate

    def unlearn(self, model: Learner, data: ForgetDataModule, trainer: Trainer) -> Learner:
        self.report.clear()
        self._means: list[Tensor] = []
        model.zero_grad()
        unlearned = super().unlearn(model, data, trainer)
        unlearned.zero_grad()
        first, last = (self._means[i].item() for i in (0, -1))
        self.report.update(steps=len(self._means), lipschitz_first=first, lipschitz_last=last)
        if first == 0:
            self.warn("noise changes no output of this model: there was nothing to flatten")
        return unlearned

    def train_stream(self, data: ForgetDataModule) -> Iterable[Any]:
        return data.loader("forget", batch_size=self.forget_batch_size)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, _ = batch
        outputs = self(x)
        low, high = x.amin(), x.amax()
        total = torch.zeros((), device=x.device)
        for _ in range(self.n):
            noisy = (x + self.sigma * self.noise(x)).clamp(low, high)
            with torch.no_grad():
                outputs_n = self(noisy)
            total = total + slopes(outputs, outputs_n, x, noisy).sum()
        self._mean = total.detach() / self.n / len(x)
        return total / self.n

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._means.append(self._mean)

    def noise(self, x: Tensor) -> Tensor:
        """Standard normal noise for one copy of a batch."""
        return torch.randn_like(x)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        if not self.accumulate:
            optimizer.zero_grad()


def slopes(outputs: Tensor, outputs_n: Tensor, x: Tensor, x_n: Tensor) -> Tensor:
    """How fast the outputs change from images to their noisy copies, row by row: (b,), 0 where a copy is the image.

    Args:
        outputs: outputs for `x`, (b, k) or (b,).
        outputs_n: outputs for `x_n`, likewise.
        x: images (b, ...).
        x_n: their noisy copies, likewise.
    """
    change = torch.linalg.vector_norm((full(outputs) - full(outputs_n)).reshape(len(x), -1), dim=1)
    distance = torch.linalg.vector_norm((x - x_n).reshape(len(x), -1), dim=1)
    same = distance == 0
    return (change / distance.masked_fill(same, 1.0)).masked_fill(same, 0.0)
