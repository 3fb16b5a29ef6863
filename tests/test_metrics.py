"""Metrics against scikit-learn and scipy, and at their extremes."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.stats import entropy as scipy_entropy
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, log_loss, recall_score, roc_auc_score
from torch import Tensor

from vislearn.metrics.accuracy import (
    accuracy,
    batch_mean_accuracy,
    batch_mean_loss,
    mean_loss,
    per_class_accuracy,
)
from vislearn.metrics.distance import (
    activation_distance,
    js,
    js_official,
    kl,
    weight_distance,
    zrf,
    zrf_official,
)
from vislearn.metrics.membership import auc, entropy, entropy_attack, logistic_attack, threshold_attack

K = 5


def logits(n: int = 40, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(n, K, generator=torch.Generator().manual_seed(seed))


def labels(n: int = 40) -> Tensor:
    return torch.randint(K, (n,), generator=torch.Generator().manual_seed(9))


def softmax(x: Tensor) -> np.ndarray:
    return x.double().softmax(1).numpy()


SURE = torch.tensor([[500.0, 0.0, -500.0]])  # a softmax that underflows to exact zeros


def test_accuracy_is_scikit_learns() -> None:
    x, y = logits(), labels()
    assert accuracy(x, y) == pytest.approx(accuracy_score(y, x.argmax(1)))
    assert accuracy(torch.eye(K), torch.arange(K)) == 1
    assert accuracy(torch.eye(K), (torch.arange(K) + 1) % K) == 0


def test_per_class_accuracy_is_the_recall_of_each_class() -> None:
    x, y = logits(), labels()
    np.testing.assert_allclose(per_class_accuracy(x, y), recall_score(y, x.argmax(1), average=None, labels=range(K)))


def test_a_class_without_rows_has_no_accuracy() -> None:
    found = per_class_accuracy(torch.eye(3), torch.tensor([0, 1, 1]))
    assert found[:2].tolist() == [1, 0.5]
    assert found[2].isnan()


def test_mean_loss_is_scikit_learns() -> None:
    x, y = logits(), labels()
    assert mean_loss(x, y) == pytest.approx(log_loss(y, softmax(x), labels=range(K)))
    assert mean_loss(torch.zeros(4, K), torch.arange(4)) == pytest.approx(math.log(K))
    assert mean_loss(SURE, torch.tensor([2])) == pytest.approx(1000)  # finite, where the probability is 0


def test_batch_means_weigh_a_short_batch_like_a_full_one() -> None:
    x = torch.eye(3)[[0, 0, 0, 0, 1]]
    y = torch.zeros(5, dtype=torch.long)
    assert accuracy(x, y) == pytest.approx(0.8)
    assert batch_mean_accuracy(x, y, 4) == pytest.approx(0.5)
    assert batch_mean_accuracy(x, y, 5) == pytest.approx(0.8)
    x, y = logits(), labels()
    assert batch_mean_loss(x, y, 33) == pytest.approx((mean_loss(x[:33], y[:33]) + mean_loss(x[33:], y[33:])) / 2)


def test_nan_outputs_have_no_accuracy() -> None:
    x = torch.eye(2)
    x[1, 0] = math.nan
    assert math.isnan(accuracy(x, torch.tensor([0, 1])))
    assert math.isnan(mean_loss(x, torch.tensor([0, 1])))


@pytest.mark.parametrize("metric", [accuracy, mean_loss, per_class_accuracy])
def test_an_empty_or_ill_shaped_set_is_refused(metric: object) -> None:
    with pytest.raises(ValueError, match="without rows"):
        metric(torch.zeros(0, K), torch.zeros(0, dtype=torch.long))
    with pytest.raises(ValueError, match="not outputs"):
        metric(torch.zeros(3, K), torch.zeros(2, dtype=torch.long))


def test_kl_is_scipys() -> None:
    p, q = logits(seed=1), logits(seed=2)
    assert kl(p, q) == pytest.approx(scipy_entropy(softmax(p), softmax(q), axis=1).mean())
    assert kl(p, q) != pytest.approx(kl(q, p), rel=1e-3)
    assert kl(p, p) == 0


def test_js_is_scipys_in_both_units() -> None:
    p, q = logits(seed=1), logits(seed=2)
    expected = (jensenshannon(softmax(p), softmax(q), axis=1, base=2) ** 2).mean()
    assert js(p, q) == pytest.approx(expected)
    assert js(p, q, "nats") == pytest.approx(expected * math.log(2))
    assert js(q, p) == pytest.approx(js(p, q))


def test_js_and_zrf_end_at_0_and_1() -> None:
    other = SURE.flip(1)
    assert js(SURE, SURE) == pytest.approx(0, abs=1e-12)
    assert js(SURE, other) == pytest.approx(1)
    assert (zrf(SURE, SURE), zrf(SURE, other)) == (pytest.approx(1), pytest.approx(0))
    assert all(math.isfinite(f(SURE, other)) for f in (kl, js_official, zrf_official))


def test_the_official_zrf_is_the_mean_over_rows_and_classes_of_the_reversed_divergence() -> None:
    p, q = logits(seed=1), logits(seed=2)
    a, b = softmax(p), softmax(q)
    m = (a + b) / 2
    expected = 0.5 * ((m * np.log(m / a)).mean() + (m * np.log(m / b)).mean())
    assert js_official(p, q) == pytest.approx(expected)
    assert zrf_official(p, q) == pytest.approx(1 - expected) != pytest.approx(zrf(p, q), abs=0.05)


def test_activation_distance_and_its_other_forms() -> None:
    p, q = logits(seed=1), logits(seed=2)
    difference = np.linalg.norm(softmax(p) - softmax(q), axis=1)
    assert activation_distance(p, q) == pytest.approx(difference.mean())
    assert activation_distance(p, q, "rms") == pytest.approx(math.sqrt((difference**2).mean()))
    assert activation_distance(p, q, "logits") == pytest.approx(np.linalg.norm((p - q).numpy(), axis=1).mean())
    assert activation_distance(SURE, SURE.flip(1)) == pytest.approx(math.sqrt(2))
    assert activation_distance(p, p) == 0


def test_regressors_have_the_mean_absolute_difference() -> None:
    assert activation_distance(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0])) == 1.5
    with pytest.raises(ValueError, match="logits"):
        js(torch.zeros(3), torch.zeros(3))


@pytest.mark.parametrize("metric", [kl, js, js_official, zrf, activation_distance])
def test_distances_need_the_same_rows(metric: object) -> None:
    with pytest.raises(ValueError, match="same rows"):
        metric(logits(4), logits(5))
    with pytest.raises(ValueError, match="without rows"):
        metric(logits(0), logits(0))


def test_weight_distance() -> None:
    total, each = weight_distance({"a": torch.zeros(4), "b": torch.zeros(1)}, {"a": torch.ones(4), "b": torch.ones(1)})
    assert (total, each) == (pytest.approx(math.sqrt(5)), {"a": 2.0, "b": 1.0})
    with pytest.raises(ValueError, match="other parameters"):
        weight_distance({"a": torch.zeros(1)}, {"b": torch.zeros(1)})


def test_entropy_is_scipys_and_0_for_certainty() -> None:
    x = logits()
    np.testing.assert_allclose(entropy(x), scipy_entropy(softmax(x), axis=1))
    assert entropy(SURE).item() == pytest.approx(0, abs=1e-200)
    assert entropy(2 * SURE).item() == 0  # probabilities that are exactly 0 count nothing
    assert entropy(torch.zeros(1, K)).item() == pytest.approx(math.log(K))
    assert entropy(x).dtype == torch.float64


def test_entropy_attack_is_balanced_logistic_regression() -> None:
    members, non_members, forget = logits(60, 1, 6.0), logits(25, 2, 1.0), logits(30, 3, 3.0)
    attack = entropy_attack(members, non_members, forget)
    features = np.concatenate([entropy(members), entropy(non_members)])[:, None]
    reference = LogisticRegression(class_weight="balanced", C=2.0).fit(features, [1] * 60 + [0] * 25)
    called = reference.predict(entropy(forget).numpy()[:, None])
    assert attack.score == pytest.approx(called.mean())
    assert 0 < attack.score < 1
    assert attack.called.long().tolist() == called.tolist()
    assert attack.slope < 0  # low entropy means member
    assert attack.called.tolist() == (entropy(forget) < attack.threshold).tolist()


def test_the_attack_at_its_extremes() -> None:
    members, non_members = logits(50, 1, 10.0), logits(50, 2, 0.1)
    assert entropy_attack(members, non_members, logits(20, 3, 10.0)).score > 0.9
    assert entropy_attack(members, non_members, logits(20, 3, 0.1)).score == 0


@pytest.mark.parametrize(("sizes", "reason"), [
    ((0, 5, 5), "members"), ((5, 0, 5), "non-members"), ((5, 5, 0), "forget set"),
])  # fmt: skip
def test_an_attack_without_rows_has_a_reason_and_no_score(sizes: tuple, reason: str) -> None:
    for attack in (entropy_attack(*(logits(n) for n in sizes)), threshold_attack(*(torch.rand(n) for n in sizes))):
        assert math.isnan(attack.score)
        assert reason in attack.reason
        assert attack.called is None


def test_a_constant_feature_has_a_reason_and_no_score() -> None:
    attack = entropy_attack(SURE.repeat(9, 1), SURE.repeat(4, 1), logits(3))
    assert math.isnan(attack.score)
    assert "same on every fitted row" in attack.reason


def test_outputs_that_are_not_finite_have_a_reason_and_no_score() -> None:
    broken = logits(5)
    broken[2] = math.nan
    attack = entropy_attack(logits(5, 1), broken, logits(5, 2))
    assert math.isnan(attack.score)
    assert "1 rows of non-members" in attack.reason


def test_logistic_attack_takes_any_feature() -> None:
    attack = logistic_attack(torch.tensor([1.0, 1.1, 0.9]), torch.tensor([-1.0, -1.1]), torch.tensor([2.0, -2.0]))
    assert attack.score == 0.5
    assert attack.slope > 0


def test_threshold_attack_has_the_best_balanced_accuracy() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(80, generator=generator) + 1, torch.randn(30, generator=generator)
    attack = threshold_attack(a, b, b)

    def balanced(threshold: float) -> float:
        return ((a >= threshold).double().mean() + (b < threshold).double().mean()).item()

    assert balanced(attack.threshold) == max(balanced(float(t)) for t in torch.cat([a, b]))
    assert attack.score == pytest.approx((b >= attack.threshold).double().mean().item())
    assert threshold_attack(torch.ones(3), torch.zeros(3), torch.tensor([1.0, 0.5])).called.tolist() == [True, False]


def test_auc_is_scikit_learns_with_ties() -> None:
    a, b = (torch.randint(6, (40,), generator=torch.Generator().manual_seed(s)).double() for s in (1, 2))
    a = a + 1
    expected = roc_auc_score([1] * 40 + [0] * 40, torch.cat([a, b]))
    assert auc(a, b) == pytest.approx(expected)
    assert (auc(torch.ones(3), torch.zeros(2)), auc(torch.zeros(3), torch.ones(2))) == (1, 0)
    assert auc(torch.ones(3), torch.ones(2)) == 0.5
    assert math.isnan(auc(torch.ones(0), torch.ones(2)))
    assert math.isnan(auc(torch.tensor([math.nan]), torch.ones(2)))
