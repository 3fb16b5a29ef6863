"""Attacks on the models before and after: by hand, at their extremes, and what they must not find."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy as scipy_entropy
from torch import Tensor

from vislearn.metrics.pre_post import (
    change_scores,
    deleted_classes,
    fall_of_classes,
    guided,
    pair_attack,
    pair_features,
)
from vislearn.metrics.roc import roc
from vislearn.metrics.signals import logit_scaled

K = 5


def logits(n: int = 40, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(n, K, generator=torch.Generator().manual_seed(seed))


Y = torch.arange(40) % K


def test_scores_of_change_are_what_they_are_called() -> None:
    before, after = logits(seed=1), logits(seed=2)
    p, q = before.double().softmax(1).numpy(), after.double().softmax(1).numpy()
    found = change_scores(before, after, Y)
    np.testing.assert_allclose(found["kl"], scipy_entropy(p, q, axis=1))
    np.testing.assert_allclose(found["l2"], np.linalg.norm(p - q, axis=1))
    own = (np.arange(40), Y.numpy())
    fall = np.log(p[own] / (1 - p[own])) - np.log(q[own] / (1 - q[own]))
    np.testing.assert_allclose(found["phi"], fall, rtol=1e-6)
    assert all((v == 0).all() for v in change_scores(before, before, Y).values())


def test_scores_of_a_regressor_are_of_its_error() -> None:
    found = change_scores(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 1.0]), torch.tensor([0.0, 1.0]))
    assert found["error"].tolist() == [2, -1]
    assert found["l2"].tolist() == [2, 1]


def test_saturated_outputs_give_finite_scores() -> None:
    sure = torch.tensor([[800.0, 0.0, -800.0, 0.0, 0.0]])
    broken = torch.full((1, K), math.nan)
    assert all(v.isnan().all() for v in change_scores(broken, sure, torch.tensor([0])).values())
    assert all(torch.isfinite(v).all() for v in change_scores(sure, sure.flip(1), torch.tensor([0])).values())


def test_forgotten_rows_fall_and_rows_never_seen_do_not() -> None:
    n = 200
    y = torch.arange(n) % K
    seen = torch.arange(n) < n // 2
    easy = 2 * torch.randn(n, generator=torch.Generator().manual_seed(3))

    def model(known: Tensor, seed: int) -> Tensor:
        out = logits(n, seed, 0.5)
        out[torch.arange(n), y] += easy + 2.0 * known
        return out

    before, after = model(seen, 1), model(torch.zeros(n), 2)
    found = change_scores(before, after, y)["phi"]
    alone = logit_scaled(before, y)
    both = roc(found[seen], found[~seen]).auc
    assert both > 0.9
    assert both > roc(alone[seen], alone[~seen]).auc + 0.1
    idle = change_scores(before, model(seen, 4), y)["phi"]
    assert roc(idle[seen], idle[~seen]).auc == pytest.approx(0.5, abs=0.1)


def test_features_of_a_pair_follow_the_order_of_the_model_before() -> None:
    before, after = torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([[5.0, 0.0, 1.0]])
    p, q = before.double().softmax(1)[0], after.double().softmax(1)[0]
    expected = torch.cat([p[[1, 2, 0]], q[[1, 2, 0]], (p - q)[[1, 2, 0]]])
    assert torch.equal(pair_features(before, after)[0], expected)


def test_an_attack_on_pairs_carries_over_to_other_classes() -> None:
    def features(n: int, label: int, fall: float, seed: int) -> Tensor:
        before, after = logits(n, seed, 0.5), logits(n, seed + 1, 0.5)
        before[:, label] += 4
        after[:, label] += 4 - fall
        return pair_features(before, after)

    scores = pair_attack(features(60, 0, 3, 1), features(60, 0, 0, 2), torch.cat([features(30, 3, 3, 5),
                         features(30, 3, 0, 7)]))  # fmt: skip
    assert roc(scores[:30], scores[30:]).auc > 0.95
    with pytest.raises(ValueError, match="shadow pairs"):
        pair_attack(features(3, 0, 3, 1), torch.zeros(0, 3 * K), features(3, 0, 3, 1))


def test_guidance_by_hand() -> None:
    before, after = torch.tensor([[2.0, 1.5, -9.0]]), torch.tensor([[4.0, 1.0, -30.0]])
    found = guided(before, after)
    pre, post = before.double().log_softmax(1), after.double().log_softmax(1)
    assert torch.allclose(found.scores, 2 * pre - post)
    assert found.allowed.tolist() == [[True, True, False]]
    assert found.scores.argmax().item() == 2  # the change of a class that was never possible leads nowhere
    assert found.prediction.tolist() == [1]  # class 1 fell
    assert guided(before, after, weight=1).prediction.tolist() == [0]
    assert guided(before, before, weight=7).prediction.tolist() == [0]
    assert guided(before, after, margin=math.inf).prediction.tolist() == [2]


def test_the_class_that_falls_most_was_deleted() -> None:
    y = torch.arange(100) % K
    before = logits(100, 1, 0.5) + 4 * torch.eye(K)[y]
    after = before.clone()
    after[:, 3] -= 20
    fall = fall_of_classes(before, after)
    assert deleted_classes(before, after) == [3]
    assert fall.sum().item() == pytest.approx(0, abs=1e-12)
    assert fall[3] == pytest.approx(before.double().softmax(1)[:, 3].mean().item(), abs=1e-3)
    after[:, 1] -= 2
    assert deleted_classes(before, after, 2) == [3, 1]


@pytest.mark.parametrize("attack", [
    lambda a, b: change_scores(a, b, Y), pair_features, guided, fall_of_classes,
])  # fmt: skip
def test_both_models_answer_for_the_same_rows(attack: object) -> None:
    with pytest.raises(ValueError, match="same rows"):
        attack(logits(4), logits(5))
    with pytest.raises(ValueError, match="without rows"):
        attack(logits(0), logits(0))
