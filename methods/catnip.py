"""Negative preference calibrated by the model's own confidence (after CATNIP, Yang et al., 2026)."""

from typing import Any, Literal

from torch import Tensor
from torch.nn import functional as F

from vislearn.errors import UserError, one_of
from vislearn.preference import PreferenceMethod, log_complement, log_likelihood, log_odds

from .npo import positive


class CATNIP(PreferenceMethod):
    r"""NPO whose reference is not the original model but the model's own doubt, 1 - p.

    Minimises, with :math:`p` the probability of the target under the unlearned model,

    .. math::
        \frac{2}{\beta}\, \mathrm{mean}\, \log\Bigl(1 + \bigl(\tfrac{p}{1 - p}\bigr)^\beta\Bigr) + \lambda L_r(D_r).

    Rows of which the model is sure are pushed hard, others hardly: the gradient is that of the log-odds
    :math:`z_y - \log \sum_{j \ne y} e^{z_j}` with the weight :math:`2 p^\beta / (p^\beta + (1 - p)^\beta)`, which is
    2 p at beta 1. Unlike that of log p it does not vanish where p is near 1, as it is on all rows of a trained
    classifier.

    Reference:
        Yang, Zhong, Hong, Zhu. CATNIP: LLM Unlearning via Calibrated and Tokenized Negative Preference Alignment.
        arXiv:2602.02824.

    Departures: the paper's, as its abstract and public reviews state it, are the reverse policy 1 - p as an adaptive
    reference in the negative preference loss, the mean over tokens instead of responses, and that no retain data are
    needed, hence ``retain="none"``. Its text and code were not at hand: beta, the rate and whether the reference takes
    gradients are ours, as are the mapping of tokens to classes and of p to
    :math:`\exp(-(f - y)^2 / (2 \sigma^2))` in regressors. A class is one token, so the paper's second idea is empty
    here.

    Args:
        beta: above 0; how steeply the weight follows the confidence.
        reference: `moving` lets the gradient through 1 - p; `fixed` takes it as a constant, which leaves NPO's gradient
            with another weight, and is what regressors always get: the log-odds of a value that is exactly right have
            no gradient.
        retain: see :class:`vislearn.preference.PreferenceMethod`; `none` makes an epoch a pass over the forget set.
        lr: constant learning rate; low, because nothing holds the retain set by default.
        **kwargs: see :class:`vislearn.preference.PreferenceMethod`.
    """

    reads_original = False

    def __init__(
        self, beta: float = 1.0, reference: Literal["moving", "fixed"] = "moving",
        retain: Literal["loss", "kl", "none"] = "none", lr: float = 1e-3, **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(retain=retain, lr=lr, **kwargs)
        self.beta = positive("beta", beta, 1)
        self.reference = one_of("reference", reference, ("moving", "fixed"))
        if reference == "fixed" and kwargs.get("grade") in ("zeroth", "hybrid"):
            raise UserError("differences of losses would move the fixed reference too; give "
                            "--method.reference=moving or --method.grade=first")  # fmt: skip

    def objective(self, outputs: Tensor, outputs_o: Tensor, y: Tensor) -> Tensor:
        return catnip(outputs, y, self.beta, self.reference == "fixed", self.noise)


def catnip(outputs: Tensor, y: Tensor, beta: float, fixed: bool = False, sigma: float | None = None) -> Tensor:
    """The loss of CATNIP, a scalar, see `log_likelihood`; `fixed` and regressors take 1 - p as a constant."""
    if fixed or sigma is not None:
        odds = log_likelihood(outputs, y, sigma) - log_complement(outputs, y, sigma).detach()
    else:
        odds = log_odds(outputs, y)
    return -2 / beta * F.logsigmoid(-beta * odds).mean()
