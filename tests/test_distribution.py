"""KLoM and the challenge's forgetting quality against slow references, at their edges, and under no difference."""

import math
import time

import numpy as np
import pytest
import torch
from scipy import stats

from vislearn.metrics.distribution import (
    EPSILON_CAP,
    final_score,
    forgetting_quality,
    halves,
    klom,
    margin,
    sample_epsilon,
)


def normal(models: int, samples: int, seed: int, shift: float = 0.0, width: float = 1.0) -> np.ndarray:
    return shift + width * np.random.default_rng(seed).normal(size=(models, samples))


def test_margin_is_the_log_odds_of_the_true_class() -> None:
    logits = torch.randn(3, 7, 4, generator=torch.Generator().manual_seed(0))
    y = torch.arange(7) % 4
    p = logits.double().softmax(-1).gather(-1, y.expand(3, 7)[..., None])[..., 0]
    before = logits.clone()
    torch.testing.assert_close(margin(logits, y), (p / (1 - p)).log())
    assert torch.equal(logits, before)  # the released code writes over its argument
    assert margin(torch.tensor([[2000.0, 0.0]]), torch.tensor([0])).item() == 2000  # a softmax would say infinity


def test_what_has_no_margin() -> None:
    with pytest.raises(ValueError, match="not finite"):
        margin(torch.tensor([[math.nan, 0.0]]), torch.tensor([0]))
    with pytest.raises(ValueError, match=r"lie in \[0, 2\)"):
        margin(torch.zeros(1, 2), torch.tensor([2]))
    for shape in ((3,), (3, 1), (2, 3)):
        with pytest.raises(ValueError, match="not logits"):
            margin(torch.zeros(shape), torch.zeros(3, dtype=torch.long))


def reference_klom(p: np.ndarray, q: np.ndarray) -> float:
    edges = np.linspace(min(p.min(), q.min()), max(p.max(), q.max()), 21)
    p, q = (np.histogram(v, edges)[0] / len(v) for v in (p, q))
    return stats.entropy(p, np.where(p > 0, np.maximum(q, 1e-5), q))


def test_klom_is_the_entropy_of_numpys_histograms() -> None:
    u, o = normal(40, 25, 0, 0.5), normal(60, 25, 1)
    expected = [reference_klom(o[:, i], u[:, i]) for i in range(25)]
    np.testing.assert_allclose(klom(u, o), expected)
    np.testing.assert_allclose(klom(o, u, "unlearned_oracle"), expected)
    np.testing.assert_allclose(klom(torch.from_numpy(u), torch.from_numpy(o)), expected)


def test_klom_of_values_on_the_edges_of_bins() -> None:
    u, o = np.linspace(0, 2, 21)[:, None] * [[1, 0.3]], np.linspace(0, 1, 41)[:, None] * [[1, 0.3]]
    np.testing.assert_allclose(klom(u, o), [reference_klom(o[:, i], u[:, i]) for i in range(2)])


def test_klom_ends() -> None:
    u = normal(30, 1, 0)
    assert klom(u, u[::-1]) == pytest.approx(0, abs=1e-4)
    apart = klom(u, u + 50)
    assert 10 < apart < math.log(1e5)
    constant = np.full((5, 1), 2.0)
    assert klom(constant, constant) == pytest.approx(0)
    assert math.isnan(klom(constant, constant, binning="first_release").item())


def test_the_open_bin_loses_the_largest_value() -> None:
    u, o = np.array([[0.0], [0.0], [1.0]]), np.array([[0.0], [0.0], [0.0]])
    assert klom(u, o, "unlearned_oracle").item() > 1
    assert klom(u, o, "unlearned_oracle", "open").item() == pytest.approx(0)
    only = np.array([[1.0], [1.0], [1.0]])
    assert math.isnan(klom(only, o, "unlearned_oracle", "open").item())  # nothing of the first side is left


def test_values_are_clipped_unless_they_have_a_unit() -> None:
    u, o = np.array([[0.0], [500.0]]), np.array([[0.0], [100.0]])
    assert klom(u, o).item() == pytest.approx(0)
    assert klom(u, o, clip=math.inf).item() > 1


def test_the_floor_of_klom_falls_with_the_number_of_models() -> None:
    floors = {n: klom(normal(n, 200, n), normal(n, 200, n + 1)).mean() for n in (20, 50, 100)}
    assert floors[20] == pytest.approx(3.03, abs=0.25)
    assert floors[50] == pytest.approx(0.83, abs=0.15)
    assert floors[100] == pytest.approx(0.35, abs=0.1)
    assert klom(normal(50, 200, 5, 1.0), normal(50, 200, 6)).mean() > 1.5


@pytest.mark.parametrize("score", [klom, forgetting_quality])
def test_too_few_or_broken_models_are_refused(score: object) -> None:
    with pytest.raises(ValueError, match="models a side are needed"):
        score(normal(1, 4, 0), normal(9, 4, 1))
    with pytest.raises(ValueError, match="same samples"):
        score(normal(9, 4, 0), normal(9, 5, 1))
    with pytest.raises(ValueError, match="expected"):
        score(np.zeros(4), np.zeros(4))
    with pytest.raises(ValueError, match="expected"):
        score(np.zeros((9, 0)), np.zeros((9, 0)))
    broken = normal(9, 4, 0)
    broken[2, 1] = math.nan
    with pytest.raises(ValueError, match="1 of 9 models"):
        score(broken, normal(9, 4, 1))


def test_halves_are_disjoint_and_equal() -> None:
    one, other = halves(np.arange(7)[:, None] * 1.0)
    assert (one.ravel().tolist(), other.ravel().tolist()) == ([0, 2, 4], [1, 3, 5])


def reference_epsilon(u: np.ndarray, r: np.ndarray) -> float:
    """Every rule of the published grid, one by one."""
    wide, narrow = max(np.ptp(u), np.ptp(r)), min(np.ptp(u), np.ptp(r))
    if narrow / wide < 0.01:
        return EPSILON_CAP
    rules = []
    p, q = (r, u) if np.median(r) > np.median(u) else (u, r)
    low, high = min(u.min(), r.min()), max(u.max(), r.max())
    for t in np.linspace(low, high, int(np.ceil((high - low) * 100))):
        rules.append((np.mean(p >= t), np.mean(q >= t)))
    a, b = (r, u) if np.ptp(u) >= np.ptp(r) else (u, r)
    start, stop = a.min() + narrow - 2, a.max() + 2
    for right in np.linspace(start, stop, int(np.ceil((stop - start) * 100))):
        left = np.linspace(right - narrow - 2, right - narrow + 2, 400)[:, None]
        rules += zip(*(((v >= left) & (v <= right)).mean(1) for v in (a, b)), strict=True)
    best = 0.0
    for tpr, fpr in set(rules):
        fnr = 1 - tpr
        if fpr == fnr == 0:
            return EPSILON_CAP
        if fpr == 0 or fnr == 0:
            continue
        for x, y in ((fpr, fnr), (fnr, fpr)):
            if x < 1 - 1e-5:
                best = max(best, math.log(1 - 1e-5 - x) - math.log(y))
    return min(best, EPSILON_CAP)


@pytest.mark.parametrize(("models", "shift", "width"), [
    (16, 0.0, 1.0), (16, 0.7, 1.0), (16, 0.0, 0.3), (5, 0.2, 2.0), (16, 9.0, 1.0), (9, 0.0, 6.0), (16, 0.0, 0.001),
])  # fmt: skip
def test_epsilon_is_the_largest_of_the_published_grid(models: int, shift: float, width: float) -> None:
    u, r = normal(models, 2, 7, shift, width), normal(models, 2, 8)
    for i in range(2):
        assert sample_epsilon(u[:, i], r[:, i]) == pytest.approx(reference_epsilon(u[:, i], r[:, i]), abs=1e-9)


def test_epsilon_with_unequal_numbers_of_models() -> None:
    u, r = normal(7, 1, 1, 0.4)[:, 0], normal(20, 1, 2)[:, 0]
    assert sample_epsilon(u, r) == pytest.approx(reference_epsilon(u, r), abs=1e-9)
    assert sample_epsilon(r, u) == pytest.approx(reference_epsilon(r, u), abs=1e-9)


def test_epsilon_at_its_ends() -> None:
    u = normal(20, 1, 0)[:, 0]
    assert sample_epsilon(u, u) == 0
    assert sample_epsilon(u, u + 100) == EPSILON_CAP
    assert sample_epsilon(0 * u, u) == EPSILON_CAP  # a deterministic method
    assert (sample_epsilon(0 * u, 0 * u), sample_epsilon(0 * u, 0 * u + 1)) == (0, EPSILON_CAP)


def test_the_score_halves_with_every_half_of_epsilon_and_ends_at_what_can_be_measured() -> None:
    u, r = normal(16, 40, 3, 0.3), normal(16, 40, 4)
    found = forgetting_quality(u, r)
    assert found.highest == 3  # ceil(log 15)
    points = [2.0 ** -(e // 0.5) if e // 0.5 <= 5 else 0 for e in found.epsilon]
    assert found.score == pytest.approx(np.mean(points))
    assert forgetting_quality(u, u).score == 1
    assert forgetting_quality(u, u + 100).score == 0


def test_equal_distributions_give_a_fifth_and_not_one() -> None:
    for models in (16, 64):
        assert 0.14 < forgetting_quality(normal(models, 100, 1), normal(models, 100, 2)).score < 0.25
    shifted = forgetting_quality(normal(64, 100, 1, 1.0), normal(64, 100, 2)).score
    assert 0.02 < shifted < 0.08


def test_collapsed_samples_are_counted() -> None:
    u = np.concatenate([normal(8, 3, 0), np.zeros((8, 1))], axis=1)
    found = forgetting_quality(u, normal(8, 4, 1))
    assert found.collapsed == 0.25
    assert found.epsilon[3] == EPSILON_CAP


def test_a_sample_costs_milliseconds() -> None:
    u, r = normal(512, 3, 0), normal(512, 3, 1)
    start = time.process_time()
    forgetting_quality(u, r)
    assert (time.process_time() - start) / 3 < 0.1  # about 0.01 on a free core


def test_final_score_by_hand() -> None:
    assert final_score(0.2, (0.9, 1.0), (0.4, 0.8)) == pytest.approx(0.2 * 0.9 * 0.5)
    for bad in (((90.0, 1.0), (0.5, 0.5)), ((0.9, 0.9), (0.5, -0.1))):
        with pytest.raises(ValueError, match="fractions"):
            final_score(0.2, *bad)
    with pytest.raises(ValueError, match="never right"):
        final_score(0.2, (0.9, 0.0), (0.5, 0.5))
