"""Naive Bayes from sums: epsilon, classes that go, priors, and the guard against lost digits."""

import numpy as np
import pytest
from sklearn.naive_bayes import GaussianNB, MultinomialNB
from vislearn.methods.naive_bayes import ExactBernoulliNB, ExactGaussianNB, ExactMultinomialNB, above, less, spread_of

from vislearn.classical import RowError
from vislearn.methods import naive_bayes


def data(n: int = 60, d: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 3
    return rng.normal(size=(n, d)) + y[:, None], y


def test_worked_numbers() -> None:
    x, y = np.array([[1.0], [3.0], [9.0], [2.0], [4.0]]), np.array([0, 0, 0, 1, 1])
    model = ExactGaussianNB(var_smoothing=0.1).fit(x, y).unlearn([2])
    # 1, 3, 2, 4 have variance 5/4; each class of two has 1
    assert model.epsilon_ == pytest.approx(0.125)
    assert model.var_.ravel() == pytest.approx([1.125, 1.125])
    assert model.theta_.ravel() == pytest.approx([2, 3])
    assert model.class_prior_ == pytest.approx([0.5, 0.5])


def test_one_row_changes_epsilon_of_every_class() -> None:
    x, y = data()
    x[0, 1] = 50.0
    model = ExactGaussianNB(var_smoothing=1e-3).fit(x, y)
    before = model.var_.copy()
    model.unlearn([0])
    theirs = GaussianNB(var_smoothing=1e-3).fit(x[1:], y[1:])
    np.testing.assert_allclose(model.var_, theirs.var_, rtol=1e-11)
    assert (np.abs(model.var_ - before)[y[1]] > 1e-3).all()  # the row was of another class


@pytest.mark.parametrize("estimator", [ExactGaussianNB(), ExactMultinomialNB(), ExactBernoulliNB()])
def test_a_class_without_rows_goes(estimator: ExactGaussianNB) -> None:
    x, y = data()
    x, names = np.abs(x), np.array(["ape", "bee", "cat"])[y]
    model = estimator.fit(x, names).unlearn(np.flatnonzero(y == 0))
    assert model.classes_.tolist() == ["bee", "cat"]
    assert model.predict_proba(x).shape == (60, 2)
    assert set(model.predict(x)) <= {"bee", "cat"}
    model.unlearn(np.flatnonzero(y == 2))  # and another, by the numbers that the rows always had
    assert model.classes_.tolist() == ["bee"]
    assert (model.predict(x) == "bee").all()


@pytest.mark.parametrize(("estimator", "name"), [(ExactGaussianNB(), "priors"), (ExactMultinomialNB(), "class_prior")])
def test_given_priors(estimator: ExactGaussianNB, name: str) -> None:
    x, y = data()
    x = np.abs(x)
    model = estimator.set_params(**{name: [0.2, 0.3, 0.5]}).fit(x, y).unlearn([0, 1])
    theirs = {"priors": GaussianNB, "class_prior": MultinomialNB}[name](**{name: [0.2, 0.3, 0.5]}).fit(x[2:], y[2:])
    np.testing.assert_allclose(model.predict_proba(x), theirs.predict_proba(x), rtol=1e-10)
    before = model.theta_.copy() if name == "priors" else model.feature_count_.copy()
    with pytest.raises(RowError, match="no row of class 1 would remain"):
        model.unlearn(np.arange(4, 60, 3).tolist())
    assert np.array_equal(before, model.theta_ if name == "priors" else model.feature_count_)
    with pytest.raises(RowError, match="Number of priors"):
        estimator.set_params(**{name: [0.5, 0.5]}).fit(x, y)


def test_bad_gaussian_priors() -> None:
    for priors, said in (([0.5, 0.6, 0.2], "sum"), ([-0.5, 0.5, 1.0], "non-negative")):
        with pytest.raises(RowError, match=said):
            ExactGaussianNB(priors=priors).fit(*data())


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_variances_of_data_far_from_zero(offset: float) -> None:
    x, y = data(300)
    far = x + offset
    model = ExactGaussianNB().fit(far, y)
    for row in np.random.default_rng(0).permutation(300)[:200]:
        model.unlearn([row])
    left = model.row_numbers_
    spread = far[left] - offset  # exact: what rounding has left of the rows
    theirs = GaussianNB().fit(spread, y[left])
    # the bound of the docstring, 1000 (k + n) roundings; raw squares would be off by 1e12 roundings
    np.testing.assert_allclose(model.var_, theirs.var_, rtol=1000 * 500 * 2.2e-16)
    np.testing.assert_allclose(model.var_, theirs.var_, rtol=1e-11)
    np.testing.assert_allclose(model.theta_ - offset, theirs.theta_, rtol=0, atol=1e-15 * max(offset, 1) * 10)


def test_an_extreme_row_takes_its_digits_with_it() -> None:
    x, y = data()
    x[3] = 1e10
    model = ExactGaussianNB().fit(x, y).unlearn([3])
    theirs = GaussianNB().fit(np.delete(x, 3, axis=0), np.delete(y, 3))
    np.testing.assert_allclose(model.var_, theirs.var_, rtol=1e-12)
    counts = np.abs(x) + 0.1
    model = ExactMultinomialNB(alpha=0.0).fit(counts, y).unlearn([3])
    theirs = MultinomialNB(alpha=0.0).fit(np.delete(counts, 3, axis=0), np.delete(y, 3))
    np.testing.assert_allclose(model.feature_log_prob_, theirs.feature_log_prob_, rtol=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6 + 0.3])
def test_a_feature_that_is_constant(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = data()
    x[:, 1] = value
    x[0, 1] = value + 7
    model = ExactGaussianNB(var_smoothing=0).fit(x, y)
    made: list[int] = []
    monkeypatch.setattr(naive_bayes, "spread_of", lambda x, w: made.append(len(x)) or spread_of(x, w))
    model.unlearn([0])
    assert made == [19, 59]  # the rows of its class, and all, once
    for row in range(1, 20):
        model.unlearn([row])
    assert made == [19, 59]
    assert model.var_[:, 1].tolist() == [0, 0, 0]


def test_a_feature_that_no_row_has_any_more_counts_zero() -> None:
    x, y = np.array([[0.1, 1.3], [0.2, 0.7], [0.0, 1.1], [0.5, 0.5]]), np.array([0, 0, 0, 1])
    model = ExactMultinomialNB().fit(x, y).unlearn([0, 1])
    assert model.feature_count_[0, 0] == 0


def test_weights() -> None:
    x, y = data()
    w = np.random.default_rng(0).uniform(0, 2, 60)
    w[6::3] = 0  # of class 0 only rows 0 and 3 weigh anything
    model = ExactGaussianNB().fit(x, y, w).unlearn([1, 2, 3])
    left = model.row_numbers_
    theirs = GaussianNB().fit(x[left], y[left], w[left])
    np.testing.assert_allclose(model.theta_, theirs.theta_, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(model.class_prior_, theirs.class_prior_, rtol=1e-12)
    model.unlearn([0])  # the class is left with weightless rows, and stays, as in a refit
    left = model.row_numbers_
    refit = ExactGaussianNB().fit(x[left], y[left], w[left])
    assert model.classes_.tolist() == refit.classes_.tolist() == [0, 1, 2]
    np.testing.assert_allclose(model.var_, refit.var_, rtol=1e-10)
    assert model.class_prior_[0] == 0
    with pytest.raises(RowError, match="weight 0"):
        model.unlearn(left[y[left] > 0])


def test_binary_features_are_kept_instead_of_the_rows() -> None:
    x, y = data()
    model = ExactBernoulliNB(binarize=0.5).fit(x, y)
    assert set(np.unique(model._rows.columns[0])) == {0.0, 1.0}
    assert np.array_equal(model._rows.columns[0], x > 0.5)


def test_there_is_no_partial_fit() -> None:
    assert not hasattr(ExactGaussianNB(), "partial_fit")
    assert not hasattr(ExactMultinomialNB(), "partial_fit")


def test_spreads() -> None:
    x, w = data()[0], np.linspace(0.1, 2, 60)
    mine, theirs = less(spread_of(x, w), x[:20], w[:20]), spread_of(x[20:], w[20:])
    np.testing.assert_allclose(mine.squares, theirs.squares, rtol=1e-13)
    np.testing.assert_allclose(mine.mean[0], theirs.mean[0], rtol=1e-14, atol=1e-15)
    assert not mine.worn
    assert less(spread_of(x, w), x, w).worn
    assert above(np.array([0.0, 1.0, 3.0, 0.4])).tolist() == [0, 2, 4, 0.5]
