"""Influence-function removal from ridge and logistic regression (Koh and Liang, 2017)."""

import warnings
from abc import abstractmethod
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.sparse.linalg import LinearOperator, cg
from scipy.special import expit, softmax
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from vislearn.classical import RowError, Rows, UnlearnerMixin, check_number, check_words, chunks

Array = NDArray[np.float64]
DENSE = 2000  # parameters up to which the Hessian is a matrix; beyond, conjugate gradients multiply by it


class _Influence(UnlearnerMixin, BaseEstimator):
    """One step for a loss of the scores x theta^T, theta (k, d) with the intercepts last; subclasses name the loss."""

    fit_intercept: bool
    hessian: str
    damping: float
    coef_: Any
    intercept_: Any
    _theta: Array

    @abstractmethod
    def _penalty(self) -> float:
        """Weight of half the squared norm of the coefficients."""

    @abstractmethod
    def _slopes(self, scores: Array, y: NDArray[Any]) -> Array:
        """(n, k) gradient of each row's loss with respect to its scores (n, k)."""

    @abstractmethod
    def _curved(self, scores: Array, v: Array) -> Array:
        """(n, k) Hessian of each row's loss, with respect to its scores, times v (n, k)."""

    def _check(self) -> None:
        check_words(self, hessian=("retain", "full"))
        check_number(self, "damping", "a convex loss needs none, damping=0")

    def _step(self, theta: Array, at: NDArray[np.intp]) -> None:
        """Take the rows at some places out of the parameters: one step, halved while it leads to a larger gradient."""
        rest = self._rows.left(at)
        gradient = self._gradient(theta, rest)
        step = self._solved(theta, rest if self.hessian == "retain" else self._rows.left(), gradient)
        before, least = float(np.linalg.norm(gradient)), 1e-10 * len(rest)  # below, gradients are rounding
        for rate in 0.5 ** np.arange(20):
            after = float(np.linalg.norm(self._gradient(theta - rate * step, rest)))
            if after <= max(before, least):
                break
        else:
            warnings.warn(f"no step lowers the gradient on the rows that remain, of norm {before:.3g}; fit again, or "
                          f"raise damping={self.damping}", stacklevel=3)  # fmt: skip
        self._rows.drop(at)
        self.report_ = {"rows": len(at), "gradient_before": before, "gradient_after": after, "rate": float(rate)}
        self._publish(theta - rate * step)

    def _publish(self, theta: Array) -> None:
        self._theta = theta
        self.coef_ = theta[:, :-1] if self.fit_intercept else theta
        self.intercept_ = theta[:, -1] if self.fit_intercept else np.zeros(len(theta))

    def _extended(self, x: Array) -> Array:
        return np.column_stack([x, np.ones(len(x))]) if self.fit_intercept else x

    def _weights(self, d: int) -> Array:
        """(d,) weight of half the square of each parameter of a score: none for the intercept."""
        out = np.full(d, self._penalty())
        if self.fit_intercept:
            out[-1] = 0
        return out

    def _gradient(self, theta: Array, rows: NDArray[np.intp]) -> Array:
        x, y = self._rows.columns
        out = theta * self._weights(theta.shape[1])
        for part in chunks(len(rows)):
            some = rows[part]
            out += self._slopes(x[some] @ theta.T, y[some]).T @ x[some]
        return out

    def _solved(self, theta: Array, rows: NDArray[np.intp], gradient: Array) -> Array:
        """(k, d) inverse of the damped Hessian over some rows times a gradient; the shortest where it is singular."""
        x, weights = self._rows.columns[0], self._weights(theta.shape[1]) + self.damping
        k, d = theta.shape
        if k * d <= DENSE:
            matrix = np.zeros((k, d, k, d))
            for part in chunks(len(rows)):
                some = x[rows[part]]
                scores = some @ theta.T
                for j in range(k):
                    curved = self._curved(scores, np.broadcast_to(np.eye(k)[j], scores.shape))
                    for i in range(k):
                        matrix[i, :, j] += (some.T * curved[:, i]) @ some
            matrix = matrix.reshape(k * d, k * d) + np.diag(np.tile(weights, k))
            return np.asarray(np.linalg.lstsq(matrix, gradient.ravel(), rcond=None)[0], np.float64).reshape(k, d)

        def product(v: Array) -> Array:
            v = v.reshape(k, d)
            out = v * weights
            for part in chunks(len(rows)):
                some = x[rows[part]]
                out += self._curved(some @ theta.T, some @ v.T).T @ some
            return out.ravel()

        found, stopped = cg(LinearOperator((k * d, k * d), product, dtype=np.float64), gradient.ravel(), rtol=1e-4)
        if stopped:
            warnings.warn(
                f"conjugate gradients stopped after {stopped} steps; raise damping={self.damping}", stacklevel=4
            )
        return found.reshape(k, d)


class InfluenceRidge(RegressorMixin, _Influence):
    r"""Ridge regression that forgets rows by one Newton step, which is exact for it.

    Minimises :math:`\tfrac12 \sum_i (x_i w + c - y_i)^2 + \tfrac\alpha2 \|w\|^2`; a removal is that of
    :class:`InfluenceLogistic`. With the Hessian of the rows that remain one step reaches the refitted model, up to
    rounding; with that of all rows it does not, which shows what the infinitesimal form leaves out.

    Reference:
        Koh, Liang. Understanding Black-box Predictions via Influence Functions. ICML 2017. arXiv:1703.04730.

    Args:
        alpha: weight of the penalty, at least 0.
        fit_intercept: whether there is an intercept.
        hessian: of the rows that remain (``"retain"``) or also of those removed (``"full"``).
        damping: added to the diagonal of the Hessian.

    Attributes:
        coef_: (d,) coefficients.
        intercept_: the intercept.
        report_: norms of the gradient on the rows that remain, before and after the last removal; rate of the step.
        row_numbers_: (n,) numbers of the rows that are left.
    """

    def __init__(
        self, alpha: float = 1.0, *, fit_intercept: bool = True, hessian: str = "retain", damping: float = 0.0
    ) -> None:  # fmt: skip
        self.alpha, self.fit_intercept, self.hessian, self.damping = alpha, fit_intercept, hessian, damping

    def fit(self, X: ArrayLike, y: Any) -> Self:
        self._check()
        check_number(self, "alpha", "ridge's usual one is alpha=1")
        x, y = validate_data(self, X, y, y_numeric=True, dtype=np.float64)
        start = Ridge(alpha=self.alpha, fit_intercept=self.fit_intercept).fit(x, y)
        self._rows = Rows(self._extended(x), y.astype(np.float64))
        intercept = [start.intercept_] if self.fit_intercept else []
        self._publish(np.concatenate([start.coef_, intercept])[None])
        return self

    def predict(self, X: ArrayLike) -> Array:
        check_is_fitted(self)
        return validate_data(self, X, dtype=np.float64, reset=False) @ self.coef_ + self.intercept_

    def unlearn(self, rows: NDArray[np.intp]) -> Self:
        self._step(self._theta, self._places(rows))
        return self

    def _publish(self, theta: Array) -> None:
        super()._publish(theta)
        self.coef_, self.intercept_ = self.coef_[0], float(self.intercept_[0])

    def _penalty(self) -> float:
        return self.alpha

    def _slopes(self, scores: Array, y: NDArray[Any]) -> Array:
        return scores - y[:, None]

    def _curved(self, scores: Array, v: Array) -> Array:
        return v


class InfluenceLogistic(ClassifierMixin, _Influence):
    r"""Logistic regression that forgets rows by one step of influence functions; approximate, without a certificate.

    Minimises :math:`\sum_i \ell(\theta, x_i, y_i) + \tfrac1{2C} \|w\|^2`, scikit-learn's objective (two classes share
    one score, more have a softmax). Forgetting rows U moves the parameters to

    .. math::
        \theta - H^{-1} g, \qquad g = \nabla_\theta L_{\text{rest}}
        \quad \bigl(= - \textstyle\sum_{i \in U} \nabla_\theta \ell_i \text{ at the optimum}\bigr),

    with H the Hessian over the rows that remain (a Newton step) or over all (the infinitesimal jackknife). A class
    without rows leaves the model before the step. Up to 2,000 parameters H is a matrix; beyond, conjugate gradients
    stop at a relative residual of 1e-4. One pass over the rows for H, two for gradients.

    Reference:
        Koh, Liang. Understanding Black-box Predictions via Influence Functions. ICML 2017. arXiv:1703.04730.

    Departures: the gradient is taken on the rows that remain, so that errors of earlier removals do not add up; the
    default Hessian is that of the remaining rows, which is better for more than one row; a step that would leave a
    larger gradient is halved until it does not; the paper damps by 0.01 where the model is not convex.

    Args:
        C: inverse weight of the penalty, above 0.
        fit_intercept: whether there is an intercept.
        hessian: of the rows that remain (``"retain"``) or also of those removed (``"full"``).
        damping: added to the diagonal of the Hessian.
        max_iter: steps of the first training.

    Attributes:
        coef_: (1, d) coefficients for two classes, (k, d) for more.
        intercept_: (1,) or (k,) intercepts.
        n_iter_: (1,) steps of the first training.
        report_: norms of the gradient on the rows that remain, before and after the last removal; rate of the step.
        row_numbers_: (n,) numbers of the rows that are left.
    """

    classes_: NDArray[Any]
    _labels: NDArray[Any]
    _present: NDArray[np.intp]

    def __init__(
        self, C: float = 1.0, *, fit_intercept: bool = True, hessian: str = "retain", damping: float = 0.0,
        max_iter: int = 1000,
    ) -> None:  # fmt: skip
        self.C, self.fit_intercept, self.max_iter = C, fit_intercept, max_iter
        self.hessian, self.damping = hessian, damping

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        self._check()
        check_number(self, "C", "logistic regression's usual one is C=1", above=True)
        x, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self._labels, y = np.unique(y, return_inverse=True)
        if len(self._labels) < 2:
            raise RowError(f"all rows are of one class, {self._labels[0]}; logistic regression needs two")
        small = len(self._labels) * (x.shape[1] + 1) <= DENSE
        start = LogisticRegression(C=self.C, fit_intercept=self.fit_intercept, max_iter=self.max_iter, tol=1e-8,
                                   solver="newton-cholesky" if small else "lbfgs").fit(x, y)  # fmt: skip
        self.n_iter_ = start.n_iter_
        self._rows = Rows(self._extended(x), y)
        self._present = np.arange(len(self._labels))
        self.classes_ = self._labels
        self._publish(np.column_stack([start.coef_, start.intercept_]) if self.fit_intercept else start.coef_)
        return self

    def decision_function(self, X: ArrayLike) -> Array:
        """(n,) score of the second of two classes, or (n, k) of each of more."""
        check_is_fitted(self)
        scores = validate_data(self, X, dtype=np.float64, reset=False) @ self.coef_.T + self.intercept_
        return scores[:, 0] if len(self.coef_) == 1 else scores

    def predict_proba(self, X: ArrayLike) -> Array:
        scores = self.decision_function(X)
        return np.stack([expit(-scores), expit(scores)], axis=1) if scores.ndim == 1 else softmax(scores, axis=1)

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        scores = self.decision_function(X)
        return self.classes_[(scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(axis=1)]

    def unlearn(self, rows: NDArray[np.intp]) -> Self:
        at = self._places(rows)
        held = np.bincount(self._rows.columns[1][self._rows.left(at)], minlength=len(self._labels))
        present = np.flatnonzero(held)
        if len(present) < 2:
            raise RowError(f"only class {self._labels[present[0]]} would remain, and logistic regression needs two; "
                           "drop the estimator instead")  # fmt: skip
        theta = self._theta
        if len(present) < len(self._present):
            theta = theta[np.isin(self._present, present)]
            if len(present) == 2:  # two classes share one score: that of the second against the first
                theta = theta[1:] - theta[:1]
            self._present, self.classes_ = present, self._labels[present]
        self._step(theta, at)
        return self

    def _penalty(self) -> float:
        return 1 / self.C

    def _slopes(self, scores: Array, y: NDArray[Any]) -> Array:
        if scores.shape[1] == 1:
            return expit(scores) - (y == self._present[1])[:, None]
        return softmax(scores, axis=1) - (y[:, None] == self._present)

    def _curved(self, scores: Array, v: Array) -> Array:
        p = expit(scores) if scores.shape[1] == 1 else softmax(scores, axis=1)
        return p * (v - (p * v).sum(axis=1, keepdims=True))
