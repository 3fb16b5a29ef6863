r"""FairSISA: equalized odds for an ensemble of hard votes, by three post-processings (Kadhe et al., 2023).

With a label y and a vote of S constituents in {0, 1} and a protected group a, an output that is 1 with probability
p_{v,a} for the vote pattern v has equalized odds when Pr[output 1 | y, a] is the same in every group a, for both
labels. Over the counts n_{v,a,y} of a calibration set, the best such p solves a linear program:

.. math::
    \min_p \tfrac{1}{N} \sum_{v,a} p_{v,a} n_{v,a,0} + (1 - p_{v,a}) n_{v,a,1} \quad \text{s.t.} \quad
    \sum_v p_{v,a} n_{v,a,y} / n_{a,y} \text{ is the same for all } a, \; y \in \{0, 1\}.

`aggregate` takes the majority for the pattern; `constituents` solves it for each constituent and takes the majority of
what they then say, which is not fair in general; `ensemble` lets the pattern be all S votes, and is never worse than
`aggregate` on the calibration set.

References:
    Kadhe, Halimi, Rawat, Baracaldo. FairSISA: Ensemble Post-Processing to Improve Fairness of Unlearning in LLMs.
    SoLaR workshop at NeurIPS 2023. arXiv:2312.07420;
    Hardt, Price, Srebro. Equality of Opportunity in Supervised Learning. NeurIPS 2016.

Departures: more than two groups are allowed; patterns that the calibration set does not show take the probability that
`aggregate` has for their majority; above MOST_PATTERNS constituents patterns with as many votes are one. A solver known
as a reference weighs groups and not rows, which is `weigh="groups"`.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import UserError

Method = Literal["aggregate", "constituents", "ensemble"]
Weigh = Literal["rows", "groups"]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
MOST_PATTERNS = 12  # constituents up to which every pattern of votes has a probability of its own


def majority(votes: ArrayLike) -> Ints:
    """(n,) 1 where more than half of the (S, n) votes are 1."""
    votes = np.asarray(votes)
    return (2 * votes.sum(axis=0, dtype=np.int64) > len(votes)).astype(np.int64)


def odds(probability: ArrayLike, label: ArrayLike, group: ArrayLike) -> dict[str, Any]:
    """Error, rates and equalized-odds gaps of an output that is 1 with these probabilities, in expectation.

    Args:
        probability: (n,) of output 1; of a plain prediction, the prediction.
        label: (n,) 0 or 1.
        group: (n,) 0 to G - 1.

    Returns:
        "error", "fpr" and "tpr" by group, "eo_gap_max" and "eo_gap_mean", the larger and the mean of both rates' gaps.
    """
    p, y, a = np.asarray(probability, dtype=np.float64), _binary(label, "label"), _groups(group)
    count, total = np.zeros((a.max() + 1, 2)), np.zeros((a.max() + 1, 2))
    np.add.at(count, (a, y), 1)
    np.add.at(total, (a, y), p)
    _known(count)
    rates = total / count
    gaps = np.ptp(rates, axis=0)
    return {
        "error": float(np.mean(np.where(y == 1, 1 - p, p))), "fpr": rates[:, 0].tolist(), "tpr": rates[:, 1].tolist(),
        "eo_gap_max": float(gaps.max()), "eo_gap_mean": float(gaps.mean()),
    }  # fmt: skip


def pattern_counts(pattern: ArrayLike, label: ArrayLike, group: ArrayLike, patterns: int) -> Floats:
    """(V, G, 2) rows of the calibration set with each pattern, group and label."""
    v, y, a = np.asarray(pattern, dtype=np.int64), _binary(label, "label"), _groups(group)
    counts = np.zeros((patterns, a.max() + 1, 2))
    np.add.at(counts, (v, a, y), 1)
    return counts


def solve(counts: Floats, weigh: Weigh = "rows") -> tuple[Floats, float]:
    """The fair probabilities with the least error: (V, G) of output 1, and the objective.

    Args:
        counts: (V, G, 2) see `pattern_counts`.
        weigh: "rows" minimises the error over all rows; "groups" the sum of the groups' own error rates.

    Raises:
        UserError: a group without rows of one of the labels.
    """
    from scipy.optimize import linprog

    patterns, groups, _ = counts.shape
    per = counts.sum(axis=0)  # (G, 2)
    _known(per)
    scale = per.sum() if weigh == "rows" else per.sum(axis=1)[None, :]
    cost = (counts[..., 0] - counts[..., 1]) / scale
    share = counts / per
    equal = np.zeros((groups - 1, 2, patterns, groups))
    for g in range(groups - 1):
        for y in (0, 1):
            equal[g, y, :, g], equal[g, y, :, g + 1] = share[:, g, y], -share[:, g + 1, y]
    rows = equal.reshape(-1, patterns * groups)
    found = linprog(cost.ravel(), A_eq=rows if len(rows) else None, b_eq=np.zeros(len(rows)) if len(rows) else None,
                    bounds=(0, 1), method="highs")  # fmt: skip
    if not found.success:  # a constant output is fair, so there always is a solution
        raise RuntimeError(f"the linear program was not solved: {found.message}")
    return np.clip(found.x, 0, 1).reshape(patterns, groups), float(found.fun + np.sum(counts[..., 1] / scale))


@dataclass
class FairVotes:
    """Post-processing of an ensemble's votes to equalized odds.

    Fit it again whenever a constituent or the calibration set changes: after a deletion in either, the old
    probabilities belong to another ensemble.

    Args:
        method: "aggregate", "constituents" or "ensemble".
        weigh: "rows" or "groups", see `solve`.
    """

    method: Method = "ensemble"
    weigh: Weigh = "rows"

    def __post_init__(self) -> None:
        if self.method not in ("aggregate", "constituents", "ensemble"):
            raise UserError(f"method is 'aggregate', 'constituents' or 'ensemble', not {self.method!r}")
        if self.weigh not in ("rows", "groups"):
            raise UserError(f"weigh is 'rows' or 'groups', not {self.weigh!r}")

    def fit(self, votes: ArrayLike, label: ArrayLike, group: ArrayLike) -> "FairVotes":
        """Solve on calibration rows, which no constituent was trained on.

        Args:
            votes: (S, n) 0 or 1.
            label: (n,) 0 or 1.
            group: (n,) 0 to G - 1.
        """
        votes = _binary(votes, "votes")
        self.constituents_ = len(votes)
        self.groups_ = int(_groups(group).max()) + 1
        self.objective_: float | list[float]
        self.probability_: Floats  # (V, G), or (S, 2, G) of "constituents"
        if self.method == "constituents":
            solved = [solve(pattern_counts(v, label, group, 2), self.weigh) for v in votes]
            self.probability_ = np.stack([p for p, _ in solved])
            self.objective_ = [objective for _, objective in solved]
            return self
        simple, objective = solve(pattern_counts(majority(votes), label, group, 2), self.weigh)
        self.probability_, self.objective_ = simple, objective
        if self.method == "ensemble":
            code, decided = self._patterns(votes)
            counts = pattern_counts(code, label, group, len(decided))
            self.probability_, self.objective_ = solve(counts, self.weigh)
            unseen = counts.sum(axis=2) == 0
            self.probability_[unseen] = simple[decided][unseen]
        return self

    def probability(self, votes: ArrayLike, group: ArrayLike) -> Floats:
        """(n,) probability of output 1."""
        votes, a = _binary(votes, "votes"), _groups(group)
        if len(votes) != self.constituents_ or a.max(initial=0) >= self.groups_:
            raise UserError(
                f"this was fitted for {self.constituents_} constituents and {self.groups_} groups; fit it again after "
                "either changed"
            )
        if self.method == "constituents":
            return majority_probability(np.stack([p[v, a] for p, v in zip(self.probability_, votes, strict=True)]))
        pattern = majority(votes) if self.method == "aggregate" else self._patterns(votes)[0]
        return self.probability_[pattern, a]

    def predict(self, votes: ArrayLike, group: ArrayLike, ids: ArrayLike, key: bytes, model: str) -> Ints:
        """(n,) outputs; the same row, key and model always give the same, so that asking again tells nothing new."""
        return (draws(ids, key, model) < self.probability(votes, group)).astype(np.int64)

    def _patterns(self, votes: Ints) -> tuple[Ints, Ints]:
        """(n,) the number of each row's pattern, and (V,) what the majority of each pattern is."""
        s = len(votes)
        if s > MOST_PATTERNS:
            return votes.sum(axis=0), (2 * np.arange(s + 1) > s).astype(np.int64)
        bits = 1 << np.arange(s)[::-1]  # constituent 0 is the most significant bit
        every = (np.arange(2**s)[None, :] & bits[:, None] != 0).astype(np.int64)
        return bits @ votes, majority(every)


def majority_probability(probability: ArrayLike) -> Floats:
    """(n,) probability that more than half of S independent outputs are 1; (S, n) is the probability of each."""
    p = np.asarray(probability, dtype=np.float64)
    ones = np.zeros((len(p) + 1, p.shape[1]))  # of 0, 1, ... outputs so far
    ones[0] = 1
    for q in p:
        ones[1:] = ones[1:] * (1 - q) + ones[:-1] * q
        ones[0] *= 1 - q
    return ones[len(p) // 2 + 1 :].sum(axis=0)


def draws(ids: ArrayLike, key: bytes, model: str) -> Floats:
    """(n,) numbers in [0, 1) that follow from key, model and row id; without the key they cannot be foreseen."""
    salt = hashlib.sha256(key + model.encode()).digest()
    raw = b"".join(hashlib.blake2b(str(i).encode(), key=salt, digest_size=8).digest() for i in np.asarray(ids).tolist())
    return (np.frombuffer(raw, dtype="<u8") >> np.uint64(11)).astype(np.float64) * 2.0**-53


def threshold_optimizer(
    score: ArrayLike, label: ArrayLike, group: ArrayLike, grid_size: int = 1000
) -> Any:  # fmt: skip
    """fairlearn's randomised thresholds on the mean score, fitted: continuous scores tell more than hard votes.

    Ask it with `predict(score[:, None], sensitive_features=group, random_state=...)`.

    Args:
        score: (n,) mean of the constituents' scores on calibration rows.
        label: (n,) 0 or 1.
        group: (n,) groups.
        grid_size: points of the curve on which thresholds are sought.

    Raises:
        UserError: fairlearn is not installed.
    """
    try:
        from fairlearn.postprocessing import ThresholdOptimizer
    except ImportError:
        raise UserError("thresholds on scores need fairlearn; install it with: pip install 'vislearn[fair]'") from None
    from sklearn.base import BaseEstimator, ClassifierMixin

    class Given(ClassifierMixin, BaseEstimator):
        """Hands the score on, as the model whose threshold is sought."""

        def fit(self, x: Any, y: Any) -> "Given":
            self.classes_ = np.array([0, 1])
            return self

        def predict(self, x: Any) -> Any:
            return np.asarray(x)[:, 0]

    x, y = np.asarray(score, dtype=np.float64)[:, None], _binary(label, "label")
    chosen = ThresholdOptimizer(
        estimator=Given().fit(x, y), constraints="equalized_odds", objective="accuracy_score", grid_size=grid_size,
        prefit=True, predict_method="predict",
    )  # fmt: skip
    return chosen.fit(x, y, sensitive_features=_groups(group))


def intervals(
    probability: ArrayLike, label: ArrayLike, group: ArrayLike, repeats: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """95 % intervals of "error" and "eo_gap_max", by drawing rows again within each group and label.

    A gap is never negative, so that of a fair output is above 0 by chance: its interval says by how much.

    Args:
        probability: (n,) of output 1; of a plain prediction, the prediction.
        label: (n,) 0 or 1.
        group: (n,) 0 to G - 1.
        repeats: draws.
        seed: of the draws.
    """
    p, y, a = np.asarray(probability, dtype=np.float64), _binary(label, "label"), _groups(group)
    generator, groups = np.random.default_rng(seed), int(a.max()) + 1
    rates, wrong = np.zeros((repeats, groups, 2)), np.zeros(repeats)
    for g in range(groups):
        for which in (0, 1):
            # equal probabilities are drawn together
            value, count = np.unique(p[(a == g) & (y == which)], return_counts=True)
            if len(value) == 0:
                raise _unknown(g, which)
            n = count.sum()
            rates[:, g, which] = generator.multinomial(n, count / n, size=repeats) @ value / n
            wrong += n * np.abs(which - rates[:, g, which])
    drawn = {"error": wrong / len(p), "eo_gap_max": np.ptp(rates, axis=1).max(axis=1)}
    ends = {name: np.quantile(values, (0.025, 0.975)) for name, values in drawn.items()}
    return {name: (float(low), float(high)) for name, (low, high) in ends.items()}


def report(stages: Mapping[str, ArrayLike], label: ArrayLike, group: ArrayLike) -> dict[str, dict[str, Any]]:
    """`odds` of several outputs for the same test rows: before a deletion, after it, and post-processed."""
    return {name: odds(probability, label, group) for name, probability in stages.items()}


def _binary(values: ArrayLike, name: str) -> Ints:
    values = np.asarray(values)
    if values.size == 0 or not np.isin(values, (0, 1)).all():
        raise UserError(f"{name} holds 0 and 1 and at least one of them; of several classes, take one as the outcome 1")
    return values.astype(np.int64)


def _groups(group: ArrayLike) -> Ints:
    values = np.asarray(group)
    if values.size == 0 or values.min() < 0 or not np.array_equal(values, values.astype(np.int64)):
        raise UserError("groups are numbered 0, 1, ... and there is at least one row")
    return values.astype(np.int64)


def _known(count: Floats) -> None:
    empty = np.argwhere(count == 0)
    if len(empty):
        raise _unknown(*map(int, empty[0]))


def _unknown(group: int, label: int) -> UserError:
    advice = "take more calibration rows, or merge groups"
    return UserError(f"group {group} has no row with label {label}, so its rate is undefined; {advice}")
