"""Path dependence: the linear theorem to rounding, and staged training of small networks."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from vislearn.metrics.path_dependence import (
    Stage,
    ascent,
    follow,
    linear_paths,
    orders,
    predicted_difference,
    recency,
    retrain_error,
    spread,
    staged_ridge,
    steps_to,
    train_orders,
)

D, ETA, STEPS = 8, 0.15, 60


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stage(rows: int, seed: int, mu: float = 0.5) -> Stage:
    return Stage(normal(rows, D, seed=seed), normal(rows, seed=seed + 100), mu)


def two_paths(rows: int = 3, mu: float = 0.5) -> tuple[Tensor, Tensor, Stage]:
    """The same two stages and the one to forget, in two orders."""
    a, b, u = stage(12, 1, mu), stage(15, 2, mu), stage(rows, 3, mu)
    return staged_ridge([a, u, b]), staged_ridge([b, a, u]), u


def test_a_stage_is_a_ridge_regression_towards_the_weights_before() -> None:
    from sklearn.linear_model import Ridge

    a, b = stage(12, 1), stage(15, 2)
    w_a = Ridge(alpha=a.mu, fit_intercept=False).fit(a.x, a.y).coef_
    # ||x w - y||^2 + mu ||w - w_a||^2 is a ridge regression of the residual, in w - w_a
    w_ab = w_a + Ridge(alpha=b.mu, fit_intercept=False).fit(b.x, b.y - b.x @ torch.as_tensor(w_a)).coef_
    np.testing.assert_allclose(staged_ridge([a]), w_a, atol=1e-10)
    np.testing.assert_allclose(staged_ridge([a, b]), w_ab, atol=1e-10)
    np.testing.assert_allclose(staged_ridge([b], start=torch.as_tensor(w_a)), w_ab, atol=1e-10)
    # (X'X + mu I)^-1 (X'y + mu w_A), by an explicit inverse
    by_hand = torch.linalg.inv(b.x.T @ b.x + b.mu * torch.eye(D)) @ (b.x.T @ b.y + b.mu * torch.as_tensor(w_a))
    np.testing.assert_allclose(staged_ridge([a, b]), by_hand, atol=1e-10)


def test_the_order_of_stages_matters() -> None:
    one, other, _ = two_paths()
    assert (one - other).norm() > 0.1


def test_ascent_follows_the_gradient_of_the_mean_squared_error() -> None:
    w, _, u = two_paths()
    leaf = w.clone().requires_grad_()
    gradient = torch.autograd.grad((u.x @ leaf - u.y).square().mean(), leaf)[0]
    torch.testing.assert_close(ascent(w, u.x, u.y, ETA, 1)[1], w + ETA * gradient, atol=1e-12, rtol=0)


@pytest.mark.parametrize("rows", [1, 3, D, 20])
def test_the_recursion_holds_to_rounding(rows: int) -> None:
    """d_t = (I + M)^t d_0, whatever the targets of the forgotten rows are."""
    one, other, u = two_paths(rows)
    apart = ascent(one, u.x, u.y, ETA, STEPS) - ascent(other, u.x, u.y, ETA, STEPS)
    growth = torch.eye(D, dtype=torch.float64) + 2 * ETA / rows * u.x.T @ u.x
    by_power = torch.stack([torch.linalg.matrix_power(growth, t) @ (one - other) for t in range(STEPS + 1)])
    scale = by_power.norm(dim=1, keepdim=True)
    assert ((apart - by_power) / scale).abs().max() < 1e-10
    assert ((predicted_difference(one - other, u.x, ETA, STEPS) - by_power) / scale).abs().max() < 1e-10
    few = predicted_difference(one - other, u.x, ETA, 3)
    torch.testing.assert_close(few, apart[:4], atol=1e-10, rtol=0)


@pytest.mark.parametrize("rows", [1, 3, D, 20])
def test_the_bound_holds_from_where_it_says(rows: int) -> None:
    one, other, u = two_paths(rows)
    x_test = normal(40, D, seed=7)
    paths = [ascent(w, u.x, u.y, ETA, STEPS) for w in (one, other)]
    found = linear_paths(*paths, u.x, x_test, ETA)
    assert found.holds_from is not None
    assert (found.difference[found.holds_from :] >= found.bound[found.holds_from :] * (1 - 1e-12)).all()
    by_hand = [((x_test @ (a - b)) ** 2).mean().item() for a, b in zip(*paths, strict=True)]
    np.testing.assert_allclose(found.difference, by_hand)
    # the bound as the paper writes it, with P = X'(XX')^-1 X (a pseudo-inverse where the rows are more than columns)
    p = torch.linalg.pinv(u.x) @ u.x
    d0, m = p @ (one - other), 2 * ETA / rows * u.x.T @ u.x
    rho = (d0 @ p @ m @ d0 / d0.square().sum()).item()
    s = torch.linalg.svdvals(x_test @ p)[min(rows, D) - 1]
    assert found.rate == pytest.approx(rho, abs=1e-10)
    t = torch.arange(STEPS + 1, dtype=torch.float64)
    torch.testing.assert_close(found.bound, s**2 * d0.square().sum() / 160 * (1 + rho) ** (2 * t), rtol=1e-9, atol=0)
    assert found.bound[-1] > 100 * found.bound[0]  # it grows: no single retrained model is near both


def test_with_one_row_the_bound_is_a_quarter_of_the_difference_in_the_long_run() -> None:
    """One forgotten row has one direction: within it the growth is exactly (1 + rho)^t, so 1/4 is all that is lost."""
    one, other, u = two_paths(1)
    paths = [ascent(w, u.x, u.y, ETA, 200) for w in (one, other)]
    found = linear_paths(*paths, u.x, normal(40, D, seed=7), ETA)
    assert (found.bound[-1] / found.difference[-1]).item() == pytest.approx(0.25, abs=1e-6)


def test_equal_models_stay_equal_and_few_test_rows_give_an_empty_bound() -> None:
    one, other, u = two_paths()
    path, far = (ascent(w, u.x, u.y, ETA, 5) for w in (one, other))
    same = linear_paths(path, path, u.x, normal(40, D), ETA)
    assert same.difference.tolist() == same.bound.tolist() == [0.0] * 6
    blind = linear_paths(path, far, u.x, normal(2, D), ETA)  # two test rows cannot see three directions
    assert blind.bound.tolist() == [0.0] * 6
    assert blind.difference.min() > 0


def test_a_stage_needs_a_pull_towards_the_weights_before() -> None:
    with pytest.raises(ValueError, match="mu must be above 0"):
        staged_ridge([stage(3, 1, 0.0)])
    with pytest.raises(ValueError, match="one stage"):
        staged_ridge([])


def test_the_forget_stage_stands_at_every_position() -> None:
    assert orders("abc", "U") == [list("Uabc"), list("aUbc"), list("abUc"), list("abcU")]


def test_spread_and_steps_by_hand() -> None:
    curves = torch.tensor([[0.9, 0.2, 0.1, 0.0], [0.8, 0.1, 0.0, 0.0], [0.9, 0.5, 0.4, 0.05]], dtype=torch.float64)
    torch.testing.assert_close(spread(curves), torch.tensor([0.1, 0.4, 0.4, 0.05], dtype=torch.float64))
    assert [steps_to(c) for c in curves] == [2, 1, 3]
    assert recency(curves) == (3 / 1.5, [2, 1, 3])


def test_recency_is_absent_where_an_order_never_forgets_or_had_forgotten_before() -> None:
    assert recency(torch.tensor([[0.9, 0.0], [0.9, 0.5]])) == (None, [1, None])
    assert recency(torch.tensor([[0.05, 0.0], [0.9, 0.0]])) == (None, [0, 1])


def test_retrain_error_by_hand() -> None:
    sure = torch.tensor([[100.0, 0.0], [100.0, 0.0]])
    assert retrain_error(sure, sure) == 0
    assert retrain_error(sure, sure.flip(1)) == pytest.approx(2)
    assert retrain_error(sure, torch.tensor([[100.0, 0.0], [0.0, 0.0]])) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="same rows"):
        retrain_error(sure, sure[:1])


def train(model: Any, x: Tensor, y: Tensor, steps: int = 60, lr: float = 0.01) -> Any:
    optimizer = torch.optim.Adam(model.parameters(), lr)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model


def ascend(model: Any, x: Tensor, y: Tensor, lr: float = 0.05) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr)
    (-nn.functional.cross_entropy(model(x), y)).backward()
    optimizer.step()
    model.zero_grad()
    return model


@pytest.fixture(scope="module")
def digits() -> dict[str, tuple[Tensor, Tensor]]:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x, y = torch.tensor(bunch.data / 16, dtype=torch.float32), torch.tensor(bunch.target)
    groups = {"a": (0, 1), "b": (2, 4), "c": (5, 6), "U": (3, 9)}
    return {k: (x[m], y[m]) for k, v in groups.items() if (m := torch.isin(y, torch.tensor(v))).any()}


def test_staged_networks_part_under_gradient_ascent(digits: dict[str, tuple[Tensor, Tensor]]) -> None:
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))  # rectifiers die when classes change
    before = copy.deepcopy(start.state_dict())
    stages = [digits[k] for k in "abc"]
    models = train_orders(start, train, stages, digits["U"])
    assert len(models) == 4
    assert all(torch.equal(v, before[k]) for k, v in start.state_dict().items())
    retain = tuple(torch.cat(parts) for parts in zip(*stages, strict=True))
    kept = [copy.deepcopy(m.state_dict()) for m in models]
    found = follow(models, ascend, digits["U"], retain, rounds=12)
    assert all(torch.equal(v, k[n]) for m, k in zip(models, kept, strict=True) for n, v in m.state_dict().items())
    assert all(m.training for m in models)
    assert found.forget.shape == found.retain.shape == found.drop.shape == (4, 13)
    assert found.forget[3, 0] > 0.95  # trained last, known best
    assert found.drop[:, 0].tolist() == [0.0] * 4
    assert (found.drop[:, -1] > 0).all()
    assert found.drop[3, -1] < 0.1 * found.drop[:3, -1].min()  # the recency effect: what came last goes last
    assert spread(found.forget)[0] > 0.5  # catastrophic forgetting: early stages are gone before any request
    assert recency(found.forget)[0] is None
    assert found.apart[0] > 0.05
    with pytest.raises(ValueError, match="no models"):
        follow([], ascend, digits["U"], retain)
