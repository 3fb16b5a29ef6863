"""RMU: what is steered, what is kept, and what does not change at all."""

import copy
from typing import Any

import pytest
import torch
from lightning import seed_everything
from test_zoo import CLASSES, Tiny, learner, trainer
from torch import Tensor, nn
from torch.nn import functional as F
from toy_data import refusal
from toy_trained import accuracy, rows, tiny, trained
from vislearn.methods.rmu import RMU, by_position, output_of, parameters_of

from vislearn.forget import RandomForget
from vislearn.learner import Classifier, Learner
from vislearn.measure import layers
from vislearn.method import frozen_copy


def unlearn(method: RMU, original: Learner, data: Tiny, **options: Any) -> Learner:
    method.check(original, data)
    seed_everything(3, verbose=False)
    return method.unlearn(copy.deepcopy(original), data, trainer(**options))


@pytest.mark.parametrize("kind", ["batch norm", "vit"])
def test_the_forget_set_is_steered_and_the_retain_set_stays(kind: str) -> None:
    data, original = tiny(), trained(kind)
    method: Any = RMU(epochs=6, lr=2e-3 if kind == "vit" else 5e-3)
    directions: list[Tensor] = []
    steering = method.steering
    method.steering = lambda h: directions.append(steering(h)) or directions[-1]
    unlearned = unlearn(method, original, data)
    assert len(directions) == 1
    with torch.no_grad():
        x_f, x_r = rows(data, "forget")[0], rows(data, "retain")[0]
        before, after = (F.cosine_similarity(method.activations(m, x_f), directions[0], dim=-1).mean()
                         for m in (original.eval(), unlearned.eval()))  # fmt: skip
        h_r, h_o = (method.activations(m, x_r) for m in (unlearned, original))
    assert after > before + 0.5 * (1 - before)
    assert (h_r - h_o).square().mean() < 0.5 * h_o.square().mean()
    assert accuracy(unlearned, data, "retain") > 0.9
    report = method.report
    assert report["forget_loss_last"] < 0.7 * report["forget_loss_first"]
    assert report["retain_drift"] < 0.5
    assert report["c"] == pytest.approx(float(directions[0].norm()))
    assert 0 <= report["predictions_kept"] <= 1
    assert not any(name in vars(method) for name in ("seen", "model", "original"))


def test_only_the_layer_and_those_before_it_change() -> None:
    data, original = tiny(RandomForget(0.2)), learner("batch norm")
    unlearned = unlearn(RMU(layer="layer2", updated=1, weight_decay=0.1), original, data)
    before = original.state_dict()
    changed = {k for k, v in unlearned.state_dict().items() if not torch.equal(v, before[k])}
    assert changed
    assert all(k.startswith("network.layer2.") for k in changed)
    assert not any("running" in k for k in changed)  # train_mode is off
    two = unlearn(RMU(layer="layer2", updated=2), original, data).state_dict()
    assert {k.split(".")[1] for k in two if not torch.equal(two[k], before[k])} == {"layer1", "layer2"}


def test_frozen_flags_come_back() -> None:
    data, original = tiny(RandomForget(0.2)), learner("batch norm")
    original.network.layer1.requires_grad_(False)
    unlearned = unlearn(RMU(epochs=1), original, data)
    assert [p.requires_grad for p in unlearned.parameters()] == [p.requires_grad for p in original.parameters()]
    assert torch.equal(unlearned.network.layer1[0].conv1.weight, original.network.layer1[0].conv1.weight)
    assert not any(m._forward_hooks for m in unlearned.modules())


@pytest.mark.parametrize(
    ("arch", "middle", "first"),
    [("resnet8", "layer2", "layer1."), ("vit_tiny_cifar", "blocks.3", "blocks.1."), ("cnn", "body.6", "body.0."),
     ("mlp", "body.3", "body.0.")],
)  # fmt: skip
def test_the_middle_layer_is_the_default(arch: str, middle: str, first: str) -> None:
    model = Classifier(arch=arch, num_classes=CLASSES, in_channels=1, image_size=8)
    name, updated = RMU().steered(model)
    assert name == middle
    names = {id(p): n.removeprefix("network.") for n, p in model.named_parameters()}
    found = [names[id(p)] for p in updated]
    assert found[0].startswith(first)
    assert len(set(found)) == len(found)
    before = [n for n in names.values() if n.startswith(("head", "layer3", "blocks.4", "body.8"))]
    assert not set(found) & set(before)


def test_an_activation_function_owns_what_feeds_it() -> None:
    model = Classifier(arch="cnn", num_classes=CLASSES, in_channels=1, image_size=8)
    stages = layers(model)
    body: Any = model.network.body
    found = parameters_of(model, stages, "body.6")
    assert [id(p) for p in found] == [id(p) for p in [*body[4].parameters(), *body[5].parameters()]]


def test_the_loss_is_worked_by_hand() -> None:
    original, data = learner("group norm"), tiny()
    method = RMU(c=2.0, alpha=3.0, layer="layer3")
    method.original, method.model, method.name = frozen_copy(original), copy.deepcopy(original).eval(), "layer3"
    with torch.no_grad():
        next(method.model.network.layer3.parameters()).mul_(1.1)
    (x_f, _), (x_r, _) = rows(data, "forget"), rows(data, "retain")
    loss = method.training_step({"forget": (x_f, None), "retain": (x_r, None)}, 0)  # no label is read
    target = method.target
    assert target is not None
    assert float(target.norm()) == pytest.approx(2.0)
    assert (target >= 0).all()
    h_f, h_r = (method.model.network.forward_features(x) for x in (x_f, x_r))
    h_o = original.eval().network.forward_features(x_r)
    expected = (h_f - target[None, :, None, None]).square().mean() + 3 * (h_r - h_o).square().mean()
    torch.testing.assert_close(loss, expected)
    again = method.training_step({"forget": (x_f, None), "retain": (x_r, None)}, 1)
    assert torch.equal(loss, again)  # the direction stays


def test_the_adaptive_length_is_a_multiple_of_the_activations_own() -> None:
    torch.manual_seed(0)
    h = torch.randn(5, 7, 3)
    found = RMU(beta=4.0).steering(h)
    assert float(found.norm()) == pytest.approx(4 * float(h.norm(dim=2).mean()))
    method = RMU()
    method.name = "layer2"
    assert "another --method.layer" in refusal(lambda: method.steering(torch.zeros(5, 7, 3)))


def test_positions_are_pixels_tokens_or_one() -> None:
    maps, tokens = torch.rand(2, 3, 4, 5), torch.rand(2, 6, 3)
    assert torch.equal(by_position(maps)[1, 7], maps[1, :, 1, 2])
    assert torch.equal(by_position(tokens), tokens)
    assert by_position(torch.rand(2, 3)).shape == (2, 1, 3)
    assert by_position(tokens.bfloat16()).dtype == torch.float32


def test_pooled_steers_the_mean_over_positions() -> None:
    original, data = learner("vit"), tiny()
    method = RMU(pooled=True)
    method.name = "blocks.1"
    x, _ = rows(data, "forget")
    pooled, each = method.activations(original.eval(), x), RMU.activations(_named(RMU(), "blocks.1"), original, x)
    torch.testing.assert_close(pooled, each.mean(1, keepdim=True))
    unlearn(RMU(pooled=True, epochs=1), original, data)


def _named(method: RMU, name: str) -> RMU:
    method.name = name
    return method


def test_nothing_behind_the_layer_runs() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4))
    calls: list[int] = []
    net[2].register_forward_hook(lambda *_: calls.append(1))
    x = torch.rand(5, 2)
    found = output_of(net, net[1], x)
    assert torch.equal(found, net[:2](x))
    assert not calls
    assert not net[1]._forward_hooks


def test_a_regressor_is_steered_too() -> None:
    data, original = tiny(RandomForget(0.3), True), learner("regressor")
    unlearned = unlearn(RMU(epochs=1), original, data)
    assert not torch.equal(unlearned.network.layer2[0].conv1.weight, original.network.layer2[0].conv1.weight)


def test_it_says_that_the_head_answers_as_before() -> None:
    method = RMU()
    method.name, method.target = "layer2", torch.ones(3)
    method.first, method.last = torch.tensor(4.0), (torch.tensor(1.0), torch.tensor(0.1))
    for kept, said in ((0.9, True), (0.1, False)):
        method.report.clear()
        method.report["predictions_kept"], method.target = kept, torch.ones(3)
        method.tell(1)
        assert any("as before" in text for text in method.report.get("warnings", [])) == said


def test_it_says_that_nothing_moved() -> None:
    method = RMU(epochs=1, lr=1e-9)
    unlearn(method, learner("batch norm"), tiny())
    assert any("hardly moved" in text for text in method.report["warnings"])
    method.lr, method.alpha = 0.03, 0.0
    unlearn(method, learner("batch norm"), tiny())
    assert not any("hardly moved" in text for text in method.report["warnings"])
    assert any("retain set" in text for text in method.report["warnings"])


def test_wrong_options_are_refused() -> None:
    assert "--method.c" in refusal(lambda: RMU(c=0.0))
    assert "--method.beta" in refusal(lambda: RMU(beta=-1.0))
    assert "--method.alpha" in refusal(lambda: RMU(alpha=-1.0))
    assert "--method.updated" in refusal(lambda: RMU(updated=0))
    data, model = tiny(), learner("batch norm")
    message = refusal(lambda: RMU(layer="layer9").check(model, data))
    assert "layer9" in message
    assert "layer1, layer2, layer3" in message
    assert "frozen" in refusal(lambda: RMU().check(model.requires_grad_(False), data))
