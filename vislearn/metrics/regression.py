"""What unlearning of regressors is measured by, beyond what classifiers have too.

Errors and distances stand in `distance`, the attack itself in `membership`, relearning steps in `relearn`.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from .membership import regression_attack, sample
from .relearn import batch_mean, official_relearn_steps

ROWS = 2000  # of each set that the attack looks at, as in the paper's code


class Shares(NamedTuple):
    """Shares of rows that an attack calls members, in [0, 1]; NaN where there is no attack, and `reason` says why."""

    members: float
    non_members: float
    forget: float
    reason: str = ""


def attack_shares(members: Tensor, non_members: Tensor, forget: Tensor, rows: int = ROWS, seed: int = 0) -> Shares:
    """The attack of Deep Regression Unlearning with its protocol: fitted on errors, asked about all three sets.

    Members and non-members are asked about with the rows that were fitted on, so their shares show how far apart the
    attack could tell them and not how it does on others. The target of the forget set's share is that of a retrained
    model. All errors belong to plain rows in eval mode; augmented members beside plain non-members, as in the authors'
    notebook, would have the attack detect the augmentation.

    Args:
        members: (m,) errors of rows that were trained on: of the retain set. The authors draw them from all of D, rows
            to forget included.
        non_members: (l,) errors of rows that were not.
        forget: (n,) errors of the forget set.
        rows: rows of each set that are drawn, without replacement; of members and non-members equally many, as many as
            the smaller set has: on unequal sides the machine calls everything what there is more of.
        seed: of the draw.

    Reference:
        Tarun, Chundawat, Mandal, Kankanhalli. Deep Regression Unlearning. ICML 2023. arXiv:2210.08196.
    """
    each = min(rows, len(members), len(non_members))
    drawn = enumerate(zip((members, non_members, forget), (each, each, rows), strict=True))
    sides = [errors[sample(len(errors), size, seed + i)] for i, (errors, size) in drawn]
    attack = regression_attack(sides[0], sides[1], torch.cat(sides))
    if attack.called is None:
        return Shares(math.nan, math.nan, math.nan, attack.reason)
    member, other, asked = (float(c.mean()) for c in attack.called.double().split([len(s) for s in sides]))
    return Shares(member, other, asked)


class Anamnesis(NamedTuple):
    """Anamnesis index: steps of the unlearned over those of the retrained model, and what they are made of.

    A count of `cap` steps is one that ran out, and the index is then a bound, or None where both ran out.
    """

    value: float | None
    unlearned: int
    retrained: int
    cap: int


def anamnesis_index(
    unlearned: nn.Module, retrained: nn.Module, original: nn.Module, batches: Sequence[tuple[Tensor, Tensor]],
    validation: Sequence[tuple[Tensor, Tensor]], alpha: float = 0.05, lr: float = 0.01, max_epochs: int = 10,
    loss: Callable[[Tensor, Tensor], Tensor] = F.l1_loss,
) -> Anamnesis:  # fmt: skip
    """The index as Deep Regression Unlearning counts it: Adam on all of D, steps counted from 1.

    Both models are relearned on copies. The notebook of the authors relearns one retrained model in place, call after
    call, so that from the second call on it has been relearned already; its printed indices are of that kind.

    Args:
        unlearned: the model in question.
        retrained: the retrained model.
        original: its loss on `validation` says what relearned means.
        batches: the training set.
        validation: held-out rows of what was forgotten.
        alpha: relearned is a loss of at most 1 + alpha times the original's.
        lr: learning rate.
        max_epochs: passes over the training set after which to give up.
        loss: what is minimised and evaluated.

    Reference:
        Tarun, Chundawat, Mandal, Kankanhalli. Deep Regression Unlearning. ICML 2023. arXiv:2210.08196.
    """
    if not len(batches) or not len(validation):
        raise ValueError("an anamnesis index needs training rows and held-out rows of what was forgotten")
    modes = {m: m.training for m in original.modules()}
    target = (1 + alpha) * batch_mean(original, validation, loss)
    for module, training in modes.items():
        module.training = training
    taken = [official_relearn_steps(m, batches, validation, target, lr, max_epochs, loss)
             for m in (unlearned, retrained)]  # fmt: skip
    cap = max_epochs * len(batches)
    return Anamnesis(None if min(taken) >= cap else taken[0] / taken[1], taken[0], taken[1], cap)


def pinball(outputs: Tensor, targets: Tensor, levels: Sequence[float]) -> Tensor:
    """Quantile loss, a scalar with a gradient: summed over levels, mean over rows.

    Args:
        outputs: (n, q) predicted quantiles; of forecasts (n, h, q), flatten the first two axes.
        targets: (n,) values.
        levels: the q levels, each in (0, 1).
    """
    if outputs.shape != (len(targets), len(levels)) or targets.ndim != 1:
        raise ValueError(f"quantiles (n, {len(levels)}) and targets (n,) expected, not {tuple(outputs.shape)} and "
                         f"{tuple(targets.shape)}")  # fmt: skip
    if not all(0 < q < 1 for q in levels):
        raise ValueError(f"levels lie between 0 and 1, not {list(levels)}")
    q = torch.as_tensor(levels, dtype=outputs.dtype, device=outputs.device)
    error = targets[:, None] - outputs
    return torch.maximum(q * error, (q - 1) * error).sum(1).mean()


def common_edges(targets: Tensor, bins: int = 24, margin: float = 0.1) -> NDArray[np.float64]:
    """(bins + 1,) edges for predictions of any model: the range of the targets, and a share `margin` of it either way.

    They depend on the targets alone, so that histograms of different models lie on the same bins.
    """
    if not len(targets) or not torch.isfinite(targets).all():
        raise ValueError("edges need finite targets")
    low, high = float(targets.min()), float(targets.max())
    width = (high - low) or 1.0
    return np.linspace(low - margin * width, high + margin * width, bins + 1)


def histogram(values: Tensor, edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """(bins,) shares of values (n,) between edges (bins + 1,), which add up to 1; outer bins hold what is beyond."""
    if values.ndim != 1 or not len(values) or not torch.isfinite(values).all():
        raise ValueError(f"finite values (n,) expected, not {tuple(values.shape)}")
    inside = np.clip(values.double().cpu().numpy(), edges[0], edges[-1])
    return np.histogram(inside, edges)[0] / len(values)
