"""ROC curves of scores, and what is read off them: larger scores mean member.

Thresholds are the values that occur, so tied scores move together. The rate of members found at a false positive rate
is that of the last vertex that keeps the bound, without interpolation.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]
Scores = Tensor | NDArray[np.floating]

BOUNDS = {"tpr_at_1": 0.01, "tpr_at_01": 0.001, "tpr_at_0": 0.0}  # false positive rates that reports give
FEWEST = 100  # members below which a rate at 0.1 % is not given: it would rest on single rows
DRAWS = 1000
INTERVAL = "95 %, bootstrap over samples"


@dataclass(frozen=True)
class Roc:
    """A ROC curve.

    Attributes:
        fpr, tpr: (v,) rates at the vertices, from (0, 0) to (1, 1).
        thresholds: (v,) scores from which on a row is called member; infinite at (0, 0).
        members, non_members: numbers of rows.
    """

    fpr: Floats
    tpr: Floats
    thresholds: Floats
    members: int
    non_members: int

    @property
    def auc(self) -> float:
        """Area under the curve: the chance that a member scores above a non-member, ties counting one half."""
        return float(np.trapezoid(self.tpr, self.fpr))

    @property
    def balanced(self) -> float:
        """The best balanced accuracy over all thresholds, chosen on these rows: it cannot fall below one half."""
        return float((1 + self.tpr - self.fpr).max() / 2)

    def tpr_at(self, bound: float, strict: bool = False) -> float:
        """Share of members found at the last vertex with a false positive rate of at most `bound`.

        Args:
            bound: false positive rate in [0, 1].
            strict: below the bound instead, as LiRA's authors count; NaN where there is no such vertex.
        """
        last = int(np.searchsorted(self.fpr, bound, side="left" if strict else "right")) - 1
        return float(self.tpr[last]) if last >= 0 else math.nan

    def resolves(self, bound: float) -> bool:
        """Whether there are non-members enough to tell this rate from 0: at least 1/bound of them."""
        return bound == 0 or self.non_members * bound >= 1 - 1e-9

    def log_points(self, points: int = 100) -> tuple[list[float], list[float]]:
        """The curve for logarithmic axes: rates of false positives from one row to all, evenly spaced in logarithms.

        The x depend on the number of non-members alone, so curves on the same rows can be averaged.
        """
        x = np.geomspace(1 / self.non_members, 1, points)
        x[-1] = 1.0
        last = np.searchsorted(self.fpr, x * (1 + 1e-12), side="right") - 1
        return x.tolist(), self.tpr[last].tolist()


def roc(members: Scores, non_members: Scores, drop_intermediate: bool = False) -> Roc:
    """The ROC curve of scores of members (m,) and non-members (l,), larger meaning member.

    Args:
        members: (m,) finite scores.
        non_members: (l,) finite scores.
        drop_intermediate: leave out vertices on a straight line between others, as scikit-learn does by default; with
            ties the last vertex within a bound can be among them.
    """
    from sklearn.metrics import roc_curve

    a, b = _scores(members, "members"), _scores(non_members, "non-members")
    labels = np.repeat([1, 0], [len(a), len(b)])
    fpr, tpr, thresholds = roc_curve(labels, np.concatenate([a, b]), drop_intermediate=drop_intermediate)
    return Roc(fpr, tpr, thresholds, len(a), len(b))


def bootstrap(
    members: Scores, non_members: Scores, bounds: Sequence[float] = (), draws: int = DRAWS, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """95 % intervals over samples: members and non-members are drawn again, each with replacement.

    The models are held fixed, so this is the uncertainty of which rows were asked, not of the training seeds.

    Returns:
        (low, high) of "auc", "balanced" and, for each of `bounds`, `str(bound)`: the rate of members at it.
    """
    a, b = _scores(members, "members"), _scores(non_members, "non-members")
    _, levels = np.unique(-np.concatenate([a, b]), return_inverse=True)  # 0 is the highest score
    found: dict[str, list[Floats]] = {}
    for tpr, fpr in _resampled(levels[: len(a)], levels[len(a) :], draws, seed):
        found.setdefault("auc", []).append(((tpr[:, 1:] + tpr[:, :-1]) * np.diff(fpr, axis=1)).sum(1) / 2)
        found.setdefault("balanced", []).append((1 + tpr - fpr).max(1) / 2)
        for bound in bounds:
            last = (fpr <= bound + 1e-12).sum(1) - 1
            found.setdefault(str(bound), []).append(tpr[np.arange(len(tpr)), last])
    ends = {name: np.percentile(np.concatenate(each), [2.5, 97.5]) for name, each in found.items()}
    return {name: (float(low), float(high)) for name, (low, high) in ends.items()}


def numbers(
    members: Scores, non_members: Scores, interval: bool = True, seed: int = 0, draws: int = DRAWS
) -> tuple[dict[str, float], list[str]]:
    """Everything that a report gives of an attack by scores, and in words what cannot be given.

    Returns:
        auc, balanced, tpr_at_1, tpr_at_01 and tpr_at_0 (at 1 %, 0.1 % and no false positives), each with `_low` and
        `_high` of its bootstrap interval if asked for; and a sentence for every rate that is unresolved.
    """
    curve = roc(members, non_members)
    out, notes, bounds = {"auc": curve.auc, "balanced": curve.balanced}, [], {}
    for name, bound in BOUNDS.items():
        if not curve.resolves(bound):
            notes.append(f"the rate of members at {bound:.1%} false positives is unresolved: it needs {1 / bound:.0f} "
                         f"non-members, and there are {curve.non_members}")  # fmt: skip
        elif name == "tpr_at_01" and curve.members < FEWEST:
            notes.append(f"no rate of members at {bound:.1%} false positives: it needs {FEWEST} rows of the asked set, "
                         f"and there are {curve.members}")  # fmt: skip
        else:
            out[name], bounds[name] = curve.tpr_at(bound), bound
    if interval:
        ends = bootstrap(members, non_members, tuple(bounds.values()), draws, seed)
        keys = {"auc": "auc", "balanced": "balanced"} | {name: str(bound) for name, bound in bounds.items()}
        for name, key in keys.items():
            out[f"{name}_low"], out[f"{name}_high"] = ends[key]
    return out, notes


def _resampled(a: NDArray, b: NDArray, draws: int, seed: int) -> Iterator[tuple[Floats, Floats]]:
    """Rates (d, v + 1) of members and non-members at every level, for the draws in parts of bounded memory."""
    rng = np.random.default_rng(seed)
    count = int(max(a.max(), b.max())) + 1
    step = max(1, 2_000_000 // (len(a) + len(b) + count))
    for start in range(0, draws, step):
        size = min(step, draws - start)
        yield tuple(_rates(levels, count, size, rng) for levels in (a, b))  # type: ignore[misc]


def _rates(levels: NDArray, count: int, draws: int, rng: np.random.Generator) -> Floats:
    """(draws, count + 1) shares of a resampled set at or above each level, 0 before the first."""
    drawn = levels[rng.integers(len(levels), size=(draws, len(levels)))]
    drawn += count * np.arange(draws)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=draws * count).reshape(draws, count)
    return np.pad(counts.cumsum(1), ((0, 0), (1, 0))) / len(levels)


def _scores(scores: Scores, name: str) -> Floats:
    values = np.asarray(scores.detach().cpu() if isinstance(scores, Tensor) else scores, dtype=np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"a curve needs scores (n,) of {name}, at least one, not {values.shape}")
    if not np.isfinite(values).all():
        raise ValueError(f"{int((~np.isfinite(values)).sum())} scores of {name} are not finite")
    return values
