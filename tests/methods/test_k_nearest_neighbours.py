"""Nearest neighbours: ties, tombstones, classes that go."""

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor
from vislearn.methods.k_nearest_neighbours import ExactKNeighborsClassifier, ExactKNeighborsRegressor

from vislearn.classical import RowError
from vislearn.methods import k_nearest_neighbours


def grid(n: int = 60, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers, so that many rows are equally far, and many are alike."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 4, (n, 2)).astype(float), rng.integers(0, 3, n)


def by_hand(x: np.ndarray, left: np.ndarray, query: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Distances and numbers of the nearest rows, by distance and then by number."""
    far = np.sqrt(((query[:, None] - x[left][None]) ** 2).sum(axis=2))
    order = np.argsort(far, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(far, order, axis=1), left[order]


@pytest.mark.parametrize("algorithm", ["kd_tree", "ball_tree"])
@pytest.mark.parametrize("tombstones", [0, 3, 1000])
@pytest.mark.parametrize("leaf_size", [1, 40])
def test_equally_near_rows_come_by_number(algorithm: str, tombstones: int, leaf_size: int) -> None:
    x, y = grid()
    query = np.concatenate([x[:20], x[:5] + 0.5])
    model = ExactKNeighborsClassifier(4, algorithm=algorithm, tombstones=tombstones, leaf_size=leaf_size).fit(x, y)
    for batch in np.split(np.random.default_rng(1).permutation(60)[:48], 8):
        model.unlearn(batch)
        for mine, theirs in zip(model.kneighbors(query), by_hand(x, model.row_numbers_, query, 4), strict=True):
            assert np.array_equal(mine, theirs)
        left = model.row_numbers_
        refit = clone(model).fit(x[left], y[left])
        assert np.array_equal(model.predict_proba(query), refit.predict_proba(query))


def test_only_ties_are_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.zeros((500, 2))
    x[:250] = np.random.default_rng(0).normal(size=(250, 2))
    model = ExactKNeighborsClassifier(3).fit(x, np.arange(500) % 2)
    monkeypatch.setattr(k_nearest_neighbours, "ANSWERS", 700)  # and in small parts
    far, rows = model.kneighbors(np.array([[0.0, 0.0], [9.0, 9.0]]))
    assert rows[0].tolist() == [250, 251, 252]
    assert far[0].tolist() == [0, 0, 0]
    assert np.array_equal(rows[1:], by_hand(x, np.arange(500), np.array([[9.0, 9.0]]), 3)[1])


def test_the_tree_is_made_again_when_it_is_full_of_deleted_rows() -> None:
    x, y = grid()
    model = ExactKNeighborsClassifier(tombstones=2).fit(x, y)
    tree = model._tree
    assert model.unlearn([0]).unlearn([1])._tree is tree
    assert model.unlearn([2])._tree is not tree
    assert len(model._leaves) == 57


@pytest.mark.parametrize("shares", ["uniform", "distance"])
def test_regression_equals_scikit_learns(shares: str) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(80, 3)), rng.normal(size=(80, 2))
    model = ExactKNeighborsRegressor(4, weights=shares).fit(x, y).unlearn(np.arange(0, 50))
    theirs = KNeighborsRegressor(4, weights=shares, algorithm="kd_tree").fit(x[50:], y[50:])
    query = np.concatenate([x[50:60], rng.normal(size=(20, 3))])  # rows that are met exactly, too
    np.testing.assert_allclose(model.predict(query), theirs.predict(query), rtol=1e-12)
    flat = ExactKNeighborsRegressor(4).fit(x, y[:, 0]).unlearn([1])
    assert flat.predict(x).shape == (80,)


def test_other_metrics() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 3)), rng.integers(0, 2, 40)
    model = ExactKNeighborsClassifier(3, metric="manhattan").fit(x, y).unlearn([3, 4])
    theirs = KNeighborsClassifier(3, metric="manhattan").fit(np.delete(x, [3, 4], axis=0), np.delete(y, [3, 4]))
    assert np.array_equal(model.predict(x), theirs.predict(x))


def test_a_class_without_rows_goes() -> None:
    x, y = grid()
    names = np.array(["a", "b", "c"])[y]
    model = ExactKNeighborsClassifier(3).fit(x, names).unlearn(np.flatnonzero(y == 1))
    assert model.classes_.tolist() == ["a", "c"]
    refit = ExactKNeighborsClassifier(3).fit(x[y != 1], names[y != 1])
    assert np.array_equal(model.predict_proba(x), refit.predict_proba(x))


def test_too_few_rows_for_k() -> None:
    x, y = grid(6)
    model = ExactKNeighborsClassifier(5).fit(x, y).unlearn([0, 1])
    with pytest.raises(RowError, match="n_neighbors=5 is more than the 4 rows"):
        model.predict(x)
    assert model.set_params(n_neighbors=4).predict(x).shape == (6,)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [({"n_neighbors": 0}, "n_neighbors"), ({"tombstones": -1}, "tombstones"), ({"weights": "none"}, "weights"),
     ({"algorithm": "brute"}, "algorithm"), ({"metric": "cosine"}, "metric"), ({"leaf_size": 1.5}, "leaf_size")],
)  # fmt: skip
def test_arguments_are_checked(arguments: dict, said: str) -> None:
    with pytest.raises(RowError, match=said):
        ExactKNeighborsClassifier(**arguments).fit(*grid())
