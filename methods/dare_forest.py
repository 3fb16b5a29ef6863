"""DaRE forests (Brophy and Lowd, 2021)."""

from collections.abc import Iterator
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from vislearn.classical import Rows, UnlearnerMixin, check_whole, check_words
from vislearn.thresholds import EVERY, Candidates, Ints, Rules, Table, mixed, uniform

CACHE_FROM = 512  # rows from which a node keeps the counts of its candidates; below, sorting its rows costs no more
NODE = np.dtype([
    ("feature", "i4"), ("code", "i4"), ("threshold", "f8"), ("left", "i4"), ("right", "i4"),
    ("start", "i4"), ("end", "i4"), ("depth", "i4"), ("seed", "u8"),
])  # fmt: skip


class DaRE(ClassifierMixin, UnlearnerMixin, BaseEstimator):
    r"""Random forest that deletes rows exactly, at a small part of the cost of a refit.

    Every tree sees every row. A node above ``random_depth`` splits a random feature that is not constant at a threshold
    uniform in [min, max); a node below draws features and, for each, ``k`` of its *valid* thresholds (between adjacent
    observed values that are not both pure of one class) and takes the one with the largest

    .. math::
        \frac{\sum_c l_c^2}{l} + \frac{\sum_c r_c^2}{r}
        \qquad\text{or}\qquad \sum_c l_c \log\frac{l_c}{l} + \sum_c r_c \log\frac{r_c}{r},

    with :math:`l_c, r_c` the rows of class c on its two sides (Gini, entropy). A deletion updates the counts along its
    paths; a subtree is grown again only where the chosen split changes.

    Exactness: what is drawn is a fixed random number for each (tree, place in the tree, feature, value), and the
    candidates are the valid thresholds with the ``k`` smallest. So they are a uniform sample of the valid thresholds,
    whichever these are, and deleting leads to the very tree that a fit of the remaining rows with the same
    ``random_state`` grows (with random levels, to one of the same distribution if the largest magnitude of a feature
    falls below a power of two). This holds for rows that are chosen without looking at the trees.

    Reference:
        Brophy, Lowd. Machine Unlearning for Random Forests. ICML 2021. arXiv:2009.05567.

    Departures: any number of classes. Candidates follow fixed random numbers where the paper draws new ones for each
    threshold lost: thresholds that *become* valid when a value disappears between two others get their chance, which
    the authors' code does not give them; it also keeps a threshold whose neighbouring value is gone, so that its
    trees are not distributed like retrained ones. Nodes with fewer than 512 rows keep no counts of candidates. There
    are no empty leaves. A class without rows leaves ``classes_``. ``min_samples_leaf`` does not bind random levels.

    Args:
        n_estimators: number of trees.
        max_depth: depth of the deepest leaves; None for no limit.
        random_depth: levels of random splits at the top, d_rmax; more make deletions cheaper and splits worse.
        k: thresholds considered for each feature of a greedy node.
        max_features: features considered by a greedy node: ``"sqrt"`` rounds the root down, None takes all.
        criterion: ``"gini"`` or ``"entropy"``.
        min_samples_split: a node with fewer rows is a leaf.
        min_samples_leaf: rows that a greedy split leaves on each side.
        threshold: where a split lies between its two values: ``"midpoint"``, or ``"left"`` on the lower one as in the
            authors' code.
        random_state: seed of the trees.

    Attributes:
        classes_: the classes that have rows left.
        report_: of the last deletion: rows deleted, subtrees grown again, and rows in these, summed over the trees.
        row_numbers_: (n,) numbers of the rows that are left.
    """

    def __init__(
        self, n_estimators: int = 100, max_depth: int | None = 10, random_depth: int = 0, k: int = 25,
        max_features: str | int | None = "sqrt", criterion: str = "gini", min_samples_split: int = 2,
        min_samples_leaf: int = 1, threshold: str = "midpoint",
        random_state: int | np.random.RandomState | None = None,
    ) -> None:  # fmt: skip
        self.n_estimators, self.max_depth, self.random_depth, self.k = n_estimators, max_depth, random_depth, k
        self.max_features, self.criterion = max_features, criterion
        self.min_samples_split, self.min_samples_leaf = min_samples_split, min_samples_leaf
        self.threshold, self.random_state = threshold, random_state

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        x, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        rules = self._rules(x.shape[1])
        self._labels, labels = np.unique(y, return_inverse=True)
        self._rows = Rows(np.empty((len(x), 0)))  # row numbers alone: the table holds the rest
        self._table = Table(x, labels, len(self._labels))
        draws = check_random_state(self.random_state).randint(1, 2**31, size=(self.n_estimators, 2)).astype(np.uint64)
        self._trees = [_Tree(self._table, seed, rules) for seed in draws[:, 0] << np.uint64(32) | draws[:, 1]]
        self._count()
        return self

    def predict_proba(self, X: ArrayLike) -> NDArray[np.float64]:
        check_is_fitted(self, "_trees")
        x = validate_data(self, X, dtype=np.float64, reset=False)
        total = sum((tree.predict(x) for tree in self._trees), np.zeros((len(x), len(self._labels))))
        return total[:, self._present] / len(self._trees)

    def predict(self, X: ArrayLike) -> NDArray[Any]:
        shares = self.predict_proba(X)
        return self.classes_[shares.argmax(axis=1)]

    def unlearn(self, rows: NDArray[np.intp]) -> Self:
        check_is_fitted(self, "_trees")
        places = self._places(rows)
        gone = self._rows.numbers[places]
        trees = self.__dict__.pop("_trees")  # interrupted, the forest is unfitted and never cleaned by half
        self._rows.drop(places)
        self._table.alive[gone] = False
        retrained = [size for tree in trees for size in tree.delete(gone)]
        self._table.erase(gone)
        self._trees = trees
        self._count()
        self.report_ = {"rows": len(gone), "subtrees_retrained": len(retrained), "rows_retrained": sum(retrained)}
        return self

    def _count(self) -> None:
        self._present = np.flatnonzero(self._trees[0].counts[0])
        self.classes_ = self._labels[self._present]

    def _rules(self, n_features: int) -> Rules:
        least = {"n_estimators": 1, "max_depth": 1, "random_depth": 0, "k": 1, "max_features": 1,
                 "min_samples_split": 2, "min_samples_leaf": 1}  # fmt: skip
        check_whole(self, least, {"max_depth": (None,), "max_features": (None, "sqrt")})
        check_words(self, criterion=("gini", "entropy"), threshold=("midpoint", "left"))
        some = self.max_features
        features = n_features if some is None else int(n_features**0.5) if isinstance(some, str) else int(some)
        depth = np.iinfo(np.int32).max if self.max_depth is None else self.max_depth
        return Rules(depth, self.random_depth, self.k, min(features, n_features), self.criterion == "gini",
                     self.min_samples_split, self.min_samples_leaf, self.threshold == "midpoint")  # fmt: skip


class _Tree:
    """Nodes in arrays; the rows of a node are a stretch of ``order``, in which nobody stands for deleted ones."""

    def __init__(self, table: Table, seed: np.uint64, rules: Rules) -> None:
        n = table.n
        self.table, self.rules = table, rules
        self.node = np.zeros(64, NODE)
        self.counts = np.zeros((64, table.n_classes), np.int64)
        self.free = list(range(63, 0, -1))
        self.cache: dict[int, Candidates] = {}
        self.order = np.arange(n, dtype=np.int32)
        self.place = np.arange(n + 1, dtype=np.int32)  # where in `order` a row is
        self.node[0] = (-1, 0, 0.0, 0, 0, 0, n, 0, seed)
        self._grow(0, self._rows(0))

    def predict(self, X: NDArray[np.float64]) -> NDArray[np.float64]:
        """(n, k) share of each class in the leaf of each row."""
        node, rows, at = self.node, np.arange(len(X)), np.zeros(len(X), np.intp)
        while len(rows := rows[node["feature"][at[rows]] >= 0]):
            here = node[at[rows]]
            below = X[rows, here["feature"]] <= here["threshold"]
            at[rows] = np.where(below, here["left"], here["right"])
        return self.counts[at] / self.counts[at].sum(axis=1, keepdims=True)

    def delete(self, rows: Ints) -> Iterator[int]:
        """Forget rows that the table has marked; yields the number of rows of each subtree that is grown again."""
        stack = [(0, rows)]
        while stack:
            i, gone = stack.pop()
            self.counts[i] -= np.bincount(self.table.y[gone], minlength=self.table.n_classes)
            f, code, left, right = (int(self.node[i][name]) for name in ("feature", "code", "left", "right"))
            if f < 0:
                stretch = self._stretch(i)
                stretch[~self.table.alive[stretch]] = self.table.n
                continue
            below = self.table.codes[f, gone] <= code
            if not self._kept(i, gone, below):
                kept = self._rows(i)
                self._grow(i, kept)
                yield len(kept)
                continue
            stack += [(child, some) for child, some in ((left, gone[below]), (right, gone[~below])) if len(some)]
        self.place[rows] = -1

    def _kept(self, i: int, gone: Ints, below: NDArray[np.bool_]) -> bool:
        """Whether an inner node would be split the same way without these rows, whose counts are already taken off."""
        if self._ends(i):
            return False
        if self.node["depth"][i] < self.rules.random_depth:
            left, right = (self.counts[self.node[side][i]].sum() for side in ("left", "right"))
            return bool(below.sum() < left and (~below).sum() < right)
        found = self.cache.get(i)
        if found is None or not self._update(i, found, gone):
            found = self._draw(i, self._rows(i))
        before = self.node["feature"][i], self.node["code"][i]
        return self._choose(i, found) and before == (self.node["feature"][i], self.node["code"][i])

    def _update(self, i: int, found: Candidates, gone: Ints) -> bool:
        """Take rows off the counts of the candidates; False where the candidates themselves may have changed."""
        table, size = self.table, int(self.counts[i].sum())
        width = max(16, 8 * table.n // size)  # about eight rows of the node on each side
        if 2 * width * len(gone) * len(found.features) > 4 * size:
            return False  # looking at the node's rows is as cheap
        labels = np.eye(table.n_classes, dtype=np.int64)[table.y[gone]]
        codes = table.codes[found.feature[:, None], gone]
        found.left -= (codes <= found.code[:, None]) @ labels
        found.at -= (codes == found.code[:, None]) @ labels
        found.at_after -= (codes == found.after[:, None]) @ labels
        n_at, n_after, n_left = (c.sum(axis=1) for c in (found.at, found.at_after, found.left))
        pure = (found.at.max(axis=1) == n_at) & (found.at_after.max(axis=1) == n_after)
        pure &= found.at.argmax(axis=1) == found.at_after.argmax(axis=1)
        least = np.minimum(n_left, size - n_left).min()
        if pure.any() or n_at.min() == 0 or n_after.min() == 0 or least < self.rules.min_leaf:
            return False
        return self._none_appears(i, found, gone, width)

    def _none_appears(self, i: int, found: Candidates, gone: Ints, width: int) -> bool:
        """Whether no threshold becomes a candidate that was none; False where this many neighbours do not tell.

        Without the last row of a value, the value before it (a) meets the one after (z). Their threshold is new if a
        and the lost value were pure of one class and a and z are not.
        """
        t, n, k = self.table, self.table.n, self.table.n_classes
        f = found.features[:, None]
        code = t.codes[f, gone]  # (m, rows)
        first = t.first[t.offset[f] + code]
        near = first[..., None] + np.arange(-width, width)  # (m, rows, 2 width) places by value
        row = t.sorted[f[..., None], near.clip(0, n - 1)]
        start, end = self.node["start"][i], self.node["end"][i]
        inside = t.alive[row] & (self.place[row] >= start) & (self.place[row] < end) & (near >= 0) & (near < n)
        c, y = t.codes[f[..., None], row], t.y[row]
        still = (inside & (c == code[..., None])).any(axis=-1)
        low, high = inside & (c < code[..., None]), inside & (c > code[..., None])
        a = np.where(low, c, -1).max(axis=-1)
        z = np.where(high, c, n).min(axis=-1)
        at_low_end, at_high_end = first - width <= 0, first + width >= n
        at_end = ((a < 0) & at_low_end) | ((z == n) & at_high_end)
        feature = np.broadcast_to(f, code.shape)
        late = t.priority(self.node["seed"][i], feature.ravel(), a.clip(0).ravel()).reshape(code.shape)
        late = (a >= 0) & (late > found.limit[:, None])
        seen = at_low_end | (low & (c < a[..., None])).any(axis=-1)  # all rows of a
        seen &= at_high_end | (high & (c > z[..., None])).any(axis=-1)  # and of z
        both = (low & (c == a[..., None])) | (high & (c == z[..., None]))
        one_class = np.where(both, y, k).min(axis=-1) == np.where(both, y, -1).max(axis=-1)
        return bool((still | at_end | late | (seen & (a >= 0) & (z < n) & one_class)).all())

    def _ends(self, i: int) -> bool:
        """Whether the node is a leaf whatever its features are."""
        counts, depth = self.counts[i], self.node["depth"][i]
        size = counts.sum()
        return bool(size < self.rules.min_split or depth >= self.rules.max_depth or counts.max() == size)

    def _grow(self, i: int, rows: Ints) -> None:
        """Grow a node and all below it afresh on these rows."""
        self._prune(i)
        stack = [(i, rows)]
        while stack:
            i, rows = stack.pop()
            self.counts[i] = np.bincount(self.table.y[rows], minlength=self.table.n_classes)
            if self._ends(i) or not self._split(i, rows):
                start = int(self.node["start"][i])
                self.order[start : start + len(rows)] = rows
                self.place[rows] = np.arange(start, start + len(rows))
                continue
            below = self.table.codes[self.node["feature"][i], rows] <= self.node["code"][i]
            start, depth, seed = (self.node[name][i] for name in ("start", "depth", "seed"))
            for side, some, own in zip(("left", "right"), (rows[below], rows[~below]), mixed(seed, [EVERY, EVERY - 1]),
                                       strict=True):  # fmt: skip
                child = self._new()
                self.node[child] = (-1, 0, 0.0, 0, 0, start, start + len(some), depth + 1, own)
                self.node[side][i] = child
                stack.append((child, some))
                start += len(some)

    def _split(self, i: int, rows: Ints) -> bool:
        """Choose a node's split; False if there is none."""
        if self.node["depth"][i] >= self.rules.random_depth:
            return self._choose(i, self._draw(i, rows))
        t, seed = self.table, self.node["seed"][i]
        for f in self._features(i):
            codes = t.codes[f, rows]
            low, high = codes.min(), codes.max()
            if low < high:
                values = t.values[t.offset[f] + codes]
                cut = uniform(np.random.default_rng([int(seed), int(f)]), t.reach[f], values.min(), values.max())
                self._set(i, f, codes[values <= cut].max(), cut)
                return True
        return False

    def _draw(self, i: int, rows: Ints) -> Candidates:
        """The candidates of a greedy node: of the first features in its own order that have a valid threshold."""
        parts: list[Candidates] = []
        order, wanted, some = self._features(i), self.rules.features, self.rules.features
        while wanted and len(order):
            parts.append(self.table.candidates(self.node["seed"][i], order[:some], rows, self.rules).head(wanted))
            order, wanted, some = order[some:], wanted - len(parts[-1].features), 2 * some
        found = parts[0] if len(parts) == 1 else Candidates.joined(parts)
        if len(rows) >= CACHE_FROM:
            self.cache[i] = found
        else:
            self.cache.pop(i, None)
        return found

    def _features(self, i: int) -> NDArray[np.intp]:
        return np.argsort(mixed(self.node["seed"][i], np.arange(len(self.table.codes))), kind="stable")

    def _choose(self, i: int, found: Candidates) -> bool:
        """Give a node the best of its candidates; False if there is none."""
        if not len(found.code):
            return False
        best = int(self.rules.scores(found.left, self.counts[i]).argmax())
        f, t = found.feature[best], self.table
        cut, upper = t.values[t.offset[f] + found.code[best]], t.values[t.offset[f] + found.after[best]]
        middle = cut / 2 + upper / 2
        if self.rules.midpoint and cut < middle < upper:  # not between neighbouring floats
            cut = middle
        self._set(i, f, found.code[best], cut)
        return True

    def _set(self, i: int, feature: int, code: int, threshold: float) -> None:
        self.node["feature"][i], self.node["code"][i], self.node["threshold"][i] = feature, code, threshold

    def _stretch(self, i: int) -> Ints:
        return self.order[self.node["start"][i] : self.node["end"][i]]

    def _rows(self, i: int) -> Ints:
        """The rows left in a node."""
        stretch = self._stretch(i)
        return stretch[self.table.alive[stretch]]

    def _prune(self, i: int) -> None:
        """Make a node a leaf and release what was below it."""
        rows, stretch = self._rows(i), self._stretch(i)
        stretch[: len(rows)], stretch[len(rows) :] = rows, self.table.n
        stack = [i]
        while stack:
            j = stack.pop()
            self.cache.pop(j, None)
            if self.node["feature"][j] >= 0:
                children = [int(self.node[side][j]) for side in ("left", "right")]
                stack += children
                self.free += children
            self.node["feature"][j] = -1

    def _new(self) -> int:
        if not self.free:
            size = len(self.node)
            self.node = np.concatenate([self.node, np.zeros(size, NODE)])
            self.counts = np.concatenate([self.counts, np.zeros_like(self.counts)])
            self.free = list(range(2 * size - 1, size - 1, -1))
        return self.free.pop()
