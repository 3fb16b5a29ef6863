"""Equalized odds for votes: small programs by hand, and what must hold for any."""

from itertools import product

import numpy as np
import pytest

from vislearn.errors import UserError
from vislearn.metrics.fair_sisa import (
    FairVotes,
    draws,
    majority,
    majority_probability,
    odds,
    pattern_counts,
    report,
    solve,
    threshold_optimizer,
)

# group 0: votes are right; group 1: half of the positives are missed
VOTE = np.array([0] * 10 + [1] * 10 + [0] * 10 + [0] * 5 + [1] * 5)
LABEL = np.array([0] * 10 + [1] * 10 + [0] * 10 + [1] * 10)
GROUP = np.array([0] * 20 + [1] * 20)


def drawn(constituents, groups=2, n=600, seed=0):
    generator = np.random.default_rng(seed)
    label, group = generator.integers(0, 2, n), generator.integers(0, groups, n)
    right = 0.9 - 0.25 * group / groups
    votes = np.where(generator.random((constituents, n)) < right, label, 1 - label)
    return votes, label, group


def test_odds():
    found = odds(VOTE, LABEL, GROUP)
    assert found["error"] == 5 / 40
    assert found["fpr"] == [0, 0]
    assert found["tpr"] == [1, 0.5]
    assert (found["eo_gap_max"], found["eo_gap_mean"]) == (0.5, 0.25)
    assert odds(np.full(40, 0.3), LABEL, GROUP)["error"] == pytest.approx(0.5)
    assert report({"a": VOTE}, LABEL, GROUP)["a"] == found


def test_the_program_by_hand():
    """Group 0 has to miss as many positives as group 1, or group 1 guesses: 5 more of 40 rows either way."""
    p, objective = solve(pattern_counts(VOTE, LABEL, GROUP, 2))
    assert objective == pytest.approx(10 / 40)
    assert p.shape == (2, 2)
    fair = odds(p[VOTE, GROUP], LABEL, GROUP)
    assert fair["error"] == pytest.approx(objective)
    assert fair["eo_gap_max"] < 1e-9


def test_groups_of_any_size_weigh_the_same_on_request():
    rows = np.r_[np.arange(20), np.tile(np.arange(20, 40), 10)]
    counts = pattern_counts(VOTE[rows], LABEL[rows], GROUP[rows], 2)
    small = solve(pattern_counts(VOTE, LABEL, GROUP, 2))[1]
    assert solve(counts, "groups")[1] == pytest.approx(2 * small)
    assert solve(counts)[1] == pytest.approx(10 * 5 / 220 + 5 / 220)


@pytest.mark.parametrize(("constituents", "groups"), [(1, 2), (3, 2), (4, 3)])
def test_what_each_method_gives(constituents, groups):
    votes, label, group = drawn(constituents, groups)
    simple, each, every = (FairVotes(m).fit(votes, label, group) for m in ("aggregate", "constituents", "ensemble"))
    assert every.objective_ <= simple.objective_ + 1e-9
    for fair in (simple, every):
        found = odds(fair.probability(votes, group), label, group)
        assert found["eo_gap_max"] < 1e-7
        assert found["error"] == pytest.approx(fair.objective_)
    assert len(each.objective_) == constituents
    p = each.probability(votes, group)
    assert np.all((p >= 0) & (p <= 1))
    if constituents == 1:
        assert np.allclose(p, simple.probability(votes, group))
        assert every.objective_ == pytest.approx(simple.objective_)
    assert odds(majority(votes), label, group)["error"] <= simple.objective_ + 1e-9


def test_patterns_that_were_not_seen_take_the_majoritys_probability():
    votes, label, group = drawn(3)
    seen = ~((votes[0] == 1) & (votes[1] == 1) & (votes[2] == 0))
    every = FairVotes("ensemble").fit(votes[:, seen], label[seen], group[seen])
    simple = FairVotes("aggregate").fit(votes[:, seen], label[seen], group[seen])
    asked = np.array([[1, 1], [1, 1], [0, 0]])
    assert np.array_equal(every.probability(asked, [0, 1]), simple.probability(asked, [0, 1]))


def test_many_constituents_count_votes():
    votes, label, group = drawn(13)
    fair = FairVotes().fit(votes, label, group)
    assert fair.probability_.shape == (14, 2)
    assert odds(fair.probability(votes, group), label, group)["eo_gap_max"] < 1e-7


def test_majorities():
    assert majority([[1, 1, 0], [0, 1, 0]]).tolist() == [0, 1, 0]  # a tie is no majority
    p = np.array([[0.2], [0.7], [0.5], [0.9]])
    expected = sum(
        np.prod([q if bit else 1 - q for q, bit in zip(p[:, 0], bits, strict=True)])
        for bits in product((0, 1), repeat=4)
        if sum(bits) > 2
    )
    assert majority_probability(p)[0] == pytest.approx(expected)


def test_draws_cannot_be_averaged_away():
    votes, label, group = drawn(3)
    fair = FairVotes().fit(votes, label, group)
    ids = np.arange(600)
    first = fair.predict(votes, group, ids, b"key", "model")
    assert np.array_equal(first, fair.predict(votes, group, ids, b"key", "model"))
    order = np.random.default_rng(1).permutation(600)
    assert np.array_equal(first[order], fair.predict(votes[:, order], group[order], ids[order], b"key", "model"))
    u = draws(np.arange(4000), b"key", "model")
    assert abs(u.mean() - 0.5) < 0.02
    assert u.min() >= 0
    assert u.max() < 1
    for key, model in ((b"other", "model"), (b"key", "other")):
        assert abs(np.corrcoef(u, draws(np.arange(4000), key, model))[0, 1]) < 0.05


def test_refusals():
    votes, label, group = drawn(3)
    for bad in (lambda: FairVotes("vote"), lambda: FairVotes(weigh="half"),
                lambda: FairVotes().fit(votes + 1, label, group), lambda: FairVotes().fit(votes, label * 2, group),
                lambda: FairVotes().fit(votes, label, group - 1), lambda: FairVotes().fit(votes[:, :0], [], []),
                lambda: odds(label, label, np.where(label == 1, 0, group)),
                lambda: FairVotes().fit(votes, label, group).probability(votes[:2], group),
                lambda: FairVotes().fit(votes, label, group).probability(votes, group + 1)):  # fmt: skip
        with pytest.raises(UserError):
            bad()


def test_thresholds_need_fairlearn():
    votes, label, group = drawn(5)
    score = votes.mean(axis=0)
    try:
        import fairlearn  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match="pip install"):
            threshold_optimizer(score, label, group)
        return
    found = threshold_optimizer(score, label, group).predict(score[:, None], sensitive_features=group, random_state=0)
    assert odds(found, label, group)["eo_gap_max"] < 0.15
