"""Unlearning traces: features, the split by model, the permutation test."""

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from vislearn.metrics.trace import (
    called_first,
    directions,
    halves,
    logistic,
    logit_features,
    seeds_for,
    trace,
    value_features,
    with_activations,
)

N, K = 60, 6


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model(seed: int, shift: float = 0.0, own: float = 0.5) -> Tensor:
    """Features of one model: noise per image, a way of its own to answer, and what its family has in common."""
    g = generator(seed)
    noise, habit = torch.randn(N, K, generator=g), own * torch.randn(K, generator=g)
    return (noise + habit + shift * torch.linspace(-1, 1, K)).double()


def test_features_by_hand() -> None:
    z = torch.tensor([[1.0, 5.0, 3.0, 100.0], [2.0, -1.0, -1.0, 7.0]])
    assert logit_features(z, dropped=[3]).tolist() == [[2, 0, -2], [2, -1, -1]]
    assert logit_features(z[:, :3]).tolist() == [[2, 0, -2], [2, -1, -1]]
    assert logit_features(torch.arange(9.0)[None], ranks=3).tolist() == [[4, 0, -4]]


def test_dropping_a_class_is_renormalising_the_others() -> None:
    z = torch.randn(N, K, generator=generator(0), dtype=torch.float64)
    p = z.softmax(1)[:, 1:]
    renormalised = (p / p.sum(1, keepdim=True)).log()
    torch.testing.assert_close(logit_features(z, [0]), logit_features(renormalised), atol=1e-12, rtol=0)


def test_a_masked_head_leaves_no_trace_once_its_class_is_dropped() -> None:
    z = torch.randn(N, K, generator=generator(0))
    masked = z.clone()
    masked[:, 2] -= 100
    assert torch.equal(logit_features(z, [2]), logit_features(masked, [2]))
    assert not torch.allclose(logit_features(z), logit_features(masked))


def test_features_of_a_regressor() -> None:
    found = value_features(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 0.0]), scale=2.0)
    assert found.tolist() == [[-0.5, 0.5], [1, 1]]
    with pytest.raises(ValueError, match="same rows"):
        value_features(torch.zeros(2), torch.zeros(3), 1.0)


def test_directions_are_shared_and_of_length_one() -> None:
    w = directions(20, 64)
    assert torch.equal(w, directions(20, 64))
    torch.testing.assert_close(w.norm(dim=0), torch.ones(64, dtype=torch.float64))
    a = torch.randn(N, 20, generator=generator(0))
    both = with_activations(model(0), a, w)
    assert both.shape == (N, K + 64)
    torch.testing.assert_close(both[:, K:], a.double() @ w)


@pytest.mark.parametrize("separable", [False, True])
@pytest.mark.parametrize("C", [0.1, 10.0])
def test_logistic_regression_is_scikit_learns(separable: bool, C: float) -> None:
    x = np.random.default_rng(0).normal(size=(90, 4))
    y = np.repeat([1.0, 0.0], [30, 60])
    x[:30] += 6 if separable else 0.5
    x = (x - x.mean(0)) / x.std(0)
    reference = LogisticRegression(C=C, class_weight="balanced", tol=1e-10, max_iter=10000).fit(x, y)
    found = logistic(x, y, C)
    np.testing.assert_allclose(found[:-1], reference.coef_[0], atol=2e-4)
    np.testing.assert_allclose(found[-1], reference.intercept_[0], atol=2e-4)


def test_a_shared_trace_is_found_and_others_answer_for_each_model() -> None:
    found = trace([model(i, 2.0) for i in range(4)], [model(10 + i) for i in range(4)])
    assert found.model_accuracy == 1
    assert found.image_accuracy > 0.8
    assert found.p_value == found.smallest_p == 1 / 35
    assert (found.log_odds[:4] > 0).all()
    assert (found.log_odds[4:] < 0).all()


def test_models_with_nothing_but_habits_of_their_own_are_no_trace() -> None:
    """A split by image would call any two models told apart; the split by model does not."""
    first, second = [model(i, own=3.0) for i in range(4)], [model(10 + i, own=3.0) for i in range(4)]
    found = trace(first, second)
    assert found.p_value > 0.1
    rows = torch.cat([*first, *second])
    label = torch.arange(8).repeat_interleave(N) < 4
    fit = torch.arange(len(rows)) % 2 == 0  # every second image of every model
    fitted = LogisticRegression().fit(rows[fit], label[fit])
    by_image = fitted.score(rows[~fit], label[~fit])
    assert by_image > 0.9
    assert found.image_accuracy < by_image - 0.2


def test_p_value_is_a_rank_among_all_assignments() -> None:
    models = [model(i, 0.6 * (i < 3)) for i in range(6)]
    found = trace(models[:3], models[3:])
    every = []
    for chosen in itertools.combinations(range(6), 3):
        rest = [i for i in range(6) if i not in chosen]
        parts = ([models[i] for i in each] for each in (chosen, rest))
        every.append(trace(*parts, permutations=0).image_accuracy)
    assert found.p_value == np.mean(np.array(every) >= found.image_accuracy - 1e-12)
    assert found.smallest_p == 0.1  # ten ways to divide six models into two threes
    assert math.isnan(trace(models[:3], models[3:], permutations=0).p_value)


def test_random_assignments_count_the_found_one() -> None:
    first, second = [model(i, 3.0) for i in range(5)], [model(10 + i) for i in range(5)]
    found = trace(first, second, permutations=19)  # of 126
    assert found.smallest_p == 1 / 20
    assert 1 / 20 <= found.p_value <= 3 / 20
    again = trace(first, second, permutations=19)
    assert (again.p_value, again.image_accuracy) == (found.p_value, found.image_accuracy)
    assert found.folds == 5


def test_p_values_under_no_difference_are_not_small_too_often() -> None:
    p = [trace([model(100 * k + i) for i in range(3)], [model(100 * k + 10 + i) for i in range(3)]).p_value
         for k in range(20)]  # fmt: skip
    assert sum(v <= 0.1 for v in p) <= 6  # 2 expected
    assert np.mean(p) > 0.3


def test_models_of_one_seed_stay_together() -> None:
    """Three copies of a model must not be fitted on and asked about; with seeds given they are one block."""
    habits = [model(i, own=3.0) for i in range(4)]
    first, second = [habits[0]] * 3 + [habits[1]] * 3, [habits[2]] * 3 + [habits[3]] * 3
    leaking = trace(first, second, permutations=0)
    assert leaking.image_accuracy > 0.95
    seeds = [0, 0, 0, 1, 1, 1]
    honest = trace(first, second, (seeds, seeds), C=1 / 3)  # three times the rows, so a third of C
    assert honest.image_accuracy == pytest.approx(trace(habits[:2], habits[2:], permutations=0).image_accuracy)
    assert honest.folds == 2
    assert honest.smallest_p == 1 / 3  # four blocks, not twelve models


def test_unequal_families_weigh_the_same() -> None:
    found = trace([model(i, 2.0) for i in range(6)], [model(10 + i) for i in range(2)])
    assert found.folds == 2
    assert found.model_accuracy == 1
    constant = [torch.zeros(N, 2)] * 6, [torch.zeros(N, 2)] * 2
    assert trace(*constant).image_accuracy == 0.5  # nothing to go by: chance, not the larger family's share
    assert trace(*constant).p_value == 1


def test_the_control_of_one_family_is_no_better_than_chance() -> None:
    assert halves([model(i, own=2.0) for i in range(4)]).image_accuracy < 0.6
    with pytest.raises(ValueError, match="four seeds"):
        halves([model(i) for i in range(3)])
    with pytest.raises(ValueError, match="four seeds"):
        halves([model(i) for i in range(4)], seeds=[0, 0, 1, 2])


def test_another_model_is_asked_about() -> None:
    first, second = [model(i, 3.0) for i in range(3)], [model(10 + i) for i in range(3)]
    assert called_first(first, second, model(20, 3.0)) > 0.8
    assert called_first(first, second, model(21)) < 0.2


def test_how_many_seeds_a_claim_needs() -> None:
    assert (seeds_for(0.1), seeds_for(0.05), seeds_for(0.01)) == (3, 4, 5)


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ([model(0)], [model(1), model(2)], "two seeds"),
        ([model(0), model(1)], [model(2), model(3)[:5]], "same images"),
        ([model(0), model(1)], [model(2), model(3) * math.nan], "model 3"),
    ],
)
def test_what_cannot_be_told_apart_is_refused(first: list[Tensor], second: list[Tensor], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        trace(first, second)


def test_too_few_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="two classes"):
        logit_features(torch.zeros(3, 3), [0, 1])
    with pytest.raises(ValueError, match="logits"):
        logit_features(torch.zeros(3))


def test_global_random_numbers_stay_where_they_are() -> None:
    state = torch.get_rng_state()
    trace([model(i) for i in range(5)], [model(10 + i) for i in range(5)], permutations=3)
    assert torch.equal(state, torch.get_rng_state())
