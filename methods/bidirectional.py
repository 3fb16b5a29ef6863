"""Bidirectional logit distillation: towards a teacher, and away from what only the student says."""

import math
from typing import Any, Literal

from torch import Tensor

from vislearn.data import ForgetDataModule
from vislearn.distill import kl
from vislearn.errors import UserError
from vislearn.learner import Classifier, Learner
from vislearn.method import GradientMethod, scenario
from vislearn.trainer import Trainer


class BidirectionalDistillation(GradientMethod):
    r"""Imitate a teacher that does not know the forgotten class, and suppress what the teacher would not say.

    On the retain set the teacher is the original model with logits :math:`z`; on the forget set its logits
    :math:`z'` have the row's own class lowered to the lowest (or the mean) of the others. With
    :math:`\mathrm{KL}_T(p \,\|\, q) = T^2\, \mathrm{KL}(\mathrm{softmax}(p / T) \,\|\, \mathrm{softmax}(q / T))` and
    the model's logits :math:`s`,

    .. math::
        L = \alpha\, \mathrm{KL}_T(z \,\|\, s; D_r)
          + (1 - \beta)\, \mathrm{KL}_T(z' \,\|\, s; D_f) + \beta\, \mathrm{KL}_T(s \,\|\, z'; D_f).

    The first two terms imitate: the model has to cover all that the teacher finds likely. The last suppresses: it is
    largest where the model is sure of a class that the teacher has lowered. Each term is 0 or more and is 0 where model
    and teacher agree, so unlike ascent the loss has a minimum at which unlearning comes to rest. Every row of the
    forget set ends up wrong, which is the aim for whole classes.

    Reference:
        The two directions are those of Zhong, Liu, Zhu. Harmonizing Multi-Objective LLM Unlearning via Unified Domain
        Representation and Bidirectional Logit Distillation. 2026. arXiv:2604.15482. Lowered logits as in DELETE, Zhou
        et al., CVPR 2025, arXiv:2503.23751.

    Departures: the paper is about language models, and this is our own form of its idea for classifiers, written
    without its equations and settings. From the paper: a teacher of the same weights is told what it must not know,
    the student imitates the teacher's likely answers, and its own sure answers that are not the teacher's are pushed
    down. Ours: an image has no instruction, so the label says what is lowered; the two directions of KL in the place of
    its losses on the largest logits of teacher and student, over all classes; the weights and all defaults.

    Args:
        alpha: weight of the retain set's term, 0 or more.
        beta: share of suppression in the forget set's terms, in [0, 1].
        temperature: T, above 0.
        lowered_to: the logit of the forgotten class in the teacher: the `min` or the `mean` of the others.
        epochs: passes over the retain set; batches of the forget set cycle beside it.
        lr: constant learning rate.
        weight_decay: weight decay.
        **kwargs: see :class:`vislearn.method.GradientMethod`.
    """

    supports = Classifier

    def __init__(
        self,
        alpha: float = 1.0,
        beta: float = 0.5,
        temperature: float = 1.0,
        lowered_to: Literal["min", "mean"] = "min",
        epochs: int = 5,
        lr: float = 0.01,
        weight_decay: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(epochs=epochs, lr=lr, weight_decay=weight_decay, **kwargs)
        if not 0 <= alpha < math.inf:
            raise UserError(f"alpha must be 0 or more, not {alpha:g}; equal weights are --method.alpha=1")
        if not 0 <= beta <= 1:
            raise UserError(f"beta lies in [0, 1], not {beta:g}; both directions alike are --method.beta=0.5")
        if not 0 < temperature < math.inf:
            raise UserError(f"temperature must be above 0, not {temperature:g}; the default is --method.temperature=1")
        if lowered_to not in ("min", "mean"):
            raise UserError(f"lowered_to is 'min' or 'mean', not '{lowered_to}' (--method.lowered_to)")
        self.alpha, self.beta, self.temperature, self.lowered_to = alpha, beta, temperature, lowered_to

    def check(self, model: Learner, data: ForgetDataModule) -> None:
        super().check(model, data)
        if data.num_classes < 3:
            raise UserError(f"{type(self).__name__} keeps the relations of the classes that remain, and with "
                            f"{data.num_classes} classes there are none; use --method=DELETE")  # fmt: skip

    def unlearn(self, model: Learner, data: ForgetDataModule, trainer: Trainer) -> Learner:
        self.report.clear()
        if scenario(data) != "class":
            self.warn("the forget set is no whole class: its rows become wrong, and a retrained model would get many "
                      "of them right")  # fmt: skip
        return super().unlearn(model, data, trainer)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (x_f, y_f), (x_r, _) = batch["forget"], batch["retain"]
        t = self.temperature
        target, outputs_f = lowered(self.original(x_f), y_f, self.lowered_to), self(x_f)
        imitate, suppress = kl(target, outputs_f, t), kl(outputs_f, target, t)
        return self.alpha * kl(self.original(x_r), self(x_r), t) + (1 - self.beta) * imitate + self.beta * suppress


def lowered(logits: Tensor, y: Tensor, to: Literal["min", "mean"] = "min") -> Tensor:
    """The logits (n, k) with that of the class y (n,) of each row replaced by the min or the mean of the others."""
    own = y[:, None]
    if to == "min":
        others = logits.scatter(1, own, math.inf).amin(1, keepdim=True)
    else:
        others = logits.scatter(1, own, 0.0).sum(1, keepdim=True) / (logits.shape[1] - 1)
    return logits.scatter(1, own, others)
