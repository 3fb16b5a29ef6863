"""The Streisand checks against scikit-learn, scipy and resampling, and on models that overdo it."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp
from sklearn.metrics import roc_auc_score
from torch import Tensor

from vislearn.metrics.distribution import margin
from vislearn.metrics.streisand import histogram_distance, same_mix, streisand, unusually_wrong

K = 4


def model(n: int, seed: int, right: float = 2.0) -> tuple[Tensor, Tensor]:
    """Logits with so much more for the true class, and the classes."""
    y = torch.arange(n) % K
    noise = torch.randn(n, K, generator=torch.Generator().manual_seed(seed))
    return noise + right * torch.nn.functional.one_hot(y, K), y


def test_alike_rows_raise_no_flag() -> None:
    found = streisand(*model(400, 0), *model(500, 1))
    assert not found.flag
    assert found.low < 0.5 < found.high
    assert found.p_value > 0.01
    assert found.below < 0.03
    assert found.entropy_distance < 0.15


def test_forgetting_too_much_raises_the_flag() -> None:
    found = streisand(*model(400, 0, -1.0), *model(500, 1))
    assert found.flag
    assert 0.8 < found.low < found.auc < found.high <= 1
    assert found.p_value < 1e-6
    assert found.below > 0.1
    assert found.margins[0] < found.margins[1]
    assert found.losses[0] > found.losses[1]


def test_rows_that_are_still_known_raise_none_but_differ() -> None:
    found = streisand(*model(400, 0, 6.0), *model(500, 1))
    assert not found.flag
    assert found.high < 0.5
    assert found.p_value < 1e-6
    assert found.entropy_distance > 0.2


def test_numbers_are_those_of_scikit_learn_and_scipy() -> None:
    (a, y), (b, z) = model(60, 0, 1.0), model(130, 1)
    found = streisand(a, y, b, z)
    p, q = margin(a, y), margin(b, z)
    assert found.auc == pytest.approx(roc_auc_score([1] * 60 + [0] * 130, torch.cat([-p, -q])))
    assert found.p_value == pytest.approx(ks_2samp(p, q, method="asymp").pvalue)
    assert found.losses[0] == pytest.approx(torch.nn.functional.cross_entropy(a.double(), y).item())
    assert found.losses[1] == pytest.approx(torch.nn.functional.cross_entropy(b.double(), z).item())
    confidence = [x.double().softmax(1).gather(1, t[:, None]).flatten().numpy() for x, t in ((a, y), (b, z))]
    assert found.below == pytest.approx((confidence[0] < np.percentile(confidence[1], 1)).mean(), abs=0.02)


def test_saturated_outputs_stay_finite() -> None:
    (a, y), (b, z) = model(50, 0, -900.0), model(120, 1, 900.0)
    found = streisand(a, y, b, z)
    assert found.auc == found.low == found.high == 1
    assert found.losses[0] == pytest.approx(900, abs=5)
    assert all(map(math.isfinite, (*found.margins, *found.losses, found.entropy_distance, found.p_value)))


def test_the_interval_of_the_auc_is_that_of_resampling() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=80) - 0.4, rng.normal(size=120)
    _, low, high = unusually_wrong(a, b)
    drawn = [unusually_wrong(rng.choice(a, 80), rng.choice(b, 120))[0] for _ in range(800)]
    assert (low, high) == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])), abs=0.02)
    assert unusually_wrong(np.zeros(5), np.zeros(7))[0] == 0.5  # ties count one half


def test_too_few_unseen_rows_have_no_percentile() -> None:
    assert math.isnan(streisand(*model(30, 0), *model(99, 1)).below)
    assert math.isfinite(streisand(*model(30, 0), *model(100, 1)).below)
    with pytest.raises(ValueError, match="two rows"):
        streisand(*model(1, 0), *model(50, 1))


def test_histograms_apart_and_together() -> None:
    assert histogram_distance(torch.zeros(5), torch.ones(7), 1.0) == 1
    assert histogram_distance(torch.linspace(0.5, 1, 50), torch.ones(1), 0.3) == 0  # above the top is in the last bin
    assert histogram_distance(torch.tensor([0.0, 1.0]), torch.tensor([0.0]), 1.0) == 0.5


def test_unseen_rows_get_the_mix_of_the_forget_set() -> None:
    forget, unseen = torch.tensor([0] * 30 + [1] * 10), torch.tensor([0, 1, 2] * 60)
    asked, beside = same_mix(forget, unseen)
    assert torch.equal(asked, torch.arange(40))
    assert torch.bincount(unseen[beside]).tolist() == [60, 20]
    assert len(beside.unique()) == len(beside)
    assert torch.equal(beside, same_mix(forget, unseen)[1])
    assert not torch.equal(beside, same_mix(forget, unseen, seed=1)[1])


def test_classes_without_unseen_rows_are_left_out() -> None:
    asked, beside = same_mix(torch.tensor([0, 3, 0, 3]), torch.tensor([0, 0, 1]))
    assert (asked.tolist(), beside.tolist()) == ([0, 2], [0, 1])
    assert [len(t) for t in same_mix(torch.tensor([2, 2]), torch.tensor([0, 1]))] == [0, 0]
