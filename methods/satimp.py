"""Loss weights by saturation and importance (Yang et al., 2025)."""

import math
from typing import Any

from torch import Tensor

from vislearn.data import ForgetDataModule
from vislearn.errors import UserError
from vislearn.grades import GRADES
from vislearn.learner import Learner
from vislearn.preference import PreferenceMethod, log_complement, log_likelihood
from vislearn.trainer import Trainer


class SatImp(PreferenceMethod):
    r"""Gradient ascent that weighs each row by how far it is from forgotten and by how much it matters.

    Minimises

    .. math::
        \mathrm{mean}\; w \log p + \lambda L_r(D_r), \qquad w = p^{\beta_1} (1 - p)^{\beta_2},

    with :math:`p` the probability of the target and w taken as a constant. The factor in beta1 is saturation: rows that
    are forgotten count no more, so the method is bounded where gradient ascent is not. The factor in beta2 is
    importance. In regressors :math:`p = \exp(-(f - y)^2 / (2 \sigma^2))`.

    With ``beta1=5`` forgetting practically stops once p is below 0.3 (w below 0.003), above chance where there are many
    classes; 1 or 2 go further. beta2 of 1 and more is fatal on well-fitted rows, whose weight is then 0 from the start.

    Reference:
        Yang et al. Exploring Criteria of Loss Reweighting to Enhance LLM Unlearning. ICML 2025. arXiv:2505.11953.

    Departures: the paper weighs the tokens of a language model; one weight per image, and the form for regressors, are
    our mapping. beta1 and beta2 are the paper's. The retain term, an option of the paper, is on by default.

    Args:
        beta1: exponent of p, 0 or more; larger stops earlier.
        beta2: exponent of 1 - p, 0 or more; larger leaves out the rows that are known best.
        **kwargs: see :class:`vislearn.preference.PreferenceMethod`.
    """

    reads_original = False
    grades = frozenset(GRADES) - {"zeroth", "hybrid"}  # differences of losses would see the weights change

    def __init__(self, beta1: float = 5.0, beta2: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name, value, usual in (("beta1", beta1, 5.0), ("beta2", beta2, 0.1)):
            if not 0 <= value < math.inf:
                raise UserError(f"{name} must be 0 or more, not {value:g}; the paper's is --method.{name}={usual:g}")
        self.beta1, self.beta2 = beta1, beta2

    def unlearn(self, model: Learner, data: ForgetDataModule, trainer: Trainer) -> Learner:
        unlearned = super().unlearn(model, data, trainer)
        if self.beta2 >= 1:
            self.warn(f"the exponent {self.beta2:g} of 1 - p takes the weight of well-fitted rows away from the start; "
                      "the paper's is 0.1")  # fmt: skip
        return unlearned

    def objective(self, outputs: Tensor, outputs_o: Tensor, y: Tensor) -> Tensor:
        return satimp(outputs, y, self.beta1, self.beta2, self.noise)


class SimSat(SatImp):
    r"""SatImp with saturation alone: :math:`w = p^\beta`.

    Reference:
        Yang et al. Exploring Criteria of Loss Reweighting to Enhance LLM Unlearning. ICML 2025. arXiv:2505.11953.

    Departures: see :class:`SatImp`, whose exponent is the default here.

    Args:
        beta: exponent of p, 0 (gradient ascent) or more.
        **kwargs: see :class:`vislearn.preference.PreferenceMethod`.
    """

    def __init__(self, beta: float = 5.0, **kwargs: Any) -> None:
        super().__init__(beta1=exponent(beta, 5), beta2=0.0, **kwargs)


class SimImp(SatImp):
    r"""SatImp with importance alone: :math:`w = (1 - p)^\beta`.

    Nothing bounds it: rows that are forgotten weigh most, and it ends as gradient ascent does.

    Reference:
        Yang et al. Exploring Criteria of Loss Reweighting to Enhance LLM Unlearning. ICML 2025. arXiv:2505.11953.

    Departures: see :class:`SatImp`, whose exponent is the default here. The default rate is a tenth of its, because
    nothing stops the ascent.

    Args:
        beta: exponent of 1 - p, 0 (gradient ascent) or more.
        lr: constant learning rate.
        **kwargs: see :class:`vislearn.preference.PreferenceMethod`.
    """

    def __init__(self, beta: float = 0.1, lr: float = 1e-3, **kwargs: Any) -> None:
        super().__init__(beta1=0.0, beta2=exponent(beta, 0.1), lr=lr, **kwargs)


def exponent(value: float, usual: float) -> float:
    """The value, or an error that names the usual one."""
    if not 0 <= value < math.inf:
        raise UserError(f"beta must be 0 or more, not {value:g}; SatImp's is --method.beta={usual:g}")
    return value


def satimp(outputs: Tensor, y: Tensor, beta1: float, beta2: float, sigma: float | None = None) -> Tensor:
    """The loss of SatImp, a scalar, see `log_likelihood`; the weights take no gradient."""
    log_p = log_likelihood(outputs, y, sigma)
    weight = (beta1 * log_p + beta2 * log_complement(outputs, y, sigma)).exp().detach()
    return (weight * log_p).mean()
