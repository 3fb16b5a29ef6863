"""k-NN and the linear probe against scikit-learn, at their extremes, and on bad input."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from vislearn.metrics.probe import STRENGTHS, fit_probe, knn, knn_transfer, probe_residual_gap, split_80_20
from vislearn.metrics.representation import DEAD


def clusters(n: int = 120, d: int = 6, k: int = 4, noise: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows around k centres, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(k, d, generator=torch.Generator().manual_seed(99))
    y = torch.arange(n) % k
    return centres[y] + noise * torch.randn(n, d, generator=generator), y


@pytest.mark.parametrize("k", [1, 5, 8])
def test_knn_is_scikit_learns(k: int) -> None:
    (bank, bank_y), (query, query_y) = clusters(noise=2), clusters(60, noise=2, seed=1)
    theirs = KNeighborsClassifier(k, metric="cosine").fit(bank.numpy(), bank_y.numpy())
    found = knn(bank, bank_y, query, query_y, k)
    np.testing.assert_array_equal(found.predicted, theirs.predict(query.numpy()))
    assert found.accuracy == pytest.approx(theirs.score(query.numpy(), query_y.numpy()))
    assert 0.3 < found.accuracy < 1
    assert torch.equal(knn(bank, bank_y, query, query_y, k, chunk=7).predicted, found.predicted)


def test_knn_looks_at_directions_and_not_at_lengths() -> None:
    (bank, y), (query, query_y) = clusters(), clusters(seed=1)
    length = torch.rand(len(query), 1, generator=torch.Generator().manual_seed(5)) + 0.1
    assert torch.equal(knn(bank, y, query * length, query_y).predicted, knn(bank, y, query, query_y).predicted)


def test_the_lowest_class_wins_a_tied_vote() -> None:
    bank = torch.tensor([[1.0, 0], [1, 0.1], [1, 0.2], [1, 0.3]])
    found = knn(bank, torch.tensor([3, 1, 3, 1]), torch.tensor([[1.0, 0]]), torch.tensor([1]), k=4)
    assert found.predicted is not None
    assert found.predicted.tolist() == [1]
    assert knn(bank, torch.tensor([3, 1, 3, 1]), bank, torch.tensor([3, 1, 3, 1]), k=1).accuracy == 1
    assert knn(bank, torch.tensor([3, 1, 3, 1]), bank, torch.tensor([1, 1, 1, 1]), k=99).accuracy == 1


def test_a_data_set_is_split_80_20_by_its_seed() -> None:
    x, y = clusters()
    bank, asked = split_80_20(len(x))
    assert (len(bank), len(asked)) == (96, 24)
    assert sorted(torch.cat([bank, asked]).tolist()) == list(range(120))
    order = torch.randperm(120, generator=torch.Generator().manual_seed(2))
    assert torch.equal(bank, order[:96])
    assert knn_transfer(x, y).accuracy == knn(x[bank], y[bank], x[asked], y[asked]).accuracy
    other_bank, _ = split_80_20(len(x), seed=3)
    assert not torch.equal(bank, other_bank)


def test_a_share_of_the_bank_may_do() -> None:
    x, y = clusters(noise=2)
    before = torch.get_rng_state()
    few = knn_transfer(x, y, bank_share=0.1)
    assert few.accuracy < knn_transfer(x, y).accuracy
    assert few.accuracy == knn_transfer(x, y, bank_share=0.1).accuracy
    assert torch.equal(before, torch.get_rng_state())


def test_the_probe_is_scikit_learns_at_the_strength_it_chose() -> None:
    (x, y), (query, query_y) = clusters(noise=2.5), clusters(noise=2.5, seed=1)
    probe = fit_probe(x * torch.tensor([1, 100, 1, 1, 1, 0.01]), y)
    scaler = StandardScaler().fit(x.numpy())
    theirs = LogisticRegression(C=1 / (len(x) * probe.strength), max_iter=1000).fit(scaler.transform(x.numpy()), y)
    found = probe.score(query * torch.tensor([1, 100, 1, 1, 1, 0.01]), query_y)
    assert found.accuracy == pytest.approx(theirs.score(scaler.transform(query.numpy()), query_y), abs=0.01)
    assert 0.4 < found.accuracy < 1


def test_the_strength_is_the_strongest_of_the_best_on_the_validation_slice() -> None:
    x, y = clusters(noise=2.5)
    fit, held = split_80_20(len(x), 0)
    scaler = StandardScaler().fit(x[fit].numpy())
    scores = {}
    for strength in STRENGTHS:
        model = LogisticRegression(C=1 / (len(fit) * strength), max_iter=1000).fit(scaler.transform(x[fit]), y[fit])
        scores[strength] = model.score(scaler.transform(x[held]), y[held])
    best = max(scores.values())
    probe = fit_probe(x, y)
    assert probe.validation == pytest.approx(best)
    assert probe.strength == max(s for s, score in scores.items() if score == best)
    assert (max(STRENGTHS), min(STRENGTHS), len(STRENGTHS)) == (100, pytest.approx(1e-4), 7)


def test_the_probe_reads_a_class_that_the_head_ignores() -> None:
    (x, y), (query, query_y) = clusters(noise=0.3), clusters(noise=0.3, seed=1)
    hidden = query_y == 3
    assert fit_probe(x, y).score(query[hidden], query_y[hidden]).accuracy == 1
    without = fit_probe(x[y != 3], y[y != 3]).score(query[hidden], query_y[hidden])
    assert without.accuracy == 0
    assert "class 3" in without.warning


def test_twice_is_the_same_and_draws_nothing_from_the_global_generators() -> None:
    x, y = clusters(noise=2.5)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, second = (fit_probe(x, y).score(x, y) for _ in range(2))
    assert first.accuracy == second.accuracy
    assert torch.equal(torch_state, torch.get_rng_state())
    np.testing.assert_array_equal(numpy_state, np.random.get_state()[1])


def test_dead_or_broken_features_give_a_reason_and_no_accuracy() -> None:
    x, y = clusters()
    for bad, words in ((torch.full_like(x, 0.1), DEAD), (x.where(x != x[0, 0], math.nan), "not finite")):
        for found in (knn(bad, y, x, y), fit_probe(bad, y).score(x, y), knn_transfer(bad, y)):
            assert math.isnan(found.accuracy)
            assert words in found.reason
            assert found.predicted is None
    assert "not finite" in fit_probe(x, y).score(x * math.inf, y).reason


def test_what_cannot_be_learnt_is_said() -> None:
    x, y = clusters()
    assert "one class" in fit_probe(x, torch.zeros_like(y)).reason
    assert "too few" in fit_probe(x[:9], y[:9]).reason
    assert "no labelled rows" in knn(x[:0], y[:0], x, y).reason
    assert "no rows to ask" in knn(x, y, x[:0], y[:0]).reason
    assert "no rows to ask" in fit_probe(x, y).score(x[:0], y[:0]).reason
    rare = knn(x[:6], y[:6], x, y)  # two rows at most of each class
    assert "fewer than 3 labelled rows of 4 classes" in rare.warning
    assert not knn(x, y, x, y).warning
    assert "not converged after 1 steps" in fit_probe(x, y, iterations=1).warning


def test_a_dead_unit_does_no_harm() -> None:
    x, y = clusters()
    assert fit_probe(torch.cat([x, torch.zeros(len(x), 3)], 1), y).validation == fit_probe(x, y).validation


def test_what_does_not_belong_together_is_refused() -> None:
    x, y = clusters()
    with pytest.raises(ValueError, match="features"):
        knn(x, y[:-1], x, y)
    with pytest.raises(ValueError, match="classes"):
        fit_probe(x, y.float())
    with pytest.raises(ValueError, match="-1"):
        knn(x, y - 1, x, y)
    with pytest.raises(ValueError, match="one layer"):
        knn(x, y, x[:, :2], y)


def test_the_residual_gap_has_a_sign() -> None:
    assert probe_residual_gap(1.0, 0.98) == pytest.approx(2)
    assert probe_residual_gap(0.96, 0.98) == pytest.approx(-2)
