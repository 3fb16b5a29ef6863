"""Both Fisher estimators against one backward pass per batch or row, and what they must leave alone."""

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from vislearn import per_sample
from vislearn.errors import UserError
from vislearn.fisher import LOSSES, cross_entropy, diagonal_fisher, diagonal_fisher_by_class
from vislearn.networks import build


class Tied(nn.Module):
    """One weight in two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(9, 9), nn.Linear(9, 9)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x.flatten(1)[:, :9]).tanh())


class Twice(nn.Module):
    """One layer called twice, one parameter that no layer owns, one that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.shift, self.unused = nn.Linear(9, 9), nn.Parameter(torch.ones(9)), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x.flatten(1)[:, :9] + self.shift).tanh())


class Borrowed(nn.Module):
    """A layer's weight that is also read outside of it: its formula alone would miss half of the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(9, 9)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.layer(x.flatten(1)[:, :9]).tanh(), self.layer.weight)


class Windows(nn.Module):
    """Cuts each image into four rows of the batch: no longer one row per image inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.head = nn.Linear(16, 8), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inside(x.reshape(-1, 16)).tanh().reshape(len(x), -1))


class Tokens(nn.Module):
    """Linear and layer-norm layers over (b, tokens, features)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer, self.head = nn.LayerNorm(8), nn.Linear(8, 6, bias=False), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.norm(x[:, 0])).tanh().mean(1))


def convolutions() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True),
        nn.Conv2d(6, 8, 3, stride=2, padding=2, dilation=2, groups=2), nn.GroupNorm(4, 8), nn.ReLU(inplace=True),
        nn.Dropout(0.5), nn.Conv2d(8, 8, (1, 3), padding=(0, 1)), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip
    for module in net:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return net


NETWORKS: dict[str, Any] = {
    "convolutions": convolutions, "tokens": Tokens, "tied": Tied, "twice": Twice, "borrowed": Borrowed,
    "windows": Windows, "resnet8": lambda: build("resnet8", 5, 1, 8), "vit": lambda: build("vit_tiny_cifar", 5, 1, 8),
    "circular": lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding="same", padding_mode="circular"), nn.Flatten(),
                                      nn.Linear(128, 5)),
    "statistics of the batch": lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2, track_running_stats=False),
                                                     nn.Flatten(), nn.Linear(72, 5)),
}  # fmt: skip
BY_LAYER = {"convolutions", "tokens", "resnet8", "vit"}


def rows(n: int = 12, classes: int = 5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 1, 8, 8, generator=generator), torch.randint(classes, (n,), generator=generator)


def network(name: str) -> nn.Module:
    torch.manual_seed(1)
    return NETWORKS[name]()


def expected(net: nn.Module, batches: list[tuple[Tensor, Tensor]], power: int, loss: Any) -> dict[str, Tensor]:
    """One forward and one backward pass per batch, as plainly as it can be written."""
    net = copy.deepcopy(net).eval()
    out = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for x, y in batches:
        net.zero_grad()
        loss(net(x), y).mean().backward()
        for name, p in net.named_parameters():
            if p.grad is not None:
                out[name] += p.grad.detach().abs() ** power / len(batches)
    return out


def assert_same(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        scale = max(float(value.abs().max()), 1e-12)
        torch.testing.assert_close(mine[name], value, rtol=1e-4, atol=1e-6 * scale, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", NETWORKS)
def test_sample_is_the_mean_over_rows(name: str, loss: str, power: int) -> None:
    net, (x, y) = network(name), rows()
    each = [(x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
    assert_same(diagonal_fisher(net, [(x[:7], y[:7]), (x[7:], y[7:])], "sample", power, loss),
                expected(net, each, power, LOSSES[loss]))  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_batch_is_the_mean_over_batches_and_a_short_one_counts_fully(name: str) -> None:
    net, (x, y) = network(name), rows()
    batches = [(x[:5], y[:5]), (x[5:10], y[5:10]), (x[10:], y[10:])]
    assert_same(diagonal_fisher(net, batches, "batch"), expected(net, batches, 2, cross_entropy))


@pytest.mark.parametrize("name", NETWORKS)
def test_formulas_are_used_where_they_hold_and_only_there(name: str, caplog: pytest.LogCaptureFixture) -> None:
    net, (x, y) = network(name).eval(), rows()
    with caplog.at_level("INFO", logger="vislearn.per_sample"):
        layers = per_sample.by_layer(net, dict(net.named_parameters()), 2, cross_entropy)
        per_sample.adder(net, dict(net.named_parameters()), 2, cross_entropy, x, y)
    used = layers is not None and "not layer by layer" not in caplog.text
    assert used == (name in BY_LAYER)


def test_a_network_that_vmap_cannot_take_goes_row_by_row() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.shift = nn.Linear(64, 5), nn.Parameter(torch.ones(64))

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1)
            return self.layer(x + self.shift if x.sum() > 0 else x)  # depends on the data

    net, (x, y) = Branches(), rows()
    each = [(x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
    assert_same(diagonal_fisher(net, [(x, y)], "sample"), expected(net, each, 2, cross_entropy))


def test_order_matters_for_batch_alone() -> None:
    net, (x, y) = network("convolutions"), rows(40)
    by_class = y.argsort(stable=True)
    one = {e: diagonal_fisher(net, list(zip(x.split(8), y.split(8), strict=True)), e) for e in ("batch", "sample")}
    x, y = x[by_class], y[by_class]
    two = {e: diagonal_fisher(net, list(zip(x.split(8), y.split(8), strict=True)), e) for e in ("batch", "sample")}
    assert_same(one["sample"], two["sample"])
    assert all(not torch.allclose(one["batch"][n], two["batch"][n], rtol=0.05) for n in one["batch"])
    assert_same(one["sample"], diagonal_fisher(net, [(x, y)], "sample", micro_batch=3))


@pytest.mark.parametrize("batch_size", [4, 7, 64])
@pytest.mark.parametrize("power", [1, 2])
def test_one_pass_gives_the_importances_of_all_rows_and_of_each_class(power: int, batch_size: int) -> None:
    net, (x, y) = network("convolutions"), rows(50)
    order = y.argsort(stable=True)
    x, y = x[order], y[order]

    def batches(which: Tensor) -> list[tuple[Tensor, Tensor]]:
        return list(zip(x[which].split(batch_size), y[which].split(batch_size), strict=True))

    whole, each = diagonal_fisher_by_class(net, batches(y >= 0), power, batch_size=batch_size)
    assert_same(whole, diagonal_fisher(net, batches(y >= 0), "batch", power))
    assert sorted(each) == y.unique().tolist()
    for label, found in each.items():
        assert_same(found, diagonal_fisher(net, batches(y == label), "batch", power))
    with pytest.raises(ValueError, match="one after the other"):
        diagonal_fisher_by_class(net, [(x[[0, -1, 0]], y[[0, -1, 0]])])


def test_the_pass_by_class_refuses_what_the_plain_one_does() -> None:
    net, (x, y) = network("convolutions"), rows(4)
    broken = x.clone()
    broken[2] = float("nan")
    for batches, message in (([(x, y * 0 + 9)], "label 9"), ([(x, y * 0), (broken, y * 0)], "batch 1"), ([], "empty")):
        with pytest.raises(UserError, match=message):
            diagonal_fisher_by_class(net, batches)
    with pytest.raises(UserError, match=r"gradient of 1\.weight"):
        diagonal_fisher_by_class(nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), [(x * 1e20, y * 0)])


def test_the_same_loader_gives_the_same_numbers() -> None:
    net, (x, y) = network("convolutions"), rows(40)
    batches = list(zip(x.split(8), y.split(8), strict=True))
    first, second = (diagonal_fisher(net, batches) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)


@pytest.mark.parametrize("estimator", ["batch", "sample"])
def test_the_model_is_left_as_it_was(estimator: Any) -> None:
    net, (x, y) = network("convolutions").train(), rows()
    net[1].eval()
    kept = next(net.parameters())
    kept.grad = torch.ones_like(kept)
    state, flags = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    random = torch.get_rng_state()
    with torch.no_grad():  # the caller's own context does not matter
        diagonal_fisher(net, [(x, y)], estimator)
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in state.items())
    assert [m.training for m in net.modules()] == flags
    assert [p.grad is None for p in net.parameters()] == [False] + [True] * (len(list(net.parameters())) - 1)
    assert torch.equal(kept.grad, torch.ones_like(kept))
    assert torch.equal(random, torch.get_rng_state())
    assert not any(m._forward_hooks for m in net.modules())


@pytest.mark.parametrize("estimator", ["batch", "sample"])
def test_frozen_and_unused_parameters_have_none_and_tied_ones_come_once(estimator: Any) -> None:
    x, y = rows()
    net = network("twice")
    net.shift.requires_grad_(False)
    found = diagonal_fisher(net, [(x, y)], estimator)
    assert found["shift"].abs().sum() == found["unused.weight"].abs().sum() == 0 < found["layer.weight"].sum()
    assert sorted(diagonal_fisher(network("tied"), [(x, y)], estimator)) == ["a.bias", "a.weight", "b.bias"]
    frozen = network("tied").requires_grad_(False)
    with pytest.raises(UserError, match="frozen"):
        diagonal_fisher(frozen, [(x, y)], estimator)


@pytest.mark.parametrize("estimator", ["batch", "sample"])
def test_half_precision_weights_have_float32_importances(estimator: Any) -> None:
    net, (x, y) = network("resnet8").to(torch.bfloat16), rows()
    net.head.weight.data *= 1e-3
    found = diagonal_fisher(net, [(x.to(torch.bfloat16) * 1e-3, y)], estimator)
    assert {v.dtype for v in found.values()} == {torch.float32}
    assert all(torch.isfinite(v).all() for v in found.values())
    assert 0 < found["head.weight"].max() < 1


@pytest.mark.parametrize("estimator", ["batch", "sample"])
def test_regressors_with_their_own_loss(estimator: Any) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 1), nn.Flatten(0))
    x, y = rows(8)[0], torch.randn(8)
    found = diagonal_fisher(net, [(x, y)], estimator, loss=lambda o, y: F.mse_loss(o, y, reduction="none"))
    residual = 2 * (net(x) - y)[:, None] * x.flatten(1)  # gradient of each row's squared error in the weight
    by_hand = residual.square().mean(0) if estimator == "sample" else residual.mean(0).square()
    torch.testing.assert_close(found["1.weight"][0], by_hand.detach())


@pytest.mark.parametrize("estimator", ["batch", "sample"])
def test_what_is_not_finite_stops_the_pass_with_its_batch(estimator: Any) -> None:
    net, (x, y) = network("convolutions"), rows()
    spoiled = x.clone()
    spoiled[9] = float("nan")
    with pytest.raises(UserError, match="batch 1"):
        diagonal_fisher(net, [(x[:6], y[:6]), (spoiled[6:], y[6:])], estimator)
    with pytest.raises(UserError, match="batch 0"):
        diagonal_fisher(net, [(spoiled[9:], y[9:])], estimator)  # the rows on which the fastest way is chosen
    huge = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
    with pytest.raises(UserError, match=r"gradient of 1\.weight"):  # squares of 1e20 do not fit into float32
        diagonal_fisher(huge, [(x * 1e20, y)], estimator)


@pytest.mark.parametrize(("y", "message"), [
    (torch.tensor([0, 5]), "label 5"), (torch.tensor([0, -100]), "label -100"),
    (torch.tensor([0.0, 1.0]), "whole numbers"),
])  # fmt: skip
def test_labels_are_classes(y: Tensor, message: str) -> None:
    with pytest.raises(UserError, match=message):
        diagonal_fisher(network("convolutions"), [(rows(2)[0], y)])


def test_bad_arguments_are_refused() -> None:
    net, batch = network("convolutions"), rows()
    with pytest.raises(UserError, match="empty"):
        diagonal_fisher(net, [])
    with pytest.raises(UserError, match="batch or sample"):
        diagonal_fisher(net, [batch], "empirical")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="squared_norm"):
        diagonal_fisher(net, [batch], loss="l2")


def test_a_third_element_is_the_label() -> None:
    net, (x, y) = network("convolutions"), rows()
    assert_same(diagonal_fisher(net, [(x, torch.zeros(len(x)), y)]), diagonal_fisher(net, [(x, y)]))


def test_a_shuffling_loader_is_warned_of_in_batch_mode() -> None:
    net, data = network("convolutions"), TensorDataset(*rows())
    with pytest.warns(UserWarning, match="shuffles"):
        diagonal_fisher(net, DataLoader(data, 4, shuffle=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        diagonal_fisher(net, DataLoader(data, 4, shuffle=True), "sample")
        diagonal_fisher(net, DataLoader(data, 4))


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def largest(net: nn.Module, x: Tensor, y: Tensor) -> int:
    with Largest() as mode:
        diagonal_fisher(net, [(x, y)], "sample")
    return mode.numel


@pytest.mark.parametrize("name", ["resnet8", "twice"])  # by formulas, by vmap
def test_memory_does_not_grow_with_the_batch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(per_sample, "ROWS", 4)
    net, (x, y) = network(name), rows(32)
    assert largest(net, x, y) <= max(largest(net, x[:4], y[:4]), x.numel())  # the batch itself is there already
    assert largest(net, x, y) < 32 * max(p.numel() for p in net.parameters())


@pytest.mark.parametrize("estimator", ["batch", "sample"])
def test_ranks_add_sums_and_counts(estimator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net, (x, y) = network("convolutions"), rows(12)
    shares = [[(x[:4], y[:4]), (x[4:8], y[4:8])], [(x[8:], y[8:])]]  # two ranks with unequal shares
    whole = diagonal_fisher(net, shares[0] + shares[1], estimator)
    sent: list[Tensor] = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t: sent.append(t.clone()))
    diagonal_fisher(net, shares[1], estimator)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda t: t.add_(sent.pop(0)))
    assert_same(diagonal_fisher(net, shares[0], estimator), whole)
    assert not sent
