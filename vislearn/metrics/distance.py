"""How far two models are from each other: divergences of their outputs on the same rows, distance of their weights.

Outputs are logits (n, k), row i of both for the same sample. Everything is computed in float64 from log-softmax, so
that saturated outputs give finite numbers. Rates are fractions in [0, 1].
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from scipy.stats import wasserstein_distance
from torch import Tensor, nn

ZRF = Literal["bits", "nats", "bt_code", "uniform_logits"]
DRAWS = 500  # of uniform logits


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


def zrf(
    unlearned: Tensor, incompetent: Tensor | None = None, kind: ZRF = "bits", draws: int = DRAWS, seed: int = 0
) -> float:
    """Zero retrain forgetting: 1 - JS(unlearned, incompetent), mean over rows of the forget set.

    It says how much like an untrained model the unlearned one behaves, so read it beside the same number of a retrained
    model against the same untrained ones: the aim is to equal that, not 1. Values of different kinds do not compare.

    Args:
        unlearned: (n, k) logits of the unlearned model.
        incompetent: (n, k) logits of an untrained model in eval mode, with the BatchNorm statistics it was made with;
            average the result over several such models. Not used by "uniform_logits".
        kind: "bits" is the definition, from 0 to 1; "nats" the same as the text of the paper has it, from 1 - ln 2 =
            0.307; "bt_code" what the authors' code computes, from `js_official`, close to 1 with many classes;
            "uniform_logits" (MU-Bench) is in nats, against the softmax of logits uniform in [0, 1).
        draws: how many sets of uniform logits are averaged.
        seed: of the uniform logits.

    Reference:
        Chundawat, Tarun, Mandal, Kankanhalli. Can Bad Teaching Induce Forgetting? AAAI 2023. arXiv:2205.08096.
    """
    if kind == "uniform_logits":
        generator = torch.Generator().manual_seed(seed)
        uniform = (torch.rand(unlearned.shape, generator=generator, dtype=torch.float64) for _ in range(draws))
        return 1 - sum(js(unlearned.cpu(), each, "nats") for each in uniform) / draws
    if incompetent is None:
        raise ValueError(f"kind={kind!r} compares with the logits of an untrained model")
    if kind == "bt_code":
        return 1 - js_official(unlearned, incompetent)
    return 1 - js(unlearned, incompetent, kind)


def zrf_official(unlearned: Tensor, incompetent: Tensor) -> float:
    """ZRF as the codes of bad teaching and SSD compute it: kind "bt_code" of `zrf`."""
    return zrf(unlearned, incompetent, "bt_code")


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


def churn(p: Tensor, q: Tensor) -> float:
    """Share of rows that two models put into different classes: p and q (n, k) outputs.

    Two retrained models differ on several percent of CIFAR-10: compare with that, not with 0.
    """
    return (_classes(p, q) != _classes(q, p)).double().mean().item()


def completeness(p: Tensor, q: Tensor, targets: Tensor) -> float:
    """Jaccard index of the rows that two models get right: p and q (n, k) outputs, targets (n,) classes.

    Returns:
        Rows that both get right over rows that either does; NaN when neither gets one right.
    """
    if targets.shape != p.shape[:1]:
        raise ValueError(f"not outputs (n, k) and targets (n,): {tuple(p.shape)}, {tuple(targets.shape)}")
    right_p, right_q = _classes(p, q) == targets, _classes(q, p) == targets
    either = (right_p | right_q).sum().item()
    return (right_p & right_q).sum().item() / either if either else math.nan


class Rates(NamedTuple):
    """Accuracies of one model as fractions, and the share of D_f that an attack calls non-member (MIA-Efficacy)."""

    forget: float
    retain: float
    test: float
    mia: float = math.nan


def tug_of_war(unlearned: Rates, retrained: Rates) -> float:
    """ToW: the product of 1 - |difference to the retrained model| over forget, retain and test accuracy; 1 is best.

    `abs_tow` is another quantity that some code calls "tow".

    Reference:
        Zhao, Kurmanji, Barbulescu, Triantafillou, Triantafillou. What makes unlearning hard and what to do about it.
        NeurIPS 2024. arXiv:2406.01257.
    """
    return _product(unlearned, retrained, ("forget", "retain", "test"))


def tug_of_war_mia(unlearned: Rates, retrained: Rates) -> float:
    """ToW-MIA: as `tug_of_war`, with the efficacy of the SVC attack on confidence in the place of forget accuracy."""
    return _product(unlearned, retrained, ("mia", "retain", "test"))


def abs_tow(rates: Rates) -> float:
    """Retain accuracy x (1 - forget accuracy) x test accuracy: needs no retrained model, and rewards over-forgetting.

    Logged as "tow" in the code of relearning studies; not the tug of war of Zhao et al.
    """
    forget, retain, test = (_fraction(v) for v in rates[:3])
    return retain * (1 - forget) * test


def average_gap(unlearned: Sequence[Rates], retrained: Sequence[Rates]) -> float:
    """Average gap as published: |difference of the means| of forget, retain, test and MIA, averaged; a fraction.

    Smaller than the mean over pairs of models (`gap.gap`), which also counts how single models scatter.
    """
    if not unlearned or not retrained:
        raise ValueError("an average gap needs models on both sides")
    u, r = (np.array([[_fraction(v) for v in rates] for rates in side]).mean(0) for side in (unlearned, retrained))
    return float(np.abs(u - r).mean())


def nomus(test_accuracy: float, attack_accuracy: float, weight: float = 0.5) -> float:
    """NoMUS (ERASURE): weight x test accuracy + (1 - weight)(1 - 2 |attack accuracy - 1/2|), all in [0, 1].

    It takes one half for the aim of an attack, which is right only where forget and unseen rows are exchangeable.
    """
    test, attack, weight = (_fraction(v) for v in (test_accuracy, attack_accuracy, weight))
    return weight * test + (1 - weight) * (1 - 2 * abs(attack - 0.5))


def weight_distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> tuple[float, dict[str, float]]:
    """L2 distance of two models' weights, in all and per tensor: a and b map the same names to tensors.

    Hidden units can be permuted without a change of the function, so independently trained models are far apart
    whatever they know; the number speaks where both started from the same weights.
    """
    _check_weights(a, b)
    each = {name: (a[name].double() - b[name].double()).norm().item() for name in a}
    return math.sqrt(sum(d * d for d in each.values())), each


def relative_weight_distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> tuple[float, dict[str, float]]:
    """`weight_distance` over the norm of the reference b, in all (NaN if b is zero) and per tensor that is not zero."""
    total, each = weight_distance(a, b)
    norms = {name: b[name].double().norm().item() for name in b}
    norm = math.sqrt(sum(n * n for n in norms.values()))
    return total / norm if norm else math.nan, {name: each[name] / n for name, n in norms.items() if n}


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """The parameters of a model by name, detached."""
    return {name: p.detach() for name, p in model.named_parameters()}


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """The running means and variances of a model's normalisations, which are no parameters; counters are left out."""
    return {name: b for name, b in model.named_buffers() if name.rpartition(".")[2] in ("running_mean", "running_var")}


def wasserstein(a: Tensor, b: Tensor) -> float:
    """Wasserstein-1 distance between two samples of predictions (n,) and (m,), in the unit of the targets.

    It compares distributions: which row got which value does not matter.
    """
    for values in (a, b):
        if values.ndim != 1:
            raise ValueError(f"predictions (n,) expected, not {tuple(values.shape)}")
        _check_finite(values)
    return float(wasserstein_distance(a.double().cpu().numpy(), b.double().cpu().numpy()))


def gaussian_kl(p: Tensor, q: Tensor, std_p: float, std_q: float) -> float:
    """Mean over rows of KL(N(p, std_p^2) || N(q, std_q^2)) in nats: p and q (n,) predictions of two regressors.

    The standard deviations are those of each model's residuals on validation rows; with equal ones it is
    (p - q)^2 / (2 std^2).
    """
    _check(p, q)
    if not (std_p > 0 and std_q > 0):
        raise ValueError(f"standard deviations must be above 0, not {std_p} and {std_q}")
    squares = std_p**2 + (p.double() - q.double()).square()
    return (math.log(std_q / std_p) + squares / (2 * std_q**2) - 0.5).mean().item()


def mae(predictions: Tensor, targets: Tensor) -> float:
    """Mean absolute error over rows: (n,) both, or (n, d) both."""
    return _errors(predictions, targets).mean().item()


def batch_mean_mae(predictions: Tensor, targets: Tensor, sizes: int | Sequence[int]) -> float:
    """Mean of the mean absolute errors of consecutive batches of these sizes, as some codes report it.

    A short last batch weighs as much as a full one; `mae` is the mean over rows.
    """
    parts = _errors(predictions, targets).split(sizes if isinstance(sizes, int) else list(sizes))
    return torch.stack([part.mean() for part in parts]).mean().item()


def rmse(predictions: Tensor, targets: Tensor) -> float:
    """Root of the mean squared error over rows: (n,) both, or (n, d) both."""
    return _errors(predictions, targets).square().mean().sqrt().item()


def within_sigma(predictions: Tensor, targets: Tensor, sigma: float) -> float:
    """Share of rows whose error is at most sigma, a standard deviation of residuals on validation rows.

    What stands in for accuracy in a regressor's tables, and must not be called so.
    """
    if not sigma > 0:
        raise ValueError(f"sigma must be above 0, not {sigma}")
    return (_errors(predictions, targets) <= sigma).double().mean().item()


def relative_difference(p: Tensor, q: Tensor, targets: Tensor) -> Tensor:
    """|p - q| / target per row, (n,) float64: how far two regressors are apart, in shares of the target.

    Reference:
        Tarun, Chundawat, Mandal, Kankanhalli. Deep Regression Unlearning. ICML 2023. arXiv:2210.08196.
    """
    _check(p, q)
    _check(p, targets)
    if not (targets != 0).all():
        raise ValueError("a target of 0 has no relative difference")
    return (p.double() - q.double()).abs() / targets.double()


def _product(unlearned: Rates, retrained: Rates, names: Sequence[str]) -> float:
    return math.prod(1 - abs(_fraction(getattr(unlearned, n)) - _fraction(getattr(retrained, n))) for n in names)


def _fraction(value: float) -> float:
    if not 0 <= value <= 1:
        raise ValueError(f"rates are fractions in [0, 1], not {value}")
    return value


def _errors(predictions: Tensor, targets: Tensor) -> Tensor:
    _check(predictions, targets)
    return (predictions.double() - targets.double()).abs()


def _classes(p: Tensor, q: Tensor) -> Tensor:
    """(n,) classes that p names; infinite logits are fine, NaN are not."""
    if p.shape != q.shape or p.ndim != 2:
        raise ValueError(f"outputs (n, k) of the same rows and classes expected, not {_shapes(p, q)}")
    if not len(p):
        raise ValueError("a set without rows has no distance")
    if p.isnan().any():
        raise ValueError(f"outputs are NaN on {p.isnan().any(1).double().mean().item():.1%} of the rows")
    return p.argmax(1)


def _log_softmax(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    _check(p, q)
    if p.ndim != 2:
        raise ValueError(f"divergences need logits (n, k), not {tuple(p.shape)}")
    return p.double().log_softmax(1), q.double().log_softmax(1)


def _kl_rows(log_p: Tensor, log_q: Tensor) -> Tensor:
    """(n,) KL(p || q) in nats from log-probabilities (n, k); classes of probability 0 under p count nothing."""
    p = log_p.exp()
    return torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(1)


def _mixture(log_p: Tensor, log_q: Tensor) -> Tensor:
    return torch.logaddexp(log_p, log_q) - math.log(2)


def _check(p: Tensor, q: Tensor) -> None:
    if p.shape != q.shape:
        more = "; give q[:, index] where the models number their classes differently" if p.ndim == q.ndim == 2 else ""
        raise ValueError(f"outputs of the same rows and classes expected, not {_shapes(p, q)}{more}")
    for outputs in (p, q):
        _check_finite(outputs)


def _check_finite(outputs: Tensor) -> None:
    if not len(outputs):
        raise ValueError("a set without rows has no distance")
    broken = ~outputs.isfinite().reshape(len(outputs), -1).all(1)
    if broken.any():
        raise ValueError(f"outputs are not finite on {broken.double().mean().item():.1%} of the rows")


def _check_weights(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> None:
    if a.keys() != b.keys():
        raise ValueError(f"the models have other parameters: {sorted(a.keys() ^ b.keys())[:5]}")
    for name in a:
        if a[name].shape != b[name].shape:
            raise ValueError(f"the models have another shape of {name}: {_shapes(a[name], b[name])}")
        if not (a[name].isfinite().all() and b[name].isfinite().all()):
            raise ValueError(f"the weights of {name} are not finite")


def _shapes(p: Tensor, q: Tensor) -> str:
    return f"{tuple(p.shape)} and {tuple(q.shape)}"
