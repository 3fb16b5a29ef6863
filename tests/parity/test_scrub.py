"""SCRUB, its rewinding and its relatives against the authors' code."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from toy_stream import Wrapped
from vislearn.methods.scrub import SCRUB, rewind_epoch

from vislearn import distill
from vislearn.data import ForgetDataModule, Labels, Memory
from vislearn.learner import linear_rate
from vislearn.metrics.accuracy import accuracy
from vislearn.trainer import Trainer

from .harness import Case, of_kind, rows


class Says(nn.Module):
    """Gives the same logits whatever it is asked."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, x: Tensor) -> Tensor:
        return self.logits


class Sequential(ForgetDataModule):
    """The two sets of a case, read front to back in batches of the size asked for."""

    channels, image_size = 1, 1

    def __init__(self, case: Case, classes: int) -> None:
        super().__init__(val_fraction=0.0)
        self.case, self.num_classes, self.classes = case, classes, tuple(map(str, range(classes)))

    def setup(self, stage: str | None = None) -> None:
        pass

    def source(self, train: bool) -> Memory:
        raise AssertionError("the batches are those of `loader`")

    def labels(self, train: bool) -> Labels:
        return Labels(torch.cat([self.case["y_retain"], self.case["y_forget"]]), self.classes)

    def loader(self, name: Any, train: bool = True, batch_size: int | None = None, held_out: bool = False) -> Any:
        x, y = self.case[f"x_{name}"], self.case[f"y_{name}"]
        return list(rows(x, y, torch.arange(len(y)), batch_size or len(y)))


class Watched(SCRUB):
    """Notes rates, losses and the weights after each pass; the teacher can be another network than the start."""

    def __init__(self, teacher: nn.Module, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.teacher = [teacher]  # in a list, so that it is no part of the module
        self.rates: list[float] = []
        self.passes: list[tuple[str, dict[str, Tensor], float]] = []
        self.sums = {"forget": [0.0, 0], "retain": [0.0, 0]}

    def on_fit_start(self) -> None:
        self.original.load_state_dict({f"net.{k}": v for k, v in self.teacher[0].state_dict().items()})

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(outputs, batch, batch_idx)
        name, (_, y) = batch
        self.rates.append(self.trainer.optimizers[0].param_groups[0]["lr"])
        self.sums[name][0] += outputs["loss"].item() * len(y)
        self.sums[name][1] += len(y)
        loaders: dict[str, list] = self.loaders
        sizes = {k: sum(len(y) for _, y in v) for k, v in loaders.items()}
        if self.sums[name][1] == sizes[name]:
            state = {k: v.clone() for k, v in self.model.net.state_dict().items()}
            self.passes.append((name, state, self.sums[name][0] / sizes[name]))
            self.sums[name] = [0.0, 0]


def run(case: Case, start: nn.Module, teacher: nn.Module, **options: Any) -> tuple[Watched, nn.Module]:
    method, model = Watched(teacher, **options), Wrapped(start)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
                      enable_model_summary=False)  # fmt: skip
    method.unlearn(model, Sequential(case, 4), trainer)
    return method, model.net


def common(case: Case) -> dict[str, Any]:
    h = case.meta["hyperparameters"]
    return {
        "gamma": h["gamma"], "alpha": h["alpha"], "temperature": h["T"], "lr": h["lr"], "momentum": h["momentum"],
        "weight_decay": h["weight_decay"], "epochs": h["epochs"], "batch_size": h["retain_batch"],
        "forget_batch_size": h["forget_batch"], "decay_epochs": h["lr_decay_epochs"],
        "decay_rate": h["lr_decay_rate"],
    }  # fmt: skip


def close(case: Case, mine: dict[str, Tensor], prefix: str) -> None:
    for name, value in mine.items():
        case.close("weights", value, case[prefix + case.stored(name)], f"{prefix} {name}")


@of_kind("loss")
def test_losses_and_their_gradients(case: Case) -> None:
    h, expected = case.meta["hyperparameters"], case.meta["expected"]
    student, teacher, y = case["logits_student"].requires_grad_(), case["logits_teacher"], case["labels"]
    for t, value in expected["kl_by_temperature"].items():
        mine = distill.kl(teacher, student, float(t))
        case.close("value", mine, value, t)
        case.close("grad", torch.autograd.grad(mine, student)[0], case[f"kl_grad_T{float(t):g}"], t)
    method = SCRUB(gamma=h["gamma"], alpha=h["alpha"], temperature=h["T"])
    method.model, method.original = Wrapped(nn.Identity()), Wrapped(Says(teacher))
    climb, back = (method.training_step((name, (student, y)), 0) for name in ("forget", "retain"))
    case.close("value", climb, expected["max_step_loss"])
    case.close("value", back, expected["min_step_loss"])
    case.close("grad", torch.autograd.grad(back, student)[0], case["min_loss_grad"])


@of_kind("epochs")
def test_epochs_alternate_with_one_optimiser(case: Case) -> None:
    expected = case.meta["expected"]
    msteps = case.meta["hyperparameters"]["msteps"]
    method, _ = run(case, case.network("student0."), case.network("teacher."), msteps=msteps, **common(case))
    names = [f"epoch{e}_after_{when}." for e in range(1, method.epochs + 1)
             for when in (("max", "min") if e <= msteps else ("min",))]  # fmt: skip
    assert len(method.passes) == len(names)
    for (_, state, _), prefix in zip(method.passes, names, strict=True):
        close(case, state, prefix)
    for name, key in (("forget", "mean_max_loss_per_epoch"), ("retain", "mean_min_loss_per_epoch")):
        case.close("losses", [loss for which, _, loss in method.passes if which == name], expected[key], name)
    steps = [len(rows) for rows in (case["y_forget"].split(method.forget_batch_size),
                                    case["y_retain"].split(method.batch_size))]  # fmt: skip
    rates = [rate for e, rate in enumerate(expected["lr_per_epoch"], 1)
             for _ in range(sum(steps) if e <= msteps else steps[1])]  # fmt: skip
    assert method.rates == pytest.approx(rates, rel=1e-12)


@of_kind("worst_case_variant")
def test_epochs_apart(case: Case) -> None:
    h = case.meta["hyperparameters"]
    teacher = case.network("teacher.")
    # they count epochs from 0, and climb in those up to m_steps, the last included
    options = common(case) | {"msteps": h["m_steps"] + 1, "decay_epochs": [d + 1 for d in h["lr_decay_epochs"]]}
    method, net = run(case, case.network("teacher."), teacher, variant="worst_case", **options)
    close(case, net.state_dict(), "theta_final.")
    assert [name for name, _, _ in method.passes] == ["forget"] * 2 + ["retain"] * 3


@of_kind("rewind_and_attack")
def test_rewinding_picks_the_epoch(case: Case) -> None:
    chosen = rewind_epoch(case["forget_error_by_epoch"].tolist(), case["validation_error_by_epoch"][-1].item())
    case.close("selected_epoch", chosen, case.meta["expected"]["selected_epoch"])


@of_kind("scrub_kd_loss")
def test_the_corrective_benchmark_distils_at_its_rates(case: Case) -> None:
    for t, value in case.meta["expected"]["kd_loss_by_temperature"].items():
        case.close("all", distill.kl(case["teacher"], case["student"], float(t)), value, t)
    for setting, rates in case.meta["expected"]["lr_at_step"].items():
        steps, base = (float(part.split("=")[1]) for part in setting.split(","))
        for step, rate in rates.items():
            case.close("all", base * linear_rate(int(step), int(steps)), rate, f"{setting} {step}")


@of_kind("methods")
def test_scrub_of_the_corrective_benchmark(case: Case) -> None:
    h, expected = case.meta["hyperparameters"], case.meta["expected"]["Scrub"]
    # they count steps: these are the passes that begin before `msteps`, and those that `iters` steps have room for
    per_f, per_r = -(-h["nf"] // h["bs"]), -(-h["nr"] // h["bs"])
    msteps = sum(e * (per_f + per_r) < h["msteps"] for e in range(h["iters"]))
    epochs = (h["iters"] - msteps * per_f) // per_r
    assert msteps * per_f + epochs * per_r == h["iters"]
    method, net = run(case, case.network(), case.network(), variant="corrective", gamma=1.0, alpha=h["alpha"],
                      temperature=4.0, msteps=msteps, epochs=epochs, lr=h["lr"], batch_size=h["bs"],
                      forget_batch_size=h["bs"])  # fmt: skip
    case.close("lr_at_each_step", method.rates, expected["lr_at_each_step"])
    close(case, net.state_dict(), "Scrub_last/")
    top1 = []
    for _, state, _ in method.passes:
        after = case.network().eval()
        after.load_state_dict(state)
        with torch.no_grad():
            top1.append(accuracy(after(case["x_test"]), case["y_test"]))
    case.close("val_top1", top1, expected["val_top1_after_each_epoch"])
    best = top1.index(max(top1))  # the first of several
    close(case, method.passes[best][1], "Scrub_selected/")
