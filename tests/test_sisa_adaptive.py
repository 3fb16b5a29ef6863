"""Deletions that follow from the models, and noise that hides the shards."""

import numpy as np
import pytest

from vislearn.errors import UserError
from vislearn.sisa_adaptive import PrivateVotes, attack, guess_shard, indicator


class Near:
    """Classes by the nearness of training rows; most certain about the rows it was trained on."""

    classes_ = np.arange(3)

    def __init__(self, x, y):
        self.x, self.y = x, y

    def predict_proba(self, x):
        near = np.exp(-((x[:, None] - self.x[None]) ** 2).sum(-1)) + 1e-12
        return np.stack([near[:, self.y == c].sum(1) for c in range(3)], axis=1) / near.sum(1, keepdims=True)


def clusters(n, seed):
    """Thirty clusters in three classes: whoever loses rows loses whole clusters."""
    centres = np.random.default_rng(0).normal(size=(30, 6))
    generator = np.random.default_rng(seed)
    cluster = generator.integers(0, 30, n)
    return centres[cluster] + 0.4 * generator.normal(size=(n, 6)), cluster % 3


def outcomes(redraw):
    test = clusters(300, 99)
    return [attack(Near, *clusters(120, s + 1), *test, 2, seed=s, redraw=redraw) for s in range(12)]


def test_the_attack_works_on_shards_that_stay():
    kept = outcomes(redraw=False)
    assert np.mean([o.guessed for o in kept]) > 0.6
    assert np.mean([o.indicator for o in kept]) > 0.8
    assert np.mean([o.attacked - o.others for o in kept]) < -0.1


def test_new_shards_take_the_advantage_away():
    redrawn = outcomes(redraw=True)
    assert 0.15 < np.mean([o.indicator for o in redrawn]) < 0.85
    assert abs(np.mean([o.attacked - o.others for o in redrawn])) < 0.05


def test_guess_and_indicator():
    outputs = np.array([[[0.9, 0.1], [0.4, 0.6]], [[0.8, 0.2], [0.2, 0.8]]])
    assert guess_shard(outputs, [0, 1]).tolist() == [0, 1]
    assert guess_shard(outputs, [1, 0]).tolist() == [1, 0]
    assert [indicator(a, 1) for a in ([0.5, 0.6], [0.6, 0.5], [0.5, 0.5])] == [1, 0, 0.5]
    assert indicator([0.1, 0.9, 0.2, 0.9], 2) == 1
    with pytest.raises(UserError, match="at least 2 shards"):
        attack(Near, *clusters(10, 0), *clusters(10, 1), 1, 0)


def test_noisy_votes():
    sure = np.zeros((9, 500, 3))
    sure[..., 2] = 1
    votes = PrivateVotes(epsilon=2.0, budget=1000.0, seed=0)
    assert np.mean(votes.answer(sure) == 2) > 0.99  # nine votes against a noise of scale one
    assert votes.spent == 1000
    with pytest.raises(UserError, match="beyond the budget"):
        votes.answer(sure[:, :1])
    loud = PrivateVotes(epsilon=0.01, budget=5.0, seed=0)
    assert np.mean(loud.answer(sure) == 2) < 0.5
    many = PrivateVotes(epsilon=0.1, budget=1.0, seed=0)
    for _ in range(10):
        many.answer(sure[:, :1])
    with pytest.raises(UserError, match="beyond the budget"):
        many.answer(sure[:, :1])
    for epsilon, budget in ((0, 1), (2, 1), (1, np.inf), (np.nan, 1)):
        with pytest.raises(UserError, match="epsilon"):
            PrivateVotes(epsilon, budget)
