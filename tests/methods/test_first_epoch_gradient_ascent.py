"""First-epoch gradient ascent: one epoch up in chosen layers, then down everywhere."""

import pytest
import torch
from lightning import seed_everything
from test_zoo import RULES, Tiny, learner
from torch import nn
from toy_stream import InOrder, Weighted, quiet_trainer
from vislearn.methods.first_epoch_gradient_ascent import FirstEpochGradientAscent

from vislearn.errors import UserError
from vislearn.learner import Learner

PLAIN = {"momentum": 0.0, "weight_decay": 0.0}


def two_units(first: float = 2.0, second: float = 3.0) -> Weighted:
    """x -> second * first * x; the loss of a row is that times its target."""
    net = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        net[0].weight.fill_(first)
        net[1].weight.fill_(second)
    return Weighted(net)


def weights(model: Learner) -> list[float]:
    return [p.item() for p in model.parameters()]


def rows(target_retain: float) -> InOrder:
    one = torch.ones(1, 1)
    return InOrder(1, forget=(one, torch.ones(1)), retain=(one, torch.full((1,), target_retain)))


def unlearn(method: FirstEpochGradientAscent, model: Learner) -> Learner:
    data = Tiny(forget=RULES["random"])
    data.setup()
    method.check(model, data)
    seed_everything(3, verbose=False)
    return method.unlearn(model, data, quiet_trainer())


def test_one_step_up_and_one_down_by_hand() -> None:
    """Up in the first unit: its gradient is 3. Down in both: gradients 3 and 2.3."""
    method = FirstEpochGradientAscent(epochs=1, ascent_lr=0.1, **PLAIN)
    assert weights(method.unlearn(two_units(), rows(1.0), quiet_trainer())) == pytest.approx([2.3, 3.0])
    method = FirstEpochGradientAscent(epochs=2, ascent_lr=0.1, lr=0.01, **PLAIN)
    after = weights(method.unlearn(two_units(), rows(1.0), quiet_trainer()))
    assert after == pytest.approx([2.3 - 0.03, 3.0 - 0.023])


def test_no_momentum_of_the_ascent_is_left_for_the_repair() -> None:
    method = FirstEpochGradientAscent(epochs=3, ascent_lr=0.1, lr=0.1, momentum=0.9, weight_decay=0.0)
    after = method.unlearn(two_units(), rows(0.0), quiet_trainer())  # a target of 0 gives no gradient
    assert weights(after) == pytest.approx([2.3, 3.0])
    assert (method.epochs, method.lr, method.ascending) == (3, 0.1, True)


@pytest.mark.parametrize(
    ("layers", "moved"), [(None, ["network.conv1"]), (["layer3"], ["network.layer3.0.conv1", "network.layer3.0.conv2"])]
)
def test_the_ascent_moves_the_chosen_layers_alone(layers: list[str] | None, moved: list[str]) -> None:
    method = FirstEpochGradientAscent(layers=layers, epochs=1, ascent_lr=0.1, weight_decay=0.5)
    after = unlearn(method, learner("group norm"))
    before = dict(learner("group norm").named_parameters())
    changed = {name for name, p in after.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name in changed if "conv" in name or "head" in name} == {f"{name}.weight" for name in moved}
    assert method.report["layers"] == moved
    assert all(p.requires_grad for p in after.parameters())


def test_one_saliency_mask_holds_for_both_phases() -> None:
    method = FirstEpochGradientAscent(epochs=2, ascent_lr=0.1, saliency=0.3)
    after = unlearn(method, learner("group norm"))
    pairs = list(zip(after.parameters(), learner("group norm").parameters(), strict=True))
    changed = sum(int((p != q).sum()) for p, q in pairs)
    assert 0 < changed <= int(0.3 * sum(p.numel() for p, _ in pairs))
    assert not torch.equal(after.network.head.weight, learner("group norm").network.head.weight)


def test_wrong_options_are_refused() -> None:
    with pytest.raises(UserError, match=r"--method\.ascent_lr"):
        FirstEpochGradientAscent(ascent_lr=0.0)
    with pytest.raises(UserError, match=r"layer9.*--method\.layers"):
        unlearn(FirstEpochGradientAscent(layers=["layer9"]), learner("batch norm"))
    frozen = learner("batch norm")
    frozen.network.conv1.requires_grad_(False)
    with pytest.raises(UserError, match="frozen"):
        unlearn(FirstEpochGradientAscent(), frozen)
