"""Signals of membership, one number per row: what a model's output on a row says of having been trained on it.

Outputs are logits (..., k), targets (...) or anything that expands to it. Everything is computed in float64, and where
a logarithm meets a saturated softmax, from sums of exponentials, so that finite logits give finite signals.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["softmax", "soft_margin", "taylor", "taylor_soft_margin"]


def entropy(outputs: Tensor) -> Tensor:
    """Entropy of the softmax of each row, in nats: (..., k) logits -> (...) float64, with 0 ln 0 = 0."""
    return torch.special.entr(outputs.double().softmax(-1)).sum(-1)


def losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each row in nats, -log p_y: (..., k) -> (...). Low means member."""
    return -_at(outputs.double().log_softmax(-1), targets)


def confidence(outputs: Tensor, targets: Tensor) -> Tensor:
    """Probability of the true class, p_y: (..., k) -> (...). High means member."""
    return _at(outputs.double().softmax(-1), targets)


def correctness(outputs: Tensor, targets: Tensor) -> Tensor:
    """1 where the largest output is the true class, else 0: (..., k) -> (...) float64; NaN where an output is NaN."""
    right = (outputs.argmax(-1) == targets).double()
    return right.masked_fill(outputs.isnan().any(-1), math.nan)


def logit_scaled(outputs: Tensor, targets: Tensor, guard: float = 0.0) -> Tensor:
    r"""Log-odds of the true class, the signal of LiRA: (..., k) -> (...). High means member.

    .. math:: \phi = \log p_y - \log(1 - p_y) = z_y - \log \sum_{j \ne y} e^{z_j}

    Args:
        outputs: (..., k) logits of at least two classes.
        targets: (...) classes.
        guard: added inside both logarithms of the probabilities, as the authors' codes do with 1e-45; it ends the
            signal at about 103.6 on either side. Without it saturated rows keep their order.

    Reference:
        Carlini et al., Membership Inference Attacks From First Principles, S&P 2022, arXiv:2112.03570, section 5.
    """
    if outputs.shape[-1] < 2:
        raise ValueError(f"log-odds need at least two classes, not outputs of shape {tuple(outputs.shape)}")
    if guard:
        p = outputs.double().softmax(-1)
        return (_at(p, targets) + guard).log() - (_without(p, targets, 0.0).sum(-1) + guard).log()
    z = outputs.double()
    return _at(z, targets) - _without(z, targets, -math.inf).logsumexp(-1)


def hinge(outputs: Tensor, targets: Tensor) -> Tensor:
    """Logit of the true class less the largest of the others: (..., k) -> (...). High means member."""
    z = outputs.double()
    return _at(z, targets) - _without(z, targets, -math.inf).amax(-1)


def modified_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    r"""Entropy that knows the true class, in nats: (..., k) -> (...). Low means member.

    .. math:: -(1 - p_y) \log p_y - \sum_{i \ne y} p_i \log(1 - p_i)

    It is 0 for a sure and right row and grows without end for a sure and wrong one.

    Reference:
        Song, Mittal. Systematic Evaluation of Privacy Risks of Machine Learning Models. USENIX Security 2021,
        arXiv:2003.10595, section 4.
    """
    z = outputs.double()
    log_p = z.log_softmax(-1)
    p, largest = log_p.exp(), z.argmax(-1)
    # 1 - p loses every digit only where p is near 1, and one class of a row can be: the others' sum is exact there
    rest = _without(z, largest, -math.inf).logsumexp(-1) - z.logsumexp(-1)
    log_not = torch.log1p(-p).scatter(-1, largest.unsqueeze(-1), rest.unsqueeze(-1))
    others = _without(torch.where(p == 0, 0.0, p * log_not), targets, 0.0).sum(-1)
    log_p_y = _at(log_p, targets)
    missing = -torch.expm1(log_p_y)
    return torch.where(missing == 0, 0.0, -missing * log_p_y) - others


def modified_entropy_released(outputs: Tensor, targets: Tensor) -> Tensor:
    """What the codes of Unlearn-Sparse and SalUn compute by this name: (n, k), (n,) -> (n,).

    The columns of all labels of the batch are turned to 1 - p in every row, and the logarithm is of p where 1 - p is
    meant: the value of a row depends on which others are asked with it. For comparison with their tables only.
    """
    p = outputs.double().softmax(-1)
    log_p = torch.where(p > 0, p, 1e-30).log()
    turned = p.clone()
    named = targets.unique()
    turned[:, named] = 1 - p[:, named]
    return -(turned * log_p).sum(-1)


def probabilities(outputs: Tensor, targets: Tensor) -> Tensor:
    """The softmax itself, (n, k) float64; the targets are not looked at."""
    return outputs.double().softmax(-1)


# the five features of Unlearn-Sparse and SalUn, by the names that the report uses
FEATURES: Mapping[str, Callable[[Tensor, Tensor], Tensor]] = {
    "correctness": correctness,
    "confidence": confidence,
    "entropy": lambda outputs, targets: entropy(outputs),
    "modified_entropy": modified_entropy,
    "probabilities": probabilities,
}


def rmia_signal(
    outputs: Tensor,
    targets: Tensor,
    kind: Kind = "softmax",
    temperature: float = 1.0,
    margin: float = 0.6,
    order: int = 4,
    clamp: bool = True,
) -> Tensor:
    """The probability of the true class as RMIA takes it: (..., k) -> (...).

    Args:
        outputs: (..., k) logits.
        targets: (...) classes.
        kind: softmax; soft_margin takes `margin` off the true class's logit; taylor puts a polynomial in place of the
            exponential (and knows no temperature, as in the authors' code); taylor_soft_margin does both and is the
            paper's signal, with temperature 2 for CIFAR-10 and 1 for CIFAR-100.
        temperature: divides the logits.
        margin: taken off the true class's logit after the division.
        order: number of terms of the polynomial: 4 means the powers 0 to 3.
        clamp: hold the polynomial at no less than 1e-12. Of even order it is negative for logits below about -1.6,
            and the authors' code then returns shares outside [0, 1].

    Reference:
        Zarifzadeh, Liu, Shokri. Low-Cost High-Power Membership Inference Attacks. ICML 2024, arXiv:2312.03262.
    """
    z = outputs.double()
    if kind != "taylor":
        z = z / temperature
    own = _at(z, targets) - (margin if kind.endswith("soft_margin") else 0.0)
    others = _without(z, targets, -math.inf)
    if not kind.startswith("taylor"):
        return torch.sigmoid(own - others.logsumexp(-1))
    top, rest = (_taylor(v, order, clamp) for v in (own, z))
    return top / (top + _without(rest, targets, 0.0).sum(-1))


def error_signal(outputs: Tensor, targets: Tensor) -> Tensor:
    """Signal of a regressor: minus the absolute error, (n,) float64. High means member."""
    return -(outputs.double() - targets.double()).abs()


def log_error_signal(outputs: Tensor, targets: Tensor) -> Tensor:
    """Signal of a regressor for LiRA: -log(error^2 + 1e-12), (n,) float64. High means member."""
    return -((outputs.double() - targets.double()).square() + 1e-12).log()


def _taylor(v: Tensor, order: int, clamp: bool) -> Tensor:
    term = total = torch.ones_like(v)
    for power in range(1, order):
        term = term * v / power
        total = total + term
    return total.clamp(min=1e-12) if clamp else total


def _at(values: Tensor, targets: Tensor) -> Tensor:
    """The entry of the true class: (..., k) -> (...)."""
    return values.gather(-1, _checked(values, targets)).squeeze(-1)


def _without(values: Tensor, targets: Tensor, filler: float) -> Tensor:
    """(..., k) with the entry of the true class replaced."""
    return values.scatter(-1, _checked(values, targets), filler)


def _checked(values: Tensor, targets: Tensor) -> Tensor:
    """The targets as an index (..., 1); classes out of range are refused."""
    if targets.ndim == 0 or values.ndim < 2 or targets.shape[-1] not in (1, values.shape[-2]):
        raise ValueError(f"not outputs (..., k) and targets (...): {tuple(values.shape)}, {tuple(targets.shape)}")
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < values.shape[-1]:
        raise ValueError(f"classes from {int(targets.min())} to {int(targets.max())}; outputs have {values.shape[-1]}")
    return targets.to(values.device).expand(values.shape[:-1]).unsqueeze(-1)
