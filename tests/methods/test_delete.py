"""DELETE: the masked loss by hand, its two parts, and what it does to a class."""

import copy
import math
from typing import Any

import pytest
import torch
from toy_stream import quiet_trainer, taught
from vislearn.methods.delete import DELETE, masked_distillation

from vislearn.datamodules import Digits
from vislearn.forget import ClassForget, Forget, RandomForget
from vislearn.learner import Classifier, Learner


def test_loss_by_hand() -> None:
    # without class 0 the teacher says 3/4 and 1/4; the student says 1/2, 1/4, 1/4
    teacher = torch.tensor([[50.0, math.log(3.0), 0.0]])
    student = torch.tensor([[math.log(2.0), 0.0, 0.0]])
    wanted = 0.75 * math.log(0.75 / 0.25) + 0.25 * math.log(0.25 / 0.25)
    assert masked_distillation(teacher, student, torch.tensor([0])).item() == pytest.approx(wanted)


def test_loss_is_a_forgetting_and_a_retaining_term() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = (2 * torch.randn(6, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    y = torch.arange(6) % 5
    own = torch.nn.functional.one_hot(y, 5).bool()
    forgetting = -(1 - student.softmax(1)[own]).log().mean()
    m, q = (logits[~own].view(6, 4).softmax(1) for logits in (teacher, student))
    retaining = (m * (m / q).log()).sum(1).mean()
    assert masked_distillation(teacher, student, y).item() == pytest.approx((forgetting + retaining).item())


def test_at_the_start_only_the_own_class_is_too_likely() -> None:
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    student, y = logits.clone().requires_grad_(), torch.tensor([0, 1, 2, 3])
    loss = masked_distillation(logits, student, y)
    loss.backward()
    p = logits.softmax(1)[torch.arange(4), y]
    assert loss.item() == pytest.approx(-(1 - p).log().mean().item())
    assert student.grad is not None
    own = student.grad[torch.arange(4), y]
    assert torch.allclose(own, p / 4)
    assert (student.grad < 0).sum() == 4 * 4  # every other class rises


def test_the_teacher_is_left_as_it_is() -> None:
    teacher = torch.randn(3, 4)
    before = teacher.clone()
    masked_distillation(teacher, torch.randn(3, 4), torch.tensor([0, 1, 2]))
    assert torch.equal(teacher, before)


def digits(forget: Forget) -> Digits:
    data = Digits(forget=forget, val_fraction=0.5, augment=False)
    data.setup()
    return data


def known(data: Digits) -> tuple[Learner, Any, Any]:
    """A classifier that has learnt the rows, with the rows."""
    torch.manual_seed(0)
    model = Classifier(arch="mlp", num_classes=10, in_channels=1, image_size=8)
    x, y = next(iter(data.loader("train", train=False, batch_size=2000)))
    return taught(model, x, y), x, y


def run(method: DELETE, model: Learner, data: Digits) -> Learner:
    torch.manual_seed(1)
    return method.unlearn(copy.deepcopy(model), data, quiet_trainer())


def test_forgets_a_class_and_keeps_the_others_without_seeing_them() -> None:
    data = digits(ClassForget([3]))
    model, x, y = known(data)
    method = DELETE()
    after = run(method, model, data)
    right = {name: (m(x).argmax(1) == y).double() for name, m in (("before", model), ("after", after))}
    assert right["before"][y == 3].mean() > 0.95
    assert right["after"][y == 3].mean() < 0.2
    assert right["after"][y != 3].mean() > 0.9
    assert "warnings" not in method.report


def test_says_that_random_rows_are_not_its_aim() -> None:
    data = digits(RandomForget(0.1))
    method = DELETE(epochs=1)
    run(method, known(data)[0], data)
    assert "no whole class" in method.report["warnings"][0]
