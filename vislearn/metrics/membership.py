"""Membership inference: does the model still treat the forget set like rows it was trained on?

The attacks here see one model's outputs. They are fitted to tell rows the model was trained on (members) from rows it
never saw, and then asked about the forget set. Their score is the share of the forget set called member: the target is
the score of a retrained model on the same rows, not 0 and not one half. A score below it gives the forget set away too.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class Attack:
    """A fitted attack and what it says of the forget set.

    Attributes:
        score: share of the forget set called member, in [0, 1]; NaN where no attack could be made.
        reason: why there is no score; empty where there is one.
        threshold: value of the feature at which the answer changes; NaN where it never does.
        slope: of the log-odds in the feature: negative if low values mean member; NaN for a threshold attack.
        called: (n,) bool, per row of the forget set; None where there is no score.
    """

    score: float
    reason: str = ""
    threshold: float = math.nan
    slope: float = math.nan
    called: Tensor | None = None


def entropy(outputs: Tensor) -> Tensor:
    """Entropy of the softmax of each row, in nats: (n, k) logits -> (n,) float64, with 0 ln 0 = 0."""
    return torch.special.entr(outputs.double().softmax(1)).sum(1)


def entropy_attack(members: Tensor, non_members: Tensor, forget: Tensor, C: float = 2.0) -> Attack:
    """Attack of the SSD benchmark: logistic regression on the entropy of the outputs.

    The authors fit with C=1 in a two-column form that scikit-learn no longer has; C=2 of the one-column form is the
    same objective. Their non-members are all test rows, forgotten classes included; ours are by default the validation
    rows, so that the test set stays unread.

    Args:
        members: (m, k) logits on the retain set.
        non_members: (l, k) logits on rows that were not trained on.
        forget: (n, k) logits on the forget set.
        C: inverse strength of the l2 penalty.

    Reference:
        Foster, Schoepf, Brintrup, AAAI 2024, arXiv:2308.07707; the attack is that of Chundawat et al., AAAI 2023.
    """
    return logistic_attack(entropy(members), entropy(non_members), entropy(forget), C)


def logistic_attack(members: Tensor, non_members: Tensor, forget: Tensor, C: float = 2.0) -> Attack:
    """Class-balanced l2 logistic regression on one feature: members (m,), non-members (l,), asked about forget (n,).

    The feature is not standardised, as in the authors' code: the penalty depends on its scale.
    """
    if reason := _degenerate(members, non_members, forget):
        return Attack(math.nan, reason)
    from sklearn.linear_model import LogisticRegression

    values = torch.cat([members, non_members]).double().cpu().numpy()[:, None]
    labels = np.repeat([1, 0], [len(members), len(non_members)])
    fitted = LogisticRegression(class_weight="balanced", solver="lbfgs", C=C).fit(values, labels)
    called = torch.from_numpy(fitted.predict(forget.double().cpu().numpy()[:, None]) == 1)
    slope, intercept = float(fitted.coef_[0, 0]), float(fitted.intercept_[0])
    threshold = -intercept / slope if slope else math.nan
    return Attack(called.double().mean().item(), threshold=threshold, slope=slope, called=called)


def threshold_attack(members: Tensor, non_members: Tensor, forget: Tensor) -> Attack:
    """The threshold that best tells members (m,) from non-members (l,), asked about forget (n,).

    Scores are such that larger means member; the threshold has the highest balanced accuracy on the fitted rows, the
    lowest of equals, and rows at it are called member.
    """
    if reason := _degenerate(members, non_members, forget):
        return Attack(math.nan, reason)
    a, b = (np.sort(s.double().cpu().numpy()) for s in (members, non_members))
    values = np.unique(np.concatenate([a, b]))
    caught = 1 - np.searchsorted(a, values, side="left") / len(a)  # share of members at or above each value
    rejected = np.searchsorted(b, values, side="left") / len(b)
    threshold = float(values[np.argmax(caught + rejected)])
    called = forget.double().cpu() >= threshold
    return Attack(called.double().mean().item(), threshold=threshold, called=called)


def auc(members: Tensor, non_members: Tensor) -> float:
    """Area under the ROC curve of scores, larger meaning member: members (m,), non_members (l,); ties count one half.

    NaN when either is empty or holds a NaN.
    """
    a, b = (s.double().cpu().numpy() for s in (members, non_members))
    if not len(a) or not len(b) or np.isnan(a).any() or np.isnan(b).any():
        return math.nan
    ordered: NDArray[np.float64] = np.sort(b)
    below, upto = np.searchsorted(ordered, a, side="left"), np.searchsorted(ordered, a, side="right")
    return float((below + upto).mean() / (2 * len(b)))


def _degenerate(members: Tensor, non_members: Tensor, forget: Tensor) -> str:
    """Why there can be no attack; empty if there can."""
    for name, feature in (("members", members), ("non-members", non_members), ("the forget set", forget)):
        if not len(feature):
            return f"there are no rows of {name}"
        if not torch.isfinite(feature).all():
            return f"the feature is not finite on {int((~torch.isfinite(feature)).sum())} rows of {name}"
    low, high = torch.cat([members, non_members]).aminmax()
    return "the feature is the same on every fitted row" if low == high else ""
