"""Distances to the retrained models, with the distance between retrained models as the floor."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

DRAWS = 2000
INTERVAL = "95 %, two-way bootstrap over seeds"


def gap(unlearned: Sequence[float], retrained: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """Mean over pairs of seeds of |u - r|, with an interval.

    Retraining with another seed gives another model, so every pair (unlearned seed, retrained seed) is one draw of the
    gap. The difference of the two means, which the literature prints, stands beside it as `of_means`; it is smaller
    whenever single models scatter around each other.

    Args:
        unlearned: one value per unlearned model.
        retrained: one value per retrained model.
        seed: seed of the bootstrap.

    Returns:
        mean, low, high (None with a single pair, and `note` says so), of_means, pairs, interval.
    """
    u, r = np.asarray(unlearned, float), np.asarray(retrained, float)
    distance = np.abs(u[:, None] - r[None, :])
    out: dict[str, Any] = {
        "mean": float(distance.mean()), "low": None, "high": None,
        "of_means": float(abs(u.mean() - r.mean())), "pairs": int(distance.size), "interval": INTERVAL,
    }  # fmt: skip
    if distance.size < 2:
        out["note"] = "one pair of models: no interval; retrain with at least two more seeds"
        return out
    rng = np.random.default_rng(seed)
    i = rng.integers(len(u), size=(DRAWS, len(u)))
    j = rng.integers(len(r), size=(DRAWS, len(r)))
    draws = distance[i[:, :, None], j[:, None, :]].mean(axis=(1, 2))
    out["low"], out["high"] = (float(q) for q in np.percentile(draws, [2.5, 97.5]))
    return out


def floor(retrained: Sequence[float], seed: int = 0) -> dict[str, Any] | None:
    """Mean |r_i - r_j| over pairs of retrained models: the gap that no method can be expected to beat.

    Returns:
        mean, low, high (None below three models), pairs; or None with fewer than two retrained models.
    """
    r = np.asarray(retrained, float)
    if len(r) < 2:
        return None
    distance = np.abs(r[:, None] - r[None, :])
    pairs = np.triu_indices(len(r), k=1)
    out: dict[str, Any] = {"mean": float(distance[pairs].mean()), "low": None, "high": None, "pairs": len(pairs[0])}
    if len(r) < 3:
        return out
    draws = np.random.default_rng(seed).integers(len(r), size=(DRAWS, len(r)))
    apart = draws[:, pairs[0]] != draws[:, pairs[1]]  # a model drawn twice is no pair
    values = np.where(apart, distance[draws[:, pairs[0]], draws[:, pairs[1]]], 0.0).sum(1)[apart.any(1)]
    means = values / apart.sum(1)[apart.any(1)]
    out["low"], out["high"] = (float(q) for q in np.percentile(means, [2.5, 97.5]))
    return out


def interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float | None, float | None]:
    """Mean and Student's t interval over seeds; the ends are None with a single value."""
    v = np.asarray(values, float)
    if len(v) < 2:
        return float(v.mean()), None, None
    half = float(stats.t.ppf(0.5 + level / 2, len(v) - 1) * v.std(ddof=1) / np.sqrt(len(v)))
    return float(v.mean()), float(v.mean() - half), float(v.mean() + half)
