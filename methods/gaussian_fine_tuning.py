"""Gaussian fine-tuning: the forget set is given values drawn from the spread of all targets (Tarun et al., 2023)."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from vislearn.data import ForgetDataModule
from vislearn.errors import UserError
from vislearn.learner import Learner, Regressor
from vislearn.loader import join_sets
from vislearn.method import GradientMethod
from vislearn.trainer import Trainer

NARROW = 0.01  # least probability outside the band that draws may be kept to


class GaussianAmnesiac(GradientMethod):
    r"""Give every row to forget a value at random, once, and go on training on everything.

    With :math:`\mu` and :math:`\sigma` the mean and the standard deviation (n - 1) of the targets of all of D,

    .. math::
        \tilde y \sim N(\mu, \sigma^2) \text{ for } D_f, \qquad
        \min_\theta \ell(\theta_u; \{(x, \tilde y)\}_{D_f} \cup D_r),

    with :math:`\ell` the learner's own loss, in shuffled batches that mix both sets. A share of the draws falls where
    the forgotten values are, and some where no target is; `report` says how many.

    Reference:
        Tarun, Chundawat, Mandal, Kankanhalli. Deep Regression Unlearning. ICML 2023. arXiv:2210.08196 (its Gaussian
        amnesiac learning). Settings of the authors' run on AgeDB; on text they take 5 epochs.

    Departures: none with the defaults. `clip` and `exclude_band` are ours.

    Args:
        clip: cut the draws to the range of the training targets.
        exclude_band: draw again what falls between the least and the largest target of the forget set.
        epochs: passes over both sets.
        lr: learning rate.
        batch_size: rows per batch.
        optimizer: `adam` or `sgd`.
        weight_decay: weight decay.
        **kwargs: see :class:`vislearn.method.GradientMethod`.
    """

    supports = Regressor
    scenarios = frozenset({"subclass", "random"})  # values have no classes

    def __init__(
        self, clip: bool = False, exclude_band: bool = False, epochs: int = 1, lr: float = 1e-3,
        batch_size: int | None = 256, optimizer: Literal["sgd", "adam"] = "adam", weight_decay: float = 0.0,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(epochs=epochs, lr=lr, batch_size=batch_size, optimizer=optimizer, weight_decay=weight_decay,
                         **kwargs)  # fmt: skip
        self.clip, self.exclude_band = clip, exclude_band

    def check(self, model: Learner, data: ForgetDataModule) -> None:
        super().check(model, data)
        y, y_f = self.targets(data)
        if self.exclude_band and (left := probability_outside(y, y_f)) < NARROW:
            raise UserError(f"the forget set spans all but {left:.1%} of the distribution that values are drawn from, "
                            "so nothing is left to draw; leave out --method.exclude_band")  # fmt: skip

    def unlearn(self, model: Learner, data: ForgetDataModule, trainer: Trainer) -> Learner:
        self.report.clear()
        return super().unlearn(model, data, trainer)

    def targets(self, data: ForgetDataModule) -> tuple[Tensor, Tensor]:
        """Targets of D and of the forget set."""
        return training_targets(data), data.observed(train=True).targets[data.ids("forget")].double()

    def train_stream(self, data: ForgetDataModule) -> Iterable[Any]:
        forget, retain = data.ids("forget"), self.retain_loader(data).ids
        loader = data.loader(torch.cat([forget, retain]), batch_size=self.batch_size)
        y, y_f = self.targets(data)
        drawn = self.draw(y, y_f)
        loader.targets = loader.targets.clone()
        loader.targets[forget] = drawn.to(loader.targets)
        return join_sets(loader, forget=forget, retain=retain)

    def draw(self, y: Tensor, y_f: Tensor) -> Tensor:
        """New values of the forget set, given the targets of D and its own."""
        mean, std = moments(y)
        if not std.any():
            self.warn(f"all training targets are {float(y.flatten()[0]):g}: the values drawn for the forget set are "
                      "the true ones")  # fmt: skip
        drawn = gaussian_targets(y, torch.randn(y_f.shape, dtype=torch.float64))
        low, high = y_f.min(), y_f.max()
        while self.exclude_band and (again := (drawn >= low) & (drawn <= high)).any():
            drawn[again] = gaussian_targets(y, torch.randn(y_f.shape, dtype=torch.float64))[again]
        outside = (drawn < y.min()) | (drawn > y.max())
        if self.clip:
            drawn = drawn.clamp(y.min(), y.max())
        self.report.update(
            mean=float(mean.mean()), std=float(std.mean()),
            in_band=float(((drawn >= low) & (drawn <= high)).double().mean()),
            out_of_range=float(outside.double().mean()), clipped=self.clip,
        )  # fmt: skip
        return drawn

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = (torch.cat(parts) for parts in zip(*batch.values(), strict=True))
        return self.model.loss(self(x), y)


def training_targets(data: ForgetDataModule) -> Tensor:
    """Targets of D in float64; refuses those that are not finite."""
    y = data.observed(train=True).targets[data.ids("train")].double()
    broken = int((~torch.isfinite(y)).sum())
    if broken:
        raise UserError(f"{broken} of {len(y)} training targets are not finite; mend the labels of these data (--data)")
    return y


def moments(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (n - 1) of targets (n,), of each output of (n, k)."""
    return y.double().mean(0), y.double().std(0)


def gaussian_targets(y: Tensor, draws: Tensor) -> Tensor:
    """mean(y) + std(y) draws: targets y (n,) of D, standard normal draws (m,); or (n, k) and (m, k). Float64."""
    mean, std = moments(y)
    return mean + std * draws.double()


def probability_outside(y: Tensor, y_f: Tensor) -> float:
    """Probability that a draw is not between the least and the largest target y_f of the forget set."""
    mean, std = moments(y)
    if not std.all():
        return 0.0
    ends = torch.stack([(end - mean) / std for end in (y_f.min(), y_f.max())])
    below, upto = torch.special.ndtr(ends)
    return float((1 - (upto - below)).min())
