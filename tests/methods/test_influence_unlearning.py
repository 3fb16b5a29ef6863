"""Influence unlearning: the linear systems against explicit inverses, the released recursion, and its reports."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_zoo import Tiny, learner, trainer
from torch import Tensor, nn
from vislearn.methods.influence_unlearning import (
    InfluenceUnlearning,
    authors_woodfisher,
    direction,
    hessian_inverse,
    shrinkage,
    woodfisher,
)  # fmt: skip

from vislearn import influence
from vislearn.errors import UserError
from vislearn.fisher import cross_entropy
from vislearn.forget import ClassForget, RandomForget
from vislearn.learner import Learner


def problem() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A network, rows, labels and a right-hand side."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    return net, torch.randn(9, 4).double(), torch.randint(3, (9,)), torch.randn(27).double()


def gradients(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """One backward pass per row: (rows, P)."""
    pairs = zip(x.split(1), y.split(1), strict=True)
    return torch.stack([influence.gradient(net, [pair], cross_entropy)[0] for pair in pairs])


def test_woodfisher_is_the_inverse_of_damping_and_fisher_information() -> None:
    net, x, y, v = problem()
    s, divisor, damping = gradients(net, x, y), 5, 0.3
    inverse = torch.linalg.inv(damping * torch.eye(27).double() + s.T @ s / divisor)
    found = woodfisher(net, [(x[:4], y[:4]), (x[4:], y[4:])], cross_entropy, v, divisor, damping, tolerance=1e-10)
    torch.testing.assert_close(found.vector, inverse @ v)
    grown = torch.eye(27).double() / damping  # row by row, as the name says
    for row in s:
        o = grown @ row
        grown = grown - torch.outer(o, o) / (divisor + o @ row)
    torch.testing.assert_close(found.vector, grown @ v)


def test_the_hessian_solver_is_the_inverse_of_damping_and_hessian() -> None:
    net, x, y, v = problem()
    columns = [influence.hessian_product(net, [(x, y)], cross_entropy, e) for e in torch.eye(27).double()]
    expected = torch.linalg.solve(torch.stack(columns) + 2 * torch.eye(27).double(), v)
    torch.testing.assert_close(hessian_inverse(net, [(x, y)], cross_entropy, v, 2.0, tolerance=1e-10).vector, expected)


def test_the_authors_recursion_step_by_step() -> None:
    net, x, y, v = problem()
    s, divisor = gradients(net, x, y), 5
    k, o = v.clone(), s[0].clone()
    for row in s[1:]:
        t = o @ row
        k -= (k @ row) / (divisor + t) * o
        o -= t / (divisor + t) * o
    torch.testing.assert_close(authors_woodfisher(net, [(x[:4], y[:4]), (x[4:], y[4:])], cross_entropy, v, divisor), k)


def test_rows_that_would_turn_the_recursion_round_are_left_out() -> None:
    assert shrinkage([1.0, -2.0], [3.0, 4.0], 2) == 0
    assert shrinkage([1.0, -3.0, 1.0], [3.0, 4.0, 6.0], 2) == shrinkage([1.0, 1.0], [3.0, 6.0], 2) == 2.0


def test_direction_by_hand() -> None:
    g_f, g_r = torch.tensor([6.0, 0.0]), torch.tensor([0.0, 8.0])
    assert torch.allclose(direction(g_f, 2, g_r, 4), torch.tensor([1.0, -8 * 2 / (6 * 4)]))


class Plane(Learner):
    """Linear regression on the mean brightness of four quarters."""

    is_classifier = False

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4, 1), nn.Flatten(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    features = forward

    def loss(self, outputs: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        return F.mse_loss(outputs, y, reduction=reduction)


def fitted(data: Tiny, name: str) -> Tensor:
    """Least squares on a set: weights and bias."""
    x, y = next(iter(data.loader(name, train=False, batch_size=1000)))
    features = Plane().net[:2](x)
    return torch.linalg.lstsq(torch.cat([features, torch.ones(len(x), 1)], 1), y[:, None]).solution[:, 0]


def test_on_a_quadratic_loss_a_full_step_is_retraining() -> None:
    data, model = Tiny(True, forget=RandomForget(0.3)), Plane()
    data.setup()
    with torch.no_grad():
        start = fitted(data, "train")
        model.net[2].weight.copy_(start[None, :4])
        model.net[2].bias.copy_(start[4:])
    method = InfluenceUnlearning(solver="hessian", damping=1e-6)
    unlearned = method.unlearn(model, data, trainer())
    end = torch.cat([p.flatten() for p in unlearned.parameters()]).detach()
    torch.testing.assert_close(end, fitted(data, "retain"), rtol=0, atol=5e-5)
    assert (end - start).abs().max() > 2e-3


def unlearn(options: dict[str, Any], prepared: bool = False, rule: Any = None) -> tuple[Learner, InfluenceUnlearning]:
    data, model = Tiny(forget=rule or ClassForget([1])), learner("batch norm")
    data.setup()
    method = InfluenceUnlearning(**options)
    if prepared:
        method.prepare(model, data, lambda name, make: make())
    torch.manual_seed(3)
    return method.unlearn(copy.deepcopy(model), data, trainer()), method


def weights(model: Learner) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_kept_gradient_of_the_training_set_changes_nothing() -> None:
    (one, _), (two, method) = unlearn({}), unlearn({}, prepared=True)
    torch.testing.assert_close(weights(one), weights(two), rtol=1e-4, atol=1e-6)
    assert method._whole is None


def test_options_lead_to_different_steps_and_the_report_says_what_was_done() -> None:
    original, steps = weights(learner("batch norm")), {}
    for name, options in {
        "default": {}, "visited": {"divide_by": "visited"}, "authors": {"solver": "authors"},
        "hessian": {"solver": "hessian", "damping": 10.0}, "damped": {"damping": 1e6},
    }.items():  # fmt: skip
        model, method = unlearn(options)
        steps[name] = weights(model) - original
        assert method.report["rows"] == len(Tiny(forget=ClassForget([1])).ids("retain"))
        assert method.report["step"] == pytest.approx(float(steps[name].norm()), rel=1e-3, abs=1e-5)
    assert steps["visited"].norm() < steps["default"].norm() < steps["authors"].norm()
    assert steps["damped"].norm() < 1e-3 * steps["default"].norm()
    few = unlearn({"N": 5})[1]
    assert few.report["rows"] == 7


def test_a_step_that_destroys_or_does_nothing_is_named() -> None:
    destroyed = unlearn({"alpha": 300.0})[1]
    assert any("destroyed" in w and "--method.alpha" in w for w in destroyed.report["warnings"])
    idle = unlearn({"alpha": 1e-8})[1]
    assert any("unchanged" in w and "--method.alpha" in w for w in idle.report["warnings"])
    short = unlearn({"iterations": 1, "damping": 1e-4})[1]
    assert any("--method.iterations" in w for w in short.report["warnings"])
    with pytest.raises(UserError, match="diverged"):
        unlearn({"alpha": 1e30})


@pytest.mark.parametrize(("options", "named"), [
    ({"alpha": 0}, "--method.alpha=1"), ({"N": 0}, "--method.N=1000"), ({"damping": -1}, "--method.damping=1"),
    ({"iterations": 0}, "--method.iterations=100"), ({"divide_by": "rows"}, "--method.divide_by=N"),
    ({"solver": "lissa"}, "--method.solver=woodfisher"), ({"solver": "authors", "damping": 2.0}, "--method.damping"),
])  # fmt: skip
def test_bad_options_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        InfluenceUnlearning(**options)
