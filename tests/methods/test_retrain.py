"""Retraining as a method: new weights, the recipe's training, and the warm start that is none."""

from typing import Any

import pytest
import torch
from lightning import seed_everything
from test_zoo import RULES, Tiny, learner
from toy_stream import line, quiet_trainer
from vislearn.methods.retrain import Retrain, new_weights

from vislearn.errors import UserError
from vislearn.learner import Learner
from vislearn.trainer import Trainer


def data(**kwargs: Any) -> Tiny:
    made = Tiny(forget=RULES["class"], **kwargs)
    made.setup()
    return made


def retrain(method: Retrain, model: Learner, trainer: Trainer | None = None, seed: int = 3) -> Learner:
    seed_everything(seed, verbose=False)
    return method.unlearn(model, data(), trainer or quiet_trainer(max_epochs=2))


def same(a: Learner, b: Learner) -> bool:
    return all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_new_weights_are_not_the_originals_first_ones_even_with_its_seed() -> None:
    model = learner("batch norm")  # seeded with 1
    seed_everything(1, verbose=False)
    assert same(model.fresh(), model)
    seed_everything(1, verbose=False)
    new = new_weights(model)
    pairs = zip(new.named_parameters(), model.parameters(), strict=True)
    assert all(not torch.equal(p, q) for (name, p), q in pairs if p.ndim > 1)
    seed_everything(1, verbose=False)
    assert same(new_weights(model), new)


def test_it_is_the_training_of_fit() -> None:
    model = learner("batch norm")
    unlearned = retrain(Retrain(), model)
    seed_everything(3, verbose=False)
    fitted = new_weights(model)
    quiet_trainer(max_epochs=2).fit(fitted, datamodule=data())
    assert same(unlearned, fitted)
    assert same(model, learner("batch norm"))
    assert unlearned.spec == model.spec


def test_its_length_is_the_recipes_unless_it_is_given() -> None:
    method, trainer = Retrain(), quiet_trainer(max_epochs=3)
    retrain(method, learner("batch norm"), trainer)
    assert method.report == {"epochs": 3, "lr": 0.1, "start": "new weights"}
    retrain(method, learner("batch norm"), trainer)
    assert trainer.max_epochs == method.report["epochs"] == 3
    method = Retrain(epochs=1)
    one = retrain(method, learner("batch norm"), trainer)
    assert method.report["epochs"] == 1
    assert same(one, retrain(Retrain(), learner("batch norm"), quiet_trainer(max_epochs=1)))


@pytest.mark.parametrize("limit", [{"max_epochs": -1}, {"max_steps": 5}, {"max_epochs": None, "max_steps": 5}])
def test_a_recipe_without_a_length_is_refused(limit: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"--method\.epochs"):
        retrain(Retrain(), learner("batch norm"), quiet_trainer(**limit))


def test_a_warm_start_keeps_all_but_the_last_layer_and_says_so() -> None:
    model = learner("batch norm")
    before = {name: p.clone() for name, p in model.named_parameters()}
    method = Retrain(epochs=1, lr=1e-9, warm_start=True)
    after = retrain(method, model)
    changed = {name for name, p in after.named_parameters() if not torch.allclose(p, before[name], atol=1e-6)}
    assert changed == {"network.head.weight", "network.head.bias"}
    assert "not the retrained model" in method.report["warnings"][0]
    assert method.report["lr"] == 1e-9
    assert after.lr == 0.1


def test_a_warm_start_needs_a_head() -> None:
    model = line(1.0)
    Retrain().check(model, data())
    with pytest.raises(UserError, match="names none"):
        Retrain(warm_start=True).check(model, data())


@pytest.mark.parametrize("augment", [True, False])
def test_augmentation_can_be_left_out(augment: bool) -> None:
    seen = []

    class Watched(Tiny):
        def loader(self, *args: Any, **kwargs: Any) -> Any:
            seen.append(self.augment)
            return super().loader(*args, **kwargs)

    watched = Watched(forget=RULES["class"])
    Retrain(augment=augment).unlearn(learner("batch norm"), watched, quiet_trainer())
    assert seen == [augment]
    assert watched.augment


def test_what_is_frozen_stays_frozen() -> None:
    model = learner("batch norm")
    model.network.conv1.requires_grad_(False)
    model.eval()
    seed_everything(3, verbose=False)
    start = new_weights(model)
    after = retrain(Retrain(), model)
    assert [p.requires_grad for p in after.parameters()] == [p.requires_grad for p in model.parameters()]
    assert torch.equal(after.network.conv1.weight, start.network.conv1.weight)
    assert not torch.equal(after.network.head.weight, start.network.head.weight)
    assert not any(m.training for m in after.modules())
    assert all(p.grad is None for p in after.parameters())


@pytest.mark.parametrize("wrong", [{"epochs": 0}, {"lr": 0.0}, {"lr": -1.0}])
def test_wrong_options_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"--method\.{next(iter(wrong))}"):
        Retrain(**wrong)
