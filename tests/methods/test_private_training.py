"""Private training in place of unlearning: the bound for a group, and what it refuses."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_data import Toy, refusal
from vislearn.methods.private_training import PrivateTraining

from vislearn.forget import RandomForget
from vislearn.learner import Classifier
from vislearn.private import PrivateClassifier
from vislearn.trainer import DEFAULTS, Trainer
from vislearn.updates import fingerprint


def original(epsilon: float | None = 0.5, **more: Any) -> PrivateClassifier:
    """As it comes back from the store; the numbers are those of no training."""
    model = PrivateClassifier("mlp_8", noise_multiplier=1.0, num_classes=2, in_channels=3, image_size=8)
    facts = {"delta": 1e-4, "accountant": "prv", "noise_multiplier": 1.0, "sample_rate": 0.2, "steps": 10}
    model.restore({"privacy": {"epsilon": epsilon, "weights": fingerprint(model.network), **facts, **more}})
    return model


def data(rows: int = 3) -> Toy:
    made = Toy(batch_size=4, val_fraction=0.0, forget=RandomForget(count=rows))
    made.setup()
    return made


def trainer() -> Trainer:
    return Trainer(**{**DEFAULTS, "accelerator": "cpu", "max_epochs": 1})


def test_the_model_stays_and_the_bound_is_reported() -> None:
    model, method = original(), PrivateTraining()
    before = fingerprint(model)
    method.check(model, data())
    unlearned = method.unlearn(model, data(), trainer())
    assert fingerprint(unlearned) == before
    assert isinstance(unlearned, PrivateClassifier)
    assert unlearned.guarantee() is not None
    report = method.report
    assert (report["epsilon"], report["rows"], report["epsilon_rows"]) == (0.5, 3, 1.5)
    assert report["delta_rows"] == pytest.approx(1e-4 * (1 + math.exp(0.5) + math.exp(1.0)))
    assert report["vacuous"] is False
    assert report["unchanged"] is True
    assert report["steps"] == 10
    (said,) = report["warnings"]
    assert "for the 3 rows of the forget set that guarantees (1.5, 0.00054)" in said


def test_a_bound_that_says_nothing_is_called_vacuous() -> None:
    method = PrivateTraining()
    method.unlearn(original(epsilon=6.0), data(), trainer())
    assert method.report["vacuous"] is True
    assert method.report["largest_group"] == 2
    assert "vacuous for the 3 rows" in method.report["warnings"][0]
    assert "up to 2" in method.report["warnings"][0]


def test_without_noise_nothing_is_guaranteed() -> None:
    method = PrivateTraining()
    method.unlearn(original(epsilon=None), data(1), trainer())  # as JSON writes an infinite one
    assert method.report["vacuous"] is True
    assert "nothing is guaranteed" in method.report["warnings"][0]


def test_a_run_tells_of_itself_alone() -> None:
    method = PrivateTraining()
    for rows in (3, 1):
        method.unlearn(original(), data(rows), trainer())
    assert method.report["rows"] == 1
    assert len(method.report["warnings"]) == 1


@pytest.mark.parametrize(("given", "words"), [
    ({"max_epsilon": 1.0}, ["3 rows", "epsilon is 1.5", "--method.max_epsilon=1", "vislearn fit"]),
    ({"max_delta": 5e-4}, ["delta is 0.0005", "--method.max_delta=0.0005"]),
])  # fmt: skip
def test_more_than_the_budget_is_refused(given: dict[str, float], words: list[str]) -> None:
    PrivateTraining(max_epsilon=1.6, max_delta=6e-4).unlearn(original(), data(), trainer())
    said = refusal(lambda: PrivateTraining(**given).unlearn(original(), data(), trainer()))
    assert all(word in said for word in words), said


@pytest.mark.parametrize("given", [{"max_epsilon": 0.0}, {"max_delta": -1.0}, {"max_epsilon": math.nan}])
def test_wrong_arguments(given: dict[str, float]) -> None:
    assert f"--method.{next(iter(given))}" in refusal(lambda: PrivateTraining(**given))


def test_a_model_that_was_not_trained_privately_is_refused() -> None:
    plain = Classifier("mlp_8", num_classes=2, in_channels=3, image_size=8)
    assert "--model=PrivateClassifier" in refusal(lambda: PrivateTraining().check(plain, data()))
    touched = original()
    with torch.no_grad():
        touched.network.head.bias += 1
    for model in (touched, original().fresh()):
        assert "nothing is known" in refusal(lambda m=model: PrivateTraining().unlearn(m, data(), trainer()))


def test_the_trainer_compares_it_with_retrained_models(tmp_path: Path) -> None:
    pytest.importorskip("opacus")
    torch.manual_seed(0)
    model = PrivateClassifier("mlp_8", noise_multiplier=1.0, num_classes=2, in_channels=3, image_size=8, delta=1e-2)
    trainer().fit(model, datamodule=Toy(batch_size=4, val_fraction=0.0))
    unlearned, comparison = trainer().unlearn(model, data(1), PrivateTraining())
    assert fingerprint(unlearned) == fingerprint(model)
    row = comparison["methods"][0]
    assert any("unchanged by design" in note for note in row["notes"])
    assert row["flags"] == []
