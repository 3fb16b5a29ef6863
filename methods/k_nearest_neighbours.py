"""Nearest neighbours that forget rows exactly."""

from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin, MultiOutputMixin, RegressorMixin
from sklearn.neighbors import BallTree, KDTree
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from vislearn.classical import RowError, Rows, UnlearnerMixin, check_whole, check_words, keep_classes

Array = NDArray[np.float64]
TREES = {"kd_tree": KDTree, "ball_tree": BallTree}
ANSWERS = 1 << 22  # distances that are held at once


class _ExactKNeighbors(UnlearnerMixin, BaseEstimator):
    """The rows, a tree over most of them, and which of those in the tree have been deleted."""

    def __init__(
        self, n_neighbors: int = 5, *, weights: Literal["uniform", "distance"] = "uniform", metric: str = "euclidean",
        algorithm: Literal["kd_tree", "ball_tree"] = "kd_tree", leaf_size: int = 40, tombstones: int = 64,
    ) -> None:  # fmt: skip
        self.n_neighbors, self.weights, self.metric = n_neighbors, weights, metric
        self.algorithm, self.leaf_size, self.tombstones = algorithm, leaf_size, tombstones

    def kneighbors(self, X: ArrayLike) -> tuple[Array, NDArray[np.intp]]:
        """(m, k) distances and row numbers of the nearest rows to X (m, d); of equally near ones the first rows."""
        distance, place = self._nearest(X)
        return distance, self._rows.numbers[place]

    def _check(self) -> None:
        check_whole(self, {"n_neighbors": 1, "leaf_size": 1, "tombstones": 0})
        check_words(self, weights=("uniform", "distance"), algorithm=tuple(TREES))
        known = TREES[self.algorithm].valid_metrics
        if self.metric not in known:
            raise RowError(f"metric {self.metric!r} is none of {self.algorithm}: {', '.join(sorted(known))}")

    def _plant(self) -> None:
        """Make the tree again, of the rows that are left."""
        self._leaves = self._rows.left()  # place of each row of the tree
        self._tree = TREES[self.algorithm](self._rows.kept()[0], leaf_size=self.leaf_size, metric=self.metric)

    def _drop(self, at: NDArray[np.intp]) -> None:
        if self._rows.drop(at) or len(self._leaves) - self._rows.held > self.tombstones:
            self._plant()

    def _nearest(self, x: Any) -> tuple[Array, NDArray[np.intp]]:
        """Distances and places of the nearest rows, by distance and then by row number."""
        check_is_fitted(self)
        x = validate_data(self, x, reset=False, dtype=np.float64)
        k, rows, n = self.n_neighbors, self._rows, len(self._leaves)
        if k > rows.held:
            raise RowError(f"n_neighbors={k} is more than the {rows.held} rows that are left; set_params makes it less")
        distance, place = np.empty((len(x), k)), np.empty((len(x), k), np.intp)
        todo, ask = np.arange(len(x)), min(n, k + n - rows.held + 1)
        while len(todo):
            tied = []
            step = max(1, ANSWERS // ask)
            for part in (todo[start : start + step] for start in range(0, len(todo), step)):
                far, at = self._tree.query(x[part], k=ask)
                at = self._leaves[at]
                # all rows that were not returned are at least as far as the last one that was
                reach = far[:, -1].copy() if ask < n else np.full(len(part), np.inf)
                far[~rows.alive[at]] = np.inf
                order = np.lexsort((at, far), axis=-1)[:, :k]
                distance[part], place[part] = (np.take_along_axis(a, order, axis=1) for a in (far, at))
                tied.append(part[distance[part, -1] >= reach])
            todo, ask = np.concatenate(tied), min(n, 2 * ask)  # a row as near as the last may have been left out
        return distance, place

    def _shares(self, distance: Array) -> Array:
        """(m, k) weights of neighbours; those of a row that is met exactly are its own alone."""
        if self.weights == "uniform":
            return np.ones_like(distance)
        with np.errstate(divide="ignore"):
            shares = 1 / distance
        met = np.isinf(shares)
        return np.where(met.any(axis=1, keepdims=True), met, shares)


class ExactKNeighborsClassifier(ClassifierMixin, _ExactKNeighbors):
    """The class that most of the k nearest rows have, and rows can be forgotten.

    A deleted row is overwritten and no longer answers; the tree is asked for as many neighbours more as it holds
    deleted rows, and is made again when those are more than `tombstones`. So a deletion costs O(d), and O(n log n d)
    every `tombstones` rows. Until then the bounds of the tree's boxes may still come from deleted rows, which no
    prediction shows; `tombstones=0` keeps nothing.

    Of rows equally far, the ones with lower numbers are the neighbours, and of classes with equally many votes the
    first is predicted, so a prediction does not depend on the tree: it is that of a refit to the last bit.

    Departures: from scikit-learn's classifier, whose choice among equally near rows depends on the layout of its data
    (rows so tied are the only ones for which predictions may differ); a search without a tree is not among the
    algorithms, because its distances, from matrix products, depend on the layout in the last bits.

    Args:
        n_neighbors: k, at least 1.
        weights: "uniform", or "distance" for votes by inverse distance.
        metric: a metric of the tree, such as "euclidean", "manhattan" or "chebyshev".
        algorithm: "kd_tree", or "ball_tree" for more metrics.
        leaf_size: rows in a leaf of the tree.
        tombstones: deleted rows in the tree before it is made again, at least 0.

    Attributes:
        classes_: (C,) the classes that a row is left of.
        row_numbers_: (n,) numbers of the rows that are left.
    """

    def fit(self, X: ArrayLike, y: Any) -> Self:
        """Keep rows X (n, d) and classes y (n,)."""
        self._check()
        x, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        self._rows, self._counts = Rows(x, codes), np.bincount(codes)
        self._plant()
        return self

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        """Classes of rows X (m, d)."""
        votes = self.predict_proba(X)  # refuses an estimator that is not fitted
        return self.classes_[votes.argmax(axis=1)]

    def predict_proba(self, X: ArrayLike) -> Array:
        """(m, C) shares of the votes."""
        distance, place = self._nearest(X)
        c = len(self.classes_)
        ballots = self._rows.columns[1][place] + c * np.arange(len(place))[:, None]
        votes = np.bincount(ballots.ravel(), weights=self._shares(distance).ravel(), minlength=c * len(place))
        votes = votes.reshape(-1, c)
        return votes / votes.sum(axis=1, keepdims=True)

    def unlearn(self, rows: NDArray[np.intp]) -> Self:
        at = self._places(rows)
        counts = self._counts - np.bincount(self._rows.columns[1][at], minlength=len(self._counts))
        self._drop(at)
        keep_classes(self, counts)
        return self


class ExactKNeighborsRegressor(MultiOutputMixin, RegressorMixin, _ExactKNeighbors):
    """The mean of the k nearest rows' targets, and rows can be forgotten.

    Neighbours, deletion and departures are those of :class:`ExactKNeighborsClassifier`.

    Args:
        n_neighbors: k, at least 1.
        weights: "uniform", or "distance" for a mean weighted by inverse distance.
        metric: a metric of the tree, such as "euclidean", "manhattan" or "chebyshev".
        algorithm: "kd_tree", or "ball_tree" for more metrics.
        leaf_size: rows in a leaf of the tree.
        tombstones: deleted rows in the tree before it is made again, at least 0.

    Attributes:
        row_numbers_: (n,) numbers of the rows that are left.
    """

    def fit(self, X: ArrayLike, y: Any) -> Self:
        """Keep rows X (n, d) and targets y (n,) or (n, t)."""
        self._check()
        x, y = validate_data(self, X, y, multi_output=True, y_numeric=True, dtype=np.float64)
        self._rows = Rows(x, y.astype(np.float64))
        self._plant()
        return self

    def predict(self, X: ArrayLike) -> Array:
        """Targets of rows X (m, d)."""
        distance, place = self._nearest(X)
        y, shares = self._rows.columns[1][place], self._shares(distance)
        shares = shares / shares.sum(axis=1, keepdims=True)
        return np.einsum("mk,mk...->m...", shares, y)

    def unlearn(self, rows: NDArray[np.intp]) -> Self:
        self._drop(self._places(rows))
        return self
