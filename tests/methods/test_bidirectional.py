"""Bidirectional distillation: the lowered teacher and both directions by hand, and what they do to a class."""

import copy
import math
from typing import Any

import pytest
import torch
from toy_stream import quiet_trainer, taught
from vislearn.methods.bidirectional import BidirectionalDistillation, lowered

from vislearn import distill
from vislearn.datamodules import Digits
from vislearn.errors import UserError
from vislearn.forget import ClassForget, RandomForget
from vislearn.learner import Classifier, Learner

Y_F = torch.tensor([3, 1])
X_F, X_R = (torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(n)) for n in (2, 5))
BATCH = {"forget": (X_F, Y_F), "retain": (X_R, torch.zeros(5, dtype=torch.long))}


def learner(seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    return Classifier(arch="mlp", num_classes=10, in_channels=1, image_size=8)


def bound(method: BidirectionalDistillation) -> BidirectionalDistillation:
    method.model, method.original = learner(0), learner(1)
    return method


def test_lowered_by_hand() -> None:
    logits, y = torch.tensor([[5.0, 1.0, 3.0], [0.0, 2.0, -1.0]]), torch.tensor([0, 2])
    assert lowered(logits, y).tolist() == [[1, 1, 3], [0, 2, 0]]
    assert lowered(logits, y, "mean").tolist() == [[2, 1, 3], [0, 2, 1]]
    assert logits[0, 0] == 5  # a copy


def test_lowered_never_leaves_the_own_class_on_top() -> None:
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(0))
    y = logits.argmax(1)
    for to in ("min", "mean"):
        assert (lowered(logits, y, to).argmax(1) != y).all()  # type: ignore[arg-type]


@pytest.mark.parametrize(("alpha", "beta", "t"), [(1.0, 0.5, 1.0), (0.3, 0.2, 2.0), (0.0, 1.0, 1.0), (2.0, 0.0, 4.0)])
def test_loss_is_the_three_terms(alpha: float, beta: float, t: float) -> None:
    m = bound(BidirectionalDistillation(alpha=alpha, beta=beta, temperature=t, lowered_to="mean"))
    s, z = m.model(X_F), lowered(m.original(X_F), Y_F, "mean")
    wanted = alpha * distill.kl(m.original(X_R), m.model(X_R), t)
    wanted = wanted + (1 - beta) * distill.kl(z, s, t) + beta * distill.kl(s, z, t)
    assert m.training_step(BATCH, 0).item() == pytest.approx(wanted.item(), rel=1e-6)


def test_suppression_is_what_weighs_where_the_model_is_sure() -> None:
    # the model is sure of class 0, which the teacher has lowered
    teacher = lowered(torch.tensor([[9.0, 1.0, 0.0]]), torch.tensor([0]))
    student = torch.tensor([[9.0, 1.0, 0.0]], requires_grad=True)
    gradient = torch.autograd.grad(distill.kl(student, teacher), student)[0]
    assert gradient[0, 0] > 0  # descent lowers it
    assert distill.kl(student, teacher).item() <= -teacher.log_softmax(1).min().item()  # bounded by the teacher alone


def test_comes_to_rest_at_the_teacher() -> None:
    m = bound(BidirectionalDistillation(alpha=0.0))
    target = lowered(m.original(X_F), Y_F).detach().requires_grad_()
    both = distill.kl(target.detach(), target) + distill.kl(target, target.detach())
    assert both.item() == pytest.approx(0, abs=1e-6)
    assert torch.autograd.grad(both, target)[0].abs().max() < 1e-6


def digits(forget: Any = None) -> Digits:
    data = Digits(forget=forget or ClassForget([3]), val_fraction=0.5, augment=False)
    data.setup()
    return data


def run(method: BidirectionalDistillation, model: Learner, data: Digits) -> Learner:
    torch.manual_seed(1)
    return method.unlearn(copy.deepcopy(model), data, quiet_trainer())


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_forgets_a_class_that_it_knew_in_each_direction(beta: float) -> None:
    data, model = digits(), learner()
    x, y = next(iter(data.loader("train", train=False, batch_size=2000)))
    taught(model, x, y)
    method = BidirectionalDistillation(beta=beta)
    after = run(method, model, data)
    right = (after(x).argmax(1) == y).double()
    assert right[y == 3].mean() < 0.2
    assert right[y != 3].mean() > 0.9
    assert "warnings" not in method.report


def test_says_that_random_rows_are_not_its_aim() -> None:
    method = BidirectionalDistillation(epochs=1)
    run(method, learner(), digits(RandomForget(0.1)))
    assert "no whole class" in method.report["warnings"][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -1.0}, r"--method\.alpha"), ({"beta": 1.5}, r"--method\.beta"),
        ({"temperature": math.inf}, r"--method\.temperature"), ({"lowered_to": "max"}, r"--method\.lowered_to"),
    ],
)  # fmt: skip
def test_refuses(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        BidirectionalDistillation(**options)


def test_refuses_two_classes() -> None:
    data = digits()
    data.num_classes = 2
    with pytest.raises(UserError, match="--method=DELETE"):
        BidirectionalDistillation().check(learner(), data)
