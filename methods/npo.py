"""Negative preference optimisation (Zhang et al., 2024)."""

import math
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from vislearn.errors import UserError
from vislearn.preference import PreferenceMethod, log_likelihood


class NPO(PreferenceMethod):
    r"""Make the true class of the forget set less likely than under the original model, and less so the further it is.

    Minimises, with :math:`p` the probability of the target under the unlearned and :math:`p_o` under the original
    model,

    .. math::
        \frac{2}{\beta}\, \mathrm{mean}\, \log\bigl(1 + (p / p_o)^\beta\bigr) + \lambda L_r(D_r).

    The gradient is that of gradient ascent with the weight :math:`2 p^\beta / (p^\beta + p_o^\beta)` on each row: 1 at
    the start, towards 0 as the row is forgotten; beta -> 0 is gradient ascent. In regressors
    :math:`\log p = -(f - y)^2 / (2 \sigma^2)`.

    Reference:
        Zhang, Lin, Bai, Mei. Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning. COLM
        2024. arXiv:2404.05868.

    Departures: the paper forgets sequences of tokens in language models; classes and values instead of tokens are our
    mapping, and so are the defaults. Language models take beta 0.1 to 0.5; 0.5 to 2 suits classifiers, where p falls
    over more orders of magnitude. The batch is averaged, where some codes sum. On rows of which the original is sure,
    p near 1, the gradient of log p itself is small, so forgetting begins slowly. In sample forgetting p ends below the
    level of a retrained model unless ``stop="validation"`` ends the run there.

    Args:
        beta: above 0; how soon forgotten rows lose their weight.
        **kwargs: see :class:`vislearn.preference.PreferenceMethod`.
    """

    def __init__(self, beta: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.beta = positive("beta", beta, 1)

    def objective(self, outputs: Tensor, outputs_o: Tensor, y: Tensor) -> Tensor:
        return npo(outputs, outputs_o, y, self.beta, self.noise)


def npo(outputs: Tensor, outputs_o: Tensor, y: Tensor, beta: float, sigma: float | None = None) -> Tensor:
    """The loss of NPO, a scalar: outputs of the unlearned and the original model, see `log_likelihood`."""
    log_ratio = log_likelihood(outputs, y, sigma) - log_likelihood(outputs_o, y, sigma)
    return -2 / beta * F.logsigmoid(-beta * log_ratio).mean()


def positive(name: str, value: float, usual: float) -> float:
    """The value, or an error that names the usual one."""
    if not 0 < value < math.inf:
        raise UserError(f"{name} must be above 0, not {value:g}; for example --method.{name}={usual:g}")
    return value
