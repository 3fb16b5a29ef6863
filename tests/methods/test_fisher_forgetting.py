"""Fisher forgetting: the Fisher information against its definition, the rules of the variance, and what is refused."""

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from test_fisher import BY_LAYER, NETWORKS, Largest, network, rows
from test_zoo import Tiny, learner, trainer
from torch import Tensor, nn
from vislearn.methods.fisher_forgetting import FisherForgetting

from vislearn import influence, per_sample
from vislearn.errors import UserError
from vislearn.forget import ClassForget, Forget, GroupForget, RandomForget
from vislearn.learner import Classifier, Learner
from vislearn.methods import fisher_forgetting as ff
from vislearn.networks import build


def definition(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """One backward pass per row and label."""
    net = copy.deepcopy(net).eval()
    total = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for row in x:
        log_p = net(row[None])[0].log_softmax(0)
        for value in log_p:
            gradients = torch.autograd.grad(value, list(net.parameters()), retain_graph=True, allow_unused=True)
            for name, gradient in zip(total, gradients, strict=True):
                if gradient is not None:
                    total[name] += value.detach().exp() * gradient**2 / len(x)
    return total


def assert_same(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-3, atol=1e-5 * float(value.abs().max()))


# a bias before a normalisation by the batch's own statistics has no gradient but rounding
@pytest.mark.parametrize("name", sorted(NETWORKS.keys() - {"statistics of the batch"}))
def test_expected_fisher_is_the_definition(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, (x, _) = network(name).train(), rows(5)
    state, expected = copy.deepcopy(net.state_dict()), definition(net, x)
    monkeypatch.setattr(influence, "GROUP", 3)  # of five classes
    if name in BY_LAYER:
        monkeypatch.setattr(per_sample, "adder", None)  # they share the forward pass
    assert_same(ff.expected_fisher(net, [(x[:3],), (x[3:],)]), expected)
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in state.items())
    assert all(module.training for module in net.modules())
    assert not any(module._forward_hooks for module in net.modules())


def test_batch_fisher_of_single_rows_is_the_definition() -> None:
    torch.manual_seed(1)
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(9, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(6, 1, 3, 3)
    assert_same(ff.batch_fisher(net, [(row[None],) for row in x]), definition(net, x))
    whole = ff.batch_fisher(net, [(x,)])
    assert any(not torch.allclose(whole[name], value, rtol=0.05) for name, value in definition(net, x).items())


def test_random_combinations_are_unbiased() -> None:
    """The mean over all patterns of signs is the sum over all labels."""
    torch.manual_seed(1)
    logits = torch.randn(1, 3, requires_grad=True)

    def squares(u: Tensor) -> Tensor:
        return torch.autograd.grad(ff.label_combination(logits, u).sum(), logits)[0] ** 2

    exact = sum(squares(u) for u in ff.combinations(torch.empty(1), 3, 0))
    signs = [squares(torch.tensor([pattern])) for pattern in itertools.product((-1.0, 1.0), repeat=3)]
    p = logits.detach().softmax(1)
    torch.testing.assert_close(exact, p - p**2)  # the variance of a one-hot label
    torch.testing.assert_close(sum(signs) / len(signs), exact)
    drawn = list(ff.combinations(torch.empty(4), 3, 2))
    assert len(drawn) == 2
    assert all(torch.allclose(u.abs(), torch.full((4, 3), 1 / math.sqrt(2))) for u in drawn)


def test_probes_come_close_to_the_exact_sum() -> None:
    torch.manual_seed(1)
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(9, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(300, 1, 3, 3)
    exact, drawn = ff.expected_fisher(net, [(x,)]), ff.expected_fisher(net, [(x,)], probes=4)
    for name, value in exact.items():
        torch.testing.assert_close(drawn[name], value, rtol=0.2, atol=0.2 * float(value.max()))
        assert not torch.equal(drawn[name], value)


def test_regressors_sum_over_outputs() -> None:
    torch.manual_seed(1)
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(9, 2)), torch.randn(6, 1, 3, 3)
    expected = x.flatten(1).square().mean(0).expand(2, -1)
    torch.testing.assert_close(ff.expected_fisher(net, [(x,)], classifier=False)["1.weight"], expected)


@pytest.mark.parametrize("probes", [0, 3])
def test_memory_does_not_grow_with_the_batch(probes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(influence, "HELD", 12)  # four rows times three directions
    torch.manual_seed(0)
    net, x = build("resnet8", 3, 1, 8), torch.randn(24, 1, 8, 8)

    def largest(n: int) -> int:
        with Largest() as mode:
            ff.expected_fisher(net, [(x[:n],)], probes=probes)
        return mode.numel

    assert largest(24) <= max(largest(4), x.numel())


def test_moments_by_hand() -> None:
    parameters = {"w": torch.ones(2, 2), "b": torch.ones(2), "head": torch.ones(2, 2)}
    information = {"w": torch.tensor([[0.0, 0.01], [1.0, 1.0]]), "b": torch.tensor([0.0, 1.0]),
                   "head": torch.tensor([[0.0, 1.0], [1.0, 1.0]])}  # fmt: skip
    mean, variance = ff.moments(parameters, information, {"head"}, 1e-3, [1])
    torch.testing.assert_close(variance["w"], torch.tensor([[0.55, 0.55], [1e-3, 1e-3]]))  # (1000 + 100) / 2
    torch.testing.assert_close(variance["b"], torch.tensor([10.0, 1e-2]))
    torch.testing.assert_close(
        variance["head"], torch.tensor([[0.505, 0.505], [1e-3, 1e-3]])
    )  # ten times (100 + 1) / 2
    assert torch.equal(mean["head"], torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    assert torch.equal(mean["w"], parameters["w"])
    same = ff.moments(parameters, information, {"head"}, 1e-3, cap=5.0, cap_last=100.0, boost=1.0)[1]
    assert float(same["head"].max()) == pytest.approx(3e-3)  # the smaller bound counts: (5 + 1) / 2


class Quarter(Tiny):
    """A quarter of the rows is as many as a class has."""

    def __init__(self, rule: Forget) -> None:
        super().__init__(forget=rule, val_fraction=0.0)
        self.setup()


@pytest.mark.parametrize(("rule", "option", "rows"), [
    (ClassForget([1]), "class", [1]), (ClassForget([0, 2]), "class", [0, 2]), (RandomForget(0.25), "class", []),
    (GroupForget("fine", ["c1", "c2"]), "class", [2]), (GroupForget("fine", ["c1"]), "class", []),
    (ClassForget([1]), "never", []), (ClassForget([1]), "authors", [1]),
    (RandomForget(0.25), "authors", [3]), (RandomForget(0.2), "authors", []), (ClassForget([0, 2]), "authors", []),
])  # fmt: skip
def test_which_rows_of_the_last_layer_start_from_zero(rule: Forget, option: Any, rows: list[int]) -> None:
    assert FisherForgetting(class_row=option).zeroed(Quarter(rule)) == rows


def test_the_last_layer_by_place_and_by_shape() -> None:
    model, data = Classifier("resnet8", 16, in_channels=1, image_size=8), Tiny(forget=RandomForget(0.2))
    assert FisherForgetting().last(model, data) == {"network.head.weight", "network.head.bias"}
    by_shape = FisherForgetting(last_layer="shape").last(model, data)
    assert by_shape > {"network.head.weight", "network.head.bias"}  # its first convolution has 16 channels


def unlearn(options: dict[str, Any], prepared: bool = False, rule: Forget | None = None, kind: str = "batch norm",
            frozen: str = "") -> tuple[Learner, FisherForgetting]:  # fmt: skip
    data, model = Tiny(kind == "regressor", forget=rule or RandomForget(0.2)), learner(kind)
    data.setup()
    for name, p in model.named_parameters():
        p.requires_grad_(name != frozen)
    method = FisherForgetting(**options)
    if prepared:
        method.prepare(model, data, lambda name, make: make())
    torch.manual_seed(3)
    return method.unlearn(copy.deepcopy(model), data, trainer()), method


@pytest.mark.parametrize("kind", ["batch norm", "regressor"])
def test_the_kept_information_of_the_training_set_changes_nothing(kind: str) -> None:
    (one, _), (two, method) = unlearn({"alpha": 1e-6}, kind=kind), unlearn({"alpha": 1e-6}, prepared=True, kind=kind)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)
    assert method._whole is None


def test_noise_has_the_variance_and_spares_buffers_and_frozen_parameters() -> None:
    original = learner("batch norm")
    frozen = next(name for name, _ in original.named_parameters())
    model, _ = unlearn({"alpha": 1e-7, "cap": 1e-9, "cap_last": 1e-9, "boost": 1.0}, frozen=frozen)
    before, after = original.state_dict(), model.state_dict()
    for name, _ in original.named_buffers():
        assert torch.equal(before[name], after[name])
    assert torch.equal(before[frozen], after[frozen])
    noise = torch.cat([(after[n] - before[n]).flatten() for n, _ in original.named_parameters() if n != frozen])
    assert float(noise.abs().max()) < 1e-6
    model, method = unlearn({"alpha": 1e-2, "cap": 1e-2, "cap_last": 1e-2, "boost": 1.0})
    noise = torch.cat([(model.state_dict()[n] - before[n]).flatten() for n, _ in original.named_parameters()])
    assert float(noise.std()) == pytest.approx(1e-2, rel=0.05)  # every weight is at the cap: sqrt(alpha cap)
    assert method.report["capped"] > 0.5


def test_a_forgotten_class_loses_its_row() -> None:
    model, method = unlearn({"alpha": 1e-12}, rule=ClassForget([1]))
    before, after = learner("batch norm").head.weight.detach(), model.head.weight.detach()
    assert method.report["zeroed_rows"] == [1]
    torch.testing.assert_close(after[[0, 2, 3]], before[[0, 2, 3]], rtol=0, atol=1e-3)
    assert float(after[1].std()) == pytest.approx(math.sqrt(1e-3), rel=0.5)


def test_noise_that_destroys_the_model_is_named() -> None:
    _, method = unlearn({"alpha": 1.0})
    assert any("destroyed" in w and "--method.alpha" in w for w in method.report["warnings"])
    assert "warnings" not in unlearn({"fisher": "batch"})[1].report


@pytest.mark.parametrize(("options", "named"), [
    ({"alpha": 0}, "--method.alpha=1e-09"), ({"cap": -1}, "--method.cap=1000"), ({"boost": 0}, "--method.boost=10"),
    ({"cap_last": math.inf}, "--method.cap_last=100"), ({"fisher": "true"}, "--method.fisher=sample"),
    ({"last_layer": "fc"}, "--method.last_layer=head"), ({"class_row": "always"}, "--method.class_row=class"),
    ({"probes": -1}, "--method.probes=0"), ({"probes": 2, "fisher": "batch"}, "--method.probes"),
    ({"batch_size": 0}, "--method.batch_size=32"),
])  # fmt: skip
def test_bad_options_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        FisherForgetting(**options)


def test_what_it_cannot_do_is_refused() -> None:
    data = Tiny(True, forget=RandomForget(0.2))
    data.setup()
    with pytest.raises(UserError, match=r"--method\.fisher=sample"):
        FisherForgetting(fisher="batch").check(learner("regressor"), data)
    net, x = nn.Sequential(nn.Flatten(), nn.Linear(9, 3)), torch.full((2, 1, 3, 3), float("nan"))
    with pytest.raises(UserError, match="not finite"):
        ff.expected_fisher(net, [(x,)])
    with pytest.raises(UserError, match="empty"):
        ff.expected_fisher(net, [])
