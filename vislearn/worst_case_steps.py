r"""The steps of the search for a worst-case forget set, as functions of tensors, and the optimiser of the lower level.

A selection is w (n,) float64 with :math:`0 \le w_i \le 1` and :math:`\sum_i w_i = m`: 1 means forget. An entry stands
for a row, or for a class.

Reference:
    Fan, Liu, Hero, Liu. Challenging Forgets: Unveiling the Worst-Case Forget Sets in Machine Unlearning. ECCV 2024.
    arXiv:2403.07362.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .errors import UserError
from .influence import row_loss
from .learner import Learner
from .loader import Loader, batches
from .measure import channels_last
from .metrics.signals import logit_scaled

Direction = Literal["hardest", "easiest"]
Projection = Literal["exact", "bisection"]
Objective = Literal["released", "paper"]
Slot = Literal["decay", "dampening"]
Batch = tuple[Tensor, Tensor, Tensor]  # positions of the rows among the candidates (b,), x, y


def project(a: Tensor, m: int) -> Tensor:
    r"""The point of :math:`\{0 \le w \le 1, \sum w = m\}` that is nearest to a, (n,) -> (n,) float64.

    It is :math:`w_i = \mathrm{clip}(a_i - \mu, 0, 1)`, and the sum is piecewise linear in :math:`\mu` with corners at
    :math:`a_i - 1` and :math:`a_i`. The piece that holds m is found among the sorted corners, and solved.
    """
    a = _projectable(a, m)
    corners = torch.cat([a - 1, a]).sort().values
    low, high = 0, len(corners) - 1  # the sum is n at the first corner, and 0 at the last
    while high - low > 1:
        middle = (low + high) // 2
        if _clipped(a, corners[middle]).sum() >= m:
            low = middle
        else:
            high = middle
    left, right = corners[low], corners[high]
    slope = int(((a - 1 <= left) & (a >= right)).sum())  # entries that are strictly between 0 and 1 on this piece
    excess = _clipped(a, left).sum() - m
    return _clipped(a, left + excess / slope if slope else left)


def project_bisection(a: Tensor, m: int, width: float = 1e-5, steps: int = 100) -> Tensor:
    """The same as the authors' code finds it: mu is halved down to a bracket, so the sum misses m a little.

    Args:
        a: (n,).
        m: the sum.
        width: bracket at which it stops.
        steps: halvings at most.
    """
    a = _projectable(a, m)
    low, high = a.min() - 1, a.max()
    middle = (low + high) / 2
    for _ in range(steps):
        middle = (low + high) / 2
        total = _clipped(a, middle).sum()
        low, high = (middle, high) if total > m else (low, middle)
        if total == m or high - low <= width:
            break
    return _clipped(a, middle)


def upper_step(
    w: Tensor, scores: Tensor, m: int, alpha: float, gamma: float = 0.0, direction: Direction = "hardest",
    projection: Projection = "exact",
) -> Tensor:  # fmt: skip
    r"""One projected gradient step on :math:`\sum_i w_i \ell_i + \gamma \lVert w \rVert^2`, (n,) -> (n,) float64.

    .. math:: w \leftarrow \mathrm{Proj}(w - \alpha (\ell + 2 \gamma w))

    The derivative of the model in w is left out: behind steps of sign gradients it is zero almost everywhere.

    Args:
        w: (n,) the selection.
        scores: (n,) losses of the unlearned model.
        m: the sum of w.
        alpha: length of the step, above 0.
        gamma: weight of the square of w.
        direction: `hardest` goes down, `easiest` goes up.
        projection: `exact`, or the authors' `bisection`.
    """
    w, scores = w.double(), scores.double()
    sign = 1.0 if direction == "hardest" else -1.0
    moved = w - sign * alpha * (scores + 2 * gamma * w)
    return (project if projection == "exact" else project_bisection)(moved, m)


def top(w: Tensor, m: int, classes: Tensor | None = None, cap: float | None = None) -> tuple[Tensor, int]:
    """The m largest entries, the first of equals.

    Args:
        w: (n,).
        m: how many.
        classes: (n,) class of each entry, for `cap`.
        cap: largest share of a class that may be chosen, in (0, 1); none by default.

    Returns:
        (m,) sorted positions, and how many entries tie at the cut: 0 where the order of rows decides nothing.

    Raises:
        UserError: the cap leaves fewer than m.
    """
    order = w.sort(descending=True, stable=True).indices
    if cap is not None:
        assert classes is not None
        _, own = classes.unique(return_inverse=True)
        room = (cap * own.bincount() + 1e-9).floor().long()
        order = order[_rank_within(own[order]) < room[own[order]]]
        if len(order) < m:
            raise UserError(f"cap={cap:g} leaves {len(order)} rows to choose from, and {m} are to be forgotten; give a "
                            "larger --cap or a smaller --budget")  # fmt: skip
    chosen = order[:m]
    values = w[order]
    cut = values[m - 1]
    tied = int((values == cut).sum()) if len(values) > m and values[m] == cut else 0
    return chosen.sort().values, tied


def ties(tied: int, n: int, what: str = "rows") -> list[str]:
    """What is to be said of entries that tie at the cut, as `top` counts them."""
    return [f"{tied} of {n} {what} tie at the cut, and the first of them were taken"] if tied else []


def class_scores(losses: Tensor, classes: Tensor, batch: int | None = None) -> Tensor:
    """One score per class: the mean loss of its rows.

    Args:
        losses: (n,) per row.
        classes: (n,) classes from 0 to c - 1, each with a row.
        batch: rows of a batch, for the score of the authors' code: the sum over batches of the mean loss of the class
            in the batch, divided once more by its number of rows there. It depends on the order of rows.

    Returns:
        (c,) float64.
    """
    losses, c = losses.double(), int(classes.max()) + 1
    if batch is None:
        return classes.bincount(losses, c) / classes.bincount(minlength=c)
    cell = torch.arange(len(losses)) // batch * c + classes
    counts = cell.bincount(minlength=c)
    sums = cell.bincount(losses, len(counts))
    shares = torch.where(counts > 0, sums / counts.clamp(min=1).square(), 0.0)
    return (torch.arange(len(counts)) % c).bincount(shares, c)


def budget_of(budget: float, n: int, what: str = "rows") -> int:
    """How many of n a budget is: a share below 1, or a number.

    Raises:
        UserError: none, all or more, or half a row.
    """
    right = f"--budget=0.1 is a tenth of the {n} {what}"
    if not math.isfinite(budget) or budget <= 0:
        raise UserError(f"the budget must be above 0, not {budget:g}; {right} (--budget)")
    if budget >= 1 and budget != int(budget):
        raise UserError(f"the budget is a share below 1 or a whole number, not {budget:g}; {right} (--budget)")
    m = int(budget) if budget >= 1 else max(1, math.floor(budget * n + 1e-9))
    if m >= n:
        raise UserError(f"the budget, {m} of {n} {what}, leaves nothing to retain; {right} (--budget)")
    return m


def lower_loss(losses: Tensor, w: Tensor, objective: Objective = "released", lam: float = 1.0) -> Tensor:
    """What the lower level minimises on a batch, a sum over rows.

    Args:
        losses: (b,) of the batch.
        w: (b,) selection of its rows.
        objective: `released`, the rows that are retained alone; `paper`, which also climbs on those to forget.
        lam: weight of the climb.
    """
    retain = ((1 - w) * losses).sum()
    return retain if objective == "released" else retain - lam * (w * losses).sum()


class SignSGD(torch.optim.Optimizer):
    """Steps of the sign of the gradient, without momentum.

    Args:
        params: as for any optimiser.
        lr: how far a step moves every weight.
        weight_decay: share of a weight, times lr, that a step takes off it apart from the gradient.
        slot: `decay`; `dampening` is the authors' code, which hands the weight decay to SGD in the place of the
            dampening, where a step of signs does not feel it.
    """

    def __init__(self, params: Any, lr: float = 1e-3, weight_decay: float = 0.0, slot: Slot = "decay") -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay if slot == "decay" else 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(p.grad.sign(), alpha=-group["lr"])


def lower_level(
    model: Learner, passes: Iterable[Iterable[Batch]], w: Tensor, optimizer: SignSGD,
    objective: Objective = "released", lam: float = 1.0,
) -> None:  # fmt: skip
    """Unlearn a selection: one step a batch, with the model in train mode; the model is changed in place.

    Args:
        model: what to unlearn from; its own loss is what is summed.
        passes: of each epoch the batches (positions in w, x, y), on the model's device.
        w: (n,) selection of rows.
        optimizer: over the model's parameters.
        objective: see `lower_loss`.
        lam: see `lower_loss`.

    Raises:
        UserError: the loss is not finite.
    """
    model.train()
    total, row_losses = torch.zeros((), dtype=torch.float64), row_loss(model)
    for rows in passes:
        for positions, x, y in rows:
            losses = row_losses(model(channels_last(x)), y)
            share = w[positions].to(losses)
            loss = lower_loss(losses, share, objective, lam)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total = total.to(loss.device) + loss.detach()
        if not torch.isfinite(total):
            raise UserError("the lower level diverged: its loss is not finite; give a smaller --lr, or "
                            "--objective=released, whose loss has a lower end")  # fmt: skip
    optimizer.zero_grad()


def positioned(loader: Loader, device: torch.device) -> Iterator[Batch]:
    """The batches of a loader's next pass, with where each row stands among its rows, which ascend."""
    for rows, (x, y) in zip(loader.upcoming(), batches(loader, device), strict=True):
        yield torch.searchsorted(loader.ids, rows).to(device), x, y


def unlearned_losses(model: Learner, rows: Iterable[Batch], n: int) -> Tensor:
    """How little a model knows of each row, (n,) float64: cross-entropy of classifiers, a regressor's own loss.

    Cross-entropy is taken from the log-odds of the true class, so that rows which a model is sure of keep their order.
    The mode of the model, and what a batch is, are the caller's.

    Args:
        model: the learner.
        rows: batches (positions, x, y), on the model's device.
        n: number of rows.
    """
    found = torch.full((n,), math.nan, dtype=torch.float64)
    with torch.no_grad():
        for positions, x, y in rows:
            outputs = model(channels_last(x)).double()
            losses = (nn.functional.softplus(-logit_scaled(outputs, y)) if model.is_classifier
                      else row_loss(model)(outputs, y))  # fmt: skip
            found[positions.cpu()] = losses.cpu()
    return found


def balance(chosen: Tensor, targets: Tensor, names: Sequence[str]) -> dict[str, Any]:
    """How a forget set is spread over the classes, and which classes it leaves nothing of.

    Args:
        chosen: (m,) positions of the rows to forget.
        targets: (n,) classes of all candidates.
        names: of the classes.

    Returns:
        "forget" and "of", counts by class; "largest_share", of a class; "gone", the classes of which nothing is left.
    """
    of = targets.bincount(minlength=len(names)).tolist()
    forget = targets[chosen].bincount(minlength=len(names)).tolist()
    shares = [f / n for f, n in zip(forget, of, strict=True) if n]
    return {"forget": dict(zip(names, forget, strict=True)), "of": dict(zip(names, of, strict=True)),
            "largest_share": max(shares), "gone": [name for name, f, n in zip(names, forget, of, strict=True)
                                                   if n and f == n]}  # fmt: skip


def _clipped(a: Tensor, mu: Tensor) -> Tensor:
    return (a - mu).clamp(0, 1)


def _projectable(a: Tensor, m: int) -> Tensor:
    if a.ndim != 1 or not 0 < m <= len(a):
        raise ValueError(f"no point of shape {tuple(a.shape)} in [0, 1] has the sum {m}")
    if not torch.isfinite(a).all():
        raise UserError("a score is not finite, so no row can be called hardest; the model diverged: give a smaller "
                        "--lr")  # fmt: skip
    return a.double()


def _rank_within(classes: Tensor) -> Tensor:
    """(n,) how many entries of the same class stand before each."""
    order = classes.sort(stable=True).indices
    counts = classes.bincount()
    first = (counts.cumsum(0) - counts)[classes[order]]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order)) - first
    return rank
