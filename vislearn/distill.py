"""Losses that distil one model into another: Kullback-Leibler divergences of outputs, differentiable in both models.

The counterparts in :mod:`vislearn.metrics.distance` measure finished models and give plain numbers.
"""

import torch
from torch import Tensor

from .learner import Learner, full


def kl(p: Tensor, q: Tensor, temperature: float = 1.0) -> Tensor:
    r"""T^2 times the mean over rows of KL(softmax(p / T) || softmax(q / T)), in nats.

    ``kl(teacher, student)`` makes the student cover whatever the teacher finds likely; ``kl(student, teacher)`` takes
    from the student what the teacher finds unlikely. The factor T^2 keeps the size of the gradient when T changes
    (Hinton, Vinyals, Dean, 2015).

    Args:
        p: (n, k) logits; minus infinity leaves a class out.
        q: (n, k) logits of the same rows, finite wherever p is.
        temperature: T, above 0.
    """
    log_p, log_q = ((full(logits) / temperature).log_softmax(1) for logits in (p, q))
    # a class that p leaves out counts nothing, and must not become 0 x infinity
    terms = log_p.exp() * (log_p.clamp(min=torch.finfo(log_p.dtype).min) - log_q)
    return temperature**2 * terms.sum(1).mean()


def gaussian_kl(p: Tensor, q: Tensor, sigma: float = 1.0) -> Tensor:
    r"""Mean over rows of KL(N(p, s^2) || N(q, s^2)) = (p - q)^2 / (2 s^2), the same in both directions.

    With s = 1, which methods take where they are told nothing else, it is half the squared difference: its size then
    depends on the unit of the targets, and weights between it and a loss have to follow. Several outputs of a row are
    independent, so their divergences add up.

    Args:
        p: (n,) or (n, d) predicted values.
        q: the same of the other model.
        sigma: s, the standard deviation that both models are given, above 0, in the unit of the targets.
    """
    if p.shape != q.shape:  # (n, 1) beside (n,) would spread to (n, n)
        raise ValueError(f"predictions of the same shape expected, not {tuple(p.shape)} and {tuple(q.shape)}")
    return (full(p) - full(q)).square().reshape(len(p), -1).sum(1).mean() / (2 * sigma**2)


def divergence(learner: Learner, p: Tensor, q: Tensor, temperature: float = 1.0, sigma: float = 1.0) -> Tensor:
    """KL(p || q) of two models' outputs: `kl` for what a classifier puts out, `gaussian_kl` for a regressor.

    Args:
        learner: says which of the two it is.
        p: outputs of one model, (n, k) logits or (n,) or (n, d) values.
        q: outputs of the other.
        temperature: of `kl`.
        sigma: of `gaussian_kl`.
    """
    return kl(p, q, temperature) if learner.is_classifier else gaussian_kl(p, q, sigma)
