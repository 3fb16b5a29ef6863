"""Influence-function removal: exact for ridge, near the refit for logistic regression, equal to the formula."""

from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.utils.estimator_checks import parametrize_with_checks
from vislearn.methods.influence_removal import InfluenceLogistic, InfluenceRidge

from vislearn.classical import RowError
from vislearn.methods import influence_removal


def some_rows(classes: int = 2, n: int = 150, d: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(1, 2, size=(n, d))
    score = x @ rng.normal(size=d) + rng.normal(0, 1.5, n)
    return x, np.digitize(score, np.quantile(score, np.arange(1, classes) / classes))


def parameters(model: Any) -> np.ndarray:
    return np.column_stack([np.atleast_2d(model.coef_), np.atleast_1d(model.intercept_)])


@pytest.mark.parametrize("fit_intercept", [True, False])
def test_ridge_is_exact(fit_intercept: bool) -> None:
    x, _ = some_rows()
    y = x @ [1, -2, 0.5, 3] + np.random.default_rng(1).normal(size=len(x)) + 7
    model = InfluenceRidge(0.5, fit_intercept=fit_intercept).fit(x, y).unlearn(np.array([3])).unlearn(np.arange(20, 90))
    rest = model.row_numbers_
    refit = Ridge(0.5, fit_intercept=fit_intercept).fit(x[rest], y[rest])
    np.testing.assert_allclose(parameters(model), parameters(refit), rtol=1e-9)
    np.testing.assert_allclose(model.predict(x), refit.predict(x), rtol=1e-8)
    assert model.report_["gradient_after"] < 1e-8 < model.report_["gradient_before"]


@pytest.mark.parametrize("classes", [2, 4])
def test_newton_step_comes_near_the_refit(classes: int) -> None:
    x, y = some_rows(classes)
    model = InfluenceLogistic(0.7).fit(x, y)
    start, gone = parameters(model), np.array([2, 30, 31, 77, 140])
    model.unlearn(gone[:2]).unlearn(gone[2:])
    refit = LogisticRegression(C=0.7, tol=1e-10, solver="newton-cholesky").fit(
        np.delete(x, gone, 0), np.delete(y, gone)
    )
    assert np.abs(parameters(model) - parameters(refit)).max() < 0.05 * np.abs(start - parameters(refit)).max()
    assert model.report_["gradient_after"] < 0.05 * model.report_["gradient_before"]
    np.testing.assert_allclose(model.predict_proba(x), refit.predict_proba(x), atol=1e-3)


@pytest.mark.parametrize("hessian", ["retain", "full"])
def test_the_step_is_the_formula(hessian: str) -> None:
    x, y = some_rows()
    model = InfluenceLogistic(1.5, hessian=hessian, damping=0.1).fit(x, y)
    theta, z, gone = parameters(model)[0], np.column_stack([x, np.ones(len(x))]), np.array([5, 9])
    p = 1 / (1 + np.exp(-z @ theta))
    used = np.delete(np.arange(len(x)), gone) if hessian == "retain" else np.arange(len(x))
    matrix = (z[used].T * (p * (1 - p))[used]) @ z[used] + np.diag([1 / 1.5] * 4 + [0]) + 0.1 * np.eye(5)
    expected = theta + np.linalg.solve(matrix, z[gone].T @ (p - y)[gone])
    np.testing.assert_allclose(parameters(model.unlearn(gone))[0], expected, atol=1e-8)


def test_the_softmax_step_is_the_formula() -> None:
    """The Hessian from differences of gradients, at two parameters apart in every direction."""
    x, y = some_rows(3)
    model = InfluenceLogistic(1.5, damping=0.2).fit(x, y)
    theta, gone = model._theta.copy(), np.array([5, 9])
    rest = model._rows.left(gone)
    columns = []
    for i in range(theta.size):
        unit = np.eye(theta.size)[i].reshape(theta.shape) * 1e-5
        columns.append((model._gradient(theta + unit, rest) - model._gradient(theta - unit, rest)).ravel() / 2e-5)
    matrix = np.array(columns) + 0.2 * np.eye(theta.size)
    expected = theta.ravel() - np.linalg.solve(matrix, model._gradient(theta, rest).ravel())
    np.testing.assert_allclose(model.unlearn(gone)._theta.ravel(), expected, atol=1e-7)


def test_conjugate_gradients_agree_with_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = some_rows(3)
    direct = InfluenceLogistic(damping=0.01).fit(x, y)
    start = parameters(direct)
    direct.unlearn(np.arange(6))
    monkeypatch.setattr(influence_removal, "DENSE", 0)
    iterated = InfluenceLogistic(damping=0.01).fit(x, y).unlearn(np.arange(6))
    moved = np.abs(parameters(direct) - start).max()
    np.testing.assert_allclose(parameters(iterated), parameters(direct), atol=0.02 * moved)


@pytest.mark.parametrize("classes", [3, 4])
def test_a_class_that_disappears_leaves_the_model(classes: int) -> None:
    x, y = some_rows(classes)
    model = InfluenceLogistic().fit(x, y).unlearn(np.flatnonzero(y == 1))
    rest = model.row_numbers_
    refit = LogisticRegression(tol=1e-10, solver="newton-cholesky").fit(x[rest], y[rest])
    assert model.classes_.tolist() == refit.classes_.tolist()
    assert model.coef_.shape == refit.coef_.shape
    assert (model.predict(x[rest]) == refit.predict(x[rest])).mean() > 0.9
    weights = model.coef_
    with pytest.raises(RowError, match="would remain"):
        model.unlearn(np.flatnonzero((y != 1) & (y != 0)))
    assert model.coef_ is weights
    assert set(model.predict(x)) <= set(refit.classes_)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (InfluenceRidge(-1.0), "alpha must be"), (InfluenceRidge(hessian="mean"), "hessian must be 'retain' or 'full'"),
        (InfluenceLogistic(0), "C must be a number above 0"), (InfluenceLogistic(damping=-0.1), "damping must be"),
    ],
    ids=str,
)  # fmt: skip
def test_wrong_arguments_are_refused(model: Any, message: str) -> None:
    with pytest.raises(RowError, match=message):
        model.fit(*some_rows())


def test_a_step_that_goes_too_far_is_halved() -> None:
    """Without the middle of three classes the others are easy to tell apart: Newton's step is far too long."""
    x, y = some_rows(3)
    report = InfluenceLogistic().fit(x, y).unlearn(np.flatnonzero(y == 1)).report_
    assert report["rate"] < 1
    assert report["gradient_after"] < report["gradient_before"]
    assert InfluenceLogistic().fit(x, y).unlearn(np.array([0])).report_["rate"] == 1


def test_a_step_that_does_not_help_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = some_rows()
    model = InfluenceLogistic().fit(x, y)
    monkeypatch.setattr(model, "_solved", lambda theta, rows, gradient: -gradient)
    with pytest.warns(UserWarning, match="no step lowers the gradient"):
        model.unlearn(np.arange(5))


@parametrize_with_checks([InfluenceRidge(), InfluenceLogistic()])
def test_scikit_learn_accepts_it(estimator: Any, check: Any) -> None:
    check(estimator)
