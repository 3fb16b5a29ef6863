"""Membership inference: does the model still treat the forget set like rows it was trained on?

The attacks here see one model's outputs. They are fitted to tell rows the model was trained on (members) from rows it
never saw, and then asked about the forget set. Their score is the share of the forget set called member: the target is
the score of a retrained model on the same rows, not 0 and not one half. A score below it gives the forget set away too.

Which rows are the non-members is the caller's choice, and it matters: validation rows keep the test set unread, and
under a class rule rows of the same class must stand against the forget set, or the attack tells classes apart.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .signals import FEATURES, entropy

Rows = tuple[Tensor, Tensor]  # outputs (n, k) and targets (n,)
TINY = 1e-12  # variance below which a feature is constant


@dataclass(frozen=True)
class Attack:
    """A fitted attack and what it says of the forget set.

    Attributes:
        score: share of the forget set called member, in [0, 1]; NaN where no attack could be made.
        reason: why there is no score; empty where there is one.
        threshold: value of the feature at which the answer changes; NaN where it never does or there are several.
        slope: of the log-odds in the feature: negative if low values mean member; NaN for other than logistic attacks.
        called: (n,) bool, per row of the forget set; None where there is no score.
        note: what to know of the score; empty if nothing.
    """

    score: float
    reason: str = ""
    threshold: float = math.nan
    slope: float = math.nan
    called: Tensor | None = None
    note: str = ""

    @property
    def efficacy(self) -> float:
        """Share of the forget set called non-member, the "MIA" or "MIA-Efficacy" of Unlearn-Sparse and SalUn."""
        return 1 - self.score


@dataclass(frozen=True)
class CrossValidated:
    """Accuracy of an attack that tells the forget set from unseen rows, fitted and judged on parts of both.

    Attributes:
        mean: accuracy over the splits, in [0, 1]; one half is guessing, as both sides have `rows` rows; NaN where there
            is none. Below one half by more than noise it does not mean that the rows are safe.
        std: population standard deviation over the splits.
        scores: accuracy per split.
        rows: rows of each side.
        reason: why there is no accuracy.
    """

    mean: float
    std: float = math.nan
    scores: tuple[float, ...] = ()
    rows: int = 0
    reason: str = ""


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


def bad_teaching_attack(members: Tensor, non_members: Tensor, forget: Tensor) -> Attack:
    """Attack of the bad-teaching code: an RBF machine on the entropy of the outputs, classes not balanced.

    Arguments as for `entropy_attack`. With many more members than non-members everything is called member.

    Reference:
        Chundawat, Tarun, Mandal, Kankanhalli. Can Bad Teaching Induce Forgetting? AAAI 2023. arXiv:2205.08096.
    """
    return svc_attack(entropy(members), entropy(non_members), entropy(forget))


def logistic_attack(members: Tensor, non_members: Tensor, forget: Tensor, C: float = 2.0) -> Attack:
    """Class-balanced l2 logistic regression on one feature: members (m,), non-members (l,), asked about forget (n,).

    The feature is not standardised, as in the authors' code: the penalty depends on its scale.
    """
    if reason := _degenerate(members, non_members, forget):
        return Attack(math.nan, reason)
    from sklearn.linear_model import LogisticRegression

    values, labels = _stacked(members, non_members)
    fitted = LogisticRegression(class_weight="balanced", solver="lbfgs", C=C).fit(values, labels)
    called = torch.from_numpy(fitted.predict(_columns(forget)) == 1)
    slope, intercept = float(fitted.coef_[0, 0]), float(fitted.intercept_[0])
    threshold = -intercept / slope if slope else math.nan
    return Attack(called.double().mean().item(), threshold=threshold, slope=slope, called=called)


def svc_attack(
    members: Tensor, non_members: Tensor, forget: Tensor, C: float = 3.0, bins: int | None = None
) -> Attack:
    """A support-vector machine with an RBF kernel of width 1/features ("auto"), features not scaled.

    Args:
        members: (m,) or (m, d) feature of rows that were trained on.
        non_members: (l,) or (l, d) feature of rows that were not.
        forget: (n,) or (n, d) feature of the rows asked about.
        C: inverse strength of the penalty.
        bins: fit on this many groups of neighbouring values of one feature, each at its mean and with the weight of its
            rows. Rows with the same value are one weighted row exactly, so this changes the answer by as little as the
            values within a group differ, and the cost no longer grows with the number of rows.
    """
    if reason := _degenerate(members, non_members, forget, TINY):
        return Attack(math.nan, reason)
    from sklearn.svm import SVC

    values, labels = _stacked(members, non_members)
    weights = np.ones(len(labels))
    if bins and values.shape[1] == 1:
        values, labels, weights = _binned(values[:, 0], labels, bins)
    # without a random state the machine, which needs no random numbers, would draw from the global ones
    fitted = SVC(C=C, gamma="auto", kernel="rbf", random_state=0).fit(values, labels, sample_weight=weights)
    distinct, where = np.unique(_columns(forget), axis=0, return_inverse=True)
    called = torch.from_numpy(fitted.predict(distinct)[where.ravel()] == 1)
    return Attack(called.double().mean().item(), called=called)


def svc_family(
    members: Rows, non_members: Rows, forget: Rows, features: Sequence[str] = tuple(FEATURES), bins: int | None = None
) -> dict[str, Attack]:
    """The attacks of Unlearn-Sparse and SalUn, one machine per feature; papers print 1 - score of "confidence".

    The authors take as many members as there are non-members, in storage order; shuffle before you cut (`sample`).
    "correctness" adds nothing to the forget accuracy, which it repeats wherever right rows are called member.

    Args:
        members: outputs and targets of retain rows.
        non_members: the same of rows that were not trained on.
        forget: the same of the forget set.
        features: names out of `FEATURES`; the released modified entropy is `modified_entropy_released` of the signals.
        bins: see `svc_attack`.

    Reference:
        Jia et al., Model Sparsity Can Simplify Machine Unlearning, NeurIPS 2023, arXiv:2304.04934; Fan et al., SalUn,
        ICLR 2024, arXiv:2310.12508.
    """
    found = {}
    for name in features:
        a, b, asked = (FEATURES[name](*rows) for rows in (members, non_members, forget))
        found[name] = svc_attack(a, b, asked, bins=bins)
    return found


def training_privacy(
    fitted: tuple[Tensor, Tensor],
    asked: tuple[Tensor, Tensor],
    attack: Callable[[Tensor, Tensor, Tensor], Attack] = svc_attack,
) -> float:
    """Balanced accuracy on other members and non-members than those fitted on, in [0, 1]; one half is guessing.

    The "training privacy" of Unlearn-Sparse and SalUn: how much the attack can do where the truth is known.

    Args:
        fitted: features of members and of non-members that the attack is fitted on.
        asked: features of members and of non-members that it is judged on; none may be among the fitted ones.
        attack: any attack of this module on features.

    Returns:
        NaN where there is no attack.
    """
    if not len(asked[0]) or not len(asked[1]):
        return math.nan
    called = attack(*fitted, torch.cat(asked)).called
    if called is None:
        return math.nan
    found, wrong = called[: len(asked[0])].double().mean(), called[len(asked[0]) :].double().mean()
    return ((found + 1 - wrong) / 2).item()


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


def class_threshold_attack(members: Rows, non_members: Rows, forget: Rows) -> Attack:
    """A threshold for each class, asked about the forget set: scores (n,) and targets (n,), larger meaning member.

    A class that has no members or no non-members to fit on, such as one that is forgotten as a whole, gets the
    threshold of all rows together, and the note counts the rows of the forget set which that concerns.

    Reference:
        Song, Mittal. Systematic Evaluation of Privacy Risks of Machine Learning Models. USENIX Security 2021,
        arXiv:2003.10595, with confidence, minus entropy or minus modified entropy as the score.
    """
    everything = threshold_attack(members[0], non_members[0], forget[0])
    if everything.called is None:
        return everything
    called, general = everything.called.clone(), 0
    for label in forget[1].unique():
        own = [scores[targets == label] for scores, targets in (members, non_members, forget)]
        attack = threshold_attack(*own)
        if attack.called is None:  # no rows of the class to fit on, or all of them tied
            general += len(own[2])
        else:
            called[(forget[1] == label).cpu()] = attack.called
    note = f"{general} of {len(called)} rows have the threshold of all classes: theirs has none of its own"
    return Attack(called.double().mean().item(), called=called, note=note if general else "")


def mean_loss_attack(members: Tensor, forget: Tensor) -> Attack:
    """Member where the loss is at most the mean loss of known members: losses (m,), asked about forget (n,).

    Reference:
        Yeom et al., Privacy Risk in Machine Learning, CSF 2018, arXiv:1709.01604, adversary 1 in its threshold form.
    """
    if reason := _unusable(members, "members") or _unusable(forget, "the forget set"):
        return Attack(math.nan, reason)
    threshold = members.double().mean().item()
    called = forget.double().cpu() <= threshold
    return Attack(called.double().mean().item(), threshold=threshold, called=called)


def kit_attack(forget: Tensor, unseen: Tensor, splits: int = 10, seed: int = 0) -> CrossValidated:
    """Attack of the NeurIPS 2023 challenge's starting kit: logistic regression on the loss, cross-validated.

    One half is the aim only where forget set and unseen rows are exchangeable, as with rows drawn at random.

    Args:
        forget: (n,) losses of the forget set.
        unseen: (l,) losses of rows that were never trained on; the longer side is shuffled and cut.
        splits: random splits; a tenth of the rows is judged in each.
        seed: of splits and cut.
    """
    return _cross_validated(forget, unseen, splits, seed)


def scrub_attack(forget: Tensor, unseen: Tensor, splits: int = 5, seed: int = 41) -> CrossValidated:
    """SCRUB's attack: as `kit_attack`, with losses held within 100 and unseen rows of the forget set's classes.

    Reference:
        Kurmanji, Triantafillou, Hayes, Triantafillou. Towards Unbounded Machine Unlearning. NeurIPS 2023.
        arXiv:2302.09880, section on user privacy.
    """
    return _cross_validated(forget.double().clamp(-100, 100), unseen.double().clamp(-100, 100), splits, seed)


def regression_attack(members: Tensor, non_members: Tensor, forget: Tensor) -> Attack:
    """Attack of Deep Regression Unlearning: an RBF machine on the absolute error: (m,), (l,), asked about (n,) errors.

    The errors are not scaled, so the answer depends on the unit of the targets. The authors' members are rows of all
    of D, the forget set included; pass rows of the retain set. `training_privacy` gives the shares on both sides.

    Reference:
        Tarun, Chundawat, Mandal, Kankanhalli. Deep Regression Unlearning. ICML 2023. arXiv:2210.08196.
    """
    return svc_attack(members.abs(), non_members.abs(), forget.abs())


def sample(rows: int, limit: int, seed: int = 0) -> Tensor:
    """Numbers of at most `limit` out of `rows` rows, ascending: shuffled with a seed, then cut; all if they fit."""
    if rows <= limit:
        return torch.arange(rows)
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[:limit].sort().values


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


def _cross_validated(forget: Tensor, unseen: Tensor, splits: int, seed: int) -> CrossValidated:
    size = min(len(forget), len(unseen))
    if reason := _unusable(forget, "the forget set") or _unusable(unseen, "unseen rows"):
        return CrossValidated(math.nan, reason=reason)
    if torch.cat([forget, unseen]).double().var(correction=0) < TINY:
        return CrossValidated(math.nan, reason="the loss is the same on every row")
    if size < 10:
        return CrossValidated(math.nan, reason=f"cross-validation needs 10 rows a side, and there are {size}")
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedShuffleSplit, cross_val_score

    cut = [values[sample(len(values), size, seed).to(values.device)] for values in (unseen, forget)]
    values, labels = _columns(torch.cat(cut)), np.repeat([0, 1], size)
    folds = StratifiedShuffleSplit(n_splits=splits, random_state=seed)
    scores = cross_val_score(LogisticRegression(), values, labels, cv=folds, scoring="accuracy")
    return CrossValidated(float(scores.mean()), float(scores.std()), tuple(map(float, scores)), size)


def _binned(values: NDArray, labels: NDArray, bins: int) -> tuple[NDArray, NDArray, NDArray]:
    """Groups of about equal size of one feature: their means (g, 1), labels (g,) and numbers of rows (g,)."""
    ordered = np.sort(values)
    edges = np.unique(ordered[np.arange(0, len(ordered), max(1, -(-len(ordered) // bins)))])
    group = np.searchsorted(edges, values, side="right") - 1
    mean = np.bincount(group, values) / np.bincount(group)
    counts = np.stack([np.bincount(group[labels == label], minlength=len(edges)) for label in (0, 1)])
    label, at = np.nonzero(counts)
    return mean[at][:, None], label, counts[label, at].astype(float)


def _stacked(members: Tensor, non_members: Tensor) -> tuple[NDArray, NDArray]:
    return _columns(torch.cat([members, non_members])), np.repeat([1, 0], [len(members), len(non_members)])


def _columns(feature: Tensor) -> NDArray:
    """(n,) or (n, d) -> (n, d) float64."""
    return feature.double().cpu().reshape(len(feature), -1).numpy()


def _degenerate(members: Tensor, non_members: Tensor, forget: Tensor, variance: float = 0.0) -> str:
    """Why there can be no attack; empty if there can."""
    for name, feature in (("members", members), ("non-members", non_members), ("the forget set", forget)):
        if reason := _unusable(feature, name):
            return reason
    fitted = torch.cat([members, non_members]).double()
    constant = bool((fitted == fitted[:1]).all()) or bool((fitted.var(0, correction=0) < variance).all())
    return "the feature is the same on every fitted row" if constant else ""


def _unusable(feature: Tensor, name: str) -> str:
    if not len(feature):
        return f"there are no rows of {name}"
    finite = torch.isfinite(feature).reshape(len(feature), -1).all(1)
    return "" if finite.all() else f"the feature is not finite on {int((~finite).sum())} rows of {name}"

