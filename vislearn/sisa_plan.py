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
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vislearn.errors import UserError

Ints = NDArray[np.int64]
MOST_SHARDS = 20  # beyond it the paper lost more than five points of accuracy even on simple tasks
SHARDS, SLICES = (1, 2, 3, 5, 10, MOST_SHARDS), (1, 2, 3, 5, 10, 20, 50)
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
    shard = np.arange(rows) * shards // rows
    sizes = np.bincount(shard, minlength=shards)
    return np.stack([np.bincount(np.arange(n) * slices // n, minlength=slices) for n in sizes])


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
    total, served = 0.0, 0
    hit: dict[int, float] = {}  # of a batch size: what a batch costs, but for the rows that are left
    while served < requests:
        size = min(batch, requests - served)
        if size not in hit:
            hit[size] = float(np.sum(weight * (1 - _untouched(prefix, n, size))))
        served += size
        total += (n - served) / n * hit[size]
    return total


def _untouched(prefix: Ints, rows: int, batch: int) -> NDArray[np.float64]:
    """C(N - p, B) / C(N - 1, B): given a row that stays, none of the other p - 1 rows is among the B."""
    missed = np.ones(prefix.shape)
    for i in range(min(batch, rows - 1)):
        missed *= np.maximum(rows - prefix - i, 0) / (rows - 1 - i)
    return missed


def simulate(shard: ArrayLike, slice_: ArrayLike, epochs: Sequence[int], batches: Iterable[ArrayLike]) -> list[int]:
    """Rows x epochs that each batch of requests runs again, by serving them one after another.

    Args:
        shard: (n,) shard of each row.
        slice_: (n,) slice of each row, from 0.
        epochs: (R,) epochs of each step.
        batches: row numbers of each batch; a row that is gone already costs nothing.
    """
    shard, slice_ = np.asarray(shard), np.asarray(slice_)
    left = np.zeros((int(shard.max()) + 1, len(epochs)), dtype=np.int64)
    np.add.at(left, (shard, slice_), 1)
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
    """
    if rows < 1 or not 0 <= requests <= rows or checkpoints < 1 or batch < 1:
        raise UserError(f"rows, checkpoints and batch are at least 1 and requests at most the rows; not {rows}, "
                        f"{checkpoints}, {batch} and {requests}")  # fmt: skip
    if accuracy:
        best = accuracy[min(accuracy)]
        allowed = [s for s in sorted(accuracy) if best - accuracy[s] <= max_drop]
    else:
        allowed = list(SHARDS)
    found = []
    for s in allowed:
        for r in SLICES:
            if s * r <= min(rows, checkpoints) and (r == 1 or r <= 4 * epochs - 2):
                cost = expected_cost(equal_counts(rows, s, r), epochs_per_slice(epochs, r), requests, batch)
                found.append((cost, s, r))
    if not found:
        raise UserError(f"no number of shards in {allowed} fits {rows} rows and {checkpoints} checkpoints")
    limit = (1 + NEAR) * min(found)[0]
    cost, s, r = min((f for f in found if f[0] <= limit), key=lambda f: (f[1] * f[2], f[1]))
    each = rows // s
    notes = [f"each constituent learns from {each} rows instead of {rows}"]
    if accuracy:
        notes.append(f"measured accuracy {accuracy[s]:.3f} with {s} shards, {best:.3f} with {min(accuracy)}")
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
    """For a plot: per number of shards, the cost of one batch of K requests as a share of a retraining."""
    schedule = epochs_per_slice(epochs, slices)
    curves = []
    for s in shards:
        counts = equal_counts(rows, s, slices)
        share = [expected_cost(counts, schedule, k, k) / max(1, epochs * (rows - k)) for k in requests]
        curves.append({"shards": s, "requests": list(requests), "share": share})
    return curves
