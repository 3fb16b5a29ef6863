"""CF-k: what is trained, what is frozen, and that frozen means bit-identical."""

from typing import Any

import pytest
import torch
from lightning import seed_everything
from test_zoo import RULES, Tiny, learner
from toy_stream import quiet_trainer
from vislearn.methods.cf_k import CFk, last, named, weight_layers
from vislearn.methods.fine_tune import FineTune

from vislearn.errors import UserError
from vislearn.learner import Learner
from vislearn.method import UnlearningMethod

HEAD = {"network.head.weight", "network.head.bias"}


def unlearn(method: UnlearningMethod, model: Learner) -> Learner:
    data = Tiny(forget=RULES["class"])
    data.setup()
    method.check(model, data)
    seed_everything(3, verbose=False)
    return method.unlearn(model, data, quiet_trainer())


def changed(before: Learner, after: Learner) -> set[str]:
    """Names of the parameters and buffers that are not bit-identical."""
    state = after.state_dict()
    return {name for name, value in before.state_dict().items() if not torch.equal(value, state[name])}


def test_frozen_weights_stay_bit_identical_under_momentum_and_weight_decay() -> None:
    after = unlearn(CFk(epochs=3, lr=0.1, momentum=0.9, weight_decay=0.5), learner("batch norm"))
    assert changed(learner("batch norm"), after) == HEAD


def test_adam_leaves_them_too() -> None:
    after = unlearn(CFk(epochs=2, optimizer="adam", weight_decay=0.5), learner("batch norm"))
    assert changed(learner("batch norm"), after) == HEAD


def test_statistics_of_the_frozen_part_move_only_when_asked_to() -> None:
    after = unlearn(CFk(epochs=1, freeze_statistics=False), learner("batch norm"))
    moved = changed(learner("batch norm"), after)
    assert moved > HEAD
    assert {name.rpartition(".")[2] for name in moved - HEAD} == {"running_mean", "running_var", "num_batches_tracked"}


def test_the_live_part_learns_with_its_normalisation() -> None:
    after = unlearn(CFk(k=2, epochs=1), learner("batch norm"))
    block = "network.layer3.0"
    statistics = {f"{block}.bn2.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")}
    weights = {f"{block}.conv2.weight", f"{block}.bn2.weight", f"{block}.bn2.bias"}
    assert changed(learner("batch norm"), after) == HEAD | weights | statistics


def test_layers_count_from_the_output() -> None:
    model = learner("batch norm")
    layers = weight_layers(model)
    assert (layers[0], layers[-1], len(layers)) == ("network.conv1", "network.head", 8)
    assert last(model, 1)[0] == HEAD
    assert last(model, 8)[0] == last(model, -1)[0] == {name for name, _ in model.named_parameters()}
    vit = learner("vit")
    assert last(vit, 1)[0] == HEAD
    behind = {f"network.{name}.{p}" for name in ("blocks.1.mlp.2", "norm") for p in ("weight", "bias")}
    assert last(vit, 2)[0] == HEAD | behind


def test_all_layers_are_fine_tuning() -> None:
    tuned, all_of_them = (unlearn(m, learner("batch norm")) for m in (FineTune(epochs=2), CFk(k=-1, epochs=2)))
    assert not changed(tuned, all_of_them)


def test_layers_can_be_named() -> None:
    model = learner("batch norm")
    parameters, modules = named(model, ["layer3", "head"])
    assert parameters == named(model, ["network.layer3", "network.head"])[0]
    assert parameters > HEAD
    assert "network.layer3.0.bn1" in modules
    assert not any(name.startswith("network.layer2") for name in parameters | modules)
    assert named(model, ["head.bias"]) == ({"network.head.bias"}, set())
    method = CFk(layers=["conv1"], epochs=1)
    after = unlearn(method, model)
    assert changed(learner("batch norm"), after) == {"network.conv1.weight"}
    assert method.report == {"layers": ["network.conv1"], "trained": 144,
                             "parameters": sum(p.numel() for p in model.parameters())}  # fmt: skip


def test_flags_are_given_back() -> None:
    model = learner("batch norm").train()
    model.network.bn1.eval()
    model.network.head.bias.requires_grad_(False)
    modes, flags = [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]
    after = unlearn(CFk(epochs=1), model)
    assert [m.training for m in after.modules()] == modes
    assert [p.requires_grad for p in after.parameters()] == flags
    assert changed(learner("batch norm"), after) == {"network.head.weight"}


@pytest.mark.parametrize("k", [0, -2])
def test_k_outside_its_range_is_refused(k: int) -> None:
    with pytest.raises(UserError, match=r"--method\.k=1"):
        CFk(k=k)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"k": 9}, r"8 layers .* --method\.k=8 at most"), ({"layers": ["layer9"]}, "layer9.*layer3.*network.head")],
)
def test_layers_that_are_not_there_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        unlearn(CFk(**options), learner("batch norm"))


def test_a_frozen_choice_is_refused() -> None:
    model = learner("batch norm")
    model.network.head.requires_grad_(False)
    with pytest.raises(UserError, match="frozen"):
        unlearn(CFk(), model)
