"""The search for worst-case forget sets against numbers of the authors' code."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_stream import Wrapped

from vislearn import worst_case_steps as steps
from vislearn.data import ForgetDataModule, Labels, Memory
from vislearn.worst_case import Settings, search

from .harness import Case, of_kind


class InOrder(ForgetDataModule):
    """The rows of a case, of which every pass visits the first first."""

    channels, image_size, classes = 1, 1, ("a", "b", "c")

    def __init__(self, case: Case) -> None:
        super().__init__(val_fraction=0.0, batch_size=case.meta["hyperparameters"]["batch_size"])
        self.x, self.y, self.num_classes = case["x"], case["y"], 3

    def source(self, train: bool) -> Memory:
        return Memory(self.x)

    def labels(self, train: bool) -> Labels:
        return Labels(self.y, self.classes)

    def loader(self, name: Any, train: bool = True, *args: Any, **kwargs: Any) -> Any:
        return super().loader(name, False, *args, **kwargs)


@of_kind("projection")
def test_projection(case: Case) -> None:
    for a, m, exact, official in zip(case["input"], case["budget"].tolist(), case["exact"], case["official_float64"],
                                     strict=True):  # fmt: skip
        case.close("exact", steps.project(a, m), exact)
        case.close("official_float64", steps.project_bisection(a, m), official)


@of_kind("bilevel_step")
def test_levels_one_by_one(case: Case) -> None:
    h = case.meta["hyperparameters"]
    model = Wrapped(case.network())
    data = InOrder(case)
    w = case["w0"]

    def batches() -> list[tuple[Tensor, Tensor, Tensor]]:
        parts = torch.arange(h["n"]).split(h["batch_size"])
        return [(rows, data.x[rows], data.y[rows]) for rows in parts]

    optimizer = steps.SignSGD(model.parameters(), h["lower_lr"])
    for state in ("theta_after_1_epoch.", "theta_after_lower."):
        steps.lower_level(model, [batches()], w, optimizer)
        for name, value in model.net.state_dict().items():
            case.close("theta", value, case[state + name], state + name)
    losses = steps.unlearned_losses(model, batches(), h["n"])
    case.close("per_sample_loss", losses, case["per_sample_loss"])
    for direction, key in (("hardest", "w_after_upper"), ("easiest", "w_after_upper_easiest")):
        for projection in ("exact", "bisection"):
            after = steps.upper_step(w, losses, h["budget_m"], h["upper_lr"], h["gamma"], direction, projection)
            case.close("w", after, case[key], f"{direction}, {projection}")
            if direction == "hardest":
                case.close("w", after @ losses, case.meta["expected"]["upper_loss_first"])


@of_kind("bilevel_step")
@pytest.mark.parametrize("projection", ["exact", "bisection"])
def test_rounds(case: Case, projection: Any, tmp_path: Path) -> None:
    h, expected = case.meta["hyperparameters"], case.meta["expected"]
    start = case["w0"].nonzero().flatten()
    for rounds in range(1, h["rounds"] + 1):
        settings = Settings(budget=h["budget_m"], alpha=h["upper_lr"], gamma=h["gamma"], rounds=rounds,
                            epochs=h["lower_epochs_per_round"], lr=h["lower_lr"],
                            projection=projection)  # fmt: skip
        found = search(Wrapped(case.network()), InOrder(case), settings, start, tmp_path / "state")
        case.close("w", found.w, case["run_w"][rounds - 1])
        if projection == "bisection":  # the sum of w differs a little from round to round, and the objective with it
            case.close("w", [c["objective"] for c in found.curve], expected["run_upper_loss"][:rounds])
        case.close("binary", torch.isin(torch.arange(h["n"]), found.rows).double(), case["run_binary"][rounds - 1])
    assert found.rows.tolist() == expected["final_forget_indices"]


@of_kind("step_size_sensitivity")
def test_a_short_step_never_leaves_the_start(case: Case) -> None:
    h, losses = case.meta["hyperparameters"], case["loss"]
    for alpha, expected in case.meta["expected"].items():
        w = torch.zeros(h["n"], dtype=torch.float64)
        w[case["initial_indices"]] = 1
        for _ in range(h["rounds"]):
            w = steps.upper_step(w, losses, h["budget_m"], float(alpha), h["gamma"])
        chosen, _ = steps.top(w, h["budget_m"])
        for name, key in (("initial", "overlap_with_initial"), ("lowest_loss", "overlap_with_lowest_loss")):
            case.close("overlap", torch.isin(chosen, case[f"{name}_indices"]).sum(), expected[key], f"{alpha} {name}")
