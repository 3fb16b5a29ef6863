"""UNSIR: the noise, the mixture with retained rows, and which rows those are."""

import copy
from typing import Any

import pytest
import torch
from test_zoo import Tiny, learner, trainer
from torch import Tensor
from toy_data import refusal
from vislearn.methods.unsir import UNSIR, Noisy, error_maximising, regrouped

from vislearn.forget import ClassForget, RandomForget, SubclassForget
from vislearn.learner import Classifier
from vislearn.methods import unsir

SMALL = {"noise_images": 4, "copies": 2, "steps": 2}


def ready(rule: Any) -> Tiny:
    data = Tiny(forget=rule)
    data.setup()
    return data


def mlp() -> Classifier:
    torch.manual_seed(0)
    return Classifier(arch="mlp", num_classes=4, in_channels=1, image_size=8)


def test_the_first_step_follows_the_sign_of_the_gradient() -> None:
    model = mlp().eval()
    start = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    z = start.clone().requires_grad_()
    objective = 0.1 * z.square().sum() / 3 - model.loss(model(z), torch.tensor([2, 2, 2]))
    (gradient,) = torch.autograd.grad(objective, z)
    made, before, after = error_maximising(model, start, 2, steps=1, lr=0.1, penalty=0.1)
    assert torch.allclose(made, start - 0.1 * gradient.sign(), atol=1e-4)  # what Adam's first step is
    assert before == after == pytest.approx(model.loss(model(start), torch.tensor([2, 2, 2])).item())


def test_noise_errs_more_and_costs_no_weight() -> None:
    model = mlp()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    start = torch.randn(8, 1, 8, 8)
    made, before, after = error_maximising(model, start, 1, steps=30, penalty=0.0)
    assert after > before + 1
    assert not made.requires_grad
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    smaller = error_maximising(model, start, 1, steps=30, penalty=10.0)[0]
    assert smaller.norm() < start.norm() < made.norm()


def test_rows_are_regrouped_in_order() -> None:
    batches = [(torch.arange(3.0), torch.arange(3)), (torch.arange(3.0, 5.0), torch.arange(3, 5))]
    found = list(regrouped(batches, [0, 1, 3, 0, 1]))
    assert [y.tolist() for _, y in found] == [[], [0], [1, 2, 3], [], [4]]
    assert all(torch.equal(x, y.float()) for x, y in found)


@pytest.mark.parametrize("rows", [25, 33])
def test_a_pass_shows_each_retained_row_once_and_each_noise_image_as_often_as_told(rows: int) -> None:
    data = ready(ClassForget([1]))
    kept = data.ids("retain")[:rows]
    noise = 1000 + torch.arange(4.0).view(4, 1, 1, 1).expand(4, 1, 8, 8)
    stream = Noisy(data.loader(kept, batch_size=16), noise, torch.tensor([1, 1, 3, 3]), copies=6)
    torch.manual_seed(0)
    batches = list(stream)
    sizes = [len(y) for _, y in batches]
    assert len(stream) == len(batches)
    assert sizes == {25: [16, 16, 17], 33: [16, 16, 16, 9]}[rows]  # no batch of a single row
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    value = x[:, 0, 0, 0]
    shown = value >= 1000
    assert torch.bincount((value[shown] - 1000).long()).tolist() == [6, 6, 6, 6]
    assert y[shown].tolist() == [[1, 1, 3, 3][int(v)] for v in value[shown] - 1000]
    plain = next(iter(data.loader(kept, train=False, batch_size=100)))
    found = {(*row.flatten().tolist(), int(label)) for row, label in zip(x[~shown], y[~shown], strict=True)}
    assert found == {(*row.flatten().tolist(), int(label)) for row, label in zip(*plain, strict=True)}
    assert 0 < shown[:16].sum() < 16  # mixed
    assert not all(torch.equal(a, b) for (a, _), (b, _) in zip(batches, stream, strict=True))  # anew in every pass


def test_retained_rows_are_capped_for_each_class_and_subclass() -> None:
    data = ready(ClassForget([1]))
    kept = UNSIR(rows_per_class=5).retained(data)
    targets = data.labels(train=True).targets
    assert torch.bincount(targets[kept], minlength=4).tolist() == [5, 0, 5, 5]
    assert torch.isin(kept, data.ids("retain")).all()
    assert torch.equal(UNSIR().retained(data), data.ids("retain"))
    assert not torch.equal(kept, UNSIR(rows_per_class=5).retained(data))  # drawn
    halves = ready(SubclassForget(["b2"]))
    fine = halves.labels(train=True).attributes["fine"][0]
    kept = UNSIR(rows_per_class=3).retained(halves)
    assert torch.bincount(fine[kept], minlength=8).tolist() == [3, 3, 3, 0, 3, 3, 3, 3]


@pytest.mark.parametrize(("rule", "steps", "classes"), [
    (ClassForget([1, 3]), 25, [1, 3]), (SubclassForget(["b2"]), 250, [1]),
], ids=["class", "subclass"])  # fmt: skip
def test_steps_depend_on_what_is_forgotten(
    rule: Any, steps: int, classes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int]] = []

    def search(model: Any, start: Tensor, label: int, steps: int, *args: float) -> tuple[Tensor, float, float]:
        asked.append((label, steps))
        return start, 0.0, 1.0

    monkeypatch.setattr(unsir, "error_maximising", search)
    method = UNSIR(noise_images=4, shown=3, copies=2)
    data = ready(rule)
    with data.reading(("retain",)):
        method.unlearn(mlp(), data, trainer())
    assert asked == [(c, steps) for c in classes]
    assert method.report["noise_rows"] == 6 * len(classes)
    assert method.report["retain_rows"] == len(data.ids("retain"))
    assert method.report["noise_loss"] == {str(c): 1.0 for c in classes}


def test_the_class_is_forgotten_and_the_others_are_not() -> None:
    data, model = ready(ClassForget([1])), mlp()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    x, y = next(iter(data.loader("train", train=False, batch_size=100)))
    for _ in range(30):
        optimizer.zero_grad()
        model.loss(model(x), y).backward()
        optimizer.step()
    model.zero_grad()
    assert (model(x).argmax(1) == y).all()
    weak = UNSIR(lr=1e-7)
    weak.unlearn(copy.deepcopy(model), data, trainer())
    assert "--method.lr than 1e-07" in weak.report["warnings"][0]
    torch.manual_seed(0)
    method = UNSIR(lr=0.01, epochs=5)
    right = method.unlearn(model, data, trainer())(x).argmax(1) == y
    assert "warnings" not in method.report
    assert method.report["impaired_share"] > 0.9
    assert right[y == 1].float().mean() < 0.5
    assert right[y != 1].float().mean() > 0.9


def test_noise_does_not_outnumber_the_retained_rows() -> None:
    data = ready(ClassForget([1]))
    for images in (20, 100):
        method = UNSIR(steps=1, noise_images=images)
        method.unlearn(mlp(), data, trainer())
        assert method.report["noise_rows"] == {20: len(data.ids("retain")) // 20 * 20, 100: 100}[images]


def test_modes_are_kept_while_noise_is_sought() -> None:
    model = learner("batch norm").train()
    model.network.bn1.eval()
    modes = [m.training for m in model.modules()]
    seen: list[bool] = []
    hook = model.network.layer1.register_forward_hook(lambda m, *args: seen.append(m.training))
    UNSIR(train_mode=False, **SMALL).noise(model, 1, torch.Size((1, 8, 8)), 2)
    UNSIR(**SMALL).noise(model, 1, torch.Size((1, 8, 8)), 2)
    hook.remove()
    assert seen == [False, False, True, True]
    assert [m.training for m in model.modules()] == modes


def test_noise_that_is_no_harder_is_said() -> None:
    method, model = UNSIR(noise_images=4), mlp()
    with torch.no_grad():
        model.network.head.weight.zero_()  # whatever the images, the answer is the same
    method.noise(model, 1, torch.Size((1, 8, 8)), 3)
    assert "--method.steps" in method.report["warnings"][0]


def test_what_cannot_be_done_is_refused() -> None:
    assert "UNSIR" in refusal(lambda: UNSIR().check(learner("group norm"), ready(RandomForget(0.2))))
    UNSIR().check(learner("group norm"), ready(SubclassForget(["b2"])))
    for name in ("steps", "copies", "rows_per_class", "repair_epochs"):
        assert f"--method.{name}" in refusal(lambda name=name: UNSIR(**{name: 0}))
    assert "--method.shown" in refusal(lambda: UNSIR(noise_images=3, shown=4))
    assert "--method.repair_lr" in refusal(lambda: UNSIR(repair_lr=0))
    assert "--method.penalty" in refusal(lambda: UNSIR(penalty=-1))
