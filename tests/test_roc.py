"""ROC curves against scikit-learn, by hand, and their intervals."""

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from vislearn.metrics.roc import bootstrap, numbers, roc


def normal(n: int, shift: float, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1, n)


def test_the_curve_by_hand() -> None:
    curve = roc(np.array([3.0, 2.0, 1.0]), np.array([2.0, 0.0]))
    assert curve.thresholds.tolist() == [math.inf, 3, 2, 1, 0]
    assert curve.fpr.tolist() == [0, 0, 0.5, 0.5, 1]
    assert curve.tpr.tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1, 1])
    assert curve.auc == pytest.approx(4.5 / 6)  # of six pairs 3>2, 3>0, 2>0, 1>0 and the tie 2=2
    assert curve.balanced == pytest.approx((1 + 0.5) / 2)
    assert (curve.members, curve.non_members) == (3, 2)


def test_area_and_best_accuracy_are_scikit_learns_with_ties() -> None:
    a, b = np.round(normal(80, 1, 0), 1), np.round(normal(50, 0, 1), 1)
    labels, scores = np.repeat([1, 0], [80, 50]), np.concatenate([a, b])
    curve = roc(a, b)
    assert curve.auc == pytest.approx(roc_auc_score(labels, scores))
    best = max(balanced_accuracy_score(labels, scores >= t) for t in np.unique(scores))
    assert curve.balanced == pytest.approx(best)
    assert roc(torch.tensor(a), torch.tensor(b)).auc == curve.auc


def test_the_rate_is_that_of_the_last_vertex_within_the_bound() -> None:
    curve = roc(np.array([5.0, 3.0, 1.0]), np.array([4.0, 2.0, 0.0, -1.0]))
    assert curve.tpr_at(0) == pytest.approx(1 / 3)
    assert curve.tpr_at(0.24) == pytest.approx(1 / 3)  # not interpolated towards the vertex at 0.25
    assert curve.tpr_at(0.25) == pytest.approx(2 / 3)
    assert curve.tpr_at(0.25, strict=True) == pytest.approx(1 / 3)
    assert math.isnan(curve.tpr_at(0, strict=True))
    assert curve.tpr_at(1) == 1


def test_every_vertex_is_kept_unless_asked() -> None:
    tied = np.array([4.0, 3.0, 2.0, 1.0])  # all on the diagonal
    assert roc(tied, tied).tpr_at(0.6) == 0.5
    assert roc(tied, tied, drop_intermediate=True).tpr_at(0.6) == 0.25


def test_constant_scores_say_nothing() -> None:
    curve = roc(np.ones(4), np.ones(3))
    assert (curve.auc, curve.balanced, curve.tpr_at(0.5)) == (0.5, 0.5, 0)


@pytest.mark.parametrize("bad", [np.array([]), np.ones((2, 2)), np.array([1.0, np.nan]), np.array([np.inf])])
def test_scores_that_give_no_curve_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="of members"):
        roc(bad, np.ones(2))
    with pytest.raises(ValueError, match="of non-members"):
        roc(np.ones(2), bad)


def test_rates_that_the_rows_cannot_resolve_are_named_and_left_out() -> None:
    found, notes = numbers(normal(200, 1, 0), normal(500, 0, 1), interval=False)
    assert set(found) == {"auc", "balanced", "tpr_at_1", "tpr_at_0"}
    assert notes == ["the rate of members at 0.1% false positives is unresolved: it needs 1000 non-members, and there "
                     "are 500"]  # fmt: skip
    found, notes = numbers(normal(50, 1, 0), normal(1000, 0, 1), interval=False)
    assert "tpr_at_01" not in found
    assert "needs 100 rows" in notes[0]
    found, notes = numbers(normal(100, 1, 0), normal(1000, 0, 1), interval=False)
    assert notes == []
    assert found["tpr_at_01"] <= found["tpr_at_1"]
    assert "tpr_at_1" not in numbers(normal(100, 1, 0), normal(99, 0, 1), interval=False)[0]


def test_the_interval_covers_the_truth_and_is_that_of_resampled_rows() -> None:
    a, b = normal(300, 1, 0), normal(200, 0, 1)
    found = bootstrap(a, b, (0.05,), draws=400, seed=3)
    rng = np.random.default_rng(7)
    areas, rates, best = [], [], []
    for _ in range(200):
        curve = roc(rng.choice(a, len(a)), rng.choice(b, len(b)))
        areas.append(curve.auc)
        rates.append(curve.tpr_at(0.05))
        best.append(curve.balanced)
    for name, draws, within in (("auc", areas, 0.015), ("0.05", rates, 0.06), ("balanced", best, 0.02)):
        assert found[name] == pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=within)
    low, high = found["auc"]
    assert low < 0.7602 < high  # the area of two normal laws one standard deviation apart
    assert found == bootstrap(a, b, (0.05,), draws=400, seed=3)
    assert found != bootstrap(a, b, (0.05,), draws=400, seed=4)


def test_parts_of_the_bootstrap_do_not_change_its_law() -> None:
    a, b = normal(3000, 0.5, 0), normal(3000, 0, 1)  # more than one part of bounded memory
    low, high = bootstrap(a, b, draws=300)["auc"]
    error = np.sqrt(1 / (12 * 3000) * 2)  # near one half the area of n and n rows has about this standard error
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.25)


def test_perfect_separation_has_an_interval_of_no_width() -> None:
    found, _ = numbers(np.ones(200), np.zeros(200))
    assert (found["auc"], found["auc_low"], found["auc_high"]) == (1, 1, 1)
    assert (found["tpr_at_1"], found["tpr_at_1_low"]) == (1, 1)


def test_points_for_logarithmic_axes_depend_on_the_number_of_non_members_alone() -> None:
    b = normal(1000, 0, 1)
    x, y = roc(normal(80, 1, 0), b).log_points()
    assert (len(x), x[0], x[-1], y[-1]) == (100, pytest.approx(0.001), 1, 1)
    assert x == roc(normal(30, 0, 2), b).log_points()[0]
    assert np.all(np.diff(y) >= 0)
    assert y[50] == roc(normal(80, 1, 0), b).tpr_at(x[50])
    assert np.allclose(np.diff(np.log(x)), np.log(1000) / 99)
