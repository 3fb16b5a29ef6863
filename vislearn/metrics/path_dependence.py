"""Path dependence: when training had stages, their order shows in what a local unlearning method leaves behind.

Two models trained on the same stages in another order differ. A local method, which follows gradients of the forget set
alone, enlarges that difference, so that it cannot bring both to one retrained model.

Reference:
    Yu, He, Goyal, Arora. On the Impossibility of Retrain Equivalence in Machine Unlearning. arXiv:2510.16629.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Rows = tuple[Tensor, Tensor]  # x (n, ...), y (n,)
Change = Callable[[Any, Tensor, Tensor], Any]  # (model, x, y) -> model


class Stage(NamedTuple):
    """Rows of one stage of a linear regression: x (n, d), y (n,), and how strongly it is held to the weights before."""

    x: Tensor
    y: Tensor
    mu: float


@dataclass(frozen=True)
class LinearPaths:
    """How far the predictions of two linear models part while both unlearn the same rows.

    Attributes:
        difference: (steps + 1,) mean squared difference of their predictions on the test rows.
        bound: (steps + 1,) what theory says it is at least, from `holds_from` on.
        rate: rho, by which the bound grows: a factor of (1 + rho)^2 a step.
        holds_from: the first step from which on the bound must hold; None if not within the steps.
    """

    difference: Tensor
    bound: Tensor
    rate: float
    holds_from: int | None


def staged_ridge(stages: Sequence[Stage], start: Tensor | None = None) -> Tensor:
    """Weights (d,) after stages that each minimise ||x w - y||^2 + mu ||w - w_before||^2, from 0 or `start`."""
    if not stages or any(s.mu <= 0 for s in stages):
        raise ValueError("one stage at least is needed, and every mu must be above 0")
    weights = torch.zeros(stages[0].x.shape[1], dtype=stages[0].x.dtype) if start is None else start
    for x, y, mu in stages:
        gram = x.T @ x + mu * torch.eye(x.shape[1], dtype=x.dtype)
        weights = torch.linalg.solve(gram, x.T @ y + mu * weights)
    return weights


def ascent(weights: Tensor, x: Tensor, y: Tensor, eta: float, steps: int) -> Tensor:
    """Gradient ascent on the mean squared error of the rows to forget: weights (d,), x (k, d), y (k,).

    Returns:
        (steps + 1, d): the weights before and after every step.
    """
    path = [weights]
    for _ in range(steps):
        weights = weights + 2 * eta / len(x) * (x.T @ (x @ weights - y))
        path.append(weights)
    return torch.stack(path)


def predicted_difference(difference: Tensor, x: Tensor, eta: float, steps: int) -> Tensor:
    """(I + M)^t d_0 with M = (2 eta / k) X'X: how the difference of two models' weights grows, without a run.

    Args:
        difference: (d,) before unlearning.
        x: (k, d) rows to forget; their targets do not matter.
        eta: step size.
        steps: of gradient ascent.

    Returns:
        (steps + 1, d).
    """
    values, vectors = torch.linalg.eigh(2 * eta / len(x) * (x.T @ x))
    powers = (1 + values)[None, :] ** torch.arange(steps + 1, dtype=x.dtype)[:, None]
    return (powers * (vectors.T @ difference)) @ vectors.T


def linear_paths(first: Tensor, second: Tensor, x: Tensor, x_test: Tensor, eta: float) -> LinearPaths:
    """The theorem on two paths of gradient ascent.

    With P the projection on the row space of the rows to forget, d_0 the difference before, rho = <P d_0, M P d_0> /
    ||P d_0||^2 and s the smallest singular value of X_test on that space, the difference of the predictions on m test
    rows is at least s^2 ||P d_0||^2 / (4 m) (1 + rho)^(2 t) once the part outside the row space, which stays as it is,
    is at most half of the part within.

    Args:
        first: (steps + 1, d) weights of one model, as `ascent` gives them.
        second: those of the other.
        x: (k, d) rows to forget.
        x_test: (m, d).
        eta: step size.
    """
    apart = first - second
    steps = torch.arange(len(apart), dtype=x.dtype)
    difference = (apart @ x_test.T).square().mean(1)
    _, size, v = torch.linalg.svd(x, full_matrices=False)
    space = v[size > size[0] * max(x.shape) * torch.finfo(x.dtype).eps].T  # (d, rank), orthonormal
    within = space @ (space.T @ apart[0])
    length = within.norm()
    if length == 0:
        return LinearPaths(difference, torch.zeros_like(difference), 0.0, 0)
    rate = (2 * eta / len(x) * (x @ within).square().sum() / length**2).item()
    seen = x_test @ space
    s = torch.linalg.svdvals(seen)[-1] if seen.shape[0] >= seen.shape[1] else torch.zeros((), dtype=x.dtype)
    bound = s**2 * length**2 / (4 * len(x_test)) * (1 + rate) ** (2 * steps)
    outside = (x_test @ (apart[0] - within)).norm()
    reached = (s * length * (1 + rate) ** steps >= 2 * outside).nonzero()
    return LinearPaths(difference, bound, rate, int(reached[0]) if len(reached) else None)


def orders(stages: Sequence[Any], forget: Any) -> list[list[Any]]:
    """The stages with the one to forget at every position, from first to last: n stages give n + 1 orders."""
    return [[*stages[:p], forget, *stages[p:]] for p in range(len(stages) + 1)]


def train_orders(start: nn.Module, fit: Change, stages: Sequence[Rows], forget: Rows) -> list[Any]:
    """Train one model per order of the stages, all from the same weights.

    Args:
        start: untrained model; it is copied.
        fit: (model, x, y) -> model, one stage with an optimiser of its own.
        stages: rows of the other stages.
        forget: rows of the stage to forget.
    """
    models = []
    for order in orders(stages, forget):
        model = copy.deepcopy(start)
        for x, y in order:
            model = fit(model, x, y)
        models.append(model)
    return models


@dataclass(frozen=True)
class Paths:
    """What happens to models of several orders (o) under the same unlearning, before and after each of t rounds.

    Attributes:
        forget: (o, t + 1) accuracy on the forget rows.
        retain: (o, t + 1) accuracy on the retain rows.
        drop: (o, t + 1) mean fall of the log-probability of the true class on the forget rows, in nats.
        apart: (t + 1,) mean over pairs of orders of the squared distance of their softmax outputs on the retain rows.
    """

    forget: Tensor
    retain: Tensor
    drop: Tensor
    apart: Tensor


def follow(models: Sequence[Any], unlearn: Change, forget: Rows, retain: Rows, rounds: int = 10) -> Paths:
    """Apply an unlearning step again and again to copies of the models.

    Args:
        models: one per order, the forget stage moving from first to last.
        unlearn: (model, x_f, y_f) -> model; one call is one round, such as a step or an epoch.
        forget: rows that are unlearned and measured.
        retain: rows of the other stages, or test rows.
        rounds: how many calls.
    """
    if not models:
        raise ValueError("no models were given")
    current = [copy.deepcopy(m) for m in models]
    found: dict[str, list[list[float]]] = {"forget": [], "retain": [], "log": []}
    apart = []
    for done in range(rounds + 1):
        if done:
            current = [unlearn(m, *forget) for m in current]
        z_f, z_r = ([_outputs(m, x) for m in current] for x in (forget[0], retain[0]))
        y_f, y_r = forget[1].cpu(), retain[1].cpu()
        found["forget"].append([(z.argmax(1) == y_f).double().mean().item() for z in z_f])
        found["retain"].append([(z.argmax(1) == y_r).double().mean().item() for z in z_r])
        found["log"].append([-F.cross_entropy(z, y_f).item() for z in z_f])
        pairs = [retrain_error(a, b) for a, b in combinations(z_r, 2)]
        apart.append(sum(pairs) / len(pairs) if pairs else math.nan)
    each = {name: torch.tensor(v, dtype=torch.float64).T for name, v in found.items()}
    drop = each["log"][:, :1] - each["log"]
    return Paths(each["forget"], each["retain"], drop, torch.tensor(apart, dtype=torch.float64))


def retrain_error(u: Tensor, r: Tensor) -> float:
    """RE: mean over rows of the squared distance of two models' softmax outputs, logits (n, k) each; from 0 to 2."""
    if u.shape != r.shape or u.ndim != 2 or not len(u):
        raise ValueError(f"logits (n, k) of the same rows expected, not {tuple(u.shape)} and {tuple(r.shape)}")
    return (u.double().softmax(1) - r.double().softmax(1)).square().sum(1).mean().item()


def spread(values: Tensor) -> Tensor:
    """SPR: largest minus smallest over the orders, (o, t) -> (t,)."""
    return values.amax(0) - values.amin(0)


def steps_to(curve: Sequence[float] | Tensor, level: float = 0.1) -> int | None:
    """The first step at which an accuracy is at or below a level; None where it never is."""
    return next((i for i, value in enumerate(torch.as_tensor(curve).tolist()) if value <= level), None)


def recency(forget: Tensor, level: float = 0.1) -> tuple[float | None, list[int | None]]:
    """How much longer the most recent stage takes to forget: above 1 it is slower than the others.

    Args:
        forget: (o, t) accuracy on the forget rows, the last order being that with the forget stage last.
        level: accuracy at which it counts as forgotten.

    Returns:
        Steps of the last order over the mean steps of the others, and the steps of every order. The index is None where
        an order never gets there, or where the others are there before the first step: training itself forgot.
    """
    steps = [steps_to(curve, level) for curve in forget]
    known = [s for s in steps if s is not None]
    if len(steps) < 2 or len(known) < len(steps) or not sum(known[:-1]):
        return None, steps
    return known[-1] * (len(known) - 1) / sum(known[:-1]), steps


@torch.no_grad()
def _outputs(model: nn.Module, x: Tensor) -> Tensor:
    """(n, k) float64 outputs in eval mode; every module gets its flag back."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        return torch.cat([model(part).double().cpu() for part in x.split(256)])
    finally:
        for module, mode in modes.items():
            module.training = mode
