"""Malicious requests: stamps, the burn attack, selection at the boundary, and checks."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vislearn.metrics.malicious import (
    alignment,
    border_mask,
    burn,
    check,
    corner_mask,
    damage,
    fingerprints,
    losses,
    near_other_class,
    nearest,
    smallest_margin,
    stamp,
    stealth,
    unknown,
)

Rows = tuple[Tensor, Tensor]


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def digits() -> dict[str, Rows]:
    """Training rows of class 3 to forget, the other training rows, and two disjoint parts of the other test rows."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x, y = torch.tensor(bunch.images / 16, dtype=torch.float32)[:, None], torch.tensor(bunch.target)
    row = torch.arange(len(y)) % 5
    masks = {"forget": (row > 1) & (y == 3), "retain": (row > 1) & (y != 3), "val": (row == 0) & (y != 3),
             "test": (row == 1) & (y != 3)}  # fmt: skip
    return {name: (x[m], y[m]) for name, m in masks.items()}


@pytest.fixture(scope="module")
def model(digits: dict[str, Rows]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    x, y = (torch.cat(parts) for parts in zip(digits["forget"], digits["retain"], strict=True))
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    for _ in range(60):
        optimizer.zero_grad()
        cross_entropy(net(x), y).backward()
        optimizer.step()
    return net


def gradient_ascent(model: Any, x: Tensor, y: Tensor, lr: float = 0.1, steps: int = 3) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr)
    for _ in range(steps):
        optimizer.zero_grad()
        (-cross_entropy(model(x), y)).backward()
        optimizer.step()
    return model


def test_masks_take_the_share_they_say() -> None:
    assert corner_mask(32, 32, 0.1).mean().item() == pytest.approx(0.1, abs=0.01)
    assert corner_mask(8, 8, 0.1)[-1, -1] == 1
    assert corner_mask(8, 8, 0.1)[0, 0] == 0
    frame = border_mask(32, 32, 0.15)
    assert frame.mean().item() == 1 - 30**2 / 32**2  # two pixels would be 23 %
    assert (frame[0].min(), frame[1:-1, 1:-1].max()) == (1, 0)
    assert border_mask(8, 8, 0.15).mean().item() == 1 - 36 / 64
    with pytest.raises(ValueError, match="share"):
        corner_mask(8, 8, 1.5)


def test_a_stamp_changes_the_mask_and_nothing_else() -> None:
    x, mask = rand(4, 3, 8, 8), corner_mask(8, 8, 0.1)
    out = stamp(x, torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1), mask)
    assert torch.equal(out[..., mask == 0], x[..., mask == 0])
    assert out[..., -1, -1].tolist() == [[1, 2, 3]] * 4
    half = stamp(x, torch.ones(1), 0.5 * torch.ones(8, 8))
    torch.testing.assert_close(half, 0.5 * x + 0.5)


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.1, 1), (0.5, 5), (1.0, 10)])
def test_a_share_of_a_request_is_stamped(share: float, count: int) -> None:
    x = rand(10, 1, 8, 8)
    out = stealth(x, torch.tensor(9.0), corner_mask(8, 8), share)
    assert (out != x).flatten(1).any(1).sum() == count
    assert torch.equal(out, stealth(x, torch.tensor(9.0), corner_mask(8, 8), share))


def test_burning_climbs_the_first_order_damage_within_its_bounds(model: nn.Module, digits: dict[str, Rows]) -> None:
    (x, y), val = digits["forget"], digits["val"]
    before = copy.deepcopy(model.state_dict())
    limits = (torch.tensor(0.0), torch.tensor(1.0))
    request = burn(model, x, y, *val, eps=0.1, steps=10, limits=limits)
    assert (request - x).abs().max() <= 0.1 + 1e-6
    assert (request.min(), request.max()) == (0, 1)
    assert not request.requires_grad
    assert alignment(model, request, y, *val) > alignment(model, x, y, *val) + 0.01
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_first_order_damage_is_what_a_small_step_does(model: nn.Module, digits: dict[str, Rows]) -> None:
    (x, y), (x_val, y_val) = digits["forget"], digits["val"]
    twin, eta = copy.deepcopy(model).double(), 1e-5
    x, x_val = x.double(), x_val.double()
    before = cross_entropy(twin(x_val), y_val).item()
    expected = alignment(twin, x, y, x_val, y_val)
    after = cross_entropy(gradient_ascent(twin, x, y, eta, 1)(x_val), y_val).item()
    assert (after - before) / eta == pytest.approx(expected, rel=1e-2)


def test_a_burnt_request_costs_more_than_an_honest_one(model: nn.Module, digits: dict[str, Rows]) -> None:
    x, y = digits["forget"]
    request = burn(model, x, y, *digits["val"], eps=0.2, steps=10)
    found = damage(gradient_ascent, model, (x, y), (request, y), digits["test"])
    assert found.before > 0.9
    assert found.honest > 0.8
    assert found.drop == found.honest - found.attacked
    assert found.drop > 0.5
    again = damage(gradient_ascent, model, (x, y), (x, y), digits["test"])
    assert again.drop == 0
    assert again.before == found.before  # the model itself was not unlearned


def test_a_stamped_request_hurts_those_who_carry_the_stamp(model: nn.Module, digits: dict[str, Rows]) -> None:
    (x, y), (x_t, y_t) = digits["forget"], digits["test"]
    mask, white = corner_mask(8, 8, 0.15), torch.tensor(1.0)
    request = stealth(x, white, mask)
    with_stamp = damage(gradient_ascent, model, (x, y), (request, y), (stamp(x_t, white, mask), y_t))
    assert with_stamp.before > 0.5
    assert with_stamp.drop > 0.3
    without = damage(gradient_ascent, model, (x, y), (stealth(x, white, mask, 0.0), y), (x_t, y_t))
    assert without.drop == 0


def test_smallest_margin_by_hand() -> None:
    outputs = torch.tensor([[3.0, 1.0], [0.0, 0.5], [1.0, 0.9], [0.0, 9.0]])
    assert smallest_margin(outputs, torch.tensor([0, 1, 0, 0]), 4).tolist() == [2, 1, 0, 3]  # the last is told wrong
    assert smallest_margin(outputs, torch.tensor([0, 1, 0, 0]), 1).tolist() == [2]


def test_nearest_other_centroid_by_hand() -> None:
    z, y = torch.tensor([[0.0], [1.0], [4.0], [10.0], [11.0], [12.0]]), torch.tensor([0, 0, 0, 1, 1, 1])
    order = near_other_class(z, y, 6).tolist()
    assert order[0] == 2  # at 4: 7 to the other centroid, 7/3 to its own
    assert order[-1] in (1, 4)  # nearest to their own centroids
    with pytest.raises(ValueError, match="no other class"):
        near_other_class(z, torch.zeros(6), 2)


def test_boundary_rows_of_the_retain_set_are_a_costly_request(model: nn.Module, digits: dict[str, Rows]) -> None:
    x, y = digits["retain"]
    with torch.no_grad():
        rows = smallest_margin(model(x), y, len(digits["forget"][0]))
    found = damage(gradient_ascent, model, digits["forget"], (x[rows], y[rows]), digits["test"])
    assert found.drop > 0.05


def test_the_hash_knows_exact_copies_only() -> None:
    x = rand(5, 1, 8, 8)
    assert unknown(x[[3, 1]], x).tolist() == [0, 0]
    assert unknown(x[[3, 1]] + 1e-6, x).tolist() == [1, 1]
    assert len(set(fingerprints(x))) == 5
    assert fingerprints(x[:1].double()) != fingerprints(x[:1])
    assert fingerprints(x.to(memory_format=torch.channels_last)) == fingerprints(x)


def test_distance_and_loss_by_hand() -> None:
    known = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    assert nearest(torch.tensor([[0.0, 0.0], [3.0, 0.0]]), known).tolist() == [0, 3]
    assert losses(torch.zeros(1, 4), torch.tensor([2])).item() == pytest.approx(torch.tensor(4.0).log().item())


def test_false_rejection_at_a_detection_rate() -> None:
    honest, malicious = torch.arange(100.0), torch.arange(50.0, 150.0)
    found = check(honest, malicious, 0.95)
    assert (found.threshold, found.detected, found.false_rejection) == (55, 0.95, 0.45)
    perfect = check(torch.zeros(10), torch.ones(10))
    assert (perfect.detected, perfect.false_rejection) == (1, 0)
    useless = check(torch.ones(10), torch.ones(10))
    assert useless.false_rejection == 1
    assert check(honest, malicious, 1.0).threshold == 50
    with pytest.raises(ValueError, match="both kinds"):
        check(honest, malicious[:0])
    with pytest.raises(ValueError, match="not a number"):
        check(honest, malicious * torch.nan)


def test_checks_on_a_burnt_request(model: nn.Module, digits: dict[str, Rows]) -> None:
    """A hash stops images that were never trained on, and every copy that was stored again with them."""
    x, y = digits["forget"]
    request = burn(model, x, y, *digits["val"], eps=0.1, steps=5)
    stored_again = (x * 255 / 16).round() * 16 / 255
    assert check(unknown(x, x), unknown(request, x)).false_rejection == 0
    assert check(unknown(stored_again, x), unknown(request, x)).false_rejection == 1
    codes = [v.flatten(1) for v in (stored_again, request, x)]
    assert check(nearest(codes[0], codes[2]), nearest(codes[1], codes[2])).false_rejection < 0.05
