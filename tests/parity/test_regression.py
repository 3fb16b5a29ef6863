"""Blindspot unlearning, Gaussian targets and the quantile loss against the authors' code."""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from toy_stream import InOrder, Wrapped, quiet_trainer
from vislearn.methods.blindspot import (
    Blindspot,
    BlindspotTraining,
    attention_difference,
    attention_map,
    blindspot_loss,
)
from vislearn.methods.fine_tune import FineTune
from vislearn.methods.gaussian_fine_tuning import gaussian_targets, moments

from vislearn.method import GradientMethod
from vislearn.metrics import membership as mia
from vislearn.metrics.regression import anamnesis_index, attack_shares, pinball
from vislearn.metrics.relearn import batch_mean
from vislearn.metrics.signals import error_signal

from .harness import Case, of_kind, rows


class Absolute(Wrapped):
    """A learner of values with the absolute error."""

    is_classifier = False

    def loss(self, outputs: Tensor, y: Tensor, reduction: str = "mean") -> Tensor:
        return F.l1_loss(outputs, y, reduction=reduction)


class Batches:
    """Batches in a fixed order; a list would be several loaders to Lightning."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class Losses(lightning.Callback):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
        self.seen.append(float(outputs["loss"]))


class Stored(Blindspot):
    """Blindspot unlearning on batches that a test gives, against a blindspot network that it gives."""

    def __init__(self, batches: list[Any], blindspot: nn.Module, **kwargs: Any) -> None:
        super().__init__(weight_decay=0.0, optimizer="adam", **kwargs)
        self.batches, self.blindspot = batches, blindspot  # type: ignore[assignment]

    def train_stream(self, data: Any) -> Batches:
        return Batches(self.batches)


def activations(case: Case, side: str) -> list[Tensor]:
    return [case[f"{side}_act{k}"].requires_grad_() for k in range(count(case, f"{side}_act"))]


def count(case: Case, prefix: str) -> int:
    return sum(name.startswith(prefix) and name[len(prefix) :].isdigit() for name in case.arrays)


def of_blindspot(case: Case) -> Mapping[str, Any]:
    """The settings of a case of these losses; others of the kind are skipped."""
    if "is_forget" not in case.arrays:
        pytest.skip("this case of kind 'losses' is not about blindspot unlearning")
    return case.meta["hyperparameters"]


@of_kind("losses", topic="regression")
def test_attention_maps_and_their_differences(case: Case) -> None:
    of_blindspot(case)
    forget = case["is_forget"].bool()
    assert count(case, "exp_attmap_student")
    for k, (a, b) in enumerate(zip(activations(case, "student"), activations(case, "blindspot"), strict=True)):
        case.close("all", attention_map(a), case[f"exp_attmap_student{k}"], str(k))
        case.close("all", attention_difference(a, b), case[f"exp_attdiff_all{k}"], str(k))
        case.close("all", attention_difference(a[forget], b[forget]), case[f"exp_attdiff_forget{k}"], str(k))


@of_kind("losses", topic="regression")
@pytest.mark.parametrize("part", ["forget", "batch"])
def test_the_loss_of_a_batch_and_its_gradients(case: Case, part: str) -> None:
    h, forget = of_blindspot(case), case["is_forget"].bool()
    for index, beta in enumerate(next(values for name, values in h.items() if name.startswith("at_beta_values"))):
        out, mine, theirs = (
            case["student_out"].requires_grad_(),
            activations(case, "student"),
            activations(case, "blindspot"),
        )
        target = torch.where(forget[:, None], case["blindspot_out"], case["targets"])
        taken = forget if part == "forget" else torch.ones_like(forget)
        losses = (out - target).abs().squeeze(1)[taken]
        loss = blindspot_loss(losses, forget[taken], [a[forget] for a in mine], [b[forget] for b in theirs], beta)
        case.close("all", loss, case[f"exp_{part}_loss_beta{index}"], f"beta {beta}")
        grads = torch.autograd.grad(loss, [out, *mine], allow_unused=True, materialize_grads=True)
        case.close("all", grads[0], case[f"exp_{part}_grad_out_beta{index}"], f"beta {beta}")
        for k, grad in enumerate(grads[1:]):
            case.close("all", grad, case[f"exp_{part}_grad_act{k}_beta{index}"], f"beta {beta}, layer {k}")


@of_kind("losses", topic="regression")
def test_quantile_loss(case: Case) -> None:
    of_blindspot(case)
    outputs = case["q_pred"].requires_grad_()
    loss = pinball(outputs, case["q_target"], case["q_levels"].tolist())
    case.close("all", loss, case["exp_quantile_loss"])
    case.close("all", torch.autograd.grad(loss, outputs)[0], case["exp_quantile_grad"])


def parts(case: Case, sizes: list[int], keep: Callable[[Tensor], Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Consecutive batches (x, y, is_forget) of the rows that are kept, in stored order."""
    ids = keep(case["is_forget"].bool()).nonzero().flatten()
    for part in ids.split(sizes):
        yield case["x"][part], case["y"][part], case["is_forget"][part].bool()


def retained(case: Case) -> InOrder:
    """The retain set in the batches of the case."""
    data = InOrder(1)
    sizes = case.meta["data"]["blindspot_and_finetune"]["sizes"]
    data.loaders = {"retain": Batches([(x, y) for x, y, _ in parts(case, sizes, torch.logical_not)])}
    return data


def validation(case: Case) -> list[tuple[Tensor, Tensor]]:
    sizes = case.meta["data"]["validation"]["sizes"]
    return list(zip(case["x_val"].split(sizes), case["y_val"].split(sizes), strict=True))


def same_state(case: Case, net: nn.Module, prefix: str) -> None:
    for name, value in net.state_dict().items():
        case.close("weights", value, case[prefix + case.stored(name)], name)


@of_kind("blindspot_train")
def test_training_of_the_blindspot_network(case: Case) -> None:
    h, losses, judged = case.meta["hyperparameters"], Losses(), []

    def judge(net: nn.Module) -> float:
        judged.append(batch_mean(copy.deepcopy(net), validation(case)))
        return judged[-1]

    stage = BlindspotTraining(judge, -math.inf, 1, epochs=h["blindspot_epochs"], lr=h["blindspot_lr"])
    model = Absolute(case.network("blindspot_init/"))
    net = stage.unlearn(model, retained(case), quiet_trainer(callbacks=[losses])).net
    case.close("losses", losses.seen, case["exp_blindspot_step_losses"])
    case.close("losses", judged, case["exp_blindspot_val_loss"])
    assert stage.taken == h["blindspot_epochs"]
    same_state(case, net, "exp_blindspot_trained/")


def mixed(case: Case) -> list[dict[str, tuple[Tensor, Tensor]]]:
    sizes = case.meta["data"]["unlearn"]["sizes"]
    return [{"forget": (x[f], y[f]), "retain": (x[~f], y[~f])}
            for x, y, f in parts(case, sizes, torch.ones_like)]  # fmt: skip


def stored(case: Case) -> tuple[Stored, Absolute]:
    """The method in front of its second stage, and the model that it starts from."""
    h = case.meta["hyperparameters"]
    blindspot = Absolute(case.network("exp_blindspot_trained/")).eval().requires_grad_(False)
    layers = [f"net.{name}" for name in case.meta["networks"]["model"]["activations"]]
    method = Stored(
        mixed(case), blindspot, beta=h["at_beta"], epochs=h["unlearn_epochs"], lr=h["unlearn_lr"], layers=layers
    )
    return method, Absolute(case.network("student_init/"))


@of_kind("blindspot_train")
def test_gradients_of_the_first_step(case: Case) -> None:
    method, model = stored(case)
    method.model = model.train()
    method.training_step(method.batches[0], 0).backward()
    for name, p in model.net.named_parameters():
        case.close("weights", p.grad, case["exp_unlearn_first_grad/" + case.stored(name)], name)


@of_kind("blindspot_train")
def test_unlearning(case: Case) -> None:
    (method, model), losses = stored(case), Losses()
    before = copy.deepcopy(method.blindspot.state_dict())
    net = GradientMethod.unlearn(method, model, InOrder(1), quiet_trainer(callbacks=[losses])).net
    case.close("losses", losses.seen, case["exp_unlearn_step_losses"])
    same_state(case, net, "exp_unlearned/")
    assert all(torch.equal(value, before[name]) for name, value in method.blindspot.state_dict().items())
    with torch.no_grad():
        case.close("weights", net.eval()(case["x_val"]), case["exp_unlearned_val_pred"])
    case.close("losses", batch_mean(net, validation(case)), case["exp_unlearn_val_loss"][-1])


@of_kind("blindspot_train")
def test_fine_tuning_on_the_retain_set(case: Case) -> None:
    h, losses = case.meta["hyperparameters"], Losses()
    method = FineTune(epochs=1, lr=h["unlearn_lr"], optimizer="adam", weight_decay=0.0)
    net = method.unlearn(Absolute(case.network()), retained(case), quiet_trainer(callbacks=[losses])).net
    case.close("losses", losses.seen, case["exp_finetune_step_losses"])
    same_state(case, net, "exp_finetuned/")


@of_kind("gaussian")
def test_gaussian_targets(case: Case) -> None:
    y, forget = case["y_train"], case["y_train"] <= case["threshold"]
    assert torch.equal(forget, case["exp_is_forget"])
    mean, std = moments(y)
    case.close("all", mean, case["exp_mean"])
    case.close("all", std, case["exp_std"])
    y[forget] = gaussian_targets(y, case["standard_normal_draws"])
    case.close("all", y, case["exp_targets"])


def of_regressors(case: Case) -> None:
    if "mia_train_pred" not in case.arrays:
        pytest.skip("this case of kind 'metrics' is not about regressors")


@of_kind("metrics", topic="regression")
def test_shares_of_the_attack(case: Case) -> None:
    of_regressors(case)
    errors = {n: -error_signal(case[f"mia_{n}_pred"], case[f"mia_{n}_y"]) for n in ("train", "test", "forget")}
    shares = attack_shares(errors["train"], errors["test"], errors["forget"])
    for name, share in zip(errors, shares[:3], strict=True):
        case.close("mia_rates", share, case[f"exp_mia_{name}_rate"], name)
    assert shares.forget == mia.regression_attack(*errors.values()).score


@of_kind("metrics", topic="regression")
def test_anamnesis_index_on_copies(case: Case) -> None:
    of_regressors(case)
    h = case.meta["hyperparameters"]

    def linear(name: str) -> nn.Module:
        unit = nn.Linear(case[f"ain_{name}_w"].numel(), 1).double()
        with torch.no_grad():
            unit.weight.copy_(case[f"ain_{name}_w"].view(1, -1))
            unit.bias.fill_(float(case[f"ain_{name}_b"]))
        return unit

    batches, validation = (
        list(
            rows(case[f"ain_x_{n}"], case[f"ain_y_{n}"], torch.arange(len(case[f"ain_x_{n}"])), h["relearn_batch_size"])
        )
        for n in ("train", "val_forget")
    )
    models = [linear(name) for name in ("unlearned", "gold", "full")]
    for _ in range(2):  # nothing is relearned in place, so the second call finds the same
        found = anamnesis_index(*models, batches, validation, h["alpha"], h["relearn_lr"], h["max_epochs"])
        case.close("steps", found[1:3], [case["exp_relearn_steps_unlearned"], case["exp_relearn_steps_gold"]])
        case.close("others", found.value, case["exp_ain"])
    never = anamnesis_index(*models, batches, validation, -2.0, h["relearn_lr"], h["max_epochs"])
    assert never.value is None
    case.close("steps", never.unlearned, case["exp_relearn_steps_unreachable"])
