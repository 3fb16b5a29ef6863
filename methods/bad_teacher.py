"""Bad teaching (Chundawat et al., 2023)."""

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from vislearn.data import ForgetDataModule
from vislearn.distill import divergence
from vislearn.errors import UserError
from vislearn.learner import Learner
from vislearn.loader import join_sets
from vislearn.method import GradientMethod
from vislearn.networks import without_public_weights
from vislearn.trainer import Trainer


class BadTeacher(GradientMethod):
    r"""Distil an untrained network on the forget set and the original model on the retain set.

    Minimises, over rows of the forget set and of a random share of the retain set,

    .. math::
        u\, \mathrm{KL}(T_d(x) \,\|\, \theta_u(x)) + (1 - u)\, \mathrm{KL}(T_s(x) \,\|\, \theta_u(x)),

    where :math:`u` is 1 on the forget set, :math:`T_s` is the original model and :math:`T_d` a network with fresh
    random weights, both in eval mode. Softmax outputs at `temperature`; no label is read. Regressors are given the
    Gaussian KL, :math:`(T(x) - \theta_u(x))^2 / (2 \sigma^2)`.

    Reference:
        Chundawat, Tarun, Mandal, Kankanhalli. Can Bad Teaching Induce Forgetting? AAAI 2023. arXiv:2205.08096.
        Settings as in the benchmark of SSD (Foster et al., AAAI 2024).

    Departures: KL is summed over classes, where the authors' code and the benchmark take the mean, which makes it
    smaller by the number of classes (``class_mean=True``); Adam hardly notices. A backbone with public weights is
    untrained in :math:`T_d`. The Gaussian KL is ours. ``batches="paired"`` is the baseline of SCRUB's code, which has
    temperature 4, retain_fraction 1, weight_decay 5e-4 and lr 1e-3 (1 epoch, batches of 128 and 512) or 5e-5 (10
    epochs, 128 and 16); there its weights can be left over from another method, here they are 1. The corrective
    benchmark has optimizer sgd, lr 0.025, retain_fraction 1 and ``class_mean=True``.

    Args:
        temperature: of the softmax of teachers and model, above 0.
        sigma: standard deviation that the Gaussian KL gives regressors, above 0, in the unit of the targets.
        batches: `mixed` shuffles both sets into one pass, in which each row weighs the same; `paired` lays a batch of
            the forget set, cycling, beside each of the retain set: the terms weigh the same and carry a factor T^2.
        class_mean: divide the divergence of classifiers by the number of classes.
        epochs: passes over the rows, for `paired` over those of the retain set.
        lr: learning rate.
        weight_decay: weight decay.
        batch_size: rows per batch; of `paired`, of the retain set.
        retain_fraction: share of the retain set that is distilled, drawn once, in (0, 1].
        optimizer: `adam` or `sgd`.
        **kwargs: see :class:`vislearn.method.GradientMethod`.
    """

    labels = False
    incompetent: Learner

    def __init__(
        self,
        temperature: float = 1.0,
        sigma: float = 1.0,
        batches: Literal["mixed", "paired"] = "mixed",
        class_mean: bool = False,
        epochs: int = 1,
        lr: float = 1e-4,
        weight_decay: float = 0.0,
        batch_size: int | None = 256,
        retain_fraction: float = 0.3,
        optimizer: Literal["sgd", "adam"] = "adam",
        **kwargs: Any,
    ) -> None:
        super().__init__(epochs=epochs, lr=lr, weight_decay=weight_decay, batch_size=batch_size,
                         retain_fraction=retain_fraction, optimizer=optimizer, **kwargs)  # fmt: skip
        for name, value in (("temperature", temperature), ("sigma", sigma)):
            if not 0 < value < math.inf:
                raise UserError(f"{name} must be above 0, not {value:g}; the default is --method.{name}=1")
        if batches not in ("mixed", "paired"):
            raise UserError(f"batches is 'mixed' or 'paired', not '{batches}' (--method.batches)")
        self.temperature, self.sigma, self.batches, self.class_mean = temperature, sigma, batches, class_mean

    def unlearn(self, model: Learner, data: ForgetDataModule, trainer: Trainer) -> Learner:
        self.report.clear()
        with without_public_weights():
            self.incompetent = model.fresh().eval().requires_grad_(False)  # T_d
        self.incompetent.to(next(model.parameters()).dtype)
        try:
            return super().unlearn(model, data, trainer)
        finally:
            del self.incompetent

    def train_stream(self, data: ForgetDataModule) -> Iterable[Any]:
        if self.batches == "paired":
            return super().train_stream(data)
        ids, ids_f = data.ids("retain"), data.ids("forget")
        kept = ids[torch.randperm(len(ids))[: max(1, int(self.retain_fraction * len(ids)))]]
        self.report["rows_retain"] = len(kept)
        rows = data.loader(torch.cat([ids_f, kept.sort().values]), batch_size=self.batch_size)
        return join_sets(rows, forget=ids_f, retain=kept)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x_f, _), (x_r, _) = batch["forget"], batch["retain"]
        pairs = [(t, x) for t, x in ((self.incompetent, x_f), (self.original, x_r)) if len(x)]
        if self.batches == "paired":
            return sum((self.divergence(t(x), self(x)) for t, x in pairs), torch.zeros((), device=x_r.device))
        # one pass of the model over all rows: their batch-norm statistics are common, as in the authors' code
        teacher = torch.cat([t(x) for t, x in pairs])
        return self.divergence(teacher, self(torch.cat([x for _, x in pairs])))

    def divergence(self, teacher: Tensor, outputs: Tensor) -> Tensor:
        """How far the model's outputs are from a teacher's."""
        value = divergence(self.model, teacher, outputs, self.temperature, self.sigma)
        if not self.model.is_classifier:
            return value
        scale = 1.0 if self.batches == "paired" else self.temperature**2
        return value / (scale * outputs.shape[1] if self.class_mean else scale)
