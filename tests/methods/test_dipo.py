"""DiPO: the short form of the loss against its definition, its gradient, what it does, refusals."""

from typing import Any

import pytest
import torch
from few_rows import Linear, few_rows, probabilities, unlearn
from torch import Tensor
from torch.nn import functional as F
from vislearn.methods.dipo import DiPO, dipo

from vislearn.errors import UserError
from vislearn.forget import ClassForget
from vislearn.learner import Classifier

Z = torch.tensor([[2.0, 0.0, -1.0, 0.5], [0.5, 1.0, 3.0, 0.0], [-2.0, 0.0, 1.0, 4.0]], dtype=torch.float64)
Z_O = torch.tensor([[3.0, 0.0, 1.0, 2.0], [0.0, 1.0, 4.0, 0.5], [1.0, 0.0, 1.5, 3.0]], dtype=torch.float64)
Y = torch.tensor([0, 2, 1])


def kl(q: Tensor, p: Tensor) -> Tensor:
    return (q * (q / p).log()).sum(1)


def defined(z: Tensor, chosen: Tensor, beta: float, a: float) -> Tensor:
    remember, forget = (Z_O + a * chosen).softmax(1), (Z_O - a * chosen).softmax(1)
    p, p_o = z.softmax(1), Z_O.softmax(1)
    gain = kl(remember, p) - kl(remember, p_o) - kl(forget, p) + kl(forget, p_o)
    return -F.logsigmoid(beta * gain).mean()


@pytest.mark.parametrize(("k", "chosen"), [
    (1, [[1, 0, 0, 0], [0, 0, 1, 0], [0, 1, 0, 0]]),
    (2, [[1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1]]),
])  # fmt: skip
def test_dipo_is_its_definition(k: int, chosen: list[list[int]]) -> None:
    for beta, a in ((0.5, 2.0), (1.0, 3.0)):
        z = Z.clone().requires_grad_()
        mine, theirs = dipo(z, Z_O, Y, beta, a, k), defined(z, torch.tensor(chosen), beta, a)
        torch.testing.assert_close(mine, theirs)
        torch.testing.assert_close(torch.autograd.grad(mine, z)[0], torch.autograd.grad(theirs, z)[0])


def test_a_first_step_moves_from_what_remembers_to_what_forgets() -> None:
    z = Z_O.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(dipo(z, Z_O, Y, 0.5, 10.0), z)
    shift = 10 * F.one_hot(Y, 4)
    direction = (Z_O - shift).softmax(1) - (Z_O + shift).softmax(1)
    torch.testing.assert_close(-gradient, 0.5 * 0.5 * direction / 3)


def test_the_gradient_is_there_for_sure_rows() -> None:
    z = torch.tensor([[9.0, 0.0, 1.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(dipo(z, z.detach(), torch.tensor([0]), 0.5), z)
    assert gradient[0, 0] > 0.2
    assert gradient[0, 2] < gradient[0, 1] < 0, "the runner-up gains most"


def test_forgets_and_retains() -> None:
    data, model = few_rows(ClassForget([1])), Linear()
    unlearned = unlearn(DiPO(lr=0.1, epochs=10), model, data, check=False)  # a learner of its own kind
    assert probabilities(unlearned, data).mean() < 0.3 * probabilities(model, data).mean()
    assert probabilities(unlearned, data, "retain").mean() > 0.8 * probabilities(model, data, "retain").mean()


@pytest.mark.parametrize(("option", "words"), [
    ({"beta": 0.0}, "--method.beta"), ({"a": -1.0}, "--method.a=10"), ({"k": 0}, "--method.k=1"),
])  # fmt: skip
def test_refuses(option: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        DiPO(**option)


def test_refuses_every_class_at_once() -> None:
    data = few_rows(ClassForget([1]))
    model = Classifier("mlp", num_classes=3, in_channels=1, image_size=2)
    DiPO(k=2).check(model, data)
    with pytest.raises(UserError, match="k=3 leaves none of 3 classes"):
        DiPO(k=3).check(model, data)
