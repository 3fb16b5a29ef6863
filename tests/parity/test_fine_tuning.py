"""Retraining, fine-tuning, gradient ascent and l1-sparse fine-tuning against the authors' code."""

import copy
from typing import Any

import lightning
import pytest
from torch import Tensor, nn
from toy_stream import InOrder, Wrapped, quiet_trainer
from vislearn.methods.fine_tune import FineTune
from vislearn.methods.gradient_ascent import GradientAscent
from vislearn.methods.l1_sparse import L1Sparse
from vislearn.methods.retrain import Retrain

from vislearn.method import UnlearningMethod

from .harness import Case, of_kind


class Again(Wrapped):
    """A learner whose new weights are always the case's."""

    def __init__(self, net: nn.Module, **kwargs: Any) -> None:
        super().__init__(net, **kwargs)
        self.net_before, self.arguments = [copy.deepcopy(net)], kwargs  # a list: no part of the network

    def fresh(self) -> "Again":
        return Again(copy.deepcopy(self.net_before[0]), **self.arguments)


def after(method: UnlearningMethod, model: Wrapped, batch_size: int, *callbacks: Any, **sets: Any) -> nn.Module:
    return method.unlearn(model, InOrder(batch_size, **sets), quiet_trainer(callbacks=list(callbacks))).net


def compare(case: Case, group: str, net: nn.Module, prefix: str) -> None:
    for name, p in net.named_parameters():
        case.close(group, p, case[prefix + case.stored(name)], name)


@of_kind("classic_baselines")
def test_l1_sparse(case: Case) -> None:
    h = case.meta["hyperparameters"]["l1"]
    method = L1Sparse(**{k: h[k] for k in ("alpha", "epochs", "lr", "momentum", "weight_decay")})
    net = after(method, Wrapped(case.network()), h["batch_size"], retain=(case["x_retain"], case["y_retain"]))
    compare(case, "theta_l1", net, "theta_l1.")


@of_kind("classic_baselines")
def test_gradient_ascent(case: Case) -> None:
    h = case.meta["hyperparameters"]["ga"]
    method = GradientAscent(**{k: h[k] for k in ("epochs", "lr", "momentum", "weight_decay")})
    net = after(method, Wrapped(case.network()), h["batch_size"], forget=(case["x_forget"], case["y_forget"]))
    compare(case, "theta_ga", net, "theta_ga.")


@of_kind("sgd_recipe")
def test_retraining_of_the_ssd_benchmark(case: Case) -> None:
    h = case.meta["hyperparameters"]
    schedule = {"schedule": "ssd", "milestones": h["milestones"], "gamma": h["gamma"]}
    model = Again(case.network(), lr=h["base_lr"], weight_decay=5e-4,
                  **(schedule if h["milestones"] else {"schedule": "constant"}))  # fmt: skip
    nn.init.zeros_(model.net[-1].weight)  # what the original has become is of no account
    net = after(Retrain(h["epochs"]), model, h["batch_size"], retain=(case["x"], case["y"]))
    compare(case, "weights", net, "final/")


@of_kind("sgd_recipe")
def test_fine_tuning_of_the_ssd_benchmark(case: Case) -> None:
    h = case.meta["hyperparameters"]
    if h["milestones"]:
        pytest.skip("this case lowers the rate at milestones, which fine-tuning does not")
    method = FineTune(epochs=h["epochs"], lr=h["base_lr"])
    net = after(method, Wrapped(case.network()), h["batch_size"], retain=(case["x"], case["y"]))
    compare(case, "weights", net, "final/")


class Rates(lightning.Callback):
    """Sets the rate of every step."""

    def __init__(self, rates: list[float]) -> None:
        self.rates = iter(rates)

    def on_train_batch_start(self, trainer: lightning.Trainer, *args: Any) -> None:
        trainer.optimizers[0].param_groups[0]["lr"] = next(self.rates)


@of_kind("methods")
def test_fine_tuning_of_the_corrective_benchmark(case: Case) -> None:
    """Their CF: the rate of each step is theirs, loss, momentum, weight decay and batch norm are ours."""
    if "CF" not in case.meta["expected"]:
        pytest.skip("this case of kind 'methods' holds no run of CF")
    rates = case.meta["expected"]["CF"]["lr_at_each_step"]
    size = case.meta["hyperparameters"]["batch_size"]

    def repeated(rows: Tensor) -> Tensor:
        """As many rows as the steps read, epoch after epoch."""
        passes = -(-len(rates) * size // len(rows))
        return rows.repeat(passes, *[1] * (rows.ndim - 1))[: len(rates) * size]

    rows = (repeated(case["x_retain"]), repeated(case["y_retain"]))
    net = after(FineTune(epochs=1, lr=rates[0]), Wrapped(case.network()), size, Rates(rates), retain=rows)
    compare(case, "weights", net, "CF_last/")
