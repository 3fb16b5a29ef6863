"""Whether many unlearned models behave like many retrained ones, sample by sample: KLoM and the challenge's score.

Each sample has one value per model: `margin` for a classifier, the signed residual for a regressor. Values are (models,
samples); the two sides need not have as many models. Both scores depend on the number of models, so each comes with
the same score between retrained models.
"""

import math
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Values = NDArray[np.float64]
Direction = Literal["oracle_unlearned", "unlearned_oracle"]
Binning = Literal["closed", "open", "first_release"]

KLOM_LEAST, KLOM_ADVISED = 2, 80  # models a side: below it is undefined; with 20 the floor alone is about 3
QUALITY_LEAST, QUALITY_ADVISED = 3, 64  # below, the highest epsilon that can be measured is below the first bin

DELTA = 1e-5  # the challenge's settings
EPSILON_CAP = 50.0
PER_UNIT = 100  # thresholds per unit of the values
BUFFER = 2.0  # windows are as wide as the narrower sample, give or take this
BUCKET = 0.5


def margin(logits: Tensor, targets: Tensor) -> Tensor:
    """Logit of the true class minus logsumexp of the others, which is log(p / (1 - p)) without rounding.

    Args:
        logits: (..., n, k), finite, k > 1.
        targets: (n,) classes.

    Returns:
        (..., n) float64.
    """
    if targets.ndim != 1 or logits.ndim < 2 or logits.shape[-2] != len(targets) or logits.shape[-1] < 2:
        raise ValueError(f"not logits (..., n, k) and targets (n,): {tuple(logits.shape)}, {tuple(targets.shape)}")
    if not logits.isfinite().all():
        raise ValueError("a logit is not finite, so that the sample has no margin")
    if len(targets) and not 0 <= targets.min() <= targets.max() < logits.shape[-1]:
        raise ValueError(f"targets must lie in [0, {logits.shape[-1]})")
    true = torch.nn.functional.one_hot(targets, logits.shape[-1]).bool().expand(logits.shape)
    z = logits.double()
    return z.masked_fill(~true, 0).sum(-1) - z.masked_fill(true, -math.inf).logsumexp(-1)


def klom(
    unlearned: Tensor | Values, oracle: Tensor | Values, direction: Direction = "oracle_unlearned",
    binning: Binning = "closed", bins: int = 20, eps: float = 1e-5, clip: float = 100.0,
) -> Values:  # fmt: skip
    """KL divergence of margins, per sample, in nats: 0 where the histograms are equal, at most about ln(1 / eps).

    Args:
        unlearned: (a, s) values of a unlearned models.
        oracle: (b, s) values of b retrained models.
        direction: KL(oracle || unlearned), as in the benchmark's tables, or KL(unlearned || oracle), as in its first
            release.
        binning: "closed" gives equal bins from the smallest to the largest value of both sides. In the released code
            ("open") the largest value falls out of the last bin; a side that loses all its values gives NaN as first
            argument and counts as uniform as second. "first_release" has one bin less, clips the first argument only
            and gives NaN where all values are equal.
        bins: number of bins.
        eps: least probability of the second distribution where the first has some.
        clip: values are cut to [-clip, clip]; infinity for values with a unit.

    Returns:
        (s,) float64. Means and 95th percentiles over samples are what is reported.

    Reference:
        Georgiev et al. Attribute-to-Delete. arXiv:2410.23232, app. E.1.
    """
    u, o = _sides(unlearned, oracle, KLOM_LEAST)
    p, q = (o, u) if direction == "oracle_unlearned" else (u, o)
    p = p.clip(-clip, clip)
    if binning == "first_release":
        bins -= 1
    else:
        q = q.clip(-clip, clip)
    low, high = np.minimum(p.min(0), q.min(0)), np.maximum(p.max(0), q.max(0))
    if binning != "first_release":
        high = np.where(low == high, low + 1, high)
    edges = np.linspace(low, high, bins + 1)  # (bins + 1, s)
    p, q = (_histogram(values, edges, binning == "closed") for values in (p, q))
    if binning == "first_release":  # a last entry that is always empty, and the least probability everywhere
        p, q = (np.concatenate([h, np.zeros_like(h[:1])]) for h in (p, q))
        q = np.maximum(np.where(q.sum(0) > 0, q, np.nan), eps)
    else:
        q = np.where(p > 0, np.maximum(q, eps), q)
    q = q / np.where(p.sum(0) > 0, q.sum(0), np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):
        terms = np.where(p > 0, p * (np.log(p) - np.log(q)), 0 * q)  # 0 * q: NaN stays NaN
    return terms.sum(0)


def halves(values: Tensor | Values) -> tuple[Values, Values]:
    """Two disjoint halves (n // 2, s) of the models (n, s), every other one: what a floor is made of."""
    v = _array(values)
    half = len(v) // 2
    return v[0 : 2 * half : 2], v[1 : 2 * half : 2]


class Quality(NamedTuple):
    """Forgetting quality of the challenge.

    Attributes:
        score: F, the mean over samples of 2^-(epsilon // 0.5), 0 above `highest`; 1 only for equal samples.
        epsilon: (s,) per sample, in [0, 50]; NaN where no decision rule was left.
        highest: the largest epsilon that this number of models can measure.
        collapsed: share of samples on which one side is less than 1 % as wide as the other.
    """

    score: float
    epsilon: Values
    highest: float
    collapsed: float


def forgetting_quality(unlearned: Tensor | Values, retrained: Tensor | Values) -> Quality:
    """F of the NeurIPS 2023 challenge: how well the best of many decision rules tells unlearned from retrained models.

    Rules are thresholds every 1/100 and windows about as wide as the narrower sample. Rates are counted by search in
    sorted values, and thresholds between the same values share one count, which is exact and needs a few milliseconds
    a sample with 512 models. F = 1 is no ceiling to aim at: two samples of one normal distribution give about 0.2, so
    divide by F between disjoint halves of the retrained models.

    Args:
        unlearned: (a, s) values of a unlearned models on s rows of the forget set, from a seeds of the method.
        retrained: (b, s) of b retrained models.

    Reference:
        Triantafillou et al. Are we making progress in unlearning? arXiv:2406.09073.
    """
    u, r = _sides(unlearned, retrained, QUALITY_LEAST)
    epsilon = np.array([sample_epsilon(u[:, i], r[:, i]) for i in range(u.shape[1])])
    widths = np.sort([np.ptp(u, axis=0), np.ptp(r, axis=0)], axis=0)
    highest = math.ceil(math.log(min(len(u), len(r)) - 1))
    bucket = np.floor(epsilon / BUCKET)
    points = np.where((bucket + 1) * BUCKET <= highest, 0.5 ** np.nan_to_num(bucket), 0.0)
    points = points[~np.isnan(epsilon)]
    score = float(points.mean()) if len(points) else math.nan
    return Quality(score, epsilon, float(highest), float((widths[0] < 0.01 * widths[1]).mean()))


def final_score(quality: float, retain: tuple[float, float], test: tuple[float, float]) -> float:
    """The challenge's final score: F x (retain accuracy over the retrained model's) x (the same of test accuracy).

    Args:
        quality: F.
        retain: mean retain accuracy, unlearned and retrained, fractions.
        test: the same on the test set.
    """
    for value in (*retain, *test):
        if not 0 <= value <= 1:
            raise ValueError(f"accuracies are fractions in [0, 1], not {value}")
    if not (retain[1] and test[1]):
        raise ValueError("a retrained model that is never right has no ratio")
    return quality * (retain[0] / retain[1]) * (test[0] / test[1])


def sample_epsilon(u: Values, r: Values) -> float:
    """Epsilon of one sample: u (a,) and r (b,) values; NaN where every rule is discarded."""
    a, b = np.sort(u), np.sort(r)
    if np.ptp(b) < np.ptp(a) or (np.ptp(a) == np.ptp(b) and np.median(b) < np.median(a)):
        a, b = b, a  # a is the narrower
    width, wider = float(np.ptp(a)), float(np.ptp(b))
    if not wider:
        return 0.0 if a[0] == b[0] else EPSILON_CAP
    if width < 0.01 * wider:
        return EPSILON_CAP
    return float(np.fmax(_windows(a, b, width), _thresholds(a, b)))


def _thresholds(a: Values, b: Values) -> float:
    """The largest epsilon of rules "at or above t": the sample of larger median is positive; NaN if all are dropped."""
    positive, negative = (a, b) if np.median(a) > np.median(b) else (b, a)
    pooled = np.sort(np.concatenate([a, b]))
    n = math.ceil((pooled[-1] - pooled[0]) * PER_UNIT)
    first = _first(pooled, pooled[:1], pooled[-1:], n)
    t = pooled[np.diff(first, prepend=0) > 0]  # thresholds between the same two values count the same
    caught, wrong = (len(v) - np.searchsorted(v, t) for v in (positive, negative))
    return _largest(caught, wrong, len(positive), len(negative))


def _windows(a: Values, b: Values, width: float) -> float:
    """The largest epsilon of rules "inside [l, r]": a, the narrower sample, is positive; NaN if all are dropped."""
    start, stop = a[0] + width - BUFFER, a[-1] + BUFFER
    right = np.linspace(start, stop, math.ceil((stop - start) * PER_UNIT))
    lefts = math.ceil(2 * BUFFER * PER_UNIT)
    pooled = np.sort(np.concatenate([a, b]))
    first = _first(pooled, right[:, None] - width - BUFFER, right[:, None] - width + BUFFER, lefts)
    ends = np.concatenate([first, np.full((len(right), 1), lefts)], axis=1)
    row, cell = np.nonzero(np.diff(ends, axis=1, prepend=0) > 0)  # some left end lies behind `cell` pooled values
    left = np.append(pooled, np.inf)  # a left end behind all values catches nothing
    caught, wrong = (np.searchsorted(v, right, "right")[row] - np.searchsorted(v, left)[cell] for v in (a, b))
    return _largest(np.maximum(caught, 0), np.maximum(wrong, 0), len(a), len(b))


def _first(values: Values, start: Values, stop: Values, n: int) -> NDArray[np.int64]:
    """Index of the first of n points from start to stop (each (..., 1)) that is at or above each value; n if none is.

    The points are those of `linspace`; the index is found by division and put right by one either way, as rounding asks
    for.
    """
    if n < 2:
        return np.where(values <= start, 0, n).astype(np.int64)
    step = (stop - start) / (n - 1)
    guess = np.clip(np.ceil((values - start) / step), 0, n).astype(np.int64)
    point = np.where(guess >= n - 1, stop, start + guess * step)
    guess += (point < values) & (guess < n)
    before = start + (guess - 1) * step
    return guess - ((guess > 0) & (before >= values))


def _largest(caught: NDArray[np.int64], wrong: NDArray[np.int64], positives: int, negatives: int) -> float:
    """The largest epsilon of rules that catch so many positives and, wrongly, so many negatives."""
    found = _table(positives, negatives)[caught, wrong]
    found = found[~np.isnan(found)]
    return float(found.max()) if len(found) else math.nan


@lru_cache(maxsize=8)
def _table(positives: int, negatives: int) -> Values:
    """Epsilon by counts, (positives + 1, negatives + 1): NaN is a rule that is dropped."""
    fnr = (1 - np.arange(positives + 1) / positives)[:, None]
    fpr = (np.arange(negatives + 1) / negatives)[None]
    with np.errstate(divide="ignore", invalid="ignore"):
        one, other = np.log(1 - DELTA - fpr) - np.log(fnr), np.log(1 - DELTA - fnr) - np.log(fpr)
    epsilon = np.clip(np.fmax(one, other), 0, EPSILON_CAP)  # of two logarithms the one that exists
    epsilon[np.broadcast_to((fnr == 0) != (fpr == 0), epsilon.shape)] = np.nan  # too few models to tell
    epsilon[positives, 0] = EPSILON_CAP  # no error at all
    return epsilon


def _histogram(values: Values, edges: Values, closed: bool) -> Values:
    """Shares (bins, s) of values (n, s) between edges (bins + 1, s); 0 throughout where no value is inside."""
    bins, samples = len(edges) - 1, values.shape[1]
    low, high = edges[0], edges[-1]
    column = np.broadcast_to(np.arange(samples), values.shape)
    with np.errstate(divide="ignore", invalid="ignore"):
        guess = np.nan_to_num((values - low) / (high - low) * bins)
    index = np.clip(guess, 0, bins - 1).astype(np.int64)
    index -= values < edges[index, column]  # division and linspace round differently
    index += values >= edges[index + 1, column]
    inside = np.broadcast_to(True, values.shape) if closed else values < high
    index = np.minimum(index, bins - 1)
    counts = np.bincount((index * samples + column)[inside], minlength=bins * samples).reshape(bins, samples)
    return counts / np.maximum(counts.sum(0), 1)


def _sides(one: Tensor | Values, other: Tensor | Values, least: int) -> tuple[Values, Values]:
    a, b = _array(one), _array(other)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"values of the same samples expected, not of {a.shape[1]} and {b.shape[1]}")
    if min(len(a), len(b)) < least:
        raise ValueError(f"at least {least} models a side are needed, and there are {len(a)} and {len(b)}")
    return a, b


def _array(values: Tensor | Values) -> Values:
    v = np.asarray(values.detach().cpu() if isinstance(values, Tensor) else values, np.float64)
    if v.ndim != 2 or not v.shape[1]:
        raise ValueError(f"values (models, samples) expected, not {v.shape}")
    if not np.isfinite(v).all():
        broken = (~np.isfinite(v)).any(1).sum()
        raise ValueError(f"values are not finite in {broken} of {len(v)} models; leave these models out and say so")
    return v
