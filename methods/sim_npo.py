"""Simple negative preference optimisation (Fan et al., 2024)."""

import math
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from vislearn.errors import UserError
from vislearn.preference import PreferenceMethod, log_likelihood

from .npo import positive


class SimNPO(PreferenceMethod):
    r"""NPO without a reference model: the weight of a row depends on its own probability alone.

    Minimises

    .. math::
        \frac{2}{\beta}\, \mathrm{mean}\, \log\bigl(1 + p^\beta e^{\beta \gamma}\bigr) + \lambda L_r(D_r),

    with :math:`p` the probability of the target under the unlearned model; in regressors
    :math:`\log p = -(f - y)^2 / (2 \sigma^2)`. The gradient is that of gradient ascent with the weight
    :math:`2 \,\mathrm{sigmoid}(\beta (\log p + \gamma))`.

    Reference:
        Fan, Liu, Lin, Jia, Zhang, Mei, Liu. Simplicity Prevails: Rethinking Negative Preference Optimization for LLM
        Unlearning. NeurIPS 2025. arXiv:2410.07163.

    Departures: the paper normalises by the length of a response, which is one class here; classes and values instead of
    tokens are our mapping, and so is the default of beta. A trained classifier has p near 1 on the whole forget set, so
    all rows start with the same weight, and what sets the method apart in language models is small here. The batch is
    averaged, where some codes sum.

    Args:
        beta: above 0; how soon unlikely rows lose their weight.
        gamma: margin in nats, 0 or more: a row keeps its weight until its cross-entropy is well above it.
        **kwargs: see :class:`vislearn.preference.PreferenceMethod`.
    """

    reads_original = False

    def __init__(self, beta: float = 1.0, gamma: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.beta = positive("beta", beta, 1)
        if not 0 <= gamma < math.inf:
            raise UserError(f"gamma must be 0 or more, not {gamma:g}; the usual margin is --method.gamma=0")
        self.gamma = gamma

    def objective(self, outputs: Tensor, outputs_o: Tensor, y: Tensor) -> Tensor:
        return sim_npo(outputs, y, self.beta, self.gamma, self.noise)


def sim_npo(outputs: Tensor, y: Tensor, beta: float, gamma: float = 0.0, sigma: float | None = None) -> Tensor:
    """The loss of SimNPO, a scalar, see `log_likelihood`."""
    return -2 / beta * F.logsigmoid(-beta * (log_likelihood(outputs, y, sigma) + gamma)).mean()
