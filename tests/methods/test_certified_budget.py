"""Certified removal: losses, training, bounds that hold, a budget that is kept."""

import math
from typing import Any

import numpy as np
import pytest
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.utils.estimator_checks import parametrize_with_checks
from vislearn.methods.certified_removal import (
    LOSSES,
    CertifiedRemoval,
    minimise,
    objective,
    removal_step,
    worst_case_bound,
)

from vislearn.classical import RowError
from vislearn.methods import certified_removal


def some_rows(n: int = 120, d: int = 5, classes: int = 2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    x /= np.linalg.norm(x, axis=1, keepdims=True) * rng.choice([1, 1.3], size=(n, 1))
    score = x @ rng.normal(size=d) + rng.normal(0, 0.3, n)
    return x, np.digitize(score, np.quantile(score, np.arange(1, classes) / classes))


class Quiet(CertifiedRemoval):
    """With noise of 0.5 whatever sigma is, so that an ample budget does not drown the rows."""

    def _draw(self, models: int, d: int) -> np.ndarray:
        return 0.5 * self._random.standard_normal((models, d))


def gradients(model: CertifiedRemoval, x: np.ndarray, y: np.ndarray) -> list[float]:
    """Norms of the gradients on the rows that are left, from the definition."""
    rest, loss = model.row_numbers_, LOSSES[model.loss]
    x, y = x[rest], y[rest]
    positive = model.classes_ if len(model.classes_) > 2 else model.classes_[1:]
    out = []
    for w, b, c in zip(model.coef_, model._noise, positive, strict=True):
        s = np.where(y == c, 1.0, -1.0)
        total = sum(loss.slope(s[i] * (x[i] @ w)) * s[i] * x[i] for i in range(len(x)))
        out.append(float(np.linalg.norm(total + len(x) * model.lam * w + b)))
    return out


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name: str) -> None:
    loss, m, h = LOSSES[name], np.linspace(-4, 4, 8001), 1e-3
    middle = slice(1, -1)
    np.testing.assert_allclose((loss.value(m[2:]) - loss.value(m[:-2])) / (2 * h), loss.slope(m)[middle], atol=1e-5)
    np.testing.assert_allclose((loss.slope(m[2:]) - loss.slope(m[:-2])) / (2 * h), loss.curvature(m)[middle], atol=2e-3)
    steepest = np.abs(np.diff(loss.curvature(m))).max() / h
    assert 0.99 * loss.lipschitz < steepest <= loss.lipschitz * (1 + 1e-9)
    assert loss.gamma >= loss.lipschitz
    assert np.abs(loss.slope(m)).max() <= 1


def test_smooth_hinge_is_the_hinge_away_from_its_corner() -> None:
    m = np.array([-3.0, 0.5, 1.5, 4.0])
    np.testing.assert_allclose(LOSSES["smooth_hinge"].value(m), np.maximum(0, 1 - m), atol=1e-15)
    assert LOSSES["smooth_hinge"].value(np.array([1.0]))[0] == pytest.approx(1 / 12)  # 1/6 of the half width


def test_training_without_noise_is_logistic_regression() -> None:
    x, y = some_rows()
    w, hessian, left, steps = minimise(
        x, np.where(y == 1, 1.0, -1.0), len(x), 0.01, np.zeros(5), LOSSES["logistic"], 1e-10, 99
    )
    known = LogisticRegression(C=1 / (0.01 * len(x)), fit_intercept=False, tol=1e-10).fit(x, y)
    np.testing.assert_allclose(w, known.coef_[0], atol=1e-6)
    assert left <= 1e-10
    assert 3 < steps < 20
    p = 1 / (1 + np.exp(-x @ w))
    np.testing.assert_allclose(hessian, (x.T * p * (1 - p)) @ x + 0.01 * len(x) * np.eye(5), atol=1e-9)


@pytest.mark.parametrize("n", [20, 200])
def test_training_ends_where_little_is_curved(n: int) -> None:
    """Most rows are beyond the corner of the hinge, where plain Newton steps are far too long."""
    x, y = some_rows(n)
    x[:, 0] += np.where(y == 1, 4, -4)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    for seed in range(3):
        noise = 5 * np.random.default_rng(seed).normal(size=5)
        for loss in LOSSES.values():
            assert minimise(x, np.where(y == 1, 1.0, -1.0), n, 1e-3, noise, loss, 1e-10, 100).left <= 1e-10


def test_training_stops_at_rounding() -> None:
    """No tolerance is out of reach: the gradient left is told, and no step is repeated for ever."""
    x, y = some_rows()
    for loss in LOSSES.values():
        trained = minimise(x, np.where(y == 1, 1.0, -1.0), len(x), 1e-3, np.full(5, 3.0), loss, 0.0, 100)
        assert trained.left < 1e-11
        assert trained.steps < 100


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("classes", "stale", "scaling"), [(2, 0, "refuse"), (2, math.inf, "clip"), (3, 10, "refuse")])
def test_bounds_hold_and_refits_are_near(loss: str, classes: int, stale: float, scaling: str) -> None:
    for seed in range(2):
        x, y = some_rows(classes=classes, seed=seed)
        model = Quiet(0.01, 1e6, loss=loss, stale=stale, scaling=scaling, random_state=seed).fit(x, y)
        order = np.random.default_rng(seed).permutation(len(x))
        for request in (order[:1], order[1:2], order[2:7], order[7:8], order[8:20]):
            model.unlearn(request)
            true = gradients(model, x, y)
            assert sum(true) <= model.spent_ + 1e-10
            rest = model.row_numbers_
            for w, b, c, left in zip(model.coef_, model._noise, model._positive, true, strict=True):
                s = np.where(y[rest] == c, 1.0, -1.0)
                exact = minimise(x[rest], s, len(rest), 0.01, b, LOSSES[loss], 1e-10, 100).weights
                assert np.linalg.norm(w - exact) <= left / (0.01 * len(rest)) + 1e-9
        assert model.retrained_ == 0


def test_a_batch_is_one_step_with_the_summed_gradient() -> None:
    x, y = some_rows()
    model = CertifiedRemoval(0.01, 3.0, scaling="refuse", random_state=0).fit(x, y)
    w, b, rows = model.coef_[0].copy(), model._noise[0], np.array([3, 50, 7])
    s = np.where(y == 1, 1.0, -1.0)
    p = 1 / (1 + np.exp(s * (x @ w)))
    gone = -(x[rows].T @ (p * s)[rows]) + 3 * 0.01 * w
    rest = np.delete(np.arange(120), rows)
    hessian = (x[rest].T * (p * (1 - p))[rest]) @ x[rest] + 117 * 0.01 * np.eye(5)
    v = np.linalg.solve(hessian, gone)
    spent = model.spent_
    model.unlearn(rows)
    np.testing.assert_allclose(model.coef_[0], w + v, atol=1e-12)
    bound = np.linalg.norm(x[rest], 2) * np.linalg.norm(v) * np.linalg.norm(x[rest] @ v) / 4
    assert model.spent_ - spent == pytest.approx(bound, rel=1e-9)
    assert np.linalg.norm(objective(x[rest], s[rest], w + v, 1.17, b, LOSSES["logistic"])[1]) <= bound


def test_the_budget_is_never_passed() -> None:
    x, y = some_rows()
    model = CertifiedRemoval(0.01, 1.0, random_state=0).fit(x, y)
    assert model.budget_ == pytest.approx(1 / math.sqrt(2 * math.log(1.5e4)))
    noise, retrained, spent = model._noise, 0, model.spent_
    for row in range(40):
        model.unlearn(np.array([row]))
        assert model.spent_ <= model.budget_
        if model.retrained_ > retrained:
            assert model.retrained_ == retrained + 1
            assert model.spent_ < 1e-9
            assert not np.array_equal(model._noise, noise)  # old noise would undo the mask
            noise, retrained = model._noise, model.retrained_
        else:
            assert model.spent_ > spent
            assert np.array_equal(model._noise, noise)
        spent = model.spent_
        assert model.certificate_["spent"] == model.spent_
        assert model.certificate_["epsilon_spent"] == pytest.approx(model.spent_ / model.budget_)
    assert 0 < retrained < 40
    assert model.certificate_ == model.certificate_ | {
        "rows": 80,
        "removed": 40,
        "retrained": retrained,
        "epsilon": 1.0,
    }


def test_a_retrain_is_a_fit_of_the_rest() -> None:
    x, y = some_rows()
    model = CertifiedRemoval(0.01, 1e-3, random_state=0).fit(x, y).unlearn(np.arange(30))
    assert model.retrained_ == 1
    rest = model.row_numbers_
    s = np.where(y[rest] == 1, 1.0, -1.0)
    unit = x[rest] / np.linalg.norm(x[rest], axis=1, keepdims=True)
    exact = minimise(unit, s, 90, 0.01, model._noise[0], LOSSES["logistic"], 1e-10, 100).weights
    np.testing.assert_allclose(model.coef_[0], exact, atol=1e-9)


def test_kept_matrices_are_those_of_the_rows_that_remain() -> None:
    x, y = some_rows(classes=3)
    model = Quiet(0.01, 1e6, scaling="refuse", stale=math.inf, random_state=0).fit(x, y)
    start = model.coef_.copy()
    for request in ([0], [5, 6, 7], [100]):
        model.unlearn(np.array(request))
    rest = model.row_numbers_
    np.testing.assert_allclose(model._gram, x[rest].T @ x[rest], atol=1e-12)
    for h, w, c in zip(model._hessian, start, range(3), strict=True):
        s = np.where(y[rest] == c, 1.0, -1.0)
        np.testing.assert_allclose(h, objective(x[rest], s, w, 1.15, 0 * w, LOSSES["logistic"])[2], atol=1e-12)


def test_a_removal_makes_no_pass_over_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = some_rows(400)
    model = Quiet(0.01, 1e6, random_state=0).fit(x, y)
    monkeypatch.setattr(certified_removal, "objective", lambda *a: 1 / 0)
    model.unlearn(np.array([0]))
    assert model.certificate_["removed"] == 1
    assert model.retrained_ == 0


def test_stale_curvature_costs_budget_and_is_renewed() -> None:
    x, y = some_rows(400)
    spent, renewed = {}, {}
    for stale in (0, 0.3, math.inf):
        model = Quiet(0.01, 1e6, stale=stale, random_state=0).fit(x, y)
        at, renewed[stale] = model._taken_at, 0
        for row in range(12):
            model.unlearn(np.array([row]))
            renewed[stale] += model._taken_at is not at
            at = model._taken_at
        spent[stale] = model.spent_
    assert renewed[math.inf] == 0 < renewed[0.3] < renewed[0] == 11
    assert spent[0] < spent[0.3] < spent[math.inf]
    assert spent[0.3] < 1.5 * spent[0]


def test_curvature_is_renewed_before_a_retrain() -> None:
    x, y = some_rows(400)
    model = Quiet(0.01, 1e6, stale=math.inf, random_state=0).fit(x, y).unlearn(np.arange(10))
    before = model._taken_at
    fresh = Quiet(0.01, 1e6, stale=0, random_state=0).fit(x, y).unlearn(np.arange(10))
    start = fresh.spent_
    needed = fresh.unlearn(np.array([20])).spent_ - start
    model.budget_ = model.spent_ + 1.01 * needed  # enough for the step, not for the price of old curvature
    model.unlearn(np.array([20]))
    assert model.retrained_ == 0
    assert model._taken_at is not before


def test_the_worst_case_is_above_the_data() -> None:
    x, y = some_rows()
    spent = {}
    for bound in ("data", "worst"):
        model = Quiet(0.1, 1e6, bound=bound, scaling="refuse", random_state=0).fit(x, y)
        model.unlearn(np.array([4])).unlearn(np.array([9, 11]))
        assert model.retrained_ == 0
        assert sum(gradients(model, x, y)) <= model.spent_
        spent[bound] = model.spent_
    assert spent["worst"] > 10 * spent["data"]
    assert worst_case_bound(101, 0.1, m=2, gamma=0.5, C=2) == pytest.approx(0.5 * 4 * 16 / (0.01 * 99))


def test_a_step_that_is_not_solved_exactly_says_so() -> None:
    hessian = np.diag([1.0, 1e-14])[None]
    step = removal_step(np.eye(2), hessian, np.array([[0.3, 1e-15]]), np.zeros((1, 2)), 0.25)
    v = step.change[0]
    assert step.fresh >= 0.25 * (v @ v)
    assert step.stale == 0


def test_a_class_that_disappears_means_retraining() -> None:
    x, y = some_rows(classes=3)
    model = Quiet(0.01, 1e6, random_state=0).fit(x, y)
    assert model.coef_.shape == (3, 5)
    model.unlearn(np.flatnonzero(y == 1))
    assert model.classes_.tolist() == [0, 2]
    assert model.coef_.shape == (1, 5)
    assert model.retrained_ == 1
    assert set(model.predict(x)) == {0, 2}
    assert (model.predict(x)[y != 1] == y[y != 1]).mean() > 0.8
    weights = model.coef_
    with pytest.raises(RowError, match="only class 0 would remain"):
        model.unlearn(np.flatnonzero(y == 2))
    assert model.coef_ is weights
    assert len(model.row_numbers_) == (y != 1).sum()


def test_an_interrupted_removal_serves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = some_rows()
    model = CertifiedRemoval(0.01, 1e-3, random_state=0).fit(x, y)
    monkeypatch.setattr(model, "_draw", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.unlearn(np.array([0]))
    with pytest.raises(NotFittedError):
        model.predict(x)


@pytest.mark.parametrize(("scaling", "norms"), [("unit", [1, 1, 0]), ("clip", [1, 0.5, 0]), ("refuse", None)])
def test_rows_are_scaled_or_refused(scaling: str, norms: list[float] | None) -> None:
    model, x, y = CertifiedRemoval(0.1, scaling=scaling), np.array([[3.0, 4], [0.3, 0.4], [0, 0]]), [0, 1, 1]
    if norms is None:
        with pytest.raises(RowError, match="row 0 has norm 5 and the certificate needs 1 at most"):
            model.fit(x, y)
        assert model.fit(x[1:], [0, 1]).predict(x).shape == (3,)  # predictions are not certified
    else:
        assert np.linalg.norm(model.fit(x, y)._rows.columns[0], axis=1) == pytest.approx(norms)


def test_intercept_is_scaled_with_the_row() -> None:
    model = CertifiedRemoval(0.1, fit_intercept=True).fit([[1.0, 0], [0, 2], [3, 0]], [0, 1, 1])
    np.testing.assert_allclose(model._rows.columns[0][0], [0.5**0.5, 0, 0.5**0.5])
    assert model.coef_.shape == (1, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lam": 0}, "lam must be a number above 0, not 0"), ({"sigma": -1.0}, "sigma must be"),
        ({"delta": 1.0}, "delta must be below 1"), ({"epsilon": math.nan}, "epsilon must be"),
        ({"epsilon": 20.0}, "a budget for epsilon=20.0 has delta=.*, not 0.0001"),
        ({"loss": "squared_hinge"}, "loss must be 'logistic' or 'smooth_hinge'"), ({"bound": "none"}, "bound must be"),
        ({"scaling": None}, "scaling must be"), ({"gamma": 0.05}, "gamma=0.05 makes the bound too small"),
        ({"stale": -1}, "stale must be a number of at least 0"), ({"max_iter": 0}, "max_iter must be"),
        ({"max_iter": 1, "sigma": 1e-9}, "training stopped at a gradient of norm"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused(options: dict[str, Any], message: str) -> None:
    x, y = some_rows()
    with pytest.raises(RowError, match=message):
        CertifiedRemoval(**options).fit(x, y)


def test_a_smaller_constant_spends_less() -> None:
    x, y = some_rows()
    spent = [CertifiedRemoval(0.01, gamma=g, random_state=0).fit(x, y).unlearn(np.array([0])).spent_
             for g in (None, 1 / (6 * 3**0.5))]  # fmt: skip
    assert spent[1] / spent[0] == pytest.approx(4 / (6 * 3**0.5), rel=1e-6)


# the noise of the paper is for many rows; the checks fit to a few
@parametrize_with_checks(
    [CertifiedRemoval(sigma=0.1, fit_intercept=True), CertifiedRemoval(sigma=0.1, loss="smooth_hinge")]
)
def test_scikit_learn_accepts_it(estimator: Any, check: Any) -> None:
    check(estimator)
