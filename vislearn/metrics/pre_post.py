"""Attacks that see the model before and after unlearning: what changed gives the forget set away.

Even exact retraining leaks to whoever holds both models, so these attacks belong to retrained models as well, and what
counts is the gain over the same attack with the model before alone.

Outputs are logits (n, k), row i of both for the same sample, or values (n,) of a regressor.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .signals import error_signal, logit_scaled


@dataclass(frozen=True)
class Guided:
    """A prediction led by the difference of two models.

    Attributes:
        scores: (n, k) log p_post + weight (log p_pre - log p_post), not normalised.
        allowed: (n, k) bool, the classes that the model before does not rule out.
        prediction: (n,) the allowed class of the highest score.
    """

    scores: Tensor
    allowed: Tensor
    prediction: Tensor


def change_scores(before: Tensor, after: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """How much less a model knows of each row after unlearning, larger meaning that it was forgotten.

    Args:
        before: (n, k) logits of the original model, or (n,) values.
        after: the same of the unlearned or retrained model.
        targets: (n,) classes or values.

    Returns:
        phi: fall of the log-odds of the true class; kl: KL(before || after) in nats; l2: distance of the softmax
        outputs. For a regressor error: growth of the absolute error; l2: absolute difference.

    Reference:
        Chen et al. When Machine Unlearning Jeopardizes Privacy. CCS 2021, arXiv:2005.02205, for the idea.
    """
    _check(before, after)
    if before.ndim == 1:
        growth = error_signal(before, targets) - error_signal(after, targets)
        return {"error": growth, "l2": (before.double() - after.double()).abs()}
    log_p, log_q = before.double().log_softmax(1), after.double().log_softmax(1)
    p, q = log_p.exp(), log_q.exp()
    return {
        "phi": logit_scaled(before, targets) - logit_scaled(after, targets),
        "kl": torch.where(p == 0, 0.0, p * (log_p - log_q)).sum(1),
        "l2": (p - q).norm(dim=1),
    }


def pair_features(before: Tensor, after: Tensor) -> Tensor:
    """(n, 3 k) probabilities before, after, and their difference, in the order of the first, largest first.

    Sorting makes the features of all classes alike, so that an attack can be fitted on other classes than it is asked
    about; both models are sorted by the one before, so that a column is the same class in all three parts.
    """
    _check(before, after)
    p, q = before.double().softmax(1), after.double().softmax(1)
    order = p.argsort(dim=1, descending=True, stable=True)
    p, q = p.gather(1, order), q.gather(1, order)
    return torch.cat([p, q, p - q], 1)


def pair_attack(members: Tensor, non_members: Tensor, asked: Tensor) -> Tensor:
    """Log-odds of having been forgotten, (n,): logistic regression on `pair_features`, fitted on shadow pairs.

    A shadow pair is a model and what unlearning made of it, by the attacker, so the forgotten rows are known.

    Args:
        members: (m, d) features of rows that a shadow pair forgot.
        non_members: (l, d) features of rows that its models never saw.
        asked: (n, d) features of the rows in question under the attacked pair.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if not len(members) or not len(non_members):
        raise ValueError("an attack on pairs is fitted on forgotten and on unseen rows of shadow pairs; one is empty")
    values: NDArray = torch.cat([members, non_members]).double().cpu().numpy()
    labels = np.repeat([1, 0], [len(members), len(non_members)])
    fitted = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
    return torch.from_numpy(fitted.fit(values, labels).decision_function(asked.double().cpu().numpy()))


def guided(before: Tensor, after: Tensor, weight: float = 2.0, margin: float = 5.0) -> Guided:
    """Follow the difference of the two models beyond the one before, among classes which that one holds possible.

    Args:
        before: (n, k) logits of the original model.
        after: (n, k) logits of the unlearned or retrained model.
        weight: of the model before; 1 is that model alone, above it the change counts. Minus the authors' gamma.
        margin: classes whose log-probability before is at least this far below the largest are ruled out.

    Reference:
        Wu et al. Unlearned but Not Forgotten: Data Extraction after Exact Unlearning in LLM. NeurIPS 2025.
        arXiv:2505.24379, here for classes in place of tokens.
    """
    _check(before, after)
    pre, post = before.double().log_softmax(1), after.double().log_softmax(1)
    scores = (1 - weight) * post + weight * pre
    allowed = pre > pre.amax(1, keepdim=True) - margin
    return Guided(scores, allowed, scores.masked_fill(~allowed, -math.inf).argmax(1))


def fall_of_classes(before: Tensor, after: Tensor) -> Tensor:
    """(k,) how much less probable each class is after unlearning, mean over public rows: logits (n, k) of both.

    The class that was deleted should fall most. With a retrained model the noise between two seeds is in it too:
    average the falls of several before taking the largest.
    """
    _check(before, after)
    return (before.double().softmax(1) - after.double().softmax(1)).mean(0)


def deleted_classes(before: Tensor, after: Tensor, count: int = 1) -> list[int]:
    """The classes that fall most (`fall_of_classes`), that first."""
    return fall_of_classes(before, after).topk(count).indices.tolist()


def _check(before: Tensor, after: Tensor) -> None:
    if before.shape != after.shape:
        raise ValueError(f"outputs of the same rows and classes expected: {tuple(before.shape)}, {tuple(after.shape)}")
    if not len(before):
        raise ValueError("a set without rows cannot be attacked")
