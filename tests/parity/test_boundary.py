"""Boundary shrink and boundary expanding against the code of the SalUn group."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toy_stream import quiet_trainer
from vislearn.methods.boundary import BoundaryExpand, BoundaryShrink, nearest_class, remove_output, step

from vislearn.data import ForgetDataModule, Labels, Loader, Memory

from .harness import Case, Stack, of_kind


class Rows(ForgetDataModule):
    """The forget rows of a case in their order, in every epoch."""

    channels, image_size = 8, 1

    def __init__(self, case: Case) -> None:
        super().__init__(batch_size=case.meta["hyperparameters"]["batch_size"], val_fraction=0)
        self.x, self.y = case["x_forget"], case["y_forget"]
        self.num_classes = int(self.y.max()) + 1

    def source(self, train: bool) -> Memory:
        return Memory(self.x)

    def labels(self, train: bool) -> Labels:
        return Labels(self.y, tuple(map(str, range(self.num_classes))))

    def loader(self, name: Any, *args: Any, **kwargs: Any) -> Loader:
        return super().loader("train", train=False, batch_size=self.batch_size)

    def ids(self, name: str) -> Tensor:
        return super().ids("train")


def run(method: BoundaryShrink | BoundaryExpand, case: Case) -> Stack:
    model = Stack(case.network("theta0.", "model"))
    return method.unlearn(model, Rows(case), quiet_trainer())  # type: ignore[return-value]


def options(case: Case, rate: str) -> dict[str, Any]:
    h = case.meta["hyperparameters"]
    return {"epochs": h["epochs"], "lr": h[rate], "momentum": h["momentum"], "weight_decay": h["weight_decay"]}


@of_kind("boundary")
def test_adversarial_rows_and_labels(case: Case) -> None:
    net, x, y = case.network("theta0.", "model"), case["x_forget"].requires_grad_(), case["y_forget"]
    (gradient,) = torch.autograd.grad(F.cross_entropy(net(x), y), x)
    moved = step(x.detach(), gradient, case.meta["hyperparameters"]["fgsm_bound"])
    case.close("x_adv", moved, case["x_adv"])
    labels = nearest_class(net(moved), y, exclude_true=False)
    case.close("y_adv", labels, case["y_adv"])
    assert int((labels != y).sum()) == case.meta["expected"]["labels_changed_by_fgsm"]


@of_kind("boundary")
def test_boundary_shrink(case: Case) -> None:
    bound = case.meta["hyperparameters"]["fgsm_bound"]
    model = run(BoundaryShrink(bound, exclude_true=False, **options(case, "lr_bs")), case)
    for name, p in model.net.named_parameters():
        case.close("theta", p, case[f"theta_bs.{name}"], name)


@of_kind("boundary")
def test_boundary_expanding(case: Case) -> None:
    class Given(BoundaryExpand):
        def new_output(self, head: nn.Linear) -> nn.Linear:
            return remove_output(case.network("theta_expanded.", "expanded")[-1])  # type: ignore[arg-type]

    model = run(Given(**options(case, "lr_be")), case)
    for name, p in model.net.named_parameters():  # their release keeps the further output
        case.close("theta", p, case[f"theta_be.{name}"][: len(p)], name)
