"""NTK scrubbing: the kernel and the step against the explicit Jacobian, and what does not fit into memory."""

import copy
import math
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_fisher import Largest
from test_zoo import Tiny, learner, trainer
from torch import Tensor, nn
from vislearn.methods.ntk import NTKScrub

from vislearn import influence
from vislearn.errors import UserError
from vislearn.forget import ClassForget, RandomForget
from vislearn.methods import ntk
from vislearn.networks import build


def problem(outputs: int = 3) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, outputs)).double()
    return net, torch.randn(7, 1, 2, 2).double(), torch.randint(3, (7,))


def jacobian(net: nn.Module, x: Tensor) -> Tensor:
    """One backward pass per row and output: (rows x outputs, P)."""
    found = []
    for row in x:
        for output in range(net(row[None]).numel()):
            gradients = torch.autograd.grad(net(row[None]).flatten()[output], list(net.parameters()))
            found.append(torch.cat([g.flatten() for g in gradients]))
    return torch.stack(found)


@pytest.mark.parametrize("numbers", [0, 200, 2**27])
def test_the_kernel_in_blocks(numbers: int) -> None:
    net, x, _ = problem()
    j = jacobian(net, x)
    torch.testing.assert_close(ntk.kernel(net, dict(net.named_parameters()), x, numbers), j @ j.T)


@pytest.mark.parametrize("arch", ["resnet8", "vit_tiny_cifar"])
def test_the_kernel_of_the_benchs_networks(arch: str) -> None:
    torch.manual_seed(1)
    net, x = build(arch, 2, 1, 8).eval(), torch.randn(3, 1, 8, 8)
    j = jacobian(net, x)
    expected = (j @ j.T).double()
    torch.testing.assert_close(ntk.kernel(net, dict(net.named_parameters()), x), expected, rtol=1e-3,
                               atol=1e-4 * float(expected.max()))  # fmt: skip


def solution(j: Tensor, residual: Tensor, ridge: float) -> Tensor:
    """w(S) by the explicit Jacobian, in the space of weights."""
    return -torch.linalg.solve(j.T @ j + ridge * torch.eye(j.shape[1]).double(), j.T @ residual)


@pytest.mark.parametrize("scale", [None, 1.0])
def test_the_step_is_the_difference_of_two_solutions(scale: float | None) -> None:
    net, x, y = problem()
    n_r, j = 5, jacobian(net, x)
    residual = (net(x).softmax(1) - F.one_hot(y, 3)).flatten().detach()
    kept = solution(j[: n_r * 3], residual[: n_r * 3], 0.1 * n_r)
    delta = kept - solution(j, residual, 0.1 * len(x))
    step, factor = ntk.scrub_step(net, x, y, n_r, 0.1, scale)
    if scale is None:  # as the authors write it: an angle, turned where the two point away from each other
        angle = math.acos(float(delta @ -kept / delta.norm() / kept.norm()))
        share = math.cos(angle) if angle <= math.pi / 2 else math.sin(angle - math.pi / 2)
        scale = float(1 + 2 * share * kept.norm() / delta.norm())
    assert factor == pytest.approx(scale)
    torch.testing.assert_close(step, scale * delta)


def test_regressors_have_errors_as_residuals() -> None:
    net, x, _ = problem(1)
    y = torch.randn(7).double()
    j, error = jacobian(net, x), (net(x)[:, 0] - y).detach()
    expected = solution(j[:5], error[:5], 0.5) - solution(j, error, 0.7)
    torch.testing.assert_close(ntk.scrub_step(net, x, y, 5, 0.1, 1.0, classifier=False)[0], expected)


def test_a_linear_model_lands_on_the_retain_sets_own_solution() -> None:
    """From the ridge solution of all rows, the unscaled step at a ridge of nearly 0 is the refit."""
    torch.manual_seed(1)
    net, x, y = nn.Linear(3, 1).double(), torch.randn(9, 3).double(), torch.randn(9).double()

    def fit(rows: slice) -> Tensor:
        features = torch.cat([x[rows], torch.ones(len(x[rows]), 1).double()], 1)
        return torch.linalg.lstsq(features, y[rows, None]).solution[:, 0]

    whole = fit(slice(None))
    with torch.no_grad():
        net.weight.copy_(whole[None, :3])
        net.bias.copy_(whole[3:])
    influence.move(influence.trainable(net), ntk.scrub_step(net, x, y, 6, 1e-9, 1.0, classifier=False)[0])
    torch.testing.assert_close(torch.cat([net.weight[0], net.bias]).detach(), fit(slice(6)), rtol=1e-4, atol=1e-5)


def test_the_jacobian_is_never_held() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 2))
    parameters, x = dict(net.named_parameters()), torch.randn(24, 1, 4, 4)
    p = sum(v.numel() for v in parameters.values())
    with Largest() as mode:
        kernel = ntk.kernel(net, parameters, x, 2 * 2 * p)  # two rows
    assert kernel.shape == (48, 48)
    assert mode.numel <= max(kernel.numel(), 2 * 2 * p)


def prepared(regression: bool = False, rule: Any = None) -> Tiny:
    data = Tiny(regression, forget=rule or ClassForget([1]))
    data.setup()
    return data


def test_what_does_not_fit_is_refused_with_sizes_that_do() -> None:
    model, data = learner("batch norm"), prepared()
    tight = NTKScrub(max_bytes=3 * 2**20)
    with pytest.raises(UserError, match=r"GiB|MiB") as refusal:
        tight.check(model, data)
    text = str(refusal.value)
    assert "\n" not in text
    rows, needed = (int(re.search(rf"--method\.{name}=(\d+)", text)[1]) for name in ("rows", "max_bytes"))
    NTKScrub(max_bytes=3 * 2**20, rows=rows).check(model, data)
    NTKScrub(max_bytes=needed).check(model, data)
    with pytest.raises(UserError, match=r"--method\.rows"):
        tight.unlearn(model, data, trainer())
    with pytest.raises(UserError, match=r"--model\.arch"):
        NTKScrub(max_bytes=1000).check(model, data)


def test_cifar10_does_not_fit_by_default_and_a_thousand_numbers_do() -> None:
    assert ntk.bytes_needed(45_000, 10, 272_474) > 700 * NTKScrub().max_bytes
    assert ntk.size(ntk.bytes_needed(45_000, 10, 272_474)).endswith("TiB")
    assert ntk.bytes_needed(600, 10, 272_474) < NTKScrub().max_bytes


def test_rows_are_drawn_in_proportion() -> None:
    data = prepared(rule=RandomForget(0.25))
    n_f, n_r = len(data.ids("forget")), len(data.ids("retain"))
    assert NTKScrub().counts(data) == NTKScrub(rows=1000).counts(data) == (n_f, n_r)
    assert NTKScrub(rows=20).counts(data) == (5, 15)
    assert NTKScrub(rows=2).counts(data) == (1, 1)
    method, model = NTKScrub(rows=20), learner("batch norm")
    unlearned = method.unlearn(copy.deepcopy(model), data, trainer())
    assert (method.report["rows_forget"], method.report["rows_retain"]) == (5, 15)
    pairs = zip(unlearned.named_parameters(), model.parameters(), strict=True)
    assert all(not torch.equal(p, q) for (name, p), q in pairs)
    assert all(torch.equal(b, model.get_buffer(name)) for name, b in unlearned.named_buffers())


def test_a_step_that_destroys_the_model_is_named() -> None:
    method = NTKScrub(scale=1e4)
    method.unlearn(learner("batch norm"), prepared(), trainer())
    assert any("destroyed" in w and "--method.scale=1" in w for w in method.report["warnings"])
    method = NTKScrub(scale=1e-6)
    method.unlearn(learner("batch norm"), prepared(), trainer())
    assert any("unchanged" in w and "--method.scale" in w for w in method.report["warnings"])


def test_an_indefinite_kernel_and_outputs_that_are_not_finite_are_refused() -> None:
    kernel = -torch.eye(2).double()
    with pytest.raises(UserError, match=r"--method\.weight_decay"):
        ntk.solve(kernel, 0.5, torch.ones(2).double())
    assert torch.equal(kernel, -torch.eye(2).double())
    net, x, y = problem()
    with pytest.raises(UserError, match="not finite"):
        ntk.scrub_step(net, x * float("nan"), y, 5, 0.1)


@pytest.mark.parametrize(("options", "named"), [
    ({"weight_decay": 0}, "--method.weight_decay=0.1"), ({"scale": -1.0}, "--method.scale"),
    ({"rows": 1}, "--method.rows=200"), ({"max_bytes": 0}, "--method.max_bytes="),
])  # fmt: skip
def test_bad_options_are_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        NTKScrub(**options)
