"""Blindspot unlearning: the loss worked by hand, the guard on the blindspot network, and what is left behind."""

import copy
import math
from typing import Any

import pytest
import torch
from few_rows import FewRows, Linear
from lightning import seed_everything
from test_zoo import Tiny, learner, trainer
from torch import Tensor, nn
from toy_data import refusal
from vislearn.methods.blindspot import (
    Blindspot,
    attention_difference,
    attention_map,
    blindspot_loss,
    compared_layers,
    constant_loss,
    per_row,
)

from vislearn.errors import UserError
from vislearn.forget import RandomForget
from vislearn.learner import Classifier, Learner, Regressor
from vislearn.networks_allcnn import AllCNN


def maps(seed: int, n: int = 3, shape: tuple[int, ...] = (5, 4, 4)) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tiny(regression: bool = True) -> Tiny:
    data = Tiny(regression, forget=RandomForget(0.2))
    data.setup()
    return data


class Keeping(Blindspot):
    """Keeps the blindspot network, and its weights before and the batches seen while unlearning."""

    def trained(self, *args: Any) -> Learner:
        self.kept = [super().trained(*args)]  # a list: no part of this module
        self.before = copy.deepcopy(self.kept[0].state_dict())
        self.flags: list[tuple[bool, bool]] = []
        return self.kept[0]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.flags.append((self.model.training, self.kept[0].training))
        return super().training_step(batch, batch_idx)


def unlearn(method: Blindspot, data: Any, original: Learner) -> Learner:
    method.check(original, data)
    seed_everything(3, verbose=False)
    return method.unlearn(copy.deepcopy(original), data, trainer())


def test_an_attention_map_by_hand() -> None:
    z = torch.tensor([[[[3.0, 0.0]], [[0.0, 2.0]]]])  # squares 9 and 4 over two channels: 4.5 and 2
    assert attention_map(z)[0].tolist() == pytest.approx([4.5 / math.hypot(4.5, 2), 2 / math.hypot(4.5, 2)])
    assert attention_map(7 * z)[0].tolist() == pytest.approx(attention_map(z)[0].tolist()), "the scale drops out"
    assert torch.equal(attention_map(torch.zeros(2, 3, 2, 2)), torch.zeros(2, 4)), "a dead layer is no NaN"


def test_no_difference_exceeds_two_over_the_positions() -> None:
    a = torch.tensor([[[1.0, 0.0, 0.0]]])
    b = torch.tensor([[[0.0, 5.0, 0.0]]])
    assert float(attention_difference(a, b)) == pytest.approx(2 / 3), "maps that do not meet reach the bound"
    for seed in range(20):
        shape = (2, 1 + seed % 3, 2)
        assert float(attention_difference(maps(seed, shape=shape), maps(100 + seed, shape=shape))) <= 2 / (shape[1] * 2)


def test_a_single_position_has_neither_value_nor_gradient() -> None:
    for shape in ((6,), (6, 1, 1)):
        a, b = maps(0, shape=shape).requires_grad_(), maps(1, shape=shape)
        difference = attention_difference(a, b)
        assert float(difference) == pytest.approx(0, abs=1e-30)
        assert torch.autograd.grad(difference, a)[0].abs().max() < 1e-14


def test_the_loss_is_the_bracket_form_and_the_mean_over_rows() -> None:
    losses = torch.tensor([1.0, 4.0, 2.0, 8.0, 6.0], dtype=torch.float64)
    forget = torch.tensor([True, False, True, False, False])
    mine, theirs = [maps(0, 2), maps(1, 2, (3, 2, 2))], [maps(2, 2), maps(3, 2, (3, 2, 2))]
    a = sum(float(attention_difference(x, y)) for x, y in zip(mine, theirs, strict=True))
    found = float(blindspot_loss(losses, forget, mine, theirs, 50.0))
    assert found == pytest.approx(2 / 5 * (1.5 + 50 * a) + 3 / 5 * 6)
    assert found == pytest.approx(21 / 5 + 2 / 5 * 50 * a)
    assert float(blindspot_loss(losses, forget, mine, theirs, 0.0)) == pytest.approx(21 / 5)


def test_batches_of_one_set_alone() -> None:
    losses, mine, theirs = torch.tensor([1.0, 3.0]), [maps(0, 2)], [maps(1, 2)]
    assert float(blindspot_loss(losses, torch.zeros(2, dtype=torch.bool), [], [], 50.0)) == 2
    bracket = 2 + 50 * float(attention_difference(mine[0], theirs[0]))
    assert float(blindspot_loss(losses, torch.ones(2, dtype=torch.bool), mine, theirs, 50.0)) == pytest.approx(bracket)


def test_losses_that_spread_to_a_square_are_refused() -> None:
    square = (torch.zeros(4, 1) - torch.zeros(4)).abs()
    with pytest.raises(ValueError, match="one loss a row"):
        blindspot_loss(square, torch.zeros(4, dtype=torch.bool), [], [])
    with pytest.raises(ValueError, match="one loss a row"):
        blindspot_loss(torch.zeros(4), torch.zeros(3, dtype=torch.bool), [], [])
    with pytest.raises(ValueError, match="same shape"):
        attention_difference(maps(0), maps(0, shape=(5, 2, 4)))
    with pytest.raises(ValueError, match="as many layers"):
        blindspot_loss(torch.zeros(2), torch.ones(2, dtype=torch.bool), [maps(0)], [])


@pytest.mark.parametrize("kind", ["regressor", "batch norm"])
def test_a_step_is_the_loss_of_one_pass_over_the_mixed_batch(kind: str) -> None:
    model, blindspot = learner(kind), learner(kind)
    for p in blindspot.parameters():
        p.data.add_(0.01)
    method = Blindspot(beta=3.0)
    method.model, method.blindspot = model.train(), blindspot.eval().requires_grad_(False)
    x = torch.rand(7, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    y = torch.linspace(0, 1, 7) if kind == "regressor" else torch.arange(7) % 4
    batch = {"forget": (x[:3], y[:3]), "retain": (x[3:], y[3:])}
    loss = method.training_step(batch, 0)
    outputs, said = copy.deepcopy(model)(x), blindspot(x[:3])
    target = said if kind == "regressor" else said.softmax(1)
    rows = torch.cat([per_row(model, outputs[:3], target), per_row(model, outputs[3:], y[3:])])
    terms = []
    for name in compared_layers(model):
        seen: list[Tensor] = []
        for net in (copy.deepcopy(model).train(), blindspot):
            handle = compared_layers(net)[name].register_forward_hook(lambda m, i, o: seen.append(o))  # noqa: B023
            net(x)
            handle.remove()
        terms.append(attention_difference(seen[0][:3], seen[1][:3]))
    assert len(terms) == 3
    assert float(loss.detach()) == pytest.approx(float(rows.mean() + 3 / 7 * 3.0 * sum(terms)), rel=1e-5)
    labels_f = {"forget": (x[:3], y[:3].flip(0) * 0), "retain": batch["retain"]}
    assert torch.equal(method.training_step(labels_f, 0), loss), "labels of the forget set have no part in it"
    for empty in ("forget", "retain"):
        one = batch | {empty: (x[:0], y[:0])}
        assert torch.isfinite(method.training_step(one, 0))
    assert not any(m._forward_hooks for net in (model, blindspot) for m in net.modules())


def test_the_blindspot_network_is_frozen_and_nothing_of_it_is_left() -> None:
    data, original = tiny(), learner("regressor")
    method = Keeping(epochs=2, batch_size=16)
    unlearned = unlearn(method, data, original)
    assert method.flags
    assert set(method.flags) == {(True, False)}, "student in train mode, blindspot network in eval mode"
    assert all(torch.equal(v, method.before[k]) for k, v in method.kept[0].state_dict().items())
    assert not any(p.requires_grad for p in method.kept[0].parameters())
    assert not hasattr(method, "blindspot")
    assert not any(m._forward_hooks for m in unlearned.modules())
    assert method.report["layers"] == ["layer1.0", "layer2.0", "layer3.0"]
    assert method.report["skipped_layers"] == []


@pytest.mark.parametrize("loss", ["mse", "l1", "huber"])
def test_the_best_constant_of_values(loss: Any) -> None:
    y = torch.tensor([0.0, 0.0, 1.0, 9.0])  # mean 2.5, median between 0 and 1
    model = Regressor("mlp", loss=loss, in_channels=1, image_size=2)
    least = min(float(model.loss(torch.full_like(y, float(c)), y)) for c in torch.linspace(-1, 10, 1101))
    by_hand = {"mse": (2 * 6.25 + 2.25 + 42.25) / 4, "l1": 2.5, "huber": least}[loss]
    assert constant_loss(model, y) == pytest.approx(by_hand, rel=0.01)


def test_the_best_constant_of_classes_is_their_entropy() -> None:
    model = Classifier("mlp", num_classes=3, in_channels=1, image_size=2)
    y = torch.tensor([0, 0, 0, 1] * 50)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert constant_loss(model, y) == pytest.approx(entropy, abs=0.01)


class Unit(Linear):
    """A linear unit that starts anew with weights of -0.5."""

    def fresh(self) -> "Unit":
        new = Unit(values=True)
        with torch.no_grad():
            new.layer.weight.fill_(-0.5)
        return new


def values() -> tuple[FewRows, Unit]:
    data = FewRows(True, forget=RandomForget(0.2))
    data.setup()
    return data, Unit(values=True)


def test_a_blindspot_network_is_trained_until_it_beats_a_constant() -> None:
    data, model = values()
    method = Blindspot(blindspot_epochs=1, blindspot_lr=0.03, max_blindspot_epochs=300, batch_size=16)
    unlearn(method, data, model)
    report = method.report
    assert 1 < report["blindspot_epochs"] < 300
    assert report["blindspot_loss"] < report["constant_loss"]
    assert not any("constant" in w for w in report.get("warnings", []))
    longer = Blindspot(blindspot_epochs=report["blindspot_epochs"] + 5, blindspot_lr=0.03, batch_size=16)
    unlearn(longer, data, model)
    assert longer.report["blindspot_epochs"] == report["blindspot_epochs"] + 5


def test_one_that_never_does_is_named_with_numbers() -> None:
    data, model = values()
    method = Blindspot(blindspot_lr=1e-6, max_blindspot_epochs=3)
    unlearn(method, data, model)
    (warning,) = [w for w in method.report["warnings"] if "constant" in w]
    assert method.report["blindspot_epochs"] == 3
    assert f"{method.report['blindspot_loss']:.4g}" in warning
    assert f"{method.report['constant_loss']:.4g}" in warning
    assert "--method.max_blindspot_epochs" in warning
    unlearn(method := Blindspot(blindspot_lr=1e-6, max_blindspot_epochs=1), data, model)
    assert method.report["blindspot_epochs"] == 2, "never fewer than blindspot_epochs"


def test_a_blindspot_network_that_diverges_is_named() -> None:
    data, model = values()
    with pytest.raises(UserError, match=r"blindspot network diverged.*--method\.blindspot_lr"):
        unlearn(Blindspot(blindspot_lr=1e30, batch_size=8), data, model)


def test_a_network_without_maps_is_told_so() -> None:
    data, model = values()
    unlearn(method := Blindspot(), data, model)
    assert any("no attention map" in w for w in method.report["warnings"])
    unlearn(method := Blindspot(beta=0.0), data, model)
    assert not any("no attention map" in w for w in method.report.get("warnings", []))


def test_forget_rows_come_to_be_answered_like_the_blindspot_network() -> None:
    data, original = values()
    x = torch.cat([x for x, _ in data.loader("forget", train=False)])
    with torch.no_grad():
        original.layer.bias.add_(5.0)
        before = original(x)
    method = Keeping(epochs=20, batch_size=8, lr=0.05, blindspot_epochs=5, blindspot_lr=0.05)
    after = unlearn(method, data, original)
    with torch.no_grad():
        said = method.kept[0](x)
        apart = [(z - said).abs().mean().item() for z in (before, after(x))]
    assert apart[1] < 0.3 * apart[0]


def test_tokens_are_positions() -> None:
    data = tiny(regression=False)
    method = Blindspot(batch_size=32)
    unlearn(method, data, learner("vit"))
    assert method.report["layers"] == ["blocks.0", "blocks.1"]
    z = torch.zeros(2, 16, 48)
    assert method.by_channel(z).shape == (2, 48, 16)
    method.tokens = False
    assert method.by_channel(z) is z


def test_layers_that_are_compared() -> None:
    assert list(compared_layers(learner("regressor"))) == ["layer1.0", "layer2.0", "layer3.0"]
    assert list(compared_layers(learner("regressor"), ["layer2", "head"])) == ["layer2", "head"]
    net = Classifier("mlp", num_classes=3, in_channels=1, image_size=2)
    net.network = AllCNN(1, 1, "batch", width=2)
    assert len(compared_layers(net)) == 8
    assert "layer1.0" in refusal(lambda: compared_layers(learner("regressor"), ["layer9"]))
    data, method = tiny(), Blindspot(layers=["layer1", "head"], batch_size=32)
    unlearn(method, data, learner("regressor"))
    assert method.report["skipped_layers"] == ["head"]
    assert any("head" in w and "single position" in w for w in method.report["warnings"])


def test_own_networks_are_compared_at_their_activations() -> None:
    class Own(Learner):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(1))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        features = forward

        def loss(self, outputs: Tensor, y: Tensor, reduction: Any = "mean") -> Tensor:
            return outputs.sum()

    assert list(compared_layers(Own())) == ["net.1"]


def test_beta_in_standard_deviations_follows_the_targets() -> None:
    data, model = tiny(), learner("regressor")
    y = data.labels(True).targets[data.ids("train")]
    method = Blindspot(beta=2.0, beta_unit="std", batch_size=32)
    unlearn(method, data, model)
    assert method.report["beta"] == pytest.approx(2 * float(y.std()) ** 2, rel=1e-4)
    model.loss_name = "l1"  # type: ignore[union-attr]
    method.unlearn(copy.deepcopy(model), data, trainer())
    assert method.report["beta"] == pytest.approx(2 * float(y.std()), rel=1e-4)


def test_wrong_options_are_refused() -> None:
    for options in (
        {"beta": -1.0},
        {"beta_unit": "mean"},
        {"blindspot_epochs": 0},
        {"blindspot_lr": 0.0},
        {"layers": []},
    ):
        assert f"--method.{next(iter(options))}" in refusal(lambda o=options: Blindspot(**o))
    data = tiny(regression=False)
    assert "beta_unit" in refusal(lambda: Blindspot(beta_unit="std").check(learner("batch norm"), data))
    data = tiny()
    labels = data.labels(True)
    labels.targets[data.ids("forget")[0]] = float("inf")
    data.labels = lambda train: labels  # type: ignore[method-assign]
    assert "1 of 87" in refusal(lambda: Blindspot().check(learner("regressor"), data))
