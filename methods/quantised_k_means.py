"""Quantised and divide-and-conquer k-means (Ginart et al., 2019)."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import sparse
from scipy.spatial.distance import cdist
from sklearn.base import BaseEstimator, ClusterMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted, validate_data

from vislearn.classical import RowError, Rows, UnlearnerMixin, check_number, check_whole, chunks
from vislearn.thresholds import mixed

Array = NDArray[np.float64]
Places = NDArray[np.intp]
ROUNDING = float(np.finfo(float).eps)


class Pass(NamedTuple):
    """What a look at the rows with some centres adds up to."""

    sizes: NDArray[np.int64]  # (k,) rows whose nearest centre this is
    sums: Array  # (k, d) sums of those rows less the centre
    loss: float  # sum of the squared distances


class Trajectory(NamedTuple):
    """A run of k-means."""

    centres: list[Array]  # of every step, those it starts from first
    passes: list[Pass]  # what the rows add up to with each of them
    model: int  # which of the centres are the model


class Grid(NamedTuple):
    """How centres are rounded."""

    eps: float  # distance between the points of the grid; 0 does not round
    gamma: float  # clusters of less than gamma n / k rows are drawn to their last centre
    phases: Array  # (T, d) shift of the grid in each step, in [0, 1)


class _ExactKMeans(ClusterMixin, UnlearnerMixin, BaseEstimator):
    """Rows, centres, and clusters that are looked up when they are asked for."""

    n_clusters: int
    random_state: Any
    cluster_centers_: Array
    outcome_: str

    def predict(self, X: ArrayLike) -> Places:
        """The nearest centre to each row of X (m, d)."""
        check_is_fitted(self)
        return look(validate_data(self, X, reset=False, dtype=np.float64), self.cluster_centers_)[0]

    @property
    def labels_(self) -> Places:
        """(n,) clusters of the rows that are left, in the order of `row_numbers_`."""
        return look(self._rows.kept()[0], self.cluster_centers_)[0]

    @property
    def inertia_(self) -> float:
        """Sum of the squared distances of the rows that are left."""
        return look(self._rows.kept()[0], self.cluster_centers_)[1].loss

    def _prepare(self, x: Any, counts: Sequence[str]) -> Array:
        """Checked rows; `_seed` is drawn and the rows are kept."""
        check_whole(self, dict.fromkeys(counts, 1))
        x = validate_data(self, x, dtype=np.float64)
        if len(x) < self.n_clusters:
            raise RowError(f"n_samples={len(x)} should be >= n_clusters={self.n_clusters}")
        self._seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))
        self._rows = Rows(x)
        return self._rows.columns[0]

    def _enough(self, at: Places) -> None:
        if (left := self._rows.held - len(at)) < self.n_clusters:
            raise RowError(f"{left} rows would remain for n_clusters={self.n_clusters}; fit fewer clusters instead")

    def _distinct(self, found: int) -> None:
        if found < self.n_clusters:
            raise RowError(f"there are only {found} distinct rows for n_clusters={self.n_clusters}; fewer would do")


class QKMeans(_ExactKMeans):
    r"""Quantised k-means: most deletions change no centre, and those that do go on from the step that they change.

    From seeds drawn as k-means++ does, step t takes the mean of each cluster, draws that of a small one to the last
    centre, and rounds to a grid with a random phase :math:`u_t \in [0, 1)^d`,

    .. math::
        c_j = q_j + \frac{1}{\max(n_j, M)} \sum_{i \in j} (x_i - q_j), \quad M = \frac{\gamma n}{k}, \quad
        q_j' = \epsilon \left( \mathrm{round}(c_j / \epsilon + u_t - 1/2) - (u_t - 1/2) \right),

    until the mean squared distance does not fall; the centres before that are the model. Forgetting rows replays the
    steps on the sums alone: the rows are assigned with each step's own centres and taken out of its sums, with n
    changed too. When every step still rounds to the same centres and stops at the same place, the new sums are all
    there is to do, at O(k d T) for each row. Otherwise the run goes on from the first step that differs, on the rows
    that are left; when a seed is forgotten, from new seeds. A value so near the edge of a cell, or losses so nearly
    equal, that rounding in the sums might decide, count as different. All k d coordinates have to stay in their cells,
    so this pays for many rows in few dimensions: on 1,797 digits of 64 pixels 2 of 60 deletions changed nothing.

    All that is drawn depends on `random_state` and the row's number alone, and a seed is the row that comes first in an
    exponential race with rates D^2. So the unlearned model is, to the last bit, what training on the rows that are left
    gives with the same draws, and is distributed as a fresh run, if requests do not depend on models published before.

    Reference:
        Ginart, Guan, Valiant, Zou. Making AI Forget You: Data Deletion in Machine Learning. NeurIPS 2019.
        arXiv:1907.05012.

    Departures: the paper retrains with fresh draws when a check fails, and keeps the seeds otherwise; with k-means++
    that is not distributed as a fresh run, because whether a row is a seed depends on the other seeds, hence the race.
    The authors' code takes the row's cluster by the new means, perturbs them by x / n, neglects that M changes, stores
    the sums at the step before, forgets the first seed and the stopping rule, so that "unchanged" is not certain, and
    overwrites the caller's rows: mistakes that are not repeated. It draws a new seed for an empty cluster, which here
    keeps its centre.

    Args:
        n_clusters: k, at least 1.
        eps: distance between grid points, in units of the data, above 0; rows in [0, 1]^d suit the default.
        gamma: balance, at least 0; clusters smaller than that share of n / k are drawn to their last centre.
        max_iter: steps at most, at least 1.
        init: "k-means++", or (k,) numbers of the rows to start from; those cannot be forgotten.
        random_state: seed of seeds and phases; None draws one.

    Attributes:
        cluster_centers_: (k, d) centres.
        labels_, inertia_: (n,) clusters of the rows that are left, and the sum of their squared distances.
        n_iter_: steps taken.
        outcome_: what the last call came to: "fitted", "unchanged" (no pass over the rows), "resumed" or "reseeded".
        row_numbers_: (n,) numbers of the rows that are left.
    """

    _grid: Grid
    _begun: Places  # numbers of the rows that it started from

    def __init__(
        self, n_clusters: int = 8, *, eps: float = 0.05, gamma: float = 0.2, max_iter: int = 10,
        init: str | ArrayLike = "k-means++", random_state: Any = None,
    ) -> None:  # fmt: skip
        self.n_clusters, self.eps, self.gamma, self.max_iter = n_clusters, eps, gamma, max_iter
        self.init, self.random_state = init, random_state

    def fit(self, X: ArrayLike, y: Any = None) -> Self:
        """Cluster rows X (n, d)."""
        check_number(self, "eps", "a twentieth of the data's range is usual", above=True)
        check_number(self, "gamma", "the authors' is gamma=0.2")
        x = self._prepare(X, ("n_clusters", "max_iter"))
        generator = np.random.default_rng(self._seed)
        self._grid = Grid(float(self.eps), float(self.gamma), generator.random((self.max_iter, x.shape[1])))
        places = self._seeds(x, self._rows.numbers)
        self._begun = self._rows.numbers[places]
        self._publish(advance(x, x[places], self._grid), "fitted")
        return self

    def unlearn(self, rows: NDArray[np.intp]) -> Self:
        at = self._places(rows)
        self._enough(at)
        begun, outcome = self._begun, "unchanged"
        if np.isin(self._rows.numbers[at], begun).any():
            x, numbers = self._rows.kept(at)[0], self._rows.numbers[self._rows.left(at)]
            places = self._seeds(x, numbers)
            begun, outcome = numbers[places], "reseeded"
            path = advance(x, x[places], self._grid)
        else:
            path, step = replay(self._path, self._rows.take(at)[0], self._rows.held - len(at), self._grid)
            if step is not None:
                path, outcome = resume(path, step, self._rows.kept(at)[0], self._grid), "resumed"
        self._begun = begun
        self._publish(path, outcome)
        self._rows.drop(at)
        return self

    def _seeds(self, x: Array, numbers: Places) -> Places:
        """The places of the rows to start from."""
        if isinstance(self.init, str):
            if self.init != "k-means++":
                raise RowError(f"init must be 'k-means++' or row numbers, not {self.init!r}")
            places = race(x, numbers, self.n_clusters, self._seed)
            self._distinct(len(places))
            return places
        given = np.asarray(self.init)
        if given.shape != (self.n_clusters,) or given.dtype.kind not in "iu":
            raise RowError(f"init names {self.n_clusters} rows, one for each cluster, or is 'k-means++'")
        missing = given[~np.isin(given, numbers)]
        if len(missing):
            raise RowError(f"init starts from row {missing[0]}, which would not be among the rows; fit again with "
                           "another init, or with 'k-means++'")  # fmt: skip
        return np.searchsorted(numbers, given)

    def _publish(self, path: Trajectory, outcome: str) -> None:
        self._path, self.outcome_ = path, outcome
        self.cluster_centers_, self.n_iter_ = path.centres[path.model].copy(), len(path.centres) - 1


class DCKMeans(_ExactKMeans):
    r"""Divide-and-conquer k-means: a deletion re-runs one small k-means and the one on top.

    Every row falls into one of `leaves` buckets at random, each bucket is clustered by k-means, and k-means of all
    their centres gives the model. Forgetting rows re-runs their buckets, of n / leaves rows each, and then the root,
    of k leaves rows. All k-means start from k-means++ seeds and stop at `max_iter` steps or when the loss does not
    fall. A bucket of at most k rows hands on the rows themselves.

    What is drawn depends on `random_state` and the row's number alone, so the unlearned model is what training on the
    rows that are left gives with the same draws, to the last bit.

    Reference:
        Ginart, Guan, Valiant, Zou. Making AI Forget You: Data Deletion in Machine Learning. NeurIPS 2019.
        arXiv:1907.05012.

    Departures: trees of two levels only, those of the paper's experiments; the paper and the authors' code take any.
    Draws are kept where the paper draws the path anew. An empty cluster keeps its centre, where the authors' code draws
    a new seed. Their code breaks on buckets of fewer than k rows.

    Args:
        n_clusters: k, at least 1, in the buckets and at the root.
        leaves: buckets, at least 1; the authors' demonstration has 16, the analysis about n^0.3.
        max_iter: steps of each k-means at most, at least 1.
        random_state: seed of buckets and seeds; None draws one.

    Attributes:
        cluster_centers_, labels_, inertia_, row_numbers_: as of :class:`QKMeans`.
        n_iter_: steps of the k-means at the root.
        outcome_: what the last call came to: "fitted", "unchanged" (no centre of a bucket has moved) or "resumed".
    """

    def __init__(self, n_clusters: int = 8, *, leaves: int = 16, max_iter: int = 10, random_state: Any = None) -> None:
        self.n_clusters, self.leaves, self.max_iter, self.random_state = n_clusters, leaves, max_iter, random_state

    def fit(self, X: ArrayLike, y: Any = None) -> Self:
        """Cluster rows X (n, d)."""
        x = self._prepare(X, ("n_clusters", "leaves", "max_iter"))
        leaf = self._leaf(self._rows.numbers)
        buckets = [np.flatnonzero(leaf == each) for each in range(self.leaves)]
        made = [self._cluster(x[places], places, self._seed)[0] for places in buckets]
        self._publish(made, *self._root(made), "fitted")
        return self

    def unlearn(self, rows: NDArray[np.intp]) -> Self:
        at = self._places(rows)
        self._enough(at)
        left = self._rows.left(at)
        leaf = self._leaf(self._rows.numbers[left])
        made, moved = list(self._made), False
        for touched in np.unique(self._leaf(self._rows.numbers[at])):
            places = left[leaf == touched]
            made[touched], _ = self._cluster(self._rows.take(places)[0], self._rows.numbers[places], self._seed)
            moved |= not np.array_equal(made[touched], self._made[touched])
        root = self._root(made) if moved else (self.cluster_centers_, self.n_iter_)
        self._publish(made, *root, "resumed" if moved else "unchanged")
        self._rows.drop(at)
        return self

    def _leaf(self, numbers: Places) -> Places:
        """The bucket of each row number."""
        return (draws(self._seed, numbers, -1) * self.leaves).astype(np.intp)

    def _root(self, made: Sequence[Array]) -> tuple[Array, int]:
        """(k, d) centres of the centres, whose draws go by bucket and place there, and steps."""
        numbers = np.concatenate([leaf * self.n_clusters + np.arange(len(m)) for leaf, m in enumerate(made)])
        handed_on = np.concatenate(made)
        self._distinct(len(np.unique(handed_on, axis=0)))
        return self._cluster(handed_on, numbers, self._seed + 1)

    def _cluster(self, x: Array, numbers: Places, seed: int) -> tuple[Array, int]:
        """Centres of plain k-means, k at most, and steps."""
        if len(x) <= self.n_clusters:
            return x.copy(), 1
        path = advance(x, x[race(x, numbers, self.n_clusters, seed)],
                       Grid(0.0, 0.0, np.zeros((self.max_iter, x.shape[1]))))  # fmt: skip
        return path.centres[path.model], len(path.centres) - 1

    def _publish(self, made: list[Array], root: Array, steps: int, outcome: str) -> None:
        self._made, self.cluster_centers_, self.n_iter_, self.outcome_ = made, root.copy(), steps, outcome


def draws(seed: int, numbers: Places, step: int) -> Array:
    """(n,) uniform numbers in (0, 1), each a function of seed, row number and step (a hash: SplitMix64, twice)."""
    key = mixed(np.array([seed], np.uint64) + mixed(step + 2, 0), 0)
    bits = mixed(key + mixed(numbers, 0), 0) >> np.uint64(11)
    return (bits.astype(np.float64) + 0.5) * 2.0**-53


def race(x: Array, numbers: Places, k: int, seed: int) -> Places:
    """Places of k seeds, as k-means++ draws them; fewer where there are fewer distinct rows.

    Every row runs with rate D^2, its squared distance to the nearest seed so far, and the first is the next seed. Each
    row has times of its own, so a row that is no seed can be taken away and the seeds stay as they are.
    """
    chosen: list[int] = []
    rate = np.ones(len(x))
    for step in range(k):
        with np.errstate(divide="ignore"):
            arrival = -np.log(draws(seed, numbers, step)) / rate
        chosen.append(int(arrival.argmin()))
        distance = cdist(x, x[chosen[-1:]], "sqeuclidean")[:, 0]
        rate = np.minimum(rate, distance) if step else distance
        if not rate.any():
            break
    return np.array(chosen, np.intp)


def look(x: Array, centres: Array) -> tuple[Places, Pass]:
    """(n,) the nearest centre of each row, the first of equally near ones, and what the rows add up to.

    Distances are sums of squared differences and no matrix product: they do not depend on the other rows.
    """
    k, labels, loss = len(centres), np.empty(len(x), np.intp), 0.0
    sums = np.zeros_like(centres)
    for part in chunks(len(x)):
        far = cdist(x[part], centres, "sqeuclidean")
        mine = labels[part] = far.argmin(axis=1)
        loss += float(np.take_along_axis(far, mine[:, None], axis=1).sum())
        member = sparse.csr_array((np.ones(len(mine)), (mine, np.arange(len(mine)))), shape=(k, len(mine)))
        sums += member @ (x[part] - centres[mine])
    return labels, Pass(np.bincount(labels, minlength=k), sums, loss)


def round_to(grid: Grid, step: int, c: Array) -> tuple[Array, Array]:
    """Centres on the grid, and how far inside its cell every coordinate is, in units of eps, at most 1/2."""
    if grid.eps == 0:
        return c, np.full_like(c, 0.5)
    shift = grid.phases[step] - 0.5
    scaled = c / grid.eps + shift
    cell = np.round(scaled)
    return grid.eps * (cell - shift), 0.5 - np.abs(scaled - cell)


def means(centres: Array, found: Pass, gamma: float, n: int) -> Array:
    """(k, d) means of the clusters, those of small ones drawn to their centre, which an empty one keeps."""
    least = gamma * n / len(centres)
    return centres + found.sums / np.maximum(np.maximum(found.sizes, least), ROUNDING)[:, None]


def advance(x: Array, start: Array, grid: Grid) -> Trajectory:
    """Run k-means from some centres."""
    return resume(Trajectory([start], [], 0), 0, x, grid)


def resume(path: Trajectory, step: int, x: Array, grid: Grid) -> Trajectory:
    """Run k-means from a step of a trajectory on; what the rows add up to is found anew there."""
    centres, passes = path.centres[: step + 1], path.passes[:step]
    passes.append(look(x, centres[step])[1])
    model, best = step, passes[step].loss if step else math.inf
    for t in range(step, len(grid.phases)):
        centres.append(round_to(grid, t, means(centres[t], passes[t], grid.gamma, len(x)))[0])
        passes.append(look(x, centres[-1])[1])
        if best <= passes[-1].loss:
            break
        model, best = t + 1, passes[-1].loss
    return Trajectory(centres, passes, model)


def replay(path: Trajectory, x: Array, n: int, grid: Grid) -> tuple[Trajectory, int | None]:
    """A trajectory without some of its rows, as far as its sums tell.

    Args:
        path: the trajectory.
        x: (m, d) the rows to take out.
        n: rows that are left.
        grid: how centres are rounded.

    Returns:
        The trajectory with the rows taken out of its sums, and the first step that has to be done again from the rows
        that are left, None if none has to.
    """
    passes, best = [], math.inf
    for q, old in zip(path.centres, path.passes, strict=True):
        part = look(x, q)[1]
        passes.append(Pass(old.sizes - part.sizes, old.sums - part.sums, old.loss - part.loss))
    made = Trajectory(path.centres, passes, path.model)
    for t in range(len(path.centres) - 1):
        q, inside = round_to(grid, t, means(path.centres[t], passes[t], grid.gamma, n))
        # sums err by n roundings of their terms, whose absolute values add up to sqrt(size loss) at most
        old = path.passes[t]
        weight = np.maximum(np.maximum(passes[t].sizes, grid.gamma * n / len(q)), 1)
        wrong = (n + len(x)) * ROUNDING * np.sqrt(old.sizes * old.loss) / weight / grid.eps
        if (inside <= 1e-9 + wrong[:, None]).any() or not np.array_equal(q, path.centres[t + 1]):
            return made, t
        loss, doubt = passes[t + 1].loss, 1e-9 * path.passes[t + 1].loss
        if abs(best - loss) <= doubt or (best <= loss) != (t + 1 > path.model):
            return made, t
        best = loss
    return made, None
