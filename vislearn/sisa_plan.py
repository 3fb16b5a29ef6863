r"""What a stream of deletion requests costs a SISA ensemble, before anything is trained.

N rows lie in S shards of R slices. Step r of a shard trains e_r epochs on its slices 1..r, so that a request for a row
of slice r repeats the steps r..R. Costs are rows x epochs that are run again; requests choose rows uniformly and
without looking at the models. The closed forms are the paper's; `expected_cost` is exact for any sizes and batches:
with p rows in slices 1..j of a shard, a batch of B requests after t others repeats step j on

.. math:: p \, \frac{N - t - B}{N} \Bigl(1 - \binom{N - p}{B} / \binom{N - 1}{B}\Bigr)

rows in expectation, because a row counts when it is not asked for up to then and another of the p rows is in the batch.

Reference:
    Bourtoule, Chandrasekaran, Choquette-Choo, Jia, Travers, Zhang, Lie, Papernot. Machine Unlearning. IEEE S&P 2021.
    arXiv:1912.03817.

Departures: the epochs of a slice are found with integers, where the authors' code rounds a product of floats down; a
schedule whose last slice would get no epoch is refused, because those rows would never be trained on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vislearn.errors import UserError

Ints = NDArray[np.int64]
MOST_SHARDS = 20  # beyond it the paper lost more than five points of accuracy even on simple tasks
SHARDS, SLICES = (1, 2, 3, 5, 10, MOST_SHARDS), (1, 2, 3, 5, 10, 20, 50)
CHUNK = 1024  # requests of a batch that are multiplied at once
NEAR = 0.05  # a plan that costs at most this much more than the cheapest is as good, and the smallest of them is better


def epochs_per_slice(epochs: int, slices: int, check: bool = True) -> tuple[int, ...]:
    """Epochs of each step, so that all steps together cost what `epochs` epochs without slices cost.

    With a = 2 epochs / (slices + 1), step r gets floor(r a) - floor((r - 1) a) epochs.

    Args:
        epochs: of a training without slices.
        slices: R.
        check: refuse a schedule in which the last slice gets no epoch.
    """
    if epochs < 1 or slices < 1:
        raise UserError(f"epochs and slices are at least 1, not {epochs} and {slices} (--epochs, --slices)")
    ends = [2 * epochs * r // (slices + 1) for r in range(slices + 1)]
    schedule = tuple(b - a for a, b in pairwise(ends))
    if check and schedule[-1] == 0:
        raise UserError(
            f"{epochs} epochs are too few for {slices} slices: the rows of the last slice would never be trained on; "
            f"give --slices={4 * epochs - 2} at most, or --epochs={(slices + 1) // 4 + 1}"
        )
    return schedule


def sharding_sequential(rows: int, shards: int, requests: int) -> float:
    """E[rows run again] when each request is served before the next: (N/S + 1/(2S) - 1) K - K^2/(2S)."""
    return (rows / shards + 1 / (2 * shards) - 1) * requests - requests**2 / (2 * shards)


def sharding_batch(rows: int, shards: int, requests: int) -> float:
    """E[rows run again] when K requests are served together: N (1 - (1 - 1/S)^K) - K."""
    return rows * (1 - (1 - 1 / shards) ** requests) - requests


def sharding_batch_exact(rows: int, shards: int, requests: int) -> float:
    """The same for K different rows and equal shards: N (1 - C(N - N/S, K) / C(N, K)) - K."""
    size = rows / shards
    i = np.arange(requests)
    missed = np.prod(np.maximum(rows - size - i, 0) / (rows - i))
    return float(rows * (1 - missed) - requests)


def slicing_single(epochs: float, rows: int, slices: int) -> float:
    """E[rows x epochs run again] for one request in a shard of `rows`: e0 D (2/3 + 1/(3R))."""
    return epochs * rows * (2 / 3 + 1 / (3 * slices))


def slicing_batch(epochs: float, rows: int, slices: int, requests: int) -> float:
    """The same for K requests together: sum over j of (2 e0/(R+1)) (j D/R) (1 - (1 - j/R)^K)."""
    j = np.arange(1, slices + 1)
    return float(np.sum(2 * epochs / (slices + 1) * j * rows / slices * (1 - (1 - j / slices) ** requests)))


def equal_counts(rows: int, shards: int, slices: int) -> Ints:
    """(S, R) rows of each slice when shards, and slices inside them, differ by one row at most."""
    if rows < shards * slices:
        raise UserError(f"{rows} rows do not fill {shards} x {slices} slices; give fewer (--shards, --slices)")
    sizes = np.diff(-(-np.arange(shards + 1) * rows // shards))  # row i of n is in part floor(i parts / n)
    return np.diff(-(-np.arange(slices + 1) * sizes[:, None] // slices), axis=1)


def expected_cost(counts: ArrayLike, epochs: Sequence[int], requests: int, batch: int = 1) -> float:
    """Exact E[rows x epochs run again] for different rows drawn uniformly, whatever the sizes.

    Args:
        counts: (S, R) rows of each slice.
        epochs: (R,) epochs of each step.
        requests: rows asked for in all.
        batch: requests that are served together; the last batch may be smaller.
    """
    prefix = np.cumsum(np.asarray(counts, dtype=np.int64), axis=1)
    n = int(prefix[:, -1].sum())
    if not 0 <= requests <= n or batch < 1:
        raise UserError(f"requests lie between 0 and {n} and a batch holds at least one, not {requests} and {batch}")
    weight = prefix * np.asarray(epochs, dtype=np.float64)

    def hit(size: int) -> float:
        """What a batch of this size costs, but for the rows that are left."""
        return float(np.sum(weight * (1 - _untouched(prefix, n, size)))) if size else 0.0

    whole, rest = divmod(requests, batch)
    left = whole - batch * whole * (whole + 1) / (2 * n)  # shares of the rows that are left, over the whole batches
    return (left * hit(batch) if whole else 0.0) + (n - requests) / n * hit(rest)


def _untouched(prefix: Ints, rows: int, batch: int) -> NDArray[np.float64]:
    """C(N - p, B) / C(N - 1, B): given a row that stays, none of the other p - 1 rows is among the B."""
    p, where = np.unique(prefix, return_inverse=True)  # shards of equal size have the same ones
    missed, most = np.ones(len(p)), min(batch, rows - 1)
    for start in range(0, most, CHUNK):
        i = np.arange(start, min(start + CHUNK, most))
        missed *= np.prod(np.maximum(rows - p[:, None] - i, 0) / (rows - 1 - i), axis=1)
    return missed[where].reshape(prefix.shape)


def positions(counts: ArrayLike) -> tuple[Ints, Ints]:
    """(n,) shard and (n,) slice of rows that lie in this order; (S, R) rows of each slice."""
    size = np.asarray(counts, dtype=np.int64)
    shards, slices = size.shape
    return np.repeat(np.arange(shards), size.sum(axis=1)), np.repeat(np.tile(np.arange(slices), shards), size.ravel())


def simulate(
    shard: ArrayLike,
    slice_: ArrayLike,
    epochs: Sequence[int],
    batches: Iterable[ArrayLike],
    counts: ArrayLike | None = None,
) -> list[int]:
    """Rows x epochs that each batch of requests runs again, by serving them one after another.

    Args:
        shard: (n,) shard of each row.
        slice_: (n,) slice of each row, from 0.
        epochs: (R,) epochs of each step.
        batches: row numbers of each batch; a row that is gone already costs nothing.
        counts: (S, R) rows of each slice, where they are known; counted by default.
    """
    shard, slice_ = np.asarray(shard), np.asarray(slice_)
    if counts is None:
        counts = np.bincount(shard * len(epochs) + slice_, minlength=(int(shard.max()) + 1) * len(epochs))
    left = np.array(counts, dtype=np.int64).reshape(-1, len(epochs))
    there = np.ones(len(shard), dtype=bool)
    costs = []
    for batch in batches:
        ids = np.unique(np.asarray(batch, dtype=np.int64))
        ids = ids[there[ids]]
        there[ids] = False
        np.add.at(left, (shard[ids], slice_[ids]), -1)
        cost = 0
        for k in np.unique(shard[ids]):
            first = int(slice_[ids][shard[ids] == k].min())
            prefix = np.cumsum(left[k])
            cost += int(np.sum(prefix[first:] * np.asarray(epochs[first:])))
        costs.append(cost)
    return costs


def distribution_aware(probability: ArrayLike, cap: float) -> Ints:
    """(n,) the shard of each row; a shard expects fewer than `cap` requests, so that rows that stay share large shards.

    Rows are taken by rising probability; one that would bring the open shard to `cap` opens the next.

    Args:
        probability: (n,) how likely each row is asked for, in [0, 1].
        cap: expected requests of a shard, in (0, 1].
    """
    p = np.asarray(probability, dtype=np.float64)
    if not 0 < cap <= 1:
        raise UserError(f"cap lies in (0, 1], not {cap:g} (--cap)")
    if len(p) == 0 or not np.all((p >= 0) & (p <= 1)):  # NaN fails too
        raise UserError("deletion probabilities lie in [0, 1], one for each row")
    order = np.argsort(p, kind="stable")
    rising = p[order]
    shard = np.empty(len(p), dtype=np.int64)
    start = number = 0
    while start < len(p):
        least = rising[start]
        most = int(min(len(p) - start, cap / least + 2)) if least > 0 else len(p) - start
        full = np.cumsum(rising[start : start + most]) >= cap
        full[0] = False  # a row on its own always has a place
        size = int(np.argmax(full)) if full.any() else most
        shard[order[start : start + size]] = number
        start, number = start + size, number + 1
    return shard


def hit_probability(probability: ArrayLike, shard: ArrayLike) -> NDArray[np.float64]:
    """(S,) how likely each shard has a request, its rows being asked for independently: 1 - prod(1 - p)."""
    stays = np.ones(int(np.asarray(shard).max()) + 1)
    np.multiply.at(stays, np.asarray(shard), 1 - np.asarray(probability, dtype=np.float64))
    return 1 - stays


def expected_round(probability: ArrayLike, shard: ArrayLike, slice_: ArrayLike, epochs: Sequence[int]) -> float:
    """Exact E[rows x epochs run again] of one batch in which each row is asked for independently.

    Of the rows of slices 1..j, sum(1 - p) - m prod(1 - p) are run again in step j in expectation.
    """
    p, shard, slice_ = np.asarray(probability, dtype=np.float64), np.asarray(shard), np.asarray(slice_)
    shape = (int(shard.max()) + 1, len(epochs))
    size, kept, none = np.zeros(shape), np.zeros(shape), np.ones(shape)
    np.add.at(size, (shard, slice_), 1)
    np.add.at(kept, (shard, slice_), 1 - p)
    np.multiply.at(none, (shard, slice_), 1 - p)
    again = np.cumsum(kept, axis=1) - np.cumsum(size, axis=1) * np.cumprod(none, axis=1)
    return float(np.sum(again * np.asarray(epochs, dtype=np.float64)))


@dataclass(frozen=True)
class Advice:
    """A number of shards and slices, what they cost, and what to know about them.

    Attributes:
        shards: S.
        slices: R.
        cost: expected rows x epochs run again for all requests.
        retraining: the same for one model on all rows, trained again after every batch.
        rows_per_shard: that a constituent learns from.
        checkpoints: that are kept.
        notes: the trade-off in sentences.
    """

    shards: int
    slices: int
    cost: float
    retraining: float
    rows_per_shard: int
    checkpoints: int
    notes: tuple[str, ...]

    @property
    def speedup(self) -> float:
        """How many times cheaper than retraining; 1 where nothing is to be retrained."""
        return self.retraining / self.cost if self.cost else 1.0


def retraining_cost(rows: int, epochs: int, requests: int, batch: int = 1) -> float:
    """Rows x epochs of training one model again after every batch of requests."""
    served = np.minimum(np.arange(batch, requests + batch, batch), requests)
    return float(epochs * np.sum(rows - served))


def recommend(
    rows: int,
    requests: int,
    batch: int = 1,
    epochs: int = 20,
    checkpoints: int = 1000,
    accuracy: Mapping[int, float] | None = None,
    max_drop: float = 0.02,
    shards: int | None = None,
    slices: int | None = None,
) -> Advice:
    """The cheapest shards and slices that accuracy and storage allow; of nearly equal ones the smallest.

    More shards always make deletion cheaper and constituents weaker; slices cost storage alone. How much accuracy the
    shards cost is a property of the data: measure it, or stay below the number at which the paper lost much.

    Args:
        rows: N.
        requests: rows asked for over the life of the ensemble.
        batch: requests that are served together.
        epochs: of a training without slices.
        checkpoints: how many may be kept, S x R.
        accuracy: measured accuracy at several numbers of shards; only those are considered.
        max_drop: accuracy that may be lost against the fewest shards that were measured.
        shards: take this number of shards, whatever it costs.
        slices: take this number of slices.

    Raises:
        UserError: nothing fits the rows and the checkpoints.
    """
    for name, value in (("shards", shards), ("slices", slices)):
        if value is not None and value < 1:
            raise UserError(f"{name} are at least 1, not {value} (--{name})")
    if rows < 1 or not 0 <= requests <= rows or checkpoints < 1 or batch < 1:
        raise UserError(f"rows, checkpoints and batch are at least 1 and requests at most the rows; not {rows}, "
                        f"{checkpoints}, {batch} and {requests} (--checkpoints, --batch, --requests)")  # fmt: skip
    if shards is not None:
        allowed = [shards]
    elif accuracy:
        best = accuracy[min(accuracy)]
        allowed = [s for s in sorted(accuracy) if best - accuracy[s] <= max_drop + 1e-12]
    else:
        allowed = list(SHARDS)
    each_slices = [r for r in SLICES if r == 1 or r <= 4 * epochs - 2] if slices is None else [slices]
    found = []
    for s, r in product(allowed, each_slices):
        if s * r <= min(rows, checkpoints):
            cost = expected_cost(equal_counts(rows, s, r), epochs_per_slice(epochs, r), requests, batch)
            found.append((cost, s, r))
    if not found:
        raise UserError(
            f"{rows} rows and {checkpoints} checkpoints are too few for {', '.join(map(str, allowed))} shards"
            f"{'' if slices is None else f' of {slices} slices'}; give fewer (--shards, --slices) or more --checkpoints"
        )
    limit = (1 + NEAR) * min(found)[0]
    cost, s, r = min((f for f in found if f[0] <= limit), key=lambda f: (f[1] * f[2], f[1]))
    each = rows // s
    notes = [f"each constituent learns from {each} rows instead of {rows}"]
    if accuracy and s in accuracy:
        least = min(accuracy)
        notes.append(f"measured accuracy {accuracy[s]:.3f} with {s} shards, {accuracy[least]:.3f} with {least}")
    elif accuracy:
        notes.append(f"accuracy with {s} shards was not measured; those measured are {', '.join(map(str, accuracy))}")
    else:
        notes.append(
            f"no accuracy was measured: up to {MOST_SHARDS} shards are considered, beyond which the paper lost more "
            "than five points on simple tasks; on ImageNet 20 shards lost 19; measure 1, 5, 10 and 20 on your data"
        )
    if min(batch, requests) >= 3 * s:
        notes.append(f"a batch of {min(batch, requests)} reaches nearly every one of {s} shards: it costs about a "
                     f"retraining; smaller batches than {3 * s} gain more")  # fmt: skip
    return Advice(s, r, cost, retraining_cost(rows, epochs, requests, batch), each, s * r, tuple(notes))


def cost_curves(
    rows: int, shards: Sequence[int], slices: int, epochs: int, requests: Sequence[int]
) -> list[dict[str, Any]]:  # fmt: skip
    """For a plot: per number of shards, the cost of one batch of K requests as a share of one retraining after it."""
    schedule = epochs_per_slice(epochs, slices)
    curves = []
    for s in shards:
        counts = equal_counts(rows, s, slices)
        share = [expected_cost(counts, schedule, k, k) / max(1, epochs * (rows - k)) for k in requests]
        curves.append({"shards": s, "requests": list(requests), "share": share})
    return curves
