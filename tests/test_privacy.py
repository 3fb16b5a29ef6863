"""Privacy accounting: what is spent, the noise for a budget, and groups of rows."""

import importlib.util
import math

import pytest
from toy_data import refusal

from vislearn import privacy
from vislearn.privacy import group, largest_group, noise_for, spent

SHORT = (0.125, 16)  # chance of a row and steps of a training


@pytest.fixture(autouse=True)
def _few_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most of the time goes into orders that change little: they bound a domain here."""
    if importlib.util.find_spec("opacus"):
        monkeypatch.setattr("opacus.accountants.RDPAccountant.DEFAULT_ALPHAS", privacy.ORDERS)


def test_a_group_pays_epsilon_for_each_row_and_delta_geometrically() -> None:
    assert group(0.5, 1e-5, 1) == pytest.approx((0.5, 1e-5))
    assert group(0.5, 1e-5, 4) == pytest.approx((2.0, 1e-5 * sum(math.exp(0.5 * i) for i in range(4))))
    assert group(0, 1e-5, 4) == pytest.approx((0, 4e-5))
    assert group(3, 1e-5, 1000) == (3000, math.inf)
    assert group(math.inf, 1e-5, 1) == (math.inf, 1e-5)
    assert group(math.inf, 1e-5, 2)[1] == math.inf


@pytest.mark.parametrize("delta", [1e-5, 1e-9, 0.3])
@pytest.mark.parametrize("epsilon", [0.0, 1e-3, 0.1, 1.0, 3.0, 8.0, 800.0])
def test_the_largest_group_is_the_last_that_means_anything(epsilon: float, delta: float) -> None:
    most = largest_group(epsilon, delta)
    assert most >= 1
    assert group(epsilon, delta, most)[1] < 1
    assert group(epsilon, delta, most + 1)[1] >= 1 - 1e-12


def test_without_noise_there_is_no_group() -> None:
    assert largest_group(math.inf, 1e-5) == 0


def test_nothing_is_spent_by_no_step_and_everything_without_noise() -> None:
    assert spent([], 1e-5) == (0.0, "prv")
    assert spent([(1.0, 0.1, 0)], 1e-5) == (0.0, "prv")
    assert spent([(1.0, 0.1, 5), (0.0, 0.1, 1)], 1e-5) == (math.inf, "none")


def test_two_stretches_of_the_same_noise_cost_what_one_does() -> None:
    pytest.importorskip("opacus")
    rate, steps = SHORT
    whole, _ = spent([(1.0, rate, steps)], 1e-5)
    parts, accountant = spent([(1.0, rate, 10), (1.0, rate, steps - 10)], 1e-5)
    assert accountant == "prv"
    assert parts == pytest.approx(whole, abs=2e-2)  # each is off by up to a hundredth


def test_every_row_in_every_batch_is_the_gaussian_mechanism() -> None:
    """Its exact delta at an epsilon is known (Balle and Wang, 2018)."""
    pytest.importorskip("opacus")
    from scipy.stats import norm

    noise, steps, delta = 5.0, 10, 1e-5
    epsilon, _ = spent([(noise, 1.0, steps)], delta)
    length = math.sqrt(steps) / noise
    exact = norm.cdf(length / 2 - epsilon / length) - math.exp(epsilon) * norm.cdf(-length / 2 - epsilon / length)
    assert 0.9 * delta < exact <= delta


def test_where_the_grid_would_not_fit_the_looser_accountant_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opacus")
    rate, steps = SHORT
    tight, _ = spent([(1.0, rate, steps)], 1e-5)
    monkeypatch.setattr(privacy, "GRID", 1000)
    loose, accountant = spent([(1.0, rate, steps)], 1e-5)
    assert accountant == "rdp"
    assert tight < loose < 1.3 * tight


@pytest.mark.parametrize("epsilon", [0.5, 2.0, 50.0])
def test_the_noise_keeps_to_the_budget_and_wastes_little_of_it(epsilon: float, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opacus")
    monkeypatch.setattr(privacy, "GRID", 0)  # the search is the same with the accountant that is quick
    noise = noise_for(epsilon, 1e-5, *SHORT)
    assert 0.99 * epsilon < spent([(noise, *SHORT)], 1e-5)[0] <= epsilon


def test_a_budget_below_what_the_accountant_can_vouch_for_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("opacus")
    monkeypatch.setattr(privacy, "GRID", 0)
    said = refusal(lambda: noise_for(0.005, 1e-5, *SHORT))
    assert "target_epsilon=0.005 cannot be reached" in said
    assert "--model.target_epsilon" in said
