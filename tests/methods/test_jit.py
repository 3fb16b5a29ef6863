"""JiT: the ratio by hand, a whole pass worked out, the authors' accumulation, train mode, refusals."""

import copy
from typing import Any

import pytest
import torch
from few_rows import Linear, few_rows, unlearn
from torch import Tensor
from vislearn.methods.jit import JiT, slopes

from vislearn.errors import UserError
from vislearn.forget import RandomForget


class Fixed(JiT):
    """Noise that can be computed again: the n-th copy is shifted by (-1)^n n in one feature."""

    drawn = 0

    def noise(self, x: Tensor) -> Tensor:
        self.drawn += 1
        return fixed(self.drawn, x)


def fixed(number: int, x: Tensor) -> Tensor:
    noise = torch.zeros_like(x)
    noise[:, number % 4] = (-1) ** number * number / 4
    return noise


def test_slopes_by_hand() -> None:
    x, x_n = torch.zeros(3, 1, 2, 2), torch.zeros(3, 1, 2, 2)
    x_n[0, 0, 0, 0], x_n[1, 0] = 2.0, 1.0
    outputs = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 1.0]])
    outputs_n = torch.tensor([[0.0, 0.0], [6.0, 8.0], [0.0, 0.0]])
    found = slopes(outputs, outputs_n, x, x_n)
    torch.testing.assert_close(found, torch.tensor([5 / 2, 10 / 2, 0.0]))  # an unchanged image counts 0
    torch.testing.assert_close(slopes(outputs[:, 0], outputs_n[:, 0], x, x_n), torch.tensor([3 / 2, 6 / 2, 0.0]))


def test_the_gradient_is_finite_where_nothing_changes() -> None:
    outputs = torch.ones(2, 3, requires_grad=True)
    x = torch.zeros(2, 4)
    (g,) = torch.autograd.grad(slopes(outputs, torch.ones(2, 3), x, x + torch.tensor([[0.0], [1.0]])).sum(), outputs)
    assert torch.equal(g, torch.zeros(2, 3))


@pytest.mark.parametrize("accumulate", [False, True])
def test_a_pass_is_the_algorithm(accumulate: bool) -> None:
    data, model = few_rows(RandomForget(0.4)), Linear()
    method = Fixed(sigma=0.5, lr=0.02, n=3, accumulate=accumulate, batch_size=8)
    unlearned = unlearn(method, model, data)
    expected = copy.deepcopy(model)
    torch.manual_seed(0)
    drawn, steps, means = 0, 0, []
    for x, _ in data.loader("forget", batch_size=8):
        if not accumulate:
            expected.zero_grad()
        loss = torch.zeros(())
        for _ in range(3):
            drawn += 1
            noisy = (x + 0.5 * fixed(drawn, x)).clamp(x.min(), x.max())
            change = (expected(x) - expected(noisy).detach()).norm(dim=1)
            distance = (x - noisy).norm(dim=1)
            moved = distance > 0
            loss = loss + (change[moved] / distance[moved]).sum() / 3
        loss.backward()
        means.append(loss.item() / len(x))
        steps += 1
        with torch.no_grad():
            for p in expected.parameters():
                p -= 0.02 * p.grad
    assert method.report["steps"] == steps > 1
    assert method.report["lipschitz_first"] == pytest.approx(means[0])
    assert method.report["lipschitz_last"] == pytest.approx(means[-1])
    for mine, theirs in zip(unlearned.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert all(p.grad is None for p in unlearned.parameters())


def test_reads_neither_labels_nor_the_retain_set() -> None:
    data = few_rows(RandomForget(0.4))
    assert not JiT.labels
    unlearn(JiT(), Linear(), data)
    assert data.read == {"forget"}


def test_mode() -> None:
    data, model = few_rows(RandomForget(0.4)), Linear(norm=True)
    moved, still = (unlearn(JiT(n=2, train_mode=mode), model, data).norm for mode in (True, False))
    assert moved.num_batches_tracked == 3  # one batch and its two noisy copies
    assert still.num_batches_tracked == 0
    assert torch.equal(still.running_mean, model.norm.running_mean)


def test_values() -> None:
    unlearned = unlearn(JiT(), Linear(values=True), few_rows(RandomForget(0.4), values=True))
    assert all(torch.isfinite(p).all() for p in unlearned.parameters())


def test_says_that_there_is_nothing_to_flatten() -> None:
    model, method = Linear(), JiT()
    with torch.no_grad():
        model.layer.weight.zero_()
    unlearn(method, model, few_rows(RandomForget(0.4)))
    assert "nothing to flatten" in method.report["warnings"][0]


@pytest.mark.parametrize(("option", "words"), [
    ({"sigma": 0.0}, "--method.sigma=0.5"), ({"n": 0}, "--method.n=25"),
])  # fmt: skip
def test_refuses(option: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        JiT(**option)


def test_refuses_grades_that_see_the_noisy_outputs_move() -> None:
    with pytest.raises(UserError, match=r"--method\.grade="):
        JiT(grade="zeroth")
    with pytest.raises(UserError, match="leave one of them out"):
        JiT(grade="diagonal_second", accumulate=True)
