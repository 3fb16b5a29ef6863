"""The membership attack of label-agnostic forgetting: trees on the sorted softmax, judged by its success rate.

The attacker knows a part of the retain set (members) and a part of the test set (non-members), and is judged on the
forget set, which it should not recognise after unlearning, and on other test rows. The rate is an accuracy on both
together, so what it should be depends on how many rows of each there are: compare with a retrained model, and read the
balanced accuracy beside it. Where a class is forgotten, members lack it and the test rows to fit on have it: the
attacker partly learns to tell classes apart, and may be right in less than half of the cases.

Reference:
    Shen, Zhang, Zhao, Bialkowski, Chen, Xu. Label-Agnostic Forgetting. ICLR 2024. arXiv:2404.00506. Protocol of the
    authors' code.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from .membership import auc

FITTED = 5000  # rows of each side that are enough to fit on
BATCH = 32  # rows are taken in whole batches of this size
LEFT_OUT = 0.01  # share of the rows to fit on that is left out, at random


class AttackRows(NamedTuple):
    """Features (n, k) and membership (n,), True for a member: to fit the attacker on, and to judge it on."""

    fit_x: Tensor
    fit_y: Tensor
    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Success:
    """How often the attacker is right.

    Attributes:
        rate: share of all judged rows, the authors' ASR; NaN where there is no attack.
        balanced: mean of the shares on forget and test rows, where one half is guessing whatever their numbers.
        auc: area under the ROC curve of its score.
        forget: share of the forget set called member.
        fitted: share of the rows it was fitted on.
        rows: forget and test rows it was judged on.
        reason: why there is no attack; empty where there is one.
    """

    rate: float
    balanced: float = math.nan
    auc: float = math.nan
    forget: float = math.nan
    fitted: float = math.nan
    rows: tuple[int, int] = (0, 0)
    reason: str = ""


def sorted_softmax(outputs: Tensor) -> Tensor:
    """Probabilities of each row in ascending order: logits (n, k) -> (n, k) float64."""
    return outputs.double().softmax(1).sort(1).values


def whole_batches(wanted: int, rows: int) -> int:
    """Rows in the fewest whole batches that hold as many as are wanted; all rows where there are not so many."""
    return min(rows, math.ceil(wanted / BATCH) * BATCH)


def attack_rows(members: Tensor, test: Tensor, forget: Tensor, fitted: int = FITTED) -> AttackRows:
    """Divide the rows as the authors do.

    The first members and the first test rows are to fit on, `fitted` of each in whole batches; all of the forget set
    and about as many of the test rows behind those are to judge on.

    Args:
        members: (m, k) logits of rows of the retain set, as many as there are forget rows, drawn at random.
        test: (l, k) logits of the test set.
        forget: (n, k) logits of the forget set.
        fitted: rows of each side that are enough to fit on.
    """
    known, unknown = whole_batches(fitted, len(members)), whole_batches(fitted, len(test))
    others = test[unknown:]
    others = others[: whole_batches(len(forget), len(others))]
    fit_x, x = (sorted_softmax(torch.cat(each)).cpu()
                for each in ((members[:known], test[:unknown]), (forget, others)))  # fmt: skip
    return AttackRows(fit_x, torch.arange(len(fit_x)) < known, x, torch.arange(len(x)) < len(forget))


def success(scores: Tensor, y: Tensor, threshold: float = 0.5) -> Success:
    """How right an attacker is: scores (n,), above the threshold for a member, and the truth (n,) bool."""
    right = (scores > threshold) == y
    sides = [right[side].double().mean().item() for side in (y, ~y)]
    return Success(right.double().mean().item(), sum(sides) / 2, auc(scores[y], scores[~y]), sides[0],
                   rows=(int(y.sum()), int((~y).sum())))  # fmt: skip


def laf_attack(members: Tensor, test: Tensor, forget: Tensor, fitted: int = FITTED, seed: int = 0) -> Success:
    """Fit boosted trees on the sorted softmax of rows whose membership is known, and judge them.

    The authors have xgboost's 100 trees with its defaults. Here they are scikit-learn's, on histograms, with the same
    number, rate (0.3), depth (6) and l2 penalty (1), and at least 4 rows in a leaf, the fewest that xgboost's least
    weight of 1 allows. On 900 forget and 928 test rows where xgboost 3.2 is right in 61.8 %, they are right in 62.8 %.

    Args:
        members: see `attack_rows`.
        test: logits of the test set, with rows left behind those that are fitted on.
        forget: logits of the forget set.
        fitted: rows of each side to fit on.
        seed: of the share that is left out of the fit.
    """
    for name, outputs in (("the retain set", members), ("the test set", test), ("the forget set", forget)):
        if not len(outputs):
            return Success(math.nan, reason=f"there are no rows of {name}")
        if not torch.isfinite(outputs).all():
            return Success(math.nan, reason=f"outputs on {name} are not finite")
    rows = attack_rows(members, test, forget, fitted)
    if bool(rows.y.all()):
        return Success(math.nan, reason=f"all {len(test)} test rows are fitted on, and none is left to judge on")
    from sklearn.ensemble import HistGradientBoostingClassifier

    generator = torch.Generator().manual_seed(seed)
    kept = torch.randperm(len(rows.fit_x), generator=generator)[: int((1 - LEFT_OUT) * len(rows.fit_x))]
    x, y = rows.fit_x[kept].numpy(), rows.fit_y[kept].numpy()
    trees = HistGradientBoostingClassifier(
        learning_rate=0.3, max_iter=100, max_depth=6, max_leaf_nodes=None, min_samples_leaf=4, l2_regularization=1.0,
        early_stopping=False, random_state=seed,
    ).fit(x, y)  # fmt: skip
    scores = torch.from_numpy(trees.predict_proba(rows.x.numpy())[:, 1])
    return replace(success(scores, rows.y), fitted=float(trees.score(x, y)))
