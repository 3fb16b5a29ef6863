"""Certified removal from linear models (Guo et al., 2020)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import linalg
from scipy.special import expit, log_ndtr, ndtr
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from vislearn.classical import RowError, Rows, UnlearnerMixin, check_words, chunks

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Loss:
    """A loss of the margin m, with its first two derivatives, both taken elementwise.

    Attributes:
        gamma: the constant that the bound uses for the second derivative, at least `lipschitz`.
        lipschitz: the smallest that is right. The first derivative is at most 1 in size.
    """

    value: Callable[[Array], Array]
    slope: Callable[[Array], Array]
    curvature: Callable[[Array], Array]
    gamma: float
    lipschitz: float


def smooth_hinge(m: Array) -> Array:
    """max(0, 1 - m), averaged over a triangle of half width 1/2, which makes the second derivative continuous."""
    u = np.clip(2 * (1 - m), -1, None)
    return np.where(u < 0, (1 + u) ** 3 / 6, u + np.clip(1 - u, 0, None) ** 3 / 6) / 2


def smooth_hinge_slope(m: Array) -> Array:
    u = np.clip(2 * (1 - m), -1, 1)
    return -np.where(u < 0, (1 + u) ** 2 / 2, 1 - (1 - u) ** 2 / 2)


LOSSES = {
    "logistic": Loss(
        lambda m: np.logaddexp(0, -m), lambda m: -expit(-m), lambda m: expit(m) * expit(-m), 1 / 4, 1 / (6 * 3**0.5)
    ),
    "smooth_hinge": Loss(
        smooth_hinge, smooth_hinge_slope, lambda m: 2 * np.clip(1 - np.abs(2 * (1 - m)), 0, None), 4.0, 4.0
    ),
}


class Trained(NamedTuple):
    """What training ends with: weights (d,), their Hessian, the norm of the gradient left, the number of steps."""

    weights: Array
    hessian: Array
    left: float
    steps: int


class Step(NamedTuple):
    """A removal from k models, and how far from zero it can take their gradients.

    Attributes:
        change: (k, d) change of the weights.
        fresh: bound of the gradients that it adds, summed over the models, were the curvature that of the weights.
        stale: what comes on top because it is that of earlier weights.
    """

    change: Array
    fresh: float
    stale: float


class CertifiedRemoval(ClassifierMixin, UnlearnerMixin, BaseEstimator):
    r"""Linear classifier that forgets rows by a Newton step, with an (epsilon, delta) certificate and a budget.

    Trains :math:`L(w) = \sum_i [\ell(y_i w^T x_i) + \tfrac\lambda2 \|w\|^2] + b^T w` with secret noise
    :math:`b \sim N(0, \sigma^2 I)`, one model for two classes and one against the rest for each of more. Forgetting
    rows U changes the weights by :math:`v = H^{-1} \sum_{i \in U} (\nabla\ell_i + \lambda w)`, with H over the n rows
    that remain, and leaves a gradient that is no longer zero but at most

    .. math::
        \beta = \gamma \, \|X\|_2 \, (\|v\| + \|w - w_H\|) \, \|X v\|,

    :math:`\gamma` the Lipschitz constant of the second derivative of the loss and :math:`w_H` the weights at which H
    was taken. The gradient left by training and the bounds of all removals, of all models, add up to ``spent_``. The
    model cannot be told from a retrained one, up to (epsilon, delta), while that is at most

    .. math::
        \sigma \epsilon / \sqrt{2 \ln(1.5 / \delta)},

    and a request that would pass it retrains with fresh noise, as one that takes all rows of a class does.

    Cost: the Hessian and X^T X of the rows that remain are kept and the removed rows taken off, so that a removal costs
    O(d^3) for each model and no pass over the rows. H is then that of the remaining rows, up to rounding, at older
    weights; the bound holds for the step as taken, and the second term is the price. ``stale`` says how much of it to
    pay before one pass renews H; before a retrain that is tried too.

    The certificate covers weights, and requests that are made without a look at them. It does not cover the pickled
    estimator, which holds b and older weights, a known ``random_state``, or a feature extractor that was trained on the
    rows. Scaling by statistics of all rows would have to be forgotten too; ``scaling`` works row by row.

    Reference:
        Guo, Goldstein, Hannun, van der Maaten. Certified Data Removal from Machine Learning Models. ICML 2020.
        arXiv:1911.03030.

    Departures: the budget is enforced, which the authors' code leaves to the reader; the norm of X is exact (theirs is
    a power iteration, up to 3 % below, which is no bound); the gradient that training leaves counts; the worst-case
    bound allows for the noise and for what earlier removals left, which the paper's does not. ``stale=0`` takes the
    Hessian at the current weights for every removal, as the paper and the code do. The squared hinge loss is not
    offered: its second derivative jumps, and no bound of this form holds.

    Args:
        lam: weight of the penalty for each row, above 0.
        sigma: standard deviation of the noise, above 0.
        epsilon: of the certificate, above 0.
        delta: of the certificate, in (0, 1).
        loss: ``"logistic"`` or ``"smooth_hinge"``, a hinge loss with a continuous second derivative.
        bound: ``"data"`` as above, or ``"worst"``, which does not look at the rows and is orders of magnitude larger.
        gamma: constant of the bound; None takes 1/4 for the logistic loss (1/(6 sqrt 3) = 0.0962 is the least that
            holds) and 4 for the smooth hinge.
        scaling: rows must have norm 1 at most: ``"unit"`` divides each by its norm, ``"clip"`` those above 1 only,
            ``"refuse"`` raises an error if there are any.
        fit_intercept: whether to append 1 to the rows, before they are scaled.
        stale: how much more than with renewed Hessians the removals may spend, as a share; 0 renews for each.
        tol: norm of the gradient at which training stops.
        max_iter: Newton steps of training.
        random_state: seed of the noise; leave it None outside experiments.

    Attributes:
        coef_: (k, d) weights for scaled rows, the intercept last.
        budget_: what the removals may spend.
        spent_: what is spent since the last training.
        n_iter_: (k,) Newton steps of the last training.
        retrained_: number of retrainings since `fit`.
        certificate_: the certificate of the model as it is, as plain numbers.
        row_numbers_: (n,) numbers of the rows that are left.
    """

    coef_: Array
    _hessian: Array  # (k, d, d) of the rows that remain, at `_taken_at` (k, d)
    _taken_at: Array
    _fresh: float
    _stale: float

    def __init__(
        self, lam: float = 1e-3, sigma: float = 10.0, epsilon: float = 1.0, delta: float = 1e-4, *,
        loss: str = "logistic", bound: str = "data", gamma: float | None = None, scaling: str = "unit",
        fit_intercept: bool = False, stale: float = 10.0, tol: float = 1e-10, max_iter: int = 100,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:  # fmt: skip
        self.lam, self.sigma, self.epsilon, self.delta = lam, sigma, epsilon, delta
        self.loss, self.bound, self.gamma, self.scaling = loss, bound, gamma, scaling
        self.fit_intercept, self.stale, self.tol, self.max_iter = fit_intercept, stale, tol, max_iter
        self.random_state = random_state

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        self._check()
        x, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self._labels, y = np.unique(y, return_inverse=True)
        if len(self._labels) < 2:
            raise RowError(f"all rows are of one class, {self._labels[0]}; a linear classifier needs two")
        self._rows = Rows(self._scaled(x, strict=True), y)
        self._held = np.bincount(y)
        self._random = check_random_state(self.random_state)
        self.retrained_ = self._removed = 0
        self._train()
        return self

    def decision_function(self, X: ArrayLike) -> Array:
        """(n,) score of the second of two classes, or (n, k) of each of more."""
        check_is_fitted(self, "coef_")
        scores = self._scaled(validate_data(self, X, dtype=np.float64, reset=False)) @ self.coef_.T
        return scores[:, 0] if len(self.classes_) == 2 else scores

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        scores = self.decision_function(X)
        return self.classes_[(scores > 0).astype(int) if scores.ndim == 1 else scores.argmax(axis=1)]

    def unlearn(self, rows: NDArray[np.intp]) -> Self:
        """Forget rows with one step for all of them; ``certificate_`` tells whether that meant retraining."""
        check_is_fitted(self, "coef_")
        at = self._places(rows)
        x, y = self._rows.take(at)
        held = self._held - np.bincount(y, minlength=len(self._labels))
        if (held > 0).sum() < 2:
            raise RowError(f"only class {self._labels[held > 0][0]} would remain, and a linear classifier needs two; "
                           "drop the estimator instead")  # fmt: skip
        w = self.coef_
        del self.coef_  # interrupted, the estimator is unfitted: it never serves weights without a certificate
        self._rows.drop(at)
        vanished = bool(((held == 0) & (self._held > 0)).any())
        self._held, self._removed = held, self._removed + len(y)
        if vanished or not self._remove(w, x, y):
            self.retrained_ += 1
            self._train()
        else:
            self._certify()
        return self

    def _remove(self, w: Array, x: Array, y: NDArray[np.intp]) -> bool:
        """Take rows x (m, d) out of the weights w (k, d); False where the budget does not allow it."""
        loss, m = LOSSES[self.loss], len(y)
        signs = [self._signs(y, c) for c in self._positive]
        delta = np.stack(
            [x.T @ (loss.slope(s * (x @ v)) * s) + m * self.lam * v for v, s in zip(w, signs, strict=True)]
        )
        self._gram -= x.T @ x
        for h, v, s in zip(self._hessian, self._taken_at, signs, strict=True):
            h -= (x.T * loss.curvature(s * (x @ v))) @ x + m * self.lam * np.eye(len(h))
        step = self._step(w, delta, m)
        allowed = 0.0 if self.bound == "worst" else self.stale
        over = self.spent_ + step.fresh + step.stale > self.budget_
        if step.stale > 0 and (over or self._stale + step.stale > allowed * (self._fresh + step.fresh)):
            self._hessian = np.stack([
                objective(self._rows.columns[0], self._signs(self._rows.columns[1], c), v, self.lam * self._rows.held,
                          np.zeros_like(v), loss)[2]
                for v, c in zip(w, self._positive, strict=True)
            ])  # fmt: skip
            self._taken_at, self._fresh, self._stale = w, 0.0, 0.0
            step = self._step(w, delta, m)
        if self.spent_ + step.fresh + step.stale > self.budget_:
            return False
        self.coef_ = w + step.change
        self.spent_ += step.fresh + step.stale
        self._fresh += step.fresh
        self._stale += step.stale
        return True

    def _step(self, w: Array, delta: Array, m: int) -> Step:
        gamma = LOSSES[self.loss].gamma if self.gamma is None else self.gamma
        step = removal_step(self._gram, self._hessian, delta, w - self._taken_at, gamma)
        if self.bound == "data":
            return step
        before = self._rows.held + m
        worst = (worst_case_bound(before, self.lam, m, gamma, offset=(np.linalg.norm(b) + self.spent_) / before)
                 for b in self._noise)  # fmt: skip
        return step._replace(fresh=float(sum(worst)))

    def _train(self) -> None:
        """Fit to the rows that are left, with fresh noise and nothing spent."""
        x, y = self._rows.columns
        present = np.flatnonzero(self._held)
        self._positive = present if len(present) > 2 else present[1:]
        self._noise = self._draw(len(self._positive), x.shape[1])
        fits = [
            minimise(x, self._signs(y, c), self._rows.held, self.lam, b, LOSSES[self.loss], self.tol, self.max_iter)
            for c, b in zip(self._positive, self._noise, strict=True)
        ]
        self.budget_ = self.sigma * self.epsilon / self._c()
        self.n_iter_ = np.array([fit.steps for fit in fits])
        self.spent_ = sum(fit.left for fit in fits)
        if self.spent_ > self.budget_:
            raise RowError(f"training stopped at a gradient of norm {self.spent_:.3g}, above the budget of "
                           f"{self.budget_:.3g}; raise max_iter={self.max_iter} or sigma={self.sigma}")  # fmt: skip
        self._gram = sum((x[part].T @ x[part] for part in chunks(len(x))), np.zeros((x.shape[1], x.shape[1])))
        self._hessian = np.stack([fit.hessian for fit in fits])
        self._fresh = self._stale = 0.0  # spent since the Hessians were taken
        self.classes_ = self._labels[present]
        self._taken_at = np.stack([fit.weights for fit in fits])
        self.coef_ = self._taken_at
        self._certify()

    def _draw(self, models: int, d: int) -> Array:
        return self.sigma * self._random.standard_normal((models, d))

    def _certify(self) -> None:
        self.certificate_ = {
            "epsilon": float(self.epsilon), "delta": float(self.delta), "budget": self.budget_, "spent": self.spent_,
            "epsilon_spent": self.spent_ * self._c() / self.sigma, "rows": self._rows.held, "removed": self._removed,
            "retrained": self.retrained_,
        }  # fmt: skip

    def _c(self) -> float:
        return math.sqrt(2 * math.log(1.5 / self.delta))

    def _signs(self, y: NDArray[np.intp], positive: int) -> Array:
        return np.where(y == positive, 1.0, -1.0)

    def _scaled(self, x: Array, strict: bool = False) -> Array:
        """Rows of norm 1 at most; `strict` refuses what is longer where nothing scales it."""
        if self.fit_intercept:
            x = np.column_stack([x, np.ones(len(x))])
        norm = np.linalg.norm(x, axis=1, keepdims=True)
        if self.scaling == "refuse":
            if strict and norm.max() > 1 + 1e-12:
                raise RowError(f"row {norm.argmax()} has norm {norm.max():.4g} and the certificate needs 1 at most; "
                               "scaling='unit' divides each row by its norm")  # fmt: skip
            return x
        return x / (np.where(norm > 0, norm, 1) if self.scaling == "unit" else np.maximum(norm, 1))

    def _check(self) -> None:
        for name in ("lam", "sigma", "epsilon", "delta", "stale", "tol", "max_iter"):
            value, least = getattr(self, name), {"stale": 0, "tol": 0, "max_iter": 1}.get(name, math.ulp(0))
            if not isinstance(value, Real) or not float(value) >= least:
                raise RowError(f"{name} must be a number {f'of at least {least}' if least in (0, 1) else 'above 0'}, "
                               f"not {value!r}")  # fmt: skip
        check_words(self, loss=tuple(LOSSES), bound=("data", "worst"), scaling=("unit", "clip", "refuse"))
        least = LOSSES[self.loss].lipschitz
        if self.gamma is not None and not (isinstance(self.gamma, Real) and float(self.gamma) >= least * (1 - 1e-12)):
            raise RowError(f"gamma={self.gamma!r} makes the bound too small; the loss {self.loss!r} needs {least:.4g}")
        if not self.delta < 1:
            raise RowError(f"delta must be below 1, not {self.delta!r}; the paper's is 1e-4")
        t = self.epsilon / self._c()  # shift of the noise, in its standard deviations, that the budget allows
        least = float(ndtr(t / 2 - self._c()) - math.exp(self.epsilon + log_ndtr(-t / 2 - self._c())))
        if least > self.delta:
            raise RowError(f"a budget for epsilon={self.epsilon} has delta={least:.2g}, not {self.delta}: the paper's "
                           "formula is for small epsilon, such as epsilon=1")  # fmt: skip


def objective(
    x: Array, s: Array, w: Array, penalty: float, b: Array, loss: Loss
) -> tuple[float, Array, Array]:  # fmt: skip
    """Value, gradient (d,) and Hessian (d, d) of sum loss(s x w) + penalty/2 |w|^2 + b w, for rows x (n, d) and s (n,).

    Rows of zeros add a constant to the value and nothing to the rest.
    """
    value, gradient, hessian = penalty / 2 * (w @ w) + b @ w, penalty * w + b, penalty * np.eye(len(w))
    for part in chunks(len(x)):
        m = s[part] * (x[part] @ w)
        value += loss.value(m).sum()
        gradient += x[part].T @ (loss.slope(m) * s[part])
        hessian += (x[part].T * loss.curvature(m)) @ x[part]
    return float(value), gradient, hessian


def minimise(
    x: Array, s: Array, n: int, lam: float, b: Array, loss: Loss, tol: float, max_iter: int
) -> Trained:  # fmt: skip
    """Newton's method, damped where a step does not help.

    Stops when the gradient has a norm of `tol`, or where rounding lets it fall no further.
    """
    w, damping = np.zeros(x.shape[1]), 0.0
    value, gradient, hessian = objective(x, s, w, n * lam, b, loss)
    size = float(np.linalg.norm(gradient))
    steps = 0
    while size > tol and steps < max_iter:
        steps += 1
        step = linalg.solve(hessian + damping * np.eye(len(w)), gradient, assume_a="pos")
        slope = gradient @ step
        trial = objective(x, s, w - step, n * lam, b, loss)
        left = float(np.linalg.norm(trial[1]))
        visible = slope > 1e-13 * abs(value)  # or else the value cannot tell better from worse, soon before not well
        near = slope < 1e-9 * abs(value)
        if (near and left < size / 2) or (visible and trial[0] <= value - 1e-4 * slope):
            w, damping = w - step, damping / 10 if damping > n * lam else 0.0
            (value, gradient, hessian), size = trial, left
        elif visible:
            damping = max(10 * damping, n * lam)
        else:
            break
    return Trained(w, hessian, size, steps)


def removal_step(gram: Array, hessian: Array, delta: Array, drift: Array, gamma: float) -> Step:
    """The step of a removal and its data-dependent bound.

    Args:
        gram: (d, d) X^T X of the rows that remain.
        hessian: (k, d, d) their Hessians.
        delta: (k, d) gradients of the removed rows, penalty included.
        drift: (k, d) the weights less those at which the Hessians were taken.
        gamma: Lipschitz constant of the second derivative of the loss.
    """
    d = len(gram)
    change = np.stack([linalg.solve(h, g, assume_a="pos") for h, g in zip(hessian, delta, strict=True)])
    norm = math.sqrt(max(linalg.eigh(gram, eigvals_only=True, subset_by_index=[d - 1, d - 1])[0], 0))
    unit = gamma * norm * np.sqrt(np.einsum("kd,kd->k", change @ gram, change).clip(0))
    inexact = np.linalg.norm(np.einsum("kde,ke->kd", hessian, change) - delta, axis=1)  # of the solution
    fresh = unit * np.linalg.norm(change, axis=1) + inexact
    return Step(change, float(fresh.sum()), float((unit * np.linalg.norm(drift, axis=1)).sum()))


def worst_case_bound(
    n: int, lam: float, m: int = 1, gamma: float = 1 / 4, C: float = 1.0, offset: float = 0.0
) -> float:  # fmt: skip
    """The paper's bound gamma m^2 (2 C)^2 / (lam^2 (n - m)) for m of n rows and slopes of at most C.

    `offset` is added to 2 C: (|b| + gradient left) / n makes it hold with noise b and after earlier removals.
    """
    return gamma * m**2 * (2 * C + offset) ** 2 / (lam**2 * (n - m))
