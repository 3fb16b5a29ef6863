"""The scikit-learn side: estimators that forget rows they were fitted on, and their comparison with refitted ones.

Row numbers are those of the array given to `fit`, from 0, and a row keeps its number for good: when row 3 has been
deleted, row 4 is still row 4, and asking for row 3 again is an error.

Gradient boosting is left out: every tree is fitted to the errors of the trees before it, so a row that goes changes the
targets of all later trees, and exact removal would be refitting them.
"""

import copy
import math
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from numbers import Integral, Real
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from sklearn.base import clone, is_classifier, is_clusterer
from sklearn.metrics import adjusted_rand_score
from sklearn.utils.validation import _check_sample_weight, check_is_fitted

from .errors import UserError

CHUNK = 1 << 16  # rows that are worked on at once, so that temporary arrays stay small


class RowError(UserError, ValueError):
    """A request or an argument that cannot be served; scikit-learn's callers know it as a ValueError."""


class Rows:
    """Own copies of the fitted rows that have not been deleted.

    Deleted rows are overwritten with zeros at once; their space is given back when less than half of the rows are left,
    which costs a deletion the copying of a few rows on average.

    Attributes:
        total: rows that were fitted.
        held: rows that are left.
        numbers: (p,) the row number at each place, ascending.
        alive: (p,) whether the row at a place is left.
        columns: arrays of p rows each: features, targets, weights.

    Args:
        *columns: arrays of n rows each, dense or in CSR form.
    """

    def __init__(self, *columns: Any) -> None:
        self.total = self.held = columns[0].shape[0]
        self.numbers, self.alive = np.arange(self.total), np.ones(self.total, bool)
        self.columns = [c.tocsr(copy=True) if sparse.issparse(c) else np.array(c, order="C") for c in columns]

    def find(self, rows: ArrayLike) -> NDArray[np.intp]:
        """The places of some row numbers, ascending.

        Raises:
            RowError: no or not only row numbers, a number twice, an unknown one, a deleted one, or all that are left.
        """
        given = np.asarray(rows)
        if given.size == 0:
            raise RowError("there is no row to forget; give at least one row number")
        if given.ndim != 1 or given.dtype.kind not in "iu":
            hint = "; np.flatnonzero makes them of a mask" if given.dtype.kind == "b" else ""
            raise RowError(f"rows are a list of row numbers, not {given.dtype} of shape {given.shape}{hint}")
        wrong = given[(given < 0) | (given >= self.total)]
        if len(wrong):
            raise RowError(f"there is no row {wrong[0]}; the rows given to fit are 0 to {self.total - 1}")
        asked, times = np.unique(given.astype(np.intp), return_counts=True)
        if len(asked) < len(given):
            raise RowError(f"row {asked[times > 1][0]} is named {times.max()} times; name every row once")
        at = np.searchsorted(self.numbers, asked).clip(max=len(self.numbers) - 1)
        gone = asked[(self.numbers[at] != asked) | ~self.alive[at]]
        if len(gone):
            raise RowError(f"row {gone[0]} has been deleted already; row_numbers_ lists the {self.held} that are left")
        if len(at) == self.held:
            raise RowError(f"these are all {self.held} rows that are left, and nothing would remain to learn from; "
                           "drop the estimator instead")  # fmt: skip
        return at

    def take(self, at: NDArray[np.intp]) -> list[Any]:
        """The rows at some places, of every column."""
        return [c[at] for c in self.columns]

    def left(self, at: NDArray[np.intp] | None = None) -> NDArray[np.intp]:
        """The places of the rows that are left, those at `at` taken away."""
        mask = self.alive
        if at is not None:
            mask = mask.copy()
            mask[at] = False
        return np.flatnonzero(mask)

    def kept(self, at: NDArray[np.intp] | None = None) -> list[Any]:
        """The rows that are left, those at `at` taken away; the columns themselves, uncopied, when that is all."""
        if at is None and self.held == len(self.numbers):
            return list(self.columns)
        return self.take(self.left(at))

    def drop(self, at: NDArray[np.intp]) -> bool:
        """Forget the rows at some places; tells whether the others have moved to new places."""
        self.alive[at] = False
        self.held -= len(at)
        for column in self.columns:
            _erase(column, at)
        if 2 * self.held >= len(self.numbers):
            return False
        places = np.flatnonzero(self.alive)
        self.columns = self.take(places)
        self.numbers, self.alive = self.numbers[places], np.ones(self.held, bool)
        return True


class UnlearnerMixin(ABC):
    """A scikit-learn estimator that can forget rows that it was fitted on.

    `fit` keeps a copy of the rows as `_rows`; arguments are checked in `fit`, as scikit-learn wants it. A request that
    is refused leaves the estimator as it was.
    """

    _rows: Rows

    @abstractmethod
    def unlearn(self, rows: NDArray[np.intp]) -> Self:
        """Forget rows.

        Args:
            rows: numbers of the rows in the array given to `fit`, each once; they stay valid after deletions.

        Raises:
            RowError: an unknown or deleted row, one named twice, no row, or all that are left.
        """

    @property
    def row_numbers_(self) -> NDArray[np.intp]:
        """(n,) numbers of the rows that are left, ascending: the order in which a refit would see them."""
        return self._rows.numbers[self._rows.alive]

    def _places(self, rows: ArrayLike) -> NDArray[np.intp]:
        """Where the rows are, after every check that all estimators share."""
        check_is_fitted(self)
        return self._rows.find(rows)


def check_whole(estimator: Any, least: Mapping[str, int], also: Mapping[str, tuple[Any, ...]] | None = None) -> None:
    """Refuse arguments, named with the least that they may be, that are no whole numbers and none of the words."""
    for name, low in least.items():
        value, words = getattr(estimator, name), (also or {}).get(name, ())
        if value not in words and (not isinstance(value, Integral) or value < low):  # type: ignore[operator]
            other = "".join(f", or {word!r}" for word in words)
            raise RowError(f"{name} must be a whole number of at least {low}{other}, not {value!r}")


def check_words(estimator: Any, **known: tuple[str, ...]) -> None:
    """Refuse arguments that are none of their words."""
    for name, words in known.items():
        if getattr(estimator, name) not in words:
            raise RowError(f"{name} must be {' or '.join(map(repr, words))}, not {getattr(estimator, name)!r}")


def check_number(estimator: Any, name: str, usual: str, above: bool = False) -> None:
    """Refuse an argument that is no finite number of at least 0, or above it; `usual` says what would be right."""
    value = getattr(estimator, name)
    number = float(value) if isinstance(value, Real) else math.nan
    if not (number > 0 if above else number >= 0) or number == math.inf:
        raise RowError(f"{name} must be a number {'above' if above else 'of at least'} 0, not {value!r}; {usual}")


def keep_classes(estimator: Any, counts: NDArray[np.intp]) -> NDArray[np.bool_]:
    """Take the classes without rows out of an estimator that keeps class numbers as second column; says which stay.

    Args:
        estimator: with `_rows`, `classes_` and `_counts`, the rows of each class.
        counts: (C,) rows that are left of each class.
    """
    stay = counts > 0
    if not stay.all():
        estimator._rows.columns[1] = (np.cumsum(stay) - 1)[estimator._rows.columns[1]]
        estimator.classes_ = estimator.classes_[stay]
    estimator._counts = counts[stay]
    return stay


def weights(sample_weight: ArrayLike | None, x: Any) -> NDArray[np.float64]:
    """(n,) weights of rows, ones by default.

    Raises:
        ValueError: a weight is negative or not finite, or all are 0.
    """
    w = _check_sample_weight(sample_weight, x, dtype=np.float64)
    if (w < 0).any():
        raise RowError("sample_weight must not be negative; a row of weight 0 counts for nothing")
    if not w.any():
        raise RowError("sample_weight must contain at least one non-zero number")
    return w


def chunks(n: int) -> Iterator[slice]:
    """Slices that cover n rows, a bounded number at a time."""
    return (slice(start, min(n, start + CHUNK)) for start in range(0, n, CHUNK))


def stretches(start: NDArray[Any], length: NDArray[Any]) -> NDArray[Any]:
    """The places of several stretches of an array, one stretch after the other."""
    return np.repeat(start - (np.cumsum(length) - length), length) + np.arange(length.sum())


def two_sum(high: NDArray[np.float64], low: NDArray[np.float64]) -> NDArray[np.float64]:
    """(2, ...) the rounded sum of two arrays, and what the rounding lost: together they are the exact sum."""
    total = high + low
    back = total - high
    return np.stack([total, (high - (total - back)) + (low - back)])


def precise_mean(x: NDArray[np.float64], w: NDArray[np.float64]) -> NDArray[np.float64]:
    """(2, d) weighted mean of (n, d) rows and a correction to it.

    Rows less both parts are centred to the precision of their spread, however far from zero they lie.
    """
    total = w.sum()
    high = w @ x / total
    low = sum((w[part] @ (x[part] - high) for part in chunks(len(x))), np.zeros_like(high)) / total
    return two_sum(high, low)


def run(
    estimator: Any, sets: Mapping[str, tuple[NDArray[Any], NDArray[Any]]], rows: NDArray[np.intp], repeats: int = 3
) -> dict[str, Any]:
    """Compare the original, the unlearned and the retrained (refitted) estimator.

    Args:
        estimator: an estimator with `unlearn`, which is cloned and stays unfitted.
        sets: features and targets by name; "train" and "retain" among them, the others are evaluated too.
        rows: numbers of the rows of "train" that "retain" lacks.
        repeats: times that fitting and unlearning are timed; the median counts.

    Returns:
        Plain numbers: `models` (name -> "<set>/<metric>" -> value), `to_retrained` (per set: agreement of predictions,
        and for regressors their largest difference), `parameters` (name -> largest absolute difference of unlearned and
        retrained, None where shapes differ) and `time` (seconds, and how many times faster than refitting).
    """
    original, fit_seconds = _timed(partial(_refit, estimator, sets["train"]), repeats)
    copies = [copy.deepcopy(original) for _ in range(repeats)]
    unlearned, seconds = _timed(lambda: copies.pop().unlearn(rows), repeats)
    retrained, refit_seconds = _timed(partial(_refit, estimator, sets["retain"]), repeats)
    models = {"original": original, "unlearned": unlearned, "retrained": retrained}
    found: dict[str, dict[str, float]] = {name: {} for name in models}
    to_retrained: dict[str, dict[str, float]] = {}
    for which, (x, y) in sets.items():
        predicted = {name: model.predict(x) for name, model in models.items()}
        for name, values in predicted.items():
            metric, value = _quality(models[name], x, y, values)
            found[name][f"{which}/{metric}"] = value
        to_retrained[which] = _agreement(unlearned, predicted["unlearned"], predicted["retrained"])
    return {
        "models": found, "to_retrained": to_retrained, "parameters": _differences(unlearned, retrained),
        "time": {"fit": fit_seconds, "unlearn": seconds, "retrain": refit_seconds,
                 "speedup": refit_seconds / max(seconds, 1e-9)},
    }  # fmt: skip


def _refit(estimator: Any, rows: tuple[NDArray[Any], NDArray[Any]]) -> Any:
    return clone(estimator).fit(*rows)


def _timed(action: Callable[[], Any], repeats: int) -> tuple[Any, float]:
    """What an action gave last, and the median of its seconds."""
    spent = []
    for _ in range(repeats):
        start = time.perf_counter()
        made = action()
        spent.append(time.perf_counter() - start)
    return made, statistics.median(spent)


def _quality(model: Any, x: NDArray[Any], y: NDArray[Any], predicted: NDArray[Any]) -> tuple[str, float]:
    """The headline metric of a kind of estimator, and its value."""
    if is_classifier(model):
        return "accuracy", float(np.mean(predicted == y))
    if is_clusterer(model):
        return "distance", float(np.mean((x - model.cluster_centers_[predicted]) ** 2) * x.shape[1])
    return "mae", float(np.mean(np.abs(predicted - y)))


def _agreement(model: Any, mine: NDArray[Any], theirs: NDArray[Any]) -> dict[str, float]:
    """How far two models predict the same; clusters have no names, so theirs is the adjusted Rand index."""
    if is_classifier(model):
        return {"agreement": float(np.mean(mine == theirs))}
    if is_clusterer(model):
        return {"agreement": float(adjusted_rand_score(theirs, mine))}
    same = np.isclose(mine, theirs, rtol=1e-9, atol=1e-9 * float(np.abs(theirs).max()))
    return {"agreement": float(same.mean()), "largest_difference": float(np.abs(mine - theirs).max())}


def _differences(mine: Any, theirs: Any) -> dict[str, float | None]:
    """The largest absolute difference of every fitted parameter that is made of real numbers."""
    out: dict[str, float | None] = {}
    for name, value in vars(mine).items():
        if not name.endswith("_") or name.startswith("_") or not hasattr(theirs, name):
            continue
        a, b = np.asarray(value), np.asarray(getattr(theirs, name))
        if a.dtype.kind == b.dtype.kind == "f" and a.size:
            out[name] = float(np.abs(a - b).max()) if a.shape == b.shape else None
    return out


def _erase(column: Any, at: NDArray[np.intp]) -> None:
    """Overwrite rows with zeros, in place; of a sparse array the places of its entries too."""
    if not sparse.issparse(column):
        column[at] = 0
        return
    entries = stretches(column.indptr[at], np.diff(column.indptr)[at])
    column.data[entries] = 0
    column.indices[entries] = 0
