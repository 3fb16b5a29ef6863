"""The cost planner: closed forms, exact expectations and what a stream of requests really costs."""

from itertools import permutations, product

import numpy as np
import pytest

from vislearn import sisa_plan as plan
from vislearn.errors import UserError

COUNTS, EPOCHS = [[2, 1], [1, 2]], (2, 3)
SHARD, SLICE = [0, 0, 0, 1, 1, 1], [0, 0, 1, 0, 1, 1]


@pytest.mark.parametrize(("requests", "batch"), [(0, 1), (1, 1), (3, 1), (4, 2), (5, 2), (6, 6), (6, 1)])
def test_expected_cost_is_the_mean_over_every_stream(requests, batch):
    costs = []
    for order in permutations(range(6), requests):
        batches = [list(order[i : i + batch]) for i in range(0, requests, batch)]
        costs.append(sum(plan.simulate(SHARD, SLICE, EPOCHS, batches)))
    assert plan.expected_cost(COUNTS, EPOCHS, requests, batch) == pytest.approx(np.mean(costs), rel=1e-12)


def test_a_stream_costs_what_is_left_of_the_prefixes():
    # row 2 is in the second slice of shard 0: 3 epochs on rows 0, 1; then row 0: 2 on row 1 and 3 on row 1
    assert plan.simulate(SHARD, SLICE, EPOCHS, [[2], [0], [0]]) == [6, 5, 0]
    assert plan.simulate(SHARD, SLICE, EPOCHS, [[2, 0, 3]]) == [5 + 2 * 0 + 3 * 2]


def test_sequential_sharding_is_exact_for_uniform_shards():
    n, s, k = 10, 3, 4
    costs = []
    for shards in product(range(s), repeat=k):
        left, cost = [n] * s, 0
        for shard in shards:
            left[shard] -= 1
            cost += left[shard]
        costs.append(cost)
    assert plan.sharding_sequential(n * s, s, k) == pytest.approx(np.mean(costs), rel=1e-12)


def test_batches_of_different_rows():
    counts = plan.equal_counts(40, 4, 1)
    exact = plan.sharding_batch_exact(40, 4, 6)
    assert plan.expected_cost(counts, (1,), 6, 6) == pytest.approx(exact, rel=1e-12)
    assert exact > plan.sharding_batch(40, 4, 6)
    assert plan.sharding_batch_exact(10, 1, 10) == 0


def test_slicing():
    # R = 3, two epochs each on 4, 8 and 12 rows: 48, 40 and 24 by the slice of the row
    assert plan.slicing_single(4, 12, 3) == pytest.approx((48 + 40 + 24) / 3)
    assert plan.slicing_batch(4, 12, 3, 1) == pytest.approx(plan.slicing_single(4, 12, 3))
    assert plan.slicing_batch(4, 12, 3, 10**6) == pytest.approx(48)


def test_epochs_of_slices():
    assert plan.epochs_per_slice(20, 5) == (6, 7, 7, 6, 7)
    assert plan.epochs_per_slice(7, 1) == (7,)
    for epochs in (1, 2, 5, 12):
        most = 4 * epochs - 2
        assert plan.epochs_per_slice(epochs, most)[-1] == 1
        with pytest.raises(UserError, match=f"--slices={most} at most"):
            plan.epochs_per_slice(epochs, most + 1)
    assert plan.epochs_per_slice(12, 50, check=False)[-1] == 0
    with pytest.raises(UserError, match="--epochs=13"):
        plan.epochs_per_slice(12, 50)
    assert plan.epochs_per_slice(13, 50)[-1] == 1
    with pytest.raises(UserError, match="at least 1"):
        plan.epochs_per_slice(0, 3)


def test_distribution_aware_by_hand():
    assert plan.distribution_aware([0.05, 0.02, 0.02, 0.2], 0.05).tolist() == [1, 0, 0, 2]
    assert plan.distribution_aware([0.0] * 5, 0.1).tolist() == [0] * 5
    assert plan.distribution_aware([0.5, 1.0, 1.0], 0.5).tolist() == [0, 1, 2]


@pytest.mark.parametrize("cap", [0.01, 0.3, 1.0])
def test_distribution_aware_against_one_row_at_a_time(cap):
    p = np.random.default_rng(0).beta(0.3, 5, size=400)
    p[:20] = 0
    expected, number, total, count = np.empty(400, dtype=int), 0, 0.0, 0
    for row in np.argsort(p, kind="stable"):
        if count and total + p[row] >= cap:
            number, total, count = number + 1, 0.0, 0
        expected[row], total, count = number, total + p[row], count + 1
    assert plan.distribution_aware(p, cap).tolist() == expected.tolist()


def test_round_of_independent_requests():
    p, shard, slice_ = np.array([0.1, 0.5, 0.2, 0.9, 0.0]), [0, 0, 0, 1, 1], [0, 0, 1, 0, 1]
    mean = hit = 0.0
    for asked in product([False, True], repeat=5):
        rows = np.flatnonzero(asked)
        chance = np.prod(np.where(asked, p, 1 - p))
        mean += chance * plan.simulate(shard, slice_, EPOCHS, [rows])[0]
        hit += chance * bool(set(rows) & {0, 1, 2})
    assert plan.expected_round(p, shard, slice_, EPOCHS) == pytest.approx(mean)
    assert plan.hit_probability(p, shard) == pytest.approx([hit, 0.9])


def test_advice():
    alone = plan.recommend(60_000, 100)
    assert alone.shards == plan.MOST_SHARDS
    assert alone.slices > 1
    assert alone.speedup > 20
    counts = plan.equal_counts(60_000, alone.shards, alone.slices)
    assert alone.cost == plan.expected_cost(counts, plan.epochs_per_slice(20, alone.slices), 100)
    assert alone.retraining == 20 * sum(60_000 - k for k in range(1, 101))
    assert "no accuracy was measured" in alone.notes[1]
    measured = plan.recommend(60_000, 100, accuracy={1: 0.95, 5: 0.94, 20: 0.90})
    assert measured.shards == 5
    together = plan.recommend(600, 300, batch=300)
    assert together.shards == 1
    assert "about a retraining" in together.notes[-1]
    assert plan.recommend(60_000, 100, checkpoints=4).checkpoints <= 4
    with pytest.raises(UserError, match="at least 1"):
        plan.recommend(10, 11)


def test_equal_counts_and_curves():
    counts = plan.equal_counts(23, 4, 3)
    assert counts.sum() == 23
    assert counts.max() - counts.min() <= 1
    with pytest.raises(UserError, match="do not fill"):
        plan.equal_counts(11, 4, 3)
    few, many = plan.cost_curves(100, [1, 10], 2, 4, [1, 10, 50])
    assert few["share"][0] > many["share"][0]
    assert np.all(np.diff(many["share"]) > 0)


def test_refusals():
    with pytest.raises(UserError, match="requests lie between"):
        plan.expected_cost(COUNTS, EPOCHS, 7)
    for p, cap in (([0.1], 0.0), ([0.1], 1.5), ([1.1], 0.5), ([float("nan")], 0.5), ([], 0.5)):
        with pytest.raises(UserError):
            plan.distribution_aware(p, cap)


@pytest.mark.parametrize("rows", [7, 60, 1000])
@pytest.mark.parametrize(("shards", "slices"), [(1, 1), (3, 2), (7, 1)])
def test_equal_counts_are_those_of_rows_in_turn(rows, shards, slices):
    shard = np.arange(rows) * shards // rows
    sizes = np.bincount(shard, minlength=shards)
    expected = [np.bincount(np.arange(n) * slices // n, minlength=slices) for n in sizes]
    counts = plan.equal_counts(rows, shards, slices)
    assert np.array_equal(counts, expected)
    own_shard, own_slice = plan.positions(counts)
    found = np.zeros_like(counts)
    np.add.at(found, (own_shard, own_slice), 1)
    assert np.array_equal(found, counts)


def test_large_batches_are_multiplied_in_parts(monkeypatch):
    counts, epochs = plan.equal_counts(5000, 3, 2), (2, 3)
    whole = plan.expected_cost(counts, epochs, 700, 300)
    monkeypatch.setattr(plan, "CHUNK", 7)
    assert plan.expected_cost(counts, epochs, 700, 300) == pytest.approx(whole, rel=1e-12)
    served, by_hand = 0, 0.0
    for size in (300, 300, 100):
        served += size
        alone = plan.expected_cost(counts, epochs, size, size) / (1 - size / 5000)
        by_hand += (1 - served / 5000) * alone
    assert whole == pytest.approx(by_hand, rel=1e-12)


def test_given_shards_and_slices_are_kept():
    asked = plan.recommend(60_000, 100, shards=7, slices=4)
    assert (asked.shards, asked.slices, asked.checkpoints) == (7, 4, 28)
    assert plan.recommend(60_000, 100, slices=2).slices == 2
    limited = plan.recommend(60_000, 100, accuracy={1: 0.95, 5: 0.94}, shards=7)
    assert "with 7 shards was not measured; those measured are 1, 5" in limited.notes[1]
    edge = plan.recommend(60_000, 100, accuracy={1: 0.95, 5: 0.93, 10: 0.9299})
    assert edge.shards == 5, "a loss of just what may be lost is allowed"
    for options, match in (({"shards": 0}, "--shards"), ({"slices": 0}, "--slices"), ({"slices": 99}, "--slices=78"),
                           ({"shards": 2000}, "more --checkpoints")):  # fmt: skip
        with pytest.raises(UserError, match=match):
            plan.recommend(60_000, 100, **options)
