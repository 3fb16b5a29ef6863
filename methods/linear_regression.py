"""Linear and ridge regression that forget rows exactly, from sums (after Cao and Yang, 2015)."""

import math
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import linalg
from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
from sklearn.utils.validation import check_is_fitted, validate_data

from vislearn.classical import RowError, Rows, UnlearnerMixin, check_number, chunks, precise_mean, two_sum, weights

Array = NDArray[np.float64]
LARGEST = 1e6  # condition number, times what deletions have lost, up to which sums are solved: 1e-10 of relative error


class Sums(NamedTuple):
    """What rows z = (x, y) of d features and t targets add up to.

    Attributes:
        total: sum of the weights.
        whole: the same when the sums were last made from the rows.
        mean: (2, d + t) weighted mean and its correction; zeros without an intercept.
        matrix: (d + t, d + t) weighted sum of (z - mean)(z - mean)^T.
    """

    total: float
    whole: float
    mean: Array
    matrix: Array


class Size(NamedTuple):
    """How large a matrix is: its columns that are not constant, and the logarithm of their determinant."""

    columns: int
    log_determinant: float


class ExactRidge(MultiOutputMixin, RegressorMixin, UnlearnerMixin, BaseEstimator):
    r"""Ridge regression; with alpha = 0, ordinary least squares.

    Minimises :math:`\sum_i w_i (y_i - x_i \beta - b)^2 + \alpha \|\beta\|^2`. With the weighted sums
    :math:`S_{xx}, S_{xy}` about the means, :math:`\beta = (S_{xx} + \alpha I)^{-1} S_{xy}` and
    :math:`b = \bar y - \bar x \beta`. Forgetting rows U of weight :math:`W_U` out of W takes them out of the sums,

    .. math::
        S' = S - \sum_{U} w_i (z_i - \bar z)(z_i - \bar z)^T - \frac{s s^T}{W - W_U}, \quad
        \bar z' = \bar z - \frac{s}{W - W_U}, \quad s = \sum_{U} w_i (z_i - \bar z), \quad z = (x, y),

    and solves again: O(k d^2 + d^3) for k rows of d features, whatever number of rows is left.

    The sums are centred, with the means in twice the working precision, so data far from zero lose nothing. Taking rows
    away costs digits where little is left in some direction. The determinant of :math:`S_{xx} + \alpha I` bounds that:
    no direction has shrunk more than it. When shrinkage times condition number passes 1e6, and when 99 % of the weight
    are gone, the sums are made again from the rows; this comes once in about 10 n / d deletions at a moderate condition
    number, so the cost above holds on average. Coefficients are within 1e-10 of a refit, relative to their norm, times
    a modest function of n and d; on average far closer. Columns are scaled to unit diagonal before they are factored,
    and what is singular or worse conditioned than 1e6 is solved by least squares on the rows, at the cost of a refit.

    Reference:
        Cao, Yang. Towards Making Systems Forget with Machine Unlearning. IEEE S&P 2015. Updating of sums: Chan, Golub,
        LeVeque. Algorithms for Computing the Sample Variance. The American Statistician 1983.

    Departures: the paper gives the scheme, learners made of sums, and neither centring nor the guard.

    Args:
        alpha: weight of the penalty, at least 0; the same for all targets. The intercept is not penalised.
        fit_intercept: whether there is an intercept.

    Attributes:
        coef_: (d,) coefficients, or (t, d) for targets of shape (n, t).
        intercept_: the intercept, or (t,) of them.
        row_numbers_: (n,) numbers of the rows that are left.
    """

    _sums: Sums
    _size: Size | None  # when the sums were last made from the rows; None where they were no use
    _flat: bool
    _features: int

    def __init__(self, alpha: float = 1.0, *, fit_intercept: bool = True) -> None:
        self.alpha, self.fit_intercept = alpha, fit_intercept

    def fit(self, X: ArrayLike, y: Any, sample_weight: ArrayLike | None = None) -> Self:
        """Fit to rows X (n, d), targets y (n,) or (n, t) and weights (n,)."""
        check_number(self, "alpha", "ridge's usual one is alpha=1")
        x, y = validate_data(self, X, y, multi_output=True, y_numeric=True, dtype=np.float64)
        self._flat, self._features = y.ndim == 1, x.shape[1]
        z = np.column_stack([x, y.astype(np.float64)])
        rows = Rows(z, weights(sample_weight, x))
        z, w = rows.columns
        sums = sums_of(z, w, self.fit_intercept)
        self._rows = rows
        self._publish(sums, *self._solve(sums, z, w))
        return self

    def predict(self, X: ArrayLike) -> Array:
        """Predictions for rows X (n, d)."""
        check_is_fitted(self)
        x = validate_data(self, X, reset=False, dtype=np.float64)
        return x @ self.coef_.T + self.intercept_

    def unlearn(self, rows: NDArray[np.intp]) -> Self:
        at = self._places(rows)
        z, w = self._rows.take(at)
        sums = without(self._sums, z, w, self.fit_intercept)
        factored, size = None, self._size  # the size stays that of the sums made from the rows
        if size is not None and sums.total > 0.01 * sums.whole:
            factored = factor(sums, self._features, self.alpha, size)
        if factored is None:
            z, w = self._rows.kept(at)
            if not w.any():
                raise RowError("all rows that would remain have weight 0; nothing is left to learn from")
            sums = sums_of(z, w, self.fit_intercept)
            coefficients, size = self._solve(sums, z, w)
        else:
            coefficients = factored[0]
        self._publish(sums, coefficients, size)
        self._rows.drop(at)
        return self

    def _solve(self, sums: Sums, z: Array, w: Array) -> tuple[Array, Size | None]:
        """(d, t) coefficients from new sums, and the size of their matrix, or None when that is no use."""
        factored = factor(sums, self._features, self.alpha)
        return factored or (least_squares(sums, z, w, self._features, self.alpha), None)

    def _publish(self, sums: Sums, coefficients: Array, size: Size | None) -> None:
        d = self._features
        intercept = np.zeros(coefficients.shape[1])
        if self.fit_intercept:
            high, low = sums.mean[:, d:] - sums.mean[:, :d] @ coefficients
            intercept = high + low
        self._sums, self._size = sums, size
        self.coef_ = coefficients[:, 0].copy() if self._flat else coefficients.T.copy()
        self.intercept_: Any = float(intercept[0]) if self._flat else intercept


def sums_of(z: Array, w: Array, centred: bool) -> Sums:
    """Sums of (n, d + t) rows with their weights."""
    mean = precise_mean(z, w) if centred else np.zeros((2, z.shape[1]))
    matrix = np.zeros((z.shape[1], z.shape[1]))
    for part in chunks(len(z)):
        off = (z[part] - mean[0]) - mean[1]
        matrix += (off * w[part, None]).T @ off
    total = float(w.sum())
    return Sums(total, total, mean, matrix)


def without(sums: Sums, z: Array, w: Array, centred: bool) -> Sums:
    """The sums less (k, d + t) rows; what is left of the weight may be 0, and the result then is not finite."""
    off = (z - sums.mean[0]) - sums.mean[1]
    total, mean = float(sums.total - w.sum()), sums.mean
    matrix = sums.matrix - (off * w[:, None]).T @ off
    if centred:
        s = w @ off
        with np.errstate(divide="ignore", invalid="ignore"):
            matrix -= np.outer(s, s) / np.float64(total)
            mean = two_sum(mean[0], mean[1] - s / np.float64(total))
    return Sums(total, sums.whole, mean, matrix)


def factor(sums: Sums, d: int, alpha: float, before: Size | None = None) -> tuple[Array, Size] | None:
    """Solve the normal equations by a Cholesky factor of the matrix scaled to unit diagonal.

    Args:
        sums: of rows with d features; without a penalty, those that are constant get the coefficient 0.
        d: number of features.
        alpha: weight of the penalty.
        before: size of the matrix when the sums were last made from the rows; None when that is now.

    Returns:
        (d, t) coefficients and the size; None where the condition number times the shrinkage since then is too large,
        or the matrix is not positive definite.
    """
    matrix = sums.matrix[:d, :d] + alpha * np.eye(d)
    # of a column that is constant up to rounding, what is left of the centred square is noise
    noise = sums.total * (1e-4 * np.finfo(float).eps * sums.mean[0, :d]) ** 2
    live = np.flatnonzero(matrix.diagonal() > noise)
    if not np.isfinite(matrix).all() or (before is not None and len(live) < before.columns):
        return None
    coefficients = np.zeros((d, len(sums.matrix) - d))
    if len(live) == 0:
        return coefficients, Size(0, 0.0)
    matrix = matrix[np.ix_(live, live)]
    diagonal = matrix.diagonal()
    scale = 1 / np.sqrt(diagonal)
    scaled = matrix * np.outer(scale, scale)
    lower, failed = linalg.lapack.dpotrf(scaled, lower=1)
    if failed:
        return None
    # the sum of absolute values of a column is the same over rows: the matrix is symmetric
    inverse_condition, _ = linalg.lapack.dpocon(lower, np.abs(scaled).sum(axis=0).max(), uplo="L")
    size = Size(len(live), float(2 * np.log(lower.diagonal()).sum() + np.log(diagonal).sum()))
    shrinkage = 0.0 if before is None else max(0.0, before.log_determinant - size.log_determinant)
    if inverse_condition <= 0 or shrinkage - math.log(inverse_condition) > math.log(LARGEST):
        return None
    target = scale[:, None] * sums.matrix[live, d:]
    coefficients[live] = scale[:, None] * linalg.cho_solve((lower, True), target)
    return coefficients, size


def least_squares(sums: Sums, z: Array, w: Array, d: int, alpha: float) -> Array:
    """(d, t) coefficients of the smallest norm, from the rows themselves."""
    off = ((z - sums.mean[0]) - sums.mean[1]) * np.sqrt(w)[:, None]
    if alpha > 0:
        off = np.vstack([off, np.hstack([math.sqrt(alpha) * np.eye(d), np.zeros((d, z.shape[1] - d))])])
    return linalg.lstsq(off[:, :d], off[:, d:])[0]
