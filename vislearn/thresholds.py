"""Candidate thresholds of trees that forget exactly: drawn by fixed random numbers, and counted.

What is drawn is a fixed random number for each (node, feature, value), and a node considers the valid thresholds with
the smallest ones. That is a uniform sample of the valid thresholds, whichever these are, and it follows them when rows
go: the candidates are always those that a tree grown on the rows that are left would draw.
"""

from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import xlogy

from .classical import stretches

Ints = NDArray[np.integer[Any]]
EVERY = np.iinfo(np.uint64).max


@dataclass(frozen=True)
class Rules:
    """How trees grow; names as in :class:`vislearn.methods.DaRE`, with None replaced by numbers."""

    max_depth: int
    random_depth: int
    k: int
    features: int
    gini: bool
    min_split: int
    min_leaf: int
    midpoint: bool

    def scores(self, left: Ints, counts: Ints) -> NDArray[np.float64]:
        """(c,) quality of splits, larger is better, from the class counts (c, k) on their left and (k,) of the node."""
        return self._purity(left.astype(np.float64)) + self._purity((counts - left).astype(np.float64))

    def _purity(self, counts: NDArray[np.float64]) -> NDArray[np.float64]:
        size = counts.sum(axis=1)
        if self.gini:
            return (counts * counts).sum(axis=1) / size
        return xlogy(counts, counts).sum(axis=1) - xlogy(size, size)


@dataclass
class Candidates:
    """Thresholds that a node considers: in the node's order of features, by priority within each."""

    features: Ints  # (m,) the features considered
    limit: NDArray[np.uint64]  # (m,) priority up to which their thresholds are candidates
    feature: Ints  # (c,)
    code: Ints  # (c,) rank of the value below the threshold
    after: Ints  # (c,) rank of the next value in the node
    left: Ints  # (c, k) rows of each class at or below the threshold
    at: Ints  # (c, k) rows of each class with the value below
    at_after: Ints  # (c, k) and with the next

    def head(self, m: int) -> "Candidates":
        """Those of the first m features."""
        mine = np.isin(self.feature, self.features[:m])
        return Candidates(self.features[:m], self.limit[:m], *(getattr(self, f.name)[mine] for f in fields(self)[2:]))

    @classmethod
    def joined(cls, parts: "list[Candidates]") -> Self:
        return cls(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)))


class Table:
    """The fitted rows by rank: what all trees of a forest share.

    The distinct values of all features lie in one array; ``offset[f] + code`` is the place of the value with rank
    ``code``. Row n, one past the last, is nobody: never alive, it stands wherever a deleted row was.

    Args:
        X: (n, p) finite features.
        y: (n,) classes from 0 to n_classes - 1.
        n_classes: number of classes.
    """

    def __init__(self, X: NDArray[np.float64], y: Ints, n_classes: int) -> None:
        self.n, p = X.shape
        self.y, self.n_classes = np.append(y, 0).astype(np.int64), n_classes
        self.alive = np.arange(self.n + 1) < self.n
        self.codes = np.zeros((p, self.n + 1), np.int32)
        found = []
        for f in range(p):
            # + 0.0 makes one number of 0.0 and -0.0
            values, codes, sizes = np.unique(X[:, f] + 0.0, return_inverse=True, return_counts=True)
            self.codes[f, :-1] = codes
            found.append((values, sizes))
        self.sorted = np.argsort(self.codes[:, :-1], axis=1, kind="stable").astype(np.int32)  # (p, n) rows by value
        self.values = np.concatenate([values for values, _ in found])
        self.size = np.concatenate([sizes for _, sizes in found])  # places that a value takes in `sorted`
        self.left = self.size.copy()  # rows with a value that are not deleted
        self.first = np.concatenate([np.cumsum(sizes) - sizes for _, sizes in found])  # place of a value's first row
        self.offset = np.cumsum([0, *(len(values) for values, _ in found)])
        # power of two above all magnitudes of a feature: where uniform draws start, which tells no value of any row
        reach = np.ldexp(1.0, np.frexp(np.abs(X).max(axis=0))[1])
        self.reach = np.minimum(reach, np.finfo(np.float64).max)

    def erase(self, rows: Ints) -> None:
        """Overwrite what is known of deleted rows: values, classes and ranks."""
        self.alive[rows] = False
        for f, codes in enumerate(self.codes[:, rows]):
            value = self.offset[f] + np.unique(codes)
            place = stretches(self.first[value], self.size[value])
            there = self.sorted[f, place]
            self.sorted[f, place[~self.alive[there]]] = self.n
            np.subtract.at(self.left, self.offset[f] + codes, 1)
            self.values[value[self.left[value] == 0]] = 0.0
        self.codes[:, rows] = 0
        self.y[rows] = 0

    def priority(self, seed: np.uint64, feature: Ints, code: Ints) -> NDArray[np.uint64]:
        """The fixed random number of each threshold: it depends on the value alone, not on the other rows."""
        return mixed(seed, feature, self.values[self.offset[feature] + code].view(np.uint64))

    def candidates(self, seed: np.uint64, features: Ints, rows: Ints, rules: Rules) -> Candidates:
        """The candidates of these features among these rows; features without a valid threshold are left out.

        A threshold is valid between two adjacent values that are not both pure of one class, with ``min_leaf`` rows on
        each side.
        """
        m, r, k = len(features), len(rows), self.n_classes
        counts = np.bincount(self.y[rows], minlength=k)
        key = self.codes[features[:, None], rows] * np.int64(k) + self.y[rows]
        key.sort(axis=1)
        key = key.ravel()
        new = np.ones(m * r, bool)
        new[1:] = key[1:] != key[:-1]
        new[::r] = True
        run = np.flatnonzero(new)  # stretches of one feature, value and class
        size = np.diff(run, append=m * r)
        owner = run // r
        code, label = np.divmod(key[run], k)
        new = np.ones(len(run), bool)
        new[1:] = (code[1:] != code[:-1]) | (owner[1:] != owner[:-1])
        at = np.zeros((int(new.sum()), k), np.int64)
        at[np.cumsum(new) - 1, label] = size
        owner, code = owner[new], code[new]
        left = np.cumsum(at, axis=0) - owner[:, None] * counts
        n_left = left.sum(axis=1)
        pure = np.where((at > 0).sum(axis=1) == 1, at.argmax(axis=1), -1)
        valid = (owner[1:] == owner[:-1]) & ((pure[1:] != pure[:-1]) | (pure[:-1] < 0))
        valid &= (n_left[:-1] >= rules.min_leaf) & (r - n_left[:-1] >= rules.min_leaf)
        here = np.flatnonzero(valid)
        priority = self.priority(seed, features[owner[here]], code[here])
        ends = np.searchsorted(owner[here], np.arange(m + 1))
        kept, considered, limit = [np.empty(0, np.intp)], list[int](), list[Any]()
        for f, low, high in zip(features, ends[:-1], ends[1:], strict=True):
            if low == high:
                continue
            mine = priority[low:high]
            some = np.arange(high - low) if high - low <= rules.k else np.argpartition(mine, rules.k - 1)[: rules.k]
            some = some[np.argsort(mine[some])]
            kept.append(here[low + some])
            considered.append(int(f))
            limit.append(mine[some[-1]] if high - low >= rules.k else EVERY)
        pick = np.concatenate(kept)
        return Candidates(np.array(considered, np.intp), np.array(limit, np.uint64), features[owner[pick]], code[pick],
                          code[pick + 1], left[pick], at[pick], at[pick + 1])  # fmt: skip


def mixed(seed: ArrayLike, *parts: ArrayLike) -> NDArray[np.uint64]:
    """64 bits for each combination of a seed and numbers, as good as independent (the mixer of splitmix64)."""
    out = np.atleast_1d(np.asarray(seed, np.uint64))
    for part in parts:
        out = (out ^ np.asarray(part, np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        out = (out ^ (out >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        out = (out ^ (out >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        out = out ^ (out >> np.uint64(31))
    return out


def uniform(rng: np.random.Generator, reach: float, least: float, most: float) -> float:
    """A draw uniform in [least, most), by rejection from [-reach, reach), which shrinks to the side of the target.

    One stream of numbers serves every target: the draw for a smaller one is the same as long as it lies in it.
    """
    low, high = -reach, reach
    while True:
        share = rng.random()
        draw = low * (1 - share) + high * share
        if draw < least:
            low = draw
        elif draw >= most:
            high = draw
        else:
            return draw
