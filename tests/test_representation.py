"""CKA, drift and the verdicts: hand-worked values, other ways to the same number, extremes and bad input."""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from vislearn.metrics.representation import (
    DEAD,
    Reading,
    agl,
    agr,
    batch_cka,
    cka,
    h_lr,
    is_constant,
    rbf_cka,
    relative_drift,
    shuffled_cka,
    unusable,
    uuef_cka,
    uuef_cka_of_layers,
    verdicts,
)

biased = partial(cka, kind="biased")
FORMS = [cka, biased, rbf_cka, partial(cka, batch=16), partial(rbf_cka, kind="unbiased")]


def features(n: int = 64, d: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def rotation(d: int) -> Tensor:
    return torch.linalg.qr(features(d, d, seed=9).double()).Q


def hsic(x: Tensor, y: Tensor) -> float:
    """HSIC_1 as it is written, from Gram matrices of features that are not centred."""
    n = len(x)
    k, m = (z.double() @ z.double().T * (1 - torch.eye(n)) for z in (x, y))
    one = torch.ones(n, dtype=torch.float64)
    whole = (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return ((torch.trace(k @ m) + whole - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3))).item()


def by_definition(x: Tensor, y: Tensor, batch: int | None = None) -> float:
    """Unbiased CKA, its terms summed over batches."""
    parts = list(zip(x.split(batch or len(x)), y.split(batch or len(y)), strict=True))
    xy, xx, yy = (sum(hsic(*p) for p in pairs) for pairs in
                  (parts, [(a, a) for a, _ in parts], [(b, b) for _, b in parts]))  # fmt: skip
    return xy / math.sqrt(xx * yy)


@pytest.mark.parametrize(("n", "d", "e"), [(40, 6, 9), (12, 50, 70), (5, 3, 3)])
def test_unbiased_cka_is_its_definition(n: int, d: int, e: int) -> None:
    x, y = features(n, d) + 3, features(n, e, seed=1)
    y[:, 0] += x[:, 0]
    assert cka(x, y).value == pytest.approx(by_definition(x, y), abs=1e-9)


def test_biased_cka_by_hand() -> None:
    x, y = torch.tensor([[1.0], [-1], [0], [0]]), torch.tensor([[1.0], [-1], [1], [-1]])
    assert biased(x, y).value == pytest.approx(2**2 / (2 * 4))  # (x'y)² / (x'x y'y)
    assert cka(x, y).value == pytest.approx(by_definition(x, y))


def test_minibatches_sum_the_terms_before_they_divide() -> None:
    x, y = features(40), features(40, seed=1)
    y[:20] += x[:20]
    halves = cka(x, y, batch=20).value
    assert halves == pytest.approx(by_definition(x, y, batch=20))
    assert halves != pytest.approx((cka(x[:20], y[:20]).value + cka(x[20:], y[20:]).value) / 2, abs=1e-4)
    assert cka(x, y, batch=40).value == pytest.approx(cka(x, y).value)
    assert cka(x, y, batch=30).value == pytest.approx(cka(x[:30], y[:30]).value)


@pytest.mark.parametrize("form", FORMS)
def test_a_model_is_equal_to_itself(form: partial[object]) -> None:
    x = features().relu()
    assert form(x, x).value == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_rotation_shift_and_scale_change_nothing_and_a_linear_map_does(form: partial[object]) -> None:
    x, y = features(), features(seed=1)
    y[:, :4] += x[:, :4]
    turned = 7.5 * x.double() @ rotation(8) + 3
    assert form(turned, y).value == pytest.approx(form(x, y).value, abs=1e-6)
    assert form(y, x).value == pytest.approx(form(x, y).value, abs=1e-9)
    squeezed = x * torch.tensor([10.0, 1, 1, 1, 1, 1, 1, 1])
    assert form(squeezed, y).value != pytest.approx(form(x, y).value, abs=1e-3)


def test_maps_are_flattened() -> None:
    x, y = features(20, 12), features(20, 5, seed=1)
    assert cka(x.view(20, 3, 2, 2), y).value == cka(x, y).value


def test_digits_survive_a_large_mean() -> None:
    x, y = features().double(), features(seed=1).double()
    assert cka(x + 1e5, y).value == pytest.approx(cka(x, y).value, abs=1e-6)
    large = (300 * features(64, 2048).relu()).half()  # their products overflow half precision
    assert cka(large, large).value == pytest.approx(1, abs=1e-6)


def test_the_floor_of_the_biased_form_and_none_of_the_unbiased() -> None:
    x, y = features(64, 256), features(64, 256, seed=1)
    assert biased(x, y).value == pytest.approx(256 / (64 + 256), abs=0.05)
    assert abs(cka(x, y).value) < 0.05


def test_shuffling_rows_leaves_the_floor() -> None:
    x = features(200, 16)
    assert cka(x, x).value == pytest.approx(1)
    assert abs(shuffled_cka(x, x).value) < 0.05
    assert shuffled_cka(x, x, similarity=biased).value > shuffled_cka(x, x).value + 0.03
    before = torch.get_rng_state()
    assert shuffled_cka(x, x, seed=3) == shuffled_cka(x, x, seed=3) != shuffled_cka(x, x, seed=4)
    assert torch.equal(before, torch.get_rng_state())


def test_uuef_means_over_batches_in_percent_with_two_decimals() -> None:
    x, y = features(50), features(50, seed=1)
    each = [biased(x[i : i + 20], y[i : i + 20]).value for i in (0, 20, 40)]
    assert batch_cka(x, y, 20).tolist() == pytest.approx(each)
    assert uuef_cka(x, y, 20).value == round(100 * sum(each) / 3, 2)
    a, b = {"layer1": x, "avgpool": y}, {"layer1": y, "avgpool": y}
    assert uuef_cka_of_layers(a, b, 20).value == pytest.approx((uuef_cka(x, y, 20).value + 100) / 2)
    with pytest.raises(ValueError, match="only one side has \\['avgpool'\\]"):
        uuef_cka_of_layers(a, {"layer1": x})


def test_a_last_batch_of_one_row_has_no_value() -> None:
    x, y = features(21), features(21, seed=1)
    assert batch_cka(x, y, 20).isnan().tolist() == [False, True]
    assert math.isnan(uuef_cka(x, y, 20).value)
    assert "1 of 2 batches" in uuef_cka(x, y, 20).reason
    assert "layer1: no feature varies" in uuef_cka_of_layers({"layer1": x}, {"layer1": y}, 20).reason


@pytest.mark.parametrize("value", [0.0, 0.1, -1e6])
@pytest.mark.parametrize("form", FORMS)
def test_dead_features_give_nan_and_the_reason(form: partial[object], value: float) -> None:
    found = form(torch.full((64, 8), value), features())
    assert math.isnan(found.value)
    assert DEAD in found.reason
    assert "first model" in found.reason
    assert math.isnan(shuffled_cka(features(), torch.full((64, 8), value), similarity=form).value)


def test_one_row_that_differs_is_not_enough() -> None:
    x = torch.zeros(10, 3)
    x[4] = 1
    found = cka(x, features(10))
    assert math.isnan(found.value)
    assert found.reason
    assert not is_constant(x)


def test_rounding_is_no_variation() -> None:
    x = torch.full((10, 3), 100.0)
    x[3] += 1e-5
    assert is_constant(x)
    x[3] += 1e-3
    assert not is_constant(x)
    assert is_constant(torch.zeros(10, 3))


def test_few_rows_are_warned_of() -> None:
    assert not cka(features(100, 64), features(100, 64, seed=1)).warning
    assert "below 80 rows" in cka(features(79, 64), features(79, 64, seed=1)).warning
    assert "mostly bias" in biased(features(60, 64), features(60, 64, seed=1)).warning


def test_bad_input_is_refused() -> None:
    x = features(10)
    for form in (cka, biased, rbf_cka, shuffled_cka):
        with pytest.raises(ValueError, match="at least 4 rows"):
            form(x[:3], x[:3])
    with pytest.raises(ValueError, match="at least 4 rows at a time, not 3"):
        cka(x, x, batch=3)
    with pytest.raises(ValueError, match="no whole batch: 10 rows, batches of 11"):
        cka(x, x, batch=11)
    for form in (cka, rbf_cka, batch_cka, uuef_cka):
        with pytest.raises(ValueError, match="10 and 9 rows"):
            form(x, x[:9])
        for bad in (math.nan, math.inf):
            with pytest.raises(ValueError, match="second model are not finite"):
                form(x, x.where(x != x[0, 0], bad))
    with pytest.raises(ValueError, match="features"):
        cka(x[:, 0], x)


def test_why_features_cannot_be_used() -> None:
    x = features(10)
    assert unusable(x) == ""
    assert unusable(x.where(x != x[2, 1], math.nan)) == "the features are not finite on 1 of 10 rows"
    assert "3 rows" in unusable(x[:3])
    assert "no rows" in unusable(x[:0])
    assert unusable(torch.ones(10, 3)) == DEAD


def test_drift_is_relative_to_the_reference() -> None:
    x = torch.tensor([[3.0, 0], [0, 4]])
    assert relative_drift(x, x).value == 0
    assert relative_drift(torch.zeros(2, 2), x).value == 1
    assert relative_drift(x + torch.tensor([[0.0, 2], [0, 0]]), x).value == pytest.approx(2 / 5)
    assert math.isnan(relative_drift(x, torch.zeros(2, 2)).value)
    with pytest.raises(ValueError, match="one layer"):
        relative_drift(x, x[:, :1])


def test_aggregates_by_hand() -> None:
    assert agl({"forget": 0.1, "retain": 0.9}, {"forget": 0, "retain": 1}) == pytest.approx(0.81)
    assert agr([0.8, -0.2], [0.5, 0.5], [0.7, 0.5]) == pytest.approx((0.8 * 0.8 + 0) / 2)
    assert h_lr(0.5, 1) == pytest.approx(2 / 3)
    assert h_lr(0, 0) == 0
    with pytest.raises(ValueError, match="same sets"):
        agl({"forget": 1}, {"retain": 1})
    with pytest.raises(ValueError, match="none"):
        agr([], [], [])


def reading(u_r: Sequence[float] = (0.85, 0.87), r_r: Sequence[float] = (0.84, 0.88, 0.86)) -> Reading:
    accuracy, knn = (0, 0.02, 0.01), (0.9, 0.91, 0.92)
    return Reading(0.7, (0.6, 0.62, 0.64), {"forget": u_r}, {"forget": r_r}, 0.01, accuracy, 0.99, 0.9, knn)


def test_verdicts_follow_the_numbers() -> None:
    assert list(verdicts(reading())) == ["consistent"]
    assert list(verdicts(reading(u_r=(0.7, 0.9)))) == ["different"]
    assert "0.80 on forget rows (0.84 to 0.88)" in verdicts(reading(u_r=(0.7, 0.9)))["different"]
    head = replace(reading(u_r=(0.6, 0.62)), u_o=0.98)
    assert list(verdicts(head)) == ["head-only"]
    assert "head-only" not in verdicts(replace(head, u_o=0.94))
    assert "head-only" not in verdicts(replace(head, o_r=(0.6, 0.62, 0.96)))  # seeds of r do as much
    assert "head-only" not in verdicts(replace(head, forget_accuracy=0.99))  # the original itself
    assert "head-only" not in verdicts(replace(head, forget_accuracy_o=0.03))  # nothing to forget
    broken = replace(reading(), retain_knn=0.85)
    assert "wrecked" in verdicts(broken)
    assert "6.0 points below" in verdicts(broken)["wrecked"]
    assert "wrecked" not in verdicts(replace(broken, retain_knn_r=(0.8, 0.9, 1.0)))  # within three deviations
    assert "wrecked" not in verdicts(replace(reading(), retain_knn=0.99, retain_knn_r=(1, 1, 1)))
    assert "same on every row" in verdicts(replace(reading(), retain_knn=math.nan, dead=True))["wrecked"]
    assert "wrecked" not in verdicts(replace(reading(), retain_knn=math.nan))


def test_without_seeds_there_is_no_range_and_no_verdict_on_it() -> None:
    assert verdicts(reading(r_r=())) == {}
    assert verdicts(reading(r_r=(0.9,))) == {}  # two retrained models have one pair
    assert "wrecked" not in verdicts(replace(reading(), retain_knn=0.1, retain_knn_r=(0.9,)))


def test_a_set_below_its_range_is_enough_to_differ() -> None:
    r_r = {"forget": (0.8, 0.9), "retain": (0.8, 0.9)}
    two = replace(reading(), u_r={"forget": (0.85,), "retain": (0.5,)}, r_r=r_r)
    assert list(verdicts(two)) == ["different"]
