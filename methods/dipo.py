"""Distribution preference optimisation (Qin et al., 2025), for classifiers."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vislearn.data import ForgetDataModule
from vislearn.errors import UserError
from vislearn.learner import Classifier, Learner, full
from vislearn.preference import PreferenceMethod

from .npo import positive


class DiPO(PreferenceMethod):
    r"""Prefer the original's outputs without their favourite classes to those with even more of them.

    From the original's logits :math:`z_o` and a set T of classes come a distribution that remembers,
    :math:`q^- = \mathrm{softmax}(z_o + a 1_T)`, and one that forgets, :math:`q^+ = \mathrm{softmax}(z_o - a 1_T)`.
    Minimises

    .. math::
        -\mathrm{mean} \log \mathrm{sigmoid}\bigl(\beta [KL(q^- \| p) - KL(q^- \| p_o) - KL(q^+ \| p) + KL(q^+ \| p_o)]
        \bigr) + \lambda L_r(D_r),

    which moves mass to the original's own runners-up, like a soft pseudo-label. The bracket is computed as
    :math:`\sum_j (q^+_j - q^-_j)(z_j - z_{o,j})`, which it equals: the gradient in the logits is bounded and does not
    vanish where the model is sure.

    Reference:
        Qin, Wu, He, Sun, Zhao, Liang, Chang, Zhang, Liu. Distribution Preference Optimization: A Fine-grained
        Perspective for LLM Unlearning. arXiv:2510.04773.

    Departures: the paper's are the two distributions, made from its own high-confidence logits, and the comparison of
    KL divergences over tokens. Ours are the exact form above, which follows its published summary, and all defaults.
    The true class stands in for the most likely token: T is the true class with the original's next best ones, so that
    rows that the original gets wrong lose their label. Regressors have no such distributions and are not served.

    Args:
        beta: above 0; how soon a row that has moved loses its weight.
        a: shift of the logits in T, above 0; at 10 the true class of a sure original is behind its runner-up.
        k: number of classes in T, from 1 (the true class) to one less than there are classes.
        **kwargs: see :class:`vislearn.preference.PreferenceMethod`.
    """

    supports = Classifier

    def __init__(self, beta: float = 0.5, a: float = 10.0, k: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.beta, self.a = positive("beta", beta, 0.5), positive("a", a, 10)
        if k < 1:
            raise UserError(f"k must be at least 1, not {k}; the true class alone is --method.k=1")
        self.k = k

    def check(self, model: Learner, data: ForgetDataModule) -> None:
        super().check(model, data)
        if self.k >= data.num_classes:
            raise UserError(f"k={self.k} leaves none of {data.num_classes} classes to move to; the true class alone is "
                            "--method.k=1")  # fmt: skip

    def objective(self, outputs: Tensor, outputs_o: Tensor, y: Tensor) -> Tensor:
        return dipo(outputs, outputs_o, y, self.beta, self.a, self.k)


def dipo(logits: Tensor, logits_o: Tensor, y: Tensor, beta: float, a: float = 10.0, k: int = 1) -> Tensor:
    """The loss of DiPO, a scalar: logits (b, c) of the unlearned and the original model, classes y (b,)."""
    z, z_o = full(logits), full(logits_o)
    # the true class comes first, whatever its logit
    chosen = z_o.scatter(1, y[:, None], torch.inf).topk(k, 1).indices
    shift = torch.zeros_like(z_o).scatter(1, chosen, a)
    direction = (z_o - shift).softmax(1) - (z_o + shift).softmax(1)  # q+ - q-
    # constants within a row fall out, because both are distributions: no normaliser is needed
    return -F.logsigmoid(beta * (direction * (z - z_o)).sum(1)).mean()
