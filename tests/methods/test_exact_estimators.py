"""What all exact estimators keep: scikit-learn's conventions, row numbers that stay, and equality with a refit."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from scipy import sparse
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import Ridge
from sklearn.naive_bayes import BernoulliNB, GaussianNB, MultinomialNB
from sklearn.neighbors import KNeighborsClassifier
from sklearn.utils.estimator_checks import parametrize_with_checks
from vislearn.methods.k_nearest_neighbours import ExactKNeighborsClassifier, ExactKNeighborsRegressor
from vislearn.methods.linear_regression import ExactRidge
from vislearn.methods.naive_bayes import ExactBernoulliNB, ExactGaussianNB, ExactMultinomialNB
from vislearn.methods.quantised_k_means import DCKMeans, QKMeans

from vislearn.classical import RowError, Rows, precise_mean, run, two_sum
from vislearn.errors import UserError

ALL = [
    ExactRidge(), ExactGaussianNB(), ExactMultinomialNB(), ExactBernoulliNB(), ExactKNeighborsClassifier(),
    ExactKNeighborsRegressor(), QKMeans(random_state=0), DCKMeans(random_state=0),
]  # fmt: skip


@parametrize_with_checks(ALL)
def test_scikit_learns_own_checks(estimator: Any, check: Callable[[Any], None]) -> None:
    check(estimator)


def problem(seed: int, counts: bool = False) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
    """Rows with some duplicates, classes, targets, and weights or none."""
    rng = np.random.default_rng(seed)
    n, d = int(rng.integers(12, 60)), int(rng.integers(1, 7))
    x = rng.poisson(3.0, (n, d)).astype(float) if counts else rng.normal(size=(n, d)) * rng.choice([0.01, 1, 100], d)
    x[n // 2] = x[0]
    if not counts:
        x += rng.choice([0.0, 0.0, 1e6])
    y = rng.integers(0, int(rng.integers(2, 5)), n)
    weights = rng.uniform(0.1, 3, n) if seed % 3 == 0 else None
    return x, y, x @ rng.normal(size=d) + rng.normal(size=n), weights


def batches(seed: int, n: int, left: int) -> Iterator[np.ndarray]:
    """Row numbers to forget, in random order and in batches of random sizes, until `left` remain; the last row goes."""
    rng = np.random.default_rng(seed + 10_000)
    order = rng.permutation(n)
    order = np.concatenate([[n - 1], order[order != n - 1]])[: n - left]
    return iter(np.split(order, np.sort(rng.integers(0, len(order), 2))))


def kept(x: Any, *others: Any, model: Any) -> list[Any]:
    """The rows that a model has left."""
    return [None if a is None else a[model.row_numbers_] for a in (x, *others)]


def close(mine: Any, theirs: Any, what: str) -> None:
    """Equal to 1e-10 of the largest value."""
    mine, theirs = np.asarray(mine), np.asarray(theirs)
    assert mine.shape == theirs.shape, what
    np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-10 * np.abs(theirs).max(), err_msg=what)


def unlearned(estimator: Any, seed: int, *data: Any, left: int = 3) -> Any:
    model = clone(estimator).fit(*data)
    for batch in batches(seed, data[0].shape[0], left):
        if len(batch):
            model.unlearn(batch)
    return model


@pytest.mark.parametrize("block", range(4))
def test_ridge_equals_refitting_on_200_data_sets(block: int) -> None:
    for seed in range(50 * block, 50 * block + 50):
        x, _, y, w = problem(seed)
        rng = np.random.default_rng(seed)
        d = x.shape[1]
        estimator = ExactRidge(float(rng.choice([0.01, 1.0, 50.0])), fit_intercept=bool(rng.integers(4)))
        model = unlearned(estimator, seed, x, y, w, left=d + int(rng.integers(2, 8)))
        refit = clone(estimator).fit(*kept(x, y, w, model=model))
        spread = (x - x.mean(axis=0)).std(axis=0)
        close(model.coef_ * spread, refit.coef_ * spread, f"coefficients of {seed}")
        close(model.predict(x), refit.predict(x), f"predictions of {seed}")
        if estimator.fit_intercept:
            x_left, y_left, w_left = kept(x, y, w, model=model)
            theirs = Ridge(alpha=estimator.alpha, solver="cholesky").fit(x_left, y_left, w_left)
            np.testing.assert_allclose(model.coef_, theirs.coef_, rtol=1e-7, atol=1e-9 * np.abs(theirs.coef_).max())


@pytest.mark.parametrize("block", range(2))
@pytest.mark.parametrize("mine", [ExactGaussianNB(), ExactGaussianNB(var_smoothing=0.01)], ids=["plain", "smoothed"])
def test_gaussian_naive_bayes_equals_refitting_on_200_data_sets(mine: Any, block: int) -> None:
    for seed in range(50 * block, 50 * block + 50):
        x, y, _, w = problem(seed)
        model = unlearned(mine, seed, x, y, w)
        theirs = GaussianNB(var_smoothing=mine.var_smoothing).fit(*kept(x, y, w, model=model))
        assert np.array_equal(model.classes_, theirs.classes_)
        for name in ("theta_", "class_count_", "class_prior_", "epsilon_"):
            close(getattr(model, name), getattr(theirs, name), f"{name} of {seed}")
        refit = clone(mine).fit(*kept(x, y, w, model=model))
        np.testing.assert_allclose(model.var_, refit.var_, rtol=1e-10, err_msg=f"variances of {seed}")
        # scikit-learn rounds the mean, which is as far off as the data are far from zero
        offset = (np.finfo(float).eps * np.abs(x).max()) ** 2
        np.testing.assert_allclose(model.var_, theirs.var_, rtol=1e-10, atol=10 * offset, err_msg=f"of {seed}")


@pytest.mark.parametrize(
    ("mine", "theirs"),
    [
        (ExactMultinomialNB(alpha=0.5), MultinomialNB(alpha=0.5)),
        (ExactMultinomialNB(fit_prior=False), MultinomialNB(fit_prior=False)),
        (ExactBernoulliNB(binarize=2), BernoulliNB(binarize=2)),
    ],
)
@pytest.mark.parametrize("form", [np.asarray, sparse.csr_matrix])
@pytest.mark.parametrize("block", range(2))
def test_counts_equal_refitting_on_400_data_sets(mine: Any, theirs: Any, form: Any, block: int) -> None:
    for seed in range(35 * block, 35 * block + 35):
        x, y, _, w = problem(seed, counts=True)
        if seed % 2 and not isinstance(mine, ExactBernoulliNB):
            x = x * np.random.default_rng(seed).uniform(0, 1, x.shape)  # counts that are not whole
        model = unlearned(mine, seed, form(x), y, w)
        x_left, y_left, w_left = kept(x, y, w, model=model)
        refit = clone(theirs).fit(form(x_left), y_left, w_left)
        assert np.array_equal(model.classes_, refit.classes_)
        for name in ("feature_count_", "class_count_", "feature_log_prob_", "class_log_prior_"):
            np.testing.assert_allclose(getattr(model, name), getattr(refit, name), rtol=1e-10, atol=1e-12)
        assert np.array_equal(model.predict(form(x)), refit.predict(form(x)))


@pytest.mark.parametrize("block", range(2))
@pytest.mark.parametrize("shares", ["uniform", "distance"])
def test_neighbours_equal_refitting_on_200_data_sets(shares: str, block: int) -> None:
    for seed in range(50 * block, 50 * block + 50):
        x, y, _, _ = problem(seed)
        x = x + np.random.default_rng(seed).normal(size=x.shape)  # no two rows alike: scikit-learn's ties are arbitrary
        mine = ExactKNeighborsClassifier(3, weights=shares, tombstones=seed % 9)
        model = unlearned(mine, seed, x, y, left=6)
        theirs = KNeighborsClassifier(3, weights=shares, algorithm="kd_tree").fit(*kept(x, y, model=model))
        query = np.random.default_rng(seed).normal(size=x.shape) * x.std(axis=0) + x.mean(axis=0)
        np.testing.assert_allclose(model.predict_proba(query), theirs.predict_proba(query), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("estimator", ALL, ids=lambda e: type(e).__name__)
def test_order_and_batches_do_not_matter(estimator: Any) -> None:
    x, y, _, _ = problem(5, counts=True)
    x[3] = x[4] = x[5]  # duplicates: only the one that is named goes
    if hasattr(estimator, "n_clusters"):
        estimator = clone(estimator).set_params(n_clusters=3)
    rows = [4, len(x) - 1, 0, 7, 8, 2]
    at_once = clone(estimator).fit(x, y).unlearn(np.array(rows))
    one_by_one = clone(estimator).fit(x, y)
    for row in reversed(rows):
        one_by_one.unlearn([row])
    np.testing.assert_allclose(at_once.predict(x), one_by_one.predict(x), rtol=1e-10)
    assert at_once.row_numbers_.tolist() == one_by_one.row_numbers_.tolist() == sorted({*range(len(x))} - {*rows})


@pytest.mark.parametrize("estimator", ALL, ids=lambda e: type(e).__name__)
def test_refused_requests_leave_everything_as_it_was(estimator: Any) -> None:
    x, y, _, _ = problem(7, counts=True)
    given = x.copy()
    with pytest.raises(NotFittedError):
        clone(estimator).unlearn([0])
    model = clone(estimator)
    if hasattr(model, "n_clusters"):
        model.set_params(n_clusters=2)
    model.fit(x, y).unlearn([1, 3])
    before = pickle.dumps(model)
    n = len(x)
    for rows, said in (
        ([0, n], f"no row {n}"), ([-1], "no row -1"), ([5, 5], "row 5 is named 2 times"), ([3], "row 3 has been"),
        ([], "no row to forget"), ([0.0], "row numbers"), (np.zeros(n, bool), "np.flatnonzero"), ([[0]], "row numbers"),
        (model.row_numbers_, "all"),
    ):  # fmt: skip
        with pytest.raises(RowError, match=said):
            model.unlearn(rows)
    assert pickle.dumps(model) == before
    assert np.array_equal(x, given)
    twin = pickle.loads(before).unlearn([2])
    model.unlearn([2])
    assert np.array_equal(model.predict(x), twin.predict(x))


def test_numbers_stay_and_deleted_rows_are_overwritten() -> None:
    x = np.arange(20.0).reshape(10, 2) + 1
    rows = Rows(x, np.arange(10))
    assert not rows.drop(rows.find([9, 0, 4]))
    assert rows.columns[0][[0, 4, 9]].tolist() == [[0, 0]] * 3
    assert rows.kept()[1].tolist() == [1, 2, 3, 5, 6, 7, 8]
    assert rows.kept(rows.find([8, 1]))[1].tolist() == [2, 3, 5, 6, 7]
    assert rows.drop(rows.find([2, 7, 8]))
    assert len(rows.columns[0]) == 4
    assert rows.numbers.tolist() == [1, 3, 5, 6]
    assert rows.take(rows.find([6, 3]))[0].tolist() == x[[3, 6]].tolist()
    with pytest.raises(RowError, match="row 7 has been deleted"):
        rows.find([7])
    assert issubclass(RowError, UserError)
    assert issubclass(RowError, ValueError)
    assert x[0, 0] == 1


def test_deleted_sparse_rows_are_overwritten() -> None:
    x = sparse.random(30, 8, 0.4, format="csr", random_state=0)
    rows = Rows(x)
    rows.drop(rows.find([3, 11, 29]))
    dense = x.toarray()
    assert np.array_equal(rows.kept()[0].toarray(), np.delete(dense, [3, 11, 29], axis=0))
    assert not rows.columns[0][[3, 11, 29]].toarray().any()
    assert not rows.columns[0].indices[x.indptr[11] : x.indptr[12]].any()


def test_means_to_twice_the_precision() -> None:
    total, low = two_sum(np.array([1.0]), np.array([1e-20]))
    assert (total, low) == (1.0, 1e-20)
    x = np.array([[1e9 + 0.1], [1e9 + 0.2], [1e9 + 0.4]])
    high, low = precise_mean(x, np.array([1.0, 2.0, 1.0]))
    off = (x[:, 0] - high) - low
    assert abs(off @ [1, 2, 1]) < 1e-22  # the sum about the mean; one part of it alone leaves 1e-7


@pytest.mark.parametrize(
    ("estimator", "metric"), [(ExactRidge(), "mae"), (ExactGaussianNB(), "accuracy"), (QKMeans(3), "distance")]
)
def test_comparison_of_the_three_models(estimator: Any, metric: str) -> None:
    x, y, targets, _ = problem(8)
    y = targets if isinstance(estimator, ExactRidge) else y
    rows = np.array([0, 5, len(x) - 1])
    retain = np.delete(np.arange(len(x)), rows)
    sets = {"train": (x, y), "retain": (x[retain], y[retain]), "forget": (x[rows], y[rows])}
    estimator = clone(estimator)
    if hasattr(estimator, "random_state"):
        estimator.set_params(random_state=0, eps=1e4)
    before = copy.deepcopy(estimator.get_params())
    found = run(estimator, sets, rows, repeats=2)
    assert estimator.get_params() == before
    assert not hasattr(estimator, "n_features_in_")
    assert set(found["models"]) == {"original", "unlearned", "retrained"}
    assert set(found["models"]["original"]) == {f"{name}/{metric}" for name in sets}
    assert all(seconds > 0 for seconds in found["time"].values())
    if metric != "distance":
        assert found["models"]["unlearned"] == pytest.approx(found["models"]["retrained"])
        assert all(each["agreement"] == 1 for each in found["to_retrained"].values())
        assert found["models"]["original"] != pytest.approx(found["models"]["retrained"], rel=1e-12)
    if metric == "mae":
        assert set(found["parameters"]) == {"coef_", "intercept_"}
        assert found["parameters"]["coef_"] < 1e-9
        worst = np.abs(y - clone(estimator).fit(x, y).predict(x)).mean()
        assert found["models"]["original"]["train/mae"] == pytest.approx(worst)
