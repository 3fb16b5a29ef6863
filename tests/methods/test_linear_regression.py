"""Ridge regression from sums: worked numbers, the guard against lost digits, and what is singular."""

import numpy as np
import pytest
from sklearn.linear_model import LinearRegression, Ridge
from vislearn.methods.linear_regression import ExactRidge, Size, factor, sums_of, without

from vislearn.classical import RowError
from vislearn.methods import linear_regression


def data(n: int = 40, d: int = 4, offset: float = 0.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, d))
    return x + offset, x @ np.arange(1.0, d + 1) + 0.1 * rng.normal(size=n) + 3


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every time that sums are made from rows, the number of rows."""
    made: list[int] = []

    def spy(z: np.ndarray, w: np.ndarray, centred: bool) -> linear_regression.Sums:
        made.append(len(z))
        return sums_of(z, w, centred)

    monkeypatch.setattr(linear_regression, "sums_of", spy)
    return made


def test_a_line_through_three_points_less_one() -> None:
    x, y = np.array([[0.0], [1.0], [5.0], [2.0]]), np.array([1.0, 3.0, 0.0, 5.0])
    model = ExactRidge(alpha=0).fit(x, y).unlearn([2])
    assert model.coef_ == pytest.approx([2])  # y = 2 x + 1
    assert model.intercept_ == pytest.approx(1)
    # about the mean (1, 3): S_xx = 2, S_xy = 4, so alpha = 2 halves the slope
    ridge = ExactRidge(alpha=2).fit(x, y).unlearn([2])
    assert (ridge.coef_[0], ridge.intercept_) == pytest.approx((1, 2))
    # without an intercept: S_xx = 0 + 1 + 4, S_xy = 3 + 10
    assert ExactRidge(0, fit_intercept=False).fit(x, y).unlearn([2]).coef_ == pytest.approx([13 / 5])


def test_weights_count_rows_several_times() -> None:
    x, y = data()
    w = np.arange(40) % 4
    model = ExactRidge().fit(x, y, w).unlearn([0, 1, 2, 39])
    repeated = np.repeat(np.arange(3, 39), w[3:39])
    theirs = Ridge().fit(x[repeated], y[repeated])
    np.testing.assert_allclose(model.coef_, theirs.coef_, rtol=1e-10)
    with pytest.raises(RowError, match="negative"):
        ExactRidge().fit(x, y, -np.ones(40))


def test_several_targets() -> None:
    x, y = data()
    both = np.column_stack([y, -2 * y + x[:, 0]])
    model = ExactRidge().fit(x, both).unlearn(np.arange(10))
    theirs = Ridge().fit(x[10:], both[10:])
    np.testing.assert_allclose(model.coef_, theirs.coef_, rtol=1e-10)
    np.testing.assert_allclose(model.intercept_, theirs.intercept_, rtol=1e-10)
    assert model.predict(x).shape == both.shape


def test_data_far_from_zero_lose_nothing() -> None:
    near, y = data(200)
    far = near + 1e6
    far_spread = far - 1e6  # what rounding has left of the rows
    rows = np.random.default_rng(1).permutation(200)[:150]
    model = ExactRidge(0.5).fit(far, y)
    for part in np.split(rows, 30):
        model.unlearn(part)
    left = model.row_numbers_
    theirs = Ridge(0.5).fit(far_spread[left], y[left])
    np.testing.assert_allclose(model.coef_, theirs.coef_, rtol=1e-11)


def test_the_rows_that_are_left_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = data(2000, 5)
    made = counted(monkeypatch)
    model = ExactRidge().fit(x, y)
    for row in range(500):
        model.unlearn([row])
    assert made == [2000]
    refit = ExactRidge().fit(x[500:], y[500:])
    np.testing.assert_allclose(model.coef_, refit.coef_, rtol=1e-12)


def test_sums_are_made_again_when_little_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = data()
    x[0] *= 1e9  # this row alone is all that its direction holds
    made = counted(monkeypatch)
    model = ExactRidge(1e-3).fit(x, y).unlearn([0])
    assert made == [40, 39]
    theirs = Ridge(1e-3).fit(x[1:], y[1:])
    np.testing.assert_allclose(model.coef_, theirs.coef_, rtol=1e-10)
    model.unlearn([1])
    assert made == [40, 39]


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6])
def test_a_column_that_becomes_constant(value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = data()
    x[:, 1] = value
    x[7, 1] = value + 5.0
    made = counted(monkeypatch)
    model = ExactRidge(0).fit(x, y).unlearn([7])
    theirs = LinearRegression().fit(np.delete(x, [1, 7], axis=0)[:, [0, 2, 3]], np.delete(y, [1, 7]))
    model.unlearn([1])
    assert made == [40, 39]  # a column that is constant needs the rows once, when it becomes so
    np.testing.assert_allclose(model.coef_[[0, 2, 3]], theirs.coef_, rtol=1e-10)
    assert model.coef_[1] == 0
    assert model.predict(x[:1]) == pytest.approx(theirs.predict(x[:1, [0, 2, 3]]))


def test_all_columns_constant() -> None:
    model = ExactRidge(0).fit(np.ones((5, 2)), np.arange(5.0)).unlearn([4])
    assert model.coef_.tolist() == [0, 0]
    assert model.intercept_ == pytest.approx(1.5)


@pytest.mark.parametrize("alpha", [0.0, 1e-12])
def test_fewer_rows_than_features(alpha: float) -> None:
    x, y = data(12, 8)
    model = ExactRidge(alpha).fit(x, y).unlearn([1, 3, 5, 7, 9, 11])
    left = np.arange(0, 12, 2)
    theirs = LinearRegression().fit(x[left], y[left])  # the solution of the smallest norm
    np.testing.assert_allclose(model.coef_, theirs.coef_, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(model.predict(x[left]), y[left], rtol=0, atol=1e-8)


def test_only_weightless_rows_cannot_remain() -> None:
    x, y = data(6)
    model = ExactRidge().fit(x, y, [1, 0, 0, 2, 0, 0])
    before = model.coef_.copy()
    with pytest.raises(RowError, match="weight 0"):
        model.unlearn([0, 3])
    assert np.array_equal(model.coef_, before)
    assert len(model.row_numbers_) == 6


@pytest.mark.parametrize("alpha", [-1, np.nan, np.inf, "1"])
def test_alpha_is_checked(alpha: object) -> None:
    with pytest.raises(RowError, match="alpha"):
        ExactRidge(alpha).fit(*data())  # type: ignore[arg-type]


def test_downdated_sums_are_those_of_the_rest() -> None:
    x, y = data(30, 3)
    z, w = np.column_stack([x, y]), np.linspace(0.5, 2, 30)
    for centred in (True, False):
        mine, theirs = without(sums_of(z, w, centred), z[:9], w[:9], centred), sums_of(z[9:], w[9:], centred)
        np.testing.assert_allclose(mine.matrix, theirs.matrix, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(mine.mean[0], theirs.mean[0], rtol=1e-13, atol=1e-15)
        assert mine.total == pytest.approx(theirs.total)
        assert mine.whole > mine.total


def test_size_is_the_log_determinant() -> None:
    x, y = data(30, 3)
    sums = sums_of(np.column_stack([x, y]), np.ones(30), True)
    found = factor(sums, 3, 0.7)
    assert found is not None
    expected = np.linalg.slogdet(np.cov(x.T, bias=True) * 30 + 0.7 * np.eye(3))[1]
    assert found[1] == (3, pytest.approx(expected))
    assert factor(sums, 3, 0.7, Size(3, expected + 30)) is None  # so much was lost since
    assert factor(sums, 3, 0.7, Size(4, expected)) is None  # a column has become constant
