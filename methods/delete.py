"""DELETE: distillation with the forgotten class masked out (Zhou et al., 2025)."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from vislearn.data import ForgetDataModule
from vislearn.distill import kl
from vislearn.learner import Classifier, Learner
from vislearn.method import GradientMethod, scenario
from vislearn.trainer import Trainer


class DELETE(GradientMethod):
    r"""Distil, on the forget set alone, what the original model says when a row's own class is no possible answer.

    With :math:`m` the softmax of the original model's logits whose entry at the label :math:`y` is set to
    :math:`-\infty`, and :math:`q` the softmax of the model's own,

    .. math::
        L = \mathrm{KL}(m \,\|\, q) = -\log(1 - q_y) + \mathrm{KL}(m \,\|\, q_{\setminus y}),

    with :math:`q_{\setminus y}` the outputs over the other classes, renormalised. The first term forgets the class,
    the second holds the relations of the other classes where they are: neither needs the retain set. Each row's own
    label is masked, so with several classes to forget a row of one may come out as another.

    Every row of the forget set ends up wrong. That is the aim for whole classes; a model retrained without a random
    tenth of the rows still gets most of them right.

    Reference:
        Zhou, Zheng, Mo, Lu, Lin, Zheng. Decoupled Distillation to Erase: A General Unlearning Method for Any
        Class-centric Tasks. CVPR 2025. arXiv:2503.23751.

    Departures: none from the authors' code, whose mask is -1e10. Settings are those of its command for CIFAR-10 and
    ResNet-18; its files set lr to 1e-4 there and to 5e-5 on CIFAR-100. It can keep batch-norm statistics fixed; that
    is ``train_mode=False``, which here also turns dropout off.

    Args:
        epochs: passes over the forget set.
        lr: constant learning rate.
        weight_decay: weight decay.
        batch_size: rows per batch.
        **kwargs: see :class:`vislearn.method.GradientMethod`.
    """

    needs = frozenset({"forget"})
    supports = Classifier

    def __init__(
        self, epochs: int = 20, lr: float = 1e-3, weight_decay: float = 0.0, batch_size: int | None = 128, **kwargs: Any
    ) -> None:
        super().__init__(epochs=epochs, lr=lr, weight_decay=weight_decay, batch_size=batch_size, **kwargs)

    def unlearn(self, model: Learner, data: ForgetDataModule, trainer: Trainer) -> Learner:
        self.report.clear()
        if scenario(data) != "class":
            self.warn("the forget set is no whole class: DELETE makes its rows wrong, and a retrained model would get "
                      "many of them right")  # fmt: skip
        return super().unlearn(model, data, trainer)

    def train_stream(self, data: ForgetDataModule) -> Iterable[Any]:
        return data.loader("forget", batch_size=self.forget_batch_size)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x_f, y_f = batch
        return masked_distillation(self.original(x_f), self(x_f), y_f)


def masked_distillation(teacher: Tensor, student: Tensor, y: Tensor) -> Tensor:
    """Mean over rows of KL(softmax of the teacher's logits without the class y || softmax of the student's).

    Args:
        teacher: (n, k) logits.
        student: (n, k) logits of the same rows.
        y: (n,) the classes that are masked.
    """
    return kl(teacher.scatter(1, y[:, None], -torch.inf), student)
