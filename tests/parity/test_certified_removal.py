"""Certified removal against the authors' equations: steps, bounds, true residuals, certificate."""

import numpy as np
import pytest
from scipy.special import expit
from vislearn.methods.certified_removal import CertifiedRemoval, worst_case_bound

from .harness import Case, of_kind


def model(case: Case, x: np.ndarray, y: np.ndarray, noise: np.ndarray, **options: float) -> CertifiedRemoval:
    """An estimator with the noise (k, d) of the case, whose Hessian is always that of its weights."""

    class Given(CertifiedRemoval):
        def _draw(self, models: int, d: int) -> np.ndarray:
            return noise

    h = case.meta["hyperparameters"]
    given = {"sigma": h["std"], "epsilon": h["epsilon"], "delta": h["delta"]} | options
    return Given(lam=h["lam"], **given, stale=0, random_state=0).fit(x, y)


def residual(case: Case, x: np.ndarray, y: np.ndarray, w: np.ndarray, b: np.ndarray) -> float:
    """Norm of the gradient in sum form, for signs y."""
    gradient = x.T @ ((expit(y * (x @ w)) - 1) * y) + case.meta["hyperparameters"]["lam"] * len(x) * w + b
    return float(np.linalg.norm(gradient))


@of_kind("certified_removal")
def test_training(case: Case) -> None:
    a = case.arrays
    case.close("w0", model(case, a["X"], a["y"], a["b"][None]).coef_[0], a["w0_official"])
    k = case.meta["hyperparameters"]["ovr_K"]
    ovr = model(case, a["X"], a["ovr_labels"], a["ovr_B"].T)
    assert len(ovr.classes_) == k
    case.close("w0", ovr.coef_.T, a["ovr_W0_exact"])


@of_kind("certified_removal")
def test_single_rows_in_order(case: Case) -> None:
    a, h, expected = case.arrays, case.meta["hyperparameters"], case.meta["expected"]
    x, y, b = a["X"], a["y"], a["b"]
    mine = model(case, x, y, b[None])
    assert mine.budget_ == pytest.approx(expected["certificate"]["budget"], rel=1e-12)
    total, steps = 0.0, expected["per_step"]
    for i, row in enumerate(h["removed_in_order"]):
        before = mine.spent_
        mine.unlearn(np.array([row]))
        bound, rest = mine.spent_ - before, mine.row_numbers_
        case.close("bound_exact_spectral_norm", bound, steps["bound_exact_spectral_norm"][i])
        case.close("bound_official_power_iteration", bound, steps["bound_official_power_iteration"][i])
        case.close("bound_exact_spectral_norm", mine.spent_, expected["certificate"]["cumulative_bound"][i])
        case.close("w_after", mine.coef_[0], a["w_after"][i])
        true = residual(case, x[rest], y[rest], mine.coef_[0], b)
        case.close("residual", true, steps["true_residual_norm"][i])
        assert true <= mine.spent_
        assert true - total <= bound
        total = true
        apart = np.linalg.norm(mine.coef_[0] - a["w_retrained"][i])
        case.close("w0", apart, steps["distance_to_retrained"][i])
    assert mine.retrained_ == 0
    assert expected["certificate"]["removals_allowed"] == len(h["removed_in_order"])


@of_kind("certified_removal")
def test_the_budget_stops_where_the_case_says(case: Case) -> None:
    """With the budget set to what i removals spend, i are served and one more retrains."""
    a, h, expected = case.arrays, case.meta["hyperparameters"], case.meta["expected"]["certificate"]
    served = 4
    epsilon = expected["c"] * expected["cumulative_bound"][served - 1] * (1 + 1e-6) / h["std"]
    mine = model(case, a["X"], a["y"], a["b"][None], epsilon=epsilon)
    for i, row in enumerate(h["removed_in_order"][: served + 1]):
        mine.unlearn(np.array([row]))
        assert mine.retrained_ == (i == served)
        assert mine.spent_ <= mine.budget_
    case.close("w0", mine.coef_[0], a["w_retrained"][served])


@of_kind("certified_removal")
def test_batch(case: Case) -> None:
    a, h, expected = case.arrays, case.meta["hyperparameters"], case.meta["expected"]["batch"]
    mine = model(case, a["X"], a["y"], a["b"][None])
    before = mine.spent_
    mine.unlearn(np.array(h["batch_removed"]))
    case.close("bound_exact_spectral_norm", mine.spent_ - before, expected["bound"])
    case.close("w_after", mine.coef_[0], a["w_after_batch"])
    rest = mine.row_numbers_
    true = residual(case, a["X"][rest], a["y"][rest], mine.coef_[0], a["b"])
    case.close("residual", true, expected["true_residual_norm"])


@of_kind("certified_removal")
def test_one_against_the_rest(case: Case) -> None:
    a, h, expected = case.arrays, case.meta["hyperparameters"], case.meta["expected"]["ovr"]
    x, labels, noise = a["X"], a["ovr_labels"], a["ovr_B"]
    mine = model(case, x, labels, noise.T)
    for i, row in enumerate(h["ovr_removed_in_order"]):
        before = mine.spent_
        mine.unlearn(np.array([row]))
        case.close("bound_exact_spectral_norm", mine.spent_ - before, expected["bound_sum_over_classes"][i])
        case.close("w_after", mine.coef_.T, a["ovr_W_after"][i])
        rest = mine.row_numbers_
        signs = [np.where(labels[rest] == k, 1.0, -1.0) for k in range(h["ovr_K"])]
        true = [residual(case, x[rest], s, w, b) for s, w, b in zip(signs, mine.coef_, noise.T, strict=True)]
        case.close("residual", np.linalg.norm(true), expected["true_residual_norm_joint"][i])


@of_kind("certified_removal")
def test_worst_case(case: Case) -> None:
    h = case.meta["hyperparameters"]
    assert worst_case_bound(h["n"], h["lam"]) == pytest.approx(case.meta["expected"]["worst_case_bound_single"])
