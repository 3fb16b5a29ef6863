"""Products with Jacobian, Hessian and Fisher information against the matrices themselves."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_fisher import Largest
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from vislearn import influence
from vislearn.errors import UserError
from vislearn.fisher import cross_entropy
from vislearn.learner import Classifier, Regressor
from vislearn.methods import FineTune
from vislearn.networks import build


class Fused(nn.Module):
    """Attention through torch's own function, whose fast kernels have no second derivative."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.head = nn.Linear(4, 12), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.view(-1, 1, 4, 4)).chunk(3, -1)
        return self.head(F.scaled_dot_product_attention(q, k, v).mean((1, 2)))


class Partly(nn.Module):
    """A frozen layer, a tied weight and a layer that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.a, self.b, self.unused = nn.Linear(16, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(2, 2)
        self.b.weight = self.a.weight
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.frozen(x.flatten(1))).tanh())


def convolutions() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Flatten(),
                        nn.Linear(18, 3))  # fmt: skip
    nn.init.uniform_(net[1].running_var, 0.5, 2)
    return net


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "convolutions": convolutions, "fused attention": Fused, "partly trained": Partly,
    "smooth": lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.Tanh(), nn.Linear(3, 3)),
}  # fmt: skip


def network(name: str) -> nn.Module:
    torch.manual_seed(1)
    return NETWORKS[name]().double()


def rows(n: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, 1, 4, 4, generator=generator).double(), torch.randint(3, (n,), generator=generator)


def vector(net: nn.Module) -> Tensor:
    n = sum(p.numel() for p in influence.trainable(net).values())
    return torch.randn(n, generator=torch.Generator().manual_seed(2)).double()


def row_losses(net: nn.Module, x: Tensor, y: Tensor) -> Callable[[Tensor], Tensor]:
    """The losses of the rows as a function of the flat weights."""
    net = copy.deepcopy(net).eval()
    parameters = influence.trainable(net)

    def losses(weights: Tensor) -> Tensor:
        parts = weights.split([p.numel() for p in parameters.values()])
        named = {name: part.view(p.shape) for part, (name, p) in zip(parts, parameters.items(), strict=True)}
        return cross_entropy(functional_call(net, named, (x,)), y)

    return losses


def start(net: nn.Module) -> Tensor:
    parameters = influence.trainable(net)
    return influence.flat(parameters.values(), parameters)


@pytest.mark.parametrize("name", NETWORKS)
def test_hessian_product_is_that_of_autograd(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(influence, "ROWS", 3)
    net, (x, y), v = network(name), rows(), vector(network(name))
    losses = row_losses(net, x, y)
    with sdpa_kernel(SDPBackend.MATH):
        _, expected = torch.autograd.functional.vhp(lambda w: losses(w).mean(), start(net), v)
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    torch.testing.assert_close(influence.hessian_product(net, batches, cross_entropy, v), expected)


@pytest.mark.parametrize("name", NETWORKS)
def test_products_with_the_gradients_of_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(influence, "ROWS", 3)
    net, (x, y), v = network(name), rows(), vector(network(name))
    with sdpa_kernel(SDPBackend.MATH):
        s = torch.autograd.functional.jacobian(row_losses(net, x, y), start(net))  # (rows, P)
    batches = [(x[:4], y[:4]), (x[4:], y[4:])]
    total, count = influence.gradient(net, batches, cross_entropy)
    assert count == len(x)
    torch.testing.assert_close(total, s.sum(0))
    torch.testing.assert_close(influence.row_products(net, batches, cross_entropy, [v, 2 * v]),
                               torch.stack([s @ v, 2 * s @ v], 1))  # fmt: skip
    torch.testing.assert_close(influence.fisher_product(net, batches, cross_entropy, v), s.T @ (s @ v))


@pytest.mark.parametrize("arch", ["resnet8", "vit_tiny_cifar"])
def test_push_and_pull_are_transposes(arch: str) -> None:
    torch.manual_seed(0)
    net = build(arch, 3, 1, 4).eval()
    x, parameters = rows(2)[0].float(), influence.trainable(net)
    v, c = vector(net), torch.randn(2, 3)
    _, tangents = influence.push(net, parameters, x, v)
    pulled = influence.pull(net, parameters, x, c)
    assert float((tangents * c).sum()) == pytest.approx(float(pulled @ v), rel=1e-3)


def test_the_model_is_left_as_it_was() -> None:
    net, (x, y), v = network("convolutions").train(), rows(), vector(network("convolutions"))
    state, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    with torch.no_grad():
        for product in (influence.hessian_product, influence.fisher_product):
            product(net, [(x, y)], cross_entropy, v)
        influence.gradient(net, [(x, y)], cross_entropy)
        influence.mean_loss(net, [(x, y)], cross_entropy)
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in state.items())
    assert all(m.training for m in net.modules())
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize("name", ["hessian_product", "fisher_product", "row_products", "gradient", "mean_loss"])
def test_memory_does_not_grow_with_the_batch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(influence, "ROWS", 4)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3))
    x, y = rows(64)[0].float(), rows(64)[1]
    v = vector(net)
    arguments: dict[str, Any] = {"gradient": (), "mean_loss": (), "row_products": ([v, v],)}

    def largest(n: int) -> int:
        with Largest() as mode:
            getattr(influence, name)(net, [(x[:n], y[:n])], cross_entropy, *arguments.get(name, (v,)))
        return mode.numel

    assert largest(64) <= max(largest(4), x.numel())


def test_conjugate_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=generator).double()
    a, b = root @ root.T + torch.eye(6).double(), torch.randn(6, generator=generator).double()
    found = influence.conjugate_gradients(lambda v: a @ v, b, 20, 1e-10)
    torch.testing.assert_close(found.vector, torch.linalg.solve(a, b))
    assert found.iterations <= 8
    assert not found.indefinite
    early = influence.conjugate_gradients(lambda v: a @ v, b, 2, 1e-10)
    assert early.iterations == 2
    assert early.residual == pytest.approx(float((b - a @ early.vector).norm() / b.norm()))
    nothing = influence.conjugate_gradients(lambda v: a @ v, 0 * b, 20, 1e-10)
    assert nothing.iterations == 0
    assert not nothing.vector.any()


def test_conjugate_gradients_stop_at_negative_curvature_and_at_what_is_not_finite() -> None:
    b = torch.tensor([1.0, 0.1]).double()
    negative = influence.conjugate_gradients(lambda v: -v, b, 20, 1e-10)
    assert negative.indefinite
    assert torch.equal(negative.vector, b)
    mixed = influence.conjugate_gradients(lambda v: torch.tensor([2.0, -1.0]).double() * v, b, 20, 1e-10)
    assert mixed.indefinite
    assert torch.isfinite(mixed.vector).all()
    with pytest.raises(UserError, match="not finite"):
        influence.conjugate_gradients(lambda v: v * float("nan"), b, 20, 1e-10)


def test_a_gradient_that_is_not_finite_is_refused() -> None:
    net, (x, y) = network("smooth"), rows()
    x[3] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        influence.gradient(net, [(x, y)], cross_entropy)
    with pytest.raises(UserError, match="frozen"):
        influence.gradient(net.requires_grad_(False), [rows()], cross_entropy)


def test_moving_adds_a_flat_vector_in_order() -> None:
    net = network("partly trained")
    before, v = start(net), vector(net)
    influence.move(influence.trainable(net), v)
    assert torch.equal(start(net), before + v)


def test_a_learners_loss_row_by_row() -> None:
    torch.manual_seed(0)
    y = torch.tensor([0, 2])
    smoothed = Classifier("mlp", 3, label_smoothing=0.1, in_channels=1, image_size=4)
    logits = torch.randn(2, 3)
    assert torch.equal(influence.row_loss(smoothed)(logits, y),
                       F.cross_entropy(logits, y, reduction="none", label_smoothing=0.1))  # fmt: skip
    several = Regressor("mlp", 2, in_channels=1, image_size=4)
    outputs, targets = torch.randn(3, 2), torch.randn(3, 2)
    torch.testing.assert_close(influence.row_loss(several)(outputs, targets), (outputs - targets).square().mean(1))


@pytest.mark.parametrize(("after", "warned"), [(1.0, False), (1.5, True)])
def test_a_loss_above_that_of_guessing_is_said(after: float, warned: bool) -> None:
    method, model = FineTune(), Classifier("mlp", 3, in_channels=1, image_size=4)
    influence.judge(method, model, torch.tensor([0, 1, 2]), 0.1, after, "try another value")
    assert any("destroyed; try another value" in w for w in method.report.get("warnings", [])) == warned
    assert method.report["retain_loss_after"] == after
    with pytest.raises(UserError, match="diverged"):
        influence.judge(method, model, torch.tensor([0, 1]), 0.1, float("inf"), "try another value")
    values, method = Regressor("mlp", in_channels=1, image_size=4), FineTune()
    influence.judge(method, values, torch.tensor([0.0, 2.0]), 0.1, after, "try another value")  # guessing gives 1
    assert ("warnings" in method.report) == warned
