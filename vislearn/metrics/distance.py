"""How far two models are from each other: divergences of their outputs on the same rows, distance of their weights.

Outputs are logits (n, k), row i of both for the same sample. Everything is computed in float64 from log-softmax, so
that saturated outputs give finite numbers.
"""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor


def kl(p: Tensor, q: Tensor) -> float:
    """Mean over rows of KL(softmax p || softmax q), in nats: p and q (n, k) logits."""
    log_p, log_q = _log_softmax(p, q)
    return _kl_rows(log_p, log_q).mean().item()


def js(p: Tensor, q: Tensor, unit: Literal["bits", "nats"] = "bits") -> float:
    """Mean over rows of the Jensen-Shannon divergence of the softmax outputs: p and q (n, k) logits.

    Returns:
        From 0 (equal) to 1 bit, which is ln 2 nats (no common class).
    """
    log_p, log_q = _log_softmax(p, q)
    log_m = _mixture(log_p, log_q)
    nats = 0.5 * (_kl_rows(log_p, log_m) + _kl_rows(log_q, log_m)).mean().item()
    return nats / math.log(2) if unit == "bits" else nats


def js_official(p: Tensor, q: Tensor) -> float:
    """What the codes of bad teaching and SSD compute in place of Jensen-Shannon: p and q (n, k) logits.

    The mixture is the first argument of both KL terms and the mean runs over rows and classes, which makes it smaller
    by about the number of classes; it has no upper bound.
    """
    log_p, log_q = _log_softmax(p, q)
    log_m = _mixture(log_p, log_q)
    return 0.5 * (_kl_rows(log_m, log_p) + _kl_rows(log_m, log_q)).mean().item() / p.shape[1]


def zrf(unlearned: Tensor, incompetent: Tensor, unit: Literal["bits", "nats"] = "bits") -> float:
    """Zero retrain forgetting: 1 - JS(unlearned, incompetent), mean over rows of the forget set.

    In bits it runs from 0 to 1. It says how much like an untrained model the unlearned one behaves, so read it beside
    the same number of a retrained model.

    Args:
        unlearned: (n, k) logits of the unlearned model.
        incompetent: (n, k) logits of an untrained model in eval mode; average the result over several such models.
        unit: bits, or nats as in the text of the paper.

    Reference:
        Chundawat, Tarun, Mandal, Kankanhalli. Can Bad Teaching Induce Forgetting? AAAI 2023. arXiv:2205.08096.
    """
    return 1 - js(unlearned, incompetent, unit)


def zrf_official(unlearned: Tensor, incompetent: Tensor) -> float:
    """ZRF as the codes of bad teaching and SSD compute it, from `js_official`; close to 1 with many classes."""
    return 1 - js_official(unlearned, incompetent)


def activation_distance(
    p: Tensor, q: Tensor, form: Literal["softmax", "rms", "logits", "values"] | None = None
) -> float:
    """How far the outputs of two models are apart on the same rows.

    Args:
        p: (n, k) logits, or (n,) values of a regressor.
        q: the same of the other model.
        form: softmax is the mean over rows of the L2 distance of the softmax outputs, in [0, sqrt 2]; rms the root of
            the mean squared distance; logits the mean L2 distance of the logits; values the mean absolute difference.
            By default values for a regressor and softmax for a classifier.
    """
    _check(p, q)
    form = form or ("values" if p.ndim == 1 else "softmax")
    if form == "values":
        return (p.double() - q.double()).abs().mean().item()
    if form == "logits":
        return (p.double() - q.double()).norm(dim=1).mean().item()
    difference = p.double().softmax(1) - q.double().softmax(1)
    if form == "rms":
        return difference.square().sum(1).mean().sqrt().item()
    return difference.norm(dim=1).mean().item()


def weight_distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> tuple[float, dict[str, float]]:
    """L2 distance of two models' weights, in all and per tensor: a and b map the same names to tensors."""
    if a.keys() != b.keys():
        raise ValueError(f"the models have other parameters: {sorted(a.keys() ^ b.keys())[:5]}")
    each = {name: (a[name].double() - b[name].double()).norm().item() for name in a}
    return math.sqrt(sum(d * d for d in each.values())), each


def _log_softmax(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    _check(p, q)
    if p.ndim != 2:
        raise ValueError(f"divergences need logits (n, k), not {tuple(p.shape)}")
    return p.double().log_softmax(1), q.double().log_softmax(1)


def _kl_rows(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(n,) KL(p || q) in nats from log-probabilities (n, k); classes of probability 0 under p count nothing."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(1)


def _mixture(log_p: Tensor, log_q: Tensor) -> Tensor:
    return torch.logaddexp(log_p, log_q) - math.log(2)


def _check(p: Tensor, q: Tensor) -> None:
    if p.shape != q.shape:
        raise ValueError(f"outputs of the same rows and classes expected, not {tuple(p.shape)} and {tuple(q.shape)}")
    if not len(p):
        raise ValueError("a set without rows has no distance")
