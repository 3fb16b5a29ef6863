"""Models between two models: weight mixing, calibration to equal utility, the barrier on the way.

Weights are mixed as theta(t) = (1 - t) a + t b. The running statistics of batch normalisation belong to the weights
they were estimated with, so they are estimated again after every mix instead of being mixed.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Module = TypeVar("Module", bound=nn.Module)
BATCH = 128


def mix(a: Mapping[str, Tensor], b: Mapping[str, Tensor], t: float) -> dict[str, Tensor]:
    """(1 - t) a + t b for every tensor; whole numbers, such as counts of batches, are those of b.

    Args:
        a: name -> tensor, of the model at t = 0; parameters, or a state dict with its buffers.
        b: the same of the model at t = 1.
        t: where between them.
    """
    if a.keys() != b.keys():
        raise ValueError(f"the models have other weights: {sorted(a.keys() ^ b.keys())[:5]}")
    for name in a:
        if a[name].shape != b[name].shape:
            raise ValueError(f"{name} is {tuple(a[name].shape)} in one model and {tuple(b[name].shape)} in the other")
    return {name: (1 - t) * x + t * b[name] if x.is_floating_point() else b[name].clone() for name, x in a.items()}


@torch.no_grad()
def mixed(a: Module, b: Module, t: float, x: Tensor | None = None) -> Module:
    """The model between two models of one architecture, in eval mode; both stay as they are.

    Args:
        a: the model at t = 0.
        b: the model at t = 1, whose buffers the mixed model takes.
        t: where between them.
        x: (n, ...) retain rows to estimate the statistics of batch normalisation on; at t = 0 and t = 1 too.
    """
    out = copy.deepcopy(b).eval()
    between = mix(dict(a.named_parameters()), dict(b.named_parameters()), t)
    for name, parameter in out.named_parameters():
        parameter.copy_(between[name])
    if x is not None:
        reestimate(out, x)
    return out


@torch.no_grad()
def reestimate(model: nn.Module, x: Tensor, batch_size: int = BATCH) -> None:
    """Set the running statistics of batch normalisation, in place, to their mean over batches of these rows.

    Only the normalisations are in train mode meanwhile, so that dropout draws nothing (torch's `update_bn` puts the
    whole model there). A model without batch normalisation is left alone and costs nothing.

    Args:
        model: any network.
        x: (n, ...) rows, n at least 2, cut into batches of nearly equal size.
        batch_size: rows per batch, at most.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        return
    if len(x) < 2:
        raise ValueError(f"batch statistics need at least 2 rows, not {len(x)}")
    momenta = [norm.momentum for norm in norms]
    modes = {m: m.training for m in model.modules()}
    model.eval()
    try:
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean over batches
            norm.train()
        for part in x.tensor_split(math.ceil(len(x) / batch_size)):
            model(part)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for m, mode in modes.items():
            m.training = mode


class Calibration(NamedTuple):
    """Largest mixing share `alpha` at which utility is kept; `reached` is False where not even share 0 keeps it."""

    alpha: float
    reached: bool
    evaluations: int


def calibrate(utility: Callable[[float], float], bar: float, step: float = 0.05, bisections: int = 5) -> Calibration:
    """The largest share of the unlearned weights at which utility is kept: a* of unlearning with control.

    The shares 1, 1 - step, ... are tried downwards and the first that passes is refined towards the one above it by
    halving. Utility need not be monotone in the share, so what lies between two tried shares may be missed. A model
    that passes at 1 has a* = 1 after one evaluation.

    Args:
        utility: share of the unlearned model's weights in [0, 1] -> accuracy of the mixed model on retain validation
            rows; for a regressor its negative error.
        bar: the utility to keep, for example 0.99 times the original model's.
        step: distance of the tried shares.
        bisections: halvings.

    Reference:
        Wang et al. Towards Effective Evaluations and Comparisons for LLM Unlearning Methods. ICLR 2025.
        arXiv:2406.09179.
    """
    if not 0 < step <= 1:
        raise ValueError(f"the step between shares lies in (0, 1], not {step}")
    shares = [max(0.0, 1 - k * step) for k in range(math.ceil(1 / step - 1e-9) + 1)]
    tried = 0
    for above, share in zip([1.0, *shares], shares, strict=False):
        tried += 1
        if utility(share) >= bar:
            low, high = share, above
            break
    else:
        return Calibration(0.0, False, tried)
    for _ in range(bisections if high > low else 0):
        tried += 1
        middle = (low + high) / 2
        low, high = (middle, high) if utility(middle) >= bar else (low, middle)
    return Calibration(low, True, tried)


def barrier(errors: Sequence[float]) -> float:
    """Height of the barrier on the straight line between two models.

    Args:
        errors: error of the mixed models at even shares from 0 to 1, both ends included.

    Returns:
        Largest excess over the straight line between the errors of the ends; 0 for models connected without a barrier.
        A large barrier between original and unlearned model goes with resistance to relearning.

    Reference:
        Frankle, Dziugaite, Roy, Carbin. Linear Mode Connectivity and the Lottery Ticket Hypothesis. ICML 2020.
        arXiv:1912.05671. As a predictor of relearning: Siddiqui et al. From Dormant to Deleted. NeurIPS 2025.
        arXiv:2505.22310.
    """
    if len(errors) < 2:
        raise ValueError("a barrier needs the errors of both ends")
    last = len(errors) - 1
    return max(e - ((1 - i / last) * errors[0] + i / last * errors[-1]) for i, e in enumerate(errors))


def alignment(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Cosine of the angle between two models' weights of two or more dimensions, taken as one vector each.

    Near 1 for models that share their start, near 0 for models from other random weights, which no straight line of low
    error connects. One-dimensional parameters are left out: those of normalisations agree between any two models.
    """
    if a.keys() != b.keys():
        raise ValueError(f"the models have other weights: {sorted(a.keys() ^ b.keys())[:5]}")
    names = [name for name in a if a[name].ndim > 1]
    dot, aa, bb = (sum((x[n].double() * y[n].double()).sum().item() for n in names)
                   for x, y in ((a, b), (a, a), (b, b)))  # fmt: skip
    return dot / math.sqrt(aa * bb) if aa * bb > 0 else 0.0
