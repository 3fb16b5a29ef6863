"""The attack of label-agnostic forgetting: rows, features, success by hand, and the measure."""

import math

import pytest
import torch
from torch import Tensor

from vislearn.measure import Bench, Predictions, Subject
from vislearn.measures.label_agnostic import MEASURES, label_agnostic_attack
from vislearn.metrics.laf_attack import attack_rows, laf_attack, sorted_softmax, success, whole_batches


def outputs(rows: int, sharpness: float, seed: int) -> Tensor:
    return sharpness * torch.randn(rows, 10, generator=torch.Generator().manual_seed(seed))


def test_the_official_caps() -> None:
    assert whole_batches(5000, 60_000) == 5024
    assert whole_batches(5000, 5000) == 5000
    rows = attack_rows(outputs(10_000, 1, 0), outputs(10_000, 1, 1), outputs(10_000, 1, 2))
    assert [int(rows.fit_y.sum()), int((~rows.fit_y).sum())] == [5024, 5024]
    assert [int(rows.y.sum()), int((~rows.y).sum())] == [10_000, 4976]
    rows = attack_rows(outputs(40, 1, 0), outputs(100, 1, 1), outputs(33, 1, 2), fitted=20)
    assert [int(rows.fit_y.sum()), int((~rows.fit_y).sum())] == [32, 32]
    assert [int(rows.y.sum()), int((~rows.y).sum())] == [33, 64]  # whole batches: at least as many as forget rows


def test_features_are_sorted_probabilities() -> None:
    found = sorted_softmax(torch.tensor([[math.log(3), 0.0, math.log(6)]]))
    assert found[0].tolist() == pytest.approx([0.1, 0.3, 0.6])
    assert found.dtype == torch.float64


def test_success_by_hand() -> None:
    found = success(torch.tensor([0.9, 0.2, 0.8, 0.6, 0.1, 0.3]), torch.tensor([1, 1, 1, 1, 0, 0]).bool())
    assert found.rate == pytest.approx(5 / 6)
    assert found.balanced == pytest.approx((3 / 4 + 1) / 2)
    assert found.forget == pytest.approx(3 / 4)
    assert found.auc == pytest.approx(7 / 8)
    assert found.rows == (4, 2)


def test_members_that_stand_out_are_found() -> None:
    members, test, forget = outputs(300, 6, 0), outputs(700, 1, 1), outputs(300, 6, 2)
    found = laf_attack(members, test, forget, fitted=300)
    assert found.rate > 0.9
    assert found.balanced > 0.9
    assert found.fitted > 0.95
    assert laf_attack(members, test, forget, fitted=300) == found
    forgotten = laf_attack(members, test, outputs(300, 1, 3), fitted=300)
    assert forgotten.forget < 0.2
    assert forgotten.balanced == pytest.approx(0.5, abs=0.1)


def test_what_cannot_be_attacked_says_why() -> None:
    few = outputs(20, 1, 0)
    assert "none is left" in laf_attack(few, few, few).reason
    assert "the forget set" in laf_attack(few, few, few[:0]).reason
    assert "not finite" in laf_attack(few / 0, few, few).reason
    assert math.isnan(laf_attack(few, few, few).rate)


def subject(forget: Tensor) -> tuple[Subject, Bench]:
    train = torch.cat([forget, outputs(200, 6, 5)])
    predictions = {
        "train": Predictions(train, torch.zeros(len(train), dtype=torch.int64), torch.arange(len(train))),
        "test": Predictions(outputs(200, 1, 6), torch.zeros(200, dtype=torch.int64), torch.arange(200)),
    }
    sets = {"forget": torch.arange(60), "retain": torch.arange(60, 260), "test": torch.arange(200)}
    found = Subject(predictions, "a")
    return found, Bench(sets, found, seed=1)


def test_the_measure() -> None:
    known = label_agnostic_attack(*subject(outputs(60, 6, 7)))
    gone = label_agnostic_attack(*subject(outputs(60, 1, 7)))
    assert not known.notes
    assert set(known.numbers) == {c.key for c in MEASURES[0].columns}
    assert known.numbers["forget/asr_balanced"] > 0.85
    assert gone.numbers["forget/asr_balanced"] == pytest.approx(0.5, abs=0.15)
    broken = label_agnostic_attack(*subject(outputs(60, math.inf, 7)))
    assert not broken.numbers
    assert "not finite" in broken.notes[0]
    assert MEASURES[0].tier == "standard"
