"""Quantised and divide-and-conquer k-means: rounding, replay, soundness, seeds that stay."""

import copy

import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score
from vislearn.methods.quantised_k_means import (
    DCKMeans,
    Grid,
    Pass,
    QKMeans,
    advance,
    draws,
    look,
    means,
    race,
    replay,
    round_to,
)

from vislearn.classical import RowError
from vislearn.methods import quantised_k_means


def blobs(n: int = 90, d: int = 2, seed: int = 0, spread: float = 0.15) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 3
    return rng.normal(size=(3, d))[y] + spread * rng.normal(size=(n, d)), y


def retrained(model: QKMeans, x: np.ndarray) -> quantised_k_means.Trajectory:
    """Training on the rows that are left, with the same draws."""
    left = model.row_numbers_
    rows = x[left]
    return advance(rows, rows[race(rows, left, model.n_clusters, model._seed)], model._grid)


def test_rounding_by_hand() -> None:
    grid = Grid(0.5, 0.0, np.array([[0.5, 0.75]]))
    # phase 1/2 leaves the grid at the multiples of eps; 3/4 moves it by a quarter of a cell
    q, inside = round_to(grid, 0, np.array([[0.7, 0.7], [1.0, -0.3]]))
    np.testing.assert_allclose(q, [[0.5, 0.875], [1.0, -0.125]])
    np.testing.assert_allclose(inside, [[0.1, 0.15], [0.5, 0.15]], atol=1e-12)
    assert round_to(Grid(0.0, 0.0, np.zeros((1, 2))), 0, q)[0] is q


def test_small_clusters_are_drawn_to_their_centre() -> None:
    centres = np.array([[0.0], [10.0], [20.0]])
    found = Pass(np.array([4, 1, 0]), np.array([[8.0], [3.0], [0.0]]), 0.0)
    assert means(centres, found, 0.0, 5).ravel().tolist() == [2, 13, 20]
    # gamma n / k = 2 rows: half of the way for the cluster of one
    assert means(centres, found, 1.2, 5).ravel().tolist() == [2, 11.5, 20]


def test_a_look_at_the_rows() -> None:
    x = np.array([[0.0], [1.0], [2.0], [10.0]])
    labels, found = look(x, np.array([[0.0], [2.0]]))
    assert labels.tolist() == [0, 0, 1, 1]  # the first of equally near centres
    assert found.sizes.tolist() == [2, 2]
    assert found.sums.ravel().tolist() == [1, 8]
    assert found.loss == 65


def test_draws_depend_on_seed_row_and_step_alone() -> None:
    numbers = np.arange(20_000)
    u = draws(3, numbers, 0)
    assert np.array_equal(draws(3, numbers[5:9], 0), u[5:9])
    assert abs(u.mean() - 0.5) < 0.01
    assert abs(u.var() - 1 / 12) < 0.005
    for other in (draws(4, numbers, 0), draws(3, numbers, 1), draws(3, numbers + 1, 0)):
        assert abs(np.corrcoef(u, other)[0, 1]) < 0.03
    assert 0 < u.min() < u.max() < 1


def test_the_race_draws_seeds_as_k_means_does() -> None:
    x, numbers = np.array([[0.0], [1.0], [3.0]]), np.arange(3)
    pairs = [tuple(race(x, numbers, 2, seed)) for seed in range(2000)]
    for (a, b), chance in {(0, 1): 1 / 10, (0, 2): 9 / 10, (1, 0): 1 / 5, (2, 1): 4 / 13}.items():
        share = np.mean([p == (a, b) for p in pairs])
        assert share == pytest.approx(chance / 3, abs=0.033)  # more than three deviations
    assert all(a != b for a, b in pairs)


def test_seeds_stay_when_another_row_goes() -> None:
    x, _ = blobs()
    numbers = np.arange(90)
    seeds = race(x, numbers, 3, 5)
    left = np.delete(numbers, [r for r in range(90) if r % 4 == 0 and r not in seeds])
    assert np.array_equal(left[race(x[left], left, 3, 5)], numbers[seeds])
    without = np.delete(numbers, seeds[1])
    again = without[race(x[without], without, 3, 5)]
    assert again[0] == seeds[0]  # drawn before the one that went
    assert seeds[1] not in again


@pytest.mark.parametrize("seed", range(15))
def test_every_deletion_gives_what_training_without_the_row_gives(seed: int) -> None:
    x, _ = blobs(60, 2, seed, spread=0.4)
    model = QKMeans(3, eps=[0.05, 0.3, 1.0][seed % 3], gamma=0.3, random_state=seed, max_iter=6).fit(x)
    outcomes = set()
    for row in range(60):
        one = copy.deepcopy(model).unlearn([row])
        path = retrained(one, x)
        assert np.array_equal(one.cluster_centers_, path.centres[path.model]), f"{row}: {one.outcome_}"
        assert one.n_iter_ == len(path.centres) - 1
        assert (one.outcome_ == "reseeded") == (row in model._begun)
        if one.outcome_ == "unchanged":
            assert np.array_equal(one.cluster_centers_, model.cluster_centers_)
        outcomes.add(one.outcome_)
    assert "reseeded" in outcomes
    assert "unchanged" in outcomes or seed % 3 == 0


@pytest.mark.parametrize("eps", [0.02, 0.5])
def test_streams_of_deletions(eps: float) -> None:
    x, _ = blobs(120, 3, 4, spread=0.3)
    model = QKMeans(3, eps=eps, random_state=1).fit(x)
    for batch in np.split(np.random.default_rng(0).permutation(120)[:100], [1, 2, 3, 10, 11, 30, 31, 60, 90]):
        model.unlearn(batch)
        path = retrained(model, x)
        assert np.array_equal(model.cluster_centers_, path.centres[path.model])
        for mine, theirs in zip(model._path.passes, path.passes, strict=True):
            assert np.array_equal(mine.sizes, theirs.sizes)
            np.testing.assert_allclose(mine.sums, theirs.sums, rtol=0, atol=1e-11)
            assert mine.loss == pytest.approx(theirs.loss, rel=1e-11)
    assert len(model.labels_) == 20
    assert model.inertia_ == pytest.approx(model._path.passes[model._path.model].loss)


def test_an_unchanged_deletion_looks_at_no_row_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = blobs(300, spread=0.05)
    model = QKMeans(3, eps=1.0, random_state=0).fit(x)
    seen: list[int] = []
    real = quantised_k_means.look
    monkeypatch.setattr(quantised_k_means, "look", lambda x, c: seen.append(len(x)) or real(x, c))
    unchanged = 0
    for row in [row for row in range(300) if row not in model._begun][:20]:
        seen.clear()
        if model.unlearn([row]).outcome_ == "unchanged":
            assert set(seen) == {1}
            unchanged += 1
    assert unchanged > 10


def test_values_near_the_edge_of_a_cell_are_done_again() -> None:
    # means 0.5 and 9 with eps 1 and phase 1/2: the first is exactly between 0 and 1
    x = np.array([[0.0], [1.0], [0.5], [9.0], [9.0]])
    grid = Grid(1.0, 0.0, np.full((3, 1), 0.5))
    path = advance(x, np.array([[0.4], [9.0]]), grid)
    assert replay(path, x[2:3], 4, grid)[1] == 0
    assert replay(path, x[4:], 4, Grid(0.7, 0.0, grid.phases))[1] is not None  # another grid moves the centres


def test_clusters_are_found() -> None:
    x, y = blobs(600, spread=0.05)
    for model in (QKMeans(3, random_state=0), DCKMeans(3, random_state=0)):
        assert adjusted_rand_score(model.fit_predict(x), y) > 0.95
        assert np.array_equal(model.predict(x), model.labels_)
        assert adjusted_rand_score(model.unlearn(np.arange(0, 600, 2)).labels_, y[1::2]) > 0.95


def test_rows_to_start_from_can_be_named() -> None:
    x, _ = blobs()
    model = QKMeans(3, init=[4, 0, 8]).fit(x)
    assert np.array_equal(model._path.centres[0], x[[4, 0, 8]])
    model.unlearn([1, 5])
    with pytest.raises(RowError, match="row 8"):
        model.unlearn([8])
    assert 8 in model.row_numbers_
    for init, said in (([1, 2], "3 rows"), ("random", "k-means"), ([0, 1, 90], "row 90"), ([0.0, 1, 2], "3 rows")):
        with pytest.raises(RowError, match=said):
            QKMeans(3, init=init).fit(x)


@pytest.mark.parametrize("cls", [QKMeans, DCKMeans])
def test_too_few_rows(cls: type) -> None:
    x, _ = blobs(9)
    model = cls(3, random_state=0).fit(x)
    with pytest.raises(RowError, match="2 rows would remain"):
        model.unlearn(np.arange(7))
    with pytest.raises(RowError, match="n_samples=2"):
        cls(3).fit(x[:2])
    alike = np.repeat(x[:2], 20, axis=0)
    with pytest.raises(RowError, match="distinct"):
        cls(3, random_state=0).fit(alike)
    few = np.concatenate([alike, x[2:3]])
    model = cls(3, random_state=0).fit(few)
    before = model.cluster_centers_.copy()
    with pytest.raises(RowError, match="distinct"):
        model.unlearn([40])
    assert np.array_equal(model.cluster_centers_, before)
    assert len(model.row_numbers_) == 41


@pytest.mark.parametrize("leaves", [1, 4, 40])
def test_a_tree_equals_one_without_the_rows(leaves: int) -> None:
    x, _ = blobs(120, spread=0.3)
    model = DCKMeans(3, leaves=leaves, random_state=2).fit(x)
    for batch in ([5], [119, 0, 44], list(range(60, 100))):
        model.unlearn(batch)
    left = model.row_numbers_
    leaf = model._leaf(left)
    made = [model._cluster(x[left[leaf == each]], left[leaf == each], model._seed)[0] for each in range(leaves)]
    assert all(np.array_equal(a, b) for a, b in zip(made, model._made, strict=True))
    assert np.array_equal(model._root(made)[0], model.cluster_centers_)


def test_only_the_bucket_of_a_row_is_clustered_again(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = blobs(200)
    model = DCKMeans(3, leaves=10, random_state=0).fit(x)
    sizes: list[int] = []
    real = DCKMeans._cluster
    monkeypatch.setattr(DCKMeans, "_cluster", lambda self, x, *rest: sizes.append(len(x)) or real(self, x, *rest))
    model.unlearn([7])
    assert len(sizes) <= 2
    assert max(sizes) < 50


@pytest.mark.parametrize(
    ("cls", "arguments", "said"),
    [(QKMeans, {"eps": 0}, "eps"), (QKMeans, {"gamma": -1}, "gamma"), (QKMeans, {"n_clusters": 0}, "n_clusters"),
     (QKMeans, {"max_iter": 0}, "max_iter"), (DCKMeans, {"leaves": 0}, "leaves"), (DCKMeans, {"max_iter": 1.5}, "max")],
)  # fmt: skip
def test_arguments_are_checked(cls: type, arguments: dict, said: str) -> None:
    with pytest.raises(RowError, match=said):
        cls(**arguments).fit(blobs()[0])


def test_the_callers_rows_are_untouched() -> None:
    x, _ = blobs()
    given = x.copy()
    for model in (QKMeans(3, eps=5.0, random_state=0), DCKMeans(3, random_state=0)):
        model.fit(x).unlearn([1, 2, 3])
        assert np.array_equal(x, given)
