"""CATNIP: the loss by hand, weights that follow the confidence, regressors, refusals."""

from typing import Any

import pytest
import torch
from few_rows import Linear, few_rows, probabilities, unlearn
from torch import Tensor
from torch.nn import functional as F
from vislearn.methods.catnip import CATNIP, catnip

from vislearn.errors import UserError
from vislearn.forget import ClassForget, RandomForget
from vislearn.preference import log_odds

Z = torch.tensor([[2.0, 0.0, -1.0], [0.5, 1.0, 3.0], [-2.0, 0.0, 1.0]], dtype=torch.float64)
Y = torch.tensor([0, 2, 0])
P = Z.softmax(1).gather(1, Y[:, None]).squeeze(1)


def gradient(loss: Any, z: Tensor = Z) -> Tensor:
    z = z.clone().requires_grad_()
    return torch.autograd.grad(loss(z), z)[0]


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_by_hand(beta: float) -> None:
    expected = (2 / beta * (1 + (P / (1 - P)) ** beta).log()).mean()
    for fixed in (False, True):
        torch.testing.assert_close(catnip(Z, Y, beta, fixed), expected)
    weight = 2 * P**beta / (P**beta + (1 - P) ** beta)
    torch.testing.assert_close(
        gradient(lambda z: catnip(z, Y, beta)), gradient(lambda z: (weight * log_odds(z, Y)).mean())
    )
    torch.testing.assert_close(
        gradient(lambda z: catnip(z, Y, beta, fixed=True)),
        gradient(lambda z: -(weight * F.cross_entropy(z, Y, reduction="none")).mean()),
    )


def test_the_weight_is_twice_the_confidence_at_beta_1() -> None:
    torch.testing.assert_close(gradient(lambda z: catnip(z, Y, 1.0))[torch.arange(3), Y], 2 * P / 3)


def test_only_a_moving_reference_pushes_sure_rows() -> None:
    z, y = torch.tensor([[30.0, 0.0, 1.0]]), torch.tensor([0])
    assert gradient(lambda z: catnip(z, y, 1.0), z)[0, 0] == pytest.approx(2)
    assert gradient(lambda z: catnip(z, y, 1.0, fixed=True), z).abs().max() < 1e-10


def test_a_regressor_that_is_right_has_finite_loss_and_gradient() -> None:
    f, y = torch.tensor([1.0, 2.0, 5.0], requires_grad=True), torch.tensor([1.0, 2.5, 0.0])
    loss = catnip(f, y, 1.0, sigma=0.5)
    (g,) = torch.autograd.grad(loss, f)
    assert torch.isfinite(loss)
    p = torch.exp(-((f - y) ** 2) / (2 * 0.5**2)).detach()
    torch.testing.assert_close(g, -2 * p * (f - y).detach() / 0.5**2 / 3)


def test_needs_no_retain_set() -> None:
    data = few_rows(RandomForget(0.2))
    unlearn(CATNIP(epochs=1), Linear(), data)
    assert data.read == {"forget"}


@pytest.mark.parametrize("reference", ["moving", "fixed"])
def test_forgets_and_retains(reference: Any) -> None:
    data, model = few_rows(ClassForget([1])), Linear()
    unlearned = unlearn(CATNIP(reference=reference, retain="loss", lr=0.1, epochs=10), model, data)
    assert probabilities(unlearned, data).mean() < 0.3 * probabilities(model, data).mean()
    assert probabilities(unlearned, data, "retain").mean() > 0.8 * probabilities(model, data, "retain").mean()


@pytest.mark.parametrize(("option", "words"), [
    ({"beta": -1.0}, "--method.beta=1"), ({"reference": "fixed", "grade": "zeroth"}, "--method.reference=moving"),
    ({"reference": "original"}, "--method.reference=moving"),
])  # fmt: skip
def test_refuses(option: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        CATNIP(**option)
