"""Distances to the retrained models, with the distance between retrained models as the floor."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

DRAWS = 2000
INTERVAL = "95 %, two-way bootstrap over seeds"


def gap(unlearned: ArrayLike, retrained: ArrayLike, seed: int = 0) -> dict[str, Any]:
    """Mean over pairs of seeds of |u - r|, with an interval.

    Retraining with another seed gives another model, so every pair (unlearned seed, retrained seed) is one draw of the
    gap. The difference of the two means, which the literature prints, stands beside it as `of_means`; it is smaller
    whenever single models scatter around each other.

    Args:
        unlearned: (a,) one value per unlearned model; or (m, a) of m metrics, which are averaged within each pair.
        retrained: (b,) one value per retrained model; or (m, b).
        seed: seed of the bootstrap.

    Returns:
        mean, low, high (None with a single pair, and `note` says so), of_means, pairs, interval.
    """
    u, r = np.atleast_2d(np.asarray(unlearned, float)), np.atleast_2d(np.asarray(retrained, float))
    distance = np.abs(u[:, :, None] - r[:, None, :]).mean(0)
    return over_pairs(distance, seed) | {"of_means": float(np.abs(u.mean(1) - r.mean(1)).mean())}


def over_pairs(distance: ArrayLike, seed: int = 0) -> dict[str, Any]:
    """Mean of distances between models of two groups, with a two-way bootstrap interval over both.

    Args:
        distance: (a, b) between model i of the first and model j of the second group.
        seed: seed of the bootstrap.

    Returns:
        mean, low, high (None with a single pair, and `note` says so), pairs, interval.
    """
    distance = np.asarray(distance, float)
    out: dict[str, Any] = {
        "mean": float(distance.mean()), "low": None, "high": None, "pairs": int(distance.size), "interval": INTERVAL,
    }  # fmt: skip
    if distance.size < 2:
        out["note"] = "one pair of models: no interval; retrain with at least two more seeds"
        return out
    rng = np.random.default_rng(seed)
    i = rng.integers(distance.shape[0], size=(DRAWS, distance.shape[0]))
    j = rng.integers(distance.shape[1], size=(DRAWS, distance.shape[1]))
    out["low"], out["high"] = ends(distance[i[:, :, None], j[:, None, :]].mean(axis=(1, 2)))
    return out


def floor(retrained: ArrayLike, seed: int = 0) -> dict[str, Any] | None:
    """Mean |r_i - r_j| over pairs of retrained models: the gap that no method can be expected to beat.

    Args:
        retrained: (b,) one value per retrained model; or (m, b) of m metrics, which are averaged within each pair.
        seed: seed of the bootstrap.

    Returns:
        mean, low, high (None below three models), pairs; or None with fewer than two retrained models.
    """
    r = np.atleast_2d(np.asarray(retrained, float))
    if r.shape[1] < 2:
        return None
    return over_pairs_within(np.abs(r[:, :, None] - r[:, None, :]).mean(0), seed)


def over_pairs_within(distance: ArrayLike, seed: int = 0) -> dict[str, Any]:
    """Mean of distances within one group, with a bootstrap interval over its models.

    Args:
        distance: (b, b), symmetric; the diagonal is not looked at.
        seed: seed of the bootstrap.

    Returns:
        mean, low, high (None below three models), pairs.
    """
    distance = np.asarray(distance, float)
    models = len(distance)
    pairs = np.triu_indices(models, k=1)
    out: dict[str, Any] = {"mean": float(distance[pairs].mean()), "low": None, "high": None, "pairs": len(pairs[0])}
    if models < 3:
        return out
    draws = np.random.default_rng(seed).integers(models, size=(DRAWS, models))
    apart = draws[:, pairs[0]] != draws[:, pairs[1]]  # a model drawn twice is no pair
    values = np.where(apart, distance[draws[:, pairs[0]], draws[:, pairs[1]]], 0.0).sum(1)[apart.any(1)]
    out["low"], out["high"] = ends(values / apart.sum(1)[apart.any(1)])
    return out


def ends(draws: np.ndarray) -> tuple[float, float]:
    """The ends of a 95 % interval of draws (n,)."""
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float | None, float | None]:
    """Mean and Student's t interval over seeds; the ends are None with a single value."""
    v = np.asarray(values, float)
    if len(v) < 2:
        return float(v.mean()), None, None
    half = float(stats.t.ppf(0.5 + level / 2, len(v) - 1) * v.std(ddof=1) / np.sqrt(len(v)))
    return float(v.mean()), float(v.mean() - half), float(v.mean() + half)
