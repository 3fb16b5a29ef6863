"""SatImp: weights by hand, constant under the gradient; what they do to sure and to forgotten rows; refusals."""

import math
from typing import Any

import pytest
import torch
from few_rows import Linear, few_rows, probabilities, unlearn
from torch.nn import functional as F
from vislearn.methods.satimp import SatImp, SimImp, SimSat, satimp

from vislearn.errors import UserError
from vislearn.forget import ClassForget, RandomForget

Z = torch.tensor([[2.0, 0.0, -1.0], [0.5, 1.0, 3.0], [-2.0, 0.0, 1.0]], dtype=torch.float64)
Y = torch.tensor([0, 2, 0])
P = Z.softmax(1).gather(1, Y[:, None]).squeeze(1)


@pytest.mark.parametrize(("beta1", "beta2"), [(5.0, 0.1), (1.0, 0.0), (0.0, 0.5), (0.0, 0.0)])
def test_weights_by_hand(beta1: float, beta2: float) -> None:
    z = Z.clone().requires_grad_()
    weight = P**beta1 * (1 - P) ** beta2
    loss = satimp(z, Y, beta1, beta2)
    torch.testing.assert_close(loss, (weight * P.log()).mean())
    (gradient,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(gradient, weight[:, None] * (F.one_hot(Y, 3) - Z.softmax(1)) / 3)  # w is a constant


def test_forgotten_rows_lose_their_weight() -> None:
    for p, least, most in ((0.29, 0.0, 0.003), (0.9, 0.4, 0.6)):
        z = torch.tensor([[math.log(p), math.log(1 - p)]], dtype=torch.float64)
        weight = satimp(z, torch.tensor([0]), 5.0, 0.1) / math.log(p)
        assert least < weight < most


def test_a_saturated_row_keeps_some_weight() -> None:
    z = torch.tensor([[40.0, 0.0]], requires_grad=True)
    loss = satimp(z, torch.tensor([0]), 5.0, 0.1)
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, z)[0]).all()


def test_a_regressor() -> None:
    f, y = torch.tensor([1.0, 3.0, 3.0]), torch.tensor([0.0, 3.0, 2.5])
    p = torch.exp(-((f - y) ** 2) / (2 * 0.5**2))
    expected = torch.where(p < 1, p**2 * (1 - p) ** 0.1 * p.log(), 0).mean()
    torch.testing.assert_close(satimp(f, y, 2.0, 0.1, 0.5), expected)


def test_the_two_halves() -> None:
    assert (SimSat(2.0).beta1, SimSat(2.0).beta2) == (2.0, 0.0)
    assert (SimImp(0.3).beta1, SimImp(0.3).beta2) == (0.0, 0.3)
    assert (SatImp().beta1, SatImp().beta2) == (5.0, 0.1)


@pytest.mark.parametrize("method", [SatImp, SimSat, SimImp])
def test_forgets_and_retains(method: Any) -> None:
    data, model = few_rows(ClassForget([1])), Linear()
    unlearned = unlearn(method(lr=0.1, epochs=10), model, data)
    assert probabilities(unlearned, data).mean() < 0.8 * probabilities(model, data).mean()
    assert probabilities(unlearned, data, "retain").mean() > 0.8 * probabilities(model, data, "retain").mean()


def test_a_smaller_exponent_goes_further() -> None:
    data, model = few_rows(RandomForget(0.3)), Linear()
    left = [probabilities(unlearn(SimSat(b, lr=0.05, retain="none", epochs=20), model, data), data).mean()
            for b in (5.0, 1.0)]  # fmt: skip
    assert left[1] < left[0] < probabilities(model, data).mean()


def test_says_that_sure_rows_have_no_weight() -> None:
    method = SatImp(beta2=1.0, epochs=1)
    unlearn(method, Linear(), few_rows(RandomForget(0.2)))
    assert "from the start" in method.report["warnings"][0]


@pytest.mark.parametrize(("make", "words"), [
    (lambda: SatImp(beta1=-1.0), "--method.beta1=5"), (lambda: SatImp(beta2=math.nan), "--method.beta2=0.1"),
    (lambda: SatImp(grade="zeroth"), "--method.grade="),
    (lambda: SimSat(-1.0), "--method.beta=5"), (lambda: SimImp(math.inf), "--method.beta=0.1"),
])  # fmt: skip
def test_refuses(make: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()
