"""CUPID: the update by hand, and each stage against its definition."""

import math

import pytest
import torch
from few_rows import Linear, few_rows
from row_steps import batch, deep, rises, row_gradients
from test_zoo import Tiny, learner
from torch import Tensor, nn
from torch.nn import functional as F
from vislearn.methods.cupid import (
    cross_entropy,
    curvature,
    gradients,
    largest,
    numbered,
    partition,
    pathway,
    project,
    rank_correlation,
    routed,
    row_weights,
    sharpness,
)

from vislearn import influence, per_sample
from vislearn.forget import ClassForget

G_1, G_2 = torch.tensor([1.0, 2.0, 0.0, -1.0]), torch.tensor([0.0, 1.0, 1.0, 1.0])
CAUSAL, MASK = torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([True, False, True, False])


# the update


def test_the_update_of_two_rows_by_hand() -> None:
    omega = torch.tensor([0.2, 0.6])
    g_f, weighted = (G_1 + G_2) / 2, (omega[0] * G_1 + omega[1] * G_2) / 2
    torch.testing.assert_close(project(g_f, CAUSAL), torch.tensor([1.0, 1.0, 0.0, 0.0]))
    torch.testing.assert_close(project(weighted, CAUSAL), torch.tensor([0.3, 0.3, 0.0, 0.0]))
    torch.testing.assert_close(routed(g_f, weighted, CAUSAL, MASK), torch.tensor([0.3, 0.5, 0.0, 0.0]))
    torch.testing.assert_close(routed(g_f, omega.mean() * g_f, CAUSAL, MASK), torch.tensor([0.4, 0.5, 0.0, 0.0]))


def test_the_projection_splits_the_gradient_and_forgets_the_length_of_its_direction() -> None:
    torch.manual_seed(0)
    g, weighted, direction = torch.randn(3, 101).double()
    mask = torch.randn(101) > 0
    rest = g - project(g, direction)
    assert abs(float(rest @ direction)) < 1e-12
    torch.testing.assert_close(project(rest, direction), torch.zeros_like(g), atol=1e-12, rtol=0)
    for factor in (1e-3, -7.0, 1e4):
        torch.testing.assert_close(routed(g, weighted, factor * direction, mask), routed(g, weighted, direction, mask))


def test_weights_of_one_and_no_mask_are_plain_ascent() -> None:
    torch.manual_seed(0)
    g, direction = torch.randn(2, 50).double()
    torch.testing.assert_close(routed(g, g, direction, None), g)


def test_without_a_direction_all_of_the_gradient_is_the_rest() -> None:
    zero = torch.zeros(4)
    assert torch.equal(project(G_1, zero), zero)
    assert torch.equal(routed(G_1, 9 * G_1, zero, MASK), torch.where(MASK, zero, G_1))


def test_rows_keep_their_numbers_in_shuffled_batches() -> None:
    data = few_rows(ClassForget(["b"]))
    loader, source = data.loader("forget", batch_size=4), data.rows(train=True)
    seen = []
    for _ in range(2):
        for ids, x, y in numbered(loader, torch.device("cpu")):
            torch.testing.assert_close(x, source[ids])
            assert (y == 1).all()
            seen += ids.tolist()
    assert sorted(seen) == sorted(2 * data.ids("forget").tolist())


def test_gradients_of_pieces_are_those_of_the_batch() -> None:
    model, (x, y) = deep(), batch()
    omega = torch.rand(12)
    each = row_gradients(model, x, y)
    for rows in (1, 5, 12):
        found, loss, accuracy = gradients(model, x, y, torch.stack([torch.ones(12), omega]), rows)
        torch.testing.assert_close(found[0], each.mean(0), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(found[1], (omega[:, None] * each).mean(0), rtol=1e-4, atol=1e-7)
        assert loss == pytest.approx(float(F.cross_entropy(model(x), y).detach()))
        assert accuracy == pytest.approx(float((model(x).argmax(1) == y).float().mean()))


# stage 1


@pytest.mark.parametrize("kind", ["batch norm", "group norm", "vit"])
def test_sharpness_is_its_definition(kind: str) -> None:
    model, data = learner(kind).eval(), Tiny()
    data.setup()
    x, y = next(iter(data.loader("train", train=False, batch_size=3)))
    (omega,), right = sharpness(model.train(), [(x, y)], [0.05])
    assert model.training
    torch.testing.assert_close(omega, rises(model.eval(), x, y, 0.05), rtol=1e-3, atol=1e-6)
    assert torch.equal(right, model(x).argmax(1) == y)


def test_sharpness_is_the_length_of_the_gradient_to_first_order() -> None:
    model, (x, y) = deep().double(), batch()
    x = x.double()
    length = row_gradients(model, x, y).norm(dim=1)
    first, second = (omega - eta * length for omega, eta in zip(sharpness(model, [(x, y)], [2e-3, 1e-3])[0],
                                                                [2e-3, 1e-3], strict=True))  # fmt: skip
    assert (first.abs() < 0.02 * 2e-3 * length).all()
    torch.testing.assert_close(first / second, torch.full_like(first, 4.0), rtol=0.1, atol=0)  # second order in eta


def test_memory_decides_how_many_rows_share_a_pass_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, y) = deep(), batch()
    together, _ = sharpness(model, [(x, y)], [0.01, 0.005])
    monkeypatch.setattr(per_sample, "BUDGET", 2 * 27 * 5)
    torch.testing.assert_close(sharpness(model, [(x[:7], y[:7]), (x[7:], y[7:])], [0.01, 0.005])[0], together)


def test_a_network_that_cannot_be_vectorised_goes_row_by_row() -> None:
    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = deep()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) if float(x.sum()) > 0 else self.inner(2 * x)

    model, (x, y) = Fickle(), batch()
    omega, right = sharpness(model, [(x, y)], [0.01])
    torch.testing.assert_close(omega[0], rises(model, x, y, 0.01), rtol=1e-3, atol=1e-7)
    assert right.shape == (12,)


def test_small_losses_are_told_apart() -> None:
    model = Linear()
    with torch.no_grad():
        model.layer.weight.mul_(5)
    x, y = torch.eye(4)[:3] * torch.tensor([[1.0], [1.2], [1.4]]), torch.arange(3)
    assert F.cross_entropy(model(x), y, reduction="none").max() < 1e-7
    (omega,), _ = sharpness(model, [(x, y)], [0.01])
    assert omega[0] > 2 * omega[1] > 4 * omega[2] > 0


@pytest.mark.parametrize(("n", "k", "k_min", "count"), [
    (40, 5.0, 1, 2), (41, 5.0, 1, 3), (19, 5.0, 1, 1), (19, 5.0, 4, 4), (3, 5.0, 9, 3), (10, 100.0, 1, 10),
    (1000, 0.3, 1, 3),
])  # fmt: skip
def test_how_many_rows_are_causal(n: int, k: float, k_min: int, count: int) -> None:
    assert partition(torch.arange(n).double(), k, k_min).nonzero().flatten().tolist() == list(range(n - count, n))


def test_equal_values_go_in_order_and_negative_ones_last() -> None:
    assert largest(torch.tensor([1.0, 3.0, -2.0, 3.0, 1.0, 0.0]), 3).tolist() == [True, True, False, True, False, False]
    assert partition(torch.tensor([-1.0, -0.5, -2.0]), 5.0).tolist() == [False, True, False]


def test_weights_of_rows() -> None:
    omega = torch.tensor([-1.0, 1.0, 3.0, 0.0])
    assert row_weights(omega).tolist() == [0.0, 1.0, 3.0, 0.0]
    assert row_weights(omega, "mean1").tolist() == [0.0, 1.0, 3.0, 0.0]  # their mean is 1 after the clamping
    assert row_weights(2 * omega, "mean1").mean() == 1
    assert row_weights(-omega.abs(), "mean1").tolist() == [0.0] * 4


def test_rank_correlation() -> None:
    a = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert rank_correlation(a, a**3) == pytest.approx(1)
    assert rank_correlation(a, torch.tensor([1.0, 2.0, 4.0, 3.0])) == pytest.approx(0.8)
    assert rank_correlation(a, torch.ones(4)) is None
    assert rank_correlation(a[:2], a[:2]) is None


# stage 2


@pytest.mark.parametrize("n", [1, 4, 27, 100])
def test_exactly_half_of_the_weights_are_causal(n: int) -> None:
    for scores in (torch.randn(n), torch.zeros(n)):
        mask = pathway(scores, [n], 0.5)
        assert int(mask.sum()) == math.ceil(n / 2)
        assert torch.equal(mask.int() + (~mask).int(), torch.ones(n, dtype=torch.int32))
    assert pathway(torch.zeros(n), [n], 0.5).tolist() == [i < math.ceil(n / 2) for i in range(n)]


def test_each_tensor_can_have_its_own_half() -> None:
    scores = torch.tensor([9.0, 8.0, 7.0, 1.0, 2.0])
    assert pathway(scores, [3, 2], 0.5).tolist() == [True, True, True, False, False]
    assert pathway(scores, [3, 2], 0.5, "tensor").tolist() == [True, True, False, False, True]


def test_the_three_diagonals() -> None:
    model, (x, y) = deep(), batch()
    loader, size = [(x[:5], y[:5]), (x[5:], y[5:])], sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(curvature(model, loader, "fisher"), row_gradients(model, x, y).square().mean(0),
                               rtol=1e-4, atol=1e-8)  # fmt: skip
    expected = torch.zeros(size).double()
    for row in x.split(1):
        p = model(row).detach().double().softmax(1)[0]
        for label in range(3):
            expected += p[label] * row_gradients(model, row, torch.tensor([label]))[0].square() / len(x)
    torch.testing.assert_close(curvature(model, loader, "ggn"), expected, rtol=1e-4, atol=1e-8)
    columns = [influence.hessian_product(model, [(x, y)], cross_entropy, e) for e in torch.eye(size).double()]
    hessian = torch.stack(columns)
    torch.manual_seed(2)
    found = curvature(model, loader, "hutchinson", probes=3)
    torch.manual_seed(2)
    signs = [(torch.randint(2, (size,)) * 2 - 1).double() for _ in range(3)]
    torch.testing.assert_close(found, sum(v * (hessian @ v) for v in signs) / 3, rtol=1e-4, atol=1e-7)
    assert (found < 0).any()
