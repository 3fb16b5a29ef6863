"""Distances to the retrained model: hand-worked values, scipy, and what must be refused."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.metrics import jaccard_score
from torch import Tensor, nn

from vislearn.metrics.distance import (
    Rates,
    abs_tow,
    activation_distance,
    average_gap,
    batch_mean_mae,
    churn,
    completeness,
    gaussian_kl,
    js,
    kl,
    mae,
    nomus,
    parameters,
    relative_difference,
    relative_weight_distance,
    rmse,
    running_statistics,
    tug_of_war,
    tug_of_war_mia,
    wasserstein,
    weight_distance,
    within_sigma,
    zrf,
    zrf_official,
)
from vislearn.metrics.gap import gap

K = 5


def logits(n: int = 40, seed: int = 0) -> Tensor:
    return 2 * torch.randn(n, K, generator=torch.Generator().manual_seed(seed))


def normal(n: int = 40, seed: int = 0) -> Tensor:
    return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def test_churn_counts_rows_in_other_classes() -> None:
    p, q = torch.eye(4), torch.eye(4)[[0, 1, 3, 2]]
    assert churn(p, q) == 0.5
    assert churn(p, 7 * p) == 0
    masked = p.clone()
    masked[:, 0] = -math.inf  # a masked class has no divergence but a decision
    assert churn(p, masked) == 0.25


def test_completeness_is_the_jaccard_index_of_right_rows() -> None:
    p, q, y = logits(seed=1), logits(seed=2), torch.arange(40) % K
    expected = jaccard_score((p.argmax(1) == y).numpy(), (q.argmax(1) == y).numpy())
    assert 0 < expected < 1
    assert completeness(p, q, y) == pytest.approx(expected)
    assert completeness(torch.eye(K), torch.eye(K), torch.arange(K)) == 1


def test_completeness_of_models_that_are_never_right_is_undefined() -> None:
    assert math.isnan(completeness(torch.eye(K), torch.eye(K), (torch.arange(K) + 1) % K))


@pytest.mark.parametrize("metric", [churn, lambda p, q: completeness(p, q, torch.zeros(len(p)).long())])
def test_decisions_need_numbers_of_the_same_rows(metric: object) -> None:
    broken = logits(4)
    broken[1, 2] = math.nan
    for pair in ((broken, logits(4)), (logits(4), broken)):
        with pytest.raises(ValueError, match=r"NaN on 25.0% of the rows"):
            metric(*pair)
    with pytest.raises(ValueError, match="same rows"):
        metric(logits(4), logits(5))
    with pytest.raises(ValueError, match="without rows"):
        metric(logits(0), logits(0))


@pytest.mark.parametrize("metric", [kl, js, zrf, activation_distance])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_outputs_that_are_not_finite_are_refused_with_their_share(metric: object, value: float) -> None:
    broken = logits(8)
    broken[3, 1] = value
    with pytest.raises(ValueError, match=r"not finite on 12.5% of the rows"):
        metric(logits(8), broken)


def test_other_classes_are_refused_unless_mapped() -> None:
    p = logits(6)
    with pytest.raises(ValueError, match="index"):
        js(p, p[:, :3])
    assert js(p, p.flip(1)[:, [4, 3, 2, 1, 0]]) == pytest.approx(0, abs=1e-12)


def test_tug_of_war_by_hand() -> None:
    u, r = Rates(0.9, 0.8, 0.7, 0.1), Rates(0.8, 1.0, 0.7, 0.6)
    assert tug_of_war(u, r) == pytest.approx(0.9 * 0.8 * 1.0)
    assert tug_of_war_mia(u, r) == pytest.approx(0.5 * 0.8 * 1.0)
    assert tug_of_war(r, r) == tug_of_war_mia(r, r) == 1
    assert tug_of_war(r, u) == tug_of_war(u, r)
    assert tug_of_war(Rates(1, 0, 0), Rates(0, 1, 1)) == 0


def test_the_other_tow_needs_no_retrained_model() -> None:
    assert abs_tow(Rates(0.25, 0.8, 0.5)) == pytest.approx(0.8 * 0.75 * 0.5)
    assert abs_tow(Rates(0, 1, 1)) == 1


def test_the_average_gap_is_the_difference_of_means() -> None:
    u = [Rates(0.1, 0.9, 0.8, 0.2), Rates(0.3, 0.9, 0.8, 0.2)]
    r = [Rates(0.2, 1.0, 0.7, 0.2)]
    assert average_gap(u, r) == pytest.approx((0 + 0.1 + 0.1 + 0) / 4)
    scattered = gap(np.array(u).T, np.array(r).T)
    assert scattered["of_means"] == pytest.approx(average_gap(u, r))
    assert scattered["mean"] == pytest.approx((0.1 + 0.1 + 0.1 + 0) / 4)  # single models scatter
    with pytest.raises(ValueError, match="both sides"):
        average_gap(u, [])


@pytest.mark.parametrize("rates", [Rates(91, 0.9, 0.9, 0.1), Rates(0.9, -0.1, 0.9, 0.1), Rates(0.9, 0.9, math.nan)])
def test_rates_are_fractions(rates: Rates) -> None:
    fine = Rates(0.9, 0.9, 0.9, 0.1)
    for call in (lambda: tug_of_war(rates, fine), lambda: tug_of_war(fine, rates), lambda: abs_tow(rates),
                 lambda: average_gap([rates], [fine])):  # fmt: skip
        with pytest.raises(ValueError, match="fractions"):
            call()


def test_the_attack_of_a_tug_of_war_must_be_known() -> None:
    with pytest.raises(ValueError, match="fractions"):
        tug_of_war_mia(Rates(0.9, 0.9, 0.9), Rates(0.9, 0.9, 0.9))


def test_nomus_by_hand() -> None:
    assert nomus(0.8, 0.5) == pytest.approx(0.9)
    assert nomus(0.8, 0.75) == nomus(0.8, 0.25) == pytest.approx(0.4 + 0.5 * 0.5)
    assert nomus(0.8, 1.0, weight=1) == pytest.approx(0.8)
    with pytest.raises(ValueError, match="fractions"):
        nomus(80.0, 0.5)


def test_zrf_by_its_names() -> None:
    p, q = logits(seed=1), logits(seed=2)
    assert zrf(p, q) == pytest.approx(1 - js(p, q))
    assert zrf(p, q, "nats") == pytest.approx(1 - math.log(2) * js(p, q))
    assert zrf(p, q, "bt_code") == zrf_official(p, q) != zrf(p, q)
    sure = torch.tensor([[500.0, 0.0]])
    assert zrf(sure, sure.flip(1), "nats") == pytest.approx(1 - math.log(2))  # its floor
    with pytest.raises(ValueError, match="untrained"):
        zrf(p)


def test_zrf_against_uniform_logits_is_repeatable_and_highest_for_flat_outputs() -> None:
    state = torch.get_rng_state()
    found = zrf(logits(), kind="uniform_logits", draws=20)
    assert found == zrf(logits(), kind="uniform_logits", draws=20)
    assert torch.equal(state, torch.get_rng_state())
    assert found < zrf(torch.zeros(40, K), kind="uniform_logits", draws=20) < 1
    generator = torch.Generator().manual_seed(3)
    drawn = [torch.rand(40, K, generator=generator, dtype=torch.float64) for _ in range(2)]
    expected = 1 - np.mean([js(logits(), d, "nats") for d in drawn])
    assert zrf(logits(), kind="uniform_logits", draws=2, seed=3) == pytest.approx(expected)


def test_weights_relative_to_the_reference() -> None:
    a, b = {"w": torch.tensor([3.0, 0.0]), "b": torch.ones(1)}, {"w": torch.tensor([0.0, 4.0]), "b": torch.zeros(1)}
    assert weight_distance(a, b) == (pytest.approx(math.sqrt(26)), {"w": 5.0, "b": 1.0})
    total, each = relative_weight_distance(a, b)
    assert total == pytest.approx(math.sqrt(26) / 4)
    assert each == {"w": 1.25}  # nothing is relative to a bias of zero
    assert math.isnan(relative_weight_distance(a, {name: 0 * v for name, v in b.items()})[0])


def test_parameters_and_running_statistics_are_apart_and_counters_nowhere() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    assert parameters(model).keys() == {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert running_statistics(model).keys() == {"1.running_mean", "1.running_var"}
    assert not any(p.requires_grad for p in parameters(model).values())


@pytest.mark.parametrize(("b", "message"), [
    ({"w": torch.zeros(1)}, "another shape of w"), ({"v": torch.zeros(3)}, "other parameters"),
    ({"w": torch.full((3,), math.nan)}, "not finite"),
])  # fmt: skip
def test_weights_that_do_not_compare_are_refused(b: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        weight_distance({"w": torch.zeros(3)}, b)


def test_wasserstein_of_sorted_values_and_of_unequal_sizes() -> None:
    a, b = normal(30, 1), 1 + normal(30, 2)
    assert wasserstein(a, b) == pytest.approx((a.sort().values - b.sort().values).abs().mean().item(), rel=1e-5)
    assert wasserstein(a, a.flip(0)) == 0  # which row has which value does not matter
    assert wasserstein(torch.tensor([0.0]), torch.tensor([1.0, 3.0])) == 2
    for bad, message in ((normal(0), "without rows"), (torch.tensor([math.inf]), "not finite"), (logits(), "predict")):
        with pytest.raises(ValueError, match=message):
            wasserstein(a, bad)


def test_kl_of_normal_distributions_is_the_integral() -> None:
    p, q, s, t = 0.3, 1.1, 0.7, 1.3
    grid = np.linspace(-12, 12, 40001)
    one, other = stats.norm(p, s), stats.norm(q, t)
    expected = np.trapezoid(one.pdf(grid) * (one.logpdf(grid) - other.logpdf(grid)), grid)
    assert gaussian_kl(torch.tensor([p]), torch.tensor([q]), s, t) == pytest.approx(expected, rel=1e-6)
    assert gaussian_kl(torch.tensor([1.0]), torch.tensor([4.0]), 2, 2) == pytest.approx(9 / 8)
    with pytest.raises(ValueError, match="above 0"):
        gaussian_kl(normal(), normal(), 0.0, 1.0)


def test_errors_of_a_regressor() -> None:
    p, y = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([1.0, 4.0, 1.0])
    assert mae(p, y) == 2
    assert rmse(p, y) == pytest.approx(math.sqrt(20 / 3))
    assert batch_mean_mae(p, y, 2) == batch_mean_mae(p, y, [2, 1]) == (1 + 4) / 2  # the short batch weighs as much
    assert within_sigma(p, y, 2.0) == pytest.approx(2 / 3)
    assert relative_difference(p, y, torch.tensor([2.0, 2.0, 8.0])).tolist() == [0, 1, 0.5]


def test_what_a_regressor_cannot_be_asked() -> None:
    with pytest.raises(ValueError, match="same rows"):
        mae(torch.zeros(3, 1), torch.zeros(3))  # would broadcast to 3 x 3
    with pytest.raises(ValueError, match="target of 0"):
        relative_difference(normal(2), normal(2), torch.zeros(2))
    with pytest.raises(ValueError, match="above 0"):
        within_sigma(normal(2), normal(2), 0.0)
    with pytest.raises(ValueError, match="not finite"):
        rmse(torch.tensor([math.nan]), torch.zeros(1))
