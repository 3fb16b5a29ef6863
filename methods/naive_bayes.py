"""Naive Bayes that forgets rows exactly, from sums (after Cao and Yang, 2015)."""

from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from sklearn.naive_bayes import BernoulliNB, GaussianNB, MultinomialNB
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_non_negative, validate_data

from vislearn.classical import RowError, Rows, UnlearnerMixin, chunks, keep_classes, precise_mean, two_sum, weights

Array = NDArray[np.float64]
KEPT = 2.0**-10  # share of a sum below which it is made again from the rows: three digits may be lost before


class Spread(NamedTuple):
    """Weighted mean and squares of some rows.

    Attributes:
        total: sum of the weights.
        mean: (2, d) mean and its correction.
        squares: (d,) sum of squares about the mean.
        peak: (1 + d,) power of two above `total` and `squares` when they were last made from the rows; no more of what
            has been forgotten is kept.
    """

    total: float
    mean: Array
    squares: Array
    peak: Array

    @property
    def worn(self) -> bool:
        """Whether so little is left of a sum that it should be made again."""
        return bool((np.append(self.total, self.squares) < KEPT * self.peak).any())


class _ExactNB(UnlearnerMixin):
    """What the three have in common: numbered classes, of which those without rows go."""

    classes_: NDArray[Any]
    _counts: NDArray[np.intp]  # rows of each class

    @property
    def partial_fit(self) -> Any:  # scikit-learn asks with hasattr
        raise AttributeError("rows are numbered by one fit; fit again with all rows")

    def _given_priors(self) -> Any:
        """Prior probabilities that the caller fixed, one per class, or None."""
        return getattr(self, "priors", getattr(self, "class_prior", None))

    def _start(self, x: Any, y: NDArray[Any], w: Array) -> tuple[NDArray[Any], Rows, NDArray[np.intp]]:
        """The classes, the rows to keep, with numbered classes, and how many there are of each class."""
        check_classification_targets(y)
        classes, codes = np.unique(y, return_inverse=True)
        priors = self._given_priors()
        if priors is not None and len(priors) != len(classes):
            raise RowError(f"Number of priors must match number of classes: {len(priors)} are given for {len(classes)}")
        return classes, Rows(x, codes, w), np.bincount(codes, minlength=len(classes))

    def _counts_without(self, codes: NDArray[np.intp]) -> NDArray[np.intp]:
        """Rows left of each class.

        Raises:
            RowError: a class would go, and the caller gave one prior per class.
        """
        counts = self._counts - np.bincount(codes, minlength=len(self._counts))
        if self._given_priors() is not None and (counts == 0).any():
            gone = self.classes_[np.flatnonzero(counts == 0)[0]]
            raise RowError(f"no row of class {gone!s} would remain, and its prior is given; fit again on the other "
                           "rows, with a prior for each of their classes")  # fmt: skip
        return counts

    def _finish(self, at: NDArray[np.intp], counts: NDArray[np.intp]) -> NDArray[np.bool_]:
        """Drop the rows, and the classes that have none left; says which classes stay."""
        self._rows.drop(at)
        return keep_classes(self, counts)


class ExactGaussianNB(_ExactNB, GaussianNB):
    r"""Gaussian naive Bayes: scikit-learn's, and rows can be forgotten.

    Per class c with weight :math:`W_c`, mean :math:`\mu_c` and squares :math:`M_c = \sum_c w_i (x_i - \mu_c)^2`,
    forgetting rows U of the class gives, with :math:`s = \sum_U w_i (x_i - \mu_c)`,

    .. math::
        M_c' = M_c - \sum_U w_i (x_i - \mu_c)^2 - \frac{s^2}{W_c'}, \quad \mu_c' = \mu_c - \frac{s}{W_c'}, \quad
        \sigma_c^2 = M_c / W_c + \epsilon.

    :math:`\epsilon` is `var_smoothing` times the largest variance of a feature over all rows, so one row changes the
    variances of every class; those sums are kept and updated as well. Like scikit-learn's, they ignore weights. O(k d)
    for k rows, plus O(C d) for C classes.

    Squares are centred and means kept in twice the working precision, so data far from zero lose nothing. A square
    keeps a relative error below 1000 (k + n) times the unit roundoff, 2e-16, for k forgotten of n rows: when less than
    a thousandth of it is left, it is made again from the rows of its class. A class without rows goes.

    Reference:
        Cao, Yang. Towards Making Systems Forget with Machine Unlearning. IEEE S&P 2015. Updating of sums: Chan, Golub,
        LeVeque. Algorithms for Computing the Sample Variance. The American Statistician 1983.

    Departures: the paper gives the scheme, learners made of sums, and neither centring nor the guard. Everything is in
    float64, where scikit-learn keeps float32; there is no `partial_fit`, whose epsilon is that of the last batch.

    Args:
        priors: (C,) probabilities of the classes; by default their shares of the weight.
        var_smoothing: share of the largest variance that is added to all, at least 0.
    """

    def __init__(self, *, priors: ArrayLike | None = None, var_smoothing: float = 1e-9) -> None:
        super().__init__(priors=priors, var_smoothing=var_smoothing)

    def fit(self, X: ArrayLike, y: Any, sample_weight: ArrayLike | None = None) -> Self:
        """Fit to rows X (n, d), classes y (n,) and weights (n,)."""
        self._validate_params()
        x, y = validate_data(self, X, y, dtype=np.float64)
        if self.priors is not None:
            given = np.asarray(self.priors, dtype=np.float64)
            if not np.isclose(given.sum(), 1.0):
                raise RowError("The sum of the priors should be 1.")
            if (given < 0).any():
                raise RowError("Priors must be non-negative.")
        classes, rows, counts = self._start(x, y, weights(sample_weight, x))
        x, codes, w = rows.columns
        order = np.split(np.argsort(codes, kind="stable"), np.cumsum(counts)[:-1])
        self.classes_, self._rows, self._counts = classes, rows, counts
        self._publish([spread_of(x[of], w[of]) for of in order], spread_of(x, np.ones(len(x))))
        return self

    def unlearn(self, rows: NDArray[np.intp]) -> Self:
        at = self._places(rows)
        x, codes, w = self._rows.take(at)
        counts = self._counts_without(codes)
        spreads = list(self._spreads)
        for c in np.unique(codes[counts[codes] > 0]):
            mine = codes == c
            spreads[c] = less(spreads[c], x[mine], w[mine])
            if spreads[c].worn:
                places = self._rows.left(at)
                left_x, _, left_w = self._rows.take(places[self._rows.columns[1][places] == c])
                spreads[c] = spread_of(left_x, left_w)
        if not any(s.total > 0 for s, n in zip(spreads, counts, strict=True) if n):
            raise RowError("all rows that would remain have weight 0; nothing is left to learn from")
        everything = less(self._everything, x, np.ones(len(x)))
        if everything.worn:
            left_x = self._rows.kept(at)[0]
            everything = spread_of(left_x, np.ones(len(left_x)))
        stay = self._finish(at, counts)
        self._publish([s for s, stays in zip(spreads, stay, strict=True) if stays], everything)
        return self

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.array_api_support = False  # rows are kept by numpy
        return tags

    def _publish(self, spreads: list[Spread], everything: Spread) -> None:
        self._spreads, self._everything = spreads, everything
        self.epsilon_ = self.var_smoothing * (everything.squares / everything.total).max()
        self.class_count_ = np.array([s.total for s in spreads])
        self.theta_ = np.stack([s.mean[0] for s in spreads])
        squares, counted = np.stack([s.squares for s in spreads]), np.maximum(self.class_count_, np.finfo(float).tiny)
        self.var_ = squares / counted[:, None] + self.epsilon_
        shares = self.class_count_ / self.class_count_.sum()
        self.class_prior_ = shares if self.priors is None else np.asarray(self.priors, dtype=np.float64)


def spread_of(x: Array, w: Array) -> Spread:
    """Mean and squares of (n, d) rows."""
    total = float(w.sum())
    if total == 0:
        return Spread(0.0, np.zeros((2, x.shape[1])), np.zeros(x.shape[1]), np.zeros(1 + x.shape[1]))
    mean, squares = precise_mean(x, w), np.zeros(x.shape[1])
    for part in chunks(len(x)):
        squares += w[part] @ ((x[part] - mean[0]) - mean[1]) ** 2
    # of a feature that is constant up to rounding, what is left is noise
    squares[squares <= total * (1e-4 * np.finfo(float).eps * mean[0]) ** 2] = 0
    return Spread(total, mean, squares, above(np.append(total, squares)))


def less(spread: Spread, x: Array, w: Array) -> Spread:
    """The spread without (k, d) of its rows; nothing, and worn, when no weight is left."""
    off = (x - spread.mean[0]) - spread.mean[1]
    s, total = w @ off, float(spread.total - w.sum())
    if total <= 0:
        return Spread(0.0, spread.mean, np.zeros_like(s), spread.peak + 1)
    squares = np.maximum(spread.squares - w @ off**2 - s * s / total, 0)
    return Spread(total, two_sum(spread.mean[0], spread.mean[1] - s / total), squares, spread.peak)


def above(values: Array) -> Array:
    """The power of two above each value, 0 for 0."""
    return np.where(values > 0, np.ldexp(1.0, np.frexp(values)[1]), 0.0)


class _ExactCounts(_ExactNB):
    """Naive Bayes made of counts. Smoothing and log-probabilities are scikit-learn's own, through its hooks."""

    feature_count_: Array
    class_count_: Array

    def fit(self, X: ArrayLike, y: Any, sample_weight: ArrayLike | None = None) -> Self:
        """Fit to rows X (n, d), dense or sparse, classes y (n,) and weights (n,)."""
        self._validate_params()  # type: ignore[attr-defined]
        x, y = self._check_X_y(X, y)  # type: ignore[attr-defined]
        if isinstance(self, MultinomialNB):
            check_non_negative(x, f"{type(self).__name__} (input X)")
        w = weights(sample_weight, x)
        classes, rows, counts = self._start(x.astype(np.float64), y, w)
        self.classes_, self._rows, self._counts = classes, rows, counts
        kept, codes, _ = rows.columns
        self._publish(count(kept, codes, w, len(classes)))
        entries = rows.columns[0].data if sparse.issparse(x) else rows.columns[0]
        # sums of whole numbers are exact up to 2^53, and need no guard
        whole = all(np.all(v == np.floor(v)) for v in (entries, w)) and self._sums.sum() < 2.0**53
        self._peak = np.zeros_like(self._sums) if whole else above(self._sums)
        return self

    def unlearn(self, rows: NDArray[np.intp]) -> Self:
        at = self._places(rows)
        x, codes, w = self._rows.take(at)
        counts = self._counts_without(codes)
        sums, peak = self._sums - count(x, codes, w, len(counts)), self._peak
        worn = (counts > 0) & (sums < KEPT * peak).any(axis=1)
        if worn.any():
            places = self._rows.left(at)
            left_x, left_codes, left_w = self._rows.take(places[worn[self._rows.columns[1][places]]])
            sums[worn] = count(left_x, left_codes, left_w, len(counts))[worn]
            peak = np.where(worn[:, None], above(sums), peak)
        if not (sums[counts > 0, 0] > 0).any():
            raise RowError("all rows that would remain have weight 0; nothing is left to learn from")
        stay = self._finish(at, counts)
        self._peak = peak[stay]
        self._publish(sums[stay])
        return self

    def _publish(self, sums: Array) -> None:
        self._sums = sums
        self.class_count_, self.feature_count_ = sums[:, 0].copy(), sums[:, 1:].copy()
        self._update_feature_log_prob(self._check_alpha())  # type: ignore[attr-defined]
        self._update_class_log_prior(self._given_priors())  # type: ignore[attr-defined]


class ExactMultinomialNB(_ExactCounts, MultinomialNB):
    r"""Multinomial naive Bayes: scikit-learn's, and rows can be forgotten.

    :math:`\log p(j|c) = \log(N_{cj} + \alpha) - \log \sum_j (N_{cj} + \alpha)` with the counts
    :math:`N_{cj} = \sum_{i \in c} w_i x_{ij}`, from which those of the forgotten rows are taken: O(k d) for k rows,
    plus O(C d) for C classes. Whole counts are exact; of others, the counts of a class are made again from its rows
    when less than a thousandth of one of them is left. A class without rows goes.

    Reference:
        Cao, Yang. Towards Making Systems Forget with Machine Unlearning. IEEE S&P 2015.

    Departures: the paper gives the scheme, learners made of sums, and not the guard. There is no `partial_fit`.

    Args:
        alpha: what is added to each count, at least 0; a number, or (d,) of them.
        force_alpha: keep an alpha below 1e-10, which scikit-learn otherwise raises to it.
        fit_prior: whether classes have their shares of the weight as priors; otherwise they are equal.
        class_prior: (C,) probabilities of the classes, instead.
    """

    def __init__(
        self, *, alpha: float | ArrayLike = 1.0, force_alpha: bool = True, fit_prior: bool = True,
        class_prior: ArrayLike | None = None,
    ) -> None:  # fmt: skip
        super().__init__(alpha=alpha, force_alpha=force_alpha, fit_prior=fit_prior, class_prior=class_prior)


class ExactBernoulliNB(_ExactCounts, BernoulliNB):
    r"""Bernoulli naive Bayes: scikit-learn's, and rows can be forgotten.

    :math:`p(j|c) = (N_{cj} + \alpha) / (W_c + 2 \alpha)` with the weight :math:`N_{cj}` of the rows of class c that
    have feature j, and :math:`W_c` of all; those of the forgotten rows are taken away, at O(k d) for k rows, plus
    O(C d) for C classes. The binary features are kept, not the rows that were given. A class without rows goes.

    Reference:
        Cao, Yang. Towards Making Systems Forget with Machine Unlearning. IEEE S&P 2015.

    Departures: the paper gives the scheme, learners made of sums. There is no `partial_fit`.

    Args:
        alpha: what is added to each count, at least 0; a number, or (d,) of them.
        force_alpha: keep an alpha below 1e-10, which scikit-learn otherwise raises to it.
        binarize: a feature is there when its value is above this; None for features that are 0 and 1 already.
        fit_prior: whether classes have their shares of the weight as priors; otherwise they are equal.
        class_prior: (C,) probabilities of the classes, instead.
    """

    def __init__(
        self, *, alpha: float | ArrayLike = 1.0, force_alpha: bool = True, binarize: float | None = 0.0,
        fit_prior: bool = True, class_prior: ArrayLike | None = None,
    ) -> None:  # fmt: skip
        super().__init__(alpha=alpha, force_alpha=force_alpha, binarize=binarize, fit_prior=fit_prior,
                         class_prior=class_prior)  # fmt: skip


def count(x: Any, codes: NDArray[np.intp], w: Array, classes: int) -> Array:
    """(C, 1 + d) per class the sum of the weights, and of the weighted rows."""
    member = sparse.csr_array((w, (codes, np.arange(len(w)))), shape=(classes, len(w)))
    features = member @ x
    features = features.toarray() if sparse.issparse(features) else features
    return np.column_stack([np.bincount(codes, weights=w, minlength=classes), features])
