"""Metrics and measures of regressors: histograms on common bins, the attack's protocol, the index, quantiles."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vislearn import methods
from vislearn.capabilities import serving
from vislearn.learner import Classifier, Regressor
from vislearn.measure import Bench, Predictions, Subject
from vislearn.measures import regression as measures
from vislearn.metrics.regression import anamnesis_index, attack_shares, common_edges, histogram, pinball


def draws(seed: int, n: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(n, generator=torch.Generator().manual_seed(seed))


def test_a_histogram_adds_up_and_keeps_what_is_beyond() -> None:
    edges = common_edges(torch.tensor([0.0, 10.0]), bins=12, margin=0.1)
    assert edges.tolist() == pytest.approx(list(range(-1, 12)))
    shares = histogram(torch.tensor([-50.0, -0.5, 3.2, 99.0]), edges)
    assert shares.tolist() == [0.5, 0, 0, 0, 0.25, *[0] * 6, 0.25]
    assert histogram(draws(0, 1000, 5), edges).sum() == pytest.approx(1)
    assert len(common_edges(torch.full((3,), 2.0))) == 25, "equal targets have bins too"


def test_broken_values_have_no_histogram() -> None:
    with pytest.raises(ValueError, match="finite"):
        histogram(torch.tensor([1.0, math.nan]), np.arange(3.0))
    with pytest.raises(ValueError, match="finite"):
        common_edges(torch.tensor([math.inf]))


def test_shares_of_an_attack_that_can_tell_and_of_one_that_cannot() -> None:
    small, large = draws(0, 300, 0.05).abs(), 2 + draws(1, 300, 0.05).abs()
    shares = attack_shares(small, large, torch.cat([small[:30], large[:90]]))
    assert shares[:3] == (1, 0, 0.25)
    none = attack_shares(torch.ones(10), torch.ones(10), torch.ones(4))
    assert math.isnan(none.forget)
    assert none.reason


def test_rows_of_the_attack_are_drawn_by_the_seed() -> None:
    sides = [draws(i, 400).abs() for i in range(3)]
    assert attack_shares(*sides, rows=50, seed=1) == attack_shares(*sides, rows=50, seed=1)
    assert attack_shares(*sides, rows=50, seed=1) != attack_shares(*sides, rows=50, seed=2)


def test_unequal_sides_do_not_decide_the_attack() -> None:
    members, others = draws(0, 600).abs(), draws(1, 120).abs()
    assert attack_shares(members, others, members).forget < 0.9  # of one kind, and five times as many


def test_pinball_by_hand() -> None:
    # target 3 against 1 and 5 at levels 0.1 and 0.9: 0.1 * 2 and 0.1 * 2
    assert float(pinball(torch.tensor([[1.0, 5.0]]), torch.tensor([3.0]), [0.1, 0.9])) == pytest.approx(0.4)
    assert float(pinball(torch.tensor([[5.0, 1.0]]), torch.tensor([3.0]), [0.1, 0.9])) == pytest.approx(3.6)
    for shape in ((3, 1), (2, 2), (3,)):
        with pytest.raises(ValueError, match="expected"):
            pinball(torch.zeros(shape), torch.zeros(3), [0.1, 0.9])
    with pytest.raises(ValueError, match="levels"):
        pinball(torch.zeros(3, 1), torch.zeros(3), [1.0])


def test_an_index_leaves_the_models_alone_and_says_when_both_run_out() -> None:
    x = draws(0, 12).view(6, 2)
    y = x.sum(1, keepdim=True)
    batches = [(x[:3], y[:3]), (x[3:], y[3:])]

    def unit(weight: float) -> nn.Linear:
        unit = nn.Linear(2, 1, bias=False)
        nn.init.constant_(unit.weight, weight)
        return unit

    original, near, far = unit(0.9), unit(0.7), unit(0.0)
    found = anamnesis_index(near, far, original, batches, batches, lr=0.05)
    assert found.value == found.unlearned / found.retrained
    assert 0 < found.value < 1
    assert (near.weight[0, 0].item(), far.weight[0, 0].item()) == (pytest.approx(0.7), 0.0)
    assert original.training
    assert anamnesis_index(near, far, original, batches, batches, lr=1e-6, max_epochs=2).value is None
    with pytest.raises(ValueError, match="needs"):
        anamnesis_index(near, far, original, batches, [])


IDS = {"forget": torch.arange(40), "retain": torch.arange(40, 200), "test": torch.arange(60)}


def subject(shift: float, seed: int = 0) -> Subject:
    """A model of 200 training and 60 test rows that misses the rows to forget by about `shift`."""
    y = {"train": torch.linspace(1, 9, 200), "test": torch.linspace(1, 9, 60)}
    outputs = {name: t + draws(seed, len(t), 0.1) for name, t in y.items()}
    outputs["train"][:40] += shift
    return Subject({name: Predictions(outputs[name], y[name], torch.arange(len(y[name]))) for name in y})


def test_histograms_of_all_models_lie_on_the_same_bins() -> None:
    original, moved = subject(0.0), subject(4.0)
    bench = Bench(IDS, original)
    curves = [measures.predictions_on_forget(s, bench).curves["forget/predictions"] for s in (original, moved)]
    assert curves[0].x == curves[1].x
    assert [sum(c.y) for c in curves] == pytest.approx([1, 1])
    means = [sum(x * y for x, y in zip(c.x, c.y, strict=True)) for c in curves]
    assert means[1] - means[0] == pytest.approx(4, abs=0.3)


def test_the_official_attack_and_the_relative_difference() -> None:
    original, moved = subject(0.0), subject(4.0, seed=5)
    bench = Bench(IDS, original)
    found = measures.official_attack(moved, bench).numbers
    assert set(found) == {f"{name}/mia_svc_official" for name in ("forget", "train", "test")}
    apart = measures.relative_to_retrained(moved, original, bench).numbers["forget/relative_difference"]
    y = original.on("forget", IDS).targets
    assert apart == pytest.approx(float((4 / y).median()), rel=0.1)


def test_what_cannot_be_had_is_said() -> None:
    broken = subject(math.nan)
    bench = Bench(IDS, subject(0.0))
    for found in (measures.predictions_on_forget(broken, bench), measures.official_attack(broken, bench),
                  measures.relative_to_retrained(broken, subject(0.0), bench)):  # fmt: skip
        assert not found.numbers
        assert not found.curves
        assert found.notes
    without = Bench({k: v for k, v in IDS.items() if k != "test"}, subject(0.0))
    assert "test rows" in measures.official_attack(subject(0.0), without).notes[0]


def test_methods_that_serve_a_learner() -> None:
    zoo = [getattr(methods, name) for name in methods.__all__]
    regressor = Regressor("mlp", in_channels=1, image_size=2)
    found = serving(regressor, zoo, most=100)
    assert {"FineTune", "SSD", "SCRUB", "NPO", "RandomLabels", "SalUn"} <= set(found)
    assert not {"DELETE", "UNSIR", "DiPO", "AmnesiacML", "AttentionShift"} & set(found)
    assert serving(regressor, zoo) == found[:8]
    assert "DELETE" in serving(Classifier("mlp", num_classes=2, in_channels=1, image_size=2), zoo, most=100)
